"""Base classes: ``Movable`` (all tensors move together) and ``PerImage`` (split by image and stacked again)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self, TypeVar, cast

import torch
from torch import Tensor

T = TypeVar("T")


def map_tensors(value: T, change: Callable[[Tensor], Tensor]) -> T:
    """Return a copy of a (nested) structure with ``change`` applied to every tensor in it."""
    if isinstance(value, Tensor):
        return cast(T, change(value))
    if isinstance(value, tuple):
        return cast(T, tuple(map_tensors(item, change) for item in value))
    if isinstance(value, list):
        return cast(T, [map_tensors(item, change) for item in value])
    if isinstance(value, Mapping):
        return cast(T, {key: map_tensors(item, change) for key, item in value.items()})
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changed = {f.name: map_tensors(getattr(value, f.name), change) for f in dataclasses.fields(value) if f.init}
        return cast(T, replace(cast(Any, value), **changed))
    return value


class Movable:
    """A structure whose tensors move, detach and cast together."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Return a copy on a device; tensors that are already there are shared."""
        return map_tensors(self, lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def detach(self) -> Self:
        """Return a copy whose tensors are detached from the autograd graph."""
        return map_tensors(self, torch.Tensor.detach)

    def float(self) -> Self:
        """Return a copy with floating-point tensors in float32; float64, integers and masks are unchanged."""
        return map_tensors(self, lambda t: t.float() if t.is_floating_point() and t.dtype != torch.float64 else t)


SHARED = {"axis": None}
"""Metadata of a field that is the same for all images of the batch."""


SECOND = {"axis": 1}
"""Metadata of a field whose images lie along its second dimension."""
ADDED = {"omit_default": True}
"""Metadata of a field that was added after caches had been written: a record omits it while it has its default value."""


@dataclass(frozen=True)
class PerImage(Movable):
    """Base of data about a batch that can be split by image, stacked again, cast and saved.

    A field is a tensor with the images along its first dimension, a tuple of such tensors (one for each level), another
    ``PerImage``, or None. In a field marked ``SECOND`` the images lie along the second dimension. A field marked ``SHARED``
    is the same for all images.
    """

    def split(self, count: int) -> list[Self]:
        """Split into one structure for each of the ``count`` images; the dimension of the images is kept with length 1."""
        pieces: list[Self] = []
        for index in range(count):
            cut: dict[str, Any] = {}
            for f in dataclasses.fields(self):
                value = getattr(self, f.name)
                axis = f.metadata.get("axis", 0)
                cut[f.name] = value if axis is None else _cut(value, index, count, axis)
            pieces.append(replace(self, **cut))
        return pieces

    @classmethod
    def stack(cls, pieces: Sequence[Self]) -> Self:
        """Join the pieces of ``split`` again. Tensors that differ in size are zero-padded at their ends (maps: right, bottom)."""
        first = pieces[0]
        joined: dict[str, Any] = {}
        for f in dataclasses.fields(first):
            axis = f.metadata.get("axis", 0)
            values = [getattr(piece, f.name) for piece in pieces]
            joined[f.name] = values[0] if axis is None else _join(values, axis)
        return replace(first, **joined)


def _cut(value: Any, index: int, count: int, axis: int) -> Any:
    if isinstance(value, Tensor):
        return value.narrow(axis, index, 1)
    if isinstance(value, PerImage):
        return value.split(count)[index]
    if isinstance(value, tuple):
        return tuple(_cut(item, index, count, axis) for item in value)
    if value is None:
        return None
    raise TypeError(
        f"a {type(value).__name__} cannot be split by image; use tensors, tuples or PerImage, or mark the field SHARED"
    )


def _join(values: Sequence[Any], axis: int) -> Any:
    first = values[0]
    if isinstance(first, Tensor):
        if axis == 0 and len({tuple(value.shape[1:]) for value in values}) > 1:
            largest = [max(value.shape[dim] for value in values) for dim in range(first.ndim)]
            values = [_padded(value, largest) for value in values]
        return torch.cat(list(values), dim=axis)
    if isinstance(first, PerImage):
        return type(first).stack(values)
    if isinstance(first, tuple):
        return tuple(_join([value[i] for value in values], axis) for i in range(len(first)))
    return first


def _padded(value: Tensor, shape: Sequence[int]) -> Tensor:
    """Pad every dimension except the first at its end with zeros (False)."""
    missing = [(0, wanted - has) for has, wanted in zip(value.shape[1:], shape[1:], strict=True)]
    return torch.nn.functional.pad(value, [number for pair in reversed(missing) for number in pair])
