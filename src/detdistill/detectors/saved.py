"""Names of version 0.1, in which one module both loaded and saved detectors; see ``load`` and ``save``."""

from detdistill.detectors.load import load_checkpoint, load_detector, load_state, load_student
from detdistill.detectors.save import installed_versions, save_student

__all__ = ["installed_versions", "load_checkpoint", "load_detector", "load_state", "load_student", "save_student"]
