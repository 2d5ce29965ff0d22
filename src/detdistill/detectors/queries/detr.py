"""DETR: transformers' model, run stage by stage.

Carion et al., "End-to-End Object Detection with Transformers", ECCV 2020, as in ``transformers.models.detr``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DetrConfig, DetrForObjectDetection
from transformers.loss.loss_for_object_detection import HungarianMatcher, ImageLoss

from detdistill.detectors.queries.shared import single_scale
from detdistill.detectors.queries.shared import transformers_detector as shared
from detdistill.detectors.queries.shared import transformers_files as files
from detdistill.detectors.queries.shared import transformers_models as models
from detdistill.detectors.queries.shared.options import DetrSelectionOptions
from detdistill.structures import Batch, Features, Queries, QuerySeed
from detdistill.values import Count

MODEL_TYPE = "detr"

TINY = "resnet10t,channels=8-16-32-64,stem=8,dim=32,heads=4,ffn=64,queries=10,encoder=1,decoder=2"
"""The smallest useful model, for ``probe``."""


@dataclass(frozen=True, kw_only=True)
class DetrOptions(single_scale.SingleScaleOptions):
    """Options of DETR."""

    queries: Count = 100


OPTIONS = DetrOptions


def build(backbone: str, classes: Sequence[str], options: DetrOptions) -> DetrDetector:
    """A fresh DETR on a timm backbone: 100 queries, 6 encoder and 6 decoder layers, losses on every decoder layer.

    Raises:
        ModelError: the options do not fit the backbone or each other.
    """
    config = DetrConfig(
        backbone_config=models.backbone_config(backbone, options, (32,)),
        auxiliary_loss=True,
        **single_scale.single_scale_arguments(MODEL_TYPE, options),
        **models.label_maps(classes),
    )
    model = models.fresh_model(DetrForObjectDetection, config, DetrDetector.backbone_modules, backbone, options)
    name = options.name or f"{MODEL_TYPE}:{backbone}"
    return DetrDetector(model, name, **models.statistics(backbone, options), **models.selection(options))


def load_pretrained(
    source: str, classes: Sequence[str] | None, name: str, options: DetrSelectionOptions
) -> shared.TransformersDetector:
    """A DETR from a folder or the hub; see ``hf``."""
    return files.load_pretrained(DetrDetector, source, classes, name, options)


def load_exported(folder: Path, classes: Sequence[str], name: str) -> shared.TransformersDetector:
    """Load an exported student folder; see ``transformers_files.load_exported``."""
    return files.load_exported(DetrDetector, folder, classes, name)


class DetrDetector(shared.TransformersDetector):
    """DETR. Features are the encoder's one map, of stride 32; queries have learned positions and start with zero content."""

    model_class = DetrForObjectDetection
    backbone_modules = ("model.backbone",)
    neck_modules = ("model.input_projection", "model.encoder")
    head_modules = ("model.query_position_embeddings", "model.decoder", "class_labels_classifier", "bbox_predictor")
    class_outputs = ("class_labels_classifier",)
    softmax = True
    top_k = None

    def backbone_maps(self, images: Tensor, pixel_mask: Tensor) -> Sequence[tuple[Tensor, Tensor]]:
        """The backbone's last map."""
        return self.model.model.backbone(images, pixel_mask)[-1:]

    def encode(self, features: Features) -> Features:
        """1x1 projection and encoder."""
        return single_scale.encode_single_scale(self.model.model, features, self.positions(features))

    def before_encoder(self, features: Features, batch: Batch) -> Features:
        """1x1 projection."""
        return single_scale.project_single_scale(self.model.model, features)

    def positions(self, features: Features) -> Tensor:
        """[B, S, D] position embeddings of the cells, relative to the valid image."""
        return single_scale.single_scale_positions(self.model.model.position_embedding, features)

    def seed(self, features: Features, batch: Batch) -> QuerySeed:
        """Zero content and the learned positions; no reference."""
        position = self.model.model.query_position_embeddings.weight.unsqueeze(0).repeat(batch.images.shape[0], 1, 1)
        return QuerySeed(torch.zeros_like(position), position)

    def decode(self, features: Features, seed: QuerySeed, batch: Batch, attention: bool = False) -> Queries:
        """Decode from any seed; a missing ``position`` counts as zeros."""
        position = torch.zeros_like(seed.content) if seed.position is None else seed.position
        decoded = single_scale.decode_single_scale(self, features, self.positions(features), seed.content, position, attention)
        boxes = shared.full_precision(self.model.bbox_predictor(decoded.hidden)).sigmoid()
        logits = shared.full_precision(self.model.class_labels_classifier(decoded.hidden))
        return Queries(
            logits, boxes, decoded.hidden, seed, decoded.attention, softmax=True, self_attention=decoded.self_attention
        )

    # ------------------------------------------------------------------------------------------------------------ training

    def criterion(self) -> Any:
        """The library's criterion, with the matching costs of the model's config."""
        config = self.config
        matcher = HungarianMatcher(class_cost=config.class_cost, bbox_cost=config.bbox_cost, giou_cost=config.giou_cost)
        return ImageLoss(matcher, config.num_labels, config.eos_coefficient, ["labels", "boxes", "cardinality"])

    def class_loss(self, logits: Tensor, wanted: Tensor, overlap: Tensor) -> Tensor:
        """Cross-entropy; queries without a box are weighted by the config's ``eos_coefficient``."""
        return F.cross_entropy(logits.transpose(1, 2), wanted, self.empty_weights(logits), reduction="none")

    def class_normalizer(self, wanted: Tensor, counted: Tensor, boxes: Tensor) -> Tensor:
        """The sum of the class weights of all counted queries, as in torch's weighted mean."""
        return (self.empty_weights(boxes)[wanted] * counted).sum().clamp(min=1e-6)  # every query may be ignored

    def empty_weights(self, like: Tensor) -> Tensor:
        """[K+1] weight of each class, the background last."""
        weights = like.new_ones(len(self.spec.classes) + 1)
        weights[-1] = self.config.eos_coefficient
        return weights
