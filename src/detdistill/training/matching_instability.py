"""Measurement of the instability of bipartite matching at every evaluation (``--instability N``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor

from detdistill.detectors.contract import Detector
from detdistill.evaluation.instability import instability, instability_of_layers
from detdistill.evaluation.scores import Scores
from detdistill.training.callbacks import Listener, Records
from detdistill.training.module import StageModule


class MatchingInstability(Listener):
    """Writes ``val/IS`` and ``val/IS_layers`` to metrics.csv; in a distributed run, only the main process measures.

    It draws no random numbers and changes no weight, so training is the same with and without it.
    """

    def __init__(self, vectors: Callable[[Detector], Tensor], records: Records) -> None:
        """``vectors`` computes the ``index_vectors`` [L, I, N] of a detector, always on the same images."""
        self.vectors, self.records = vectors, records
        self.before: Tensor | None = None
        """Index vectors of the previous evaluation; at first, those before training."""

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Compute the index vectors before the first step, for comparison with the first epoch."""
        assert isinstance(module, StageModule)
        if trainer.global_step == 0 and module.detector is not None:
            self.before = self.vectors(module.detector)

    def on_scores(self, trainer: L.Trainer, module: StageModule, scores: Scores, best: bool) -> None:
        """Compare with the previous evaluation, and store the index vectors for the next."""
        assert module.detector is not None
        now = self.vectors(module.detector)
        row = {"val/IS_layers": instability_of_layers(now)}
        # No comparison if the run was resumed with another number of images, or was not measured before.
        if self.before is not None and self.before.shape == now.shape:
            row = {"val/IS": instability(self.before, now)} | row
        self.before = now
        self.records.write(trainer, module, row)

    def state_dict(self) -> dict[str, Any]:
        """State for a resumed run: the index vectors of the latest evaluation."""
        return {"before": None if self.before is None else self.before.to(torch.int32)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state from ``state_dict``."""
        self.before = None if state_dict["before"] is None else state_dict["before"].cpu().long()
