"""PGD: imitate the towers of a dense head in the regions from which the teacher predicts each object well."""

from detdistill.methods.pgd.loss import (
    PGDBoxTerms,
    PGDClassTerms,
    pgd_background,
    pgd_box_terms,
    pgd_candidates,
    pgd_class_terms,
    pgd_loss,
    pgd_normalized,
    pgd_weights,
)
from detdistill.methods.pgd.method import PGD, PGDCells, PGDTaught

__all__ = [
    "PGD",
    "PGDBoxTerms",
    "PGDCells",
    "PGDClassTerms",
    "PGDTaught",
    "pgd_background",
    "pgd_box_terms",
    "pgd_candidates",
    "pgd_class_terms",
    "pgd_loss",
    "pgd_normalized",
    "pgd_weights",
]
