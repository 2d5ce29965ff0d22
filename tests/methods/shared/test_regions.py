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
from detdistill.structures import IGNORED, Assignment, Clock
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
