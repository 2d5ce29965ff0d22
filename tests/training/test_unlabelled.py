"""What a teacher knows and the labels lack is no background, for detectors of each family."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from detdistill.detectors.build import build_detector
from detdistill.detectors.contract import PREDICTION, Teacher
from detdistill.errors import RunError
from detdistill.functional.label_scores import detection_loss
from detdistill.methods.shared.compose import build_method
from detdistill.settings import DistillSettings
from detdistill.structures import Assignment, Batch, Detections, Look, Target
from detdistill.training.unlabelled import Unlabelled
from tests.tiny import TinyDense, tiny_batch

BOX, FAR = [8.0, 8.0, 28.0, 28.0], [36.0, 36.0, 60.0, 60.0]


def found(*boxes: tuple[list[float], float, int]) -> Detections:
    """Detections of (box, score, label)."""
    return Detections(
        torch.tensor([box for box, _, _ in boxes]).reshape(-1, 4),
        torch.tensor([score for _, score, _ in boxes]),
        torch.tensor([label for _, _, label in boxes], dtype=torch.int64),
    )


def teacher(classes: tuple[str, ...], *detections: Detections) -> Teacher:
    """A frozen detector that finds what it is told, image by image."""
    detector = TinyDense()
    detector.spec = replace(detector.spec, classes=classes)
    detector.detect = lambda prediction, batch: detections  # type: ignore[method-assign]
    return Teacher(detector)


def batch_of(*targets: Target) -> Batch:
    batch = tiny_batch(len(targets))
    return replace(batch, targets=targets, ids=tuple(range(len(targets))))


def target(*boxes: tuple[list[float], int]) -> Target:
    labels = torch.tensor([label for _, label in boxes], dtype=torch.int64)
    return Target(torch.tensor([box for box, _ in boxes]).reshape(-1, 4), labels, torch.zeros(len(boxes), dtype=torch.bool))


def unlabelled(
    teachers: list[Teacher], labelled: dict[int, frozenset[int]], mode: str = "label", least: float = 0.3
) -> Unlabelled:
    return Unlabelled({one: Look() for one in teachers}, ("hat", "vest", "shoe"), labelled, mode, least)  # type: ignore[arg-type]


def test_boxes_of_unlabelled_classes_join_with_their_scores_and_the_students_labels():
    knows = teacher(
        ("shoe", "hat", "tie"), found((BOX, 0.8, 0), (FAR, 0.9, 1), (FAR, 0.9, 2), (FAR, 0.2, 0)), found((BOX, 0.8, 0))
    )
    batch = batch_of(target((FAR, 0)), target((FAR, 0)))
    seen, added = unlabelled([knows], {0: frozenset({0})})(batch)  # image 1 is labelled for all
    first, second = seen.targets
    assert first.boxes_xyxy.tolist() == [FAR, BOX]
    assert first.labels.tolist() == [0, 2]
    assert first.scores is not None
    assert first.scores.tolist() == pytest.approx([1.0, 0.8])
    assert second is batch.targets[1]
    assert float(added) == 0.5
    assert seen.images is batch.images  # so that the teacher's pass is shared


def test_ignored_boxes_count_nothing_and_labels_keep_their_scores():
    knows = teacher(("vest",), found((BOX, 0.8, 0)))
    batch = batch_of(replace(target((FAR, 0)), scores=torch.tensor([0.5])))
    seen, _ = unlabelled([knows], {0: frozenset({0})}, mode="ignore")(batch)
    assert seen.targets[0].scores is not None
    assert seen.targets[0].scores.tolist() == [0.5, 0.0]


def test_each_object_is_added_once_and_a_label_wins():
    near = [9.0, 8.0, 28.0, 28.0]
    first = teacher(("vest",), found((BOX, 0.6, 0), (FAR, 0.9, 0)))
    second = teacher(("vest", "shoe"), found((near, 0.7, 0), (near, 0.5, 1)))
    seen, _ = unlabelled([first, second], {0: frozenset({0})})(batch_of(target((FAR, 0))))
    assert seen.targets[0].boxes_xyxy.tolist() == [FAR, near, near]  # the surer of both; FAR is labelled as another class
    assert seen.targets[0].labels.tolist() == [0, 1, 2]


def test_a_mosaic_is_labelled_for_what_all_its_images_are_labelled_for():
    knows = teacher(("hat", "vest"), found((BOX, 0.8, 0), (FAR, 0.8, 1)))
    batch = batch_of(target())
    batch = replace(batch, views=(replace(batch.views[0], mosaic=(0, 1, 2, 3)),))
    seen, _ = unlabelled([knows], {0: frozenset({0, 1}), 3: frozenset({0})})(batch)
    assert seen.targets[0].labels.tolist() == [1]


BACKBONE = "resnet10t,channels=8-8-8-8,stem=8"
FAMILIES = {
    "dense": f"fcos:{BACKBONE},neck=32,levels=3-4,convs=1",
    "two_stage": f"faster_rcnn:{BACKBONE},neck=16,levels=3-4,mlp=16,proposals=20,rois=64,norm=frozen",
    "queries": f"detr:{BACKBONE},dim=16,heads=2,ffn=16,queries=8,encoder=1,decoder=2",
}


def student_and_batch(family: str, label: int = 1, score: float = 0.0):
    """A student, its prediction, its own assignment, and a batch of a labelled box and one that counts ``score``."""
    torch.manual_seed(0)
    student = build_detector(FAMILIES[family], ("hat", "vest", "shoe")).train()
    batch = batch_of(replace(target((FAR, 0), (BOX, label)), scores=torch.tensor([1.0, score])))
    prediction = student(batch, PREDICTION).float().prediction
    return student, prediction, student.assign(prediction, batch), batch


def test_an_ignored_box_gives_no_gradient_where_it_is_matched_in_a_region_head():
    student, prediction, assignment, batch = student_and_batch("two_stage")
    logits = prediction.logits.detach().requires_grad_()
    losses = detection_loss(student, replace(prediction, logits=logits), batch, assignment)
    (gradient,) = torch.autograd.grad(losses.total(), logits)
    matched = assignment.matched == 1
    assert bool(matched.any()), "nothing is matched to the box: the test says nothing"
    assert float(gradient[matched].abs().max()) == 0
    assert float(gradient[assignment.matched == -1].abs().max()) > 0


@pytest.mark.parametrize("family", ["dense", "queries"])
def test_what_is_matched_to_an_ignored_box_has_no_class_and_no_background(family):
    """As another class the box gives the same losses; counted, or as background, it gives others."""
    student, prediction, assignment, batch = student_and_batch(family)
    assert bool((assignment.matched == 1).any())

    def losses(given: Batch, by: Assignment = assignment) -> dict[str, torch.Tensor]:
        return dict(detection_loss(student, prediction, given, by).terms)

    ignored = losses(batch)
    other = losses(batch.with_targets([replace(batch.targets[0], labels=torch.tensor([0, 2]))]))
    for name, value in ignored.items():
        torch.testing.assert_close(other[name], value)
    background = replace(assignment, matched=assignment.matched.masked_fill(assignment.matched == 1, -1))
    for counted in (losses(batch.with_targets([replace(batch.targets[0], scores=None)])), losses(batch, background)):
        assert any(not torch.allclose(counted[name], value) for name, value in ignored.items())


def data_of(labelled: tuple[int, ...] | None):
    return SimpleNamespace(classes=("hat", "vest"), records=[SimpleNamespace(id=1, labelled=labelled)])


@pytest.mark.parametrize(
    ("settings", "classes", "cached", "said"),
    [
        (
            {},
            ("vest",),
            True,
            "unlabelled: neither a cache nor a served teacher gives boxes of classes that the labels lack; run the teacher",
        ),
        (
            {},
            ("hat",),
            False,
            "unlabelled: no teacher knows a class that some images are not labelled for (vest); give a teacher",
        ),
    ],
)
def test_runs_that_cannot_have_it_are_refused(settings, classes, cached, said):
    student, other = TinyDense(), TinyDense()
    other.spec = replace(other.spec, classes=classes)
    method = build_method("pkd", other, student)
    with pytest.raises(RunError) as error:
        Unlabelled.of(method, student, data_of((0,)), DistillSettings(**settings), cached)  # type: ignore[arg-type]
    assert str(error.value).startswith(said)


def test_whole_labels_and_background_need_nothing():
    student = TinyDense()
    method = build_method("pkd", TinyDense(), student)
    assert Unlabelled.of(method, student, data_of(None), DistillSettings(), False) is None  # type: ignore[arg-type]
    assert Unlabelled.of(method, student, data_of((0,)), DistillSettings(unlabelled="background"), False) is None  # type: ignore[arg-type]
