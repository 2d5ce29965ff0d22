"""DeFeat: imitate foreground and background apart, in the neck's maps, the backbone's maps and the head's class scores."""

from detdistill.methods.defeat.loss import (
    DeFeatTerms,
    defeat_backbone_masks,
    defeat_decay,
    defeat_head_terms,
    defeat_map_terms,
    defeat_masks,
    nearest_mask,
)
from detdistill.methods.defeat.method import DeFeat
from detdistill.methods.defeat.parts import DeFeatTaught, TaughtRegions, by_images, start_small, teacher_regions

__all__ = [
    "DeFeat",
    "DeFeatTaught",
    "DeFeatTerms",
    "TaughtRegions",
    "by_images",
    "defeat_backbone_masks",
    "defeat_decay",
    "defeat_head_terms",
    "defeat_map_terms",
    "defeat_masks",
    "nearest_mask",
    "start_small",
    "teacher_regions",
]
