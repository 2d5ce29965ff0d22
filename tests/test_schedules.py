"""Gains at several lengths: at equal steps, at equal time, and what they mean."""

import json

import pytest

from detdistill import api, cli
from detdistill.compare import summarize
from detdistill.errors import RunError
from detdistill.schedules import Schedule, baseline_at, check_factors, meaning, over_schedules
from tests.test_compare import P, make_run

MODEL = "fcos:resnet10t,channels=8-8-8-8,stem=8,neck=32,levels=3-4,convs=1"
DIGITS = "digits:train=8,val=4,size=64,seed=0"


def make_length(folder, epochs, alone, distilled, slower=2.0):
    """Runs of two seeds, whose baselines take 100 seconds an epoch."""
    runs = []
    for seed in (0, 1):
        common = {"epochs": epochs, "steps": 10 * epochs, "images_seen": 80 * epochs}
        runs.append(
            make_run(folder / f"baseline-seed{seed}", "baseline", seed, alone + 0.01 * seed, seconds=100.0 * epochs, **common)
        )
        ap = distilled + 0.01 * seed
        runs.append(make_run(folder / f"distilled-seed{seed}", "distilled", seed, ap, seconds=100.0 * slower * epochs, **common))
    return runs


def test_at_equal_steps_and_at_equal_time(tmp_path):
    one = make_length(tmp_path / "1x", 1, alone=0.20, distilled=0.30)
    four = make_length(tmp_path / "4x", 4, alone=0.30, distilled=0.34)
    first, last = over_schedules({4.0: four, 1.0: one})
    assert (first.factor, first.gain.mean, first.gain.verdict) == (1.0, pytest.approx(0.10), "gain")
    assert (first.seconds_alone, first.seconds_distilled) == (100.0, 200.0)
    # 200 seconds lie halfway between 100 and 400 on the logarithm, so the baseline has 0.25 then.
    assert first.at_equal_time.mean == pytest.approx(0.05)
    assert last.gain.mean == pytest.approx(0.04)
    assert last.at_equal_time is None  # no baseline trained 800 seconds
    assert meaning((first, last)) == "partly faster convergence: +10.0 at 1x, +4.0 at 4x; what is left at 4x is a gain"


@pytest.mark.parametrize(
    ("gains", "expected"),
    [
        (([0.10, 0.102], [0.09, 0.092]), "a better student, as far as 3x shows: +10.1 at 1x, +9.1 at 3x"),
        (([0.10, 0.102], [0.02, -0.02]), "faster convergence: +10.1 at 1x, and no gain shown at 3x (+0.0)"),
        (([0.05, -0.05], [0.05, 0.052]), "a better student, as far as 3x shows: +0.0 at 1x, +5.1 at 3x"),
        (([0.05, -0.05], [0.02, -0.02]), "no gain shown: +0.0 at 1x, +0.0 at 3x"),
        (([0.05, 0.052], [-0.05, -0.052]), "worse at 3x: +5.1 at 1x, -5.1 at 3x"),
        (([0.05], [0.04]), "+5.0 at 1x, +4.0 at 3x on one seed: no verdict; run more seeds (--seeds 0,1,2)"),
    ],
)
def test_what_the_gains_mean(gains, expected):
    found = []
    for factor, some in zip((1.0, 3.0), gains, strict=True):
        pairs = [P(seed, 0.3, 0.3 + gain) for seed, gain in enumerate(some)]
        found.append(Schedule(factor, summarize("pkd", "t", "s", "AP", pairs), 1.0, 2.0, None))
    assert meaning(found) == expected


def test_no_baseline_encloses_the_time():
    assert baseline_at(99.0, [(100.0, 0.2), (400.0, 0.3)]) is None
    assert baseline_at(400.0, [(400.0, 0.3), (100.0, 0.2)]) == 0.3
    assert baseline_at(100.0, []) is None


@pytest.mark.parametrize(
    ("factors", "length", "expected"),
    [
        ((1,), 12, "at: 1 must be two or more numbers above 0, such as 1,3"),
        ((1, 0), 12, "at: 1,0 must be two or more numbers above 0"),
        ((1, 1.2), 2, r"at: two lengths are equal \(1x is 2, 1.2x is 2 epochs\); give factors further apart"),
    ],
)
def test_lengths_that_cannot_be_compared(factors, length, expected):
    with pytest.raises(RunError, match=expected):
        check_factors(factors, length, "epochs")


def test_lengths_are_rounded_and_ascend():
    assert check_factors((3, 0.5), 5, "steps") == ((0.5, 2), (3, 15))


def test_the_command_runs_every_length(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    teacher = tmp_path / "teacher"
    common = ["--data", DIGITS, "--size", "64", "--batch", "4", "--device", "cpu"]
    cli.main(["train", "--model", MODEL, "--out", str(teacher), "--steps", "1", "--report", "false", *common])
    capsys.readouterr()
    words = ["schedules", "--teacher", str(teacher), "--student", MODEL, "--method", "pkd", "--at", "1,2", "--steps", "1"]
    cli.main([*words, "--seeds", "0,1", "--out", str(tmp_path / "out"), *common])
    shown = capsys.readouterr().out
    assert "at equal time" in shown
    assert max(map(len, shown.splitlines())) <= 80
    written = json.loads((tmp_path / "out" / "schedules.json").read_text())
    assert [one["factor"] for one in written["schedules"]] == [1.0, 2.0]
    steps = {
        path.parent.parent.name: json.loads(path.read_text())["steps"] for path in (tmp_path / "out").glob("*x/*/summary.json")
    }
    assert steps == {"1x": 1, "2x": 2}
    assert len(list((tmp_path / "out").glob("*x/*/summary.json"))) == 8
    assert (tmp_path / "out" / "report.html").is_file()
    with pytest.raises(RunError, match="at: 1 must be two or more"):
        api.schedules(str(teacher), MODEL, DIGITS, "pkd", at=(1,))
