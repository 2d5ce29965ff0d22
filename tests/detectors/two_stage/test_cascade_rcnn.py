import copy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou, clip_boxes_to_image

from detdistill.detectors.adapters import wrap_torchvision
from detdistill.detectors.build import build_detector
from detdistill.detectors.contract import DetectionHead, HasBackboneFeatures, HasCopies, HasRegions
from detdistill.detectors.inherit import inherit_head
from detdistill.detectors.student_files.models.cascade import StageBoxCoder
from detdistill.detectors.two_stage.cascade_rcnn import CascadeRCNNDetector, wrap_model
from detdistill.errors import ModelError
from detdistill.structures import Assignment, Origin, Regions, Target
from tests.detectors.two_stage.cascade import assert_training_equals_the_reference, jittered, lively
from tests.detectors.two_stage.shared import library_images, make_batch, own_losses
from tests.golden import Golden, assert_golden

SMALL = "cascade_rcnn:resnet10t,channels=8-16-16-16,stem=8,neck=16,levels=3-5,proposals=60,rois=24,mlp=32,score=0"
SIZES = [(128, 128), (96, 120), (120, 100)]
BOXES = [[[10, 12, 50, 60, 0], [70, 20, 120, 55, 1], [30, 70, 64, 110, 0]], [], [[5, 5, 90, 100, 1]]]


@pytest.fixture
def detector():
    torch.manual_seed(0)
    return lively(build_detector(SMALL, ("a", "b"))).train()


@pytest.fixture
def batch():
    return make_batch(SIZES, BOXES)


def chain(prediction):
    """The three stages' predictions."""
    return [prediction.previous.previous, prediction.previous, prediction]


# -------------------------------------------------------------------------------------------------------- golden numbers


def test_deltas_of_each_stage_are_the_released_ones():
    golden = Golden("_cascade")
    height, width = golden["in_image_size"].tolist()
    for stage, stds in enumerate(golden.meta["stds"]):
        coder = StageBoxCoder(stds)
        assert_golden(coder.encode_single(golden["in_gt"], golden["in_proposals"]), golden[f"out_encoded_stage{stage}"])
        decoded = coder.decode_single(golden["in_deltas"], golden["in_proposals"])
        assert_golden(clip_boxes_to_image(decoded, (height, width)), golden[f"out_decoded_stage{stage}"])


def test_assignment_of_each_stage_is_the_released_one(detector):
    golden = Golden("_cascade")
    priors, boxes = golden["in_assign_priors"], golden["in_assign_gt"]
    batch = make_batch([(128, 128)], [[]])
    batch = batch.with_targets([Target(boxes, torch.zeros(len(boxes), dtype=torch.int64), torch.zeros(len(boxes)) > 0)])
    blank = torch.zeros(len(priors), 1, 4, dtype=priors.dtype)
    prediction = None
    for stage, iou in enumerate(golden.meta["iou_thresholds"]):
        detector.model.roi_heads.stages[stage].proposal_matcher = Matcher(iou, iou)
        origin = Origin.given([len(priors)])
        prediction = Regions(priors, origin, blank[:, 0, :3], blank, blank, previous=prediction)
        # there 0 is the background and k the box k - 1
        assert torch.equal(detector.assign(prediction, batch).matched, golden[f"out_assigned_stage{stage}"] - 1)


def test_a_box_shrinks_as_little_as_it_grows():
    box = torch.tensor([[100.0, 100, 200, 300]])
    for stds in ((0.1, 0.1, 0.2, 0.2), (0.033, 0.033, 0.067, 0.067)):
        [small] = StageBoxCoder(stds).decode_single(torch.tensor([[0.0, 0, -1000, -1000]]), box)
        torch.testing.assert_close(small[2:] - small[:2], torch.tensor([100, 200]) * 16 / 1000, rtol=1e-3, atol=0)
        [large] = StageBoxCoder(stds).decode_single(torch.tensor([[0.0, 0, 1000, 1000]]), box)
        torch.testing.assert_close(large[2:] - large[:2], torch.tensor([100, 200]) * 1000 / 16)


# ------------------------------------------------------------------------------------------------------------- training


def test_losses_and_gradients_are_those_of_torchvisions_parts(detector, batch):
    prediction = assert_training_equals_the_reference(detector, batch)
    assert set(detector.loss(prediction, batch).terms) == {
        "loss_objectness",
        "loss_rpn_box_reg",
        *(f"loss_classifier_stage{stage}" for stage in (1, 2, 3)),
        *(f"loss_box_reg_stage{stage}" for stage in (1, 2, 3)),
    }


@pytest.mark.parametrize("boxes", [[[], [], []], [[[70, 20, 120, 55, 1]], [], []]])
def test_losses_with_few_or_no_boxes(detector, boxes):
    prediction = assert_training_equals_the_reference(detector, make_batch(SIZES, boxes))
    if not boxes[0]:
        assert all((stage.origin.ground_truth == -1).all() for stage in chain(prediction))


def test_thresholds_weights_and_stds_of_the_stages(detector, batch):
    """By hand, without the library: labels at 0.5, 0.6, 0.7; deltas of finer scale; weights 1, 0.5, 0.25."""
    for heads in detector.model.roi_heads.stages:  # boxes move a little
        torch.nn.init.normal_(heads.box_predictor.bbox_pred.weight, std=0.1)
    prediction = detector.regions(detector.features(batch), jittered(batch), batch)
    terms = detector.loss(prediction, batch).terms
    counts = []
    for number, stage in enumerate(chain(prediction)):
        deviation = torch.tensor([[0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1], [0.033, 0.033, 0.067, 0.067]][number])
        labels, box_loss = torch.full((len(stage.logits),), 2), torch.zeros(())
        for row, box in enumerate(stage.boxes_xyxy):
            target = batch.targets[int(stage.origin.image[row])]
            overlap, index = box_iou(box[None], target.boxes_xyxy)[0].max(dim=0)
            if overlap >= 0.5 + 0.1 * number:
                labels[row] = target.labels[index]
                wanted = target.boxes_xyxy[index]
                size, goal = box[2:] - box[:2], wanted[2:] - wanted[:2]
                shift = ((wanted[2:] + wanted[:2]) - (box[2:] + box[:2])) / 2 / size
                difference = (torch.cat([shift, (goal / size).log()]) / deviation - stage.deltas[row, 0]).abs()
                box_loss = box_loss + torch.where(difference < 1, difference.square() / 2, difference - 0.5).sum()
        counts.append(int((labels < 2).sum()))
        expected = 0.5**number * F.cross_entropy(stage.logits, labels)
        torch.testing.assert_close(terms[f"loss_classifier_stage{number + 1}"], expected)
        expected = 0.5**number * box_loss / len(labels)
        torch.testing.assert_close(terms[f"loss_box_reg_stage{number + 1}"], expected, rtol=1e-4, atol=1e-6)
    assert 24 >= counts[0] > counts[1] > counts[2] > 3


def test_each_stage_continues_where_the_one_before_ended(detector, batch):
    """A region of a later stage is the refined, clipped region of the same origin; ground truth is inserted anew."""
    stages = chain(own_losses(detector, batch)[2])
    for before, after in pairwise(stages):
        assert after.first is None or after is stages[-1]
        inserted = after.origin.ground_truth >= 0
        for row in range(len(after.logits)):
            image, origin = int(after.origin.image[row]), after.origin
            if inserted[row]:
                assert torch.equal(after.boxes_xyxy[row], batch.targets[image].boxes_xyxy[origin.ground_truth[row]])
                continue
            same = (before.origin.image == image) & (before.origin.level == origin.level[row])
            same &= (before.origin.cell == origin.cell[row]).all(dim=1) & (before.origin.anchor == origin.anchor[row])
            [source] = torch.nonzero(same & (before.origin.ground_truth < 0)).flatten().tolist()
            size = tuple(batch.sizes[image].tolist())
            assert torch.equal(after.boxes_xyxy[row], clip_boxes_to_image(before.refined_xyxy[source, 0].detach(), size))
        assert not after.boxes_xyxy.requires_grad
    for stage in stages:
        assert torch.bincount(stage.origin.image, minlength=3).max() <= 24
        assert sorted(stage.origin.ground_truth[stage.origin.ground_truth >= 0].tolist()) == [0, 0, 1, 2]


def test_crowd_boxes_are_left_out_and_indices_count_all_boxes(detector, batch):
    crowd = replace(batch.targets[0], crowd=torch.tensor([True, False, False]))
    crowded = batch.with_targets([crowd, *batch.targets[1:]])
    prediction = assert_training_equals_the_reference(detector, crowded)
    matched = detector.assign(prediction, crowded).matched[prediction.origin.image == 0]
    assert set(matched.tolist()) == {-1, 1, 2}


# ---------------------------------------------------------------------------------------------------- assignment as a value


def test_own_assignment_gives_the_own_loss_and_draws_nothing(detector, batch):
    terms, _, prediction = own_losses(detector, batch)
    before = torch.get_rng_state()
    again = detector.loss(prediction, batch, detector.assign(prediction, batch)).terms
    assert torch.equal(before, torch.get_rng_state())
    for name, value in terms.items():
        assert torch.equal(again[name], value)


def test_a_prediction_of_an_earlier_stage_is_assigned_as_there(detector, batch):
    prediction = detector.regions(detector.features(batch), jittered(batch), batch)
    for number, stage in enumerate(chain(prediction)):
        matched = detector.assign(stage, batch).matched
        for image in (0, 2):
            mine = stage.origin.image == image
            overlap, index = box_iou(stage.boxes_xyxy[mine], batch.targets[image].boxes_xyxy).max(dim=1)
            assert torch.equal(matched[mine], torch.where(overlap >= 0.5 + 0.1 * number, index, -1))
    terms = detector.loss(prediction, batch).terms
    earlier = detector.loss(prediction.previous, batch).terms
    assert earlier.keys() == {name for name in terms if not name.endswith("3")}
    assert all(torch.equal(terms[name], value) for name, value in earlier.items())


def test_foreign_assignment_is_that_of_the_last_stage(detector, batch):
    terms, _, prediction = own_losses(detector, batch)
    matched = torch.full_like(prediction.origin.image, -1)
    matched[prediction.origin.image == 2] = 0
    foreign = detector.loss(prediction, batch, Assignment(matched)).terms
    for name in terms:
        if not name.endswith("3"):
            assert torch.equal(foreign[name], terms[name])
    labels = torch.where(matched >= 0, 1, 2)
    torch.testing.assert_close(foreign["loss_classifier_stage3"], 0.25 * F.cross_entropy(prediction.logits, labels))
    where = matched >= 0
    where &= (prediction.boxes_xyxy[:, 2:] > prediction.boxes_xyxy[:, :2]).all(dim=1)
    boxes = batch.targets[2].boxes_xyxy.expand(int(where.sum()), 4)
    encoded = detector.model.roi_heads.box_coder.encode_single(boxes, prediction.boxes_xyxy[where])
    expected = F.smooth_l1_loss(prediction.deltas[where, 0], encoded, reduction="sum") / len(matched)
    torch.testing.assert_close(foreign["loss_box_reg_stage3"], 0.25 * expected)


def test_ignored_regions_weights_and_normalizer(detector, batch):
    prediction = own_losses(detector, batch)[2]
    own, count = detector.assign(prediction, batch), len(prediction.logits)
    name = "loss_classifier_stage3"
    everything = detector.loss(prediction, batch, own).terms[name] * count
    half = torch.arange(count) < 20
    parts = [detector.loss(prediction, batch, own.as_ignored(where)).terms[name] for where in (half, ~half)]
    torch.testing.assert_close((count - 20) * parts[0] + 20 * parts[1], everything)
    weighted = Assignment(own.matched, torch.full((count,), 3.0), torch.tensor(9.0))
    torch.testing.assert_close(detector.loss(prediction, batch, weighted).terms[name], everything / 3)


def test_an_empty_region_has_no_box_loss(detector, batch):
    """A box refined to beyond the image is clipped to nothing; a foreign assignment may still name it."""
    given = [torch.tensor([[10.0, 10, 10, 40], [10, 10, 50, 50]]), torch.zeros(0, 4), torch.zeros(0, 4)]
    prediction = detector.regions(detector.features(batch), given, batch).previous.previous
    both, second = (detector.loss(prediction, batch, Assignment(torch.tensor(m))).terms for m in ([0, 0], [-1, 0]))
    assert torch.equal(both["loss_box_reg_stage1"], second["loss_box_reg_stage1"])
    assert torch.isfinite(both["loss_box_reg_stage1"])
    assert float(both["loss_box_reg_stage1"].detach()) > 0


def test_positives_are_the_refined_boxes(detector, batch):
    prediction = own_losses(detector, batch)[2]
    assignment = detector.assign(prediction, batch)
    positives = detector.positives(prediction, assignment, batch)
    assert prediction.deltas.shape[1:] == (1, 4)
    assert len(positives) == int((assignment.matched >= 0).sum()) >= 4
    assert torch.equal(positives.boxes_xyxy, prediction.refined_xyxy[positives.index, 0])
    for row in range(len(positives)):
        target = batch.targets[int(positives.image[row])]
        assert torch.equal(positives.targets_xyxy[row], target.boxes_xyxy[positives.ground_truth[row]])
        assert positives.labels[row] == target.labels[positives.ground_truth[row]]
    assert torch.autograd.grad(positives.boxes_xyxy.sum(), prediction.deltas)[0].abs().sum() > 0


# ------------------------------------------------------------------------------------------------------------ inference


@pytest.mark.parametrize("boxes", [BOXES, [[], [], []]])
def test_detections_are_the_models(detector, boxes):
    batch = make_batch(SIZES, boxes)
    detector.eval()
    with torch.no_grad():
        expected = detector.model(library_images(batch))
        prediction = detector(batch).prediction
        found = detector.detect(prediction, batch)
    for mine, theirs in zip(found, expected, strict=True):
        assert len(mine) > 10
        assert torch.equal(mine.boxes_xyxy, theirs["boxes"])
        assert torch.equal(mine.scores, theirs["scores"])
        assert torch.equal(mine.labels, theirs["labels"] - 1)


def test_scores_are_the_softmax_of_the_mean_logits(detector, batch):
    detector.eval()
    with torch.no_grad():
        prediction = detector(batch).prediction
        found = detector.detect(prediction, batch)
    stages = chain(prediction)
    mean = torch.stack([stage.logits for stage in stages]).mean(dim=0)
    scores = mean.softmax(dim=1)
    assert not torch.allclose(scores, prediction.logits.softmax(dim=1), atol=1e-2)
    for image, mine in enumerate(found):
        rows = torch.nonzero(prediction.origin.image == image).flatten()
        boxes = clip_boxes_to_image(prediction.refined_xyxy[rows, 0], tuple(batch.sizes[image].tolist()))
        for index in range(0, len(mine), 5):
            row = rows[int((boxes - mine.boxes_xyxy[index]).abs().sum(dim=1).argmin())]
            assert float(mine.scores[index]) == pytest.approx(float(scores[row, mine.labels[index]]), rel=1e-5)
            origin = mine.origin
            assert torch.equal(origin.cell[index], prediction.origin.cell[row])
            assert origin.level[index] == prediction.origin.level[row] >= 0


def test_a_sampled_region_is_scored_by_the_stages_it_went_through(detector, batch):
    for heads, count in zip(detector.model.roi_heads.stages, (24, 16, 12), strict=True):
        heads.fg_bg_sampler.batch_size_per_image = count
    prediction = own_losses(detector, batch)[2]
    stages = [[(key(stage.origin, row), stage.logits[row]) for row in range(len(stage.logits))] for stage in chain(prediction)]
    assert [len(rows) for rows in stages] == [72, 48, 36]
    known = []
    for row in range(36):
        logits = [dict(rows)[key(prediction.origin, row)] for rows in stages if key(prediction.origin, row) in dict(rows)]
        known.append(len(logits))
        expected = torch.stack(logits).mean(dim=0)
        one = Regions.stack(prediction.split(3))  # as it comes out of a cache
        torch.testing.assert_close(detector._detection_logits(one)[row], expected)
    assert known.count(3) >= 32
    assert all(len(found) > 0 for found in detector.detect(prediction, batch))


def key(origin, row):
    return (
        *(int(getattr(origin, name)[row]) for name in ("image", "level", "anchor", "ground_truth")),
        *origin.cell[row].tolist(),
    )


def test_regions_on_given_boxes(detector, batch):
    detector.eval()
    given = [torch.tensor([[3.0, 4, 40, 50], [60, 60, 120, 128]]), torch.zeros(0, 4), torch.tensor([[0.0, 0, 100, 120]])]
    sizes = [tuple(row) for row in batch.sizes.tolist()]
    with torch.no_grad():
        features = detector.features(batch)
        stages = chain(detector.regions(features, given, batch))
        maps, boxes = dict(zip(("0", "1", "2"), features.maps, strict=True)), given
        for stage, heads in zip(stages, detector.model.roi_heads.stages, strict=True):
            pooled = heads.box_roi_pool(maps, boxes, sizes)
            logits, deltas = heads.box_predictor(heads.box_head(pooled))
            refined = heads.box_coder.decode(deltas, boxes)
            assert torch.equal(stage.boxes_xyxy, torch.cat(boxes))
            assert torch.equal(stage.pooled, pooled)
            assert torch.equal(stage.embedding, heads.box_head(pooled))
            assert torch.equal(stage.logits, logits.roll(-1, dims=1))
            assert torch.equal(stage.deltas[:, 0], deltas)
            assert torch.equal(stage.refined_xyxy, refined)
            assert stage.origin.image.tolist() == [0, 0, 2]
            assert stage.origin.level.tolist() == [-1, -1, -1]
            boxes = [clip_boxes_to_image(b, size) for b, size in zip(refined[:, 0].split([2, 0, 1]), sizes, strict=True)]
    assert stages[-1].first is None


def test_regions_sample_nothing_in_training_mode_and_need_no_boxes(detector, batch):
    features = detector.features(batch)
    given = [torch.tensor([[3.0, 4, 40, 50]])] * 3
    for stage in chain(detector.regions(features, given, batch)):
        assert stage.origin.image.tolist() == [0, 1, 2]
    nothing = detector.regions(features, [torch.zeros(0, 4)] * 3, batch)
    assert nothing.refined_xyxy.shape == (0, 1, 4)
    losses = detector.loss(nothing, batch)
    losses.total().backward()
    assert float(losses.total().detach()) == 0
    assert detector.model.roi_heads.earlier[0].box_head.fc6.weight.grad is not None
    assert [len(found) for found in detector.detect(nothing, batch)] == [0, 0, 0]


def test_an_image_alone_is_detected_as_in_the_batch(detector, batch):
    detector.eval()
    with torch.no_grad():
        together = detector.detect(detector(batch).prediction, batch)
        for index in range(3):
            alone = replace(
                batch,
                images=batch.images[index : index + 1],
                sizes=batch.sizes[index : index + 1],
                targets=batch.targets[index : index + 1],
                ids=batch.ids[index : index + 1],
                views=batch.views[index : index + 1],
            )
            [found] = detector.detect(detector(alone).prediction, alone)
            torch.testing.assert_close(found.boxes_xyxy, together[index].boxes_xyxy, rtol=1e-5, atol=1e-3)
            torch.testing.assert_close(found.scores, together[index].scores, rtol=1e-5, atol=1e-5)


def test_cut_and_stacked_prediction_detects_the_same(detector, batch):
    detector.eval()
    with torch.no_grad():
        prediction = detector(batch).prediction
    stacked = Regions.stack(prediction.split(3))
    for mine, other in zip(detector.detect(stacked, batch), detector.detect(prediction, batch), strict=True):
        assert torch.equal(mine.boxes_xyxy, other.boxes_xyxy)
        assert torch.equal(mine.scores, other.scores)


def test_half_precision_maps_are_decoded_in_full(detector, batch):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        prediction = detector(batch).prediction
        total = detector.loss(prediction, batch).total()
    for stage in chain(prediction):
        assert stage.boxes_xyxy.dtype == stage.refined_xyxy.dtype == stage.logits.dtype == torch.float32
    total.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in detector.parameters())


def test_the_model_alone_has_no_losses(detector, batch):
    with pytest.raises(RuntimeError, match=r"CascadeRCNN alone has no losses; call eval\(\) first"):
        detector.model(library_images(batch))


# ------------------------------------------------------------------------------------------------------------ capabilities


def test_capabilities_and_options(detector):
    for capability in (HasRegions, HasCopies, HasBackboneFeatures):
        assert isinstance(detector, capability)
    stages = detector.model.roi_heads.stages
    assert [heads.proposal_matcher.high_threshold for heads in stages] == [0.5, 0.6, 0.7]
    assert [heads.fg_bg_sampler.batch_size_per_image for heads in stages] == [24, 24, 24]
    assert detector.model.roi_heads.box_head.fc7.out_features == 32
    assert detector.model.rpn._post_nms_top_n == {"training": 60, "testing": 60}
    limited = build_detector(SMALL + ",dets=3", ("a", "b")).eval()
    batch = make_batch(SIZES, BOXES)
    assert [len(found) for found in limited.detect(limited(batch).prediction, batch)] == [3, 3, 3]
    with pytest.raises(ModelError, match="cascade_rcnn has no option 'convs'"):
        build_detector(SMALL + ",convs=2", ("a", "b"))
    with pytest.raises(ModelError, match="1 outputs of the model have no class"):
        wrap_model(detector.model, ("a",), "one")
    assert type(wrap_torchvision(detector.model, ("a", "b"), "two")) is CascadeRCNNDetector


def test_copied_head_is_equal_and_apart(detector, batch):
    detector.requires_grad_(False)
    head = detector.copy_head()
    assert isinstance(head, DetectionHead)
    features = detector.features(batch)
    predictions = []
    for part in (head, detector):
        torch.manual_seed(1)
        predictions.append(part.predict(features, batch))
    for mine, other in zip(*map(chain, predictions), strict=True):
        assert torch.equal(mine.logits, other.logits)
        assert torch.equal(mine.boxes_xyxy, other.boxes_xyxy)
    before = copy.deepcopy(detector.state_dict())
    head.loss(predictions[0], batch).total().backward()
    assert all(parameter.grad is not None for parameter in head.parameters())
    torch.optim.SGD(head.parameters(), lr=1.0).step()
    for name, value in detector.state_dict().items():
        assert torch.equal(value, before[name])


def test_fresh_head_and_neck_are_drawn_anew(detector, batch):
    head = detector.copy_head(fresh=True)
    kept = dict(detector.copy_head().named_parameters())
    for name, parameter in head.named_parameters():
        assert parameter.shape == kept[name].shape
        if parameter.ndim > 1:
            assert not torch.equal(parameter, kept[name])
    for heads in head.model.roi_heads.stages:
        assert float(heads.box_predictor.bbox_pred.weight.detach().std()) == pytest.approx(0.001, rel=0.3)
        assert float(heads.box_predictor.cls_score.weight.detach().std()) == pytest.approx(0.01, rel=0.3)
    detector.eval()
    bottom, features = detector.backbone_features(batch), detector.features(batch)
    for mine, fresh, other in zip(
        detector.copy_neck()(bottom).maps, detector.copy_neck(fresh=True)(bottom).maps, features.maps, strict=True
    ):
        assert torch.equal(mine, other)
        assert not torch.equal(fresh, other)


def test_heads_are_inherited_class_by_class(detector):
    student = build_detector(SMALL, ("b", "c"))
    inherited = inherit_head(student, detector)
    assert not [name for name, _ in inherited.skipped]
    for mine, theirs in zip(student.model.roi_heads.stages, detector.model.roi_heads.stages, strict=True):
        assert torch.equal(mine.box_predictor.cls_score.weight[[0, 1]], theirs.box_predictor.cls_score.weight[[0, 2]])
        assert torch.equal(mine.box_predictor.bbox_pred.weight, theirs.box_predictor.bbox_pred.weight)


def test_a_copied_region_head_has_all_stages(detector, batch):
    head = detector.copy_region_head()
    features, boxes = detector.features(batch), [target.boxes_xyxy for target in batch.targets]
    found = head.regions(features, boxes, batch)
    for mine, other in zip(chain(found), chain(detector.regions(features, boxes, batch)), strict=True):
        assert torch.equal(mine.logits, other.logits)
    losses = head.loss(found, batch)
    assert list(losses.terms) == [f"loss_{name}_stage{stage}" for stage in (1, 2, 3) for name in ("classifier", "box_reg")]
    losses.total().backward()
    assert all(parameter.grad is not None for parameter in head.parameters())
