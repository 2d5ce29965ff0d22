#!/usr/bin/env bash
# mean-average-precision 2024.1.5.0: the column `crowd` of its ground truth does not make a region a crowd.
#
# Expected: as in COCO, a crowd region need not be found, and detections inside it are no mistakes, so a perfect detection of the only
# object has AP 1. Seen, with the settings that the package gives for COCO: the crowd counts as an object that was missed, and a
# detection inside it as false. A class without any object also counts, with AP 0, where pycocotools leaves it out of the mean.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet mean-average-precision==2024.1.5.0 pycocotools==2.0.11 numpy==2.3.5 pandas==2.3.3
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import contextlib
import io

import numpy as np
from mean_average_precision import MetricBuilder
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

OBJECT, CROWD, INSIDE = (150, 150, 190, 190), (0, 0, 100, 100), (10, 10, 50, 50)


def package(truth: list[tuple], detections: list[tuple], classes: int) -> float:
    metric = MetricBuilder.build_evaluation_metric("map_2d", async_mode=False, num_classes=classes)
    rows = [[*box, 0, 0, crowd] for box, crowd in truth]
    metric.add(np.array([[*box, 0, score] for box, score in detections], float), np.array(rows, float))
    settings = {"iou_thresholds": np.arange(0.5, 1.0, 0.05), "recall_thresholds": np.arange(0.0, 1.01, 0.01), "mpolicy": "soft"}
    return round(float(metric.value(**settings)["mAP"]), 2)


def pycocotools(truth: list[tuple], detections: list[tuple], classes: int) -> float:
    def box(x1: int, y1: int, x2: int, y2: int) -> dict:
        return {"image_id": 1, "category_id": 1, "bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)}

    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "images": [{"id": 1, "width": 200, "height": 200}],
            "categories": [{"id": number + 1, "name": str(number)} for number in range(classes)],
            "annotations": [{"id": place, "iscrowd": crowd, **box(*each)} for place, (each, crowd) in enumerate(truth, start=1)],
        }
        coco.createIndex()
        run = COCOeval(coco, coco.loadRes([{"score": score, **box(*each)} for each, score in detections]), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return round(float(run.stats[0]), 2)


cases = {
    "an object, found": ([(OBJECT, 0)], [(OBJECT, 0.8)], 1),
    "and a crowd": ([(OBJECT, 0), (CROWD, 1)], [(OBJECT, 0.8)], 1),
    "and a detection inside the crowd": ([(OBJECT, 0), (CROWD, 1)], [(OBJECT, 0.8), (INSIDE, 0.9)], 1),
    "an object, found, and a class without objects": ([(OBJECT, 0)], [(OBJECT, 0.8)], 2),
}
found = {name: (package(*case), pycocotools(*case)) for name, case in cases.items()}
for name, (mine, theirs) in found.items():
    print(f"{name}: mean-average-precision 2024.1.5.0 {mine}, pycocotools 2.0.11 {theirs}")
assert list(found.values()) == [(1.0, 1.0), (0.5, 1.0), (0.25, 1.0), (0.5, 1.0)], "changed"
print("as found")
PYTHON
