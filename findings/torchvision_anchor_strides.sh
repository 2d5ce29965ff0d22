#!/usr/bin/env bash
# torchvision 0.29.1: anchors of a pyramid level do not lie on its stride when the image is no multiple of it.
#
# Expected: the level of stride 64 has anchors 64 pixels apart. Seen: the distance is the image's side divided by the number of cells,
# rounded down: on 224 pixels, which a level of stride 64 covers with 4 cells, 56 pixels. Maps and anchors then drift apart by up to
# 24 pixels, and MMDetection's and Detectron's weights, trained on true strides, give other boxes. GeneralizedRCNNTransform pads images
# to multiples of 32 only, so this meets every image whose side is no multiple of 64 or 128.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 numpy==2.3.5
"$folder/venv/bin/python" - <<'PYTHON'
import torch
import torchvision
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList


def distance(side: int) -> int:
    """Distance of the anchors of a level of stride 64 on a square image."""
    cells = -(-side // 64)  # convolutions of stride 2 round up
    images = ImageList(torch.zeros(1, 3, side, side), [(side, side)])
    (anchors,) = AnchorGenerator(sizes=((64,),), aspect_ratios=((1.0,),))(images, [torch.zeros(1, 8, cells, cells)])
    return int(anchors[1, 0] - anchors[0, 0])


found = {side: distance(side) for side in (192, 224, 256, 800)}
print(f"torchvision {torchvision.__version__}: distance of anchors on the level of stride 64, by the image's side: {found}")
assert found == {192: 64, 224: 56, 256: 64, 800: 61}, "changed"
print("as found")
PYTHON
