"""An exported file as a detector, so that evaluation and prediction treat it as any other model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, cast

import numpy as np
import torch
from torch import Tensor, nn

from detdistill.detectors.contract import Detector
from detdistill.detectors.load import check_class_count
from detdistill.errors import ModelError
from detdistill.export.runtimes import open_file
from detdistill.export.selection import select
from detdistill.structures import Batch, Detections, Features, Prediction


@dataclass(frozen=True)
class FileResults:
    """Results of a file for each image of a batch, by the names of ``About.outputs``."""

    images: tuple[dict[str, Tensor], ...]


class FileDetector(Detector):
    """A file in its runtime. It predicts and detects; it has no features to imitate and cannot be trained."""

    def __init__(self, path: Path, device: str = "cpu", threads: int = 0) -> None:
        """Open a file; see ``open_file``."""
        super().__init__()
        self.path = path
        self.about, self._run = open_file(path, device, threads)
        self.spec = self.about.spec
        # Evaluation reads the device of the images from a parameter; the runtime moves them itself.
        self.place = nn.Parameter(torch.zeros(()), requires_grad=False)

    def features(self, batch: Batch) -> Features:
        """Nothing: a file runs as a whole, in ``predict``."""
        return Features((), ())

    def predict(self, features: Features, batch: Batch) -> Prediction:
        """Run the file on a batch; one image at a time if it takes only one.

        Raises:
            ModelError: the images are larger than the file's fixed size, or of another size where none may differ.
        """
        images, sizes = self.prepared(batch)
        parts = [slice(None)] if "batch" in self.about.free else [slice(index, index + 1) for index in range(len(batch))]
        found: list[dict[str, Tensor]] = []
        for part in parts:
            results = [torch.from_numpy(np.asarray(one)) for one in self._run(images[part], sizes[part])]
            found += by_image(dict(zip(self.about.outputs, results, strict=True)), len(images[part]))
        return cast(Prediction, FileResults(tuple(found)))

    def prepared(self, batch: Batch) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Images and sizes as the file takes them; smaller images are padded to a fixed size.

        Raises:
            ModelError: as ``predict``.
        """
        images = batch.images.float().cpu()
        if "size" not in self.about.free:
            (height, width), (own_h, own_w) = self.about.canvas_hw, batch.padding_hw
            if own_h > height or own_w > width:
                raise ModelError(
                    f"{self.path}: takes images of {height}x{width} pixels, but got {own_h}x{own_w}; use "
                    f"--size {self.about.size} --resize {self.about.resize}, or export it at another --size"
                )
            images = nn.functional.pad(images, (0, width - own_w, 0, height - own_h))
        return images.numpy(), batch.sizes.cpu().numpy().astype(np.int64)

    def detect(self, prediction: Prediction, batch: Batch) -> list[Detections]:
        """Choose the detections by the rule in the file."""
        results = cast(Any, prediction)
        chosen = [select(found, self.about.rule) for found in results.images]
        if not self.about.rule.clip:
            return chosen
        limits = batch.sizes[:, [1, 0, 1, 0]].to(torch.float32)
        clipped = [one.boxes_xyxy.clamp(min=0).minimum(limit) for one, limit in zip(chosen, limits, strict=True)]
        return [replace(one, boxes_xyxy=boxes) for one, boxes in zip(chosen, clipped, strict=True)]

    def assign(self, prediction: Prediction, batch: Batch) -> NoReturn:
        """Not available."""
        raise self._no("ground truth cannot be assigned to its predictions")

    def loss(self, prediction: Prediction, batch: Batch, assignment: Any = None) -> NoReturn:
        """Not available."""
        raise self._no("it has no losses")

    def positives(self, prediction: Prediction, assignment: Any, batch: Batch) -> NoReturn:
        """Not available."""
        raise self._no("it has no positives")

    def export(self, folder: Path, resizing: object = None) -> NoReturn:
        """Not available."""
        raise self._no("it cannot be saved as a student")

    def _no(self, why: str) -> ModelError:
        return ModelError(f"{self.path}: an exported file is for inference only ({why}); use the run or the student folder")


def by_image(results: dict[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    """Split the results of a file by image; ``levels`` [P] is common to all, final detections belong to one image."""
    if "labels" in results:
        return [results]
    return [{name: value if name == "levels" else value[image] for name, value in results.items()} for image in range(count)]


def load_file(path: str | Path, classes: Sequence[str] | None = None, device: str = "cpu", threads: int = 0) -> FileDetector:
    """Open an exported file as a detector.

    Args:
        path: file written by ``detdistill export``.
        classes: class names; the file must have as many. None: any number.
        device: cpu or cuda.
        threads: threads of the runtime; 0: as many as torch uses.

    Raises:
        ModelError, RunError: as ``open_file``.
        ClassCountError: the file has another number of classes.
    """
    detector = FileDetector(Path(path), device, threads)
    check_class_count(path, detector.spec.classes, classes)
    return detector
