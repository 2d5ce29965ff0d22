"""DETRDistill's projections of queries for the contrastive loss, and the targets from the teacher.

Shape letters: B images, L decoder layers, N student's queries, M teacher's queries, K classes, D width, G boxes of an image.
Boxes of queries are cxcywh in parts of the valid image.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor, nn

from detdistill.structures import (
    SECOND,
    Features,
    Queries,
    Taught,
)


class ContrastiveHead(nn.Module):
    """Two towers that bring the student's and the teacher's query embeddings into one space (released code only)."""

    def __init__(self, student: int, teacher: int, width: int = 512) -> None:
        super().__init__()

        def tower(channels: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Linear(channels, width),
                nn.Linear(width, width),
                nn.BatchNorm1d(width),
                nn.ReLU(inplace=True),
                nn.Linear(width, width),
            )

        self.student, self.teacher = tower(student), tower(teacher)

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Project rows [R, D] of both sides to rows [R, width] of length 1."""
        return F.normalize(self.student(student), dim=1), F.normalize(self.teacher(teacher), dim=1)


@dataclass(frozen=True)
class DETRDistillTaught(Taught):
    """Targets of all terms from the teacher."""

    features: Features
    prediction: Queries
    """With its initial queries; logits of all classes of the teacher."""
    matched: Tensor = field(metadata=SECOND)
    """[L, B, M] ground-truth box (index within its image's ``Target``) of each of the teacher's queries, -1 for none."""
