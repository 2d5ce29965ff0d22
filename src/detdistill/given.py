"""Models as users give them: names, paths and URLs, results of earlier calls, and detectors in memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detdistill.cache.storage import is_url, masked, url_of
from detdistill.errors import DetdistillError, ModelError, RunError
from detdistill.results import Distilled

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from detdistill.detectors.contract import Detector


def name_or_detector(model: Any, what: str = "model") -> str | Detector:
    """A model string or path as text, or the detector itself.

    Args:
        model: a model string, a path, a URL (then the path of a local copy), the result of ``train`` or ``distill`` (then the
            path of its run folder), a ``Detector`` (also a wrapped model), or a ``Teacher``.
        what: role of the model, for messages.

    Raises:
        ModelError: anything else, or a result with several runs.
    """
    if isinstance(model, str | Path):
        return local_copy(model)
    if isinstance(model, Distilled):
        distilled = [run for run in model.runs if len(model.runs) == 1 or run.name.startswith("distilled")]
        if len(distilled) != 1:
            some = (distilled or model.runs)[0]
            raise ModelError(f"{what}: this result has {len(model.runs)} runs; give one of its .runs, e.g. {some}")
        return str(distilled[0])
    from torch import nn

    from detdistill.detectors.contract import Detector, Teacher
    from detdistill.training.run import Run

    if isinstance(model, Run):
        return str(model.folder)
    if isinstance(model, Teacher):
        return model.detector
    if isinstance(model, Detector):
        return model
    if isinstance(model, nn.Module):
        raise ModelError(f"{what}: a {type(model).__name__} is no detector yet; wrap it: detdistill.wrap(model, taps=[...], ...)")
    raise ModelError(
        f"{what}: a {type(model).__name__} is no model; give a model string, a path, a result of train or distill, or a detector"
    )


def run_folders(given: Any) -> list[str]:
    """Paths of runs as users give them; of URLs the paths of local copies.

    Args:
        given: one or several of: a path or URL, the result of ``train``, or of ``distill`` (all its runs).

    Raises:
        RunError: anything else, or nothing.
    """
    folders: list[str] = []
    for one in given if isinstance(given, list | tuple) else [given]:
        if isinstance(one, str | Path):
            folders.append(local_copy(one))
        elif isinstance(one, Distilled):
            folders += map(str, one.runs)
        elif _is_run(one):
            folders.append(str(one.folder))
        else:
            raise RunError(f"runs: a {type(one).__name__} is no run; give run folders, or results of train or distill")
    if not folders:
        raise RunError("runs: none is given; give run folders, or results of train or distill")
    return folders


def _is_run(value: Any) -> bool:
    from detdistill.training.run import Run  # brings PyTorch, which runs given by their paths do not need

    return isinstance(value, Run)


def local_copy(name: str | Path) -> str:
    """A path or model string as it is; of a URL the path of a local copy, see ``kept_copy``."""
    if not is_url(str(name)):
        return str(name)
    from detdistill.training.kept_runs import kept_copy  # imported here: it imports torch, and names are mostly local

    return kept_copy(name)


def name_of(model: Any, what: str = "model") -> str:
    """A model string or path as text, for what needs a model on disk.

    Raises:
        ModelError: a detector in memory, and see ``name_or_detector``.
    """
    found = name_or_detector(model, what)
    if not isinstance(found, str):
        raise ModelError(f"{what}: a detector in memory has no folder; give the run, the student folder or the model string")
    return found


def student_of(model: Any, what: str = "student") -> tuple[str, Callable[[], Detector] | None]:
    """The name of a student, and for a model given in Python what builds it (None: the name is a model string).

    Args:
        model: a model string, a detector, or a function that builds one (see ``own_student``).
        what: role of the model, for messages.

    Raises:
        ModelError: anything else, or a student that cannot be trained, evaluated or copied.
    """
    if isinstance(model, str):
        return model, None
    from detdistill.detectors.contract import Teacher
    from detdistill.training.own_models import is_own, own_student

    if isinstance(model, Teacher):
        raise ModelError(f"{what}: a Teacher is frozen; give a model string, a detector, or a function that builds one")
    if is_own(model):
        own = own_student(model)
        return own.name, own.build
    raise ModelError(
        f"{what}: a {type(model).__name__} cannot be trained; give a model string, a detector (also a wrapped model), or a "
        "function that builds one"
    )


def teacher_of(model: Any) -> tuple[str | None, str | Detector | None]:
    """The name of a teacher, and what is to be loaded (a name) or used (a detector).

    Raises:
        ModelError: see ``name_or_detector``.
    """
    if model is None:
        return None, None
    found = name_or_detector(model, "teacher")
    if isinstance(found, str):
        return masked(url_of(str(model))) if isinstance(model, str | Path) and is_url(str(model)) else found, found
    from detdistill.detectors.options import OWN

    return f"{OWN}:{found.spec.name}", found


def teachers_of(model: Any, method: str) -> tuple[str | None, dict[str, str | Detector]]:
    """The teachers' names as text, and what is to be loaded (a name) or used (a detector), by name.

    Args:
        model: as for ``teacher_of``; a single teacher has the empty name. Several as the text ``a=RUN1,b=RUN2`` or as a dict.
        method: the methods, whose ``@NAME`` tell a teacher ``a=`` from a setting of a model string (``weights=``).

    Raises:
        ModelError: see ``name_or_detector``; or a name is given twice, or is no name; the message names the teacher.
    """
    if isinstance(model, str):
        from detdistill.methods.shared.catalogue import named_teachers

        pairs = _split_teachers(model, named_teachers(method))
    elif isinstance(model, Mapping):
        pairs = list(model.items())
        wrong = [name for name, _ in pairs if not (isinstance(name, str) and name.isidentifier())]
        if wrong or not pairs:
            raise ModelError(
                f"teacher: {wrong[0]!r} is no name of a teacher; write e.g. a" if wrong else "teacher: a dict without teachers"
            )
    else:
        name, source = teacher_of(model)
        return name, {} if source is None else {"": source}
    twice = [name for index, (name, _) in enumerate(pairs) if name in [other for other, _ in pairs[:index]]]
    if twice:
        raise ModelError(f"teacher: two teachers are named {twice[0]}; give each a name of its own, e.g. a=RUN1,b=RUN2")
    found: dict[str, str | Detector] = {}
    texts = []
    for name, one in pairs:
        with about_teacher(name):
            text, source = teacher_of(one)
            if source is None or source == "":
                raise ModelError("there is no model behind its name; write e.g. a=RUN1,b=RUN2")
        found[name] = source
        texts.append(f"{name}={text}" if name else str(text))
    return ",".join(texts), found


@contextlib.contextmanager
def about_teacher(name: str) -> Iterator[None]:
    """Context in which the errors of a named teacher begin with its name."""
    try:
        yield
    except DetdistillError as error:
        if not name:
            raise
        raise type(error)(f"teacher {name}: {error}") from error


def _split_teachers(text: str, used: Sequence[str]) -> list[tuple[str, str]]:
    """Names and models of ``a=RUN1,b=RUN2``; one model without a name if the text does not begin with ``NAME=``.

    Behind a model string (``b=torchvision:NAME,weights=DEFAULT``), a word before ``=`` is a teacher only if a method uses it.
    """
    first, equals, _ = text.partition("=")
    if not (equals and first.strip().isidentifier()) or Path(text).exists():
        return [("", text)]
    pairs: list[tuple[str, str]] = []
    for piece in text.split(","):
        name, equals, model = (part.strip() for part in piece.partition("="))
        if not pairs or (equals and name.isidentifier() and (name in used or ":" not in pairs[-1][1])):
            pairs.append((name, model))
        else:
            pairs[-1] = (pairs[-1][0], f"{pairs[-1][1]},{piece.strip()}")
    return pairs


def open_detector(
    model: Any, classes: Sequence[str] | None = None, device: str | None = None, *, fresh: bool = False
) -> Detector:
    """The detector of a model as in ``name_or_detector``; names and paths are loaded, exported files are opened.

    Args:
        model: see ``name_or_detector``.
        classes: class names for model strings without weights; a loaded detector must have as many.
        device: device of the runtime of an exported file; None: cpu.
        fresh: a model string without weights is built with random ones, of 80 classes without ``classes``.

    Raises:
        ModelError: see ``name_or_detector`` and ``load_detector``.
    """
    from detdistill.detectors.load import check_class_count, load_detector
    from detdistill.export.file_detector import load_file
    from detdistill.export.formats import is_file

    found = name_or_detector(model)
    if not isinstance(found, str):
        check_class_count(found.spec.name, found.spec.classes, classes)
        return found
    if is_file(found):
        return load_file(found, classes, device or "cpu")
    if fresh and ":" in found and classes is None and "weights=" not in found and not found.startswith("hf:"):
        from detdistill.detectors.build import build_detector

        return build_detector(found, [f"class {number}" for number in range(80)])
    return load_detector(found, classes)
