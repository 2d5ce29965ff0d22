"""Draw the README's picture: images with the boxes of the student trained alone, of its teacher, and of the distilled student.

    uv run detdistill demo --out runs/demo
    uv run python tools/picture.py --demo runs/demo --out docs/pictures/students.png

Right boxes (same class, IoU 0.5 or more) are green, all others red; boxes below ``--score``, and those on a better box, are not
drawn. The images are the first of the validation set with at least ``--objects`` objects; they are not chosen by what the models
find.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image
from torchvision.ops import box_iou

import detdistill
from detdistill.data.records import Record
from detdistill.evaluation.predict import NamedDetections

RIGHT, WRONG = "#2ca02c", "#d62728"
SAME = 0.6
"""IoU from which on two boxes are taken for guesses at one object, of which the better one is drawn."""


def main() -> None:
    """Draw and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, required=True, help="folder of a run of the demo")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--score", type=float, default=0.3)
    parser.add_argument("--objects", type=int, default=3)
    parser.add_argument("--rows", type=int, default=2)
    chosen = parser.parse_args()
    (alone,) = (chosen.demo / "students").glob("baseline-seed*")
    (distilled,) = (chosen.demo / "students").glob("distilled-seed*")
    models = {"student alone": alone, "its teacher": chosen.demo / "teacher", "student under the teacher": distilled}
    data = json.loads((chosen.demo / "teacher/summary.json").read_text())["data"]["path"]
    records = [one for one in detdistill.load_data(data).val.records if len(one.boxes_xyxy) >= chosen.objects][: chosen.rows]
    figure, axes = plt.subplots(len(records), len(models), figsize=(9, 3.1 * len(records)), layout="constrained", squeeze=False)
    for column, (title, run) in enumerate(models.items()):
        ap = json.loads((run / "summary.json").read_text())["metrics"]["AP"]
        for row, found in enumerate(detdistill.detect(str(run), [str(one.path) for one in records])):
            draw(axes[row][column], records[row], found, chosen.score)
        axes[0][column].set_title(f"{title}: AP {100 * ap:.1f}", fontsize=11)
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(chosen.out, dpi=100)
    Image.open(chosen.out).convert("P", palette=Image.Palette.ADAPTIVE).save(chosen.out, optimize=True)  # a third of the size


def draw(axes: plt.Axes, record: Record, found: NamedDetections, least: float) -> None:
    """Draw an image and its boxes."""
    axes.imshow(np.asarray(Image.open(record.path).convert("RGB")))
    axes.set_axis_off()
    overlap = box_iou(found.boxes_xyxy.double(), torch.from_numpy(record.boxes_xyxy))
    alike = box_iou(found.boxes_xyxy, found.boxes_xyxy).tril(diagonal=-1)  # a box and the better ones before it
    for index, (box, score, name) in enumerate(zip(found.boxes_xyxy.tolist(), found.scores.tolist(), found.names, strict=True)):
        if score < least or float(alike[index].max()) > SAME:
            continue
        same = torch.from_numpy(record.labels) == found.labels[index]
        colour = RIGHT if bool((overlap[index][same] >= 0.5).any()) else WRONG
        left, top, right, bottom = box
        axes.add_patch(plt.Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=colour, linewidth=2))
        axes.text(left + 1, top - 2, name, color="white", fontsize=8, backgroundcolor=colour, bbox={"pad": 1, "color": colour})


if __name__ == "__main__":
    main()
