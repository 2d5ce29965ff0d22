import math

import pytest
import torch

from detdistill.detectors.contract import Teacher
from detdistill.errors import DetdistillError
from detdistill.losses import mgd_keep, mgd_loss
from detdistill.methods.mgd import MGD, MGDGeneration
from detdistill.structures import Clock
from tests.golden import Golden, assert_golden
from tests.methods.contract_checks import check_method
from tests.tiny import TinyDense, tiny_batch


@pytest.fixture
def golden():
    return Golden("mgd")


def test_values_and_gradients_equal_the_released_code(golden):
    settings = golden.meta["hyperparameters"]
    alpha, dropped = settings["alpha_mgd"], settings["lambda_mgd"]
    student = [level.requires_grad_() for level in golden.levels("in_student")]
    teacher = golden.levels("in_teacher")
    modules, generated = [], []
    for index, (mine, theirs) in enumerate(zip(student, teacher, strict=True)):
        keep = mgd_keep(golden[f"in_uniform_{index}"], dropped)
        assert torch.equal(keep.long(), golden[f"out_mask_{index}"].long())
        module = MGDGeneration(mine.shape[1], theirs.shape[1]).double()
        module.load_state_dict(golden.parameters(f"param_l{index}."))
        modules.append(module)
        generated.append(module(mine, keep))
        assert_golden(generated[-1], golden[f"out_generated_{index}"])
        assert_golden(mgd_loss(generated[-1:], [theirs], weight=1.0), golden[f"out_dis_{index}"])
        assert_golden(mgd_loss(generated[-1:], [theirs], alpha), golden[f"out_total_{index}"])
    total = mgd_loss(generated, teacher, alpha)
    assert_golden(total, golden["out_total"])
    total.backward()
    for index, module in enumerate(modules):
        assert_golden(student[index].grad, golden[f"grad_student_{index}"])
        for name, parameter in module.named_parameters():
            assert_golden(parameter.grad, golden[f"grad_param_l{index}.{name}"])


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniform(seed, *shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def generator():
    torch.manual_seed(0)
    return MGDGeneration(3, 5).double()


@pytest.mark.parametrize("dropped", [0.0, 0.2, 0.65, 1.0])
def test_share_of_dropped_cells(dropped):
    keep = mgd_keep(uniform(0, 1, 1, 300, 300), dropped)
    assert 1 - float(keep.float().mean()) == pytest.approx(dropped, abs=0.01)


def test_nothing_dropped_compares_whole_maps(generator):
    student, teacher = draw(0, 2, 3, 4, 5), draw(1, 2, 5, 4, 5)
    loss = mgd_loss([generator(student, mgd_keep(uniform(2, 2, 1, 4, 5), 0.0))], [teacher], weight=0.1)
    expected = 0.1 * (generator.generation(generator.align(student)) - teacher).square().sum() / 2
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)


def test_everything_dropped_leaves_nothing_to_learn_from(generator):
    student = draw(0, 2, 3, 4, 5).requires_grad_()
    keep = mgd_keep(uniform(2, 2, 1, 4, 5), 1.0)
    loss = mgd_loss([generator(student, keep)], [draw(1, 2, 5, 4, 5)])
    loss.backward()
    assert not student.grad.any()
    other = mgd_loss([generator(draw(9, 2, 3, 4, 5), keep)], [draw(1, 2, 5, 4, 5)])
    assert float(other.detach()) == float(loss.detach())


def test_gradient_is_zero_exactly_at_dropped_cells(generator):
    student, teacher = draw(0, 2, 3, 6, 6).requires_grad_(), draw(1, 2, 5, 6, 6).requires_grad_()
    keep = mgd_keep(uniform(2, 2, 1, 6, 6), 0.5)
    mgd_loss([generator(student, keep)], [teacher]).backward()
    touched = (student.grad != 0).any(dim=1, keepdim=True)
    assert torch.equal(touched, keep)
    assert teacher.grad is None
    assert all(bool(parameter.grad.any()) for parameter in generator.parameters())


def test_perfect_generation_costs_nothing(generator):
    student, keep = draw(0, 2, 3, 4, 5), mgd_keep(uniform(2, 2, 1, 4, 5))
    generated = generator(student, keep).detach()
    assert float(mgd_loss([generated], [generated])) == 0.0


def test_copies_of_the_batch_change_nothing_and_the_weight_is_linear(generator):
    student, teacher, keep = draw(0, 2, 3, 4, 5), draw(1, 2, 5, 4, 5), mgd_keep(uniform(2, 2, 1, 4, 5))
    loss = float(mgd_loss([generator(student, keep)], [teacher]).detach())
    twice = generator(student.repeat(2, 1, 1, 1), keep.repeat(2, 1, 1, 1))
    assert float(mgd_loss([twice], [teacher.repeat(2, 1, 1, 1)]).detach()) == pytest.approx(loss, rel=1e-12)
    assert float(mgd_loss([generator(student, keep)], [teacher], 6e-5).detach()) == pytest.approx(3 * loss, rel=1e-12)


def test_equal_channels_have_no_align_layer():
    assert [name for name, _ in MGDGeneration(4, 4).named_parameters()] == [
        "generation.0.weight",
        "generation.0.bias",
        "generation.2.weight",
        "generation.2.bias",
    ]


# ------------------------------------------------------------------------------------------------------------- method


def test_contract():
    assert len(check_method(MGD)) == 18
    check_method(MGD, dropped=0.45, drop_channels=True, levels=[1])


@pytest.fixture
def masks(monkeypatch):
    """The masks that the method draws."""
    seen = []

    def record(values, dropped):
        seen.append(values <= 1 - dropped)
        return seen[-1]

    monkeypatch.setattr("detdistill.methods.mgd.mgd_keep", record)
    return seen


def learn(student=None, **settings):
    student, batch = student or TinyDense(seed=1), tiny_batch()
    method = MGD(Teacher(TinyDense(channels=(16, 16), seed=2)), student, **settings)
    return method.learn(student, student(batch), method.teach(batch), batch, Clock(1, 10))


def test_every_level_image_and_step_has_its_own_draw_over_all_channels(masks):
    torch.manual_seed(0)
    learn()
    learn()
    assert [tuple(mask.shape) for mask in masks] == [(2, 1, 8, 8), (2, 1, 4, 4)] * 2
    assert not torch.equal(masks[0][0], masks[0][1])
    assert not torch.equal(masks[0][:, :, :4, :4], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_channels_can_be_dropped_instead(masks):
    learn(drop_channels=True)
    assert [tuple(mask.shape) for mask in masks] == [(2, 16, 1, 1)] * 2


def test_masks_stay_in_eval_mode(masks):
    torch.manual_seed(0)
    learn(TinyDense(seed=1).eval(), dropped=0.5)
    share = torch.cat([mask.flatten() for mask in masks]).float().mean()
    assert 0.35 < float(share) < 0.65


def test_same_draws_give_the_same_loss():
    losses = []
    for _ in range(2):
        torch.manual_seed(5)
        losses.append(learn().total())
    assert torch.equal(losses[0], losses[1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": -1.0}, "weight=-1.0 is not a number, 0 or more"),
        ({"weight": math.inf}, "weight=inf is not a number, 0 or more"),
        ({"dropped": 1.5}, "dropped=1.5 is not a number from 0 to 1"),
        ({"dropped": math.nan}, "dropped=nan is not a number from 0 to 1"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(DetdistillError) as error:
        MGD(Teacher(TinyDense()), TinyDense(), **settings)
    assert str(error.value) == f"mgd: {message}"
