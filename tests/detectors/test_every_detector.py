"""Every adapter of the folder, and the detectors of a few lines, keep what the contract says of parts, specs and looks."""

from contextlib import suppress

import pytest
import torch

from detdistill.data.transforms import ViewSettings
from detdistill.detectors.adapters import adapter_names
from detdistill.detectors.build import build_detector
from detdistill.detectors.contract import HasQueries, HasTowers
from detdistill.detectors.probe import has_tiny, tiny_detector
from detdistill.errors import ModelError
from detdistill.evaluation.predict import predict_image
from detdistill.structures import Batch, Target, View
from tests.detectors.checks import check_detector
from tests.tiny import TinyDense, TinyQueries, TinyRegions

NO_ATTENTION = {"adamixer"}
"""Query decoders whose attention has no maps: AdaMixer mixes what it samples."""


@pytest.mark.parametrize("name", [name for name in adapter_names() if has_tiny(name)])
def test_every_adapter(name):
    detector = tiny_detector(name)
    checked = check_detector(detector)
    assert {"neck", "spec", "parts", "looks", "teacher_runs_once"} <= set(checked)
    assert ("towers" in checked) == isinstance(detector, HasTowers)
    assert ("attention" in checked) == (isinstance(detector, HasQueries) and name not in NO_ATTENTION)


@pytest.mark.parametrize("kind", [TinyDense, TinyRegions, TinyQueries])
def test_the_detectors_of_a_few_lines(kind):
    checked = check_detector(kind())
    assert {"neck", "spec", "parts", "looks", "teacher_runs_once"} <= set(checked)
    assert ("towers" in checked) == (kind is TinyDense)
    assert ("attention" in checked) == (kind is TinyQueries)


class TwiceBackbone(TinyDense):
    def neck(self, features, batch):
        self.backbone[0](self.normalized(batch))
        return super().neck(features, batch)


class ShiftedNeck(TinyDense):
    def features(self, batch):
        found = super().features(batch)
        return type(found)(tuple(level + 1e-6 for level in found.maps), found.strides, found.padding)


class WrongAnchors(TinyDense):
    def build(self, *arguments):
        from dataclasses import replace

        super().build(*arguments)
        self.spec = replace(self.spec, anchors=(1, 2))


class ForgottenPart(TinyDense):
    def parts(self):
        found = super().parts()
        return type(found)(found.backbone, (), found.head)


class SharedPart(TinyDense):
    def parts(self):
        found = super().parts()
        return type(found)(found.backbone, (*found.neck, self.head), found.head)


class LooseTower(TinyDense):
    def finish(self, hidden, batch):
        from dataclasses import replace

        found = super().finish(hidden, batch)
        return found if hidden.depth == self.tower_depth else replace(found, logits=found.logits + 1e-6)


class AllAttention(TinyQueries):
    """In training it shows the attention of one query more than it has."""

    def predict(self, features, batch, attention=False):
        from dataclasses import replace

        found = super().predict(features, batch, attention)
        if not (self.training and attention):
            return found
        return replace(found, attention=torch.cat([found.attention, found.attention[:, :, :, :1]], dim=3))


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (TwiceBackbone, "the backbone ran 2 times"),
        (ShiftedNeck, "the neck makes other features"),
        (WrongAnchors, "level 1 has 2 anchors"),
        (ForgottenPart, "neither backbone nor neck nor head"),
        (SharedPart, "parameters of the head are in"),
        (LooseTower, "the prediction differs"),
        (AllAttention, "attention"),
    ],
)
def test_the_checks_find_what_they_are_for(broken, message):
    with pytest.raises(AssertionError, match=message):
        check_detector(broken())


SIDES = (1, 32, 64, 96, 128, 256, 300)
"""Sides of images that are tried until a detector accepts one, in pixels."""


def one_image(side, masks):
    """One image of noise with a box over most of it."""
    image = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    box = torch.tensor([[0.1, 0.2, 0.8, 0.9]]) * side
    shapes = torch.zeros(1, side, side, dtype=torch.bool)
    shapes[:, side // 5 : side * 9 // 10, side // 10 : side * 4 // 5] = True
    target = Target(box, torch.tensor([1]), torch.tensor([False]), shapes if masks else None)
    return Batch(image, torch.tensor([[side, side]]), (target,), (0,), (View((side, side), (side, side)),))


def smallest(detector):
    """The smallest image that a detector accepts without a ``ModelError``."""
    for side in SIDES:
        batch = one_image(side, detector.spec.needs_masks)
        with suppress(ModelError), torch.no_grad():
            detector.eval().features(batch)
            return batch
    raise AssertionError(f"{detector.spec.name} refuses images of {SIDES}")


def check_one_image(detector, batch):
    """In training, evaluation and detection, in float32 and bf16: losses, gradients and boxes are finite."""
    for half in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            detector.train()
            losses = detector.loss(detector(batch).prediction, batch)
            with torch.no_grad():
                detector.eval()
                prediction = detector(batch).prediction
                evaluated = detector.loss(prediction, batch)
                (found,) = detector.detect(prediction, batch)
        for terms in (losses.terms, evaluated.terms):
            assert all(bool(torch.isfinite(term)) for term in terms.values())
        assert bool(torch.isfinite(found.boxes_xyxy).all())
        losses.total().backward()
        assert all(bool(torch.isfinite(p.grad).all()) for p in detector.parameters() if p.grad is not None)
        detector.zero_grad()
    image = (batch.images[0] * 255).to(torch.uint8)
    boxes, scores, _ = predict_image(detector, image, ViewSettings(size=image.shape[-1]))
    assert bool(torch.isfinite(boxes).all())
    assert bool(torch.isfinite(scores).all())


@pytest.mark.parametrize("name", [name for name in adapter_names() if has_tiny(name)])
def test_one_smallest_image(name):
    """Levels of one cell and a batch of one."""
    detector = tiny_detector(name)
    check_one_image(detector, smallest(detector))


@pytest.mark.parametrize("name", ["fcos", "gfl", "atss", "paa", "reppoints"])
def test_one_image_whose_heads_normalise_one_value_per_group(name):
    """With neck=32 the 32 groups of the heads' GroupNorm have a channel each, and the last level has a cell."""
    options = "resnet10t,channels=8-16-32-64,stem=8,neck=32,levels=3-7,convs=1,score=0"
    detector = build_detector(f"{name}:{options}", ("a", "b"))
    batch = one_image(128, masks=False)
    assert detector.features(batch).maps[-1].shape == (1, 32, 1, 1)
    check_one_image(detector, batch)


@pytest.mark.parametrize("name", [name for name in adapter_names() if has_tiny(name)])
def test_weights_that_are_not_numbers_give_a_loss_that_is_none(name):
    """Training then stops in the usual way; no library's own error gets in between."""
    detector = tiny_detector(name)
    with torch.no_grad():
        for parameter in detector.parts().parameters(detector.parts().head):
            parameter.fill_(torch.nan)
    batch = one_image(128 if detector.spec.fixed_size_hw is None else detector.spec.fixed_size_hw[0], detector.spec.needs_masks)
    total = detector.loss(detector(batch).prediction, batch).total()
    assert not bool(torch.isfinite(total))
    assert total.requires_grad
