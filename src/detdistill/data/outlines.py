"""Checks of COCO segmentations: polygons and run lengths become what training can draw, or the reason why not.

The segmentation of an object is a list of polygons, each a flat list of pixels ``[x1, y1, x2, y2, ...]``, or run lengths
``{"size": [height, width], "counts": ...}``, column by column, background first. The counts are a list of numbers or COCO's
compressed text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

NUMBERS = frozenset({int, float})
FAR = 10
"""Points farther from the origin than this many times the image's width plus height cannot be pixels of a polygon."""

Box = tuple[float, float, float, float]


def usable_outline(value: Any, size_hw: tuple[int, int]) -> tuple[Any, str]:
    """Check a segmentation.

    Args:
        value: what the annotation says.
        size_hw: height and width of the image, in pixels.

    Returns:
        Polygons or run lengths, or None if nothing can be drawn; and the problem, or an empty text. Both are given if only
        some of the polygons can be drawn.
    """
    if value is None or value == [] or value == {}:
        return None, ""
    if isinstance(value, dict):
        problem = _runs_problem(value, size_hw)
        return (None, problem) if problem else (value, "")
    polygons = as_polygons(value)
    if polygons is None:
        return None, f"segmentation is {_short(value)}, neither polygons nor run lengths with size and counts"
    limit = FAR * (size_hw[0] + size_hw[1])
    problems = [problem for polygon in polygons if (problem := _polygon_problem(polygon, limit))]
    if not problems:
        return polygons, ""
    kept = [polygon for polygon in polygons if not _polygon_problem(polygon, limit)]
    return kept or None, f"{len(problems)} of {len(polygons)} polygons cannot be drawn: {problems[0]}"


def outline_box(value: Any) -> Box | None:
    """The tight box of a segmentation, x1, y1, x2, y2 in pixels; None if it has none."""
    if isinstance(value, dict):
        size = value.get("size")
        if not isinstance(size, list | tuple) or _runs_problem(value, size):
            return None
        return _box_of_runs(run_lengths(value["counts"]), int(size[0]))
    points = [polygon for polygon in as_polygons(value) or () if not _polygon_problem(polygon, math.inf)]
    if not points:
        return None
    xs, ys = [x for polygon in points for x in polygon[0::2]], [y for polygon in points for y in polygon[1::2]]
    return float(min(xs)), float(min(ys)), float(max(xs)), float(max(ys))


def as_polygons(value: Any) -> list[Any] | None:
    """The list of polygons: a flat list of numbers is one polygon, and so is a list of three or more points ``[x, y]``."""
    if not isinstance(value, list) or not value:
        return None
    if len(value) == 1 and type(value[0]) is list:
        return value
    if all(type(one) in NUMBERS for one in value):
        return [value]
    if not all(isinstance(one, list) for one in value):
        return None
    if len(value) >= 3 and all(len(one) == 2 and set(map(type, one)) <= NUMBERS for one in value):
        return [[number for point in value for number in point]]
    return value


def run_lengths(counts: Any) -> np.ndarray:
    """Run lengths [R] int64 of COCO's counts: a list of numbers, or the compressed text.

    The text holds base-32 digits, lowest first; bit 5 marks that more follow, and bit 4 of the last one is the sign. From the
    third run on, the difference to the run before the previous one is stored.

    Raises:
        ValueError: a character does not belong to the code, or the text ends within a number.
    """
    if not isinstance(counts, str | bytes):
        return np.asarray(counts, dtype=np.int64)
    digits = np.frombuffer(counts.encode("latin-1") if isinstance(counts, str) else counts, dtype=np.uint8).astype(np.int64) - 48
    if digits.size == 0 or digits.min() < 0 or digits.max() > 63 or digits[-1] & 32:
        raise ValueError("not COCO's compressed run lengths")
    ends = np.flatnonzero((digits & 32) == 0)
    begins = np.concatenate([[0], ends[:-1] + 1])
    place = np.arange(digits.size) - np.repeat(begins, ends - begins + 1)
    if place.max() > 11:
        raise ValueError("a run length is too large")
    values = np.add.reduceat((digits & 31) << (5 * place), begins)
    values -= np.where(digits[ends] & 16, np.int64(1) << (5 * (ends - begins + 1)), 0)
    # values[i] += values[i - 2] from the fourth run on: two interleaved running sums, of which the first run is no part.
    values[1::2] = values[1::2].cumsum()
    values[2::2] = values[2::2].cumsum()
    return values


def _runs_problem(runs: Mapping[str, Any], size_hw: Sequence[Any]) -> str:
    size, counts = runs.get("size"), runs.get("counts")
    if not isinstance(size, list | tuple) or len(size) != 2 or any(type(side) is not int or side < 1 for side in size):
        return f"the size of its run lengths is {_short(size)}, not [height, width]"
    if tuple(size) != tuple(size_hw):
        return f"its run lengths are for {size[1]}x{size[0]} pixels, the image has {size_hw[1]}x{size_hw[0]}"
    if isinstance(counts, list):
        if not set(map(type, counts)) <= {int} or any(not 0 <= count <= size[0] * size[1] for count in counts):
            return "its run lengths are not whole numbers from 0 to the number of pixels"
        total = sum(counts)
    elif isinstance(counts, str | bytes):
        try:
            lengths = run_lengths(counts)
        except ValueError as error:
            return f"its counts cannot be decoded: {error}"
        if lengths.min() < 0 or lengths.max() > size[0] * size[1]:
            return "its counts cannot be decoded: a run length is negative or larger than the image"
        total = int(lengths.sum())
    else:
        return f"the counts of its run lengths are {_short(counts)}, neither a list nor a text"
    return "" if total == size[0] * size[1] else f"its run lengths sum to {total}, not to {size[1]}x{size[0]} pixels"


def _polygon_problem(polygon: Any, limit: float) -> str:
    if type(polygon) is not list or not NUMBERS.issuperset(map(type, polygon)):
        return f"{_short(polygon)} is no list of numbers"
    if len(polygon) < 6 or len(polygon) % 2:
        return f"{len(polygon)} numbers are no polygon: it needs x and y of at least three points"
    try:
        # Not a number, once added, makes the sum not a number.
        finite = math.isfinite(sum(polygon, 0.0)) and max(polygon) <= limit and min(polygon) >= -limit
    except OverflowError:
        finite = False
    if not finite:
        return "a coordinate is not finite, or far outside the image"
    if len(polygon) <= 8 and len(set(zip(polygon[0::2], polygon[1::2], strict=True))) < 3:
        return "it has fewer than three different points"
    return ""


def _box_of_runs(lengths: np.ndarray, height: int) -> Box | None:
    """Tight box of the pixels in the odd runs of a mask whose columns have ``height`` pixels."""
    ends = lengths.cumsum()
    begins, ends = (ends - lengths)[1::2], ends[1::2]
    begins, ends = begins[ends > begins], ends[ends > begins]
    if not len(begins):
        return None
    first, last = begins // height, (ends - 1) // height
    top, bottom = float((begins % height).min()), float(((ends - 1) % height).max() + 1)
    if (first != last).any():  # a run over the end of a column has that column's lowest pixel and the next one's highest
        top, bottom = 0.0, float(height)
    return float(first.min()), top, float(last.max() + 1), bottom


def _short(value: Any) -> str:
    return f"{value!r:.60}"
