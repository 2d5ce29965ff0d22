import json
import math
import re
from dataclasses import replace

import pytest
import yaml

from detdistill.compare import Pair as P
from detdistill.compare import compare_runs, expand, gains_json, show_gains, summarize
from detdistill.errors import RunError
from detdistill.settings import TrainSettings, as_plain

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


def make_run(folder, role, seed, ap, **changes):
    """A finished run's folder as far as a comparison reads it; ``changes`` go into config or summary."""
    settings = {**as_plain(TrainSettings()), "dis": 1.0}
    summary = {
        "role": role,
        "student": "fcos:resnet10t",
        "teacher": "runs/teacher" if role == "distilled" else None,
        "method": "pkd" if role == "distilled" else None,
        "inherit": False,
        "init": None,
        "seed": seed,
        "steps": 100,
        "images_seen": 1600,
        "metrics": {**dict.fromkeys(METRICS, -1.0), "AP": ap, "AP50": 2 * ap},
        "data": {"fingerprint": "train", "val_fingerprint": "val"},
    }
    for name, value in changes.items():
        if name in ("fingerprint", "val_fingerprint"):
            summary["data"][name] = value
        else:
            (settings if name in settings and name not in summary else summary)[name] = value
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder


def make_pairs(parent, gains, **changes):
    for seed, gain in enumerate(gains):
        make_run(parent / f"baseline-seed{seed}", "baseline", seed, 0.2)
        make_run(parent / f"distilled-seed{seed}", "distilled", seed, 0.2 + gain, **changes)
    return parent


def test_interval_is_students_t_by_hand():
    gain = summarize("pkd", "t", "s", "AP", [P(0, 0.20, 0.22), P(1, 0.20, 0.23), P(2, 0.20, 0.24)])
    assert gain.mean == pytest.approx(0.03)
    half = 4.302653 * 0.01 / math.sqrt(3)  # t of 2 degrees of freedom at 97.5 %; the deviation is 0.01
    assert gain.low == pytest.approx(0.03 - half, abs=1e-8)
    assert gain.high == pytest.approx(0.03 + half, abs=1e-8)


def test_interval_equals_scipys():
    from scipy import stats

    pairs = [P(seed, 0.3, 0.3 + value) for seed, value in enumerate((0.05, -0.01, 0.02, 0.07, 0.03))]
    gains = [pair.gain for pair in pairs]
    low, high = stats.t.interval(0.95, len(gains) - 1, loc=sum(gains) / len(gains), scale=stats.sem(gains))
    gain = summarize("pkd", "t", "s", "AP", pairs)
    assert (gain.low, gain.high) == pytest.approx((low, high))


@pytest.mark.parametrize(
    ("gains", "verdict"),
    [
        ((0.02, 0.03, 0.04), "gain"),
        ((-0.02, -0.03, -0.04), "worse"),
        ((0.10, -0.01, 0.02), "no gain shown"),
        ((0.02, 0.02), "gain"),
        ((0.30,), "one seed: no verdict"),
    ],
)
def test_verdicts(gains, verdict):
    found = summarize("pkd", "t", "s", "AP", [P(seed, 0.2, 0.2 + gain) for seed, gain in enumerate(gains)])
    assert found.verdict == verdict


def test_one_pair_has_no_interval_and_says_why():
    found = summarize("pkd", "t", "s", "AP", [P(0, 0.2, 0.5)])
    assert (found.low, found.high) == (None, None)
    assert found.mean == pytest.approx(0.3)
    assert "run more seeds" in found.notes[0]


def test_runs_are_paired_by_seed_in_whatever_order(tmp_path):
    make_run(tmp_path / "a", "distilled", 1, 0.40)
    make_run(tmp_path / "b", "baseline", 0, 0.20)
    make_run(tmp_path / "c", "distilled", 0, 0.25)
    make_run(tmp_path / "d", "baseline", 1, 0.30)
    make_run(tmp_path / "e", "teacher", 1, 0.90)
    (gain,) = compare_runs([tmp_path])
    assert [(pair.seed, pair.baseline, pair.distilled) for pair in gain.pairs] == [(0, 0.20, 0.25), (1, 0.30, 0.40)]
    assert gain.mean == pytest.approx(0.075)
    assert (gain.method, gain.teacher, gain.student, gain.metric) == ("pkd", "runs/teacher", "fcos:resnet10t", "AP")
    assert compare_runs([tmp_path], metric="AP50")[0].mean == pytest.approx(0.15)


def test_each_method_teacher_and_strength_is_compared_alone(tmp_path):
    make_pairs(tmp_path / "x", (0.01, 0.02))
    for seed in (0, 1):
        make_run(tmp_path / "y" / f"fgd{seed}", "distilled", seed, 0.3, method="fgd", inherit=True)
        make_run(tmp_path / "y" / f"strong{seed}", "distilled", seed, 0.1, dis=2.0)
        make_run(tmp_path / "y" / f"other{seed}", "distilled", seed, 0.1, teacher="runs/other")
    gains = compare_runs([tmp_path / "x", tmp_path / "y"])
    assert [(gain.method, gain.teacher) for gain in gains] == [
        ("fgd + inherited head", "runs/teacher"),
        ("pkd", "runs/other"),
        ("pkd", "runs/teacher"),
        ("pkd, distill_weight 2", "runs/teacher"),
    ]
    assert [round(gain.mean, 6) for gain in gains] == [0.1, -0.1, 0.015, -0.1]


def test_a_seed_without_baseline_is_noted_and_left_out(tmp_path):
    make_pairs(tmp_path, (0.1, 0.1))
    make_run(tmp_path / "alone", "distilled", 5, 0.9)
    (gain,) = compare_runs([tmp_path])
    assert [pair.seed for pair in gain.pairs] == [0, 1]
    assert gain.notes == ("seed 5: no baseline of the same student and data",)


def test_unequal_budgets_are_refused_naming_each_difference(tmp_path):
    make_pairs(tmp_path, (0.1, 0.1), epochs=24, lr=0.01, steps=200, images_seen=3200)
    with pytest.raises(RunError) as error:
        compare_runs([tmp_path])
    assert str(error.value) == (
        "unequal budgets, seed 0: epochs 12 and 24; lr 0.001 and 0.01; steps done 100 and 200; images_seen done 1600 and 3200; "
        "--allow_unequal true compares them anyway"
    )
    (gain,) = compare_runs([tmp_path], allow_unequal=True)
    assert gain.mean == pytest.approx(0.1)
    assert "seed 0: epochs 12 and 24" in gain.notes
    assert len(gain.notes) == 8


def test_other_initial_weights_and_early_stops_are_unequal_budgets(tmp_path):
    make_run(tmp_path / "a", "baseline", 0, 0.2, init={"from": "runs/x", "fingerprint": "1", "taken": 3, "total": 3})
    make_run(tmp_path / "b", "distilled", 0, 0.3, stopped_early=True)
    with pytest.raises(RunError, match=r"initial weights runs/x and fresh; the distilled run stopped early; --allow_unequal"):
        compare_runs([tmp_path])
    make_run(tmp_path / "other" / "c", "distilled", 0, 0.3, init={"from": "moved/x", "fingerprint": "1", "taken": 3, "total": 3})
    (gain,) = compare_runs([tmp_path / "a", tmp_path / "other"])
    assert gain.mean == pytest.approx(0.1)


def test_a_run_that_did_not_know_a_setting_had_its_default(tmp_path):
    old = make_run(tmp_path / "old", "baseline", 0, 0.2)
    config = yaml.safe_load((old / "config.yaml").read_text())
    del config["backbone_lr_factor"]
    (old / "config.yaml").write_text(yaml.safe_dump(config))
    same = make_run(tmp_path / "same", "distilled", 0, 0.3)
    assert compare_runs([old, same])[0].notes == ("one pair shows a difference, not a gain; run more seeds (--seeds 0,1,2)",)
    other = make_run(tmp_path / "other", "distilled", 0, 0.3, backbone_lr_factor=0.1)
    with pytest.raises(RunError, match=r"seed 0: backbone_lr_factor 1\.0 and 0\.1"):
        compare_runs([old, other])


def test_other_data_are_refused_whatever_is_allowed(tmp_path):
    make_run(tmp_path / "a" / "b", "baseline", 0, 0.2)
    make_run(tmp_path / "a" / "d", "distilled", 0, 0.3, fingerprint="other")
    with pytest.raises(RunError, match="pkd: no baseline with the same student, data and seed"):
        compare_runs([tmp_path / "a"], allow_unequal=True)
    make_run(tmp_path / "v" / "b", "baseline", 0, 0.2)
    make_run(tmp_path / "v" / "d", "distilled", 0, 0.3, val_fingerprint="other")
    with pytest.raises(RunError, match="evaluated on different images"):
        compare_runs([tmp_path / "v"], allow_unequal=True)


def test_an_undefined_metric_is_refused(tmp_path):
    make_pairs(tmp_path, (0.1,))
    with pytest.raises(RunError, match="APl is undefined on its validation images"):
        compare_runs([tmp_path], metric="APl")


def test_an_unknown_metric_is_named_with_the_nearest(tmp_path):
    make_pairs(tmp_path, (0.1,))
    with pytest.raises(RunError, match=r"no metric 'AP_50' \(did you mean 'AP50'\?\); metrics: AP, AP50"):
        compare_runs([tmp_path], metric="AP_50")


def test_two_runs_of_one_seed_are_refused(tmp_path):
    make_pairs(tmp_path / "a", (0.1,))
    make_run(tmp_path / "b" / "again", "baseline", 0, 0.2)
    with pytest.raises(RunError, match=r"two baselines with seed 0: .*a/baseline-seed0 and .*b/again; give one of them"):
        compare_runs([tmp_path / "a", tmp_path / "b"])
    make_run(tmp_path / "c" / "again", "distilled", 0, 0.2)
    with pytest.raises(RunError, match="two pkd runs with seed 0"):
        compare_runs([tmp_path / "a", tmp_path / "c"])


def test_nothing_to_pair_says_what_makes_pairs(tmp_path):
    make_run(tmp_path / "b", "baseline", 0, 0.2)
    with pytest.raises(RunError, match=r"nothing to compare: 1 baseline and 0 distilled runs in .*--baseline true"):
        compare_runs([tmp_path])


def test_folders_are_expanded_once(tmp_path):
    make_pairs(tmp_path / "x", (0.1,))
    names = [path.name for path in expand([tmp_path / "x", tmp_path / "x" / "distilled-seed0"])]
    assert names == ["baseline-seed0", "distilled-seed0"]
    (tmp_path / "empty").mkdir()
    for missing in ("empty", "nowhere"):
        with pytest.raises(RunError, match=rf"{missing} holds no finished run \(no summary.json\)"):
            expand([tmp_path / missing])


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("summary.json", "{broken", "is not a complete run: Expecting property name"),
        ("summary.json", "[1]", "summary.json and config.yaml must hold keys and values"),
        ("summary.json", '{"role": "baseline"}', "is not a complete run: summary.json lacks student, teacher"),
        ("config.yaml", "a: [", "is not a complete run: while parsing"),
        ("config.yaml", "", "summary.json and config.yaml must hold keys and values"),
        ("config.yaml", None, "is not a complete run: .*No such file"),
    ],
)
def test_a_broken_run_is_named(tmp_path, name, content, expected):
    make_pairs(tmp_path, (0.1,))
    broken = tmp_path / "baseline-seed0" / name
    broken.unlink() if content is None else broken.write_text(content)
    with pytest.raises(RunError, match=expected) as error:
        compare_runs([tmp_path])
    assert "baseline-seed0" in str(error.value)


def test_table_and_json_say_the_same(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    (gain,) = gains = compare_runs([make_pairs(tmp_path, (0.02, 0.03, 0.04))])
    show_gains(gains)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == ["AP on the validation images (x 100)", "", "teacher runs/teacher", "student fcos:resnet10t"]
    head, row = (re.split(" {2,}", line.strip()) for line in lines[4:])
    assert head == ["method", "seeds", "baseline", "distilled", "gain", "95 % interval", "verdict"]
    assert row == ["pkd", "3", "20.0", "23.0", "+3.0", "+0.5 .. +5.5", "gain"]
    written = json.loads(json.dumps(gains_json(gains)))["gains"][0]
    assert written["mean"] == pytest.approx(gain.mean)
    assert written["verdict"] == "gain"
    assert written["pairs"][2] == {"seed": 2, "baseline": 0.2, "distilled": pytest.approx(0.24)}


def test_each_teacher_and_student_has_a_table_of_its_own(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    (gain,) = compare_runs([make_pairs(tmp_path, (0.02, 0.03, 0.04))])
    other = replace(gain, method="fgd", teacher="runs/b", notes=("seed 5: no baseline of the same student and data",))
    show_gains([replace(gain, teacher="runs/a"), other, replace(gain, method="cwd", teacher="runs/a")])
    blocks = capsys.readouterr().out.split("\n\n")[1:]
    shown = [[line.split()[:2] for line in block.splitlines() if not line.startswith("  method")] for block in blocks]
    assert shown == [
        [["teacher", "runs/a"], ["student", "fcos:resnet10t"], ["pkd", "3"], ["cwd", "3"]],
        [["teacher", "runs/b"], ["student", "fcos:resnet10t"], ["fgd", "3"], ["fgd:", "seed"]],
    ]


def test_a_name_that_leaves_no_room_for_its_numbers_stands_above_them(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    (gain,) = compare_runs([make_pairs(tmp_path, (0.02, 0.03, 0.04))])
    long = "fgd,profile=anchor_free,foreground_weight=0.0005,temperature=0.8+pkd,weight=2 + inherited head"
    teacher = "runs/" + 20 * "folder/"
    show_gains([replace(gain, method=long, teacher=teacher), replace(gain, teacher=teacher)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[lines.index("teacher") + 1] == teacher
    place = lines.index(f"  {long}")
    numbers = "3      20.0       23.0  +3.0   +0.5 .. +5.5  gain"
    assert [line.strip() for line in lines[place + 1 :]] == [numbers, f"pkd         {numbers}"]
    assert lines[place + 1].index("3") == lines[place + 2].index("3")
