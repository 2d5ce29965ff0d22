from collections.abc import Sequence
from typing import Literal

import pytest

from detdistill.detectors.contract import Teacher
from detdistill.methods.pkd import PKD
from detdistill.methods.shared.compose import build_method, method_class, method_slugs, parse_methods
from detdistill.methods.shared.hyper_parameters import (
    MethodError,
    check_some,
    checked_settings,
    hyper_parameters,
    read_setting,
)
from detdistill.values import Fraction, Weight, check
from tests.tiny import TinyDense


class Toy:
    def __init__(
        self,
        teacher: object,
        student: object,
        *,
        weight: Weight = 2.0,
        part: Fraction | None = None,
        levels: Sequence[int] = (0,),
        form: Literal["plain", "normal"] = "plain",
    ) -> None:
        raise AssertionError("settings are checked without building anything")


def test_hyper_parameters_are_the_keyword_only_arguments():
    found = hyper_parameters(Toy)
    assert {name: parameter.default for name, parameter in found.items()} == {
        "weight": 2.0, "part": None, "levels": (0,), "form": "plain",
    }  # fmt: skip
    assert list(found) == ["weight", "part", "levels", "form"]


def test_given_values_are_checked_and_the_others_are_the_defaults():
    assert checked_settings("toy", Toy, {}) == {"weight": 2.0, "part": None, "levels": (0,), "form": "plain"}
    found = checked_settings("toy", Toy, {"weight": 3, "levels": [1, 2], "part": 1})
    assert found == {"weight": 3.0, "part": 1.0, "levels": (1, 2), "form": "plain"}
    assert isinstance(found["weight"], float)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weight": -1.0}, "toy: weight=-1.0 is not a number, 0 or more"),
        ({"weight": "3"}, "toy: weight=3 is not a number, 0 or more"),
        ({"weight": True}, "toy: weight=True is not a number, 0 or more"),
        ({"weight": float("nan")}, "toy: weight=nan is not a number, 0 or more"),
        ({"part": 1.5}, "toy: part=1.5 is not a number from 0 to 1 or none"),
        ({"levels": 3}, "toy: levels=3 is not a list, each a whole number"),
        ({"form": "norml"}, "toy: form=norml is not one of plain, normal (did you mean 'normal'?)"),
        ({"wait": 1}, "toy has no hyper-parameter 'wait' (did you mean 'weight'?); it has: weight, part, levels, form"),
    ],
)
def test_values_of_another_kind_are_refused(given, message):
    with pytest.raises(MethodError) as error:
        checked_settings("toy", Toy, given)
    assert str(error.value) == message


def test_text_is_read_by_the_type():
    assert read_setting("toy", Toy, "weight", "1e-2") == 0.01
    assert read_setting("toy", Toy, "part", "none") is None
    assert read_setting("toy", Toy, "levels", "0/3") == (0, 3)
    with pytest.raises(MethodError) as error:
        read_setting("toy", Toy, "weight", "")
    assert str(error.value) == "toy: write weight=VALUE"
    with pytest.raises(MethodError) as error:
        read_setting("toy", Toy, "part", "2")
    assert str(error.value) == "toy: part=2 is not a number from 0 to 1 or none"


def test_python_and_command_line_refuse_alike():
    teacher, student = Teacher(TinyDense()), TinyDense()
    refusals = []
    for attempt in (lambda: PKD(teacher, student, weight=-1.0), lambda: build_method("pkd,weight=-1.0", teacher, student)):
        with pytest.raises(MethodError) as error:
            attempt()
        refusals.append(str(error.value))
    assert refusals == ["pkd: weight=-1.0 is not a number, 0 or more"] * 2


@pytest.mark.parametrize("slug", method_slugs())
def test_every_default_is_of_its_own_type(slug):
    for name, parameter in hyper_parameters(method_class(slug)).items():
        value = check(parameter.kind, parameter.default)
        assert value == parameter.default, name
        assert type(value) is type(parameter.default), name
    ((_, settings),) = parse_methods(slug)
    assert settings == {name: parameter.default for name, parameter in hyper_parameters(method_class(slug)).items()}


def test_weights_that_are_all_zero_are_refused():
    check_some("toy", cls_weight=0.0, l1_weight=0.5)
    with pytest.raises(MethodError) as error:
        check_some("toy", cls_weight=0.0, l1_weight=0.0)
    assert str(error.value) == "toy: cls_weight, l1_weight are all 0; nothing would be distilled"
