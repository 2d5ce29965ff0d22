"""The case that the checks examine: a planned run, its data and teacher, and the few batches and trials that they share."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from detdistill.cache.knowledge import KnowledgeSource
from detdistill.data.loader import DetectionLoader
from detdistill.data.records import DataSplits, DetectionSet
from detdistill.data.transforms import ViewSettings
from detdistill.detectors.contract import Teacher
from detdistill.doctor.findings import Table
from detdistill.doctor.trial import Course, Look, Trial
from detdistill.progress import Progress
from detdistill.settings import DistillSettings
from detdistill.structures import Batch
from detdistill.training.plan import Plan, view_settings
from detdistill.training.session import Session, open_session

LARGEST_BATCH = 4
"""Images per step of the trials; a run's larger batch would take longer and show the same."""
BATCHES = 8
"""Number of different batches of the trials."""


@dataclass(frozen=True)
class Probe:
    """The same few steps with and without distillation, from the same weights on the same batches."""

    alone: Course
    distilled: Course
    before: Look
    """Terms of the first batch before the first step, without the factors of ``--balance``."""
    middle: Look
    """The same in the middle of training by the clock, after every warm-up of a method."""
    after: Look
    """Terms of the first batch after the last step, with the factors of ``--balance``."""
    alone_names: tuple[str, ...]
    """Distillation terms that train only the method's own modules."""
    saved_bytes: int
    """Memory that a batch of the distilled student keeps for its backward pass."""


@dataclass(eq=False)
class Case:
    """A planned run, and what was found out about it so far."""

    plan: Plan
    splits: DataSplits
    teacher: Teacher | None
    """The loaded teacher; None: the method has none, or the run learns from a cache or a served teacher."""
    cache: KnowledgeSource | None
    known: Mapping[str, Any]
    """Image settings with which the teacher was trained (``size``, ``resize``, ``max_size``); empty: not known."""
    device: str
    images: int
    """Largest number of validation images for AP."""
    steps: int
    """Number of steps of each trial."""
    progress: Progress
    numbers: dict[str, Any] = field(default_factory=dict)
    tables: list[Table] = field(default_factory=list)
    seconds_per_image: float = 0.0
    """Time of reading and augmenting a training image; known after ``batches``."""

    @property
    def settings(self) -> DistillSettings:
        """Settings of the run."""
        assert isinstance(self.plan.settings, DistillSettings)
        return self.plan.settings

    def session(self, distilled: bool = True) -> Session:
        """A new session of the run, or of its baseline: both start from the same weights.

        Raises:
            DetdistillError: teacher, student and method cannot be used together; see ``open_session``.
        """
        if distilled:
            return open_session(self.plan, self.splits, self.teacher, self.cache)
        settings = replace(self.settings, cache=None, served=None, inherit=False)
        return open_session(replace(self.plan, settings=settings, role="baseline", teacher=None), self.splits)

    @functools.cached_property
    def views(self) -> ViewSettings:
        """Image settings of the run."""
        return view_settings(self.settings, masks=self.opened.student.spec.needs_masks)

    @functools.cached_property
    def opened(self) -> Session:
        """A session that is looked at, not trained.

        Raises:
            DetdistillError: as ``session``.
        """
        return self.session()

    @functools.cached_property
    def batches(self) -> list[Batch]:
        """Some training batches of at most ``LARGEST_BATCH`` images with boxes, as the run augments them, on the device."""
        train = self.splits.train
        chosen = [record for record in train.records if (~record.crowd).any()][: BATCHES * LARGEST_BATCH]
        data = DetectionSet.of(train.name, train.form, train.root, train.classes, chosen)
        size = min(self.settings.batch, LARGEST_BATCH)
        loader = DetectionLoader(data, self.views, size, train=True, seed=self.settings.seed)
        started = time.perf_counter()
        found = [batch for batch in itertools.islice(loader, BATCHES) if len(batch) == min(size, len(chosen))]
        self.seconds_per_image = (time.perf_counter() - started) / sum(map(len, found))
        return [batch.to(self.device) for batch in found]

    @functools.cached_property
    def probe(self) -> Probe:
        """Train with and without distillation for ``steps`` steps of the run's schedule."""
        bar = self.progress.bar("train for a few steps", 2)
        alone = Trial(self.session(distilled=False), self.device, self.steps).run(self.batches)
        bar.update(1)
        trial, first = Trial(self.session(), self.device, self.steps), self.batches[0]
        saved = trial.saved_bytes(first)
        before, middle = trial.look(first), trial.look(first, progress=0.5)
        course = trial.run(self.batches)
        bar.update(2)
        after = trial.look(first, balanced=True) if not course.broken else before
        return Probe(alone, course, before, middle, after, trial.trains_alone, saved)

    @functools.cached_property
    def by_heart(self) -> tuple[Course, Course]:
        """Train on one batch again and again at the peak learning rate: the student alone, and distilled."""
        bar = self.progress.bar("learn one batch by heart", 2)
        found = []
        for number, distilled in enumerate((False, True), start=1):
            trial = Trial(self.session(distilled), self.device, self.steps, constant=True)
            found.append(trial.run(self.batches[:1]))
            bar.update(number)
        return found[0], found[1]
