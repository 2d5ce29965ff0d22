"""HEAD: assistants with the teacher's head on the student's features make a heterogeneous pair comparable."""

from detdistill.methods.head.loss import head_ckd_loss, head_layer_loss, head_neck_loss, head_neck_mask
from detdistill.methods.head.method import HEAD

__all__ = ["HEAD", "head_ckd_loss", "head_layer_loss", "head_neck_loss", "head_neck_mask"]
