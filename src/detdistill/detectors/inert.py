"""Read checkpoints that hold pickled objects, without importing or running anything that the file names.

Tensors and plain values are read as themselves. Every other class or function in the file becomes a stand-in that does nothing:
it remembers its name, and an object its arguments and its state. So the weights of a pickled network can be collected by
``state_of`` although its class is never imported.
"""

from __future__ import annotations

import _codecs
import collections
import pickle
import types
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from detdistill.errors import ModelError


class Inert:
    """Stand-in for an object of a class that is not imported."""

    named = ""
    """Module and name of the class or function that the file names, e.g. ``torch.nn.modules.conv.Conv2d``."""

    def __new__(cls, *arguments: Any, **_: Any) -> Inert:
        """Remember the arguments."""
        one = object.__new__(cls)
        one.__dict__.update(arguments=arguments, state={}, items=[])
        return one

    def __init__(self, *_: Any, **__: Any) -> None:
        """Take any arguments."""

    def __setstate__(self, state: Any) -> None:
        """Remember the state."""
        self.__dict__["state"] = state

    def __call__(self, *arguments: Any, **_: Any) -> Inert:
        """The result of a function that is not run."""
        return Inert(*arguments)

    def __hash__(self) -> int:
        return id(self)

    def append(self, item: Any) -> None:
        """Remember an item of a list or set."""
        self.__dict__["items"].append(item)

    add = append

    def extend(self, items: Any) -> None:
        """Remember items of a list or set."""
        self.__dict__["items"].extend(items)

    update = extend

    def __setitem__(self, key: Any, value: Any) -> None:
        self.__dict__["items"].append((key, value))


def _rebuilt(kind: Any, *_: Any) -> Any:
    """What the oldest pickle protocols build objects with."""
    return kind() if isinstance(kind, type) and issubclass(kind, Inert) else Inert()


_PLAIN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor"): torch._utils._rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    ("torch", "Size"): torch.Size,
    ("_codecs", "encode"): _codecs.encode,
    ("copyreg", "_reconstructor"): _rebuilt,
    ("copy_reg", "_reconstructor"): _rebuilt,
    **{
        (module, kind.__name__): kind
        for module in ("builtins", "__builtin__")  # the second in older protocols
        for kind in (set, frozenset, list, dict, tuple, int, float, bool, str, bytes, complex)
    },
    **{("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
}
"""The only names of a file that are looked up: they build tensors and plain values, and have no other effect."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = _PLAIN.get((module, name))
        if found is not None:
            return found
        return type(name.rpartition(".")[2] or "Inert", (Inert,), {"named": f"{module}.{name}"})


def _load(file: BinaryIO, **options: Any) -> Any:
    return _Unpickler(file, **options).load()


_pickle: Any = types.ModuleType("inert_pickle", "The part of ``pickle`` that ``torch.load`` uses.")
_pickle.Unpickler, _pickle.load, _pickle.UnpicklingError = _Unpickler, _load, pickle.UnpicklingError


def read_inert(path: Path) -> Any:
    """Read a file that ``torch.save`` wrote.

    Args:
        path: a .pt or .pth file.

    Returns:
        The content: tensors on the CPU, plain values, lists and dicts, and ``Inert`` for every other object.

    Raises:
        ModelError: the file is missing, damaged, or a TorchScript archive.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                    raise ModelError(
                        f"{path}: is a TorchScript archive, which holds no model that can be trained; give its .pt file"
                    )
        return torch.load(path, map_location="cpu", weights_only=False, pickle_module=_pickle)
    except ModelError:
        raise
    except FileNotFoundError as error:
        raise ModelError(f"{path}: there is no such file") from error
    except Exception as error:  # torch and pickle raise errors of many kinds for files that are cut, changed or something else
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"{path}: cannot be read as a checkpoint of torch ({reason}); is it complete?") from error


def state_of(module: Inert) -> dict[str, Tensor]:
    """Parameters and persistent buffers of a pickled ``torch.nn.Module``, by their names in its state dict."""
    return dict(_tensors(module, ""))


def _tensors(module: Inert, prefix: str) -> Iterator[tuple[str, Tensor]]:
    state = module.__dict__["state"]
    if not isinstance(state, dict):
        return
    passing = state.get("_non_persistent_buffers_set") or ()
    for group in ("_parameters", "_buffers"):
        for name, tensor in dict(state.get(group) or {}).items():
            if isinstance(tensor, Tensor) and not (group == "_buffers" and name in passing):
                yield prefix + name, tensor.detach()
    for name, child in dict(state.get("_modules") or {}).items():
        if isinstance(child, Inert):
            yield from _tensors(child, f"{prefix}{name}.")
