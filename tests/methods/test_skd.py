import pytest
import torch
import torch.nn.functional as F
from torch import nn

from detdistill.detectors.contract import Teacher
from detdistill.errors import DetdistillError
from detdistill.methods.skd import CHUNK, SKD, _blur_matrix, skd_loss, skd_scaled, skd_ssim
from detdistill.structures import Clock
from tests.golden import Golden, assert_golden
from tests.methods.contract_checks import check_method, without_boxes
from tests.tiny import TinyDense, TinyRegions, tiny_batch


def maps(seed, *shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_values_and_gradients_equal_kornia():
    golden = Golden("skd")
    window, weight = golden.meta["window_size"], golden.meta["lambda_"]
    students, teachers = [level.requires_grad_() for level in golden.levels("in_student")], golden.levels("in_teacher")
    for level, (mine, theirs) in enumerate(zip(students, teachers, strict=True)):
        assert_golden(skd_loss([mine], [theirs], 1.0, scope="none", window=window), golden[f"out_loss_{level}"])
        if f"out_ssim_map_{level}" in golden:
            assert_golden(skd_ssim(mine, theirs, window), golden[f"out_ssim_map_{level}"])
        if f"out_loss_valid_{level}" in golden:
            valid = skd_loss([mine], [theirs], 1.0, scope="none", window=window, borders=False)
            assert_golden(valid, golden[f"out_loss_valid_{level}"])
    middle = _blur_matrix(4 * window, window, 1.5, students[0])[2 * window]
    assert_golden(middle[2 * window - window // 2 :][:window], golden["out_kernel1d"])
    total = skd_loss(students, teachers, weight, scope="none", window=window)
    assert_golden(total, golden["out_total"])
    total.backward()
    for student, expected in zip(students, golden.levels("grad_student"), strict=True):
        assert_golden(student.grad, expected)


# ---------------------------------------------------------------------------------------------------------- similarity


def plain(student, teacher, weight=4.0, scope="image", **how):
    """The loss in one piece, with autograd."""
    pairs = zip(student, teacher, strict=True)
    each = [skd_ssim(skd_scaled(mine, scope), skd_scaled(theirs, scope), **how) for mine, theirs in pairs]
    return weight * sum(((1 - level) / 2).clamp(0, 1).mean() for level in each)


PARTS = [(1, 1, 1), (0, 1, 1), (0, 0, 1), (0, 1, 0), (1, 0, 0), (1, 0, 1), (1, 1, 0)]


@pytest.mark.parametrize("scope", ["image", "channel", "tensor", "none"])
@pytest.mark.parametrize("parts", PARTS, ids=str)
def test_computing_in_pieces_changes_neither_value_nor_gradient(parts, scope, monkeypatch):
    monkeypatch.setitem(CHUNK, "cpu", 2 * 9 * 7)
    how = dict(zip(("luminance", "contrast", "structure"), map(bool, parts), strict=True))
    teacher, found = [maps(1, 2, 5, 9, 7)], []
    for loss in (skd_loss, plain):
        student = maps(0, 2, 5, 9, 7).requires_grad_()
        value = loss([student], teacher, window=5, scope=scope, **how)
        (3 * value).backward()
        found.append((value.detach(), student.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-14)


def test_the_parts_multiply_to_the_whole():
    student, teacher = maps(0, 1, 2, 8, 8), maps(1, 1, 2, 8, 8)
    one = [skd_ssim(student, teacher, 5, luminance=a, contrast=b, structure=c) for a, b, c in ((1, 0, 0), (0, 1, 0), (0, 0, 1))]
    torch.testing.assert_close(one[0] * one[1] * one[2], skd_ssim(student, teacher, 5), rtol=1e-6, atol=1e-8)


def test_the_blur_equals_a_convolution_of_the_reflected_map():
    level = maps(0, 1, 1, 6, 9)
    taps = torch.exp(-torch.arange(-2.0, 3.0, dtype=torch.float64).square() / (2 * 1.5**2))
    kernel = (taps / taps.sum())[:, None] * (taps / taps.sum())
    expected = F.conv2d(F.pad(level, (2, 2, 2, 2), mode="reflect"), kernel[None, None])
    blurred = _blur_matrix(6, 5, 1.5, level) @ level @ _blur_matrix(9, 5, 1.5, level).T
    torch.testing.assert_close(blurred, expected)


def test_maps_smaller_than_the_window():
    for shape in ((1, 1), (2, 3), (1, 20), (5, 6)):
        student = maps(0, 2, 3, *shape).requires_grad_()
        loss = skd_loss([student], [maps(1, 2, 3, *shape)])
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(student.grad).all()
        assert skd_ssim(student, student.detach(), borders=False).numel() > 0


def test_equal_maps_anticorrelated_maps_and_bounds():
    teacher = maps(0, 2, 3, 12, 12)
    assert 0 <= skd_loss([teacher], [teacher]).item() < 1e-6
    against = skd_loss([1 - teacher], [teacher], 1.0)
    assert 0.5 < against.item() <= 1.0


def test_a_positive_factor_and_an_offset_change_nothing():
    student, teacher = maps(0, 2, 3, 12, 12), maps(1, 2, 3, 12, 12)
    expected = skd_loss([student], [teacher]).item()
    by_image = torch.tensor([3.0, 0.5]).view(2, 1, 1, 1)
    by_channel = torch.rand(2, 3, 1, 1) + 0.5
    assert skd_loss([by_image * student - 7], [teacher]).item() == pytest.approx(expected, rel=1e-4)
    assert skd_loss([2 * student + 1], [teacher], scope="tensor").item() == pytest.approx(
        skd_loss([student], [teacher], scope="tensor").item(), rel=1e-4
    )
    channels = [skd_loss([some], [teacher], scope="channel").item() for some in (student, by_channel * student)]
    assert channels[0] == pytest.approx(channels[1], rel=1e-4)
    assert skd_loss([by_channel * student], [teacher]).item() != pytest.approx(expected, rel=1e-3)


def test_symmetric_in_value_and_constant_in_the_teacher():
    student, teacher = maps(0, 2, 3, 12, 12).requires_grad_(), maps(1, 2, 3, 12, 12).requires_grad_()
    assert skd_loss([student], [teacher]).item() == pytest.approx(skd_loss([teacher], [student]).item(), rel=1e-12)
    skd_loss([student], [teacher]).backward()
    assert teacher.grad is None
    assert student.grad.any()


def test_levels_count_alike_and_images_do_not_depend_on_each_other():
    student, teacher = maps(0, 2, 3, 12, 12), maps(1, 2, 3, 12, 12)
    fine, coarse = ([student], [teacher]), ([maps(2, 2, 3, 4, 4)], [maps(3, 2, 3, 4, 4)])
    both = skd_loss(fine[0] + coarse[0], fine[1] + coarse[1]).item()
    assert both == pytest.approx(skd_loss(*fine).item() + skd_loss(*coarse).item(), rel=1e-12)
    alone = sum(skd_loss([student[[i]]], [teacher[[i]]]).item() for i in range(2)) / 2
    assert skd_loss(*fine).item() == pytest.approx(alone, rel=1e-12)


def test_constant_maps_and_one_outlier_are_finite():
    teacher = maps(1, 1, 3, 12, 12).float()
    outlier = torch.zeros(1, 3, 12, 12)
    outlier[0, 0, 0, 0] = 1e6
    for student in (torch.full((1, 3, 12, 12), 2.0), outlier):
        student.requires_grad_()
        loss = skd_loss([student], [teacher])
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(student.grad).all()


def test_maps_of_unlike_size_and_an_even_window_are_refused():
    with pytest.raises(DetdistillError, match=r"skd: level 0: student map \(1, 2, 3, 3\) and teacher map \(1, 3, 3, 3\) differ"):
        skd_loss([torch.zeros(1, 2, 3, 3)], [torch.zeros(1, 3, 3, 3)])
    with pytest.raises(DetdistillError, match="skd: window=4 is not odd"):
        skd_loss([torch.zeros(1, 2, 3, 3)], [torch.zeros(1, 2, 3, 3)], window=4)


# -------------------------------------------------------------------------------------------------------------- method


def built(teacher=TinyDense, channels=12, **settings):
    torch.manual_seed(0)
    student = TinyDense()
    return SKD(Teacher(teacher(channels=(channels, channels), seed=1)), student, **settings), student


def learned(batch, **settings):
    method, student = built(**settings)
    return method.learn(student, student(batch), method.teach(batch), batch, Clock(0, 1))


def test_the_term_is_the_loss_of_the_adapted_maps():
    batch = tiny_batch()
    settings = {"window": 5, "sigma": 1.0, "luminance": False, "scope": "channel"}
    method, student = built(**settings)
    mine, theirs = method.adapters(student.features(batch).maps), method.teacher.observe(batch).features.maps
    expected = skd_loss(mine, theirs, 2.0, **settings)
    losses = learned(batch, weight=2.0, **settings)
    assert losses.terms["skd"].item() == pytest.approx(expected.item(), rel=1e-6)
    assert learned(without_boxes(batch, range(2)), weight=2.0, **settings).terms["skd"].item() == losses.terms["skd"].item()


def test_convolutions_lie_where_detectors_are_unlike():
    def convolutions(*given, **settings):
        return [isinstance(layer, nn.Conv2d) for layer in built(*given, **settings)[0].adapters]

    assert convolutions(TinyDense, 8) == [False, False]
    assert convolutions(TinyDense, 12) == convolutions(TinyRegions, 8) == [True, True]
    assert convolutions(TinyDense, 8, adapt="always") == [True, True]
    assert convolutions(TinyRegions, 8, adapt="never") == [False, False]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 4}, "window=4 is not odd"),
        ({"window": 0}, "window=0 is not a whole number, 1 or more"),
        ({"luminance": False, "contrast": False, "structure": False}, "luminance, contrast, structure are all false"),
        ({"adapt": "never"}, "adapt=never, but the student has 8 channels at stride 8, the teacher 12; use adapt=unlike"),
        ({"scope": "batch"}, "scope=batch is not one of image, tensor, channel, none"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(DetdistillError) as error:
        built(**settings)
    assert str(error.value).startswith(f"skd: {message}")


def test_contract():
    assert len(check_method(SKD)) == 18
