"""Anchors, pooling and selection without torchvision's roundings, by hand."""

import math

import torch
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import roi_align

from detdistill.detectors.student_files.models.exact import AlignedRoIAlign, ExactAnchors


def test_anchors_have_exact_sides_and_the_given_strides():
    """224 pixels and 4 cells: the stride stays 64 (torchvision: 56); 32 2^(1/3) stays 40.317 (torchvision: 40)."""
    side = 32 * 2 ** (1 / 3)
    generator = ExactAnchors(sizes=[[side]], aspect_ratios=[[0.5, 1.0]], strides=[64])
    anchors = generator(ImageList(torch.zeros(1, 3, 224, 224), [(224, 224)]), [torch.zeros(1, 8, 4, 4)])[0]
    wide, high = side * math.sqrt(2), side / math.sqrt(2)
    shapes = torch.tensor([[-wide, -high, wide, high], [-side, -side, side, side]]) / 2
    expected = [shapes + 64 * torch.tensor([column, row, column, row]) for row in range(4) for column in range(4)]
    torch.testing.assert_close(anchors, torch.cat(expected), rtol=1e-6, atol=1e-5)


def test_pooling_is_aligned_on_the_level_of_each_box():
    """Areas of 112^2 and below go to the first level, of 224^2 to the second."""
    torch.manual_seed(0)
    maps = {"0": torch.randn(1, 4, 64, 64), "1": torch.randn(1, 4, 32, 32)}
    boxes = torch.tensor([[3.0, 5.0, 60.0, 90.0], [10.0, 0.0, 250.0, 230.0]])
    pool = AlignedRoIAlign(["0", "1"], output_size=7, sampling_ratio=0)
    found = pool(maps, [boxes], [(512, 512)])
    for index, (name, scale) in enumerate((("0", 1 / 8), ("1", 1 / 16))):
        region = torch.cat([torch.zeros(1, 1), boxes[index : index + 1]], dim=1)
        expected = roi_align(maps[name], region, (7, 7), scale, 0, aligned=True)
        torch.testing.assert_close(found[index : index + 1], expected, rtol=1e-6, atol=1e-6)
