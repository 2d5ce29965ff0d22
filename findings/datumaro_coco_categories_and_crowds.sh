#!/usr/bin/env bash
# datumaro 1.13.12: a COCO file that it reads and writes has other category ids, and its crowds without a mask are objects.
#
# Expected: images and objects keep their ids (`reindex` is off by default, and they do), so categories keep theirs; `is_crowd` is
# supported on boxes, as the format's page says. Seen: categories are counted anew from 1 without a word, so in a part of COCO the class
# 18 (dog) becomes 2, and the detections of a model that was trained on COCO's ids are scored against other classes, or none. A crowd that
# is given by its box alone keeps its flag inside datumaro, and is written with `iscrowd: 0`; the YOLO writer warns of crowds, this one not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet datumaro==1.13.12 pycocotools==2.0.11 numpy==2.3.5
"$folder/venv/bin/python" -W ignore - "$folder" <<'PYTHON'
import contextlib
import io
import json
import sys
from pathlib import Path

from datumaro import Dataset
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

folder = Path(sys.argv[1])
given, written = (folder / name / "annotations/instances_val.json" for name in ("in", "out"))
for made in (given.parent, folder / "in/images/val"):
    made.mkdir(parents=True)
Image.new("RGB", (200, 100)).save(folder / "in/images/val/a.png")
dog = {"image_id": 7, "category_id": 18, "segmentation": []}
content = {
    "images": [{"id": 7, "file_name": "a.png", "width": 200, "height": 100}],
    "categories": [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}],
    "annotations": [
        {**dog, "id": 41, "bbox": [10, 20, 30, 40], "area": 1200, "iscrowd": 0},
        {**dog, "id": 42, "bbox": [60, 10, 120, 80], "area": 9600, "iscrowd": 1},
    ],
}
given.write_text(json.dumps(content))
dataset = Dataset.import_from(str(folder / "in"), "coco_instances")
inside = {note.id: note.attributes["is_crowd"] for item in dataset for note in item.annotations}
dataset.export(str(folder / "out"), "coco_instances", save_media=True)
after = json.loads(written.read_text())


def precision(file: Path, number: int) -> float:
    """AP of a detector that finds the dog, and one dog of the crowd, and calls them by this number."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(file)
        boxes = ([10, 20, 30, 40], 0.8), ([70, 20, 20, 20], 0.9)
        found = [{"image_id": 7, "category_id": number, "bbox": box, "score": score} for box, score in boxes]
        run = COCOeval(coco, coco.loadRes(found), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return round(float(run.stats[0]), 2)


classes = {item["id"]: item["name"] for item in after["categories"]}
crowds = {item["id"]: item["iscrowd"] for item in after["annotations"]}
print(f"datumaro 1.13.12: classes {{1: 'person', 18: 'dog'}} became {classes}; image 7 is {after['images'][0]['id']}")
print(f"crowds {{41: 0, 42: 1}}: inside datumaro {inside}, written {crowds}")
scores = [precision(given, 18), precision(written, 18), precision(written, 2)]
print(f"AP of the same detections: {scores[0]} on the file read; on the file written {scores[1]} as class 18, {scores[2]} as class 2")
assert classes == {1: "person", 2: "dog"} and after["images"][0]["id"] == 7, "changed"
assert inside == {41: False, 42: True} and crowds == {41: 0, 42: 0}, "changed"
assert scores == [1.0, 0.0, 0.25], "changed"
print("as found")
PYTHON
