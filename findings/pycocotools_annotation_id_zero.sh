#!/usr/bin/env bash
# pycocotools 2.0.11 and faster-coco-eval 1.8.0: an object whose annotation id is 0 is never found.
#
# Expected: two perfect detections of two objects have AP 1. Seen: AP 0.25, because the match with annotation 0 counts as a miss and
# as a false detection. The format asks for ids, not for ids above 0, and converters count from 0: so do the COCO
# exports of Label Studio and labelme's example. hotcoco 1.3.0 gives 1 for the same data.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet pycocotools==2.0.11 faster-coco-eval==1.8.0 hotcoco==1.3.0 numpy==2.3.5
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import contextlib
import io

import faster_coco_eval
import hotcoco
import pycocotools.coco
import pycocotools.cocoeval


def content(first: int) -> dict:
    """Two images with one object each, whose annotation ids count from ``first``."""
    images = [{"id": image, "file_name": f"{image}.png", "width": 200, "height": 200} for image in (1, 2)]
    about = {"category_id": 1, "bbox": [10, 10, 50, 50], "area": 2500, "iscrowd": 0}
    annotations = [{"id": first + place, "image_id": image, **about} for place, image in enumerate((1, 2))]
    return {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "cat"}]}


def average_precision(coco: type, evaluation: type, first: int) -> float:
    detections = [{"image_id": image, "category_id": 1, "bbox": [10, 10, 50, 50], "score": 0.9} for image in (1, 2)]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = coco(content(first)) if coco is not pycocotools.coco.COCO else coco()
        if coco is pycocotools.coco.COCO:
            truth.dataset = content(first)
            truth.createIndex()
        run = evaluation(truth, truth.loadRes(detections), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return round(float(run.stats[0]), 2)


tools = {
    "pycocotools 2.0.11": (pycocotools.coco.COCO, pycocotools.cocoeval.COCOeval),
    "faster-coco-eval 1.8.0": (faster_coco_eval.COCO, faster_coco_eval.COCOeval_faster),
    "hotcoco 1.3.0": (hotcoco.COCO, hotcoco.COCOeval),
}
found = {name: tuple(average_precision(*tool, first) for first in (1, 0)) for name, tool in tools.items()}
for name, numbers in found.items():
    print(f"{name}: AP {numbers[0]} with ids 1 and 2, {numbers[1]} with ids 0 and 1")
first, second, third = found.values()
assert first == second == (1.0, 0.25) and third == (1.0, 1.0), "changed"
print("as found")
PYTHON
