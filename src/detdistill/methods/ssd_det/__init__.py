"""SSD-Det: noisy boxes are refined in every training step, and the refined boxes train the detector."""

from detdistill.methods.ssd_det.loss import ssd_det_bag, ssd_det_focal, ssd_det_merge, ssd_det_random_boxes
from detdistill.methods.ssd_det.method import SSDDet
from detdistill.methods.ssd_det.parts import Refinement, Refiner, Weights

__all__ = [
    "Refinement",
    "Refiner",
    "SSDDet",
    "Weights",
    "ssd_det_bag",
    "ssd_det_focal",
    "ssd_det_merge",
    "ssd_det_random_boxes",
]
