"""Parts that dense one-stage models share: towers, square anchors, and inference.

Shape letters: B images, L levels, P predictions of an image (level by level, then row by row), K classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import batched_nms, clip_boxes_to_image, deform_conv2d

# ---------------------------------------------------------------------------------------------------------------- heads


def tower(channels: int, convs: int, bias: bool = False) -> nn.Sequential:
    """``convs`` blocks of 3x3 convolution, GroupNorm and ReLU; ``bias``: of the convolutions, before the norm.

    GroupNorm has 32 groups as in the papers' code; with channels that 32 does not divide, the greatest common divisor of
    both (48 channels: 16 groups).
    """
    groups = math.gcd(32, channels)
    return nn.Sequential(
        *(
            nn.Sequential(
                nn.Conv2d(channels, channels, 3, padding=1, bias=bias), nn.GroupNorm(groups, channels), nn.ReLU(inplace=True)
            )
            for _ in range(convs)
        )
    )


class DeformableConv(nn.Conv2d):
    """A convolution without bias that looks where it is told, in float32 (bfloat16 has no kernel for it on a CPU)."""

    def __init__(self, channels: int, outputs: int | None = None, kernel: int = 3) -> None:
        """C channels, D outputs (None: as many), an odd number of taps along each side."""
        super().__init__(channels, outputs or channels, kernel, padding=kernel // 2, bias=False)

    def forward(self, features: Tensor, offset: Tensor) -> Tensor:  # type: ignore[override]
        """Convolve.

        Args:
            features: [B, C, H, W].
            offset: [B, 2 * taps, H, W] from each tap's usual place, (y, x) in cells.

        Returns:
            [B, D, H, W].
        """
        with torch.autocast(features.device.type, enabled=False):
            wide = self.weight.dtype
            # The kernel reads memory at the offsets: a diverged model must not give it numbers that are none.
            usable = offset.to(wide).where(offset.isfinite(), 0.0)
            return deform_conv2d(features.to(wide), usable, self.weight, padding=self.padding)  # type: ignore[arg-type]


class ClassificationHead(nn.Module):
    """A tower (``conv``) and one logit for each class (``cls_logits``); no background."""

    def __init__(self, channels: int, num_classes: int, convs: int, bias: bool = False) -> None:
        super().__init__()
        self.num_classes, self.num_anchors = num_classes, 1
        self.conv = tower(channels, convs, bias)
        self.cls_logits = nn.Conv2d(channels, num_classes, 3, padding=1)


class RegressionHead(nn.Module):
    """A tower (``conv``), the box outputs (``bbox_reg``), a factor for each level (``scales``), and a centerness logit."""

    def __init__(
        self, channels: int, outputs: int, convs: int, levels: int, centerness: bool = False, bias: bool = False
    ) -> None:
        super().__init__()
        self.conv = tower(channels, convs, bias)
        self.bbox_reg = nn.Conv2d(channels, outputs, 3, padding=1)
        self.scales = nn.ParameterList(nn.Parameter(torch.ones(())) for _ in range(levels))
        self.bbox_ctrness = nn.Conv2d(channels, 1, 3, padding=1) if centerness else None


class DenseHead(nn.Module):
    """Two towers and their output layers, shared by all levels but for the scale of the regression."""

    def __init__(
        self,
        channels: int,
        num_classes: int,
        outputs: int,
        convs: int,
        levels: int,
        centerness: bool = False,
        bias: bool = False,
    ) -> None:
        """Build with random weights.

        Args:
            channels: of the pyramid.
            num_classes: K, no background.
            outputs: R, numbers that encode a box.
            convs: blocks of each tower.
            levels: of the pyramid.
            centerness: also predict it, from the regression's tower.
            bias: of the towers' convolutions.
        """
        super().__init__()
        self.classification_head = ClassificationHead(channels, num_classes, convs, bias)
        self.regression_head = RegressionHead(channels, outputs, convs, levels, centerness, bias)
        self.reset()

    def reset(self) -> None:
        """Draw all weights: normal of deviation 0.01; class scores begin at 0.01 (focal loss, section 4.1)."""
        reset(self)
        nn.init.constant_(cast(Tensor, self.classification_head.cls_logits.bias), -math.log(0.99 / 0.01))

    def forward(self, maps: Sequence[Tensor]) -> dict[str, Tensor]:
        """As ``outputs``, from the pyramid's maps [B, C, H_l, W_l]."""
        classification, regression = self.classification_head.conv, self.regression_head.conv
        return self.outputs([classification(level) for level in maps], [regression(level) for level in maps])

    def outputs(self, class_maps: Sequence[Tensor], box_maps: Sequence[Tensor]) -> dict[str, Tensor]:
        """The output layers on the towers' last maps.

        Returns:
            ``cls_logits`` [B, P, K], ``bbox_regression`` [B, P, R], with centerness ``bbox_ctrness`` [B, P, 1].
        """
        boxes = self.regression_head
        pairs = zip(box_maps, boxes.scales, strict=True)
        found = {
            "cls_logits": flat([self.classification_head.cls_logits(level) for level in class_maps]),
            "bbox_regression": flat([boxes.bbox_reg(level) * scale for level, scale in pairs]),
        }
        if boxes.bbox_ctrness is not None:
            found["bbox_ctrness"] = flat([boxes.bbox_ctrness(level) for level in box_maps])
        return found


def reset(module: nn.Module) -> None:
    """Random weights for the parts of a dense head: convolutions normal of deviation 0.01, norms and scales the identity."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.normal_(part.weight, std=0.01)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.GroupNorm):
            part.reset_parameters()
        elif isinstance(part, nn.ParameterList):
            for scale in part:
                nn.init.ones_(scale)


def flat(maps: Sequence[Tensor]) -> Tensor:
    """Maps [B, R, H_l, W_l] of all levels as [B, P, R]: level by level, row by row."""
    return torch.cat([level.flatten(2).transpose(1, 2) for level in maps], dim=1)


# -------------------------------------------------------------------------------------------------------------- anchors


def square_anchors(shapes: Sequence[tuple[int, int]], strides: Sequence[int], scale: float, like: Tensor) -> Tensor:
    """One square of side ``scale * stride`` for each cell, centred on (column * stride, row * stride): the cell's corner.

    Args:
        shapes: L pairs of rows and columns.
        strides: of the levels.
        scale: side in strides.
        like: gives type and device.

    Returns:
        [P, 4] in pixels.
    """
    anchors = []
    for (height, width), stride in zip(shapes, strides, strict=True):
        y, x = torch.meshgrid(
            torch.arange(height, device=like.device) * stride, torch.arange(width, device=like.device) * stride, indexing="ij"
        )
        centers = torch.stack([x.flatten(), y.flatten()], dim=1).to(like.dtype)
        half = scale * stride / 2
        anchors.append(torch.cat([centers - half, centers + half], dim=1))
    return torch.cat(anchors)


def valid_cells(levels: Tensor, cells: Tensor, strides: Sequence[int], sizes: Tensor) -> Tensor:
    """Which predictions of a padded batch belong to their image.

    Args:
        levels: [P] level of each prediction.
        cells: [P, 2] its row and column.
        strides: of the levels.
        sizes: [B, 2] valid height and width of each image.

    Returns:
        [B, P] bool: row < ceil(height / stride) and column < ceil(width / stride), that is, the corner is in the image.
    """
    corners = cells * cells.new_tensor(strides)[levels, None]
    return (corners[None] < sizes[:, None]).all(dim=-1)


# ------------------------------------------------------------------------------------------------------------ the model


class OneStage(nn.Module):
    """A one-stage detector: backbone with pyramid, dense head, selection. Inference only; it behaves as torchvision's do.

    A subclass makes the head and says how a regression is decoded.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module,
        strides: Sequence[int],
        *,
        image_mean: Sequence[float],
        image_std: Sequence[float],
        anchor_scale: float = 8,
        score_thresh: float = 0.05,
        nms_thresh: float = 0.6,
        topk_candidates: int = 1000,
        detections_per_img: int = 100,
    ) -> None:
        """Put the parts together.

        Args:
            backbone: maps images to an ordered dictionary of the pyramid's levels.
            head: with ``forward`` and ``outputs`` as ``DenseHead`` has them.
            strides: of the levels.
            image_mean: that images are normalised by.
            image_std: that images are normalised by.
            anchor_scale: side of an anchor in strides.
            score_thresh: class scores must lie above it.
            nms_thresh: IoU from which the lower of two boxes of a class falls away.
            topk_candidates: pairs of prediction and class that each level keeps at most.
            detections_per_img: of an image, at most.
        """
        super().__init__()
        self.backbone = backbone
        self.head: Any = head
        self.strides = tuple(strides)
        self.transform = GeneralizedRCNNTransform(800, 1333, list(image_mean), list(image_std))
        self.anchor_scale = anchor_scale
        self.score_thresh = score_thresh
        self.nms_thresh = nms_thresh
        self.topk_candidates = topk_candidates
        self.detections_per_img = detections_per_img

    def decode(self, regression: Tensor, anchors: Tensor, strides: Tensor) -> Tensor:
        """Boxes [B, P, 4] in pixels of a regression [B, P, R], its anchors [B, P, 4] and strides [P]."""
        raise NotImplementedError

    def anchors(self, shapes: Sequence[tuple[int, int]], like: Tensor) -> Tensor:
        """[P, 4] see ``square_anchors``."""
        return square_anchors(shapes, self.strides, self.anchor_scale, like)

    def references(self, outputs: Mapping[str, Tensor], anchors: Tensor, strides: Tensor) -> Tensor:
        """Boxes [B, P, 4] that the regression refers to: the anchors [B, P, 4], if the head does not move them first."""
        return anchors

    def scores(self, outputs: Mapping[str, Tensor], valid: Tensor) -> Tensor:
        """Class scores [B, P, K] by which candidates are chosen; 0 where ``valid`` [B, P] is False."""
        return outputs["cls_logits"].sigmoid() * valid[..., None].to(outputs["cls_logits"].dtype)

    def forward(self, images: Sequence[Tensor], targets: object = None) -> list[dict[str, Tensor]]:
        """Detections of images [3, H, W]: ``boxes`` [D, 4], ``scores`` [D], ``labels`` [D] (1 .. K), best first.

        Raises:
            RuntimeError: in training mode; this model has no losses.
        """
        if self.training:
            raise RuntimeError(f"{type(self).__name__} is for inference only; call .eval() before it sees images")
        whole = [(image.shape[-2], image.shape[-1]) for image in images]
        batch, _ = self.transform(list(images), None)
        maps = list(self.backbone(batch.tensors).values())
        outputs = {name: value.to(batch.tensors.dtype) for name, value in self.head(maps).items()}
        shapes = [(level.shape[-2], level.shape[-1]) for level in maps]
        anchors = self.anchors(shapes, batch.tensors)
        levels, cells = places(shapes, anchors.device)
        strides = anchors.new_tensor(self.strides)[levels]
        references = self.references(outputs, anchors.expand(len(images), -1, -1), strides)
        boxes = self.decode(outputs["bbox_regression"], references, strides)
        valid = valid_cells(levels, cells, self.strides, torch.tensor(batch.image_sizes, device=cells.device))
        counts = [height * width for height, width in shapes]
        found = self.select(outputs, boxes, counts, valid, batch.image_sizes)
        for result in found:
            del result["index"]
        results: list[dict[str, Tensor]] = self.transform.postprocess(found, batch.image_sizes, whole)
        return results

    def select(
        self,
        outputs: Mapping[str, Tensor],
        boxes: Tensor,
        counts: Sequence[int],
        valid: Tensor,
        sizes: Sequence[tuple[int, int]],
    ) -> list[dict[str, Tensor]]:
        """The final boxes of each image.

        Of each level the ``topk_candidates`` best pairs of prediction and class above ``score_thresh``; boxes clipped to
        the image, those without area dropped; NMS for each class; the ``detections_per_img`` best. A centerness multiplies
        the scores after threshold and ranking, before NMS.

        Args:
            outputs: ``cls_logits`` [B, P, K] and, where there is one, ``bbox_ctrness`` [B, P, 1].
            boxes: [B, P, 4] decoded.
            counts: predictions of each level.
            valid: [B, P] bool, predictions that may be chosen.
            sizes: valid height and width of each image.

        Returns:
            For each image ``boxes``, ``scores``, ``labels`` (1 .. K) and ``index`` [D] into P.
        """
        scores = self.scores(outputs, valid)
        quality = outputs["bbox_ctrness"][..., 0].sigmoid() if "bbox_ctrness" in outputs else None
        found = []
        for image, size in enumerate(sizes):
            values, index, labels = best_of_levels(scores[image], counts, self.score_thresh, self.topk_candidates)
            mine = clip_boxes_to_image(boxes[image, index], size)
            if quality is not None:
                values = values * quality[image, index]
            filled = (mine[:, 2:] > mine[:, :2]).all(dim=1)
            mine, values, index, labels = mine[filled], values[filled], index[filled], labels[filled]
            keep = batched_nms(mine, values, labels, self.nms_thresh)[: self.detections_per_img]
            found.append({"boxes": mine[keep], "scores": values[keep], "labels": labels[keep] + 1, "index": index[keep]})
        return found


def places(shapes: Sequence[tuple[int, int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Level [P] and row and column [P, 2] of each prediction."""
    levels, cells = [], []
    for level, (height, width) in enumerate(shapes):
        rows, columns = torch.meshgrid(torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij")
        cells.append(torch.stack([rows.flatten(), columns.flatten()], dim=1))
        levels.append(torch.full((height * width,), level, device=device))
    return torch.cat(levels), torch.cat(cells)


def best_of_levels(scores: Tensor, counts: Sequence[int], threshold: float, topk: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best pairs of prediction and class of each level.

    Args:
        scores: [P, K] of one image.
        counts: predictions of each level.
        threshold: scores must lie above it.
        topk: pairs of a level, at most.

    Returns:
        Score [D], prediction [D] and class [D].
    """
    values, rows, classes = [], [], []
    first = 0
    for level in scores.split(list(counts)):
        row, label = torch.nonzero(level > threshold, as_tuple=True)
        value, order = level[row, label].sort(descending=True)
        values.append(value[:topk])
        rows.append(row[order[:topk]] + first)
        classes.append(label[order[:topk]])
        first += len(level)
    return torch.cat(values), torch.cat(rows), torch.cat(classes)
