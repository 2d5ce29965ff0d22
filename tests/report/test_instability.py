"""The figure of matching instability: there when runs measured it, with one sentence that says what it is."""

from __future__ import annotations

from pathlib import Path

from detdistill.report.page import build_report
from detdistill.report.runs import group, read
from detdistill.report.words import instability_sentence
from detdistill.training.metrics_table import MetricsTable
from tests.report.runs import write_experiment, write_run
from tests.report.test_report import parsed


def measure(folder: Path, values: list[float]) -> None:
    """As training logs it: a row of its own at each evaluation."""
    table = MetricsTable(folder / "metrics.csv", lambda stage, step: True)
    for epoch, value in enumerate(values):
        row = {"stage": "train", "step": 10 * (epoch + 1), "total": 120, "epoch": epoch, "lr": 0.001, "seconds": epoch}
        table.add({**row, "val/IS": value, "val/IS_layers": value / 2})


def measured(folder: Path) -> list[Path]:
    config = {"instability": 32}
    teacher = write_run(folder / "teacher", "teacher", 0.4, config=config)
    students = write_experiment(folder / "students", "detrdistill", [0.30, 0.31], [0.33, 0.34], config=config)
    for run in (teacher, *students):
        seed = int(run.name.endswith("seed1"))
        measure(run, [1.0, 0.5] if run == teacher else [6.0 + seed, 4.0 + seed] if "baseline" in run.name else [3.0, 2.0 + seed])
    # The baselines of ``write_experiment`` take no settings; those of a real experiment have the same.
    for run in students:
        if "baseline" in run.name:
            path = run / "config.yaml"
            path.write_text(path.read_text() + "instability: 32\n")
    return [teacher, *students]


def test_sentence_has_means_over_evaluations_and_seeds(tmp_path: Path):
    sentence = instability_sentence(group([read(folder) for folder in measured(tmp_path)]))
    # Baseline: 5 and 6; distilled: 2.5 and 3.
    assert sentence.endswith("Mean of all evaluations: teacher 0.75, baseline 5.50, detrdistill 2.75.")
    assert "mean over the first 32 validation images (IS of DN-DETR, last decoder layer)" in sentence
    assert len(sentence.splitlines()) == 1


def test_page_shows_the_figure(tmp_path: Path):
    page = build_report(measured(tmp_path), tmp_path / "report.html")
    parser, text = parsed(page)
    assert "Matching instability Number of queries per image with another matched box" in text
    assert "teacher 0.75, baseline 5.50, detrdistill 2.75." in text
    titles = [attributes.get("aria-label") or "" for tag, attributes in parser.tags if tag == "svg"]
    assert "changed matches, between evaluations against epochs" in titles
    assert "changed matches, between decoder layers against epochs" in titles


def test_runs_that_did_not_measure_show_nothing(tmp_path: Path):
    runs = write_experiment(tmp_path / "students", "pkd", [0.30], [0.33])
    assert instability_sentence(group([read(folder) for folder in runs])) == ""
    _, text = parsed(build_report(runs, tmp_path / "report.html"))
    assert "nstability" not in text


def test_only_some_runs_measured(tmp_path: Path):
    runs = [*measured(tmp_path)[1:], write_run(tmp_path / "other", "distilled", 0.3, method="pkd")]
    sentence = instability_sentence(group([read(folder) for folder in runs]))
    assert sentence.endswith("baseline 5.50, detrdistill 2.75.")
