"""Training whose weights, gradients and optimizer states are shared out among the processes (``--strategy fsdp``).

Torch's ``fully_shard`` gathers the weights of a module when it is called, and only then. Detectors are called in parts (features,
towers, predictions), so the module that is called is the training step itself: it gathers everything that belongs to no block of
a backbone. Blocks of backbones are called as modules by all libraries; each is gathered when its turn comes and released
after it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from detdistill.detectors.contract import Detector, Teacher
from detdistill.errors import ModelError, RunError
from detdistill.methods.shared.contract import Method, Stage
from detdistill.settings import DistillSettings, TrainSettings
from detdistill.structures import Clock
from detdistill.training.module import StageModule
from detdistill.training.self_teacher import AverageTeacher


def check_sharding(settings: TrainSettings, method: Method | None, stages: int) -> None:
    """Check that a run can be sharded.

    Args:
        settings: settings of the run.
        method: its method; None: the student trains alone.
        stages: number of stages.

    Raises:
        RunError: it cannot; the message names the setting.
    """
    reason = ""
    if settings.devices * settings.nodes == 1:
        reason = "there is one process to share with; give --devices, or leave it out"
    elif settings.ema:
        reason = "the moving average (--ema) would need the whole weights in every step; leave out one of them"
    elif isinstance(settings, DistillSettings) and settings.balance is not None:
        reason = "--balance measures gradients of whole weights; leave out one of them"
    elif settings.precision == "16":
        reason = "its gradients cannot be scaled for --precision 16; use bf16 or 32"
    elif method is not None and any(isinstance(teacher, AverageTeacher) for teacher in method.teachers()):
        reason = "a moving average of the student as teacher would need the whole weights in every step; use --strategy ddp"
    elif stages > 1:
        reason = f"{method.slug if method else 'the run'} trains in {stages} stages, and a student cannot be shared out twice"
        reason += "; use --strategy ddp"
    if reason:
        raise RunError(f"strategy fsdp: {reason}")


class ShardedModule(StageModule):
    """A stage whose weights are shared out among the processes. Evaluation, export and ``student/`` use a whole copy."""

    def configure_model(self) -> None:
        """Share out student, method and the blocks of the teachers' backbones; Lightning calls this in all processes.

        Raises:
            RunError: the stage changes which modules it trains.
        """
        mesh = self._device_mesh["data_parallel"]  # type: ignore[index]
        check_trained(self.stage, self.total)
        self._train_only(self.stage.trains(Clock(0, self.total)))
        self._whole = [copy.deepcopy(self.student).requires_grad_(False)]  # in a list, so that it is no submodule
        share_out(self.student, mesh)
        if self.method is not None:
            for teacher in self.method.teachers():
                if isinstance(teacher, Teacher):
                    share_out(teacher.detector, mesh)
        fully_shard(self, mesh=mesh)
        register_fsdp_forward_method(self, "training_step")

    def _freeze(self) -> None:
        """Nothing: weights are frozen before they are shared out, and the stage trains the same ones at all steps."""

    def teardown(self, stage: str) -> None:
        """Nothing to unfreeze: the whole copy has its own parameters."""

    @property
    def detector(self) -> Detector | None:
        """The whole copy of the student, as of the last ``refresh``."""
        return self._whole[0] if self.stage.evaluates is self.student else self.stage.evaluates

    def refresh(self) -> None:
        """Gather the weights into the whole copy; called in all processes."""
        target = self._whole[0]
        own = dict(target.named_parameters())
        with torch.no_grad():
            for name, parameter in self.student.named_parameters():
                own[name].data = whole(parameter.detach()).clone()
            buffers = dict(target.named_buffers())
            for name, buffer in self.student.named_buffers():
                buffers[name].data = whole(buffer.detach()).clone()
        target.train(self.student.training)


def share_out(detector: Detector, mesh: DeviceMesh) -> None:
    """Share out the blocks of a detector's backbone, each of which is gathered while it runs."""
    for block in blocks(detector):
        fully_shard(block, mesh=mesh, reshard_after_forward=True)


def blocks(detector: Detector) -> list[nn.Module]:
    """The blocks of a detector's backbone: members of a list or sequence that are built of further modules."""
    try:
        roots = detector.parts().backbone
    except ModelError:  # wrapped models do not say what their backbone is
        return []

    def inside(module: nn.Module) -> Iterator[nn.Module]:
        for child in module.children():
            built = type(child).__module__.partition(".")[0] != "torch" and next(child.children(), None) is not None
            if isinstance(module, (nn.Sequential, nn.ModuleList)) and built and next(child.parameters(), None) is not None:
                yield child
            else:
                yield from inside(child)

    return list(dict.fromkeys(block for root in roots for block in inside(root)))


def by_parts(module: StageModule) -> str:
    """The message about a detector that uses the weights of a block that was not gathered, with its remedy."""
    teachers = () if module.method is None else module.method.teachers()
    names = " or ".join([module.student.spec.name, *(teacher.spec.name for teacher in teachers)])
    return f"strategy fsdp: {names} uses weights of a block without calling the block; use --strategy ddp"


def check_trained(stage: Stage, total: int) -> None:
    """Check that a stage trains the same modules at all steps.

    Raises:
        RunError: it does not.
    """
    asked = {tuple(id(module) for module in stage.trains(Clock(step, total))) for step in {0, total // 2, max(0, total - 1)}}
    if len(asked) > 1:
        raise RunError(
            f"strategy fsdp: stage {stage.name} changes which modules it trains, and weights that are shared out cannot be "
            "frozen later; use --strategy ddp"
        )


def whole(tensor: Tensor) -> Tensor:
    """A tensor that is shared out, gathered from all processes; another tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
