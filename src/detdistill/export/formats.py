"""Exported files by their names; nothing is loaded for it."""

from __future__ import annotations

from pathlib import Path

SUFFIXES = {".onnx": "onnx", ".xml": "openvino", ".torchscript": "torchscript", ".pt2": "pt2"}
"""Format of a file by its suffix."""


def is_file(name: str | Path) -> bool:
    """Whether a model's name is the path of an exported file."""
    path = Path(name)
    return path.suffix in SUFFIXES and path.is_file()
