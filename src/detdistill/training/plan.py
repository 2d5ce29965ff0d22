"""The plan of a run: student, data, settings, role and teacher."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from detdistill.cache.storage import masked
from detdistill.data.transforms import ViewSettings
from detdistill.detectors.contract import Detector
from detdistill.settings import DistillSettings, TrainSettings, as_plain, names_where


@dataclass(frozen=True)
class Plan:
    """Student, data, settings, role and teacher of a run."""

    student: str
    data: str
    settings: TrainSettings
    role: str = "train"
    """Role in reports: train, teacher, baseline or distilled."""
    teacher: str | None = None
    title: str = ""
    """Name on the progress bar; empty: the role."""
    build: Callable[[], Detector] | None = field(default=None, repr=False, compare=False)
    """Builds the student, for a model that was given in Python; None: it is built from the model string ``student``."""

    @property
    def distilling(self) -> DistillSettings | None:
        """The settings if the run is distilled (from a teacher, wherever it is, or by a method without one), otherwise None."""
        known = self.teacher is not None or self.role == "distilled"
        return (
            self.settings
            if isinstance(self.settings, DistillSettings) and (known or self.settings.cache or self.settings.served)
            else None
        )

    def config(self) -> dict[str, Any]:
        """Content of ``config.yaml``: all arguments of ``detdistill train`` or ``detdistill distill``, passwords hidden."""
        return {name: masked(value) if isinstance(value, str) else value for name, value in self.arguments().items()}

    def arguments(self) -> dict[str, Any]:
        """All arguments of ``detdistill train`` or ``detdistill distill``, with the passwords of URLs."""
        if self.distilling is None:
            plain = as_plain(self.settings)
            plain = {name: plain[name] for name in as_plain(TrainSettings())}
            return {"model": self.student, "data": self.data, "role": self.role, **plain}
        return {"teacher": self.teacher, "student": self.student, "data": self.data, **as_plain(self.settings)}


def view_settings(settings: TrainSettings, **changes: Any) -> ViewSettings:
    """The image settings of a run, with ``changes``."""
    own = {name: getattr(settings, name) for name in names_where(TrainSettings, "views")}
    return ViewSettings(**{**own, "teacher_size": getattr(settings, "teacher_size", None), **changes})
