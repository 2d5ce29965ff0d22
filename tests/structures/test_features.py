import torch

from detdistill.structures import Features
from tests.tiny import TinyDense, tiny_batch


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
