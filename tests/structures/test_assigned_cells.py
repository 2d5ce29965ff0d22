import dataclasses

import pytest
import torch

from detdistill.cache.encoding import STORES, decode, encode
from detdistill.structures import IGNORED, NEGATIVE, AssignedCells, Assignment, Batch, Dense
from tests.methods.contract_checks import assert_same, without_boxes
from tests.methods.offline_checks import one_by_one
from tests.tiny import TinyDense, tiny_batch

STRIDES = (8, 16)


def dense_on(canvas_hw, strides=STRIDES, anchors=(1, 1), images=1):
    """A prediction with nothing in it but its cells, in the order level, row, column, anchor."""
    places = [
        (level, row, column, anchor)
        for level, (stride, count) in enumerate(zip(strides, anchors, strict=True))
        for row in range(-(-canvas_hw[0] // stride))
        for column in range(-(-canvas_hw[1] // stride))
        for anchor in range(count)
    ]
    levels, rows, columns, numbers = torch.tensor(places).unbind(1)
    zeros = torch.zeros(images, len(places), 4)
    return Dense(zeros[..., :2], zeros, zeros, zeros, levels, torch.stack([rows, columns], 1), numbers)


def batch_of(sizes, canvas_hw=None):
    """Images of given height and width, without boxes, on their common canvas."""
    canvas_hw = canvas_hw or tuple(map(max, zip(*sizes, strict=True)))
    batch = without_boxes(tiny_batch(len(sizes)), range(len(sizes)))
    return Batch(
        torch.zeros(len(sizes), 3, *canvas_hw),
        torch.tensor(sizes),
        batch.targets,
        batch.ids,
        batch.views,
        (canvas_hw,) * len(sizes),
    )


def index_of(dense, level, row, column, anchor=0):
    wanted = torch.tensor([level, row, column, anchor])
    places = torch.stack([dense.levels, *dense.cells.unbind(1), dense.anchors], 1)
    (index,) = torch.nonzero((places == wanted).all(dim=1)).flatten().tolist()
    return index


def assigned(dense, **cells):
    """All negative but for places such as ``l0r1c2a0=3``."""
    matched = torch.full(dense.boxes_xyxy.shape[:2], NEGATIVE)
    for place, box in cells.items():
        level, row, column, anchor = (int(digit) for digit in place if digit.isdigit())
        matched[0, index_of(dense, level, row, column, anchor)] = box
    return Assignment(matched)


def test_places_by_hand():
    dense, batch = dense_on((16, 24), anchors=(2, 1)), batch_of([(16, 24)])
    assignment = assigned(dense, l0r1c2a1=5, l1r0c1a0=0, l0r0c0a0=IGNORED)
    cells = AssignedCells.of(assignment, dense, batch, STRIDES)
    assert cells.places.tolist() == [[[0, 0, 0, 0], [0, 1, 2, 1], [1, 0, 1, 0]]]
    assert cells.ground_truth.tolist() == [[IGNORED, 5, 0]]
    assert (cells.weights, cells.padding_ignored.tolist(), cells.strides) == (None, [False], STRIDES)
    assert_same(cells.on(dense, batch), assignment, "")


@pytest.mark.parametrize("images_without_boxes", [range(0), range(1), range(3)])
def test_the_own_assignment_of_a_batch_comes_back(images_without_boxes):
    detector, batch = TinyDense(), without_boxes(tiny_batch(3), images_without_boxes)
    prediction = detector(batch).prediction
    assignment = detector.assign(prediction, batch)
    assert (int((assignment.matched >= 0).sum()) > 0) == (len(images_without_boxes) < 3)
    cells = AssignedCells.of(assignment, prediction, batch, detector.spec.strides)
    found = cells.on(prediction, batch)
    assert torch.equal(found.matched, assignment.matched)
    assert (found.weights, found.normalizer) == (None, None)
    assert_same(detector.loss(prediction, batch, found).terms, detector.loss(prediction, batch).terms, "")


def random_assignment(dense, batch, generator, weighted=True):
    """A third of the cells inside each image answers for a box or is ignored; negatives weigh 1."""
    shape = dense.boxes_xyxy.shape[:2]
    draw = torch.rand(shape, generator=generator)
    matched = torch.full(shape, NEGATIVE)
    matched[draw < 0.2] = torch.randint(0, 9, (int((draw < 0.2).sum()),), generator=generator)
    matched[(draw >= 0.2) & (draw < 0.33)] = IGNORED
    stride = torch.tensor(STRIDES)[dense.levels][:, None]
    inside = (dense.cells * stride < batch.sizes[:, None]).all(dim=-1)
    matched[~inside] = NEGATIVE
    weights = torch.where(matched == NEGATIVE, 1.0, torch.rand(shape, generator=generator)) if weighted else None
    return Assignment(matched, weights), inside


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("store", STORES)
def test_split_stacked_and_kept_in_any_store_it_is_the_same_assignment(weighted, store):
    batch = batch_of([(64, 64), (48, 40), (16, 64)])
    dense = dense_on((64, 64), anchors=(3, 1), images=3)
    assignment, _ = random_assignment(dense, batch, torch.Generator().manual_seed(0), weighted)
    cells = AssignedCells.of(assignment, dense, batch, STRIDES)
    pieces = []
    for piece in cells.split(3):
        record = encode(piece, store)
        pieces.append(decode(record.layout, bytearray(record.data)))
        assert type(pieces[-1]) is AssignedCells
        assert pieces[-1].places.dtype == torch.int64
    again = AssignedCells.stack(pieces)
    assert again.strides == STRIDES
    found = again.on(dense, batch)
    assert torch.equal(found.matched, assignment.matched)
    if weighted:
        tolerance = {"float32": 0.0, "float16": 1e-3, "bfloat16": 1e-2, "int8": 1e-2, "int6": 3e-2}[store]
        torch.testing.assert_close(found.weights, assignment.weights, rtol=0, atol=tolerance)
        assert bool((found.weights[found.matched == NEGATIVE] == 1).all())
    else:
        assert found.weights is None
    turned = AssignedCells.stack([pieces[2], pieces[0]])
    mixed = batch_of([(16, 64), (64, 64)])
    assert torch.equal(turned.on(dense_on((64, 64), anchors=(3, 1), images=2), mixed).matched, assignment.matched[[2, 0]])


@pytest.mark.parametrize("padding_ignored", [False, True])
def test_an_image_alone_is_laid_on_the_canvas_of_a_batch(padding_ignored):
    """From a canvas of its own to a larger one, where the cells beyond the image are as the record says."""
    generator = torch.Generator().manual_seed(1)
    alone, dense = batch_of([(40, 56)], canvas_hw=(48, 64)), dense_on((48, 64))
    assignment, inside = random_assignment(dense, alone, generator)
    if padding_ignored:
        assignment = assignment.as_ignored(~inside)
    cells = AssignedCells.of(assignment, dense, alone, STRIDES)
    assert cells.padding_ignored.tolist() == [padding_ignored]
    together, large = batch_of([(40, 56)], canvas_hw=(96, 64)), dense_on((96, 64))
    found = cells.on(large, together)
    for index in range(len(large.levels)):
        level, (row, column) = int(large.levels[index]), large.cells[index].tolist()
        if row * STRIDES[level] < 40 and column * STRIDES[level] < 56:
            mine = index_of(dense, level, row, column)
            assert found.matched[0, index] == assignment.matched[0, mine]
            assert found.weights[0, index] == assignment.weights[0, mine]
        else:
            assert found.matched[0, index] == (IGNORED if padding_ignored else NEGATIVE)
    assert torch.equal(cells.on(dense, alone).matched, assignment.matched)


def test_cells_that_begin_in_the_image_are_listed_and_those_beyond_are_not():
    dense, batch = dense_on((32, 32)), batch_of([(17, 32)], canvas_hw=(32, 32))
    last_row_inside = assigned(dense, l0r2c0a0=1, l1r1c0a0=2)  # both begin at row 16, the image's last
    cells = AssignedCells.of(last_row_inside, dense, batch, STRIDES)
    assert cells.ground_truth.tolist() == [[1, 2]]
    assert torch.equal(cells.on(dense, batch).matched, last_row_inside.matched)
    # A box that reaches over padding: what answers for it there is left out, and negative afterwards.
    beyond = assigned(dense, l0r3c0a0=1, l0r0c0a0=1)
    cells = AssignedCells.of(beyond, dense, batch, STRIDES)
    assert cells.places.tolist() == [[[0, 0, 0, 0]]]
    assert torch.equal(cells.on(dense, batch).matched, assigned(dense, l0r0c0a0=1).matched)


def test_cells_that_a_prediction_lacks_are_passed_over():
    dense, batch = dense_on((32, 32)), batch_of([(32, 32)])
    cells = AssignedCells.of(assigned(dense, l0r3c3a0=1, l0r0c1a0=2, l1r1c1a0=3), dense, batch, STRIDES)
    small = dense_on((16, 32), strides=(8,), anchors=(1,))
    found = cells.on(small, batch_of([(16, 32)]))
    assert torch.equal(found.matched, assigned(small, l0r0c1a0=2).matched)
    # More anchors in a cell than the assigner had: the further ones are negative.
    more = dense_on((32, 32), anchors=(2, 2))
    found = cells.on(more, batch)
    assert int((found.matched >= 0).sum()) == 3
    assert found.matched[0, index_of(more, 0, 3, 3, 0)] == 1
    assert found.matched[0, index_of(more, 0, 3, 3, 1)] == NEGATIVE


def test_a_batch_without_anything_assigned():
    dense, batch = dense_on((16, 16), images=2), batch_of([(16, 16), (16, 16)])
    nothing = Assignment(torch.full(dense.boxes_xyxy.shape[:2], NEGATIVE))
    cells = AssignedCells.of(nothing, dense, batch, STRIDES)
    assert cells.places.shape == (2, 0, 4)
    assert torch.equal(AssignedCells.stack(cells.split(2)).on(dense, batch).matched, nothing.matched)
    record = encode(cells.split(2)[0], "float32")
    assert len(record.data) == 1, "one byte: the padding is not ignored"


def test_records_of_single_images_are_the_assignment_of_a_batch_of_many_sizes():
    """As a cache has it: every image assigned on a canvas of its own, then laid on the batch's prediction."""
    detector, batch = TinyDense(), tiny_batch(3)
    batch = dataclasses.replace(batch, canvases_hw=tuple(view.size_hw for view in batch.views))
    pieces = []
    for _, alone in one_by_one(batch):
        prediction = detector(alone).prediction
        cells = AssignedCells.of(detector.assign(prediction, alone), prediction, alone, detector.spec.strides)
        record = encode(cells, "int8")
        pieces.append(decode(record.layout, bytearray(record.data)))
    prediction = detector(batch).prediction
    found = AssignedCells.stack(pieces).on(prediction, batch)
    assert torch.equal(found.matched, detector.assign(prediction, batch).matched)
    assert_same(detector.loss(prediction, batch, found).terms, detector.loss(prediction, batch).terms, "")


@pytest.mark.parametrize(
    ("canvas_hw", "per_cell"),
    [
        ((320, 320), 4 + 1),  # at most 40 rows and columns: one byte for each number
        ((800, 1344), 8 + 1),  # 168 columns: two
    ],
)
def test_size_in_bytes(canvas_hw, per_cell):
    """Nine anchors on five levels: some dozens of cells instead of 22,000 or 200,000 numbers of 8 bytes."""
    strides = (8, 16, 32, 64, 128)
    height, width = (side // 8 for side in canvas_hw)
    dense = dense_on(canvas_hw, strides, (1,) * 5)
    batch = batch_of([canvas_hw])
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(height * width, generator=generator)[:60]
    chosen[0] = height * width - 1  # the last cell, whose numbers are the largest
    matched = torch.full((1, len(dense.levels)), NEGATIVE)
    matched[0, chosen] = torch.arange(60)
    count = int((matched >= 0).sum())
    cells = AssignedCells.of(Assignment(matched), dense, batch, strides)
    assert len(encode(cells, "float32").data) == count * per_cell + 1
    weighted = AssignedCells.of(Assignment(matched, torch.ones(matched.shape)), dense, batch, strides)
    assert len(encode(weighted, "float32").data) == count * (per_cell + 4) + 1
    assert torch.equal(cells.on(dense, batch).matched, matched)


def test_cells_go_to_the_levels_of_another_detector_by_stride():
    dense, batch = dense_on((32, 32), anchors=(2, 1)), batch_of([(32, 32)])
    cells = AssignedCells.of(assigned(dense, l0r1c2a1=5, l1r0c1a0=0, l0r0c0a0=IGNORED), dense, batch, STRIDES)
    coarse = dense_on((32, 32), strides=(16, 32), anchors=(1, 1))
    assert_same(cells.with_strides((16, 32)).on(coarse, batch), assigned(coarse, l0r0c1a0=0), "")
    both = dense_on((32, 32), strides=(4, 8, 16), anchors=(1, 2, 1))
    found = cells.with_strides((4, 8, 16)).on(both, batch)
    assert_same(found, assigned(both, l1r1c2a1=5, l2r0c1a0=0, l1r0c0a0=IGNORED), "")
    assert not (cells.with_strides((64,)).ground_truth != NEGATIVE).any()
    assert_same(cells.with_strides(STRIDES), cells, "")
