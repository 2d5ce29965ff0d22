"""Every adapter of the folder, and the detectors of a few lines, keep what the contract says of parts, specs and looks."""

import pytest
import torch

from detdistill.detectors.adapters import adapter_names
from detdistill.detectors.contract import HasQueries, HasTowers
from detdistill.detectors.probe import has_tiny, tiny_detector
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
