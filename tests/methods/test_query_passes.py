"""What a step of the methods for DETRs runs: each encoder once, decoders as often as the method decodes a group of queries."""

from collections import Counter

import pytest
import torch

from detdistill.detectors.build import build_detector
from detdistill.detectors.contract import Teacher
from detdistill.methods.shared.compose import build_method
from detdistill.structures import Clock
from tests.tiny import tiny_batch

TINY = "deformable_detr:resnet10t,channels=8-16-32-64,stem=8,dim=32,heads=4,ffn=64,queries=10,encoder=1,decoder=2"


def counted(detector, side, calls):
    """Count calls of a detector's encoder, and passes of its decoder by those of the first layer."""
    core = detector.model.model
    for name, module in (("encoder", core.encoder), ("decoder", core.decoder.layers[0])):
        module.register_forward_hook(lambda *_, name=name: calls.update([f"{side} {name}"]))


@pytest.mark.parametrize(
    ("method", "student_passes", "teacher_passes"),
    [
        ("detrdistill", 2, 1),  # own and the teacher's queries
        ("detrdistill,assignment_weight=0", 1, 1),
        ("kd_detr", 3, 2),  # own, specific and general points
        ("d3etr", 2, 1),  # own, which shows its attention maps, and the teacher's queries
    ],
)
def test_passes_of_one_step(method, student_passes, teacher_passes):
    torch.manual_seed(0)
    teacher, student = (build_detector(TINY, ("a", "b")) for _ in range(2))
    built = build_method(method, Teacher(teacher), student.train())
    calls: Counter[str] = Counter()
    counted(teacher, "teacher", calls)
    counted(student, "student", calls)
    batch = tiny_batch(2)
    built.step(student, batch, built.teach(batch), Clock(0, 1)).total().backward()
    assert calls == {
        "student encoder": 1,
        "student decoder": student_passes,
        "teacher encoder": 1,
        "teacher decoder": teacher_passes,
    }
