"""Run all checks in order. What cannot be told after a finding that forbids the start is left out."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from detdistill.doctor import cost, data, learning, pair, teacher
from detdistill.doctor.case import Case
from detdistill.doctor.findings import Diagnosis, Finding
from detdistill.errors import DetdistillError

Check = Callable[[Case], Iterable[Finding]]

FIRST: tuple[Check, ...] = (data.defects, data.class_names, teacher.weights, pair.fits)
"""Checks that need no trained step; if one forbids the start, no other is made."""
LOOKS: tuple[Check, ...] = (
    data.splits,
    data.inputs,
    teacher.output,
    teacher.scores,
    pair.levels,
    pair.unmatched,
    pair.batch_norms,
)
TRIALS: tuple[Check, ...] = (
    learning.terms, learning.shares, learning.by_heart, learning.half_precision, learning.probe, cost.cost,
)  # fmt: skip
"""Checks that train for a few steps."""


def examine(case: Case) -> Diagnosis:
    """Make all checks of a planned run.

    A check that fails by an error of its own becomes a warning that names the error; the others go on.
    """
    findings: list[Finding] = []
    for group in (FIRST, LOOKS, TRIALS):
        for check in group:
            findings += _made(check, case)
        stopped = any(finding.level == "stop" for finding in findings)
        if stopped and group is FIRST:
            findings.append(Finding("warning", "doctor", "further checks were left out", "", "first mend what forbids the start"))
            break
    plan = case.plan
    about = f"{case.settings.method}: teacher {plan.teacher or 'none'}, student {plan.student}, data {plan.data}"
    return Diagnosis(about, tuple(findings), tuple(case.tables), case.numbers)


def _made(check: Check, case: Case) -> list[Finding]:
    found: list[Finding] = []
    try:
        found.extend(check(case))
    except DetdistillError as error:
        found.append(Finding("stop", check.__name__, str(error).rstrip(".")))
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, AssertionError) as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        what = f"this check failed: {type(error).__name__}: {reason}".rstrip(". ")
        found.append(Finding("warning", check.__name__, what, "", "a run may fail in the same way; try a run of a few steps"))
    return found
