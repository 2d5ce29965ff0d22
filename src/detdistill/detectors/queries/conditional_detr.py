"""Conditional DETR: transformers' model, run stage by stage.

Meng et al., "Conditional DETR for Fast Training Convergence", ICCV 2021, as in ``transformers.models.conditional_detr``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import ConditionalDetrConfig, ConditionalDetrForObjectDetection
from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher, DeformableDetrImageLoss

from detdistill.detectors.queries.shared import single_scale
from detdistill.detectors.queries.shared import transformers_detector as shared
from detdistill.detectors.queries.shared import transformers_files as files
from detdistill.detectors.queries.shared import transformers_models as models
from detdistill.detectors.queries.shared.options import DetrSelectionOptions
from detdistill.structures import Batch, Features, Queries, QuerySeed

MODEL_TYPE = "conditional_detr"
OPTIONS = single_scale.SingleScaleOptions

TINY = "resnet10t,channels=8-16-32-64,stem=8,dim=32,heads=4,ffn=64,queries=10,encoder=1,decoder=2"
"""The smallest useful model, for ``probe``."""


def build(backbone: str, classes: Sequence[str], options: single_scale.SingleScaleOptions) -> ConditionalDetrDetector:
    """A fresh Conditional DETR on a timm backbone: 300 queries, 6 encoder and 6 decoder layers, losses on every layer.

    Raises:
        ModelError: the options do not fit the backbone or each other.
    """
    config = ConditionalDetrConfig(
        backbone_config=models.backbone_config(backbone, options, (32,)),
        auxiliary_loss=True,
        **single_scale.single_scale_arguments(MODEL_TYPE, options),
        **models.label_maps(classes),
    )
    modules = ConditionalDetrDetector.backbone_modules
    model = models.fresh_model(ConditionalDetrForObjectDetection, config, modules, backbone, options)
    name = options.name or f"{MODEL_TYPE}:{backbone}"
    return ConditionalDetrDetector(model, name, **models.statistics(backbone, options), **models.selection(options))


def load_pretrained(
    source: str, classes: Sequence[str] | None, name: str, options: DetrSelectionOptions
) -> shared.TransformersDetector:
    """A Conditional DETR from a folder or the hub; see ``hf``."""
    return files.load_pretrained(ConditionalDetrDetector, source, classes, name, options)


def load_exported(folder: Path, classes: Sequence[str], name: str) -> shared.TransformersDetector:
    """Load an exported student folder; see ``transformers_files.load_exported``."""
    return files.load_exported(ConditionalDetrDetector, folder, classes, name)


class ConditionalDetrDetector(shared.TransformersDetector):
    """Conditional DETR. Features are the encoder's one map, of stride 32; sigmoid outputs.

    The content of the queries starts at zero. The decoder computes the reference points from a seed's ``position`` and does
    not read its ``reference``.
    """

    model_class = ConditionalDetrForObjectDetection
    backbone_modules = ("model.backbone",)
    neck_modules = ("model.input_projection", "model.encoder")
    head_modules = ("model.query_position_embeddings", "model.decoder", "class_labels_classifier", "bbox_predictor")
    class_outputs = ("class_labels_classifier",)
    image_processor = "ConditionalDetrImageProcessor"

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
        """Zero content, the learned positions, and the reference points [B, N, 2] that the decoder derives from them."""
        position = self.model.model.query_position_embeddings.weight.unsqueeze(0).repeat(batch.images.shape[0], 1, 1)
        return QuerySeed(torch.zeros_like(position), position, self.reference(position))

    def reference(self, position: Tensor) -> Tensor:
        """[B, N, 2] reference points (x, y) as fractions of the valid image."""
        return shared.full_precision(self.model.model.decoder.ref_point_head(position)).sigmoid()

    def decode(self, features: Features, seed: QuerySeed, batch: Batch, attention: bool = False) -> Queries:
        """Decode from any seed; a missing ``position`` counts as zeros."""
        position = torch.zeros_like(seed.content) if seed.position is None else seed.position
        decoded = single_scale.decode_single_scale(self, features, self.positions(features), seed.content, position, attention)
        center = shared.inverse_sigmoid(shared.full_precision(decoded.outputs.reference_points).transpose(0, 1))
        shift = torch.cat([center, torch.zeros_like(center)], dim=-1)
        boxes = (shared.full_precision(self.model.bbox_predictor(decoded.hidden)) + shift).sigmoid()
        logits = shared.full_precision(self.model.class_labels_classifier(decoded.hidden))
        return Queries(logits, boxes, decoded.hidden, seed, decoded.attention, self_attention=decoded.self_attention)

    def criterion(self) -> Any:
        """The library's criterion, with the matching costs of the model's config."""
        return shared.focal_criterion(self.config, DeformableDetrHungarianMatcher, DeformableDetrImageLoss)
