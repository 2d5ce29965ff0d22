"""What every detector must keep, in one call: ``check_detector(detector)``, beside the probe (``detectors/probe.py``)."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from detdistill.detectors.contract import (
    PREDICTION,
    Detector,
    HasBackboneFeatures,
    HasQueries,
    HasTowers,
    Parts,
    Teacher,
)
from detdistill.structures import WHOLE_TOWER, Batch, Dense, Features, Look, Queries, Regions, View
from tests.detectors.dense.shared import target
from tests.methods.contract_checks import assert_same

SIZES = ((128, 128), (96, 80), (64, 64))
"""Height and width of three images; the first fills every map of every detector."""


def check_detector(detector: Detector) -> list[str]:
    """Assert what ``detectors/contract.py`` says of parts, specs and looks.

    Args:
        detector: small, with fresh weights; it comes back in training mode.

    Returns:
        The names of the checks that had something to check; a test may assert what is in it.
    """
    checked = []
    for check in (check_neck, check_spec, check_parts, check_looks, check_teacher_runs_once, check_towers, check_attention):
        detector.train()
        try:
            if check(detector, batch_for(detector)):
                checked.append(check.__name__.removeprefix("check_"))
        except Exception as error:
            error.add_note(f"{detector.spec.name}: {check.__name__}")
            raise
    detector.train()
    return checked


def batch_for(detector: Detector) -> Batch:
    """Three images of unequal size, one without boxes, with masks where the detector wants them."""
    generator = torch.Generator().manual_seed(0)
    images = torch.zeros(3, 3, *SIZES[0])
    for image, (height, width) in zip(images, SIZES, strict=True):
        image[:, :height, :width] = torch.rand(3, height, width, generator=generator)
    rows = ([[10, 10, 50, 60], [20, 20, 90, 80], [5, 5, 20, 20]], [[1, 1, 60, 60], [0, 0, 50, 88]], [])
    targets = []
    for boxes in rows:
        one = target(boxes, [index % len(detector.spec.classes) for index in range(len(boxes))])
        if detector.spec.needs_masks:
            masks = torch.zeros(len(one), *SIZES[0], dtype=torch.bool)
            for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
                mask[y1:y2, x1:x2] = True
            one = dataclasses.replace(one, masks=masks)
        targets.append(one)
    return Batch(images, torch.tensor(SIZES), tuple(targets), (0, 1, 2), tuple(View(size, size) for size in SIZES))


def unpadded(batch: Batch) -> Batch:
    """The first image alone, which fills its tensor."""
    return Batch(batch.images[:1], batch.sizes[:1], batch.targets[:1], batch.ids[:1], batch.views[:1])


@torch.no_grad()
def check_neck(detector: Detector, batch: Batch) -> bool:
    """The neck on the backbone's maps gives the features bit by bit, masks included, with padding and without."""
    if not isinstance(detector, HasBackboneFeatures):
        return False
    detector.eval()
    for given in (batch, unpadded(batch)):
        features = detector.features(given)
        made = detector.neck(detector.backbone_features(given), given)
        assert_same(made, features, "the neck makes other features: ")
        assert (made.strides, made.padding is None) == (features.strides, features.padding is None)
        assert (features.padding is None) == (given is not batch), "padding is told where there is some, and only there"
    return True


@torch.no_grad()
def check_spec(detector: Detector, batch: Batch) -> bool:
    """Channels and strides of backbone and neck, anchors of a cell and form of dense predictions are those of the spec."""
    detector.eval()
    spec, features = detector.spec, detector.features(batch)
    assert (features.channels, features.strides) == (spec.channels, spec.strides)
    _check_sizes(features, batch)
    if isinstance(detector, HasBackboneFeatures):
        below = detector.backbone_features(batch)
        assert spec.backbone is not None
        assert (below.channels, below.strides) == (spec.backbone.channels, spec.backbone.strides)
        _check_sizes(below, batch)
    prediction = detector.predict(features, batch)
    first = prediction.first if isinstance(prediction, Regions) else prediction
    if not isinstance(first, Dense):
        assert (spec.anchors, spec.coding) == ((), None)
        return True
    assert len(spec.anchors) == len(features.maps)
    for level, (count, maps) in enumerate(zip(spec.anchors, features.maps, strict=True)):
        mine = first.levels == level
        height, width = maps.shape[-2:]
        places = torch.stack([*first.cells[mine].unbind(dim=1), first.anchors[mine]], dim=1)
        expected = torch.cartesian_prod(torch.arange(height), torch.arange(width), torch.arange(count)).view(-1, 3)
        assert sorted(places.tolist()) == expected.tolist(), f"level {level} has {count} anchors of each cell"
    assert spec.coding is not None
    assert first.deltas.shape[-1] == spec.box_numbers
    assert (first.quality is not None) == spec.coding.quality
    for level, anchors in enumerate(spec.coding.anchors_wh):
        sides = first.priors_xyxy[0, first.levels == level, 2:] - first.priors_xyxy[0, first.levels == level, :2]
        expected = torch.tensor(anchors)[first.anchors[first.levels == level]]
        torch.testing.assert_close(sides, expected, rtol=1e-4, atol=1e-3, msg=lambda text, level=level: f"level {level}: {text}")
    return True


def _check_sizes(features: Features, batch: Batch) -> None:
    """Maps are at least as large as the image, and not a whole cell of the coarsest stride larger."""
    coarsest = max(features.strides)
    for maps, stride in zip(features.maps, features.strides, strict=True):
        for cells, pixels in zip(maps.shape[-2:], batch.padding_hw, strict=True):
            assert pixels - stride < cells * stride < pixels + max(coarsest, 64) + stride, (maps.shape, stride)


def check_parts(detector: Detector, batch: Batch) -> bool:
    """Backbone, neck and head together hold every parameter, each in one of them; names are those of the state dict."""
    parts = detector.parts()
    owners: dict[int, str] = {}
    for side in ("backbone", "neck", "head"):
        modules = getattr(parts, side)
        mine = Parts.parameters(modules)
        twice = [owners[id(p)] for p in mine if id(p) in owners]
        assert not twice, f"parameters of the {side} are in {set(twice)} too"
        owners |= {id(p): side for p in mine}
        named = parts.names(detector, modules)
        inside = {id(tensor) for module in modules for tensor in (*module.parameters(), *module.buffers())}
        state = detector.state_dict(keep_vars=True)
        assert {id(state[name]) for name in named} == inside & {id(tensor) for tensor in state.values()}
    missing = [name for name, p in detector.named_parameters() if id(p) not in owners]
    assert not missing, f"neither backbone nor neck nor head: {missing[:5]}"
    assert len(owners) == len({id(p) for p in detector.parameters()})
    assert Parts.parameters(parts.backbone), "a backbone without parameters"
    assert Parts.parameters(parts.head), "a head without parameters"
    # The backbone's parameters are those that the backbone's maps depend on.
    if isinstance(detector, HasBackboneFeatures):
        torch.stack([level.float().square().mean() for level in detector.backbone_features(batch).maps]).sum().backward()
        reached = {owners[id(p)] for p in detector.parameters() if p.grad is not None and bool(p.grad.any())}
        detector.zero_grad()
        assert reached == {"backbone"}
    return True


@torch.no_grad()
def check_looks(detector: Detector, batch: Batch) -> bool:
    """One pass that shows several parts shows what the separate calls give."""
    detector.eval()
    features = detector.features(batch)
    plain = detector(batch, Look())
    assert (plain.prediction, plain.backbone_features, plain.towers) == (None, None, ())
    assert_same(plain.features, features, "")
    seen = detector.observe(batch, PREDICTION)
    assert_same(seen.prediction, detector.predict(features, batch), "observe predicts something else: ")
    if isinstance(detector, HasBackboneFeatures):
        below = detector.observe(batch, Look(backbone=True, prediction=True))
        assert_same(below.backbone_features, detector.backbone_features(batch), "observe shows other maps of the backbone: ")
        assert_same(below.features, features, "features differ when the backbone is looked at: ")
        assert_same(below.prediction, seen.prediction, "the prediction differs when the backbone is looked at: ")
    return True


def check_teacher_runs_once(detector: Detector, batch: Batch) -> bool:
    """A teacher that shows everything runs its backbone once, and what it shows is what separate calls give."""
    if not isinstance(detector, HasBackboneFeatures):
        return False
    detector = copy.deepcopy(detector)
    teacher, calls = Teacher(detector), []
    modules = [module for part in detector.parts().backbone for module in part.modules()]
    first = next(module for module in modules if isinstance(module, nn.Conv2d))
    first.register_forward_hook(lambda *_: calls.append(1))
    look = Look(backbone=True, prediction=True)
    seen = teacher.observe(batch, look)
    assert len(calls) == 1, f"the backbone ran {len(calls)} times"
    again = teacher.observe(batch, Look(prediction=True))
    assert len(calls) == 1, "a second question about the same batch ran the backbone again"
    assert again.prediction.logits is seen.prediction.logits, "a second question ran the head again"
    assert again.backbone_features is None
    with torch.no_grad():
        features = detector.features(batch)
        assert_same(seen.backbone_features, detector.backbone_features(batch), "")
        assert_same(seen.features, features, "")
        assert_same(seen.prediction, detector.predict(features, batch), "")
    return True


@torch.no_grad()
def check_towers(detector: Detector, batch: Batch) -> bool:
    """With its towers looked at, a dense head predicts the same; each tower is that of its depth."""
    if not isinstance(detector, HasTowers):
        return False
    detector.eval()
    features, depth = detector.features(batch), detector.tower_depth
    own = detector.predict(features, batch)
    for depths in ((WHOLE_TOWER,), (0,), tuple(range(depth + 1)), (0, WHOLE_TOWER)):
        seen = detector.observe(batch, Look(towers=depths, prediction=True))
        assert_same(seen.prediction, own, f"with towers {depths} the prediction differs: ")
        assert [tower.depth for tower in seen.towers] == sorted({depth if one == WHOLE_TOWER else one for one in depths})
        for tower in seen.towers:
            assert_same(tower, detector.tower(features, tower.depth), f"tower {tower.depth}: ")
            assert tower.strides == detector.spec.strides
    seen = detector.observe(batch, Look(towers=(0, WHOLE_TOWER)))
    assert seen.prediction is None
    assert seen.tower().depth == depth
    for side in (seen.tower(0).classification, seen.tower(0).regression):
        assert_same(side, features.maps, "at depth 0 both sides are the features: ")
    return True


def check_attention(detector: Detector, batch: Batch) -> bool:
    """In training, a prediction that shows its attention is the same, and shows the attention of its own queries only.

    Dropout and batch statistics are off, so that training and evaluation can be compared; denoising and further groups of
    queries, which exist in training only, are on.
    """
    if not isinstance(detector, HasQueries) or not _shows_attention(detector, batch):
        return False
    with steady(detector):
        detector.eval()
        with torch.no_grad():
            features = detector.features(batch)
            alone = detector.decode(features, detector.seed(features, batch), batch, attention=True)
        detector.train()
        for module in detector.modules():
            if isinstance(module, nn.BatchNorm2d | nn.Dropout):
                module.eval()
        found: list[tuple[Queries, dict[str, torch.Tensor]]] = []
        for attention in (False, True):
            torch.manual_seed(3)
            prediction = detector.predict(features, batch, attention=attention)
            found.append((prediction, dict(detector.loss(prediction, batch).terms)))
    (plain, losses), (shown, losses_shown) = found
    assert plain.attention is None
    assert plain.self_attention is None
    for name in ("logits", "boxes_cxcywh01", "embedding"):
        torch.testing.assert_close(getattr(shown, name), getattr(plain, name), rtol=1e-4, atol=1e-5, msg=name)
    assert_same(losses_shown, losses, "the own loss differs when attention is shown: ", rtol=1e-4, atol=1e-5)
    for name in ("attention", "self_attention"):
        mine, wanted = getattr(shown, name), getattr(alone, name)
        assert (mine is None) == (wanted is None), name
        if mine is not None:
            torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    # Attention can be learned from: in training it carries a gradient.
    shown_map = next(one for one in (shown.attention, shown.self_attention) if one is not None)
    assert shown_map.requires_grad
    look = detector.eval().observe(batch, Look(attention=True)).prediction
    assert isinstance(look, Queries)
    assert_same(look.attention, alone.attention, "observe shows other attention: ", rtol=1e-5, atol=1e-6)
    return True


@torch.no_grad()
def _shows_attention(detector: Detector, batch: Batch) -> bool:
    teacher = Teacher(copy.deepcopy(detector))
    return teacher.queries.self_attention or teacher.queries.cross_attention


@contextmanager
def steady(detector: Detector) -> Iterator[None]:
    """Functional dropout off, whatever the library's modules say."""
    changed = []
    for module in detector.modules():
        for name in ("dropout", "attention_dropout", "activation_dropout"):
            value = getattr(module, name, None)
            if isinstance(value, float) and value:
                changed.append((module, name, value))
                setattr(module, name, 0.0)
    try:
        yield
    finally:
        for module, name, value in changed:
            setattr(module, name, value)
