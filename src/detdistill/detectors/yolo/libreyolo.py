"""YOLOX and YOLO9 of the package libreyolo: its networks, run stage by stage.

libreyolo:yolox-n                   a network of the package, with random weights
libreyolo:best.pt                   a trained network

Networks and assignment come from the package, which is licensed under MIT and imported only here. Losses, their gradients and
detections equal the package's (``model(images, targets)``, ``postprocess``).

Shape letters: B images, P predictions of an image, K classes, C outputs of the network for classes, M positives.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from detdistill.detectors.contract import Parts
from detdistill.detectors.torchvision.dense_outputs import layout
from detdistill.detectors.yolo.shared.common import DESCRIPTION, objects_of, points_of, reset
from detdistill.detectors.yolo.shared.libreyolo_assignment import simota, task_aligned
from detdistill.detectors.yolo.shared.libreyolo_detector import LibreNetwork, LibreYOLOOptions
from detdistill.detectors.yolo.shared.libreyolo_networks import BINS, build_network, describe, need_library, read_saved
from detdistill.detectors.yolo.shared.libreyolo_usage import usage
from detdistill.errors import ModelError
from detdistill.functional.counting import label_weights
from detdistill.functional.focal import distribution_focal_loss
from detdistill.structures import (
    Assignment,
    Batch,
    BoxDistributions,
    Clock,
    Dense,
    Features,
    Prediction,
    Resizing,
    Tower,
)

TINY = "yolox-n,width=0.0625"
LAST_EPOCHS = 15
"""Epochs at the end of a run in which the package's training adds YOLOX's L1 loss."""

OPTIONS = LibreYOLOOptions


def build(backbone: str, classes: Sequence[str], options: LibreYOLOOptions) -> YOLOX | YOLO9:
    """Build a network with random weights, or, from a .pt file, with all of its weights that fit ``classes``.

    Raises:
        ModelError: the package is missing, or the network is unknown or detects no boxes.
    """
    return load(backbone, classes, options)


def load(backbone: str, classes: Sequence[str] | None, options: LibreYOLOOptions) -> YOLOX | YOLO9:
    """Build a network; a .pt file also gives the weights.

    If ``classes`` are classes of the file (None: all of them), its outputs are kept and those of other classes ignored. With new
    classes the output layers are newly initialised, and all other weights are kept.

    Raises:
        ModelError: as ``build``, the file cannot be read, or a network without weights shall have its own classes.
    """
    text = options.name or f"libreyolo:{backbone}"
    need_library(text)
    if not backbone.endswith(".pt"):
        description = describe(backbone, text, options.depth, options.width)
        if classes is None:
            raise ModelError(f"model {text!r} has no weights, so no classes of its own; give its .pt file")
        return _wrap(build_network(description, len(classes)), description, classes, options, text)
    if options.depth is not None or options.width is not None:
        raise ModelError(f"model {text!r}: depth and width belong to its file and cannot be changed")
    saved = read_saved(Path(backbone))
    known = classes is None or set(classes) <= set(saved.classes)
    names = saved.classes if classes is None else tuple(classes)
    model = build_network(saved.description, len(saved.classes if known else names))
    own, new = model.state_dict(), () if known else CLASS_OUTPUTS
    wrong = [name for name in own if not name.startswith(new) and not _fits(saved.state.get(name), own[name])]
    if wrong:
        raise ModelError(
            f"{backbone}: matches {len(own) - len(wrong)} of {len(own)} tensors of its own network ({wrong[0]} does not fit)"
        )
    model.load_state_dict({name: saved.state[name] for name in own if _fits(saved.state.get(name), own[name])}, strict=False)
    columns = [saved.classes.index(name) for name in names] if known else None
    return _wrap(model, saved.description, names, options, text, columns)


def load_exported(folder: Path, classes: Sequence[str], name: str) -> YOLOX | YOLO9:
    """Load a student folder.

    Raises:
        ModelError: the package is missing, or files are missing or do not fit.
    """
    need_library(name)
    try:
        about = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        state = load_file(folder / "model.safetensors")
        description, options = about["description"], LibreYOLOOptions(**about["options"], name=name)
        model = build_network(description, len(about["names"]))
        columns = [about["names"].index(one) for one in classes]
        model.load_state_dict(state)
    except ModelError:
        raise
    except Exception as error:  # missing files, other JSON, tensors of another network
        raise ModelError(f"{folder}: cannot be loaded ({str(error).splitlines()[0]}); save the student again") from error
    return _wrap(model, description, classes, options, name, columns)


CLASS_OUTPUTS = ("head.cls_preds.", *(f"head.cv3.{level}.2." for level in range(4)))
"""Beginnings of the names of the output layers for classes."""


def _fits(given: Tensor | None, wanted: Tensor) -> bool:
    return given is not None and given.shape == wanted.shape


def _wrap(
    model: Any,
    description: dict[str, Any],
    classes: Sequence[str],
    options: LibreYOLOOptions,
    name: str,
    columns: Sequence[int] | None = None,
) -> YOLOX | YOLO9:
    if description["family"] == "yolox":
        return YOLOX(model, description, classes, options, name, columns)
    if options.l1 is not None:
        raise ModelError(f"model {name!r}: l1 is there for yolox only")
    return YOLO9(model, description, classes, options, name, columns)


class YOLOX(LibreNetwork):
    """YOLOX: one box of centre and size for each cell, with class scores and objectness (``quality``); SimOTA.

    Ge et al., "YOLOX: Exceeding YOLO Series in 2021", 2021. A detection's score is the product of class score and objectness.
    """

    std = (1 / 255, 1 / 255, 1 / 255)
    single_label = by_level = has_quality = True
    l1 = False
    """Whether the box outputs have an L1 loss, too; see ``schedule``."""

    @property
    def outputs(self) -> int:
        """Number of the network's outputs for classes."""
        return int(self.head.num_classes)

    def network_input(self, images: Tensor) -> Tensor:
        """BGR in 0..255, from RGB in 0..1."""
        return images.flip(1) * 255

    def backbone(self, images: Tensor) -> tuple[Tensor, ...]:
        """The maps of the CSPDarknet that the neck reads."""
        found = self.model.backbone.backbone(images)
        return tuple(found[name] for name in self.model.backbone.in_features)

    def pyramid(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The three maps of the path aggregation network: top-down, then bottom-up."""
        neck, (fine, middle, coarse) = self.model.backbone, maps
        lateral = neck.lateral_conv0(coarse)
        between = neck.C3_p4(torch.cat([neck.upsample(lateral), middle], dim=1))
        reduced = neck.reduce_conv1(between)
        first = neck.C3_p3(torch.cat([neck.upsample(reduced), fine], dim=1))
        second = neck.C3_n3(torch.cat([neck.bu_conv2(first), reduced], dim=1))
        third = neck.C3_n4(torch.cat([neck.bu_conv1(second), lateral], dim=1))
        return first, second, third

    def parts(self) -> Parts:
        """Group the modules: the CSPDarknet, the other layers of the path aggregation network, and the head."""
        neck = tuple(module for name, module in self.model.backbone.named_children() if name != "backbone")
        return Parts((self.model.backbone.backbone,), neck, (self.head,))

    def reset_head(self) -> None:
        """Initialise the head anew: scores begin at 0.01."""
        reset(self.head)
        self.model.init_weights()

    def class_rows(self, name: str) -> Tensor | None:
        """Return the rows [K, 1] of the outputs of each class; see ``inherit``."""
        return self.columns[:, None] if re.search(r"\.cls_preds\.\d+\.(?:weight|bias)$", name) else None

    # ------------------------------------------------------------------------------------------------------- prediction

    def predict(self, features: Features, batch: Batch) -> Dense:
        """Compute one prediction for each cell."""
        return self.finish(self.tower(features, upto=0), batch)

    @property
    def tower_depth(self) -> int:
        """Number of blocks before the output layers: the stem, which both branches share, and those of a branch."""
        return 1 + len(self.head.cls_convs[0])

    def tower(self, features: Features, upto: int | None = None) -> Tower:
        """Compute the inner maps of both branches after ``upto`` blocks (None: all blocks); every level has its own blocks."""
        depth = self.tower_depth if upto is None else upto
        if depth == 0:
            return Tower(features.maps, features.maps, 0, features.strides)
        maps = self._stems(features.maps)
        classes, boxes = (
            tuple(side[level][: depth - 1](one) for level, one in enumerate(maps))
            for side in (self.head.cls_convs, self.head.reg_convs)
        )
        return Tower(classes, boxes, depth, features.strides)

    def _stems(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(stem(one) for stem, one in zip(self.head.stems, maps, strict=True))

    def finish(self, hidden: Tower, batch: Batch) -> Dense:
        """Run the remaining blocks and the output layers; outputs and boxes are float32 under mixed precision."""
        head, classes, boxes = self.head, hidden.classification, hidden.regression
        if hidden.depth == 0:
            # Maps that both branches share pass the stem once, so that its BatchNorm sees them once.
            shared = all(one is other for one, other in zip(classes, boxes, strict=True))
            classes = self._stems(classes)
            boxes = classes if shared else self._stems(boxes)
        begin = max(hidden.depth - 1, 0)
        classes, boxes = (
            tuple(side[level][begin:](one) for level, one in enumerate(maps))
            for side, maps in ((head.cls_convs, classes), (head.reg_convs, boxes))
        )
        logits, deltas, objectness = (
            torch.cat([layer(one).flatten(2) for layer, one in zip(layers, maps, strict=True)], dim=2)
            .transpose(1, 2)
            .to(batch.images.dtype)
            for layers, maps in ((head.cls_preds, classes), (head.reg_preds, boxes), (head.obj_preds, boxes))
        )
        levels, cells, numbers = layout([(one.shape[-2], one.shape[-1]) for one in boxes], self.spec.anchors, deltas.device)
        center, extent = self._centers(deltas, levels, cells)
        corners = torch.cat([center - extent / 2, center + extent / 2], dim=-1)
        priors = self.priors(levels, cells, deltas).expand_as(corners)
        return Dense(logits[..., self.columns], deltas, corners, priors, levels, cells, numbers, quality=objectness[..., 0])

    def _centers(self, deltas: Tensor, levels: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
        """Centre and size [..., P, 2] in pixels: the centre is counted from the cell's corner, the size is a logarithm."""
        points, strides = points_of(levels, cells, self.spec.strides, deltas)
        return (deltas[..., :2] + (points - 0.5)) * strides, deltas[..., 2:].exp() * strides

    def boxes_and_scores(self, dense: Dense, sigmoid: Callable[[Tensor], Tensor] = torch.sigmoid) -> tuple[Tensor, Tensor]:
        """Boxes [B, P, 4] in pixels, and products [B, P, K] of class score and objectness."""
        return dense.boxes_xyxy, sigmoid(_objectness(dense)[..., None]) * sigmoid(dense.logits)

    # ------------------------------------------------------------------------------------------------------------- loss

    def schedule(self, clock: Clock) -> None:
        """Switch on the L1 loss in the last epochs, as the package does with the end of its mosaic; in short runs always."""
        last = LAST_EPOCHS if self.options.l1 is None else self.options.l1
        self.l1 = clock.epoch >= clock.epochs - last

    def assign(self, prediction: Prediction, batch: Batch) -> Assignment:
        """Assign by SimOTA; ``weights`` of positives are the IoUs of their pairs."""
        dense = cast(Dense, prediction)
        boxes = torch.cat(self._centers(dense.deltas, dense.levels, dense.cells), dim=-1)
        strides = boxes.new_tensor(self.spec.strides)[dense.levels]
        return simota(self.head, dense.logits, _objectness(dense), boxes, dense.cells.flip(1), strides, batch)

    def loss_terms(self, dense: Dense, batch: Batch, assignment: Assignment) -> dict[str, Tensor]:
        """Compute ``iou_loss``, ``obj_loss`` and ``cls_loss`` (binary cross-entropy), and in the last epochs ``l1_loss``.

        Class targets of positives are their weights, objectness targets 1. All terms are divided by the number of positives, at
        least 1.
        """
        matched, positive = assignment.matched, assignment.matched >= 0
        weights = label_weights(assignment, dense.logits)
        image, index = torch.nonzero(positive, as_tuple=True)
        labels, corners = objects_of(batch, image, matched[positive], dense.deltas.dtype)
        total = _divisor(positive.sum(), assignment, dense.deltas)
        center, extent = self._centers(dense.deltas[positive], dense.levels[index], dense.cells[index])
        wanted = torch.cat([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], dim=1)
        overlap = self.head.iou_loss(torch.cat([center, extent], dim=1), wanted)
        classes = torch.zeros_like(dense.logits[positive])
        classes[torch.arange(len(labels), device=labels.device), labels] = weights[positive]
        entropy = nn.functional.binary_cross_entropy_with_logits
        objects = entropy(_objectness(dense), positive.to(dense.deltas.dtype), reduction="none")
        terms = {
            "iou_loss": 5.0 * overlap.sum() / total,
            "obj_loss": (objects * torch.where(positive, torch.ones_like(weights), weights)).sum() / total,
            "cls_loss": entropy(dense.logits[positive], classes, reduction="sum") / total,
        }
        if self.l1:
            points, strides = points_of(dense.levels[index], dense.cells[index], self.spec.strides, corners)
            goal = torch.cat([wanted[:, :2] / strides - (points - 0.5), (wanted[:, 2:] / strides + 1e-8).log()], dim=1)
            terms["l1_loss"] = (dense.deltas[positive] - goal).abs().sum() / total
        return terms

    def usage(self, resizing: Resizing | None = None) -> str:
        """Explain how the package loads the folder."""
        return usage(self.description, self.outputs, own="width" in self.description)


def _objectness(dense: Dense) -> Tensor:
    """[B, P] logits.

    Raises:
        ValueError: the prediction has none, because it is of another kind of detector.
    """
    if dense.quality is None:
        raise ValueError("this prediction has no objectness; call predict again on the features")
    return dense.quality


def _divisor(count: Tensor, assignment: Assignment, like: Tensor) -> Tensor:
    """[] the divisor of the losses: a sum over all processes, at least 1, divided by their number."""
    # The package's own function, because it rounds the count to float32, also in float64.
    from libreyolo.training.distributed import all_reduce_avg_scalar_tensor

    given = assignment.normalizer
    found: Tensor = all_reduce_avg_scalar_tensor(count) if given is None else given
    return found.to(like)


class YOLO9(LibreNetwork):
    """YOLO9: class scores and distributions of the box's sides for each cell; task-aligned assignment.

    The auxiliary branch that the package's own training adds is left out.
    """

    box_bins = BINS
    single_label = by_level = False

    @property
    def outputs(self) -> int:
        """Number of the network's outputs for classes."""
        return int(self.head.nc)

    def backbone(self, images: Tensor) -> tuple[Tensor, ...]:
        """The maps of the backbone that the neck reads."""
        return tuple(self.model.backbone(images))

    def pyramid(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The maps of the neck."""
        return tuple(self.model.neck(*maps))

    def parts(self) -> Parts:
        """Group the modules; backbone, neck and head are the package's own."""
        return Parts((self.model.backbone,), (self.model.neck,), (self.head,))

    def reset_head(self) -> None:
        """Initialise the head anew: sides begin at bins of equal weight, scores at 5e-5."""
        reset(self.head)
        for boxes, classes in zip(self.head.cv2, self.head.cv3, strict=True):
            nn.init.constant_(boxes[-1].bias, 1.0)
            nn.init.constant_(classes[-1].bias, -10.0)

    def class_rows(self, name: str) -> Tensor | None:
        """Return the rows [K, 1] of the outputs of each class; see ``inherit``."""
        return self.columns[:, None] if re.search(r"\.cv3\.\d+\.2\.(?:weight|bias)$", name) else None

    # ------------------------------------------------------------------------------------------------------- prediction

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
        logits, deltas = (
            torch.cat([one.flatten(2) for one in maps], dim=2).transpose(1, 2).to(batch.images.dtype) for maps in (scores, boxes)
        )
        levels, cells, numbers = layout([(one.shape[-2], one.shape[-1]) for one in boxes], self.spec.anchors, deltas.device)
        points, strides = points_of(levels, cells, self.spec.strides, deltas)
        bins = torch.arange(BINS, dtype=deltas.dtype, device=deltas.device)
        sides = (deltas.unflatten(-1, (4, BINS)).softmax(dim=-1) * bins).sum(dim=-1)
        corners = torch.cat([points - sides[..., :2], points + sides[..., 2:]], dim=-1) * strides
        priors = self.priors(levels, cells, deltas).expand_as(corners)
        return Dense(logits[..., self.columns], deltas, corners, priors, levels, cells, numbers)

    def boxes_and_scores(self, dense: Dense, sigmoid: Callable[[Tensor], Tensor] = torch.sigmoid) -> tuple[Tensor, Tensor]:
        """Boxes [B, P, 4] in pixels, and scores [B, P, K]."""
        sides = self.head.dfl(dense.deltas.transpose(1, 2)).transpose(1, 2)
        points, strides = points_of(dense.levels, dense.cells, self.spec.strides, sides)
        corners = torch.cat([points - sides[..., :2], points + sides[..., 2:]], dim=-1) * strides
        return corners, sigmoid(dense.logits)

    def distributions(self, prediction: Prediction, batch: Batch) -> BoxDistributions:
        """Return the distributions; a step is one stride, and step 0 lies at the cell's centre."""
        dense = cast(Dense, prediction)
        centers = (dense.priors_xyxy[..., :2] + dense.priors_xyxy[..., 2:]) / 2
        signs = dense.boxes_xyxy.new_tensor([-1.0, -1.0, 1.0, 1.0])
        strides = dense.boxes_xyxy.new_tensor(self.spec.strides)[dense.levels]
        units = (strides[:, None] * signs).expand_as(dense.priors_xyxy)
        steps = torch.arange(BINS, dtype=signs.dtype, device=signs.device)
        return BoxDistributions(dense.deltas.unflatten(-1, (4, BINS)), centers.repeat(1, 1, 2), units, steps)

    # ------------------------------------------------------------------------------------------------------------- loss

    def assign(self, prediction: Prediction, batch: Batch) -> Assignment:
        """Assign by task alignment with ten candidates of each object; ``weights`` of positives are their target scores."""
        dense = cast(Dense, prediction)
        points, strides = points_of(dense.levels, dense.cells, self.spec.strides, dense.boxes_xyxy)
        return task_aligned(dense.logits, dense.boxes_xyxy, points * strides, strides[:, 0], batch, BINS)

    def loss_terms(self, dense: Dense, batch: Batch, assignment: Assignment) -> dict[str, Tensor]:
        """Compute ``box_loss`` (complete IoU), ``cls_loss`` (binary cross-entropy) and ``dfl_loss``.

        Class targets of positives are their weights. All terms are divided by the sum of these weights, at least 1.
        """
        from libreyolo.utils.box_ops import compute_iou

        matched, positive = assignment.matched, assignment.matched >= 0
        weights = label_weights(assignment, dense.logits)
        image, index = torch.nonzero(positive, as_tuple=True)
        labels, wanted = objects_of(batch, image, matched[positive], dense.boxes_xyxy.dtype)
        score = weights[positive]
        total = _divisor(score.sum(), assignment, dense.deltas)
        target = torch.zeros_like(dense.logits)
        target[image, index, labels] = score
        entropy = nn.functional.binary_cross_entropy_with_logits(dense.logits, target, reduction="none")
        counted = torch.where(positive, torch.ones_like(weights), weights)

        points, strides = points_of(dense.levels[index], dense.cells[index], self.spec.strides, dense.boxes_xyxy)
        goal = wanted / strides
        overlap = compute_iou(dense.boxes_xyxy[positive] / strides, goal, "ciou", pairwise=False)
        sides = torch.cat([points - goal[:, :2], goal[:, 2:] - points], dim=-1).clamp(0, BINS - 1.01)
        spread = distribution_focal_loss(dense.deltas[positive].reshape(-1, BINS), sides.flatten()).view(-1, 4).mean(dim=-1)
        return {
            "box_loss": 7.5 * ((1 - overlap) * score).sum() / total,
            "cls_loss": 0.5 * (entropy * counted[..., None]).sum() / total,
            "dfl_loss": 1.5 * (spread * score).sum() / total,
        }

    def usage(self, resizing: Resizing | None = None) -> str:
        """Explain how the package loads the folder."""
        return usage(self.description, self.outputs, own="class_width" in self.description)
