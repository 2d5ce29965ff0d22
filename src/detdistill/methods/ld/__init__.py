"""LD: the student's distributions of box sides should equal the teacher's."""

from detdistill.methods.ld.loss import (
    LDRegion,
    ld_box_loss,
    ld_class_loss,
    ld_general_instances,
    ld_imitation_loss,
    ld_rebinned,
    ld_valuable_region,
)
from detdistill.methods.ld.method import LD
from detdistill.methods.ld.parts import LDCells, LDObjects, LDSides

__all__ = [
    "LD",
    "LDCells",
    "LDObjects",
    "LDRegion",
    "LDSides",
    "ld_box_loss",
    "ld_class_loss",
    "ld_general_instances",
    "ld_imitation_loss",
    "ld_rebinned",
    "ld_valuable_region",
]
