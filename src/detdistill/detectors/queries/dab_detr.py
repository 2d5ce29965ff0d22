"""DAB-DETR: transformers' model, run stage by stage.

Liu et al., "DAB-DETR: Dynamic Anchor Boxes are Better Queries for DETR", ICLR 2022, as in ``transformers.models.dab_detr``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DabDetrConfig, DabDetrForObjectDetection
from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher, DeformableDetrImageLoss

from detdistill.detectors.queries.shared import single_scale
from detdistill.detectors.queries.shared import transformers_detector as shared
from detdistill.detectors.queries.shared import transformers_files as files
from detdistill.detectors.queries.shared import transformers_models as models
from detdistill.detectors.queries.shared.options import DetrSelectionOptions
from detdistill.structures import Batch, Features, Queries, QuerySeed

MODEL_TYPE = "dab-detr"
OPTIONS = single_scale.SingleScaleOptions

TINY = "resnet10t,channels=8-16-32-64,stem=8,dim=32,heads=4,ffn=64,queries=10,encoder=1,decoder=2"
"""The smallest useful model, for ``probe``."""


def build(backbone: str, classes: Sequence[str], options: single_scale.SingleScaleOptions) -> DabDetrDetector:
    """A fresh DAB-DETR on a timm backbone: 300 anchors, 6 encoder and 6 decoder layers, losses on every layer.

    Raises:
        ModelError: the options do not fit the backbone or each other.
    """
    arguments = single_scale.single_scale_arguments("dab_detr", options)
    config = DabDetrConfig(
        backbone_config=models.backbone_config(backbone, options, (32,)),
        auxiliary_loss=True,
        hidden_size=arguments.pop("d_model"),
        **arguments,
        **models.label_maps(classes),
    )
    model = models.fresh_model(DabDetrForObjectDetection, config, DabDetrDetector.backbone_modules, backbone, options)
    name = options.name or f"dab_detr:{backbone}"
    return DabDetrDetector(model, name, **models.statistics(backbone, options), **models.selection(options))


def load_pretrained(
    source: str, classes: Sequence[str] | None, name: str, options: DetrSelectionOptions
) -> shared.TransformersDetector:
    """A DAB-DETR from a folder or the hub; see ``hf``."""
    return files.load_pretrained(DabDetrDetector, source, classes, name, options)


def load_exported(folder: Path, classes: Sequence[str], name: str) -> shared.TransformersDetector:
    """Load an exported student folder; see ``transformers_files.load_exported``."""
    return files.load_exported(DabDetrDetector, folder, classes, name)


@dataclass(frozen=True)
class AnchorSeed(QuerySeed):
    """DAB-DETR's own seed: ``reference`` and the logits it was computed from, so that decoding needs no inverse sigmoid."""

    anchors: Tensor | None = None
    """[B, N, 4] the reference boxes before the sigmoid."""


class DabDetrDetector(shared.TransformersDetector):
    """DAB-DETR. Features are the encoder's one map, of stride 32; sigmoid outputs.

    Queries are anchor boxes (``reference``) whose content is zero or a learned pattern. Seeds have no ``position``.
    """

    model_class = DabDetrForObjectDetection
    backbone_modules = ("model.backbone.conv_encoder",)
    neck_modules = ("model.input_projection", "model.encoder")
    head_modules = ("model.query_refpoint_embeddings", "model.decoder", "class_embed", "bbox_predictor")
    class_outputs = ("class_embed",)
    image_processor = "ConditionalDetrImageProcessor"

    @property
    def width(self) -> int:
        """Channels of the encoder's map."""
        return int(self.config.hidden_size)

    def backbone_maps(self, images: Tensor, pixel_mask: Tensor) -> Sequence[tuple[Tensor, Tensor]]:
        """The backbone's last map."""
        return self.model.model.backbone.conv_encoder(images, pixel_mask)[-1:]

    def encode(self, features: Features) -> Features:
        """1x1 projection and encoder."""
        model, level = self.model.model, features.maps[-1]
        encoded = model.encoder(
            inputs_embeds=shared.flat_map(model.input_projection(level)),
            attention_mask=shared.valid_masks(features)[-1].flatten(1),
            object_queries=self.positions(features),
        )
        padding = None if features.padding is None else features.padding[-1:]
        return Features((shared.as_map(encoded.last_hidden_state, level),), features.strides[-1:], padding)

    def before_encoder(self, features: Features, batch: Batch) -> Features:
        """1x1 projection."""
        return single_scale.project_single_scale(self.model.model, features)

    def positions(self, features: Features) -> Tensor:
        """[B, S, D] position embeddings of the cells, relative to the valid image."""
        level, mask = features.maps[-1], shared.valid_masks(features)[-1]
        embedded = self.model.model.backbone.position_embedding(level, mask)
        return shared.flat_map(embedded.to(shared.full_precision(level).dtype))

    def seed(self, features: Features, batch: Batch) -> AnchorSeed:
        """The learned anchors. With P patterns, every anchor occurs P times, once with each pattern as its content."""
        model, count = self.model.model, max(1, self.model.model.num_patterns)
        anchors = model.query_refpoint_embeddings.weight.unsqueeze(0).repeat(batch.images.shape[0], count, 1)
        if model.num_patterns:
            content = model.patterns.weight.repeat_interleave(model.num_queries, dim=0).expand(batch.images.shape[0], -1, -1)
        else:
            content = anchors.new_zeros(*anchors.shape[:2], self.width)
        return AnchorSeed(content, None, anchors.sigmoid(), anchors)

    def decode(self, features: Features, seed: QuerySeed, batch: Batch, attention: bool = False) -> Queries:
        """Decode from any seed that has a reference: boxes, or points, which are given the mean size of the learned anchors.

        Raises:
            ValueError: the seed has no reference.
        """
        with self.attention_maps(attention) as wanted:
            outputs = self.model.model.decoder(
                inputs_embeds=seed.content,
                query_position_embeddings=self.anchors(seed),
                object_queries=self.positions(features),
                encoder_hidden_states=shared.flat_map(features.maps[-1]),
                memory_key_padding_mask=shared.valid_masks(features)[-1].flatten(1),
                **wanted,
            )
        hidden = outputs.intermediate_hidden_states
        before = shared.inverse_sigmoid(shared.full_precision(outputs.reference_points))
        boxes = (shared.full_precision(self.model.bbox_predictor(hidden)) + before).sigmoid()
        logits = shared.full_precision(self.model.class_embed(hidden))
        if not attention:
            return Queries(logits, boxes, hidden, seed)
        looks, among = (torch.stack(tuple(maps)) for maps in (outputs.cross_attentions, outputs.attentions))
        return Queries(logits, boxes, hidden, seed, looks, self_attention=among)

    def anchors(self, seed: QuerySeed) -> Tensor:
        """[B, N, 4] a seed's boxes before the sigmoid."""
        if isinstance(seed, AnchorSeed) and seed.anchors is not None:
            return seed.anchors
        if seed.reference is None:
            raise ValueError(f"{self.spec.name}: a seed without reference cannot be decoded; DAB-DETR's queries are boxes")
        points = shared.inverse_sigmoid(seed.reference)
        if points.shape[-1] == 4:
            return points
        size = self.model.model.query_refpoint_embeddings.weight[:, 2:].mean(dim=0)
        return torch.cat([points, size.expand_as(points)], dim=-1)

    def criterion(self) -> Any:
        """The library's criterion, with the matching costs of the model's config."""
        return shared.focal_criterion(self.config, DeformableDetrHungarianMatcher, DeformableDetrImageLoss)
