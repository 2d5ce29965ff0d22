"""COCO evaluation."""

from detdistill.evaluation.run import evaluate
from detdistill.evaluation.scores import METRICS, Scores, coco_scores

__all__ = ["METRICS", "Scores", "coco_scores", "evaluate"]
