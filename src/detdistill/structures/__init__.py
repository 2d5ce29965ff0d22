"""Data structures that all packages share: frozen dataclasses of tensors. They import torch only; field names end in the unit.

Shape letters: B images, L levels (or decoder layers), P dense predictions of an image, R regions of the whole batch,
N queries of an image, M positives of the whole batch, K classes, D embedding width, G ground-truth boxes of an image.

Class labels are ``0 .. K-1``; the background is never a label. Softmax detectors have K+1 logits, **background last**.
"""

from detdistill.structures.assigned_cells import AssignedCells, cells_inside
from detdistill.structures.base import ADDED, SECOND, SHARED, Movable, PerImage, map_tensors
from detdistill.structures.batch import Batch, Target, View
from detdistill.structures.features import Features
from detdistill.structures.masked_cells import MaskedCells
from detdistill.structures.observation import WHOLE_TOWER, Look, Observation, Taught, TaughtTogether, Tower
from detdistill.structures.predictions import NO_OBJECT, BoxDistributions, Dense, Origin, Prediction, Queries, QuerySeed, Regions
from detdistill.structures.resizing import Resizing
from detdistill.structures.step import Clock, Losses
from detdistill.structures.targets import IGNORED, NEGATIVE, Assignment, Detections, Positives

__all__ = [
    "ADDED",
    "IGNORED",
    "NEGATIVE",
    "NO_OBJECT",
    "SECOND",
    "SHARED",
    "WHOLE_TOWER",
    "AssignedCells",
    "Assignment",
    "Batch",
    "BoxDistributions",
    "Clock",
    "Dense",
    "Detections",
    "Features",
    "Look",
    "Losses",
    "MaskedCells",
    "Movable",
    "Observation",
    "Origin",
    "PerImage",
    "Positives",
    "Prediction",
    "Queries",
    "QuerySeed",
    "Regions",
    "Resizing",
    "Target",
    "Taught",
    "TaughtTogether",
    "Tower",
    "View",
    "cells_inside",
    "map_tensors",
]
