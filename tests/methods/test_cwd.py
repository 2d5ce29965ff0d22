import math

import pytest
import torch

from detdistill.detectors.contract import Teacher
from detdistill.errors import DetdistillError
from detdistill.losses import cwd_logit_map, cwd_loss
from detdistill.methods.cwd import CWD
from detdistill.methods.shared.needs import PairError
from detdistill.structures import Clock, Dense
from tests.golden import Golden, assert_golden
from tests.methods.contract_checks import check_method
from tests.tiny import TinyDense, TinyRegions, tiny_batch


@pytest.fixture
def golden():
    return Golden("cwd")


def test_values_and_gradients_equal_mmrazor(golden):
    settings = golden.meta["main"]
    student = [level.requires_grad_() for level in golden.levels("in_student")]
    teacher = golden.levels("in_teacher")
    for index, expected in enumerate(golden.levels("out_loss")):
        assert_golden(cwd_loss([student[index]], [teacher[index]], settings["loss_weight"], settings["tau"]), expected)
    total = cwd_loss(student, teacher, settings["loss_weight"], settings["tau"])
    assert_golden(total, golden["out_total"])
    total.backward()
    for level, expected in zip(student, golden.levels("grad_student"), strict=True):
        assert_golden(level.grad, expected)


def test_values_equal_torchdistiller(golden):
    settings = golden.meta.get("torchdistiller")
    student, teacher = golden.levels("in_student"), golden.levels("in_teacher")
    for index, expected in enumerate(golden.levels("out_torchdistiller_loss")):
        loss = cwd_loss([student[index]], [teacher[index]], settings["weight_applied_outside"], settings["temperature"])
        assert_golden(loss, expected)


def test_values_equal_mmdetection_distiller(golden):
    settings = golden.meta.get("align")
    student, teacher = golden.levels("in_student"), golden.levels("in_teacher")
    for index, expected in enumerate(golden.levels("out_mmdetdistiller_loss")):
        loss = cwd_loss([student[index]], [teacher[index]], settings["weight"], settings["tau"], cross_entropy=True)
        assert_golden(loss, expected)


def test_adapter_equals_mmdetection_distiller(golden):
    if "in_align_student" not in golden:
        pytest.skip("no adapter in this file")
    settings = golden.meta["align"]
    student, teacher = golden["in_align_student"].requires_grad_(), golden["in_align_teacher"]
    align = torch.nn.Conv2d(student.shape[1], teacher.shape[1], 1).double()
    align.load_state_dict(golden.parameters("param_align_"))
    loss = cwd_loss(
        [align(student)], [teacher], settings["weight"], settings["tau"], divisors=[student.shape[1]], cross_entropy=True
    )
    assert_golden(loss, golden["out_align_loss"])
    loss.backward()
    assert_golden(student.grad, golden["grad_align_student"])
    assert_golden(align.weight.grad, golden["grad_align_weight"])
    # A shift of a channel changes nothing, so both gradients are rounding errors around zero.
    assert float((align.bias.grad - golden["grad_align_bias"]).abs().max()) < 1e-12


def maps(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_zero_at_equality_and_never_negative():
    for seed in range(5):
        student, teacher = maps(seed, 2, 3, 4, 5), maps(seed + 100, 2, 3, 4, 5)
        assert abs(float(cwd_loss([teacher], [teacher]))) < 1e-12
        assert float(cwd_loss([student], [teacher])) > 0


def test_shifting_a_channel_changes_nothing_and_scaling_does():
    student, teacher = maps(0, 2, 3, 4, 5), maps(1, 2, 3, 4, 5)
    shift = maps(2, 2, 3, 1, 1) * 10
    loss = float(cwd_loss([student], [teacher]))
    assert float(cwd_loss([student + shift], [teacher])) == pytest.approx(loss, rel=1e-12)
    assert float(cwd_loss([student], [teacher + shift])) == pytest.approx(loss, rel=1e-12)
    assert float(cwd_loss([student * 2], [teacher])) != pytest.approx(loss, rel=1e-2)


@pytest.mark.parametrize("cross_entropy", [False, True])
def test_gradient_has_its_closed_form(cross_entropy):
    student, teacher = maps(0, 2, 3, 4, 5).requires_grad_(), maps(1, 2, 3, 4, 5).requires_grad_()
    cwd_loss([student], [teacher], weight=7.0, temperature=3.0, cross_entropy=cross_entropy).backward()
    q, p = (level.detach().flatten(2).div(3.0).softmax(2).view_as(level) for level in (student, teacher))
    torch.testing.assert_close(student.grad, 7.0 * 3.0 / (2 * 3) * (q - p), rtol=1e-10, atol=1e-12)
    assert float(student.grad.sum(dim=(2, 3)).abs().max()) < 1e-12
    assert teacher.grad is None


def test_copies_of_images_and_channels_and_reordered_positions_change_nothing():
    student, teacher = maps(0, 2, 3, 4, 5), maps(1, 2, 3, 4, 5)
    loss = float(cwd_loss([student], [teacher]))
    for copies in ((2, 1, 1, 1), (1, 2, 1, 1)):
        assert float(cwd_loss([student.repeat(copies)], [teacher.repeat(copies)])) == pytest.approx(loss, rel=1e-12)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    shuffled = [level.flatten(2)[..., order].view_as(level) for level in (student, teacher)]
    assert float(cwd_loss(shuffled[:1], shuffled[1:])) == pytest.approx(loss, rel=1e-12)


def test_cross_entropy_is_larger_by_the_teachers_entropy():
    student, teacher = maps(0, 2, 3, 4, 5), maps(1, 2, 3, 4, 5)
    p = (teacher.flatten(2) / 2.0).softmax(2)
    entropy = -(p * p.log()).sum(2).mean()
    difference = cwd_loss([student], [teacher], 5.0, 2.0, cross_entropy=True) - cwd_loss([student], [teacher], 5.0, 2.0)
    assert float(difference) == pytest.approx(5.0 * 4.0 * float(entropy), rel=1e-12)


def test_extreme_maps_stay_finite():
    student = torch.zeros(1, 1, 2, 2, requires_grad=True)
    loss = cwd_loss([student * 1.0], [torch.tensor([[[[1e4, -1e4], [0.0, 0.0]]]])])
    loss.backward()
    assert float(loss.detach()) == pytest.approx(5 * math.log(4), rel=1e-6)
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_temperature_must_be_positive(temperature):
    with pytest.raises(DetdistillError, match="temperature"):
        cwd_loss([maps(0, 1, 1, 2, 2)], [maps(0, 1, 1, 2, 2)], temperature=temperature)


def test_other_shapes_are_refused():
    with pytest.raises(DetdistillError, match=r"level 0.*\[1, 1, 2, 2\].*\[1, 1, 4, 4\]"):
        cwd_loss([maps(0, 1, 1, 2, 2)], [maps(0, 1, 1, 4, 4)])


# ------------------------------------------------------------------------------------------------------------- logits


def dense(logits, levels, cells, anchors):
    zeros = torch.zeros(*logits.shape[:2], 4)
    return Dense(logits, zeros, zeros, zeros, torch.tensor(levels), torch.tensor(cells), torch.tensor(anchors))


def test_logit_map_puts_each_prediction_at_its_cell_anchor_and_class():
    cells = [(1, 0), (0, 0), (0, 1), (1, 1), (0, 0), (0, 1), (1, 0), (1, 1), (0, 0)]
    anchors = [0, 0, 0, 0, 1, 1, 1, 1, 0]
    levels = [0] * 8 + [1]
    logits = torch.arange(2 * 9 * 3.0).view(2, 9, 3)
    prediction = dense(logits, levels, cells, anchors)
    found = cwd_logit_map(prediction, 0)
    assert found.shape == (2, 6, 2, 2)
    for index, ((row, column), anchor) in enumerate(zip(cells[:8], anchors[:8], strict=True)):
        for k in range(3):
            assert torch.equal(found[:, anchor * 3 + k, row, column], logits[:, index, k])
    assert torch.equal(cwd_logit_map(prediction, 1)[..., 0, 0], logits[:, 8])
    assert torch.equal(cwd_logit_map(prediction, 0, classes=[2, 0]), found[:, [2, 0, 5, 3]])


def learn(student, teacher, **settings):
    batch = tiny_batch()
    method = CWD(Teacher(teacher), student, **settings)
    return method.learn(student, student(batch), method.teach(batch), batch, Clock(1, 10))


def test_logits_are_matched_by_class_name():
    student, teacher = TinyDense(classes=("a", "b"), seed=1), TinyDense(classes=("a", "b"), seed=1)
    assert abs(float(learn(student, teacher, on="logits").total().detach())) < 1e-5
    swapped = TinyDense(classes=("b", "a"), seed=1)
    assert float(learn(student, swapped, on="logits").total().detach()) > 1e-3


def test_logits_need_dense_detectors_that_share_classes():
    with pytest.raises(PairError, match=r"cwd: the teacher .* predicts regions"):
        CWD(Teacher(TinyRegions()), TinyDense(), on="logits")
    with pytest.raises(PairError, match="does not know a"):
        CWD(Teacher(TinyDense(classes=("b", "c"))), TinyDense(), on="logits")


# ------------------------------------------------------------------------------------------------------------- method


def test_contract():
    assert len(check_method(CWD)) == 18
    check_method(CWD, temperature=4.0, channels="student", levels=[0])


def test_contract_on_logits():
    assert check_method(CWD, on="logits", resize_student=True) == ["dense 8 -> dense 8", "dense 16 -> dense 8"]


def test_divisor_of_mmdetection_distiller():
    torch.manual_seed(0)
    student, teacher = TinyDense(), TinyDense(channels=(16, 16), seed=1)
    torch.manual_seed(3)
    compared = float(learn(student, teacher).total().detach())
    torch.manual_seed(3)
    assert float(learn(student, teacher, channels="student").total().detach()) == pytest.approx(2 * compared, rel=1e-5)


def test_boxes_are_not_used():
    student, batch, empty = TinyDense(seed=1), tiny_batch(), tiny_batch(boxes=False)
    method = CWD(Teacher(TinyDense(seed=2)), student)
    taught = method.teach(batch)
    with_boxes = method.learn(student, student(batch), taught, batch, Clock(0, 1)).total()
    assert torch.equal(method.learn(student, student(batch), taught, empty, Clock(0, 1)).total(), with_boxes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"on": "logit"}, "on=logit is not one of features, logits (did you mean 'logits'?)"),
        ({"channels": "teacher"}, "channels=teacher is not one of compared, student"),
        ({"weight": -1.0}, "weight=-1.0 is not a number, 0 or more"),
        ({"temperature": 0.0}, "temperature=0.0 is not a number above 0"),
        ({"levels": [5]}, "levels=[5]: student level 5 has no partner; levels with one: [0, 1] (strides [8, 16])"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(DetdistillError) as error:
        CWD(Teacher(TinyDense()), TinyDense(), **settings)
    assert str(error.value) == f"cwd: {message}"
