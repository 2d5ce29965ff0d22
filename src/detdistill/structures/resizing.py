"""How images are resized before a detector sees them: the part of a run's settings that its student must be used with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Resizing:
    """Image size and resizing of evaluation and prediction, as the settings of a run name them."""

    size: int
    """Pixels: the long side (letterbox), both sides (stretch), or the short side (short_side)."""
    resize: str
    """``letterbox``, ``stretch`` or ``short_side``."""
    max_size: int | None = None
    """With ``short_side``: largest long side in pixels; None: no limit."""

    @staticmethod
    def of(settings: Any) -> Resizing:
        """Take the three values from settings that have them as attributes."""
        return Resizing(settings.size, settings.resize, settings.max_size)

    @staticmethod
    def from_plain(content: object) -> Resizing | None:
        """Read the form of ``plain``; None: ``content`` is not in this form."""
        if not isinstance(content, Mapping) or not {"size", "resize"} <= content.keys():
            return None
        return Resizing(content["size"], content["resize"], content.get("max_size"))

    def plain(self) -> dict[str, Any]:
        """The values by name, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        """In words, e.g. ``size 640, letterbox``."""
        return f"size {self.size}, {self.resize}" + ("" if self.max_size is None else f", max_size {self.max_size}")
