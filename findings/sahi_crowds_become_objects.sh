#!/usr/bin/env bash
# sahi 0.12.8: every crowd region of a COCO file becomes one ordinary object.
#
# Expected: `slice_coco` (the command `sahi coco slice`) and `Coco.from_coco_dict_or_path` keep `iscrowd`, which the package has a field
# for in every class of its own. Seen: the reader does not hand it on, so what is written says `iscrowd: 0` for all; a warning tells of
# skipped masks only. On the sliced file a crowd must be found as one box, and detections of its members count as mistakes; training
# learns a crowd as one large object.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet sahi==0.12.8 pycocotools==2.0.11 numpy==2.3.5
"$folder/venv/bin/python" -W ignore - "$folder" 2>"$folder/log" <<'PYTHON' || { cat "$folder/log"; exit 1; }
import contextlib
import io
import json
import sys
from pathlib import Path

from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from sahi.slicing import slice_coco
from sahi.utils.coco import Coco

folder = Path(sys.argv[1])
Image.new("RGB", (200, 200)).save(folder / "a.png")
one = {"image_id": 1, "category_id": 1}
rows = {"size": [200, 200], "counts": [0, 16000, 24000]}  # the left 80 columns, as COCO writes its crowds
content = {
    "images": [{"id": 1, "file_name": "a.png", "width": 200, "height": 200}],
    "categories": [{"id": 1, "name": "person"}],
    "annotations": [
        {**one, "id": 1, "bbox": [120, 120, 40, 40], "area": 1600, "iscrowd": 0, "segmentation": []},
        {**one, "id": 2, "bbox": [0, 0, 80, 200], "area": 16000, "iscrowd": 1, "segmentation": rows},
        {**one, "id": 3, "bbox": [90, 10, 100, 80], "area": 8000, "iscrowd": 1, "segmentation": [[90, 10, 190, 10, 190, 90, 90, 90]]},
    ],
}
given = folder / "given.json"
given.write_text(json.dumps(content))
# One slice, as large as the image: nothing is cut.
names = {"output_coco_annotation_file_name": "sliced", "output_dir": str(folder / "slices")}
_, sliced = slice_coco(str(given), str(folder), **names, slice_height=200, slice_width=200)
read = Coco.from_coco_dict_or_path(str(given)).json


def precision(file: Path) -> float:
    """AP of a detector that finds the object, and one member of each crowd."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(file)
        boxes = ([120, 120, 40, 40], 0.8), ([10, 10, 30, 40], 0.9), ([100, 20, 30, 40], 0.85)
        run = COCOeval(coco, coco.loadRes([{**one, "bbox": box, "score": score} for box, score in boxes]), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return round(float(run.stats[0]), 2)


before = [item["iscrowd"] for item in content["annotations"]]
flags = [item["iscrowd"] for item in json.loads(Path(sliced).read_text())["annotations"]]
kept = [item["iscrowd"] for item in read["annotations"]]
print(f"sahi 0.12.8: iscrowd {before} in the file, {kept} as read, {flags} in the sliced file")
print(f"AP of the same detections by pycocotools 2.0.11: {precision(given)} on the file, {precision(Path(sliced))} on the sliced file")
assert before == [0, 1, 1] and kept == flags == [0, 0, 0], "changed"
assert precision(given) == 1 and precision(Path(sliced)) < 0.2, "changed"
print("as found")
PYTHON
