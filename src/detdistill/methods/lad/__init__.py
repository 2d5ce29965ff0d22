"""LAD: the teacher assigns the labels that the student learns from; with SoLAD also its scores and boxes."""

from detdistill.methods.lad.loss import (
    LADLabelTerms,
    LADSoftTerms,
    lad_label_terms,
    lad_region,
    lad_soft_terms,
    lad_switched_costs,
)
from detdistill.methods.lad.method import LAD, LADTaught

__all__ = [
    "LAD",
    "LADLabelTerms",
    "LADSoftTerms",
    "LADTaught",
    "lad_label_terms",
    "lad_region",
    "lad_soft_terms",
    "lad_switched_costs",
]
