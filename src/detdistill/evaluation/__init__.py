"""COCO evaluation."""

from detdistill.evaluation.errors import ERRORS, KINDS, detection_errors
from detdistill.evaluation.run import evaluate
from detdistill.evaluation.scores import METRICS, Scores, coco_scores

__all__ = ["ERRORS", "KINDS", "METRICS", "Scores", "coco_scores", "detection_errors", "evaluate"]
