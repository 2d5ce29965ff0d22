"""Versions of what affects results, on this machine."""

from __future__ import annotations

import functools
import platform
from importlib.metadata import PackageNotFoundError, version

NAMES = ("detdistill", "torch", "torchvision", "timm", "lightning", "faster-coco-eval", "numpy")
OPTIONAL = ("transformers", "ultralytics", "libreyolo")
"""Packages whose detectors can be trained, where they are installed."""


@functools.cache
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that affect results; read once in a process."""
    return {"python": platform.python_version(), **{name: version(name) for name in NAMES}}


def versions_of_all() -> dict[str, str]:
    """``versions`` and those of the optional packages that are installed."""
    found = dict(versions())
    for name in OPTIONAL:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
