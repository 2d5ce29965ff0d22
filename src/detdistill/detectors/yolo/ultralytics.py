"""YOLO of the package ultralytics (v5 to v12, 26): its networks, run stage by stage.

ultralytics:yolo11n                 a network of the package, with random weights
ultralytics:best.pt                 a trained network
ultralytics:own.yaml                a description of a network

Networks, assignment and the IoU of the boxes come from the package, which is licensed under AGPL-3.0 and imported only here.
Losses, their gradients and detections equal the package's (``model.loss``; validation with one label for each class). The
prediction of a network with two branches (YOLOv10, YOLO26) is the dense one-to-many branch, through which the neck is trained;
its one-to-one branch reads detached maps, and its loss is added by the package's schedule (``schedule``).

Shape letters: B images, P predictions of an image, K classes, R numbers for each side of a box (bins; 1 without bins).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file

from detdistill.detectors.torchvision.images import image_sizes
from detdistill.detectors.yolo.shared.common import DESCRIPTION, detections_at
from detdistill.detectors.yolo.shared.detector import Network, UltralyticsOptions
from detdistill.detectors.yolo.shared.networks import build_network, describe, need_library, read_saved, resized
from detdistill.errors import ModelError
from detdistill.structures import (
    Assignment,
    Batch,
    Clock,
    Dense,
    Detections,
    Features,
    Losses,
    Prediction,
    Tower,
)

TINY = "yolo11n,width=0.0625"
FIRST_MANY, LAST_MANY = 0.8, 0.1
"""Weight of the one-to-many branch in the first and in the last epoch; the other branch has the rest."""


OPTIONS = UltralyticsOptions


def build(backbone: str, classes: Sequence[str], options: UltralyticsOptions) -> YOLO | TwoBranches:
    """Build a network with random weights, or, from a .pt file, with all of its weights that fit ``classes``.

    Raises:
        ModelError: the package is missing, or the network is unknown or detects no boxes.
    """
    return load(backbone, classes, options)


def load(backbone: str, classes: Sequence[str] | None, options: UltralyticsOptions) -> YOLO | TwoBranches:
    """Build a network; a .pt file also gives the weights.

    If ``classes`` are classes of the file (None: all of them), its outputs are kept and those of other classes ignored. With new
    classes the output layers are newly initialised, and all other weights are kept.

    Raises:
        ModelError: as ``build``, the file cannot be read, or a network without weights shall have its own classes.
    """
    text = options.name or f"ultralytics:{backbone}"
    need_library(text)
    if not backbone.endswith(".pt"):
        if classes is None:
            raise ModelError(f"model {text!r} has no weights, so no classes of its own; give its .pt file")
        description = resized(describe(backbone, text), options.depth, options.width)
        return _wrap(build_network(description, len(classes)), description, classes, options, text)
    if options.depth is not None or options.width is not None:
        raise ModelError(f"model {text!r}: depth and width belong to its file and cannot be changed")
    saved = read_saved(Path(backbone))
    known = classes is None or set(classes) <= set(saved.classes)
    names = saved.classes if classes is None else tuple(classes)
    model = build_network(saved.description, len(saved.classes if known else names))
    own = model.state_dict()
    fitting = {name: tensor for name, tensor in saved.state.items() if name in own and own[name].shape == tensor.shape}
    if known and len(fitting) < len(own):
        missing = next(name for name in own if name not in fitting)
        raise ModelError(f"{backbone}: matches {len(fitting)} of {len(own)} tensors of its own network ({missing} does not fit)")
    model.load_state_dict(fitting, strict=False)
    columns = [saved.classes.index(name) for name in names] if known else None
    return _wrap(model, saved.description, names, options, text, columns)


def load_exported(folder: Path, classes: Sequence[str], name: str) -> YOLO | TwoBranches:
    """Load a student folder.

    Raises:
        ModelError: the package is missing, or files are missing or do not fit.
    """
    need_library(name)
    try:
        about = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        state = load_file(folder / "model.safetensors")
        description, options = about["description"], UltralyticsOptions(**about["options"], name=name)
        model = build_network(description, len(about["names"]))
        columns = [about["names"].index(one) for one in classes]
        model.load_state_dict(state)
    except ModelError:
        raise
    except Exception as error:  # missing files, other JSON, tensors of another network
        raise ModelError(f"{folder}: cannot be loaded ({str(error).splitlines()[0]}); save the student again") from error
    return _wrap(model, description, classes, options, name, columns)


def _wrap(
    model: Any,
    description: dict[str, Any],
    classes: Sequence[str],
    options: UltralyticsOptions,
    name: str,
    columns: Sequence[int] | None = None,
) -> YOLO | TwoBranches:
    kind = YOLO if _branches(model.model[-1]) == 1 else TwoBranches
    if not options.nms and kind is YOLO:
        raise ModelError(f"model {name!r}: nms=false needs a network with a one-to-one branch (yolov10, yolo26)")
    return kind(model, description, classes, options, name, columns)


def _branches(head: Any) -> int:
    return 1 if getattr(head, "one2one_cv2", None) is None else 2


class YOLO(Network):
    """A network with one branch (YOLOv5 to YOLO12, without v10). Its head can stop after each of its two blocks."""

    def predict(self, features: Features, batch: Batch) -> Dense:
        """Compute one prediction for each cell."""
        return self.finish(self.tower(features, upto=0), batch)

    @property
    def tower_depth(self) -> int:
        """Number of blocks of each branch of the head."""
        return len(self.head.cv2[0]) - 1

    def tower(self, features: Features, upto: int | None = None) -> Tower:
        """Compute the inner maps of both branches after ``upto`` blocks (None: all blocks); every level has its own blocks."""
        depth = self.tower_depth if upto is None else upto
        classes, boxes = (
            tuple(side[level][:depth](maps) for level, maps in enumerate(features.maps))
            for side in (self.head.cv3, self.head.cv2)
        )
        return Tower(classes, boxes, depth, features.strides)

    def finish(self, hidden: Tower, batch: Batch) -> Dense:
        """Run the remaining blocks and the output layers; outputs and boxes are float32 under mixed precision."""
        scores, boxes = (
            [side[level][hidden.depth :](maps) for level, maps in enumerate(given)]
            for side, given in ((self.head.cv3, hidden.classification), (self.head.cv2, hidden.regression))
        )
        shapes = tuple((one.shape[-2], one.shape[-1]) for one in boxes)
        sides, logits = (torch.cat([one.flatten(2) for one in maps], dim=2) for maps in (boxes, scores))
        return self.dense(sides, logits, shapes, batch)

    def loss(self, prediction: Prediction, batch: Batch, assignment: Assignment | None = None) -> Losses:
        """Compute the losses under an assignment, by default the detector's own (see ``branch_loss``)."""
        dense = cast(Dense, prediction)
        return Losses(self.branch_loss(dense, batch, self.assign(dense, batch) if assignment is None else assignment))


class TwoBranches(Network):
    """A network with a dense and a one-to-one branch (YOLOv10, YOLO26).

    The prediction is the dense branch. The one-to-one branch lies in ``own`` and always uses its own assignment.
    """

    many = FIRST_MANY
    """Weight of the dense branch's loss; see ``schedule``."""

    def predict(self, features: Features, batch: Batch) -> Dense:
        """Compute one prediction for each cell; in training, the one-to-one branch gives the features no gradient."""
        maps = list(features.maps)
        detached = [level.detach() for level in maps] if self.training else maps
        shapes = tuple((level.shape[-2], level.shape[-1]) for level in maps)
        both = [
            self.head.forward_head(given, **branch)
            for given, branch in ((maps, self.head.one2many), (detached, self.head.one2one))
        ]
        many, one = (self.dense(found["boxes"], found["scores"], shapes, batch) for found in both)
        return dataclasses.replace(many, own=one)

    def schedule(self, clock: Clock) -> None:
        """Set the weights of both branches for an epoch: the dense one's falls linearly from 0.8 to 0.1."""
        left = max(1 - clock.epoch / max(clock.epochs - 1, 1), 0)
        self.many = left * (FIRST_MANY - LAST_MANY) + LAST_MANY

    def loss(self, prediction: Prediction, batch: Batch, assignment: Assignment | None = None) -> Losses:
        """Compute the losses of both branches; ``assignment`` is for the dense one.

        Raises:
            ValueError: the prediction lacks the one-to-one branch, because it was split by image or read from a cache.
        """
        dense = cast(Dense, prediction)
        other = self._other(dense)
        terms = self.branch_loss(dense, batch, self.assign(dense, batch) if assignment is None else assignment)
        more = self.branch_loss(other, batch, self._assigned(other, batch, top=7, last=1))
        return Losses(
            {
                **{name: self.many * value for name, value in terms.items()},
                **{f"one_to_one_{name}": (1 - self.many) * value for name, value in more.items()},
            }
        )

    def _other(self, dense: Dense) -> Dense:
        if not isinstance(dense.own, Dense):
            raise ValueError(f"{self.spec.name}: this prediction has no one-to-one branch; call predict again on the features")
        return dense.own

    def detect(self, prediction: Prediction, batch: Batch) -> list[Detections]:
        """Select the detections of the dense branch, or, with the option ``nms=false``, the best of the one-to-one branch."""
        dense = cast(Dense, prediction)
        if self.options.nms:
            return super().detect(dense, batch)
        one = self._other(dense)
        scores = one.logits.sigmoid()
        found = []
        for image, size in enumerate(image_sizes(batch)):
            best = scores[image].amax(dim=1).topk(min(self.options.dets, scores.shape[1])).indices
            score, place = scores[image, best].flatten().topk(len(best))
            index, labels = best[place // scores.shape[2]], place % scores.shape[2]
            keep = score > self.options.score
            index, labels, score = index[keep], labels[keep], score[keep]
            found.append(detections_at(one.boxes_xyxy[image, index], score, labels, index, image, one, size))
        return found
