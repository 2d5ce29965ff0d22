"""Checks of teacher, student and method together: whether they fit, their levels, and boxes that no cell learns."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from detdistill.detectors.contract import Detector, dense_positives
from detdistill.doctor.case import Case
from detdistill.doctor.findings import Finding, fine, percent
from detdistill.errors import DetdistillError, counted
from detdistill.structures import Batch, Regions

UNMATCHED = 0.02
SMALL_BATCH = 4


def fits(case: Case) -> Iterator[Finding]:
    """Whether the method can be built for teacher and student."""
    try:
        session = case.opened
    except DetdistillError as error:
        todo = "`detdistill methods --teacher T --student S` lists what works with a pair"
        yield Finding("stop", "pair", str(error).rstrip("."), "", todo)
        return
    yield fine("pair", f"{case.settings.method} can be built for {session.student.spec.name}")
    earlier = [] if session.method is None else [stage.name for stage in session.method.stages(session.student)[:-1]]
    if earlier:
        what = f"the method first trains {counted(len(earlier), 'stage')} ({', '.join(earlier)}); here its networks are untrained"
        yield Finding("fine", "pair", f"{what}, so its losses will differ from those below")


def levels(case: Case) -> Iterator[Finding]:
    """Levels that both have, and levels that are too coarse for the images."""
    student = case.opened.student.spec
    height, width = case.batches[0].padding_hw
    coarse = [stride for stride in student.strides if stride * 2 > min(height, width)]
    if coarse:
        what = f"images of {width}x{height} pixels leave one cell on the levels of stride {', '.join(map(str, coarse))}"
        yield Finding("warning", "levels", what, student.name, "raise --size, or leave out levels (levels= of the model string)")
    if case.teacher is None:
        return
    mine, theirs = student.strides, case.teacher.spec.strides
    common = sorted(set(mine) & set(theirs))
    text = f"strides {_listed(mine)} of the student and {_listed(theirs)} of the teacher"
    if common:
        yield fine("levels", f"{text}: {len(common)} in common")
    else:
        todo = "give both the same levels= in their model strings"
        yield Finding("warning", "levels", f"{text} have none in common: methods on maps must resize them", "", todo)


def _listed(strides: tuple[int, ...]) -> str:
    return ", ".join(map(str, strides))


def unmatched(case: Case) -> Iterator[Finding]:
    """Boxes to which the student assigns no prediction, so that it never learns them."""
    student = case.opened.student.to(case.device).train()
    missed: list[float] = []
    boxes = 0
    with torch.no_grad():
        for batch in case.batches:
            found = matched_boxes(student, batch)
            for image, target in enumerate(batch.targets):
                for index in torch.nonzero(~target.crowd).flatten().tolist():
                    boxes += 1
                    if (image, index) not in found:
                        box = target.boxes_xyxy[index]
                        missed.append(float((box[2:] - box[:2]).min()))
    share = len(missed) / max(1, boxes)
    case.numbers["unmatched"] = {"boxes": boxes, "unmatched": len(missed)}
    text = f"{len(missed)} of {boxes} boxes looked at have no positive ({percent(share)})"
    if share > UNMATCHED:
        strides = case.opened.student.spec.strides
        middle = sorted(missed)[len(missed) // 2]
        sizes = f"their shorter side is {middle:.0f} px (median), its finest stride {min(strides)}"
        what = f"{text}: the student never learns them; {sizes}"
        todo = "raise --size, add a finer level or smaller anchors, or more queries"
        yield Finding("warning", "levels", what, case.opened.student.spec.name, todo)
    else:
        yield fine("levels", text)


def matched_boxes(student: Detector, batch: Batch) -> set[tuple[int, int]]:
    """Pairs of image and box that have a positive; for two-stage detectors: an anchor of the first stage."""
    prediction = student(batch).prediction
    assert prediction is not None
    if isinstance(prediction, Regions) and prediction.first is not None:
        positives = dense_positives(prediction.first, student.assign(prediction.first, batch), batch)
    else:
        positives = student.positives(prediction, student.assign(prediction, batch), batch)
    return set(zip(positives.image.tolist(), positives.ground_truth.tolist(), strict=True))


def batch_norms(case: Case) -> Iterator[Finding]:
    """Batch norms that see few images."""
    norms = [module for module in case.opened.student.modules() if isinstance(module, _BatchNorm)]
    if not norms:
        yield fine("norms", "the student has no batch norm")
        return
    batch, settings = case.settings.batch, case.settings
    rest = len(case.splits.train.records) % (batch * settings.devices * settings.nodes)
    if batch < SMALL_BATCH:
        more = "; --accumulate does not help them" if settings.accumulate > 1 else ""
        what = f"{len(norms)} batch norms see {counted(batch, 'image')} at a time, so their statistics are noisy{more}"
        todo = f"raise --batch to {SMALL_BATCH} or more, or take a student with group norms or frozen batch norms"
        yield Finding("warning", "norms", what, case.opened.student.spec.name, todo)
    elif rest == 1 and settings.devices * settings.nodes == 1:
        what = f"the last batch of each epoch has one image, for {len(norms)} batch norms"
        yield Finding("warning", "norms", what, "", "change --batch by one")
    else:
        yield fine("norms", f"{len(norms)} batch norms see {batch} images at a time")
