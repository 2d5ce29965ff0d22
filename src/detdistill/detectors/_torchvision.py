"""What the adapters of torchvision's detectors share.

Labels: torchvision's class 0 is the background, so a model of K classes has K+1 outputs; pretrained ones have more (91
for COCO, with unused names). ``columns`` [K] says which output belongs to each of our labels 0 .. K-1.

Images are normalised by the detector and padded with zeros to the multiple that the model's own transform pads to, so
that features, losses and detections equal those of ``model(images, targets)`` on images that keep their size.

Shape letters: B images, L levels, P predictions of an image, K classes, C = K+1 or more outputs, A anchors of a cell.
"""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import clip_boxes_to_image

from detdistill.detectors import standalone
from detdistill.detectors.contract import Detector, DetectorSpec, Family
from detdistill.detectors.standalone import TimmPyramid
from detdistill.errors import ModelError
from detdistill.structures import Assignment, Batch, Dense, Detections, Features, Movable, Origin, Target


class TorchvisionDetector(Detector):
    """The parts that are the same for all of torchvision's detectors on a feature pyramid."""

    head_prefixes: tuple[str, ...] = ("model.backbone.fpn.", "model.head.")
    columns: Tensor

    def __init__(
        self,
        model: Any,
        classes: Sequence[str],
        name: str,
        *,
        family: Family,
        softmax: bool = False,
        columns: Sequence[int] | None = None,
        description: Mapping[str, Any] | None = None,
        pyramid: tuple[tuple[int, ...], tuple[int, ...]] | None = None,
        needs_masks: bool = False,
        fixed_size_hw: tuple[int, int] | None = None,
    ) -> None:
        """Wrap a model.

        Args:
            model: torchvision's; its parameters keep their names below ``model.``.
            classes: names of our labels.
            name: as the command line writes it.
            family: which prediction the adapter makes.
            softmax: K+1 logits with the background last.
            columns: the output of each class; None: 1 .. K, as for every model with K+1 outputs.
            description: the tree ``standalone.build`` makes the model from; None: the export has no loading script.
            pyramid: channels and strides of the features; None: of ``model.backbone``, found out.
            needs_masks: training needs masks.
            fixed_size_hw: the only input size.
        """
        super().__init__()
        self.model = model
        self.description = description
        wanted = list(columns) if columns is not None else list(range(1, len(classes) + 1))
        self.register_buffer("columns", torch.tensor(wanted, dtype=torch.int64), persistent=False)
        channels, strides = pyramid or pyramid_of(model.backbone)
        mean, std = model.transform.image_mean, model.transform.image_std
        self.spec = DetectorSpec(
            name=name,
            family=family,
            classes=tuple(classes),
            channels=channels,
            strides=strides,
            softmax=softmax,
            mean=tuple(mean),
            std=tuple(std),
            needs_masks=needs_masks,
            fixed_size_hw=fixed_size_hw,
        )

    def features(self, batch: Batch) -> Features:
        """The pyramid's levels."""
        levels = self.model.backbone(self.image_list(batch).tensors)
        return with_padding(tuple(levels.values()), self.spec.strides, batch)

    def backbone_features(self, batch: Batch) -> Features:
        """The backbone's maps that enter the pyramid."""
        maps = tuple(backbone_maps(self.model.backbone, self.image_list(batch).tensors).values())
        return with_padding(maps, self.spec.strides[: len(maps)], batch)

    def image_list(self, batch: Batch) -> ImageList:
        """Normalised images as the model's own transform would hand them on."""
        images = self.normalized(batch)
        return ImageList(padded(images, self.model.transform.size_divisible), image_sizes(batch))

    def image_shapes(self, batch: Batch) -> ImageList:
        """An ``ImageList`` of the right sizes without the pixels, for anchors and clipping."""
        divisible = self.model.transform.size_divisible
        height, width = (-(-side // divisible) * divisible for side in batch.padding_hw)
        return ImageList(batch.images.new_empty(()).expand(len(batch), 3, height, width), image_sizes(batch))

    def copy_neck(self, fresh: bool = False) -> Neck:
        """The feature pyramid alone, on its own parameters."""
        neck = Neck(copy.deepcopy(self.model.backbone.fpn), self.spec.strides).requires_grad_(True).train()
        if fresh:
            neck.reset()
        return neck

    def without_backbone(self) -> TorchvisionDetector:
        """A copy, on its own trainable parameters, that can do all but compute features."""
        nothing: dict[int, Any] = {id(self.model.backbone): nn.Identity()}
        return copy.deepcopy(self, nothing).requires_grad_(True).train()

    def export(self, folder: Path) -> None:
        """Write ``model.safetensors`` (the model's own names), ``model.json`` and the script ``load_student.py``."""
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.model.state_dict().items()}
        write_atomically(folder / "model.safetensors", lambda path: save_file(state, path))
        if self.description is None:
            return
        labels: list[str | None] = [None] * (int(self.columns.max()) + 1)
        for label, column in enumerate(self.columns.tolist()):
            labels[column] = self.spec.classes[label]
        text = json.dumps({"model": self.description, "labels": labels}, indent=1)
        write_atomically(folder / "model.json", lambda path: path.write_text(text + "\n", encoding="utf-8"))
        script = Path(standalone.__file__)
        write_atomically(folder / "load_student.py", lambda path: shutil.copyfile(script, path))
        if '"models.' in text:  # a detector that no library has: its few files go along
            (folder / "models").mkdir(exist_ok=True)
            for source in sorted((script.parent / "models").glob("*.py")):
                copy_of = partial(shutil.copyfile, source)
                write_atomically(folder / "models" / source.name, copy_of)


class Neck(nn.Module):
    """A feature pyramid that maps backbone ``Features`` to neck ``Features``."""

    def __init__(self, fpn: nn.Module, strides: tuple[int, ...]) -> None:
        super().__init__()
        self.fpn = fpn
        self.strides = strides

    def forward(self, features: Features) -> Features:
        """Levels of the strides the detector has."""
        maps = {str(index): level for index, level in enumerate(features.maps)}
        levels = tuple(self.fpn(maps).values())
        if features.padding is None:
            return Features(levels, self.strides)
        finest, stride = features.padding[0], features.strides[0]
        steps = [own // stride for own in self.strides]  # a coarse cell is padding when its first fine cell is
        return Features(levels, self.strides, tuple(finest[:, ::step, ::step] for step in steps))

    def reset(self) -> None:
        """Random weights, drawn as torchvision draws them."""
        for module in self.fpn.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


@dataclass(frozen=True)
class OwnOutputs(Movable):
    """A dense head's raw outputs as the library's own loss and decoding want them; float32 under mixed precision."""

    outputs: dict[str, Tensor]
    """Under the library's names, each [B, P, ...]."""
    anchors: tuple[Tensor, ...]
    """[P, 4] for each image."""
    counts: tuple[int, ...]
    """Predictions of each level."""


def own_outputs(prediction: Any, detector: Detector) -> OwnOutputs:
    """The raw outputs of a prediction.

    Raises:
        ValueError: the prediction was split by image or read from a cache, so it has none.
    """
    if not isinstance(prediction.own, OwnOutputs):
        raise ValueError(f"{detector.spec.name}: this prediction lost its own outputs; predict again from features")
    return prediction.own


# ------------------------------------------------------------------------------------------------- images and features


def image_sizes(batch: Batch) -> list[tuple[int, int]]:
    """Valid height and width of each image."""
    return [(int(height), int(width)) for height, width in batch.sizes.tolist()]


def padded(images: Tensor, divisible: int) -> Tensor:
    """Images [B, 3, H, W] with zeros on the right and at the bottom up to a multiple of ``divisible``."""
    below, right = (-side % divisible for side in images.shape[-2:])
    return nn.functional.pad(images, (0, right, 0, below)) if below or right else images


def with_padding(maps: tuple[Tensor, ...], strides: tuple[int, ...], batch: Batch) -> Features:
    """Features with their padding masks: a cell is padding when its first pixel is."""
    if all(
        level.shape[-2] * stride <= height and level.shape[-1] * stride <= width
        for level, stride in zip(maps, strides, strict=True)
        for height, width in image_sizes(batch)
    ):
        return Features(maps, strides)
    masks = []
    for level, stride in zip(maps, strides, strict=True):
        rows = torch.arange(level.shape[-2], device=level.device)[None, :, None] * stride
        columns = torch.arange(level.shape[-1], device=level.device)[None, None, :] * stride
        masks.append((rows >= batch.sizes[:, 0, None, None]) | (columns >= batch.sizes[:, 1, None, None]))
    return Features(maps, strides, tuple(masks) if any(bool(mask.any()) for mask in masks) else None)


def backbone_maps(backbone: Any, images: Tensor) -> Mapping[str, Tensor]:
    """The maps of the body of a ``TimmPyramid`` or of torchvision's ``BackboneWithFPN``."""
    return backbone.maps(images) if isinstance(backbone, TimmPyramid) else backbone.body(images)


@torch.no_grad()
def pyramid_of(backbone: nn.Module, size: int = 256) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Channels and strides of each level, found out by an empty image of ``size`` pixels (statistics stay untouched).

    Raises:
        ModelError: the backbone yields no named maps.
    """
    training = {module: module.training for module in backbone.modules()}
    parameter = next(backbone.parameters())
    levels = backbone.eval()(torch.zeros(1, 3, size, size, device=parameter.device, dtype=parameter.dtype))
    for module, was in training.items():
        module.training = was
    if not isinstance(levels, Mapping):
        raise ModelError("the backbone must return a dictionary of maps, as torchvision's BackboneWithFPN does")
    maps: list[Tensor] = list(levels.values())
    return tuple(level.shape[1] for level in maps), tuple(size // level.shape[-1] for level in maps)


# ----------------------------------------------------------------------------------------------- targets and matching


def trainable(target: Target) -> Tensor:
    """[T] indices of the boxes that training uses: no crowd, and a width and height above zero."""
    boxes = target.boxes_xyxy
    return torch.nonzero(~target.crowd & (boxes[:, 2:] > boxes[:, :2]).all(dim=1)).flatten()


def target_dicts(batch: Batch, columns: Tensor, only_trainable: bool = True) -> list[dict[str, Tensor]]:
    """Targets in the library's form: ``boxes`` [G, 4], ``labels`` [G] as output columns, ``masks`` where there are.

    Args:
        batch: its targets are read.
        columns: [K] the output of each class.
        only_trainable: leave out crowd and empty boxes; False keeps the indices that an ``Assignment`` speaks of.
    """
    dicts = []
    for target in batch.targets:
        keep = trainable(target) if only_trainable else slice(None)
        entry = {"boxes": target.boxes_xyxy[keep].to(batch.images.dtype), "labels": columns[target.labels[keep]]}
        if target.masks is not None:
            entry["masks"] = target.masks[keep].to(torch.uint8)
        dicts.append(entry)
    return dicts


def whole_indices(matched: Tensor, target: Target) -> Tensor:
    """Indices into the trainable boxes as indices into all boxes of the image; negative values stay."""
    kept = trainable(target)
    return matched if len(kept) == 0 else torch.where(matched >= 0, kept[matched.clamp(min=0)], matched)


class Matches:
    """Stands in for a head inside the library's ``compute_loss`` and notes what it was asked to compute with."""

    def compute_loss(self, targets: Any, outputs: Any, anchors: Any, matched_idxs: list[Tensor]) -> dict[str, Tensor]:
        """Keep the matches, compute nothing."""
        self.matched = matched_idxs
        return {}

    def assignment(self, batch: Batch) -> Assignment:
        """[B, P] the matches as indices into all boxes of each image."""
        pairs = zip(self.matched, batch.targets, strict=True)
        return Assignment(torch.stack([whole_indices(row, target) for row, target in pairs]))


def matched_targets(matched: Tensor, targets: Sequence[Mapping[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """Boxes [M, 4] and labels [M] of the positives of an assignment [B, P], image by image, in order of prediction."""
    rows = [row[row >= 0] for row in matched]
    boxes = torch.cat([target["boxes"][row] for target, row in zip(targets, rows, strict=True)])
    labels = torch.cat([target["labels"][row] for target, row in zip(targets, rows, strict=True)])
    return boxes, labels


# --------------------------------------------------------------------------------------------------- dense predictions


def flat_outputs(maps: Sequence[Tensor], width: int) -> Tensor:
    """Output maps [B, A*width, H, W] of all levels as [B, P, width], in torchvision's order: level, row, column, anchor."""
    flat = []
    for level in maps:
        images, _, height, columns = level.shape
        cells = level.view(images, -1, width, height, columns).permute(0, 3, 4, 1, 2)
        flat.append(cells.reshape(images, -1, width))
    return torch.cat(flat, dim=1)


def layout(shapes: Sequence[tuple[int, int]], anchors: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Where predictions lie, in torchvision's order.

    Args:
        shapes: height and width of each level.
        anchors: of a cell, for each level.
        device: for the result.

    Returns:
        Level [P], row and column [P, 2], anchor [P].
    """
    levels, cells, numbers = [], [], []
    for level, ((height, width), count) in enumerate(zip(shapes, anchors, strict=True)):
        row, column, anchor = torch.meshgrid(
            torch.arange(height, device=device),
            torch.arange(width, device=device),
            torch.arange(count, device=device),
            indexing="ij",
        )
        levels.append(torch.full((row.numel(),), level, device=device))
        cells.append(torch.stack([row.flatten(), column.flatten()], dim=1))
        numbers.append(anchor.flatten())
    return torch.cat(levels), torch.cat(cells), torch.cat(numbers)


def reset_dense_head(head: Any, prior_probability: float = 0.01) -> None:
    """Random weights for a head of FCOS or RetinaNet, drawn as torchvision draws them."""
    for module in head.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.01)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, (nn.GroupNorm, nn.BatchNorm2d)):
            module.reset_parameters()
    nn.init.constant_(head.classification_head.cls_logits.bias, -math.log((1 - prior_probability) / prior_probability))


# ---------------------------------------------------------------------------------------------------------- detections


def to_detections(
    results: Sequence[Mapping[str, Tensor]],
    detector: TorchvisionDetector,
    prediction: Dense,
    scores: Tensor,
    sizes: Sequence[tuple[int, int]],
) -> list[Detections]:
    """Torchvision's results of a dense prediction with our labels and the origin of each box.

    Args:
        results: ``boxes``, ``scores``, ``labels`` of each image.
        detector: whose they are; ``detector.model.score_thresh`` is read.
        prediction: what they were selected from.
        scores: [B, P, C] final scores.
        sizes: valid height and width that boxes were clipped to.
    """
    where = (prediction.levels, prediction.cells, prediction.anchors)
    detections = []
    for image, (result, size) in enumerate(zip(results, sizes, strict=True)):
        keep, labels = our_labels(result["labels"], detector.columns)
        result = {key: value[keep] for key, value in result.items()}
        boxes = clip_boxes_to_image(prediction.boxes_xyxy[image], size)
        origin = find_origin(result, image, scores[image], boxes, where, detector.model.score_thresh)
        detections.append(Detections(result["boxes"], result["scores"], labels, origin))
    return detections


def our_labels(theirs: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Which of the library's labels [D] are classes of ours (indices [M]), and those as our labels [M].

    Outputs that belong to no class (the background of sigmoid heads, COCO's unused numbers) fall away.
    """
    label_of = torch.full((max(int(columns.max()), int(theirs.max()) if len(theirs) else 0) + 1,), -1, device=columns.device)
    label_of[columns] = torch.arange(len(columns), device=columns.device)
    mine = label_of[theirs]
    keep = torch.nonzero(mine >= 0).flatten()
    return keep, mine[keep]


@torch.no_grad()
def find_origin(
    result: Mapping[str, Tensor],
    image: int,
    scores: Tensor,
    boxes_xyxy: Tensor,
    where: tuple[Tensor, Tensor, Tensor],
    threshold: float,
) -> Origin:
    """Which predictions became the final boxes of an image: those of nearest score and box (torchvision does not say).

    Args:
        result: the image's ``boxes``, ``scores`` and ``labels``, from these very predictions.
        image: index in the batch.
        scores: [P, C] final scores of all predictions.
        boxes_xyxy: [P, 4] decoded and clipped as in ``result``.
        where: level [P], cell [P, 2] and anchor [P].
        threshold: predictions whose every score is below cannot be meant.
    """
    candidates = torch.nonzero(scores.amax(dim=1) >= threshold * (1 - 1e-4)).flatten()
    boxes, scores = boxes_xyxy[candidates], scores[candidates]
    found = [candidates[:0]]
    rows = max(1, 4_000_000 // max(1, len(candidates)))  # at most 64 MB of differences at a time
    numbers = torch.arange(len(result["boxes"]), device=boxes.device)
    for part in numbers.split(rows) if len(numbers) else ():
        box, score, label = result["boxes"][part], result["scores"][part], result["labels"][part]
        distance = (boxes[None] - box[:, None]).abs().sum(dim=2) + 1000 * (scores[:, label].T - score[:, None]).abs()
        found.append(candidates[distance.argmin(dim=1)])
    index = torch.cat(found)
    levels, cells, anchors = where
    return Origin(torch.full_like(index, image), levels[index], cells[index], anchors[index], torch.full_like(index, -1))


# ---------------------------------------------------------------------------------------------------------------- files


def write_atomically(path: Path, write: Any) -> None:
    """Call ``write`` with a temporary path in the same folder, then put the file in place."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
