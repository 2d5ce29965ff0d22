"""Compare baseline and distilled students, paired by seed, with a confidence interval and a verdict."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from detdistill.errors import RunError, nearest
from detdistill.printing import html_table
from detdistill.settings import BUDGET, TrainSettings, as_plain, renamed

if TYPE_CHECKING:
    from rich.text import Text

    from detdistill.export.as_run import Measured

NEEDED = ("role", "student", "teacher", "method", "seed", "steps", "images_seen", "metrics", "data")
"""Keys of ``summary.json`` that a comparison needs."""


@dataclass(frozen=True)
class Pair:
    """Metric (0..1) of two runs of the same seed, without and with distillation."""

    seed: int
    baseline: float
    distilled: float

    @property
    def gain(self) -> float:
        """Distilled minus baseline."""
        return self.distilled - self.baseline


@dataclass(frozen=True, repr=False)
class Gain:
    """Gain of a method for a student and a teacher. Numbers are fractions as in COCO's tools; texts show points of 100."""

    method: str
    teacher: str
    student: str
    metric: str
    pairs: tuple[Pair, ...]
    mean: float
    """Mean gain as a fraction: 0.021 is 2.1 points of AP."""
    low: float | None
    """Lower end of the 95 % confidence interval of the mean gain (Student's t, paired); None with a single pair."""
    high: float | None
    """Upper end of the interval; None with a single pair."""
    verdict: str
    """``gain``, ``no gain shown``, ``worse``, or ``one seed: no verdict``."""
    notes: tuple[str, ...] = ()

    @property
    def interval(self) -> str:
        """The 95 % interval as text in points of 100; ``-`` with a single pair."""
        return "-" if self.low is None or self.high is None else f"{100 * self.low:+.1f} .. {100 * self.high:+.1f}"

    def __repr__(self) -> str:
        """Mean gain, interval and verdict, in points of 100."""
        within = "" if self.low is None else f" ({self.interval})"
        seeds = f"{len(self.pairs)} seed{'s' if len(self.pairs) > 1 else ''}"
        return f"{self.method}: {self.metric} {100 * self.mean:+.1f}{within}, {self.verdict}, {seeds}"

    def rows(self) -> list[tuple[str, str]]:
        """Names and values of a small table, in points of 100."""
        baseline, distilled = (statistics.fmean(getattr(pair, name) for pair in self.pairs) for name in ("baseline", "distilled"))
        return [
            ("method", self.method),
            (f"{self.metric} of the baseline", f"{100 * baseline:.1f}"),
            (f"{self.metric} of the distilled student", f"{100 * distilled:.1f}"),
            ("gain", f"{100 * self.mean:+.1f}"),
            ("95 % interval", self.interval),
            ("verdict", self.verdict),
            ("seeds", ", ".join(str(pair.seed) for pair in self.pairs)),
        ]

    def _repr_html_(self) -> str:
        """A small table for notebooks."""
        return html_table(self.rows())


ONE_SEED = "one seed: no verdict"
"""The verdict on a single pair of runs, which has no interval."""


def compare_runs(
    folders: Sequence[Path | str],
    *,
    metric: str = "AP",
    allow_unequal: bool = False,
    measured: Mapping[Path, Measured] | None = None,
) -> list[Gain]:
    """Pair baselines and distilled runs by seed, for each method and teacher.

    An exported file stands for the run that it was made of, with scores of its own. Files pair with files of the same form, such
    as ``onnx int8``; if there is none, with another form or the run, and a note says so.

    Args:
        folders: run folders, folders that hold run folders, or exported files of runs.
        metric: name of one of the 12 COCO metrics.
        allow_unequal: compare even if budgets differ; the differences are listed in ``notes``.
        measured: scores of files; None: those in ``export.json`` beside each.

    Returns:
        The gain of each method, teacher, student and form.

    Raises:
        RunError: unknown or undefined metric, no pair, a file without partner, two runs with the same seed, unequal budgets,
            different validation images, or an incomplete run.
    """
    runs = read_all(folders, measured or {})
    baselines = _baselines(runs)
    groups = _groups(runs)
    files = {one["folder"]: one for one in runs if one["form"] != TORCH}
    if not files and (not groups or not baselines):
        raise RunError(
            f"nothing to compare: {len(baselines)} baseline and {sum(map(len, groups.values()))} distilled runs in "
            f"{', '.join(map(str, folders))}; `detdistill distill --baseline true --seeds 0,1,2` makes both"
        )
    gains, unpaired = [], dict(files)
    data_sets = {data for *_, data, _ in groups}
    for (method, teacher, student, _, _), distilled in sorted(groups.items()):
        pairs, notes = [], []
        for one in sorted(distilled, key=lambda run: int(run["seed"])):
            baseline = _partner(one, baselines)
            if baseline is None:
                notes.append(f"seed {one['seed']}: no baseline of the same student and data")
                continue
            notes += [f"seed {one['seed']}: {text}" for text in _checked(baseline, one, metric, allow_unequal)]
            pairs.append(Pair(one["seed"], baseline["metrics"][metric], one["metrics"][metric]))
            for used in (baseline, one):
                unpaired.pop(used["folder"], None)
        if len(data_sets) > 1:
            notes.insert(0, f"data {distilled[0]['data'].get('path')}")
        if not pairs and not unpaired:
            raise RunError(f"{method}: no baseline with the same student, data and seed; notes: {'; '.join(notes)}")
        if pairs:
            gains.append(summarize(method, teacher, student, metric, pairs, notes))
    for path, one in unpaired.items():
        other = {"baseline": "distilled run", "distilled": "baseline"}.get(one["role"])
        lacking = (
            f"and no {other} of the same student, data and seed is given, as run or as file" if other else "which has no pair"
        )
        raise RunError(f"{path} stands for the {one['role']} run of seed {one['seed']}, {lacking}")
    return gains


TORCH = "torch"
"""Form of a run, beside those of exported files."""

BaselineKey = tuple[str, str, int]


def _baselines(runs: Sequence[dict[str, Any]]) -> dict[BaselineKey, dict[str, dict[str, Any]]]:
    """The baselines of each student, data and seed, by their form.

    Raises:
        RunError: two have the same form.
    """
    found: dict[BaselineKey, dict[str, dict[str, Any]]] = {}
    for one in (one for one in runs if one["role"] == "baseline"):
        forms = found.setdefault((one["student"], one["data"]["fingerprint"], one["seed"]), {})
        if one["form"] in forms:
            twin = forms[one["form"]]
            raise RunError(f"two baselines with seed {one['seed']}: {twin['folder']} and {one['folder']}; give one of them")
        forms[one["form"]] = one
    return found


def _groups(runs: Sequence[dict[str, Any]]) -> dict[tuple[str, str, str, str, str], list[dict[str, Any]]]:
    """The distilled runs by method, teacher, student, data and form.

    Raises:
        RunError: two runs of a group have the same seed.
    """
    found: dict[tuple[str, str, str, str, str], list[dict[str, Any]]] = {}
    for one in (one for one in runs if one["role"] == "distilled"):
        label = _label(one)
        group = found.setdefault((label, one["teacher"] or "none", one["student"], one["data"]["fingerprint"], one["form"]), [])
        twin = next((other for other in group if other["seed"] == one["seed"]), None)
        if twin is not None:
            raise RunError(f"two {label} runs with seed {one['seed']}: {twin['folder']} and {one['folder']}; give one of them")
        group.append(one)
    return found


def _partner(one: dict[str, Any], baselines: Mapping[BaselineKey, dict[str, dict[str, Any]]]) -> dict[str, Any] | None:
    """The baseline of a distilled run: of the same form if there is one, else the run, else any file."""
    forms = baselines.get((one["student"], one["data"]["fingerprint"], one["seed"]), {})
    return forms.get(one["form"]) or forms.get(TORCH) or next(iter(forms.values()), None)


def _checked(baseline: dict[str, Any], one: dict[str, Any], metric: str, allow_unequal: bool) -> list[str]:
    """Check that two runs can be paired, and list what differs between them.

    Raises:
        RunError: a metric is unknown or undefined, the images differ, or the budgets do and ``allow_unequal`` is off.
    """
    for run in (baseline, one):
        if metric not in run["metrics"]:
            known = run["metrics"]
            raise RunError(f"no metric {metric!r}{nearest(metric, known)}; metrics: {', '.join(known)}")
        if run["metrics"][metric] < 0:
            raise RunError(f"{run['folder']}: {metric} is undefined on its validation images; compare another metric")
    if baseline["data"]["val_fingerprint"] != one["data"]["val_fingerprint"]:
        raise RunError(f"{baseline['folder']} and {one['folder']} were evaluated on different images; evaluate both on the same")
    different = unequal(baseline, one)
    if different and not allow_unequal:
        raise RunError(f"unequal budgets, seed {one['seed']}: {'; '.join(different)}; --allow_unequal true compares them anyway")
    if baseline["form"] != one["form"]:
        different.append(f"the distilled student is {one['form']}, the baseline {baseline['form']}")
    return different


def read_all(folders: Sequence[Path | str], measured: Mapping[Path, Measured]) -> list[dict[str, Any]]:
    """Read runs (see ``expand`` and ``read_run``) and exported files (see ``read_file_run``); each gets a ``form``."""
    from detdistill.export.formats import is_file

    files = [path for path in dict.fromkeys(map(Path, folders)) if is_file(path)]
    runs = [{**read_run(folder), "form": TORCH} for folder in expand([one for one in folders if Path(one) not in files])]
    if files:  # else comparing needs no torch, whose import takes seconds
        from detdistill.export.as_run import read_file_run

        runs += [read_file_run(path, measured.get(path)) for path in files]
    return runs


def t_interval(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Mean and the 95 % confidence interval of the mean (Student's t); without ends for a single value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None, None
    from scipy.special import stdtrit  # the quantile of scipy.stats.t, whose import takes a second

    half = float(stdtrit(len(values) - 1, 0.975)) * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def over_seeds(runs: Sequence[Path], gains: Sequence[Gain]) -> dict[Path, dict[str, Any]]:
    """For each of several runs that differ only by their seed, what their cards say about all of them together.

    Args:
        runs: folders of the runs of one experiment: distilled runs, perhaps with their baselines.
        gains: the gains of the distilled runs; empty without baselines.

    Returns:
        ``Origin.seeds`` by run folder; empty with a single seed, or if an AP is undefined.
    """
    found: dict[Path, dict[str, Any]] = {}
    read = {folder: read_run(folder) for folder in runs}
    for role in ("baseline", "distilled"):
        mine = {folder: one for folder, one in read.items() if one["role"] == role}
        scores = [one["metrics"]["AP"] for one in mine.values()]
        if len(scores) < 2 or min(scores) < 0:
            continue
        told: dict[str, Any] = {"seeds": [one["seed"] for one in mine.values()], "AP": list(t_interval(scores))}
        if role == "distilled" and len(gains) == 1:
            told |= {"gain": [gains[0].mean, gains[0].low, gains[0].high], "verdict": gains[0].verdict}
        found |= dict.fromkeys(mine, told)
    return found


def summarize(method: str, teacher: str, student: str, metric: str, pairs: Sequence[Pair], notes: Sequence[str] = ()) -> Gain:
    """Mean gain, its 95 % interval (paired t), and the verdict: ``gain`` only if the whole interval is above zero."""
    gains = [pair.gain for pair in pairs]
    mean, low, high = t_interval(gains)
    if low is None or high is None:
        extra = ("one pair shows a difference, not a gain; run more seeds (--seeds 0,1,2)",)
        return Gain(method, teacher, student, metric, tuple(pairs), mean, None, None, ONE_SEED, (*notes, *extra))
    verdict = "gain" if low > 0 else "worse" if high < 0 else "no gain shown"
    return Gain(method, teacher, student, metric, tuple(pairs), mean, low, high, verdict, tuple(notes))


def unequal(baseline: dict[str, Any], distilled: dict[str, Any]) -> list[str]:
    """List the differences in the budgets of two runs, in words."""
    standard = as_plain(TrainSettings())  # runs of earlier versions have fewer settings
    settings = [{key: run["config"].get(key, standard[key]) for key in BUDGET} for run in (baseline, distilled)]
    different = [f"{key} {settings[0][key]} and {settings[1][key]}" for key in BUDGET if settings[0][key] != settings[1][key]]
    for key in ("steps", "images_seen"):
        if baseline[key] != distilled[key]:
            different.append(f"{key} done {baseline[key]} and {distilled[key]}")
    starts = [run.get("init") or {} for run in (baseline, distilled)]
    if starts[0].get("fingerprint") != starts[1].get("fingerprint"):
        different.append(f"initial weights {' and '.join(str(start.get('from', 'fresh')) for start in starts)}")
    for name, run in (("baseline", baseline), ("distilled run", distilled)):
        if run.get("stopped_early"):
            different.append(f"the {name} stopped early")
    return different


def _label(run: dict[str, Any]) -> str:
    """Name of the method in a comparison, with everything that distinguishes its runs: weight, balance, inherited head."""
    weight, balance = run["config"].get("distill_weight", 1.0), run["config"].get("balance")
    label: str = run["method"] + ("" if weight == 1 else f", distill_weight {weight:g}")
    label += "" if balance is None else f", balance {balance:g}"
    label += " + inherited head" if run.get("inherit") else ""
    return label if run["form"] == TORCH else f"{label} ({run['form']})"


def expand(folders: Sequence[Path | str]) -> list[Path]:
    """Replace each folder that is not a run folder by the run folders inside it.

    Raises:
        RunError: a folder neither is a finished run nor holds one.
    """
    found: list[Path] = []
    for folder in map(Path, folders):
        if (folder / "summary.json").exists():
            found.append(folder)
        elif folder.is_dir() and (inside := sorted(path.parent for path in folder.glob("*/summary.json"))):
            found += inside
        else:
            raise RunError(f"{folder} holds no finished run (no summary.json)")
    return list(dict.fromkeys(found))


def read_run(folder: Path) -> dict[str, Any]:
    """Read the summary of a run, with its folder and config added.

    Raises:
        RunError: a file is missing or broken.
    """
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        config = renamed(config) if isinstance(config, dict) else config
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RunError(f"{folder} is not a complete run: {error}") from error
    if not isinstance(summary, dict) or not isinstance(config, dict):
        raise RunError(f"{folder} is not a complete run: summary.json and config.yaml must hold keys and values")
    missing = [key for key in NEEDED if key not in summary]
    if missing:
        raise RunError(f"{folder} is not a complete run: summary.json lacks {', '.join(missing)}")
    return {**summary, "folder": folder, "config": config}


def show_gains(gains: Sequence[Gain]) -> None:
    """Print the comparison as a table for each teacher and student; AP is multiplied by 100, as in papers."""
    from rich.text import Text

    from detdistill import printing

    console = printing.stdout()
    printing.line(console, f"{gains[0].metric} on the validation images (x 100)")
    groups: dict[tuple[str, str], list[Gain]] = {}
    for gain in gains:
        groups.setdefault((gain.teacher, gain.student), []).append(gain)
    for (teacher, student), group in groups.items():
        printing.line(console)
        printing.labelled(console, "teacher", teacher)
        printing.labelled(console, "student", student)
        head = ("method", "seeds", "baseline", "distilled", "gain", "95 % interval", "verdict")
        printing.table(console, head, [_row(gain) for gain in group], left=("verdict",), indent=2)
        for gain in group:
            for note in gain.notes:
                printing.paragraph(console, Text(f"{gain.method}: {note}", "dim"), first="  ", indent=4)


def _row(gain: Gain) -> tuple[str | Text, ...]:
    from rich.text import Text

    return (
        gain.method,
        str(len(gain.pairs)),
        f"{100 * statistics.fmean(pair.baseline for pair in gain.pairs):.1f}",
        f"{100 * statistics.fmean(pair.distilled for pair in gain.pairs):.1f}",
        f"{100 * gain.mean:+.1f}",
        gain.interval,
        # The column before tells the number of seeds.
        Text(gain.verdict.removeprefix("one seed: "), {"gain": "green", "worse": "red"}.get(gain.verdict, "yellow")),
    )


def gains_json(gains: Sequence[Gain]) -> dict[str, Any]:
    """The comparison as plain values for JSON."""
    return {"gains": [asdict(gain) for gain in gains]}
