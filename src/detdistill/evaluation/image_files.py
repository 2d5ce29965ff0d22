"""Find, decode and convert the images that a detector is to see: files, folders, and images in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from detdistill.data.loader import read_image
from detdistill.data.pixels import eight_bits
from detdistill.errors import DataError

NOT_DECODED = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"})
"""Formats that Pillow recognises, but cannot decode by itself."""
VIDEOS = frozenset({".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv"})
NO_VIDEOS = "no video reader is installed; extract the frames into a folder, e.g. `ffmpeg -i FILE frames/%06d.jpg`"


@dataclass(frozen=True)
class FoundFiles:
    """The images of a folder, and the number of files that are no images."""

    paths: tuple[Path, ...]
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Number of files by lower-case suffix (``.txt``), most frequent first; ``no suffix`` and ``hidden`` are keys too."""

    def __str__(self) -> str:
        """The files that were left out, in one line; empty if there are none."""
        if not self.left_out:
            return ""
        counts = ", ".join(f"{count} {kind}" for kind, count in self.left_out.items())
        videos = f" ({NO_VIDEOS})" if VIDEOS & set(self.left_out) else ""
        count = sum(self.left_out.values())
        which = "1 file that is no image" if count == 1 else f"{count} files that are no images"
        return f"left out {which} Pillow can open: {counts}{videos}"


@cache
def image_suffixes() -> frozenset[str]:
    """Suffixes of the formats that the installed Pillow, with the plugins that were registered, can decode."""
    known = Image.registered_extensions()
    return frozenset(suffix for suffix, form in known.items() if form in Image.OPEN and form not in NOT_DECODED)


def find_images(images: Path, out: Path | None = None) -> FoundFiles:
    """List an image, or all images of a folder and its sub-folders except earlier drawings in ``out``.

    Raises:
        DataError: ``images`` does not exist, is a video, or holds no image.
    """
    if images.is_file():
        if images.suffix.lower() in VIDEOS:
            raise DataError(f"{images}: {NO_VIDEOS}")
        return FoundFiles((images,))
    if not images.is_dir():
        raise DataError(f"{images}: there is no such file or folder")
    drawn = None if out is None else out.resolve()
    files = sorted(path for path in images.rglob("*") if path.is_file() and drawn not in path.resolve().parents)
    paths, others = [], Counter[str]()
    for path in files:
        if path.name.startswith("."):
            others["hidden"] += 1
        elif path.suffix.lower() in image_suffixes():
            paths.append(path)
        else:
            others[path.suffix.lower() or "no suffix"] += 1
    found = FoundFiles(tuple(paths), dict(others.most_common()))
    if not paths:
        raise DataError(f"{images}: no images in it; give an image or a folder of images" + (f"; {found}" if others else ""))
    return found


def drawing_names(paths: Sequence[Path], images: Path) -> list[Path]:
    """Path of each drawing relative to the output folder; all paths are different."""
    inside = [relative_name(path, images) for path in paths]
    plain = [path.with_suffix(".jpg") for path in inside]
    counts = Counter(plain)
    return [name if counts[name] == 1 else path.with_name(f"{path.name}.jpg") for name, path in zip(plain, inside, strict=True)]


def relative_name(path: Path, images: Path) -> Path:
    """Path of an image inside the folder ``images``; its name if ``images`` is the image itself."""
    return path.relative_to(images) if path != images else Path(path.name)


def decode(path: Path) -> Tensor:
    """Decode an image file: [3, h, w] uint8 RGB. Of a file with several frames, the first one.

    Raises:
        DataError: the file cannot be decoded.
    """
    if not path.exists():
        raise DataError(f"{path}: there is no such file")
    try:
        return read_image(path)
    except Exception as error:  # for broken files, Pillow's plugins raise errors of many kinds: struct's, index errors
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: the image cannot be decoded ({reason}); remove or replace it") from error


def as_pixels(image: Any) -> Tensor:
    """Convert an image to [3, h, w] uint8 RGB.

    Args:
        image: a path; a PIL image; an array [h, w], [h, w, 3] RGB or [h, w, 4] RGBA of uint8; a tensor [3, h, w] RGB of uint8,
            or of floats in 0..1.

    Raises:
        DataError: the file cannot be decoded, or the object is no image of these forms.
    """
    if isinstance(image, str | Path):
        return decode(Path(image))
    if isinstance(image, np.ndarray):
        return _of_array(image)
    if isinstance(image, Image.Image):
        return torch.from_numpy(np.array(eight_bits(image).convert("RGB"))).permute(2, 0, 1).contiguous()
    if isinstance(image, Tensor):
        return _of_tensor(image)
    raise DataError(f"a {type(image).__name__} is no image; give a path, a PIL image, an array [h, w, 3] or a tensor [3, h, w]")


def _of_array(image: np.ndarray) -> Tensor:
    shape = list(image.shape)
    if image.dtype != np.uint8 or not (image.ndim == 2 or (image.ndim == 3 and shape[2] in (3, 4))) or 0 in shape:
        raise DataError(f"an array {shape} of {image.dtype} is no image; give uint8 of shape [h, w], [h, w, 3] or [h, w, 4]")
    pixels = torch.from_numpy(np.ascontiguousarray(image))
    if pixels.ndim == 2:
        return pixels.expand(3, -1, -1).contiguous()
    return pixels[..., :3].permute(2, 0, 1).contiguous()


def _of_tensor(image: Tensor) -> Tensor:
    shape = list(image.shape)
    if image.ndim != 3 or shape[0] != 3 or 0 in shape:
        advice = f"; give {shape[0]} images as a list" if image.ndim == 4 else ""
        raise DataError(f"a tensor {shape} is no image; give [3, h, w] RGB{advice}")
    image = image.detach().cpu()
    if image.dtype == torch.uint8:
        return image.contiguous()
    if not image.is_floating_point():
        raise DataError(f"a tensor of {image.dtype} is no image; give uint8, or floats in 0..1")
    low, high = float(image.min()), float(image.max())
    if not (low >= 0 and high <= 1):  # also False for NaN
        raise DataError(f"a tensor of floats from {low:g} to {high:g} is no image; floats must be in 0..1, not normalised")
    return (image.float() * 255).round().to(torch.uint8)
