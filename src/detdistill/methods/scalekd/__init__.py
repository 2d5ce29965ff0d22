"""ScaleKD: scale-decoupled features, and the predictions of a trained cross-scale assistant."""

from detdistill.methods.scalekd.loss import (
    scalekd_box_loss,
    scalekd_class_loss,
    scalekd_feature_loss,
    scalekd_region_class_loss,
)
from detdistill.methods.scalekd.method import ScaleKD

__all__ = [
    "ScaleKD",
    "scalekd_box_loss",
    "scalekd_class_loss",
    "scalekd_feature_loss",
    "scalekd_region_class_loss",
]
