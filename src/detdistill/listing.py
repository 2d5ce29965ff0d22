"""Contents of the listing commands, as text and as JSON. They are read from the package's files, not from a list."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from detdistill import printing
from detdistill.errors import ModelError

if TYPE_CHECKING:
    from detdistill.detectors.contract import Detector
    from detdistill.detectors.probed import Probed, Survey
    from detdistill.evaluation.scores import Scores
    from detdistill.export.bench import Timing
    from detdistill.export.run import Exported


# ---------------------------------------------------------------------------------------------------------- methods


@dataclass(frozen=True)
class Listed:
    """A method, and whether it can be used with a pair of teacher and student."""

    name: str
    title: str
    """Title of the paper, with venue and year."""
    serves: bool | None = None
    """The method can be used with the pair; None: no pair was given."""
    reason: str | None = None
    """Reason why the method cannot be used with the pair."""


@dataclass(frozen=True)
class MethodList:
    """All methods, and the pair that they were tried with."""

    teacher: str | None
    student: str | None
    methods: tuple[Listed, ...]


def list_methods(teacher: str | None = None, student: str | None = None) -> MethodList:
    """List all methods; with a teacher or a student, find out by building each method whether it can be used with the pair.

    Args:
        teacher: model string or run folder; None: the same model as the student.
        student: model string or run folder; None: the same model as the teacher. Without both, no pair is tried.

    Raises:
        DetdistillError: teacher or student cannot be built or loaded.
    """
    from detdistill.methods.shared.catalogue import entry, method_slugs

    teacher, student = teacher or student, student or teacher
    if teacher is None or student is None:
        return MethodList(None, None, tuple(Listed(slug, entry(slug).title) for slug in method_slugs()))
    from detdistill.detectors.contract import Teacher
    from detdistill.methods.shared.compose import reasons_against

    frozen = Teacher(_detector(teacher, ("one", "two")))
    learner = _detector(student, frozen.spec.classes or ("one", "two"))
    if learner.spec.family == "features":
        raise ModelError(f"{student} is a backbone, which can only teach; give the student too: --student fcos:resnet18")
    reasons = reasons_against(frozen, learner)
    found = [Listed(slug, entry(slug).title, not reason, reason or None) for slug, reason in reasons.items()]
    return MethodList(teacher, student, tuple(found))


def _detector(name: str, classes: Sequence[str]) -> Detector:
    """Load a detector with its own classes if it has any, otherwise build it with the given ones."""
    from detdistill.detectors.load import load_detector
    from detdistill.errors import ClassCountError
    from detdistill.given import local_copy

    name = local_copy(name)
    if Path(name).exists():
        return load_detector(name)
    try:
        return load_detector(name, classes)
    except ClassCountError:
        return load_detector(name)


def show_methods(found: MethodList) -> None:
    """Print each method with its paper and, if a pair was given, whether it can be used with the pair."""
    console = printing.stdout()
    if found.teacher is not None and found.student is not None:
        printing.labelled(console, "teacher", found.teacher)
        printing.labelled(console, "student", found.student)
        printing.line(console)
    items: list[tuple[str, list[str | Text]]] = []
    for method in found.methods:
        answer: list[str | Text] = []
        if method.serves is not None:
            answer = [Text("yes", "green") if method.serves else Text(f"no: {method.reason}", "yellow")]
        items.append((method.name, [method.title, *answer]))
    printing.entries(console, items)


# -------------------------------------------------------------------------------------------------------- detectors


def list_detectors(probe: bool = False) -> Survey:
    """List all detectors with their capabilities, as they come with the package or were found here.

    What is found here is kept in the user's cache folder, and taken from there as long as the installed versions are the same.

    Args:
        probe: run and export all detectors on tiny backbones, with the installed versions; this takes minutes.
    """
    from detdistill.detectors.probed import kept_survey, shipped_survey

    if not probe and (known := kept_survey() or shipped_survey()) is not None:
        return known
    from detdistill.progress import Progress

    with Progress() as progress:
        bar = progress.bar("trying every detector on a tiny backbone", 1)
        from detdistill.detectors.probe import survey
        from detdistill.export.probe import probe_export

        return survey(bar.follow, probe_export)


def show_detectors(found: Survey) -> None:
    """Print each detector with its description, kind of prediction, capabilities, and failed checks with their reasons."""
    console = printing.stdout()
    printing.entries(console, [(probed.name, [probed.about, *_abilities(probed)]) for probed in found.detectors])
    printing.line(console)
    printing.paragraph(
        console,
        f"Tried on a tiny model of each ({found.when}; `detectors --probe true` tries here, in minutes): "
        f"{', '.join(found.capabilities)}.",
    )
    printing.paragraph(console, "Write `detector:backbone[,key=value ...]`, e.g. `fcos:resnet18,width=0.5,neck=64,levels=3-5`.")


def _abilities(probed: Probed) -> list[Text]:
    lines = []
    if probed.results:
        able = ", ".join(check.split()[0] for check in probed.able)
        lines.append(Text(f"predicts {probed.family}{'; has ' * bool(able)}{able}"))
    if probed.export:
        lines.append(Text(f"exports {probed.export}", "yellow" if probed.export.startswith("no: ") else ""))
    lines += [Text(f"FAILS {check}: {reason}", "bold red") for check, reason in probed.reasons.items()]
    return lines


def detectors_json(found: Survey) -> dict[str, Any]:
    """The detectors as JSON: the fields of ``Probed``; ``results`` has every check, null if it was not run."""
    shown = [
        {**asdict(probed), "results": {check: probed.results.get(check) for check in found.checks}} for probed in found.detectors
    ]
    return {"probed": found.when, "detectors": shown}


# ---------------------------------------------------------------------------------------------------------- recipes


@dataclass(frozen=True)
class Recipe:
    """Ready-made settings for ``--recipe``."""

    name: str
    about: str
    """Description, from the first line of the recipe's file."""
    settings: dict[str, Any]


def list_recipes() -> list[Recipe]:
    """Read all recipes from their files."""
    import yaml

    recipes = []
    for path in sorted((Path(__file__).parent / "recipes").glob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        about = text.splitlines()[0].lstrip("# ").partition(" Use:")[0]
        recipes.append(Recipe(path.stem, about, yaml.safe_load(text)))
    return recipes


def show_recipes(found: Sequence[Recipe]) -> None:
    """Print each recipe with its description."""
    console = printing.stdout()
    printing.entries(console, [(recipe.name, [recipe.about]) for recipe in found])
    printing.line(console)
    printing.paragraph(console, "`detdistill distill --recipe NAME` takes method, weights and schedule from a recipe.")


# --------------------------------------------------------------------------------------------- scores and citations


def show_scores(scores: Scores) -> None:
    """Print the 12 COCO numbers, the AP of each class and the loss of AP50 by kind of error, times 100; ``-``: undefined."""
    from detdistill.evaluation.scores import points

    console = printing.stdout()
    printing.line(console, f"{scores.images} images, {scores.seconds:.1f} s; all numbers x 100")
    printing.line(console)
    printing.grid(console, {name: points(value) for name, value in scores.metrics.items()})
    printing.line(console)
    printing.table(console, ("class", "AP"), [(name, points(value)) for name, value in scores.per_class.items()])
    if scores.errors:
        printing.line(console)
        printing.line(console, "AP50 lost to")
        printing.grid(console, {name: f"{100 * value:.1f}" for name, value in scores.errors.items()})


# --------------------------------------------------------------------------------------------------- exported files


def show_export(made: Exported) -> None:
    """Print a row for torch and for each file: AP, AP lost, the largest differences, the time of one image, the size."""
    console = printing.stdout()
    head = ("", *made.stages[0].HEAD, "")
    rows = [(stage.name, *stage.cells, "" if stage.passed else "TOO MUCH LOST") for stage in made.stages]
    printing.table(console, head, rows)
    printing.line(console)
    free = " and ".join({"batch": "number", "size": "size"}[name] for name in made.about.free)
    height, width = made.about.canvas_hw
    size = "" if "size" in made.about.free else f", {height}x{width} pixels"
    printing.paragraph(console, f"The {free} of images may vary{size}." if free else f"One image at a time{size}.")
    for path in filter(None, (made.file, made.int8, made.notes, made.card)):
        printing.labelled(console, "wrote", str(path))
    if made.card is None:
        printing.labelled(console, "no card: there is a README of somebody else in", str(made.notes.parent))


def show_bench(found: Mapping[str, Timing]) -> None:
    """Print the time and the images per second of each model, and how many times faster than the first it is."""
    console = printing.stdout()
    first = next(iter(found.values()))
    rows = [
        (
            name,
            f"{timing.milliseconds:.1f}",
            f"{timing.least:.1f}",
            f"{timing.images_per_second:.1f}",
            f"{first.milliseconds / timing.milliseconds:.2f}x",
        )
        for name, timing in found.items()
    ]
    printing.table(console, ("model", "ms", "least", "images/s", "speed"), rows)
