"""What the tests of our own one-stage detectors share: checks that hold for each of them."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torchvision.ops import batched_nms, clip_boxes_to_image

from detdistill.detectors.build import build_detector
from detdistill.detectors.contract import Tower
from detdistill.detectors.inherit import inherit_head
from detdistill.structures import IGNORED, Assignment, Batch, View
from tests.detectors.dense.shared import EMPTY, FULL, SIZES, library_images, randomize_outputs, target, unequal_batch
from tests.golden import assert_golden

OPTIONS = "resnet10t,channels=8-16-32-64,stem=8,neck=32,levels=3-5,convs=2,score=0.01,dets=20"
CLASSES = ["apple", "pear", "plum"]


def fresh(kind, classes=CLASSES, options=OPTIONS, seed=0):
    torch.manual_seed(seed)
    return build_detector(f"{kind}:{options}", classes)


def spread_out(kind, seed=3):
    """A detector whose statistics and outputs are not the initial ones."""
    detector = randomize_outputs(fresh(kind, seed=seed))
    detector.train()
    with torch.no_grad():
        detector.features(unequal_batch(seed=1))
    return detector.eval()


def part(batch, index):
    """One image of a batch, without the padding."""
    height, width = batch.sizes[index].tolist()
    images = batch.images[index : index + 1, :, :height, :width]
    fields = (batch.targets[index],), (batch.ids[index],), (batch.views[index],)
    return Batch(images, batch.sizes[index : index + 1], *fields)


def equal_batch(count=2):
    """Images of one size, so that nothing is padded."""
    images = torch.rand(count, 3, 64, 96, generator=torch.Generator().manual_seed(5))
    sizes = torch.tensor([[64, 96]] * count)
    return Batch(images, sizes, FULL[:count], tuple(range(count)), (View((64, 96), (64, 96)),) * count)


# ---------------------------------------------------------------------------------------------------------- the numbers


def golden_prediction(kind, golden, names, dtype, settings=()):
    """A detector of the file's settings, its prediction from the file's maps (leaves by name and level), the batch.

    Args:
        kind: of detector.
        golden: the file.
        names: our output's name for each name in the file.
        dtype: to compute in.
        settings: attributes of the model beside ``anchor_scale``, under the same name in the file's ``meta``.
    """
    strides = golden["in_strides"].tolist()
    first, last = (int(stride).bit_length() - 1 for stride in (strides[0], strides[-1]))
    classes = [str(index) for index in range(golden.meta["num_classes"])]
    detector = fresh(kind, classes, f"resnet10t,channels=8-16-32-64,stem=8,neck=32,convs=0,levels={first}-{last}")
    detector.model.anchor_scale = golden.meta["octave_base_scale"]
    detector.candidates = golden.meta.get("topk", 9)
    for name in settings:
        setattr(detector.model, name, golden.meta[name])
    leaves = {name: [level.to(dtype).requires_grad_() for level in golden.levels(f"in_{name}")] for name in names}
    outputs = {
        ours: torch.cat([level.flatten(2).transpose(1, 2) for level in leaves[theirs]], dim=1) for theirs, ours in names.items()
    }
    height, width = golden["in_pad_size"].tolist()  # the released code counts the anchors up to the padded size
    boxes, labels = golden.levels("in_boxes"), golden.levels("in_labels")
    targets = tuple(
        replace(target([], label.tolist()), boxes_xyxy=box.reshape(-1, 4)) for box, label in zip(boxes, labels, strict=True)
    )
    count = len(targets)
    batch = Batch(
        torch.zeros(count, 3, height, width, dtype=dtype),
        torch.tensor([[height, width]] * count),
        targets,
        tuple(range(count)),
        (View((height, width), (height, width)),) * count,
    )
    shapes = [tuple(level.shape[-2:]) for level in golden.levels("in_cls")]
    return detector, detector.placed(outputs, shapes, batch), batch, leaves


def assert_golden_losses(detector, prediction, batch, leaves, golden, terms, dtype):
    """Losses level by level, their sum and all gradients; ``terms``: our name for each term in the file."""
    values = detector.loss_values(prediction, batch, detector.assign(prediction, batch))
    assert values.keys() == set(terms.values())
    for theirs, ours in terms.items():
        for level, expected in enumerate(golden.levels(f"out_loss_{theirs}")):
            assert_golden(values[ours][:, prediction.levels == level].sum(), expected.to(dtype))
    total = detector.loss(prediction, batch).total()
    assert_golden(total, golden["out_total"].to(dtype))
    total.backward()
    for name, levels in leaves.items():
        for level, leaf in enumerate(levels):
            assert_golden(leaf.grad, golden[f"grad_student_{name}_{level}"].to(dtype))


# --------------------------------------------------------------------------------------------------------------- results


def assert_detections_equal_the_models(kind):
    """``detect`` equals ``model(images)``, and both equal a slow selection; origins lead to the box they became."""
    detector, batch = spread_out(kind), unequal_batch()
    with torch.no_grad():
        prediction = detector(batch).prediction
        mine = detector.detect(prediction, batch)
        theirs = detector.model(library_images(batch))
    for image, (one, other) in enumerate(zip(mine, theirs, strict=True)):
        assert len(one) > 5
        assert other.keys() == {"boxes", "scores", "labels"}
        torch.testing.assert_close(one.boxes_xyxy, other["boxes"], rtol=0, atol=1e-4)
        torch.testing.assert_close(one.scores, other["scores"], rtol=0, atol=1e-6)
        assert torch.equal(one.labels, other["labels"] - 1)
        slow = slow_selection(detector, prediction, image, SIZES[image])
        torch.testing.assert_close(one.boxes_xyxy, slow[0])
        torch.testing.assert_close(one.scores, slow[1])
        assert torch.equal(one.labels, slow[2])
        for row in range(len(one)):
            level, cell = one.origin.level[row], one.origin.cell[row]
            at = torch.nonzero((prediction.levels == level) & (prediction.cells == cell).all(dim=1)).flatten()
            assert len(at) == 1
            height, width = SIZES[image]
            assert int(cell[0]) * 8 * 2 ** int(level) < height
            assert int(cell[1]) * 8 * 2 ** int(level) < width
            decoded = clip_boxes_to_image(prediction.boxes_xyxy[image, at], SIZES[image])
            assert torch.equal(decoded[0], one.boxes_xyxy[row])
        assert bool((one.origin.image == image).all())
        assert bool((one.origin.anchor == 0).all())
        assert bool((one.origin.ground_truth == -1).all())


def slow_selection(detector, prediction, image, size):
    """Boxes, scores and labels, pair by pair."""
    scores = prediction.logits[image].sigmoid()
    rows = []
    for level in range(int(prediction.levels.max()) + 1):
        mine = []
        for index in torch.nonzero(prediction.levels == level).flatten().tolist():
            row, column = (prediction.cells[index] * 8 * 2**level).tolist()
            if row < size[0] and column < size[1]:
                pairs = [(float(score), index, label) for label, score in enumerate(scores[index])]
                mine += [pair for pair in pairs if pair[0] > detector.model.score_thresh]
        rows += sorted(mine, reverse=True)[: detector.model.topk_candidates]
    index, labels = torch.tensor([row[1] for row in rows]), torch.tensor([row[2] for row in rows])
    values = scores[index, labels]
    if prediction.quality is not None:
        values = values * prediction.quality[image, index].sigmoid()
    boxes = clip_boxes_to_image(prediction.boxes_xyxy[image, index], size)
    filled = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    boxes, values, labels = boxes[filled], values[filled], labels[filled]
    keep = batched_nms(boxes, values, labels, 0.6)[: detector.model.detections_per_img]
    return boxes[keep], values[keep], labels[keep]


def assert_learns_two_images(kind, steps=60):
    """A short training on two images with one coloured box each finds these boxes."""
    torch.manual_seed(0)
    detector = fresh(kind, options="resnet10t,channels=16-32-64-128,stem=8,neck=32,levels=3-5,convs=1")
    images = torch.full((2, 3, 64, 64), 0.5) + 0.05 * torch.rand(2, 3, 64, 64)
    boxes = ([8.0, 16.0, 40.0, 48.0], [20.0, 4.0, 60.0, 40.0])
    for image, channel, box in zip(images, (0, 2), boxes, strict=True):
        x1, y1, x2, y2 = map(int, box)
        image[channel, y1:y2, x1:x2] = 1.0
    targets = target([boxes[0]], [0]), target([boxes[1]], [2])
    batch = Batch(images, torch.tensor([[64, 64]] * 2), targets, (0, 1), (View((64, 64), (64, 64)),) * 2)
    optimizer = torch.optim.AdamW(detector.parameters(), lr=4e-3)
    totals = []
    for _ in range(steps):
        loss = detector.loss(detector(batch).prediction, batch).total()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(detector.parameters(), 10.0)
        optimizer.step()
        totals.append(float(loss.detach()))
    assert totals[-1] < 0.4 * totals[0]
    detector.eval()
    with torch.no_grad():
        found = detector.detect(detector(batch).prediction, batch)
    for one, box, label in zip(found, boxes, (0, 2), strict=True):
        assert int(one.labels[0]) == label
        torch.testing.assert_close(one.boxes_xyxy[0], torch.tensor(box), rtol=0, atol=4.0)


# ---------------------------------------------------------------------------------------------------------- the contract


def assert_towers_resume(kind):
    """Left at any depth and resumed there, by this detector or by halves, the prediction is the same."""
    detector, batch = fresh(kind), unequal_batch()
    features = detector.features(batch)
    whole = detector.predict(features, batch)
    assert detector.tower_depth == 2
    for depth in range(3):
        resumed = detector.finish(detector.tower(features, upto=depth), batch)
        assert torch.equal(resumed.logits, whole.logits)
        assert torch.equal(resumed.boxes_xyxy, whole.boxes_xyxy)
    assert detector.tower(features, upto=0).classification[0] is features.maps[0]
    half = detector.tower(features, upto=1)
    mixed = Tower(half.classification, detector.tower(features, upto=1).regression, 1, half.strides)
    assert torch.equal(detector.finish(mixed, batch).deltas, whole.deltas)
    outputs = detector.model.head(features.maps)
    assert torch.equal(outputs["cls_logits"], whole.logits)
    assert torch.equal(outputs["bbox_regression"], whole.deltas)


def assert_copies_stand_alone(kind):
    """Head and neck, equal or fresh, on their own parameters."""
    detector, batch = fresh(kind), unequal_batch()
    detector.requires_grad_(False)
    detector.eval()
    features = detector.features(batch)
    head = detector.copy_head()
    assert {name.split(".")[1] for name, _ in head.named_parameters()} == {"head"}
    prediction = head.predict(features, batch)
    assert torch.equal(prediction.logits, detector.predict(features, batch).logits)
    head.loss(prediction, batch).total().backward()
    assert all(parameter.grad is not None for parameter in head.parameters())
    again = detector.copy_head(fresh=True)
    bias = again.model.head.classification_head.cls_logits.bias
    torch.testing.assert_close(bias.sigmoid(), torch.full_like(bias, 0.01))
    assert not torch.equal(again.predict(features, batch).logits, prediction.logits)
    bottom = detector.backbone_features(batch)
    assert bottom.channels == (16, 32, 64)
    copied = detector.copy_neck()(bottom)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(copied.maps, features.maps, strict=True))
    assert not torch.equal(detector.copy_neck(fresh=True)(bottom).maps[0], features.maps[0])


def assert_foreign_assignments_are_honoured(kind):
    """Own assignment given back, weights, ignored predictions and the normaliser."""
    detector, batch = fresh(kind), unequal_batch()
    prediction = detector(batch).prediction
    own = detector.assign(prediction, batch)
    positive = own.matched >= 0
    assert int(positive.sum()) > 5
    plain = detector.loss(prediction, batch).terms
    assert all(float(term.detach()) > 0 for term in plain.values())
    given = detector.loss(prediction, batch, Assignment(own.matched)).terms
    weighted = detector.loss(prediction, batch, Assignment(own.matched, weights=torch.full(own.matched.shape, 2.0))).terms
    ten, five = (detector.loss(prediction, batch, Assignment(own.matched, normalizer=torch.tensor(n))).terms for n in (10.0, 5.0))
    for name, term in plain.items():
        assert torch.equal(given[name], term)
        torch.testing.assert_close(weighted[name], 2 * term)
        torch.testing.assert_close(five[name], 2 * ten[name])
    ignored = detector.loss(prediction, batch, own.as_ignored(own.matched == -1)).terms
    assert float(ignored["classification"].detach()) < float(plain["classification"].detach())
    assert torch.equal(ignored["bbox_regression"], plain["bbox_regression"])
    # one positive of weight 0 counts as a positive, but has no loss: nor has it a gradient
    first = tuple(torch.nonzero(positive)[0].tolist())
    weights = torch.ones(own.matched.shape)
    weights[first] = 0
    values = detector.loss_values(prediction, batch, Assignment(own.matched, weights=weights))
    whole = detector.loss_values(prediction, batch, own)
    for name, value in values.items():
        assert float(value[first].detach()) == 0
        others = torch.ones_like(positive)
        others[first] = False
        torch.testing.assert_close(value[others], whole[name][others])


def assert_a_positive_outside_its_box_is_finite(kind):
    detector = fresh(kind)
    batch = unequal_batch((target([[100, 80, 120, 95]], [0]), *EMPTY[1:]))
    prediction = detector(batch).prediction
    matched = torch.full(prediction.logits.shape[:2], -1)
    matched[0, 0] = 0
    total = detector.loss(prediction, batch, Assignment(matched)).total()
    total.backward()
    assert torch.isfinite(total.detach())
    assert all(torch.isfinite(p.grad).all() for p in detector.parameters() if p.grad is not None)


def assert_no_boxes_are_no_trouble(kind):
    """Without any box the loss is finite, all of it background, and every parameter has a gradient."""
    detector, batch = fresh(kind), unequal_batch(EMPTY)
    losses = detector.loss(detector(batch).prediction, batch)
    losses.total().backward()
    assert float(losses.terms["classification"].detach()) > 0
    assert all(float(term.detach()) == 0 for name, term in losses.terms.items() if name != "classification")
    for name, parameter in detector.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    assert len(detector.positives(detector(batch).prediction, detector.assign(detector(batch).prediction, batch), batch)) == 0


def assert_padding_takes_no_part(kind):
    """Cells beyond an image's size are ignored, and the others are matched as in the image alone."""
    detector, batch = fresh(kind), unequal_batch()
    prediction = detector(batch).prediction
    assignment = detector.assign(prediction, batch)
    corners = prediction.cells * torch.tensor([8, 16, 32])[prediction.levels, None]
    outside = (corners[None] >= batch.sizes[:, None]).any(dim=-1)
    assert int(outside.sum()) > 50
    assert torch.equal(assignment.matched == IGNORED, outside)
    values = detector.loss_values(prediction, batch, assignment)
    assert all(not value[outside].any() for value in values.values())
    assert assignment.matched[1].unique().tolist() == [-2, -1, 1]  # the crowd box of image 1 keeps its number 0
    for index in range(len(batch)):
        single = part(batch, index)
        alone = detector(single).prediction
        matched = detector.assign(alone, single).matched[0]
        rows = zip(alone.levels.tolist(), alone.cells.tolist(), matched.tolist(), strict=True)
        places = {(level, *cell): match for level, cell, match in rows}
        for place in torch.nonzero(~outside[index]).flatten().tolist():
            key = (int(prediction.levels[place]), *prediction.cells[place].tolist())
            assert int(assignment.matched[index, place]) == places[key]


def assert_a_batch_equals_its_images(kind):
    """Images of one size: outputs and detections of the batch are those of the single images."""
    detector, batch = spread_out(kind), equal_batch()
    with torch.no_grad():
        together = detector(batch).prediction
        found = detector.detect(together, batch)
        for index in range(len(batch)):
            single = part(batch, index)
            alone = detector(single).prediction
            torch.testing.assert_close(together.logits[index], alone.logits[0], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(together.boxes_xyxy[index], alone.boxes_xyxy[0], rtol=1e-5, atol=1e-3)
            torch.testing.assert_close(found[index].scores, detector.detect(alone, single)[0].scores, rtol=0, atol=1e-5)


def assert_mixed_precision(kind):
    detector, batch = fresh(kind), unequal_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        prediction = detector(batch).prediction
        losses = detector.loss(prediction, batch)
    full = detector(batch).prediction
    assert prediction.boxes_xyxy.dtype == prediction.logits.dtype == torch.float32
    torch.testing.assert_close(prediction.priors_xyxy, full.priors_xyxy, rtol=0, atol=0)
    again = detector.decode(prediction.deltas, prediction.priors_xyxy, prediction.levels)
    torch.testing.assert_close(prediction.boxes_xyxy, again, rtol=0, atol=0)  # decoded in full precision
    losses.total().backward()
    assert torch.isfinite(losses.total().detach())


def assert_positives_are_differentiable(kind):
    detector, batch = fresh(kind), unequal_batch()
    prediction = detector(batch).prediction
    assignment = detector.assign(prediction, batch)
    positives = detector.positives(prediction, assignment, batch)
    assert len(positives) == int((assignment.matched >= 0).sum())
    assert torch.equal(positives.targets_xyxy[0], batch.targets[0].boxes_xyxy[positives.ground_truth[0]])
    positives.boxes_xyxy.sum().backward()
    assert float(detector.model.head.regression_head.bbox_reg.bias.grad.abs().sum()) > 0


def assert_heads_are_inherited_by_class(kind):
    """Outputs go to the class of the same name; there is no background."""
    teacher, student = spread_out(kind), fresh(kind, ["plum", "fig", "apple"], seed=9)
    mine = copy.deepcopy(student.model.head.classification_head.cls_logits.weight.data)
    inherited = inherit_head(student, teacher)
    assert not inherited.skipped
    theirs = teacher.model.head.classification_head.cls_logits.weight
    got = student.model.head.classification_head.cls_logits.weight
    assert torch.equal(got[0], theirs[2])
    assert torch.equal(got[1], mine[1])
    assert torch.equal(got[2], theirs[0])
    scale = "model.head.regression_head.scales.0"
    assert scale in inherited.copied
