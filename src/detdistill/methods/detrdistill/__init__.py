"""DETRDistill: a DETR learns from another DETR's predictions, from features under a mask its queries make, and its queries."""

from detdistill.methods.detrdistill.loss import (
    LogitsTerms,
    LogitsWeights,
    detrdistill_contrastive_loss,
    detrdistill_feature_loss,
    detrdistill_layers,
    detrdistill_logits_loss,
    detrdistill_masks,
    detrdistill_match,
    detrdistill_quality,
    detrdistill_quality_weights,
    detrdistill_query_weights,
    detrdistill_split_loss,
    detrdistill_targets,
)
from detdistill.methods.detrdistill.method import DETRDistill
from detdistill.methods.detrdistill.parts import ContrastiveHead, DETRDistillTaught

__all__ = [
    "ContrastiveHead",
    "DETRDistill",
    "DETRDistillTaught",
    "LogitsTerms",
    "LogitsWeights",
    "detrdistill_contrastive_loss",
    "detrdistill_feature_loss",
    "detrdistill_layers",
    "detrdistill_logits_loss",
    "detrdistill_masks",
    "detrdistill_match",
    "detrdistill_quality",
    "detrdistill_quality_weights",
    "detrdistill_query_weights",
    "detrdistill_split_loss",
    "detrdistill_targets",
]
