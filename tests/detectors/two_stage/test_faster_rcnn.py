import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.ops import box_iou, clip_boxes_to_image

from detdistill.detectors.build import build_detector
from detdistill.detectors.contract import DetectionHead, HasBackboneFeatures, HasCopies, HasRegions
from detdistill.detectors.load import load_detector
from detdistill.detectors.save import save_student
from detdistill.detectors.two_stage.faster_rcnn import wrap_model
from detdistill.errors import DataError, ModelError
from detdistill.structures import Assignment, Regions, Target
from tests.detectors.two_stage.shared import assert_same_training, library_images, make_batch, own_losses

SMALL = "faster_rcnn:resnet10t,channels=8-16-16-16,stem=8,neck=16,levels=3-5,proposals=60,rois=24,mlp=32,score=0"
SIZES = [(128, 128), (96, 120), (120, 100)]
BOXES = [[[10, 12, 50, 60, 0], [70, 20, 120, 55, 1], [30, 70, 64, 110, 0]], [], [[5, 5, 90, 100, 1]]]


@pytest.fixture
def detector():
    torch.manual_seed(0)
    return build_detector(SMALL, ("a", "b")).train()


@pytest.fixture
def batch():
    return make_batch(SIZES, BOXES)


# ------------------------------------------------------------------------------------------------- equal to the library


def test_losses_and_gradients_are_the_librarys(detector, batch):
    assert_same_training(detector, batch)


def test_losses_without_any_box_are_the_librarys(detector):
    prediction = assert_same_training(detector, make_batch(SIZES, [[], [], []]))
    assert (prediction.origin.ground_truth == -1).all()


def test_losses_with_default_levels_are_the_librarys(batch):
    torch.manual_seed(0)
    detector = build_detector("faster_rcnn:resnet10t,channels=8-16-16-16,neck=16,proposals=40,rois=16,mlp=32", ("a", "b"))
    assert detector.spec.strides == (4, 8, 16, 32, 64)
    assert detector.model.rpn.anchor_generator.sizes == ((32,), (64,), (128,), (256,), (512,))
    assert_same_training(detector.train(), batch)


def test_a_batch_of_an_odd_size_is_padded_as_by_the_library(detector):
    whole = make_batch([(97, 121), (96, 120), (90, 100)], [*BOXES[1:], []])
    cut = replace(whole, images=whole.images[:, :, :97, :121])
    assert_same_training(detector, cut)


def test_crowd_boxes_are_left_out_and_indices_count_all_boxes(detector, batch):
    crowd = replace(batch.targets[0], crowd=torch.tensor([True, False, False]))
    crowded = batch.with_targets([crowd, *batch.targets[1:]])
    prediction = assert_same_training(detector, crowded)
    matched = detector.assign(prediction, crowded).matched[prediction.origin.image == 0]
    assert set(matched.tolist()) == {-1, 1, 2}


@pytest.mark.parametrize("boxes", [BOXES, [[], [], []]])
def test_detections_are_the_librarys(detector, boxes):
    batch = make_batch(SIZES, boxes)
    detector.eval()
    with torch.no_grad():
        expected = detector.model(library_images(batch))
        found = detector.detect(detector(batch).prediction, batch)
    for mine, theirs in zip(found, expected, strict=True):
        assert len(mine) > 0
        assert torch.equal(mine.boxes_xyxy, theirs["boxes"])
        assert torch.equal(mine.scores, theirs["scores"])
        assert torch.equal(mine.labels, theirs["labels"] - 1)


@pytest.mark.parametrize("training", [True, False])
def test_proposals_are_the_librarys(detector, batch, training):
    detector.train(training)
    features = detector.features(batch)
    images, _ = detector.model.transform(library_images(batch))
    detector.model.eval() if not training else detector.model.rpn.train()
    names = [*map(str, range(len(features.maps)))]
    torch.manual_seed(3)
    targets = [{"boxes": target.boxes_xyxy} for target in batch.targets]
    expected, _ = detector.model.rpn(images, dict(zip(names, features.maps, strict=True)), targets)
    boxes, origins = detector.proposals(features, batch)
    for mine, theirs, origin in zip(boxes, expected, origins, strict=True):
        assert torch.equal(mine, theirs)
        assert len(mine) == len(origin.level) <= 60


def test_regions_on_given_boxes_are_the_librarys_parts(detector, batch):
    detector.eval()
    given = [torch.tensor([[3.0, 4, 40, 50], [60, 60, 120, 128]]), torch.zeros(0, 4), torch.tensor([[0.0, 0, 100, 120]])]
    with torch.no_grad():
        features = detector.features(batch)
        regions = detector.regions(features, given, batch)
        heads, sizes = detector.model.roi_heads, [tuple(row) for row in batch.sizes.tolist()]
        maps = dict(zip(("0", "1", "2"), features.maps, strict=True))
        pooled = heads.box_roi_pool(maps, given, sizes)
        logits, deltas = heads.box_predictor(heads.box_head(pooled))
        boxes = heads.box_coder.decode(deltas, given)
    assert regions.origin.image.tolist() == [0, 0, 2]
    assert regions.origin.level.tolist() == [-1, -1, -1]
    assert torch.equal(regions.pooled, pooled)
    assert torch.equal(regions.embedding, heads.box_head(pooled))
    assert torch.equal(regions.logits, logits.roll(-1, dims=1))
    assert torch.equal(regions.deltas.flatten(1), deltas[:, 4:])
    assert torch.equal(regions.refined_xyxy, boxes[:, 1:])
    assert regions.first is None


def test_whole_model_of_torchvision_by_name(batch):
    torch.manual_seed(0)
    detector = build_detector("torchvision:fasterrcnn_mobilenet_v3_large_320_fpn", ("a", "b")).train()
    assert detector.spec.family == "regions"
    assert_same_training(detector, batch)


def test_outputs_that_are_no_class_count_as_background(batch):
    """COCO's weights have 91 outputs for 80 classes: scores stay those of the softmax over all of them."""
    torch.manual_seed(0)
    model = build_detector(SMALL, tuple("abcde")).model.eval()
    torch.nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight, std=0.2)
    detector = wrap_model(model, ("first", "second"), "six outputs", columns=(4, 1))
    with torch.no_grad():
        prediction = detector(batch).prediction
        theirs = model.roi_heads.box_predictor(prediction.embedding)[0].softmax(dim=1)
        expected = model(library_images(batch))
    mine = prediction.logits.softmax(dim=1)
    torch.testing.assert_close(mine[:, :2], theirs[:, [4, 1]])
    torch.testing.assert_close(mine[:, 2], theirs[:, [0, 2, 3, 5]].sum(dim=1))
    for found, result in zip(detector.detect(prediction, batch), expected, strict=True):
        best = result["boxes"][result["labels"] == 4][0]
        assert found.boxes_xyxy[found.labels == 0][0].tolist() == pytest.approx(best.tolist(), abs=1e-3)


# ----------------------------------------------------------------------------------------------------------- the first stage


def test_every_proposal_comes_from_its_origin(detector, batch):
    """The anchor of the origin's cell, moved by the deltas predicted there and clipped, is the box."""
    torch.nn.init.normal_(detector.model.rpn.head.cls_logits.weight)
    torch.nn.init.normal_(detector.model.rpn.head.bbox_pred.weight, std=0.3)
    detector.eval()
    features = detector.features(batch)
    prediction = detector.predict(features, batch)
    origin, model = prediction.origin, detector.model
    assert (origin.level >= 0).all()
    assert len(set(origin.level.tolist())) == 3
    raw = model.rpn.head(list(features.maps))[1]
    for index in range(len(origin.image)):
        image, level, (row, column), anchor = (value[index].tolist() for value in (*vars_of(origin),))
        stride = features.strides[level]
        prior = model.rpn.anchor_generator.cell_anchors[level][anchor] + stride * torch.tensor([column, row, column, row])
        delta = raw[level][image, 4 * anchor : 4 * anchor + 4, row, column]
        box = model.rpn.box_coder.decode_single(delta[None], prior[None])
        box = clip_boxes_to_image(box, tuple(batch.sizes[image].tolist()))[0]
        torch.testing.assert_close(prediction.boxes_xyxy[index], box, rtol=1e-5, atol=1e-4)


def vars_of(origin):
    return origin.image, origin.level, origin.cell, origin.anchor


def test_detections_keep_the_origin_of_their_proposal(detector, batch):
    detector.eval()
    prediction = detector(batch).prediction
    for image, found in enumerate(detector.detect(prediction, batch)):
        assert (found.origin.image == image).all()
        known = torch.cat([value.reshape(len(prediction.logits), -1) for value in vars_of(prediction.origin)], dim=1)
        scores = F.softmax(prediction.logits.detach(), dim=1)
        for index in range(0, len(found), 7):
            key = torch.cat([value[index].reshape(-1) for value in vars_of(found.origin)])
            [region] = torch.nonzero((known == key).all(dim=1)).flatten().tolist()
            label = int(found.labels[index])
            assert float(found.scores[index]) == pytest.approx(float(scores[region, label]), rel=1e-6)
            clipped = clip_boxes_to_image(prediction.refined_xyxy[region, label][None], tuple(batch.sizes[image].tolist()))
            assert torch.equal(found.boxes_xyxy[index], clipped[0])


def test_inserted_ground_truth_is_marked(detector, batch):
    prediction = own_losses(detector, batch)[2]
    origin = prediction.origin
    inserted = torch.nonzero(origin.ground_truth >= 0).flatten()
    assert len(inserted) == 4
    for index in inserted.tolist():
        box = batch.targets[origin.image[index]].boxes_xyxy[origin.ground_truth[index]]
        assert torch.equal(prediction.boxes_xyxy[index], box)
        assert (origin.level[index], origin.anchor[index], origin.cell[index].tolist()) == (-1, -1, [-1, -1])
    assert torch.bincount(origin.image, minlength=3).tolist() == [24, 24, 24]


def test_first_stage_as_dense(detector, batch):
    rpn = own_losses(detector, batch)[2].first
    cells = 16 * 16 + 8 * 8 + 4 * 4
    assert rpn.logits.shape == (3, 3 * cells, 1)
    assert torch.bincount(rpn.levels).tolist() == [768, 192, 48]
    assert [rpn.cells[index].tolist() for index in (0, 3, 768, 768 + 3 * 9)] == [[0, 0], [0, 1], [0, 0], [1, 1]]
    centers = (rpn.priors_xyxy[0, :, :2] + rpn.priors_xyxy[0, :, 2:]) / 2
    strides = torch.tensor([8, 16, 32])[rpn.levels]
    torch.testing.assert_close(centers, (rpn.cells.flip(1) * strides[:, None]).float())
    areas = (rpn.priors_xyxy[0, :, 2:] - rpn.priors_xyxy[0, :, :2]).prod(dim=1).sqrt()
    torch.testing.assert_close(areas, torch.tensor([24.0, 48, 96])[rpn.levels], rtol=0.03, atol=0)
    assert rpn.boxes_xyxy.requires_grad


# ---------------------------------------------------------------------------------------------------- assignment as a value


def test_own_assignment_gives_the_own_loss_and_draws_nothing(detector, batch):
    terms, _, prediction = own_losses(detector, batch)
    before = torch.get_rng_state()
    assignment = detector.assign(prediction, batch)
    again = detector.loss(prediction, batch, assignment).terms
    assert torch.equal(before, torch.get_rng_state())
    for name, value in terms.items():
        assert torch.equal(again[name], value)
    for image, target in enumerate(batch.targets):
        mine = prediction.origin.image == image
        matched = assignment.matched[mine]
        if len(target) == 0:
            assert (matched == -1).all()
            continue
        best, index = box_iou(prediction.boxes_xyxy[mine], target.boxes_xyxy).max(dim=1)
        assert torch.equal(matched, torch.where(best >= 0.5, index, -1))


def test_assign_with_other_targets(detector, batch):
    prediction = own_losses(detector, batch)[2]
    box = prediction.boxes_xyxy[prediction.origin.image == 1][:1]
    other = Target(box, torch.tensor([1]), torch.tensor([False]))
    changed = batch.with_targets([batch.targets[0], other, batch.targets[2]])
    assignment = detector.assign(prediction, changed)
    mine = prediction.origin.image == 1
    assert torch.equal(assignment.matched[mine] == 0, box_iou(prediction.boxes_xyxy[mine], box)[:, 0] >= 0.5)
    positives = detector.positives(prediction, assignment, changed)
    assert (positives.labels[positives.image == 1] == 1).all()
    losses = detector.loss(prediction, changed)
    assert not torch.equal(losses.terms["loss_classifier"], detector.loss(prediction, batch).terms["loss_classifier"])


def test_foreign_assignment_replaces_the_regions_and_spares_the_first_stage(detector, batch):
    terms, _, prediction = own_losses(detector, batch)
    matched = torch.full_like(prediction.origin.image, -1)
    matched[prediction.origin.image == 2] = 0
    foreign = detector.loss(prediction, batch, Assignment(matched)).terms
    for name in ("loss_objectness", "loss_rpn_box_reg"):
        assert torch.equal(foreign[name], terms[name])
    # torchvision's own loss, told the same labels: class 1 of ours is 2 of theirs
    logits = prediction.logits.roll(1, dims=1)
    deltas = F.pad(prediction.deltas.flatten(1), (4, 0))
    labels = torch.where(matched >= 0, 2, 0)
    boxes = batch.targets[2].boxes_xyxy.expand(len(matched), 4)
    encoded = detector.model.roi_heads.box_coder.encode_single(boxes, prediction.boxes_xyxy)
    classifier, box = fastrcnn_loss(logits, deltas, [labels], [encoded])
    torch.testing.assert_close(foreign["loss_classifier"], classifier)
    torch.testing.assert_close(foreign["loss_box_reg"], box)


def test_ignored_regions_weights_and_normalizer(detector, batch):
    prediction = own_losses(detector, batch)[2]
    own = detector.assign(prediction, batch)
    everything = detector.loss(prediction, batch, own).terms["loss_classifier"] * 72
    half = torch.arange(72) < 36
    parts = [detector.loss(prediction, batch, own.as_ignored(where)).terms["loss_classifier"] for where in (half, ~half)]
    torch.testing.assert_close(36 * (parts[0] + parts[1]), everything)
    weighted = Assignment(own.matched, torch.full((72,), 3.0), torch.tensor(9.0))
    torch.testing.assert_close(detector.loss(prediction, batch, weighted).terms["loss_classifier"], everything / 3)


def test_positives_are_the_refined_boxes_of_the_right_class(detector, batch):
    prediction = own_losses(detector, batch)[2]
    assignment = detector.assign(prediction, batch)
    positives = detector.positives(prediction, assignment, batch)
    assert len(positives) == int((assignment.matched >= 0).sum()) >= 4
    for row, region in enumerate(positives.index.tolist()):
        target = batch.targets[prediction.origin.image[region]]
        label = int(target.labels[assignment.matched[region]])
        assert int(positives.labels[row]) == label
        assert torch.equal(positives.boxes_xyxy[row], prediction.refined_xyxy[region, label])
        assert torch.equal(positives.targets_xyxy[row], target.boxes_xyxy[assignment.matched[region]])
    assert torch.autograd.grad(positives.boxes_xyxy.sum(), prediction.deltas)[0].abs().sum() > 0


# ------------------------------------------------------------------------------------------------------ eval, cutting, errors


def test_eval_mode_needs_no_targets_and_inserts_nothing(detector, batch):
    detector.eval()
    unlabeled = batch.with_targets(batch.targets)
    unlabeled = replace(unlabeled, targets=())
    prediction = detector(unlabeled).prediction
    assert (prediction.origin.ground_truth == -1).all()
    assert torch.equal(prediction.logits, detector(batch).prediction.logits)
    assert len(detector.detect(prediction, unlabeled)) == 3


def test_training_without_targets_is_refused(detector, batch):
    with pytest.raises(DataError, match=r"0 targets for 3 images; give targets, or call eval\(\) first"):
        detector(replace(batch, targets=()))


def test_loss_in_eval_mode_samples_anchors_then(detector, batch):
    detector.eval()
    prediction = detector(batch).prediction
    terms = detector.loss(prediction, batch).terms
    assert terms.keys() == {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg"}
    assert all(torch.isfinite(term) for term in terms.values())


def test_cut_and_stacked_prediction_detects_the_same(detector, batch):
    detector.eval()
    prediction = detector(batch).prediction
    stacked = Regions.stack(prediction.split(3))
    for mine, other in zip(detector.detect(stacked, batch), detector.detect(prediction, batch), strict=True):
        assert torch.equal(mine.boxes_xyxy, other.boxes_xyxy)
        assert torch.equal(mine.scores, other.scores)
        assert torch.equal(mine.origin.cell, other.origin.cell)


def test_half_precision_maps_are_decoded_in_full(detector, batch):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        prediction = detector(batch).prediction
        total = detector.loss(prediction, batch).total()
    assert prediction.boxes_xyxy.dtype == prediction.first.boxes_xyxy.dtype == prediction.logits.dtype == torch.float32
    total.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in detector.parameters())


# ------------------------------------------------------------------------------------------------------------ capabilities


def test_capabilities(detector):
    for capability in (HasRegions, HasCopies, HasBackboneFeatures):
        assert isinstance(detector, capability)


def test_backbone_features_then_neck_are_the_features(detector, batch):
    detector.eval()
    backbone = detector.backbone_features(batch)
    assert backbone.strides == (8, 16, 32)
    assert backbone.channels == (16, 16, 16)
    for mine, other in zip(detector.copy_neck()(backbone).maps, detector.features(batch).maps, strict=True):
        assert torch.equal(mine, other)


def test_copied_head_is_equal_and_apart(detector, batch):
    head = detector.copy_head()
    assert isinstance(head, DetectionHead)
    features = detector.features(batch)
    torch.manual_seed(1)
    mine = head.predict(features, batch)
    torch.manual_seed(1)
    other = detector.predict(features, batch)
    assert torch.equal(mine.logits, other.logits)
    for name, term in head.loss(mine, batch).terms.items():
        assert torch.equal(term, detector.loss(other, batch).terms[name])
    before = copy.deepcopy(detector.state_dict())
    head.loss(mine, batch).total().backward()
    torch.optim.SGD(head.parameters(), lr=1.0).step()
    for name, value in detector.state_dict().items():
        assert torch.equal(value, before[name])


def test_copy_of_a_frozen_detector_can_be_trained(detector):
    detector.eval().requires_grad_(False)
    assert all(parameter.requires_grad for parameter in detector.copy_head().parameters())


def test_fresh_head_differs_and_runs_on_another_pyramid(detector, batch):
    head = detector.copy_head(fresh=True)
    kept = dict(detector.copy_head().named_parameters())
    for name, parameter in head.named_parameters():
        assert parameter.shape == kept[name].shape
        if parameter.ndim > 1:
            assert not torch.equal(parameter, kept[name])
    assert float(head.model.rpn.head.cls_logits.weight.detach().std()) == pytest.approx(0.01, rel=0.3)
    finer = replace(
        detector.features(batch),
        maps=tuple(F.interpolate(level, scale_factor=2) for level in detector.features(batch).maps),
        strides=(4, 8, 16),
    )
    prediction = head.predict(finer, batch)
    assert head.model.roi_heads.box_roi_pool.scales == [0.25, 0.125, 0.0625]
    stride = torch.tensor(finer.strides)[prediction.first.levels]
    centers = (prediction.first.priors_xyxy[0, :, :2] + prediction.first.priors_xyxy[0, :, 2:]) / 2
    torch.testing.assert_close(centers, (prediction.first.cells.flip(1) * stride[:, None]).float())
    head.loss(prediction, batch).total().backward()
    assert all(parameter.grad is not None for parameter in head.parameters())


def test_options(detector):
    model = detector.model
    assert model.rpn._post_nms_top_n == {"training": 60, "testing": 60}
    assert model.roi_heads.fg_bg_sampler.batch_size_per_image == 24
    assert model.roi_heads.box_head.fc7.out_features == 32
    assert model.roi_heads.score_thresh == 0
    limited = build_detector(SMALL + ",dets=3", ("a", "b")).eval()
    batch = make_batch(SIZES, BOXES)
    assert [len(found) for found in limited.detect(limited(batch).prediction, batch)] == [3, 3, 3]


def test_keypoints_are_refused():
    name = "keypointrcnn_resnet50_fpn"
    model = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=2)
    with pytest.raises(ModelError, match="keypoints are not supported; use a Faster R-CNN or Mask R-CNN"):
        wrap_model(model, ("person",), name)


def test_option_without_use_is_refused():
    with pytest.raises(ModelError, match="faster_rcnn has no option 'convs'"):
        build_detector(SMALL + ",convs=2", ("a", "b"))


def test_the_small_model_of_the_documentation_has_two_million_parameters():
    name = "faster_rcnn:resnet10t,channels=32-64-128-256,neck=64,levels=3-5,proposals=100,rois=48,mlp=256"
    detector = build_detector(name, tuple("0123456789"))
    assert sum(parameter.numel() for parameter in detector.parameters()) == pytest.approx(2.3e6, rel=0.05)
    assert detector.spec.softmax
    assert detector.spec.strides == (8, 16, 32)


# ----------------------------------------------------------------------------------------------------------------- export


def test_saved_and_loaded_detector_detects_the_same(detector, batch, tmp_path):
    detector.eval()
    loaded = load_detector(save_student(detector, tmp_path / "student")).eval()
    assert loaded.spec == detector.spec
    with torch.no_grad():
        expected = detector.detect(detector(batch).prediction, batch)
        found = loaded.detect(loaded(batch).prediction, batch)
    for mine, other in zip(expected, found, strict=True):
        assert torch.equal(mine.boxes_xyxy, other.boxes_xyxy)
        assert torch.equal(mine.scores, other.scores)
        assert torch.equal(mine.labels, other.labels)
