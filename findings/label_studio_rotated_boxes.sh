#!/usr/bin/env bash
# label-studio-sdk 2.1.2: a rotated rectangle becomes three different boxes in the four exports, and one of them is right.
#
# Expected: forms that have no angle get the upright box around the rotated rectangle. Seen, for a rectangle of 40 x 20 pixels turned by
# 90 degrees on an image of 200 x 100: YOLO and VOC leave out the angle, so the box lies beside the object; COCO turns the box in per cent
# of the image's sides, which is right on square images only, and gives a box of the wrong shape here. Only YOLO OBB has its corners.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet label-studio-sdk==2.1.2
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import json
import logging
import re
import sys
from pathlib import Path

from label_studio_sdk.converter import Converter
from PIL import Image

logging.disable()
folder = Path(sys.argv[1])
uploads = folder / "media/upload"
(uploads / "1").mkdir(parents=True)
WIDTH, HEIGHT = 200, 100
Image.new("RGB", (WIDTH, HEIGHT)).save(uploads / "1/a.png")
interface = """<View><Image name="image" value="$image"/><RectangleLabels name="label" toName="image">
<Label value="ship"/></RectangleLabels></View>"""
# The rectangle's own first corner is at x 110, y 30; 40 along it goes down, 20 across it goes left.
box = {"x": 55, "y": 30, "width": 20, "height": 20, "rotation": 90, "rectanglelabels": ["ship"]}
result = {"id": "r", "type": "rectanglelabels", "from_name": "label", "to_name": "image", "value": box}
result |= {"original_width": WIDTH, "original_height": HEIGHT}
task = {"id": 1, "data": {"image": "/data/upload/1/a.png"}, "predictions": []}
task["annotations"] = [{"id": 1, "completed_by": 1, "was_cancelled": False, "result": [result]}]
(folder / "tasks.json").write_text(json.dumps([task]))
for form in ("COCO", "YOLO", "VOC", "YOLO_OBB"):
    converter = Converter(config=interface, project_dir=str(folder / "media"), upload_dir=str(uploads))
    converter.convert(str(folder / "tasks.json"), str(folder / form), form, is_dir=False)
x, y, width, height = json.loads((folder / "COCO/result.json").read_text())["annotations"][0]["bbox"]
cx, cy, w, h = map(float, (folder / "YOLO/labels/a.txt").read_text().split()[1:])
corners = list(map(float, (folder / "YOLO_OBB/labels/a.txt").read_text().split()[1:]))
found = {
    "true": (90, 30, 110, 70),
    "YOLO OBB": (min(corners[::2]) * WIDTH, min(corners[1::2]) * HEIGHT, max(corners[::2]) * WIDTH, max(corners[1::2]) * HEIGHT),
    "COCO": (x, y, x + width, y + height),
    "YOLO": ((cx - w / 2) * WIDTH, (cy - h / 2) * HEIGHT, (cx + w / 2) * WIDTH, (cy + h / 2) * HEIGHT),
    "VOC": map(float, re.findall(r"<[xy]m..>(\d+)<", (folder / "VOC/Annotations/a.xml").read_text())),
}
found = {form: tuple(round(number) for number in numbers) for form, numbers in found.items()}
print("label-studio-sdk 2.1.2: x1, y1, x2, y2 of the box around a rotated rectangle:")
for form, numbers in found.items():
    print(f"  {form:8} {numbers}")
assert found["YOLO OBB"] == found["true"], "changed"
assert found["COCO"] == (70, 30, 110, 50) and found["YOLO"] == found["VOC"] == (110, 30, 150, 50), "changed"
print("as found")
PYTHON
