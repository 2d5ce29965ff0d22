from dataclasses import dataclass, field

import pytest
import torch

from detdistill.structures import (
    SHARED,
    Assignment,
    Batch,
    Clock,
    Dense,
    Features,
    Losses,
    Observation,
    Origin,
    PerImage,
    Queries,
    Regions,
    Target,
    Taught,
    TaughtTogether,
    View,
)
from tests.methods.contract_checks import assert_same, tensors
from tests.tiny import TinyDense, TinyQueries, TinyRegions, tiny_batch

FAMILIES = [TinyDense, TinyRegions, TinyQueries]


# ------------------------------------------------------------------------------------------------------ view and batch


def test_view_back_to_original_undoes_scale_offset_and_flip():
    plain = View(original_hw=(50, 100), size_hw=(120, 210), scale_xy=(2.0, 3.0), offset_xy=(10.0, -15.0))
    box = torch.tensor([[5.0, 10.0, 20.0, 30.0]])
    seen = torch.tensor([[5 * 2 + 10, 10 * 3 - 15, 20 * 2 + 10, 30 * 3 - 15]], dtype=torch.float32)
    assert plain.to_original(seen).tolist() == box.tolist()
    flipped = View((50, 100), (120, 210), (2.0, 3.0), (10.0, -15.0), flip=True)
    mirrored = torch.tensor([[210 - 50.0, 15.0, 210 - 20.0, 75.0]])
    assert flipped.to_original(mirrored).tolist() == box.tolist()
    assert flipped.to_original(torch.zeros(0, 4)).shape == (0, 4)


def test_mosaic_has_no_way_back():
    with pytest.raises(ValueError, match="mosaic"):
        View((8, 8), (8, 8), mosaic=(1, 2, 3, 4)).to_original(torch.zeros(1, 4))


def test_view_keys_tell_views_apart():
    views = [
        View((8, 8), (8, 8)),
        View((8, 8), (8, 9)),
        View((8, 8), (8, 8), flip=True),
        View((8, 8), (8, 8), scale_xy=(2.0, 1.0)),
        View((8, 8), (8, 8), offset_xy=(2.0, 0.0)),
        View((8, 8), (8, 8), photometric=(1.0, 1.1, 1.0, 0.0)),
        View((8, 8), (8, 8), mosaic=(1, 2, 3, 4)),
    ]
    assert len({view.key for view in views}) == len(views)
    assert View((8, 8), (8, 8), flip=True).key == "8x8-flip"
    assert View((4, 4), (8, 8)).key == View((9, 9), (8, 8)).key


def test_padding_mask_marks_rows_and_columns_beyond_the_size():
    batch = tiny_batch(2, size=16)
    batch = Batch(batch.images, torch.tensor([[16, 10], [12, 16]]), batch.targets, batch.ids, batch.views)
    mask = batch.padding_mask()
    assert mask.sum(dim=(1, 2)).tolist() == [16 * 6, 4 * 16]
    assert mask[0, :, :10].sum() == 0
    assert bool(mask[0, :, 10:].all())
    assert bool(mask[1, 12:].all())
    assert batch.padding_hw == (16, 16)


def test_with_targets_shares_images_and_refuses_another_count():
    batch, other = tiny_batch(2, seed=0), tiny_batch(2, seed=1)
    changed = batch.with_targets(other.targets)
    assert changed.images is batch.images
    assert changed.ids == batch.ids
    assert changed.targets == other.targets
    with pytest.raises(ValueError, match="2 images need 2 targets, got 1"):
        batch.with_targets(other.targets[:1])


def test_crowd_boxes_are_left_out_with_their_masks():
    boxes = torch.arange(12.0).reshape(3, 4)
    target = Target(boxes, torch.tensor([0, 1, 1]), torch.tensor([False, True, False]), torch.eye(3, dtype=torch.bool)[:, None])
    kept = target.without_crowd()
    assert kept.boxes_xyxy.tolist() == boxes[[0, 2]].tolist()
    assert kept.labels.tolist() == [0, 1]
    assert kept.masks.tolist() == torch.eye(3, dtype=torch.bool)[[0, 2], None].tolist()
    assert kept.without_crowd() is kept
    assert len(target) == 3


# ----------------------------------------------------------------------------------------------- moving and casting


def test_to_detach_and_float_reach_every_tensor_and_nothing_else():
    seen = TinyRegions()(tiny_batch(2))
    half = Features((torch.ones(1, 2, 3, 3, dtype=torch.bfloat16),), (8,), (torch.ones(1, 3, 3, dtype=torch.bool),)).float()
    assert half.maps[0].dtype == torch.float32
    assert half.padding[0].dtype == torch.bool
    assert half.strides == (8,)
    double = Features((torch.ones(1, 2, 3, 3, dtype=torch.float64),), (8,))
    assert double.float().maps[0].dtype == torch.float64
    assert seen.float().prediction.origin.level.dtype == torch.int64
    assert any(tensor.requires_grad for _, tensor in tensors(seen))
    constant = seen.detach()
    assert not any(tensor.requires_grad for _, tensor in tensors(constant))
    assert_same(constant, seen, "")
    assert {tensor.device.type for _, tensor in tensors(seen.to("meta"))} == {"meta"}
    moved = tiny_batch(2).to("meta")
    assert moved.targets[1].boxes_xyxy.device.type == "meta"
    assert moved.views == tiny_batch(2).views


def test_adapters_own_lists_are_detached_too():
    maps = torch.ones(1, requires_grad=True) * 2
    empty = torch.zeros(1, 0, dtype=torch.int64)
    dense = Dense(maps, maps, maps, maps, empty, empty, empty, own={"levels": [maps]})
    assert not dense.detach().own["levels"][0].requires_grad


# ------------------------------------------------------------------------------------------------- split and stack


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


def test_queries_are_split_along_their_second_dimension():
    detector, batch = TinyQueries(), tiny_batch(3)
    features = detector.features(batch)
    queries = detector.decode(features, detector.seed(features, batch), batch, attention=True)
    piece = queries.split(3)[1]
    assert torch.equal(piece.logits, queries.logits[:, 1:2])
    assert torch.equal(piece.attention, queries.attention[:, 1:2])
    assert torch.equal(piece.seed.content, queries.seed.content[1:2])
    assert_same(Queries.stack([piece, queries.split(3)[0]]).boxes_cxcywh01, queries.boxes_cxcywh01[:, [1, 0]], "")


def test_regions_are_split_by_their_origin_even_when_images_are_mixed():
    batch = tiny_batch(3)
    regions = TinyRegions()(batch).prediction.detach()
    order = torch.randperm(len(regions.boxes_xyxy), generator=torch.Generator().manual_seed(0))
    mixed = Regions(
        regions.boxes_xyxy[order],
        regions.origin[order],
        regions.logits[order],
        regions.deltas[order],
        regions.refined_xyxy[order],
        previous=regions,
    )
    piece = mixed.split(3)[2]
    mine = mixed.origin.image == 2
    assert torch.equal(piece.boxes_xyxy, mixed.boxes_xyxy[mine])
    assert torch.equal(piece.origin.cell, mixed.origin.cell[mine])
    assert piece.origin.image.unique().tolist() == [0]
    assert piece.pooled is None
    back = Regions.stack(mixed.split(3))
    assert back.origin.image.tolist() == sorted(mixed.origin.image.tolist())
    assert_same(back.previous, regions, "")


def test_regions_of_an_image_without_any_survive():
    detector, batch = TinyRegions(), tiny_batch(2)
    boxes = [torch.zeros(0, 4), torch.tensor([[0.0, 0.0, 8.0, 8.0]])]
    regions = detector.regions(detector.features(batch), boxes, batch).detach()
    assert regions.origin.image.tolist() == [1]
    pieces = regions.split(2)
    assert [len(piece.boxes_xyxy) for piece in pieces] == [0, 1]
    assert_same(Regions.stack(pieces), regions, "")


def test_stacked_maps_of_different_sizes_are_zero_padded_and_masked():
    small = Features((torch.ones(1, 2, 2, 3), torch.ones(1, 2, 1, 1)), (8, 16))
    large = Features(
        (torch.ones(1, 2, 4, 2), torch.ones(1, 2, 1, 1)),
        (8, 16),
        (torch.zeros(1, 4, 2, dtype=torch.bool), torch.zeros(1, 1, 1, dtype=torch.bool)),
    )
    large.padding[0][:, 3] = True
    both = Features.stack([small, large])
    assert both.maps[0].shape == (2, 2, 4, 3)
    assert both.maps[0].sum(dim=(1, 2, 3)).tolist() == [2 * 6, 2 * 8]
    assert both.padding[0].int().tolist() == [
        [[0, 0, 0], [0, 0, 0], [1, 1, 1], [1, 1, 1]],
        [[0, 0, 1], [0, 0, 1], [0, 0, 1], [1, 1, 1]],
    ]
    assert not both.padding[1].any()
    assert Features.stack([small, small]).padding is None
    unmasked = Features.stack([small, Features((torch.ones(1, 2, 4, 2), torch.ones(1, 2, 1, 1)), (8, 16))])
    assert unmasked.padding[0].sum(dim=(1, 2)).tolist() == [6, 4]


def test_take_keeps_masks_with_their_levels():
    features = TinyDense().backbone_features(tiny_batch(2))
    last = features.take([1])
    assert last.strides == (16,)
    assert torch.equal(last.maps[0], features.maps[1])
    assert torch.equal(last.padding[0], features.padding[1])
    assert features.channels == (6, 6)


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


def test_what_cannot_be_split_is_refused_not_copied():
    @dataclass(frozen=True)
    class Wrong(PerImage):
        assignment: Assignment

    with pytest.raises(TypeError, match="Assignment cannot be split"):
        Wrong(Assignment(torch.zeros(2, 3))).split(2)


# -------------------------------------------------------------------------------------------------------------- origin


def test_origin_given_knows_only_the_image():
    origin = Origin.given([2, 0, 1])
    assert origin.image.tolist() == [0, 0, 2]
    for unknown in (origin.level, origin.cell, origin.anchor, origin.ground_truth):
        assert (unknown == -1).all()
    assert origin.cell.shape == (3, 2)
    assert origin.cell.is_contiguous()
    assert Origin.given([0, 0]).image.tolist() == []


def test_origin_survives_ranking_and_joining():
    origin = Origin(*(torch.arange(4) + 10 * n if n != 2 else torch.arange(8).reshape(4, 2) for n in range(5)))
    ranked = origin[torch.tensor([3, 1])]
    assert ranked.image.tolist() == [3, 1]
    assert ranked.cell.tolist() == [[6, 7], [2, 3]]
    assert ranked.ground_truth.tolist() == [43, 41]
    kept = origin[torch.tensor([True, False, False, True])]
    joined = Origin.cat([ranked, kept])
    assert joined.level.tolist() == [13, 11, 10, 13]
    assert joined.anchor.tolist() == [33, 31, 30, 33]


def test_as_ignored_leaves_the_original_alone():
    assignment = Assignment(torch.tensor([[0, -1, 1]]))
    assert assignment.as_ignored(torch.tensor([[True, False, False]])).matched.tolist() == [[-2, -1, 1]]
    assert assignment.matched.tolist() == [[0, -1, 1]]


# ------------------------------------------------------------------------------------------------------ losses, clock


def test_losses_are_prefixed_merged_and_summed():
    first = Losses({"cls": torch.tensor(1.0), "box": torch.tensor(2.0, dtype=torch.bfloat16)})
    second = Losses({"cls": torch.tensor(4.0)}, {"gap": torch.tensor(100.0)}).prefixed("pkd")
    merged = Losses.merge([first, second])
    assert list(merged.terms) == ["cls", "box", "pkd/cls"]
    assert list(merged.monitors) == ["pkd/gap"]
    assert float(merged.total()) == 7.0
    assert merged.total().dtype == torch.float32
    with pytest.raises(ValueError, match="'cls'"):
        Losses.merge([first, Losses({"cls": torch.tensor(0.0)})])


def test_total_trains_terms_and_never_monitors():
    term, monitor = torch.tensor(1.0, requires_grad=True), torch.tensor(1.0, requires_grad=True)
    Losses({"a": term * 2, "b": term * 3}, {"m": monitor * 5}).total().backward()
    assert float(term.grad) == 5.0
    assert monitor.grad is None


def test_clock():
    assert Clock(0, 10).progress == 0.0
    assert Clock(5, 10).progress == 0.5
    assert Clock(0, 0).progress == 0.0
    assert [Clock(step, 10).warm_up(4) for step in (0, 1, 4, 9)] == [0.0, 0.25, 1.0, 1.0]
    assert Clock(0, 10).warm_up(0) == 1.0
