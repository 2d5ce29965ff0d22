"""Tables about methods, from what the methods say of themselves. No detector of the library is built for them.

What a method trains, and its earlier stages, are found by building it for the tiny detectors of the tests.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import detdistill.losses
from detdistill.cache.identity import knowledge_of
from detdistill.detectors.contract import CAPABILITIES, Teacher
from detdistill.listing import list_recipes
from detdistill.methods.shared.catalogue import method_slugs
from detdistill.methods.shared.compose import method_class, parse_methods
from detdistill.methods.shared.contract import Method
from detdistill.methods.shared.hyper_parameters import checked_settings, hyper_parameters
from detdistill.methods.shared.needs import Needs, PairError
from detdistill.structures import WHOLE_TOWER, Clock, Look
from detdistill.values import in_words
from markdown_text import described_arguments, first_sentence, plain, table

ROOT = Path(__file__).resolve().parent.parent
NEVER, DIFFERENT, ALWAYS = "no", "where channels differ", "yes"


# ----------------------------------------------------------------------------------------------------- of all methods


def methods_table(folder: str) -> str:
    """The table of all methods: slug, linked to its page in ``folder``, and paper."""
    rows = ((f"[`{slug}`]({folder}{slug}.md)", method_class(slug).title) for slug in method_slugs())
    return table(("method", "paper"), *rows)


def properties_table() -> str:
    """The table of all methods' requirements, trained modules and stages, with default hyper-parameters."""
    head = (
        "method",
        "teacher",
        "student",
        "parts read: teacher / student",
        "compares",
        "own trained modules",
        "earlier stages",
        "works from a cache alone",
    )
    return table(head, *map(_properties, method_slugs()))


def _properties(slug: str) -> tuple[str, ...]:
    needs, built = needs_of(slug), built_parts(slug)
    trains = sorted(set(built.trains.values()), key=[NEVER, DIFFERENT, ALWAYS].index)[-1] if built.trains else NEVER
    compared = [what for what, yes in (("classes", needs.same_classes), ("cells", needs.same_cells)) if yes]
    return (
        f"[`{slug}`]({slug}.md)",
        "none" if needs.teacher is None else _families(needs.teacher_families),
        _families(needs.student_families),
        f"{'-' if needs.teacher is None else _looks(needs.teacher)} / {_looks(needs.student)}",
        " and ".join(compared) or "-",
        trains if built.found else "?",
        (", ".join(f"`{name}`" for name in built.stages) or "-") if built.found else "?",
        "no" if needs.why_live() else "yes" if _teaches(slug) else "no teacher output",
    )


# ------------------------------------------------------------------------------------------------------ of one method


def tables_of(slug: str) -> dict[str, str]:
    """All tables of a method's page, by name."""
    return {
        "about": about(slug),
        "requirements": requirements_table(slug),
        "hyperparameters": hyperparameters_table(slug),
        "recipes": recipes_table(slug),
        "losses": losses_table(slug),
    }


def about(slug: str) -> str:
    """The line with a method's paper and source."""
    path = Path(inspect.getfile(method_class(slug))).relative_to(ROOT)
    return f"*{method_class(slug).title}*. Source: [`{path}`](../../{path}). [All methods](README.md).\n"


def requirements_table(slug: str) -> str:
    """The table of a method's requirements, trained modules and stages, with default hyper-parameters."""
    needs, built = needs_of(slug), built_parts(slug)
    rows = [
        ("teacher", _side(needs.teacher, needs.teacher_families, needs.teacher_capabilities, needs.box_distributions)),
        ("student", _side(needs.student, needs.student_families, needs.student_capabilities, needs.box_distributions)),
    ]
    if needs.teacher is not None:
        anchors = "with the same anchors" if needs.same_anchors else "with as many anchors"
        cells = f"compared: both sides have the same strides, {anchors}" if needs.same_cells else "not compared"
        rows += [("class scores", _classes(needs)), ("single cells", cells)]
    rows.append(("cache", _cache(slug, needs)))
    if built.found:
        parts = [f"`{name}`" + (f" ({when})" if when == DIFFERENT else "") for name, when in built.trains.items()]
        rows.append(("trained modules of the method", ", ".join(parts) or "nothing"))
        rows.append(("stages before `distill`", ", ".join(f"`{name}`" for name in built.stages) or "none"))
    return table(("with default settings", ""), *rows)


def hyperparameters_table(slug: str) -> str:
    """The table of a method's hyper-parameters: name, type, default and meaning."""
    kind: Any = method_class(slug)
    words = described_arguments(kind.__init__)
    rows = [(f"`{n}`", in_words(p.kind), f"`{plain(p.default)}`", words[n]) for n, p in hyper_parameters(kind).items()]
    return table(("name", "value", "default", "meaning"), *rows) if rows else "None.\n"


def recipes_table(slug: str) -> str:
    """The table of the recipes that use a method, alone or in a composition."""
    rows = []
    for recipe in list_recipes():
        if slug in (kind.slug for kind, _ in parse_methods(recipe.settings["method"])):
            path = f"src/detdistill/recipes/{recipe.name}.yaml"
            settings = ", ".join(f"`{name}={plain(value)}`" for name, value in recipe.settings.items())
            rows.append((f"[`{recipe.name}`](../../{path})", recipe.about, settings))
    return table(("recipe", "about", "settings"), *rows) if rows else "No recipe.\n"


def losses_table(slug: str) -> str:
    """The table of a method's public functions, in the order of its file."""
    module = method_class(slug).__module__.removesuffix(".method")
    names = [name for name in detdistill.losses.__all__ if _module(name) in (module, f"{module}.loss")]
    names.sort(key=lambda name: inspect.getsourcelines(getattr(detdistill.losses, name))[1])
    rows = [(f"`{name}`", first_sentence(getattr(detdistill.losses, name))) for name in names]
    return table(("in `detdistill.losses`", "computes"), *rows) if rows else "No public functions.\n"


def _module(name: str) -> str:
    return str(getattr(detdistill.losses, name).__module__)


# ----------------------------------------------------------------------------------------------- needs, in plain words


def needs_of(slug: str) -> Needs:
    """The needs of a method with default hyper-parameters."""
    kind = method_class(slug)
    return kind.needs(**checked_settings(slug, kind, {}))


def _families(families: Sequence[str]) -> str:
    named = [f"`{family}`" for family in families] or ["any"]
    return " or ".join([", ".join(named[:-1]), named[-1]] if len(named) > 1 else named)


def _looks(look: Look) -> str:
    towers = ["all of the head's towers" if depth == WHOLE_TOWER else f"the head after {depth} blocks" for depth in look.towers]
    further = [("backbone", look.backbone), ("prediction", look.prediction), ("attention", look.attention)]
    return ", ".join(["features", *(name for name, yes in further if yes), *towers])


def _side(look: Look | None, families: Sequence[str], capabilities: Sequence[type], distributions: bool) -> str:
    if look is None:
        return "none"
    said = f"a detector that predicts {_families(families)}" if families else "any detector"
    said += " with distributions of box sides" if distributions else ""
    said += f"; looked at: {_looks(look)}"
    if capabilities:
        said += f"; parts run again while learning: {', '.join(CAPABILITIES[capability] for capability in capabilities)}"
    return said


def _classes(needs: Needs) -> str:
    said = {
        "any": "",
        "same": "both sides score classes by the same function, sigmoid or softmax",
        "sigmoid": "both sides score classes by sigmoids",
    }[needs.outputs]
    if not needs.same_classes:
        return said or "not compared"
    return "compared: the teacher knows every class of the student by name" + (f"; {said}" if said else "")


def _cache(slug: str, needs: Needs) -> str:
    """Whether a cache is enough for a method, and which caches it can use."""
    if why := needs.why_live():
        return f"not enough: {why}"
    if not _teaches(slug):
        return "none: nothing is taught"
    if method_class(slug).teach is Method.teach:
        assert needs.teacher is not None
        return f"enough; one cache serves all methods that look at the teacher's {_looks(needs.teacher)}"
    (knowledge,) = knowledge_of(slug)
    names = [f"`{name}`" for name in knowledge if name != "teach"]
    return "enough; a cache of this method's own" + (f", for fixed values of {', '.join(names)}" if names else "")


def _teaches(slug: str) -> bool:
    """Whether ``teach`` of a method returns something that a cache can store."""
    return needs_of(slug).teacher is not None or method_class(slug).teach is not Method.teach


# ----------------------------------------------------------------------------------------- parts, found by building it


@dataclass(frozen=True)
class Built:
    """Submodules and stages of a method with default hyper-parameters, found by building it."""

    found: bool
    """The method could be built for some pair of tiny detectors."""
    trains: dict[str, str]
    """Submodules that are trained in the last stage; ``ALWAYS``, or ``DIFFERENT`` if they exist only where channels differ."""
    stages: tuple[str, ...]
    """Names of the stages before the last."""


@functools.cache
def built_parts(slug: str) -> Built:
    """Build the method for tiny detectors of equal and of different channels."""
    equal, different = (next(_buildings(slug, channels), None) for channels in (8, 16))
    some = different or equal
    if some is None:
        return Built(False, {}, ())
    method, student = some
    always = set(_trained(*equal)) if equal is not None else set()
    trains = {name: ALWAYS if name in always else DIFFERENT for name in _trained(method, student)}
    return Built(True, trains, tuple(stage.name for stage in method.stages(student)[:-1]))


def _buildings(slug: str, teacher_channels: int) -> Iterator[tuple[Method[Any], Any]]:
    """The method and its student, for each pair of tiny detectors that it accepts."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    from tests.tiny import TinyDense, TinyQueries, TinyRegions

    kinds = (TinyDense, TinyRegions, TinyQueries)
    pairs = list(itertools.product(kinds if needs_of(slug).teacher is not None else (None,), kinds))
    if pairs[0][0] is not None:  # for methods that refuse all of these pairs
        pairs += [(kind, kind) for kind in _further_kinds()]
    build: Any = method_class(slug)
    for theirs, mine in pairs:
        teacher = None if theirs is None else Teacher(theirs(channels=(teacher_channels, teacher_channels), seed=1))
        student = mine(seed=2)
        try:
            yield build(teacher, student), student
        except PairError:
            continue


@functools.cache
def _further_kinds() -> tuple[Any, ...]:
    """Tiny dense detectors with what few methods need: as many blocks as a real head (CrossKD), distributions of box sides (LD).

    They are only built, never run, so bins in the spec are enough.
    """
    from tests.tiny import TinyDense, TinyHead

    class DeepHead(TinyHead):
        tower_depth = 4

    class DeepDense(TinyDense):
        tower_depth = DeepHead.tower_depth

        def __init__(self, **settings: Any) -> None:
            super().__init__(**settings)
            self.head = DeepHead(self.spec.channels[0], len(self.spec.classes))

    def binned_dense(**settings: Any) -> TinyDense:
        detector = TinyDense(**settings)
        detector.spec = replace(detector.spec, box_bins=5)
        return detector

    return DeepDense, binned_dense


def _trained(method: Method[Any], student: Any) -> list[str]:
    """Names of the method's direct submodules with parameters that are trained in the last stage."""
    modules = method.stages(student)[-1].trains(Clock(0, 1))
    chosen = {id(parameter) for module in modules for parameter in module.parameters() if parameter.requires_grad}
    return [name for name, child in method.named_children() if any(id(p) in chosen for p in child.parameters())]
