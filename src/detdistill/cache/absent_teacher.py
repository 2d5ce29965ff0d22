"""A teacher of which only the description is here: enough for methods that read what it said from a cache."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NoReturn

from detdistill.cache.storage import CacheError
from detdistill.detectors.contract import FEATURES, Detector, DetectorSpec, Teacher
from detdistill.functional.query_seeds import QuerySpec
from detdistill.structures import Assignment, Batch, Detections, Features, Look, Losses, Observation, Positives, Prediction


class SpecOnly(Detector):
    """A detector without weights; asking it anything is an error."""

    def __init__(self, spec: DetectorSpec) -> None:
        super().__init__()
        self.spec = spec

    def _refuse(self) -> NoReturn:
        raise CacheError(
            f"teacher {self.spec.name}: only its description is in the cache, and this method runs the teacher itself; "
            f"give the teacher too (--teacher), or train online (without --cache)"
        )

    def features(self, batch: Batch) -> Features:
        """An error."""
        self._refuse()

    def predict(self, features: Features, batch: Batch) -> Prediction:
        """An error."""
        self._refuse()

    def assign(self, prediction: Prediction, batch: Batch) -> Assignment:
        """An error."""
        self._refuse()

    def loss(self, prediction: Prediction, batch: Batch, assignment: Assignment | None = None) -> Losses:
        """An error."""
        self._refuse()

    def detect(self, prediction: Prediction, batch: Batch) -> list[Detections]:
        """An error."""
        self._refuse()

    def positives(self, prediction: Prediction, assignment: Assignment, batch: Batch) -> Positives:
        """An error."""
        self._refuse()

    def export(self, folder: Path) -> None:
        """An error."""
        self._refuse()


class AbsentTeacher(Teacher):
    """Its ``spec`` and ``fingerprint`` are the real teacher's; it cannot be observed."""

    present = False

    def __init__(self, spec: DetectorSpec, fingerprint: str) -> None:
        super().__init__(SpecOnly(spec))
        self.fingerprint = fingerprint

    @functools.cached_property
    def queries(self) -> QuerySpec:
        """What the teacher's queries are made of, as the cache says.

        Raises:
            CacheError: it does not.
        """
        if self.spec.queries is None:
            raise CacheError(
                f"teacher {self.spec.name}: the cache does not say what its queries are made of, because it was made by an "
                f"earlier version or of another kind of detector; make it anew, or give the teacher too (--teacher)"
            )
        return self.spec.queries

    def observe(self, batch: Batch, look: Look = FEATURES) -> Observation:
        """An error.

        Raises:
            CacheError: always.
        """
        assert isinstance(self.detector, SpecOnly)
        self.detector._refuse()
