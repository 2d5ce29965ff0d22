"""Checks of the data and of the classes, without running a network on more than a few images."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterator

import numpy as np
import torch

from detdistill.detectors.contract import DetectorSpec
from detdistill.doctor.case import Case
from detdistill.doctor.findings import Finding, fine, some
from detdistill.errors import counted

FEW_VAL_IMAGES = 50
FEW_BOXES = 10
"""Training boxes of a class below which it can hardly be learnt."""
SMALLEST_SIDE = 4.0
"""Sides of boxes in pixels of the resized image below which they can hardly be found."""
SMALL_SHARE = 0.05
CLOSE = 0.8
"""Similarity (0..1, of difflib) from which a name is taken for a misspelling of another."""


def defects(case: Case) -> Iterator[Finding]:
    """Defects of the files, and what is odd about the splits."""
    look = f"`detdistill data inspect {case.plan.data}` lists every one; correct the files"
    kinds = Counter((defect.kind, defect.skipped) for defect in case.splits.defects)
    for (kind, skipped), count in kinds.most_common():
        example = next(defect for defect in case.splits.defects if defect.kind == kind)
        lost = f"; {counted(count, skipped)} left out" if skipped != "nothing" else ""
        what = f"{counted(count, 'defect')} of kind '{kind}'{lost}: {example.message}"
        yield Finding("warning", "data", what, f"{example.file}, {example.record}", look)
    for note in case.splits.notes:
        yield Finding("warning", "data", note.rstrip("."), "", look)
    sizes = ", ".join(f"{data.name} {counted(len(data.records), 'image')}" for data in case.splits.sets)
    yield fine("data", f"{sizes}, {counted(len(case.splits.classes), 'class')}")


def splits(case: Case) -> Iterator[Finding]:
    """Splits that cannot measure or teach, classes with few boxes, and boxes that are tiny after resizing."""
    train, val = case.splits.train, case.splits.val
    if not any((~record.crowd).any() for record in val.records):
        todo = "give a val split with labels"
        yield Finding("stop", "data", "no validation image has an object, so AP is undefined", str(val.root), todo)
    elif len(val.records) < FEW_VAL_IMAGES:
        what = f"{counted(len(val.records), 'validation image')}: differences of a few AP are chance"
        yield Finding("warning", "data", what, "", "take more validation images, and several seeds")
    counts = np.zeros(len(train.classes), dtype=int)
    for record in train.records:
        counts += np.bincount(record.labels[~record.crowd], minlength=len(counts))
    for bound, level, words in ((0, "stop", "no training box"), (FEW_BOXES, "warning", f"fewer than {FEW_BOXES} training boxes")):
        few = [
            name for name, count in zip(train.classes, counts, strict=True) if (count == 0 if bound == 0 else 0 < count < bound)
        ]
        if few:
            known = level if len(few) == len(counts) else "warning"
            yield Finding(known, "data", f"{words} of {some(few)}", "", "add images of them, or leave the class out")  # type: ignore[arg-type]
    yield from _tiny_boxes(case)


def _tiny_boxes(case: Case) -> Iterator[Finding]:
    sides = []
    for record in case.splits.train.records:
        height, width = record.size_hw
        resized = case.views.resized_hw(height, width)
        boxes = record.boxes_xyxy[~record.crowd]
        spread = (boxes[:, 2:] - boxes[:, :2]) * np.array([resized[1] / width, resized[0] / height])
        sides.append(spread.min(axis=1) if len(spread) else np.zeros(0))
    shorter = np.concatenate(sides)
    tiny = float((shorter < SMALLEST_SIDE).mean())
    case.numbers["boxes"] = {"median_shorter_side_px": float(np.median(shorter)), "below_4_px": tiny}
    if tiny > SMALL_SHARE:
        what = (
            f"{100 * tiny:.0f} % of the training boxes are less than {SMALLEST_SIDE:g} px high or wide at size {case.views.size}"
        )
        yield Finding("warning", "data", what, "", "raise --size, or cut large images into tiles")


def plain(name: str) -> str:
    """A class name without case, spaces, dashes and underscores: names that differ only there mean the same."""
    return re.sub(r"[\W_]+", "", name.lower())


def near_misses(unknown: list[str], known: tuple[str, ...]) -> list[tuple[str, str]]:
    """Pairs of a name and the known name that it probably means, by spelling.

    >>> near_misses(["Helmet", "traffic light", "cat"], ("helmet", "traffic_light", "dog"))
    [('Helmet', 'helmet'), ('traffic light', 'traffic_light')]
    """
    pairs = []
    for name in unknown:
        same = [other for other in known if plain(other) == plain(name) or plain(other).rstrip("s") == plain(name).rstrip("s")]
        if same:
            pairs.append((name, same[0]))
        elif close := difflib.get_close_matches(name, known, n=1, cutoff=CLOSE):
            pairs.append((name, close[0]))
    return pairs


def class_names(case: Case) -> Iterator[Finding]:
    """Classes of the data that the teacher lacks, names that differ only in spelling, and names that occur twice."""
    mine = case.splits.classes
    twins = [(one, other) for index, one in enumerate(mine) for other in mine[index + 1 :] if plain(one) == plain(other)]
    if twins:
        text = some(f"'{one}' and '{other}'" for one, other in twins)
        yield Finding(
            "warning", "classes", f"names that differ only in spelling are two classes: {text}", "", "rename one of them"
        )
    if case.teacher is None:
        return
    theirs = case.teacher.spec.classes
    unknown = [name for name in mine if name not in theirs]
    if not unknown:
        further = f", which knows {len(theirs) - len(mine)} more" if len(theirs) > len(mine) else ""
        yield fine("classes", f"all {len(mine)} classes are the teacher's by name{further}")
        return
    pairs = near_misses(unknown, tuple(name for name in theirs if name not in mine))
    spelt = f"; it spells {some(f'{one!r} as {other!r}' for one, other in pairs)}" if pairs else ""
    todo = "write the names in the data as the teacher does" if pairs else "take a teacher of these classes"
    if not case.settings.other_classes:
        todo += "; --other_classes true is enough for methods on features"
    what = f"the teacher does not know {some(unknown)}{spelt}"
    yield Finding("warning" if case.settings.other_classes else "stop", "classes", what, case.teacher.spec.name, todo)


def inputs(case: Case) -> Iterator[Finding]:
    """Whether images that a detector has normalised have about mean 0 and standard deviation 1."""
    pixels = torch.cat(
        [
            batch.images[index, :, : int(height), : int(width)].flatten(1).cpu()
            for batch in case.batches
            for index, (height, width) in enumerate(batch.sizes.tolist())
        ],
        dim=1,
    )
    mean, std = pixels.mean(dim=1), pixels.std(dim=1)
    case.numbers["inputs"] = {"mean": mean.tolist(), "std": std.tolist()}
    sides = [("student", case.opened.student.spec)] + ([("teacher", case.teacher.spec)] if case.teacher is not None else [])
    for side, spec in sides:
        yield _normalised(side, spec, mean, std)
    if bool((std < 0.02).all()):
        todo = "check how the images were written; `detdistill data inspect --deep true` looks at all"
        yield Finding("warning", "inputs", "the images looked at have hardly any contrast", "", todo)


def _normalised(side: str, spec: DetectorSpec, mean: torch.Tensor, std: torch.Tensor) -> Finding:
    after = (mean - torch.tensor(spec.mean)) / torch.tensor(spec.std)
    spread = std / torch.tensor(spec.std)
    numbers = f"mean {after.mean():.2g}, standard deviation {spread.mean():.2g}"
    if float(after.abs().max()) > 2.5 or not 0.2 < float(spread.mean()) < 4:
        what = f"the {side}'s normalisation does not suit the images: afterwards they have {numbers}, not about 0 and 1"
        todo = "check mean and std of the model (in 0..1, not 0..255), or the images"
        return Finding("warning", "inputs", what, spec.name, todo)
    return fine("inputs", f"images have {numbers} after the {side}'s normalisation")
