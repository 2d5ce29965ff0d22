import copy

import pytest
import torch
from torch import nn

from detdistill.detectors.contract import Parts, Pyramid
from detdistill.functional.masks import label_map
from detdistill.losses import labelenc_distance
from detdistill.methods.labelenc import LabelEnc, LabelEncoder
from detdistill.methods.shared.align import ConvolutionAdapters
from detdistill.methods.shared.needs import PairError
from detdistill.structures import Clock, Target
from tests.golden import Golden, assert_golden, sine_parameter
from tests.methods.contract_checks import check_method, run_stage, stage_losses, without_boxes
from tests.tiny import TinyDense, TinyQueries, TinyRegions, tiny_batch

EARLY, MIDDLE, LATE = Clock(0, 100), Clock(50, 100), Clock(95, 100)

# ------------------------------------------------------------------------------------------------------------- golden

NAMES = {"con1": "reduce", "con2": "spread", "con3": "expand", "downsample.0": "shortcut"}


def released_encoder(meta):
    """The encoder with the weights of the file's formula, under our names."""
    encoder = LabelEncoder(meta["num_classes"], Pyramid((256, 512, 1024, 2048), (4, 8, 16, 32)))
    state = {}
    for number, (name, shape) in enumerate(meta["encoder_parameters"]):
        stage, _, rest = name.partition(".")
        if stage == "stage1":
            ours = f"first.{rest}"
        else:
            block, _, inside = rest.partition(".") if rest[0].isdigit() else ("0", "", rest)
            layer, _, kind = inside.rpartition(".")
            ours = f"stages.{int(stage[5:]) - 2}.{block}.{NAMES[layer]}.{kind}"
        state[ours] = sine_parameter(number, shape)
    encoder.load_state_dict(state)
    return encoder


def ground_truth(golden):
    boxes, labels = [], []
    while f"in_boxes_{len(boxes)}" in golden:
        boxes.append(golden[f"in_boxes_{len(boxes)}"].reshape(-1, 4))
        labels.append(golden[f"in_labels_from1_{len(labels)}"].reshape(-1) - 1)
    return boxes, labels


def test_encoder_equals_the_released_code():
    golden = Golden("labelenc")
    size = tuple(golden.meta["image_size_hw"])
    planes = label_map(*ground_truth(golden), size, golden.meta["num_classes"])
    assert_golden(planes, golden["out_box_map"])
    with torch.no_grad():
        stages = released_encoder(golden.meta)(golden["out_box_map"])
    for number, maps in enumerate(stages, start=2):
        assert_golden(maps[:, ::32], golden[f"out_encoder_stage{number}_channels_every_32"])
        assert_golden(maps.double().mean(dim=(1, 2, 3)).float(), golden[f"out_encoder_stage{number}_mean_per_image"].float())


def test_distance_and_gradients_equal_the_released_code():
    golden = Golden("labelenc")
    student = [level.requires_grad_() for level in golden.levels("in_student")]
    adapters = ConvolutionAdapters([student[0].shape[1]]).double()
    names = {name: f"{student[0].shape[1]}.{name.replace('_', '.')}" for name in golden.parameters("param_adapt_")}
    adapters.load_state_dict({names[name]: tensor for name, tensor in golden.parameters("param_adapt_").items()})
    distance = labelenc_distance(adapters(student), golden.levels("in_label"))
    assert_golden(distance, golden["out_distance_step1"])
    assert_golden(distance, golden["out_auxiliary_step2"])
    scale = golden["out_total"] / golden["out_distance_step1"]
    for actual, expected in zip(torch.autograd.grad(scale * distance, student), golden.levels("grad_student"), strict=True):
        assert_golden(actual, expected)


# ------------------------------------------------------------------------------------------------------------ the loss


def pyramids(seed=0, images=2):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(images, 3, side, side + 1, generator=generator, dtype=torch.float64) for side in (5, 2)]


def test_distance_is_blind_to_scale_and_offset():
    maps, others = pyramids(), pyramids(1)
    assert float(labelenc_distance([2.5 * level - 3 for level in maps], maps)) < 1e-6
    scaled = labelenc_distance(others, [7 * level for level in maps])
    torch.testing.assert_close(scaled, labelenc_distance(others, maps), rtol=1e-4, atol=0)


def test_distance_is_a_mean_over_cells_and_over_images():
    mine, theirs = pyramids(), pyramids(1)
    levels = [labelenc_distance([a], [b]) for a, b in zip(mine, theirs, strict=True)]
    cells = [level[0, 0].numel() for level in mine]
    expected = sum(loss * count for loss, count in zip(levels, cells, strict=True)) / sum(cells)
    torch.testing.assert_close(labelenc_distance(mine, theirs), expected)
    alone = [labelenc_distance([a[i : i + 1] for a in mine], [b[i : i + 1] for b in theirs]) for i in range(2)]
    torch.testing.assert_close(torch.stack(alone).mean(), expected)


def test_constant_maps_and_single_cells_are_finite():
    mine = [torch.randn(1, 1, 1, 1, requires_grad=True), torch.ones(1, 4, 3, 3, requires_grad=True)]
    loss = labelenc_distance(mine, [torch.zeros(1, 1, 1, 1), torch.zeros(1, 4, 3, 3)])
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(bool(torch.isfinite(level.grad).all()) for level in mine)


# ---------------------------------------------------------------------------------------------------------- the modules


@pytest.mark.parametrize("strides", [(8, 16, 32), (4, 8), (8, 16, 16), (16, 32), (32,), (2, 4)])
def test_encoder_gives_the_pyramid_of_the_backbone(strides):
    pyramid = Pyramid(tuple(range(5, 5 + len(strides))), strides)
    maps = LabelEncoder(2, pyramid)(torch.zeros(1, 2, 64, 96))
    assert [tuple(level.shape[1:]) for level in maps] == [
        (width, 64 // stride, 96 // stride) for width, stride in zip(pyramid.channels, strides, strict=True)
    ]


def test_size_of_the_encoder_is_the_papers():
    encoder = LabelEncoder(80, Pyramid((512, 1024, 2048), (8, 16, 32)))  # RetinaNet with ResNet-50
    whole = LabelEncoder(80, Pyramid((256, 512, 1024, 2048), (4, 8, 16, 32)))
    assert [p.shape for p in encoder.parameters()] == [p.shape for p in whole.parameters()]
    assert [len(stage) for stage in encoder.stages] == [1, 2, 2, 1]


# ----------------------------------------------------------------------------------------------------------- the method


def build(student=None, seed=0, **options):
    torch.manual_seed(seed)
    student = student or TinyDense(seed=2)
    return LabelEnc(None, student, **options), student


def test_contract():
    assert check_method(LabelEnc) == ["dense 8"]


@pytest.mark.parametrize("student", [TinyRegions, TinyQueries])
def test_a_student_without_copies_is_refused(student):
    with pytest.raises(PairError, match=r"labelenc: the student tiny.* lacks copies of neck and head"):
        LabelEnc(None, student())


def test_distance_reaches_adapter_and_detector_only():
    method, _ = build(label_weight=0.0)
    batch = tiny_batch(3)
    losses = method.train_encoder(batch, None, MIDDLE)
    losses.terms["distance"].backward()
    assert all(p.grad is not None for p in method.auxiliary_adapters.parameters())
    assert float(method.auxiliary.backbone[0].weight.grad.abs().max()) > 0
    assert all(p.grad is None for part in (method.encoder, method.label_neck) for p in part.parameters())
    assert method.auxiliary.head.logits.weight.grad is None


def test_label_losses_reach_encoder_neck_and_head_only():
    method, _ = build()
    losses = method.train_encoder(tiny_batch(3), None, MIDDLE)
    sum(term for name, term in losses.terms.items() if name.startswith("label/")).backward()
    for part in (method.encoder, method.label_neck, method.auxiliary.head):
        assert all(p.grad is not None for p in part.parameters())
        assert any(float(p.grad.abs().max()) > 0 for p in part.parameters())
    for part in (method.auxiliary.backbone, method.auxiliary.levels):
        assert all(p.grad is None for p in part.parameters())


def test_before_the_switch_the_adapter_keeps_its_weights():
    method, student = build()
    stage, batch = method.stages(student)[0], tiny_batch(2)
    assert method.auxiliary_adapters not in stage.trains(EARLY)
    assert method.auxiliary_adapters in stage.trains(MIDDLE)
    kept = copy.deepcopy(method.auxiliary_adapters.state_dict())
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1, weight_decay=0.1)
    losses = run_stage(stage, student, method, batch, EARLY)
    assert "distance" not in losses.terms
    optimizer.step()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in method.auxiliary_adapters.state_dict().items())
    assert "distance" in stage_losses(stage, batch, MIDDLE).terms


def test_the_auxiliary_loss_ends():
    method, student = build()
    last, batch = method.stages(student)[-1], tiny_batch(2)
    assert "auxiliary" in stage_losses(last, batch, MIDDLE).terms
    assert "auxiliary" not in stage_losses(last, batch, LATE).terms
    assert method.adapters in last.trains(MIDDLE)
    assert method.adapters not in last.trains(LATE)


def test_distill_trains_the_student_and_its_adapter():
    method, student = build()
    run_stage(method.stages(student)[-1], student, method, tiny_batch(2))
    assert all(p.grad is not None for p in (*student.parameters(), *method.adapters.parameters()))
    parts = (method.encoder, method.label_neck, method.auxiliary, method.auxiliary_adapters)
    assert all(p.grad is None for part in parts for p in part.parameters())


class Shuffled(TinyDense):
    """A detector whose copied neck has its own names and another order."""

    def copy_neck(self, fresh=False):
        neck = super().copy_neck(fresh)
        other = nn.Module()
        other.second, other.first = neck.convs[1], neck.convs[0]
        other.forward = neck.forward
        return other


@pytest.mark.parametrize("kind", [TinyDense, Shuffled])
def test_the_student_starts_from_the_labels_neck_and_the_trained_head(kind):
    method, student = build(kind(seed=2))
    with torch.no_grad():
        for parameter in method.auxiliary.parameters():
            parameter.add_(1)
    before = copy.deepcopy(student.state_dict())
    method.stages(student)[-1].before()
    batch = tiny_batch(2)
    below = student.backbone_features(batch)
    for mine, theirs in zip(student.neck(below, batch).maps, method.label_neck(below).maps, strict=True):
        assert torch.equal(mine, theirs)
    head = Parts.parameters(student.parts().head)
    assert all(torch.equal(a, b) for a, b in zip(head, Parts.parameters(method.auxiliary.parts().head), strict=True))
    backbone = [name for name in before if name.startswith("backbone")]
    assert all(torch.equal(before[name], student.state_dict()[name]) for name in backbone)


def test_building_leaves_the_student_as_it_was():
    student = TinyDense(seed=2)
    method, _ = build(student, hand_over=False)
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), TinyDense(seed=2).parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), method.auxiliary.parameters(), strict=True))
    assert method.stages(student)[-1].before is None


def test_the_stage_depends_on_its_own_settings_and_the_student():
    def key(student=None, **options):
        method, student = build(student, **options)
        return method.stages(student)[0].depends_on

    assert key() == key(seed=1) == key(auxiliary_weight=2.0, hand_over=False)
    others = {key(label_weight=2.0), key(vary_intensity=False), key(TinyDense(classes=("a", "c")))}
    assert len({key(), *others}) == 4


def test_intensity_varies_in_the_first_stage_only():
    method, student = build()
    batch = tiny_batch(3)
    below = student.backbone_features(batch)
    plain, varied = method.encode(below, batch), method.encode(below, batch, vary=True)
    assert torch.equal(plain.maps[0], method.encode(below, batch).maps[0])
    assert not torch.equal(plain.maps[0], varied.maps[0])


def test_crowd_boxes_are_not_drawn():
    method, student = build()
    batch = tiny_batch(1)
    target = batch.targets[0]
    crowd = Target(target.boxes_xyxy, target.labels, torch.ones_like(target.crowd))
    below = student.backbone_features(batch)
    empty = without_boxes(batch, range(1))
    assert torch.equal(method.encode(below, batch.with_targets([crowd])).maps[0], method.encode(below, empty).maps[0])


AWKWARD = {
    "no box": torch.zeros(0, 4),
    "the whole image": torch.tensor([[0.0, 0.0, 64.0, 64.0]]),
    "on the border": torch.tensor([[-8.0, 0.0, 3.0, 64.0], [60.0, 60.0, 64.0, 70.0]]),
    "without area": torch.tensor([[5.0, 5.0, 5.0, 9.0], [3.0, 3.0, 3.0, 3.0]]),
}


@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_boxes_are_finite_and_equal_to_the_image_alone(name):
    method, student = build()
    boxes = AWKWARD[name]
    other = tiny_batch(1, seed=4)
    target = Target(boxes, torch.zeros(len(boxes), dtype=torch.int64), torch.zeros(len(boxes), dtype=torch.bool))
    batch = tiny_batch(2)
    batch = batch.with_targets([target, other.targets[0]])
    whole = method.encode(student.backbone_features(batch), batch)
    alone = batch._on_canvas([0], batch.padding_hw)
    single = method.encode(student.backbone_features(alone), alone)
    for mine, theirs in zip(whole.maps, single.maps, strict=True):
        torch.testing.assert_close(mine[:1], theirs, rtol=1e-5, atol=1e-6)
    for stage in method.stages(student):
        losses = stage_losses(stage, batch)
        assert bool(torch.isfinite(losses.total().detach()))


def test_maps_of_another_size_are_resized_to_the_backbones():
    """A backbone that rounds down (72 pixels at stride 16 make 4 rows, the encoder 5)."""
    method, student = build()
    batch = tiny_batch(1, size=72)
    below = student.backbone_features(batch)
    assert [tuple(level.shape[-2:]) for level in below.maps] == [(9, 9), (4, 4)]
    assert [level.shape[-2:] for level in method.encode(below, batch).maps] == [level.shape[-2:] for level in below.maps]


def test_the_encoder_learns_to_be_read():
    method, student = build(TinyDense(seed=2))
    stage, batch = method.stages(student)[0], tiny_batch(2, size=32)
    optimizer = torch.optim.AdamW([p for module in stage.trains(EARLY) for p in module.parameters()], lr=3e-3)
    found = []
    for step in range(25):
        losses = stage.step(batch, None, Clock(step, 200))
        optimizer.zero_grad()
        losses.total().backward()
        optimizer.step()
        found.append(float(sum(term.detach() for name, term in losses.terms.items() if name.startswith("label/"))))
    assert found[-1] < 0.5 * found[0]
