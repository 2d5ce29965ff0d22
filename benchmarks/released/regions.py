"""Comparisons of the losses of regions, and of the distances to maps made from labels. Pooled regions are given."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from detdistill.losses import (
    dsig_edge_loss,
    dsig_feature_loss,
    dsig_node_losses,
    g_detkd_ckd_loss,
    g_detkd_sgfi_loss,
    gid_feature_loss,
    gid_relation_loss,
    gid_response_loss,
    head_ckd_loss,
    head_layer_loss,
    labelenc_distance,
    lgd_loss,
    mimic_loss,
    odkd_box_loss,
    odkd_class_loss,
)
from detdistill.methods.g_detkd.parts import LevelMatching
from detdistill.structures import Origin
from released.inputs import CHANNELS, CLASSES, IMAGES, STRIDES, maps
from released.measure import Case
from released.stubs import Source, load

REGIONS = 1024
"""512 regions of each image."""


def _pooled(count: int = REGIONS, size: int = 7) -> tuple[Tensor, Tensor]:
    torch.manual_seed(5)
    shape = (count, CHANNELS, size, size)
    return torch.randn(shape, requires_grad=True), torch.randn(shape)


def mimic(folder: Path) -> Case:
    """``L2Loss`` of United-Perception on 1024 pooled regions, as its ``Sample_Feature_Mimicker`` calls it."""
    name = "up.tasks.distill.losses.l2_loss"
    source = Source(
        "ModelTC/United-Perception", "52aaeb9ed27a490820696d7754d19f98cd6ecd11", {name: name.replace(".", "/") + ".py"}
    )
    (module,) = load(source, folder)
    mine, theirs = _pooled()
    loss = module.L2Loss()
    return Case(partial(mimic_loss, mine, theirs), lambda: loss([theirs], [mine]) / 2.0, [mine])


def odkd(folder: Path) -> Case:
    """The third party's class and box losses of 1024 regions; its class weights are 1."""
    source = Source(
        "HqWei/Distillation-of-Faster-rcnn", "2bcdefacb283cb5633982588a22c370691b40461", {"mimic_loss": "mimic_loss.py"}
    )
    (module,) = load(source, folder)
    torch.manual_seed(5)
    logits, fixed = torch.randn(REGIONS, CLASSES + 1, requires_grad=True), torch.randn(REGIONS, CLASSES + 1)
    deltas, other, target = torch.randn(256, 4, requires_grad=True), torch.randn(256, 4), torch.randn(256, 4)
    zero = torch.zeros(())

    def ours() -> Tensor:
        return 0.5 * odkd_class_loss(logits, fixed, background_weight=1.0) + 0.5 * odkd_box_loss(deltas, other, target)

    def released() -> Tensor:
        classes = module.compute_loss_classification(fixed, logits, 0.5, zero)[0]
        return classes + module.compute_loss_regression(zero, deltas, other, target, target, 0.0, 0.5)[0]

    return Case(ours, released, [logits, deltas])


def gid(folder: Path) -> Case:
    """Feature, relation and response losses of 20 instances and 2000 predictions; the instances are given."""
    name = "gid.loss"
    source = Source("daixinghome/Distill_GID_detectron2", "9118c54274e87f29492948c468632429de4f933b", {name: "GID/gid/loss.py"})
    (module,) = load(source, folder)
    module.smooth_l1_loss = lambda mine, theirs, beta, reduction: F.smooth_l1_loss(mine, theirs, reduction=reduction, beta=beta)
    mine, theirs = _pooled(20, 10)
    places = IMAGES * 9 * sum(-(-800 // stride) * -(-1088 // stride) for stride in STRIDES)
    logits, fixed = torch.randn(places, CLASSES, requires_grad=True), torch.randn(places, CLASSES)
    deltas, other = torch.randn(places, 4, requires_grad=True), torch.randn(places, 4)
    mask = torch.zeros(places, dtype=torch.bool)
    mask[torch.randperm(places)[:2000]] = True

    def ours() -> Tensor:
        response = gid_response_loss(logits[mask], fixed[mask], deltas[mask], other[mask])
        relation = gid_relation_loss(mine, theirs)
        return 5e-4 * gid_feature_loss(mine, theirs) + 40 * relation + 0.1 * response.classification + response.box

    def released() -> Tensor:
        response = partial(module.distill_loss_response, distill_mask=mask)
        return (
            5e-4 * module.distill_loss_feature(theirs, mine)
            + 40 * module.distill_loss_relation(theirs, mine, smooth_l1_beta=1.0)
            + 0.1 * response(fixed, logits, loss_mode="bce")
            + response(other, deltas, loss_mode="l1", smooth_l1_beta=0.1)
        )

    return Case(ours, released, [mine, logits, deltas])


def dsig(folder: Path) -> Case:
    """Feature, node and edge losses: 128 foreground and 384 background regions an image, every sixth of these mined."""
    names = {f"utils.{part}": f"projects/Distillation/utils/{part}.py" for part in ("feature_kd_loss", "matrix_utils")}
    losses, matrices = load(Source("dvlab-research/Dsig", "c8a534ca80c5a8ef719b5d769a84d077755d0183", names), folder)
    given = maps()
    mine, theirs = _pooled()
    image = torch.arange(REGIONS) // 512
    foreground = torch.arange(REGIONS) % 512 < 128
    mined = ~foreground & (torch.arange(REGIONS) % 6 == 0)

    def ours() -> Tensor:
        nodes = dsig_node_losses(mine, theirs, image, foreground, ~foreground)
        edges = dsig_edge_loss(mine, theirs, image, foreground | mined)
        return dsig_feature_loss(given.student, given.teacher) + nodes.foreground + nodes.background + edges

    def released() -> Tensor:
        total: Any = 0.0
        for student, teacher in zip(given.student, given.teacher, strict=True):
            total = total + losses.mse_loss_withmask(student, teacher).mean()
        split = matrices.split_features_per_image
        fronts, backs = (
            [split(side[mask], [len(side[mask]) // 2] * 2) for side in (mine, theirs)] for mask in (foreground, ~foreground)
        )
        chosen = [torch.nonzero(mined[image == index][128:]).flatten() for index in range(IMAGES)]
        rows = [
            matrices.cat_fg_bg_features(front, matrices.select_topk_features_as_fg(back, chosen))
            for front, back in zip(fronts, backs, strict=True)
        ]
        for student, teacher in zip(*backs, strict=True):
            total = total + losses.mse_loss_withmask(student, teacher).mean() * (128 / 384 * 7.5)
        for student, teacher in zip(*fronts, strict=True):
            total = total + losses.mse_loss_withmask(student.flatten(1), teacher.flatten(1)).mean()
        edges = [matrices.generate_correlation_matrix(side) for side in rows]
        return total + matrices.corr_mat_mse_loss(edges[1], edges[0])

    return Case(ours, released, [*given.student, mine])


def g_detkd(folder: Path) -> Case:
    """``SGFILoss`` after its 1x1 adapter, and ``ckd_loss`` with a bank of 9 batches: 256 regions from 4 levels."""
    base = "todd.tasks.object_detection_knowledge_distillation.models.losses."
    files = {base + part: (base + part).replace(".", "/") + ".py" for part in ("rcnn", "ckd")}
    source = Source("LutingWang/todd", "e4ce698f9aa1a6b22c046ee7a6176bec3a198102", files)
    rcnn, ckd = load(source, folder)
    levels = [_pooled(256)[0] for _ in range(4)]
    target = _pooled(256)[1]
    rows, fixed = torch.randn(256, 1024, requires_grad=True), torch.randn(256, 1024)
    bank = F.normalize(torch.randn(9 * 256, 1024), dim=1)
    adapter, loss = torch.nn.Conv2d(CHANNELS, CHANNELS, 1), rcnn.SGFILoss()
    matching = LevelMatching([CHANNELS] * 4, CHANNELS)

    def ours() -> Tensor:
        matched = matching(levels, target)
        return g_detkd_sgfi_loss(matched[0], target) + 0.5 * g_detkd_ckd_loss(
            rows, fixed, bank=bank, positive_in_denominator=False
        )

    def released() -> Tensor:
        fused = loss(torch.stack([adapter(level) for level in levels]), target)
        keys = torch.cat([F.normalize(fixed), bank])
        return F.mse_loss(fused, target) + 0.5 * ckd.ckd_loss(F.normalize(rows), keys)

    why = "weights are drawn on each side; that version takes the softmax over the regions"
    return Case(ours, released, [*levels, rows], [matching], [adapter, loss], differs=why)


def head(folder: Path) -> Case:
    """Mean squared differences of 1024 regions' layers of 1024 numbers; the released loss of todd is ``F.mse_loss`` times 2."""
    torch.manual_seed(5)
    layers = [torch.randn(REGIONS, 1024, requires_grad=True) for _ in range(3)]
    fixed = [torch.randn(REGIONS, 1024) for _ in range(2)]
    level = torch.zeros(REGIONS, dtype=torch.int64)
    origin = Origin(level, level, torch.zeros(REGIONS, 2, dtype=torch.int64), level, level)

    def ours() -> Tensor:
        return head_layer_loss(layers[:2], fixed) + head_ckd_loss(layers[2], fixed[1], origin)

    def released() -> Tensor:
        return (
            2 * F.mse_loss(layers[0], fixed[0])
            + 2 * F.mse_loss(layers[1], fixed[1])
            + 2 * F.mse_loss(layers[2], fixed[1][level >= 0])
        )

    return Case(ours, released, layers, note="released: F.mse_loss, which todd's loss is")


def labelenc(folder: Path) -> Case:
    """Auxiliary loss of ``LabelEncStep2Network``; its adapter and the maps from labels are given."""
    name = "fcos_core.modeling.detector.labelenc_step2_network"
    source = Source("megvii-model/LabelEnc", "16a4038954714d78f39b81d786046b32c8480613", {name: name.replace(".", "/") + ".py"})
    (module,) = load(source, folder)
    given = maps()
    module.to_image_list = lambda images: SimpleNamespace(tensors=torch.zeros(1, 1))
    module.box_encode = lambda *inputs, **settings: None
    norm = torch.nn.GroupNorm(1, CHANNELS, affine=False)

    class Backbone:
        """Returns the student's maps."""

        out_channels = CHANNELS

        def __call__(self, images: Any) -> list[Tensor]:
            return given.student

    network = SimpleNamespace(
        training=True, num_classes=81, label_encoding_function=lambda drawn: given.teacher, backbone=Backbone(), roi_heads=None,
        rpn=lambda *inputs: (None, {}), layernorm=norm, feature_adapt=lambda level: level,
    )  # fmt: skip

    def released() -> Tensor:
        return module.LabelEncStep2Network.forward(network, None)["auxiliary loss"]

    return Case(partial(labelenc_distance, given.student, given.teacher), released, given.student)


def lgd(folder: Path) -> Case:
    """Distillation loss of ``BaseDistillator``; its adapter and the dynamic teacher's maps are given."""
    name = "models.base_distillator"
    source = Source("megvii-research/LGD", "e03357d37aea7c7aa59874be9361f37e74d18b50", {name: "models/base_distillator.py"})
    (module,) = load(source, folder)
    given = maps()
    norm = torch.nn.InstanceNorm2d(CHANNELS, affine=False)
    network = SimpleNamespace(distill_flag=1, adapter={"distill": lambda level: level}, norm_stu=norm, norm_tea=norm, coef=1.0)
    both = {side: dict(enumerate(levels)) for side, levels in (("stu", given.student), ("tea", given.teacher))}

    def released() -> Tensor:
        return module.BaseDistillator.distill(network, both, None, None, None, None)

    return Case(partial(lgd_loss, given.student, given.teacher), released, given.student)
