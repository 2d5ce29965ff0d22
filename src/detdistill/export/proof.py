"""Compare a written file with the detector it was made of: numbers on real images, AP, latency.

Tracing writes a constant in place of a size without an error, so the file is run with a second number of images and, where it
may vary, a second size. The results of detectors with queries are compared as sets: equal scores may change their order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from detdistill.errors import ModelError
from detdistill.export.file_detector import FileDetector, by_image
from detdistill.export.graphs import Graph
from detdistill.structures import Batch

MOST_LOST, MOST_LOST_INT8 = 0.1, 1.0
"""Points of AP (0..100) that a file may lose to the detector in torch."""


@dataclass(frozen=True)
class Difference:
    """Largest difference between a file and its graph in torch."""

    boxes_px: float
    scores: float
    unmatched: int = 0
    """Detections that only one side has (files with NMS inside)."""

    def worst(self, other: Difference) -> Difference:
        """The larger of both, number by number."""
        return Difference(
            max(self.boxes_px, other.boxes_px), max(self.scores, other.scores), max(self.unmatched, other.unmatched)
        )


@dataclass(frozen=True)
class Stage:
    """A form of the model in the table: torch, the file, its int8 form."""

    name: str
    file: str | None
    megabytes: float
    AP: float | None
    """0..1; None: no data given, -1: undefined."""
    milliseconds: float | None
    """From pixels to detections, one image, median of interleaved rounds."""
    difference: Difference | None = None
    lost: float | None = None
    """AP of torch minus this AP, in points of 100; None: no AP."""
    passed: bool = True
    metrics: Mapping[str, float] | None = None
    """The 12 COCO numbers; None: no data given."""
    checksum: str | None = None
    """Of the file, as ``files.checksum``: the numbers are those of this file and of no later one."""

    HEAD: ClassVar[tuple[str, ...]] = ("AP", "lost", "boxes px", "scores", "ms", "MB")
    """Titles of ``cells``."""

    @property
    def cells(self) -> tuple[str, ...]:
        """The numbers as texts for tables: AP and loss in points of 100; empty where there is none, ``-`` if undefined."""
        found = self.difference
        return (
            "" if self.AP is None else "-" if self.AP < 0 else f"{100 * self.AP:.2f}",
            "" if self.lost is None else f"{self.lost:+.2f}",
            "" if found is None else f"{found.boxes_px:.1e}",
            "" if found is None else f"{found.scores:.1e}",
            "" if self.milliseconds is None else f"{self.milliseconds:.1f}",
            f"{self.megabytes:.2f}",
        )

    def to_plain(self) -> dict[str, Any]:
        """The stage as JSON."""
        return asdict(self)

    @staticmethod
    def from_plain(content: Mapping[str, Any]) -> Stage:
        """Invert ``to_plain``.

        Raises:
            TypeError: the content is no such stage.
        """
        found = content.get("difference")
        return Stage(**{**content, "difference": None if found is None else Difference(**found)})


@torch.no_grad()
def largest_difference(graph: Graph, file: FileDetector, batches: Sequence[Batch]) -> Difference:
    """Run graph and file on batches and compare every image.

    Raises:
        ModelError: the file fails on a batch, or its results have other shapes.
    """
    found = Difference(0.0, 0.0)
    as_sets = "labels" in graph.outputs or file.spec.family == "queries"
    for batch in batches:
        images, sizes = (torch.from_numpy(one) for one in file.prepared(batch))
        ours: list[dict[str, Tensor]] = []
        for part in [slice(None)] if "batch" in file.about.free else [slice(one, one + 1) for one in range(len(batch))]:
            ours += by_image(dict(zip(graph.outputs, graph(images[part], sizes[part]), strict=True)), len(images[part]))
        try:
            theirs = file.predict(file.features(batch), batch).images  # type: ignore[union-attr]
        except ModelError:
            raise
        except Exception as error:  # each runtime has errors of its own
            shape = "x".join(map(str, images.shape))
            raise ModelError(f"{file.path}: fails on images of shape {shape}: {str(error).splitlines()[0][:200]}") from error
        for mine, other in zip(ours, theirs, strict=True):
            one = set_difference(mine, other) if as_sets else place_difference(mine, other, file)
            found = found.worst(one)
    return found


def place_difference(mine: Mapping[str, Tensor], other: Mapping[str, Tensor], file: FileDetector) -> Difference:
    """Compare results of one image place by place.

    Raises:
        ModelError: shapes differ.
    """
    for name, value in mine.items():
        if value.shape != other[name].shape:
            raise ModelError(f"{file.path}: {name} is {list(other[name].shape)} in the file and {list(value.shape)} in torch")
    scores = [float((value - other[name]).abs().max()) for name, value in mine.items() if name not in ("boxes", "levels")]
    return Difference(float((mine["boxes"] - other["boxes"]).abs().max()), max(scores))


def set_difference(mine: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Difference:
    """Compare results of one image as sets: pairs by the least sum of differences of boxes (in 100 pixels) and scores.

    Final detections pair with those of their own class only.
    """
    boxes = torch.cdist(mine["boxes"].float(), other["boxes"].float(), p=float("inf"))
    first, second = (side["scores"].float().reshape(len(side["boxes"]), -1) for side in (mine, other))
    scores = torch.cdist(first, second, p=float("inf"))
    cost = boxes / 100 + scores
    if "labels" in mine:
        cost = cost + 1e3 * (mine["labels"][:, None] != other["labels"][None])
    rows, columns = linear_sum_assignment(cost.numpy())
    pairs = [(row, column) for row, column in zip(rows, columns, strict=True) if cost[row, column] < 1e3]
    unmatched = max(boxes.shape) - len(pairs)
    if not pairs:
        return Difference(0.0, 0.0, unmatched)
    row, column = (torch.tensor(one) for one in zip(*pairs, strict=True))
    return Difference(float(boxes[row, column].max()), float(scores[row, column].max()), unmatched)


def judged(stage: Stage, torch_ap: float | None, int8: bool) -> Stage:
    """Fill in ``lost`` and ``passed``; without AP on both sides nothing can be lost."""
    if stage.AP is None or torch_ap is None or min(stage.AP, torch_ap) < 0:
        return stage
    lost = 100 * (torch_ap - stage.AP)
    return Stage(**{**vars(stage), "lost": lost, "passed": lost <= (MOST_LOST_INT8 if int8 else MOST_LOST)})
