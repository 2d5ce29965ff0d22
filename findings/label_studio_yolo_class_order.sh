#!/usr/bin/env bash
# label-studio-sdk 2.1.2: `classes.txt` of a YOLO export is not in the order of the numbers in the rows.
#
# Expected: row `0 ...` is an object of the first class of classes.txt, as every reader of YOLO data takes it. Seen: where the labels of
# the project have the documented attribute `category`, rows have these numbers, but classes.txt follows the interface's order, so that
# all classes are exchanged. Only notes.json beside it has the numbers.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet label-studio-sdk==2.1.2
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import json
import logging
import sys
from pathlib import Path

from label_studio_sdk.converter import Converter
from PIL import Image

logging.disable()
folder = Path(sys.argv[1])
uploads = folder / "media/upload"
(uploads / "1").mkdir(parents=True)
Image.new("RGB", (200, 100)).save(uploads / "1/a.png")
interface = """<View><Image name="image" value="$image"/><RectangleLabels name="label" toName="image">
<Label value="cat" category="1"/><Label value="dog" category="0"/></RectangleLabels></View>"""
box = {"x": 10, "y": 20, "width": 30, "height": 40, "rotation": 0, "rectanglelabels": ["cat"]}
result = {"id": "r", "type": "rectanglelabels", "from_name": "label", "to_name": "image", "original_width": 200, "original_height": 100}
task = {"id": 1, "data": {"image": "/data/upload/1/a.png"}, "predictions": []}
task["annotations"] = [{"id": 1, "completed_by": 1, "was_cancelled": False, "result": [{**result, "value": box}]}]
(folder / "tasks.json").write_text(json.dumps([task]))
converter = Converter(config=interface, project_dir=str(folder / "media"), upload_dir=str(uploads))
converter.convert(str(folder / "tasks.json"), str(folder / "yolo"), "YOLO", is_dir=False)
classes = (folder / "yolo/classes.txt").read_text().split()
number = int((folder / "yolo/labels/a.txt").read_text().split()[0])
noted = {category["name"]: category["id"] for category in json.loads((folder / "yolo/notes.json").read_text())["categories"]}
print(f"label-studio-sdk 2.1.2: drawn as cat; the row's class is {number}, classes.txt is {classes}: it is read as {classes[number]}")
print(f"notes.json: {noted}")
assert (classes, number, noted) == (["cat", "dog"], 1, {"cat": 1, "dog": 0}), "changed"
print("as found")
PYTHON
