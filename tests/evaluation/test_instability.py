"""Index vectors counted by hand, and a detector's matching against the cheapest of all matchings."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from detdistill.data.loader import DetectionLoader
from detdistill.data.records import DetectionSet
from detdistill.data.transforms import ViewSettings
from detdistill.detectors.contract import Detector
from detdistill.detectors.probe import tiny_detector
from detdistill.errors import ModelError
from detdistill.evaluation.instability import (
    changed_matches,
    check_queries,
    first_images,
    index_vectors,
    instability,
    instability_of_layers,
)
from tests.evaluation.test_run import make_set

VIEWS = ViewSettings(size=128, resize="stretch")
# 2 layers, 2 images, 4 queries.
BEFORE = torch.tensor([[[0, 1, -1, -1], [-1, 0, -1, -1]], [[0, 1, -1, -1], [0, -1, -1, -1]]])
NOW = torch.tensor([[[0, 1, -1, -1], [-1, 0, -1, -1]], [[1, 0, -1, -1], [-1, -1, -1, 0]]])


def test_changes_counted_by_hand():
    assert changed_matches(BEFORE, NOW).tolist() == [[0, 0], [2, 2]]
    assert changed_matches(torch.tensor([2, -1, 0]), torch.tensor([-1, -1, 1])).tolist() == 2
    assert changed_matches(BEFORE, BEFORE).sum() == 0


def test_epochs_are_compared_in_the_last_layer_and_averaged_over_images():
    assert instability(BEFORE, NOW) == 2.0
    assert instability(BEFORE.flip(0), NOW.flip(0)) == 0.0
    one_changed = torch.cat([NOW[:, :1], BEFORE[:, 1:]], dim=1)
    assert instability(BEFORE, one_changed) == 1.0


def test_no_image_can_change_more_than_twice_its_boxes():
    first = torch.tensor([[[0, 1, 2, -1, -1, -1]]])
    assert instability(first, first.flip(-1)) == 6.0


def test_consecutive_layers():
    assert instability_of_layers(BEFORE) == 1.0  # 0 and 2
    assert instability_of_layers(NOW) == 2.0
    assert instability_of_layers(torch.stack([BEFORE[0], BEFORE[0], NOW[1]])) == 1.0  # 0, 0; 2, 2
    assert instability_of_layers(BEFORE[:1]) == 0.0


def test_vectors_of_other_queries_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 2, 4\).*\(2, 1, 4\)"):
        changed_matches(BEFORE, BEFORE[:, :1])


def cheapest(cost: Tensor) -> list[int]:
    """Of all ways to give each of G boxes another of N queries, [N, G]: the box of each query."""
    ways = list(itertools.permutations(range(cost.shape[0]), cost.shape[1]))
    best = min(ways, key=lambda way: sum(float(cost[query, box]) for box, query in enumerate(way)))
    return [best.index(query) if query in best else -1 for query in range(cost.shape[0])]


def cost_of(logits: Tensor, boxes_cxcywh01: Tensor, target: Tensor, labels: Tensor, weight: float) -> Tensor:
    """[N, G] of one image and layer, the target as xyxy in parts of it: ``weight`` focal + 5 L1 + 2 (-GIoU), written out."""
    p = logits.double().sigmoid()[:, labels]
    focal = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log() - 0.75 * p**2 * -(1 - p + 1e-8).log()
    cost = torch.zeros(len(logits), len(labels), dtype=torch.float64)
    for query, (cx, cy, w, h) in enumerate(boxes_cxcywh01.double().tolist()):
        for box, (x1, y1, x2, y2) in enumerate(target.double().tolist()):
            l1 = abs(cx - (x1 + x2) / 2) + abs(cy - (y1 + y2) / 2) + abs(w - (x2 - x1)) + abs(h - (y2 - y1))
            left, top, right, bottom = cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2
            inside = max(0, min(right, x2) - max(left, x1)) * max(0, min(bottom, y2) - max(top, y1))
            union = w * h + (x2 - x1) * (y2 - y1) - inside
            hull = (max(right, x2) - min(left, x1)) * (max(bottom, y2) - min(top, y1))
            giou = inside / union - (hull - union) / hull
            cost[query, box] = weight * focal[query, box] + 5 * l1 - 2 * giou
    return cost


def by_brute_force(detector: Detector, data: DetectionSet, weight: float) -> Tensor:
    """[L, I, N], one image at a time."""
    rows = []
    for batch in DetectionLoader(data, VIEWS, 1, train=False):
        with torch.no_grad():
            prediction = detector.predict(detector.features(batch), batch)
        target = batch.targets[0]
        rows.append(
            [
                cheapest(cost_of(logits[0], boxes[0], target.boxes_xyxy / VIEWS.size, target.labels, weight))
                for logits, boxes in zip(prediction.logits, prediction.boxes_cxcywh01, strict=True)
            ]
        )
    return torch.tensor(rows).transpose(0, 1)


@pytest.mark.parametrize(("name", "weight"), [("deformable_detr", 1.0), ("rt_detr", 2.0)])
def test_two_epochs_of_a_detector_against_brute_force(name: str, weight: float, tmp_path: Path):
    data = make_set(tmp_path, classes=("a", "b"), boxes=2)
    torch.manual_seed(0)
    detector = tiny_detector(name, data.classes)
    vectors, expected = [], []
    for _ in range(2):
        with torch.no_grad():  # an "epoch" that moves every weight
            for parameter in detector.parameters():
                parameter += 0.05 * parameter.std().nan_to_num() * torch.randn_like(parameter)
        vectors.append(index_vectors(detector, data, VIEWS, batch_size=3))
        expected.append(by_brute_force(detector.eval(), data, weight))
        assert vectors[-1].shape == (2, 4, 10)
        assert (vectors[-1] >= 0).sum(dim=-1).eq(2).all()
        assert torch.equal(vectors[-1], expected[-1])
    by_hand = [sum(a != b for a, b in zip(*pair, strict=True)) for pair in zip(*(e[-1].tolist() for e in expected), strict=True)]
    assert instability(*vectors) == sum(by_hand) / 4
    assert sum(by_hand) > 0, "the example must move something"


def test_classes_go_by_their_names(tmp_path: Path):
    detector = tiny_detector("deformable_detr").eval()
    data = make_set(tmp_path, classes=detector.spec.classes[:2])
    backwards = make_set(tmp_path, classes=detector.spec.classes[1::-1])
    flipped = []
    for record in data.records:
        flipped.append(type(record)(**{**vars(record), "labels": 1 - record.labels}))
    same = DetectionSet.of("val", "coco", data.root, backwards.classes, flipped)
    assert torch.equal(index_vectors(detector, data, VIEWS), index_vectors(detector, same, VIEWS))
    with pytest.raises(ModelError, match="does not know"):
        index_vectors(detector, make_set(tmp_path, classes=("unheard", "of")), VIEWS)


def test_modes_and_random_numbers_are_left_alone(tmp_path: Path):
    detector = tiny_detector("rt_detr").train()
    frozen = next(part for part in detector.modules() if isinstance(part, torch.nn.BatchNorm2d)).eval()
    data = make_set(tmp_path, classes=detector.spec.classes[:2])
    weights = {name: tensor.clone() for name, tensor in detector.state_dict().items()}
    state = torch.get_rng_state()
    first = index_vectors(detector, data, VIEWS)
    assert torch.equal(first, index_vectors(detector, data, VIEWS, batch_size=1))
    assert torch.equal(state, torch.get_rng_state())
    assert detector.training
    assert not frozen.training
    assert all(torch.equal(weights[name], tensor) for name, tensor in detector.state_dict().items())


def test_first_images_keep_their_order(tmp_path: Path):
    data = make_set(tmp_path)
    assert first_images(data, 2).records == data.records[:2]
    assert first_images(data, 99).records == data.records
    assert first_images(data, 4).fingerprint == data.fingerprint
    detector = tiny_detector("deformable_detr")
    whole = make_set(tmp_path, classes=detector.spec.classes[:2])
    assert torch.equal(index_vectors(detector, first_images(whole, 2), VIEWS), index_vectors(detector, whole, VIEWS)[:, :2])


def test_images_without_boxes_match_nobody(tmp_path: Path):
    detector = tiny_detector("rt_detr")
    data = make_set(tmp_path, classes=detector.spec.classes[:2], boxes=0)
    assert index_vectors(detector, data, VIEWS).eq(-1).all()


def test_detectors_without_queries_are_refused(tmp_path: Path):
    detector = tiny_detector("fcos")
    with pytest.raises(ModelError, match=r"instability: fcos:.* has no queries .* leave out --instability") as caught:
        check_queries(detector)
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match="has no queries"):
        index_vectors(detector, make_set(tmp_path), VIEWS)
