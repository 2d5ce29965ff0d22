"""Comparisons of the losses between feature maps."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detdistill.functional.attention import spatial_attention  # noqa: F401  (imported before the clock starts)
from detdistill.losses import (
    cwd_loss,
    fgd_loss,
    fgd_masks,
    fgd_terms,
    fitnet_loss,
    fitnet_normalized_loss,
    fkd_attention,
    fkd_loss,
    mgd_keep,
    mgd_loss,
    pkd_loss,
    skd_loss,
)
from detdistill.methods.fgd import ContextBlock
from detdistill.methods.fkd import FKDLevel
from detdistill.methods.mgd import MGDGeneration
from released.inputs import CHANNELS, Maps, maps
from released.measure import Case
from released.stubs import Source, load

RAZOR = "mmrazor.models.losses."
CONNECTORS = "mmrazor.models.architectures.connectors."


def _razor(*modules: str, installed: tuple[str, ...] = ()) -> Source:
    files = {name: name.replace(".", "/") + ".py" for name in modules}
    return Source("open-mmlab/mmrazor", "90c7af1fdf35a606a2fceaaeb4b6be2f0dac4eb7", files, installed)


def _summed(loss: nn.Module, given: Maps) -> Tensor:
    """A released loss of one level, added over levels."""
    return sum(loss(mine, theirs) for mine, theirs in zip(given.student, given.teacher, strict=True))  # type: ignore[return-value]


def fitnet(folder: Path) -> Case:
    """Plain form: the released side is ``F.mse_loss`` written by hand, as detector papers have it."""
    given = maps()

    def released() -> Tensor:
        return sum(F.mse_loss(mine, theirs) for mine, theirs in zip(given.student, given.teacher, strict=True))  # type: ignore[return-value]

    return Case(partial(fitnet_loss, given.student, given.teacher), released, given.student, note="released: F.mse_loss")


def fitnet_normalized(folder: Path) -> Case:
    """The form of mmrazor's ``L2Loss``."""
    (module,) = load(_razor(RAZOR + "l2_loss"), folder)
    given = maps()
    return Case(
        partial(fitnet_normalized_loss, given.student, given.teacher), partial(_summed, module.L2Loss(), given), given.student
    )


def pkd(folder: Path) -> Case:
    """``PKDLoss`` of mmrazor."""
    (module,) = load(_razor(RAZOR + "pkd_loss"), folder)
    given = maps()
    loss = module.PKDLoss(loss_weight=6)
    return Case(partial(pkd_loss, given.student, given.teacher), partial(loss, given.student, given.teacher), given.student)


def cwd(folder: Path) -> Case:
    """``ChannelWiseDivergence`` of mmrazor."""
    (module,) = load(_razor(RAZOR + "cwd"), folder)
    given = maps()
    loss = module.ChannelWiseDivergence(tau=1, loss_weight=5)
    return Case(partial(cwd_loss, given.student, given.teacher), partial(_summed, loss, given), given.student)


def fkd(folder: Path) -> Case:
    """``FBKDLoss`` and its connectors of mmrazor, two-stage settings: every block pools keys and values by 4."""
    names = (RAZOR + "fbkd_loss", CONNECTORS + "base_connector", CONNECTORS + "fbkd_connector")
    losses, _, connectors = load(_razor(*names, installed=("mmcv", "mmengine")), folder)
    given = maps()
    settings = {"mode": "dot_product", "sub_sample": True, "maxpool_stride": 2, "zeros_init": True}
    students = [connectors.FBKDStudentConnector(CHANNELS, 4 if level < 2 else 2, **settings) for level in range(5)]
    teachers = [connectors.FBKDTeacherConnector(CHANNELS, 4 if level < 2 else 2, **settings) for level in range(5)]
    parts = [FKDLevel(CHANNELS, 4 if level < 2 else 2, 4) for level in range(5)]
    loss = losses.FBKDLoss()

    def ours() -> Tensor:
        total = []
        for part, mine, theirs in zip(parts, given.student, given.teacher, strict=True):
            cells, _ = fkd_attention(mine, theirs, 0.5, 0.5)
            total.append(fkd_loss(part(mine, theirs, cells)))
        return torch.stack(total).sum()

    def released() -> Tensor:
        pairs = zip(students, teachers, given.student, given.teacher, strict=True)
        return sum(loss(student(mine), teacher(theirs)) for student, teacher, mine, theirs in pairs)  # type: ignore[return-value]

    return Case(ours, released, given.student, parts, (*students, *teachers), differs="weights are drawn on each side")


def fgd(folder: Path) -> Case:
    """``FeatureLoss`` of FGD, masks of the boxes included."""
    source = Source(
        "yzd-v/FGD",
        "c03a6cf3b3cb3cbfd5554dbf4766e7135747d22d",
        {"mmdet.distillation.losses.fgd": "mmdet/distillation/losses/fgd.py"},
    )
    (module,) = load(source, folder)
    given = maps()
    losses = [module.FeatureLoss(CHANNELS, CHANNELS, "fgd", gamma_fgd=5e-4) for _ in given.student]
    mine = [ContextBlock(CHANNELS) for _ in given.student]
    theirs = [ContextBlock(CHANNELS) for _ in given.student]
    for loss in losses:  # ours begins at zero there
        for last in (loss.channel_add_conv_s[-1], loss.channel_add_conv_t[-1]):
            nn.init.zeros_(last.weight), nn.init.zeros_(last.bias)

    def ours() -> Tensor:
        total = []
        for level, (student, teacher) in enumerate(zip(given.student, given.teacher, strict=True)):
            masks = fgd_masks(given.boxes, [meta["img_shape"][:2] for meta in given.metas], given.shapes[level])
            total.append(fgd_loss(fgd_terms(student, teacher, *masks, mine[level](student), theirs[level](teacher))))
        return torch.stack(total).sum()

    def released() -> Tensor:
        parts = zip(losses, given.student, given.teacher, strict=True)
        return sum(loss(student, teacher, given.boxes, given.metas) for loss, student, teacher in parts)  # type: ignore[return-value]

    return Case(ours, released, given.student, (*mine, *theirs), losses)


def mgd(folder: Path) -> Case:
    """``FeatureLoss`` of MGD."""
    name = "mmdet.distillation.losses.mgd"
    source = Source("yzd-v/MGD", "2c9da0b28625eb948db57afc02c824452c3910fe", {name: "det/mmdet/distillation/losses/mgd.py"})
    (module,) = load(source, folder)
    given = maps()
    losses = [module.FeatureLoss(CHANNELS, CHANNELS, "mgd") for _ in given.student]
    generators = [MGDGeneration(CHANNELS, CHANNELS) for _ in given.student]

    def ours() -> Tensor:
        parts = zip(generators, given.student, given.teacher, strict=True)
        losses = []
        for part, mine, theirs in parts:  # level by level, as the method does
            losses.append(mgd_loss([part(mine, mgd_keep(torch.rand(2, 1, *mine.shape[2:])))], [theirs]))
        return torch.stack(losses).sum()

    def released() -> Tensor:
        parts = zip(losses, given.student, given.teacher, strict=True)
        return sum(loss(student, teacher) for loss, student, teacher in parts)  # type: ignore[return-value]

    return Case(ours, released, given.student, generators, losses, differs="weights and masks are drawn on each side")


def skd(folder: Path) -> Case:
    """``ssim_loss`` of kornia, which the paper's one line calls, after the scaling to 0..1."""
    names = ("losses.ssim", "losses._utils", "metrics.ssim", "filters.filter", "filters.kernels", "core.check", "core._compat")
    files = {f"kornia.{name}": f"kornia/{name.replace('.', '/')}.py" for name in names}
    source = Source("kornia/kornia", "b4f5a78a13891c7ac4c1cd9695941380273e981d", files)
    losses, ssim, filters, kernels = load(
        source, folder, "kornia.losses.ssim", "kornia.metrics.ssim", "kornia.filters.filter", "kornia.filters.kernels"
    )
    losses.metrics = SimpleNamespace(ssim=ssim.ssim)
    ssim.filter2d_separable, ssim.get_gaussian_kernel1d = filters.filter2d_separable, kernels.get_gaussian_kernel1d
    given = maps()
    student, teacher = given.student[:3], given.teacher[:3]  # kornia fails on the smaller two

    def scaled(level: Tensor) -> Tensor:
        low, high = level.amin(dim=(1, 2, 3), keepdim=True), level.amax(dim=(1, 2, 3), keepdim=True)
        return (level - low) / (high - low + 1e-6)

    def released() -> Tensor:
        pairs = zip(student, teacher, strict=True)
        return 4.0 * sum(losses.ssim_loss(scaled(mine), scaled(theirs), 11) for mine, theirs in pairs)  # type: ignore[return-value]

    return Case(partial(skd_loss, student, teacher), released, student, note="three levels; the scaling is ours on both sides")
