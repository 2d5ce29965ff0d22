from dataclasses import dataclass, field

import pytest
import torch

from detdistill.cache.encoding import decode, encode
from detdistill.structures import (
    SHARED,
    WHOLE_TOWER,
    Features,
    Look,
    Observation,
    Taught,
    TaughtTogether,
    Tower,
)
from tests.methods.contract_checks import assert_same
from tests.tiny import TinyDense, TinyQueries, TinyRegions, tiny_batch

FAMILIES = [TinyDense, TinyRegions, TinyQueries]


@pytest.mark.parametrize("detector_class", FAMILIES)
def test_split_and_stack_give_back_an_observation(detector_class):
    detector, batch = detector_class(), tiny_batch(3)
    seen = detector(batch)
    backbone = detector.backbone_features(batch)
    whole = Observation(seen.features, backbone, seen.prediction).detach()
    pieces = whole.split(3)
    assert len(pieces) == 3
    assert torch.equal(pieces[1].features.maps[0], whole.features.maps[0][1:2])
    assert_same(Observation.stack(pieces), whole, "")
    assert Observation.stack(pieces).features.strides == (8, 16)
    turned = Observation.stack([pieces[2], pieces[0]])
    assert torch.equal(turned.features.maps[1], whole.features.maps[1][[2, 0]])
    assert torch.equal(turned.backbone_features.maps[0], backbone.maps[0][[2, 0]])


@dataclass(frozen=True)
class Weighted(Taught):
    maps: tuple[torch.Tensor, ...]
    weight: torch.Tensor | None
    temperature: float = field(default=1.0, metadata=SHARED)


def test_knowledge_of_several_methods_is_split_and_stacked_together():
    features = TinyDense().features(tiny_batch(2)).detach()
    own = Weighted((torch.arange(4.0).reshape(2, 2),), None, temperature=2.0)
    together = TaughtTogether((Observation(features), None, own))
    pieces = together.split(2)
    assert pieces[1].parts[2].maps[0].tolist() == [[2.0, 3.0]]
    assert pieces[1].parts[1] is None
    back = TaughtTogether.stack(pieces)
    assert_same(back, together, "")
    assert back.parts[2].temperature == 2.0


# ------------------------------------------------------------------------------------------------------------- looks


def test_a_union_of_looks_shows_what_either_shows():
    one, other = Look(backbone=True, towers=(2,)), Look(towers=(WHOLE_TOWER, 0, 2), prediction=True)
    assert one | other == Look(backbone=True, towers=(WHOLE_TOWER, 0, 2), prediction=True)
    assert one | other == other | one
    assert one | Look() == one
    assert Look(attention=True) | Look() == Look(attention=True)
    assert not (Look() | Look()).prediction


def observed(look, detector_class=TinyDense, count=2):
    detector, batch = detector_class(seed=1).eval(), tiny_batch(count)
    with torch.no_grad():
        return detector, batch, detector(batch, look)


def test_only_what_a_look_names_is_left():
    detector, _, seen = observed(Look(backbone=True, towers=(0, 1, 2), prediction=True))
    assert_same(seen.only(Look(backbone=True, towers=(0, 1, 2), prediction=True)), seen, "")
    plain = seen.only(Look())
    assert (plain.backbone_features, plain.prediction, plain.towers) == (None, None, ())
    assert plain.features is seen.features
    assert seen.only(Look(prediction=True)).prediction is seen.prediction
    assert seen.only(Look(backbone=True)).backbone_features is seen.backbone_features
    assert [tower.depth for tower in seen.only(Look(towers=(1,))).towers] == [1]
    # The whole tower and its depth are one.
    assert [tower.depth for tower in seen.only(Look(towers=(WHOLE_TOWER, detector.tower_depth))).towers] == [2]


def test_attention_is_left_only_where_it_was_asked_for():
    _, _, seen = observed(Look(attention=True), TinyQueries)
    kept = seen.only(Look(attention=True)).prediction
    assert torch.equal(kept.attention, seen.prediction.attention)
    assert torch.equal(kept.self_attention, seen.prediction.self_attention)
    without = seen.only(Look(prediction=True)).prediction
    assert (without.attention, without.self_attention) == (None, None)
    assert torch.equal(without.logits, seen.prediction.logits)
    assert seen.only(Look()).prediction is None


def test_a_tower_is_found_by_its_depth():
    _, _, seen = observed(Look(towers=(0, 2)))
    assert [seen.tower(depth).depth for depth in (0, 2, WHOLE_TOWER)] == [0, 2, 2]
    with pytest.raises(KeyError, match=r"no tower of depth 1 was looked at, only \[0, 2\]"):
        seen.tower(1)
    with pytest.raises(KeyError, match=r"no tower of depth -1 was looked at, only \[\]"):
        seen.only(Look()).tower()


def test_towers_are_split_by_image_and_stacked_on_the_largest_maps():
    _, _, seen = observed(Look(towers=(0, 1)), count=3)
    pieces = seen.split(3)
    assert torch.equal(pieces[2].tower(1).regression[1], seen.tower(1).regression[1][2:])
    assert (pieces[2].tower(1).depth, pieces[2].tower(1).strides) == (1, (8, 16))
    assert_same(Observation.stack(pieces), seen, "")
    small = Tower((torch.ones(1, 2, 1, 3),), (2 * torch.ones(1, 2, 1, 3),), 1, (8,))
    large = Tower((3 * torch.ones(1, 2, 2, 2),), (4 * torch.ones(1, 2, 2, 2),), 1, (8,))
    both = Tower.stack([small, large])
    assert both.classification[0][:, 0].tolist() == [[[1, 1, 1], [0, 0, 0]], [[3, 3, 0], [3, 3, 0]]]
    assert both.regression[0][:, 0].tolist() == [[[2, 2, 2], [0, 0, 0]], [[4, 4, 0], [4, 4, 0]]]


def test_towers_of_both_sides_come_back_from_a_record():
    detector, batch, seen = observed(Look(towers=(0, 1, 2), prediction=True))
    piece = seen.split(2)[1]
    record = encode(piece, "float32")
    back = decode(record.layout, bytearray(record.data))
    assert_same(back.towers, piece.towers, "")
    assert [(tower.depth, tower.strides) for tower in back.towers] == [(0, (8, 16)), (1, (8, 16)), (2, (8, 16))]
    assert not torch.equal(back.tower(1).classification[0], back.tower(1).regression[0])
    # A method goes on from a tower that came from a cache as from the detector's own.
    alone = batch._on_canvas([1], batch.padding_hw)
    with torch.no_grad():
        for tower in back.towers:
            assert_same(detector.finish(tower, alone), piece.prediction, f"from depth {tower.depth}: ", rtol=1e-6, atol=1e-6)
    # At depth 0 both sides are the features, and memory that is shared is written once.
    features = encode(piece.only(Look()), "float32")
    assert len(encode(piece.only(Look(towers=(0,))), "float32").data) == len(features.data)
    one_more = encode(piece.only(Look(towers=(1,))), "float32")
    maps = sum(level.numel() for level in piece.features.maps)
    assert len(one_more.data) - len(features.data) == 2 * 4 * maps


def test_an_observation_without_towers_is_stacked_with_its_kind():
    piece = Observation(Features((torch.ones(1, 2, 2, 2),), (8,)))
    assert Observation.stack([piece, piece]).towers == ()
