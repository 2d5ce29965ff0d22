"""LW-DETR and RF-DETR: a plain ViT, a projector, queries chosen from its cells, and groups of queries in training.

Chen et al., "LW-DETR: A Transformer Replacement to YOLO for Real-Time Detection", arXiv 2406.03459; groups as in Group DETR.
In training the library decodes several groups of queries beside each other, none of which sees another; ``Queries`` holds
the first, the only one that is there afterwards. Boxes are parts of the valid image, as in Deformable DETR.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.loss.loss_lw_detr import LwDetrHungarianMatcher, LwDetrImageLoss

from detdistill.detectors.contract import Pyramid
from detdistill.detectors.queries.shared import deformable
from detdistill.detectors.queries.shared import transformers_detector as shared
from detdistill.detectors.queries.shared.deformable import Memory, Outputs
from detdistill.errors import DataError
from detdistill.structures import Assignment, Batch, Features, Losses, Movable, Prediction, Queries, QuerySeed


@dataclass(frozen=True)
class Own(Movable):
    """What the losses need beside ``Queries``: the sets of all groups, [B, groups * N, ...]."""

    layers: tuple[Outputs, ...]
    encoder: Outputs | None
    """None for foreign queries."""
    groups: int


class GroupDetector(shared.TransformersDetector):
    """A detector of the family, in stages."""

    backbone_modules = ("model.backbone.backbone",)
    neck_modules = ("model.backbone.projector",)
    head_modules = (
        *("model.reference_point_embed", "model.query_feat", "model.decoder"),
        *("model.enc_output", "model.enc_output_norm", "model.enc_out_bbox_embed", "model.enc_out_class_embed"),
        *("class_embed", "bbox_embed"),
    )
    class_outputs = ("model.enc_out_class_embed", "class_embed")
    image_processor = "DeformableDetrImageProcessor"
    step: int
    """Sides of the images are made a multiple of this, for the windows of the ViT."""

    # --------------------------------------------------------------------------------------------------------- features

    def find_backbone_pyramid(self, size: int = 128) -> Pyramid:
        """By an image of a size that the windows fit."""
        return super().find_backbone_pyramid(2 * self.step)

    def rest(self, batch: Batch) -> tuple[int, int, int, int]:
        """What is padded on the right and at the bottom for the windows, as ``torch.nn.functional.pad`` wants it."""
        height, width = batch.padding_hw
        return 0, -width % self.step, 0, -height % self.step

    def backbone_maps(self, images: Tensor, pixel_mask: Tensor) -> Sequence[tuple[Tensor, Tensor]]:
        """The ViT's maps, all of one stride."""
        maps = self.model.model.backbone.backbone(images).feature_maps
        return [(level, resized(pixel_mask.float(), level)) for level in maps]

    def backbone_features(self, batch: Batch) -> Features:
        """As in the base, of images that the windows fit."""
        valid = F.pad((~batch.padding_mask()).long(), self.rest(batch))
        maps = self.backbone_maps(F.pad(self.normalized(batch), self.rest(batch)), valid)
        padding = None if bool(valid.all()) else tuple(~mask for _, mask in maps)
        return Features(tuple(level for level, _ in maps), self.backbone_strides, padding)

    def neck(self, features: Features, batch: Batch) -> Features:
        """The projector, with masks taken from the pixels as in the library."""
        return self.project(features, F.pad((~batch.padding_mask()).float(), self.rest(batch)))

    def encode(self, features: Features) -> Features:
        """The projector; masks are taken from the ViT's cells."""
        return self.project(features, shared.valid_masks(features)[0].float())

    def project(self, features: Features, valid: Tensor) -> Features:
        """The projector. ``valid``: [B, H, W] 1 where the image is, at any resolution."""
        found = self.model.model.backbone.projector(features.maps)
        maps = tuple(found) if isinstance(found, (list, tuple)) else (found,)
        padding = None if bool(valid.all()) else tuple(~resized(valid, level) for level in maps)
        return Features(maps, self.spec.strides, padding)

    # ----------------------------------------------------------------------------------------------------------- queries

    def choose(self, features: Features, groups: int) -> tuple[Tensor, Tensor, Outputs]:
        """Content [B, groups * N, D] and boxes [B, groups * N, 4] of the queries, and the encoder's outputs for them.

        Raises:
            DataError: the images have fewer cells than the detector has queries.
        """
        core, count = self.model.model, self.config.num_queries
        memory, masks = deformable.flatten(features.maps), shared.valid_masks(features)
        tokens = shared.full_precision(memory.tokens)
        if tokens.shape[1] < count:
            raise DataError(
                f"{self.spec.name}: these images give {tokens.shape[1]} cells, fewer than the {count} queries chosen from them; "
                f"take larger images or a detector with fewer queries"
            )
        padding = ~torch.cat([mask.flatten(1) for mask in masks], dim=1)
        cells, places, invalid = core.gen_encoder_output_proposals(tokens, padding, list(memory.shapes))
        logits, boxes = [], []
        for group in range(groups):
            hidden = core.enc_output_norm[group](core.enc_output[group](cells))
            scores = core.enc_out_class_embed[group](hidden).masked_fill(invalid, float("-inf")).amax(dim=-1)
            moved = moved_boxes(places, core.enc_out_bbox_embed[group](hidden))
            index = scores.topk(count, dim=1).indices[..., None]
            chosen = hidden.gather(1, index.expand(-1, -1, hidden.shape[-1]))
            logits.append(shared.full_precision(core.enc_out_class_embed[group](chosen)))
            boxes.append(moved.gather(1, index.expand(-1, -1, 4)))
        encoder = Outputs(torch.cat(logits, dim=1), torch.cat(boxes, dim=1))
        content = core.query_feat.weight[: groups * count].expand(len(tokens), -1, -1)
        learned = core.reference_point_embed.weight[: groups * count].expand(len(tokens), -1, -1)
        return content, moved_boxes(encoder.boxes.detach(), learned), encoder

    def seed(self, features: Features, batch: Batch) -> QuerySeed:
        """The first group's learned content, and the boxes of the chosen cells moved by the learned ones."""
        content, reference, _ = self.choose(features, 1)
        return QuerySeed(content, reference=reference)

    def predict(self, features: Features, batch: Batch, attention: bool = False) -> Queries:
        """The first group; in training the other groups are decoded beside it, for the loss."""
        groups, count = (self.config.group_detr if self.training else 1), self.config.num_queries
        content, reference, encoder = self.choose(features, groups)
        with deformable.watched(self.model.model.decoder.layers, attention, slice(count)) as looks:
            layers, embedding = self.run(features, content, reference, groups)
        seed = QuerySeed(content[:, :count], reference=reference[:, :count])
        first = [layer.take(0, count) for layer in layers]
        found = self.queries(first, embedding[:, :, :count], seed, Own(layers, encoder, groups))
        return replace(found, attention=looks.attention, self_attention=looks.self_attention)

    def decode(self, features: Features, seed: QuerySeed, batch: Batch, attention: bool = False) -> Queries:
        """Decode from any seed with a box (cxcywh) for each query, as one group; ``position`` is not used: the box is it.

        ``attention``: [L, B, heads, N, S] cross-attention, spread over the S cells of all levels (``dense_attention``).

        Raises:
            ValueError: the seed has no boxes.
        """
        if seed.reference is None or seed.reference.shape[-1] != 4:
            raise ValueError(f"{self.spec.name}: queries need a reference box (cxcywh), no point; give seed.reference [B, N, 4]")
        with deformable.watched(self.model.model.decoder.layers, attention) as looks:
            layers, embedding = self.run(features, seed.content, seed.reference, 1)
        found = self.queries(layers, embedding, seed, Own(layers, None, 1))
        return replace(found, attention=looks.attention, self_attention=looks.self_attention)

    def run(self, features: Features, content: Tensor, reference: Tensor, groups: int) -> tuple[tuple[Outputs, ...], Tensor]:
        """The decoder: outputs of each layer, and embeddings [L, B, N, D]. All layers start at one box."""
        memory: Memory = deformable.flatten(features.maps)
        masks, decoder, hidden = shared.valid_masks(features), self.model.model.decoder, content
        exact = shared.full_precision(memory.tokens).dtype
        ratios = torch.stack([self.model.model.get_valid_ratio(mask, dtype=exact) for mask in masks], dim=1)
        places, position = decoder.get_reference(reference, ratios)
        valid = torch.cat([mask.flatten(1) for mask in masks], dim=1)
        layers, embedding = [], []
        with self.groups(groups):
            for layer in decoder.layers:
                hidden = layer(
                    hidden,
                    position_embeddings=position,
                    reference_points=places,
                    encoder_hidden_states=memory.tokens,
                    encoder_attention_mask=valid,
                    **memory.where(),
                )
                normed = decoder.layernorm(hidden)
                boxes = moved_boxes(reference, shared.full_precision(self.model.bbox_embed(normed)))
                layers.append(Outputs(shared.full_precision(self.model.class_embed(normed)), boxes))
                embedding.append(normed)
        return tuple(layers), torch.stack(embedding)

    @contextmanager
    def groups(self, count: int) -> Iterator[None]:
        """Inside, the self-attention of training takes its queries for this many groups."""
        before = self.config.group_detr
        self.config.group_detr = count
        try:
            yield
        finally:
            self.config.group_detr = before

    def queries(self, layers: Sequence[Outputs], embedding: Tensor, seed: QuerySeed, own: Own) -> Queries:
        """The contract's structure."""
        logits, boxes = (torch.stack([getattr(layer, name) for layer in layers]) for name in ("logits", "boxes"))
        return Queries(logits, boxes, embedding, seed, own=own)

    # ------------------------------------------------------------------------------------------------------------ training

    def criterion(self) -> LwDetrImageLoss:
        """The library's criterion, with the matching costs of the model's config."""
        config = self.config
        matcher = LwDetrHungarianMatcher(config.class_cost, config.bbox_cost, config.giou_cost)
        losses = ["labels", "boxes", "cardinality"]
        return LwDetrImageLoss(matcher, config.num_labels, config.focal_alpha, losses, config.group_detr)

    def own(self, prediction: Prediction) -> Own:
        """What the losses need.

        Raises:
            ValueError: the prediction was split by image or read from a cache, so it has none.
        """
        if not isinstance(prediction.own, Own):
            raise ValueError(f"{self.spec.name}: this prediction has no raw outputs; call predict again on the features")
        return prediction.own

    def match(self, outputs: Outputs, batch: Batch, groups: int) -> Tensor:
        """[B, groups * N] the library's one-to-one matching within each group."""
        matcher, labels = self.criterion().matcher, self.labels(batch)
        size = outputs.logits.shape[1] // groups
        parts = [outputs.take(group * size, (group + 1) * size) for group in range(groups)]
        return torch.cat([deformable.hungarian(lambda o, t: matcher(o, t, 1), part, labels, batch) for part in parts], dim=1)

    def assign(self, prediction: Prediction, batch: Batch) -> Assignment:
        """The library's one-to-one matching of every decoder layer, first group."""
        own = self.own(prediction)
        size = own.layers[0].logits.shape[1] // own.groups
        return Assignment(torch.stack([self.match(layer.take(0, size), batch, 1) for layer in own.layers]))

    def loss(self, prediction: Prediction, batch: Batch, assignment: Assignment | None = None) -> Losses:
        """The library's terms with its weights: last layer, ``_i`` for the layers before, ``_enc`` for the encoder's outputs.

        All groups are trained; a foreign assignment is that of the first, the others and the encoder's keep their own.
        """
        own, whole = self.own(prediction), self.labels(batch, only_trainable=False)
        boxes = max(1, sum(len(entry["boxes"]) for entry in self.labels(batch)) * own.groups)
        normalizer: Any = boxes if assignment is None or assignment.normalizer is None else assignment.normalizer
        sets: list[tuple[str, Outputs, int | None]] = [("", own.layers[-1], len(own.layers) - 1)]
        if self.config.auxiliary_loss:
            sets += [(f"_{number}", layer, number) for number, layer in enumerate(own.layers[:-1])]
        if own.encoder is not None:
            sets.append(("_enc", own.encoder, None))
        terms = {}
        for suffix, outputs, layer in sets:
            matched = self.match(outputs, batch, own.groups)
            weights = torch.ones_like(outputs.logits[..., 0])
            if assignment is not None and layer is not None:
                count = assignment.matched.shape[2]
                matched[:, :count] = assignment.matched[layer]
                if assignment.weights is not None:
                    weights[:, :count] = assignment.weights[layer]
            pairs = deformable.pairs_of(matched, weights, whole, outputs.boxes.dtype)
            distance, overlap = deformable.box_losses(outputs, pairs)
            found = {
                "loss_ce": quality_loss(outputs, pairs, self.config.focal_alpha),
                "loss_bbox": distance,
                "loss_giou": overlap,
            }
            terms.update({name + suffix: value / normalizer * self.term_weights()[name] for name, value in found.items()})
        return Losses(terms)

    def term_weights(self) -> dict[str, float]:
        """Of the config."""
        return {**super().term_weights(), "loss_ce": self.config.class_loss_coefficient}


def quality_loss(outputs: Outputs, pairs: deformable.Pairs, alpha: float, gamma: float = 2.0) -> Tensor:
    """Sum over queries and classes of the IoU-aware cross-entropy: the matched class wants score^a * IoU^(1-a)."""
    probability, where = outputs.logits.sigmoid(), (pairs.image, pairs.query, pairs.labels)
    iou = deformable.overlaps(outputs.boxes[pairs.image, pairs.query].detach(), pairs.boxes)[0].to(probability.dtype)
    wanted = (probability[where].pow(alpha) * iou.pow(1 - alpha)).clamp(min=0.01).detach()
    up, down = torch.zeros_like(probability), probability.pow(gamma)
    up[where], down[where] = wanted, 1 - wanted
    entropy = -up * probability.log() - down * (1 - probability).log()
    return (entropy.sum(dim=-1) * pairs.counted).sum()


def moved_boxes(boxes: Tensor, deltas: Tensor) -> Tensor:
    """Boxes cxcywh moved by parts of their size and scaled by exponents."""
    center = deltas[..., :2] * boxes[..., 2:] + boxes[..., :2]
    return torch.cat([center, deltas[..., 2:].exp() * boxes[..., 2:]], dim=-1)


def resized(valid: Tensor, like: Tensor) -> Tensor:
    """A mask [B, H, W] of zeros and ones at the size of a map, nearest, as bool."""
    return F.interpolate(valid[None], size=like.shape[-2:])[0].bool()
