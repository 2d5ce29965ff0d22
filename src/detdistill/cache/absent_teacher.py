"""Stand-in for a teacher that is not loaded: its description alone, enough for methods that read its knowledge from a cache."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NoReturn

from detdistill.cache.storage import CacheError
from detdistill.detectors.contract import FEATURES, Detector, DetectorSpec, Teacher
from detdistill.functional.query_seeds import QuerySpec
from detdistill.structures import (
    Assignment,
    Batch,
    Detections,
    Features,
    Look,
    Losses,
    Observation,
    Positives,
    Prediction,
    Resizing,
)


class SpecOnly(Detector):
    """A detector with a description but without weights; every method raises ``CacheError``."""

    def __init__(self, spec: DetectorSpec, served: bool) -> None:
        super().__init__()
        self.spec, self.served = spec, served

    def _refuse(self) -> NoReturn:
        there, flag = ("with this run", "--served") if self.served else ("in the cache", "--cache")
        raise CacheError(
            f"teacher {self.spec.name}: only its description is {there}, and this method runs the teacher itself; "
            f"give the teacher too (--teacher), or train online (without {flag})"
        )

    def features(self, batch: Batch) -> Features:
        """Raise ``CacheError``."""
        self._refuse()

    def predict(self, features: Features, batch: Batch) -> Prediction:
        """Raise ``CacheError``."""
        self._refuse()

    def assign(self, prediction: Prediction, batch: Batch) -> Assignment:
        """Raise ``CacheError``."""
        self._refuse()

    def loss(self, prediction: Prediction, batch: Batch, assignment: Assignment | None = None) -> Losses:
        """Raise ``CacheError``."""
        self._refuse()

    def detect(self, prediction: Prediction, batch: Batch) -> list[Detections]:
        """Raise ``CacheError``."""
        self._refuse()

    def positives(self, prediction: Prediction, assignment: Assignment, batch: Batch) -> Positives:
        """Raise ``CacheError``."""
        self._refuse()

    def export(self, folder: Path, resizing: Resizing | None = None) -> None:
        """Raise ``CacheError``."""
        self._refuse()


class AbsentTeacher(Teacher):
    """A teacher with the ``spec`` and ``fingerprint`` of the real one; it cannot be observed."""

    present = False

    def __init__(self, spec: DetectorSpec, fingerprint: str, served: bool = False) -> None:
        """Describe a teacher.

        Args:
            spec: its properties.
            fingerprint: of its weights.
            served: it runs in another process, which answers this one; False: there is a cache of its knowledge.
        """
        super().__init__(SpecOnly(spec, served))
        self.fingerprint = fingerprint

    @functools.cached_property
    def queries(self) -> QuerySpec:
        """Description of the teacher's queries, as stored in the cache.

        Raises:
            CacheError: the cache has no such description.
        """
        if self.spec.queries is None:
            raise CacheError(
                f"teacher {self.spec.name}: the cache has no description of its queries, because the cache is from an earlier "
                f"version or the teacher has no queries; make the cache again, or give the teacher too (--teacher)"
            )
        return self.spec.queries

    def observe(self, batch: Batch, look: Look = FEATURES) -> Observation:
        """Raise ``CacheError``.

        Raises:
            CacheError: always.
        """
        assert isinstance(self.detector, SpecOnly)
        self.detector._refuse()
