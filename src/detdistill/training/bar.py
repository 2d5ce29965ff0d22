"""The progress bar of a training stage: loss terms, AP and remaining time."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Any

import lightning as L

from detdistill.evaluation.scores import Scores, points
from detdistill.progress import Progress
from detdistill.structures import Batch
from detdistill.training.callbacks import Listener
from detdistill.training.module import StageModule


class TrainingBar(Listener):
    """Shows smoothed losses and the latest AP beside the bar."""

    def __init__(self, progress: Progress, title: str, total: int) -> None:
        """Add a bar for a stage of ``total`` optimizer steps."""
        self.bar = progress.bar(title, total)
        self.smooth: dict[str, float] = {}
        self.ap = ""
        self._drawn = 0.0

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Redraw at most four times a second."""
        if not trainer.is_global_zero or time.monotonic() - self._drawn < 0.25:
            return
        self._drawn = time.monotonic()
        self.draw(trainer, module)

    def on_scores(self, trainer: L.Trainer, module: StageModule, scores: Scores, best: bool) -> None:
        """Print a line for each evaluation."""
        self.ap = f"AP {points(scores.metrics['AP'])}"
        if trainer.is_global_zero:
            self.draw(trainer, module)
            losses = " ".join(f"{name} {value:.3f}" for name, value in together(self.smooth).items())
            ap, ap50 = points(scores.metrics["AP"]), points(scores.metrics["AP50"])
            self.bar.say(f"epoch {trainer.current_epoch + 1}  AP {ap:>5}  AP50 {ap50:>5}{'  best' if best else ''}  {losses}")

    def draw(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Update the smoothed losses and redraw the bar."""
        assert isinstance(module, StageModule)
        if module.last is not None:
            for name, term in module.last.terms.items():
                value = float(term)
                self.smooth[name] = 0.8 * self.smooth.get(name, value) + 0.2 * value
        losses = " ".join(f"{name} {value:.2f}" for name, value in together(self.smooth).items())
        self.bar.update(trainer.global_step, f"{self.ap} {losses}".strip())


def together(terms: Mapping[str, float]) -> dict[str, float]:
    """The loss terms as a line shows them: a DETR repeats its losses for each layer and group, and these are one sum.

    ``metrics.csv`` and the report have every term.

    >>> together({"loss_bbox": 2.0, "loss_bbox_aux_0": 2.5, "loss_bbox_dn_0": 1.0, "pkd": 3.0})
    {'loss_bbox': 2.0, 'pkd': 3.0, 'auxiliary': 3.5}
    """
    shown: dict[str, float] = {}
    auxiliary = 0.0
    for name, value in terms.items():
        own = re.fullmatch(r"(.+?)_(?:(?:aux_|dn_|enc_)?\d+|dn|enc)", name)
        if own and own[1] in terms:
            auxiliary += value
        else:
            shown[name] = value
    return shown | ({"auxiliary": auxiliary} if len(shown) < len(terms) else {})
