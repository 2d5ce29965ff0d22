import json

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torchvision.ops import box_iou, deform_conv2d

from detdistill.detectors.contract import Teacher
from detdistill.detectors.dense import mimicdet as module
from detdistill.detectors.inherit import inherit_head
from detdistill.detectors.load import load_detector
from detdistill.detectors.save import save_student
from detdistill.functional.regions import decode_boxes
from detdistill.structures import Assignment, Origin
from tests.detectors.dense import own as own_dense
from tests.detectors.dense.shared import EMPTY, SIZES, library_images, unequal_batch

OPTIONS = "resnet10t,channels=8-16-32-64,stem=8,neck=32,levels=3-5,mlp=16,rois=24,score=0.01,dets=20"
OWN = {"objectness", "refinement", "classification", "bbox_regression"}
TRAINED = OWN | {"region_head", "mimic"}


def fresh(options=OPTIONS, classes=own_dense.CLASSES, seed=0):
    return own_dense.fresh("mimicdet", classes, options, seed)


def spread_out(seed=3):
    """Statistics and outputs that are not the initial ones, so that there are detections."""
    detector = fresh(seed=seed)
    with torch.no_grad():
        for name, parameter in detector.model.head.named_parameters():
            if name.split(".")[-2] in ("cls_logits", "bbox_reg", "objectness", "deltas", "offset"):
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))
        detector.features(unequal_batch(seed=1))
    return detector.eval()


# ------------------------------------------------------------------------------------------------------ the network


def test_the_class_branch_by_hand():
    """Offsets come from the deltas of the refinement; deformable convolution, ReLU, 1x1 convolution, ReLU, output layer."""
    head = spread_out().model.head
    maps = [torch.randn(1, 32, 6, 5, generator=torch.Generator().manual_seed(0))]
    with torch.no_grad():
        found = head(maps)
        refinement = head.regression_head.refinement
        inner = F.conv2d(maps[0], refinement.conv.weight, refinement.conv.bias, padding=1).relu()
        deltas = F.conv2d(inner, refinement.deltas.weight, refinement.deltas.bias)
        branch = head.classification_head
        offset = F.conv2d(deltas, branch.guided.offset.weight, branch.guided.offset.bias)
        assert offset.shape == (1, 50, 6, 5)
        looked = deform_conv2d(maps[0], offset, branch.guided.deformable.weight, padding=2).relu()
        hidden = F.conv2d(looked, branch.hidden.weight, branch.hidden.bias).relu()
        logits = F.conv2d(hidden, branch.cls_logits.weight, branch.cls_logits.bias)
    torch.testing.assert_close(found["cls_logits"], logits.flatten(2).transpose(1, 2))
    torch.testing.assert_close(found["refinement"], deltas.flatten(2).transpose(1, 2))
    assert offset.abs().max() > 0.01


def test_boxes_refer_to_the_refined_anchors_which_have_no_gradient():
    detector, batch = spread_out(), unequal_batch()
    prediction = detector(batch).prediction
    outputs, anchors = prediction.own.outputs, prediction.priors_xyxy
    weights = (10.0, 10.0, 5.0, 5.0)
    assert float((anchors[0, :, 2:] - anchors[0, :, :2]).min()) == 32  # four strides of 8
    assert torch.equal(anchors[0], anchors[1])
    refined = detector.refined(prediction)
    by_hand = decode_boxes(outputs["refinement"], anchors, weights, bound_shrinking=True)
    torch.testing.assert_close(refined, by_hand, rtol=1e-5, atol=1e-3)
    assert not refined.requires_grad
    boxes = decode_boxes(outputs["bbox_regression"], refined, weights, bound_shrinking=True)
    torch.testing.assert_close(prediction.boxes_xyxy, boxes, rtol=1e-5, atol=1e-3)
    again = decode_boxes(prediction.deltas, anchors, weights)  # as methods read them
    torch.testing.assert_close(prediction.boxes_xyxy, again, rtol=1e-4, atol=1e-2)
    prediction.boxes_xyxy.sum().backward()
    refinement = detector.model.head.regression_head.refinement
    assert refinement.deltas.weight.grad is None
    assert detector.model.head.regression_head.bbox_reg.weight.grad.any()


def test_the_finer_level_is_that_of_a_pyramid_with_one_more_input():
    """torchvision's pyramid with the same weights, from the map of stride 4 on."""
    from torchvision.ops import FeaturePyramidNetwork

    detector, batch = fresh().train(), own_dense.equal_batch()
    below = detector.backbone_features(batch)
    assert below.strides == (4, 8, 16, 32)
    features = detector.neck(below, batch)
    assert features.strides == (8, 16, 32)
    fpn, whole = detector.model.backbone.fpn, FeaturePyramidNetwork(list(below.channels), 32)
    whole.inner_blocks[0][0].load_state_dict(detector.finer.lateral.state_dict())
    whole.layer_blocks[0][0].load_state_dict(detector.finer.output.state_dict())
    for index in range(3):
        whole.inner_blocks[index + 1].load_state_dict(fpn.inner_blocks[index].state_dict())
        whole.layer_blocks[index + 1].load_state_dict(fpn.layer_blocks[index].state_dict())
    expected = list(whole({str(index): level for index, level in enumerate(below.maps)}).values())
    torch.testing.assert_close(features.finer, expected[0])
    torch.testing.assert_close(features.maps[0], expected[1])
    assert not hasattr(detector.eval().features(batch), "finer")


def test_only_the_best_refined_anchors_are_kept():
    detector, batch = spread_out(), unequal_batch()
    detector.model.refined = 7
    prediction = detector(batch).prediction
    valid, objectness = detector.valid(prediction, batch), prediction.own.outputs["objectness"]
    kept = detector.model.kept(objectness, valid)
    for image in range(3):
        least = sorted(objectness[image, valid[image], 0].tolist(), reverse=True)[6]
        assert torch.equal(kept[image], valid[image] & (objectness[image, :, 0] >= least))
    scores = detector.model.scores(prediction.own.outputs, valid)
    assert torch.equal(scores > 0, kept[..., None].expand_as(scores))
    torch.testing.assert_close(scores[kept], prediction.logits[kept].softmax(dim=-1)[:, :-1])


def test_detections_equal_the_models():
    detector, batch = spread_out(), unequal_batch()
    detector.model.refined = 30
    with torch.no_grad():
        prediction = detector(batch).prediction
        mine, theirs = detector.detect(prediction, batch), detector.model(library_images(batch))
    for image, (one, other) in enumerate(zip(mine, theirs, strict=True)):
        assert len(one) > 5
        torch.testing.assert_close(one.boxes_xyxy, other["boxes"], rtol=0, atol=1e-4)
        torch.testing.assert_close(one.scores, other["scores"], rtol=0, atol=1e-6)
        assert torch.equal(one.labels, other["labels"] - 1)
        height, width = SIZES[image]
        assert one.boxes_xyxy[:, 2].max() <= width
        assert one.boxes_xyxy[:, 3].max() <= height


# ------------------------------------------------------------------------------------------------------- the losses


def test_terms_in_training_and_in_evaluation():
    detector, batch = fresh().train(), unequal_batch()
    prediction = detector(batch).prediction
    losses = detector.loss(prediction, batch)
    assert losses.terms.keys() == TRAINED
    assert all(torch.equal(term, losses.terms[name]) for name, term in detector.loss(prediction, batch).terms.items())
    assert detector.loss(detector.eval()(batch).prediction, batch).terms.keys() == OWN
    without = fresh(OPTIONS + ",mimic=0").train()
    assert without.loss(without(batch).prediction, batch).terms.keys() == TRAINED - {"mimic"}
    half = fresh(OPTIONS + ",mimic=0.5").train()
    torch.manual_seed(0)
    one = detector.train()(batch).prediction
    torch.manual_seed(0)
    other = half(batch).prediction
    torch.testing.assert_close(half.loss(other, batch).terms["mimic"], detector.loss(one, batch).terms["mimic"] / 2)


def test_losses_by_hand():
    detector, batch = spread_out(), unequal_batch()
    prediction = detector(batch).prediction
    matched = torch.full(prediction.logits.shape[:2], -2)
    matched[0] = -1
    matched[0, 5], matched[0, 9], matched[1, 3] = 0, 2, 1
    found = detector.loss(prediction, batch, Assignment(matched)).terms
    logits, deltas = prediction.logits.detach(), prediction.own.outputs["bbox_regression"].detach()
    priors = detector.refined(prediction)
    entropy = -logits.log_softmax(dim=-1)
    negatives = entropy[0, :, -1].clone()
    negatives[[5, 9]] = -1
    negatives[~detector.model.kept(prediction.own.outputs["objectness"], detector.valid(prediction, batch))[0]] = -1
    hardest = negatives.sort(descending=True).values[:6].sum()  # three for each of the two positives of image 0
    labels = [batch.targets[0].labels[0], batch.targets[0].labels[2], batch.targets[1].labels[1]]
    classes = sum(entropy[image, row, label] for (image, row), label in zip([(0, 5), (0, 9), (1, 3)], labels, strict=True))
    torch.testing.assert_close(found["classification"], (classes + hardest) / 4)  # image 2 counts as one positive
    distance = 0.0
    for image, row, box in ((0, 5, 0), (0, 9, 2), (1, 3, 1)):
        prior, target = priors[image, row], batch.targets[image].boxes_xyxy[box]
        size, wanted = prior[2:] - prior[:2], target[2:] - target[:2]
        move = ((target[:2] + target[2:]) - (prior[:2] + prior[2:])) / 2 / size
        distance += (deltas[image, row] - torch.cat([10 * move, 5 * (wanted / size).log()])).abs().sum()
    torch.testing.assert_close(found["bbox_regression"], distance / 4)
    own = prediction.own.outputs
    first = detector.first_assignment(prediction, batch).matched
    used = first != -2
    target = (first >= 0).float()
    logit = own["objectness"][..., 0].detach()
    count = (first >= 0).sum(dim=1).clamp(min=1).sum()
    plain = F.softplus(logit) - target * logit
    torch.testing.assert_close(found["objectness"], plain[used].sum() / count)
    assert float(found["refinement"].detach()) > 0


def test_both_heads_take_anchors_of_an_iou_of_at_least_0_6(monkeypatch):
    detector, batch = spread_out(), unequal_batch()
    prediction = detector(batch).prediction
    close = detector.refined(prediction).clone()
    close[0, 4], close[0, 6] = torch.tensor([10.0, 10, 50, 42]), torch.tensor([10.0, 10, 50, 39])  # IoU 0.64 and 0.58 with box 0
    monkeypatch.setattr(detector, "refined", lambda _: close)
    matched = detector.assign(prediction, batch).matched
    assert matched[0, 4] == 0
    assert matched[0, 6] == -1
    for image, target in enumerate(batch.targets):
        mine = torch.nonzero(matched[image] >= 0).flatten()
        if len(mine):
            overlaps = box_iou(close[image, mine], target.boxes_xyxy)
            assert float(overlaps[torch.arange(len(mine)), matched[image, mine]].min()) >= 0.6


def test_the_mimic_loss_by_hand(monkeypatch):
    """For every region with a cell: the features of its cell, and the region head's of the box, on the level below."""
    detector, batch = fresh().train(), unequal_batch()
    drawn, pooled = [], []
    sample, predict = module.sample_regions, detector.region_head.predict
    monkeypatch.setattr(module, "sample_regions", lambda *given, **how: drawn.append(sample(*given, **how)) or drawn[-1])
    monkeypatch.setattr(detector.region_head, "predict", lambda *given: pooled.append((given, predict(*given))) or pooled[-1][1])
    prediction = detector(batch).prediction
    found = detector.loss(prediction, batch).terms
    ((features, boxes, levels), output), regions = pooled[0], drawn[0]
    assert len(pooled) == 1
    assert features.strides == (4, 8, 16, 32)
    assert [len(mine) for mine in boxes] == [24, 24, 24]
    origin, total, count = Origin.cat(regions.origins), 0.0, 0
    for row, box in enumerate(torch.cat(boxes)):
        image, level, (y, x) = int(origin.image[row]), int(origin.level[row]), origin.cell[row].tolist()
        if level < 0:
            assert torch.equal(box, batch.targets[image].boxes_xyxy[origin.ground_truth[row]])
            continue
        place = (prediction.levels == level) & (prediction.cells == origin.cell[row]).all(dim=1)
        torch.testing.assert_close(box, clip(detector.refined(prediction)[image, place][0], SIZES[image]))
        assert int(levels[row]) == level  # of four levels: an anchor of stride 8 is pooled at stride 4
        for maps, theirs in ((prediction.own.class_hidden, output.class_hidden), (prediction.own.box_hidden, output.box_hidden)):
            total = total + 1 - F.cosine_similarity(maps[level][image, :, y, x], theirs[row], dim=0)
        count += 1
    assert 40 < count < 72
    torch.testing.assert_close(found["mimic"], total / count, rtol=1e-4, atol=1e-5)


def clip(boxes, size):
    height, width = size
    return torch.minimum(boxes.clamp(min=0), torch.tensor([width, height, width, height]))


def test_the_mimic_loss_reaches_the_one_stage_head_and_not_the_region_head():
    detector, batch = fresh().train(), unequal_batch()
    detector.loss(detector(batch).prediction, batch).terms["mimic"].backward()

    def reached(module):
        return any(p.grad is not None and bool(p.grad.any()) for p in module.parameters())

    head = detector.model.head
    for side in (head.classification_head, head.regression_head):
        assert reached(side.guided.deformable)
        assert reached(side.hidden)
    assert reached(detector.model.backbone.fpn)
    assert reached(detector.model.backbone.body)
    assert not reached(detector.region_head)
    assert not reached(detector.finer)
    assert not reached(head.regression_head.refinement)
    detector.loss(detector(batch).prediction, batch).terms["region_head"].backward()
    assert reached(detector.region_head)
    assert reached(detector.finer)


def test_no_boxes_are_no_trouble():
    detector, batch = fresh().train(), unequal_batch(EMPTY)
    losses = detector.loss(detector(batch).prediction, batch)
    losses.total().backward()
    assert float(losses.terms["refinement"].detach()) == float(losses.terms["bbox_regression"].detach()) == 0
    assert float(losses.terms["mimic"].detach()) > 0
    for name, parameter in detector.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


def test_a_given_assignment_replaces_that_of_the_one_stage_head():
    detector, batch = fresh().train(), unequal_batch()
    prediction = detector(batch).prediction
    plain = detector.loss(prediction, batch).terms
    own = detector.assign(prediction, batch)
    given = detector.loss(prediction, batch, own).terms
    assert all(torch.equal(given[name], plain[name]) for name in TRAINED)
    matched = own.matched.clone()
    matched[0, 8] = 1
    weighted = detector.loss(prediction, batch, Assignment(matched, torch.full(matched.shape, 2.0))).terms
    other = detector.loss(prediction, batch, Assignment(matched)).terms
    for name in TRAINED:
        factor = 2 if name in ("classification", "bbox_regression") else 1
        torch.testing.assert_close(weighted[name], factor * other[name])
    assert not torch.equal(other["bbox_regression"], plain["bbox_regression"])


def test_a_tower_of_other_features_has_no_region_head():
    """As CrossKD resumes it: the features are not known."""
    detector, batch = fresh().train(), unequal_batch()
    tower = detector.tower(detector.features(batch), 0)
    assert detector.tower_depth == 0
    foreign = type(detector.eval().tower(detector.features(batch), 0))(tower.classification, tower.regression, 0, tower.strides)
    terms = detector.loss(detector.train().finish(foreign, batch), batch).terms
    assert terms.keys() == OWN


def test_without_a_finer_map_the_region_head_starts_at_the_finest_level():
    options = OPTIONS.replace("levels=3-5", "levels=2-4").replace("resnet10t,channels=8-16-32-64,stem=8", "convnext_atto")
    detector, batch = fresh(options).train(), own_dense.equal_batch(1)
    assert detector.finer is None
    assert detector.spec.strides == (4, 8, 16)
    assert detector.loss(detector(batch).prediction, batch).terms.keys() == TRAINED


# -------------------------------------------------------------------------------------------------------- what is kept


def test_the_region_head_is_neither_exported_nor_counted_nor_part_of_the_identity(tmp_path):
    detector, batch = spread_out(), own_dense.equal_batch()
    save_student(detector, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored.keys() == detector.model.state_dict().keys()
    assert not [name for name in stored if "region" in name or "finer" in name]
    shown = (tmp_path / "README.md").read_text()
    kept = sum(p.numel() for p in detector.model.parameters())
    assert f"{kept:,} parameters" in shown
    assert detector.count_parameters() == kept < sum(p.numel() for p in detector.parameters())
    again = load_detector(tmp_path).eval()
    with torch.no_grad():
        mine, theirs = (one.detect(one(batch).prediction, batch)[0] for one in (detector, again))
    assert torch.equal(mine.boxes_xyxy, theirs.boxes_xyxy)
    assert Teacher(again).fingerprint == Teacher(load_detector(tmp_path)).fingerprint
    assert json.loads((tmp_path / "model.json").read_text())["model"]["training_only"] == {"rois": 24, "mimic": 1.0}
    assert again.train().loss(again(batch).prediction, batch).terms.keys() == TRAINED


def test_copies_of_the_head_have_no_region_head():
    detector, batch = fresh().train(), unequal_batch()
    head = detector.copy_head()
    assert {name.split(".")[1] for name, _ in head.named_parameters()} == {"head"}
    features = detector.features(batch)
    assert head.loss(head.predict(features, batch), batch).terms.keys() == OWN
    assert torch.equal(head.predict(features, batch).logits, detector.predict(features, batch).logits)


def test_classes_are_inherited_by_name_in_both_heads():
    teacher, student = fresh(seed=1), fresh(classes=["plum", "fig", "apple"], seed=9)
    assert not inherit_head(student, teacher).skipped
    for of in (lambda one: one.model.head.classification_head.cls_logits.weight, lambda one: one.region_head.logits.weight):
        mine, theirs = of(student), of(teacher)
        assert torch.equal(mine[0], theirs[2])
        assert torch.equal(mine[2], theirs[0])
        assert torch.equal(mine[3], theirs[3])  # the background


def test_mixed_precision():
    detector, batch = fresh().train(), unequal_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        prediction = detector(batch).prediction
        losses = detector.loss(prediction, batch)
    assert prediction.boxes_xyxy.dtype == prediction.logits.dtype == torch.float32
    assert losses.terms.keys() == TRAINED
    losses.total().backward()
    assert torch.isfinite(losses.total().detach())
