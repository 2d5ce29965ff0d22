"""G-DetKD: soft matching of a region's features over all levels, and a contrast of region embeddings."""

from detdistill.methods.g_detkd.loss import (
    g_detkd_blend,
    g_detkd_box_loss,
    g_detkd_ckd_loss,
    g_detkd_class_loss,
    g_detkd_level_weights,
    g_detkd_sgfi_loss,
    g_detkd_units,
)
from detdistill.methods.g_detkd.method import GDetKD

__all__ = [
    "GDetKD",
    "g_detkd_blend",
    "g_detkd_box_loss",
    "g_detkd_ckd_loss",
    "g_detkd_class_loss",
    "g_detkd_level_weights",
    "g_detkd_sgfi_loss",
    "g_detkd_units",
]
