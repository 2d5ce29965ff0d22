import pytest
import torch

from detdistill.functional.deformable import (
    LEAST_ROW,
    Cells,
    DeformableAttention,
    DeformableEncoder,
    DeformableEncoderLayer,
    by_cells,
    deformable_attention,
    num_heads,
    places_of_cells,
    valid_ratios,
)

SHAPES = [(5, 7), (3, 4), (1, 2)]
CELLS = sum(rows * columns for rows, columns in SHAPES)


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def randomized(module, seed=0):
    """Weights that are not the initial zeros, which would hide mistakes."""
    module = module.double()
    for index, parameter in enumerate(module.parameters()):
        parameter.data = 0.3 * draw(seed + index, *parameter.shape)
    return module


def run(encoder, maps, padding=None):
    return encoder(Cells.of(maps, padding)).maps()


@pytest.fixture
def library():
    return pytest.importorskip("transformers.models.deformable_detr.modeling_deformable_detr")


@pytest.mark.parametrize("width", [6, 20])  # below and above the width from which cells are weighed instead of sampled
def test_sampling_equals_transformers(library, width):
    value = draw(0, 2, CELLS, 4, width).requires_grad_()
    locations = (draw(1, 2, 9, 4, 3, 5, 2) * 0.4 + 0.5).requires_grad_()  # some outside the map
    weights = draw(2, 2, 9, 4, 15).softmax(-1).view(2, 9, 4, 3, 5).requires_grad_()
    sizes = torch.tensor(SHAPES)
    theirs = library.MultiScaleDeformableAttention()(value, sizes, SHAPES, None, locations, weights, 64)
    ours = deformable_attention(value, SHAPES, locations, weights)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    change = draw(3, *theirs.shape)
    inputs = (value, locations, weights)
    for mine, other in zip(torch.autograd.grad(ours, inputs, change), torch.autograd.grad(theirs, inputs, change), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-10)


def test_cells_are_weighed_on_a_cpu_only_and_in_wide_heads():
    assert by_cells(torch.zeros(1, 2, 1, LEAST_ROW))
    assert not by_cells(torch.zeros(1, 2, 1, LEAST_ROW - 1))
    assert not by_cells(torch.zeros(1, 2, 1, LEAST_ROW, device="meta"))  # scipy's sparse products need a CPU


def test_places_without_a_number_give_none():
    """The loop must meet NaN in the loss and say so, not an index out of range somewhere inside."""
    value = draw(0, 1, CELLS, 1, 16).requires_grad_()
    locations = torch.full((1, 2, 1, 3, 1, 2), 0.5, dtype=torch.float64)
    locations[0, 0, 0, 1] = torch.tensor([float("nan"), 0.5])
    attended = deformable_attention(value, SHAPES, locations, torch.full((1, 2, 1, 3, 1), 1 / 3, dtype=torch.float64))
    attended.sum().backward()
    assert attended[0, 0].isnan().all()
    assert attended[0, 1].isfinite().all()


def test_places_far_outside_see_nothing():
    value = draw(0, 1, CELLS, 1, 16)
    locations = torch.tensor([1e30, -1e30], dtype=torch.float64).expand(1, 2, 1, 3, 1, 2)
    attended = deformable_attention(value, SHAPES, locations, torch.full((1, 2, 1, 3, 1), 1 / 3, dtype=torch.float64))
    assert not attended.any()


def test_layer_equals_transformers(library):
    configuration = pytest.importorskip("transformers").DeformableDetrConfig(
        d_model=16, num_feature_levels=3, encoder_attention_heads=4, encoder_n_points=2, encoder_ffn_dim=64, dropout=0.0
    )
    theirs = library.DeformableDetrEncoderLayer(configuration).double().eval()
    ours = randomized(DeformableEncoderLayer(16, levels=3, heads=4, points=2))
    names = {
        "attention_norm": "self_attn_layer_norm",
        "attention": "self_attn",
        "feed_forward_norm": "final_layer_norm",
        "feed_forward.0": "mlp.fc1",
        "feed_forward.2": "mlp.fc2",
    }

    def renamed(name):
        start = next(start for start in names if name.startswith(start + "."))
        return names[start] + name[len(start) :]

    theirs.load_state_dict({renamed(name): weight for name, weight in ours.state_dict().items()})
    cells, positions = draw(50, 2, CELLS, 16), draw(51, 2, CELLS, 16)
    padding = torch.zeros(2, CELLS, dtype=torch.bool)
    padding[1, 30:35] = True
    ratios = draw(52, 2, 3, 2).sigmoid()
    places = places_of_cells(SHAPES, ratios)
    expected = theirs(
        cells,
        ~padding,
        spatial_position_embeddings=positions,
        reference_points=places[:, :, None] * ratios[:, None],
        spatial_shapes=torch.tensor(SHAPES),
        spatial_shapes_list=SHAPES,
        level_start_index=None,
    )
    torch.testing.assert_close(ours(cells, positions, places, SHAPES, ratios, padding), expected, rtol=1e-10, atol=1e-10)


def test_initial_offsets_equal_transformers(library):
    transformers = pytest.importorskip("transformers")
    configuration = transformers.DeformableDetrConfig(
        d_model=16, num_feature_levels=3, encoder_attention_heads=8, encoder_n_points=2, encoder_layers=1
    )
    theirs = library.DeformableDetrEncoder(configuration).layers[0].self_attn
    ours = DeformableAttention(16, levels=3, heads=8, points=2)
    torch.testing.assert_close(ours.sampling_offsets.bias, theirs.sampling_offsets.bias, rtol=0, atol=1e-6)
    assert not ours.sampling_offsets.weight.any()


def test_valid_ratios_and_places():
    """A map of 4 x 6 cells of which 3 x 4 show the second image: its fourth column ends at 1, its fifth lies beyond."""
    padding = torch.zeros(2, 4, 6, dtype=torch.bool)
    padding[1, 3:], padding[1, :, 4:] = True, True
    ratios = valid_ratios([padding])
    torch.testing.assert_close(ratios, torch.tensor([[[1.0, 1.0]], [[4 / 6, 3 / 4]]]))
    places = places_of_cells([(4, 6)], ratios).view(2, 4, 6, 2)
    torch.testing.assert_close(places[1, 0, :, 0], torch.tensor([0.5, 1.5, 2.5, 3.5, 4.5, 5.5]) / 4)
    torch.testing.assert_close(places[0, :, 0, 1], torch.tensor([0.5, 1.5, 2.5, 3.5]) / 4)


def test_uniform_attention_on_a_constant_map_returns_it():
    attention = DeformableAttention(8, levels=1, heads=2, points=1).double()
    torch.nn.init.zeros_(attention.sampling_offsets.bias)
    for layer in (attention.value_proj, attention.output_proj):
        torch.nn.init.eye_(layer.weight)
    cells = draw(0, 2, 12, 8)
    # Without offsets each cell samples its own centre.
    ratios = torch.ones(2, 1, 2).double()
    seen = attention(draw(1, 2, 12, 8), places_of_cells([(3, 4)], ratios), cells, [(3, 4)], ratios)
    torch.testing.assert_close(seen, cells, rtol=1e-12, atol=1e-12)


def test_a_box_is_sampled_in_parts_of_its_half_size():
    """One head, one point: a fixed offset of 1 samples half of the box's half size right of and below its centre."""
    attention = DeformableAttention(1, levels=1, heads=1, points=1).double()
    torch.nn.init.ones_(attention.sampling_offsets.bias)
    for layer in (attention.value_proj, attention.output_proj):
        torch.nn.init.ones_(layer.weight)
    cells = torch.arange(16.0, dtype=torch.float64).view(1, 16, 1)  # 4 x 4: value = 4 * row + column
    box = torch.tensor([[[0.375, 0.375, 0.5, 0.5]]], dtype=torch.float64)  # centre of cell (1, 1); half of 0.5 is one cell
    ratios = torch.ones(1, 1, 2, dtype=torch.float64)
    seen = attention(torch.zeros(1, 1, 1, dtype=torch.float64), box, cells, [(4, 4)], ratios)
    assert float(seen.detach()) == pytest.approx(4 * 2 + 2)


def test_more_padding_changes_nothing():
    encoder = randomized(DeformableEncoder(8, levels=2, layers=2, heads=2))
    maps = [draw(7, 1, 8, 4, 6), draw(8, 1, 8, 2, 3)]
    wide = [torch.nn.functional.pad(level, (0, 3, 0, 2), value=9.0) for level in maps]
    masks = [torch.ones_like(level[:, 0], dtype=torch.bool) for level in wide]
    for level, mask in zip(maps, masks, strict=True):
        mask[:, : level.shape[2], : level.shape[3]] = False
    plain, padded = encoder(Cells.of(maps)).maps(), encoder(Cells.of(wide, masks)).maps()
    for before, after in zip(plain, padded, strict=True):
        torch.testing.assert_close(after[..., : before.shape[2], : before.shape[3]], before, rtol=1e-6, atol=1e-6)


def test_no_cell_sees_padding():
    encoder = randomized(DeformableEncoder(8, levels=2, layers=2, heads=2))
    maps = [draw(7, 1, 8, 4, 6), draw(8, 1, 8, 2, 3)]
    padding = [torch.zeros(1, 4, 6, dtype=torch.bool), torch.zeros(1, 2, 3, dtype=torch.bool)]
    padding[0][..., 4:], padding[1][..., 2:] = True, True
    changed = [level.masked_fill(mask[:, None], 99.0) for level, mask in zip(maps, padding, strict=True)]
    for before, after, mask in zip(run(encoder, maps, padding), run(encoder, changed, padding), padding, strict=True):
        keep = ~mask[:, None].expand_as(before)
        torch.testing.assert_close(before[keep], after[keep], rtol=1e-12, atol=1e-12)
    unmasked = [(a - b).abs().max() for a, b in zip(run(encoder, maps), run(encoder, changed), strict=True)]
    assert float(unmasked[0]) > 1e-3


def test_no_layers_are_the_identity():
    encoder = DeformableEncoder(8, levels=1, layers=0)
    level = draw(0, 1, 8, 2, 2)
    assert torch.equal(run(encoder, [level])[0], level)
    assert not list(encoder.parameters())


def test_every_parameter_learns_and_levels_mix():
    encoder = randomized(DeformableEncoder(6, levels=2, layers=1))
    maps = [draw(3, 2, 6, 4, 4).requires_grad_(), draw(4, 2, 6, 2, 2).requires_grad_()]
    run(encoder, maps)[0].square().mean().backward()
    assert float(maps[1].grad.abs().max()) > 0
    assert all(float(p.grad.abs().max()) > 0 for p in encoder.parameters())


@pytest.mark.parametrize(("channels", "heads"), [(256, 8), (12, 6), (7, 7), (11, 1), (1, 1)])
def test_heads_divide_the_channels(channels, heads):
    assert num_heads(channels) == heads


def test_half_precision_stays_close():
    torch.manual_seed(0)
    encoder = DeformableEncoder(16, levels=2, layers=2)
    maps = [torch.randn(1, 16, 8, 8), torch.randn(1, 16, 4, 4)]
    exact = run(encoder, maps)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = run(encoder, maps)
    for a, b in zip(exact, half, strict=True):
        assert float((a - b).abs().mean()) < 0.02
