#!/usr/bin/env bash
# mapcalc 0.2.2: the scores that it takes do not change its result; the order of the boxes does.
#
# Expected: average precision ranks detections by score, in whatever order they are given. Seen: they are ranked as listed. A false
# detection with the highest score costs nothing if it is listed last; after NMS by class, or with boxes sorted by place, the mAP is
# another one than that of the same detections sorted by score.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet mapcalc==0.2.2 numpy==2.3.5
"$folder/venv/bin/python" - <<'PYTHON'
from mapcalc import calculate_map

truth = {"boxes": [[10, 10, 60, 60], [100, 100, 140, 140]], "labels": [1, 1]}
boxes = {"false": [150, 10, 170, 30], "first": [10, 10, 60, 60], "second": [100, 100, 140, 140]}


def average_precision(listed: tuple[str, ...], scores: dict[str, float]) -> float:
    detections = {"boxes": [boxes[name] for name in listed], "labels": [1, 1, 1], "scores": [scores[name] for name in listed]}
    return round(calculate_map(truth, detections, 0.5), 3)


best, worst = {"false": 0.99, "first": 0.9, "second": 0.8}, {"false": 0.01, "first": 0.9, "second": 0.8}
found = {
    (place, name): average_precision(order, scores)
    for place, order in (("first", ("false", "first", "second")), ("last", ("first", "second", "false")))
    for name, scores in (("highest", best), ("lowest", worst))
}
for (place, name), number in found.items():
    print(f"mapcalc 0.2.2: two right detections and a false one of the {name} score, listed {place}: mAP {number}")
assert found == {("first", "highest"): 0.667, ("first", "lowest"): 0.667, ("last", "highest"): 1.0, ("last", "lowest"): 1.0}, "changed"
print("as found")
PYTHON
