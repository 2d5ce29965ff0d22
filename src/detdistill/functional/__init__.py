"""The pure functions of all methods: tensors in, tensors out, usable in anybody's loop.

    from detdistill.functional import pkd_loss

A method's functions live in its own file, ``detdistill/methods/<slug>.py``; any name that begins with a slug is found
there, so a new method's functions are here without an edit.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any


def __getattr__(name: str) -> Any:
    folder = Path(__file__).parent.parent / "methods"
    slugs = sorted((path.stem for path in folder.glob("[a-z]*.py")), key=len, reverse=True)
    for slug in slugs:
        if name.startswith(f"{slug}_"):
            module = importlib.import_module(f"detdistill.methods.{slug}")
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"detdistill.functional has no {name!r}; methods with functions: {', '.join(sorted(slugs))}")
