import pytest
import torch

from detdistill.structures import Batch, Target, View
from tests.tiny import tiny_batch


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
