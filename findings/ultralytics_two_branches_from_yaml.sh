#!/usr/bin/env bash
# ultralytics 8.4.190: yolo26n.yaml says `end2end: True`, and the network that is built from it says False.
#
# Expected: a network from this description detects with its one-to-one branch, without NMS, as the description says. Seen: the second
# branch is built, but detections come from the one-to-many branch and need NMS, until `end2end` is set by hand.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 ultralytics==8.4.190
export YOLO_CONFIG_DIR="$folder" YOLO_VERBOSE=False
"$folder/venv/bin/python" - <<'PYTHON'
import torch
import ultralytics
from ultralytics.nn.tasks import DetectionModel

model = DetectionModel("yolo26n.yaml", nc=3, verbose=False).eval()
said, built = model.yaml["end2end"], model.end2end
with torch.no_grad():
    first = tuple(model(torch.zeros(1, 3, 64, 64))[0].shape)
    model.end2end = True
    second = tuple(model(torch.zeros(1, 3, 64, 64))[0].shape)
print(f"ultralytics {ultralytics.__version__}: the description says end2end {said}, the network {built}")
print(f"output {first} (boxes and scores of all cells), after end2end = True {second}")
assert (said, built, first, second) == (True, False, (1, 7, 84), (1, 84, 6)), "changed"
print("as found")
PYTHON
