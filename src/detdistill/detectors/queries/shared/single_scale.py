"""Shared code of DETR, Conditional DETR and DAB-DETR: one feature map, and a decoder that attends to all of its cells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from detdistill.detectors.queries.shared.options import DetrSelectionOptions, EncoderOptions, QueryOptions
from detdistill.detectors.queries.shared.transformers_detector import (
    TransformersDetector,
    as_map,
    flat_map,
    full_precision,
    valid_masks,
)
from detdistill.detectors.torchvision.options import BackboneOptions
from detdistill.errors import ModelError
from detdistill.structures import (
    Features,
)


@dataclass(frozen=True, kw_only=True)
class SingleScaleOptions(DetrSelectionOptions, QueryOptions, EncoderOptions, BackboneOptions):
    """Options of DETR, Conditional DETR and DAB-DETR."""


def single_scale_arguments(detector: str, options: SingleScaleOptions) -> dict[str, Any]:
    """Arguments of a library config, from the options of the model string.

    Args:
        detector: name of the detector, for error messages.
        options: options of the model string.

    Raises:
        ModelError: ``dim`` is not a multiple of twice ``heads``.
    """
    if options.dim % (2 * options.heads):
        raise ModelError(f"{detector}: dim={options.dim} must be a multiple of twice heads={options.heads}")
    return {
        "d_model": options.dim,
        "num_queries": options.queries,
        "encoder_layers": options.encoder,
        "decoder_layers": options.decoder,
        "encoder_attention_heads": options.heads,
        "decoder_attention_heads": options.heads,
        "encoder_ffn_dim": options.ffn,
        "decoder_ffn_dim": options.ffn,
    }


def single_scale_positions(embedding: Any, features: Features) -> Tensor:
    """[B, S, D] position embeddings of DETR and Conditional DETR; they depend only on the map's shape and mask."""
    level, mask = features.maps[-1], valid_masks(features)[-1]
    dtype = full_precision(level).dtype
    return flat_map(embedding(shape=level.shape, device=level.device, dtype=dtype, mask=mask))


def project_single_scale(model: Any, features: Features) -> Features:
    """Apply the projection of DETR, Conditional DETR or DAB-DETR to the last map."""
    padding = None if features.padding is None else features.padding[-1:]
    return Features((model.input_projection(features.maps[-1]),), features.strides[-1:], padding)


def encode_single_scale(model: Any, features: Features, positions: Tensor) -> Features:
    """Apply projection and encoder of DETR or Conditional DETR to the last map."""
    level, mask = features.maps[-1], valid_masks(features)[-1]
    encoded = model.encoder(
        inputs_embeds=flat_map(model.input_projection(level)),
        attention_mask=mask.flatten(1),
        spatial_position_embeddings=positions,
    )
    padding = None if features.padding is None else features.padding[-1:]
    return Features((as_map(encoded.last_hidden_state, level),), features.strides[-1:], padding)


@dataclass(frozen=True)
class Decoded:
    """The decoder's results."""

    hidden: Tensor
    """[L, B, N, D] normalised embeddings, the input of the class and box outputs."""
    attention: Tensor | None
    """[L, B, heads, N, S] cross-attention; None unless requested."""
    self_attention: Tensor | None
    """[L, B, heads, N, N]; None unless requested."""
    outputs: Any
    """The output object of the library's decoder."""


def decode_single_scale(
    detector: TransformersDetector,
    features: Features,
    positions: Tensor,
    content: Tensor,
    position: Tensor,
    attention: bool,
) -> Decoded:
    """Run the decoder of DETR or Conditional DETR and collect the outputs of all layers.

    With ``auxiliary_loss`` the library returns normalised outputs of the inner layers and normalises the last layer's output
    twice. Without it, the inner layers' outputs come before the norm, which is then applied here. The last layer's output is
    the library's in both cases.
    """
    model = detector.model.model
    auxiliary = bool(detector.config.auxiliary_loss)
    with detector.attention_maps(attention) as wanted:
        outputs = model.decoder(
            inputs_embeds=content,
            attention_mask=None,
            spatial_position_embeddings=positions,
            object_queries_position_embeddings=position,
            encoder_hidden_states=flat_map(features.maps[-1]),
            encoder_attention_mask=valid_masks(features)[-1].flatten(1),
            output_hidden_states=not auxiliary,
            **wanted,
        )
    if auxiliary:
        inner = list(outputs.intermediate_hidden_states[:-1])
    else:
        inner = [model.decoder.layernorm(hidden) for hidden in outputs.hidden_states[1:-1]]
    hidden = torch.stack([*inner, outputs.last_hidden_state])
    if not attention:
        return Decoded(hidden, None, None, outputs)
    return Decoded(hidden, torch.stack(tuple(outputs.cross_attentions)), torch.stack(tuple(outputs.attentions)), outputs)
