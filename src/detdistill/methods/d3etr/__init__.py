"""D3ETR: the student's decoder follows the teacher's, layer by layer, in what it predicts and where its queries look."""

from detdistill.methods.d3etr.loss import (
    D3ETRQueries,
    D3ETRTerms,
    D3ETRWeights,
    d3etr_loss,
    d3etr_match,
    d3etr_terms,
    gathered_attention,
    spread_attention,
)
from detdistill.methods.d3etr.method import D3ETR, D3ETRTaught

__all__ = [
    "D3ETR",
    "D3ETRQueries",
    "D3ETRTaught",
    "D3ETRTerms",
    "D3ETRWeights",
    "d3etr_loss",
    "d3etr_match",
    "d3etr_terms",
    "gathered_attention",
    "spread_attention",
]
