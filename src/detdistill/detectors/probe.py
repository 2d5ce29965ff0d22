"""Probe the detectors: build every adapter's tiny model and call every part of the contract.

An adapter's tiny model has the model string ``NAME:TINY``; ``TINY`` is a constant in the adapter's file, by default
``GENERIC``. Adapters that only load models with their weights set ``TINY = None`` and are not run. Every failure is reported
with its reason. All adapters are found in their folders, not listed by hand.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from detdistill.detectors.adapters import adapter, adapter_names
from detdistill.detectors.build import build_detector
from detdistill.detectors.contract import (
    CAPABILITIES,
    Detector,
    HasBackboneFeatures,
    HasCopies,
    HasQueries,
    HasRegions,
    HasTowers,
)
from detdistill.detectors.probed import STAGES, Probed, Survey, keep_survey
from detdistill.errors import DetdistillError
from detdistill.structures import Batch, Features, Prediction, QuerySeed, Regions, Target, View, map_tensors

GENERIC = "resnet10t,channels=8-16-32-64,stem=8,neck=32"
"""Model string after ``NAME:`` of the tiny model, for adapters without a ``TINY`` of their own."""
PROBED = (HasBackboneFeatures, HasTowers, HasRegions, HasQueries, HasCopies)
"""Capabilities that are probed: those that most methods build on. Tests of the few detectors with further ones cover these."""
CHECKS = (STAGES, *(CAPABILITIES[protocol].partition(" (")[0] for protocol in PROBED))
"""Names of all checks, in the order of the tables' columns."""


class ProbeError(Exception):
    """A part of a detector ran, but its result breaks the contract."""


def has_tiny(name: str) -> bool:
    """Whether an adapter can build a tiny model; False for adapters that only load models."""
    return getattr(adapter(name), "TINY", GENERIC) is not None


def tiny_name(name: str) -> str:
    """The model string of an adapter's tiny model.

    Raises:
        ImportError: the adapter needs a package that is missing or too old.
    """
    return f"{name}:{getattr(adapter(name), 'TINY', GENERIC)}"


def tiny_detector(name: str, classes: Sequence[str] = ("one", "two")) -> Detector:
    """Build an adapter's tiny model with random weights (seeded), in training mode.

    Raises:
        ImportError: as ``tiny_name``.
        ModelError: the adapter does not accept its own ``TINY``.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_detector(tiny_name(name), classes).train()


def probe_all(follow: Callable[[int, int], None] | None = None, export: Callable[[Detector], str] | None = None) -> list[Probed]:
    """Probe all adapters in order of name.

    Args:
        follow: called with the number of adapters done and the number of all adapters.
        export: tries to export a detector and says how, see ``export.probe.probe_export``; None: not tried.
    """
    names, found = adapter_names(), []
    for index, name in enumerate(names):
        if follow is not None:
            follow(index, len(names))
        found.append(probe_adapter(name, export))
    if follow is not None:
        follow(len(names), len(names))
    return found


def survey(follow: Callable[[int, int], None] | None = None, export: Callable[[Detector], str] | None = None) -> Survey:
    """Probe all adapters, and keep what was found for ``kept_survey``; arguments as in ``probe_all``."""
    found = survey_of(probe_all(follow, export), time.strftime("%Y-%m-%d %H:%M"))
    keep_survey(found)
    return found


def survey_of(detectors: Sequence[Probed], when: str) -> Survey:
    """Put the results of ``probe_all`` together."""
    return Survey(tuple(detectors), tuple(CAPABILITIES[protocol] for protocol in PROBED), CHECKS, when)


def probe_adapter(name: str, export: Callable[[Detector], str] | None = None) -> Probed:
    """Build one adapter's tiny model and run every check. Errors of the adapter are reported, never raised.

    Args:
        name: of the adapter.
        export: as in ``probe_all``.
    """
    try:
        about = (adapter(name).__doc__ or "").strip().splitlines()[0].rstrip(".")
    except Exception as error:  # a missing or too old package, or any fault of the file
        return Probed(name, "cannot be imported", reasons={STAGES: _one_line(error)})
    if not has_tiny(name):
        return Probed(name, about, "as loaded")
    try:
        detector = tiny_detector(name)
    except Exception as error:
        return Probed(name, about, reasons={STAGES: _one_line(error)})
    found = replace(probe_detector(detector), name=name, about=about)
    return found if export is None else replace(found, export=export(detector))


def probe_detector(detector: Detector) -> Probed:
    """Run every check on a small detector. Its gradients and its BatchNorm statistics are changed."""
    probes: dict[type, Callable[[Any, Batch], None]] = {
        HasBackboneFeatures: _backbone_features,
        HasTowers: _towers,
        HasRegions: _regions,
        HasQueries: _queries,
        HasCopies: _copies,
    }
    batch = probe_batch(len(detector.spec.classes))
    results, reasons = {}, dict[str, str]()
    asked: list[tuple[str, bool, Callable[[Any, Batch], None]]] = [(STAGES, True, _stages)]
    for check, protocol in zip(CHECKS[1:], PROBED, strict=True):
        asked.append((check, isinstance(detector, protocol), probes[protocol]))
    with torch.random.fork_rng(devices=[]):
        for check, claimed, run in asked:
            torch.manual_seed(0)
            try:
                if claimed:
                    run(detector, batch)
            except Exception as error:  # any error of a library counts as a failed check
                reasons[check] = _one_line(error)
            results[check] = claimed and check not in reasons
    name, _, _ = detector.spec.name.partition(":")
    return Probed(name, type(detector).__doc__ or "", detector.spec.family, results, reasons)


def probe_batch(classes: int = 2, size: int = 64) -> Batch:
    """Make a batch of three noise images: two of different heights with boxes and masks, and one without boxes.

    Args:
        classes: number of classes.
        size: height and width of the padded images in pixels.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(3, 3, size, size, generator=generator)
    heights, targets = (size, size * 3 // 4, size), []
    corners: tuple[list[list[float]], ...] = ([[0.05, 0.1, 0.6, 0.7], [0.5, 0.4, 0.75, 0.65]], [[0.2, 0.1, 0.9, 0.7]], [])
    for index, (height, rows) in enumerate(zip(heights, corners, strict=True)):
        images[index, :, height:] = 0
        boxes = torch.tensor(rows).reshape(-1, 4) * size
        masks = torch.zeros(len(rows), size, size, dtype=torch.bool)
        for mask, (left, top, right, bottom) in zip(masks, boxes.long().tolist(), strict=True):
            mask[top:bottom, left:right] = True
        labels = torch.arange(len(rows)) % classes
        targets.append(Target(boxes, labels, torch.zeros(len(rows), dtype=torch.bool), masks))
    views = tuple(View((height, size), (height, size)) for height in heights)
    return Batch(images, torch.tensor([[height, size] for height in heights]), tuple(targets), (0, 1, 2), views)


# ------------------------------------------------------------------------------------------------------ the single probes


def _stages(detector: Detector, batch: Batch) -> None:
    detector.train()
    features = detector.features(batch)
    _check(features.channels == detector.spec.channels, f"features have channels {features.channels}, not those of its spec")
    _check(features.strides == detector.spec.strides, f"features have strides {features.strides}, not those of its spec")
    prediction = detector.predict(features, batch)
    assignment = detector.assign(prediction, batch)
    _check(bool((assignment.matched >= 0).any()), "assign finds no positive")
    losses = detector.loss(prediction, batch)
    total = losses.total()
    _check(bool(torch.isfinite(total)), f"the loss is {float(total.detach())}")
    total.backward()  # type: ignore[no-untyped-call]
    gradients = [parameter.grad for parameter in detector.parameters() if parameter.grad is not None]
    _check(bool(gradients), "no parameter gets a gradient")
    _check(all(bool(torch.isfinite(gradient).all()) for gradient in gradients), "a gradient is not finite")
    detector.zero_grad()
    empty = batch.with_targets([map_tensors(target, lambda rows: rows[:0]) for target in batch.targets])
    without = detector.loss(detector.predict(detector.features(empty), empty), empty).total()
    _check(bool(torch.isfinite(without)), f"the loss of a batch without boxes is {float(without.detach())}")
    again = detector.predict(detector.features(batch), batch)
    positives = detector.positives(again, detector.assign(again, batch), batch)
    _check(len(positives) > 0, "positives are empty")
    _check(positives.boxes_xyxy.requires_grad, "the boxes of positives are not differentiable")
    with torch.no_grad():
        detections = detector.eval().detect(detector(batch).prediction, batch)  # type: ignore[arg-type]
    _check(len(detections) == len(batch), f"detect gives {len(detections)} results for {len(batch)} images")
    for found, size in zip(detections, batch.sizes, strict=True):
        limit = size.flip(0).repeat(2)
        inside = (found.boxes_xyxy >= 0).all() and (found.boxes_xyxy <= limit + 1e-3).all()
        _check(bool(inside), "detections leave the image")


@torch.no_grad()
def _backbone_features(detector: Any, batch: Batch) -> None:
    found = detector.eval().backbone_features(batch)
    _check(len(found.maps) == len(found.strides) > 0, "backbone features without maps, or with other strides than maps")


@torch.no_grad()
def _towers(detector: Any, batch: Batch) -> None:
    features = detector.eval().features(batch)
    own = detector.predict(features, batch)
    for depth in (None, *range(detector.tower_depth + 1)):
        finished = detector.finish(detector.tower(features, depth), batch)
        _check_same(finished, own, f"finish(tower(features, {depth})) differs from predict(features)")


@torch.no_grad()
def _regions(detector: Any, batch: Batch) -> None:
    features = detector.eval().features(batch)
    boxes = [torch.tensor([[4.0, 4.0, 40.0, 30.0], [10.0, 8.0, 50.0, 44.0]]), torch.zeros(0, 4), torch.tensor([[0.0, 0, 20, 20]])]
    found = detector.regions(features, boxes, batch)
    while found.previous is not None:  # the first stage of a cascade predicts on the given boxes
        found = found.previous
    _check(torch.equal(found.boxes_xyxy, torch.cat(boxes)), "regions differ from the given boxes or their order")
    _check(found.origin.image.tolist() == [0, 0, 2], "regions have the wrong image")
    _check(found.logits.shape[1] == len(detector.spec.classes) + 1, "regions have other classes than the detector")
    copied = _eval(detector.copy_region_head()).regions(features, boxes, batch)
    _check_same(copied, detector.regions(features, boxes, batch), "a copied region head predicts something else")
    proposals, origins = detector.proposals(features, batch)
    _check([len(rows) for rows in proposals] == [len(rows.image) for rows in origins], "proposals without their origin")


@torch.no_grad()
def _queries(detector: Any, batch: Batch) -> None:
    features = detector.eval().features(batch)
    seed = detector.seed(features, batch)
    own = detector.decode(features, seed, batch)
    predicted = detector.predict(features, batch)
    _check(torch.allclose(own.logits, predicted.logits, atol=1e-5), "decode(seed) differs from predict")
    foreign = QuerySeed(  # as from another detector: without the fields that only this detector's seeds have
        content=seed.content.flip(1)[:, :3] + 0.1,
        position=None if seed.position is None else seed.position[:, :3],
        reference=None if seed.reference is None else seed.reference[:, :3],
    )
    other = detector.decode(features, foreign, batch)
    _check(other.logits.shape[2] == 3, "a foreign group of 3 queries gives another number of predictions")
    _check_same(detector.decode(features, seed, batch), own, "decoding a foreign group changes the own result")


@torch.no_grad()
def _copies(detector: Any, batch: Batch) -> None:
    features = detector.eval().features(batch)
    own = detector.predict(features, batch)
    head = _eval(detector.copy_head())
    _check_same(head.predict(features, batch), own, "a copied head predicts something else")
    fresh = _eval(detector.copy_head(fresh=True))
    fresh.predict(features, batch)
    mine = {id(parameter) for parameter in detector.parameters()}
    _check(not any(id(p) in mine for part in (head, fresh) for p in part.parameters()), "a copied head shares parameters")
    below = detector.backbone_features(batch)
    made: Features = _eval(detector.copy_neck())(below)
    same = len(made.maps) == len(features.maps) and all(
        torch.equal(copied, level) for copied, level in zip(made.maps, features.maps, strict=True)
    )
    _check(same, "a copied neck makes other features")
    anew: Features = _eval(detector.copy_neck(fresh=True))(below)
    _check(anew.channels == features.channels, "a fresh neck makes features of other channels")


def _eval(module: Any) -> Any:
    return module.eval() if isinstance(module, nn.Module) else module


def _check(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ProbeError(otherwise)


def _check_same(found: Prediction, expected: Prediction, otherwise: str) -> None:
    """Raise ``ProbeError`` unless logits and boxes are equal bit by bit."""
    names = ("logits", "refined_xyxy") if isinstance(expected, Regions) else ("logits", "boxes_xyxy", "boxes_cxcywh01")
    for name in names:
        theirs = getattr(expected, name, None)
        if theirs is not None and not torch.equal(getattr(found, name), theirs):
            mine = getattr(found, name)
            by = f" by {float((mine - theirs).abs().max()):.1e}" if mine.shape == theirs.shape else ""
            raise ProbeError(f"{otherwise}{by} ({name})")


def _one_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    first = text[0] if text else ""
    if isinstance(error, (DetdistillError, ProbeError, ImportError)):
        return first
    return f"{type(error).__name__}: {first}"
