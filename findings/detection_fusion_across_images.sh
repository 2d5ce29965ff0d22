#!/usr/bin/env bash
# detection-fusion 1.1.0: boxes of different images are merged with each other.
#
# Expected: the pipeline of its page (`load`, `ensemble`, `evaluate`) merges what several models found in the same image; the files are one
# for each image, and the loader keeps the image's name. Seen: the strategies get the boxes of all images at once and do not look at the
# name, so an object that stands at the same place in two images ends as one box in one of them, or as a mean of both, or without an image.
# Two models that find everything get a recall of one half, and fewer boxes the more images there are. (torch and torchvision are
# needed for its import; it does not declare them.)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet detection-fusion==1.1.0 torch==2.14.1 torchvision==0.29.1 numpy==2.3.5
"$folder/venv/bin/python" -W ignore - "$folder" <<'PYTHON'
import contextlib
import io
import sys
from pathlib import Path

from detection_fusion.pipeline import DetectionPipeline

folder = Path(sys.argv[1])
# Rows of YOLO: class, centre, size; a detection has its score behind. A camera that does not move, a car that hardly does.
objects = {"a": "0 0.30 0.30 0.20 0.20", "b": "0 0.32 0.30 0.20 0.20"}
scores = {"a": "0.9", "b": "0.8"}


def files(place: Path, images: str, scored: bool) -> None:
    place.mkdir(parents=True)
    for image in images:
        (place / f"{image}.txt").write_text(objects[image] + (f" {scores[image]}\n" if scored else "\n"))


def merged(images: str, strategy: str) -> tuple:
    """Which boxes two perfect models get from this strategy as (image, centre), and the recall."""
    place = folder / f"{images}-{strategy}"
    files(place / "GT", images, scored=False)
    for model in ("one", "two"):
        files(place / "labels" / model, images, scored=True)
    with contextlib.redirect_stderr(io.StringIO()):
        pipeline = DetectionPipeline().load(str(place / "labels"), format="yolo").ensemble(strategy, iou_threshold=0.5)
        run = pipeline.evaluate(str(place / "GT")).run()
    return [(box.image_name, round(box.x, 3)) for box in run.ensemble_result], run.evaluation_result.recall


for strategy in ("weighted_vote", "majority_vote", "nms"):
    alone, together = {image: merged(image, strategy) for image in "ab"}, merged("ab", strategy)
    print(f"detection-fusion 1.1.0, {strategy}: one image alone {alone}; both {together}")
    assert all(len(boxes) == 1 and boxes[0][0] == image and recall == 1 for image, (boxes, recall) in alone.items()), "changed"
    assert len(together[0]) == 1 and together[1] == 0.5, "changed"
print("as found")
PYTHON
