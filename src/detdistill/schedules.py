"""A better student, or only a faster one: baseline and distilled student at growing lengths of training.

A gain of a short training may be faster convergence, which the baseline makes up for if it trains longer. So the gain is measured
at several lengths, and at equal time: against a baseline that trained as many seconds as the distilled run, whose steps also
run the teacher.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from detdistill.compare import Gain, Pair, compare_runs, read_run, summarize
from detdistill.errors import RunError
from detdistill.printing import html_table, labelled, line, paragraph, stdout, table

STAYS = 0.5
"""A gain at the longest schedule of at least this part of the shortest schedule's gain is said to stay."""


@dataclass(frozen=True)
class Schedule:
    """Baseline and distilled student at one length of training."""

    factor: float
    """Length as a multiple of the settings' own."""
    gain: Gain
    """Gain over the baseline of the same length."""
    seconds_alone: float
    """Training time of the baseline, mean over the seeds."""
    seconds_distilled: float
    """Training time of the distilled run, mean over the seeds."""
    at_equal_time: Gain | None
    """Gain over a baseline of as many seconds (see ``baseline_at``); None: no two baselines enclose this time for every seed."""


@dataclass(frozen=True)
class Schedules:
    """Result of ``schedules``."""

    folder: Path
    """The folder that holds a folder of runs for each length."""
    found: tuple[Schedule, ...]
    """Ascending by length."""
    report: Path
    """Path of the HTML report about all runs."""

    def __repr__(self) -> str:
        """The gain at each length, and what it means."""
        return (
            f"Schedules({'; '.join(f'{one.factor:g}x {100 * one.gain.mean:+.1f}' for one in self.found)}; {meaning(self.found)})"
        )

    def _repr_html_(self) -> str:
        """A small table for notebooks."""
        rows = [(f"gain at {one.factor:g}x", repr(one.gain)) for one in self.found]
        return html_table([*rows, ("meaning", meaning(self.found)), ("report", str(self.report))])


def over_schedules(runs: Mapping[float, Sequence[Path]]) -> tuple[Schedule, ...]:
    """Compare the runs of each length.

    Args:
        runs: by factor, the run folders of baselines and distilled students of the same seeds, with one method.

    Raises:
        RunError: see ``compare_runs``.
    """
    curves: dict[int, list[tuple[float, float]]] = {}
    read = {factor: [read_run(Path(folder)) for folder in folders] for factor, folders in sorted(runs.items())}
    for found in read.values():
        for one in (one for one in found if one["role"] == "baseline"):
            curves.setdefault(one["seed"], []).append((one["seconds"], one["metrics"]["AP"]))
    schedules = []
    for factor, found in read.items():
        gain = compare_runs(runs[factor])[0]
        alone, distilled = ([one for one in found if one["role"] == role] for role in ("baseline", "distilled"))
        pairs = [
            Pair(one["seed"], ap, one["metrics"]["AP"])
            for one in distilled
            if (ap := baseline_at(one["seconds"], curves.get(one["seed"], []))) is not None
        ]
        at_time = summarize(gain.method, gain.teacher, gain.student, "AP", pairs) if len(pairs) == len(distilled) else None
        seconds_alone, seconds_distilled = (statistics.fmean(one["seconds"] for one in some) for some in (alone, distilled))
        schedules.append(Schedule(factor, gain, seconds_alone, seconds_distilled, at_time))
    return tuple(schedules)


def baseline_at(seconds: float, curve: Sequence[tuple[float, float]]) -> float | None:
    """AP of a baseline that trains for a given time, between two baselines that were trained.

    Each point is the end of a training with its whole learning-rate schedule, so it is no point of a learning curve. Between two
    of them AP is linear in the logarithm of the time.

    Args:
        seconds: the time.
        curve: time and AP of baselines of different lengths.

    Returns:
        The AP, 0..1; None if the time is shorter or longer than all of them.

    Example:
        >>> baseline_at(200.0, [(100.0, 0.20), (400.0, 0.30)])
        0.25
        >>> baseline_at(500.0, [(100.0, 0.20), (400.0, 0.30)]) is None
        True
    """
    points = sorted(curve)
    for (early, low), (late, high) in itertools.pairwise(points):
        if early <= seconds <= late:
            part = math.log(seconds / early) / math.log(late / early) if late > early else 0.0
            return low + part * (high - low)
    return None


def meaning(found: Sequence[Schedule]) -> str:
    """The meaning of the gains at the shortest and at the longest schedule together, in words."""
    first, last = found[0], found[-1]
    short, long = (f"{100 * one.gain.mean:+.1f} at {one.factor:g}x" for one in (first, last))
    if len(last.gain.pairs) < 2:
        return f"{short}, {long} on one seed: no verdict; run more seeds (--seeds 0,1,2)"
    if last.gain.verdict == "worse":
        return f"worse at {last.factor:g}x: {short}, {long}"
    if last.gain.verdict == "gain":
        if first.gain.verdict != "gain" or last.gain.mean >= STAYS * first.gain.mean:
            return f"a better student, as far as {last.factor:g}x shows: {short}, {long}"
        return f"partly faster convergence: {short}, {long}; what is left at {last.factor:g}x is a gain"
    if first.gain.verdict == "gain":
        return f"faster convergence: {short}, and no gain shown at {last.factor:g}x ({100 * last.gain.mean:+.1f})"
    return f"no gain shown: {short}, {long}"


def check_factors(factors: Sequence[float], length: int, unit: str) -> tuple[tuple[float, int], ...]:
    """Factors in ascending order, and the length of each in epochs or steps.

    Raises:
        RunError: fewer than two factors, one that is not above 0, or two of the same length.
    """
    if len(factors) < 2 or any(not math.isfinite(one) or one <= 0 for one in factors):
        raise RunError(f"at: {','.join(f'{one:g}' for one in factors)} must be two or more numbers above 0, such as 1,3")
    lengths = [(factor, max(1, round(length * factor))) for factor in sorted(factors)]
    if len({count for _, count in lengths}) < len(lengths):
        said = ", ".join(f"{factor:g}x is {count}" for factor, count in lengths)
        raise RunError(f"at: two lengths are equal ({said} {unit}); give factors further apart")
    return tuple(lengths)


def show_schedules(result: Schedules) -> None:
    """Print the gains at all lengths as a table, and what they mean."""
    console, first = stdout(), result.found[0].gain
    line(console, f"AP on the validation images (x 100), {first.method}")
    labelled(console, "teacher", first.teacher)
    labelled(console, "student", first.student)
    line(console)
    head = ("length", "seconds", "baseline", "distilled", "gain", "95 % interval", "at equal time")
    table(console, head, [_row(one) for one in result.found], indent=2)
    line(console)
    paragraph(console, f"{meaning(result.found)[:1].upper()}{meaning(result.found)[1:]}.")
    time = "Seconds: alone / distilled. At equal time: the gain over a baseline of the distilled run's seconds, between two "
    paragraph(console, f"{time}baselines that were trained; a dash: no baseline trained as long.")


def _row(one: Schedule) -> tuple[str, ...]:
    baseline, distilled = (statistics.fmean(getattr(pair, name) for pair in one.gain.pairs) for name in ("baseline", "distilled"))
    return (
        f"{one.factor:g}x",
        f"{one.seconds_alone:.0f} / {one.seconds_distilled:.0f}",
        f"{100 * baseline:.1f}",
        f"{100 * distilled:.1f}",
        f"{100 * one.gain.mean:+.1f}",
        one.gain.interval,
        "-" if one.at_equal_time is None else f"{100 * one.at_equal_time.mean:+.1f}",
    )


def schedules_json(result: Schedules) -> dict[str, Any]:
    """The result as plain values for JSON."""
    return {"schedules": [asdict(one) for one in result.found], "meaning": meaning(result.found)}
