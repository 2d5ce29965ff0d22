"""Identity of a cache: its kinds of knowledge and its views. A run is refused if the cache lacks what the run needs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from detdistill.cache.storage import CacheError
from detdistill.data.transforms import PADDING_MULTIPLE, ViewSettings
from detdistill.data.views import endless, variants
from detdistill.detectors.contract import FEATURES
from detdistill.methods.shared.compose import parse_methods
from detdistill.methods.shared.contract import Method

Knowledge = dict[str, Any]
"""A kind of knowledge: the ``teach`` that gives it, and the hyper-parameters on which the result depends."""


def knowledge_of(methods: str) -> list[Knowledge]:
    """List the kind of knowledge of each method in a text like ``fgd,temperature=0.8+pkd``, in order.

    Methods that inherit ``Method.teach`` and observe the same parts of the teacher have the same kind of knowledge, so a
    cache made for one of them serves all of them.
    """
    return [_knowledge(kind, given) for kind, given in parse_methods(methods)]


def _knowledge(kind: type[Method[Any]], settings: Mapping[str, Any]) -> Knowledge:
    if kind.teach is Method.teach:
        look = kind.needs(**settings).teacher or FEATURES
        further: Knowledge = {"towers": list(look.towers)} if look.towers else {}
        further |= {"attention": True} if look.attention else {}
        return {"teach": "observation", "backbone": look.backbone, "prediction": look.prediction, **further}
    wanted = settings if kind.teach_settings is None else kind.teach_settings
    return {"teach": kind.slug, **{name: _plain(settings[name]) for name in wanted}}


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def in_words(knowledge: Knowledge) -> str:
    """Describe a kind of knowledge in words, for messages."""
    if knowledge["teach"] == "observation":
        seen = ["features", *(name for name in ("backbone", "prediction", "towers", "attention") if knowledge.get(name))]
        return " and ".join(seen)
    settings = [f"{name}={value}" for name, value in knowledge.items() if name != "teach"]
    return ",".join([knowledge["teach"], *settings])


def unique(knowledge: Sequence[Knowledge]) -> list[Knowledge]:
    """Remove duplicates, keeping the order."""
    return [one for index, one in enumerate(knowledge) if one not in knowledge[:index]]


def views_of(settings: ViewSettings) -> dict[str, Any]:
    """Describe the finite set of views that these settings can draw.

    Raises:
        CacheError: the number of views is infinite; the message names all settings that cause this.
    """
    if found := endless(settings):
        raise CacheError(
            f"{' and '.join(found)} make{'s' if len(found) == 1 else ''} endlessly many views, which no cache can hold; "
            f"turn that off, use --scales for a few sizes, or train online (without --cache)"
        )
    kinds = variants(settings)
    return {
        "size": settings.size,
        "resize": settings.resize,
        "max_size": settings.max_size,
        "multiple": PADDING_MULTIPLE,
        "flips": sorted({bool(kind.flip) for kind in kinds}),
        "scales": sorted({scale for kind in kinds for scale in kind.scales or (1.0,)}),
        **({} if settings.teacher_size is None else {"teacher_size": settings.teacher_size}),
    }


def views_lacking(cached: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """List the view settings that a run needs and the cache lacks, in words; empty if the cache has all views."""
    found = [
        f"{name}={wanted[name]} (the cache has {cached[name]})"
        for name in ("size", "resize", "max_size", "multiple")
        if wanted[name] != cached[name]
    ]
    mine, has = (views.get("teacher_size") for views in (wanted, cached))
    if mine != has:
        found.append(f"teacher_size={mine or 'none'} (the cache has {has or 'none'})")
    words = {False: "images that are not flipped", True: "flipped images"}
    found += [words[flip] for flip in wanted["flips"] if flip not in cached["flips"]]
    extra = [scale for scale in wanted["scales"] if scale not in cached["scales"]]
    if extra:
        has = ",".join(f"{scale:g}" for scale in cached["scales"])
        found.append(f"scale {','.join(f'{scale:g}' for scale in extra)} (the cache has {has})")
    return found


def digest(content: Mapping[str, Any]) -> str:
    """sha256 of a mapping of plain values (hex)."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
