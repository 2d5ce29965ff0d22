#!/usr/bin/env bash
# imgann 0.8.1: its conversions from COCO move every box by half its width and height.
#
# Expected: COCO's `bbox` begins with the left upper corner, so [80, 30, 40, 20] becomes 80, 30, 120, 50 in VOC. Seen: the first two
# numbers are taken as the box's centre; boxes near the left or upper border get negative corners. Nothing is said, and coco2csv does
# the same. Back to COCO, the box stays where it was moved to.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet imgann==0.8.1 scikit-learn==1.8.0 opencv-python-headless==4.12.0.88
"$folder/venv/bin/python" -W ignore - "$folder" <<'PYTHON'
import json
import re
import sys
from pathlib import Path

from imgann import Convertor
from PIL import Image

folder = Path(sys.argv[1])
for name in ("images", "voc"):
    (folder / name).mkdir()
Image.new("RGB", (200, 100)).save(folder / "images/a.png")
annotation = {"id": 1, "image_id": 1, "category_id": 1, "area": 800, "iscrowd": 0, "segmentation": []}
content = {
    "images": [{"id": 1, "file_name": "a.png", "width": 200, "height": 100}],
    "categories": [{"id": 1, "name": "cat", "supercategory": "animal"}],
    "annotations": [{**annotation, "bbox": [80, 30, 40, 20]}, {**annotation, "id": 2, "bbox": [5, 5, 40, 20]}],
}
(folder / "coco.json").write_text(json.dumps(content))
Convertor.coco2voc(str(folder / "images"), str(folder / "coco.json"), str(folder / "voc"))
numbers = list(map(int, re.findall(r"<[xy]m..>(-?\d+)<", (folder / "voc/a.xml").read_text())))
print(f"imgann 0.8.1: boxes [80, 30, 40, 20] and [5, 5, 40, 20] of COCO become {numbers[:4]} and {numbers[4:]} in VOC")
assert numbers == [60, 20, 100, 40, -15, -5, 25, 15], "changed"
print("as found")
PYTHON
