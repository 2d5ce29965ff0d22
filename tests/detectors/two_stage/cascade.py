"""A training step of the cascades written with torchvision's own functions, which the adapters must equal."""

import torch
import torch.nn.functional as F
from torchvision.models.detection.roi_heads import maskrcnn_loss
from torchvision.ops import clip_boxes_to_image

from tests.detectors.two_stage.shared import gradients, library_images, library_targets, own_losses


def reference_losses(detector, batch, seed=5):
    """Losses by our names, and gradients; BatchNorm's running statistics are put back."""
    model = detector.model
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    torch.manual_seed(seed)
    images, targets = model.transform(library_images(batch), library_targets(batch))
    features = model.backbone(images.tensors)
    boxes, losses = model.rpn(images, features, targets)
    for index, (heads, weight) in enumerate(zip(model.roi_heads.stages, (1, 0.5, 0.25), strict=True)):
        # select_training_samples appends the ground truth
        boxes, matched, labels, regression = heads.select_training_samples(boxes, targets)
        scores, deltas = heads.box_predictor(heads.box_head(heads.box_roi_pool(features, boxes, images.image_sizes)))
        label = torch.cat(labels)
        positive = label > 0
        box_loss = F.smooth_l1_loss(deltas[positive], torch.cat(regression)[positive], reduction="sum") / len(label)
        losses[f"loss_classifier_stage{index + 1}"] = weight * F.cross_entropy(scores, label)
        losses[f"loss_box_reg_stage{index + 1}"] = weight * box_loss
        if heads.has_mask():
            where = [value > 0 for value in labels]
            chosen = [given[mine] for given, mine in zip(boxes, where, strict=True)]
            logits = heads.mask_predictor(heads.mask_head(heads.mask_roi_pool(features, chosen, images.image_sizes)))
            masks, wanted = [target["masks"] for target in targets], [target["labels"] for target in targets]
            matched = [index[mine] for index, mine in zip(matched, where, strict=True)]
            losses[f"loss_mask_stage{index + 1}"] = weight * maskrcnn_loss(logits, chosen, masks, wanted, matched)
        refined = heads.box_coder.decode(deltas.detach(), boxes)[:, 0].split([len(given) for given in boxes])
        inserted = [
            (given[:, None] == target["boxes"]).all(dim=-1).any(dim=1) for given, target in zip(boxes, targets, strict=True)
        ]
        boxes = [
            clip_boxes_to_image(box, size)[~mine] for box, size, mine in zip(refined, images.image_sizes, inserted, strict=True)
        ]
    return losses, gradients(detector, sum(losses.values()), buffers)


def assert_training_equals_the_reference(detector, batch):
    """All terms and all gradients; returns our prediction."""
    expected, expected_gradients = reference_losses(detector, batch)
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


def lively(detector, std=0.3):
    """Larger random weights in all outputs, so that boxes move, scores differ, and every stage says something else."""
    for heads in detector.model.roi_heads.stages:
        torch.nn.init.normal_(heads.box_predictor.cls_score.weight, std=std)
        torch.nn.init.normal_(heads.box_predictor.bbox_pred.weight, std=3 * std)
    torch.nn.init.normal_(detector.model.rpn.head.bbox_pred.weight, std=0.2)
    return detector


def jittered(batch):
    """Six proposals near each box: an untrained first stage finds none."""
    generator = torch.Generator().manual_seed(0)
    boxes = []
    for target in batch.targets:
        moved = target.boxes_xyxy.repeat(6, 1)
        boxes.append(moved + 16 * torch.rand(moved.shape, generator=generator) - 8)
    return boxes
