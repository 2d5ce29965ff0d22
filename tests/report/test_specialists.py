"""AP on the classes of each teacher, and on those that none knows."""

from __future__ import annotations

from pathlib import Path

from detdistill.report.page import build_report
from detdistill.report.runs import group, read
from detdistill.report.specialists import specialties
from tests.report.runs import write_run

BEFORE = {"cat": 0.1, "dog": 0.2, "new": 0.3, "rare": -1.0}
AFTER = {"cat": 0.3, "dog": 0.2, "new": 0.5, "rare": -1.0}
TEACHERS = {"pets": {"metrics": {}, "per_class": {"cat": 0.6, "dog": 0.4}}, "dogs": {"metrics": {}, "per_class": {"dog": 0.8}}}


def folders(path: Path) -> list[Path]:
    baseline = write_run(path / "baseline", "baseline", 0.2, per_class=BEFORE)
    return [
        baseline,
        write_run(path / "distilled", "distilled", 0.3, method="pkd@pets+pkd@dogs", per_class=AFTER, teachers=TEACHERS),
    ]


def test_each_teacher_has_a_line_and_new_classes_one(tmp_path: Path):
    (table,) = specialties(group([read(folder) for folder in folders(tmp_path)]))
    assert table.label == "pkd@pets+pkd@dogs"
    assert [(line.title, line.classes, line.cells) for line in table.lines] == [
        ("pets", "cat, dog", ("50.0", "15.0", "25.0", "+10.0")),
        ("dogs", "dog", ("80.0", "20.0", "20.0", "0.0")),
        ("no teacher", "new", ("\N{EN DASH}", "30.0", "50.0", "+20.0")),
    ]


def test_the_page_shows_the_table(tmp_path: Path):
    page = build_report(folders(tmp_path), tmp_path / "page.html").read_text()
    assert '<h2 id="specialties">' in page
    assert "<td>cat, dog</td><td>50.0</td><td>15.0</td><td>25.0</td><td>+10.0</td>" in page


def test_a_teacher_of_all_classes_has_no_table(tmp_path: Path):
    runs = [
        write_run(tmp_path / role, role, 0.2, method=None if role == "baseline" else "pkd") for role in ("baseline", "distilled")
    ]
    assert specialties(group([read(folder) for folder in runs])) == []
