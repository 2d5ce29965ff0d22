"""A search over settings: what is searched, on which images, and equal care for the student alone."""

import json
from pathlib import Path

import pytest
import yaml

from detdistill import api, cli
from detdistill.data.discover import hold_out, load_data
from detdistill.errors import DataError, DetdistillError, RunError
from detdistill.find import Searched, as_settings, new_study, read_searched, with_values
from detdistill.settings import DistillSettings

MODEL = "fcos:resnet10t,channels=8-8-8-8,stem=8,neck=32,levels=3-4,convs=1"
DIGITS = "digits:train=8,val=4,size=64,seed=0"


def test_held_out_images_come_from_train_and_val_is_not_seen():
    splits = load_data("digits:train=20,val=5,size=64,seed=0")
    held = load_data("digits:train=20,val=5,size=64,seed=0", held_out=0.25)
    train, val = ({record.id for record in part.records} for part in (held.train, held.val))
    assert (len(train), len(val)) == (15, 5)
    assert train | val == {record.id for record in splits.train.records}
    assert not {record.path for record in held.val.records} & {record.path for record in splits.val.records}
    assert held.notes[-1] == "held out: 5 of 20 training images are used as val instead of the val split"
    again = hold_out(splits, 0.25)
    assert again.val.fingerprint == held.val.fingerprint != splits.val.fingerprint


def test_too_much_held_out():
    splits = load_data("digits:train=2,val=2,size=64,seed=0")
    with pytest.raises(DataError, match=r"no usable box in the 0 training images left by held_out=0.9; hold out fewer$"):
        hold_out(splits, 0.9)


def test_what_is_searched():
    settings = DistillSettings(lr=0.002, method="pkd,weight=6+fgd")
    lr, own, weight = read_searched(("lr=1e-4..1e-2", "distill_weight", "pkd.weight=1..20"), settings)
    assert lr == Searched("lr", 1e-4, 1e-2)
    assert own == Searched("distill_weight", 0.1, 10.0)
    assert weight == Searched("pkd.weight", 1.0, 20.0)
    (around,) = read_searched(("lr",), settings)
    assert (around.low, around.high) == pytest.approx((0.0006, 0.006))


@pytest.mark.parametrize(
    ("over", "expected"),
    [
        ((), "over: nothing to search; give some of lr, distill_weight, balance, or METHOD.NAME=LOW..HIGH"),
        (("momentum",), "over: no setting 'momentum' to search; lr, distill_weight, balance or METHOD.NAME=LOW..HIGH"),
        (("lr=1",), "over: lr=1: write lr=LOW..HIGH, e.g. lr=0.1..10"),
        (("lr=2..1",), "over: lr=2..1: the first number must be smaller than the second"),
        (("balance=0.5..1",), "over: balance=0.5..1 must lie above 0 and below 1"),
        (("balance", "distill_weight"), "over: balance holds the share that distill_weight would change; search one of them"),
        (("lr", "lr=0.1..1"), "over: lr, lr=0.1..1 names one thing twice"),
        (("fgd.alpha=1..2",), "over: fgd.alpha: fgd is no method of this run; it has pkd"),
        (("pkd.wieght=1..2",), "pkd has no hyper-parameter 'wieght' (did you mean 'weight'?); it has: "),
        (("pkd.weight",), "over: pkd.weight: give its range, pkd.weight=LOW..HIGH"),
    ],
)
def test_what_cannot_be_searched(over, expected):
    with pytest.raises(DetdistillError) as caught:
        read_searched(over, DistillSettings())
    assert str(caught.value).startswith(expected)


def test_values_of_a_trial_as_settings():
    assert with_values("pkd,weight=6+fgd", {"pkd.weight": 2.5, "lr": 0.001}) == "pkd,weight=2.5+fgd"
    assert with_values("fgd,temperature=0.8", {"pkd.weight": 2.0}) == "fgd,temperature=0.8"
    assert as_settings("pkd", {"lr": 0.001}) == {"lr": 0.001}
    assert as_settings("pkd", {"pkd.weight": 3.0, "balance": 0.2}) == {"balance": 0.2, "method": "pkd,weight=3"}


def test_the_first_trial_is_what_was_given_and_suggestions_depend_on_the_seed_only():
    settings = DistillSettings(lr=0.002)
    searched = read_searched(("lr", "distill_weight"), settings)

    def suggestions():
        study, found = new_study(searched, settings, 3), []
        for ap in (0.1, 0.3, 0.2, 0.25, 0.22):
            trial = study.ask()
            found.append([one.suggest(trial) for one in searched])
            study.tell(trial, ap)
        return found

    first = suggestions()
    assert first[0] == [0.002, 1.0]
    assert first == suggestions()
    assert all(0.0006 <= lr <= 0.006 and 0.1 <= weight <= 10 for lr, weight in first)
    assert len({tuple(one) for one in first}) == 5


def test_a_search_end_to_end_and_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    api.train(MODEL, DIGITS, steps=1, batch=4, size=64, out=tmp_path / "teacher", report=False)
    words = [
        "find",
        "--teacher",
        str(tmp_path / "teacher"),
        "--student",
        MODEL,
        "--data",
        DIGITS,
        "--over",
        "lr",
        "--trials",
        "2",
    ]
    words += ["--steps", "1", "--batch", "4", "--size", "64", "--out", str(tmp_path / "found"), "--held_out", "0.25"]
    cli.main([*words, "--json", "true"])
    shown = capsys.readouterr()
    document = json.loads(shown.out)
    assert "budget: 4 runs of 1 steps: 2 distilled, 2 alone" in shown.err
    assert [one["number"] for one in document["tried"]] == [0, 1]
    assert document["tried"][0]["values"] == {"lr": 0.001}
    assert all(one["alone"] is not None for one in document["tried"])
    assert document["held_out"] == 0.25
    assert document == json.loads((tmp_path / "found/find.json").read_text())
    best = yaml.safe_load((tmp_path / "found/best.yaml").read_text())
    assert best == {"lr": document["tried"][document["best_trial"]]["values"]["lr"]}
    for role in ("baseline", "distilled"):
        config = yaml.safe_load((tmp_path / f"found/trial01/{role}-seed0/config.yaml").read_text())
        assert (config["lr"], config["held_out"]) == (document["tried"][1]["values"]["lr"], 0.25)
    summary = json.loads((tmp_path / "found/trial00/distilled-seed0/summary.json").read_text())
    assert summary["data"]["val_fingerprint"] == load_data(DIGITS, held_out=0.25).val.fingerprint
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("found/trial*/*/summary.json")}
    words[words.index("--trials") + 1] = "3"
    cli.main([*words, "--resume", "true"])
    assert {path: path.stat().st_mtime_ns for path in before} == before, "finished runs are not repeated"
    assert json.loads((tmp_path / "found/find.json").read_text())["tried"][:2] == document["tried"]
    assert len(list(tmp_path.glob("found/trial*"))) == 3
    text = capsys.readouterr().out
    assert "the validation images were not used" in " ".join(text.split())


def test_held_out_does_not_fit_a_cache():
    with pytest.raises(RunError, match=r"^held_out: a cache holds all training images; leave out --cache or --held_out$"):
        DistillSettings(held_out=0.2, cache="somewhere")
