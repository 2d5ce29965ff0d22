"""Any teacher to any student: FitNet, PKD and one whole step for every pair of detectors, and which pairs are refused.

What is expected is written down here by rule, from the papers' strides, never recorded from what the code does. A
detector that is missing makes its pairs fail.
"""

import atexit
import functools
import re
import shutil
import tempfile
from pathlib import Path

import pytest
import torch

from detdistill.detectors.build import build_detector
from detdistill.detectors.contract import Parts, Teacher
from detdistill.detectors.probe import probe_batch, tiny_name
from detdistill.methods.shared.compose import build_method
from detdistill.methods.shared.needs import PairError
from detdistill.structures import Clock
from tests.detectors.mmdet.checkpoints import checkpoint
from tests.golden import Golden

pytestmark = pytest.mark.slow

STRIDES = {
    "faster_rcnn": (4, 8, 16, 32, 64),
    "mask_rcnn": (4, 8, 16, 32, 64),
    "cascade_rcnn": (4, 8, 16, 32, 64),
    "retinanet": (8, 16, 32, 64, 128),
    "fcos": (8, 16, 32, 64, 128),
    "atss": (8, 16, 32, 64, 128),
    "paa": (8, 16, 32, 64, 128),
    "gfl": (8, 16, 32, 64, 128),
    "reppoints": (8, 16, 32, 64, 128),
    "mimicdet": (8, 16, 32, 64, 128),
    "ssd": (8, 16, 32, 64, 128, 256),
    "deformable_detr": (8, 16, 32, 64),
    "conditional_detr": (32,),
    "detr": (32,),
    "rt_detr": (8, 16, 32),
    "adamixer": (4, 8, 16, 32),
    "yolo11": (8, 16, 32),
    "yolo26": (8, 16, 32),
    "yolox": (8, 16, 32),
    "mmdet": (8, 16, 32, 64, 128),
}
"""Of the maps that each detector shows to a method: the neck's; of DETR families the encoder's; AdaMixer's projected maps."""
FINE = "fcos on levels 3-4"
STRIDES_WITH_FINE = {**STRIDES, FINE: (8, 16)}
SOFTMAX = {"ssd", "mimicdet"}
"""Dense detectors whose classes and background share a softmax; the others have sigmoids."""
DENSE = {"retinanet", "fcos", "atss", "paa", "gfl", "reppoints", "ssd", "mimicdet"}


@functools.cache
def mmdet_file():
    """A GFL as mmdet saves it."""
    folder = Path(tempfile.mkdtemp(prefix="detdistill-grid-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    golden = Golden("mmdet_gfl")
    return checkpoint(golden, folder / "gfl.pth", dataset_meta={"classes": ["one", "two", "three"]})


def model_name(name):
    if name == "mmdet":
        return f"mmdet:{mmdet_file()}"
    if name == "yolox":
        return "libreyolo:yolox-n,width=0.0625"
    if name.startswith("yolo"):
        return f"ultralytics:{name}n,width=0.0625"
    return f"{tiny_name('fcos')},levels=3-4" if name == FINE else tiny_name(name)


@functools.cache
def teacher_of(name):
    torch.manual_seed(1)
    return Teacher(build_detector(model_name(name), ("one", "two")))


@functools.cache
def student_of(name):
    torch.manual_seed(2)
    return build_detector(model_name(name), ("two", "one")).train()


@functools.cache
def batch():
    """One batch object, so that each teacher looks at it once."""
    return probe_batch()


def refusal(method, teacher, student):
    """What the sentence must say, or None where the pair is served."""
    theirs, mine = STRIDES_WITH_FINE[teacher], STRIDES_WITH_FINE[student]
    if not set(theirs) & set(mine):
        return (
            f"{method}: no common level: student {student_of(student).spec.name} has strides {mine}, "
            f"teacher {teacher_of(teacher).spec.name} has {theirs}; choose levels that meet, e.g. by levels= in the model's name"
        )
    return None


@pytest.mark.parametrize("name", STRIDES_WITH_FINE)
def test_each_detector_shows_the_strides_of_its_paper(name):
    assert student_of(name).spec.strides == STRIDES_WITH_FINE[name]
    assert teacher_of(name).observe(batch()).features.strides == STRIDES_WITH_FINE[name]


def test_only_pairs_without_a_common_stride_are_refused():
    """Every detector's maps include stride 32, so by themselves all pairs are served; the short pyramid meets not all."""
    refused = {
        (teacher, student) for teacher in STRIDES_WITH_FINE for student in STRIDES_WITH_FINE if refusal("pkd", teacher, student)
    }
    assert refused == {("detr", FINE), ("conditional_detr", FINE), (FINE, "detr"), (FINE, "conditional_detr")}


@pytest.mark.parametrize("student", STRIDES_WITH_FINE)
@pytest.mark.parametrize("teacher", STRIDES_WITH_FINE)
def test_each_pair_trains_or_is_refused_by_a_right_sentence(teacher, student):
    frozen, learner = teacher_of(teacher), student_of(student)
    for slug in ("fitnet", "pkd"):
        sentence = refusal(slug, teacher, student)
        if sentence is not None:
            with pytest.raises(PairError, match=f"^{re.escape(sentence)}; methods that could serve this pair: "):
                build_method(slug, frozen, learner)
    if refusal("pkd", teacher, student) is not None:
        return
    torch.manual_seed(0)
    method = build_method("fitnet+pkd", frozen, learner)
    common = [stride for stride in STRIDES_WITH_FINE[student] if stride in STRIDES_WITH_FINE[teacher]]
    for single in method.methods:
        assert [learner.spec.strides[pair.student] for pair in single.pairs] == common
        assert [frozen.spec.strides[pair.teacher] for pair in single.pairs] == common
    before = {name: parameter.detach().clone() for name, parameter in learner.named_parameters()}
    fixed = {name: tensor.clone() for name, tensor in frozen.detector.state_dict().items()}
    optimizer = torch.optim.AdamW([*learner.parameters(), *method.parameters()], lr=1e-4)
    losses = method.step(learner, batch(), method.teach(batch()), Clock(0, 10))
    assert all(bool(torch.isfinite(term)) for term in losses.terms.values())
    assert float(losses.terms["fitnet/fitnet"].detach()) > 0
    assert float(losses.terms["pkd/pkd"].detach()) > 0
    # Distillation must reach the student's backbone by itself, not only beside the detection loss.
    backbone = Parts.parameters(learner.parts().backbone)
    distilled = losses.terms["fitnet/fitnet"] + losses.terms["pkd/pkd"]
    reached = torch.autograd.grad(distilled, backbone, retain_graph=True, allow_unused=True)
    assert sum(gradient is not None and bool(gradient.any()) for gradient in reached) >= 0.5 * len(backbone) > 0
    losses.total().backward()
    torch.nn.utils.clip_grad_norm_(learner.parameters(), 5.0, error_if_nonfinite=True)
    optimizer.step()
    moved = {name for name, parameter in learner.named_parameters() if not torch.equal(parameter, before[name])}
    got_gradient = {name for name, parameter in learner.named_parameters() if parameter.grad is not None}
    assert len(moved) >= 0.9 * len(got_gradient) > 0
    assert len(got_gradient) >= 0.9 * len(before)
    assert all(torch.equal(tensor, fixed[name]) for name, tensor in frozen.detector.state_dict().items())
    optimizer.zero_grad()


@pytest.mark.parametrize("student", ["fcos", "ssd", "faster_rcnn", "detr"])
@pytest.mark.parametrize("teacher", ["retinanet", "ssd", "cascade_rcnn", "rt_detr"])
def test_logits_are_compared_between_dense_detectors_of_one_kind_only(teacher, student):
    """CWD on logits: both dense, and both with sigmoids or both with a softmax."""
    frozen, learner = teacher_of(teacher), student_of(student)
    role, detector = ("student", learner) if student not in DENSE else ("teacher", frozen)
    if student not in DENSE or teacher not in DENSE:
        name = detector.spec.name
        sentence = (
            rf"^cwd: the {role} {re.escape(name)} predicts (regions|queries); it needs a {role} that predicts dense; methods"
        )
    elif (teacher in SOFTMAX) != (student in SOFTMAX):
        kinds = ("softmax", "sigmoid") if teacher in SOFTMAX else ("sigmoid", "softmax")
        sentence = (
            rf"^cwd: it compares class scores, but the teacher {re.escape(frozen.spec.name)} has {kinds[0]} and the student "
            rf"{re.escape(learner.spec.name)} {kinds[1]} classes; methods that could serve this pair: "
        )
    elif (teacher, student) == ("retinanet", "fcos"):
        sentence = (
            rf"^cwd: the student {re.escape(learner.spec.name)} has 1 anchors in a cell of stride 8, the teacher "
            rf"{re.escape(frozen.spec.name)} 9; use on=features; methods that could serve this pair: "
        )
    else:
        assert build_method("cwd,on=logits", frozen, learner).slug == "cwd"
        return
    with pytest.raises(PairError, match=sentence):
        build_method("cwd,on=logits", frozen, learner)
