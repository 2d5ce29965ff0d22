"""UniKD: compare a fixed number of embeddings that are extracted from the features, for any pair of detectors."""

from detdistill.methods.unikd.loss import KINDS, unikd_boxes, unikd_loss
from detdistill.methods.unikd.method import UniKD
from detdistill.methods.unikd.parts import Adaptor, KnowledgeExtractor, LevelSource, UniKDTaught, level_sources, pyramid_of

__all__ = [
    "KINDS",
    "Adaptor",
    "KnowledgeExtractor",
    "LevelSource",
    "UniKD",
    "UniKDTaught",
    "level_sources",
    "pyramid_of",
    "unikd_boxes",
    "unikd_loss",
]
