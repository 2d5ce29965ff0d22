import math

import pytest
import torch
import torch.nn.functional as F

from detdistill.functional.cells import index_cells
from detdistill.functional.deformable import cell_centers
from detdistill.functional.positions import (
    NO_CLASS,
    boxes_with_context,
    corner_descriptors,
    detr_positions,
    point_descriptors,
    relative_boxes,
    sine_positions,
)
from tests.golden import Golden, assert_golden

# ----------------------------------------------------------------------------------------------------------- sine codes


def test_sines_by_hand():
    """Eight channels: for y and for x two frequencies, 1 and 1/100, each as sine and cosine."""
    found = sine_positions(torch.tensor([0.1, 0.7], dtype=torch.float64), 8)
    expected = []
    for place in (0.7, 0.1):
        for frequency in (1.0, 0.01):
            expected += [math.sin(2 * math.pi * place * frequency), math.cos(2 * math.pi * place * frequency)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_positions_equal_transformers():
    library = pytest.importorskip("transformers.models.deformable_detr.modeling_deformable_detr")
    sine = library.DeformableDetrSinePositionEmbedding(num_position_features=6, normalize=True)
    expected = sine(torch.Size((1, 12, 5, 7)), "cpu", torch.float64)[0].flatten(1).T
    # Theirs adds 1e-6 to the size of the map.
    ours = sine_positions(cell_centers([(5, 7)], like=expected), 12)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def test_positions_serve_any_number_of_channels():
    places = cell_centers([(3, 4)], like=torch.zeros((), dtype=torch.float64))
    assert sine_positions(places, 10).shape == (12, 10)
    assert torch.equal(sine_positions(places, 10), sine_positions(places, 12)[:, :10])


def test_detr_positions_equal_the_released_code_of_icd():
    golden = Golden("icd")
    padding, expected = golden["out_padding_mask"], golden["out_pos_embedding"]  # [B, S] and [S, B, D], level by level
    shapes = [tuple(level.shape[2:]) for level in golden.levels("in_student")]
    masks = padding.split([height * width for height, width in shapes], dim=1)
    found = [
        detr_positions(mask.view(-1, *shape), expected.shape[2], torch.float64).flatten(1, 2)
        for mask, shape in zip(masks, shapes, strict=True)
    ]
    assert_golden(torch.cat(found, dim=1).transpose(0, 1), expected)


def test_detr_positions_count_valid_cells():
    """A map of 4 x 6 cells, of which 3 x 4 show the second image: its third row is the last, at 2 pi."""
    padding = torch.zeros(2, 4, 6, dtype=torch.bool)
    padding[1, 3:], padding[1, :, 4:] = True, True
    found = detr_positions(padding, 8, torch.float64)
    places = torch.stack([torch.arange(1, 5).expand(3, -1) / 4, (torch.arange(1, 4) / 3)[:, None].expand(-1, 4)], dim=-1)
    torch.testing.assert_close(found[1, :3, :4], sine_positions(places.double(), 8), rtol=0, atol=1e-5)
    assert bool(found.isfinite().all())
    alone = detr_positions(torch.zeros(1, 3, 4, dtype=torch.bool), 8, torch.float64)
    assert torch.equal(found[1:, :3, :4], alone)  # more padding changes nothing


def test_detr_positions_of_half_precision_count_fine_maps():
    """Half precision alone cannot count beyond 2048."""
    padding = torch.zeros(1, 1, 3000, dtype=torch.bool)
    found = detr_positions(padding, 4, torch.float16)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.float(), detr_positions(padding, 4), rtol=0, atol=1e-3)


# ---------------------------------------------------------------------------------------------------------- descriptors


def test_relative_boxes_lead_back_to_the_boxes():
    boxes = torch.rand(5, 2, 2, dtype=torch.float64).sort(dim=1).values.flatten(1) * 50
    found = relative_boxes(boxes, (40, 80))
    center, size = found[:, :2] * torch.tensor([80, 40]), found[:, 2:] * torch.tensor([80, 40])
    torch.testing.assert_close(torch.cat([center - size / 2, center + size / 2], dim=1), boxes)
    assert torch.equal(relative_boxes(boxes, torch.tensor([40, 80])), found)
    assert relative_boxes(boxes[:0], (40, 80)).shape == (0, 4)
    torch.testing.assert_close(
        relative_boxes(boxes, (0.1, 0.3)), found * torch.tensor([80 / 0.3, 40 / 0.1]).double().repeat(2), rtol=1e-7, atol=0
    )


def test_point_descriptors_equal_the_released_code_of_icd():
    golden = Golden("icd")
    height, width = golden["in_image_sizes"][-1].tolist()  # the released code takes the last image's for all
    ltrb = golden["in_query_ltrb"]
    sizes = (ltrb[..., :2] + ltrb[..., 2:]) * torch.tensor([width, height])
    found = point_descriptors(golden["in_query_point"], sizes, golden["in_query_class"], golden.meta["num_classes"])
    assert_golden(found.transpose(0, 1), golden["out_descriptor"])


def test_point_descriptors_by_hand():
    """Bins begin at e^(6 / 1.44) = 64.5, e^(7 / 1.44) = 129.1, e^(8 / 1.44) = 258.6 and e^(9 / 1.44) = 518.0 pixels."""
    sizes = torch.tensor([[0.0, 1e-3], [64, 65], [129, 130], [258, 259], [518, 519], [-5.0, 1e6]], dtype=torch.float64)
    points = torch.tensor([[0.3, 0.9]], dtype=torch.float64).expand(6, -1)
    found = point_descriptors(points, sizes, torch.tensor([0, 1, 2, 0, 1, NO_CLASS]), num_classes=3)
    assert found[:, :3].tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0], [0, 1, 0], [0, 0, 0]]
    bins = found[:, 259:].view(6, 2, 5)
    assert bins.argmax(dim=-1).tolist() == [[0, 0], [0, 1], [1, 2], [2, 3], [3, 4], [0, 4]]
    assert bins.sum(dim=-1).tolist() == [[0, 1], [1, 1], [1, 1], [1, 1], [1, 1], [0, 1]]
    for start, place in ((3, 0.3), (131, 0.9)):
        angles = torch.tensor([2 * math.pi * place / 10000 ** (k / 64) for k in range(64)], dtype=torch.float64)
        torch.testing.assert_close(found[2, start : start + 128], torch.cat([angles.sin(), angles.cos()]), rtol=0, atol=1e-12)


def test_context_is_last_and_only_where_there_are_boxes():
    boxes, labels = torch.tensor([[-3.0, 5.0, 90.0, 70.0], [1.0, 2.0, 3.0, 4.0]]), torch.tensor([7, 0])
    found, names = boxes_with_context(boxes, labels, (64, 80), context=True)
    assert found.tolist() == [[0, 5, 79, 63], [1, 2, 3, 4], [0, 0, 79, 63]]
    assert names.tolist() == [7, 0, NO_CLASS]
    found, names = boxes_with_context(boxes, labels, (64, 80), context=False)
    assert found.tolist() == [[0, 5, 79, 63], [1, 2, 3, 4]]
    assert names.tolist() == [7, 0]
    for context in (True, False):
        found, names = boxes_with_context(boxes[:0], labels[:0], (64, 80), context)
        assert found.tolist() == [[0, 0, 1, 1]]
        assert names.tolist() == [NO_CLASS]


def test_the_context_covers_every_cell_of_every_level():
    boxes, _ = boxes_with_context(torch.tensor([[10.0, 10.0, 20.0, 20.0]]), torch.tensor([0]), (64, 80), context=True)
    for shape in ((8, 10), (4, 5), (2, 3), (1, 2), (1, 1)):
        assert bool(index_cells(boxes, (64, 80), shape).regions()[1].all())


def test_corner_descriptors_by_hand():
    boxes, labels = boxes_with_context(torch.tensor([[16.0, 8.0, 99.0, 40.0]]), torch.tensor([1]), (32, 64), context=True)
    found = corner_descriptors(boxes, labels, (32, 64), num_classes=3)
    right, bottom = 2 * 63 / 64 - 1, 2 * 31 / 32 - 1  # never 1
    assert found.tolist() == [[-0.5, -0.5, right, bottom, -1, 1, -1], [-1, -1, right, bottom, -1, -1, -1]]


def released_parameters(meta):
    """The label encoder's parameters by the formula that the golden file describes; convolutions of size 1 as matrices."""
    found = {}
    for number, (name, shape) in enumerate(meta["teacher_parameters"]):
        if not name.startswith("label_encoder_."):
            continue
        count = math.prod(shape)
        x = 43758.5453 * torch.sin(12.9898 * (torch.arange(count, dtype=torch.float64) % 9973) + 78.233 * (number + 1))
        scale = math.sqrt(6 / (count / shape[0])) if len(shape) > 1 else 0.1
        found[name.removeprefix("label_encoder_.")] = (scale * (2 * (x - x.floor()) - 1)).float().view(shape[:2])
    return found


def layer(x, parameters, name):
    weight = parameters[f"{name}.weight"]
    return F.linear(x, weight, parameters[f"{name}.bias"])


def block(x, parameters, name):
    raw = layer(x, parameters, name)
    return F.layer_norm(raw, raw.shape[-1:]).relu()


def transformed(x, parameters, name):
    """Each row times a matrix that a small network makes of it."""
    hidden = x
    for part in ("conv1", "conv2", "conv3", "fc1", "fc2"):
        hidden = block(hidden, parameters, f"{name}.{part}")
    matrix = layer(hidden, parameters, f"{name}.fc3").view(len(x), x.shape[1], x.shape[1])
    return (x[:, None] @ matrix)[:, 0]


@pytest.mark.parametrize("variant", ["ctx", "noctx"])
def test_label_embedding_of_the_descriptors_equals_the_released_code_of_lgd(variant):
    golden = Golden("lgd")
    size, classes = tuple(golden.meta["image_size_hw"]), golden.meta["num_classes"]
    parameters = released_parameters(golden.meta)
    descriptors, image = [], 0
    while f"in_boxes_{image}" in golden:
        boxes, labels = golden[f"in_boxes_{image}"].reshape(-1, 4), golden[f"in_labels_from0_{image}"].reshape(-1)
        described, labels = boxes_with_context(boxes, labels, size, context=variant == "ctx")
        descriptors.append(corner_descriptors(described, labels, size, classes))
        image += 1
    counts = [len(rows) for rows in descriptors]
    first = block(transformed(torch.cat(descriptors), parameters, "stn_desc"), parameters, "conv1")
    local = transformed(first, parameters, "stn_feat")
    wide = block(block(local, parameters, "conv2"), parameters, "conv3")
    of_image = torch.cat([rows.amax(dim=0, keepdim=True).expand(len(rows), -1) for rows in wide.split(counts)])
    embedding = block(torch.cat([local, of_image], dim=1), parameters, "conv4")
    expected = golden[f"out_{variant}_label_embedding"]
    torch.testing.assert_close(embedding, expected, rtol=1e-4, atol=1e-4)
    assert float(expected.abs().max()) > 1
