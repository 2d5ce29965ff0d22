"""GLAMD: imitate features and dense predictions, weighted by attention over the whole map and inside its patches."""

from detdistill.methods.glamd.loss import (
    GLAMDAttention,
    GLAMDLevel,
    GLAMDTerms,
    glamd_attention,
    glamd_box_loss,
    glamd_channel_loss,
    glamd_class_loss,
    glamd_feature_loss,
    glamd_spatial_loss,
)
from detdistill.methods.glamd.method import GLAMD

__all__ = [
    "GLAMD",
    "GLAMDAttention",
    "GLAMDLevel",
    "GLAMDTerms",
    "glamd_attention",
    "glamd_box_loss",
    "glamd_channel_loss",
    "glamd_class_loss",
    "glamd_feature_loss",
    "glamd_spatial_loss",
]
