"""Callbacks of the training loop: evaluation, logging and checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import Logger

from detdistill.detectors.contract import Detector
from detdistill.errors import RunError
from detdistill.evaluation.scores import Scores
from detdistill.files import replace_with_checksum
from detdistill.structures import Batch
from detdistill.training.metrics_table import MetricsTable
from detdistill.training.module import StageModule

Evaluate = Callable[[Detector], Scores]


class Evaluation(L.Callback):
    """Evaluates the detector every few epochs and at the end, and keeps the latest scores and the best AP."""

    def __init__(self, evaluate: Evaluate, every: int, patience: int = 0) -> None:
        """Set the evaluation, its interval, and early stopping.

        Args:
            evaluate: computes the scores of a detector; runs on every process of a distributed run, with the same result.
            every: epochs between evaluations.
            patience: end the stage after this many evaluations without a better AP; 0: never.
        """
        self.evaluate, self.every, self.patience = evaluate, every, patience
        self.latest: Scores | None = None
        self.best_ap = float("-inf")
        self.step = -1
        self.since_best = 0
        """Number of evaluations since the best AP."""
        self.stopped = False
        """Whether the stage ended before its last step."""

    @property
    def may_be_last(self) -> bool:
        """Whether the stage ends early if the next evaluation finds no better AP."""
        return self.patience > 0 and self.since_best + 1 >= self.patience

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Train no further if the run is resumed from the checkpoint at which it had stopped early."""
        if self.stopped:
            trainer.should_stop = True

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Evaluate every ``every`` epochs and at the last step, before the checkpoint, which then contains the scores."""
        assert isinstance(module, StageModule)
        if (trainer.current_epoch + 1) % self.every == 0 or trainer.global_step >= module.total:
            self.run(trainer, module)

    def run(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Evaluate now, and call ``on_scores`` of the other callbacks."""
        assert isinstance(module, StageModule)
        if module.detector is None or self.step == trainer.global_step:
            return
        module.check_weights()
        module.refresh()
        self.step = trainer.global_step
        if trainer.world_size > 1:  # running statistics differ between processes until the next step
            for buffer in module.detector.buffers():
                torch.distributed.broadcast(buffer, src=0)
        self.latest = self.evaluate(module.detector)
        best = self.latest.metrics["AP"] > self.best_ap
        self.best_ap = max(self.best_ap, self.latest.metrics["AP"])
        self.since_best = 0 if best else self.since_best + 1
        if 0 < self.patience <= self.since_best and trainer.global_step < module.total:
            self.stopped = trainer.should_stop = True
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Listener):
                callback.on_scores(trainer, module, self.latest, best)

    def state_dict(self) -> dict[str, Any]:
        """State for a resumed run: best AP, step and scores of the latest evaluation, and what early stopping counts."""
        latest = asdict(self.latest) if self.latest else None
        early = {"since_best": self.since_best, "stopped": self.stopped}
        return {"best_ap": self.best_ap, "step": self.step, "latest": latest, **early}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state from ``state_dict``."""
        self.best_ap, self.step = state_dict["best_ap"], state_dict["step"]
        self.latest = Scores(**state_dict["latest"]) if state_dict["latest"] else None
        self.since_best = state_dict.get("since_best", 0)  # checkpoints of earlier versions have neither
        self.stopped = state_dict.get("stopped", False)


class Listener(L.Callback):
    """A callback that is called after every evaluation."""

    def on_scores(self, trainer: L.Trainer, module: StageModule, scores: Scores, best: bool) -> None:
        """Called after each evaluation, on every process; ``best``: the AP is the highest of this stage so far."""


class Records(Listener):
    """Writes losses and scores to metrics.csv and to the other loggers."""

    def __init__(self, table: MetricsTable, every: int) -> None:
        """Write a row of losses to ``table`` every ``every`` optimizer steps."""
        self.table, self.every = table, every
        self._logged = 0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Do not log the step of the checkpoint again in a resumed run."""
        self._logged = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Log each ``every``-th optimizer step (with several batches per step: the losses of the last batch)."""
        assert isinstance(module, StageModule)
        step = trainer.global_step
        if not trainer.is_global_zero or module.last is None or step == self._logged:
            return
        watched = any(name.startswith(("share/", "balance/")) for name in module.last.monitors)
        if step % self.every and not watched and step != 1:
            return
        self._logged = step
        row = {f"train/{name}": float(term) for name, term in module.last.terms.items()}
        row = {"loss": sum(row.values())} | row
        row |= {name: float(value) for name, value in module.last.monitors.items()}
        self.write(trainer, module, row)

    def on_scores(self, trainer: L.Trainer, module: StageModule, scores: Scores, best: bool) -> None:
        """Log the 12 COCO numbers."""
        if trainer.is_global_zero:
            self.write(trainer, module, {f"val/{name}": value for name, value in scores.metrics.items()})

    def write(self, trainer: L.Trainer, module: StageModule, row: dict[str, float]) -> None:
        """Write a row for the current step; only for the main process."""
        rate = float(trainer.optimizers[0].param_groups[0]["lr"])
        base: dict[str, float | int | str] = {
            "stage": module.stage.name,
            "step": trainer.global_step,
            "total": module.total,
            "epoch": trainer.current_epoch,
        }
        self.table.add({**base, "lr": rate, "seconds": module.seconds, **row})
        for logger in trainer.loggers:
            assert isinstance(logger, Logger)
            logger.log_metrics({**row, "lr": rate}, step=trainer.global_step)


class Checkpoints(Listener):
    """Saves ``last.ckpt`` after each epoch (and every few steps) and ``best.ckpt`` at each new best AP, never half-written."""

    def __init__(self, folder: Path, every: int, saved: Callable[[], None] | None = None) -> None:
        """Save to ``folder`` after each epoch and every ``every`` optimizer steps; 0: after each epoch only.

        Args:
            folder: the folder of checkpoints.
            every: see above.
            saved: called in the main process after ``last.ckpt`` was saved.
        """
        self.folder, self.every, self.saved = folder, every, saved
        self._saved = 0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Do not save the step of the checkpoint again during the batches of the next step."""
        self._saved = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Save every ``every`` optimizer steps, except after the last step of an epoch.

        The checkpoint of that step is saved after the evaluation: a run resumed from a checkpoint before it would skip
        the evaluation, because Lightning takes the epoch as finished.
        """
        step = trainer.global_step
        assert isinstance(module, StageModule)
        ends_epoch = batch_idx + 1 == trainer.num_training_batches or step >= module.total
        if self.every and step % self.every == 0 and step != self._saved and not ends_epoch:
            self.save(trainer, module, "last.ckpt")

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Save after the evaluation of the epoch (this callback comes after ``Evaluation``)."""
        self.save(trainer, module, "last.ckpt")

    def on_scores(self, trainer: L.Trainer, module: StageModule, scores: Scores, best: bool) -> None:
        """Save ``best.ckpt`` at a new best AP."""
        if best:
            self.save(trainer, module, "best.ckpt")

    def save(self, trainer: L.Trainer, module: L.LightningModule, name: str) -> None:
        """Write the checkpoint under a temporary name and rename it. If this fails, the previous checkpoint is kept.

        Raises:
            NonFiniteLoss: the weights are not finite.
            RunError: the disk is full or not writable.
        """
        assert isinstance(module, StageModule)
        module.check_weights()
        self._saved = trainer.global_step
        path = self.folder / name
        temporary = path.with_suffix(".tmp")
        try:
            trainer.save_checkpoint(temporary, weights_only=False)
            if trainer.is_global_zero:
                replace_with_checksum(temporary, path)
        except (OSError, RuntimeError) as error:  # torch's zip writer reports a full disk as a RuntimeError
            temporary.unlink(missing_ok=True)
            kept = "the previous one is kept" if path.exists() else "there is no earlier one"
            raise RunError(f"cannot save {path}: {_reason(error)}; {kept}. Make space and continue with --resume true") from error
        if name == "last.ckpt" and self.saved is not None and trainer.is_global_zero:
            self.saved()


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).strip().splitlines()[0]
