"""Draw curves and bars as inline SVG with the colours of the page, for light mode, dark mode and print."""

from __future__ import annotations

import io
import math
import re
import statistics
import warnings
import zlib
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any

from detdistill.report.runs import Curve, Group

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NUM_COLOURS = 6
"""Number of method colours in the page's style sheet: ``--c0`` .. ``--c5``."""
DASHES = {"solid": "-", "dotted": ":", "dashdot": "-."}
"""Line styles of the first six methods, the next six, and all others."""
MOST_WITH_SEEDS = 5
"""Figures of more groups show only the means over the seeds."""
_SENTINELS = {"ink": "#010101", "grid": "#020202", "teacher": "#030303", "baseline": "#040404"} | {
    f"c{index}": f"#0505{index + 16:02x}" for index in range(NUM_COLOURS)
}
"""Placeholder colours for matplotlib; each is replaced by ``var(--name)`` of the page."""
MOST_POINTS = 150
"""Longer curves are averaged in at most this many bins."""
MOST_CLASSES = 60
WIDTH_INCH, HEIGHT_INCH = 4.3, 2.7


class Palette:
    """Colour of each group, the same on the whole page."""

    def __init__(self, groups: Sequence[Group]) -> None:
        """Assign the colours: fixed for teacher and baseline, in order for methods and plain runs."""
        self._names: dict[tuple[str, str], str] = {}
        for group in groups:
            if group.role in ("teacher", "baseline"):
                self._names[group.role, group.label] = group.role
            else:
                taken = sum(name.startswith("c") for name in self._names.values())
                self._names[group.role, group.label] = f"c{taken % NUM_COLOURS}"

    def name(self, group: Group) -> str:
        """Name of the group's colour in the style sheet, without the leading dashes."""
        return self._names[group.role, group.label]

    def line(self, group: Group) -> str:
        """Style of the group's lines: ``dashed`` for the teacher, else one of ``DASHES``, so that no two groups look alike."""
        if group.role == "teacher":
            return "dashed"
        others = [key for key, name in self._names.items() if name.startswith("c")]
        turn = others.index((group.role, group.label)) // NUM_COLOURS if (group.role, group.label) in others else 0
        return list(DASHES)[min(turn, len(DASHES) - 1)]


def curves(
    groups: Sequence[Group],
    palette: Palette,
    column: str,
    against: str = "steps",
    *,
    factor: float = 1.0,
    label: str = "",
    level: float | None = None,
) -> str:
    """Draw a column of ``metrics.csv`` for all runs: thin lines for seeds, thick for their mean, dashed for the teacher.

    With more than ``MOST_WITH_SEEDS`` groups only the means are drawn.

    Args:
        groups: the groups to draw.
        palette: colours.
        column: column of ``metrics.csv``.
        against: x axis: ``steps``, ``epochs`` or ``seconds``.
        factor: factor on the values (100 for AP).
        label: title of the panel.
        level: the teacher's value as a horizontal line, used if the teacher's run is not among the groups.

    Returns:
        The SVG; empty if no run logged the column.
    """
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    with _panel(WIDTH_INCH, HEIGHT_INCH) as figure:
        axes = figure.subplots()
        drawn = []
        for group in groups:
            found = [_thin(run.curve(column, against)) for run in group.runs]
            found = [([*x], [factor * value for value in y]) for x, y in found if x]
            if found and len(groups) > MOST_WITH_SEEDS:
                found = [mean_curve(found)]
            if found:
                dash = "--" if group.role == "teacher" else DASHES[palette.line(group)]
                drawn += _draw(axes, found, _SENTINELS[palette.name(group)], dash)
        if not drawn:
            return ""
        if level is not None:
            axes.axhline(level, color=_SENTINELS["teacher"], linestyle="--", linewidth=1.8)
        if column.startswith("train/") and min(drawn) > 0 and max(drawn) > 30 * min(drawn):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_title(label or column, loc="left")
        axes.set_xlabel({"steps": "step", "epochs": "epoch", "seconds": "training time, seconds"}[against])
        if against == "epochs":
            axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        return _svg(figure, f"{label or column} against {against}")


def _draw(axes: Axes, found: Sequence[Curve], colour: str, dash: str) -> list[float]:
    alone = len(found) == 1
    for x, y in found:
        marker = "o" if alone and len(x) <= 30 else ""
        axes.plot(
            x,
            y,
            color=colour,
            linestyle=dash,
            linewidth=1.8 if alone else 0.7,
            alpha=1.0 if alone else 0.55,
            marker=marker,
            markersize=3,
        )
    if not alone:
        x, y = mean_curve(found)
        marker = "o" if len(x) <= 30 else ""
        axes.plot(x, y, color=colour, linestyle=dash, linewidth=2.2, marker=marker, markersize=3)
    return [value for _, y in found for value in y]


def mean_curve(found: Sequence[Curve]) -> Curve:
    """Mean over the seeds of x and y at the k-th logged point, up to the length of the shortest curve."""
    shortest = min(len(x) for x, _ in found)
    return (
        [statistics.fmean(x[index] for x, _ in found) for index in range(shortest)],
        [statistics.fmean(y[index] for _, y in found) for index in range(shortest)],
    )


def _thin(curve: Curve) -> Curve:
    x, y = curve
    size = math.ceil(len(x) / MOST_POINTS)
    if size <= 1:
        return curve
    starts = range(0, len(x), size)
    return [statistics.fmean(x[i : i + size]) for i in starts], [statistics.fmean(y[i : i + size]) for i in starts]


def shares(group: Group, palette: Palette, terms: Sequence[str]) -> str:
    """Draw each loss term's share of the student's gradient, mean over seeds, stacked to 1.

    Args:
        group: the runs of one method.
        palette: colours.
        terms: distillation terms of the method, drawn in its colour; all others are grey.
    """
    names = list(
        dict.fromkeys(name.removeprefix("share/") for run in group.runs for name in run.columns if name.startswith("share/"))
    )
    if not names:
        return ""
    ordered = [*[name for name in names if name in terms], *[name for name in names if name not in terms]]
    with _panel(WIDTH_INCH, HEIGHT_INCH) as figure:
        axes = figure.subplots()
        means = [mean_curve([_thin(run.curve(f"share/{name}")) for run in group.runs if run.rows]) for name in ordered]
        length = min(len(x) for x, _ in means)
        if length == 0:
            return ""
        counts = [0, 0]
        below = [0.0] * length
        x = means[0][0][:length]
        for name, (_, y) in zip(ordered, means, strict=True):
            own = name in terms
            above = [low + value for low, value in zip(below, y[:length], strict=True)]
            # Distillation terms in the method's colour, the detector's own in grey; adjacent areas differ in opacity.
            colour = palette.name(group) if own else "teacher"
            alpha = max(0.15, (0.85 if own else 0.5) - 0.15 * counts[own])
            counts[own] += 1
            if length > 1:
                axes.fill_between(x, below, above, color=_SENTINELS[colour], alpha=alpha, linewidth=0)
            else:
                axes.bar(["step 1"], [above[0] - below[0]], bottom=below, color=_SENTINELS[colour], alpha=alpha, width=0.4)
            if above[-1] - below[-1] > 0.06:
                place = (x[-1], (above[-1] + below[-1]) / 2) if length > 1 else (0, (above[-1] + below[-1]) / 2)
                axes.annotate(
                    _short(name, 24), place, xytext=(-4, 0), textcoords="offset points", ha="right" if length > 1 else "center",
                    va="center", color=_SENTINELS["ink"], fontsize=9,
                )  # fmt: skip
            below = above
        axes.set_ylim(0, 1)
        if length > 1:
            axes.set_xlim(x[0], x[-1])
            axes.set_xlabel("step")
        axes.set_title(f"{_short(group.label, 40)}:\nshare of the student's gradient", loc="left")
        return _svg(figure, f"share of each loss term in the gradient, {group.label}")


def class_gains(
    group: Group, palette: Palette, baseline: Mapping[str, float], distilled: Mapping[str, float], teacher: Mapping[str, float]
) -> tuple[str, int]:
    """Draw the gain of each class, sorted, and beside it the AP of baseline, student and teacher.

    Args:
        group: the method (for its colour).
        palette: colours.
        baseline: AP of the baseline by class, 0..1.
        distilled: AP of the distilled student by class, 0..1.
        teacher: AP of the teacher by class, 0..1; may be empty.

    Returns:
        The SVG, and the number of classes left out in the middle of a long list.
    """
    gains = sorted(((distilled[name] - baseline[name], name) for name in distilled if name in baseline), reverse=True)
    left_out = max(0, len(gains) - MOST_CLASSES)
    if left_out:
        gains = gains[: MOST_CLASSES // 2] + gains[-MOST_CLASSES // 2 :]
    if not gains:
        return "", 0
    colour = _SENTINELS[palette.name(group)]
    with _panel(5.4, 0.9 + 0.21 * len(gains)) as figure:
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1, 1.15))
        y = list(range(len(gains)))
        names = [name for _, name in gains]
        values = [100 * gain for gain, _ in gains]
        left.barh(y, values, color=[colour if value >= 0 else _SENTINELS["baseline"] for value in values], height=0.7)
        left.axvline(0, color=_SENTINELS["ink"], linewidth=0.8)
        left.set_yticks(y, [_short(name, 20) for name in names])
        left.set_ylim(len(gains) - 0.4, -0.6)
        left.set_title("distilled \N{MINUS SIGN} baseline, AP", loc="left")
        right.hlines(
            y,
            [100 * min(baseline[name], distilled[name]) for name in names],
            [100 * max(baseline[name], distilled[name]) for name in names],
            color=_SENTINELS["grid"],
            linewidth=2,
        )
        right.plot([100 * baseline[n] for n in names], y, "o", markersize=5, markerfacecolor="none", color=_SENTINELS["baseline"])
        right.plot([100 * distilled[n] for n in names], y, "o", markersize=5, color=colour)
        known = [(100 * teacher[name], row) for row, name in enumerate(names) if name in teacher]
        if known:
            right.plot(
                [x for x, _ in known],
                [row for _, row in known],
                "|",
                markersize=10,
                markeredgewidth=2,
                color=_SENTINELS["teacher"],
            )
        right.set_title("AP", loc="left")
        right.tick_params(axis="y", length=0)
        if left_out:
            for axes in (left, right):
                axes.axhline(MOST_CLASSES / 2 - 0.5, color=_SENTINELS["ink"], linewidth=0.6, linestyle=":")
        return _svg(figure, f"gain of each class, {group.label}"), left_out


def error_bars(models: Sequence[tuple[str, Mapping[str, float]]], kinds: Sequence[str]) -> str:
    """Draw the AP50 lost to each kind of error as bars, for each kind a bar per model.

    Args:
        models: for each model its colour (a name of the style sheet) and the AP50 lost by kind, 0..1.
        kinds: the kinds to draw, in order.
    """
    with _panel(5.4, 2.7) as figure:
        axes = figure.subplots()
        width = 0.8 / len(models)
        for index, (colour, lost) in enumerate(models):
            x = [place + (index - (len(models) - 1) / 2) * width for place in range(len(kinds))]
            axes.bar(x, [100 * lost[kind] for kind in kinds], width=0.9 * width, color=_SENTINELS[colour])
        axes.set_xticks(range(len(kinds)), kinds)
        axes.tick_params(axis="x", length=0)
        axes.grid(visible=False, axis="x")
        axes.set_ylim(bottom=0)
        axes.set_title("AP50 lost, points", loc="left")
        return _svg(figure, "AP50 lost to each kind of error")


def _short(name: str, most: int) -> str:
    return name if len(name) <= most else name[: most - 1] + "\N{HORIZONTAL ELLIPSIS}"


@contextmanager
def _panel(width: float, height: float) -> Iterator[Figure]:
    """Context with a figure in the page's style. Global state is kept: no pyplot, no backend, rc settings only inside."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    ink, grid = _SENTINELS["ink"], _SENTINELS["grid"]
    style: Any = {
        "svg.fonttype": "none", "svg.hashsalt": "detdistill", "text.parse_math": False, "font.size": 10,
        "axes.titlesize": 10.5, "axes.titleweight": "bold", "axes.labelsize": 10, "text.color": ink, "axes.labelcolor": ink,
        "xtick.color": ink, "ytick.color": ink, "axes.titlecolor": ink, "axes.edgecolor": grid, "axes.spines.top": False,
        "axes.spines.right": False, "axes.grid": True, "grid.color": grid, "grid.linewidth": 0.6, "axes.axisbelow": True,
        "figure.constrained_layout.use": True, "axes.unicode_minus": True, "axes.formatter.limits": (-3, 5),
    }  # fmt: skip
    with mpl.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the browser has the glyphs that matplotlib's fonts lack
        yield Figure(figsize=(width, height))


def _svg(figure: Figure, title: str) -> str:
    """The figure as an ``<svg>`` element with unique ids, and without fixed colours, fonts or name-space addresses."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    head = re.search(r'viewBox="([^"]+)"', text)
    assert head is not None
    width = float(head.group(1).split()[2])
    body = text[text.index(">") + 1 :]
    prefix = f"f{zlib.crc32(text.encode()):x}"  # differs between figures, not between runs of the program
    body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL)  # would apply to the whole page
    body = re.sub(r'\bid="', f'id="{prefix}-', body)
    body = re.sub(r"url\(#", f"url(#{prefix}-", body)
    body = re.sub(r'xlink:href="#', f'href="#{prefix}-', body)
    body = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", body)
    body = re.sub(r"font: (?:\w+ )*?(bold|700) ([\d.]+px)[^;\"]*", r"font-weight: 600; font-size: \2", body)
    body = re.sub(r"font-family: [^;\"]*;?", "", body)
    for name, sentinel in _SENTINELS.items():
        body = body.replace(sentinel, f"var(--{name})")
    return (
        f'<svg class="figure" viewBox="{head.group(1)}" style="max-width:{width * 4 / 3:.0f}px" role="img" '
        f'aria-label="{escape(title, quote=True)}">{body}'
    )
