"""Checks that train for a few steps: every loss term, its share of the gradient, a batch learnt by heart, half precision."""

from __future__ import annotations

import math
from collections.abc import Iterator

from detdistill.doctor.case import Case
from detdistill.doctor.findings import Finding, Table, fine, percent, some
from detdistill.doctor.trial import Course, Look, Trial
from detdistill.structures import Clock

DOMINANT, NEGLIGIBLE = 0.9, 0.01
"""Shares of the distillation terms in the gradient above and below which they are warned of."""
USUAL = 0.3
"""Share for which a weight is proposed."""
LEAST_FALL = 0.1
"""Part of its loss that a student must lose on one batch."""
RISE = 1.5
HALF_PRECISION = 0.1
"""Largest relative change of a loss term by half precision."""


def terms(case: Case) -> Iterator[Finding]:
    """Terms that are not finite, always zero, or without a gradient into the student."""
    probe = case.probe
    for side, course in (("alone", probe.alone), ("distilled", probe.distilled)):
        if course.broken:
            todo = "lower --lr, use --precision 32, and check the teacher's weights"
            yield Finding("stop", "terms", f"{course.broken} is not finite when the student trains {side}", "", todo)
    bad = [name for look in (probe.before, probe.middle) for name, value in look.values.items() if not math.isfinite(value)]
    if bad:
        what = f"{some(dict.fromkeys(bad))} is not finite on the first batch"
        yield Finding("stop", "terms", what, "", "check the teacher's weights, the boxes of the data and the method's settings")
        return
    distilled = [name for name in probe.before.distilled | probe.middle.distilled if name not in probe.alone_names]
    if not distilled:
        yield fine("terms", "the method adds no loss term of its own; the teacher acts on the student's own loss")
        return
    idle = [name for name in distilled if not _reaches(probe.before, name) and not _reaches(probe.middle, name)]
    for name in sorted(idle):
        value = probe.middle.values.get(name, 0.0)
        zero = not value and not any(probe.distilled.values.get(name, ()))
        why = "it is 0 in every batch" if zero else f"its value is {value:.3g}"
        todo = "check its weight, and whether the data give it something to compare (several classes, boxes, levels of both)"
        yield Finding("warning", "terms", f"no gradient into the student ({why})", name, todo)
    if len(idle) == len(distilled):
        what = "no distillation term has a gradient into the student: the run would be the baseline at a higher price"
        yield Finding("stop", "terms", what, case.settings.method, "raise the method's weights, or take another method")
    else:
        yield fine(
            "terms", f"{len(distilled) - len(idle)} of {len(distilled)} distillation terms reach the student, all are finite"
        )


def _reaches(look: Look, name: str) -> bool:
    return bool(look.norms.get(name))


def shares(case: Case) -> Iterator[Finding]:
    """Share of each term in the student's gradient at the first step and after the probe."""
    probe = case.probe
    looks = (probe.before, probe.after)
    names = list(dict.fromkeys(name for look in looks for name in look.values))
    rows = [
        (name, *(_cell(look.shares.get(name)) for look in looks), f"{probe.before.values.get(name, 0.0):.3g}") for name in names
    ]
    whole = ("distillation, together", *(percent(look.distilled_share) for look in looks), "")
    head = ("loss term", "step 0", f"step {len(probe.distilled.own)}", "value")
    case.tables.append(Table("Share of the student's gradient", head, (*rows, whole)))
    case.numbers["terms"] = {
        name: {"value": probe.before.values.get(name), "shares": [look.shares.get(name) for look in looks]} for name in names
    }
    case.numbers["distilled_share"] = [look.distilled_share for look in looks]
    if not any(_reaches(look, name) for look in (*looks, probe.middle) for name in look.distilled):
        return
    if case.settings.balance is not None:
        yield fine("shares", f"--balance {case.settings.balance:g} holds the distillation terms, {whole[1]} at step 0 without it")
        return
    share = max(look.distilled_share for look in (*looks, probe.middle))
    if min(look.distilled_share for look in looks) > DOMINANT:
        what = f"distillation makes {whole[1]} of the student's gradient at step 0 and {whole[2]} later: the labels hardly count"
        yield Finding("warning", "shares", what, "", _advice(case, probe.after))
    elif share < NEGLIGIBLE:
        what = f"distillation makes {whole[1]} of the student's gradient: next to nothing"
        yield Finding("warning", "shares", what, "", _advice(case, probe.after))
    else:
        yield fine("shares", f"distillation makes {whole[1]} of the student's gradient at step 0, {whole[2]} after the probe")


def _cell(share: float | None) -> str:
    return "-" if share is None else percent(share)


def _advice(case: Case, look: Look) -> str:
    """The weight that would give distillation the usual share, from one batch."""
    weight = case.settings.distill_weight * USUAL / (1 - USUAL) * look.own_norm / max(look.distilled_norm, 1e-30)
    return f"--balance {USUAL:g} holds a share; on this batch --distill_weight {weight:.2g} would give {percent(USUAL)}"


def by_heart(case: Case) -> Iterator[Finding]:
    """Whether the student can learn one batch by heart, alone and distilled."""
    alone, distilled = case.by_heart
    rows = [_row("one batch, alone", alone), _row("one batch, distilled", distilled)]
    rows += [_row("different batches, alone", case.probe.alone), _row("different batches, distilled", case.probe.distilled)]
    head = ("", "first", "last", "distillation", "seconds per step")
    case.tables.append(Table(f"The student's own loss in {case.steps} steps", head, tuple(rows)))
    case.numbers["by_heart"] = {"alone": list(alone.own), "distilled": list(distilled.own), "terms": list(distilled.distilled)}
    images = f"images {some(case.batches[0].ids)}"
    for side, course in (("alone", alone), ("distilled", distilled)):
        if course.broken:
            what = f"{course.broken} is not finite on one batch at the peak learning rate, {side}"
            yield Finding("stop", "learning", what, images, "lower --lr")
        elif course.late > RISE * course.own[0]:
            what = (
                f"the own loss rises from {course.own[0]:.3g} to {course.late:.3g} on one batch at the peak learning rate, {side}"
            )
            yield Finding("warning", "learning", what, images, "lower --lr, or clip more")
    if alone.broken or distilled.broken:
        return
    if alone.fall < LEAST_FALL:
        what = f"alone, the student cannot learn one batch: its loss loses {percent(max(0, alone.fall))} in {case.steps} steps"
        todo = "look at boxes and classes of these images; try another --lr, or more --steps here"
        yield Finding("warning", "learning", what, images, todo)
    elif distilled.fall < alone.fall / 2:
        what = f"distilled, the own loss falls by {percent(max(0, distilled.fall))} where it falls by {percent(alone.fall)} alone"
        yield Finding("warning", "learning", what, images, "distillation holds the student back: --balance, or a lower weight")
    else:
        yield fine(
            "learning",
            f"one batch is learnt: the own loss falls by {percent(alone.fall)} alone, {percent(distilled.fall)} distilled",
        )
    start, end = distilled.distilled[0], sum(distilled.distilled[-3:]) / len(distilled.distilled[-3:])
    if start > 0 and end > RISE * start:
        what = f"the distillation terms rise from {start:.3g} to {end:.3g} on one batch"
        yield Finding("warning", "learning", what, images, "lower --lr, or the method's weight")


def _row(title: str, course: Course) -> tuple[str, ...]:
    terms = f"{course.distilled[0]:.3g} to {course.distilled[-1]:.3g}" if any(course.distilled) else "-"
    return title, f"{course.own[0]:.3g}", f"{course.late:.3g}", terms, f"{course.seconds:.2f}"


def probe(case: Case) -> Iterator[Finding]:
    """Report the losses of a few steps side by side, and that so few steps show no winner."""
    alone, distilled = case.probe.alone, case.probe.distilled
    images = len(case.batches[0])
    case.numbers["probe"] = {"alone": list(alone.own), "distilled": list(distilled.own), "images_per_step": images}
    if alone.broken or distilled.broken:
        return
    course = [f"{one.own[0]:.3g} to {one.late:.3g}" for one in (alone, distilled)]
    what = f"{case.steps} steps of {images} images side by side: own loss {course[0]} alone, {course[1]} distilled"
    yield fine("probe", f"{what}; which of the two gets better cannot be told from so few")


def half_precision(case: Case) -> Iterator[Finding]:
    """Whether half precision changes a loss term by much."""
    precision = case.settings.precision
    if precision == "32":
        return
    trial = Trial(case.session(), case.device, 1)
    clock = Clock(500, 1000, epoch=5, epochs=10)
    found = []
    for kind in ("32", precision):
        losses = trial.losses(case.batches[0], clock, kind)
        found.append({name: float(term.detach()) for name, term in losses.terms.items()})
    bad = [name for name, value in found[1].items() if not math.isfinite(value)]
    changes = {name: abs(found[1].get(name, 0.0) - value) / max(abs(value), 1e-6) for name, value in found[0].items()}
    case.numbers["precision"] = {"of": precision, "changes": changes}
    large = {name: change for name, change in changes.items() if change > HALF_PRECISION}
    if bad:
        yield Finding("stop", "precision", f"{some(bad)} is not finite in {precision}", "", "use --precision 32 or bf16")
    elif large:
        text = some(f"{name} by {percent(change)}" for name, change in large.items())
        yield Finding(
            "warning", "precision", f"{precision} changes the loss {text}", "", "use --precision 32 if the run disappoints"
        )
    else:
        yield fine("precision", f"{precision} changes no loss term by more than {percent(max(changes.values(), default=0.0))}")
