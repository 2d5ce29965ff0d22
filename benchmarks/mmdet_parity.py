"""Detectors of MMDetection beside ours with the same weights: pyramid, head outputs and detections.

The first command runs in an environment of its own, the second in this project's:

    python -m venv MMDET && MMDET/bin/pip install mmdet==3.3.0 mmengine==0.10.7 mmcv-lite==2.1.0 torch torchvision
    MMDET/bin/python benchmarks/mmdet_parity.py make --full FOLDER          networks of full size: FILE.pth and results of each
    uv run python benchmarks/mmdet_parity.py compare FOLDER                 loads each file by mmdet:FILE.pth, prints a table
    MMDET/bin/python benchmarks/mmdet_parity.py make --golden tests/golden  small networks: the golden files of the tests

No weights are downloaded: every parameter and statistic is a formula of its number and shape (``formula``). mmcv-lite lacks
mmcv's compiled operators; a stand-in for its module ``mmcv._ext`` gives the four that are needed, made of torchvision's.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import json
import math
import re
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
FOCAL = {"type": "FocalLoss", "use_sigmoid": True, "gamma": 2.0, "alpha": 0.25, "loss_weight": 1.0}
REGIONS = [[4.0, 6.0, 40.0, 50.0], [10.0, 2.0, 90.0, 60.0], [20.0, 20.0, 28.0, 31.0], [0.0, 0.0, 95.0, 63.0]]
"""Boxes for which the second stage of two-stage detectors is compared, in pixels."""
FACTORS = (
    (
        r".*\.(retina_reg|rpn_reg|reppoints_pts_init_out|reppoints_pts_refine_out|reppoints_cls_out|retina_cls|rpn_cls)\.weight",
        0.1,
    ),
    (r"roi_head\..*\.(fc_cls|fc_reg)\.weight", 0.03),
    (r"backbone\.layer\d\.\d+\.bn[23]\.weight", 0.3),
)
"""Outputs that are small numbers, and norms before residual sums, which would let values grow from block to block."""
RESULTS = ("boxes", "scores", "labels")
"""Names of the detections among the results."""
MOST = 100
"""Numbers of a tensor that a golden file holds, evenly spread."""

# ------------------------------------------------------------------------------------------------------- the same on both sides


def formula(number: int, name: str, shape: list[int]) -> Tensor:
    """Values of a parameter or statistic: a hash of its number and place, uniform in a range by its kind, float32."""
    count = math.prod(shape)
    x = 43758.5453 * torch.sin(12.9898 * (torch.arange(count, dtype=torch.float64) % 9973) + 78.233 * (number + 1))
    unit = x - x.floor()
    if name.endswith("running_var") or len(shape) == 0 or (len(shape) == 1 and name.endswith("weight")):
        values = 0.75 + 0.5 * unit
    elif len(shape) > 1:
        values = math.sqrt(6 / (count / shape[0])) * (2 * unit - 1)
    else:
        values = 0.1 * (2 * unit - 1)
    for pattern, factor in FACTORS:
        if re.fullmatch(pattern, name):
            values = values * factor
    return values.float().view(shape)


def weights(names: list[list[Any]], caffe: bool = False) -> dict[str, Tensor]:
    """A state dict.

    Args:
        names: name, shape, and the name of the same tensor that came before, or None.
        caffe: pixels are not divided by their deviation, so the first layer is.
    """
    found: dict[str, Tensor] = {}
    for number, (name, shape, same) in enumerate(names):
        if same is not None:
            found[name] = found[same]
        elif name.endswith("num_batches_tracked"):
            found[name] = torch.zeros(shape, dtype=torch.int64)
        elif name.endswith("integral.project"):  # GFL's bins, which are no weights
            found[name] = torch.arange(shape[0], dtype=torch.float32)
        else:
            found[name] = formula(number, name, shape)
    if caffe:
        found["backbone.conv1.weight"] /= 60
    return found


def picture(height: int, width: int) -> Tensor:
    """[3, H, W] uint8 RGB."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    wave = torch.stack([(x * (3 + k) + y * (5 - k) + 17 * k * torch.sin(x / 7.0 + y / (5.0 + k))) % 256 for k in range(3)])
    return wave.to(torch.uint8)


def sampled(tensor: Tensor) -> Tensor:
    """At most about ``MOST`` values of a tensor, evenly spread."""
    flat = tensor.flatten()
    return flat[:: max(1, len(flat) // MOST) | 1]


# ------------------------------------------------------------------------------------------------------ in mmdet's environment


def stand_in() -> None:
    """Put a module ``mmcv._ext`` into place, with the operators that mmcv-lite lacks."""
    from torchvision.ops import deform_conv2d, nms, roi_align

    def own_nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
        return nms(boxes, scores, float(iou_threshold))

    def pool(x: Tensor, rois: Tensor, output: Tensor, *_: Any, **given: Any) -> None:
        size = (given["aligned_height"], given["aligned_width"])
        found = roi_align(x, rois, size, given["spatial_scale"], given["sampling_ratio"], given["aligned"])
        output.copy_(found)

    def convolve(x: Tensor, weight: Tensor, offset: Tensor, output: Tensor, *_: Any, **given: Any) -> None:
        stride, padding = (given["dH"], given["dW"]), (given["padH"], given["padW"])
        output.copy_(deform_conv2d(x, offset, weight, stride=stride, padding=padding))

    module: Any = types.ModuleType("mmcv._ext")
    known = {"nms": own_nms, "roi_align_forward": pool, "deform_conv_forward": convolve}

    def operator(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return known.get(name, lambda *_, **__: None)

    module.__getattr__ = operator
    module.__spec__ = importlib.machinery.ModuleSpec("mmcv._ext", None)
    sys.modules["mmcv._ext"] = module


def resnet(full: bool, depth: int = 18, **more: Any) -> dict[str, Any]:
    """A ResNet-50, or a narrow one of this depth."""
    return {"type": "ResNet", "depth": 50 if full else depth, "base_channels": 64 if full else 8, **more}


def network(name: str, full: bool) -> dict[str, Any]:
    """The ``model`` of a configuration: that of a released one, or a narrow form of it."""
    detector, _, form = name.partition("-")
    made: dict[str, Any] = {
        "gfl": dense,
        "atss": dense,
        "retinanet": dense,
        "fcos": dense,
        "reppoints": dense,
        "faster_rcnn": two_stage,
        "mask_rcnn": two_stage,
        "cascade_rcnn": two_stage,
        "cascade_mask_rcnn": two_stage,
        "deformable_detr": deformable_detr,
        "conditional_detr": single_scale_detr,
        "dab_detr": single_scale_detr,
    }[detector](detector, form, full)
    return made


def pixels(caffe: bool) -> dict[str, Any]:
    mean, std, flip = ([103.530, 116.280, 123.675], [1.0, 1.0, 1.0], False) if caffe else (MEAN, STD, True)
    return {"type": "DetDataPreprocessor", "mean": mean, "std": std, "bgr_to_rgb": flip, "pad_size_divisor": 32}


def squares(scale: int) -> dict[str, Any]:
    return {
        "type": "AnchorGenerator",
        "ratios": [1.0],
        "octave_base_scale": scale,
        "scales_per_octave": 1,
        "strides": [8, 16, 32, 64, 128],
    }


def dense(detector: str, form: str, full: bool) -> dict[str, Any]:
    caffe, classes = form.startswith("caffe"), 80 if full else 3
    width = 256 if full else (64 if form == "gn" else 32)
    grouped = {"type": "GN", "num_groups": 32, "requires_grad": True}
    top = {"gfl": ("on_output", False), "atss": ("on_output", False), "fcos": ("on_output", True)}.get(
        detector, ("on_input", False)
    )
    body: dict[str, Any] = resnet(full, 50 if caffe else 18, style="caffe" if caffe else "pytorch")
    stages = [256, 512, 1024, 2048] if full else ([32, 64, 128, 256] if caffe else [8, 16, 32, 64])
    neck: dict[str, Any] = {
        "type": "FPN",
        "in_channels": stages,
        "out_channels": width,
        "start_level": 1,
        "add_extra_convs": top[0],
        "relu_before_extra_convs": top[1],
        "num_outs": 5,
        **({"norm_cfg": grouped} if form == "gn" else {}),
    }
    common = {"num_classes": classes, "in_channels": width, "feat_channels": width, "stacked_convs": 4 if full else 2}
    deltas: dict[str, Any] = {"type": "DeltaXYWHBBoxCoder", "target_means": [0.0] * 4, "target_stds": [0.1, 0.1, 0.2, 0.2]}
    heads: dict[str, dict[str, Any]] = {
        "gfl": {"type": "GFLHead", "reg_max": 16 if full else 4, "anchor_generator": squares(8), "norm_cfg": grouped},
        "atss": {"type": "ATSSHead", "anchor_generator": squares(8), "bbox_coder": deltas, "norm_cfg": grouped},
        "fcos": {"type": "FCOSHead", "strides": [8, 16, 32, 64, 128], "norm_cfg": grouped},
        "reppoints": {
            "type": "RepPointsHead",
            "point_feat_channels": width,
            "num_points": 9,
            "gradient_mul": 0.1,
            "point_strides": [8, 16, 32, 64, 128],
            "point_base_scale": 4,
            "transform_method": "moment",
            "loss_cls": FOCAL,
            **({"norm_cfg": grouped} if form == "gn" else {}),
        },
        "retinanet": {
            "type": "RetinaHead",
            "anchor_generator": {**squares(4), "scales_per_octave": 3, "ratios": [0.5, 1.0, 2.0]},
            "bbox_coder": {**deltas, "target_stds": [1.0] * 4},
        },
    }
    head = heads[detector]
    if form == "caffe_later":
        head |= {"norm_on_bbox": True, "centerness_on_reg": True, "conv_bias": True}
    kind = {"gfl": "GFL", "atss": "ATSS", "fcos": "FCOS", "retinanet": "RetinaNet", "reppoints": "RepPointsDetector"}[detector]
    iou = 0.6 if detector in ("gfl", "atss") else 0.5
    test = {
        "nms_pre": 1000,
        "min_bbox_size": 0,
        "score_thr": 0.05,
        "nms": {"type": "nms", "iou_threshold": iou},
        "max_per_img": 100,
    }
    return {
        "type": kind,
        "data_preprocessor": pixels(caffe),
        "backbone": body,
        "neck": neck,
        "bbox_head": {**head, **common},
        "test_cfg": test,
    }


def two_stage(detector: str, form: str, full: bool) -> dict[str, Any]:
    width, classes, mlp, cascade = 256 if full else 16, 80 if full else 3, 1024 if full else 24, detector.startswith("cascade")
    coder = {"type": "DeltaXYWHBBoxCoder", "target_means": [0.0] * 4}
    stds = [[0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1], [0.033, 0.033, 0.067, 0.067]]
    boxes = [
        {
            "type": "Shared2FCBBoxHead",
            "in_channels": width,
            "fc_out_channels": mlp,
            "roi_feat_size": 7,
            "num_classes": classes,
            "bbox_coder": {**coder, "target_stds": std},
            "reg_class_agnostic": cascade,
        }
        for std in stds
    ]
    mask = {
        "type": "FCNMaskHead",
        "num_convs": 4,
        "in_channels": width,
        "conv_out_channels": width,
        "num_classes": classes,
    }

    def extractor(side: int) -> dict[str, Any]:
        layer = {"type": "RoIAlign", "output_size": side, "sampling_ratio": 0}
        return {"type": "SingleRoIExtractor", "roi_layer": layer, "out_channels": width, "featmap_strides": [4, 8, 16, 32]}

    heads: dict[str, Any] = {
        "type": "CascadeRoIHead" if cascade else "StandardRoIHead",
        "bbox_roi_extractor": extractor(7),
        "bbox_head": boxes if cascade else boxes[0],
        **({"num_stages": 3, "stage_loss_weights": [1, 0.5, 0.25]} if cascade else {}),
    }
    if "mask" in detector:
        heads |= {"mask_roi_extractor": extractor(14), "mask_head": mask}
    first = {"nms_pre": 1000, "max_per_img": 1000, "nms": {"type": "nms", "iou_threshold": 0.7}, "min_bbox_size": 0}
    second = {
        "score_thr": 0.001 if full else 0.05,
        "nms": {"type": "nms", "iou_threshold": 0.5},
        "max_per_img": 100,
        "mask_thr_binary": 0.5,
    }
    return {
        "type": "CascadeRCNN" if cascade else ("MaskRCNN" if "mask" in detector else "FasterRCNN"),
        "data_preprocessor": pixels(False),
        "backbone": resnet(full, style="pytorch"),
        "neck": {
            "type": "FPN",
            "in_channels": [256, 512, 1024, 2048] if full else [8, 16, 32, 64],
            "out_channels": width,
            "num_outs": 5,
        },
        "rpn_head": {
            "type": "RPNHead",
            "in_channels": width,
            "feat_channels": width,
            "anchor_generator": {
                "type": "AnchorGenerator",
                "scales": [8],
                "ratios": [0.5, 1.0, 2.0],
                "strides": [4, 8, 16, 32, 64],
            },
            "bbox_coder": {**coder, "target_stds": [1.0] * 4},
        },
        "roi_head": heads,
        "train_cfg": None,
        "test_cfg": {"rpn": first, "rcnn": second},
    }


def transformer(width: int, wide: int, layers: int, attention: dict[str, Any], cross: dict[str, Any], act: str) -> dict[str, Any]:
    inner = {"embed_dims": width, "feedforward_channels": wide, "act_cfg": {"type": act}}
    first, both = (
        {"self_attn_cfg": attention, "ffn_cfg": inner},
        {"self_attn_cfg": attention, "cross_attn_cfg": cross, "ffn_cfg": inner},
    )
    return {
        "encoder": {"num_layers": layers, "layer_cfg": first},
        "decoder": {"num_layers": layers, "return_intermediate": True, "layer_cfg": both},
    }


def deformable_detr(detector: str, form: str, full: bool) -> dict[str, Any]:
    # mmdet's embeddings of proposals are made for 256 channels
    width, classes, layers = 256 if full or form == "two_stage" else 32, 80 if full else 3, 6 if full else 2
    heads = 8 if full else 4
    sampling = {"embed_dims": width, "num_heads": heads, "batch_first": True}
    parts = transformer(width, 1024 if full else 48, layers, sampling, sampling, "ReLU")
    parts["decoder"]["layer_cfg"]["self_attn_cfg"] = {"embed_dims": width, "num_heads": heads, "batch_first": True}
    parts["decoder"]["post_norm_cfg"] = None
    neck = {
        "type": "ChannelMapper",
        "in_channels": [512, 1024, 2048] if full else [128, 256, 512],
        "kernel_size": 1,
        "out_channels": width,
        "act_cfg": None,
        "norm_cfg": {"type": "GN", "num_groups": 32},
        "num_outs": 4,
    }
    return {
        "type": "DeformableDETR",
        "num_queries": 300 if full else 30,
        "num_feature_levels": 4,
        "with_box_refine": form in ("refine", "two_stage"),
        "as_two_stage": form == "two_stage",
        "data_preprocessor": {**pixels(False), "pad_size_divisor": 1},
        "backbone": {**resnet(full), "base_channels": 64, "out_indices": [1, 2, 3]},
        "neck": neck,
        **parts,
        "positional_encoding": {"num_feats": width // 2, "normalize": True, "offset": -0.5},
        "bbox_head": {"type": "DeformableDETRHead", "num_classes": classes, "embed_dims": width, "loss_cls": FOCAL},
        "test_cfg": {"max_per_img": 100 if full else 50},
    }


def single_scale_detr(detector: str, form: str, full: bool) -> dict[str, Any]:
    dab = detector == "dab_detr"
    width, classes, layers = 32 if dab and not full else 256, 80 if full else 3, 6 if full else 2  # Conditional DETR's are fixed
    attention = {"embed_dims": width, "num_heads": 8 if full else 4}
    parts = transformer(
        width, 2048 if full else 48, layers, attention, {**attention, "cross_attn": True}, "PReLU" if dab else "ReLU"
    )
    parts["decoder"]["layer_cfg"]["self_attn_cfg"] = {**attention, "cross_attn": False}
    if dab:
        parts["decoder"] |= {"query_dim": 4, "query_scale_type": "cond_elewise", "with_modulated_hw_attn": True}
    return {
        "type": "DABDETR" if dab else "ConditionalDETR",
        "num_queries": 300 if full else 30,
        **({"with_random_refpoints": False, "num_patterns": 0} if dab else {}),
        "data_preprocessor": {**pixels(False), "pad_size_divisor": 1},
        "backbone": {**resnet(full), "base_channels": 64, "out_indices": [3]},
        "neck": {
            "type": "ChannelMapper",
            "in_channels": [2048 if full else 512],
            "kernel_size": 1,
            "out_channels": width,
            "act_cfg": None,
            "norm_cfg": None,
            "num_outs": 1,
        },
        **parts,
        "positional_encoding": {"num_feats": width // 2, "normalize": True, **({"temperature": 20} if dab else {})},
        "bbox_head": {
            "type": "DABDETRHead" if dab else "ConditionalDETRHead",
            "num_classes": classes,
            "embed_dims": width,
            "loss_cls": FOCAL,
        },
        "test_cfg": {"max_per_img": (300 if dab else 100) if full else (60 if dab else 50)},
    }


NETWORKS = (
    *("gfl", "atss", "retinanet", "retinanet-caffe", "fcos-caffe", "fcos-caffe_later", "reppoints", "reppoints-gn"),
    *("faster_rcnn", "mask_rcnn", "cascade_rcnn", "cascade_mask_rcnn"),
    *("deformable_detr", "deformable_detr-refine", "deformable_detr-two_stage", "conditional_detr", "dab_detr"),
)
"""What is compared: a detector, and a form of it."""


def make(name: str, full: bool) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Tensor]]:
    """Build mmdet's detector with formula weights and run it on a picture: results, what describes them, and the weights."""
    from mmdet.registry import MODELS
    from mmdet.structures import DetDataSample
    from mmengine.config import Config

    config = Config({"model": network(name, full)})
    model: Any = MODELS.build(config.model).eval()
    first: dict[int, str] = {}
    names = [[key, list(value.shape), first.setdefault(value.data_ptr(), key)] for key, value in model.state_dict().items()]
    names = [[key, shape, None if same == key else same] for key, shape, same in names]
    state = weights(names, "caffe" in name)
    model.load_state_dict(state)
    height, width = (224, 256) if full else (96, 160)
    image = picture(height, width).flip(0)  # as mmdet reads files: blue first
    sample = DetDataSample(metainfo={"img_shape": (height, width), "ori_shape": (height, width), "scale_factor": (1.0, 1.0)})
    with torch.no_grad():
        data = model.data_preprocessor({"inputs": [image], "data_samples": [sample]}, False)
        maps = model.extract_feat(data["inputs"])
        results = {f"neck_{level}": one for level, one in enumerate(maps)} | outputs(model, maps, data["data_samples"])
        found = model.predict(data["inputs"], data["data_samples"], rescale=False)[0].pred_instances
    results |= {"boxes": found.bboxes, "scores": found.scores, "labels": found.labels}
    classes = [f"class {number}" for number in range(80 if full else 3)]
    meta = {"names": names, "config": config.pretty_text, "classes": classes, "image_hw": [height, width], "network": name}
    return results, meta, state


def outputs(model: Any, maps: Any, samples: Any) -> dict[str, Tensor]:
    """Outputs of the heads as [B, predictions, numbers], level by level, row by row, anchor by anchor."""
    if hasattr(model, "rpn_head"):
        return region_outputs(model, maps)
    if hasattr(model, "encoder"):
        return query_outputs(model, maps, samples)
    found, head = model.bbox_head(maps), model.bbox_head
    classes = head.cls_out_channels
    results = {"cls": flat(found[0], classes)}
    kind = type(head).__name__
    if kind in ("FCOSHead", "RepPointsHead"):
        offset = 0.5 if kind == "FCOSHead" else 0.0
        boxes = []
        for level, stride in zip(found[1], (8, 16, 32, 64, 128), strict=True):
            y, x = torch.meshgrid(torch.arange(level.shape[2]), torch.arange(level.shape[3]), indexing="ij")
            points = (torch.stack([x.flatten(), y.flatten()], dim=1) + offset).repeat(1, 2) * stride
            sides = flat([level], 4)
            boxes.append(points + (sides * sides.new_tensor([-1, -1, 1, 1]) if kind == "FCOSHead" else sides * stride))
        results["decoded"] = torch.cat(boxes, dim=1)
    else:
        results["box"] = flat(found[1], found[1][0].shape[1] // (found[0][0].shape[1] // classes))
    return results | ({"ctr": flat(found[2], 1)} if len(found) == 3 and kind != "RepPointsHead" else {})


def flat(levels: Any, numbers: int) -> Tensor:
    return torch.cat([level.permute(0, 2, 3, 1).reshape(len(level), -1, numbers) for level in levels], dim=1)


def region_outputs(model: Any, maps: Any) -> dict[str, Tensor]:
    """The first stage's outputs, and those of every later stage for ``REGIONS``."""
    objectness, deltas = model.rpn_head(maps)
    results = {"rpn_cls": flat(objectness, 1), "rpn_box": flat(deltas, 4)}
    regions, heads = torch.tensor([[0.0, *box] for box in REGIONS]), model.roi_head
    stages = range(getattr(heads, "num_stages", 1))
    for stage in stages:
        found = heads._bbox_forward(*((stage,) if len(stages) > 1 else ()), maps, regions)
        results |= {f"roi_cls_{stage}": found["cls_score"], f"roi_box_{stage}": found["bbox_pred"]}
        if heads.with_mask:
            results[f"mask_{stage}"] = heads._mask_forward(*((stage,) if len(stages) > 1 else ()), maps, regions)["mask_preds"]
    return results


def query_outputs(model: Any, maps: Any, samples: Any) -> dict[str, Tensor]:
    """Outputs of the last layer for all queries, boxes as centre and size in parts of the image; the encoder's map."""
    memory = model.forward_encoder(**model.pre_transformer(maps, samples)[0])["memory"]
    found = model.bbox_head(**model.forward_transformer(maps, samples))
    return {"memory": memory, "cls": found[0][-1], "box": found[1][-1]}


def write_checkpoint(path: Path, meta: dict[str, Any], state: dict[str, Tensor]) -> None:
    """Write a file as mmengine does, with objects of its own classes inside."""
    from mmengine.logging import HistoryBuffer

    about = {
        "cfg": meta["config"],
        "dataset_meta": {"classes": tuple(meta["classes"])},
        "epoch": 12,
        "mmengine_version": "0.10.7",
    }
    torch.save({"meta": about, "state_dict": state, "message_hub": {"loss": HistoryBuffer([1.0], [1])}}, path)


def save(path: Path, results: dict[str, Tensor], meta: dict[str, Any]) -> None:
    arrays = {name: value.numpy() for name, value in results.items()}
    everything: dict[str, Any] = {"meta": np.array(json.dumps(meta)), **arrays}
    np.savez_compressed(path, **everything)


def make_all(full: Path | None, golden: Path | None, only: list[str]) -> None:
    stand_in()
    from mmdet.utils import register_all_modules

    register_all_modules()
    torch.set_num_threads(1)
    for name in only or NETWORKS:
        for folder in (folder for folder in (full, golden) if folder):
            results, meta, state = make(name, full is folder)
            folder.mkdir(parents=True, exist_ok=True)
            if full is folder:
                write_checkpoint(folder / f"{name}.pth", meta, state)
                save(folder / f"{name}.npz", results, meta)
            else:
                small = {key: value if key in RESULTS else sampled(value) for key, value in results.items()}
                save(folder / f"mmdet_{name.replace('-', '_')}.npz", small, meta)
            print(f"{name}: {len(results['scores'])} detections", flush=True)


# ------------------------------------------------------------------------------------------------------- in our environment


def compare(folder: Path, only: list[str]) -> None:
    """Load each file by its model string and print the largest differences, relative to the largest value."""
    columns = ("network", "detector", "neck", "head outputs", "detections equal", "scores", "boxes")
    print("|", " | ".join(columns), "|\n|", " | ".join("---" for _ in columns), "|")
    for path in sorted(folder.glob("*.npz")):
        if only and path.stem not in only:
            continue
        with np.load(path) as arrays:
            theirs = {name: torch.from_numpy(arrays[name]) for name in arrays.files if name != "meta"}
            meta = json.loads(str(arrays["meta"]))
        detector, ours = run_ours(f"mmdet:{path.with_suffix('.pth')}", meta["image_hw"], theirs)
        print(row(path.stem, type(detector).__name__, ours, theirs), flush=True)


def row(name: str, kind: str, ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> str:
    """One line of the table."""
    apart = {key: difference(ours[key], value) for key, value in theirs.items() if key not in RESULTS}
    neck = max(value for key, value in apart.items() if key.startswith(("neck", "memory")))
    heads = ", ".join(f"{key} {value:.1e}" for key, value in apart.items() if not key.startswith("neck"))
    mine, yours = paired(ours, theirs)
    scores, boxes = (f"{difference(ours[key][mine], theirs[key][yours]):.1e}" for key in ("scores", "boxes"))
    return f"| {name} | {kind} | {neck:.1e} | {heads} | {len(mine)} of {len(theirs['scores'])} | {scores} | {boxes} |"


def paired(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> tuple[list[int], list[int]]:
    """Rows of our detections and of theirs that are the same one: equal labels, boxes within 0.1 pixels, scores within 1e-3.

    Near-equal scores may come in another order, and the last of many equal ones may be others.
    """
    free, mine, yours = list(range(len(ours["scores"]))), [], []
    for row, (box, score, label) in enumerate(zip(*(theirs[key] for key in RESULTS), strict=True)):
        same = [index for index in free if ours["labels"][index] == label]
        apart = (ours["boxes"][same] - box).abs().amax(dim=1) if same else torch.zeros(0)
        if len(apart) and apart.min() < 0.1 and (ours["scores"][same[int(apart.argmin())]] - score).abs() < 1e-3:
            mine.append(same[int(apart.argmin())])
            yours.append(row)
            free.remove(mine[-1])
    return mine, yours


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12)) if len(theirs.flatten()) else 0.0


def run_ours(name: str, size: list[int], wanted: Any) -> tuple[Any, dict[str, Tensor]]:
    """Load a detector, and compute the same results with it, by the same names.

    Args:
        name: model string.
        size: height and width of the picture.
        wanted: names of the results.
    """
    from detdistill.detectors.load import load_detector
    from detdistill.structures import Batch, Target, View

    detector: Any = load_detector(name).eval()
    # An encoder's rounding in float32 differs between CPUs as much as between implementations; in float64 only mmdet's is left.
    exact = torch.float64 if detector.spec.family == "queries" else torch.float32
    detector.to(exact)
    height, width = size
    nothing = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool))
    view = View((height, width), (height, width))
    batch = Batch(picture(height, width)[None].to(exact) / 255, torch.tensor([[height, width]]), (nothing,), (0,), (view,))
    with torch.no_grad():
        features = detector.features(batch)
        prediction = detector.predict(features, batch)
        found = detector.detect(prediction, batch)[0]
        results = {f"neck_{level}": one for level, one in enumerate(features.maps)}
        if detector.spec.family == "queries":
            mapped = detector.before_encoder(detector.backbone_features(batch), batch).maps
            results = {f"neck_{level}": one for level, one in enumerate(mapped)}
            results["memory"] = torch.cat([one.flatten(2).transpose(1, 2) for one in features.maps], dim=1)
            results |= {"cls": prediction.logits[-1], "box": prediction.boxes_cxcywh01[-1]}
        elif detector.spec.family == "regions":
            results |= our_regions(detector, features, prediction, batch)
        else:
            results |= {"cls": prediction.logits, "box": prediction.deltas, "decoded": prediction.boxes_xyxy}
            results |= {} if prediction.quality is None else {"ctr": prediction.quality[..., None]}
    results |= {"boxes": found.boxes_xyxy, "scores": found.scores, "labels": found.labels}
    return detector, {
        key: value.float() if value.is_floating_point() else value for key, value in results.items() if key in wanted
    }


def our_regions(detector: Any, features: Any, prediction: Any, batch: Any) -> dict[str, Tensor]:
    """What ``region_outputs`` computes."""
    results = {"rpn_cls": prediction.first.logits, "rpn_box": prediction.first.deltas}
    heads, boxes = detector.model.roi_heads, [torch.tensor(REGIONS)]
    stages = [*getattr(heads, "earlier", ()), heads]
    for number, stage in enumerate(stages):
        found = detector._region_stage(features, boxes, [origins(len(REGIONS))], batch, stage)
        results |= {f"roi_cls_{number}": found.logits, f"roi_box_{number}": found.deltas.flatten(1)}
        if stage.has_mask():
            pooled = detector._pool(stage.mask_roi_pool, features, boxes, batch)
            results[f"mask_{number}"] = stage.mask_predictor(stage.mask_head(pooled))[:, 1:]
    return results


def origins(count: int) -> Any:
    from detdistill.structures import Origin

    return Origin.given([count], torch.device("cpu"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    making = actions.add_parser("make", help="in mmdet's environment")
    making.add_argument("--full", type=Path, help="folder for files of full size")
    making.add_argument("--golden", type=Path, help="folder for golden files of small networks")
    comparing = actions.add_parser("compare", help="in this project's environment")
    comparing.add_argument("folder", type=Path)
    for one in (making, comparing):
        one.add_argument("--only", nargs="*", default=[], choices=NETWORKS)
    given = parser.parse_args()
    if given.action == "make":
        make_all(given.full, given.golden, given.only)
    else:
        compare(given.folder, given.only)


if __name__ == "__main__":
    main()
