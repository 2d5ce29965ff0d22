"""Deformable DETR: transformers' model, run stage by stage; plain, with box refinement, or two-stage.

Zhu et al., "Deformable DETR: Deformable Transformers for End-to-End Object Detection", ICLR 2021, as in
``transformers.models.deformable_detr``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection
from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher, DeformableDetrImageLoss

from detdistill.detectors.contract import Parts
from detdistill.detectors.queries.shared import deformable
from detdistill.detectors.queries.shared import transformers_detector as shared
from detdistill.detectors.queries.shared import transformers_files as files
from detdistill.detectors.queries.shared import transformers_models as models
from detdistill.detectors.queries.shared.deformable import Outputs
from detdistill.detectors.queries.shared.options import (
    DetrSelectionOptions,
    EncoderOptions,
    QueryOptions,
    SamplingOptions,
)
from detdistill.detectors.torchvision.options import BackboneOptions, LevelOptions, Levels
from detdistill.errors import ModelError
from detdistill.functional.counting import divisor_over_ranks
from detdistill.structures import Assignment, Batch, Features, Losses, Prediction, Queries, QuerySeed
from detdistill.values import Count

MODEL_TYPE = "deformable_detr"
PRIOR = 0.01
"""Initial score of every class, as in the authors' code. transformers starts at 0.5, from which training hardly improves."""

TINY = "resnet10t,channels=8-16-32-64,stem=8,dim=32,heads=4,ffn=64,queries=10,encoder=1,decoder=2"
"""The smallest useful model, for ``probe``."""


@dataclass(frozen=True, kw_only=True)
class DeformableDetrOptions(DetrSelectionOptions, SamplingOptions, QueryOptions, EncoderOptions, BackboneOptions, LevelOptions):
    """Options of Deformable DETR."""

    levels: Levels = (3, 6)
    ffn: Count = 1024
    refine: bool = False
    """Each decoder layer refines the boxes of the previous layer."""
    two_stage: bool = False
    """Queries are chosen from the encoder's cells; includes ``refine``."""


OPTIONS = DeformableDetrOptions


def build(backbone: str, classes: Sequence[str], options: DeformableDetrOptions) -> DeformableDetrDetector:
    """A fresh Deformable DETR on a timm backbone: levels 3-6, 300 queries, 6 encoder and 6 decoder layers.

    Levels above 5 are convolutions on top of the backbone.

    Raises:
        ModelError: the options do not fit the backbone or each other.
    """
    width, heads = options.dim, options.heads
    if width % heads or width % 32:
        raise ModelError(f"{MODEL_TYPE}: dim={width} must be a multiple of heads={heads} and of 32 (its norms have 32 groups)")
    first, last = options.levels
    strides = tuple(2**level for level in range(first, min(last, 5) + 1))
    if not strides or (len(strides) == 1 and last > first):
        raise ModelError(f"{MODEL_TYPE}: levels={first}-{last} must begin at 5 or below, and with one level end there")
    config = DeformableDetrConfig(
        backbone_config=models.backbone_config(backbone, options, strides),
        auxiliary_loss=True,
        num_feature_levels=last - first + 1,
        d_model=width,
        num_queries=options.queries,
        two_stage_num_proposals=options.queries,
        encoder_layers=options.encoder,
        decoder_layers=options.decoder,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=options.ffn,
        decoder_ffn_dim=options.ffn,
        encoder_n_points=options.points,
        decoder_n_points=options.points,
        with_box_refine=options.refine or options.two_stage,
        two_stage=options.two_stage,
        **models.label_maps(classes),
    )
    model = models.fresh_model(
        DeformableDetrForObjectDetection, config, DeformableDetrDetector.backbone_modules, backbone, options
    )
    name = options.name or f"{MODEL_TYPE}:{backbone}"
    return DeformableDetrDetector(
        start_as_published(model), name, **models.statistics(backbone, options), **models.selection(options)
    )


def load_pretrained(
    source: str, classes: Sequence[str] | None, name: str, options: DetrSelectionOptions
) -> shared.TransformersDetector:
    """A Deformable DETR from a folder or the hub; see ``hf``."""
    return files.load_pretrained(DeformableDetrDetector, source, classes, name, options)


def load_exported(folder: Path, classes: Sequence[str], name: str) -> shared.TransformersDetector:
    """Load an exported student folder; see ``transformers_files.load_exported``."""
    return files.load_exported(DeformableDetrDetector, folder, classes, name)


@torch.no_grad()
def start_as_published(model: Any) -> Any:
    """Initialise the outputs as the authors' code does: low class scores, and small boxes at the reference points."""
    for number, (class_head, box_head) in enumerate(zip(model.class_embed, model.bbox_embed, strict=True)):
        class_head.bias.fill_(-math.log((1 - PRIOR) / PRIOR))
        box_head.layers[-1].weight.zero_()
        box_head.layers[-1].bias.zero_()
        if not model.config.two_stage and (number == 0 or not model.config.with_box_refine):
            box_head.layers[-1].bias[2:].fill_(-2.0)
    return model


class DeformableDetrDetector(shared.TransformersDetector):
    """Deformable DETR. Features are the encoder's maps of all levels.

    Boxes and references are fractions of the valid image. As in the library, the valid image is measured in whole cells of
    each level, so boxes are off by a fraction of a cell where padding begins inside a cell.

    Two-stage queries are the encoder cells with the highest score of the first class. transformers has no loss on the
    encoder's outputs, so the paper's loss (appendix A.4) is added as ``loss_*_enc``; as in the authors' code, all boxes count
    as the first class.
    """

    model_class = DeformableDetrForObjectDetection
    backbone_modules = ("model.backbone",)
    neck_modules = ("model.input_proj", "model.encoder")
    head_modules = (
        *("model.query_position_embeddings", "model.reference_points"),
        *("model.enc_output", "model.enc_output_norm", "model.pos_trans", "model.pos_trans_norm"),  # two-stage
        "model.decoder",
        *("class_embed", "bbox_embed"),
    )
    class_outputs = ("class_embed", "model.decoder.class_embed")
    image_processor = "DeformableDetrImageProcessor"

    def parts(self) -> Parts:
        """As in the base; the level embeddings belong to the neck."""
        found = super().parts()
        return replace(found, neck=(*found.neck, nn.ParameterList([self.model.model.level_embed])))

    # --------------------------------------------------------------------------------------------------------- features

    def neck_strides(self) -> tuple[int, ...]:
        """The backbone's strides; every added level doubles the stride of the previous one."""
        strides = list(self.backbone_strides)
        while len(strides) < self.config.num_feature_levels:
            strides.append(2 * strides[-1])
        return tuple(strides)

    def backbone_maps(self, images: Tensor, pixel_mask: Tensor) -> Sequence[tuple[Tensor, Tensor]]:
        """The maps of the library's backbone."""
        return self.model.model.backbone(images, pixel_mask)

    def neck(self, features: Features, batch: Batch) -> Features:
        """Projections and encoder; masks of the added levels are taken from the pixels, as in the library."""
        return self.encode_masked(features, (~batch.padding_mask()).float())

    def encode(self, features: Features) -> Features:
        """Projections and encoder; masks of the added levels are taken from the finest map, which may differ by one cell."""
        return self.encode_masked(features, shared.valid_masks(features)[0].float())

    def encode_masked(self, features: Features, valid: Tensor) -> Features:
        """Projections and encoder. ``valid``: [B, H, W] 1 where the image is; masks of added levels are sampled from it."""
        core = self.model.model
        maps, masks = self.projected(features, valid)
        memory = deformable.flatten(maps)
        dtype = shared.full_precision(features.maps[0]).dtype
        positions = []
        for number, (level, mask) in enumerate(zip(maps, masks, strict=True)):
            place = core.position_embedding(shape=level.shape, device=level.device, dtype=dtype, mask=mask).to(level.dtype)
            positions.append(shared.flat_map(place) + core.level_embed[number].view(1, 1, -1))
        encoded = core.encoder(
            inputs_embeds=memory.tokens,
            attention_mask=torch.cat([mask.flatten(1) for mask in masks], dim=1),
            spatial_position_embeddings=torch.cat(positions, dim=1),
            valid_ratios=valid_ratios(masks, memory.tokens.dtype),
            **memory.where(),
        ).last_hidden_state
        return Features(deformable.unflatten(encoded, memory.shapes), self.spec.strides, padding_of(masks))

    def before_encoder(self, features: Features, batch: Batch) -> Features:
        """Projections only: what the encoder reads on all levels, without positions."""
        maps, masks = self.projected(features, (~batch.padding_mask()).float())
        return Features(tuple(maps), self.spec.strides, padding_of(masks))

    def projected(self, features: Features, valid: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Maps and masks of all levels before the encoder; ``valid`` as in ``encode_masked``."""
        projections = self.model.model.input_proj
        maps = [project(level) for project, level in zip(projections, features.maps, strict=False)]
        masks = list(shared.valid_masks(features))
        for number, project in enumerate(projections[len(maps) :]):
            maps.append(project(maps[-1] if number else features.maps[-1]))
            masks.append(F.interpolate(valid[None], size=maps[-1].shape[-2:])[0].bool())
        return maps, masks

    # ----------------------------------------------------------------------------------------------------------- queries

    def propose(self, features: Features) -> tuple[QuerySeed, Outputs | None]:
        """Initial queries, and in a two-stage model the class and box outputs of the encoder for every cell (else None).

        Raises:
            ModelError: the images have fewer cells than the detector has queries.
        """
        core, width, count = self.model.model, self.config.d_model, features.maps[0].shape[0]
        if not self.config.two_stage:
            position, content = (half.expand(count, -1, -1) for half in core.query_position_embeddings.weight.split(width, 1))
            return QuerySeed(content, position, shared.full_precision(core.reference_points(position)).sigmoid()), None
        memory, masks = deformable.flatten(features.maps), shared.valid_masks(features)
        queries = self.config.two_stage_num_proposals
        if memory.tokens.shape[1] < queries:
            raise ModelError(
                f"{self.spec.name}: these images give {memory.tokens.shape[1]} encoder cells, fewer than the {queries} queries "
                f"chosen from them; take larger images or a detector with queries={memory.tokens.shape[1]} or fewer"
            )
        padding = ~torch.cat([mask.flatten(1) for mask in masks], dim=1)
        cells, places = core.gen_encoder_output_proposals(shared.full_precision(memory.tokens), padding, list(memory.shapes))
        logits = core.decoder.class_embed[-1](cells)
        unactivated = core.decoder.bbox_embed[-1](cells) + places
        index = logits[..., 0].topk(queries, dim=1).indices
        chosen = unactivated.gather(1, index[..., None].expand(-1, -1, 4)).detach()
        position, content = core.pos_trans_norm(core.pos_trans(core.get_proposal_pos_embed(chosen))).split(width, dim=2)
        outputs = Outputs(shared.full_precision(logits), shared.full_precision(unactivated).sigmoid())
        return QuerySeed(content, position, chosen.sigmoid()), outputs

    def seed(self, features: Features, batch: Batch) -> QuerySeed:
        """Learned queries with reference points [B, N, 2]; two-stage: queries made of proposals, with boxes [B, N, 4]."""
        return self.propose(features)[0]

    def predict(self, features: Features, batch: Batch, attention: bool = False) -> Queries:
        """The decoder on the detector's own queries."""
        seed, encoder = self.propose(features)
        return replace(self.decode(features, seed, batch, attention), own=encoder)

    def decode(self, features: Features, seed: QuerySeed, batch: Batch, attention: bool = False) -> Queries:
        """Decode from any seed. References may be points or boxes; missing ones are computed from the positions.

        ``attention``: [L, B, heads, N, S] cross-attention, spread over the S cells of all levels (``dense_attention``).

        Raises:
            ValueError: the seed has no reference, and none can be computed: no position, or a two-stage model.
        """
        memory, masks = deformable.flatten(features.maps), shared.valid_masks(features)
        decoder, hidden, reference = self.model.model.decoder, seed.content, seed.reference
        if reference is None:
            if seed.position is None or self.config.two_stage:
                raise ValueError(f"{self.spec.name}: queries need a reference; give seed.reference [B, N, 2] or [B, N, 4]")
            reference = shared.full_precision(self.model.model.reference_points(seed.position)).sigmoid()
        ratios = valid_ratios(masks, shared.full_precision(memory.tokens).dtype)
        valid = torch.cat([mask.flatten(1) for mask in masks], dim=1)
        logits, boxes, embedding = [], [], []
        with deformable.watched(decoder.layers, attention) as looks:
            for number, layer in enumerate(decoder.layers):
                places = reference[:, :, None] * ratios.repeat(1, 1, reference.shape[-1] // 2)[:, None]
                hidden = layer(
                    hidden,
                    seed.position,
                    places,
                    **memory.where(),
                    encoder_hidden_states=memory.tokens,
                    encoder_attention_mask=valid,
                )
                moved = self.model.bbox_embed[number](hidden)
                start = shared.inverse_sigmoid(reference)
                if start.shape[-1] == 4:
                    box = (moved + start).sigmoid()
                else:
                    box = torch.cat([moved[..., :2] + start, shared.full_precision(moved[..., 2:])], dim=-1).sigmoid()
                logits.append(shared.full_precision(self.model.class_embed[number](hidden)))
                boxes.append(box)
                embedding.append(hidden)
                if self.config.with_box_refine:
                    reference = box.detach()
        layers = [torch.stack(values) for values in (logits, boxes, embedding)]
        return Queries(layers[0], layers[1], layers[2], seed, looks.attention, self_attention=looks.self_attention)

    # ------------------------------------------------------------------------------------------------------------ training

    def criterion(self) -> Any:
        """The library's criterion, with the matching costs of the model's config."""
        return shared.focal_criterion(self.config, DeformableDetrHungarianMatcher, DeformableDetrImageLoss)

    def loss(self, prediction: Prediction, batch: Batch, assignment: Assignment | None = None) -> Losses:
        """As in the base; two-stage: plus the encoder's losses, which always use their own matching."""
        losses = super().loss(prediction, batch, assignment)
        if not isinstance(prediction.own, Outputs):
            return losses
        encoder = self.encoder_losses(prediction.own, batch)
        if shared.diverged_losses(prediction) is not None:
            return losses
        return Losses({**losses.terms, **encoder}, losses.monitors)

    def encoder_losses(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Focal, L1 and GIoU loss of the encoder's outputs in all cells; every box counts as the first class (appendix A.4)."""
        labels = [entry | {"class_labels": torch.zeros_like(entry["class_labels"])} for entry in self.labels(batch)]
        whole = [
            entry | {"class_labels": torch.zeros_like(entry["class_labels"])}
            for entry in self.labels(batch, only_trainable=False)
        ]
        matched = deformable.hungarian(self.criterion().matcher, outputs, labels, batch)
        pairs = deformable.pairs_of(matched, None, whole, outputs.boxes.dtype)
        count, weights = sum(len(entry["boxes"]) for entry in labels), self.term_weights()
        divisor = divisor_over_ranks(count, outputs.logits)
        distance, overlap = deformable.box_losses(outputs, pairs)
        found = {
            "loss_ce": deformable.focal_loss(outputs, pairs, self.config.focal_alpha),
            "loss_bbox": distance,
            "loss_giou": overlap,
        }
        return {f"{name}_enc": value / divisor * weights[name] for name, value in found.items()}

    def without(self, modules: Sequence[str], fresh: bool) -> shared.TransformersDetector:
        """As in the base; fresh outputs are initialised as published (``start_as_published``)."""
        other = super().without(modules, fresh)
        if "model.encoder" in modules:
            other.model.model.level_embed = None
        if fresh and "class_embed" not in modules:
            start_as_published(other.model)
        return other


def valid_ratios(masks: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """[B, levels, 2] share of valid columns and rows of each level."""
    shares = []
    for mask in masks:
        columns, rows = mask[:, 0].sum(1).to(dtype) / mask.shape[2], mask[:, :, 0].sum(1).to(dtype) / mask.shape[1]
        shares.append(torch.stack([columns, rows], dim=-1))
    return torch.stack(shares, dim=1)


def padding_of(masks: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
    """Padding masks [B, H_l, W_l] of masks that are True where valid; None if all is."""
    return None if all(bool(mask.all()) for mask in masks) else tuple(~mask for mask in masks)
