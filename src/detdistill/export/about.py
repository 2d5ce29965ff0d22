"""The description in an exported file: the images it takes, its classes, and the choice of detections."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from detdistill.detectors.contract import DetectorSpec
from detdistill.errors import ModelError
from detdistill.export.selection import Rule

KEY = "detdistill"
"""Name of the entry in a file's metadata; its value is JSON."""


@dataclass(frozen=True)
class About:
    """Description inside an exported file."""

    spec: DetectorSpec
    rule: Rule
    size: int
    """Side of the input images in pixels, in the sense of ``resize``."""
    resize: str
    """letterbox, stretch or short_side."""
    max_size: int | None
    canvas_hw: tuple[int, int]
    """Height and width of the image tensor at ``size``; the only ones if ``free`` lacks "size"."""
    free: tuple[str, ...]
    """What may differ: "batch", "size". Without "batch" the file takes one image at a time."""
    outputs: tuple[str, ...]
    format: str
    opset: int | None = None
    int8: bool = False
    multiple: int = 32
    """Height and width must be multiples of this."""
    versions: Mapping[str, str] = field(default_factory=dict)
    origin: Mapping[str, Any] | None = None
    """``card.Origin`` of the detector as JSON: the run that trained it; None: unknown."""

    def to_text(self) -> str:
        """The description as JSON text."""
        return json.dumps({**asdict(self), "rule": self.rule.to_plain(), "input": INPUT}, indent=1)

    @staticmethod
    def from_text(text: str, where: object) -> About:
        """Read the JSON text of a file.

        Raises:
            ModelError: the text is no such description.
        """
        try:
            content: dict[str, Any] = dict(json.loads(text))
            content.pop("input", None)
            content["spec"] = DetectorSpec.from_plain(content["spec"])
            content["rule"] = Rule.from_plain(content["rule"])
            values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in content.items()}
            return About(**values)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{where}: its description cannot be read ({error}); export the model again") from error


INPUT = {
    "images": "[B, 3, H, W] float32 RGB in 0..1, zero-padded on the right and at the bottom; the file normalises",
    "sizes": "[B, 2] int64 height and width of each image inside the padding",
}
"""The inputs in words, for readers of the metadata."""
