"""Faster, Mask and Cascade R-CNN of MMDetection as ours. The background is last there and first here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from detdistill.detectors.mmdet.shared.body import Body, pyramid_of
from detdistill.detectors.mmdet.shared.checkpoint import Checkpoint
from detdistill.detectors.mmdet.shared.config import Section
from detdistill.detectors.mmdet.shared.options import MMDetOptions
from detdistill.detectors.mmdet.shared.plan import Names, Plan, State, bgr_folded, expect, selection, zeros
from detdistill.detectors.student_files.load_student import build as build_model
from detdistill.errors import ModelError

PACKAGE = "torchvision.models.detection"
STDS = [[0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1], [0.033, 0.033, 0.067, 0.067]]
"""Standard deviations of the deltas of the stages of a cascade, in the released configurations."""
PROPOSALS: Names = (
    (r"rpn_head\.rpn_conv\.(.+)", r"rpn.head.conv.0.0.\1"),
    (r"rpn_head\.rpn_cls\.(.+)", r"rpn.head.cls_logits.\1"),
    (r"rpn_head\.rpn_reg\.(.+)", r"rpn.head.bbox_pred.\1"),
)


def plan_two_stage(checkpoint: Checkpoint, options: MMDetOptions) -> Plan:
    """Faster and Mask R-CNN."""
    masks = "roi_head.mask_head.conv_logits.weight" in checkpoint.state
    body = pyramid_of(checkpoint, options, "pool")
    head = checkpoint.model.at("roi_head", "bbox_head")
    expect(checkpoint, head.at("bbox_coder"), target_stds=STDS[0], target_means=[0.0] * 4)
    width, mlp = body.description["out_channels"], checkpoint.shape("roi_head.bbox_head.shared_fcs.0.weight")[0]
    side = _side(checkpoint, "roi_head.bbox_head", width)
    names = (*_box_head("roi_head.bbox_head", "roi_heads"), *(_mask_head("roi_head.mask_head", "roi_heads") if masks else ()))
    classes = checkpoint.shape("roi_head.bbox_head.fc_cls.weight")[0] - 1
    fixed = {
        "call": f"{PACKAGE}.mask_rcnn.MaskRCNN" if masks else f"{PACKAGE}.FasterRCNN",
        **_shared(checkpoint, options, body, side),
        "box_head": {"call": f"{PACKAGE}.faster_rcnn.TwoMLPHead", "in_channels": width * side**2, "representation_size": mlp},
    }

    def describe(count: int) -> dict[str, Any]:
        outputs = {"num_classes": count + 1}
        predictor = {"call": f"{PACKAGE}.faster_rcnn.FastRCNNPredictor", "in_channels": mlp, **outputs}
        found = {**fixed, "box_predictor": predictor}
        if masks:
            convolutions = {"call": f"{PACKAGE}.mask_rcnn.MaskRCNNHeads", "in_channels": width, "dilation": 1}
            found["mask_roi_pool"] = _pool(checkpoint.model.at("roi_head", "mask_roi_extractor"), checkpoint, body, 14)
            found["mask_head"] = {**convolutions, "layers": [width] * checkpoint.count("roi_head.mask_head.convs.#.")}
            found["mask_predictor"] = {
                "call": f"{PACKAGE}.mask_rcnn.MaskRCNNPredictor",
                "in_channels": width,
                "dim_reduced": checkpoint.shape("roi_head.mask_head.upsample.weight")[1],
                **outputs,
            }
        return found

    return _plan("mask_rcnn" if masks else "faster_rcnn", body, classes, names, describe, cascade=False)


def plan_cascade(checkpoint: Checkpoint, options: MMDetOptions) -> Plan:
    """Cascade and Cascade Mask R-CNN of three stages."""
    masks = "roi_head.mask_head.0.conv_logits.weight" in checkpoint.state
    body = pyramid_of(checkpoint, options, "pool")
    stages = checkpoint.count("roi_head.bbox_head.#.")
    width, mlp = body.description["out_channels"], checkpoint.shape("roi_head.bbox_head.0.shared_fcs.0.weight")[0]
    if checkpoint.shape("roi_head.bbox_head.0.fc_reg.weight")[0] != 4:
        raise ModelError(f"{checkpoint.path}: its cascade has boxes for each class; only class-agnostic ones can be loaded")
    names: Names = ()
    for stage in range(stages):
        ours = "roi_heads" if stage == stages - 1 else f"roi_heads.earlier.{stage}"
        names += _box_head(f"roi_head.bbox_head.{stage}", ours)
        names += _mask_head(f"roi_head.mask_head.{stage}", ours) if masks else ()
    shared = _shared(checkpoint, options, body, _side(checkpoint, "roi_head.bbox_head.0", width))
    fixed = {
        "call": "models.cascade.CascadeMaskRCNN" if masks else "models.cascade.CascadeRCNN",
        **shared,
        "ious": [0.5, 0.6, 0.7][:stages],
        "stds": _stds(checkpoint, stages),
        "representation_size": mlp,
    }
    if masks:
        fixed["mask_roi_pool"] = _pool(checkpoint.model.at("roi_head", "mask_roi_extractor"), checkpoint, body, 14)
    classes = checkpoint.shape("roi_head.bbox_head.0.fc_cls.weight")[0] - 1
    adapter = "cascade_mask_rcnn" if masks else "cascade_rcnn"
    return _plan(adapter, body, classes, names, lambda count: {**fixed, "num_classes": count + 1}, cascade=True)


def _plan(adapter: str, body: Body, classes: int, names: Names, describe: Any, *, cascade: bool) -> Plan:
    def converted(state: State) -> State:
        found = {name: _background_first(name, tensor, not cascade) for name, tensor in state.items()}
        return bgr_folded(found, "backbone.body.conv1.weight") if body.blue_first else found

    def whole(count: int) -> dict[str, Any]:
        return {"call": "models.exact.limited", "model": describe(count)}

    rows = r"roi_heads\.(earlier\.\d+\.)?(box_predictor\.cls_score|mask_predictor\.mask_fcn_logits)\.(weight|bias)"
    boxes = r"roi_heads\.box_predictor\.bbox_pred\.(weight|bias)"
    return Plan(
        adapter,
        classes,
        (*body.names, *PROPOSALS, *names),
        build=lambda wanted: build_model(whole(len(wanted))),
        description=whole,
        repeats={rows: 1} if cascade else {rows: 1, boxes: 1},
        convert=converted,
        background=True,
    )


def _background_first(name: str, tensor: Tensor, boxes_of_classes: bool) -> Tensor:
    """The rows of an output in torchvision's order: background, classes."""
    if ".box_predictor.cls_score." in name:
        return tensor.roll(1, 0)
    if ".box_predictor.bbox_pred." in name and boxes_of_classes:
        return torch.cat([zeros(4, tensor), tensor])
    if ".mask_predictor.mask_fcn_logits." in name:
        return torch.cat([zeros(1, tensor), tensor])
    return tensor


def _shared(checkpoint: Checkpoint, options: MMDetOptions, body: Body, side: int) -> dict[str, Any]:
    """Entries of the descriptions of all two-stage detectors: proposals, pooling, pixels, selection."""
    generator = checkpoint.model.at("rpn_head", "anchor_generator")
    expect(checkpoint, checkpoint.model.at("rpn_head", "bbox_coder"), target_stds=[1.0] * 4, target_means=[0.0] * 4)
    scales, ratios = generator.get("scales", [8]), generator.get("ratios", [0.5, 1.0, 2.0])
    chosen = selection(checkpoint, options, 0.5, 1000, inside=("rcnn",))
    first = checkpoint.model.at("test_cfg", "rpn") or checkpoint.config.at("test_cfg", "rpn")
    proposals = first.get("max_per_img", first.get("max_num", 1000))
    return {
        "backbone": body.description,
        "rpn_anchor_generator": {
            "call": "models.exact.ExactAnchors",
            "sizes": [[stride * scale for scale in scales] for stride in body.strides],
            "aspect_ratios": [ratios] * len(body.strides),
            "strides": list(body.strides),
        },
        "box_roi_pool": _pool(checkpoint.model.at("roi_head", "bbox_roi_extractor"), checkpoint, body, side),
        "image_mean": body.mean,
        "image_std": body.std,
        "box_score_thresh": chosen["score"],
        "box_nms_thresh": chosen["nms"],
        "box_detections_per_img": chosen["dets"],
        "rpn_pre_nms_top_n_test": first.get("nms_pre", 1000),
        "rpn_post_nms_top_n_test": proposals,
        "rpn_nms_thresh": first.at("nms").get("iou_threshold", first.get("nms_thr", 0.7)),
    }


def _pool(said: Section, checkpoint: Checkpoint, body: Body, side: int) -> dict[str, Any]:
    """The description of a region pooling: RoIAlign with aligned cells."""
    expect(checkpoint, said, type="SingleRoIExtractor", finest_scale=56)
    layer = said.at("roi_layer")
    expect(checkpoint, layer, type="RoIAlign", aligned=True)
    return {
        "call": "models.exact.AlignedRoIAlign",
        "featmap_names": [str(level) for level in range(body.maps)],
        "output_size": side,
        "sampling_ratio": layer.get("sampling_ratio", 0),
    }


def _side(checkpoint: Checkpoint, head: str, width: int) -> int:
    """Cells along a side of the pooled regions, from the first layer that reads them.

    Raises:
        ModelError: the head has other layers than two that are fully connected.
    """
    count = checkpoint.count(f"{head}.shared_fcs.#.")
    if count != 2 or f"{head}.shared_convs.0.conv.weight" in checkpoint.state:
        raise ModelError(f"{checkpoint.path}: its box head is no head of two fully connected layers (Shared2FCBBoxHead)")
    return int((checkpoint.shape(f"{head}.shared_fcs.0.weight")[1] // width) ** 0.5)


def _stds(checkpoint: Checkpoint, stages: int) -> list[list[float]]:
    """Standard deviations of the deltas of each stage."""
    heads: Any = checkpoint.model.at("roi_head").get("bbox_head", [])
    sections = [Section(head, f"model.roi_head.bbox_head[{number}]") for number, head in enumerate(heads)]
    found = [section.at("bbox_coder").get("target_stds", STDS[number]) for number, section in enumerate(sections[:stages])]
    return found if len(found) == stages else STDS[:stages]


def _box_head(theirs: str, ours: str) -> Names:
    theirs = theirs.replace(".", r"\.")
    pairs: Sequence[tuple[str, str]] = (
        (r"shared_fcs\.0", "box_head.fc6"),
        (r"shared_fcs\.1", "box_head.fc7"),
        ("fc_cls", "box_predictor.cls_score"),
        ("fc_reg", "box_predictor.bbox_pred"),
    )
    return tuple((rf"{theirs}\.{name}\.(.+)", rf"{ours}.{place}.\1") for name, place in pairs)


def _mask_head(theirs: str, ours: str) -> Names:
    theirs = theirs.replace(".", r"\.")
    return (
        (rf"{theirs}\.convs\.(\d+)\.conv\.(.+)", rf"{ours}.mask_head.\1.0.\2"),
        (rf"{theirs}\.upsample\.(.+)", rf"{ours}.mask_predictor.conv5_mask.\1"),
        (rf"{theirs}\.conv_logits\.(.+)", rf"{ours}.mask_predictor.mask_fcn_logits.\1"),
    )
