"""Commands that compare runs or list what there is: compare, report, methods, detectors, recipes, cite, data inspect."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace

from detdistill.cli.arguments import Parser, json_flag, plain
from detdistill.cli.output import FRACTIONS, say, show

if TYPE_CHECKING:
    from detdistill.data.inspect import DataReport
    from detdistill.methods.shared.catalogue import Entry


def compare_flags(parser: Parser) -> None:
    parser.add_argument("runs", nargs="+", type=str, help="run folders, folders that hold them, or exported files of runs")
    parser.add_argument("--data", type=str | None, default=None, help="evaluate the files here; none: scores of export.json")
    parser.add_argument("--metric", type=str, default="AP", help="one of the 12 COCO numbers")
    parser.add_argument("--allow_unequal", type=bool, default=False, help="compare runs whose budgets differ")
    parser.add_argument("--out", type=Path | None, default=None, help="also write the result to this JSON file")
    json_flag(parser, FRACTIONS)


def compare(chosen: Namespace) -> None:
    from detdistill import api
    from detdistill.compare import gains_json, show_gains

    show(chosen, lambda: api.compare(**plain(chosen)), show_gains, gains_json)


def report_flags(parser: Parser) -> None:
    parser.add_argument("runs", nargs="+", type=str, help="run folders, or folders that hold them")
    parser.add_argument("--out", type=Path | None, default=None, help="path of the page; none: report.html in the first folder")


def report(chosen: Namespace) -> None:
    from detdistill import api

    say(f"report {api.report(**plain(chosen))}")


def methods_flags(parser: Parser) -> None:
    build = "without --{0}: with a {0} of the same build"
    parser.add_argument(
        "--teacher", type=str | None, default=None, help=f"show which methods work with this teacher; {build.format('student')}"
    )
    parser.add_argument(
        "--student", type=str | None, default=None, help=f"show which methods work with this student; {build.format('teacher')}"
    )
    json_flag(parser)


def methods(chosen: Namespace) -> None:
    from dataclasses import asdict

    from detdistill.listing import list_methods, show_methods

    show(chosen, lambda: list_methods(**plain(chosen)), show_methods, asdict)


def detectors_flags(parser: Parser) -> None:
    parser.add_argument(
        "--probe", type=bool, default=False, help="try all detectors with the installed versions; this takes minutes"
    )
    json_flag(parser)


def detectors(chosen: Namespace) -> None:
    from detdistill.listing import detectors_json, list_detectors, show_detectors

    show(chosen, lambda: list_detectors(**plain(chosen)), show_detectors, detectors_json)


def recipes(chosen: Namespace) -> None:
    from dataclasses import asdict

    from detdistill.listing import list_recipes, show_recipes

    show(chosen, list_recipes, show_recipes, lambda found: {"recipes": [asdict(recipe) for recipe in found]})


def cite_flags(parser: Parser) -> None:
    parser.add_argument("method", type=str, help="a method, or several joined by +")
    json_flag(parser)


def cite(chosen: Namespace) -> None:
    from detdistill.methods.shared.catalogue import entry, split_methods  # not `listing`, whose tables take longer to import

    def entries(found: Sequence[Entry]) -> None:
        for method in found:
            say(method.bibtex)

    def document(found: Sequence[Entry]) -> dict[str, Any]:
        return {"methods": [{"name": method.slug, "title": method.title, "bibtex": method.bibtex} for method in found]}

    show(chosen, lambda: [entry(slug) for slug, *_ in split_methods(chosen.method)], entries, document)


def inspect_flags(parser: Parser) -> None:
    parser.add_argument("data", type=str, help="COCO, YOLO, VOC or Roboflow data, or digits")
    parser.add_argument("--strict", type=bool, default=False, help="fail at the first defect")
    parser.add_argument("--deep", type=bool, default=False, help="decode every image")
    parser.add_argument("--out", type=Path | None, default=None, help="also write the report to this JSON file")
    json_flag(parser)


def inspect(chosen: Namespace) -> None:
    from detdistill import api, printing

    values = plain(chosen)
    out = values.pop("out")

    def document(found: DataReport) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(found.to_json())
        return content

    show(chosen, lambda: api.inspect_data(**values), lambda found: found.render(printing.stdout()), document, out)
