"""Bytes of a cached view: methods that need the cells near objects, against the teacher's whole maps.

    uv run python benchmarks/cells.py --data ../coco128 --out benchmarks/results/cells_coco128.json

For the first images of a data set, each method's ``teach`` runs once for an untrained teacher, and the record is encoded as in a
cache (float32). ``pkd`` stores the maps of all levels. The number of cells depends on boxes and image size; the values do not
matter for the size, except for methods that choose cells by the teacher's scores (``pgd``).
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch

from detdistill.cache.encoding import encode
from detdistill.cache.fill import Lecture
from detdistill.data.discover import load_data
from detdistill.data.transforms import ViewSettings
from detdistill.data.views import batches_of, sights
from detdistill.detectors.build import build_detector
from detdistill.detectors.contract import Teacher
from detdistill.methods.shared.compose import build_method
from detdistill.training.machine import hardware, versions

PAIRS = {
    "fcos:resnet18": ("pkd", "fgfi,form=fpn", "pgd", "frs,profile=fcos"),
    "faster_rcnn:resnet18": ("pkd", "fgfi,form=fpn", "tadf,class_weight=0,box_weight=0"),
}


def main() -> None:
    """Measure all methods, print a table and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--size", type=int, default=640)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    train = load_data(chosen.data).train
    views = ViewSettings(size=chosen.size, flip=0.0)
    wanted = sights(train, views)[: chosen.images]
    rows = []
    for model, methods in PAIRS.items():
        torch.manual_seed(0)
        teacher, student = Teacher(build_detector(model, train.classes)), build_detector(model, train.classes)
        maps = 0.0
        for method in methods:
            lecture = Lecture(method, build_method(method, teacher, student))
            sizes = []
            for _, batch in batches_of(train, views, wanted, 1):
                sizes += [len(encode(pieces, "float32").data) for pieces in lecture.teach(batch)]
            mean = statistics.fmean(sizes)
            maps = maps or mean
            row = {
                "teacher": model,
                "method": method,
                "bytes": round(mean),
                "largest": max(sizes),
                "of_maps": round(mean / maps, 4),
            }
            print(row, flush=True)
            rows.append(row)
    if chosen.out:
        content = {
            "what": f"mean bytes of a view in float32, {len(wanted)} images at {chosen.size} px; of_maps: share of pkd's",
            "command": f"uv run python benchmarks/cells.py --data {Path(chosen.data).name} --out {chosen.out}",
            "rows": rows,
            "hardware": hardware(),
            "versions": versions(),
        }
        chosen.out.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
