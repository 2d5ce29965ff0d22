"""What the tests of SSD and SSDLite compare with: the library's own call on the same images."""

import torch

from detdistill.detectors.student_files import load_student
from detdistill.structures import Batch, Target, View


def make_batch(sizes, rows, size_hw, seed=0):
    """Noise of the given valid sizes [h, w] in a tensor of ``size_hw``, with boxes [x1, y1, x2, y2, label] for each image."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(len(sizes), 3, *size_hw, generator=generator)
    targets = []
    for image, (height, width), boxes in zip(images, sizes, rows, strict=True):
        image[:, height:] = 0
        image[:, :, width:] = 0
        table = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 5)
        targets.append(Target(table[:, :4], table[:, 4].long(), torch.zeros(len(table), dtype=torch.bool)))
    views = tuple(View(tuple(hw), tuple(hw)) for hw in sizes)
    return Batch(images, torch.tensor(sizes), tuple(targets), tuple(range(len(sizes))), views)


def library_images(batch):
    """A list without padding."""
    return [image[:, :height, :width] for image, (height, width) in zip(batch.images, batch.sizes.tolist(), strict=True)]


def library_targets(batch):
    """Labels from 1."""
    return [{"boxes": target.boxes_xyxy, "labels": target.labels + 1} for target in batch.targets]


def gradients(model, losses, buffers):
    """By name; BatchNorm's statistics are put back."""
    model.zero_grad()
    sum(losses.values()).backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.load_state_dict(buffers, strict=False)
    return found


def assert_same_training(detector, batch):
    """Losses are the library's, bit for bit, and so are all gradients to rounding; returns our losses."""
    model = detector.train().model
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    expected = model(library_images(batch), library_targets(batch))
    expected_gradients = gradients(model, expected, buffers)
    losses = detector.loss(detector(batch).prediction, batch).terms
    found = gradients(model, dict(losses), buffers)
    assert losses.keys() == expected.keys() == {"bbox_regression", "classification"}
    for name, value in expected.items():
        assert torch.equal(losses[name], value), name
    assert found.keys() == expected_gradients.keys() == dict(model.named_parameters()).keys()
    for name, value in expected_gradients.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6 * float(value.abs().max()), msg=name)
    return losses


def assert_same_detections(detector, batch, at_least=1):
    """Boxes, scores and labels are the library's, bit for bit, and each box is where its origin says."""
    detector.eval()
    with torch.no_grad():
        expected = detector.model(library_images(batch))
        prediction = detector(batch).prediction
        found = detector.detect(prediction, batch)
    assert len(found) == len(expected) == len(batch)
    for image, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        assert len(mine) >= at_least
        assert torch.equal(mine.boxes_xyxy, theirs["boxes"])
        assert torch.equal(mine.scores, theirs["scores"])
        assert torch.equal(mine.labels + 1, theirs["labels"])
        assert_origins(mine, image, prediction, batch)
    return found


def assert_origins(detections, image, prediction, batch):
    """Level, cell and anchor name one prediction, whose box and score these are."""
    places = torch.cat([prediction.levels[:, None], prediction.cells, prediction.anchors[:, None]], dim=1)
    origin = detections.origin
    named = torch.cat([origin.level[:, None], origin.cell, origin.anchor[:, None]], dim=1)
    index = (places[None] == named[:, None]).all(dim=2).float().argmax(dim=1)
    limit = batch.sizes[image].flip(0).repeat(2).float()
    boxes = torch.minimum(prediction.boxes_xyxy[image, index].clamp(min=0), limit)
    assert torch.equal(boxes, detections.boxes_xyxy)
    scores = prediction.logits[image].softmax(dim=-1)[index, detections.labels]
    torch.testing.assert_close(scores, detections.scores)
    assert origin.image.unique().tolist() == [image]


def detections_of_the_export(detector, image, folder):
    """What the script beside the exported model finds on an image [3, H, W]; test_export runs it without this package."""
    detector.export(folder)
    model = load_student.load(folder)
    with torch.no_grad():
        return {**model([image])[0], "classes": model.classes}
