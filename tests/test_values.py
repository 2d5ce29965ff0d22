"""Typed values: what fits, what is refused, and in which words."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from detdistill.values import Ascending, Count, Fraction, Index, Limits, Positive, Weight, check, choices, in_words, read

Range = Annotated[tuple[Count, Count], Ascending()]

GOOD: list[tuple[Any, Any, Any]] = [
    (int, 3, 3),
    (float, 3, 3.0),
    (bool, True, True),
    (Weight, 0, 0.0),
    (Weight | None, None, None),
    (Fraction, 1, 1.0),
    (Positive, 1e-9, 1e-9),
    (Count, 1, 1),
    (Sequence[int], [1, 2], (1, 2)),
    (Sequence[int] | None, (0,), (0,)),
    (tuple[float, float] | None, [1, 2.5], (1.0, 2.5)),
    (tuple[Literal["a", "b"], ...], ["a", "b", "a"], ("a", "b", "a")),
    (Annotated[int | None, Limits(2)], 2, 2),
    (Range, [3, 7], (3, 7)),
    (Range | None, [3, 3], (3, 3)),
    (Literal[300, 512], 512, 512),
    (Path | None, Path("x"), Path("x")),
    (str, "x", "x"),
]


@pytest.mark.parametrize(("kind", "value", "wanted"), GOOD)
def test_a_value_of_its_type_comes_back_as_the_type_has_it(kind: Any, value: Any, wanted: Any) -> None:
    found = check(kind, value)
    assert found == wanted
    assert type(found) is type(wanted)


BAD: list[tuple[Any, Any, str]] = [
    (Weight, -1.0, "is not a number, 0 or more"),
    (Weight, math.nan, "is not a number, 0 or more"),
    (float, math.inf, "is not a number"),
    (Positive, 0, "is not a number above 0"),
    (Fraction, 1.1, "is not a number from 0 to 1"),
    (Count, 0, "is not a whole number, 1 or more"),
    (Count, 1.0, "is not a whole number, 1 or more"),
    (int, True, "is not a whole number"),
    (bool, 1, "is not true or false"),
    (Weight | None, "x", "is not a number, 0 or more, or none"),
    (Literal["sum", "mean"], "meen", "is not one of sum, mean (did you mean 'mean'?)"),
    (Sequence[Count], [1, 0], "is not a list, each a whole number, 1 or more"),
    (Sequence[int], 3, "is not a list, each a whole number"),
    (Sequence[int], "12", "is not a list, each a whole number"),
    (tuple[float, float], [1.0], "is not two numbers"),
    (Annotated[int | None, Limits(2)], 1, "is not a whole number, 2 or more, or none"),
    (Range, [7, 3], "is not a range, each end a whole number, 1 or more"),
    (Range, [0, 3], "is not a range, each end a whole number, 1 or more"),
    (Range, [3], "is not a range, each end a whole number, 1 or more"),
    (Literal[300, 512], 400, "is not one of 300, 512"),
]


@pytest.mark.parametrize(("kind", "value", "words"), BAD)
def test_a_value_of_another_type_is_refused_in_words(kind: Any, value: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(words)}$") as caught:
        check(kind, value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "text", "wanted"),
    [
        (Weight, "1e-3", 1e-3),
        (int, "7", 7),
        (Sequence[int] | None, "0/1/2", (0, 1, 2)),
        (Sequence[int] | None, "none", None),
        (Sequence[int], "-1", (-1,)),
        (bool, "false", False),
        (bool, "True", True),
        (Literal[300, 512], "512", 512),
        (Literal["none", "gn"], "none", "none"),
        (Literal["a", "b"] | None, "b", "b"),
        (str | None, "none", None),
        (str | None, "x", "x"),
        (tuple[int, ...], "8-16", (8, 16)),
    ],
)
def test_text_is_read_as_the_type_says(kind: Any, text: str, wanted: Any) -> None:
    assert read(kind, text, "-" if "8-16" in text else "/") == wanted


@pytest.mark.parametrize(
    ("kind", "text"), [(Weight, "nan"), (Weight, "-1"), (int, "1.5"), (bool, "yes"), (Index, "x"), (Literal["a"], "b")]
)
def test_text_that_says_something_else_is_refused(kind: Any, text: str) -> None:
    with pytest.raises(ValueError, match=r"^is not "):
        read(kind, text)


def test_choices_are_the_words_of_a_type() -> None:
    assert choices(Literal["a", "b"] | None) == ["a", "b"]
    assert choices(tuple[Literal["c"], ...]) == ["c"]
    assert choices(int) == []
    assert in_words(Path | None) == "a path or none"


def test_a_text_without_the_separator_is_told_it() -> None:
    with pytest.raises(ValueError, match=r"^is not a range, each end .*, 1 or more; its parts have '-' between them$"):
        read(Range, "3/7", "-")
    with pytest.raises(ValueError, match=r"^is not a range, each end a whole number, 1 or more$"):
        read(Range, "7-3", "-")
