"""DICOD: an image classifier teaches a detector what its objects are, and where their boxes should lie."""

from detdistill.methods.dicod.loss import dicod_classification_loss, dicod_localization_loss, dicod_pooled, dicod_sample
from detdistill.methods.dicod.method import DICOD
from detdistill.methods.dicod.parts import Classifier, DICODTaught, as_teacher, jittered, large_enough

__all__ = [
    "DICOD",
    "Classifier",
    "DICODTaught",
    "as_teacher",
    "dicod_classification_loss",
    "dicod_localization_loss",
    "dicod_pooled",
    "dicod_sample",
    "jittered",
    "large_enough",
]
