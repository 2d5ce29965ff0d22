"""RT-DETR and its relatives (RT-DETRv2, D-FINE, DEIMv2): hybrid encoder, queries chosen from encoder tokens, denoising.

These models ignore padding masks. Attention, positions, anchors and boxes are relative to the *frame*: the batch's tensor,
padded to a multiple of 32. The adapter equals ``model(tensor, labels)`` with boxes as fractions of the frame. It converts
boxes and references from the frame to the valid image on output and back on input. The prediction for an image therefore
depends slightly on the padding of its batch, as in transformers.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_convert
from transformers.loss.loss_rt_detr import RTDetrLoss
from transformers.models.rt_detr.modeling_rt_detr import get_contrastive_denoising_training_group

from detdistill.detectors.queries.shared import deformable as shared
from detdistill.detectors.queries.shared import transformers_detector as transformers_base
from detdistill.detectors.queries.shared import transformers_models as models
from detdistill.detectors.queries.shared.deformable import Memory, Outputs
from detdistill.detectors.queries.shared.options import (
    DetrSelectionOptions,
    EncoderOptions,
    QueryOptions,
    SamplingOptions,
)
from detdistill.detectors.torchvision.backbones import probe, timm_description
from detdistill.detectors.torchvision.options import BackboneOptions, LevelOptions, Levels
from detdistill.detectors.torchvision.targets import trainable
from detdistill.errors import DataError, ModelError
from detdistill.functional.counting import divisor_over_ranks
from detdistill.structures import Assignment, Batch, Features, Losses, Movable, Prediction, Queries, QuerySeed
from detdistill.values import Count, Index


@dataclass(frozen=True)
class Chosen(Movable):
    """Initial queries, selected from the encoder's tokens."""

    content: Tensor
    """[B, N, D], no gradient."""
    reference: Tensor
    """[B, N, 4] cxcywh as fractions of the frame, no gradient."""
    outputs: Outputs
    """Predictions of the encoder's heads for the selected tokens; trained as an additional set."""


@dataclass(frozen=True)
class Denoising(Movable):
    """Denoising queries: noisy ground truth that the decoder should correct (training only). ``Queries`` never contains them."""

    content: Tensor
    """[B, M, D] embedded noisy labels."""
    reference: Tensor
    """[B, M, 4] noisy boxes as fractions of the frame."""
    mask: Tensor
    """[M + N, M + N] mask added to the self-attention, so that queries of different groups do not attend to each other."""
    labels: tuple[dict[str, Tensor], ...]
    """Ground truth of the denoising queries; the batch given to ``loss`` may have other targets."""
    positive: tuple[Tensor, ...]
    """Indices of the positive queries of each image; they belong to box 0, 1, ... in turn, repeated."""
    groups: int

    def pairs(self, weights_of: Tensor) -> shared.Pairs:
        """Match each positive query to its ground-truth box. ``weights_of``: tensor [B, M, ...] of the dtype for weights."""
        matched = torch.full(weights_of.shape[:2], -1, device=weights_of.device)
        for image, (queries, label) in enumerate(zip(self.positive, self.labels, strict=True)):
            if len(label["boxes"]):
                numbers = torch.arange(len(label["boxes"]), device=matched.device)
                matched[image, queries] = numbers.repeat(self.groups)
        return shared.pairs_of(matched, None, self.labels, weights_of.dtype)


@dataclass(frozen=True)
class Run(Movable):
    """Outputs of the decoder for a set of queries, for each layer."""

    layers: tuple[Outputs, ...]
    embedding: Tensor
    """[L, B, N, D]."""
    first: Outputs | None = None
    """D-FINE's first boxes, before any refinement; trained as an additional set."""

    def take(self, start: int, stop: int | None) -> Run:
        """Select a range of the queries."""
        first = None if self.first is None else self.first.take(start, stop)
        return Run(tuple(layer.take(start, stop) for layer in self.layers), self.embedding[:, :, start:stop], first)


@dataclass(frozen=True)
class Own(Movable):
    """Outputs for the losses that ``Queries`` does not contain."""

    run: Run
    encoder: Outputs | None = None
    """Predictions of the encoder's heads; None: the queries come from elsewhere."""
    denoising: Denoising | None = None
    noisy: Run | None = None
    """Outputs of the decoder for the denoising queries."""

    def last_layer(self) -> Own:
        """The outputs of the last decoder layer alone."""
        return Own(replace(self.run, layers=self.run.layers[-1:], embedding=self.run.embedding[-1:]), self.encoder)


class HybridEncoderDetector(transformers_base.TransformersDetector):
    """Base class of the family's adapters. Each adapter adds its decoder (``run``) and its losses (``set_losses``)."""

    backbone_modules = ("model.backbone",)
    neck_modules = ("model.encoder_input_proj", "model.encoder")
    head_modules = (
        "model.decoder_input_proj",
        *("model.enc_output", "model.enc_score_head", "model.enc_bbox_head"),
        *("model.denoising_class_embed", "model.weight_embedding"),  # only in some configs
        "model.decoder",
        *("class_embed", "bbox_embed"),  # models in which transformers has the decoder's outputs under a second name
    )
    class_outputs = ("model.enc_score_head", "model.denoising_class_embed", "model.decoder.class_embed", "class_embed")
    image_processor = "RTDetrImageProcessor"
    boxes_in_padding = True
    top_k = None

    @property
    def width(self) -> int:
        """Return the channels of the encoder's maps."""
        return int(self.config.encoder_hidden_dim)

    # ----------------------------------------------------------------------------------------------- images and features

    def frame_hw(self, batch: Batch) -> tuple[int, int]:
        """Return height and width of the frame in pixels: the batch's tensor, padded to a multiple of the coarsest stride."""
        height, width = batch.padding_hw
        step = self.spec.strides[-1]
        return -(-height // step) * step, -(-width // step) * step

    def frames(self, batch: Batch) -> Tensor:
        """Return the frame size [B, 2], repeated for each image."""
        return torch.tensor([self.frame_hw(batch)], device=batch.images.device).expand(batch.images.shape[0], -1)

    def scale(self, batch: Batch) -> Tensor:
        """Return the factors [B, 1, 4] that convert fractions of the frame to fractions of the valid image, for x, y, x, y."""
        return (self.frames(batch) / batch.sizes).flip(1).repeat(1, 2)[:, None]

    def labels(self, batch: Batch, only_trainable: bool = True) -> list[dict[str, Tensor]]:
        """Convert targets as the base class does, but with boxes as fractions of the frame."""
        height, width = self.frame_hw(batch)
        found = []
        for target in batch.targets:
            keep = trainable(target) if only_trainable else slice(None)
            boxes = box_convert(target.boxes_xyxy[keep].to(batch.images.dtype), "xyxy", "cxcywh")
            found.append({"class_labels": target.labels[keep], "boxes": boxes / boxes.new_tensor([width, height, width, height])})
        return found

    def backbone_features(self, batch: Batch) -> Features:
        """Compute the backbone's maps of the whole frame."""
        height, width = self.frame_hw(batch)
        missing = (0, width - batch.padding_hw[1], 0, height - batch.padding_hw[0])
        pixel_mask = F.pad((~batch.padding_mask()).long(), missing)
        maps = self.backbone_maps(F.pad(self.normalized(batch), missing), pixel_mask)
        padding = tuple(~mask for _, mask in maps)
        padded = any(bool(mask.any()) for mask in padding)
        return Features(tuple(level for level, _ in maps), self.spec.strides, padding if padded else None)

    def backbone_maps(self, images: Tensor, pixel_mask: Tensor) -> Sequence[tuple[Tensor, Tensor]]:
        """Run transformers' backbone."""
        return self.model.model.backbone(images, pixel_mask)

    def before_encoder(self, features: Features, batch: Batch) -> Features:
        """Run the projection before the encoder; its BatchNorm keeps its statistics."""
        with shared.still_statistics(self.projections):
            return replace(features, maps=tuple(self.projected(features)))

    @property
    def projections(self) -> nn.ModuleList:
        """The projection of each level before the encoder."""
        return cast(nn.ModuleList, self.model.model.encoder_input_proj)

    def projected(self, features: Features) -> list[Tensor]:
        """The projected maps."""
        return [project(level) for project, level in zip(self.projections, features.maps, strict=True)]

    def encode(self, features: Features) -> Features:
        """Run projection and hybrid encoder; return the maps before the decoder's projection. Padding is treated as image."""
        return replace(features, maps=tuple(self.model.model.encoder(self.projected(features)).last_hidden_state))

    # ----------------------------------------------------------------------------------------------------------- queries

    def memory(self, features: Features) -> Memory:
        """Project the maps and flatten them for the decoder."""
        projections = list(self.model.model.decoder_input_proj)
        last = features.maps[-1]  # all levels above the encoder's are computed from its last map, as in transformers
        maps = [*features.maps, *[last] * (len(projections) - len(features.maps))]
        return shared.flatten([project(level) for project, level in zip(projections, maps, strict=True)])

    def choose(self, memory: Memory, batch: Batch) -> Chosen:
        """Select the encoder tokens with the highest class scores, and the encoder head's boxes for them.

        Raises:
            DataError: the images have fewer cells than the detector has queries.
        """
        core, count = self.model.model, self.config.num_queries
        tokens = memory.tokens
        if tokens.shape[1] < count:
            height, width = self.frame_hw(batch)
            raise DataError(
                f"{self.spec.name}: {height}x{width} pixels give {tokens.shape[1]} encoder cells, fewer than the {count} "
                f"queries chosen from them; take larger images or a detector with queries={tokens.shape[1]} or fewer"
            )
        exact = tokens.dtype if tokens.dtype == torch.float64 else torch.float32
        anchors, valid = core.generate_anchors(memory.shapes, device=tokens.device, dtype=exact)
        anchors, valid = anchors.clone(), valid.clone()  # transformers caches them, perhaps as inference tensors
        hidden = core.enc_output(valid.to(tokens.dtype) * tokens)
        logits = core.enc_score_head(hidden)
        boxes = (core.enc_bbox_head(hidden) + anchors).sigmoid()
        index = logits.max(dim=-1).values.topk(count, dim=1).indices[..., None]
        chosen = [value.gather(1, index.expand(-1, -1, value.shape[-1])) for value in (hidden, logits, boxes)]
        content = chosen[0].detach()
        if self.config.learn_initial_query:
            content = core.weight_embedding.weight.expand(tokens.shape[0], -1, -1)
        return Chosen(content, chosen[2].detach(), Outputs(chosen[1].to(exact), chosen[2]))

    def seed(self, features: Features, batch: Batch) -> QuerySeed:
        """Compute content and boxes of the selected encoder tokens. Queries of this family have no position besides the box."""
        with shared.still_statistics(self.model.model.decoder_input_proj):
            chosen = self.choose(self.memory(features), batch)
        return QuerySeed(chosen.content, reference=chosen.reference * self.scale(batch))

    def decode(self, features: Features, seed: QuerySeed, batch: Batch, attention: bool = False) -> Queries:
        """Decode from any seed with a box (cxcywh) for each query. The box gives the position; ``seed.position`` is not used.

        The prediction's ``attention`` is the cross-attention [L, B, heads, N, S] over the S cells of all levels (see
        ``dense_attention``).

        Raises:
            ValueError: the seed has no boxes.
        """
        if seed.reference is None or seed.reference.shape[-1] != 4:
            raise ValueError(
                f"{self.spec.name}: queries need a reference box (cxcywh), not a point; give seed.reference [B, N, 4]"
            )
        with shared.still_statistics(self.model.model.decoder_input_proj):
            memory = self.memory(features)
        with shared.watched(self.model.model.decoder.layers, attention) as looks:
            run = self.run(memory, seed.content, seed.reference / self.scale(batch), None)
        found = self.queries(run, seed, Own(run), batch)
        return replace(found, attention=looks.attention, self_attention=looks.self_attention)

    def predict(self, features: Features, batch: Batch, attention: bool = False) -> Queries:
        """Decode the detector's own queries; in training also denoising queries from ``batch.targets`` (torch's random state)."""
        memory, layers = self.memory(features), self.model.model.decoder.layers
        chosen = self.choose(memory, batch)
        seed = QuerySeed(chosen.content, reference=chosen.reference * self.scale(batch))
        noise = self.denoising(batch, chosen)
        if noise is None:
            with shared.watched(layers, attention) as looks:
                run = self.run(memory, chosen.content, chosen.reference, None)
            own = Own(run, chosen.outputs)
        else:
            content = torch.cat([noise.content, chosen.content.to(noise.content.dtype)], dim=1)
            reference = torch.cat([noise.reference, chosen.reference], dim=1)
            count = noise.content.shape[1]
            with shared.watched(layers, attention, slice(count, None)) as looks:
                both = self.run(memory, content, reference, noise.mask)
            run = both.take(count, None)
            own = Own(run, chosen.outputs, noise, both.take(0, count))
        found = self.queries(run, seed, own, batch)
        return replace(found, attention=looks.attention, self_attention=looks.self_attention)

    def denoising(self, batch: Batch, chosen: Chosen) -> Denoising | None:
        """Build transformers' contrastive denoising queries; None in eval mode, without boxes, or with ``denoising=0``."""
        config = self.config
        if not (self.training and config.num_denoising > 0 and batch.targets):
            return None
        labels = self.labels(batch)
        content, unactivated, mask, meta = get_contrastive_denoising_training_group(
            targets=labels,
            num_classes=config.num_labels,
            num_queries=chosen.content.shape[1],
            class_embed=self.model.model.denoising_class_embed,
            num_denoising_queries=config.num_denoising,
            label_noise_ratio=config.label_noise_ratio,
            box_noise_scale=config.box_noise_scale,
        )
        if content is None:  # no boxes at all
            return None
        reference = unactivated.to(chosen.reference.dtype).sigmoid().detach()
        return Denoising(content, reference, mask, tuple(labels), tuple(meta["dn_positive_idx"]), meta["dn_num_group"])

    def without(self, modules: Sequence[str], fresh: bool) -> transformers_base.TransformersDetector:
        """Copy as the base class does; ``fresh`` norms are initialised by ``unit_norms``."""
        other = super().without(modules, fresh)
        if fresh:
            unit_norms(other.model)
        return other

    @abstractmethod
    def run(self, memory: Memory, content: Tensor, reference: Tensor, mask: Tensor | None) -> Run:
        """Run the decoder layers.

        Args:
            memory: flattened maps for the cross-attention.
            content: [B, N, D] content of the queries.
            reference: [B, N, 4] cxcywh as fractions of the frame.
            mask: [N, N] mask added to the self-attention; None: no mask.
        """

    def queries(self, run: Run, seed: QuerySeed, own: Own, batch: Batch) -> Queries:
        """Convert the decoder outputs to ``Queries``."""
        boxes = torch.stack([layer.boxes for layer in run.layers]) * self.scale(batch)
        return Queries(torch.stack([layer.logits for layer in run.layers]), boxes, run.embedding, seed, own=own)

    def own(self, prediction: Prediction) -> Own:
        """Return the raw outputs of a prediction for the losses.

        Raises:
            ValueError: the prediction has no raw outputs, because it was split by image or read from a cache.
        """
        if not isinstance(prediction.own, Own):
            raise ValueError(f"{self.spec.name}: this prediction has no raw outputs; call predict again on the features")
        return prediction.own

    # ------------------------------------------------------------------------------------------------------------ training

    def criterion(self) -> RTDetrLoss:
        """Build transformers' criterion; its matcher has the costs of the model's config."""
        return RTDetrLoss(self.config)

    def trained(self, outputs: Outputs) -> Outputs:
        """Collect the predictions of all layers for matcher and losses."""
        return outputs

    def assign(self, prediction: Prediction, batch: Batch) -> Assignment:
        """Assign by transformers' one-to-one matching in each decoder layer (Hungarian; focal, L1 and GIoU costs)."""
        matcher, labels = self.criterion().matcher, self.labels(batch)
        layers = [self.trained(layer) for layer in self.own(prediction).run.layers]
        return Assignment(torch.stack([shared.hungarian(matcher, layer, labels, batch) for layer in layers]))

    def loss(self, prediction: Prediction, batch: Batch, assignment: Assignment | None = None) -> Losses:
        """Compute the loss terms under transformers' names.

        No suffix: last layer; ``_aux_i``: earlier layers, then the encoder; ``_dn_i``: denoising queries. A given
        ``assignment`` applies to the decoder layers. The encoder's predictions (and D-FINE's first boxes) use their own
        matching; each denoising query keeps the box from which ``predict`` built it. The divisors are means over processes.
        """
        own, config, matcher = self.own(prediction), self.config, self.criterion().matcher
        usable, noise = self.labels(batch), own.denoising
        labels = self.labels(batch, only_trainable=False)
        # All processes communicate: the divisors are computed even if the prediction has diverged.
        boxes = divisor_over_ranks(sum(len(label["boxes"]) for label in usable), prediction.logits)
        noisy: Any = 0 if noise is None else sum(len(label["boxes"]) for label in noise.labels) * noise.groups
        noisy = divisor_over_ranks(noisy, prediction.logits)
        normalizer: Any = boxes if assignment is None or assignment.normalizer is None else assignment.normalizer
        matched = self.assign(prediction, batch).matched if assignment is None else assignment.matched
        terms: dict[str, Tensor] = {}
        sets = [(suffix, self.trained(outputs), layer) for suffix, outputs, layer in self.sets(own)]
        rows = [shared.hungarian(matcher, one, usable, batch) if layer is None else matched[layer] for _, one, layer in sets]
        place_rows, places = self.place_rows(rows, boxes)
        if (diverged := transformers_base.diverged_losses(prediction)) is not None:
            return diverged
        if assignment is not None and assignment.normalizer is not None:
            places = assignment.normalizer
        for (suffix, outputs, layer), row, place_row in zip(sets, rows, place_rows, strict=True):
            given = None if assignment is None or assignment.weights is None or layer is None else assignment.weights[layer]
            pairs = shared.pairs_of(row, given, labels, outputs.boxes.dtype)
            place_pairs = pairs if place_row is row else shared.pairs_of(place_row, given, labels, outputs.boxes.dtype)
            found = {**self.class_losses(outputs, pairs, normalizer), **self.place_losses(outputs, place_pairs, places)}
            terms |= {name + suffix: term for name, term in found.items()}
        if noise is not None and own.noisy is not None and config.auxiliary_loss:
            for number, outputs in enumerate(map(self.trained, self.noisy_sets(own.noisy))):
                pairs = noise.pairs(outputs.boxes)
                found = {**self.class_losses(outputs, pairs, noisy), **self.place_losses(outputs, pairs, noisy)}
                terms |= {f"{name}_dn_{number}": term for name, term in found.items()}
        return Losses(terms)

    def sets(self, own: Own) -> list[tuple[str, Outputs, int | None]]:
        """List the trained sets: suffix of the loss terms, predictions, decoder layer of the assignment (None: own matching)."""
        *before, last = own.run.layers
        sets: list[tuple[str, Outputs, int | None]] = [("", last, len(before))]
        if self.config.auxiliary_loss:
            sets += [(f"_aux_{number}", layer, number) for number, layer in enumerate(before)]
            if own.encoder is not None:
                sets.append((f"_aux_{len(before)}", own.encoder, None))
        return sets

    def noisy_sets(self, noisy: Run) -> Sequence[Outputs]:
        """List the trained predictions of the denoising queries."""
        return noisy.layers

    def place_rows(self, rows: Sequence[Tensor], boxes: Any) -> tuple[Sequence[Tensor], Any]:
        """Return the matches [B, N] of each set and the normaliser for the box losses; by default unchanged."""
        return rows, boxes

    def class_losses(self, outputs: Outputs, pairs: shared.Pairs, normalizer: Any) -> dict[str, Tensor]:
        """Compute the weighted varifocal loss of one set."""
        config = self.config
        quality = shared.varifocal_loss(outputs, pairs, config.focal_loss_alpha, config.focal_loss_gamma)
        return {"loss_vfl": quality / normalizer * config.weight_loss_vfl}

    def place_losses(self, outputs: Outputs, pairs: shared.Pairs, normalizer: Any) -> dict[str, Tensor]:
        """Compute the weighted L1 and GIoU losses of one set."""
        distance, overlap = shared.box_losses(outputs, pairs)
        return {
            "loss_bbox": distance / normalizer * self.config.weight_loss_bbox,
            "loss_giou": overlap / normalizer * self.config.weight_loss_giou,
        }


class RefiningDetector(HybridEncoderDetector):
    """Adapter of RT-DETR and RT-DETRv2: each decoder layer refines the boxes of the previous layer."""

    def run(self, memory: Memory, content: Tensor, reference: Tensor, mask: Tensor | None) -> Run:
        """Run the decoder layers with their outputs; no gradient flows from a layer's reference boxes to the previous layer."""
        decoder, hidden = self.model.model.decoder, content
        layers, embedding = [], []
        for layer, box_head, class_head in zip(decoder.layers, decoder.bbox_embed, decoder.class_embed, strict=True):
            hidden = layer(
                hidden,
                object_queries_position_embeddings=decoder.query_pos_head(reference),
                encoder_hidden_states=memory.tokens,
                reference_points=reference.unsqueeze(2),
                encoder_attention_mask=mask,
                **memory.where(),
            )
            boxes = (box_head(hidden) + transformers_base.inverse_sigmoid(reference)).sigmoid()
            layers.append(Outputs(transformers_base.full_precision(class_head(hidden)), boxes))
            embedding.append(hidden)
            reference = boxes.detach()
        return Run(tuple(layers), torch.stack(embedding))


# ----------------------------------------------------------------------------------------------------- models from options


@dataclass(frozen=True, kw_only=True)
class HybridOptions(DetrSelectionOptions, SamplingOptions, QueryOptions, EncoderOptions, BackboneOptions, LevelOptions):
    """Options of RT-DETR and its relatives; the last level is the backbone's deepest."""

    levels: Levels = (3, 5)
    encoder: Count = 1
    ffn: Count = 1024
    denoising: Index = 100
    """Approximate number of denoising queries in training; 0: no denoising."""


def family_arguments(detector: str, backbone: str, options: HybridOptions) -> dict[str, Any]:
    """Compute the arguments of transformers' config from the options of a model string.

    Raises:
        ModelError: the backbone lacks a level, or the width does not fit the heads.
    """
    width, heads = options.dim, options.heads
    if width % heads or width % 4:
        raise ModelError(f"{detector}: dim={width} must be a multiple of heads={heads} and of 4")
    first, last = options.levels
    strides = tuple(2**level for level in range(first, last + 1))
    count = len(strides)
    body = probe(backbone, timm_description(backbone, options))
    channels = dict(zip(body.feature_info.reduction(), body.feature_info.channels(), strict=True))
    return {
        "backbone_config": models.backbone_config(backbone, options, strides),
        "freeze_backbone_batch_norms": options.norm == "frozen",
        "d_model": width,
        "encoder_hidden_dim": width,
        "encoder_in_channels": [channels[stride] for stride in strides],
        "feat_strides": list(strides),
        "encode_proj_layers": [count - 1],
        "decoder_in_channels": [width] * count,
        "num_feature_levels": count,
        "encoder_layers": options.encoder,
        "decoder_layers": options.decoder,
        "encoder_attention_heads": heads,
        "decoder_attention_heads": heads,
        "encoder_ffn_dim": options.ffn,
        "decoder_ffn_dim": options.ffn,
        "decoder_n_points": options.points,
        "num_queries": options.queries,
        "num_denoising": options.denoising,
        "anchor_image_size": None,
    }


@torch.no_grad()
def unit_norms(model: Any) -> Any:
    """Set the weights of the BatchNorms in neck and decoder to 1, as in the authors' code.

    transformers initialises them around 0 (standard deviation 0.01), which scales the maps by about 0.01.
    """
    for name, module in model.model.named_modules():
        if isinstance(module, nn.BatchNorm2d) and not name.startswith("backbone."):
            module.weight.fill_(1.0)
    return model
