import dataclasses
import math
from pathlib import Path

import pytest
import yaml

from detdistill.errors import RunError, nearest
from detdistill.settings import BUDGET, CacheSettings, DistillSettings, TrainSettings, as_plain, names_where


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("lr", -1.0, "lr: -1.0 is not a number above 0"),
        ("lr", math.nan, "lr: nan is not a number above 0"),
        ("lr", math.inf, "lr: inf is not a number above 0"),
        ("lr", 0.0, "lr: 0.0 is not a number above 0"),
        ("lr", "fast", "lr: 'fast' is not a number above 0"),
        ("lr", True, "lr: True is not a number above 0"),
        ("epochs", 0, "epochs: 0 is not a whole number, 1 or more"),
        ("epochs", 2.5, "epochs: 2.5 is not a whole number, 1 or more"),
        ("steps", "many", "steps: 'many' is not a whole number, 1 or more, or none"),
        ("batch", -4, "batch: -4 is not a whole number, 1 or more"),
        ("size", 16, "size: 16 is not a whole number, 32 or more"),
        ("flip", 1.5, "flip: 1.5 is not a number from 0 to 1"),
        ("ema", 1.0, "ema: 1.0 is not a number, 0 or more and below 1"),
        ("optimizer", "adam", "optimizer: 'adam' is not one of adamw, sgd (did you mean 'adamw'?)"),
        ("precision", 32, "precision: 32 is not one of 32, bf16, 16 (did you mean '32'?)"),
        ("track", ("wandbb",), "track: ('wandbb',) is not a list, each one of wandb, mlflow (did you mean 'wandb'?)"),
        ("scale_jitter", (1.5, 0.5), "scale_jitter: 1.5,0.5 must be two numbers, smaller first"),
        ("scale_jitter", (0.0, 1.0), "scale_jitter: (0.0, 1.0) is not two numbers above 0 or none"),
        ("scale_jitter", (math.nan, 1.0), "scale_jitter: (nan, 1.0) is not two numbers above 0 or none"),
        ("scale_jitter", (1.0,), "scale_jitter: (1.0,) is not two numbers above 0 or none"),
        ("strict", "yes", "strict: 'yes' is not true or false"),
        ("out", "runs/a", "out: 'runs/a' is not a path or none"),
    ],
)
def test_each_bad_value_is_named_in_one_line(name, value, expected):
    with pytest.raises(RunError) as error:
        TrainSettings(**{name: value})
    assert str(error.value) == expected


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("distill_weight", math.nan, "distill_weight: nan is not a number, 0 or more"),
        ("distill_weight", -0.5, "distill_weight: -0.5 is not a number, 0 or more"),
        ("jobs", 0, "jobs: 0 is not a whole number, 1 or more"),
        ("seeds", (0, 1, 0), "seeds: 0,1,0 must be different whole numbers, 0 or more"),
        ("seeds", (0, -1), "seeds: (0, -1) is not a list, each a whole number, 0 or more"),
        ("seeds", 3, "seeds: 3 is not a list, each a whole number, 0 or more"),
        ("lr", -1.0, "lr: -1.0 is not a number above 0"),
    ],
)
def test_settings_of_distillation_are_checked_too(name, value, expected):
    with pytest.raises(RunError) as error:
        DistillSettings(**{name: value})
    assert str(error.value) == expected


def test_whole_numbers_are_numbers_and_lists_are_tuples():
    settings = DistillSettings(lr=1, seeds=[0, 1], scale_jitter=[0.5, 2])
    assert settings.lr == 1
    assert settings.seeds == (0, 1)
    assert settings.scale_jitter == (0.5, 2)


def test_plain_settings_come_back_from_yaml_unchanged():
    settings = DistillSettings(out=Path("runs/a"), seeds=(0, 2), scale_jitter=(0.5, 1.5), lr=1e-5, track=("wandb",))
    plain = as_plain(settings)
    assert list(plain) == [field.name for field in dataclasses.fields(DistillSettings)]
    back = yaml.safe_load(yaml.safe_dump(plain))
    assert back == plain
    assert DistillSettings(**{**back, "out": Path(back["out"])}) == settings


def test_nearest_names_the_closest_or_nothing():
    assert nearest("pdk", ["pkd", "fgd"]) == " (did you mean 'pkd'?)"
    assert nearest("zzz", ["pkd", "fgd"]) == ""


def test_the_budget_is_what_the_settings_say_of_themselves():
    """How long, by which optimizer, in which precision, on which images and views: not chance, files, logs, or the teacher."""
    assert set(names_where(TrainSettings, "views")) < set(BUDGET)
    assert {"epochs", "steps", "batch", "lr", "precision", "ema", "sync_bn", "held_out"} < set(BUDGET)
    assert not {"seed", "device", "init", "log_every", "patience", "out", "channels_last", "strategy"} & set(BUDGET)
    for kind in (DistillSettings, CacheSettings):  # their own settings belong to the teaching
        assert names_where(kind, "budget") == BUDGET
