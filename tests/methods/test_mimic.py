import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from detdistill.detectors.build import build_detector
from detdistill.detectors.contract import Teacher
from detdistill.errors import DetdistillError
from detdistill.functional.cells import level_of_box
from detdistill.functional.regions import pool_boxes
from detdistill.losses import mimic_loss, mimic_prediction_loss
from detdistill.methods.mimic import Mimic, RegionTransform
from detdistill.methods.shared.contract import Composition
from detdistill.methods.shared.needs import PairError
from detdistill.structures import Clock, Features
from tests.golden import Golden, assert_golden
from tests.methods.contract_checks import check_method, without_boxes
from tests.tiny import TinyDense, TinyQueries, TinyRegions, tiny_batch

CLOCK = Clock(5, 10)


# ------------------------------------------------------------------------------------------------ against released code


def test_values_and_gradients_equal_the_released_code():
    golden = Golden("mimic")
    kind = "teacher" if golden.meta["teacher_proposal"] else "student"
    proposals = golden[f"in_{kind}_proposals"]
    student = [level.requires_grad_() for level in golden.levels("in_student")]
    strides = tuple(golden["in_strides"].tolist())
    size, samples = golden.meta["pool"], golden.meta["sampling_ratio"]
    boxes = [proposals[proposals[:, 0] == image, 1:5] for image in range(len(student[0]))]
    levels = level_of_box(torch.cat(boxes), len(strides), golden.meta["base_scale"])
    pooled, wanted = (
        pool_boxes(Features(tuple(maps), strides), boxes, size, levels, sampling_ratio=samples, aligned=False)
        for maps in (student, golden.levels("in_teacher"))
    )
    for name, rows in (("student", pooled), ("teacher", wanted)):
        if f"out_{name}_pooled_level_order" in golden:
            assert_golden(rows[levels.argsort(stable=True)], golden[f"out_{name}_pooled_level_order"])
    total = mimic_loss(pooled, wanted)
    assert_golden(total, golden["out_total"])
    total.backward()
    for level, expected in zip(student, golden.levels("grad_student"), strict=True):
        assert_golden(level.grad, expected)


# ------------------------------------------------------------------------------------------------------- invariants


def pyramid(seed, images=2, channels=4):
    generator = torch.Generator().manual_seed(seed)
    maps = (torch.randn(images, channels, side, side, generator=generator, dtype=torch.float64) for side in (16, 8))
    return Features(tuple(level.requires_grad_() for level in maps), (8, 16))


BOXES = [
    torch.tensor([[3.0, 5.0, 40.0, 60.0], [60.0, 20.0, 90.0, 44.0]], dtype=torch.float64),
    torch.tensor([[10.0, 10.0, 30.0, 26.0]], dtype=torch.float64),
]


def loss_of(student, teacher, boxes=BOXES, levels=None, **settings):
    pools = [pool_boxes(side, boxes, 7, levels, sampling_ratio=2, aligned=False) for side in (student, teacher)]
    return mimic_loss(*pools, **settings)


def test_equal_maps_and_an_identity_lose_nothing():
    maps = pyramid(0)
    transform = RegionTransform((4, 4), 4, per_level=True).double()
    for convolution in transform.convolutions:
        nn.init.dirac_(convolution.weight)
        nn.init.zeros_(convolution.bias)
    levels = torch.tensor([0, 1, 0])
    pooled = transform(maps, BOXES, levels, 7, 2)
    loss = mimic_loss(pooled, pool_boxes(maps, BOXES, 7, levels, sampling_ratio=2, aligned=False))
    assert float(loss.detach()) == 0.0


def test_half_the_mean_square_or_the_papers_sum():
    rows = [torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in (0, 1)]
    squares = (rows[0] - rows[1]).square()
    assert float(mimic_loss(*rows)) == pytest.approx(0.5 * float(squares.mean()), rel=1e-12)
    assert float(mimic_loss(*rows, normalize=False)) == pytest.approx(float(squares.sum()) / 10, rel=1e-12)
    assert float(mimic_loss(*rows, weight=3.0)) == pytest.approx(1.5 * float(squares.mean()), rel=1e-12)
    assert float(mimic_prediction_loss(*rows, 2.0)) == pytest.approx(float(squares.sum()) / 5, rel=1e-12)


def test_copies_and_order_of_the_regions_change_nothing():
    student, teacher = pyramid(0), pyramid(1)
    expected = float(loss_of(student, teacher).detach())
    twice = [torch.cat([boxes, boxes]) for boxes in BOXES]
    assert float(loss_of(student, teacher, twice).detach()) == pytest.approx(expected, rel=1e-12)
    flipped = [boxes.flip(0) for boxes in BOXES]
    assert float(loss_of(student, teacher, flipped).detach()) == pytest.approx(expected, rel=1e-12)


def test_gradient_stays_where_regions_were_pooled_and_off_the_teacher():
    student, teacher = pyramid(0), pyramid(1)
    boxes = [box.clone().requires_grad_() for box in BOXES]
    loss_of(student, teacher, boxes, levels=torch.tensor([0, 0, 0])).backward()
    fine, coarse = (level.grad for level in student.maps)
    assert coarse is None or not coarse.any()
    assert fine[0, :, 0:6, 0:5].any()
    assert not fine[0, :, 10:].any()
    assert not fine[1, :, :, 6:].any()
    assert all(level.grad is None for level in teacher.maps)
    assert all(box.grad is None for box in boxes)


def test_the_level_of_a_box_changes_at_twice_the_base():
    boxes = torch.tensor([[0.0, 0.0, 111.0, 111.0], [0.0, 0.0, 110.0, 110.0]])
    assert level_of_box(boxes, 4, 56.0).tolist() == [1, 0]


def test_no_region_is_zero_and_connected():
    student = pyramid(0)
    nothing = [boxes[:0] for boxes in BOXES]
    loss = loss_of(student, pyramid(1), nothing)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert all(not level.grad.any() for level in student.maps)
    some = loss_of(student, pyramid(1), [BOXES[0], nothing[1]])
    alone = [Features(tuple(level[:1] for level in pyramid(seed).maps), (8, 16)) for seed in (0, 1)]
    assert float(some.detach()) == pytest.approx(float(loss_of(*alone, BOXES[:1]).detach()), rel=1e-12)


def test_a_transform_of_each_level_reads_its_own_channels():
    maps = Features((torch.randn(2, 3, 16, 16), torch.randn(2, 5, 8, 8)), (8, 16))
    transform = RegionTransform((3, 5), 4, per_level=True)
    boxes, levels = [boxes.float() for boxes in BOXES], torch.tensor([1, 0, 1])
    pooled = transform(maps, boxes, levels, 7, 2)
    assert pooled.shape == (3, 4, 7, 7)
    for row, (image, box) in enumerate(((0, 0), (0, 1), (1, 0))):
        one = [boxes[image][[box]] if index == image else boxes[0][:0] for index in range(2)]
        expected = transform(maps, one, levels[[row]], 7, 2)[0]
        torch.testing.assert_close(pooled[row], expected)


# ---------------------------------------------------------------------------------------------------------- the method


def test_contract_of_two_stages():
    assert check_method(Mimic, keep_features=True) == ["regions 8 -> regions 8", "regions 16 -> regions 8"]


def test_contract_of_one_stage():
    assert len(check_method(Mimic, two_stage=False, size=2, max_regions=4)) == 18


def build(student=None, teacher=None, **settings):
    torch.manual_seed(0)
    student = student or TinyRegions(seed=2)
    return student, Mimic(Teacher(teacher or TinyRegions(seed=1)), student, **settings)


def learn(batch, clock=CLOCK, student=None, **settings):
    student, method = build(student, **settings)
    return method.learn(student, student(batch), method.teach(batch), batch, clock)


def test_the_first_stage_trains_features_and_proposals_and_the_second_predictions():
    student, method = build()
    batch = tiny_batch(2)
    first, distill = method.stages(student)
    assert (first.name, first.share, first.evaluates) == ("mimic", 1.0, None)
    losses = first.step(batch, method.teach(batch), CLOCK)
    assert list(losses.terms) == ["cls", "box", "mimic_features"]
    assert losses.distilled == {"mimic_features"}
    losses.total().backward()
    assert student.rpn.logits.weight.grad is not None
    assert student.embed.weight.grad is None  # the region head learns in the second stage
    assert set(distill.step(batch, method.teach(batch), CLOCK).distilled) == {"mimic_class", "mimic_box"}
    student, method = build(keep_features=True, class_weight=0.0)
    assert set(method.step(student, batch, method.teach(batch), CLOCK).distilled) == {"mimic_features", "mimic_box"}
    student, method = build(two_stage=False)
    assert [stage.name for stage in method.stages(student)] == ["distill"]


def test_an_equal_teacher_teaches_nothing():
    student, method = build(TinyRegions(seed=1), transform="none", keep_features=True)
    batch = tiny_batch(2)
    losses = method.learn(student, student(batch), method.teach(batch), batch, CLOCK)
    assert [float(term.detach()) for term in losses.terms.values()] == [0.0, 0.0, 0.0]
    assert float(losses.monitors["regions"]) > 0


def test_images_without_ground_truth_take_part():
    batch = tiny_batch(2)
    assert float(learn(without_boxes(batch, range(2)), two_stage=False).terms["mimic_features"].detach()) > 0
    labels = learn(without_boxes(batch, range(2)), two_stage=False, proposals="labels")
    assert float(labels.terms["mimic_features"].detach()) == 0.0
    assert float(labels.monitors["regions"]) == 0.0


def test_an_image_counts_by_its_regions():
    """With as many regions in each image, the loss of a batch is the mean over the images alone."""
    batch = replace(tiny_batch(3), sizes=torch.full((3, 2), 64))
    boxes = torch.tensor([[4.0, 4.0, 30.0, 30.0], [0.0, 0.0, 64.0, 64.0]])  # the second fills the image, to its border
    target = replace(batch.targets[0], boxes_xyxy=boxes, labels=torch.tensor([0, 1]), crowd=torch.zeros(2, dtype=torch.bool))
    batch = batch.with_targets([target] * 3)
    whole = learn(batch, two_stage=False, proposals="labels").terms["mimic_features"]
    alone = [learn(batch._on_canvas([image], (64, 64)), two_stage=False, proposals="labels") for image in range(3)]
    mean = sum(losses.terms["mimic_features"] for losses in alone) / 3
    assert float(whole.detach()) == pytest.approx(float(mean.detach()), rel=1e-5)


def test_weight_and_warm_up_scale_the_features():
    batch = tiny_batch(2)
    full = float(learn(batch, two_stage=False).total().detach())
    assert float(learn(batch, two_stage=False, weight=3.0).total().detach()) == pytest.approx(3 * full, rel=1e-5)
    quarter = learn(batch, Clock(25, 1000), two_stage=False, warm_iters=100)
    assert float(quarter.total().detach()) == pytest.approx(full / 4, rel=1e-5)


@pytest.mark.parametrize("kernel", [2, 4])
def test_a_deconvolution_doubles_the_student(kernel):
    student, method = build(TinyDense(strides=(16, 32), seed=2), TinyDense(seed=1), two_stage=False, deconvolution=kernel)
    batch = tiny_batch(2)
    doubled = [layer(level) for layer, level in zip(method.deconvolutions, student(batch).features.maps, strict=True)]
    assert [tuple(level.shape[-2:]) for level in doubled] == [(8, 8), (4, 4)]
    assert math.isfinite(float(method.learn(student, student(batch), method.teach(batch), batch, CLOCK).total().detach()))


def test_fewer_levels_of_the_teacher_and_a_level_of_one_cell():
    batch = tiny_batch(2)
    for strides in ((8,), (8, 64), (64,)):
        teacher = TinyDense(channels=(8,) * len(strides), strides=strides, seed=1)
        student, method = build(teacher=teacher, two_stage=False)
        losses = method.learn(student, student(batch), method.teach(batch), batch, CLOCK)
        assert math.isfinite(float(losses.total().detach()))


def test_a_teacher_with_other_classes():
    student = TinyRegions(seed=2)
    batch = tiny_batch(2)
    student, method = build(teacher=TinyRegions(classes=("b", "c", "a"), seed=1))
    seen, taught = student(batch), method.teach(batch)
    terms = method.learn(student, seen, taught, batch, CLOCK).terms
    theirs = method.teacher.predict_regions(seen.prediction, taught.features, batch)
    gap = theirs.logits[:, [2, 0, 3]] - seen.prediction.logits
    assert float(terms["mimic_class"].detach()) == pytest.approx(float(gap.square().sum().detach()) / (2 * len(gap)), rel=1e-5)
    gap = theirs.deltas[:, [2, 0]] - seen.prediction.deltas
    assert float(terms["mimic_box"].detach()) == pytest.approx(float(gap.square().sum().detach()) / (2 * len(gap)), rel=1e-5)
    with pytest.raises(PairError, match=r"mimic: it compares class scores, but the teacher does not know b; its classes: a"):
        build(teacher=TinyRegions(classes=("a",), seed=1))
    build(teacher=TinyRegions(classes=("a",), seed=1), two_stage=False)


def test_no_surviving_proposal_is_finite():
    student, method = build(two_stage=False)
    batch = tiny_batch(2)
    seen = student(batch)
    point = replace(seen.prediction.first, boxes_xyxy=torch.full_like(seen.prediction.first.boxes_xyxy, 7.0))
    seen = replace(seen, prediction=replace(seen.prediction, first=point))
    losses = method.learn(student, seen, method.teach(batch), batch, CLOCK)
    assert float(losses.total().detach()) == 0.0
    losses.total().backward()
    assert all(torch.isfinite(p.grad).all() for p in student.parameters() if p.grad is not None)


def test_the_composition_runs_the_teachers_head_once():
    student, method = build()
    other = type("Other", (Mimic,), {"slug": "other"})(method.teacher, student)
    together, batch = Composition([method, other], student), tiny_batch(2)
    runs = []
    regions = method.teacher.detector.regions
    method.teacher.detector.regions = lambda *given: runs.append(1) or regions(*given)
    terms = together.step(student, batch, together.teach(batch), CLOCK).terms
    assert len(runs) == 1
    assert torch.equal(terms["mimic/mimic_class"], terms["other/mimic_class"])


TINY = "resnet10t,channels=8-16-32-64,stem=8,neck={},mlp=16,proposals=20,rois=16"


def test_every_pair_of_two_stage_detectors_learns():
    batch = tiny_batch(2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        teachers = [Teacher(build_detector(f"{name}:{TINY.format(16)}", ["a", "b"])) for name in ("faster_rcnn", "cascade_rcnn")]
        students = [build_detector(f"{name}:{TINY.format(8)}", ["a", "b"]) for name in ("faster_rcnn", "cascade_rcnn")]
    for teacher in teachers:
        for student in students:
            method = Mimic(teacher, student.train(), keep_features=True)
            for stage in method.stages(student):
                losses = stage.step(batch, method.teach(batch), CLOCK)
                assert math.isfinite(float(losses.total().detach()))
                assert all(float(losses.terms[name].detach()) > 0 for name in losses.distilled)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": -1.0}, "weight=-1.0 is not a number, 0 or more"),
        ({"weight": 0.0}, "weight are all 0; nothing would be distilled"),
        ({"proposals": "rpn"}, "proposals=rpn is not one of student, teacher, labels"),
        ({"max_regions": 0}, "max_regions=0 is not a whole number, 1 or more"),
        ({"deconvolution": 3}, "deconvolution=3 is not one of 0, 2, 4"),
        ({"levels": [5]}, "levels=[5]: give each level once, from 0 to 1"),
        ({"levels": [0, -2]}, "levels=[0, -2]: give each level once, from 0 to 1"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(DetdistillError) as error:
        build(**settings)
    assert str(error.value) == f"mimic: {message}"


def test_refused_pairs_are_told_why():
    refused = [
        ({"student": TinyDense()}, "the student tinydense:patches predicts dense; it needs a student that predicts regions"),
        (
            {"teacher": TinyQueries()},
            "the teacher tinyqueries:patches predicts queries; it needs",
        ),
        ({"teacher": TinyRegions(channels=(16, 16)), "transform": "none"}, "set mimic,transform=shared"),
        ({"student": TinyDense(), "teacher": _uneven(), "two_stage": False}, "take a teacher whose neck has equal channels"),
        ({"student": _uneven(), "teacher": TinyDense(), "two_stage": False}, "set mimic,transform=per_level"),
    ]
    for settings, message in refused:
        with pytest.raises(PairError) as error:
            build(**settings)
        assert message in str(error.value)


def _uneven():
    detector = TinyDense()
    detector.spec = replace(detector.spec, channels=(8, 12))
    return detector
