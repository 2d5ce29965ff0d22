"""Sentences of the report: the verdict on each method, and notes on what weakens it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from detdistill.compare import Gain, compare_runs
from detdistill.errors import RunError
from detdistill.report.runs import Group, Run, baselines_for, defined, distillation_terms
from detdistill.training.metrics_table import idle_terms

NEAR_ZERO_AP = 0.02
NEGLIGIBLE_SHARE = 0.01
"""Share of the student's gradient below which distillation terms are reported as without effect."""
DOMINANT_SHARE = 0.9
FEW_IMAGES = 500
STILL_RISING = 0.005
"""AP gain (0..1) in the last quarter of training above which a run is reported as not converged."""
SHORT_EPOCHS = 12
NOTED_CHANGE = 0.005
"""Smallest change of the AP50 (0..1) lost to a kind of error that the page mentions."""
KIND_WORDS = {
    "Cls": "wrong classes", "Loc": "loose boxes", "Both": "both at once", "Dupe": "duplicates", "Bkg": "background",
    "Miss": "missed objects",
}  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """Verdict on one method, at the top of the page."""

    label: str
    tone: str
    """``gain``, ``worse``, ``open`` (no gain shown) or ``none`` (no baseline to compare with)."""
    headline: str
    sentence: str
    notes: tuple[str, ...]
    gain: Gain | None = None


def points(value: float | None, signed: bool = False) -> str:
    """Format AP times 100 with one decimal, as in papers; a dash if undefined."""
    if value is None:
        return "\N{EN DASH}"
    text = f"{100 * value:{'+' if signed else ''}.1f}"
    if float(text) == 0:
        text = "0.0"
    return text.replace("-", "\N{MINUS SIGN}")


def teacher_metric(group: Group | None, groups: Sequence[Group], name: str = "AP") -> float | None:
    """The teacher's metric: as measured in the distilled runs with their data and size, else that of the teacher's own run."""
    if group is not None:
        noted = group.mean(lambda run: defined((run.summary.get("teacher_metrics") or {}).get(name)))
        if noted is not None:
            return noted
    teachers = [other for other in groups if other.role == "teacher"]
    return teachers[0].metric(name) if len(teachers) == 1 else None


def verdict(group: Group, groups: Sequence[Group]) -> Verdict:
    """Give the verdict on one method from its runs and their baselines."""
    runs = [run for other in groups for run in other.runs]
    baselines = baselines_for(group, runs)
    teacher = teacher_metric(group, groups)
    notes = [*_teacher_notes(teacher, baselines), *_share_notes(group, baselines)]
    student = points(group.metric("AP"))
    if not baselines:
        notes.append("No baseline: detdistill distill --baseline true --seeds 0,1,2 trains the same student without a teacher.")
        sentence = f"The student reached AP {student}. Without a baseline of the same student and data, no gain can be stated."
        return Verdict(group.label, "none", f"AP {student}", sentence, tuple(notes))
    try:
        # Unequal budgets become notes instead of an error, so that the page is still made.
        gain = compare_runs([run.folder for run in (*baselines, *group.runs)], allow_unequal=True)[0]
    except RunError as error:
        return Verdict(group.label, "none", f"AP {student}", f"Not comparable: {error}", tuple(notes))
    fair = [note for note in gain.notes if not note.startswith("one pair")]
    if fair:
        lone = [note for note in fair if "no baseline" in note]
        if lone:
            notes.insert(0, f"Left out of the comparison: {'; '.join(lone)}.")
        if len(lone) < len(fair):
            notes.insert(0, f"Not a fair comparison: {'; '.join(note for note in fair if note not in lone)}.")
    notes += [*_convergence_notes(group, baselines, gain), *_cost_notes(group, baselines)]
    return Verdict(group.label, *_judge(gain, teacher), tuple(notes), gain)


def verdict_cells(one: Verdict) -> tuple[str, ...]:
    """Cells of a verdict in a table: gain, interval, AP alone, AP distilled, seeds, verdict."""
    if one.gain is None:
        return (one.headline, "", "", "", "", one.sentence)
    baseline, distilled = (statistics.fmean(getattr(pair, name) for pair in one.gain.pairs) for name in ("baseline", "distilled"))
    inside = (one.gain.low, one.gain.high)
    interval = " to ".join(points(end, signed=True) for end in inside) if None not in inside else points(None)
    mean = points(one.gain.mean, signed=True)
    return (mean, interval, points(baseline), points(distilled), str(len(one.gain.pairs)), one.gain.verdict)


def shared_notes(verdicts: Sequence[Verdict]) -> list[str]:
    """The notes of all verdicts, each once, with the methods it is about unless these are all."""
    about: dict[str, list[str]] = {}
    for one in verdicts:
        for note in one.notes:
            about.setdefault(note, []).append(one.label)
    return [note if len(labels) == len(verdicts) else f"{', '.join(labels)}: {note}" for note, labels in about.items()]


def _judge(gain: Gain, teacher: float | None) -> tuple[str, str, str]:
    """Tone, headline and sentence."""
    baseline = statistics.fmean(pair.baseline for pair in gain.pairs)
    distilled = statistics.fmean(pair.distilled for pair in gain.pairs)
    reached = f"AP {points(distilled)} with distillation, {points(baseline)} without"
    if teacher is not None:
        reached += f", teacher {points(teacher)}"
    if gain.low is None or gain.high is None:
        sentence = f"{reached}. One seed: a difference, not a proof. Run more seeds (--seeds 0,1,2)."
        return "open", f"{points(gain.mean, signed=True)} AP on one seed", sentence
    interval = f"95 % interval {points(gain.low, signed=True)} to {points(gain.high, signed=True)}, {len(gain.pairs)} seeds"
    headline = f"{points(gain.mean, signed=True)} AP"
    if gain.verdict == "gain":
        gap = teacher - baseline if teacher is not None else 0.0
        closed = f" It closes {100 * gain.mean / gap:.0f} % of the gap to the teacher." if gap >= 0.01 else ""
        return "gain", headline, f"A gain ({interval}): {reached}.{closed}"
    if gain.verdict == "worse":
        return "worse", headline, f"Worse than training alone ({interval}): {reached}."
    wide = " Two seeds give very wide intervals; run three to five." if len(gain.pairs) == 2 else ""
    return "open", headline, f"No gain shown: the interval holds zero ({interval}). {reached}.{wide}"


def _teacher_notes(teacher: float | None, baselines: Sequence[Run]) -> list[str]:
    if teacher is None:
        return []
    if teacher < NEAR_ZERO_AP:
        return [
            f"The teacher's AP is {points(teacher)}: it knows next to nothing of these images. "
            "Check its weights, classes and image size."
        ]
    alone = [ap for run in baselines if (ap := defined(run.summary["metrics"].get("AP"))) is not None]
    if alone and teacher < statistics.fmean(alone):
        return [
            f"The teacher (AP {points(teacher)}) is worse than the baseline ({points(statistics.fmean(alone))}): "
            "there is little to learn from it."
        ]
    return []


def kd_share(run: Run, terms: Sequence[str]) -> float | None:
    """Mean share of the distillation terms in the student's gradient, over the second half of the logged rows."""
    logged = [sum(row.get(f"share/{term}", 0.0) for term in terms) for row in run.rows if any(f"share/{t}" in row for t in terms)]
    return statistics.fmean(logged[len(logged) // 2 :]) if logged else None


def _share_notes(group: Group, baselines: Sequence[Run]) -> list[str]:
    found = [(kd_share(run, terms), terms) for run in group.runs if (terms := distillation_terms(run, baselines))]
    shares = [share for share, _ in found if share is not None]
    if not shares:
        return []
    mean, names = statistics.fmean(shares), ", ".join(found[0][1])
    idle = [name for name in idle_terms(group.runs[0].rows) if name in found[0][1]]
    notes = [f"{name} had no gradient in any measurement: it taught nothing." for name in idle]
    if mean < NEGLIGIBLE_SHARE:
        notes.append(
            f"Distillation did next to nothing: {names} made {100 * mean:.2g} % of the student's gradient. "
            "Raise its weight (--distill_weight), hold its share (--balance 0.3), or check that teacher and student see the same "
            "levels."
        )
    elif mean > DOMINANT_SHARE:
        notes.append(
            f"Distillation drowned the student's own loss: {names} made {100 * mean:.0f} % of its gradient. "
            "Lower its weight (--distill_weight), or hold its share (--balance 0.3)."
        )
    return notes


def share_sentence(group: Group, baselines: Sequence[Run]) -> str:
    """Sentence on the share of the distillation terms in the student's gradient."""
    terms = distillation_terms(group.runs[0], baselines)
    share = group.mean(lambda run: kd_share(run, distillation_terms(run, baselines)))
    if not terms:
        return f"{group.label}: no loss term of its own (the teacher acts on the student's own loss)."
    if share is None:
        return f"{group.label}: shares were not logged (--monitor_every 0, or a run too short)."
    together = f"the loss term {terms[0]}" if len(terms) == 1 else f"the loss terms {', '.join(terms)} together"
    said = f"{group.label}: {together} made {100 * share:.2g} % of the student's gradient in the second half of training"
    if share < NEGLIGIBLE_SHARE:
        return f"{said}: next to nothing, so any difference from the baseline is chance."
    return f"{said}, more than the student's own loss." if share > 0.5 else f"{said}."


def balance_sentence(group: Group) -> str:
    """Sentence on the share that ``--balance`` held, beginning with a space; empty if the runs have no balance."""
    wanted = group.runs[0].config.get("balance")
    if wanted is None:
        return ""
    measured = [shares for run in group.runs if (shares := _balanced_shares(run))]
    if not measured:
        return f" --balance {wanted:g} changed nothing, because no distillation term had a gradient into the student."
    first = statistics.fmean(shares[0] for shares in measured)
    held = statistics.fmean(statistics.fmean(shares[len(shares) // 2 :]) for shares in measured)
    columns = dict.fromkeys(name for run in group.runs for name in run.columns if _is_factor(name))
    ends = {name: group.mean(lambda run, name=name: (run.curve(name)[1] or [None])[-1]) for name in columns}  # type: ignore[misc]
    factors = ", ".join(f"{name.split('/')[1]} {factor:.3g}" for name, factor in ends.items() if factor is not None)
    return (
        f" --balance {wanted:g}: the methods' gradient was {100 * first:.2g} % before the first step, without factors, and "
        f"{100 * held:.2g} % in the second half of training (own loss and methods each by the norm of their sum); factors at "
        f"the end: {factors}."
    )


def _balanced_shares(run: Run) -> list[float]:
    """The measured share of all methods together, in each row that has one."""
    rows = [[value for name, value in row.items() if name.startswith("balance/") and not _is_factor(name)] for row in run.rows]
    return [sum(shares) for shares in rows if shares]


def _is_factor(column: str) -> bool:
    return column.startswith("balance/") and column.endswith("/factor")


def instability_sentence(groups: Sequence[Group]) -> str:
    """Sentence on how often the matched box of a query changed; empty if no run measured it."""
    found = [(one, one.mean(_instability)) for one in groups]
    known = [(one, mean) for one, mean in found if mean is not None]
    if not known:
        return ""
    counts = {
        min(int(run.config.get("instability") or 0), int(run.summary["data"].get("val_images") or 0))
        for one, _ in known
        for run in one.runs
        if _instability(run) is not None
    }
    images = " or ".join(map(str, sorted(counts))) + f" validation image{'' if counts == {1} else 's'}"
    said = ", ".join(f"{one.label} {mean:.2f}" for one, mean in known)
    return (
        "Number of queries per image with another matched box than at the previous evaluation (at first: than before training), "
        f"mean over the first {images} (IS of DN-DETR, last decoder layer); lower is steadier. Mean of all evaluations: {said}."
    )


def _instability(run: Run) -> float | None:
    values = run.curve("val/IS")[1]
    return statistics.fmean(values) if values else None


def error_sentence(label: str, baseline: Group, distilled: Group) -> str:
    """Sentence on the kinds of errors that distillation reduced or increased in all pairs of seeds.

    Args:
        label: name of the method on the page.
        baseline: runs without distillation.
        distilled: runs with distillation; runs of the same seed are compared.
    """
    alone = {run.seed: run.summary.get("errors") or {} for run in baseline.runs}
    taught_by_seed = {run.seed: run.summary.get("errors") or {} for run in distilled.runs}
    pairs = [(alone[seed], lost) for seed, lost in taught_by_seed.items() if lost and alone.get(seed)]
    changes = {kind: [taught[kind] - plain[kind] for plain, taught in pairs] for kind in KIND_WORDS} if pairs else {}
    means = {
        kind: statistics.fmean(values)
        for kind, values in changes.items()
        if abs(statistics.fmean(values)) >= NOTED_CHANGE and (min(values) > 0 or max(values) < 0)
    }
    less = [
        f"{points(-mean)} less to {KIND_WORDS[kind]}" for kind, mean in sorted(means.items(), key=lambda one: one[1]) if mean < 0
    ]
    more = [
        f"{points(mean)} more to {KIND_WORDS[kind]}" for kind, mean in sorted(means.items(), key=lambda one: -one[1]) if mean > 0
    ]
    if not pairs:
        return f"{label}: no baseline with the same seed noted its errors."
    scores = [score for one in (baseline, distilled) if (score := one.metric("AP")) is not None]
    if not scores or max(scores) < NEAR_ZERO_AP:
        return f"{label}: AP is near 0, so the kinds of errors say nothing."
    if len(pairs) == 1:
        return f"{label}: one seed, so no change of a kind of error can be told from chance."
    if not less and not more:
        return f"{label}: no kind of error changed by {points(NOTED_CHANGE)} AP50 or more in the same direction in all seeds."
    seeds = f"mean of {len(pairs)} seeds, which agree on the direction"
    parts = [_listed(part) for part in (less, more) if part]
    return f"{label}: the student loses {', but '.join(parts)} than without distillation (points of AP50, {seeds})."


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def teacher_errors(group: Group | None, groups: Sequence[Group]) -> dict[str, float]:
    """AP50 that the teacher loses to each kind of error, from the runs as in ``teacher_metric``; empty if not recorded."""
    noted = [run.summary["teacher_errors"] for run in group.runs if run.summary.get("teacher_errors")] if group else []
    teachers = [other for other in groups if other.role == "teacher"]
    return dict(noted[0]) if noted else teachers[0].errors() if len(teachers) == 1 else {}


def _convergence_notes(group: Group, baselines: Sequence[Run], gain: Gain) -> list[str]:
    notes = []
    rises = [rise for run in baselines if (rise := _late_rise(run)) is not None]
    rising = statistics.fmean(rises) if rises else 0.0
    short = max(int(run.summary.get("epochs") or 0) for run in group.runs) <= SHORT_EPOCHS
    if gain.mean > 0 and (short or rising > STILL_RISING):
        text = "Much of a short schedule's gain is faster convergence: look at the curves."
        if rising > STILL_RISING:
            text += f" The baseline still gained {points(rising)} AP in the last quarter of its training."
        notes.append(text)
    late = [
        run.summary["best_ap"] - run.summary["metrics"]["AP"] for run in (*baselines, *group.runs) if run.summary.get("best_ap")
    ]
    if late and max(late) > 2 * STILL_RISING:
        notes.append(f"AP is that of the end of training; the best of a run was up to {points(max(late))} higher on the way.")
    images = min((int(run.summary["data"].get("val_images") or FEW_IMAGES) for run in group.runs), default=FEW_IMAGES)
    if images < FEW_IMAGES:
        notes.append(f"Evaluated on {images} images only: the interval covers the seeds, not the choice of images.")
    return notes


def _late_rise(run: Run) -> float | None:
    """AP gained in the last quarter of the steps; None if there are too few evaluations."""
    steps, values = run.curve("val/AP")
    earlier = [value for step, value in zip(steps, values, strict=True) if step <= 0.75 * steps[-1]]
    return values[-1] - earlier[-1] if len(values) > 1 and earlier else None


def _cost_notes(group: Group, baselines: Sequence[Run]) -> list[str]:
    seconds = group.mean(lambda run: run.summary.get("seconds"))
    alone = [run.summary["seconds"] for run in baselines if run.summary.get("seconds")]
    if seconds is None or not alone or seconds < 1.2 * statistics.fmean(alone):
        return []
    return [
        f"Same steps, not same time: a distilled run took {seconds / statistics.fmean(alone):.1f} times as long as its baseline."
    ]
