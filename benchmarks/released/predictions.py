"""Comparisons of the losses between predictions and under given labels."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from detdistill.losses import (
    bckd_box_loss,
    bckd_class_loss,
    crosskd_align,
    crosskd_class_loss,
    crosskd_distribution_loss,
    crosskd_moments,
    crosskd_scores,
    lad_label_terms,
    ld_box_loss,
    ld_class_loss,
)
from detdistill.structures import Target
from released.inputs import CHANNELS, CLASSES, IMAGES, flat, level_logits, maps
from released.measure import Case
from released.stubs import Source, load

LOSSES = "mmdet.models.losses."
IOU = "mmdet.core.bbox.iou_calculators.iou2d_calculator"
BINS = 17


def _paths(*names: str) -> dict[str, str]:
    return {name: name.replace(".", "/") + ".py" for name in names}


def _counts(shapes: list[tuple[int, int]]) -> list[int]:
    return [height * width for height, width in shapes]


def bckd(folder: Path) -> Case:
    """``NovelKDLoss`` and mmdet's ``GIoULoss``, level by level, of 80 classes; decoded boxes are given."""
    names = (IOU, LOSSES + "utils", LOSSES + "iou_loss", LOSSES + "kd_loss")
    source = Source("TinyTigerPan/BCKD", "121c9aa272c9195c0f05cd12727bfe57636a5005", _paths(*names))
    boxes, _, iou, kd = load(source, folder)
    iou.bbox_overlaps = boxes.bbox_overlaps
    mine, theirs = level_logits(CLASSES, 1.0, -3.0)
    sizes = [IMAGES * level.shape[2] * level.shape[3] for level in theirs]
    fixed = [torch.cat([corner, corner + 8], dim=1) for corner in (torch.rand(size, 2) * 100 for size in sizes)]
    drawn = [(level + torch.randn_like(level)).requires_grad_() for level in fixed]
    weights = [torch.ones(size) for size in sizes]
    of_class, of_box = kd.NovelKDLoss(loss_weight=1.0), iou.GIoULoss(loss_weight=4.0)

    def ours() -> Tensor:
        total = []
        for level, other in enumerate(theirs):
            logits = [side.permute(0, 2, 3, 1).reshape(-1, CLASSES) for side in (mine[level], other)]
            total.append(bckd_class_loss(*logits, weights[level], 50.0))
            total.append(4 * bckd_box_loss(drawn[level], fixed[level], *logits, weights[level], 50.0))
        return torch.stack(total).sum()

    def released() -> Tensor:
        total = 0.0
        for level, other in enumerate(theirs):
            score, soft = (side.permute(0, 2, 3, 1).reshape(-1, CLASSES) for side in (mine[level], other))
            total = total + of_class(score, soft, weight=weights[level], avg_factor=50.0)
            gap = soft.detach().sigmoid() - score.detach().sigmoid()
            gap = gap.abs().pow(1.0).max(dim=1)[0] * weights[level]
            total = total + of_box(drawn[level], fixed[level].detach(), weight=gap, avg_factor=50.0)
        return total  # type: ignore[return-value]

    return Case(ours, released, [*mine, *drawn])


def ld(folder: Path) -> Case:
    """``KnowledgeDistillationKLDivLoss`` on 1 % positives and 5 % valuable locations of GFL's outputs; regions are given."""
    source = Source("HikariTJU/LD", "4287990ca27f51f6f15dc66d28bb420a053c307e", _paths(LOSSES + "utils", LOSSES + "kd_loss"))
    kd = load(source, folder)[1]
    scores, fixed = level_logits(CLASSES, 1.0, -3.0)
    sides, other = level_logits(4 * BINS)
    torch.manual_seed(2)
    sizes = [IMAGES * level.shape[2] * level.shape[3] for level in fixed]
    main, valuable = ([torch.rand(size) < share for size in sizes] for share in (0.01, 0.05))
    overlap = [torch.rand(size) for size in sizes]
    of_side, of_class = (
        kd.KnowledgeDistillationKLDivLoss(loss_weight=0.25, T=10),
        kd.KnowledgeDistillationKLDivLoss(loss_weight=10, T=2),
    )

    def rows(level: Tensor, numbers: int) -> Tensor:
        return level.permute(0, 2, 3, 1).reshape(-1, numbers)

    def ours() -> Tensor:
        def chosen(levels: list[Tensor], masks: list[Tensor]) -> Tensor:
            return torch.cat([level[index] for level, index in zip(levels, masks, strict=True)])

        positive, close = ([mask.nonzero()[:, 0] for mask in masks] for masks in (main, valuable))
        classes = [chosen([rows(level, CLASSES) for level in part], positive) for part in (scores, fixed)]
        borders = [[rows(level, 4 * BINS) for level in part] for part in (sides, other)]
        here, near = ([chosen(part, masks).unflatten(1, (4, BINS)) for part in borders] for masks in (positive, close))
        best = classes[0].detach().amax(dim=1).sigmoid()
        share = torch.cat([torch.full((int(mask.sum()),), 1 / max(1, int(mask.sum()))) for mask in main])
        return (
            0.25 * ld_box_loss(*here, best)
            + 0.25 * ld_box_loss(*near, torch.cat(overlap)[torch.cat(valuable)], divisor=16)
            + 10 * ld_class_loss(*classes, share)
        )

    def released() -> Tensor:
        total = 0.0
        for level, mask in enumerate(main):
            score, soft = rows(scores[level], CLASSES), rows(fixed[level], CLASSES)
            border, target = rows(sides[level], 4 * BINS), rows(other[level], 4 * BINS)
            here, near = mask.nonzero().squeeze(1), valuable[level].nonzero().squeeze(1)
            if len(here):
                weight = score.detach().sigmoid().max(dim=1)[0][here][:, None].expand(-1, 4).reshape(-1)
                pair = border[here].reshape(-1, BINS), target[here].reshape(-1, BINS)
                total = total + of_side(*pair, weight=weight, avg_factor=4.0)
                total = total + of_class(score[here], soft[here], weight=torch.ones(len(here)), avg_factor=here.shape[0])
            if len(near):
                weight = overlap[level][near][:, None].expand(-1, 4).reshape(-1)
                pair = border[near].reshape(-1, BINS), target[near].reshape(-1, BINS)
                total = total + of_side(*pair, weight=weight, avg_factor=16.0)
        return total  # type: ignore[return-value]

    return Case(ours, released, [*scores, *sides])


def crosskd(folder: Path) -> Case:
    """Alignment of the tower's maps and the losses of ``CrossKDGFL``; between them both run one 1x1 output layer."""
    name = "mmdet.models.detectors.crosskd_gfl"
    source = Source(
        "jbwang1997/CrossKD", "87e156a46259e3a516b65fc6a049b200b9ab0d54", _paths(name, LOSSES + "utils", LOSSES + "kd_loss")
    )
    module, _, kd = load(source, folder)
    given = maps()
    other = [(level.detach().roll(1, 0) + 0.3).requires_grad_() for level in given.student]
    fixed, sides = level_logits(CLASSES, 1.0, -3.0)[1], level_logits(4 * BINS)[1]
    to_class, to_side = (
        nn.Conv2d(CHANNELS, CLASSES, 1).requires_grad_(False),
        nn.Conv2d(CHANNELS, 4 * BINS, 1).requires_grad_(False),
    )
    align = module.CrossKDGFL.align_scale
    weights = [torch.ones(IMAGES, height * width) for height, width in given.shapes]
    head = SimpleNamespace(cls_out_channels=CLASSES, reg_max=BINS - 1)
    detector = SimpleNamespace(
        bbox_head=head, loss_cls_kd=kd.KDQualityFocalLoss(beta=1, loss_weight=1.0),
        loss_reg_kd=kd.KnowledgeDistillationKLDivLoss(class_reduction="sum", T=1, loss_weight=4.0),
    )  # fmt: skip

    def moments(level: Tensor):  # type: ignore[no-untyped-def]  # as the method keeps them of each image
        rows = level.flatten(2)
        means = rows.mean(dim=2)
        counts = torch.full((len(level),), float(rows.shape[2]))
        return crosskd_moments(counts, means, (rows - means[..., None]).square().sum(dim=2))

    def ours() -> Tensor:
        logits, borders = [], []
        for mine, box, theirs in zip(given.student, other, given.teacher, strict=True):
            known = moments(theirs)
            logits.append(to_class(crosskd_align(mine, known)))
            borders.append(to_side(crosskd_align(box, known)))
        together = [flat(levels, CLASSES) for levels in (logits, fixed)]
        distributions = [flat(levels, 4 * BINS).unflatten(-1, (4, BINS)) for levels in (borders, sides)]
        label_weights = torch.cat(weights, dim=1)
        score = crosskd_scores(together[1], label_weights)
        return crosskd_class_loss(*together, label_weights, 50.0) + 4 * crosskd_distribution_loss(*distributions, score)

    def released() -> Tensor:
        classes, boxes, masses = [], [], []
        for level, theirs in enumerate(given.teacher):
            logits = to_class(align(None, given.student[level], theirs).relu())
            border = to_side(align(None, other[level], theirs).relu())
            parts = module.CrossKDGFL.pred_mimicking_loss_single(
                detector, fixed[level], sides[level], logits, border, weights[level], avg_factor=50.0
            )
            for found, part in zip((classes, boxes, masses), parts, strict=True):
                found.append(part)
        return sum(classes) + sum(boxes) / sum(masses)  # type: ignore[return-value]

    return Case(ours, released, [*given.student, *other])


def lad(folder: Path) -> Case:
    """``LADHead.loss_by_feat`` of mmdet under given labels (40 positives an image); the boxes are decoded already."""
    name = "mmdet.models.dense_heads.lad_head"
    losses = [LOSSES + part for part in ("utils", "iou_loss", "focal_loss", "cross_entropy_loss", "accuracy")]
    overlaps = "mmdet.structures.bbox.bbox_overlaps"
    source = Source("jbwang1997/CrossKD", "87e156a46259e3a516b65fc6a049b200b9ab0d54", _paths(overlaps, *losses, name))
    boxes, _, iou, focal, entropy, _, module = load(source, folder)
    iou.bbox_overlaps = module.bbox_overlaps = boxes.bbox_overlaps
    module.levels_to_images = lambda levels: list(flat(levels, levels[0].shape[1]))
    given = maps()
    logits, _ = level_logits(CLASSES, 1.0, -3.0)
    quality = [torch.randn(IMAGES, 1, *shape, requires_grad=True) for shape in given.shapes]
    corners = [torch.rand(IMAGES, 2, *shape) * 500 for shape in given.shapes]
    place = [torch.cat([corner, corner + 100], dim=1).requires_grad_() for corner in corners]
    torch.manual_seed(4)
    count = sum(_counts(given.shapes))
    matched = torch.full((IMAGES, count), -1)
    for image in range(IMAGES):
        matched[image, torch.randperm(count)[:40]] = torch.randint(0, 10, (40,))
    targets = [
        Target(own, labels, torch.zeros(10, dtype=torch.bool)) for own, labels in zip(given.boxes, given.labels, strict=True)
    ]
    labels = torch.stack([torch.cat([own, torch.tensor([CLASSES])])[row] for own, row in zip(given.labels, matched, strict=True)])
    wanted = torch.cat([own[row.clamp(min=0)] for own, row in zip(given.boxes, matched, strict=True)])
    positive = (labels.flatten() < CLASSES).nonzero().reshape(-1)
    assignment = (labels.flatten(), torch.ones(labels.numel()), wanted, None, positive, wanted[positive], len(positive))
    head = SimpleNamespace(
        cls_out_channels=CLASSES, bbox_coder=SimpleNamespace(decode=lambda anchors, deltas: deltas),
        loss_cls=focal.FocalLoss(use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0),
        loss_bbox=iou.GIoULoss(loss_weight=1.3), loss_centerness=entropy.CrossEntropyLoss(use_sigmoid=True, loss_weight=0.5),
    )  # fmt: skip

    def ours() -> Tensor:
        together = flat(logits, CLASSES), flat(place, 4), flat(quality, 1)[..., 0]
        return sum(lad_label_terms(*together, matched, targets))  # type: ignore[arg-type, return-value]

    def released() -> Tensor:
        metas = [{}] * IMAGES
        found = module.LADHead.loss_by_feat(head, logits, place, quality, None, metas, label_assignment_results=assignment)
        return sum(found.values())

    return Case(ours, released, [*logits, *quality, *place])
