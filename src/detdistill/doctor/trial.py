"""A few training steps of a run's last stage on given batches, without a run folder: what the checks look at."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from detdistill.detectors.contract import HasSchedule
from detdistill.settings import DistillSettings, TrainSettings
from detdistill.structures import Batch, Clock, Losses
from detdistill.training.balance import Balance, gradient_norm, gradient_shares
from detdistill.training.optimizers import build_optimizer, build_schedule
from detdistill.training.session import Session
from detdistill.training.stage_loop import plain_stage


@dataclass(frozen=True)
class Look:
    """Loss terms of one batch at one time of training."""

    values: Mapping[str, float]
    shares: Mapping[str, float]
    """Share of each term in the student's gradient, by its own norm; they sum to 1."""
    norms: Mapping[str, float | None]
    """Norm of the gradient of each term for the student; None: the term does not reach the student."""
    own_norm: float
    """Norm of the gradient of the student's own loss, all terms together."""
    distilled_norm: float
    """Norm of the gradient of the distillation terms, all together."""
    distilled: frozenset[str]
    """Names of the distillation terms."""

    @property
    def distilled_share(self) -> float:
        """Share of all distillation terms together: their norm over the sum of both norms, as ``--balance`` counts it."""
        whole = self.own_norm + self.distilled_norm
        return self.distilled_norm / whole if whole > 0 else 0.0


@dataclass(frozen=True)
class Course:
    """Course of a student's training over a few steps."""

    own: tuple[float, ...]
    """The student's own loss before each step."""
    distilled: tuple[float, ...]
    """Sum of the distillation terms before each step."""
    values: Mapping[str, tuple[float, ...]]
    """Each term before each step."""
    seconds: float
    """Median time of a step, with what is taught."""
    teach_seconds: float
    """Median time of getting what is taught, from the teacher or from a cache."""
    broken: str = ""
    """What was not finite, in words; the trial ended there. Empty: everything was finite."""

    @property
    def fall(self) -> float:
        """Part of the first own loss that the last three steps had lost; negative if it rose."""
        return 1 - self.late / self.own[0] if self.own and self.own[0] else 0.0

    @property
    def late(self) -> float:
        """Mean own loss of the last three steps."""
        return statistics.fmean(self.own[-3:])


class Trial:
    """A student, its method and an optimizer, for some steps of the stage ``distill`` (or of training alone)."""

    def __init__(self, session: Session, device: str, total: int, constant: bool = False) -> None:
        """Move the modules to the device and build the optimizer.

        Args:
            session: a session of its own; its student is trained.
            device: cpu or cuda.
            total: number of steps of the trial, over which the run's schedule is stretched.
            constant: keep the learning rate at its peak instead.
        """
        self.session, self.device, self.total = session, torch.device(device), total
        self.student, self.method = session.student.to(device).train(), session.method
        settings: TrainSettings = session.plan.settings
        if self.method is None:
            self.stage = plain_stage(self.student)
        else:
            self.method.to(device).train()
            for teacher in self.method.teachers():
                teacher.to(device)
            self.stage = self.method.stages(self.student)[-1]
        changes = {**self.stage.overrides, **({"schedule": "constant", "warmup_steps": 0} if constant else {})}
        self.settings = replace(settings, **changes)
        modules: list[nn.Module] = [self.student] if self.method is None else [self.student, self.method]
        self.trainable = [p for module in modules for p in module.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(modules, self.settings)
        self.schedule = build_schedule(self.optimizer, self.settings, total)
        share = settings.balance if isinstance(settings, DistillSettings) else None
        self.balance = None if share is None or self.method is None else Balance(share, self.method.members)
        self.done = 0
        self.teach_seconds = 0.0

    @property
    def weights(self) -> list[nn.Parameter]:
        """The student's weights that are trained now."""
        return [p for p in self.student.parameters() if p.requires_grad]

    @property
    def trains_alone(self) -> tuple[str, ...]:
        """Terms that train only the method's own modules."""
        return () if self.method is None else self.method.trains_alone

    def losses(self, batch: Batch, clock: Clock, precision: str | None = None) -> Losses:
        """The losses of a batch at a time of training, with the run's ``distill_weight``, without ``balance``."""
        wanted = {id(p) for module in self.stage.trains(clock) for p in module.parameters()}
        for parameter in self.trainable:
            parameter.requires_grad_(id(parameter) in wanted)
        if isinstance(self.student, HasSchedule):
            self.student.schedule(clock)
        precision = self.settings.precision if precision is None else precision
        kind = {"32": torch.float32, "bf16": torch.bfloat16, "16": torch.float16}[precision]
        with torch.autocast(self.device.type, dtype=kind, enabled=precision != "32"):
            started = time.perf_counter()
            source, method = self.session.source, self.stage.learns_from
            taught = None if method is None else source(method, batch)
            self._wait()
            self.teach_seconds = time.perf_counter() - started
            found = self.stage.step(batch, taught, clock)
        for teacher in () if self.method is None else self.method.teachers():
            teacher.forget()
        weight = self.settings.distill_weight if isinstance(self.settings, DistillSettings) else 1.0
        return found.with_distilled_scaled(weight)

    def look(self, batch: Batch, progress: float = 0.0, balanced: bool = False) -> Look:
        """Measure every term of a batch; nothing is trained.

        Args:
            batch: the batch, on the device.
            progress: time of training, 0 at the first step, 1 at the end.
            balanced: with the factors that ``--balance`` has now.
        """
        losses = self.losses(batch, Clock(round(progress * 1000), 1000, epoch=round(10 * progress), epochs=10))
        if balanced and self.balance is not None:
            losses = self.balance.apply(losses)
        names = [name for name, term in losses.terms.items() if name not in losses.distilled]
        own, distilled = (gradient_norm(losses, part, self.weights) for part in (names, losses.distilled & losses.terms.keys()))
        norms = {name: gradient_norm(losses, [name], self.weights) for name in losses.terms}
        return Look(
            {name: float(term.detach()) for name, term in losses.terms.items()},
            {name: float(share) for name, share in gradient_shares(losses, self.weights).items()},
            {name: None if norm is None else float(norm) for name, norm in norms.items()},
            0.0 if own is None else float(own),
            0.0 if distilled is None else float(distilled),
            losses.distilled & losses.terms.keys(),
        )

    def run(self, batches: Sequence[Batch]) -> Course:
        """Train on ``total`` batches, from the first again when they are used up."""
        own: list[float] = []
        distilled: list[float] = []
        values: dict[str, list[float]] = {}
        seconds: list[float] = []
        teaching: list[float] = []
        broken = ""
        while self.done < self.total and not broken:
            started = time.perf_counter()
            losses, broken = self._step(batches[self.done % len(batches)])
            self._wait()
            seconds.append(time.perf_counter() - started)
            teaching.append(self.teach_seconds)
            numbers = {name: float(term.detach()) for name, term in losses.terms.items()}
            own.append(sum(value for name, value in numbers.items() if name not in losses.distilled))
            distilled.append(sum(value for name, value in numbers.items() if name in losses.distilled))
            for name, value in numbers.items():
                values.setdefault(name, []).append(value)
        later = slice(1, None) if len(seconds) > 2 else slice(None)  # the first step warms up
        terms = {name: tuple(found) for name, found in values.items()}
        times = statistics.median(seconds[later]), statistics.median(teaching[later])
        return Course(tuple(own), tuple(distilled), terms, *times, broken)

    def _step(self, batch: Batch) -> tuple[Losses, str]:
        """One optimizer step; the losses, and what was not finite (then no weight has changed)."""
        losses = self.losses(batch, Clock(self.done, self.total))
        if self.balance is not None:
            if self.balance.due(self.done):
                self.balance.measure(losses, self.weights)
            losses = self.balance.apply(losses)
        bad = [name for name, term in losses.terms.items() if not bool(torch.isfinite(term).all())]
        if bad:
            return losses, f"loss term {', '.join(bad)} at step {self.done}"
        self.optimizer.zero_grad()
        losses.total().backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.trainable if p.grad is not None])
        if not bool(torch.isfinite(norm)):
            return losses, f"the gradient at step {self.done}"
        if self.settings.clip:
            torch.nn.utils.clip_grads_with_norm_(self.trainable, self.settings.clip, norm)
        self.optimizer.step()
        self.schedule.step()
        self.done += 1
        return losses, ""

    def saved_bytes(self, batch: Batch) -> int:
        """Bytes that the forward pass of a batch keeps for its backward pass, weights not counted."""
        known = {p.untyped_storage().data_ptr() for p in self.trainable}
        found = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal found
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                known.add(storage.data_ptr())
                found += storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            self.losses(batch, Clock(0, self.total)).total()
        return found

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
