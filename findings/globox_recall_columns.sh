#!/usr/bin/env bash
# globox 2.9.0: the columns AR 1, AR 10 and AR 100 of its tables hold the average precision.
#
# Expected: the row of a class in `COCOEvaluator.save_csv` has the class's average recall under AR 1, AR 10 and AR 100, as the evaluator
# computes it and as pycocotools prints it. Seen: these three columns hold AP with that many detections, in the CSV file and in the rows of
# `show_summary`; the summary's last row and the columns AR S, AR M and AR L are right. For a detector that finds all objects among many
# mistakes, recall 1 reads as its low precision.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet globox==2.9.0 pycocotools==2.0.11 numpy==2.3.5
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import contextlib
import csv
import io
import sys
from pathlib import Path

import numpy as np
from globox import Annotation, AnnotationSet, BoundingBox, COCOEvaluator
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

# Corners. One image, one class, two objects; both are found, each behind two detections of nothing.
truth = [(10, 10, 60, 60), (100, 10, 160, 60)]
nothing = [(300 + 20 * place, 300, 310 + 20 * place, 310) for place in range(4)]
detections = [(nothing[0], 0.9), (nothing[1], 0.8), (truth[0], 0.7), (nothing[2], 0.6), (nothing[3], 0.5), (truth[1], 0.4)]


def boxes(rows: list[tuple]) -> AnnotationSet:
    made = [BoundingBox.create(label="cat", coords=box, confidence=score) for box, score in rows]
    return AnnotationSet([Annotation("a.png", image_size=(400, 400), boxes=made)])


evaluator = COCOEvaluator(ground_truths=boxes([(box, None) for box in truth]), predictions=boxes(detections))
file = Path(sys.argv[1]) / "table.csv"
evaluator.save_csv(file)
row = next(iter(csv.DictReader(file.open())))
computed = {"AR 1": evaluator.ar_1(), "AR 10": evaluator.ar_10(), "AR 100": evaluator.ar_100()}


def entry(x1: int, y1: int, x2: int, y2: int) -> dict:
    return {"image_id": 1, "category_id": 1, "bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1), "iscrowd": 0}


with contextlib.redirect_stdout(io.StringIO()):
    coco = COCO()
    coco.dataset = {
        "images": [{"id": 1, "width": 400, "height": 400}],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [{"id": place, **entry(*box)} for place, box in enumerate(truth, start=1)],
    }
    coco.createIndex()
    run = COCOeval(coco, coco.loadRes([{"score": score, **entry(*box)} for box, score in detections]), "bbox")
    run.evaluate()
    run.accumulate()
    run.summarize()
right = dict(zip(computed, run.stats[6:9].tolist(), strict=True))
written = {name: float(row[name]) for name in computed}
print(f"pycocotools 2.0.11: AP {run.stats[0]:.3f}, {right}")
print(f"globox 2.9.0: AP {evaluator.ap():.3f}, computed {computed}, written to the CSV file {written}")
assert np.isclose(evaluator.ap(), run.stats[0]) and np.allclose(list(computed.values()), list(right.values())), "changed"
assert list(right.values()) == [0.0, 1.0, 1.0], "changed"
assert np.allclose([written["AR 10"], written["AR 100"]], evaluator.ap()) and evaluator.ap() < 0.4, "changed"
print("as found")
PYTHON
