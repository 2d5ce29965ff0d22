"""The grammar of model strings, and the reading of options into an adapter's dataclass."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal

import pytest

from detdistill.detectors.options import ModelName, ModelOptions, option_types, parse_model, read_options
from detdistill.errors import ModelError
from detdistill.values import Ascending, Count, Fraction, Index


@dataclass(frozen=True, kw_only=True)
class Shared(ModelOptions):
    score: Fraction = 0.05
    dets: Count = 100


@dataclass(frozen=True, kw_only=True)
class Own(Shared):
    dets: Count = 300
    levels: Annotated[tuple[Count, Count], Ascending()] = (3, 7)
    channels: tuple[Count, ...] | None = None
    convs: Index = 4
    pretrained: bool = False
    norm: Literal["bn", "frozen"] = "bn"


@dataclass(frozen=True, kw_only=True)
class OfAFolder(Shared):
    commas_in_backbone = True


def test_a_string_is_cut_at_its_commas() -> None:
    text = "any:resnet18, score=0.1,path=a=b"
    assert parse_model(text) == ModelName(text, "any", "resnet18", {"score": "0.1", "path": "a=b"})
    assert parse_model("any:a:b").backbone == "a:b"


def test_options_are_read_into_their_types() -> None:
    model = parse_model("any:resnet18,levels=3-5,channels=16-32,convs=0,pretrained=true,norm=frozen,score=1")
    own = read_options(Own, model)
    assert own == Own(levels=(3, 5), channels=(16, 32), convs=0, pretrained=True, norm="frozen", score=1.0, name=model.text)
    assert isinstance(own.score, float)
    assert read_options(Own, parse_model("any:resnet18")) == Own(name="any:resnet18")


def test_the_names_of_options_are_the_fields_but_name() -> None:
    assert list(option_types(Own)) == ["score", "dets", "levels", "channels", "convs", "pretrained", "norm"]
    assert option_types(Own)["dets"] == Count


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("resnet18", "model 'resnet18': expected detector:backbone[,key=value]..., e.g. retinanet:resnet18"),
        (":resnet18", "model ':resnet18': expected detector:backbone[,key=value]..., e.g. retinanet:resnet18"),
        ("any:,dets=3", "model 'any:,dets=3': expected detector:backbone[,key=value]..., e.g. retinanet:resnet18"),
        ("any:a,dets", "model 'any:a,dets': option dets needs a value, dets=..."),
        ("any:a,dets=", "model 'any:a,dets=': option dets needs a value, dets=..."),
        ("any:a,", "model 'any:a,': expected key=value after each comma, got ''"),
        ("any:a,=3", "model 'any:a,=3': expected key=value after each comma, got '=3'"),
        ("any:a,dets=3,dets=3", "model 'any:a,dets=3,dets=3': option dets is given twice"),
    ],
)
def test_malformed_strings_are_named_in_one_line(text: str, message: str) -> None:
    with pytest.raises(ModelError, match=f"^{re.escape(message)}$"):
        parse_model(text)


NAMES = "it has: score, dets, levels, channels, convs, pretrained, norm"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("nom=bn", f"any has no option 'nom' (did you mean 'norm'?); {NAMES}"),
        ("queries=3", f"any has no option 'queries'; {NAMES}"),
        ("name=x", f"any has no option 'name' (did you mean 'norm'?); {NAMES}"),
        ("dets=0", "model 'any:a,dets=0': dets='0' is not a whole number, 1 or more"),
        ("dets=many", "model 'any:a,dets=many': dets='many' is not a whole number, 1 or more"),
        ("convs=-1", "model 'any:a,convs=-1': convs='-1' is not a whole number, 0 or more"),
        ("score=2", "model 'any:a,score=2': score='2' is not a number from 0 to 1"),
        ("score=nan", "model 'any:a,score=nan': score='nan' is not a number from 0 to 1"),
        ("pretrained=maybe", "model 'any:a,pretrained=maybe': pretrained='maybe' is not true or false"),
        ("norm=frosen", "model 'any:a,norm=frosen': norm='frosen' is not one of bn, frozen (did you mean 'frozen'?)"),
        ("levels=5-3", "model 'any:a,levels=5-3': levels='5-3' is not a range, each end a whole number, 1 or more"),
        ("levels=3", "... a range, each end a whole number, 1 or more; its parts have '-' between them"),
        ("channels=16/32", "... a list, each a whole number, 1 or more, or none; its parts have '-' between them"),
    ],
)
def test_wrong_options_are_named_in_one_line(option: str, message: str) -> None:
    with pytest.raises(ModelError) as caught:
        read_options(Own, parse_model(f"any:a,{option}"))
    text = str(caught.value)
    assert text == message or (message.startswith("...") and text.endswith(message[4:]))
    assert "\n" not in text


def test_a_detector_may_be_named_otherwise_and_may_have_no_options() -> None:
    with pytest.raises(ModelError, match=r"^any:vgg16 has no option 'dets'; it has: none$"):
        read_options(ModelOptions, parse_model("any:vgg16,dets=3"), "any:vgg16")


@pytest.mark.parametrize(
    ("text", "backbone", "given"),
    [
        ("hf:a,b=1,c", "a,b=1,c", {}),
        ("hf:a,b=1,score=0.1,dets=2", "a,b=1", {"score": "0.1", "dets": "2"}),
        ("hf:a,score=0.1,b,dets=2", "a,score=0.1,b", {"dets": "2"}),
        ("hf:score=3", "score=3", {}),
        ("hf:a, dets=2", "a", {"dets": "2"}),
    ],
)
def test_a_backbone_with_commas_ends_where_only_known_options_follow(text: str, backbone: str, given: dict[str, str]) -> None:
    assert parse_model(text, OfAFolder) == ModelName(text, "hf", backbone, given)


def test_a_known_option_at_the_end_needs_a_value() -> None:
    with pytest.raises(ModelError, match=r"option score needs a value"):
        parse_model("hf:a,score", OfAFolder)
