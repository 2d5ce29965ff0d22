from dataclasses import replace

import pytest
import torch
from torch import nn

from detdistill.detectors.contract import Teacher
from detdistill.errors import DetdistillError
from detdistill.functional.attention import channel_attention, spatial_attention
from detdistill.losses import fgd_loss, fgd_masks, fgd_terms
from detdistill.methods.fgd import FGD, ContextBlock, FGDTerms
from detdistill.structures import Clock, Target
from tests.golden import Golden, assert_golden
from tests.methods.contract_checks import check_method
from tests.tiny import TinyDense, tiny_batch

RELEASED = {"conv_mask_": "mask", "channel_add_conv_": "transform"}


class Parts(nn.Module):
    """The learnable parts of one level: their names of the released state dict, in our modules."""

    def __init__(self, released):
        super().__init__()
        weight = released.get("align.weight")
        self.align = nn.Identity() if weight is None else nn.Conv2d(weight.shape[1], weight.shape[0], 1)
        channels = released["conv_mask_s.weight"].shape[1]
        self.s, self.t = ContextBlock(channels), ContextBlock(channels)
        self.double()
        self.load_state_dict({self.ours(name): value for name, value in released.items()})

    @staticmethod
    def ours(name):
        head, _, rest = name.partition(".")
        for theirs, part in RELEASED.items():
            if head.startswith(theirs):
                return f"{head[-1]}.{part}.{rest}"
        return name

    def contexts(self, student, teacher):
        return self.s(student), self.t(teacher)


@pytest.fixture
def golden():
    return Golden("fgd")


def boxes_and_sizes(golden):
    boxes = [boxes.reshape(-1, 4) for boxes in golden.levels("in_boxes")]
    return boxes, [tuple(size.tolist()) for size in golden.levels("in_image_size")]


def test_masks_and_attention_equal_the_released_code(golden):
    boxes, sizes = boxes_and_sizes(golden)
    temperature = golden.meta["hyperparameters"].get("temp", 0.5)
    for level, teacher in enumerate(golden.levels("in_teacher")):
        foreground, background = fgd_masks(boxes, sizes, tuple(teacher.shape[-2:]))
        checked = {
            f"out_mask_fg_{level}": foreground,
            f"out_mask_bg_{level}": background,
            f"out_spatial_att_teacher_{level}": spatial_attention(teacher, temperature),
            f"out_channel_att_teacher_{level}": channel_attention(teacher, temperature),
        }
        student = Parts(golden.parameters(f"param_l{level}.")).align(golden[f"in_student_{level}"])
        checked[f"out_spatial_att_student_{level}"] = spatial_attention(student, temperature)
        checked[f"out_channel_att_student_{level}"] = channel_attention(student, temperature)
        for name, actual in checked.items():
            if name in golden:
                assert_golden(actual.reshape(golden[name].shape), golden[name])


def test_values_and_gradients_equal_the_released_code(golden):
    settings = golden.meta["hyperparameters"]
    weights = {
        "foreground": settings.get("alpha_fgd", 1e-3),
        "background": settings.get("beta_fgd", 5e-4),
        "attention": settings.get("gamma_fgd", 5e-4),
        "relation": settings.get("lambda_fgd", 5e-6),
    }
    boxes, sizes = boxes_and_sizes(golden)
    students = [level.requires_grad_() for level in golden.levels("in_student")]
    parts, totals = [], []
    for level, (student, teacher) in enumerate(zip(students, golden.levels("in_teacher"), strict=True)):
        parts.append(Parts(golden.parameters(f"param_l{level}.")))
        aligned = parts[-1].align(student)
        masks = fgd_masks(boxes, sizes, tuple(teacher.shape[-2:]))
        terms = fgd_terms(aligned, teacher, *masks, *parts[-1].contexts(aligned, teacher), settings.get("temp", 0.5))
        for name, short in zip(FGDTerms._fields, ("fg", "bg", "attention", "relation"), strict=True):
            if f"out_{short}_{level}" in golden:
                assert_golden(getattr(terms, name), golden[f"out_{short}_{level}"])
        totals.append(fgd_loss(terms, **weights))
        if f"out_total_{level}" in golden:
            assert_golden(totals[-1], golden[f"out_total_{level}"])
    total = torch.stack(totals).sum()
    assert_golden(total, golden["out_total"])
    total.backward()
    for level, student in enumerate(students):
        assert_golden(student.grad, golden[f"grad_student_{level}"])
        gradients = dict(parts[level].named_parameters())
        expected = golden.parameters(f"grad_param_l{level}.")
        assert expected
        # Gradients that cancel (a bias before a softmax) are rounding noise: compare those at the level's scale.
        scale = max(float(value.abs().max()) for value in expected.values())
        for name, value in expected.items():
            tolerance = 1e-9 * max(float(value.abs().max()), 1e-3 * scale)
            torch.testing.assert_close(gradients[Parts.ours(name)].grad, value, rtol=1e-9, atol=tolerance)


def maps(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def randomized(block, seed):
    generator = torch.Generator().manual_seed(seed)
    block = block.double()
    for parameter in block.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return block


BOXES = [torch.tensor([[8.0, 8.0, 30.0, 22.0]], dtype=torch.float64), torch.zeros(0, 4, dtype=torch.float64)]
SIZES = [(48, 64), (48, 64)]


def terms_of(student, teacher, boxes=None, student_block=None, teacher_block=None, sizes=SIZES):
    masks = fgd_masks(BOXES if boxes is None else boxes, sizes, tuple(teacher.shape[-2:]))
    zero = torch.zeros(student.shape[:2], dtype=student.dtype)
    contexts = [zero if block is None else block(level) for block, level in ((student_block, student), (teacher_block, teacher))]
    return fgd_terms(student, teacher, *masks, *contexts)


def test_zero_when_student_and_blocks_agree():
    teacher = maps(0, 2, 6, 6, 8)
    block = randomized(ContextBlock(6), 1)
    for blocks in ((block, block), (ContextBlock(6).double(), ContextBlock(6).double())):
        student = teacher.clone().requires_grad_()
        terms = terms_of(student, teacher, None, *blocks)
        assert [term.item() for term in terms] == [0.0, 0.0, 0.0, 0.0]
        fgd_loss(terms).backward()
        assert torch.isfinite(student.grad).all()


def test_relation_is_the_squared_distance_at_first():
    student, teacher = maps(0, 2, 6, 6, 8), maps(1, 2, 6, 6, 8)
    terms = terms_of(student, teacher, None, ContextBlock(6).double(), ContextBlock(6).double())
    assert terms.relation.item() == pytest.approx((student - teacher).square().sum().item() / 2, rel=1e-12)


def test_attention_sums_to_its_size():
    level = 3 * maps(2, 2, 6, 5, 7)
    assert spatial_attention(level, 0.1).sum(dim=(1, 2)).tolist() == pytest.approx([35.0, 35.0])
    assert channel_attention(level, 0.1).sum(dim=1).tolist() == pytest.approx([6.0, 6.0])


def test_masks_share_out_one_for_each_box_and_the_background():
    foreground, background = fgd_masks(BOXES, SIZES, (6, 8))
    # Cells of 8 pixels: columns 1 to 4 (30 / 8 rounds up to 4) and rows 1 to 3, both ends inclusive.
    expected = torch.zeros(6, 8, dtype=torch.float64)
    expected[1:4, 1:5] = 1 / 12
    assert torch.equal(foreground[0], expected)
    assert float(foreground[0].sum()) == pytest.approx(1.0)
    assert torch.equal(background[0] > 0, foreground[0] == 0)
    assert background.sum(dim=(1, 2)).tolist() == pytest.approx([1.0, 1.0])
    assert float(foreground[1].sum()) == 0.0
    assert torch.equal(background[1], torch.full((6, 8), 1 / 48, dtype=torch.float64))


def test_the_smaller_box_wins_and_a_full_image_has_no_background():
    whole, small = [0.0, 0.0, 64.0, 48.0], [9.0, 9.0, 15.0, 15.0]
    for order in ([whole, small], [small, whole]):
        foreground, background = fgd_masks([torch.tensor(order)], [(48, 64)], (6, 8))
        assert foreground[0, 1, 1].item() == foreground[0, 2, 2].item() == 0.25
        assert foreground[0, 0, 0].item() == pytest.approx(1 / 63)  # 9 columns and 7 rows: the edge clips, the value stays
        assert background.sum().item() == 0.0


def test_many_boxes_equal_one_after_the_other():
    corners = 400 * torch.rand(150, 2, generator=torch.Generator().manual_seed(3))
    boxes = torch.cat([corners, corners + 30 + corners.flip(0) / 4], dim=1)
    foreground, _ = fgd_masks([boxes], [(520, 520)], (26, 26))
    one_by_one = torch.stack([fgd_masks([box[None]], [(520, 520)], (26, 26))[0] for box in boxes]).amax(dim=0)
    assert torch.equal(foreground, one_by_one)


def test_masks_ignore_scale_and_clamp_at_the_border():
    boxes = torch.tensor([[-9.0, -4.0, 20.0, 20.0]])
    clamped = torch.tensor([[0.0, 0.0, 20.0, 20.0]])
    mask = fgd_masks([boxes], [(48, 64)], (6, 8))[0]
    assert torch.equal(mask, fgd_masks([clamped], [(48, 64)], (6, 8))[0])
    assert torch.equal(mask, fgd_masks([2 * boxes], [(96, 128)], (6, 8))[0])


def test_no_boxes():
    student, teacher = maps(4, 2, 6, 6, 8), maps(5, 2, 6, 6, 8)
    terms = terms_of(student, teacher, [torch.zeros(0, 4), torch.zeros(0, 4)])
    assert float(terms.foreground) == 0.0
    weights = spatial_attention(teacher, 0.5)[:, None] * channel_attention(teacher, 0.5)[:, :, None, None]
    expected = ((student - teacher).square() * weights).sum(dim=1).mean(dim=(1, 2)).mean()
    assert float(terms.background) == pytest.approx(float(expected), rel=1e-6)


def test_duplicating_the_batch_changes_nothing():
    student, teacher = maps(6, 2, 6, 6, 8), maps(7, 2, 6, 6, 8)
    blocks = randomized(ContextBlock(6), 8), randomized(ContextBlock(6), 9)
    once = terms_of(student, teacher, None, *blocks)
    twice = terms_of(student.repeat(2, 1, 1, 1), teacher.repeat(2, 1, 1, 1), BOXES * 2, *blocks, sizes=SIZES * 2)
    assert [term.item() for term in twice] == pytest.approx([term.item() for term in once], rel=1e-12)


def test_gradients_stay_in_their_region_and_off_the_teacher():
    student, teacher = maps(10, 2, 16, 6, 8).requires_grad_(), maps(11, 2, 16, 6, 8).requires_grad_()
    blocks = randomized(ContextBlock(16), 12), randomized(ContextBlock(16), 13)
    masks = fgd_masks(BOXES, SIZES, (6, 8))
    terms = fgd_terms(student, teacher, *masks, blocks[0](student), blocks[1](teacher.detach()))
    inside = (masks[0] > 0)[:, None].expand_as(student)
    (foreground,) = torch.autograd.grad(terms.foreground, student, retain_graph=True)
    (background,) = torch.autograd.grad(terms.background, student, retain_graph=True)
    assert torch.equal(foreground != 0, inside)
    assert torch.equal(background != 0, ~inside)
    fgd_loss(terms).backward()
    assert teacher.grad is None
    for block in blocks:
        for name, parameter in block.named_parameters():
            if name != "mask.bias":  # a softmax does not see it
                assert float(parameter.grad.abs().max()) > 0, name


def test_weights_scale_the_loss():
    terms = terms_of(maps(14, 2, 6, 6, 8), maps(15, 2, 6, 6, 8))
    once = fgd_loss(terms, 1e-3, 2e-3, 3e-3, 4e-3)
    assert fgd_loss(terms, 3e-3, 6e-3, 9e-3, 12e-3).item() == pytest.approx(3 * once.item(), rel=1e-12)


def test_profiles_are_the_published_rows_and_a_weight_overrides_its_own_only():
    def weights(**settings):
        return FGD(Teacher(TinyDense()), TinyDense(), **settings).weights

    assert weights() == {"foreground": 1e-3, "background": 5e-4, "attention": 5e-4, "relation": 5e-6}
    assert weights(profile="two_stage") == {"foreground": 5e-5, "background": 2.5e-5, "attention": 5e-5, "relation": 5e-7}
    anchor_free = {"foreground": 1.6e-3, "background": 8e-4, "attention": 8e-4, "relation": 8e-6}
    assert weights(profile="anchor_free") == anchor_free
    assert weights(profile="anchor_free", attention_weight=0.0) == anchor_free | {"attention": 0.0}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"foreground_weight": -1.0}, "foreground_weight=-1.0 is not a number, 0 or more, or none"),
        ({"relation_weight": float("nan")}, "relation_weight=nan is not a number, 0 or more, or none"),
        ({"temperature": 0.0}, "temperature=0.0 is not a number above 0"),
        (
            {"profile": "one-stage"},
            "profile=one-stage is not one of one_stage, two_stage, anchor_free (did you mean 'one_stage'?)",
        ),
        ({"box_norm": "pad"}, "box_norm=pad is not one of padded, image (did you mean 'padded'?)"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(DetdistillError) as error:
        FGD(Teacher(TinyDense()), TinyDense(), **settings)
    assert str(error.value) == f"fgd: {message}"


def learned(batch, autocast=False, **settings):
    torch.manual_seed(0)
    teacher, student = Teacher(TinyDense(channels=(12, 12), seed=1)), TinyDense()
    method = FGD(teacher, student, **settings)
    taught, seen = method.teach(batch), student(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        return method.learn(student, seen, taught, batch, Clock(0, 1)).terms


def test_terms_are_the_weighted_sums_over_levels():
    batch = tiny_batch()
    terms = learned(batch)
    torch.manual_seed(0)
    teacher, student = TinyDense(channels=(12, 12), seed=1), TinyDense()
    method = FGD(Teacher(teacher), student)
    boxes = [target.boxes_xyxy for target in batch.targets]
    expected = torch.zeros(4)
    for level, (mine, theirs) in enumerate(zip(student.features(batch).maps, teacher.features(batch).maps, strict=True)):
        mine = method.adapters[level](mine)
        nothing = torch.zeros(mine.shape[:2])  # what fresh context blocks add
        masks = fgd_masks(boxes, [(64, 64)] * 2, tuple(mine.shape[-2:]))
        expected += torch.stack(fgd_terms(mine, theirs, *masks, nothing, nothing)) * torch.tensor([1e-3, 5e-4, 5e-4, 5e-6])
    assert [terms[f"fgd_{name}"].item() for name in FGDTerms._fields] == pytest.approx(expected.tolist(), rel=1e-5)


def test_box_norm_matters_for_padded_images_only():
    plain, padded = tiny_batch(count=1), tiny_batch(count=2)
    for batch, same in ((plain, True), (padded, False)):
        ours, released = learned(batch), learned(batch, box_norm="image")
        assert (ours["fgd_foreground"].item() == pytest.approx(released["fgd_foreground"].item())) is same
        assert ours["fgd_relation"].item() == pytest.approx(released["fgd_relation"].item())


def test_crowd_boxes_are_background():
    batch = tiny_batch(count=1)
    nothing = batch.with_targets([Target(torch.zeros(0, 4), torch.zeros(0).long(), torch.zeros(0).bool())])
    crowd = batch.with_targets([replace(batch.targets[0], crowd=torch.ones(len(batch.targets[0]), dtype=torch.bool))])
    assert learned(crowd)["fgd_foreground"].item() == 0.0
    assert learned(crowd)["fgd_background"].item() == learned(nothing)["fgd_background"].item()


def test_autocast_does_not_reach_the_losses():
    batch = tiny_batch()
    plain, mixed = learned(batch), learned(batch, autocast=True)
    assert {name: term.dtype for name, term in mixed.items()} == dict.fromkeys(plain, torch.float32)
    assert [term.item() for term in mixed.values()] == [term.item() for term in plain.values()]


@pytest.mark.parametrize("box_norm", ["padded", "image"])
def test_contract(box_norm):
    assert len(check_method(FGD, box_norm=box_norm)) == 18


def test_contexts_of_each_cell_are_those_of_the_map_where_they_are_equal():
    generator = torch.Generator().manual_seed(5)
    student, teacher = (torch.rand(2, 4, 5, 6, generator=generator) for _ in range(2))
    masks = [torch.rand(2, 5, 6, generator=generator) for _ in range(2)]
    contexts = [torch.rand(2, 4, generator=generator, requires_grad=True) for _ in range(2)]
    spread = [one[:, :, None, None].expand(-1, -1, 5, 6) for one in contexts]
    plain, wide = fgd_terms(student, teacher, *masks, *contexts), fgd_terms(student, teacher, *masks, *spread)
    for one, other in zip(plain, wide, strict=True):
        torch.testing.assert_close(one, other)
    mine, theirs = (torch.autograd.grad(terms.relation, contexts[0])[0] for terms in (plain, wide))
    torch.testing.assert_close(mine, theirs)
