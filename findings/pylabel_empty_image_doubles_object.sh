#!/usr/bin/env bash
# pylabel 0.1.55: in its COCO files, an image without objects doubles the object before it.
#
# Expected: a COCO file that is read by ImportCoco and written by ExportToCoco holds the same objects. Seen: for each image without
# objects, the object written last is written again, on the earlier image and with the same id. pycocotools counts it as one more object,
# which no detection is left for: perfect detections miss half of the objects of the class.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet pylabel==0.1.55 pandas==2.3.3 numpy==2.3.5 pycocotools==2.0.11
"$folder/venv/bin/python" -W ignore - "$folder" <<'PYTHON'
import contextlib
import io
import json
import sys
from pathlib import Path

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from pylabel import importer

source, target = (Path(sys.argv[1]) / name for name in ("in.json", "out.json"))
objects = [
    {"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 20, 30, 40], "area": 1200, "iscrowd": 0, "segmentation": []},
    {"id": 2, "image_id": 3, "category_id": 2, "bbox": [50, 20, 30, 40], "area": 1200, "iscrowd": 0, "segmentation": []},
]
content = {
    "images": [{"id": number, "file_name": f"{number}.png", "width": 200, "height": 100} for number in (1, 2, 3)],
    "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    "annotations": objects,
}
source.write_text(json.dumps(content))


def precision(file: Path) -> float:
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(file)
        found = [{"score": 0.9, **{name: item[name] for name in ("image_id", "category_id", "bbox")}} for item in objects]
        run = COCOeval(coco, coco.loadRes(found), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return float(run.stats[0])


with contextlib.redirect_stderr(io.StringIO()):
    importer.ImportCoco(source).export.ExportToCoco(target)
written = [(item["id"], item["image_id"], item["category_id"]) for item in json.loads(target.read_text())["annotations"]]
print(f"pylabel 0.1.55: objects as (id, image, class), two in; out {written}")
assert len(written) == 3 and written[0] == written[1] and written[0][1:] == (1, 1), "changed"

# pylabel counts its ids from 0, which pycocotools takes for "not matched": an effect of its own, so the ids count from 1 here.
shifted = json.loads(target.read_text())
for item in shifted["annotations"]:
    item["id"] += 1
target.write_text(json.dumps(shifted))
before, after = precision(source), precision(target)
print(f"AP of perfect detections by pycocotools 2.0.11: {before:.2f} on the file read, {after:.2f} on the file written")
assert before > 0.99 and after < 0.8, "changed"
print("as found")
PYTHON
