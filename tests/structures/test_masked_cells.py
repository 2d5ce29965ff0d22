import pytest
import torch

from detdistill.cache.encoding import STORES, decode, encode
from detdistill.structures import MaskedCells
from tests.methods.contract_checks import assert_same


def maps(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


MASK = torch.zeros(3, 2, 3)
MASK[0] = torch.tensor([[0.0, 0.5, 0.0], [1.0, 0.0, 0.25]])
MASK[2, 0, 2] = 0.75


@pytest.mark.parametrize("mask", [MASK, MASK > 0], ids=["weights", "binary"])
def test_cells_lie_image_by_image_and_row_by_row(mask):
    level = maps(3, 4, 2, 3)
    cells = MaskedCells.of(level, mask)
    assert cells.image.tolist() == [0, 0, 0, 2]
    assert cells.cells.tolist() == [[0, 1], [1, 0], [1, 2], [0, 2]]
    assert torch.equal(cells.values, level.movedim(1, -1)[mask > 0])
    assert torch.equal(cells.pick(level), cells.values)
    assert cells.weights is None if mask.dtype == torch.bool else cells.weights.tolist() == [0.5, 1.0, 0.25, 0.75]


def test_gradient_reaches_the_picked_cells_only():
    level = maps(3, 4, 2, 3).requires_grad_()
    MaskedCells.of(level.detach(), MASK).pick(level).sum().backward()
    assert torch.equal(level.grad, (MASK > 0).float()[:, None].expand_as(level))


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("mask", [MASK, MASK > 0, MASK < 0], ids=["weights", "binary", "empty"])
def test_pieces_are_stored_and_stacked(mask, store):
    cells = MaskedCells.of(maps(3, 4, 2, 3), mask)
    records = [encode(piece, store) for piece in cells.split(3)]
    again = MaskedCells.stack([decode(record.layout, bytearray(record.data)) for record in records])
    coarse = {"float32": 0.0, "float16": 2e-3, "bfloat16": 2e-2, "int8": 2e-2, "int6": 6e-2}[store]
    assert_same(again, cells, "stored cells differ: ", rtol=coarse, atol=coarse)


def test_images_of_unequal_maps():
    first, second = maps(1, 4, 2, 3), maps(1, 4, 3, 2, seed=1)
    pieces = [MaskedCells.of(level, torch.ones_like(level[:, 0], dtype=torch.bool)) for level in (first, second)]
    together = MaskedCells.stack(pieces)
    student = maps(2, 5, 3, 3, seed=2)
    assert torch.equal(together.pick(student)[:6], student[0, :, :2].flatten(1).T)
    assert torch.equal(together.pick(student)[6:], student[1, :, :, :2].flatten(1).T)


def test_maps_of_another_size_are_resized():
    cells = MaskedCells.of(maps(1, 4, 4, 4), torch.ones(1, 4, 4, dtype=torch.bool))
    picked = cells.pick(torch.full((1, 2, 2, 2), 3.0))
    assert torch.equal(picked, torch.full((16, 2), 3.0))


def test_float_keeps_the_places():
    cells = MaskedCells.of(maps(3, 4, 2, 3).bfloat16(), MASK).float()
    assert cells.values.dtype == torch.float32
    assert cells.image.dtype == cells.cells.dtype == torch.int64
