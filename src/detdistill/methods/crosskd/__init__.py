"""CrossKD: maps from inside the student's head run through the rest of the teacher's head."""

from detdistill.methods.crosskd.loss import (
    CrossKDMoments,
    crosskd_align,
    crosskd_box_loss,
    crosskd_centerness_loss,
    crosskd_class_loss,
    crosskd_distribution_loss,
    crosskd_moments,
    crosskd_scores,
)
from detdistill.methods.crosskd.method import CrossKD, CrossKDTaught

__all__ = [
    "CrossKD",
    "CrossKDMoments",
    "CrossKDTaught",
    "crosskd_align",
    "crosskd_box_loss",
    "crosskd_centerness_loss",
    "crosskd_class_loss",
    "crosskd_distribution_loss",
    "crosskd_moments",
    "crosskd_scores",
]
