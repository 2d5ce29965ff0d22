"""Python functions behind the commands of the command line. Heavy modules are imported only when a function runs."""

from detdistill.api.doctor import doctor
from detdistill.api.find import find
from detdistill.api.labelling import label
from detdistill.api.models import bench, detect, evaluate, export, export_student, predict, push
from detdistill.api.reading import compare, inspect_data, report
from detdistill.api.schedules import schedules
from detdistill.api.serving import teach
from detdistill.api.shared import write
from detdistill.api.training import Cached, cache, distill, train, verify_cache
from detdistill.results import Distilled

__all__ = [
    "Cached", "Distilled", "bench", "cache", "compare", "detect", "distill", "doctor", "evaluate", "export", "export_student",
    "find", "inspect_data", "label", "predict", "push", "report", "schedules", "teach", "train", "verify_cache", "write",
]  # fmt: skip
