"""Deformable, Conditional and DAB-DETR of MMDetection 3 as transformers' models."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch

from detdistill.detectors.adapters import adapter
from detdistill.detectors.mmdet.shared.body import frozen_norms, resnet_of, statistics
from detdistill.detectors.mmdet.shared.checkpoint import Checkpoint
from detdistill.detectors.mmdet.shared.options import MMDetOptions
from detdistill.detectors.mmdet.shared.plan import Names, Plan, State, bgr_folded
from detdistill.errors import ModelError

FIRST = "backbone.conv1.weight"
"""Name of the first convolution here until the backbone's place in transformers' model is known."""
BOTH: Names = (
    (r"(encoder|decoder)\.layers\.(\d+)\.self_attn\.attn\.(in_proj_weight|in_proj_bias)", r"model.\1.layers.\2.self_attn.\3"),
    (r"decoder\.post_norm\.(.+)", r"model.decoder.layernorm.\1"),
    (r"(encoder|decoder)\.(query_scale|ref_point_head|ref_anchor_head)\.(.+)", r"model.\1.\2.\3"),
)
FEED_FORWARD: Names = (
    (r"(encoder|decoder)\.layers\.(\d+)\.ffn\.layers\.0\.0\.(.+)", r"model.\1.layers.\2.mlp.fc1.\3"),
    (r"(encoder|decoder)\.layers\.(\d+)\.ffn\.layers\.1\.(.+)", r"model.\1.layers.\2.mlp.fc2.\3"),
)
NORMS: Names = (
    (r"(encoder|decoder)\.layers\.(\d+)\.norms\.0\.(.+)", r"model.\1.layers.\2.self_attn_layer_norm.\3"),
    (r"encoder\.layers\.(\d+)\.norms\.1\.(.+)", r"model.encoder.layers.\1.final_layer_norm.\2"),
    (r"decoder\.layers\.(\d+)\.norms\.1\.(.+)", r"model.decoder.layers.\1.encoder_attn_layer_norm.\2"),
    (r"decoder\.layers\.(\d+)\.norms\.2\.(.+)", r"model.decoder.layers.\1.final_layer_norm.\2"),
)
DEFORMABLE: Names = (
    *BOTH,
    *FEED_FORWARD,
    *NORMS,
    (r"neck\.convs\.(\d+)\.conv\.(.+)", r"model.input_proj.\1.0.\2"),
    (r"neck\.convs\.(\d+)\.gn\.(.+)", r"model.input_proj.\1.1.\2"),
    (r"level_embed", "model.level_embed"),
    (r"encoder\.layers\.(\d+)\.self_attn\.(.+)", r"model.encoder.layers.\1.self_attn.\2"),
    (r"decoder\.layers\.(\d+)\.self_attn\.attn\.out_proj\.(.+)", r"model.decoder.layers.\1.self_attn.o_proj.\2"),
    (r"decoder\.layers\.(\d+)\.cross_attn\.(.+)", r"model.decoder.layers.\1.encoder_attn.\2"),
    (r"query_embedding\.weight", "model.query_position_embeddings.weight"),
    (r"reference_points_fc\.(.+)", r"model.reference_points.\1"),
    (r"memory_trans_fc\.(.+)", r"model.enc_output.\1"),
    (r"memory_trans_norm\.(.+)", r"model.enc_output_norm.\1"),
    (r"pos_trans_fc\.(.+)", r"model.pos_trans.\1"),
    (r"pos_trans_norm\.(.+)", r"model.pos_trans_norm.\1"),
    (r"bbox_head\.cls_branches\.(\d+)\.(.+)", r"class_embed.\1.\2"),
    *((rf"bbox_head\.reg_branches\.(\d+)\.{2 * layer}\.(.+)", rf"bbox_embed.\1.layers.{layer}.\2") for layer in range(3)),
)
PROJECTIONS = {
    "qcontent": ("q_content_proj", "query_content_proj"),
    "qpos": ("q_pos_proj", "query_pos_proj"),
    "kcontent": ("k_content_proj", "key_content_proj"),
    "kpos": ("k_pos_proj", "key_pos_proj"),
    "v": ("v_proj", "value_proj"),
    "qpos_sine": ("q_pos_sine_proj", "query_pos_sine_proj"),
}
"""Names of a decoder layer's projections: in a checkpoint, in Conditional DETR, and, after the kind of attention, in DAB-DETR."""
CONDITIONAL: Names = (
    *BOTH,
    *FEED_FORWARD,
    *NORMS,
    (r"neck\.convs\.0\.conv\.(.+)", r"model.input_projection.\1"),
    (r"encoder\.layers\.(\d+)\.self_attn\.attn\.out_proj\.(.+)", r"model.encoder.layers.\1.self_attn.o_proj.\2"),
    *(
        (rf"decoder\.layers\.(\d+)\.{attention}\.{theirs}_proj\.(.+)", rf"model.decoder.layers.\1.{place}.{ours}.\2")
        for attention, place in (("self_attn", "self_attn"), ("cross_attn", "encoder_attn"))
        for theirs, ours in (*((name, both[0]) for name, both in PROJECTIONS.items()), ("out", "o_proj"))
    ),
    (r"query_embedding\.weight", "model.query_position_embeddings.weight"),
    (r"bbox_head\.fc_cls\.(.+)", r"class_labels_classifier.\1"),
    (r"bbox_head\.reg_ffn\.layers\.0\.0\.(.+)", r"bbox_predictor.layers.0.\1"),
    (r"bbox_head\.reg_ffn\.layers\.1\.(.+)", r"bbox_predictor.layers.1.\1"),
    (r"bbox_head\.fc_reg\.(.+)", r"bbox_predictor.layers.2.\1"),
)
DAB: Names = (
    *BOTH,
    (r"neck\.convs\.0\.conv\.(.+)", r"model.input_projection.\1"),
    (r"encoder\.layers\.(\d+)\.self_attn\.attn\.out_proj\.(.+)", r"model.encoder.layers.\1.self_attn.out_proj.\2"),
    (r"encoder\.layers\.(\d+)\.ffn\.layers\.0\.0\.(.+)", r"model.encoder.layers.\1.fc1.\2"),
    (r"encoder\.layers\.(\d+)\.ffn\.layers\.0\.1\.(.+)", r"model.encoder.layers.\1.activation_fn.\2"),
    (r"encoder\.layers\.(\d+)\.ffn\.layers\.1\.(.+)", r"model.encoder.layers.\1.fc2.\2"),
    (r"encoder\.layers\.(\d+)\.norms\.0\.(.+)", r"model.encoder.layers.\1.self_attn_layer_norm.\2"),
    (r"encoder\.layers\.(\d+)\.norms\.1\.(.+)", r"model.encoder.layers.\1.final_layer_norm.\2"),
    *(
        (rf"decoder\.layers\.(\d+)\.{kind}\.{theirs}_proj\.(.+)", rf"model.decoder.layers.\1.{kind}.{ours}.\2")
        for kind in ("self_attn", "cross_attn")
        for theirs, ours in (
            *((name, f"{kind}_{both[1]}") for name, both in PROJECTIONS.items()),
            ("out", f"{kind}.output_proj"),
        )
    ),
    (r"decoder\.layers\.(\d+)\.ffn\.layers\.0\.0\.(.+)", r"model.decoder.layers.\1.mlp.fc1.\2"),
    (r"decoder\.layers\.(\d+)\.ffn\.layers\.0\.1\.(.+)", r"model.decoder.layers.\1.mlp.activation_fn.\2"),
    (r"decoder\.layers\.(\d+)\.ffn\.layers\.1\.(.+)", r"model.decoder.layers.\1.mlp.fc2.\2"),
    (r"decoder\.layers\.(\d+)\.norms\.0\.(.+)", r"model.decoder.layers.\1.self_attn.self_attn_layer_norm.\2"),
    (r"decoder\.layers\.(\d+)\.norms\.1\.(.+)", r"model.decoder.layers.\1.cross_attn.cross_attn_layer_norm.\2"),
    (r"decoder\.layers\.(\d+)\.norms\.2\.(.+)", r"model.decoder.layers.\1.mlp.final_layer_norm.\2"),
    (r"query_embedding\.weight", "model.query_refpoint_embeddings.weight"),
    (r"patterns\.weight", "model.patterns.weight"),
    (r"bbox_head\.fc_cls\.(.+)", r"class_embed.\1"),
    (r"bbox_head\.fc_reg\.layers\.(.+)", r"bbox_predictor.layers.\1"),
)


def plan_deformable(checkpoint: Checkpoint, options: MMDetOptions) -> Plan:
    """Deformable DETR: plain, with refinement of boxes, or in two stages."""
    said, maps = checkpoint.model, checkpoint.count("neck.convs.#.")
    added = checkpoint.count("neck.extra_convs.#.")
    two_stage = "memory_trans_fc.weight" in checkpoint.state
    first, last = (checkpoint.state[f"bbox_head.cls_branches.{number}.weight"] for number in (0, 1))
    attention = said.at("encoder", "layer_cfg", "self_attn_cfg")
    heads, levels = attention.get("num_heads", 8), maps + added
    queries = said.get("num_queries", 300) if two_stage else checkpoint.shape("query_embedding.weight")[0]
    more = {
        **sizes(checkpoint),
        "heads": heads,
        "queries": queries,
        "levels": (6 - maps, 5 - maps + levels),
        "points": checkpoint.shape("encoder.layers.0.self_attn.attention_weights.weight")[0] // heads // levels,
        "refine": bool(said.get("with_box_refine", False)) if said else not torch.equal(first, last),
        "two_stage": two_stage,
    }
    extra = tuple(
        (rf"neck\.extra_convs\.{number}\.{theirs}\.(.+)", rf"model.input_proj.{maps + number}.{ours}.\1")
        for number in range(added)
        for theirs, ours in (("conv", 0), ("gn", 1))
    )

    def with_biases(state: State) -> State:
        """Transformers' projections have biases."""
        found = dict(state)
        for level in range(levels):
            weight = state[f"model.input_proj.{level}.0.weight"]
            found.setdefault(f"model.input_proj.{level}.0.bias", weight.new_zeros(len(weight)))
        return found

    return plan_of(
        checkpoint,
        options,
        "deformable_detr",
        (*extra, *DEFORMABLE),
        more,
        r"(model\.decoder\.)?class_embed\.\d+\.(weight|bias)",
        with_biases,
    )


def plan_conditional(checkpoint: Checkpoint, options: MMDetOptions) -> Plan:
    """Conditional DETR."""
    more = {**sizes(checkpoint), **single_scale(checkpoint)}
    rows = r"class_labels_classifier\.(weight|bias)"
    return plan_of(checkpoint, options, "conditional_detr", CONDITIONAL, more, rows)


def plan_dab(checkpoint: Checkpoint, options: MMDetOptions) -> Plan:
    """DAB-DETR without patterns.

    Raises:
        ModelError: as ``plan_of``, or it has patterns.
    """
    if "patterns.weight" in checkpoint.state:
        raise ModelError(f"{checkpoint.path}: its queries have patterns (num_patterns), which cannot be loaded")
    more = {**sizes(checkpoint), **single_scale(checkpoint)}
    return plan_of(checkpoint, options, "dab_detr", DAB, more, r"class_embed\.(weight|bias)")


def sizes(checkpoint: Checkpoint) -> dict[str, int]:
    """Options of all three by the shapes of tensors."""
    return {
        "dim": checkpoint.shape("neck.convs.0.conv.weight")[0],
        "encoder": checkpoint.count("encoder.layers.#."),
        "decoder": checkpoint.count("decoder.layers.#."),
        "ffn": checkpoint.shape("encoder.layers.0.ffn.layers.0.0.weight")[0],
    }


def single_scale(checkpoint: Checkpoint) -> dict[str, int]:
    """Options of detectors with one map."""
    attention = checkpoint.model.at("encoder", "layer_cfg", "self_attn_cfg")
    return {"heads": attention.get("num_heads", 8), "queries": checkpoint.shape("query_embedding.weight")[0]}


def plan_of(
    checkpoint: Checkpoint,
    options: MMDetOptions,
    kind: str,
    names: Names,
    more: dict[str, Any],
    rows: str,
    convert: Callable[[State], State] = dict,
) -> Plan:
    """Put a plan together.

    Raises:
        ModelError: the backbone is none of timm's, or in the form of Caffe, which transformers' configurations cannot hold.
    """
    backbone, arguments = resnet_of(checkpoint, options)
    if arguments:
        raise ModelError(
            f"{checkpoint.path}: transformers' models have no backbone with {', '.join(arguments)}; this one cannot be loaded"
        )
    mean, std, blue_first = statistics(checkpoint, options)
    module = adapter(kind)
    said = checkpoint.model.at("test_cfg")
    dets = options.dets or said.get("max_per_img", 100)
    score = options.score or 0.0

    def build(classes: Sequence[str]) -> Any:
        own = {**more, "norm": frozen_norms(checkpoint, options), "score": score, "dets": dets}
        name = f"{kind}:{backbone}," + ",".join(f"{key}={written(value)}" for key, value in own.items())
        found = module.build(backbone, classes, module.OPTIONS(**own, name=name))
        if kind == "conditional_detr":
            found.model.config.auxiliary_loss = False  # with it, transformers' decoder normalises between its layers
        return type(found)(found.model, name, mean=mean, std=std, score=score, dets=dets)

    def converted(state: State) -> State:
        found = convert(state)
        for name in [name for name in found if ".in_proj_" in name]:
            place, kind_of = name.rsplit(".in_proj_", 1)
            parts = zip("qkv", found.pop(name).chunk(3), strict=True)
            found |= {f"{place}.{part}_proj.{kind_of}": tensor for part, tensor in parts}
        return bgr_folded(found, FIRST) if blue_first else found

    classes = next(
        len(tensor)
        for name, tensor in checkpoint.state.items()
        if re.search(r"bbox_head\.(fc_cls|cls_branches\.0)\.weight", name)
    )
    body = ((r"backbone\.(.+)", r"backbone.\1"),)
    return Plan(kind, classes, (*body, *names), build=build, repeats={rows: 1}, convert=converted)


def written(value: Any) -> str:
    """A value as model strings have it."""
    if isinstance(value, tuple):
        return "-".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def placed(state: State, own: dict[str, Any]) -> State:
    """The state with the backbone where transformers' model has it, and tied tensors under all of their names.

    Args:
        state: tensors under transformers' names, those of the backbone under ``backbone.``.
        own: transformers' state dict.
    """
    first = next(name for name in own if re.fullmatch(r"model\.backbone\..*conv1\.weight", name) and ".layer" not in name)
    place = first.removesuffix("conv1.weight")
    found = {re.sub(r"^backbone\.", place, name): tensor for name, tensor in state.items()}
    same = {tensor.data_ptr(): name for name, tensor in own.items() if name in found}
    return found | {
        name: found[same[tensor.data_ptr()]] for name, tensor in own.items() if name not in found and tensor.data_ptr() in same
    }
