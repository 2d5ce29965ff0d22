"""The page says what the runs say, asks nothing of the network, and survives hostile names and missing models."""

from __future__ import annotations

import html
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from detdistill.data.records import Record
from detdistill.errors import RunError
from detdistill.evaluation.drawing import class_colour
from detdistill.report import figures, words
from detdistill.report.page import build_report
from detdistill.report.pictures import Found, best_threshold, f1, hits, iou
from detdistill.report.runs import baselines_for, distillation_terms, group, read
from tests.report.runs import write_experiment, write_run

VOID = {"meta", "link", "img", "br", "input", "hr"}


class Balance(HTMLParser):
    """Checks that every element is closed in order; collects tags, attributes, ids and the visible text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text.append(data)


def parsed(page: Path) -> tuple[Balance, str]:
    parser = Balance()
    parser.feed(page.read_text())
    parser.close()
    assert parser.open == []
    return parser, " ".join(" ".join(parser.text).split())


def test_page_of_an_experiment_has_verdict_numbers_and_gain(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "teacher", "teacher", 0.41)]
    runs += write_experiment(tmp_path / "students", "pkd", [0.30, 0.31, 0.29], [0.33, 0.345, 0.315])
    page = build_report(runs, tmp_path / "out" / "report.html")
    _, text = parsed(page)
    assert "▲ +3.0 AP" in text
    # Gains 3.0, 3.5, 2.5: mean 3.0, standard error 0.5 / sqrt(3), t(0.975, 2) = 4.303.
    assert "A gain (95 % interval +1.8 to +4.2, 3 seeds): AP 33.0 with distillation, 30.0 without, teacher 40.0." in text
    assert "It closes 30 % of the gap to the teacher." in text
    assert "Much of a short schedule's gain is faster convergence: look at the curves." in text
    assert "baseline, mean of 3 seeds 30.0 40.0 30.0 30.0 30.0 –" in text  # APl is undefined
    assert "gain +3.0 +3.0 +3.0 +3.0 +3.0 –" in text
    assert "pkd, seed 1 34.5" in text
    assert "1.50 M" in text
    assert "fingerprint of the validation data val-print" in text
    assert f"detdistill distill --config {tmp_path}/students/distilled-seed0/config.yaml" in text
    assert "No pictures: the data nowhere/data.yaml cannot be read here" in text
    assert not list(page.parent.glob("*.tmp"))


def test_page_loads_nothing_and_keeps_its_ids_apart(tmp_path: Path) -> None:
    page = build_report(write_experiment(tmp_path, "pkd", [0.30, 0.31], [0.33, 0.34]), tmp_path / "report.html")
    parser, _ = parsed(page)
    source = page.read_text()
    assert "http://" not in source
    assert "https://" not in source
    assert "<script" not in source
    assert "@import" not in source
    for tag, attributes in parser.tags:
        for name in ("src", "href", "xlink:href", "data", "poster"):
            address = attributes.get(name)
            assert address is None or address.startswith(("#", "data:")), (tag, address)
    ids = [attributes["id"] for _, attributes in parser.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    wanted = set(re.findall(r'(?:href="#|url\(#)([\w.-]+)', source))
    assert wanted <= set(ids)
    assert len(source) < 3_000_000


def test_names_are_text_and_never_markup_or_mathematics(tmp_path: Path) -> None:
    runs = write_experiment(tmp_path / "a & <i>b</i>", "pkd,note=<script>alert(1)</script>", [0.3], [0.4])
    page = build_report(runs, tmp_path / "report.html")
    parser, text = parsed(page)
    assert "script" not in {tag for tag, _ in parser.tags}
    assert "<b>dog</b>" in text
    assert "$a_b$" in text  # matplotlib would have set it as a formula
    assert "<script>alert(1)</script>" in text
    assert html.escape("<b>dog</b>") in page.read_text()
    assert "<b>dog" not in page.read_text()


@pytest.mark.parametrize(
    ("baselines", "distilled", "tone", "said"),
    [
        ([0.30], [0.32], "open", "One seed: a difference, not a proof."),
        ([0.30, 0.30, 0.30], [0.31, 0.28, 0.32], "open", "No gain shown: the interval holds zero"),
        ([0.30, 0.31, 0.29], [0.25, 0.26, 0.245], "worse", "Worse than training alone"),
        ([0.30, 0.31, 0.29], [0.35, 0.36, 0.345], "gain", "A gain (95 % interval"),
    ],
)
def test_verdict_in_words(tmp_path: Path, baselines: list[float], distilled: list[float], tone: str, said: str) -> None:
    groups = group([read(folder) for folder in write_experiment(tmp_path, "pkd", baselines, distilled)])
    found = words.verdict(groups[-1], groups)
    assert found.tone == tone
    assert found.sentence.startswith(said) or said in found.sentence


def notes_of(folders: list[Path]) -> str:
    groups = group([read(folder) for folder in folders])
    return " ".join(words.verdict(groups[-1], groups).notes)


def test_honest_notes(tmp_path: Path) -> None:
    unequal = write_experiment(tmp_path / "a", "pkd", [0.3, 0.3], [0.4, 0.4], config={"lr": 0.01})
    assert "Not a fair comparison: seed 0: lr 0.001 and 0.01; seed 1: lr 0.001 and 0.01." in notes_of(unequal)
    blind = write_experiment(tmp_path / "b", "pkd", [0.3], [0.3], teacher_ap=0.001)
    assert "The teacher's AP is 0.1: it knows next to nothing" in notes_of(blind)
    weak = write_experiment(tmp_path / "c", "pkd", [0.3], [0.3], teacher_ap=0.2)
    assert "The teacher (AP 20.0) is worse than the baseline (30.0)" in notes_of(weak)
    idle = write_experiment(tmp_path / "d", "pkd", [0.3], [0.3], share=0.0004)
    assert "Distillation did next to nothing: pkd made 0.04 % of the student's gradient." in notes_of(idle)
    loud = write_experiment(tmp_path / "e", "pkd", [0.3], [0.3], share=0.97)
    assert "Distillation drowned the student's own loss: pkd made 97 %" in notes_of(loud)
    half = write_experiment(tmp_path / "h", "pkd", [0.3], [0.3], kd_terms=("pkd", "pkd_other"))
    for path in [folder / "metrics.csv" for folder in half if folder.name.startswith("distilled")]:
        header, *lines = path.read_text().splitlines()
        last = header.split(",").index("share/pkd_other")
        cells = [line.split(",") for line in lines]
        cells = [[*line[:last], "0" if line[last] else "", *line[last + 1 :]] for line in cells]
        path.write_text("\n".join([header, *map(",".join, cells)]) + "\n")
    assert "pkd_other had no gradient in any measurement: it taught nothing." in notes_of(half)
    slow = write_experiment(tmp_path / "f", "pkd", [0.3], [0.3], seconds=250.0)
    assert "a distilled run took 2.5 times as long as its baseline" in notes_of(slow)
    fine = write_experiment(tmp_path / "g", "pkd", [0.3], [0.3], teacher_ap=0.5)
    assert notes_of(fine) == "Evaluated on 40 images only: the interval covers the seeds, not the choice of images."


def test_unfinished_baseline_is_said(tmp_path: Path) -> None:
    baseline = write_run(tmp_path / "baseline", "baseline", 0.24, rising=True)
    distilled = write_run(tmp_path / "distilled", "distilled", 0.30, method="pkd")
    # The baseline stood at 9/12 of its AP after three quarters of its steps: 6 points to come.
    assert "The baseline still gained 6.0 AP in the last quarter of its training." in notes_of([baseline, distilled])


def test_methods_share_baselines_and_prefer_their_own(tmp_path: Path) -> None:
    first = write_experiment(tmp_path / "first", "pkd", [0.30], [0.33])
    second = write_experiment(tmp_path / "second", "cwd", [0.20], [0.33], kd_terms=("cwd",))
    alone = write_run(tmp_path / "third" / "distilled-seed0", "distilled", 0.35, method="mgd", kd_terms=("mgd",))
    runs = [read(folder) for folder in (*first, *second, alone)]
    groups = {one.label: one for one in group(runs)}
    assert list(groups) == ["baseline", "pkd", "cwd", "mgd"]
    assert [run.folder for run in baselines_for(groups["cwd"], runs)] == [second[0]]
    assert [run.folder for run in baselines_for(groups["mgd"], runs)] == [first[0]]
    page = build_report([*first, *second, alone], tmp_path / "report.html")
    _, text = parsed(page)
    assert "+3.0 AP on one seed" in text
    assert "+13.0 AP on one seed" in text
    assert "+5.0 AP on one seed" in text


def test_many_methods_stand_in_a_table_best_first(tmp_path: Path) -> None:
    runs = write_experiment(tmp_path, "pkd", [0.30, 0.31], [0.33, 0.34])
    for place, method in enumerate(("cwd", "fgd", "mgd", "fkd", "skd", "frs"), start=1):
        for seed, plain in enumerate((0.30, 0.31)):
            ap = plain + 0.01 * place
            runs.append(write_run(tmp_path / f"{method}{seed}", "distilled", ap, seed=seed, method=method, kd_terms=(method,)))
    page = build_report(runs, tmp_path / "report.html")
    source = page.read_text()
    parser, text = parsed(page)
    assert "verdict frs +6.0 +6.0 to +6.0 30.5 36.5 2 gain skd +5.0 " in text
    assert text.index("mgd +3.0") < text.index("fgd +2.0") < text.index("cwd +1.0")
    assert not [attributes for tag, attributes in parser.tags if "gain" in str(attributes.get("class")) and tag == "article"]
    assert text.count("Evaluated on 40 images only: the interval covers the seeds, not the choice of images.") == 1
    assert "Each of the 16 runs alone" in text
    assert "<details><summary>Each of the 16 runs alone" in source
    assert "frs (mean of 2 seeds)" in text
    groups = group([read(run) for run in runs])
    palette = figures.Palette(groups)
    looks = {(palette.name(one), palette.line(one)) for one in groups}
    assert len(looks) == len(groups) == 8
    assert ("c0", "dotted") in looks


def test_notes_of_several_verdicts_are_said_once() -> None:
    def said(label: str, *notes: str) -> words.Verdict:
        return words.Verdict(label, "open", "", "", notes)

    notes = words.shared_notes([said("a", "short", "few"), said("b", "few"), said("c", "few", "slow"), said("d", "few", "slow")])
    assert notes == ["a: short", "few", "c, d: slow"]


def test_seed_without_baseline_does_not_count(tmp_path: Path) -> None:
    runs = write_experiment(tmp_path, "pkd", [0.30, 0.30], [0.33, 0.33])
    runs.append(write_run(tmp_path / "distilled-seed7", "distilled", 0.90, seed=7, method="pkd"))
    _, text = parsed(build_report(runs, tmp_path / "report.html"))
    assert "gain +3.0 +3.0" in text
    assert "Left out of the comparison: seed 7: no baseline of the same student and data." in text
    assert "Not a fair comparison" not in text


def test_settings_that_differ_are_listed(tmp_path: Path) -> None:
    runs = write_experiment(tmp_path, "pkd", [0.3], [0.4], config={"lr": 0.01, "epochs": 24})
    _, text = parsed(build_report(runs, tmp_path / "report.html"))
    assert "Settings that differ baseline pkd epochs 12 24 lr 0.001 0.01" in text


def test_page_of_one_distilled_run_and_of_one_plain_run(tmp_path: Path) -> None:
    alone = write_run(tmp_path / "distilled", "distilled", 0.33, method="pkd")
    _, text = parsed(build_report([alone], alone / "report.html"))
    assert "The student reached AP 33.0. Without a baseline of the same student and data, no gain can be stated." in text
    assert "teacher 40.0 40.0" in text
    assert "teacher (as it is)" in text
    plain = write_run(tmp_path / "plain", "train", 0.21)
    _, text = parsed(build_report([plain], plain / "report.html"))
    assert "AP 21.0" in text
    assert "Trained without a teacher." in text
    assert "Gain of each class" not in text


def test_run_that_is_not_whole_is_refused_and_the_old_page_stays(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text("old")
    (tmp_path / "broken").mkdir()
    with pytest.raises(RunError, match="broken is not a complete run"):
        build_report([tmp_path / "broken"], page)
    with pytest.raises(RunError, match="at least one run"):
        build_report([], page)
    assert page.read_text() == "old"


def test_stages_follow_each_other_on_the_axis(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", "train", 0.2)
    lines = ["stage,step,total,epoch,lr,seconds,loss,val/AP", "warm,5,10,0,0.1,1.0,3.0,", "warm,10,10,1,0.1,2.0,2.0,0.1"]
    lines += ["distill,5,10,0,0.1,1.5,1.0,", "distill,10,10,1,0.1,3.0,nan,0.2"]
    (folder / "metrics.csv").write_text("\n".join(lines))
    run = read(folder)
    assert run.curve("loss") == ([5, 10, 15], [3.0, 2.0, 1.0])  # a loss that is no number is no point
    assert run.curve("val/AP", "epochs") == ([2, 4], [0.1, 0.2])
    assert run.curve("val/AP", "seconds") == ([2.0, 5.0], [0.1, 0.2])


def test_distillation_terms_are_those_the_baseline_lacks(tmp_path: Path) -> None:
    baseline, distilled = (read(f) for f in write_experiment(tmp_path, "fgd+pkd", [0.3], [0.3], kd_terms=("fgd_fg", "pkd", "x")))
    assert distillation_terms(distilled, [baseline]) == ["fgd_fg", "pkd", "x"]
    assert distillation_terms(distilled, []) == ["fgd_fg", "pkd"]  # by the method's name when there is nothing to compare
    assert words.kd_share(distilled, ["pkd"]) == pytest.approx(0.3)


def test_long_class_lists_show_both_ends(tmp_path: Path) -> None:
    names = [f"class{index:03d}" for index in range(100)]
    gains = {name: 0.2 + index / 1000 for index, name in enumerate(names)}
    runs = [
        write_run(tmp_path / "b", "baseline", 0.2, per_class=dict.fromkeys(names, 0.2)),
        write_run(tmp_path / "d", "distilled", 0.3, method="pkd", per_class=gains),
    ]
    page = build_report(runs, tmp_path / "report.html")
    _, text = parsed(page)
    assert "The 30 best and the 30 worst; 40 classes between them are left out." in text
    assert "class099" in text
    assert "class070" in text
    assert "class069" not in text
    assert "class029" in text
    assert "class030" not in text


def test_numbers_are_printed_as_papers_do() -> None:
    assert words.points(0.3049) == "30.5"
    assert words.points(-0.012, signed=True) == "−1.2"
    assert words.points(0.0301, signed=True) == "+3.0"
    assert words.points(-0.0001, signed=True) == "0.0"
    assert words.points(None) == "–"


def test_mean_curve_ends_with_the_shortest_seed() -> None:
    assert figures.mean_curve([([1, 2, 3], [1.0, 2.0, 3.0]), ([1, 2], [3.0, 6.0])]) == ([1, 2], [2.0, 4.0])


# ------------------------------------------------------------------------------------------------------------- pictures


def record(boxes: list[list[float]], labels: list[int], crowd: list[bool] | None = None, number: int = 0) -> Record:
    corners = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    flags = np.array(crowd if crowd is not None else [False] * len(labels), dtype=bool)
    areas = (corners[:, 2:] - corners[:, :2]).prod(axis=1)
    return Record(number, Path("x.jpg"), (100, 100), corners, np.array(labels, dtype=np.int64), flags, areas, None)


def found(boxes: list[list[float]], scores: list[float], labels: list[int]) -> Found:
    return Found(np.array(boxes, dtype=np.float64).reshape(-1, 4), np.array(scores), np.array(labels, dtype=np.int64))


def test_hits_take_each_ground_truth_once_and_of_its_own_class() -> None:
    truth = record([[0, 0, 10, 10], [50, 50, 90, 90]], [0, 1])
    seen = found([[0, 0, 10, 10], [0, 0, 10, 9], [50, 50, 90, 90], [50, 50, 90, 70]], [0.9, 0.8, 0.7, 0.6], [0, 0, 0, 1])
    assert hits(seen, truth).tolist() == [True, False, False, True]  # twice, wrong class, IoU of exactly one half
    assert f1(seen, truth) == pytest.approx(2 * 2 / (4 + 2))
    assert f1(found([], [], []), record([], [])) == 1.0
    assert hits(seen, record([[0, 0, 10, 10]], [0], [True])).tolist() == [False] * 4  # crowds are nobody's hit


def test_iou_by_hand() -> None:
    assert iou(np.array([0.0, 0, 2, 2]), np.array([[1.0, 0, 3, 2], [5, 5, 6, 6]])).tolist() == pytest.approx([1 / 3, 0])


def test_threshold_with_the_best_f1() -> None:
    truth = record([[0, 0, 10, 10], [20, 20, 30, 30]], [0, 0])
    seen = found([[0, 0, 10, 10], [20, 20, 30, 30], [60, 60, 70, 70]], [0.9, 0.4, 0.3], [0, 0, 0])
    assert best_threshold({0: seen}, [truth]) == 0.4
    assert len(seen.above(0.4).scores) == 2
    assert best_threshold({0: found([[60, 60, 70, 70]], [0.9], [0])}, [truth]) == 1.0


def test_class_colours_differ_and_repeat() -> None:
    assert class_colour(3) == class_colour(3)
    assert len({class_colour(label) for label in range(80)}) == 80


@pytest.mark.slow
def test_pictures_of_real_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Teacher, baseline and student of a few steps: the pictures and maps are made, and a lost model is said."""
    import shutil

    from detdistill import api
    from detdistill.demo import SETTINGS, STUDENT
    from detdistill.progress import Progress

    data = "digits:train=16,val=8,size=64,seed=0"
    quick = {**SETTINGS, "size": 64, "steps": 2, "monitor_every": 1, "log_every": 1, "precision": "32"}
    quiet = Progress(quiet=True)
    teacher = api.train(STUDENT, data, role="teacher", out=tmp_path / "teacher", report=False, progress=quiet, **quick)
    paired = {**quick, "baseline": True, "seeds": (0,), "out": tmp_path / "runs", "report": False, "progress": quiet}
    result = api.distill(str(teacher.folder), STUDENT, data, "pkd", **paired)
    page = build_report([teacher.folder, *result.runs], tmp_path / "report.html")
    parser, text = parsed(page)
    images = [attributes for tag, attributes in parser.tags if tag == "img"]
    # Six images: ground truth and three models each, and three levels of three models.
    assert len(images) == 6 * (4 + 9)
    assert all(str(attributes["src"]).startswith("data:image/jpeg;base64,") for attributes in images)
    assert "Chosen by a rule from 8 validation images" in text
    assert "stride 8" in text
    assert "defects in the data none" in text
    shutil.rmtree(teacher.folder / "student")
    _, text = parsed(build_report([teacher.folder, *result.runs], tmp_path / "again.html"))
    assert "teacher is not shown:" in text
    assert "baseline" in text


def test_runs_of_two_data_sets_or_budgets_are_not_averaged(tmp_path: Path) -> None:
    digits = {"path": "sets/digits", "fingerprint": "one", "val_fingerprint": "v1", "train_images": 80, "val_images": 20}
    cells = {"path": "sets/cells", "fingerprint": "two", "val_fingerprint": "v2", "train_images": 50, "val_images": 10}
    folders = []
    for name, data, alone, taught in (("digits", digits, 0.20, 0.30), ("cells", cells, 0.50, 0.48)):
        for seed in (0, 1):
            folders.append(write_run(tmp_path / f"{name}-b{seed}", "baseline", alone, seed=seed, data=data))
            folders.append(write_run(tmp_path / f"{name}-d{seed}", "distilled", taught, seed=seed, method="pkd", data=data))
    _, text = parsed(build_report(folders, tmp_path / "page.html"))
    for label in ("baseline, data digits", "baseline, data cells", "pkd, data digits", "pkd, data cells"):
        assert f"{label}, mean of 2 seeds" in text
    assert "mean of 4 seeds" not in text
    assert "2 data sets: digits, cells" in text
    assert "+10.0 AP" in text
    assert "\N{MINUS SIGN}2.0 AP" in text
    longer = write_run(tmp_path / "longer", "baseline", 0.6, seed=2, data=digits, steps=240)
    labels = [one.label for one in group([read(folder) for folder in (*folders, longer)])]
    assert "baseline, data digits, 240 steps" in labels
    assert "baseline, data digits, 120 steps" in labels
    assert "baseline, data cells" in labels
