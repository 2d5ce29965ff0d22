"""What the tests of both two-stage adapters compare with: the library's own call on the same images."""

import torch

from detdistill.structures import Batch, Target, View


def library_images(batch):
    """The images as torchvision takes them: a list, without padding."""
    return [image[:, :height, :width] for image, (height, width) in zip(batch.images, batch.sizes.tolist(), strict=True)]


def library_targets(batch):
    """The targets as torchvision takes them: labels from 1, no crowd boxes, masks of the image's size."""
    targets = []
    for target, (height, width) in zip(batch.targets, batch.sizes.tolist(), strict=True):
        kept = target.without_crowd()
        known = {"boxes": kept.boxes_xyxy, "labels": kept.labels + 1}
        if kept.masks is not None:
            known["masks"] = kept.masks[:, :height, :width]
        targets.append(known)
    return targets


def criterion_losses(detector, batch, seed=5):
    """Losses and gradients of ``model(images, targets)``; BatchNorm's running statistics are put back."""
    buffers = {name: buffer.clone() for name, buffer in detector.model.named_buffers()}
    torch.manual_seed(seed)
    losses = detector.model(library_images(batch), library_targets(batch))
    return losses, gradients(detector, sum(losses.values()), buffers)


def own_losses(detector, batch, seed=5):
    """Losses and gradients part by part, and the prediction."""
    buffers = {name: buffer.clone() for name, buffer in detector.model.named_buffers()}
    torch.manual_seed(seed)
    prediction = detector.predict(detector.features(batch), batch)
    losses = detector.loss(prediction, batch)
    return losses.terms, gradients(detector, losses.total(), buffers), prediction


def gradients(detector, total, buffers):
    """By parameter name."""
    detector.zero_grad()
    total.backward()
    found = {name: parameter.grad.clone() for name, parameter in detector.model.named_parameters() if parameter.grad is not None}
    detector.zero_grad()
    detector.model.load_state_dict(buffers, strict=False)
    return found


def assert_same_training(detector, batch):
    """All terms and all gradients are the library's; returns our prediction."""
    expected, expected_gradients = criterion_losses(detector, batch)
    terms, found_gradients, prediction = own_losses(detector, batch)
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value, rtol=1e-6, atol=1e-7, msg=name)
    assert found_gradients.keys() == expected_gradients.keys() == dict(detector.model.named_parameters()).keys()
    for name, value in expected_gradients.items():
        # sums over regions in another order: the last digits may differ
        scale = float(value.abs().max())
        torch.testing.assert_close(found_gradients[name], value, rtol=1e-4, atol=1e-5 * scale + 1e-7, msg=name)
    return prediction


def make_batch(sizes, boxes, size=128, seed=0):
    """Noise images of the given valid sizes with the given boxes [x1, y1, x2, y2, label]; masks are the boxes' diamonds."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(len(sizes), 3, size, size, generator=generator)
    targets = []
    for image, (height, width), rows in zip(images, sizes, boxes, strict=True):
        image[:, height:] = 0
        image[:, :, width:] = 0
        table = torch.tensor(rows, dtype=torch.float32).reshape(-1, 5)
        masks = torch.stack([diamond(row, size) for row in table]) if len(table) else torch.zeros(0, size, size, dtype=torch.bool)
        targets.append(Target(table[:, :4], table[:, 4].long(), torch.zeros(len(table), dtype=torch.bool), masks))
    return Batch(
        images,
        torch.tensor(sizes),
        tuple(targets),
        ids=tuple(range(len(sizes))),
        views=tuple(View(hw, hw) for hw in sizes),
    )


def diamond(row, size):
    """[size, size] bool: the diamond in a box."""
    rows, columns = torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="ij")
    x1, y1, x2, y2 = row[:4]
    return ((columns - (x1 + x2) / 2) / (x2 - x1)).abs() + ((rows - (y1 + y2) / 2) / (y2 - y1)).abs() <= 0.5
