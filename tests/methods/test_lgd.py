import copy
import itertools

import pytest
import torch
from torch import nn

from detdistill.functional.cells import index_cells
from detdistill.functional.positions import boxes_with_context
from detdistill.losses import lgd_loss
from detdistill.methods.lgd import LGD, DynamicTeacher
from detdistill.methods.shared.align import ConvolutionAdapters
from detdistill.methods.shared.hyper_parameters import MethodError
from detdistill.methods.shared.needs import PairError
from detdistill.structures import Batch, Clock, Target, View
from tests.golden import Golden, assert_golden, sine_parameter
from tests.methods.contract_checks import check_method, learn, run_stage, without_boxes
from tests.tiny import TinyDense, TinyQueries, TinyRegions, tiny_batch

FIRST, FROZEN, OFF, ON = Clock(0, 180), Clock(10, 180), Clock(25, 180), Clock(40, 180)

# ------------------------------------------------------------------------------------------------------------- golden

NAMES = {
    "label_encoder_.stn_desc.": "labels.transform.",
    "label_encoder_.stn_feat.": "labels.inner_transform.",
    "label_encoder_.conv1.": "labels.first.",
    "label_encoder_.conv2.": "labels.second.",
    "label_encoder_.conv3.": "labels.third.",
    "label_encoder_.conv4.": "labels.last.",
    "canoni_proj_1D.0.0.": "key.",
    "student_proj_2D.0.0.": "appearance.",
    "local_inst_proj_2D.": "of_map.",
    "local_inst_proj_1D.": "of_object.",
    "global_ctx_proj_1D.": "of_context.",
    "refinement_module.0.": "refine.0.",
    "refinement_module.3.": "refine.1.",
    "refinement_module.6.": "refine.2.",
    "multi_head_attn.": "attention.",
}
INSIDE = {"conv1": "layers.0", "conv2": "layers.1", "conv3": "layers.2", "fc1": "layers.3", "fc2": "layers.4", "fc3": "matrix"}
CONTEXT = {"ctx": True, "noctx": False}


def released(meta, variant):
    """Dynamic teacher and adapter with the weights of the file's formula, under our names."""
    channels = meta["adapter_parameters"][0][1][0]
    teacher = DynamicTeacher(meta["num_classes"], channels, meta["heads"], CONTEXT[variant])
    adapters = ConvolutionAdapters([channels])
    state = {}
    for number, (name, shape) in enumerate(meta["teacher_parameters"]):
        start = next(start for start in NAMES if name.startswith(start))
        rest = name[len(start) :]
        layer, _, kind = rest.rpartition(".")
        rest = f"{INSIDE[layer]}.{kind}" if layer in INSIDE else rest
        tensor = sine_parameter(number, shape)
        state[NAMES[start] + rest] = tensor.squeeze(2) if tensor.dim() == 3 else tensor
    wanted = teacher.state_dict().keys()
    teacher.load_state_dict({name: tensor for name, tensor in state.items() if name in wanted})
    adapters.load_state_dict(
        {
            name.replace("adapter", str(channels), 1): sine_parameter(1000 + number, shape)
            for number, (name, shape) in enumerate(meta["adapter_parameters"])
        }
    )
    return teacher, adapters


def ground_truth(golden):
    boxes, labels = [], []
    while f"in_boxes_{len(boxes)}" in golden:
        boxes.append(golden[f"in_boxes_{len(boxes)}"].reshape(-1, 4))
        labels.append(golden[f"in_labels_from0_{len(labels)}"].reshape(-1))
    return boxes, labels


@pytest.mark.parametrize("variant", ["ctx", "noctx"])
def test_teacher_loss_and_gradients_equal_the_released_code(variant):
    golden = Golden("lgd")
    teacher, adapters = released(golden.meta, variant)
    boxes, labels = ground_truth(golden)
    size = tuple(golden.meta["image_size_hw"])
    student = [level.requires_grad_() for level in golden.levels("in_student")]
    embedded = []
    teacher.labels.register_forward_hook(lambda module, inputs, output: embedded.append(output))
    drawn = teacher(student if variant == "ctx" else [level.detach() for level in student], boxes, labels, size)
    close(embedded[0], golden[f"out_{variant}_label_embedding"])
    for level, maps in enumerate(drawn):
        close(maps[:, ::16], golden[f"out_{variant}_teacher_{level}_channels_every_16"])
    loss = lgd_loss(adapters(student), drawn, golden.meta["coef"])
    assert_golden(loss, golden[f"out_{variant}_loss_distill"])
    for level, gradient in enumerate(torch.autograd.grad(loss, student, retain_graph=True)):
        close(gradient[:, ::16], golden[f"grad_student_{variant}_{level}_channels_every_16"])
    probe = sum(maps[:, ::16].square().mean() for maps in drawn)
    assert_golden(probe, golden[f"out_{variant}_probe"])
    if variant == "ctx":
        for level, gradient in enumerate(torch.autograd.grad(probe, student)):
            close(gradient[:, ::16], golden[f"grad_student_ctx_probe_{level}_channels_every_16"])


def close(actual, expected):
    """The file is float32 and passes a dozen layers of other order: 1e-4 of the largest entry."""
    torch.testing.assert_close(actual.detach(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_masks_equal_the_released_code():
    golden = Golden("lgd")
    size = tuple(golden.meta["image_size_hw"])
    for variant, context in CONTEXT.items():
        for image, (boxes, labels) in enumerate(zip(*ground_truth(golden), strict=True)):
            described, _ = boxes_with_context(boxes, labels, size, context)
            for level in range(len(golden.levels("in_student"))):
                expected = golden[f"out_{variant}_mask_level{level}_image{image}"].bool()
                assert torch.equal(index_cells(described, size, tuple(expected.shape[1:])).regions(), expected)


# ------------------------------------------------------------------------------------------------------------ the loss


def pyramids(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 3, side, side + 1, generator=generator, dtype=torch.float64) for side in (5, 2)]


def test_loss_is_blind_to_scale_and_offset_of_channels():
    maps, others = pyramids(), pyramids(1)
    factors = torch.tensor([1.0, 5.0, 0.5], dtype=torch.float64)[:, None, None]
    torch.testing.assert_close(
        lgd_loss([factors * level + 3 for level in others], maps), lgd_loss(others, maps), rtol=1e-3, atol=0
    )
    assert float(lgd_loss(maps, maps)) == 0


def test_loss_is_a_mean_over_cells_times_its_weight():
    mine, theirs = pyramids(), pyramids(1)
    levels = [lgd_loss([a], [b]) for a, b in zip(mine, theirs, strict=True)]
    cells = [level[0, 0].numel() for level in mine]
    expected = sum(loss * count for loss, count in zip(levels, cells, strict=True)) / sum(cells)
    torch.testing.assert_close(lgd_loss(mine, theirs, 3.0), 3 * expected)


def test_single_cells_and_constant_maps_are_finite():
    mine = [torch.randn(1, 2, 1, 1, requires_grad=True), torch.ones(1, 2, 3, 3, requires_grad=True)]
    loss = lgd_loss(mine, [torch.ones(1, 2, 1, 1), torch.zeros(1, 2, 3, 3)])
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(bool(torch.isfinite(level.grad).all()) for level in mine)


# -------------------------------------------------------------------------------------------------- the dynamic teacher


@pytest.fixture(scope="module")
def drawing():
    torch.manual_seed(0)
    return DynamicTeacher(2, 8), DynamicTeacher(2, 8, context=False)


MAPS = [torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(1)), torch.randn(2, 8, 1, 1)]
BOXES = [torch.tensor([[4.0, 4.0, 30.0, 40.0], [20.0, 10.0, 60.0, 50.0]]), torch.tensor([[0.0, 0.0, 20.0, 20.0]])]
LABELS = [torch.tensor([0, 1]), torch.tensor([1])]


def test_the_order_of_boxes_does_not_matter_and_images_are_apart(drawing):
    for teacher in drawing:
        first = teacher(MAPS, BOXES, LABELS, (64, 64))
        turned = teacher(MAPS, [BOXES[0].flip(0), BOXES[1]], [LABELS[0].flip(0), LABELS[1]], (64, 64))
        other = teacher(MAPS, [BOXES[0], BOXES[1] + 9], [LABELS[0], 1 - LABELS[1]], (64, 64))
        alone = teacher([level[:1] for level in MAPS], BOXES[:1], LABELS[:1], (64, 64))
        for maps in (turned, other, alone):
            for mine, theirs in zip(first, maps, strict=True):
                torch.testing.assert_close(mine[0], theirs[0], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(first[0][1], other[0][1], atol=1e-3)


def test_without_context_nothing_is_drawn_outside_the_boxes(drawing):
    seen = []
    handle = drawing[1].of_map.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    drawing[1](MAPS, BOXES, LABELS, (64, 64))
    handle.remove()
    inside = index_cells(BOXES[0], (64, 64), (8, 8)).union()
    assert bool((seen[0][0][:, ~inside] == 0).all())
    assert bool((seen[0][0][:, inside] != 0).any())


def test_an_image_without_boxes_draws_its_context(drawing):
    none = [torch.zeros(0, 4), BOXES[1]]
    labels = [torch.zeros(0, dtype=torch.int64), LABELS[1]]
    seen = []
    handle = drawing[0].of_map.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    drawn = drawing[0](MAPS, none, labels, (64, 64))
    handle.remove()
    assert [level.shape for level in drawn] == [level.shape for level in MAPS]
    assert all(bool(torch.isfinite(level).all()) for level in drawn)
    assert not seen[0][0].any()
    assert bool(torch.isfinite(drawing[1](MAPS, none, labels, (64, 64))[0]).all())


@pytest.mark.parametrize("interaction", ["label_guided", "student", "label"])
def test_interactions_draw_different_pyramids(interaction):
    torch.manual_seed(0)
    teacher = DynamicTeacher(2, 8, interaction=interaction)
    maps = [level.clone().requires_grad_() for level in MAPS]
    drawn = teacher(maps, BOXES, LABELS, (64, 64))
    drawn[0].square().sum().backward()
    reached = maps[0].grad is not None
    assert reached == (interaction != "label")
    assert (teacher.key.weight.grad is not None) == (interaction != "student")
    assert ("attention.in_proj_weight" in teacher.state_dict()) == (interaction == "label_guided")


# ----------------------------------------------------------------------------------------------------------- the method


def build(student=None, **options):
    torch.manual_seed(0)
    student = student or TinyDense(seed=2)
    return LGD(None, student, **options), student


def test_contract():
    assert check_method(LGD) == ["dense 8", "regions 8", "queries 8"]


def test_refused_students_and_settings():
    with pytest.raises(PairError, match=r"lgd: the levels of the student tinydense:patches have \(8, 16\) channels"):
        LGD(None, TinyDense(channels=(8, 16)))
    with pytest.raises(MethodError, match="weight"):
        build(weight=0.0, teacher_weight=0.0)
    method, _ = build(TinyDense(channels=(6, 6)))
    assert method.dynamic_teacher.attention.num_heads == 6


def gradients(losses, modules):
    found = torch.autograd.grad(losses, [p for m in modules for p in m.parameters()], allow_unused=True, retain_graph=True)
    return [gradient is not None and float(gradient.abs().max()) > 0 for gradient in found]


def test_the_student_imitates_from_its_time_on():
    method, student = build()
    batch = tiny_batch(2)
    off, on = (learn(method, student, batch, None, clock).terms["imitation"] for clock in (OFF, ON))
    for loss, learns in ((off, False), (on, True)):
        assert all(gradients(loss, [method.adapters]))
        assert any(gradients(loss, [student.backbone, student.levels])) == learns
        assert not any(gradients(loss, [method.dynamic_teacher, student.head]))
    torch.testing.assert_close(on, off)
    late, _ = build(imitates_until=0.5)
    assert late.imitates(Clock(90, 180))
    assert not late.imitates(Clock(91, 180))


@pytest.mark.parametrize("detach", [False, True])
def test_teacher_losses_train_the_dynamic_teacher_and_the_head(detach):
    method, student = build(detach_appearance=detach)
    terms = learn(method, student, tiny_batch(2), None, ON).terms
    loss = sum(term for name, term in terms.items() if name.startswith("teacher_"))
    assert {f"teacher_{name}" for name in ("cls", "box")} == set(terms) - {"imitation"}
    assert all(gradients(loss, [student.head.logits, method.dynamic_teacher.refine]))
    assert any(gradients(loss, [student.backbone])) != detach
    assert not any(gradients(loss, [method.adapters]))


def test_teacher_and_student_have_the_same_assignment():
    """A detector that assigns by its own predictions: those of the student count for both."""
    method, student = build()
    asked, used = [], []
    assign, loss = student.assign, student.loss
    student.assign = lambda prediction, batch: asked.append(assign(prediction, batch)) or asked[-1]
    student.loss = lambda prediction, batch, given=None: used.append(given) or loss(prediction, batch, given)
    learn(method, student, tiny_batch(2), None, ON)
    assert len(asked) == 1
    assert used[0] is asked[0]


def test_the_backbone_rests_at_first():
    method, student = build()
    (stage,) = method.stages(student)
    run_stage(stage, student, method, tiny_batch(2), FROZEN)
    assert all(p.grad is None for p in student.backbone.parameters())
    assert all(p.grad is not None for part in (student.levels, student.head, method) for p in part.parameters())
    run_stage(stage, student, method, tiny_batch(2), ON)
    assert all(p.grad is not None for p in student.backbone.parameters())
    method, student = build(backbone_from=0.0)
    assert method.stages(student)[0].trains(FIRST) == (student, method)


class Normed(TinyDense):
    """Its head begins with a batch norm."""

    def __init__(self):
        super().__init__(seed=2)
        self.norm = nn.BatchNorm2d(8)

    def predict(self, features, batch):
        maps = tuple(self.norm(level) for level in features.maps)
        return super().predict(type(features)(maps, features.strides, features.padding), batch)


def test_norms_of_the_head_do_not_count_the_drawn_pyramid():
    method, student = build(Normed())
    batch = tiny_batch(2)
    student(batch)
    before = copy.deepcopy(student.norm.state_dict())
    seen = student(batch)
    counted = copy.deepcopy(student.norm.state_dict())
    assert not torch.equal(before["running_mean"], counted["running_mean"])
    method.learn(student, seen, None, batch, ON)
    assert all(torch.equal(tensor, counted[name]) for name, tensor in student.norm.state_dict().items())


def batch_of(boxes, size=64):
    target = Target(boxes, torch.zeros(len(boxes), dtype=torch.int64), torch.zeros(len(boxes), dtype=torch.bool))
    image = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    return Batch(image, torch.tensor([[size, size]]), (target,), (1,), (View((size, size), (size, size)),))


AWKWARD = {
    "none": torch.zeros(0, 4),
    "whole": torch.tensor([[0.0, 0.0, 64.0, 64.0]]),
    "border": torch.tensor([[-8.0, 0.0, 3.0, 64.0], [60.0, 60.0, 64.0, 70.0]]),
    "flat": torch.tensor([[5.0, 5.0, 5.0, 9.0], [70.0, 3.0, 90.0, 4.0]]),
}


@pytest.mark.parametrize(("name", "context"), itertools.product(AWKWARD, [True, False]))
def test_awkward_boxes_are_finite(name, context):
    method, student = build(context=context)
    run_stage(method.stages(student)[0], student, method, batch_of(AWKWARD[name]), ON)
    assert all(bool(torch.isfinite(p.grad).all()) for p in (*student.parameters(), *method.parameters()) if p.grad is not None)


def test_a_level_of_one_cell():
    method, student = build(TinyDense(strides=(16, 64), seed=2))
    losses = run_stage(method.stages(student)[0], student, method, tiny_batch(2), ON)
    assert bool(torch.isfinite(losses.total().detach()))


@pytest.mark.parametrize("kind", [TinyDense, TinyRegions, TinyQueries])
def test_crowds_are_not_described(kind):
    method, student = build(kind(seed=2))
    batch = tiny_batch(1)
    target = batch.targets[0]
    crowd = batch.with_targets([Target(target.boxes_xyxy, target.labels, torch.ones_like(target.crowd))])
    features = student.features(batch)
    drawn, none = method.draw(features, crowd), method.draw(features, without_boxes(batch, range(1)))
    assert torch.equal(drawn[0], none[0])


def test_the_dynamic_teacher_learns_to_be_read():
    method, student = build()
    (stage,) = method.stages(student)
    batch = tiny_batch(2)
    optimizer = torch.optim.AdamW([*student.parameters(), *method.parameters()], lr=3e-3)
    found = []
    for step in range(15):
        losses = stage.step(batch, None, Clock(step, 15))
        optimizer.zero_grad()
        losses.total().backward()
        optimizer.step()
        found.append(float(sum(term.detach() for name, term in losses.terms.items() if name.startswith("teacher_"))))
    assert found[-1] < 0.8 * found[0]
