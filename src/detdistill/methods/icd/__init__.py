"""ICD: a decoder learns to find objects in the teacher's features; the student imitates the features where it looks."""

from detdistill.methods.icd.loss import (
    BoxPrior,
    ICDQueries,
    icd_auxiliary_losses,
    icd_queries,
    icd_value_loss,
    icd_value_weights,
)
from detdistill.methods.icd.method import ICD
from detdistill.methods.icd.parts import ConditionalDecoder, DecoderLayer, Tokens, box_prior, cell_positions, heads_of

__all__ = [
    "ICD",
    "BoxPrior",
    "ConditionalDecoder",
    "DecoderLayer",
    "ICDQueries",
    "Tokens",
    "box_prior",
    "cell_positions",
    "heads_of",
    "icd_auxiliary_losses",
    "icd_queries",
    "icd_value_loss",
    "icd_value_weights",
]
