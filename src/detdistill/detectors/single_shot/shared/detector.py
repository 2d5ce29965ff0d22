"""Adapter of torchvision's ``SSD`` for SSD and SSDLite.

Shape letters: B images, L levels, A default boxes of a cell, P default boxes of an image, K classes, C = K+1 or more outputs.

torchvision's output 0 is the background; here the background is the last logit. Pretrained models have outputs without a
class. Their probabilities are added to the background, so that the probabilities of the K classes do not change.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.ssd import SSD, SSDFeatureExtractorVGG
from torchvision.models.detection.ssdlite import SSDLiteFeatureExtractorMobileNet, SSDLiteHead
from torchvision.ops import batched_nms, clip_boxes_to_image

from detdistill.detectors.contract import DenseCoding, Parts, Pyramid, dense_positives
from detdistill.detectors.student_files.load_student import TimmLevels
from detdistill.detectors.torchvision.dense_outputs import flat_outputs, layout
from detdistill.detectors.torchvision.detector import TorchvisionDetector
from detdistill.detectors.torchvision.images import image_sizes, with_padding
from detdistill.detectors.torchvision.matching import match_anchors
from detdistill.detectors.torchvision.targets import trainable, whole_indices
from detdistill.errors import ModelError
from detdistill.functional.counting import divisor_over_ranks, share_over_ranks
from detdistill.functional.modes import evaluating
from detdistill.structures import (
    IGNORED,
    NEGATIVE,
    Assignment,
    Batch,
    Dense,
    Detections,
    Features,
    Losses,
    Origin,
    Positives,
    Prediction,
    Tower,
)


def wrap_ssd(
    model: nn.Module,
    classes: Sequence[str],
    name: str,
    columns: Sequence[int] | None = None,
    description: Mapping[str, Any] | None = None,
) -> SingleShotDetector:
    """Wrap a built ``torchvision.models.detection.SSD`` with the head of SSD or SSDLite.

    Raises:
        ModelError: the model is not an SSD, or its backbone is of an unsupported kind.
    """
    if not isinstance(model, SSD):
        raise ModelError(f"{name}: a {type(model).__name__} is not torchvision's SSD; give a torchvision.models.detection.SSD")
    known = (SSDFeatureExtractorVGG, SSDLiteFeatureExtractorMobileNet, TimmLevels)
    if not isinstance(model.backbone, known):
        kind = type(model.backbone).__name__
        raise ModelError(
            f"{name}: the backbone is a {kind}; only the backbones of torchvision's SSD and SSDLite and of timm are supported"
        )
    fixed = model.transform.fixed_size  # (width, height); None: images keep their size
    return SingleShotDetector(
        model,
        classes,
        name,
        family="dense",
        softmax=True,
        columns=columns,
        description=description,
        pyramids=_pyramids(model.backbone, fixed),
        fixed_size_hw=None if fixed is None else (fixed[1], fixed[0]),
    )


class SingleShotDetector(TorchvisionDetector):
    """Adapter of SSD and SSDLite. The neck is the added levels above the backbone's maps. Softmax with the background last.

    Images are not resized; the sizes of default boxes are fractions of the batch's image size. torchvision's own SSD300 and
    SSDLite320 resize each image to 300 or 320 pixels. This size is ``spec.fixed_size_hw``: give images of this size.
    """

    model: Any

    def __init__(self, *arguments: Any, **options: Any) -> None:
        """Wrap a model; see ``TorchvisionDetector``."""
        super().__init__(*arguments, **options)
        self._num_backbone_levels = len(self.spec.strides) - len(_added(self.model.backbone))

    def anchors_per_cell(self) -> tuple[int, ...]:
        """Return the numbers of the model's generator of default boxes."""
        return tuple(self._boxes_per_cell())

    def dense_coding(self) -> DenseCoding:
        """Return boxes of four sides; those of the default boxes depend on the size of the images."""
        return DenseCoding()

    def parts(self) -> Parts:
        """Group the modules: the backbone, the blocks of the added levels, the head."""
        backbone, added = self.model.backbone, _added(self.model.backbone)
        if isinstance(backbone, TimmLevels):
            below: list[nn.Module] = [backbone.body]
        elif isinstance(backbone, SSDFeatureExtractorVGG):
            below = [backbone.features, backbone.extra[0], nn.ParameterList([backbone.scale_weight])]
        else:
            below = [backbone.features]
        return Parts(tuple(below), tuple(added), (self.model.head,))

    # ---------------------------------------------------------------------------------------------------------- features

    def features(self, batch: Batch) -> Features:
        """Compute the maps of all levels.

        Raises:
            ModelError: the images are too small for a model of fixed size.
        """
        try:
            return super().features(batch)
        except RuntimeError as error:
            fixed = self.spec.fixed_size_hw
            if fixed is None or min(batch.padding_hw) >= min(fixed):
                raise
            sizes = f"images of {fixed[0]}x{fixed[1]}, but got {batch.padding_hw[0]}x{batch.padding_hw[1]}"
            raise ModelError(f"{self.spec.name} needs {sizes}; set --size {max(fixed)}") from error

    def backbone_features(self, batch: Batch) -> Features:
        """Compute the backbone's maps, without the added levels; for VGG-16: conv4_3 (rescaled) and fc7."""
        maps = _body_maps(self.model.backbone, self.image_list(batch).tensors)
        return with_padding(tuple(maps), self.spec.strides[: len(maps)], batch)

    def neck(self, features: Features, batch: Batch) -> Features:
        """Compute the added levels above the backbone's maps; return all levels."""
        maps = list(features.maps)
        for block in _added(self.model.backbone):
            maps.append(block(maps[-1]))
        return with_padding(tuple(maps), self.spec.strides, batch)

    # -------------------------------------------------------------------------------------------------------- prediction

    def predict(self, features: Features, batch: Batch) -> Dense:
        """Compute one prediction for each default box, cell by cell, finest level first."""
        return self.finish(self.tower(features, upto=0), batch)

    @property
    def tower_depth(self) -> int:
        """Number of blocks before the output layers: 0 in SSD, 1 (depthwise) in SSDLite. Each level has blocks of its own."""
        return len(_layers(self.model.head.classification_head.module_list[0])) - 1

    def tower(self, features: Features, upto: int | None = None) -> Tower:
        """Compute the inner maps of both branches after ``upto`` blocks (None: all blocks)."""
        depth = self.tower_depth if upto is None else upto
        head = self.model.head
        sides = [
            tuple(_layers(block)[:depth](level) for block, level in zip(side.module_list, features.maps, strict=True))
            for side in (head.classification_head, head.regression_head)
        ]
        return Tower(sides[0], sides[1], depth, features.strides)

    def finish(self, hidden: Tower, batch: Batch) -> Dense:
        """Run the remaining blocks and the output layers."""
        classification, regression = self.model.head.classification_head, self.model.head.regression_head

        def outputs(side: Any, maps: tuple[Tensor, ...], width: int) -> Tensor:
            found = [_layers(block)[hidden.depth :](level) for block, level in zip(side.module_list, maps, strict=True)]
            return flat_outputs(found, width).to(batch.images.dtype)

        logits = outputs(classification, hidden.classification, classification.num_columns)
        deltas = outputs(regression, hidden.regression, regression.num_columns)
        shapes = [(level.shape[-2], level.shape[-1]) for level in hidden.classification]
        stand_ins = [batch.images.new_empty(1, 1, *shape) for shape in shapes]  # so that boxes have full precision under autocast
        priors = torch.stack(self.model.anchor_generator(self.image_shapes(batch), stand_ins))
        boxes = self.model.box_coder.decode_single(deltas.flatten(0, 1), priors.flatten(0, 1)).reshape(priors.shape)
        levels, cells, anchors = layout(shapes, self._boxes_per_cell(), priors.device)
        return Dense(
            logits=self._background_last(logits),
            deltas=deltas,
            boxes_xyxy=boxes,
            priors_xyxy=priors,
            levels=levels,
            cells=cells,
            anchors=anchors,
            softmax=True,
        )

    def _background_last(self, outputs: Tensor) -> Tensor:
        """Convert outputs [B, P, C] to logits [B, P, K+1]."""
        if outputs.shape[-1] == len(self.columns) + 1:
            background = outputs[..., :1]
        else:
            others = torch.ones(outputs.shape[-1], dtype=torch.bool, device=outputs.device)
            others[self.columns] = False
            background = outputs[..., others].logsumexp(dim=-1, keepdim=True)
        return torch.cat([outputs[..., self.columns], background], dim=-1)

    def _boxes_per_cell(self) -> list[int]:
        return list(self.model.anchor_generator.num_anchors_per_location())

    # -------------------------------------------------------------------------------------------------- training, results

    def assign(self, prediction: Prediction, batch: Batch) -> Assignment:
        """Assign by torchvision's ``SSDMatcher``: IoU of at least 0.5, and for each ground-truth box its best default box."""
        dense = cast(Dense, prediction)
        matched = torch.full(dense.logits.shape[:2], NEGATIVE, dtype=torch.int64, device=dense.logits.device)
        for image, target in enumerate(batch.targets):
            boxes = target.boxes_xyxy[trainable(target)].to(dense.priors_xyxy.dtype)
            if len(boxes):
                matched[image] = whole_indices(match_anchors(self.model.proposal_matcher, boxes, dense, image), target)
        return Assignment(matched)

    def loss(self, prediction: Prediction, batch: Batch, assignment: Assignment | None = None) -> Losses:
        """Compute torchvision's terms ``bbox_regression`` (smooth L1) and ``classification`` (cross-entropy).

        ``classification`` uses the positives and the hardest negatives, three for each positive, so an image without
        positives has no negatives either. Both terms are divided by the number of positives in the batch (mean over
        processes).
        """
        dense = cast(Dense, prediction)
        if assignment is None:
            assignment = self.assign(prediction, batch)
        elif assignment.weights is not None or assignment.normalizer is not None or bool((assignment.matched == IGNORED).any()):
            return Losses(self._weighted_loss(dense, batch, assignment))
        targets = [{"boxes": t.boxes_xyxy.to(dense.deltas.dtype), "labels": t.labels + 1} for t in batch.targets]
        outputs = {"cls_logits": _background_first(dense.logits), "bbox_regression": dense.deltas}
        terms = self.model.compute_loss(targets, outputs, list(dense.priors_xyxy), list(assignment.matched))
        share = share_over_ranks((assignment.matched >= 0).sum().to(dense.logits.dtype))
        return Losses({name: term * share for name, term in terms.items()})

    def _weighted_loss(self, dense: Dense, batch: Batch, assignment: Assignment) -> dict[str, Tensor]:
        """Compute ``SSD.compute_loss`` with weights; ignored predictions are neither positives nor hard negatives."""
        positives = dense_positives(dense, assignment, batch)
        where = (positives.image, positives.index)
        wanted = torch.full_like(assignment.matched, len(self.spec.classes))
        wanted[where] = positives.labels
        entropy = F.cross_entropy(dense.logits.flatten(0, 1), wanted.flatten(), reduction="none").reshape(wanted.shape)
        is_positive, is_negative = assignment.matched >= 0, assignment.matched == NEGATIVE
        rank = entropy.detach().masked_fill(~is_negative, -torch.inf).argsort(dim=1, descending=True).argsort(dim=1)
        num_negatives = self.model.neg_to_pos_ratio * is_positive.sum(dim=1, keepdim=True)
        used = is_positive | (is_negative & (rank < num_negatives))
        weights = torch.ones_like(entropy) if assignment.weights is None else assignment.weights.to(entropy.dtype)
        regression = self.model.box_coder.encode_single(positives.targets_xyxy, dense.priors_xyxy[where])
        smooth_l1 = F.smooth_l1_loss(dense.deltas[where], regression, reduction="none").sum(dim=1)
        divisor = divisor_over_ranks(len(positives), entropy) if assignment.normalizer is None else assignment.normalizer
        return {
            "bbox_regression": (smooth_l1 * weights[where]).sum() / divisor,
            "classification": (entropy * weights)[used].sum() / divisor,
        }

    def detect(self, prediction: Prediction, batch: Batch) -> list[Detections]:
        """Select the detections like ``SSD.postprocess_detections``, and keep the origin of each box."""
        dense = cast(Dense, prediction)
        return [self._detect(dense, image, size) for image, size in enumerate(image_sizes(batch))]

    def _detect(self, dense: Dense, image: int, size_hw: tuple[int, int]) -> Detections:
        boxes = clip_boxes_to_image(dense.boxes_xyxy[image], size_hw)
        by_class = _background_first(dense.logits[image]).softmax(dim=-1)[:, 1:].T  # [K, P]
        scores, index = by_class.topk(min(self.model.topk_candidates, by_class.shape[1]), dim=1)
        label, rank = torch.nonzero(scores > self.model.score_thresh, as_tuple=True)
        scores, index = scores[label, rank], index[label, rank]
        keep = batched_nms(boxes[index], scores, label, self.model.nms_thresh)[: self.model.detections_per_img]
        index = index[keep]
        no_box = torch.full_like(index, -1)
        origin = Origin(torch.full_like(index, image), dense.levels[index], dense.cells[index], dense.anchors[index], no_box)
        return Detections(boxes[index], scores[keep], label[keep], origin)

    def positives(self, prediction: Prediction, assignment: Assignment, batch: Batch) -> Positives:
        """Gather the predictions that ``assignment`` matches to a ground-truth box."""
        return dense_positives(cast(Dense, prediction), assignment, batch)

    # ------------------------------------------------------------------------------------------------------------ copies

    def copy_head(self, fresh: bool = False) -> SingleShotDetector:
        """Copy the head into a detector with parameters of its own; ``fresh``: newly initialised. It cannot compute features."""
        head = cast(SingleShotDetector, self.without_backbone())
        if fresh:
            _initialize(head.model.head)
        return head

    def copy_neck(self, fresh: bool = False) -> ExtraLevels:  # type: ignore[override]
        """Copy the blocks of the added levels into a module with parameters of its own; ``fresh``: newly initialised."""
        neck = ExtraLevels(copy.deepcopy(_added(self.model.backbone)), self.spec.strides[self._num_backbone_levels :])
        if fresh:
            _initialize(neck, lite=isinstance(self.model.head, SSDLiteHead))
        return neck.requires_grad_(True).train()

    def class_rows(self, name: str) -> Tensor | None:
        """Return the rows of the class outputs of each class and default box; see ``inherit.HasClassRows``."""
        prefix = "model.head.classification_head.module_list."
        outputs: int = self.model.head.classification_head.num_columns
        if not name.startswith(prefix):
            return None
        level, *inside = name.removeprefix(prefix).split(".")
        if isinstance(self.model.head, SSDLiteHead) and inside[0] != "1":  # the depthwise convolution before the outputs
            return None
        first_rows = torch.arange(self._boxes_per_cell()[int(level)]) * outputs
        return torch.add(first_rows[None], self.columns.cpu()[:, None])


class ExtraLevels(nn.Module):
    """Neck of an SSD: levels above the backbone's maps, each computed from the level below."""

    def __init__(self, blocks: Sequence[nn.Module], strides: Sequence[int]) -> None:
        """Store the blocks without a copy; ``strides`` are the strides of the added levels."""
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.strides = tuple(strides)

    def forward(self, features: Features) -> Features:
        """Compute the added levels; return all levels, the backbone's first."""
        maps = list(features.maps)
        for block in self.blocks:
            maps.append(block(maps[-1]))
        strides = (*features.strides, *self.strides)
        if features.padding is None:
            return Features(tuple(maps), strides)
        finest, padding = features.padding[0], list(features.padding)
        for level, stride in zip(maps[len(padding) :], self.strides, strict=True):
            rows, columns = (  # a coarse cell is padding if its first fine cell is padding
                (torch.arange(length, device=finest.device) * stride // features.strides[0]).clamp(max=fine - 1)
                for length, fine in zip(level.shape[-2:], finest.shape[-2:], strict=True)
            )
            padding.append(finest[:, rows][:, :, columns])
        return Features(tuple(maps), strides, tuple(padding))


def _background_first(logits: Tensor) -> Tensor:
    """Reorder logits [..., K+1] to torchvision's order (background first)."""
    return torch.cat([logits[..., -1:], logits[..., :-1]], dim=-1)


def _body_maps(backbone: Any, images: Tensor) -> list[Tensor]:
    """Compute the backbone's maps, finest first, without the added levels."""
    if isinstance(backbone, TimmLevels):
        return backbone.maps(images)
    if isinstance(backbone, SSDFeatureExtractorVGG):
        inner = backbone.features(images)
        return [backbone.scale_weight.view(1, -1, 1, 1) * F.normalize(inner), backbone.extra[0](inner)]
    maps = [backbone.features[0](images)]
    return [*maps, backbone.features[1](maps[0])]


def _added(backbone: Any) -> list[nn.Module]:
    """Return the blocks of the added levels; with VGG-16, the first entry of ``extra`` belongs to the backbone."""
    return list(backbone.extra[1:] if isinstance(backbone, SSDFeatureExtractorVGG) else backbone.extra)


@torch.no_grad()
def _pyramids(backbone: Any, fixed_size: tuple[int, int] | None) -> tuple[Pyramid, Pyramid]:
    """Determine the pyramid of all levels and that of the backbone's; with a fixed size, strides are rounded (300 / 38: 8)."""
    if isinstance(backbone, TimmLevels):
        channels, strides = tuple(backbone.out_channels), backbone.strides
    else:
        assert fixed_size is not None
        parameter = next(backbone.parameters())
        images = torch.zeros(1, 3, fixed_size[1], fixed_size[0], device=parameter.device, dtype=parameter.dtype)
        with evaluating(backbone):
            maps = list(backbone(images).values())
        channels = tuple(level.shape[1] for level in maps)
        strides = tuple(round(fixed_size[0] / level.shape[-1]) for level in maps)
    below = len(strides) - len(_added(backbone))
    return Pyramid(channels, strides), Pyramid(channels[:below], strides[:below])


def _initialize(module: nn.Module, lite: bool = False) -> None:
    """Initialise the weights randomly, by torchvision's rules for this kind of head and its added levels."""
    lite = lite or isinstance(module, SSDLiteHead)
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            if lite:
                nn.init.normal_(part.weight, mean=0.0, std=0.03)
            else:
                nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.BatchNorm2d):
            part.reset_parameters()


def _layers(block: nn.Module) -> nn.Sequential:
    """Return the layers of one level and branch of the head, the output layer last."""
    return block if isinstance(block, nn.Sequential) else nn.Sequential(block)
