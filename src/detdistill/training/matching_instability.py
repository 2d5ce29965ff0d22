"""The instability of bipartite matching, measured beside every evaluation (``--instability N``)."""

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
    """``val/IS`` and ``val/IS_layers`` into metrics.csv; of a distributed run, the main process measures alone.

    Draws no random numbers and touches no weight: a run with it trains what the run without it trains.
    """

    def __init__(self, vectors: Callable[[Detector], Tensor], records: Records) -> None:
        """``vectors`` gives a detector's ``index_vectors`` [L, I, N], always on the same images."""
        self.vectors, self.records = vectors, records
        self.before: Tensor | None = None
        """Those of the evaluation before; at first those before training."""

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Before the first step, so that there is something to compare the first epoch with."""
        assert isinstance(module, StageModule)
        if trainer.global_step == 0 and module.detector is not None:
            self.before = self.vectors(module.detector)

    def on_scores(self, trainer: L.Trainer, module: StageModule, scores: Scores, best: bool) -> None:
        """Compare with the evaluation before, and remember."""
        assert module.detector is not None
        now = self.vectors(module.detector)
        row = {"val/IS_layers": instability_of_layers(now)}
        # Not where a run was resumed with another number of images, or without any number before.
        if self.before is not None and self.before.shape == now.shape:
            row = {"val/IS": instability(self.before, now)} | row
        self.before = now
        self.records.write(trainer, module, row)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know."""
        return {"before": None if self.before is None else self.before.to(torch.int32)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See ``state_dict``."""
        self.before = None if state_dict["before"] is None else state_dict["before"].cpu().long()
