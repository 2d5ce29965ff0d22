import math

import numpy as np
import pytest

from detdistill.data.outlines import outline_box, run_lengths, usable_outline

SIZE = (6, 8)
TRIANGLE = [1, 1, 5, 1, 5, 4]
COUNTS = [7, 2, 4, 2, 33]
"""In columns of 6 pixels: rows 1 and 2 of columns 1 and 2."""


def compressed(counts, size_hw):
    from faster_coco_eval.core import mask

    values = np.repeat(np.arange(len(counts)) % 2, counts).reshape(size_hw[::-1]).T
    return mask.encode(np.asfortranarray(values.astype(np.uint8)))["counts"].decode()


@pytest.mark.parametrize("value", [None, [], {}])
def test_no_outline_is_no_problem(value):
    assert usable_outline(value, SIZE) == (None, "")


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        ([TRIANGLE], [TRIANGLE]),
        (TRIANGLE, [TRIANGLE]),
        ([[1, 1], [5, 1], [5.5, 4]], [[1, 1, 5, 1, 5.5, 4]]),
        ({"size": [6, 8], "counts": COUNTS}, {"size": [6, 8], "counts": COUNTS}),
    ],
)
def test_what_can_be_drawn_is_kept(value, kept):
    assert usable_outline(value, SIZE) == (kept, "")


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("[[1, 1, 5, 1, 5, 4]]", "neither polygons nor run lengths"),
        (7, "neither polygons nor run lengths"),
        (True, "neither polygons nor run lengths"),
        ([[1, 1, 5, 5]], "4 numbers are no polygon"),
        ([1, 1, 5, 5], "4 numbers are no polygon"),
        ([[1, 1, 5, 1, 5]], "5 numbers are no polygon"),
        ([[]], "0 numbers are no polygon"),
        ([[1, 1, 5, 1, math.nan, 4]], "not finite"),
        ([[1, 1, 5, 1, math.inf, 4]], "not finite"),
        ([[1, 1, 5, 1, 10**400, 4]], "not finite"),
        ([[1, 1, 5, 1, 1e9, 4]], "far outside"),
        ([["1", "1", "5", "1", "5", "4"]], "is no list of numbers"),
        ([[True, 1, 5, 1, 5, 4]], "is no list of numbers"),
        ([[1, 1, 5, 5, 1, 1]], "fewer than three different points"),
        ([[0, 700, 3, 800, 5, 900]], "far outside"),
        ([{"size": [6, 8], "counts": COUNTS}, {"size": [6, 8], "counts": COUNTS}], "neither polygons nor run lengths"),
        ({"counts": COUNTS}, "the size of its run lengths is None"),
        ({"size": ["6", "8"], "counts": COUNTS}, "the size of its run lengths is"),
        ({"size": [8, 6], "counts": COUNTS}, "for 6x8 pixels, the image has 8x6"),
        ({"size": [6, 8]}, "neither a list nor a text"),
        ({"size": [6, 8], "counts": [40, 7]}, "sum to 47, not to 8x6"),
        ({"size": [6, 8], "counts": [50, -2]}, "not whole numbers from 0"),
        ({"size": [6, 8], "counts": [24.0, 24.0]}, "not whole numbers from 0"),
        ({"size": [6, 8], "counts": "~~"}, "cannot be decoded"),
        ({"size": [6, 8], "counts": "\u00e9"}, "cannot be decoded"),
        ({"size": [6, 8], "counts": "P"}, "cannot be decoded"),
        ({"size": [6, 8], "counts": ""}, "cannot be decoded"),
        ({"size": [6, 8], "counts": "o" * 40 + "0"}, "cannot be decoded"),
    ],
)
def test_what_cannot_be_drawn_has_a_reason(value, problem):
    kept, reason = usable_outline(value, SIZE)
    assert kept is None
    assert problem in reason


def test_good_parts_are_kept_beside_bad_ones():
    kept, reason = usable_outline([TRIANGLE, [1, 2, 3, 4]], SIZE)
    assert kept == [TRIANGLE]
    assert reason.startswith("1 of 2 polygons cannot be drawn")


@pytest.mark.parametrize("seed", range(20))
def test_compressed_counts_are_those_of_the_library(seed):
    generator = np.random.default_rng(seed)
    size = int(generator.integers(2, 300)), int(generator.integers(2, 300))
    ends = np.sort(generator.choice(size[0] * size[1] - 1, min(30, size[0] * size[1] // 2), replace=False) + 1)
    counts = np.diff([0, *ends, size[0] * size[1]]).tolist()
    text = compressed(counts, size)
    assert run_lengths(text).tolist() == counts
    assert usable_outline({"size": list(size), "counts": text}, size)[1] == ""


@pytest.mark.parametrize(
    ("value", "box"),
    [
        ([TRIANGLE], (1, 1, 5, 4)),
        ([TRIANGLE, [0, 2, 1, 2, 1, 5]], (0, 1, 5, 5)),
        ({"size": [6, 8], "counts": COUNTS}, (1, 1, 3, 3)),
        ({"size": [6, 8], "counts": compressed(COUNTS, SIZE)}, (1, 1, 3, 3)),
        ({"size": [6, 8], "counts": [7, 8, 33]}, (1, 0, 3, 6)),
        ({"size": [6, 8], "counts": [48]}, None),
        ({"size": [6, 8], "counts": [47]}, None),
        ("text", None),
        ([[1, 2, 3, 4]], None),
    ],
)
def test_the_tight_box(value, box):
    assert outline_box(value) == box
