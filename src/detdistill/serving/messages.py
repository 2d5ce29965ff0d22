"""Messages between students and a served teacher, as bytes: description, question (a batch) and answer (records).

A question is JSON, then tensors in the safetensors format. An answer is JSON, then the bytes of records, encoded as in a cache
and with a cache's checksums. Both begin with the length of the JSON. Nothing in them is code, or names a file.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from detdistill.cache.encoding import Encoded
from detdistill.cache.knowledge import FORMAT, About
from detdistill.cache.shards import checksum, sealed, unsealed
from detdistill.cache.storage import CacheError
from detdistill.errors import RunError
from detdistill.structures import Batch, Target, View

PROTOCOL = 1
"""Version of all messages; a student and a teacher with other versions do not understand each other."""
DESCRIPTION, READ, TEACH = "/description", "/read", "/teach"
"""Paths of the server: what it teaches; records by their keys, without pixels; records of a batch."""
CHECKSUM = "X-Checksum"
"""Header of a request with the crc32 of its body."""
LARGEST_BODY = 1 << 30
"""Bytes of the largest question; 16 images of 2048 pixels in float32 are 0.8 GB."""
LARGEST = 1 << 63
"""Whole numbers in a question are below it."""
TOKEN = "DETDISTILL_TOKEN"
"""Environment variable with the word that a server demands and its students send."""


class ServingError(RunError):
    """A teacher cannot be served, or a served teacher cannot be used; the message says which, why and what to do."""


def token_from_environment() -> str | None:
    """The word in ``DETDISTILL_TOKEN``; None: it is not set.

    Raises:
        ServingError: it cannot be sent in a header.
    """
    token = os.environ.get(TOKEN)
    if not token:
        return None
    if not (token.isascii() and token.isprintable() and " " not in token):
        raise ServingError(f"{TOKEN} may hold letters, digits and signs only, no blanks and no other characters")
    return token


@dataclass(frozen=True)
class Description:
    """Description of what a server teaches."""

    about: About
    """Teacher and knowledge as a cache describes them. ``data_fingerprint`` and ``views`` bind students only if ``recorded``."""
    classes: tuple[str, ...]
    """Names of the students' classes, in the order of their labels."""
    recorded: bool
    """The server writes a cache of what it says."""

    def packed(self) -> bytes:
        """As JSON with a checksum."""
        from detdistill import __version__

        own = {"protocol": PROTOCOL, "version": __version__, "classes": list(self.classes), "recorded": self.recorded}
        return sealed({**own, "about": self.about.as_plain()})

    @staticmethod
    def unpacked(content: bytes, url: str) -> Description:
        """Invert ``packed``.

        Raises:
            ServingError: it is no description, or one of another version; the message names ``url``.
        """
        from detdistill import __version__

        try:
            plain = unsealed(content, url)
            about, protocol, version = dict(plain["about"]), plain["protocol"], plain["version"]
        except (CacheError, KeyError, TypeError, ValueError) as error:
            raise ServingError(
                f"served teacher {url}: what answers there is no `detdistill teach`; check host and port"
            ) from error
        if (protocol, about.pop("format", None)) != (PROTOCOL, FORMAT):
            raise ServingError(
                f"served teacher {url}: it is detdistill {version} (protocol {protocol}), this is {__version__} (protocol "
                f"{PROTOCOL}); install the same version on both machines"
            )
        try:
            return Description(About.from_plain(about), tuple(plain["classes"]), plain["recorded"])
        except (KeyError, TypeError) as error:
            raise ServingError(f"served teacher {url}: it is detdistill {version}; install that version here, too") from error


# ------------------------------------------------------------------------------------------------------------- questions


def packed_question(groups: Sequence[Batch], data: str) -> bytes:
    """Encode the images of a batch.

    Pixels that are whole 255ths are sent as bytes, all others as they are; both exactly. Where the teacher sees the images at a
    size of its own, only these are sent. Masks are left out: no teacher is shown any.

    Args:
        groups: the images by canvas, see ``Batch.by_canvas``.
        data: fingerprint of the student's training data.
    """
    tensors: dict[str, Tensor] = {}
    plain = [_described(group, f"{number}.", tensors) for number, group in enumerate(groups)]
    return _framed({"data": data, "groups": plain}, save(tensors))


def _described(batch: Batch, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Everything of a batch except its tensors, which are added to ``tensors``."""
    tensors[f"{name}sizes"] = _own(batch.sizes)
    for index, target in enumerate(batch.targets):
        for field in ("boxes_xyxy", "labels", "crowd", "scores"):
            if (value := getattr(target, field)) is not None:
                tensors[f"{name}{index}.{field}"] = _own(value)
    large = None if batch.large is None else _described(batch.large, f"{name}large.", tensors)
    if large is None:
        tensors[f"{name}images"] = _narrow(batch.images.detach().cpu()).contiguous()
    views = [dataclasses.asdict(view) for view in batch.views]
    return {"ids": list(batch.ids), "views": views, "hw": list(batch.padding_hw), "enlarged": batch.enlarged, "large": large}


def _own(tensor: Tensor) -> Tensor:
    """A copy in memory of its own, as the format demands it."""
    return tensor.detach().cpu().clone().contiguous()


def _narrow(pixels: Tensor) -> Tensor:
    """Pixels 0..1 as uint8 if that loses nothing."""
    if pixels.dtype != torch.float32:
        return pixels
    whole = (pixels * 255).round_().to(torch.uint8)
    return whole if torch.equal(_wide(whole), pixels) else pixels


def _wide(pixels: Tensor) -> Tensor:
    """uint8 pixels as float32 in 0..1, as the loader makes them."""
    return pixels.to(torch.float32).div_(255) if pixels.dtype == torch.uint8 else pixels


def unpacked_question(content: bytes, classes: int) -> tuple[list[Batch], str]:
    """Invert ``packed_question``, and check everything in it.

    Args:
        content: from outside.
        classes: number of classes; labels are below it.

    Returns:
        The groups, and the fingerprint of the data.

    Raises:
        ValueError: it is no question; with the reason.
    """
    plain, rest = _unframed(content)
    try:
        tensors = load(rest)
        groups = [_batch(group, f"{number}.", tensors, classes) for number, group in enumerate(plain["groups"])]
        if not groups:
            raise ValueError("no images")
        return groups, _text(plain["data"])
    except SafetensorError as error:
        raise ValueError(f"its tensors cannot be read ({error})") from error
    except (KeyError, TypeError, AttributeError, IndexError, OverflowError, RuntimeError) as error:
        raise ValueError(f"a part is missing or wrong ({' '.join(str(error).split())[:200]})") from error


def _batch(plain: Mapping[str, Any], name: str, tensors: Mapping[str, Tensor], classes: int) -> Batch:
    ids = tuple(_whole(one) for one in plain["ids"])
    views = tuple(_view(one) for one in plain["views"])
    height, width = (_whole(side, 1) for side in plain["hw"])
    large = None if plain["large"] is None else _batch(plain["large"], f"{name}large.", tensors, classes)
    if large is None:
        images = _wide(tensors[f"{name}images"])
    else:  # the teacher sees the larger ones; of these, only size and padding matter
        images = torch.zeros(()).expand(len(ids), 3, height, width)
    sizes = tensors[f"{name}sizes"]
    _check(images.dtype == torch.float32 and tuple(images.shape) == (len(ids), 3, height, width), "images", images)
    _check(sizes.dtype == torch.int64 and tuple(sizes.shape) == (len(ids), 2), "sizes", sizes)
    if not ids or len(views) != len(ids) or bool((sizes < 1).any()) or bool((sizes > torch.tensor([height, width])).any()):
        raise ValueError("ids, views and sizes do not describe the images")
    enlarged = _number(plain["enlarged"])
    smaller = large is None or (height <= large.padding_hw[0] and width <= large.padding_hw[1])
    if large is not None and (len(large) != len(ids) or large.large is not None or not smaller or enlarged < 1):
        raise ValueError("the teacher's images are not those of the student")
    targets = tuple(_target(f"{name}{index}.", tensors, classes) for index in range(len(ids)))
    return Batch(images, sizes, targets, ids, views, large=large, enlarged=enlarged)


def _target(name: str, tensors: Mapping[str, Tensor], classes: int) -> Target:
    boxes, labels, crowd = (tensors[f"{name}{field}"] for field in ("boxes_xyxy", "labels", "crowd"))
    scores = tensors.get(f"{name}scores")
    count = len(labels) if labels.ndim else -1
    _check(boxes.is_floating_point() and tuple(boxes.shape) == (count, 4), "boxes", boxes)
    _check(labels.dtype == torch.int64 and labels.ndim == 1, "labels", labels)
    _check(crowd.dtype == torch.bool and tuple(crowd.shape) == (count,), "crowd", crowd)
    _check(scores is None or (scores.is_floating_point() and tuple(scores.shape) == (count,)), "scores", cast(Tensor, scores))
    if count and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(f"a label is not one of the {classes} classes")
    return Target(boxes, labels, crowd, scores=scores)


def _view(plain: Mapping[str, Any]) -> View:
    pairs: dict[str, tuple[float, ...]] = {
        name: tuple(_whole(one, 1) for one in plain[name]) for name in ("original_hw", "size_hw")
    }
    pairs |= {name: tuple(_number(one) for one in plain[name]) for name in ("scale_xy", "offset_xy")}
    if any(len(pair) != 2 for pair in pairs.values()) or not isinstance(plain["flip"], bool):
        raise ValueError("a view is wrong")
    photometric, mosaic = tuple(map(_number, plain["photometric"])), tuple(map(_whole, plain["mosaic"]))
    return View(**cast(dict[str, Any], pairs), flip=plain["flip"], photometric=photometric, mosaic=mosaic)


def packed_keys(keys: Sequence[str], data: str) -> bytes:
    """Encode a question for records that the server may have, by their keys."""
    return json.dumps({"keys": list(keys), "data": data}).encode()


def unpacked_keys(content: bytes) -> tuple[list[str], str]:
    """Invert ``packed_keys``.

    Raises:
        ValueError: it is no such question.
    """
    try:
        plain = json.loads(content)
        return [_text(key) for key in plain["keys"]], _text(plain["data"])
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError("a part is missing or wrong") from error


# --------------------------------------------------------------------------------------------------------------- answers


def packed_answer(keys: Sequence[str], records: Sequence[Encoded]) -> list[bytes]:
    """Encode the records of a batch, in the order of its images; as parts, so that large records are not copied."""
    layouts: dict[str, int] = {}
    rows = []
    for key, record in zip(keys, records, strict=True):
        number = layouts.setdefault(record.layout, len(layouts))
        rows.append([key, number, len(record.data), checksum(key, record.layout, record.data)])
    return [_framed({"layouts": list(layouts), "records": rows}, b""), *(record.data for record in records)]


def unpacked_answer(content: bytes, keys: Sequence[str]) -> list[Encoded]:
    """Invert ``packed_answer``.

    Args:
        content: the answer.
        keys: of the images that were asked about.

    Raises:
        ValueError: it is damaged, or about other images.
    """
    plain, rest = _unframed(content)
    records, position = [], 0
    try:
        for wanted, (key, number, length, crc) in zip(keys, plain["records"], strict=True):
            layout, data = plain["layouts"][number], rest[position : position + length]
            position += length
            if key != wanted or checksum(key, layout, data) != crc:
                raise ValueError(f"the record of image {wanted} is damaged (its checksum is wrong)")
            records.append(Encoded(layout, data))
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError("a part is missing or wrong") from error
    return records


# ---------------------------------------------------------------------------------------------------------------- pieces


def _framed(plain: Mapping[str, Any], rest: bytes) -> bytes:
    text = json.dumps(plain, separators=(",", ":")).encode()
    return b"".join((struct.pack("<Q", len(text)), text, rest))


def _unframed(content: bytes) -> tuple[dict[str, Any], bytes]:
    try:
        (length,) = struct.unpack_from("<Q", content)
        if length > len(content) - 8:
            raise ValueError("it is cut short")
        plain = json.loads(content[8 : 8 + length])
    except (struct.error, RecursionError) as error:
        raise ValueError("it is cut short") from error
    if not isinstance(plain, dict):
        raise ValueError("it holds no fields")
    return plain, content[8 + length :]


def _check(good: bool, what: str, tensor: Tensor) -> None:
    if not good:
        raise ValueError(f"{what} of type {tensor.dtype} and shape {list(tensor.shape)}")


def _whole(value: Any, least: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not (-LARGEST if least is None else least) <= value < LARGEST:
        raise ValueError("a whole number is wrong")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError("a number is wrong")
    return float(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("a text is wrong")
    return value


def some_of(batch: Batch, indices: Sequence[int]) -> Batch:
    """Some images of a batch of one canvas, and of what the teacher sees of them."""
    chosen = list(indices)
    return Batch(
        batch.images[chosen],
        batch.sizes[chosen],
        tuple(batch.targets[index] for index in chosen),
        tuple(batch.ids[index] for index in chosen),
        tuple(batch.views[index] for index in chosen),
        large=None if batch.large is None else some_of(batch.large, chosen),
        enlarged=batch.enlarged,
    )


def joined(batches: Sequence[Batch]) -> Batch:
    """Join batches of the same canvas."""
    if len(batches) == 1:
        return batches[0]
    larger = [batch.large for batch in batches if batch.large is not None]
    return replace(
        batches[0],
        images=torch.cat([batch.images for batch in batches]),
        sizes=torch.cat([batch.sizes for batch in batches]),
        targets=tuple(target for batch in batches for target in batch.targets),
        ids=tuple(one for batch in batches for one in batch.ids),
        views=tuple(view for batch in batches for view in batch.views),
        canvases_hw=None,
        large=joined(larger) if larger else None,
    )
