#!/usr/bin/env bash
# ensemble-boxes 1.0.9: `soft_nms` lowers no score, and weights change the caller's scores.
#
# Expected: Soft-NMS (Bodla et al., 2017) keeps overlapping boxes with lower scores: for the default, Gaussian one, a duplicate with
# score 0.8 of a box with score 0.9 ends at 0.8 * exp(-IoU^2 / 0.5), behind a box that stands alone with 0.5. Seen: all scores come back as
# they went in; the lowered ones only decide which boxes fall below `thresh`, so duplicates rank as high as before. `nms` and `soft_nms`
# with weights also multiply the scores in the caller's lists: the next call, or the next method that is compared, gets them lower.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet ensemble-boxes==1.0.9 numpy==2.3.5 numba==0.63.1 pandas==2.3.3
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
from ensemble_boxes import nms, soft_nms

first = [0.1, 0.1, 0.5, 0.5]
duplicate = [0.1, 0.1, 0.5, 0.48]
alone = [0.6, 0.6, 0.9, 0.9]
boxes = np.array([first, duplicate, alone])
given = np.array([0.9, 0.8, 0.5])


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    sides = np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2])
    shared = np.prod(np.maximum(sides, 0))
    return shared / (np.prod(one[2:] - one[:2]) + np.prod(other[2:] - other[:2]) - shared)


def soft(sigma: float) -> np.ndarray:
    """The paper's rule: the best box is taken, the scores of the others fall with their overlap with it, and so on."""
    scores, left = given.copy(), [0, 1, 2]
    while left:
        best = max(left, key=lambda place: scores[place])
        left.remove(best)
        for place in left:
            scores[place] *= np.exp(-(overlap(boxes[best], boxes[place]) ** 2) / sigma)
    return scores


for method, name in ((2, "Gaussian"), (1, "linear")):
    kept, scores, _ = soft_nms([boxes], [given.copy()], [np.zeros(3)], method=method, iou_thr=0.5, sigma=0.5, thresh=0.001)
    back = [scores[np.abs(kept - box).sum(axis=1).argmin()] for box in boxes]
    print(f"ensemble-boxes 1.0.9, {name} Soft-NMS: scores in {given.tolist()}, out {np.array(back).tolist()}")
    assert len(kept) == 3 and np.array_equal(back, given), "changed"
print(f"by the paper, Gaussian: {soft(0.5).round(3).tolist()}")
assert soft(0.5)[1] < soft(0.5)[2], "the duplicate ranks behind the box that stands alone"

lists = [[0.9], [0.8]]
calls = [nms([[first], [alone]], lists, [[0], [0]], weights=[1, 1])[1].tolist() for _ in range(3)]
print(f"the same nms with weights [1, 1], three times: {calls}; the caller's scores afterwards: {[list(each) for each in lists]}")
assert np.allclose(calls, [[0.45, 0.4], [0.225, 0.2], [0.1125, 0.1]]), "changed"
print("as found")
PYTHON
