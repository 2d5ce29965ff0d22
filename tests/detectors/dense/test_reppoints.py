import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from detdistill.detectors.build import build_detector
from detdistill.detectors.contract import HasBackboneFeatures, HasCopies, HasTowers
from detdistill.detectors.inherit import inherit_head
from detdistill.detectors.student_files.models.dense import flat
from detdistill.detectors.student_files.models.reppoints import points_to_boxes
from detdistill.errors import ModelError
from detdistill.structures import IGNORED, Assignment, Batch, Target, View
from tests.detectors.dense.shared import EMPTY, assert_detections_equal, target, unequal_batch
from tests.golden import Golden, assert_golden

NAME = "reppoints:resnet10t,channels=8-16-32-64,stem=8,neck=32,levels=3-5,convs=2,score=0.01"


@pytest.fixture
def detector():
    torch.manual_seed(0)
    return spread(build_detector(NAME, ["a", "b", "c"]))


def spread(detector, seed=0):
    """Points a stride or two apart and scores of all heights, as in a detector that has learned something."""
    generator = torch.Generator().manual_seed(seed)
    sides = detector.model.head.classification_head, detector.model.head.regression_head
    for part in (sides[0].deformable, sides[1].deformable, sides[1].first_conv):
        part.weight.data = torch.randn(part.weight.shape, generator=generator) * 0.05
    for part, size in ((sides[0].cls_logits, 0.8), (sides[1].first_points, 0.8), (sides[1].correction, 0.3)):
        part.weight.data = torch.randn(part.weight.shape, generator=generator) * size
    return detector


# ------------------------------------------------------------------------------------------------------ released numbers


def golden_case():
    """The released head's outputs as a prediction of a detector of ours, the batch, and the leaves of the graph."""
    golden = Golden("_reppoints")
    strides, (height, width) = golden["in_strides"].tolist(), golden["in_pad_size"].tolist()
    levels = f"{int(math.log2(strides[0]))}-{int(math.log2(strides[-1]))}"
    classes = [str(number) for number in range(golden.meta["num_classes"])]
    detector = build_detector(f"reppoints:resnet10t,channels=8-16-32-64,stem=8,neck=32,levels={levels},convs=0", classes)
    assert detector.spec.strides == tuple(strides)
    dtype = golden["in_cls_0"].dtype
    detector.to(dtype).point_scale, detector.least_iou = golden.meta["point_base_scale"], 0.0
    head = detector.model.head
    head.moment.data, head.moment_gradient = golden["param_moment_transfer"], golden.meta["moment_mul"]
    leaves = {name: golden.levels(f"in_{name}") for name in ("cls", "pts_init", "pts_refine")}
    for level in itertools.chain(*leaves.values()):
        level.requires_grad_()
    names = ("cls_logits", "first_points", "bbox_regression")
    outputs = {name: flat(maps) for name, maps in zip(names, leaves.values(), strict=True)}
    images = len(golden["in_image_sizes"])
    size = (height, width)  # the released code trains on all cells of the padded image
    boxes, labels = golden.levels("in_boxes"), golden.levels("in_labels")
    targets = tuple(Target(*pair, torch.zeros(len(pair[0]), dtype=torch.bool)) for pair in zip(boxes, labels, strict=True))
    batch = Batch(
        torch.zeros(images, 3, height, width, dtype=dtype),
        torch.tensor([size] * images),
        targets,
        tuple(range(images)),
        (View(size, size),) * images,
    )
    shapes = [tuple(level.shape[-2:]) for level in leaves["cls"]]
    return golden, detector, detector.placed(outputs, shapes, batch), batch, leaves


def test_boxes_equal_the_released_code():
    golden, detector, prediction, _, _ = golden_case()
    for level, expected in enumerate(golden.levels("out_bbox_init")):  # in strides, without the centre
        here = prediction.levels == level
        corners = prediction.priors_xyxy[:, here]
        centers = (corners[..., :2] + corners[..., 2:]).repeat(1, 1, 2) / 2
        boxes = (detector.first_boxes(prediction)[:, here] - centers) / golden["in_strides"][level]
        assert_golden(boxes.transpose(1, 2).unflatten(-1, expected.shape[-2:]), expected)


def test_losses_and_gradients_equal_the_released_code():
    golden, detector, prediction, batch, leaves = golden_case()
    values = detector.loss_values(prediction, batch, detector.assign(prediction, batch))
    pairs = {"loss_cls": "classification", "loss_pts_init": "first_points", "loss_pts_refine": "refined_points"}
    for theirs, mine in pairs.items():
        for level, expected in enumerate(golden.levels(f"out_{theirs}")):
            assert_golden(values[mine][:, prediction.levels == level].sum(), expected)
    total = detector.loss(prediction, batch).total()
    assert_golden(total, golden["out_total"])
    total.backward()
    for name, maps in leaves.items():
        for level, expected in zip(maps, golden.levels(f"grad_student_{name}"), strict=True):
            assert_golden(level.grad, expected)
    assert_golden(detector.model.head.moment.grad, golden["grad_param_moment_transfer"])


# ------------------------------------------------------------------------------------------------------------ the network


def test_moment_transform_by_hand():
    """x: 0 eight times and 9; y: 1 always. Mean 1 and 1; variance (8 * 1 + 64) / 8 = 9, so half the width is 3 strides."""
    points = torch.tensor([[1.0, 0.0] * 8 + [1.0, 9.0]], dtype=torch.float64)
    moment = torch.tensor([math.log(2), 5.0], dtype=torch.float64, requires_grad=True)
    boxes = points_to_boxes(points, torch.tensor([[40.0, 16.0]]), torch.tensor([8.0]), moment)
    torch.testing.assert_close(boxes, torch.tensor([[40 + 8 - 48, 24, 40 + 8 + 48, 24]], dtype=torch.float64))
    boxes[0, 2].backward()  # d(right)/d(log factor) is half the width, 48 px; a hundredth of it arrives
    torch.testing.assert_close(moment.grad, torch.tensor([0.48, 0.0], dtype=torch.float64))


def test_points_that_coincide_have_a_finite_gradient():
    points = torch.zeros(1, 18, requires_grad=True)
    boxes = points_to_boxes(points, torch.zeros(1, 2), torch.tensor([8.0]), torch.zeros(2))
    assert boxes.tolist() == [[0.0] * 4]
    boxes.square().sum().backward()
    assert torch.isfinite(points.grad).all()


def test_deformable_convolutions_look_at_the_points(detector):
    """Against sampling by ``grid_sample``: tap k sees the feature at the cell plus the k-th point."""
    head = detector.model.head
    features = torch.rand(1, 32, 9, 7)
    points = torch.randn(9, 2) * 1.5  # (y, x)
    head.regression_head.first_points.weight.data.zero_()
    head.regression_head.first_points.bias.data = points.flatten()
    outputs = head.outputs([features], [features])
    rows, columns = torch.meshgrid(torch.arange(9), torch.arange(7), indexing="ij")
    seen = []
    for y, x in points.tolist():
        grid = torch.stack([(columns + x + 0.5) * 2 / 7 - 1, (rows + y + 0.5) * 2 / 9 - 1], dim=-1)
        seen.append(F.grid_sample(features, grid[None], align_corners=False, padding_mode="zeros"))
    taps = torch.stack(seen, dim=2)  # [1, 32, 9, H, W]
    looked = torch.einsum("bckhw,ock->bohw", taps, head.classification_head.deformable.weight.flatten(2)).relu()
    torch.testing.assert_close(outputs["cls_logits"], flat([head.classification_head.cls_logits(looked)]), rtol=1e-4, atol=1e-4)
    looked = torch.einsum("bckhw,ock->bohw", taps, head.regression_head.deformable.weight.flatten(2)).relu()
    refined = flat([head.regression_head.correction(looked)]) + points.flatten()
    torch.testing.assert_close(outputs["bbox_regression"], refined, rtol=1e-4, atol=1e-4)
    assert torch.equal(outputs["first_points"], points.flatten().expand(1, 63, 18))


@pytest.mark.parametrize("output", ["cls_logits", "bbox_regression"])
def test_a_tenth_of_the_gradient_reaches_the_first_points(detector, output):
    head = detector.model.head
    features = torch.rand(1, 32, 5, 5)

    def gradient(share):
        head.offset_gradient = share
        head.zero_grad()
        head.outputs([features], [features])[output].square().sum().backward()
        return head.regression_head.first_points.weight.grad.clone()

    whole = gradient(1.0)
    assert float(whole.abs().max()) > 0.1
    torch.testing.assert_close(gradient(0.1), 0.1 * whole)
    assert float(gradient(0.0).abs().max()) == 0  # the refined points add to the first ones without a gradient


def test_fresh_weights():
    head = build_detector(NAME, ["a", "b", "c"]).model.head
    bias = head.classification_head.cls_logits.bias
    torch.testing.assert_close(bias.sigmoid(), torch.full_like(bias, 0.01))
    assert head.moment.tolist() == [0.0, 0.0]
    for part in (head.classification_head.deformable, head.regression_head.first_conv):
        assert float(part.weight.detach().std()) == pytest.approx(0.01, rel=0.1)


def test_parameters_with_and_without_norm():
    plain, normed = (build_detector(f"{NAME},headnorm={norm}", ["a", "b", "c"]).model.head for norm in ("none", "gn"))
    kinds = [type(part).__name__ for part in plain.regression_head.conv[1]]
    assert kinds == ["Conv2d", "ReLU"]
    assert [type(part).__name__ for part in normed.regression_head.conv[1]] == ["Conv2d", "TolerantGroupNorm", "ReLU"]
    block = 9 * 32 * 32
    layers = block + 32 + 2 * (32 * 18 + 18) + 2 * block + 32 * 3 + 3 + 2
    assert sum(parameter.numel() for parameter in plain.parameters()) == 4 * (block + 32) + layers
    assert sum(parameter.numel() for parameter in normed.parameters()) == 4 * (block + 64) + layers
    with pytest.raises(ModelError, match="headnorm='bn' is not one of gn, none"):
        build_detector(f"{NAME},headnorm=bn", ["a"])


def test_levels_above_the_backbone_read_its_deepest_map():
    detector = build_detector(NAME.replace("levels=3-5", "levels=3-7"), ["a"])
    assert detector.spec.strides == (8, 16, 32, 64, 128)
    batch = unequal_batch()
    bottom, features = detector.eval().backbone_features(batch), detector.features(batch)
    above = detector.model.backbone.fpn.extra_blocks
    assert torch.equal(features.maps[3], above.p6(bottom.maps[-1]))
    assert torch.equal(features.maps[4], above.p7(features.maps[3]))  # no ReLU between


def test_detections_equal_the_models_own(detector):
    assert_detections_equal(detector, unequal_batch())


def test_no_detections_at_all(detector):
    detector.eval().model.score_thresh = 1.0
    batch = unequal_batch()
    found = detector.detect(detector(batch).prediction, batch)
    assert [one.boxes_xyxy.shape for one in found] == [(0, 4)] * 3
    assert found[0].origin.cell.shape == (0, 2)


# --------------------------------------------------------------------------------------------------------- assignments


def planted(detector, batch, boxes):
    """A prediction whose first points have the given boxes (cell of the finest level -> box), all others a point."""
    prediction = detector(batch).prediction
    points = torch.zeros_like(prediction.own.outputs["first_points"])
    signs = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]] * 2 + [[0, 0]])  # of deviation 1: 8 / (9 - 1)
    for (image, cell), box in boxes.items():
        x1, y1, x2, y2 = box
        row, column = prediction.cells[cell].tolist()
        center = torch.tensor([(y1 + y2) / 2 - row * 8, (x1 + x2) / 2 - column * 8])
        half = torch.tensor([(y2 - y1) / 2, (x2 - x1) / 2])
        points[image, cell] = ((center + signs * half) / 8).flatten()
    prediction.own.outputs["first_points"] = points
    return prediction


def test_assignment_by_overlap_with_the_first_boxes(detector):
    batch = unequal_batch((target([[20, 20, 60, 60], [100, 80, 104, 84], [70, 0, 90, 20]], [0, 1, 2], crowd=(2,)), *EMPTY[1:]))
    same, half, low = (20.0, 20.0, 60.0, 60.0), (20.0, 20.0, 60.0, 38.0), (20.0, 20.0, 60.0, 30.0)
    prediction = planted(detector, batch, {(0, 7): same, (0, 8): half, (0, 9): low, (0, 10): (70.0, 0.0, 90.0, 20.0)})
    torch.testing.assert_close(detector.first_boxes(prediction)[0, 7], torch.tensor(same))
    matched = detector.assign(prediction, batch).matched
    assert matched[0, [7, 8, 9]].tolist() == [0, IGNORED, -1]  # IoU 1, 0.45, 0.25
    assert matched[0, 10] == -1  # a crowd box is no target
    assert not bool((matched == 1).any())  # it overlaps nothing
    detector.least_iou = 0.0  # as released: it takes all that it does not overlap
    assert int((detector.assign(prediction, batch).matched[0] == 1).sum()) > 100


def test_padding_takes_no_part(detector):
    batch = unequal_batch()
    prediction = detector(batch).prediction
    strides = torch.tensor(detector.spec.strides)[prediction.levels]
    corners = prediction.cells * strides[:, None]
    for assignment in (detector.assign(prediction, batch), detector.first_assignment(prediction, batch)):
        for image, (height, width) in enumerate(batch.sizes.tolist()):
            outside = (corners[:, 0] >= height) | (corners[:, 1] >= width)
            assert bool((assignment.matched[image, outside] == IGNORED).all())
    # image 2, 64 x 64 without boxes, has 8 x 8, 4 x 4 and 2 x 2 cells of its own
    assert int((detector.first_assignment(prediction, batch).matched[2] == -1).sum()) == 64 + 16 + 4


def test_first_assignment_is_the_nearest_cell_of_the_boxs_level(detector):
    """A box of 64 px belongs to stride 16; its centre (53, 45) is nearest to the cell at (48, 48)."""
    batch = unequal_batch((target([[0, 0, 5, 5], [21, 13, 85, 77]], [0, 1], crowd=(0,)), *EMPTY[1:]))
    prediction = detector(batch).prediction
    matched = detector.first_assignment(prediction, batch).matched
    (place,) = torch.nonzero(matched[0] >= 0).flatten().tolist()
    assert matched[0, place] == 1  # crowd boxes keep their number
    assert prediction.levels[place] == 1
    assert prediction.cells[place].tolist() == [3, 3]


# -------------------------------------------------------------------------------------------------------------- losses


def test_own_assignment_given_back_changes_nothing(detector):
    batch = unequal_batch()
    prediction = detector(batch).prediction
    own = detector.loss(prediction, batch).terms
    given = detector.loss(prediction, batch, detector.assign(prediction, batch)).terms
    assert all(float(term.detach()) > 0 for term in own.values())
    assert {name: float(term.detach()) for name, term in given.items()} == {
        name: float(term.detach()) for name, term in own.items()
    }


def test_foreign_assignment_by_hand(detector):
    batch = unequal_batch((target([[0, 0, 127, 99], [20, 20, 90, 80]], [0, 2]), *EMPTY[1:]))
    prediction = detector(batch).prediction
    matched = torch.full(prediction.logits.shape[:2], -1)
    matched[0, [18, 56]] = torch.tensor([0, 1])
    matched[1:, :] = IGNORED
    weights = torch.ones(matched.shape)
    weights[0, 56] = 3.0
    terms = detector.loss(prediction, batch, Assignment(matched, weights, torch.tensor(5.0))).terms
    difference = (prediction.boxes_xyxy[0, [18, 56]] - batch.targets[0].boxes_xyxy).abs() / 32  # 4 strides of 8 px
    corner = torch.where(difference < 0.11, difference.square() / 0.22, difference - 0.055).sum(dim=1)
    torch.testing.assert_close(terms["refined_points"], (corner[0] + 3 * corner[1]) / 5)
    wanted = torch.zeros_like(prediction.logits[0])
    wanted[18, 0], wanted[56, 2] = 1, 1
    p = prediction.logits[0].sigmoid()
    focal = torch.where(wanted == 1, -0.25 * (1 - p) ** 2 * p.log(), -0.75 * p**2 * (1 - p).log())
    torch.testing.assert_close(terms["classification"], (focal.sum(dim=1) * weights[0]).sum() / 5)
    assert torch.equal(terms["first_points"], detector.loss(prediction, batch).terms["first_points"])


def test_foreign_weights_ignored_and_normalizer(detector):
    batch = unequal_batch()
    prediction = detector(batch).prediction
    own = detector.assign(prediction, batch)
    plain = detector.loss(prediction, batch, own).terms
    count = (own.matched >= 0).sum(dim=1).clamp(min=1).sum()
    halved = detector.loss(prediction, batch, Assignment(own.matched, normalizer=count / 2)).terms
    weighted = detector.loss(prediction, batch, Assignment(own.matched, weights=torch.full(own.matched.shape, 2.0))).terms
    for name in ("classification", "refined_points"):
        torch.testing.assert_close(halved[name], 2 * plain[name])
        torch.testing.assert_close(weighted[name], 2 * plain[name])
    ignored = detector.loss(prediction, batch, own.as_ignored(own.matched == -1)).terms
    assert float(ignored["classification"].detach()) < float(plain["classification"].detach())
    assert torch.equal(ignored["refined_points"], plain["refined_points"])


@pytest.mark.parametrize("targets", [EMPTY, (EMPTY[0], target([[10, 10, 50, 60]], [1]), EMPTY[0])])
def test_images_without_boxes(detector, targets):
    batch = unequal_batch(targets)
    losses = detector.loss(detector(batch).prediction, batch)
    boxes = sum(map(len, targets))
    assert (float(losses.terms["refined_points"].detach()) > 0) == (boxes > 0)
    assert (float(losses.terms["first_points"].detach()) > 0) == (boxes > 0)
    assert 0 < float(losses.terms["classification"].detach()) < math.inf
    losses.total().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in detector.parameters())


# ------------------------------------------------------------------------------------------------------- the contract


def test_capabilities(detector):
    assert all(isinstance(detector, protocol) for protocol in (HasBackboneFeatures, HasTowers, HasCopies))
    assert (detector.spec.family, detector.spec.softmax, detector.spec.strides) == ("dense", False, (8, 16, 32))


def test_deltas_are_the_refined_points_and_priors_one_stride_wide(detector):
    batch = unequal_batch()
    prediction = detector(batch).prediction
    assert torch.equal(prediction.deltas, prediction.own.outputs["bbox_regression"])
    strides = torch.tensor(detector.spec.strides)[prediction.levels].float()
    corners = prediction.cells.flip(1) * strides[:, None]
    half = strides[:, None] / 2
    assert torch.equal(prediction.priors_xyxy[1], torch.cat([corners - half, corners + half], dim=1))
    y, x = prediction.deltas[0, 5].view(9, 2).unbind(dim=1)
    center = (prediction.boxes_xyxy[0, 5, :2] + prediction.boxes_xyxy[0, 5, 2:]) / 2
    torch.testing.assert_close(center, corners[5] + 8 * torch.stack([x.mean(), y.mean()]))


def test_positives_are_differentiable_and_in_place(detector):
    batch = unequal_batch()
    prediction = detector(batch).prediction
    assignment = detector.assign(prediction, batch)
    positives = detector.positives(prediction, assignment, batch)
    assert len(positives) == int((assignment.matched >= 0).sum()) > 2
    assert torch.equal(positives.targets_xyxy[0], batch.targets[0].boxes_xyxy[positives.ground_truth[0]])
    positives.boxes_xyxy.square().sum().backward()
    head = detector.model.head
    assert all(float(part.grad.abs().max()) > 0 for part in (head.regression_head.correction.bias, head.moment))


def test_tower_can_be_left_and_resumed_at_every_depth(detector):
    batch = unequal_batch()
    features = detector.features(batch)
    whole = detector.predict(features, batch)
    assert detector.tower_depth == 2
    for depth in range(3):
        resumed = detector.finish(detector.tower(features, upto=depth), batch)
        assert torch.equal(resumed.logits, whole.logits)
        assert torch.equal(resumed.boxes_xyxy, whole.boxes_xyxy)
        assert torch.equal(resumed.own.outputs["first_points"], whole.own.outputs["first_points"])
    outputs = detector.model.head(list(features.maps))
    assert torch.equal(outputs["cls_logits"], whole.logits)


def test_head_and_neck_copies(detector):
    batch = unequal_batch()
    detector.eval().requires_grad_(False)
    features = detector.features(batch)
    head = detector.copy_head()
    assert {name.split(".")[1] for name, _ in head.named_parameters()} == {"head"}
    prediction = head.predict(features, batch)
    assert torch.equal(prediction.boxes_xyxy, detector.predict(features, batch).boxes_xyxy)
    head.loss(prediction, batch, head.assign(prediction, batch)).total().backward()
    assert all(parameter.grad is not None for parameter in head.parameters())
    head.model.head.moment.data += 1
    assert detector.model.head.moment.tolist() == [0.0, 0.0]
    fresh = detector.copy_head(fresh=True)
    assert float(fresh.model.head.classification_head.deformable.weight.detach().std()) == pytest.approx(0.01, rel=0.1)
    assert not torch.equal(fresh.predict(features, batch).logits, prediction.logits)

    bottom = detector.backbone_features(batch)
    for mine, theirs in zip(detector.copy_neck()(bottom).maps, features.maps, strict=True):
        assert torch.equal(mine, theirs)
    assert not torch.equal(detector.copy_neck(fresh=True)(bottom).maps[0], features.maps[0])


def test_neck_copy_with_levels_above_the_backbone():
    detector = build_detector(NAME.replace("levels=3-5", "levels=3-6"), ["a"]).eval()
    batch = unequal_batch()
    copied, features = detector.copy_neck()(detector.backbone_features(batch)), detector.features(batch)
    assert len(copied.maps) == 4
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(copied.maps, features.maps, strict=True))


def test_head_inheritance_goes_class_by_class(detector):
    student = build_detector(NAME, ["c", "x", "a"])
    before = student.model.head.classification_head.cls_logits.weight.detach().clone()
    detector.model.head.moment.data += 0.5
    inherited = inherit_head(student, detector)
    assert inherited.skipped == ()
    mine = student.model.head.classification_head.cls_logits.weight
    theirs = detector.model.head.classification_head.cls_logits.weight
    assert torch.equal(mine[[0, 2]], theirs[[2, 0]])
    assert torch.equal(mine[1], before[1])
    assert torch.equal(student.model.head.moment, detector.model.head.moment)


def test_images_of_other_sizes_in_the_batch_change_nothing(detector):
    """On the same canvas, each image's detections are those of the image alone."""
    detector.eval()
    batch = unequal_batch()
    with torch.no_grad():
        together = detector.detect(detector(batch).prediction, batch)
        for index, found in enumerate(together):
            one = Batch(batch.images[[index]], batch.sizes[[index]], (batch.targets[index],), (index,), (batch.views[index],))
            (alone,) = detector.detect(detector(one).prediction, one)
            assert len(found) == len(alone) > 10
            torch.testing.assert_close(found.boxes_xyxy, alone.boxes_xyxy, rtol=1e-5, atol=1e-3)
            torch.testing.assert_close(found.scores, alone.scores, rtol=1e-5, atol=1e-5)
            assert torch.equal(found.labels, alone.labels)


def test_mixed_precision_keeps_boxes_in_float32(detector):
    batch = unequal_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        prediction = detector(batch).prediction
        losses = detector.loss(prediction, batch)
    assert prediction.boxes_xyxy.dtype == prediction.deltas.dtype == torch.float32
    losses.total().backward()
    assert torch.isfinite(losses.total().detach())
    assert all(torch.isfinite(parameter.grad).all() for parameter in detector.parameters())
    exact = detector(batch).prediction
    torch.testing.assert_close(prediction.own.outputs["first_points"], exact.own.outputs["first_points"], rtol=0.1, atol=0.2)
