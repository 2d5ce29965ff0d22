"""Tables of what there is: methods, detectors, recipes. Read from the files themselves, never from a list."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from detdistill.detectors.contract import Detector


def show_methods(teacher: str | None = None, student: str | None = None) -> None:
    """All methods; with a student (and a teacher), whether each can serve the pair, found by building it."""
    from detdistill.detectors.contract import Teacher
    from detdistill.methods.shared.compose import build_method, method_class, method_slugs
    from detdistill.methods.shared.needs import PairError

    table = Table("method", "paper", *(["serves this pair"] if student else []))
    learner = frozen = None
    if student:
        frozen = Teacher(_detector(teacher or student, ("one", "two")))
        learner = _detector(student, frozen.spec.classes)
    for slug in method_slugs():
        row = [slug, escape(method_class(slug).title)]
        if learner is not None:
            try:
                build_method(slug, frozen, learner)
                row.append("yes")
            except PairError as error:
                row.append(escape(f"no: {error}"))
        table.add_row(*row)
    Console().print(table)


def _detector(name: str, classes: Sequence[str]) -> Detector:
    """With its own classes where it has some, else with these."""
    from detdistill.detectors.load import load_detector

    return load_detector(name) if Path(name).exists() else load_detector(name, classes)


def show_detectors() -> None:
    """All detectors and what each can do, found by running it on a tiny backbone."""
    from detdistill.progress import Progress

    with Progress() as progress:
        bar = progress.bar("trying every detector on a tiny backbone", 1)
        from detdistill.detectors.probe import CHECKS, probe_all

        found = probe_all(bar.follow)
    table = Table("detector", "what it is", "predicts", *(check.removeprefix("all ").split()[0] for check in CHECKS))
    coloured = {"yes": "[green]yes[/]", "no": "[dim]no[/]", "FAILS": "[bold red]FAILS[/]", "": ""}
    for probed in found:
        cells = [coloured[cell] for cell in map(probed.cell, CHECKS)]
        table.add_row(probed.name, escape(probed.about), probed.family, *cells)
    about = "any of torchvision's own detectors by name, e.g. torchvision:fcos_resnet50_fpn,weights=COCO_V1"
    table.add_row("torchvision:NAME", about, "as its kind", *[""] * len(CHECKS))
    console = Console()
    console.print(table)
    for probed in found:
        for failure in probed.failures:
            console.print(f"[red]{escape(failure)}[/red]", soft_wrap=True)
    console.print("Write detector:backbone[,key=value ...], e.g. fcos:resnet18,width=0.5,neck=64,levels=3-5")


def show_recipes() -> None:
    """All recipes with their first comment."""
    table = Table("recipe", "what it is")
    for path in sorted((Path(__file__).parent / "recipes").glob("*.yaml")):
        table.add_row(path.stem, escape(path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")))
    Console().print(table)
