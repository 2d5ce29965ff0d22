"""Convert ground truth to the form of torchvision's losses, and torchvision's matches to ``Assignment``.

Shape letters: B images, P predictions of an image, K classes, G boxes of an image, T of them trainable, M positives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from detdistill.structures import Assignment, Batch, Target


def trainable(target: Target) -> Tensor:
    """Return the indices [T] of the boxes used in training: boxes that are not crowd and have a width and height above zero."""
    boxes = target.boxes_xyxy
    return torch.nonzero(~target.crowd & (boxes[:, 2:] > boxes[:, :2]).all(dim=1)).flatten()


def target_dicts(batch: Batch, columns: Tensor, only_trainable: bool = True) -> list[dict[str, Tensor]]:
    """Convert targets to torchvision's form: ``boxes`` [G, 4], ``labels`` [G] as output indices, ``masks`` if given.

    Args:
        batch: batch with targets.
        columns: [K] index of the output of each class.
        only_trainable: True: leave out crowd and empty boxes; False: keep all boxes, so that the indices of an ``Assignment``
            stay valid.
    """
    dicts = []
    for target in batch.targets:
        keep = trainable(target) if only_trainable else slice(None)
        entry = {"boxes": target.boxes_xyxy[keep].to(batch.images.dtype), "labels": columns[target.labels[keep]]}
        if target.masks is not None:
            entry["masks"] = target.masks[keep].to(torch.uint8)
        dicts.append(entry)
    return dicts


def whole_indices(matched: Tensor, target: Target) -> Tensor:
    """Convert indices into the trainable boxes to indices into all boxes of the image; negative values stay unchanged."""
    kept = trainable(target)
    return matched if len(kept) == 0 else torch.where(matched >= 0, kept[matched.clamp(min=0)], matched)


class Matches:
    """Replacement of a head inside torchvision's ``compute_loss`` that records the matches."""

    def __init__(self, head: Any = None) -> None:
        """Compute the losses of ``head``; None: no losses."""
        self.head = head

    def compute_loss(self, targets: Any, outputs: Any, anchors: Any, matched_idxs: list[Tensor]) -> dict[str, Tensor]:
        """Record the matches."""
        self.matched = matched_idxs
        return {} if self.head is None else self.head.compute_loss(targets, outputs, anchors, matched_idxs)

    def number(self, like: Tensor) -> Tensor:
        """Count the matched predictions of the batch: [], with dtype and device of ``like``."""
        return torch.stack([(row >= 0).sum() for row in self.matched]).sum().to(like)

    def assignment(self, batch: Batch) -> Assignment:
        """Return the matches [B, P] as indices into all boxes of each image."""
        pairs = zip(self.matched, batch.targets, strict=True)
        return Assignment(torch.stack([whole_indices(row, target) for row, target in pairs]))


def matched_targets(matched: Tensor, targets: Sequence[Mapping[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """Gather boxes [M, 4] and labels [M] of the positives of an assignment [B, P], image by image, in order of prediction."""
    rows = [row[row >= 0] for row in matched]
    boxes = torch.cat([target["boxes"][row] for target, row in zip(targets, rows, strict=True)])
    labels = torch.cat([target["labels"][row] for target, row in zip(targets, rows, strict=True)])
    return boxes, labels
