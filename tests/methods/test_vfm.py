import pytest
import torch

from detdistill.detectors.contract import Teacher
from detdistill.errors import DetdistillError
from detdistill.losses import vfm_cosine_loss, vfm_levels, vfm_smooth_loss
from detdistill.methods.shared.needs import PairError
from detdistill.methods.vfm import VFM
from detdistill.structures import Clock, Features, Observation
from tests.methods.contract_checks import check_method
from tests.tiny import TinyDense, TinyQueries, tiny_batch

CLOCK = Clock(0, 10)


def maps(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------- the losses


def test_values_by_hand():
    """Two cells: one right angle of length 2 and 3, one opposite; differences 2, 3 and 2, 2 in two channels."""
    student = torch.tensor([[2.0, 1.0], [0.0, 1.0]]).view(1, 2, 1, 2)
    teacher = torch.tensor([[0.0, -1.0], [3.0, -1.0]]).view(1, 2, 1, 2)
    assert float(vfm_cosine_loss(student, teacher)) == pytest.approx((1 + 2) / 2)
    assert float(vfm_smooth_loss(student, teacher)) == pytest.approx((1.5 + 2.5 + 1.5 + 1.5) / 4)
    first = torch.tensor([[[False, True]]])
    assert float(vfm_cosine_loss(student, teacher, first)) == pytest.approx(1)
    assert float(vfm_smooth_loss(student, teacher, first)) == pytest.approx((1.5 + 2.5) / 2)


def test_small_differences_are_squared():
    zeros = torch.zeros(1, 1, 1, 1)
    assert float(vfm_smooth_loss(zeros + 0.4, zeros)) == pytest.approx(0.08)


def test_zero_without_a_gradient_at_equality():
    student = maps(0, 2, 3, 4, 5).requires_grad_()
    for loss in (vfm_cosine_loss, vfm_smooth_loss):
        value = loss(student, student.detach().clone())
        assert float(value.detach()) == pytest.approx(0, abs=1e-12)
        (slope,) = torch.autograd.grad(value, student)
        assert float(slope.abs().max()) < 1e-12


def test_the_cosine_ignores_lengths_and_the_smooth_part_does_not():
    student, teacher = maps(0, 2, 3, 4, 5), maps(1, 2, 3, 4, 5)
    torch.testing.assert_close(vfm_cosine_loss(3 * student, 7 * teacher), vfm_cosine_loss(student, teacher))
    assert float(vfm_smooth_loss(3 * student, teacher)) > float(vfm_smooth_loss(student, teacher)) + 0.1


def test_padded_cells_count_nothing():
    student, teacher = maps(0, 2, 3, 4, 4).requires_grad_(), maps(1, 2, 3, 4, 4)
    padding = torch.zeros(2, 4, 4, dtype=torch.bool)
    padding[1, :, 2:] = True
    for loss in (vfm_cosine_loss, vfm_smooth_loss):
        value = loss(student, teacher, padding)
        other = torch.where(padding[:, None], torch.full_like(teacher, 9.0), teacher)
        torch.testing.assert_close(loss(student, other, padding), value)
        (slope,) = torch.autograd.grad(value, student)
        assert not slope.movedim(1, -1)[padding].any()
        assert slope.movedim(1, -1)[~padding].any()
        nothing = loss(student, teacher, torch.ones_like(padding))
        assert float(nothing.detach()) == 0


def test_gradients_agree_with_finite_differences():
    student, teacher = maps(0, 1, 3, 2, 2).requires_grad_(), maps(1, 1, 3, 2, 2)
    for loss in (vfm_cosine_loss, vfm_smooth_loss):
        assert torch.autograd.gradcheck(lambda level, loss=loss: loss(level, teacher), (student,))


def test_maps_that_cannot_be_compared_are_named():
    with pytest.raises(DetdistillError, match=r"vfm_cosine_loss: student map .* differ in channels"):
        vfm_cosine_loss(maps(0, 1, 3, 2, 2), maps(0, 1, 4, 2, 2))


def test_levels_by_nearest_stride():
    assert vfm_levels((8, 16, 32, 64), (14,)) == [(1, 0)]
    assert vfm_levels((8, 16, 32), (8, 16, 32)) == [(0, 0), (1, 1), (2, 2)]
    assert vfm_levels((8, 16, 32), (4, 64), levels=[0, 2]) == [(0, 0), (2, 1)]


# ------------------------------------------------------------------------------------------------------- the method


@pytest.mark.parametrize("settings", [{}, {"maps": "backbone", "levels": (-1,), "smooth_weight": 0.0, "cosine_weight": 1.0}])
def test_contract(settings):
    kinds = ("dense", "regions", "queries")
    expected = [f"{teacher} {channels} -> {student} 8" for teacher in kinds for student in kinds for channels in (8, 16)]
    assert check_method(VFM, **settings) == expected


def test_terms_are_those_of_the_pure_functions():
    """The student's level of stride 16 is compared, on the grid of a teacher with one map of stride 8."""
    batch = tiny_batch(3)
    teacher, student = Teacher(TinyDense(channels=(12,), strides=(8,), seed=1)), TinyDense(seed=2)
    method = VFM(teacher, student, weight=2.0, levels=(-1,))
    seen, taught = student(batch), method.teach(batch)
    losses = method.learn(student, seen, taught, batch, CLOCK)
    mine = method.adapters[0](seen.features.maps[1])
    mine = torch.nn.functional.interpolate(mine, size=(8, 8), mode="bilinear", align_corners=False)
    padding = torch.zeros(3, 8, 8, dtype=torch.bool)
    padding[1, 6:] = True  # the second image is a quarter lower
    assert torch.equal(taught.features.padding[0], padding)
    fixed = taught.features.maps[0]
    assert list(losses.terms) == ["vfm_cosine", "vfm_smooth"]
    torch.testing.assert_close(losses.terms["vfm_cosine"], 1.8 * vfm_cosine_loss(mine, fixed, padding))
    torch.testing.assert_close(losses.terms["vfm_smooth"], 0.2 * vfm_smooth_loss(mine, fixed, padding))


def test_the_backbone_follows_alone():
    batch = tiny_batch(2)
    teacher, student = Teacher(TinyDense(seed=1)), TinyDense(seed=2)
    method = VFM(teacher, student, maps="backbone")
    look = method.requirements.student
    assert look.backbone
    method.learn(student, student(batch, look), method.teach(batch), batch, CLOCK).total().backward()
    reached = {name.partition(".")[0] for name, p in student.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == {"backbone"}
    assert [adapter.in_channels for adapter in method.adapters] == [6, 6]


def test_a_trained_projection_reaches_the_teachers_maps():
    """The projection alone brings both terms down, if the teacher's maps are a projection of the student's."""
    batch = tiny_batch(2)
    teacher, student = Teacher(TinyDense(seed=1)), TinyDense(seed=2)
    torch.manual_seed(0)
    method = VFM(teacher, student)
    seen = Observation(student(batch).features.detach())
    level = [torch.einsum("bchw,dc->bdhw", one, torch.randn(8, 8)) for one in seen.features.maps]
    taught = Observation(Features(tuple(level), seen.features.strides))
    optimizer = torch.optim.LBFGS(method.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        total = method.learn(student, seen, taught, batch, CLOCK).total()
        total.backward()
        return total

    before = float(loss().detach())
    optimizer.step(loss)
    assert float(loss().detach()) < 1e-3 * before


# ------------------------------------------------------------------------------------------------------- bad input


def test_a_level_that_the_student_lacks_is_refused():
    with pytest.raises(PairError) as error:
        VFM(Teacher(TinyDense()), TinyDense(), levels=(2,))
    assert str(error.value) == "vfm: levels=2: the student tinydense:patches has 2 levels here, of strides (8, 16)"


def test_weights_that_are_all_zero_are_refused():
    for settings in ({"weight": 0.0}, {"cosine_weight": 0.0, "smooth_weight": 0.0}):
        with pytest.raises(DetdistillError, match=r"vfm: .*all 0; nothing would be distilled"):
            VFM(Teacher(TinyDense()), TinyQueries(), **settings)
