"""The LightningModule of all methods: it runs the step of a stage, sums the loss terms, and checks and measures them."""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from detdistill.detectors.contract import Detector, HasSchedule
from detdistill.errors import DetdistillWarning, RunError
from detdistill.methods.shared.contract import Method, Source, Stage, teach_by_canvas
from detdistill.settings import DistillSettings, TrainSettings
from detdistill.structures import Batch, Clock, Losses, map_tensors
from detdistill.training.balance import Balance, gradient_shares
from detdistill.training.optimizers import build_optimizer, build_schedule
from detdistill.training.self_teacher import AverageTeacher
from detdistill.training.unlabelled import Unlabelled


class NonFiniteLoss(RunError):
    """A loss term, the gradient or a weight became NaN or infinite."""


class StageModule(L.LightningModule):
    """Student and method, trained by one stage. The state dict does not contain the teacher."""

    def __init__(
        self,
        student: Detector,
        method: Method | None,
        stage: Stage,
        settings: TrainSettings,
        total: int,
        source: Source = teach_by_canvas,
        images: int = 0,
        seconds: float = 0.0,
        unlabelled: Unlabelled | None = None,
    ) -> None:
        """Prepare a stage for Lightning.

        Args:
            student: the student of the run, in all stages.
            method: the method; None: the detector is trained without one.
            stage: the stage to train.
            settings: settings of the run, with the stage's overrides.
            total: optimizer steps of this stage.
            source: gives the knowledge of the stage's method about a batch, from the teacher or from a cache.
            images: number of images that this process saw in the stages before.
            seconds: training time of the stages before.
            unlabelled: adds what the teachers know and the labels lack to the batches on which the student is trained.
        """
        super().__init__()
        self.student, self.method = student, method
        self.stage, self.settings, self.total, self.source = stage, settings, total, source
        self.distill_weight = settings.distill_weight if isinstance(settings, DistillSettings) else 1.0
        share = settings.balance if isinstance(settings, DistillSettings) else None
        self.balance = None if share is None or method is None else Balance(share, method.members)
        self.unlabelled = unlabelled if stage.evaluates is student else None
        teachers = () if method is None else method.teachers()
        self._averages = [teacher for teacher in teachers if isinstance(teacher, AverageTeacher)]
        self._trace: Mapping[str, float] = {}
        """Measurement of ``balance`` that is not logged yet."""
        self.average: AveragedModel | None = None
        if settings.ema:
            self.average = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(settings.ema), use_buffers=True)
            self.average.requires_grad_(False)
        self.last: Losses | None = None
        """The latest losses, detached; shown by the progress bar."""
        self.images = images
        """Number of images that this process has seen in this run."""
        self._unchecked: list[tuple[Losses, Batch]] = []
        # Parameters that were frozen before (early layers of a pretrained backbone, for example) stay frozen.
        self._trainable = [p for p in nn.ModuleList(filter(None, (student, method))).parameters() if p.requires_grad]
        self._trained: tuple[int, ...] = ()
        self._random_state: Mapping[str, Any] | None = None
        self._started = time.monotonic()
        self._seconds_before = seconds

    @property
    def clock(self) -> Clock:
        """Step, total steps and epoch of this stage."""
        steps = max(1, -(-int(self.trainer.num_training_batches) // self.settings.accumulate))
        return Clock(self.global_step, self.total, self.current_epoch, max(1, -(-self.total // steps)))

    @property
    def seconds(self) -> float:
        """Training time of this run, including earlier stages and the time before it was resumed."""
        return self._seconds_before + time.monotonic() - self._started

    @property
    def detector(self) -> Detector | None:
        """The detector that is evaluated and exported: with ``ema`` the moving average of the student."""
        if self.stage.evaluates is self.student and self.average is not None:
            averaged = self.average.module
            assert isinstance(averaged, Detector)
            return averaged
        return self.stage.evaluates

    def refresh(self) -> None:
        """Bring ``detector`` up to date with the training, in all processes; nothing to do where it is the student itself."""

    # ------------------------------------------------------------------------------------------------- the step

    def training_step(self, batch: Batch, index: int) -> Tensor:
        """Compute the losses of a batch by the stage's step; return their sum."""
        self._freeze()
        if isinstance(self.student, HasSchedule):
            self.student.schedule(self.clock)
        method = self.stage.learns_from
        added = None
        if self.unlabelled is not None:
            batch, added = self.unlabelled(batch)
        taught = None if method is None else self.source(method, batch)
        losses = self.stage.step(batch, taught, self.clock).with_distilled_scaled(self.distill_weight)
        if added is not None:
            losses = replace(losses, monitors={**losses.monitors, "unlabelled/boxes": added})
        learns = any(p.requires_grad for p in self.student.parameters())  # not in stages that train only the method
        if self.balance is not None and learns:
            losses = self._balanced(self.balance, losses, first=index % self.settings.accumulate == 0)
        total = losses.total()
        every = self.settings.monitor_every
        steps_now = (index + 1) % self.settings.accumulate == 0 or index + 1 == self.trainer.num_training_batches
        if every and self.global_step % every == 0 and steps_now and len(losses.terms) > 1 and learns:
            losses = Losses(losses.terms, {**losses.monitors, **self._shares(losses)})
        if steps_now and self._trace:
            trace = {name: torch.tensor(value) for name, value in self._trace.items()}
            losses, self._trace = Losses(losses.terms, {**losses.monitors, **trace}), {}
        self.last = Losses(
            {name: term.detach() for name, term in losses.terms.items()},
            {name: value.detach() for name, value in losses.monitors.items()},
        )
        self._unchecked.append((self.last, batch))
        self.images += len(batch)
        if self.method is not None:
            for teacher in self.method.teachers():
                teacher.forget()
        return total

    def _freeze(self) -> None:
        """Turn on gradients for the modules that the stage trains at this step, and off for all others."""
        modules = self.stage.trains(self.clock)
        trained = tuple(dict.fromkeys(id(module) for module in modules))
        if trained != self._trained:
            self._trained = trained
            self._train_only(modules)

    def _train_only(self, modules: Iterable[nn.Module]) -> None:
        """Turn on gradients for the given modules, and off for all others."""
        wanted = {id(p) for module in modules for p in module.parameters()}
        for parameter in self._trainable:
            parameter.requires_grad_(id(parameter) in wanted)

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip the gradient. If the losses or the gradient are not finite, stop before the weights change.

        Both are checked together here, so that the program waits for a GPU only once per step.

        Raises:
            NonFiniteLoss: they are not finite; the message names the term, the step and the images.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if isinstance(norm, DTensor):  # of gradients that are shared out among the processes
            norm = norm.full_tensor()
        finite = torch.isfinite(torch.stack([losses.total() for losses, _ in self._unchecked])).all()
        if self.settings.precision != "16":  # with precision 16, the loss scaler skips such steps and lowers its scale
            finite &= torch.isfinite(norm)
        if self.trainer.world_size > 1:  # all processes stop together; otherwise the others would wait for this one forever
            finite = finite.float()
            torch.distributed.all_reduce(finite, torch.distributed.ReduceOp.MIN)
        if not bool(finite):
            raise NonFiniteLoss(self._blame())
        self._unchecked.clear()
        if gradient_clip_val:
            torch.nn.utils.clip_grads_with_norm_(parameters, gradient_clip_val, norm)

    def _blame(self) -> str:
        what, batch = "", self._unchecked[-1][1]
        for losses, seen in self._unchecked:
            if not bool(torch.isfinite(losses.total())):
                bad = [name for name, term in losses.terms.items() if not bool(torch.isfinite(term).all())]
                what, batch = f"loss {', '.join(bad) or 'sum'}", seen
                break
        else:
            broken = [
                name
                for name, p in self.named_parameters()
                if p.grad is not None and not bool(torch.isfinite(own_part(p.grad)).all())
            ]
            what = f"the gradient ({broken[0] if broken else 'its norm'}, {len(broken)} tensors)"
            values = (f"{name} {float(term):.3g}" for name, term in self._unchecked[-1][0].terms.items())
            what += f" of losses {', '.join(values)}"
        where = f"at step {self.global_step} (epoch {self.current_epoch}) on images {list(batch.ids)}"
        if self._is_the_teachers_fault(batch):
            return f"the teacher's output is NaN {where}; check the teacher's weights, or verify the cache"
        return f"{what} is not finite {where}; {self._advice()}"

    def _is_the_teachers_fault(self, batch: Batch) -> bool:
        """Whether what is taught about a batch, computed or read once more, holds NaN.

        Stages without it, which train networks of the method on the teacher itself: whether the teacher's features do.
        """
        if self.method is None:
            return False
        method, broken = self.stage.learns_from, False
        taught = [teacher.observe(batch) for teacher in self.method.teachers()] if method is None else self.source(method, batch)

        def look(tensor: Tensor) -> Tensor:
            nonlocal broken
            broken |= tensor.is_floating_point() and bool(torch.isnan(tensor).any())
            return tensor

        if taught is not None:
            map_tensors(taught, look)
        return broken

    def _advice(self) -> str:
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        return f"lower lr (now {rate:.3g}) or the loss's weight, or use precision=32"

    def check_weights(self) -> None:
        """Check that all weights and running statistics are finite, before they are saved or evaluated.

        Raises:
            NonFiniteLoss: they are not; the message names a tensor.
        """
        tensors: dict[str, Tensor] = dict(self.named_parameters())
        tensors |= {name: buffer for name, buffer in self.named_buffers() if name.endswith(("running_mean", "running_var"))}
        finite = torch.stack([torch.isfinite(own_part(tensor.detach())).all() for tensor in tensors.values()])
        if any(isinstance(tensor, DTensor) for tensor in tensors.values()):  # each process has seen its own part of them
            finite = finite.int()
            torch.distributed.all_reduce(finite, torch.distributed.ReduceOp.MIN)
        if not bool(finite.all()):
            bad = [name for name, good in zip(tensors, finite.tolist(), strict=True) if not good]
            raise NonFiniteLoss(f"{bad[0]} ({len(bad)} tensors) is not finite after step {self.global_step}; {self._advice()}")

    def _shares(self, losses: Losses) -> dict[str, Tensor]:
        """Share of each loss term in the student's gradient, as monitors."""
        weights = [p for p in self.student.parameters() if p.requires_grad]
        return {f"share/{name}": share for name, share in gradient_shares(losses, weights).items()}

    def _balanced(self, balance: Balance, losses: Losses, first: bool) -> Losses:
        """Apply the factors of ``balance``, which are measured anew before every few optimizer steps.

        Args:
            balance: the factors.
            losses: of this batch, scaled by ``distill_weight``.
            first: this is the first batch of an optimizer step, all batches of which have the same factors.
        """
        if first and balance.due(self.global_step):
            scaler = getattr(self.trainer.precision_plugin, "scaler", None)
            reason = balance.measure(
                losses,
                [p for p in self.student.parameters() if p.requires_grad],
                1.0 if scaler is None else float(scaler.get_scale()),
                self._mean_over_processes if self.trainer.world_size > 1 else None,
            )
            self._trace = balance.trace
            if reason and self.global_step == 0 and self.global_rank == 0:
                text = f"balance: in stage {self.stage.name} {reason}, so --balance changes nothing there"
                warnings.warn(text, DetdistillWarning, stacklevel=2)
        return balance.apply(losses)

    @staticmethod
    def _mean_over_processes(values: Tensor) -> Tensor:
        torch.distributed.all_reduce(values)
        return values / torch.distributed.get_world_size()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Take the step, and update the moving average before a checkpoint can be saved."""
        super().optimizer_step(*args, **kwargs)
        if self.average is not None:
            self.average.update_parameters(self.student)
        for teacher in self._averages:
            teacher.follow(self.student)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """End the stage at its last step, which may be in the middle of an epoch."""
        if self.global_step >= self.total:
            self.trainer.should_stop = True

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Move a whole batch to the device."""
        return batch.to(device, non_blocking=True)

    def setup(self, stage: str) -> None:
        """Move the teachers to the device (they are not submodules), and set the memory layout."""
        if self.method is not None:
            for teacher in self.method.teachers():
                teacher.to(self.trainer.strategy.root_device)
                if self.settings.channels_last:
                    teacher.detector.to(memory_format=torch.channels_last)
        if self.settings.channels_last:
            self.student.to(memory_format=torch.channels_last)

    def teardown(self, stage: str) -> None:
        """Unfreeze the parameters that this stage has frozen."""
        for parameter in self._trainable:
            parameter.requires_grad_(True)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Build one optimizer for student and method, and its schedule."""
        optimizer = build_optimizer([module for module in (self.student, self.method) if module is not None], self.settings)
        schedule = build_schedule(optimizer, self.settings, self.total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # ----------------------------------------------------------------------------------------- random states on disk

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add stage, training time, number of images, all random states, factors of ``balance``, and averages that teach."""
        checkpoint["detdistill"] = {
            "stage": self.stage.name,
            "seconds": self.seconds,
            "images": self.images,
            "random": random_state(),
            **({} if self.balance is None else {"balance": self.balance.state_dict()}),
            **({"averages": [teacher.state_dict() for teacher in self._averages]} if self._averages else {}),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the random states until training starts, because building the loaders draws random numbers."""
        mine = checkpoint["detdistill"]
        self._seconds_before, self.images = mine["seconds"], mine["images"]
        self._random_state = mine["random"]
        if self.balance is not None:
            self.balance.load_state_dict(mine["balance"])
        for teacher, state in zip(self._averages, mine.get("averages", ()), strict=True):
            teacher.load_state_dict(state)

    def on_train_start(self) -> None:
        """Restore the random states when everything else is ready."""
        self._started = time.monotonic()
        self.restore_random_state()
        if self.global_rank > 0:  # all processes have the same seed, but random masks and samples should differ
            torch.manual_seed(self.settings.seed + 1_000_003 * self.global_rank + self.global_step)

    def restore_random_state(self) -> None:
        """Restore the random states of the checkpoint, if there is one and this was not done yet."""
        if self._random_state is not None:
            set_random_state(self._random_state)
            self._random_state = None


def own_part(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that is shared out among the processes; another tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def random_state() -> dict[str, Any]:
    """Random states of torch, CUDA, numpy and python, as tensors and plain numbers (loadable with ``weights_only``)."""
    name, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002 - libraries below may still use it
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), int(position), int(has_gauss), float(gauss)],
        "python": random.getstate(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restore the random states from ``random_state``."""
    torch.set_rng_state(state["torch"].cpu())
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))  # noqa: NPY002
    version, numbers, cached = state["python"]
    random.setstate((version, tuple(numbers), cached))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([rng.cpu() for rng in state["cuda"]])
