"""Regions of a step: hand-made boxes, tiny detectors, and how often a teacher's region head runs."""

import functools
from dataclasses import replace

import pytest
import torch

from detdistill.detectors.build import build_detector
from detdistill.detectors.contract import Teacher
from detdistill.errors import ModelError
from detdistill.methods.shared.compose import build_method
from detdistill.methods.shared.regions import has_area, label_regions, of_class, proposed_boxes, usable_boxes
from detdistill.structures import IGNORED, Assignment, Clock, Dense, Queries, QuerySeed
from tests.methods.contract_checks import assert_same, without_boxes
from tests.tiny import TinyDense, TinyQueries, TinyRegions, tiny_batch

TINY = "resnet10t,channels=8-16-32-64,stem=8,neck=16,mlp=16,proposals=20,rois=16"


class Counting(TinyRegions):
    """Counts how often the region head runs on given boxes."""

    runs = 0

    def regions(self, features, boxes_xyxy, batch):
        type(self).runs += 1
        return super().regions(features, boxes_xyxy, batch)


@pytest.mark.parametrize("detector_class", [TinyDense, TinyRegions, TinyQueries])
def test_proposals_are_inside_the_valid_image_and_have_area(detector_class):
    detector, batch = detector_class(seed=1), tiny_batch(3)
    prediction = detector(batch).prediction
    every = proposed_boxes(prediction, batch, 1000)
    assert len(every) == 3
    for boxes, (height, width) in zip(every, batch.sizes.tolist(), strict=True):
        assert len(boxes) > 0
        assert bool(has_area(boxes).all())
        assert float(boxes.min()) >= 0
        assert float(boxes[:, 2].max()) <= width
        assert float(boxes[:, 3].max()) <= height
        assert not boxes.requires_grad
    some = proposed_boxes(prediction, batch, 2)
    assert_same(some, [boxes[:2] for boxes in every], "")


def test_proposals_of_a_region_prediction_without_first_stage_leave_inserted_ground_truth_out():
    detector, batch = TinyRegions(seed=1), tiny_batch(2)
    prediction = detector(batch).prediction
    alone = proposed_boxes(replace(prediction, first=None), batch, 100)
    assert sum(map(len, alone)) <= int((prediction.origin.ground_truth < 0).sum())
    inserted = prediction.boxes_xyxy[prediction.origin.ground_truth >= 0]
    assert not any(bool((box == torch.cat(alone)).all(dim=1).any()) for box in inserted)


def test_queries_propose_the_boxes_of_the_last_layer_best_first():
    """Fractions of the valid image, which of the second one is 48 pixels high."""
    earlier = torch.tensor([0.75, 0.75, 0.25, 0.25]).expand(3, 4)
    last = torch.tensor([[0.5, 0.25, 1.0, 0.25], [0.25, 0.5, 0.25, 0.5], [0.5, 0.5, 0.5, 0.25]])
    boxes = torch.stack([earlier, last])[:, None].expand(-1, 2, -1, -1)
    logits = torch.tensor([[[0.0, 0.0], [0.0, 0.0], [9.0, 9.0]], [[0.0, 4.0], [3.0, 0.0], [2.0, 2.0]]])
    seed = QuerySeed(torch.zeros(2, 3, 1), None, None)
    queries = Queries(logits[:, None].expand(-1, 2, -1, -1), boxes, torch.zeros(2, 2, 3, 1), seed)
    first, second = proposed_boxes(queries, tiny_batch(2), 2)
    assert first.tolist() == [[0, 8, 64, 24], [8, 16, 24, 48]]
    assert second.tolist() == [[0, 6, 64, 18], [8, 12, 24, 36]]
    # With a background, which is the last class, the first query is no object.
    first, _ = proposed_boxes(replace(queries, softmax=True), tiny_batch(2), 2)
    assert first.tolist() == [[8, 16, 24, 48], [16, 24, 48, 40]]


def dense_of(boxes):
    """A prediction of one level and one class, best first."""
    boxes, level = boxes[None], torch.zeros(len(boxes), dtype=torch.int64)
    return Dense(
        torch.linspace(3, -3, len(level))[None, :, None], boxes, boxes, boxes, level, level[:, None].expand(-1, 2), level
    )


def test_dense_proposals_are_suppressed_and_limited_as_in_faster_rcnn():
    """Beyond an IoU of 0.7 the worse box is dropped; of a level the best 2000 boxes stay."""
    near = torch.tensor([[0.0, 0.0, 8.0, 8.0], [0.0, 0.0, 8.0, 6.0], [20.0, 20.0, 28.0, 28.0], [20.0, 20.0, 28.0, 25.0]])
    (kept,) = proposed_boxes(dense_of(near), tiny_batch(1), 5000)
    assert torch.equal(kept, near[[0, 2, 3]])  # IoU 0.75 and 0.625
    corners = torch.cartesian_prod(torch.arange(50.0), torch.arange(50.0))
    (kept,) = proposed_boxes(dense_of(torch.cat([corners, corners + 1], dim=1)), tiny_batch(1), 5000)
    assert torch.equal(kept[:, :2], corners[:2000])


def test_boxes_without_area_or_finite_numbers_are_dropped():
    batch = tiny_batch(1)
    boxes = torch.tensor([[-5.0, -5, 9, 9], [3, 3, 3, 9], [70, 70, 90, 90], [0, 0, torch.nan, 5], [5, 5, 4, 9]])
    (kept,) = usable_boxes([boxes], batch)
    assert kept.tolist() == [[0, 0, 9, 9]]
    assert usable_boxes([boxes[1:2]], batch)[0].shape == (0, 4)


def test_labels_are_those_of_the_detectors_own_assignment():
    detector, batch = TinyRegions(seed=1), tiny_batch(3)
    regions = detector(batch).prediction
    labels, positives = label_regions(detector, regions, batch)
    matched = detector.assign(regions, batch).matched
    assert torch.equal(labels == 2, matched < 0)
    assert torch.equal(torch.nonzero(matched >= 0).flatten(), positives.index)
    assert torch.equal(labels[positives.index], positives.labels)
    labels, positives = label_regions(detector, regions, without_boxes(batch, range(3)))
    assert labels.unique().tolist() == [2]
    assert len(positives) == 0
    detector.assign = lambda prediction, batch: Assignment(matched.masked_fill(matched < 0, IGNORED))
    ignored, _ = label_regions(detector, regions, batch)
    assert torch.equal(ignored == IGNORED, matched < 0)
    assert torch.equal(ignored[positives.index], positives.labels)


def test_deltas_of_a_class_or_of_none():
    deltas = torch.arange(24.0).view(2, 3, 4)
    assert torch.equal(of_class(deltas, torch.tensor([2, 0])), torch.stack([deltas[0, 2], deltas[1, 0]]))
    assert torch.equal(of_class(deltas[:, :1], torch.tensor([2, 0])), deltas[:, 0])
    assert of_class(deltas[:0], torch.zeros(0, dtype=torch.int64)).shape == (0, 4)


def test_the_teacher_predicts_on_the_students_regions_once_for_all_that_ask():
    teacher, batch = Teacher(Counting(seed=1)), tiny_batch(3)
    Counting.runs = 0
    mine = TinyRegions(seed=2)(batch).prediction
    features = teacher.observe(batch).features
    found = teacher.predict_regions(mine, features, batch)
    copies = replace(features, maps=tuple(level.clone() for level in features.maps))
    assert teacher.predict_regions(replace(mine), copies, batch) is found
    assert Counting.runs == 1  # all images in one call
    by_image = [mine.boxes_xyxy[mine.origin.image == image] for image in range(3)]
    expected = teacher.detector.regions(features, by_image, batch)
    assert torch.equal(found.boxes_xyxy, mine.boxes_xyxy)
    torch.testing.assert_close(found.logits, expected.logits)
    assert not found.logits.requires_grad
    other = replace(features, maps=tuple(level + 1 for level in features.maps))
    assert not torch.equal(teacher.predict_regions(mine, other, batch).logits, found.logits)
    teacher.forget()
    Counting.runs = 0
    teacher.predict_regions(mine, features, batch)
    assert Counting.runs == 1


def test_the_teachers_rows_are_in_the_order_of_the_boxes():
    teacher, batch = Teacher(TinyRegions(seed=1)), tiny_batch(2)
    mine = TinyRegions(seed=2)(batch).prediction
    features = teacher.observe(batch).features
    expected = teacher.predict_regions(mine, features, batch)
    order = torch.randperm(len(mine.boxes_xyxy), generator=torch.Generator().manual_seed(0))
    mixed = teacher.predict_regions(mine.rows(order), features, batch)
    torch.testing.assert_close(mixed.logits, expected.logits[order])
    torch.testing.assert_close(mixed.boxes_xyxy, mine.boxes_xyxy[order])
    nothing = teacher.predict_regions(mine.rows(order[:0]), features, batch)
    assert nothing.logits.shape == (0, 3)


def test_a_cascade_answers_for_the_boxes_that_were_given():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        detector = build_detector(f"cascade_rcnn:{TINY}", ["a", "b"])
    batch = tiny_batch(2)
    seen = detector.train()(batch).prediction
    start = seen.before_refinement()
    assert start.previous is None
    assert start is seen.previous.previous
    found = Teacher(detector).predict_regions(start, detector.features(batch), batch)
    torch.testing.assert_close(found.boxes_xyxy, start.boxes_xyxy)


def test_a_teacher_without_regions_is_named():
    batch = tiny_batch(1)
    mine = TinyRegions()(batch).prediction
    teacher = Teacher(TinyDense())
    with pytest.raises(ModelError, match="tinydense:patches has no region head that predicts on given boxes"):
        teacher.predict_regions(mine, teacher.observe(batch).features, batch)


REGION_METHODS = ("odkd", "dsig", "g_detkd", "tadf", "mimic")


def counted(detector, monkeypatch):
    """The lists of images and regions that the detector pooled, one entry for each call."""
    calls, pool = [], detector._pool

    def record(pooler, features, boxes, batch):
        calls.append([len(mine) for mine in boxes])
        return pool(pooler, features, boxes, batch)

    monkeypatch.setattr(detector, "_pool", record)
    return calls


@pytest.mark.parametrize("order", [1, -1])
def test_a_composition_of_region_methods_pools_the_regions_of_a_step_once(order, monkeypatch):
    """One call of the student and one of the teacher, for all images together, whatever the order of the members."""
    teacher, student = (two_stage(seed) for seed in (1, 2))
    names = REGION_METHODS[::order]
    method = build_method("+".join(names), Teacher(teacher), student.train())
    batch = tiny_batch(3)
    taught = method.teach(batch)
    mine, theirs = counted(student, monkeypatch), counted(teacher, monkeypatch)
    losses = method.step(student, batch, taught, Clock(5, 10))
    assert {name.split("/")[0] for name in losses.terms if "/" in name} >= set(names)
    assert len(mine) == 1
    assert theirs == mine
    assert len(mine[0]) == 3


@functools.cache
def two_stage(seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_detector(f"faster_rcnn:{TINY}", ["a", "b"])
