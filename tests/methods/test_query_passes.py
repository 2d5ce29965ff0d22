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


@pytest.mark.parametrize(
    ("method", "student_passes", "teacher_passes"), [("detrdistill", 2, 1), ("kd_detr", 3, 2), ("d3etr", 2, 1)]
)
def test_every_pass_of_a_bf16_step_runs_in_bf16_and_the_losses_in_float32(method, student_passes, teacher_passes):
    """Also those that run inside ``learn``, on a first pass that was turned into float32."""
    torch.manual_seed(0)
    teacher, student = (build_detector(TINY, ("a", "b")) for _ in range(2))
    built, batch = build_method(method, Teacher(teacher), student.train()), tiny_batch(2)
    kinds: dict[str, list[torch.dtype]] = {}
    for side, detector in (("student", student), ("teacher", teacher)):
        layer = detector.model.model.decoder.layers[0]
        linear = [module for module in layer.modules() if isinstance(module, torch.nn.Linear)][-1]
        kinds[side] = []
        linear.register_forward_hook(lambda module, given, made, found=kinds[side]: found.append(made.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        losses = built.step(student, batch, built.teach(batch), Clock(0, 1))
    assert kinds == {"student": [torch.bfloat16] * student_passes, "teacher": [torch.bfloat16] * teacher_passes}
    assert {term.dtype for term in losses.terms.values()} == {torch.float32}
    assert all(bool(torch.isfinite(term)) for term in losses.terms.values())
    losses.total().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in student.parameters() if p.grad is not None)
