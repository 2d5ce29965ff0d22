"""How often queries change the box that they are matched to: the instability of bipartite matching (IS).

Li et al., "DN-DETR: Accelerate DETR Training by Introducing Query DeNoising", CVPR 2022, section 3, equations 1 and 2. For
an image and an epoch i, V_n^i is the index of the ground-truth box that query n is matched to, -1 for none; then
``IS^i = sum_n 1(V_n^i != V_n^(i-1))``, averaged over the images of a validation set. Between two epochs an image with G boxes
(and at least 2 G queries) adds 2 G at most. The paper matches the last decoder layer.

``instability_of_layers`` counts the same changes between consecutive decoder layers in one epoch, to show whether the layers
match the same queries to a box (compare Liu et al., "Detection Transformer with Stable Matching", ICCV 2023).

The index n must identify the same query in both epochs. This holds for learned queries (DETR, Conditional DETR, DAB-DETR,
one-stage Deformable DETR, AdaMixer). In detectors that select queries from the encoder's output (RT-DETR, D-FINE, two-stage
models), n is a rank, so changes of the order count too. Their values are higher and comparable only among such detectors.

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
    """Count the queries with a changed match, for each image (and layer): [...] from [..., N].

    Args:
        before: [..., N] int64, index of each query's ground-truth box, -1 for none.
        now: [..., N] int64, the same at a later time (or for the next decoder layer).

    Raises:
        ValueError: the shapes differ, so the images or queries are not the same.

    Example:
        >>> changed_matches(torch.tensor([0, 1, -1, -1]), torch.tensor([1, 0, -1, 2])).tolist()
        3
    """
    if before.shape != now.shape:
        raise ValueError(f"index vectors of shapes {tuple(before.shape)} and {tuple(now.shape)} are not of the same queries")
    return (before != now).sum(dim=-1)


def instability(before: Tensor, now: Tensor) -> float:
    """Compute IS between two epochs: number of changed queries in the last decoder layer, mean over the images.

    Args:
        before: [L, I, N] result of ``index_vectors`` in the earlier epoch.
        now: [L, I, N] result of ``index_vectors`` in the later epoch.

    Raises:
        ValueError: the shapes differ.
    """
    return float(changed_matches(before[-1], now[-1]).double().mean())


def instability_of_layers(vectors: Tensor) -> float:
    """Count changed queries between consecutive decoder layers, mean over pairs of layers and images; 0 with one layer.

    Args:
        vectors: [L, I, N] result of ``index_vectors``.
    """
    changes = changed_matches(vectors[:-1], vectors[1:])
    return float(changes.double().mean()) if len(changes) else 0.0


def first_images(data: DetectionSet, count: int) -> DetectionSet:
    """The first ``count`` images of a set in its own order; all if it has fewer."""
    return DetectionSet.of(data.name, data.form, data.root, data.classes, data.records[:count])


def check_queries(detector: Detector) -> None:
    """Check that the detector has queries, and therefore a bipartite matching.

    Raises:
        ModelError: the detector has no queries.
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
    """Match queries to ground-truth boxes by the detector's own assignment.

    Predictions are made as in evaluation (no augmentation, no denoising queries, float32). Boxes that are not used in
    training (crowds) are not matched.

    Args:
        detector: a detector with queries. It stays on its device and is in eval mode during the call.
        images: the images, all of which are used in their order (see ``first_images``).
        settings: image size and resizing.
        batch_size: number of images per forward pass.
        loader: loader of ``images`` to reuse; None: a new one is made.

    Returns:
        [L, I, N] int64 on the CPU: index of the ground-truth box of each query, -1 for none.

    Raises:
        ModelError: the detector has no queries, or lacks classes of the data.
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
