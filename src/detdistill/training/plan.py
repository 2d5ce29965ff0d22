"""What decides a run: student, data, settings, role and teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from detdistill.data.transforms import ViewSettings
from detdistill.settings import DistillSettings, TrainSettings, as_plain, names_where


@dataclass(frozen=True)
class Plan:
    """All that decides a run."""

    student: str
    data: str
    settings: TrainSettings
    role: str = "train"
    """train, teacher, baseline or distilled: what reports call it."""
    teacher: str | None = None
    title: str = ""
    """What the progress bar calls it."""

    @property
    def distilling(self) -> DistillSettings | None:
        """The settings of a distilled run, under a teacher, what one said, or a method that needs none."""
        known = self.teacher is not None or self.role == "distilled"
        return self.settings if isinstance(self.settings, DistillSettings) and (known or self.settings.cache) else None

    def config(self) -> dict[str, Any]:
        """What ``config.yaml`` holds: the arguments of ``detdistill train`` or ``detdistill distill``, all of them."""
        if self.distilling is None:
            plain = as_plain(self.settings)
            plain = {name: plain[name] for name in as_plain(TrainSettings())}
            return {"model": self.student, "data": self.data, "role": self.role, **plain}
        return {"teacher": self.teacher, "student": self.student, "data": self.data, **as_plain(self.settings)}


def view_settings(settings: TrainSettings, **changes: Any) -> ViewSettings:
    """How this run makes images."""
    return ViewSettings(**{**{name: getattr(settings, name) for name in names_where(TrainSettings, "views")}, **changes})
