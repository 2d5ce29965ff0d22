import torch

from detdistill.structures import Origin, Queries, Regions
from tests.methods.contract_checks import assert_same
from tests.tiny import TinyQueries, TinyRegions, tiny_batch


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
