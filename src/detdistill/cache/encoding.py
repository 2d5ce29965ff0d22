"""Encoding of the knowledge about one image as bytes and a layout, and decoding.

The layout is text: the nesting of the structure, and the name, type and shape of each tensor in the order of the bytes.
Images of the same size have the same layout, so a shard stores each layout only once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from detdistill.structures import Movable

Store = Literal["float32", "float16", "bfloat16", "int8", "int6"]
"""Number format of stored floating-point tensors. Integers, masks and boxes are always exact."""
STORES: tuple[Store, ...] = get_args(Store)
STEPS: dict[Store, int] = {"int8": 127, "int6": 31}
"""Number of quantisation steps from 0 to the largest absolute value of a row."""
DEFLATED: tuple[Store, ...] = ("int6",)
"""Stores with compressed records: small integers occupy whole bytes, but only a few values are frequent."""

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Names of the types in safetensors files."""
BY_NAME = {name: dtype for dtype, name in DTYPES.items()}

EXACT = ("xyxy", "cxcywh", "boxes", "reference")
"""Floating-point fields with one of these words in their name hold coordinates; these are stored exactly."""
LARGEST_HALF = torch.finfo(torch.float16).max
_PACKAGE = re.compile(r"detdistill\.structures(?=\.)|detdistill\.methods\.(?!shared\.)\w+(?=\.)")
"""Packages that name a class in records; the file inside the package does not enter the name."""


@dataclass(frozen=True)
class Slot:
    """One tensor of a record."""

    name: str
    stored: str
    shape: tuple[int, ...]
    original: str
    """Type before encoding, restored by decoding (except: float16, bfloat16, int8 and int6 are decoded to float32)."""
    scales: int = -1
    """Index of the slot with the scale of each row (int8 and int6 only); -1: no scales."""

    @property
    def nbytes(self) -> int:
        """Size of the tensor in the record, in bytes."""
        count = BY_NAME[self.stored].itemsize
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True)
class Encoded:
    """A record, ready to be written."""

    layout: str
    data: bytes


def encode(value: Any, store: Store) -> Encoded:
    """Encode a nested structure of ``Movable`` dataclasses, tuples, tensors, None and plain values.

    Tensors that share the same memory (a pyramid used by several methods) are stored once.

    Raises:
        TypeError: a value has another type; the message names its place in the structure.
    """
    packer = _Packer(store)
    node = packer.pack(value, "")
    order = sorted(range(len(packer.tensors)), key=lambda index: -packer.tensors[index].dtype.itemsize)  # stays aligned
    places = {old: new for new, old in enumerate(order)}
    slots = [dataclasses.replace(packer.slots[old], scales=places.get(packer.slots[old].scales, -1)) for old in order]
    rows = [[s.name, s.stored, list(s.shape), s.original, s.scales] for s in slots]
    deflated = store in DEFLATED
    layout = json.dumps([_renumbered(node, places), rows, deflated], separators=(",", ":"))
    data = b"".join(_bytes(packer.tensors[old]) for old in order)
    return Encoded(layout, _deflate(data) if deflated else data)


def decode(layout: str, data: bytearray) -> Any:
    """Invert ``encode``. Where the stored type equals the decoded one, tensors share the memory of ``data``.

    Raises:
        ValueError: the data are shorter than the layout, or the layout names a class that is not loaded.
    """
    node, slots, deflated = _parsed(layout)
    if deflated:
        data = bytearray(zlib.decompress(data))
    tensors: list[Tensor] = []
    position = 0
    for slot in slots:
        dtype, count = BY_NAME[slot.stored], slot.nbytes
        if position + count > len(data):
            raise ValueError("the record is shorter than its layout")
        flat = torch.frombuffer(data, dtype=dtype, count=count // dtype.itemsize, offset=position) if count else None
        tensors.append(torch.empty(slot.shape, dtype=dtype) if flat is None else flat.view(slot.shape))
        position += count
    return _unpack(node, [_restored(slot, tensor, tensors) for slot, tensor in zip(slots, tensors, strict=True)])


def slots_of(record: Encoded) -> tuple[Slot, ...]:
    """The tensors of a record in the order of its bytes; a compressed record counts as a single tensor of bytes."""
    _, slots, deflated = _parsed(record.layout)
    return (Slot("deflated", "U8", (len(record.data),), "U8"),) if deflated else slots


@lru_cache(maxsize=4096)
def _parsed(layout: str) -> tuple[Any, tuple[Slot, ...], bool]:
    node, rows, deflated = json.loads(layout)
    slots = tuple(Slot(name, stored, tuple(shape), original, scales) for name, stored, shape, original, scales in rows)
    return node, slots, deflated


def _deflate(data: bytes) -> bytes:
    """Compress by Huffman codes alone: the values are noise-like, so a search for repetitions would find none."""
    coder = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS, 9, zlib.Z_HUFFMAN_ONLY)
    return coder.compress(data) + coder.flush()


class _Packer:
    def __init__(self, store: Store) -> None:
        self.store = store
        self.tensors: list[Tensor] = []
        self.slots: list[Slot] = []
        self._known: dict[tuple[Any, ...], int] = {}

    def pack(self, value: Any, path: str) -> Any:
        """JSON node of a value; its tensors are appended to ``tensors``."""
        if isinstance(value, Tensor):
            return {"t": self._tensor(value, path)}
        if isinstance(value, tuple):
            return [self.pack(item, f"{path}[{index}]") for index, item in enumerate(value)]
        if isinstance(value, Movable) and dataclasses.is_dataclass(value):
            found = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init and not _left_out(f, value)}
            fields = {name: self.pack(item, f"{path}.{name}") for name, item in found.items()}
            return {"is": _name(type(value)), "fields": fields}
        if value is None or isinstance(value, bool | int | float | str):
            return {"v": value}
        raise TypeError(
            f"a {type(value).__name__} at {path or 'the top'} cannot be stored in a cache; use tensors, tuples or PerImage"
        )

    def _tensor(self, tensor: Tensor, path: str) -> int:
        memory = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, "exact" if _exact(path) else "")
        if memory in self._known:
            return self._known[memory]
        index = self._add(tensor.detach().cpu(), path.lstrip("."))
        self._known[memory] = index
        return index

    def _add(self, tensor: Tensor, name: str) -> int:
        scales = -1
        kept = _as_stored(tensor, self.store, name)
        if kept is None:
            rows = tensor.float().abs().amax(dim=-1, keepdim=True) / STEPS[self.store]
            kept = (tensor.float() / rows.clamp(min=torch.finfo(torch.float32).tiny)).round().to(torch.int8)
            self._append(rows, f"{name}.scale", torch.float32, -1)
            scales = len(self.slots) - 1
        self._append(kept, name, tensor.dtype, scales)
        return len(self.slots) - 1

    def _append(self, tensor: Tensor, name: str, original: torch.dtype, scales: int) -> None:
        self.tensors.append(tensor)
        self.slots.append(Slot(name, DTYPES[tensor.dtype], tuple(tensor.shape), DTYPES[original], scales))


def _exact(name: str) -> bool:
    return any(word in name.rsplit(".", 1)[-1] for word in EXACT)


def _as_stored(tensor: Tensor, store: Store, name: str) -> Tensor | None:
    """The tensor in its stored type; None if it must be quantised to integers with scales."""
    if not tensor.is_floating_point():
        return _narrowed(tensor)
    if store == "float32" or _exact(name) or tensor.numel() == 0:
        return tensor
    if store == "bfloat16":
        return tensor.to(torch.bfloat16)
    if store in STEPS and tensor.ndim and bool(torch.isfinite(tensor).all()):
        return None
    half = tensor.to(torch.float16)
    # A tensor with values beyond float16's range stays unchanged, and so does one with infinities under int8 and int6.
    return half if store == "float16" and bool((tensor.abs() <= LARGEST_HALF).all()) else tensor


def _narrowed(tensor: Tensor) -> Tensor:
    """The integers in the narrowest type that holds all of them."""
    if tensor.dtype not in (torch.int64, torch.int32, torch.int16) or tensor.numel() == 0:
        return tensor
    low, high = (int(limit) for limit in tensor.aminmax())
    for dtype in (torch.int8, torch.int16, torch.int32):
        if torch.iinfo(dtype).min <= low and high <= torch.iinfo(dtype).max:
            return tensor.to(dtype)
    return tensor


def _bytes(tensor: Tensor) -> memoryview:
    if tensor.numel() == 0:
        return memoryview(b"")
    array = tensor.contiguous().flatten().view(torch.uint8).numpy()
    view: memoryview = array.data
    return view


def _restored(slot: Slot, tensor: Tensor, tensors: list[Tensor]) -> Tensor:
    original = BY_NAME[slot.original]
    if slot.scales >= 0:
        return tensor.float() * tensors[slot.scales]
    if original.is_floating_point:
        return tensor.float() if tensor.dtype != torch.float64 else tensor
    return tensor.to(original)


def _renumbered(node: Any, places: dict[int, int]) -> Any:
    if isinstance(node, list):
        return [_renumbered(item, places) for item in node]
    if "t" in node:
        return {"t": places[node["t"]]}
    if "is" in node:
        return {"is": node["is"], "fields": {name: _renumbered(item, places) for name, item in node["fields"].items()}}
    return node


def _unpack(node: Any, tensors: list[Tensor]) -> Any:
    if isinstance(node, list):
        return tuple(_unpack(item, tensors) for item in node)
    if "t" in node:
        return tensors[node["t"]]
    if "is" in node:
        return _kind(node["is"])(**{name: _unpack(item, tensors) for name, item in node["fields"].items()})
    return tuple(node["v"]) if isinstance(node["v"], list) else node["v"]


def _left_out(field: dataclasses.Field[Any], owner: Any) -> bool:
    """True for a field that was added to its class later and has its default: records then stay as they were before it."""
    value = getattr(owner, field.name)
    return bool(field.metadata.get("omit_default")) and not isinstance(value, Tensor) and value == field.default


def _name(kind: type) -> str:
    """Name of a class in records: its package and class name, without the file inside the package.

    For example ``detdistill.structures:Features`` or ``detdistill.methods.unikd:UniKDTaught`` (a method may be a file or a
    folder).
    """
    package = _PACKAGE.match(kind.__module__)
    return f"{package[0] if package else kind.__module__}:{kind.__qualname__}"


def _kind(name: str) -> type:
    """Find a class by its name in records, among the loaded classes and the methods of this package; nothing else is imported.

    Raises:
        ValueError: there is no such class.
    """
    module = name.partition(":")[0]
    # The class may belong to another method of the cache that this run does not use, so that method's module is imported.
    rooms = (module, f"{module}.method") if module.startswith("detdistill.methods.") else ()
    for room in (None, *rooms):
        if room is not None:
            with contextlib.suppress(ImportError):
                importlib.import_module(room)
        for kind in _descendants(Movable):
            if _name(kind) == name:
                return kind
    raise ValueError(f"the cache holds a {name}, which is not loaded here; import the module that defines it first")


def _descendants(kind: type) -> Iterator[type]:
    child: type
    for child in kind.__subclasses__():
        yield child
        yield from _descendants(child)
