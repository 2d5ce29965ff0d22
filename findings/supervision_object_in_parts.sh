#!/usr/bin/env bash
# supervision 0.31.2: an object whose mask has two parts becomes two objects in YOLO and VOC files, and VOC's boxes grow by a pixel.
#
# Expected: a COCO annotation with a `bbox` and two polygons (an object behind a pole) stays one object with this box. Seen: one row of
# YOLO, and one <object> of VOC, for each part, so that counts and boxes change. VOC's boxes are those of the rasterised polygons, whose
# last pixel lies outside: one pixel wider and higher, also for an object in one part. Without polygons, box and count stay.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet supervision==0.31.2 opencv-python-headless==4.12.0.88
"$folder/venv/bin/python" -W ignore - "$folder" <<'PYTHON'
import json
import re
import sys
from pathlib import Path

import supervision
from PIL import Image

folder = Path(sys.argv[1])
(folder / "images").mkdir()
Image.new("RGB", (100, 80)).save(folder / "images/a.png")


def converted(segmentation: list[list[int]]) -> tuple[int, list[tuple[int, ...]]]:
    """Number of YOLO rows, and VOC's boxes counted from 0, of one object with the box 10, 20, 40, 60."""
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 20, 30, 40], "area": 1200, "iscrowd": 0}
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 100, "height": 80}],
        "categories": [{"id": 1, "name": "cat", "supercategory": ""}],
        "annotations": [{**annotation, "segmentation": segmentation}],
    }
    (folder / "coco.json").write_text(json.dumps(content))
    data = supervision.DetectionDataset.from_coco(str(folder / "images"), str(folder / "coco.json"))
    data.as_yolo(annotations_directory_path=str(folder / "yolo"))
    data.as_pascal_voc(annotations_directory_path=str(folder / "voc"))
    numbers = list(map(int, re.findall(r"<[xy]m..>(\d+)<", (folder / "voc/a.xml").read_text())))
    boxes = [tuple(numbers[first : first + 4]) for first in range(0, len(numbers), 4)]
    rows = (folder / "yolo/a.txt").read_text().split("\n")
    return len(list(filter(None, rows))), sorted((x1 - 1, y1 - 1, x2, y2) for x1, y1, x2, y2 in boxes)


whole = [10, 20, 40, 20, 40, 60, 10, 60]
above, below = [10, 20, 40, 20, 40, 25, 10, 25], [10, 50, 40, 50, 40, 60, 10, 60]
found = {"no polygon": converted([]), "one part": converted([whole]), "two parts": converted([above, below])}
for name, (rows, boxes) in found.items():
    print(f"supervision {supervision.__version__}: object with the box (10, 20, 40, 60), {name}: {rows} rows of YOLO; VOC {boxes}")
assert found["no polygon"] == (1, [(10, 20, 40, 60)]), "changed"
assert found["one part"] == (1, [(10, 20, 41, 61)]), "changed"
assert found["two parts"] == (2, [(10, 20, 41, 26), (10, 50, 41, 61)]), "changed"
print("as found")
PYTHON
