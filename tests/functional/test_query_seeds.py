"""Queries of one decoder for another: formats, gaps, bridges, random queries, and the GIoU of released DETRs."""

from dataclasses import asdict

import pytest
import torch
from torch import nn

from detdistill.detectors.contract import DetectorSpec
from detdistill.errors import DetdistillError
from detdistill.functional.positions import sine_positions
from detdistill.functional.query_seeds import (
    QueryBridge,
    QueryFormat,
    QuerySpec,
    giou_with_eps,
    query_gaps,
    query_spec,
    random_queries,
)
from detdistill.structures import Queries, QuerySeed

PLAIN = QueryFormat(width=8, empty=False, position=False, reference=0)


class Decoder(nn.Module):
    """Six queries with a box each; ``reads_reference`` decides whether the box moves the answer."""

    def __init__(self, reads_reference=True, refuses_below=0, reason=""):
        super().__init__()
        self.content = nn.Parameter(torch.arange(48.0).view(1, 6, 8) / 48)
        self.reads_reference, self.refuses_below, self.reason = reads_reference, refuses_below, reason
        self.spec = DetectorSpec("decoder", "queries", ("a",), channels=(4, 4), strides=(8, 16))
        self.canvases = []

    def seed(self, features, batch):
        self.canvases.append(batch.images.shape[-1])
        if self.canvases[-1] < self.refuses_below:
            raise DetdistillError("fewer cells than queries")
        return QuerySeed(self.content, None, torch.full((1, 6, 4), 0.25))

    def decode(self, features, seed, batch, attention=False):
        if attention and self.reason:
            raise DetdistillError(self.reason)
        boxes = seed.reference if self.reads_reference else torch.zeros_like(seed.reference)
        count, cells = seed.content.shape[1], sum(level.shape[-1] * level.shape[-2] for level in features.maps)
        layers = torch.stack([boxes, boxes, boxes])
        cross = torch.zeros(3, 1, 5, count, cells) if attention else None
        among = torch.zeros(3, 1, 5, count, count) if attention else None
        return Queries(torch.zeros(3, 1, count, 1), layers, seed.content[None], seed, attention=cross, self_attention=among)


def test_query_spec_finds_format_layers_and_heads():
    decoder = Decoder().train()
    spec = query_spec(decoder)
    box = QueryFormat(8, False, False, 4)
    assert spec == QuerySpec(box, box, layers=3, width=8, heads=5, self_attention=True, cross_attention=True)
    assert decoder.training
    assert QuerySpec.from_plain(asdict(spec)) == spec


def test_query_spec_leaves_out_a_reference_that_changes_nothing():
    spec = query_spec(Decoder(reads_reference=False))
    assert (spec.gives.reference, spec.reads.reference) == (4, 0)


def test_query_spec_tries_larger_canvases_and_then_says_why_none_served():
    decoder = Decoder(refuses_below=500)
    assert query_spec(decoder).layers == 3
    assert decoder.canvases == [128, 256, 512]
    with pytest.raises(DetdistillError, match="fewer cells than queries"):
        query_spec(Decoder(refuses_below=5000))


def test_query_spec_keeps_the_reason_for_missing_attention():
    spec = query_spec(Decoder(reason="it samples points"))
    assert (spec.heads, spec.self_attention, spec.cross_attention, spec.no_attention) == (0, False, False, "it samples points")


def test_format_of_queries():
    content = torch.zeros(2, 3, 8)
    assert QueryFormat.of(QuerySeed(content, None, None)) == QueryFormat(8, True, False, 0)
    point = QuerySeed(content + 1, content, torch.zeros(2, 3, 2))
    assert QueryFormat.of(point) == QueryFormat(8, False, True, 2)


@pytest.mark.parametrize(
    ("gives", "reads", "gaps"),
    [
        (PLAIN, PLAIN, []),
        (QueryFormat(8, False, True, 4), PLAIN, []),  # parts that are not read are no gap
        (QueryFormat(4, False, False, 0), PLAIN, ["contents of 8 channels (these have 4)"]),
        (QueryFormat(4, True, False, 0), PLAIN, []),  # zeros have any width
        (PLAIN, QueryFormat(8, False, True, 0), ["position embeddings"]),
        (QueryFormat(4, True, True, 0), QueryFormat(8, True, True, 0), ["position embeddings of 8 channels (these have 4)"]),
        (PLAIN, QueryFormat(8, False, False, 4), ["reference boxes"]),
        (QueryFormat(8, False, False, 2), QueryFormat(8, False, False, 4), ["reference boxes (these have points)"]),
        (PLAIN, QueryFormat(8, False, False, 2), ["points"]),
    ],
)
def test_gaps_and_the_parameters_that_fill_them(gives, reads, gaps):
    assert query_gaps(gives, reads) == gaps
    assert bool(list(QueryBridge(gives, reads).parameters())) == bool(gaps)


def test_a_bridge_without_gaps_drops_what_is_not_read_and_cuts_the_graph():
    content = torch.randn(1, 2, 8, requires_grad=True)
    box = torch.tensor([[[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8]]])
    read = QueryBridge(QueryFormat(8, False, True, 4), QueryFormat(8, False, False, 2))(QuerySeed(content, content, box))
    assert read.position is None
    torch.testing.assert_close(read.reference, box[..., :2])
    torch.testing.assert_close(read.content, content.detach())
    assert not read.content.requires_grad


def test_a_bridge_makes_zeros_of_zeros():
    read = QueryBridge(QueryFormat(4, True, False, 0), PLAIN)(QuerySeed(torch.zeros(1, 2, 4), None, None))
    assert read.content.shape == (1, 2, 8)
    assert not read.content.any()


def test_a_bridge_makes_positions_from_the_sines_of_a_box():
    bridge = QueryBridge(QueryFormat(8, False, False, 4), QueryFormat(8, False, True, 4))
    seed = QuerySeed(torch.randn(1, 2, 8), None, torch.rand(1, 2, 4))
    sines = torch.cat([sine_positions(seed.reference[..., :2], 8), sine_positions(seed.reference[..., 2:], 8)], dim=-1)
    torch.testing.assert_close(bridge(seed).position, bridge.position(sines))


def test_a_bridge_makes_positions_from_contents_where_there_is_no_reference():
    bridge = QueryBridge(PLAIN, QueryFormat(8, False, True, 0))
    seed = QuerySeed(torch.randn(1, 2, 8), None, None)
    torch.testing.assert_close(bridge(seed).position, bridge.position(seed.content))


def test_a_bridge_between_widths_maps_contents_and_positions():
    bridge = QueryBridge(QueryFormat(4, False, True, 0), QueryFormat(8, False, True, 0))
    seed = QuerySeed(torch.randn(1, 2, 4), torch.randn(1, 2, 4), None)
    read = bridge(seed)
    torch.testing.assert_close(read.content, bridge.content(seed.content))
    torch.testing.assert_close(read.position, bridge.position(seed.position))


def test_a_bridge_turns_points_into_boxes_of_about_an_eighth_of_the_image():
    bridge = QueryBridge(QueryFormat(8, False, True, 2), QueryFormat(8, False, True, 4))
    nn.init.zeros_(bridge.reference.weight)
    point = torch.tensor([[[0.1, 0.9]]])
    read = bridge(QuerySeed(torch.randn(1, 1, 8), torch.randn(1, 1, 8), point))
    torch.testing.assert_close(read.reference, torch.tensor([[[0.1, 0.9, 0.1192029, 0.1192029]]]))
    nn.init.ones_(bridge.reference.weight)
    nn.init.zeros_(bridge.reference.bias)
    seed = QuerySeed(torch.full((1, 1, 8), 0.1), torch.full((1, 1, 8), 0.2), point)
    torch.testing.assert_close(bridge(seed).reference[0, 0, 2:].logit(), torch.full((2,), 2.4))  # 8 * (0.1 + 0.2)


def test_a_bridge_makes_a_point_near_the_middle_at_first():
    bridge = QueryBridge(PLAIN, QueryFormat(8, False, False, 2))
    assert torch.equal(bridge.reference.bias, torch.zeros(2))
    nn.init.zeros_(bridge.reference.weight)
    torch.testing.assert_close(bridge(QuerySeed(torch.randn(1, 1, 8), None, None)).reference, torch.full((1, 1, 2), 0.5))


def test_random_queries_are_one_set_for_all_images_in_the_wanted_format():
    like = torch.zeros(3, 1, dtype=torch.float64)
    torch.manual_seed(5)
    drawn = random_queries(QueryFormat(8, False, True, 4), 40, like)
    torch.manual_seed(5)
    expected = [torch.randn(40, 8), torch.randn(40, 8), torch.randn(40, 4).sigmoid()]
    for part, values in zip((drawn.content, drawn.position, drawn.reference), expected, strict=True):
        assert part.dtype == torch.float64
        torch.testing.assert_close(part[2], values.double())
        assert torch.equal(part[0], part[2])
    empty = random_queries(QueryFormat(8, True, False, 0), 4, like)
    assert empty.content.shape == (3, 4, 8)
    assert not empty.content.any()
    assert (empty.position, empty.reference) == (None, None)


def test_giou_of_hand_made_boxes():
    """Boxes of 2 x 2 and 4 x 2 that share 1 x 2: union 10; the hull is 5 x 2. And two that lie apart."""
    first = torch.tensor([[1.0, 1.0, 2.0, 2.0], [0.5, 0.5, 1.0, 1.0]], dtype=torch.float64)
    second = torch.tensor([[3.0, 1.0, 4.0, 2.0], [3.5, 0.5, 1.0, 1.0]], dtype=torch.float64)
    expected = torch.tensor([2 / 10 - 0 / 10, 0 / 2 - 2 / 4], dtype=torch.float64)
    torch.testing.assert_close(giou_with_eps(first, second, eps=0.0), expected)
    with_eps = torch.tensor([2 / 10.5 - 0 / 10.5, 0 / 2.5 - 2 / 4.5], dtype=torch.float64)
    torch.testing.assert_close(giou_with_eps(first, second, eps=0.5), with_eps)
    apart = torch.tensor([0.5, 3.5, 1.0, 1.0], dtype=torch.float64), torch.tensor([0.5, 0.5, 1.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(giou_with_eps(*apart, eps=0.0), torch.tensor(-0.5, dtype=torch.float64))


def test_giou_gradients_agree_with_finite_differences():
    generator = torch.Generator().manual_seed(3)
    boxes = torch.rand(2, 4, 4, generator=generator, dtype=torch.float64).add(0.3)
    torch.autograd.gradcheck(giou_with_eps, (boxes[0].requires_grad_(), boxes[1].requires_grad_()))
