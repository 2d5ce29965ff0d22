"""Options of ``mmdet:FILE.pth``: what is not, or not rightly, said in the file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from detdistill.detectors.options import ModelOptions
from detdistill.values import Count, Fraction

Detector = Literal[
    "gfl",
    "atss",
    "retinanet",
    "fcos_scales",
    "reppoints",
    "faster_rcnn",
    "mask_rcnn",
    "cascade_rcnn",
    "cascade_mask_rcnn",
    "deformable_detr",
    "conditional_detr",
    "dab_detr",
]


@dataclass(frozen=True, kw_only=True)
class MMDetOptions(ModelOptions):
    """Options of a checkpoint of MMDetection. The default ``none`` means: as its configuration says."""

    detector: Detector | None = None
    """Detector that the checkpoint holds, if its file does not say it."""
    style: Literal["pytorch", "caffe"] | None = None
    """``pytorch``: backbone and pixels as torchvision's; ``caffe``: stride in the first convolution, BGR, deviation 1."""
    mean: tuple[float, ...] | None = None
    """Mean of the pixels in 0..255, in the order of the weights' channels, written ``103.53-116.28-123.675``."""
    std: tuple[float, ...] | None = None
    """Standard deviation of the pixels in 0..255, in the same order."""
    bgr: bool | None = None
    """Whether the weights read blue first."""
    names: str | None = None
    """File with the names of the classes, one in a line, if the checkpoint does not have them."""
    norm: Literal["bn", "frozen"] | None = None
    """``bn``: BatchNorm trains; ``frozen``: BatchNorm is constant. Default: ``frozen``, unless it says ``norm_eval=False``."""
    score: Fraction | None = None
    """Detections below this score are dropped."""
    dets: Count | None = None
    """Maximum number of detections of an image."""
