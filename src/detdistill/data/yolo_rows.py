"""Rows of YOLO label files: parsing, and the decision what the values after the class are.

``class cx cy width height`` is a box. Longer rows may be polygons, oriented boxes, boxes with points (pose, landmarks) or the
output of a tracker or predictor, and a single row often fits several of these. So the form is decided once for the whole data
set, by how many rows fit each reading; if two readings fit, the set is refused until its YAML file says ``task``.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from detdistill.errors import DataError, subject

Task = Literal["detect", "segment", "pose", "obb"]
TASKS: tuple[Task, ...] = ("detect", "segment", "pose", "obb")
FITS = 0.95
"""A reading is possible if it fits this share of the long rows; the others are errors in the data."""
RARE = 0.05
"""Long rows that fit two readings are errors, not a reason to refuse the set, if they are at most this share of all rows."""


class Row(NamedTuple):
    """One row of a label file."""

    number: int
    """Line in the file, from 1."""
    text: str
    label: float
    values: list[float]
    """The numbers after the class; empty if the row has something else than numbers."""


def parse_rows(text: str) -> list[Row]:
    """Rows of a label file without the empty lines."""
    rows = []
    underscores = "_" in text  # Python reads 1_0 as 10
    for number, line in enumerate(text.splitlines(), start=1):
        parts = line.split()
        if not parts:
            continue
        try:
            if underscores and "_" in line:
                raise ValueError
            label, *values = map(float, parts)
        except ValueError:
            label, values = math.nan, []
        rows.append(Row(number, line.strip(), label, values))
    return rows


@dataclass(frozen=True)
class RowForm:
    """How rows with more than four values are read; rows with four values are boxes in every form."""

    name: str
    """As shown to the user."""
    polygon: bool = False
    """True if the row is a polygon; False: its first four values are a box."""
    tail: int = 0
    """Number of values after the polygon that are not part of it."""
    lengths: frozenset[int] | None = None
    """Numbers of values that a row of this form may have; None: any that the reading allows."""

    def shape(self, values: Sequence[float]) -> Sequence[float] | None:
        """The values of a row that are coordinates: four of a box, at least six of a polygon; None: the row is malformed."""
        if len(values) == 4:
            return values
        if len(values) < 5 or (self.lengths is not None and len(values) not in self.lengths):
            return None
        if not self.polygon:
            return values[:4]
        corners = values[: len(values) - self.tail]
        return corners if len(corners) >= 6 and len(corners) % 2 == 0 else None


BOXES = RowForm("boxes", lengths=frozenset({4}))
POLYGONS = RowForm("polygons", polygon=True)


def form_of(file: str, rows: Iterable[Row], task: Task | None, points: tuple[int, int] | None) -> tuple[RowForm, str]:
    """Decide the form of a data set's long rows.

    Args:
        file: the YAML file, for messages.
        rows: all rows of all splits.
        task: what the YAML file says under ``task``; None: nothing.
        points: ``kpt_shape`` of the YAML file (number of points, values of each); None: it has none.

    Returns:
        The form, and a note for the user (may be empty).

    Raises:
        DataError: two readings fit the rows.
    """
    total, long = 0, []
    for row in rows:
        total += bool(row.values)
        if len(row.values) > 4:
            long.append(row.values)
    if points is not None and task in (None, "pose"):
        return RowForm("boxes with points", lengths=frozenset({4 + points[0] * points[1]})), ""
    if task is not None:
        return _told(task, long)
    if not long:
        return BOXES, ""
    shares = {form: sum(map(fits, long)) / len(long) for form, fits in _readings(long).items()}
    possible = [form for form, share in shares.items() if share >= FITS]
    if POLYGONS in possible and sum(map(_parallelogram, long)) >= FITS * len(long):
        return POLYGONS, ""
    if len(possible) > 1 and len(long) > RARE * total:
        names = " or ".join(form.name for form in possible)
        raise DataError(
            f"{file}: {len(long)} of {total} rows have {_counts(long)} values after the class, which may be {names}; "
            f"write 'task: segment' (polygons), 'task: obb' (four corners), or 'task: detect' (the first four values are the box "
            f"and the others are not used) into this file"
        )
    if not possible:
        # Many rows are broken: the form that fits most of the others, if there is only one.
        possible = [form for form, share in shares.items() if share > 0.5]
    if len(possible) != 1:
        return BOXES, ""
    form = possible[0]
    if form.name == TRACKED and 2 * len(long) < total:
        return BOXES, ""
    unused = "" if form == POLYGONS else f"{len(long)} of {total} rows are {form.name}: only the {_used(form)} are used"
    return form, unused


def _told(task: Task, long: list[list[float]]) -> tuple[RowForm, str]:
    if task == "segment":
        return POLYGONS, ""
    if task == "obb":
        return RowForm("oriented boxes", polygon=True, lengths=frozenset({8})), ""
    rows = subject(len(long), "row", "have")
    note = f"{rows} more than four values after the class: only the first four, the box, are used"
    return RowForm("boxes with other values"), note if long else ""


def _used(form: RowForm) -> str:
    return "polygons" if form.polygon else "boxes"


def _counts(rows: Sequence[Sequence[float]]) -> str:
    counts = sorted({len(values) for values in rows})
    return " or ".join(map(str, counts)) if len(counts) < 4 else f"{counts[0]} to {counts[-1]}"


TRACKED = "boxes with a confidence or a track number"


def _readings(long: list[list[float]]) -> dict[RowForm, Callable[[list[float]], bool]]:
    """The forms that long rows may have, each with its test of a row."""
    usual = Counter(map(len, long)).most_common(1)[0][0]
    more = usual - 4

    def boxes_with_points(row: list[float]) -> bool:
        if len(row) != usual or not _is_box(row):
            return False
        flat = more % 2 == 0 and all(map(_near, itertools.repeat(row), row[4::2], row[5::2]))
        # The third value of a point is its visibility or its confidence.
        return flat or (
            more % 3 == 0
            and all(value == 2 or 0 <= value <= 1 for value in row[6::3])
            and all(map(_near, itertools.repeat(row), row[4::3], row[5::3]))
        )

    return {
        RowForm(TRACKED, lengths=frozenset({5, 6})): _is_tracked,
        RowForm(f"boxes with {more} values of points", lengths=frozenset({usual})): boxes_with_points,
        POLYGONS: lambda row: len(row) % 2 == 0 and _is_polygon(row),
        RowForm("polygons with a confidence", polygon=True, tail=1): (
            lambda row: len(row) % 2 == 1 and _is_polygon(row[:-1]) and 0 <= row[-1] <= 1
        ),
        RowForm("polygons with a confidence and a track number", polygon=True, tail=2): (
            lambda row: len(row) % 2 == 0 and _is_polygon(row[:-2]) and 0 <= row[-2] <= 1 < row[-1] and row[-1].is_integer()
        ),
    }


def _is_box(row: Sequence[float]) -> bool:
    """The first four values are center and size of a box inside the image, up to rounding."""
    (cx, cy, width, height), slack = row[:4], 0.01
    return (
        width > 0
        and height > 0
        and cx - width / 2 > -slack
        and cy - height / 2 > -slack
        and cx + width / 2 < 1 + slack
        and cy + height / 2 < 1 + slack
    )


def _near(row: Sequence[float], x: float, y: float) -> bool:
    """The point lies in the row's box or a quarter of its size beside it, or it is one that was not seen (0 or negative)."""
    cx, cy, width, height = row[:4]
    return (abs(x - cx) <= 0.75 * width and abs(y - cy) <= 0.75 * height) or (x == y == 0) or (x < 0 and y < 0)


def _is_tracked(row: Sequence[float]) -> bool:
    if not _is_box(row):
        return False
    if len(row) == 5:
        return 0 <= row[4] <= 1 or (row[4] > 0 and row[4].is_integer())
    return len(row) == 6 and 0 <= row[4] <= 1 and row[5] >= 0 and row[5].is_integer()


def _is_polygon(row: Sequence[float]) -> bool:
    """At least three corners near the image. Points that are not seen are often written as -1: these are no corners."""
    return len(row) >= 6 and all(-0.5 < value < 1.5 for value in row)


def _parallelogram(row: Sequence[float]) -> bool:
    """Four corners whose opposite sides are equal: an oriented box. A box and two points are so only by chance."""
    return len(row) == 8 and all(abs(row[axis] + row[axis + 4] - row[axis + 2] - row[axis + 6]) < 2e-3 for axis in (0, 1))
