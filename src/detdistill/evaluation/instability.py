"""How often queries change the box that they are matched to: the instability of bipartite matching (IS).

Li et al., "DN-DETR: Accelerate DETR Training by Introducing Query DeNoising", CVPR 2022, section 3, equations 1 and 2. For
an image and an epoch i, V_n^i is the index of the ground-truth box that query n is matched to, -1 for none; then
``IS^i = sum_n 1(V_n^i != V_n^(i-1))``, averaged over the images of a validation set. Between two epochs an image with G boxes
(and at least 2 G queries) adds 2 G at most. The paper matches the last decoder layer.

The same count between one decoder layer and the next, in one epoch, says whether layers agree about who answers for a box
(Liu et al., "Detection Transformer with Stable Matching", ICCV 2023, have the layers in view); it is offered beside the first.

Query n must mean the same in both epochs. It does where queries are learned (DETR, Conditional DETR, DAB-DETR, Deformable DETR
with one stage, AdaMixer). Where the encoder's best places become queries (RT-DETR, D-FINE, two stages), n is a rank, and a
changed order counts as changed matches: such numbers are higher, and comparable among such detectors only.

Shape letters: L decoder layers, I images, N queries.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from detdistill.data.loader import DetectionLoader
from detdistill.data.records import DetectionSet
from detdistill.data.transforms import ViewSettings
from detdistill.detectors.contract import Detector
from detdistill.errors import ModelError
from detdistill.evaluation.run import check_classes
from detdistill.functional.modes import evaluating
from detdistill.structures import NEGATIVE


def changed_matches(before: Tensor, now: Tensor) -> Tensor:
    """[...] number of queries whose match differs, of each image (and layer).

    Args:
        before: [..., N] int64, index of each query's ground-truth box, -1 for none.
        now: the same, later (or one decoder layer on).

    Raises:
        ValueError: the shapes differ: other images or other queries.

    Example:
        >>> changed_matches(torch.tensor([0, 1, -1, -1]), torch.tensor([1, 0, -1, 2])).tolist()
        3
    """
    if before.shape != now.shape:
        raise ValueError(f"index vectors of shapes {tuple(before.shape)} and {tuple(now.shape)} are not of the same queries")
    return (before != now).sum(dim=-1)


def instability(before: Tensor, now: Tensor) -> float:
    """IS between two epochs: changed queries of the last decoder layer, mean over the images.

    Args:
        before: [L, I, N] of the earlier epoch, as ``index_vectors`` gives them.
        now: [L, I, N] of the later epoch.

    Raises:
        ValueError: the shapes differ.
    """
    return float(changed_matches(before[-1], now[-1]).double().mean())


def instability_of_layers(vectors: Tensor) -> float:
    """Changed queries between a decoder layer and the next, mean over all such pairs and the images; 0 with one layer.

    Args:
        vectors: [L, I, N] of one epoch.
    """
    changes = changed_matches(vectors[:-1], vectors[1:])
    return float(changes.double().mean()) if len(changes) else 0.0


def first_images(data: DetectionSet, count: int) -> DetectionSet:
    """The first ``count`` images of a set in its own order, or all where it has fewer."""
    return DetectionSet.of(data.name, data.form, data.root, data.classes, data.records[:count])


def check_queries(detector: Detector) -> None:
    """Only detectors with queries have a bipartite matching.

    Raises:
        ModelError: this one has none.
    """
    if detector.spec.family != "queries":
        raise ModelError(
            f"instability: {detector.spec.name} has no queries that are matched to boxes one to one; use a detector of the "
            f"DETR family, or leave out --instability"
        )


@torch.no_grad()
def index_vectors(
    detector: Detector,
    images: DetectionSet,
    settings: ViewSettings,
    *,
    batch_size: int = 8,
    loader: DetectionLoader | None = None,
) -> Tensor:
    """[L, I, N] int64 on the CPU: the ground-truth box that each query is matched to by the detector's own rule, -1 for none.

    Predictions are those of evaluation (no augmentation, no denoising queries, float32); boxes that training leaves out
    (crowds) are matched to nobody.

    Args:
        detector: one with queries; it runs where it is, in eval mode for the time.
        images: all of them are used (``first_images``), in their order.
        settings: how images are made.
        batch_size: images at a time.
        loader: of ``images``, to be used again instead of making one.

    Raises:
        ModelError: the detector has no queries, or does not know the classes of the data.
    """
    check_queries(detector)
    check_classes(detector, images)
    if loader is None:
        loader = DetectionLoader(images, settings, batch_size, train=False)
    where = next(detector.parameters()).device
    number = torch.tensor([detector.spec.classes.index(name) for name in images.classes], dtype=torch.int64)
    found = []
    with evaluating(detector):
        for batch in loader:
            batch = batch.with_targets([replace(target, labels=number[target.labels]) for target in batch.targets]).to(where)
            prediction = detector.predict(detector.features(batch), batch)
            found.append(detector.assign(prediction, batch).matched.clamp(min=NEGATIVE).cpu())
    return torch.cat(found, dim=1)
