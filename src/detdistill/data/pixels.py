"""Pixels as detectors get them, 8 bits a channel, and how much of that range an image uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from detdistill.errors import subject

Item = TypeVar("Item")

FAULTS = (OSError, EOFError, ValueError, SyntaxError, Image.DecompressionBombError)
"""What PIL raises for a broken file."""
NARROW = 64
"""An image whose brightest and darkest level differ by less uses too few of the 256 levels."""
LOOKS = 24
"""Images of a set that are decoded to judge its range."""


def is_deep(mode: str) -> bool:
    """True for greys of more than 8 bits: integers of 16 or 32 bits, and floats."""
    return mode.startswith("I") or mode == "F"


def eight_bits(image: Image.Image) -> Image.Image:
    """Convert 16-bit grey to 8 bits: 65535 becomes 255. 32-bit integers count as 16-bit ones; floats are cut to 0..255."""
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    return image


@dataclass(frozen=True)
class Range:
    """Darkest and brightest value of an image."""

    low: int
    high: int
    """Of 255, over all channels, as a detector gets them."""
    colour: tuple[int, ...] | None = None
    """Red, green and blue of an image of one colour."""
    deep: tuple[float, float] | None = None
    """The same of the file's own values, for greys of more than 8 bits."""

    @property
    def narrow(self) -> bool:
        """True if too few levels are used."""
        return self.high - self.low < NARROW


def look(image: Image.Image) -> Range:
    """The range of an opened image; only where a few of its pixels look too alike are all of them compared."""
    deep = None
    if is_deep(image.mode):
        values = np.asarray(image)
        deep = float(np.nanmin(values)), float(np.nanmax(values))
        image = eight_bits(image)
    for size in ((64, 64), None):
        part = image if size is None else image.resize(size, Image.Resampling.NEAREST)
        extremes = part.convert("RGB").getextrema()
        lows, highs = zip(*extremes, strict=True)
        if max(highs) - min(lows) >= NARROW:
            break
    return Range(min(lows), max(highs), tuple(lows) if lows == highs else None, deep)


def look_at(path: Path) -> Range | None:
    """The range of an image file; None if it cannot be decoded."""
    try:
        with Image.open(path) as image:
            image.draft("RGB", (256, 256))  # JPEG is decoded at a fraction of its size
            return look(image)
    except FAULTS:
        return None


def some(items: Sequence[Item], most: int = LOOKS) -> list[Item]:
    """At most ``most`` items, evenly spaced."""
    return [items[round(place)] for place in np.linspace(0, len(items) - 1, min(most, len(items)))]


def low_range(paths: Sequence[Path]) -> str:
    """Say how few levels the deep greys of a set use, judged by some of them; an empty text if they use enough.

    Args:
        paths: image files with greys of more than 8 bits.
    """
    seen = [found for path in some(paths) if (found := look_at(path)) is not None]
    own = [value for found in seen for value in found.deep or ()]
    if not own:
        return ""
    low, high = min(found.low for found in seen), max(found.high for found in seen)
    if high - low >= NARROW:
        return ""
    return (
        f"{subject(len(paths), 'image', 'have')} greys of more than 8 bits with values from {min(own):g} to {max(own):g}: a "
        f"detector gets {high - low + 1} of 256 levels, because 16-bit greys are divided by 256 and floats are cut to 0..255; "
        "stretch all images alike to the full range"
    )
