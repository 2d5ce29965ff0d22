"""A search over settings of a distillation."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detdistill.api.shared import settings_of, write
from detdistill.api.training import distill_each
from detdistill.errors import RunError, counted
from detdistill.settings import DistillSettings

if TYPE_CHECKING:
    from detdistill.api.shared import Model
    from detdistill.detectors.contract import Detector
    from detdistill.find import Found, Tried
    from detdistill.progress import Progress


def find(
    teacher: Model | None,
    student: str | Detector | Callable[[], Detector],
    data: str = "digits",
    method: str = "pkd",
    *,
    over: Sequence[str] = ("lr", "distill_weight"),
    trials: int = 12,
    at_once: int = 1,
    progress: Progress | None = None,
    **settings: Any,
) -> Found:
    """Search settings of a distillation by Optuna, scored on images held out of the training images.

    The validation images are not used. Where ``lr`` is searched, each trial also trains the student alone with the same
    learning rate, so that both sides get equal care; else the student is trained alone once.

    Args:
        teacher: see ``distill``.
        student: see ``distill``.
        data: see ``train``.
        method: see ``distill``.
        over: what is searched: ``lr``, ``distill_weight`` or ``balance``, with a range as ``lr=1e-4..1e-2`` or without, and
            hyper-parameters of the methods as ``pkd.weight=1..20``.
        trials: number of trials. The first has the settings as given.
        at_once: number of trials that are suggested together, before any of them has a result; their runs take place together
            with ``jobs`` or on Ray. The suggestions depend on this number, as on the seed, and not on where or when runs end.
        progress: display of the progress; None: a new one on stderr.
        settings: fields of ``DistillSettings``, the same for all trials; ``held_out`` is 0.2 unless given. Every trial runs
            each of ``seeds``. ``out`` is the folder of the search, with a folder for each trial; with ``resume``, finished runs
            are kept and the search goes on.

    Returns:
        All trials, and the best settings. They are also in ``find.json`` and, for ``--config``, in ``best.yaml``.

    Raises:
        DetdistillError: one line that says what is wrong and what to do.
    """
    wanted = _checked(method, settings, trials, at_once)
    from detdistill.find import Found, as_settings, in_words, new_study, read_searched
    from detdistill.progress import Progress
    from detdistill.training.folder import new_folder

    searched = read_searched(over, wanted)
    study = new_study(searched, wanted, wanted.seed, at_once)
    folder = wanted.out if wanted.resume and wanted.out is not None else new_folder(wanted.out, "find")
    _check_at_once(folder, at_once)
    seeds = wanted.seeds or (wanted.seed,)
    twice = any(one.name == "lr" for one in searched)
    tried: list[Tried] = []
    common = {**settings, "held_out": wanted.held_out, "seeds": seeds, "report": False}
    with progress or Progress() as shown:
        shown.say(_budget(trials, twice, wanted, len(seeds)))
        for start in range(0, trials, at_once):
            asked = [study.ask() for _ in range(start, min(start + at_once, trials))]
            values = {number: {one.name: one.suggest(ask) for one in searched} for number, ask in enumerate(asked, start)}
            variants = {}
            for number, chosen in values.items():
                shown.say(f"trial {number + 1} of {trials}: {in_words(chosen)}")
                own = {"baseline": twice or number == 0, **_place(folder / f"trial{number:02d}", wanted)}
                variants[f"trial {number + 1}"] = {"method": method, **common, **as_settings(method, chosen), **own}
            done = distill_each(teacher, student, data, variants, progress=shown)
            for (number, chosen), ask, one in zip(values.items(), asked, done.values(), strict=True):
                tried.append(_tried(number, chosen, one.runs))
                study.tell(ask, tried[-1].ap)
            best = as_settings(method, max(tried, key=lambda one: one.ap).values)
            result = Found(folder, method, tuple(tried), wanted.held_out or 0.0, seeds, best, at_once)
            _write(result)
    return result


def _checked(method: str, settings: dict[str, Any], trials: int, at_once: int) -> DistillSettings:
    """The settings of all trials, with images held out.

    Raises:
        RunError: a number or a setting is not allowed.
    """
    if trials < 2:
        raise RunError(f"trials: {trials} must be 2 or more")
    if at_once < 1:
        raise RunError(f"at_once: {at_once} must be 1 or more")
    held_out = settings.get("held_out") or 0.2
    return settings_of(DistillSettings, {"method": method, **settings, "held_out": held_out, "baseline": False})


def _place(folder: Path, settings: DistillSettings) -> dict[str, Any]:
    return {"out": folder, "resume": settings.resume and folder.exists(), "score_teacher": False}


def _check_at_once(folder: Path, at_once: int) -> None:
    """Compare ``at_once`` with that of the search to be resumed: with another one, other settings would be suggested.

    Raises:
        RunError: it differs.
    """
    file = folder / "find.json"
    if not file.exists():
        return
    try:
        before = json.loads(file.read_text(encoding="utf-8")).get("at_once", 1)
    except (OSError, ValueError, AttributeError) as error:
        raise RunError(f"{file} cannot be read: {error}; start a new search with another --out") from error
    if before != at_once:
        raise RunError(f"cannot resume {folder}: at_once was {before} and is now {at_once}; use the same, or a new --out")


def _budget(trials: int, twice: bool, settings: DistillSettings, seeds: int) -> str:
    """What the search will cost, said before it starts."""
    length = f"{settings.epochs} epochs" if settings.steps is None else f"{settings.steps} steps"
    alone = trials if twice else 1
    why = "the student alone is tried with the same learning rates" if twice else "the student alone has nothing to be searched"
    runs = counted((trials + alone) * seeds, "run")
    return f"budget: {runs} of {length}: {trials * seeds} distilled, {alone * seeds} alone ({why})"


def _tried(number: int, values: dict[str, float], runs: Sequence[Path]) -> Tried:
    """The result of a trial, from its runs."""
    from detdistill.compare import read_run
    from detdistill.find import Tried

    read = [read_run(run) for run in runs]
    aps = {role: [one["metrics"]["AP"] for one in read if one["role"] == role] for role in ("baseline", "distilled")}
    alone = statistics.fmean(aps["baseline"]) if aps["baseline"] else None
    return Tried(number, values, statistics.fmean(aps["distilled"]), alone, sum(one["seconds"] for one in read))


def _write(found: Found) -> None:
    """Write the trials so far, so that an interrupted search leaves its results."""
    import yaml

    from detdistill.find import found_json

    write(found.folder / "find.json", json.dumps(found_json(found), indent=2) + "\n")
    write(found.folder / "best.yaml", yaml.safe_dump(found.best, sort_keys=False))
