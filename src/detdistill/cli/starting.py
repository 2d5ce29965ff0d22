"""What comes before a command's heavy imports, which take seconds: paths that are not there, and a word to the terminal."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

from jsonargparse import Namespace

from detdistill.errors import DataError, no_model

LIGHT = ("compare", "methods", "detectors", "recipes", "cite", "data-inspect", "push")
"""Commands that often do without torch."""
MODELS = ("model", "models", "teacher", "student")


def check_paths(chosen: Namespace) -> None:
    """Refuse models and images whose path does not exist. Names of other forms are left to the command.

    A teacher may be elsewhere if its cache is here, if it is served, and if the runs take place on a cluster.

    Raises:
        ModelError: a model is written as a path, and there is nothing.
        DataError: the images are not there.
    """
    absent = chosen.get("cache") or chosen.get("served") or chosen.get("on", "local") != "local"
    for key in MODELS:
        given = None if key == "teacher" and absent else chosen.get(key)
        for name in given if isinstance(given, list) else [given]:
            if isinstance(name, str) and os.sep in name and not any(mark in name for mark in ":=,@") and not os.path.exists(name):
                raise no_model(name)
    images = chosen.get("images")
    if isinstance(images, Path) and not images.exists():
        raise DataError(f"{images}: there is no such file or folder")


def load_torch(verb: str) -> None:
    """Import torch for a command that needs it, and show on a terminal meanwhile that something happens."""
    if verb in LIGHT or "torch" in sys.modules or not sys.stderr.isatty():
        return
    sys.stderr.write("loading PyTorch ...")
    sys.stderr.flush()
    try:
        for name in ("torch", "torchvision"):
            importlib.import_module(name)
    finally:
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()
