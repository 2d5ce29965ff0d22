"""GFL, ATSS, RetinaNet, FCOS and RepPoints of MMDetection as ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from detdistill.detectors.mmdet.shared.body import Body, pyramid_of
from detdistill.detectors.mmdet.shared.checkpoint import Checkpoint
from detdistill.detectors.mmdet.shared.options import MMDetOptions
from detdistill.detectors.mmdet.shared.plan import Plan, State, bgr_folded, expect, selection
from detdistill.detectors.student_files.load_student import build as build_model

CLASSIFICATION, REGRESSION = "head.classification_head", "head.regression_head"
GROUPED_TOWERS = (
    (r"bbox_head\.cls_convs\.(\d+)\.conv\.(.+)", rf"{CLASSIFICATION}.conv.\1.0.\2"),
    (r"bbox_head\.cls_convs\.(\d+)\.gn\.(.+)", rf"{CLASSIFICATION}.conv.\1.1.\2"),
    (r"bbox_head\.reg_convs\.(\d+)\.conv\.(.+)", rf"{REGRESSION}.conv.\1.0.\2"),
    (r"bbox_head\.reg_convs\.(\d+)\.gn\.(.+)", rf"{REGRESSION}.conv.\1.1.\2"),
)
SCALES = ((r"bbox_head\.scales\.(\d+)\.scale", rf"{REGRESSION}.scales.\1"),)
OUTPUTS = rf"{CLASSIFICATION}\.cls_logits\.(weight|bias)"
SQUARES = {"ratios": [1.0], "octave_base_scale": 8, "scales_per_octave": 1}


def outputs(classes: str, boxes: str, *others: tuple[str, str]) -> tuple[tuple[str, str], ...]:
    """Names of the output layers of a head."""
    pairs = ((classes, f"{CLASSIFICATION}.cls_logits"), (boxes, f"{REGRESSION}.bbox_reg"), *others)
    return tuple((rf"bbox_head\.{theirs}\.(.+)", rf"{ours}.\1") for theirs, ours in pairs)


def settings(body: Body, chosen: dict[str, Any]) -> dict[str, Any]:
    """Entries of the descriptions of all dense detectors: pixels and selection."""
    return {
        "image_mean": body.mean,
        "image_std": body.std,
        "score_thresh": chosen["score"],
        "nms_thresh": chosen["nms"],
        "topk_candidates": chosen["topk"],
        "detections_per_img": chosen["dets"],
    }


def plan_of(
    adapter: str,
    body: Body,
    classes: int,
    names: tuple[tuple[str, str], ...],
    describe: Callable[[int], dict[str, Any]],
    anchors: int = 1,
    convert: Callable[[State], State] = dict,
    from_zero: bool = False,
) -> Plan:
    """Put a plan together; the weights of the first convolution are turned where they read blue first."""

    def converted(state: State) -> State:
        found = convert(state)
        return bgr_folded(found, "backbone.body.conv1.weight") if body.blue_first else found

    return Plan(
        adapter,
        classes,
        (*body.names, *names),
        build=lambda wanted: build_model(describe(len(wanted))),
        description=describe,
        repeats={OUTPUTS: anchors},
        convert=converted,
        from_zero=from_zero,
    )


def one_stage(
    checkpoint: Checkpoint, body: Body, options: MMDetOptions, call: str, nms: float, **more: Any
) -> Callable[[int], dict[str, Any]]:
    """The description of a model of ``models``, for a number of classes."""
    chosen = settings(body, selection(checkpoint, options, nms, 1000))
    fixed = {
        "call": call,
        "backbone": body.description,
        "channels": body.description["out_channels"],
        "strides": list(body.strides),
        "convs": checkpoint.count("bbox_head.cls_convs.#."),
        **chosen,
        **more,
    }
    return lambda classes: {**fixed, "num_classes": classes}


def plan_gfl(checkpoint: Checkpoint, options: MMDetOptions) -> Plan:
    """GFL, and the students of LD, which are GFLs."""
    said = checkpoint.model.at("bbox_head")
    expect(checkpoint, said.at("anchor_generator"), **SQUARES)
    body = pyramid_of(checkpoint, options, "linear")
    bins = checkpoint.shape("bbox_head.gfl_reg.weight")[0] // 4
    describe = one_stage(checkpoint, body, options, "models.gfl.GFL", 0.6, reg_max=bins - 1)
    names = (*GROUPED_TOWERS, *SCALES, *outputs("gfl_cls", "gfl_reg"))
    return plan_of("gfl", body, checkpoint.shape("bbox_head.gfl_cls.weight")[0], names, describe)


def plan_atss(checkpoint: Checkpoint, options: MMDetOptions) -> Plan:
    """ATSS."""
    said = checkpoint.model.at("bbox_head")
    expect(checkpoint, said.at("anchor_generator"), **SQUARES)
    expect(checkpoint, said.at("bbox_coder"), target_stds=[0.1, 0.1, 0.2, 0.2], target_means=[0.0] * 4)
    body = pyramid_of(checkpoint, options, "linear")
    describe = one_stage(checkpoint, body, options, "models.atss.ATSS", 0.6)
    centerness = ("atss_centerness", f"{REGRESSION}.bbox_ctrness")
    names = (*GROUPED_TOWERS, *SCALES, *outputs("atss_cls", "atss_reg", centerness))
    return plan_of("atss", body, checkpoint.shape("bbox_head.atss_cls.weight")[0], names, describe)


def plan_fcos(checkpoint: Checkpoint, options: MMDetOptions) -> Plan:
    """FCOS; the options of its head that change its boxes are read, and without a configuration are the defaults there."""
    said = checkpoint.model.at("bbox_head")
    expect(checkpoint, said, dcn_on_last_conv=False)
    body = pyramid_of(checkpoint, options, "conv")
    describe = one_stage(
        checkpoint,
        body,
        options,
        "models.fcos.FCOS",
        0.5,
        exponential=not said.get("norm_on_bbox", False),
        from_classes=not said.get("centerness_on_reg", False),
    )
    centerness = ("conv_centerness", f"{REGRESSION}.bbox_ctrness")
    names = (*GROUPED_TOWERS, *SCALES, *outputs("conv_cls", "conv_reg", centerness))

    def with_biases(state: State) -> State:
        """Convolutions before a norm have biases only if ``conv_bias`` says so; ours have them always."""
        found = dict(state)
        for head in (CLASSIFICATION, REGRESSION):
            for number in range(checkpoint.count("bbox_head.cls_convs.#.")):
                block = f"{head}.conv.{number}.0"
                if f"{block}.weight" in state:
                    found.setdefault(f"{block}.bias", state[f"{block}.weight"].new_zeros(len(state[f"{block}.weight"])))
        return found

    classes = checkpoint.shape("bbox_head.conv_cls.weight")[0]
    return plan_of("fcos_scales", body, classes, names, describe, convert=with_biases)


def plan_reppoints(checkpoint: Checkpoint, options: MMDetOptions) -> Plan:
    """RepPoints with the moment transform, with or without GroupNorm."""
    said = checkpoint.model.at("bbox_head")
    expect(checkpoint, said, num_points=9, transform_method="moment", use_grid_points=False, center_init=True, point_base_scale=4)
    body = pyramid_of(checkpoint, options, "input")
    grouped = "bbox_head.cls_convs.0.gn.weight" in checkpoint.state
    describe = one_stage(checkpoint, body, options, "models.reppoints.RepPoints", 0.5, norm=grouped)
    names = (
        *GROUPED_TOWERS,
        (r"bbox_head\.moment_transfer", "head.moment"),
        (r"bbox_head\.reppoints_cls_conv\.weight", f"{CLASSIFICATION}.deformable.weight"),
        (r"bbox_head\.reppoints_cls_out\.(.+)", rf"{CLASSIFICATION}.cls_logits.\1"),
        (r"bbox_head\.reppoints_pts_init_conv\.(.+)", rf"{REGRESSION}.first_conv.\1"),
        (r"bbox_head\.reppoints_pts_init_out\.(.+)", rf"{REGRESSION}.first_points.\1"),
        (r"bbox_head\.reppoints_pts_refine_conv\.weight", f"{REGRESSION}.deformable.weight"),
        (r"bbox_head\.reppoints_pts_refine_out\.(.+)", rf"{REGRESSION}.correction.\1"),
    )
    classes = checkpoint.shape("bbox_head.reppoints_cls_out.weight")[0]
    return plan_of("reppoints", body, classes, names, describe)


def plan_retinanet(checkpoint: Checkpoint, options: MMDetOptions) -> Plan:
    """RetinaNet. Its head has no output for a background, unlike torchvision's own; labels begin at 0."""
    said = checkpoint.model.at("bbox_head")
    generator = said.at("anchor_generator")
    expect(checkpoint, said.at("bbox_coder"), target_stds=[1.0] * 4, target_means=[0.0] * 4)
    body = pyramid_of(checkpoint, options, "input")
    ratios, parts = generator.get("ratios", [0.5, 1.0, 2.0]), generator.get("scales_per_octave", 3)
    scale, anchors = generator.get("octave_base_scale", 4), len(ratios) * parts
    channels, towers = body.description["out_channels"], checkpoint.count("bbox_head.cls_convs.#.")
    chosen = settings(body, selection(checkpoint, options, 0.5, 1000))

    def describe(classes: int) -> dict[str, Any]:
        return {
            "call": "models.exact.RetinaNet",
            "backbone": body.description,
            "num_classes": classes,
            "anchor_generator": {
                "call": "models.exact.ExactAnchors",
                "sizes": [[stride * scale * 2 ** (part / parts) for part in range(parts)] for stride in body.strides],
                "aspect_ratios": [ratios] * len(body.strides),
                "strides": list(body.strides),
            },
            "head": {
                "call": "retinanet_head",
                "in_channels": channels,
                "num_anchors": anchors,
                "num_classes": classes,
                "num_convs": towers,
            },
            **chosen,
        }

    names = (
        (r"bbox_head\.cls_convs\.(\d+)\.conv\.(.+)", rf"{CLASSIFICATION}.conv.\1.0.\2"),
        (r"bbox_head\.reg_convs\.(\d+)\.conv\.(.+)", rf"{REGRESSION}.conv.\1.0.\2"),
        *outputs("retina_cls", "retina_reg"),
    )
    classes = checkpoint.shape("bbox_head.retina_cls.weight")[0] // anchors
    return plan_of("retinanet", body, classes, names, describe, anchors, from_zero=True)
