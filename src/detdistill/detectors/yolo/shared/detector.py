"""Base of detectors with one and with two branches: features, points and boxes, losses, detections, copies, export.

Shape letters: B images, P predictions of an image, K classes, R numbers for each side of a box (bins; 1 without bins).
"""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from detdistill.detectors.contract import DenseCoding, Detector, DetectorSpec, Parts, Pyramid, dense_positives
from detdistill.detectors.options import ModelOptions
from detdistill.detectors.single_cells import accept_single_cells
from detdistill.detectors.torchvision.dense_outputs import layout
from detdistill.detectors.torchvision.images import coarser_padding, image_sizes, with_padding
from detdistill.detectors.yolo.shared.assignment import task_aligned
from detdistill.detectors.yolo.shared.common import (
    DESCRIPTION,
    detections_at,
    grey_padded,
    objects_of,
    output_names,
    points_of,
    reset,
)
from detdistill.detectors.yolo.shared.networks import save_pt
from detdistill.detectors.yolo.shared.selection import select
from detdistill.errors import ModelError
from detdistill.files import write_atomically
from detdistill.functional.counting import mean_over_ranks, number_of_ranks
from detdistill.functional.focal import distribution_focal_loss
from detdistill.functional.modes import evaluating
from detdistill.structures import (
    IGNORED,
    Assignment,
    Batch,
    BoxDistributions,
    Dense,
    Detections,
    Features,
    Positives,
    Prediction,
    Resizing,
)
from detdistill.values import Count, Fraction, Positive, Weight


@dataclass(frozen=True, kw_only=True)
class UltralyticsOptions(ModelOptions):
    """Options of the package's networks."""

    score: Fraction = 0.001
    """Detections score above this."""
    iou: Fraction = 0.7
    """Of two boxes of one class with a larger IoU, the one with the higher score stays."""
    dets: Count = 300
    """Maximum number of detections of an image."""
    nms: bool = True
    """`false`: detections of the one-to-one branch, without NMS (YOLOv10, YOLO26)."""
    width: Positive | None = None
    """Multiplier of the channels, instead of the size's own."""
    depth: Positive | None = None
    """Multiplier of the repeated blocks, instead of the size's own."""
    box: Weight = 7.5
    """Weight of the boxes' loss."""
    cls: Weight = 0.5
    """Weight of the classes' loss."""
    dfl: Weight = 1.5
    """Weight of the loss of the sides' distributions, or of the sides."""


class Network(Detector):
    """Base of the detectors with one and with two branches."""

    library = "ultralytics"
    columns: Tensor
    """[K] index of the network's output for each class."""

    def __init__(
        self,
        model: Any,
        description: dict[str, Any],
        classes: Sequence[str],
        options: UltralyticsOptions,
        name: str,
        columns: Sequence[int] | None = None,
    ) -> None:
        """Wrap a network of the package.

        Args:
            model: a ``DetectionModel``.
            description: what it was built from, for ``export``.
            classes: names of the K classes, in label order.
            options: thresholds and weights of the losses.
            name: model string.
            columns: output of each class; None: 0 .. K-1.
        """
        super().__init__()
        accept_single_cells(model)
        self.model, self.description, self.options = model, description, options
        wanted = list(range(len(classes))) if columns is None else list(columns)
        self.register_buffer("columns", torch.tensor(wanted, dtype=torch.int64), persistent=False)
        below = len(description["backbone"])
        self._body, self._neck = range(below), range(below, len(model.model) - 1)
        read = [source for layer in model.model[below:] for source in _sources(layer) if 0 <= source < below]
        self._taps = sorted({*read, below - 1})
        features, backbone = self._pyramids()
        self.spec = DetectorSpec(
            name=name,
            family="dense",
            classes=tuple(classes),
            channels=features.channels,
            strides=features.strides,
            mean=(0.0, 0.0, 0.0),
            std=(1.0, 1.0, 1.0),
            backbone=backbone,
            anchors=(1,) * len(features.strides),
            box_bins=self.head.reg_max if self.head.reg_max > 1 else 0,
            coding=DenseCoding(),
        )

    @property
    def head(self) -> Any:
        """The package's ``Detect``."""
        return self.model.model[-1]

    def parts(self) -> Parts:
        """Group the layers: those of the description's backbone, the others, and ``Detect``."""
        return Parts(
            tuple(self.model.model[index] for index in self._body),
            tuple(self.model.model[index] for index in self._neck),
            (self.head,),
        )

    # --------------------------------------------------------------------------------------------------------- features

    def normalized(self, batch: Batch) -> Tensor:
        """[B, 3, H, W] images in 0..1 with grey padding, as the package shows them, and padded to whole cells of each level."""
        return grey_padded(batch, max(self.spec.strides))

    def features(self, batch: Batch) -> Features:
        """Compute the maps that the head reads."""
        return self.neck(self.backbone_features(batch), batch)

    def backbone_features(self, batch: Batch) -> Features:
        """Compute the maps of the backbone that later layers read."""
        return with_padding(self.backbone(self.normalized(batch)), self._below_strides(), batch)

    def backbone(self, images: Tensor) -> tuple[Tensor, ...]:
        """The maps of the backbone that later layers read, from images [B, 3, H, W] with grey padding."""
        kept: dict[int, Tensor] = {}
        self._run(self._body, images, kept, self._taps)
        return tuple(kept[index] for index in self._taps)

    def neck(self, features: Features, batch: Batch) -> Features:
        """Run the layers between backbone and head."""
        return with_padding(self.pyramid(features.maps), self.spec.strides, batch)

    def pyramid(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The maps that the head reads, from those of the backbone."""
        kept = dict(zip(self._taps, maps, strict=True))
        self._run(self._neck, maps[-1], kept, self.head.f)
        return tuple(kept[index] for index in self.head.f)

    def _below_strides(self) -> tuple[int, ...]:
        assert self.spec.backbone is not None
        return self.spec.backbone.strides

    def _run(self, layers: Iterable[int], value: Tensor, kept: dict[int, Tensor], wanted: Iterable[int]) -> None:
        """Run layers in turn; the maps that later layers read, and the wanted ones, are put into ``kept`` by their number."""
        keep = {*self.model.save, *wanted}
        for index in layers:
            layer = self.model.model[index]
            sources = [value if source == -1 else kept[source] for source in _sources(layer)]
            value = layer(sources if isinstance(layer.f, list) else sources[0])
            if index in keep:
                kept[index] = value

    @torch.no_grad()
    def _pyramids(self) -> tuple[Pyramid, Pyramid]:
        """Channels and strides of the head's maps and of the backbone's, by a run on an empty image."""
        size, kept = 256, dict[int, Tensor]()
        parameter = next(self.model.parameters())
        with evaluating(self.model):
            self._run((*self._body, *self._neck), parameter.new_zeros(1, 3, size, size), kept, (*self._taps, *self.head.f))
        both = [[kept[index] for index in wanted] for wanted in (self.head.f, self._taps)]
        features, backbone = (
            Pyramid(tuple(one.shape[1] for one in maps), tuple(size // one.shape[-1] for one in maps)) for maps in both
        )
        return features, backbone

    # ------------------------------------------------------------------------------------------------------- prediction

    def dense(
        self, boxes: Tensor, scores: Tensor, shapes: Sequence[tuple[int, int]], batch: Batch, own: Dense | None = None
    ) -> Dense:
        """The prediction of a branch: points at the centres of the cells, sides as distances in strides.

        Args:
            boxes: [B, 4R, P] outputs for the sides left, top, right, bottom.
            scores: [B, C, P] logits of all outputs of the network, which may be more than the detector's classes.
            shapes: rows and columns of each level.
            batch: the images; outputs and boxes get their precision.
            own: prediction of a second branch.
        """
        deltas, scores = (one.transpose(1, 2).to(batch.images.dtype) for one in (boxes, scores))
        levels, cells, numbers = layout(shapes, self.spec.anchors, deltas.device)
        points, strides = self._points(levels, cells, deltas)
        sides = deltas
        if self.head.reg_max > 1:
            bins = torch.arange(self.head.reg_max, dtype=deltas.dtype, device=deltas.device)
            sides = deltas.unflatten(-1, (4, -1)).softmax(dim=-1).matmul(bins)
        corners = torch.cat([points - sides[..., :2], points + sides[..., 2:]], dim=-1) * strides
        halves = torch.cat([points - 0.5, points + 0.5], dim=-1) * strides
        return Dense(
            logits=scores[..., self.columns],
            deltas=deltas,
            boxes_xyxy=corners,
            priors_xyxy=halves.expand_as(corners),
            levels=levels,
            cells=cells,
            anchors=numbers,
            own=own,
        )

    def _points(self, levels: Tensor, cells: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Centre [P, 2] (x, y, in cells) and stride [P, 1] of each prediction."""
        return points_of(levels, cells, self.spec.strides, like)

    def positives(self, prediction: Prediction, assignment: Assignment, batch: Batch) -> Positives:
        """Gather the predictions that ``assignment`` matches to a ground-truth box."""
        return dense_positives(cast(Dense, prediction), assignment, batch)

    def distributions(self, prediction: Prediction, batch: Batch) -> BoxDistributions:
        """Return the distributions; a step is one stride, and step 0 lies at the cell's centre.

        Raises:
            ModelError: the sides of this network's boxes are single numbers (YOLO26).
        """
        if not self.spec.box_bins:
            raise ModelError(f"{self.spec.name}: the sides of its boxes are numbers, not distributions")
        dense = cast(Dense, prediction)
        centers = (dense.priors_xyxy[..., :2] + dense.priors_xyxy[..., 2:]) / 2
        signs = dense.boxes_xyxy.new_tensor([-1.0, -1.0, 1.0, 1.0])
        strides = dense.boxes_xyxy.new_tensor(self.spec.strides)[dense.levels]
        units = (strides[:, None] * signs).expand_as(dense.priors_xyxy)
        steps = torch.arange(self.spec.box_bins, dtype=signs.dtype, device=signs.device)
        return BoxDistributions(dense.deltas.unflatten(-1, (4, -1)), centers.repeat(1, 1, 2), units, steps)

    # ------------------------------------------------------------------------------------------------------------- loss

    def assign(self, prediction: Prediction, batch: Batch) -> Assignment:
        """Assign by task alignment with ten candidates of each object; ``weights`` of positives are their target scores."""
        return self._assigned(cast(Dense, prediction), batch, top=10)

    def _assigned(self, dense: Dense, batch: Batch, top: int, last: int | None = None) -> Assignment:
        points = (dense.priors_xyxy[0, :, :2] + dense.priors_xyxy[0, :, 2:]) / 2
        return task_aligned(dense.logits, dense.boxes_xyxy, points, batch, self.spec.strides, top=top, last=last)

    def branch_loss(self, dense: Dense, batch: Batch, assignment: Assignment) -> dict[str, Tensor]:
        """Compute ``box_loss`` (complete IoU), ``cls_loss`` (binary cross-entropy) and ``dfl_loss`` or ``l1_loss``.

        Class targets of positives are their weights. All terms are divided by the sum of these weights (at least 1, mean over
        processes), and multiplied by the options' weights and by the number of images of all processes, as in the package.
        """
        from ultralytics.utils.metrics import bbox_iou

        matched = assignment.matched
        positive, weights = matched >= 0, assignment.weights
        weights = torch.ones_like(dense.logits[..., 0]) if weights is None else weights.to(dense.logits.dtype)
        image, index = torch.nonzero(positive, as_tuple=True)
        labels, wanted = objects_of(batch, image, matched[positive], dense.boxes_xyxy.dtype)
        score = weights[positive]
        total = assignment.normalizer if assignment.normalizer is not None else mean_over_ranks(score.sum(), least=1)

        target = torch.zeros_like(dense.logits)
        target[image, index, labels] = score
        entropy = nn.functional.binary_cross_entropy_with_logits(dense.logits, target, reduction="none").sum(dim=-1)
        entropy = entropy * torch.where(positive, torch.ones_like(weights), weights).masked_fill(matched == IGNORED, 0.0)

        strides = dense.boxes_xyxy.new_tensor(self.spec.strides)[dense.levels[index]][:, None]
        boxes, goal = dense.boxes_xyxy[positive] / strides, wanted / strides
        overlap = bbox_iou(boxes, goal, xywh=False, CIoU=True).squeeze(-1)
        points = (dense.priors_xyxy[positive][:, :2] + dense.priors_xyxy[positive][:, 2:]) / 2 / strides
        sides = torch.cat([points - goal[:, :2], goal[:, 2:] - points], dim=-1)
        last = self._side_loss(dense.deltas[positive], sides, strides, dense)
        count, options = len(batch) * number_of_ranks(), self.options
        return {
            "box_loss": options.box * count * ((1 - overlap) * score).sum() / total,
            "cls_loss": options.cls * count * entropy.sum() / total,
            "dfl_loss" if self.spec.box_bins else "l1_loss": options.dfl * count * (last * score).sum() / total,
        }

    def _side_loss(self, deltas: Tensor, sides: Tensor, strides: Tensor, dense: Dense) -> Tensor:
        """[M] distribution focal loss of the positives, or the distance of the sides in parts of the image."""
        bins = self.head.reg_max
        if bins > 1:
            spread = distribution_focal_loss(deltas.reshape(-1, bins), sides.clamp(0, bins - 1 - 0.01).flatten())
            return spread.view(-1, 4).mean(dim=-1)
        first = dense.levels == 0
        rows, columns = (dense.cells[first].amax(dim=0) + 1).unbind()
        size = torch.stack([columns, rows, columns, rows]).to(deltas.dtype) * self.spec.strides[0]
        return (deltas * strides / size - sides * strides / size).abs().mean(dim=-1)

    # ------------------------------------------------------------------------------------------------------- detections

    def detect(self, prediction: Prediction, batch: Batch) -> list[Detections]:
        """Select the detections as the package's validation does, and clip them to the images."""
        dense, options = cast(Dense, prediction), self.options
        boxes, scores = self.decoded(dense.deltas.transpose(1, 2), dense.levels, dense.cells), dense.logits.sigmoid()
        found = []
        for image, size in enumerate(image_sizes(batch)):
            index, labels, score = select(
                boxes[image], scores[image], threshold=options.score, iou=options.iou, most=options.dets
            )
            found.append(detections_at(boxes[image, index], score, labels, index, image, dense, size))
        return found

    def decoded(self, outputs: Tensor, levels: Tensor, cells: Tensor) -> Tensor:
        """Decode boxes with the arithmetic of the package's inference (centre and size; bins by convolution).

        Args:
            outputs: [B, 4R, P] outputs for the sides.
            levels: [P] level of each prediction.
            cells: [P, 2] row and column of each prediction.

        Returns:
            [B, P, 4] in pixels, not clipped.
        """
        points, strides = self._points(levels, cells, outputs)
        sides = self.head.dfl(outputs) if self.head.reg_max > 1 else outputs
        low, high = points.T - sides[:, :2], points.T + sides[:, 2:]
        center, extent = (low + high) / 2 * strides.T, (high - low) * strides.T
        return torch.cat([center - extent / 2, center + extent / 2], dim=1).transpose(1, 2)

    # ----------------------------------------------------------------------------------------------------------- copies

    def copy_head(self, fresh: bool = False) -> Self:
        """Copy the head into a detector with parameters of its own; ``fresh``: newly initialised. It cannot compute features."""
        head = self._without((*self._body, *self._neck))
        if fresh:
            reset(head.head)
            head.head.bias_init()
        return head

    def copy_neck(self, fresh: bool = False) -> Neck:
        """Copy the layers between backbone and head into a module; ``fresh``: newly initialised."""
        neck = Neck(self._without((*self._body, len(self.model.model) - 1), head_reads=list(self.head.f)))
        if fresh:
            reset(neck)
        return neck

    def _without(self, layers: Iterable[int], head_reads: list[int] | None = None) -> Self:
        """A trainable copy in which these layers have no parameters."""
        nothing: dict[int, Any] = {id(self.model.model[index]): nn.Identity() for index in layers}
        one = copy.deepcopy(self, nothing).requires_grad_(True).train()
        if head_reads is not None:
            one.head.f = head_reads
        return one

    def class_rows(self, name: str) -> Tensor | None:
        """Return the rows [K, 1] of the outputs of each class; see ``inherit``."""
        outputs = re.search(r"\.(?:one2one_)?cv3\.\d+\.(\d+)\.(?:weight|bias)$", name)
        return self.columns[:, None] if outputs and int(outputs[1]) == len(self.head.cv3[0]) - 1 else None

    # ----------------------------------------------------------------------------------------------------------- export

    def export(self, folder: Path, resizing: Resizing | None = None) -> None:
        """Write ``model.safetensors`` (the package's names) and ``network.json`` (its description, all class names)."""
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.model.state_dict().items()}
        write_atomically(folder / "model.safetensors", lambda path: save_file(state, path))
        names = self.output_names()
        options = {key: value for key, value in dataclasses.asdict(self.options).items() if key != "name"}
        content = {"description": self.description, "names": names, "options": options}
        text = json.dumps(content, indent=1) + "\n"
        write_atomically(folder / DESCRIPTION, lambda path: path.write_text(text, encoding="utf-8"))

    def output_names(self) -> list[str]:
        """Class of each output of the network; a number for outputs that the detector ignores."""
        return output_names(self.head.nc, self.columns, self.spec.classes)

    def save_pt(self, path: Path) -> None:
        """Write a file that ``ultralytics.YOLO(path)`` opens, in float32; the package's own ``save`` halves the weights."""
        save_pt(self.description, self.model.state_dict(), self.output_names(), path)

    def usage(self, resizing: Resizing | None = None) -> str:
        """Explain how the package loads the folder."""
        return USAGE


class Neck(nn.Module):
    """The layers between backbone and head; maps backbone ``Features`` to neck ``Features``."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, features: Features) -> Features:
        """Compute the maps that the head reads."""
        strides = self.network.spec.strides
        return Features(self.network.pyramid(features.maps), strides, coarser_padding(features, strides))


def _sources(layer: Any) -> list[int]:
    """Numbers of the layers whose outputs a layer reads; -1: the one before."""
    return list(layer.f) if isinstance(layer.f, list) else [layer.f]


USAGE = """```python
import json

from safetensors.torch import load_file
from ultralytics.nn.tasks import DetectionModel  # AGPL-3.0

about = json.load(open("path/to/this/folder/network.json"))
model = DetectionModel(about["description"], nc=len(about["names"]), verbose=False)
model.load_state_dict(load_file("path/to/this/folder/model.safetensors"))
model.names = dict(enumerate(about["names"]))
```

`detdistill student --model FOLDER --out OTHER --pt` also writes `best.pt`, which `ultralytics.YOLO("OTHER/best.pt")` opens."""
"""How to load an exported folder with the package."""
