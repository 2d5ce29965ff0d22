"""DSIG: regions are the nodes of a graph; nodes and edges of the student's graph should equal those of the teacher's."""

from detdistill.methods.dsig.loss import (
    DSIGNodes,
    dsig_box_loss,
    dsig_class_loss,
    dsig_edge_loss,
    dsig_feature_loss,
    dsig_mine,
    dsig_node_losses,
)
from detdistill.methods.dsig.method import DSIG

__all__ = [
    "DSIG",
    "DSIGNodes",
    "dsig_box_loss",
    "dsig_class_loss",
    "dsig_edge_loss",
    "dsig_feature_loss",
    "dsig_mine",
    "dsig_node_losses",
]
