"""Comparisons of the losses that weight the cells of maps, or relate them."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from detdistill.functional.relations import GloReBlock
from detdistill.losses import (
    defeat_head_terms,
    defeat_map_terms,
    defeat_masks,
    drkd_instance_loss,
    drkd_pixel_loss,
    fgfi_loss,
    fgfi_masks,
    frs_class_loss,
    frs_feature_loss,
    frs_richness,
    glamd_box_loss,
    glamd_class_loss,
    pgd_class_terms,
    pgd_loss,
    pgd_normalized,
)
from detdistill.methods.drkd import RelationBlock, drkd_regions
from detdistill.methods.fgfi import fgfi_virtual_anchors
from detdistill.methods.glamd import GLAMDLevel
from detdistill.methods.pgd import pgd_box_terms
from detdistill.structures import Features
from released.inputs import CHANNELS, CLASSES, IMAGES, STRIDES, Maps, level_logits, maps
from released.measure import Case
from released.stubs import Source, load

PGD_REPOSITORY = Source("ChenhongyiYang/PGD", "81c54d57c30d130c32e9e927b1ec5e1b59320245")
DEFEAT = Source(
    "ggjy/DeFeat.pytorch",
    "c46a793df414a42f64f9fad9c7106ee60b44c9b3",
    {
        "mmdet.apis.train": "mmdet/apis/train.py",
        "mmdet.models.dense_heads.anchor_head": "mmdet/models/dense_heads/anchor_head.py",
        "mmdet.core.bbox.iou_calculators.iou2d_calculator": "mmdet/core/bbox/iou_calculators/iou2d_calculator.py",
    },
)


def frs(folder: Path) -> Case:
    """``forward_train`` of the one-stage class, on RetinaNet's 720 logits a cell; the adapters' outputs are given."""
    name = "mmdet.models.detectors.distill_frs_single"
    files = {name: "detectors/distill_frs_single.py"}
    (module,) = load(Source("duzhixing/FRS", "decd60c569681e676854e541c45a1ce8fa8071a1", files), folder)
    given = maps()
    mine, theirs = level_logits(9 * CLASSES, 1.0, -4.0)

    class Head:
        """Returns given logits."""

        def __init__(self, logits: list[Tensor]) -> None:
            self.logits = logits

        def __call__(self, maps: Any) -> tuple[list[Tensor]]:
            return (self.logits,)

        def forward_train(self, *inputs: Any) -> dict[str, Tensor]:
            return {}

    detector = SimpleNamespace(
        extract_feat=lambda image: given.student, bbox_head=Head(mine), stu_feature_adap=lambda maps: maps, debug=False, iter=500,
        teacher=SimpleNamespace(extract_feat=lambda image: given.teacher, bbox_head=Head(theirs)),
        distill_feat_weight=0.005, distill_cls_weight=0.02, distill_warm_step=500,
    )  # fmt: skip

    def ours() -> Tensor:
        richness = [frs_richness(level) for level in theirs]
        return frs_feature_loss(given.student, given.teacher, richness, 0.005) + frs_class_loss(mine, theirs, richness, 0.02)

    def released() -> Tensor:
        losses = module.Distilling_FRS_Single.forward_train(detector, None, given.metas, given.boxes, given.labels)
        return losses["distill_feat_loss"] + losses["distill_cls_loss"]

    return Case(ours, released, [*given.student, *mine], note="without adapters, which are the same convolutions")


def _defeat_model(given: Maps, masks: Any, logits: list[Tensor] | None = None) -> tuple[Any, Any]:
    """Student and teacher as ``batch_processor_kd`` calls them."""

    class Model:
        """Returns given maps and logits."""

        def __init__(self, maps: list[Tensor], logits: Tensor | None) -> None:
            self.maps, self.logits = maps, logits
            self.module = SimpleNamespace()
            if logits is not None:
                head = SimpleNamespace(forward_train=lambda *a, **k: ({}, logits, None, None, None))
                self.module = SimpleNamespace(roi_head=head)

        def __call__(self, **data: Any) -> tuple[Any, ...]:
            found = {"neck": self.maps, "backbone": None, "bbox_targets": [LABELS], "sampling": None, "cls_score": self.logits}
            found |= {"img_metas": None, "gt_bboxes": None, "gt_labels": None}
            return {}, found, {"neck_mask_batch": masks(), "bb_mask_batch": None}, None, None

    mine, theirs = logits or (None, None)
    return Model(given.student, mine), Model(given.teacher, theirs)


LABELS = torch.cat([torch.arange(256) % CLASSES, torch.full((768,), CLASSES)])
"""Labels of 1024 regions; the last 768 are background."""


def fgfi(folder: Path) -> Case:
    """Form for pyramids as in DeFeat's repository, masks included; one anchor size with three ratios a cell."""
    train, heads, boxes = load(DEFEAT, folder)
    sys.modules["mmdet.core"].bbox_overlaps = boxes.bbox_overlaps  # type: ignore[attr-defined]
    given = maps()
    anchors = fgfi_virtual_anchors(STRIDES, given.shapes)
    flat = [level.flatten(0, 2) for level in anchors]
    head = SimpleNamespace(num_anchors=anchors[0].shape[2], get_anchors=lambda sizes, metas: ([flat] * IMAGES, None))
    head._map_roi_levels = partial(heads.AnchorHead._map_roi_levels, head)
    models = _defeat_model(given, lambda: heads.AnchorHead.get_roi_mask(head, given.teacher, given.metas, given.boxes))
    settings = SimpleNamespace(type="neck,mask-neck-roi,pixel-wise", hint_neck_w=3, get=lambda name, other: other)

    def ours() -> Tensor:
        return fgfi_loss(given.student, given.teacher, fgfi_masks(anchors, given.boxes))

    def released() -> Tensor:
        return train.batch_processor_kd(*models, {"img": SimpleNamespace(data=[])}, True, kd_cfg=settings)["loss"]

    return Case(ours, released, given.student, note="without adapters, which are the same convolutions")


def defeat(folder: Path) -> Case:
    """Neck and head parts of ``batch_processor_kd``, masks included."""
    train, heads, _ = load(DEFEAT, folder)
    given = maps()
    mine, theirs = torch.randn(1024, CLASSES + 1, requires_grad=True), torch.randn(1024, CLASSES + 1)
    head = SimpleNamespace(anchor_generator=SimpleNamespace(strides=STRIDES))
    head._map_roi_levels = partial(heads.AnchorHead._map_roi_levels, head)
    masks = partial(heads.AnchorHead.get_gt_mask, head, given.teacher, given.metas, given.boxes)
    models = _defeat_model(given, masks, [mine, theirs])
    settings = SimpleNamespace(
        type="neck-decouple,mask-neck-gt,pixel-wise,head-cls,KL-decouple", hint_neck_w=4, hint_neck_back_w=2, head_cls_w=1,
        head_cls_back_w=1, head_cls_T=1, get=lambda name, other: other,
    )  # fmt: skip

    def ours() -> Tensor:
        neck = defeat_map_terms(given.student, given.teacher, defeat_masks(given.boxes, STRIDES, given.shapes))
        regions = defeat_head_terms(mine, theirs, LABELS < CLASSES, LABELS == CLASSES)
        return 4 * neck.foreground + 2 * neck.background + regions.foreground + regions.background

    def released() -> Tensor:
        return train.batch_processor_kd(*models, {"img": SimpleNamespace(data=[])}, True, kd_cfg=settings)["loss"]

    return Case(ours, released, [*given.student, mine], note="without adapters; the released masks are float64")


def glamd(folder: Path) -> Case:
    """``forward_train`` of the one-stage detector on RetinaNet's outputs, mmdet 2.14's ``IoULoss``."""
    losses = "mmdet.models.losses."
    other = f"../{PGD_REPOSITORY.folder}/mmdet/"
    files = {
        "mmdet.core.bbox.iou_calculators.iou2d_calculator": other + "core/bbox/iou_calculators/iou2d_calculator.py",
        losses + "utils": other + "models/losses/utils.py",
        losses + "iou_loss": other + "models/losses/iou_loss.py",
        "mmdet.glamd": "single_stage.py",
        "base_detector": "base_detector.py",
    }
    source = Source("yh9468/GLAMD", "7eabff6376590c126a392ad5cf39a16885af309f", files)
    boxes, _, iou, module = load(source, folder, *list(files)[:4])
    module.IoULoss, iou.bbox_overlaps = iou.IoULoss, boxes.bbox_overlaps
    given = maps()
    logits, fixed = level_logits(9 * CLASSES, 1.0, -4.0)
    counts = [IMAGES * height * width * 9 for height, width in given.shapes]
    corners = [torch.rand(count, 2) * 800 for count in counts]
    fixed_boxes = [torch.cat([corner, corner + 80], dim=1) for corner in corners]
    mine = [(level + torch.randn_like(level) * 8).requires_grad_() for level in fixed_boxes]
    detector = module.SingleStageDetector({}, bbox_head={})
    detector.extract_feat = lambda image: given.student
    del detector._modules["bbox_head"]
    shapes = [torch.empty(IMAGES, 36, *shape) for shape in given.shapes]
    detector.__dict__["bbox_head"] = SimpleNamespace(forward_train=lambda *inputs: ({}, (logits, shapes), mine))
    teacher = {"feat": given.teacher, "head_outs": (fixed, None), "decoded_bbox": fixed_boxes}
    parts = [GLAMDLevel(CHANNELS, CHANNELS) for _ in given.student]
    for index, part in enumerate(parts):
        part.adapt_feature.load_state_dict(detector.adaptation_layers[index].state_dict())
        part.adapt_channel.load_state_dict(detector.channel_wise_adaptation[index].state_dict())
        part.adapt_spatial.load_state_dict(detector.spatial_wise_adaptation[index].state_dict())

    def ours() -> Tensor:
        total = []
        for level, part in enumerate(parts):
            terms, attention = part(given.student[level], given.teacher[level])
            mask = attention.mask()
            weights = mask[..., None].expand(*mask.shape, 9)
            one_by_one = [side[level].unflatten(1, (9, -1)).permute(0, 3, 4, 1, 2) for side in (logits, fixed)]
            classes = glamd_class_loss(*one_by_one, weights / mask.sum())
            place = glamd_box_loss(mine[level], fixed_boxes[level], weights.flatten() / weights.numel())
            total.append(4.2e-4 * terms.feature + 0.024 * terms.channel + 0.024 * terms.spatial + 0.1 * (classes + place))
        return torch.stack(total).sum()

    def released() -> Tensor:
        return sum(detector.forward_train(None, given.metas, None, None, t_info=teacher).values())  # type: ignore[return-value]

    unused = {"local_channel_wise_adaptation"}
    modules = [child for name, child in detector.named_children() if name not in unused]
    return Case(ours, released, [*given.student, *logits, *mine], parts, modules)


def drkd(folder: Path) -> Case:
    """``forward_train`` of the two-stage detector; both pool all regions from the first image."""
    name = "mmdet.models.detectors."
    files = {name + "GloRe": "mmdet/models/detectors/GloRe.py", name + "two_stage": "mmdet/models/detectors/two_stage.py"}
    source = Source("nizhenliang/Dual-Relation-Knowledge-Distillation", "78ea05b7f62d0c2817a6edaf0d70cde5048b751d", files)
    _, module = load(source, folder)
    given = maps()
    module.TwoStageDetector.with_neck = False
    detector = module.TwoStageDetector({})
    detector.extract_feat = lambda image: given.student
    del detector._modules["backbone"]
    detector.__dict__["roi_head"] = SimpleNamespace(forward_train=lambda *inputs: {})
    metas = [{"ori_filename": "image.jpg"}] * IMAGES
    nodes = (64, 64, 256, 256, 256)
    graphs = [[GloReBlock(CHANNELS, count) for count in nodes] for _ in range(2)]
    relations = [[RelationBlock(9 * CHANNELS) for _ in range(2)] for _ in range(2)]
    adapters = [[nn.Conv2d(CHANNELS, CHANNELS, 1) for _ in range(count)] for count in (5, 2, 2)]
    strides, counts = (4, 8), [len(own) for own in given.boxes]

    def each(modules: Any, values: Any, *rest: Any) -> list[Tensor]:
        return [module(value, *rest) for module, value in zip(modules, values, strict=True)]

    def ours() -> Tensor:
        pixel = drkd_pixel_loss(each(adapters[0], each(graphs[0], given.student)), each(graphs[1], given.teacher))
        settings = {"scale_by_width": True, "from_first_image": True}
        regions = [
            drkd_regions(Features(tuple(side[:2]), strides), given.boxes, **settings) for side in (given.student, given.teacher)
        ]
        related = [each(blocks, own, counts) for blocks, own in zip(relations, regions, strict=True)]
        relation = drkd_instance_loss(each(adapters[1], related[0]), related[1], counts)
        return pixel + relation + drkd_instance_loss(each(adapters[2], regions[0]), regions[1], counts, 2.4e-3)

    def released() -> Tensor:
        teacher = {"feat": given.teacher}
        return sum(detector.forward_train(None, metas, given.boxes, given.labels, t_info=teacher).values())  # type: ignore[return-value]

    ours_modules = [module for group in (*graphs, *relations, *adapters) for module in group]
    why = "weights are drawn on each side; the released relation filter is random"
    return Case(ours, released, given.student, ours_modules, [detector], differs=why)


def pgd(folder: Path) -> Case:
    """``PGDClsLoss`` and ``PGDRegLoss``; the key regions are given, and weights are added over images as released."""
    files = {f"mmdet.distillation.losses.pgd_{kind}": f"mmdet/distillation/losses/pgd_{kind}.py" for kind in ("cls", "reg")}
    classes, boxes = load(Source(PGD_REPOSITORY.repository, PGD_REPOSITORY.commit, files), folder)
    given, place = maps(), maps()
    place.student[:] = [(level.detach() + 0.1).requires_grad_() for level in place.student]
    torch.manual_seed(3)
    foreground = [torch.rand(IMAGES, *shape) * (torch.rand(IMAGES, *shape) < 0.02) for shape in given.shapes]
    background = [(torch.rand(IMAGES, *shape) < 0.8).float() for shape in given.shapes]
    of_class = classes.PGDClsLoss("pgd", 0.8, 0.8, 1.0, 0.04, 0.02, 8e-4)
    of_box = boxes.PGDRegLoss("pgd", 0.8, 0.064, 8e-4)

    def ours() -> Tensor:
        total = []
        for level, mask in enumerate(foreground):
            weights = pgd_normalized(mask), pgd_normalized(background[level])
            terms = pgd_class_terms(given.student[level], given.teacher[level], *weights, per_image=False)
            image, row, column = torch.nonzero(mask, as_tuple=True)
            cells = [side[level][image, :, row, column] for side in (place.student, place.teacher)]
            total.append(pgd_loss(terms, pgd_box_terms(*cells, mask[image, row, column])))
        return torch.stack(total).sum()

    def released() -> Tensor:
        total: Any = 0
        for level, mask in enumerate(foreground):
            masks = mask[:, None], background[level][:, None]
            total = total + of_class(given.student[level], given.teacher[level], *masks)
            total = total + of_box(place.student[level], place.teacher[level], masks[0])
        return total

    return Case(ours, released, [*given.student, *place.student])
