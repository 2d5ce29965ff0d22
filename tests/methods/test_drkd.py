from dataclasses import replace

import pytest
import torch
from torch import nn

from detdistill.detectors.contract import Teacher
from detdistill.errors import DetdistillError
from detdistill.functional.relations import GloReBlock
from detdistill.methods.drkd import (
    DRKD,
    DrawnFilter,
    RelationBlock,
    drawn_filter,
    drkd_instance_loss,
    drkd_pixel_loss,
    drkd_regions,
)
from detdistill.structures import Clock, Features, Target
from tests.golden import Golden, assert_golden
from tests.methods.contract_checks import check_method
from tests.tiny import TinyDense, tiny_batch

GRAPH = {
    "reduce.weight": "conv_state_weight",
    "reduce.bias": "conv_state_bias",
    "project.weight": "conv_proj_weight",
    "project.bias": "conv_proj_bias",
    "mix_nodes.weight": "gcn_conv1_weight",
    "mix_nodes.bias": "gcn_conv1_bias",
    "mix_states.weight": "gcn_conv2_weight",
    "extend.weight": "conv_extend_weight",
    "norm_weight": "blocker_weight",
    "norm_bias": "blocker_bias",
}
RELATION = {
    f"{ours}.{part}": f"{theirs}_{part}"
    for ours, theirs in {"theta": "theta_0", "phi": "phi_0", "g": "g_0", "out": "W"}.items()
    for part in ("weight", "bias")
}


# ------------------------------------------------------------------------------------------------------------- golden


@pytest.fixture
def golden():
    return Golden("drkd")


def loaded(module, golden, prefix, names):
    module.double().load_state_dict({ours: golden[f"param_{prefix}_{theirs}"] for ours, theirs in names.items()})
    return module


def graph(golden, side, level):
    channels, nodes = golden.meta["num_in"], golden.meta["num_mid"][level]
    return loaded(GloReBlock(channels, nodes), golden, f"{side}_non_local_{level}", GRAPH)


def relation(golden, side, level):
    width = golden.meta["num_in"] * golden.meta["roi_output"] ** 2
    return loaded(RelationBlock(width), golden, f"{side}_relation_{level}", RELATION)


def convolution(golden, prefix):
    channels = golden.meta["num_in"]
    return loaded(nn.Conv2d(channels, channels, 1), golden, prefix, {"weight": "weight", "bias": "bias"})


def regions_of(golden, maps, boxes, **settings):
    """Regions of the instance levels; the released code's strides begin with 4 or 8."""
    first = int(golden.meta["spatial_scale"].rpartition("*")[2].strip(" )"))
    strides = tuple(first * 2**level for level in range(len(maps)))
    return drkd_regions(Features(tuple(maps), strides), boxes, golden.meta["roi_output"], scale_by_width=True, **settings)


def instance_losses(golden, students, teachers, boxes, filter_names, blocks, **settings):
    """Relations and objects, with the filters that the released code drew."""
    weights, counts = golden.meta["weights"], [len(own) for own in boxes]
    levels = golden.meta["instance_levels"]
    mine, theirs = ([regions_of(golden, maps, boxes, **settings)[level] for level in levels] for maps in (students, teachers))
    related = {}
    for side, regions in (("student", mine), ("teacher", theirs)):
        filters = [
            [DrawnFilter(*(golden[f"param_{name}_{part}"] for part in ("weight", "bias"))) for name in filter_names(side, level)]
            for level in levels
        ]
        related[side] = [blocks[side][index](own, counts, filters[index]) for index, own in enumerate(regions)]
    adapted = [
        convolution(golden, f"relation_adaptation_{level}")(own) for level, own in zip(levels, related["student"], strict=True)
    ]
    objects = [convolution(golden, f"for_adaptation_{level}")(own) for level, own in zip(levels, mine, strict=True)]
    return (
        drkd_instance_loss(adapted, related["teacher"], counts, weights["ir"]),
        drkd_instance_loss(objects, theirs, counts, weights["ins"]),
    )


def pixel_loss(golden, students, teachers, blocks):
    mine = [
        convolution(golden, f"non_local_adaptation_{level}")(block(own))
        for level, (block, own) in enumerate(zip(blocks["student"], students, strict=True))
    ]
    theirs = [block(own) for block, own in zip(blocks["teacher"], teachers, strict=True)]
    return drkd_pixel_loss(mine, theirs, golden.meta["weights"]["pr"])


def test_values_and_gradients_equal_the_released_code(golden):
    students, teachers = [level.requires_grad_() for level in golden.levels("in_student")], golden.levels("in_teacher")
    boxes = [own.reshape(-1, 4) for own in golden.levels("in_boxes")]
    sides, levels = ("student", "teacher"), golden.meta["instance_levels"]
    graphs = {side: [graph(golden, side, level) for level in range(len(students))] for side in sides}
    relations = {side: [relation(golden, side, level) for level in levels] for side in sides}
    pixels = pixel_loss(golden, students, teachers, graphs)
    related, objects = instance_losses(
        golden,
        students,
        teachers,
        boxes,
        lambda side, level: [f"filter_{side}_{level}_{image}" for image in range(len(boxes))],
        relations,
        from_first_image=True,
    )
    for name, value in {"pr": pixels, "ir": related, "ins": objects}.items():
        assert_golden(value, golden[f"out_loss_{name}"])
    total = pixels + related + objects
    assert_golden(total, golden["out_total"])
    total.backward()
    for level, expected in zip(students, golden.levels("grad_student"), strict=True):
        assert_golden(level.grad, expected)
    assert_golden(graphs["teacher"][0].mix_states.weight.grad, golden["grad_teacher_non_local_0_gcn_conv2_weight"])
    assert_golden(relations["teacher"][0].theta.weight.grad, golden["grad_teacher_relation_0_theta_weight"])


def test_one_image_equals_the_released_code(golden):
    """The code is right for the only image of a batch; the file has the last image of its batch alone."""
    last = len(golden.levels("in_boxes")) - 1
    students, teachers = ([level[last:] for level in golden.levels(f"in_{side}")] for side in ("student", "teacher"))
    boxes = [golden[f"in_boxes_{last}"].reshape(-1, 4)]
    sides, levels = ("student", "teacher"), golden.meta["instance_levels"]
    graphs = {side: [graph(golden, side, level) for level in range(len(students))] for side in sides}
    relations = {side: [relation(golden, side, level) for level in levels] for side in sides}
    related, objects = instance_losses(
        golden, students, teachers, boxes, lambda side, level: [f"filter_single_{side}_{level}"], relations
    )
    for name, value in {"pr": pixel_loss(golden, students, teachers, graphs), "ir": related, "ins": objects}.items():
        assert_golden(value, golden[f"out_single_loss_{name}"])


def test_parts_equal_the_released_code(golden):
    students = golden.levels("in_student")
    assert_golden(graph(golden, "student", 0)(students[0]), golden["out_glore_student_train_0"])
    boxes = [own.reshape(-1, 4) for own in golden.levels("in_boxes")]
    assert_golden(regions_of(golden, students, boxes)[0][: len(boxes[0])], golden["out_roi_student_0_image0"])


# -------------------------------------------------------------------------------------------------------------- losses


def noise(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_losses_are_zero_for_equal_values_with_a_finite_gradient():
    same, regions = noise(0, 2, 4, 3, 5), noise(1, 3, 4, 3, 3)
    for loss in (
        drkd_pixel_loss([mine := same.clone().requires_grad_()], [same]),
        drkd_instance_loss([mine := regions.clone().requires_grad_()], [regions], [1, 0, 2]),
    ):
        loss.backward()
        assert loss.item() == 0.0
    assert torch.equal(mine.grad, torch.zeros_like(mine))


def test_norms_grow_linearly_and_with_the_root_of_the_batch():
    student, teacher = noise(0, 2, 4, 3, 5), noise(1, 2, 4, 3, 5)
    once = drkd_pixel_loss([student], [teacher]).item()
    assert drkd_pixel_loss([teacher + 2 * (student - teacher)], [teacher]).item() == pytest.approx(2 * once, rel=1e-12)
    twice = drkd_pixel_loss([student.repeat(2, 1, 1, 1)], [teacher.repeat(2, 1, 1, 1)]).item()
    assert twice == pytest.approx(2**0.5 * once, rel=1e-12)
    regions = noise(2, 5, 4, 3, 3), noise(3, 5, 4, 3, 3)
    apart = [
        drkd_instance_loss([regions[0][part]], [regions[1][part]], [len(regions[0][part])]) for part in (slice(2), slice(2, 5))
    ]
    assert drkd_instance_loss([regions[0]], [regions[1]], [2, 0, 3]).item() == pytest.approx(sum(apart).item(), rel=1e-12)


@pytest.mark.parametrize("filtered", [False, True])
def test_relations_equal_a_loop_over_pairs(filtered):
    block, regions = RelationBlock(16).double(), noise(0, 3, 4, 2, 2)
    filters = [drawn_filter(3, regions.flatten(1), torch.Generator().manual_seed(1))] if filtered else None
    rows = regions.flatten(1)
    expected = []
    for mine in rows:
        weights = torch.ones(3).double()
        if filtered:
            weights = torch.stack([mine @ filters[0].weight[other] + filters[0].bias[other] for other in range(3)]).softmax(0)
            assert weights.sum().item() == pytest.approx(1.0)
        attention = torch.stack([block.theta(mine) @ block.phi(other) for other in rows]) * weights
        assert attention.softmax(0).sum().item() == pytest.approx(1.0)
        expected.append(
            mine + block.out(sum(share * block.g(other) for share, other in zip(attention.softmax(0), rows, strict=True)))
        )
    torch.testing.assert_close(block(regions, [3], filters), torch.stack(expected).view_as(regions))


def test_a_single_object_attends_to_itself_and_images_do_not_mix():
    block, regions = RelationBlock(16).double(), noise(0, 4, 4, 2, 2)
    rows = regions[:1].flatten(1)
    alone = block(regions[:1], [1])
    torch.testing.assert_close(alone.flatten(1), block.out(block.g(rows)) + rows)
    together = block(regions, [1, 0, 3])
    torch.testing.assert_close(together, torch.cat([alone, block(regions[1:], [3])]))
    order = torch.tensor([0, 3, 1, 2])
    torch.testing.assert_close(block(regions[order], [1, 0, 3]), together[order])
    assert block(regions[:0], [0, 0]).shape == (0, 4, 2, 2)


def test_a_drawn_filter_is_initialised_like_a_linear_layer():
    like = torch.zeros(2, 400)
    drawn = drawn_filter(50, like, torch.Generator().manual_seed(0))
    assert (drawn.weight.shape, drawn.bias.shape) == ((50, 400), (50,))
    assert 0.99 / 20 < drawn.weight.abs().max().item() <= 1 / 20
    assert drawn.weight.mean().item() == pytest.approx(0.0, abs=1e-3)
    assert not torch.equal(drawn.weight, drawn_filter(50, like).weight)


def test_regions_come_from_their_own_image_unless_asked_otherwise():
    maps = (noise(0, 2, 4, 8, 8), noise(1, 2, 4, 4, 4))
    changed = tuple(torch.cat([level[:1], level[1:] + 1]) for level in maps)
    boxes = [torch.tensor([[0.0, 0.0, 30.0, 20.0]]), torch.tensor([[8.0, 8.0, 60.0, 60.0], [1.0, 2.0, 9.0, 9.0]])]
    for from_first, moves in ((False, True), (True, False)):
        before, after = (drkd_regions(Features(level, (8, 16)), boxes, from_first_image=from_first) for level in (maps, changed))
        assert torch.equal(before[0][:1], after[0][:1])
        assert torch.equal(before[0][1:], after[0][1:]) is not moves
    by_width = drkd_regions(Features(maps, (8, 16)), boxes, scale_by_width=True)
    for own, same in zip(by_width, drkd_regions(Features(maps, (8, 16)), boxes), strict=True):
        torch.testing.assert_close(own, same)


# -------------------------------------------------------------------------------------------------------------- method


def built(teacher=None, student=None, seed=0, **settings):
    torch.manual_seed(seed)
    student = student or TinyDense()
    settings = {"nodes": (4, 6)} | settings
    return DRKD(Teacher(teacher or TinyDense(channels=(12, 12), seed=1)), student, **settings), student


def learned(batch, autocast=False, **settings):
    method, student = built(**settings)
    taught, seen = method.teach(batch), student(batch)
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        return method.learn(student, seen, taught, batch, Clock(0, 1)), method, student


def with_boxes(batch, *boxes):
    targets = [Target(own, torch.zeros(len(own)).long(), torch.zeros(len(own)).bool()) for own in boxes]
    return batch.with_targets(targets)


def test_equal_maps_and_blocks_give_zero():
    teacher = TinyDense(seed=1)
    method, student = built(teacher, TinyDense(seed=1))
    for mine, theirs in (("student_pixels", "teacher_pixels"), ("student_relations", "teacher_relations")):
        getattr(method, mine).load_state_dict(getattr(method, theirs).state_dict())
    for adapter in (*method.adapt_pixels, *method.adapt_relations, *method.adapt_instances):
        nn.init.dirac_(adapter.weight)
        nn.init.zeros_(adapter.bias)
    batch = tiny_batch()
    losses = method.learn(student, student(batch), method.teach(batch), batch, Clock(0, 1))
    assert {name: term.item() for name, term in losses.terms.items()} == pytest.approx(dict.fromkeys(losses.terms, 0.0), abs=1e-6)
    assert all(monitor.item() > 0 for monitor in losses.monitors.values())


def test_profiles_are_the_released_weights_and_a_weight_of_zero_has_no_modules():
    def weights(**settings):
        method, _ = built(**settings)
        return method.pixel_weight, method.relation_weight, method.instance_weight

    assert weights() == (1e-3, 4e-3, 2.4e-3)
    assert weights(profile="one_stage") == (4e-3, 5e-3, 6e-3)
    assert weights(profile="one_stage", relation_weight=0.0) == (4e-3, 0.0, 6e-3)
    for name, modules in (("pixel", "pixels"), ("relation", "relations"), ("instance", "instances")):
        losses, method, _ = learned(tiny_batch(), **{f"{name}_weight": 0.0})
        assert f"drkd_{name}" not in losses.terms
        assert len(losses.terms) == 2
        assert len(getattr(method, f"adapt_{modules}")) == 0


def test_gradients_reach_both_sides_blocks_and_not_the_teacher():
    losses, method, student = learned(tiny_batch(), relation_filter="random")
    losses.total().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in method.parameters())
    assert all(p.grad is None for p in method.teacher.detector.parameters())
    assert any(p.grad is not None and bool(p.grad.any()) for p in student.parameters())


def test_without_boxes_only_pixels_learn():
    losses, _, student = learned(tiny_batch(boxes=False))
    assert losses.terms["drkd_relation"].item() == losses.terms["drkd_instance"].item() == 0.0
    assert losses.terms["drkd_pixel"].item() > 0
    losses.total().backward()
    assert all(torch.isfinite(p.grad).all() for p in student.parameters() if p.grad is not None)


def test_instance_losses_of_a_batch_are_the_sum_over_its_images():
    batch = tiny_batch(count=3)
    together = learned(batch)[0].terms
    apart = [
        learned(
            replace(
                batch,
                **{name: getattr(batch, name)[image : image + 1] for name in ("images", "sizes", "targets", "ids", "views")},
            )
        )[0].terms
        for image in range(3)
    ]
    for name in ("drkd_relation", "drkd_instance"):
        assert together[name].item() == pytest.approx(sum(terms[name].item() for terms in apart), rel=1e-5)


def test_the_order_of_boxes_and_crowds_change_nothing():
    batch = tiny_batch(count=1)
    boxes = torch.tensor([[1.0, 2.0, 30.0, 40.0], [8.0, 8.0, 20.0, 60.0], [0.0, 0.0, 64.0, 64.0]])
    plain = learned(with_boxes(batch, boxes))[0].terms
    shuffled = learned(with_boxes(batch, boxes[[2, 0, 1]]))[0].terms
    crowd = with_boxes(batch, torch.cat([boxes, torch.tensor([[3.0, 3.0, 50.0, 50.0]])]))
    crowd = crowd.with_targets([replace(crowd.targets[0], crowd=torch.tensor([False, False, False, True]))])
    for terms in (shuffled, learned(crowd)[0].terms):
        assert {name: term.item() for name, term in terms.items()} == pytest.approx(
            {name: term.item() for name, term in plain.items()}, rel=1e-5
        )


@pytest.mark.parametrize(
    ("boxes", "settings"),
    [
        ([[0.0, 0.0, 64.0, 64.0]], {}),
        ([[60.0, 60.0, 64.0, 64.0], [0.0, 0.0, 0.5, 64.0]], {}),
        ([[5.0, 5.0, 5.0, 5.0]], {"roi_size": 1}),
        ([[0.0, 0.0, 64.0, 64.0]], {"teacher": TinyDense(channels=(12, 16), seed=1)}),
        ([[0.0, 0.0, 64.0, 64.0]], {"teacher": TinyDense(channels=(12, 12), strides=(16, 32), seed=1)}),
        (
            [[0.0, 0.0, 64.0, 64.0]],
            {"teacher": TinyDense(strides=(32, 64), seed=1), "student": TinyDense(strides=(32, 64)), "instance_levels": (-1,)},
        ),
    ],
)
def test_odd_boxes_and_pyramids(boxes, settings):
    losses, method, _ = learned(with_boxes(tiny_batch(count=1), torch.tensor(boxes)), **settings)
    losses.total().backward()
    assert all(bool(torch.isfinite(term)) for term in losses.terms.values())
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in method.parameters())


def test_half_precision_does_not_reach_the_losses():
    plain, mixed = (learned(tiny_batch(), autocast=autocast)[0].terms for autocast in (False, True))
    assert {name: term.dtype for name, term in mixed.items()} == dict.fromkeys(plain, torch.float32)
    assert all(torch.equal(mixed[name], term) for name, term in plain.items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"pixel_weight": 0, "relation_weight": 0, "instance_weight": 0},
            "pixel_weight, relation_weight, instance_weight are all 0",
        ),
        ({"nodes": ()}, "nodes is empty; give at least one number, which then serves all levels"),
        ({"levels": (1,), "instance_levels": (0,)}, "instance_levels=[0]: student level 0 is not compared; compared are [1]"),
        ({"relation_filter": "official"}, "relation_filter=official is not one of none, random"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(DetdistillError) as error:
        built(**settings)
    assert str(error.value).startswith(f"drkd: {message}")


def test_contract():
    assert len(check_method(DRKD, nodes=(4,), relation_filter="random")) == 18


def test_the_losses_fall_in_training():
    batch = tiny_batch()
    method, student = built()
    taught = method.teach(batch)
    optimizer = torch.optim.AdamW([*student.parameters(), *method.parameters()], lr=1e-3)
    history = []
    for _ in range(40):
        losses = method.learn(student, student(batch), taught, batch, Clock(0, 1))
        optimizer.zero_grad()
        losses.total().backward()
        optimizer.step()
        history.append(losses.total().item())
    assert history[-1] < 0.8 * history[0]
