"""DEIMv2: transformers' model, run stage by stage, on a convolutional backbone.

Huang et al., "Real-Time Object Detection Meets DINOv3", arXiv 2509.20787, as in ``transformers.models.deimv2``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detdistill.detectors.queries.shared import deformable
from detdistill.detectors.queries.shared import rt_detr as family
from detdistill.detectors.queries.shared import transformers_detector as shared
from detdistill.detectors.queries.shared import transformers_files as files
from detdistill.detectors.queries.shared import transformers_models as models
from detdistill.detectors.queries.shared.d_fine import FineDetector
from detdistill.detectors.queries.shared.deformable import Outputs
from detdistill.detectors.queries.shared.options import DetrSelectionOptions
from detdistill.errors import ModelError
from detdistill.functional.counting import divisor_over_ranks
from detdistill.structures import Features

try:
    from transformers import Deimv2Config, Deimv2ForObjectDetection
    from transformers.loss.loss_deimv2 import Deimv2Loss
except ImportError as error:
    raise ModelError("deimv2 needs a transformers that has DEIMv2; upgrade it") from error

MODEL_TYPE = "deimv2"
OPTIONS = family.HybridOptions
TINY = "resnet10t,channels=8-16-32-64,stem=8,dim=32,heads=4,ffn=64,queries=10,encoder=1,decoder=2"
"""The smallest useful model, for ``probe``."""


def build(backbone: str, classes: Sequence[str], options: family.HybridOptions) -> Deimv2Detector:
    """A fresh DEIMv2 on a timm backbone: levels 3-5, 300 queries, 1 encoder and 6 decoder layers, 100 denoising queries.

    Raises:
        ModelError: the options do not fit the backbone or each other.
    """
    config = Deimv2Config(**family.family_arguments(MODEL_TYPE, backbone, options), **models.label_maps(classes))
    model = models.fresh_model(Deimv2ForObjectDetection, config, Deimv2Detector.backbone_modules, backbone, options)
    name = options.name or f"{MODEL_TYPE}:{backbone}"
    return Deimv2Detector(family.unit_norms(model), name, **models.statistics(backbone, options), **models.selection(options))


def load_pretrained(
    source: str, classes: Sequence[str] | None, name: str, options: DetrSelectionOptions
) -> shared.TransformersDetector:
    """A DEIMv2 from a folder or the hub; see ``hf``."""
    config = files.read_config(source)
    if config.encoder_type == "lite" or config.backbone_config.model_type == "dinov3_vit":
        raise ModelError(f"{source}: a DEIMv2 with a lite encoder or on DINOv3 has no adapter; take one with a hybrid encoder")
    return files.load_pretrained(Deimv2Detector, source, classes, name, options)


def load_exported(folder: Path, classes: Sequence[str], name: str) -> shared.TransformersDetector:
    """Load an exported student folder; see ``transformers_files.load_exported``."""
    return files.load_exported(Deimv2Detector, folder, classes, name)


class Deimv2Detector(FineDetector):
    """DEIMv2: D-FINE with other layers and a matching-aware class loss.

    With ``use_dense_one_to_one`` the box losses of every set of outputs use the union of the matches of all sets.
    """

    model_class = Deimv2ForObjectDetection
    backbone_modules = ("model.conv_encoder.model",)
    neck_modules = ("model.conv_encoder.encoder_input_proj", "model.encoder")

    def backbone_maps(self, images: Tensor, pixel_mask: Tensor) -> Sequence[tuple[Tensor, Tensor]]:
        """The maps of the library's backbone before its projection, with masks computed as in the related families."""
        maps = self.model.model.conv_encoder.model(images).feature_maps
        return [(level, F.interpolate(pixel_mask[None].float(), size=level.shape[-2:])[0].bool()) for level in maps]

    @property
    def projections(self) -> nn.ModuleList:
        """The projection of each level before the encoder."""
        return cast(nn.ModuleList, self.model.model.conv_encoder.encoder_input_proj)

    def encode(self, features: Features) -> Features:
        """Projection and hybrid encoder. Returns the encoder's maps, before the decoder's own projection."""
        return replace(features, maps=tuple(self.model.model.encoder(self.projected(features)).feature_maps))

    def criterion(self) -> Deimv2Loss:
        """The library's criterion."""
        return Deimv2Loss(self.config)

    def place_rows(self, rows: Sequence[Tensor], boxes: Any) -> tuple[Sequence[Tensor], Any]:
        """The union of the matches of all sets, as in the library: each query gets the box that most sets match it to.

        The box losses are divided by the number of pairs in the union. Without ``use_dense_one_to_one``: as in the base.
        """
        if not self.config.use_dense_one_to_one:
            return rows, boxes
        sets = []
        for row in rows:
            queries = [torch.nonzero(image >= 0).flatten() for image in row]
            sets.append([(query, image[query]) for query, image in zip(queries, row, strict=True)])
        union = torch.full_like(rows[0], -1)
        # the library counts pairs of the last set and of all others; one set alone has no others
        found = self.criterion()._get_dense_o2o_indices(sets[0], sets[1:]) if len(sets) > 1 else sets[0]
        for image, (query, box) in enumerate(found):
            union[image, query] = box
        places = []
        for row in rows:
            places.append(torch.where((row < -1) & (union == -1), row, union))  # ignored queries stay ignored
        return places, divisor_over_ranks(sum(len(query) for query, _ in found), union)

    def class_losses(self, outputs: Outputs, pairs: deformable.Pairs, normalizer: Any) -> dict[str, Tensor]:
        """Matching-aware loss: the target of the matched class is the IoU to the power of gamma."""
        config = self.config
        gamma, alpha = config.focal_loss_gamma, 1.0 if config.mal_alpha is None else config.mal_alpha
        iou = deformable.overlaps(outputs.boxes[pairs.image, pairs.query].detach(), pairs.boxes)[0]
        where = (pairs.image, pairs.query, pairs.labels)
        wanted, positive = torch.zeros_like(outputs.logits), torch.zeros_like(outputs.logits)
        wanted[where], positive[where] = iou.to(wanted.dtype).pow(gamma), 1.0
        weight = alpha * outputs.logits.detach().sigmoid().pow(gamma) * (1 - positive) + positive
        entropy = F.binary_cross_entropy_with_logits(outputs.logits, wanted, weight=weight, reduction="none")
        return {"loss_mal": (entropy.sum(dim=-1) * pairs.counted).sum() / normalizer * config.weight_loss_mal}
