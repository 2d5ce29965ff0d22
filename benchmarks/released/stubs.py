"""Load single files of released code: everything else that they import is an empty stand-in.

A loss of released code imports a framework (mmcv, mmdet, detectron2, ...) for a registry, a base class or a decorator. Here each
such name is a stand-in: a decorator that returns what it is given, a module without parameters as a base class. Only the files
named in ``Source.files`` are executed. A process loads one source, so that forks of one framework do not meet.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

FRAMEWORKS = [
    "AdelaiDet",
    "adet",
    "cvpods",
    "detectron2",
    "fcos_core",
    "fvcore",
    "kornia",
    "mmcv",
    "mmdet",
    "mmengine",
    "mmrazor",
    "model",
    "models",
    "pycocotools",
    "todd",
    "tools",
    "up",
    "utils",
]
"""First parts of the names of modules that are stand-ins unless a source names their file."""


@dataclass(frozen=True)
class Source:
    """Files of one repository that are executed for a comparison."""

    repository: str
    """``owner/name`` on GitHub."""
    commit: str
    files: dict[str, str] = field(default_factory=dict)
    """Name of a module: path of its file in the repository."""
    installed: tuple[str, ...] = ()
    """First parts of names that are taken from packages in FOLDER/site instead of stand-ins."""

    @property
    def folder(self) -> str:
        """Name of the repository's folder below that of ``--released``."""
        return self.repository.replace("/", "+")


class _Kind(type):
    """Class of the stand-in classes: any attribute is a stand-in, and a call with one function or class returns it."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return stand_in(name)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if "stand_in" in cls.__dict__ and len(args) == 1 and not kwargs and callable(args[0]):
            return args[0]
        return super().__call__(*args, **kwargs)


class _StandIn(nn.Module, metaclass=_Kind):
    """Base class, decorator or object that does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def init_weights(self, *args: Any, **kwargs: Any) -> None:
        """Initialise nothing."""

    @staticmethod
    def register_module(*args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """As a registry: a decorator that registers nothing."""
        return _StandIn()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As a decorator: what it is given."""
        return args[0] if args else self


def stand_in(name: str) -> type:
    """A new stand-in class; each is its own, since a class cannot have one base twice."""
    return _Kind(name, (_StandIn,), {"stand_in": True})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, source: Source, folder: Path) -> None:
        self.files = {name: folder / source.folder / path for name, path in source.files.items()}
        self.first = {*FRAMEWORKS, *(name.split(".")[0] for name in self.files)} - set(source.installed)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name in self.files:
            return importlib.util.spec_from_file_location(name, self.files[name])
        if name.split(".")[0] not in self.first:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: Any) -> ModuleType:
        module = ModuleType(spec.name)
        known: dict[str, Any] = {}

        def attribute(wanted: str) -> Any:
            if wanted == "__all__":  # a star import takes nothing
                return []
            if wanted.startswith("__"):
                raise AttributeError(wanted)
            return known.setdefault(wanted, stand_in(wanted))

        module.__getattr__ = attribute  # type: ignore[method-assign]
        return module

    def exec_module(self, module: ModuleType) -> None:
        """A stand-in has no code."""


def load(source: Source, folder: Path, *names: str) -> Sequence[ModuleType]:
    """Execute the named modules of a source (and what they import from its other files).

    Args:
        source: what to load.
        folder: that of ``--released``; the repository lies in ``owner+name`` below it.
        names: modules of ``source.files`` to return; none: all, in their order.
    """
    sys.path.insert(0, str(folder / "site"))
    sys.meta_path.insert(0, _Finder(source, folder))
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]  # released code moves what it makes
    nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    return [importlib.import_module(name) for name in (names or source.files)]
