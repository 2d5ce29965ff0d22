"""What the tests of torchvision's dense detectors share: a batch of unequal images and the library's own answer to it."""

from __future__ import annotations

import copy

import torch

from detdistill.structures import Batch, Target, View

SIZES = ((100, 128), (90, 70), (64, 64))


def target(boxes, labels, crowd=()):
    return Target(
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        torch.tensor(labels, dtype=torch.int64),
        torch.tensor([index in crowd for index in range(len(labels))], dtype=torch.bool),
    )


FULL = (
    target([[10, 10, 50, 60], [20, 20, 90, 80], [5, 5, 20, 20]], [0, 2, 1]),
    target([[1, 1, 60, 60], [0, 0, 50, 88]], [1, 2], crowd=(0,)),
    target([], []),
)
EMPTY = (target([], []),) * 3


def unequal_batch(targets=FULL, seed=0):
    """Three images of different sizes (none a multiple of 32), a crowd box, an image without boxes."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.zeros(3, 3, 100, 128)
    for image, (height, width) in zip(images, SIZES, strict=True):
        image[:, :height, :width] = torch.rand(3, height, width, generator=generator)
    views = tuple(View(size, size) for size in SIZES)
    return Batch(images, torch.tensor(SIZES), tuple(targets), (0, 1, 2), views)


def library_images(batch):
    return [image[:, :height, :width] for image, (height, width) in zip(batch.images, batch.sizes.tolist(), strict=True)]


def library_targets(batch, first=1):
    kept = [one.without_crowd() for one in batch.targets]
    return [{"boxes": one.boxes_xyxy, "labels": one.labels + first} for one in kept]


def assert_losses_and_gradients_equal(detector, batch):
    """Staged losses and all their gradients equal ``model(images, targets)`` bit by bit; returns both losses."""
    detector.train()
    library = copy.deepcopy(detector.model)
    losses = detector.loss(detector(batch).prediction, batch)
    theirs = library(library_images(batch), library_targets(batch))
    assert {key: float(value.detach()) for key, value in losses.terms.items()} == {
        key: float(value.detach()) for key, value in theirs.items()
    }
    losses.total().backward()
    sum(theirs.values()).backward()
    compared = 0
    for (name, mine), other in zip(detector.model.named_parameters(), library.parameters(), strict=True):
        assert (mine.grad is None) == (other.grad is None), name
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, other.grad, rtol=0, atol=1e-7, msg=name)
            compared += 1
    assert compared > 20
    return losses


def assert_detections_equal(detector, batch):
    """``detect`` equals the library's output without what is no class of ours; every origin decodes to its box."""
    detector.eval()
    with torch.no_grad():
        prediction = detector(batch).prediction
        mine = detector.detect(prediction, batch)
        theirs = detector.model(library_images(batch))
    for index, (one, other) in enumerate(zip(mine, theirs, strict=True)):
        known = other["labels"] > 0
        assert len(one) == int(known.sum()) > 10
        assert torch.equal(one.boxes_xyxy, other["boxes"][known])
        assert torch.equal(one.scores, other["scores"][known])
        assert torch.equal(one.labels, other["labels"][known] - 1)
        places = torch.cat([prediction.levels[:, None], prediction.cells, prediction.anchors[:, None]], dim=1).tolist()
        at = {tuple(place): row for row, place in enumerate(places)}
        origin = one.origin
        rows = [
            at[(int(level), int(row), int(column), int(anchor))]
            for level, (row, column), anchor in zip(origin.level, origin.cell, origin.anchor, strict=True)
        ]
        height, width = SIZES[index]
        decoded = prediction.boxes_xyxy[index, rows].clamp(min=0).minimum(torch.tensor([width, height, width, height]))
        torch.testing.assert_close(decoded, one.boxes_xyxy, rtol=1e-6, atol=1e-4)
        scores = prediction.logits[index, rows, one.labels].sigmoid()
        if prediction.quality is not None:
            scores = (scores * prediction.quality[index, rows].sigmoid()).sqrt()
        torch.testing.assert_close(scores, one.scores, rtol=1e-5, atol=1e-6)
        assert bool((origin.image == index).all())
        assert bool((origin.ground_truth == -1).all())
    return mine


def randomize_outputs(detector, seed=0):
    """Outputs spread out, so that scores, boxes and their order are a real test."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in detector.named_parameters():
        if name.endswith(("cls_logits.weight", "bbox_reg.weight", "bbox_ctrness.weight")):
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return detector
