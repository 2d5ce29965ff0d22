"""LW-DETR and RF-DETR: a plain ViT, a projector, queries selected from its cells, and groups of queries in training.

Chen et al., "LW-DETR: A Transformer Replacement to YOLO for Real-Time Detection", arXiv 2406.03459; groups as in Group DETR.
In training, transformers decodes several groups of queries in parallel, without attention between groups. ``Queries`` holds
the first group, the only one used in inference. Boxes are fractions of the valid image, as in Deformable DETR.
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
from detdistill.functional.counting import divisor_over_ranks
from detdistill.structures import Assignment, Batch, Features, Losses, Movable, Prediction, Queries, QuerySeed


@dataclass(frozen=True)
class Own(Movable):
    """Outputs for the losses that ``Queries`` does not contain: the sets of all groups, [B, groups * N, ...]."""

    layers: tuple[Outputs, ...]
    encoder: Outputs | None
    """Predictions of the encoder's heads; None: the queries come from elsewhere."""
    groups: int


class GroupDetector(shared.TransformersDetector):
    """Base class of the adapters of LW-DETR and RF-DETR."""

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
    """Images are padded to a multiple of this number of pixels, for the windows of the ViT."""

    # --------------------------------------------------------------------------------------------------------- features

    def find_backbone_pyramid(self, size: int = 128) -> Pyramid:
        """Determine the backbone's pyramid by a run on an image whose size is a multiple of the windows."""
        return super().find_backbone_pyramid(2 * self.step)

    def rest(self, batch: Batch) -> tuple[int, int, int, int]:
        """Return the padding for the windows (right and bottom), as an argument of ``torch.nn.functional.pad``."""
        height, width = batch.padding_hw
        return 0, -width % self.step, 0, -height % self.step

    def backbone_maps(self, images: Tensor, pixel_mask: Tensor) -> Sequence[tuple[Tensor, Tensor]]:
        """Compute the ViT's maps, all of one stride."""
        maps = self.model.model.backbone.backbone(images).feature_maps
        return [(level, resized(pixel_mask.float(), level)) for level in maps]

    def backbone_features(self, batch: Batch) -> Features:
        """Compute the backbone's maps as the base class does, on images padded for the windows."""
        valid = F.pad((~batch.padding_mask()).long(), self.rest(batch))
        maps = self.backbone_maps(F.pad(self.normalized(batch), self.rest(batch)), valid)
        padding = None if bool(valid.all()) else tuple(~mask for _, mask in maps)
        return Features(tuple(level for level, _ in maps), self.backbone_strides, padding)

    def neck(self, features: Features, batch: Batch) -> Features:
        """Run the projector; padding masks come from the pixel mask, as in transformers."""
        return self.project(features, F.pad((~batch.padding_mask()).float(), self.rest(batch)))

    def before_encoder(self, features: Features, batch: Batch) -> Features:
        """Run the projector; there is no encoder."""
        return self.neck(features, batch)

    def encode(self, features: Features) -> Features:
        """Run the projector; padding masks come from the masks of the ViT's maps."""
        return self.project(features, shared.valid_masks(features)[0].float())

    def project(self, features: Features, valid: Tensor) -> Features:
        """Run the projector. ``valid``: mask [B, H, W] at any resolution, 1 inside the valid image."""
        found = self.model.model.backbone.projector(features.maps)
        maps = tuple(found) if isinstance(found, (list, tuple)) else (found,)
        padding = None if bool(valid.all()) else tuple(~resized(valid, level) for level in maps)
        return Features(maps, self.spec.strides, padding)

    # ----------------------------------------------------------------------------------------------------------- queries

    def choose(self, features: Features, groups: int) -> tuple[Tensor, Tensor, Outputs]:
        """Compute content [B, groups * N, D] and boxes [B, groups * N, 4] of the queries, and the encoder's outputs for them.

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
        content = core.query_feat.weight[: groups * count].expand(tokens.shape[0], -1, -1)
        learned = core.reference_point_embed.weight[: groups * count].expand(tokens.shape[0], -1, -1)
        return content, moved_boxes(encoder.boxes.detach(), learned), encoder

    def seed(self, features: Features, batch: Batch) -> QuerySeed:
        """Compute the first group's queries: learned content, and the boxes of the selected cells with the learned offsets."""
        content, reference, _ = self.choose(features, 1)
        return QuerySeed(content, reference=reference)

    def predict(self, features: Features, batch: Batch, attention: bool = False) -> Queries:
        """Decode the first group; in training also the other groups, for the loss."""
        groups, count = (self.config.group_detr if self.training else 1), self.config.num_queries
        content, reference, encoder = self.choose(features, groups)
        with deformable.watched(self.model.model.decoder.layers, attention, slice(count)) as looks:
            layers, embedding = self.run(features, content, reference, groups)
        seed = QuerySeed(content[:, :count], reference=reference[:, :count])
        first = [layer.take(0, count) for layer in layers]
        found = self.queries(first, embedding[:, :, :count], seed, Own(layers, encoder, groups))
        return replace(found, attention=looks.attention, self_attention=looks.self_attention)

    def decode(self, features: Features, seed: QuerySeed, batch: Batch, attention: bool = False) -> Queries:
        """Decode from any seed with a box (cxcywh) for each query, as one group. The box gives the position.

        ``seed.position`` is not used. The prediction's ``attention`` is the cross-attention [L, B, heads, N, S] over the S
        cells of all levels (see ``dense_attention``).

        Raises:
            ValueError: the seed has no boxes.
        """
        if seed.reference is None or seed.reference.shape[-1] != 4:
            raise ValueError(
                f"{self.spec.name}: queries need a reference box (cxcywh), not a point; give seed.reference [B, N, 4]"
            )
        with deformable.watched(self.model.model.decoder.layers, attention) as looks:
            layers, embedding = self.run(features, seed.content, seed.reference, 1)
        found = self.queries(layers, embedding, seed, Own(layers, None, 1))
        return replace(found, attention=looks.attention, self_attention=looks.self_attention)

    def run(self, features: Features, content: Tensor, reference: Tensor, groups: int) -> tuple[tuple[Outputs, ...], Tensor]:
        """Run the decoder: outputs of each layer, and embeddings [L, B, N, D]. All layers refine the same initial box."""
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
        """Context in which the self-attention in training mode splits its queries into this number of groups."""
        before = self.config.group_detr
        self.config.group_detr = count
        try:
            yield
        finally:
            self.config.group_detr = before

    def queries(self, layers: Sequence[Outputs], embedding: Tensor, seed: QuerySeed, own: Own) -> Queries:
        """Convert the decoder outputs to ``Queries``."""
        logits, boxes = (torch.stack([getattr(layer, name) for layer in layers]) for name in ("logits", "boxes"))
        return Queries(logits, boxes, embedding, seed, own=own)

    # ------------------------------------------------------------------------------------------------------------ training

    def criterion(self) -> LwDetrImageLoss:
        """Build transformers' criterion, with the matching costs of the model's config."""
        config = self.config
        matcher = LwDetrHungarianMatcher(config.class_cost, config.bbox_cost, config.giou_cost)
        losses = ["labels", "boxes", "cardinality"]
        return LwDetrImageLoss(matcher, config.num_labels, config.focal_alpha, losses, config.group_detr)

    def own(self, prediction: Prediction) -> Own:
        """Return the raw outputs of a prediction for the losses.

        Raises:
            ValueError: the prediction has no raw outputs, because it was split by image or read from a cache.
        """
        if not isinstance(prediction.own, Own):
            raise ValueError(f"{self.spec.name}: this prediction has no raw outputs; call predict again on the features")
        return prediction.own

    def match(self, outputs: Outputs, batch: Batch, groups: int) -> Tensor:
        """Compute transformers' one-to-one matching within each group, [B, groups * N]."""
        matcher, labels = self.criterion().matcher, self.labels(batch)
        size = outputs.logits.shape[1] // groups
        parts = [outputs.take(group * size, (group + 1) * size) for group in range(groups)]
        return torch.cat([deformable.hungarian(lambda o, t: matcher(o, t, 1), part, labels, batch) for part in parts], dim=1)

    def assign(self, prediction: Prediction, batch: Batch) -> Assignment:
        """Assign the first group by transformers' one-to-one matching in each decoder layer."""
        own = self.own(prediction)
        size = own.layers[0].logits.shape[1] // own.groups
        return Assignment(torch.stack([self.match(layer.take(0, size), batch, 1) for layer in own.layers]))

    def loss(self, prediction: Prediction, batch: Batch, assignment: Assignment | None = None) -> Losses:
        """Compute the loss terms of transformers with its weights.

        No suffix: last layer; ``_i``: earlier layers; ``_enc``: encoder outputs. All groups are trained. A given
        ``assignment`` applies to the first group; the other groups and the encoder outputs use their own matching.
        """
        own, whole = self.own(prediction), self.labels(batch, only_trainable=False)
        boxes = divisor_over_ranks(sum(len(entry["boxes"]) for entry in self.labels(batch)) * own.groups, prediction.logits)
        if (diverged := shared.diverged_losses(prediction)) is not None:
            return diverged
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
        """Return the weights of the loss terms from the model's config."""
        return {**super().term_weights(), "loss_ce": self.config.class_loss_coefficient}


def quality_loss(outputs: Outputs, pairs: deformable.Pairs, alpha: float, gamma: float = 2.0) -> Tensor:
    """Sum the IoU-aware cross-entropy over queries and classes; the target of the matched class is score^a * IoU^(1-a).

    Logarithms are those of the rounded probabilities, as in transformers. Where they or their gradients are not finite because
    a probability is rounded to 0 or 1 (float32: logits above 16 or below -88), the logarithm of the exact sigmoid takes their
    place.
    """
    probability, where = outputs.logits.sigmoid(), (pairs.image, pairs.query, pairs.labels)
    iou = deformable.overlaps(outputs.boxes[pairs.image, pairs.query].detach(), pairs.boxes)[0].to(probability.dtype)
    wanted = (probability[where].pow(alpha) * iou.pow(1 - alpha)).clamp(min=0.01).detach()
    up, down = torch.zeros_like(probability), probability.pow(gamma)
    up[where], down[where] = wanted, 1 - wanted
    entropy = -up * _log(probability, outputs.logits) - down * _log(1 - probability, -outputs.logits)
    return (entropy.sum(dim=-1) * pairs.counted).sum()


def _log(probability: Tensor, logits: Tensor) -> Tensor:
    """Logarithm of a sigmoid's probability, finite with its gradient for all finite logits."""
    rounded, exact = probability.detach().log(), F.logsigmoid(logits)
    usable = torch.isfinite(probability.detach().reciprocal())  # the gradient of the logarithm
    log = torch.where(usable, probability.where(usable, 1.0).log(), exact)
    # In between, a probability has a logarithm but no finite gradient: the value is still that of the rounded probability.
    return log + torch.where(torch.isfinite(rounded) & ~usable, rounded - log.detach(), 0.0)


def moved_boxes(boxes: Tensor, deltas: Tensor) -> Tensor:
    """Shift boxes (cxcywh) by fractions of their size and scale width and height by exponentials."""
    center = deltas[..., :2] * boxes[..., 2:] + boxes[..., :2]
    return torch.cat([center, deltas[..., 2:].exp() * boxes[..., 2:]], dim=-1)


def resized(valid: Tensor, like: Tensor) -> Tensor:
    """Resize a mask [B, H, W] of zeros and ones to the size of a map (nearest); return bool."""
    return F.interpolate(valid[None], size=like.shape[-2:])[0].bool()
