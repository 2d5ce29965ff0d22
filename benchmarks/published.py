"""Own detectors against published sizes: parameters, and multiply-adds of one image.

    uv run python benchmarks/published.py --detector reppoints

No weights are needed and no image is looked at: what is counted is that the layers are those of the published model. The
count is of backbone, pyramid and head, without selection; one multiply-add is one, not two.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from detdistill.detectors.build import build_detector
from detdistill.training.run import versions

CLASSES = [str(number) for number in range(80)]
SIZE = (800, 1280)


def reppoints() -> dict[str, Any]:
    """RepPoints (moment) on ResNet-50, no GroupNorm: ``reppoints-moment_r50_fpn_1x_coco`` of mmdet.

    The number to compare with is the one usually quoted for this configuration, from mmdet's counter, which counts what
    trains (all but stem and first stage). It was not checked against a primary source; the paper gives none.
    """
    name = "reppoints:resnet50,headnorm=none"
    model: Any = build_detector(name, CLASSES).model.eval()
    body = model.backbone.body
    frozen = sum(map(parameters, (body.conv1, body.bn1, body.layer1)))
    parts = {"backbone": body, "neck": model.backbone.fpn, "head": model.head}
    return {
        "model": name,
        "parameters": {part: parameters(module) for part, module in parts.items()} | {"all": parameters(model)},
        "trained_parameters_millions": round((parameters(model) - frozen) / 1e6, 2),
        "quoted_trained_parameters_millions": 36.62,
        "giga_multiply_adds": multiply_adds(lambda images: model.head(list(model.backbone(images).values()))),
    }


def parameters(module: nn.Module) -> int:
    """Numbers in a module's parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def multiply_adds(run: Callable[[torch.Tensor], object]) -> dict[str, float]:
    """Billions of multiply-adds for one image of ``SIZE``, by kind of operation; norms and sampling do not count."""

    def deformable(images: list[int], weight: list[int], *_: Any, out_shape: list[int], **__: Any) -> int:
        return 2 * images[0] * out_shape[2] * out_shape[3] * weight[0] * weight[1] * weight[2] * weight[3]

    formula = {torch.ops.torchvision.deform_conv2d: deformable}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=formula) as counter:
        run(torch.zeros(1, 3, *SIZE))
    found = counter.get_flop_counts()["Global"]
    billions = {str(kind).split(".")[-1]: round(count / 2e9, 2) for kind, count in found.items()}
    return billions | {"all": round(counter.get_total_flops() / 2e9, 2)}


DETECTORS = {"reppoints": reppoints}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--detector", choices=DETECTORS, required=True)
    parser.add_argument("--out", type=Path, help="also write the result here")
    arguments = parser.parse_args()
    command = f"uv run python benchmarks/published.py --detector {arguments.detector} --out {arguments.out}"
    counted = DETECTORS[arguments.detector]()
    result = {"detector": arguments.detector, "command": command, "size_hw": SIZE, **counted, "versions": versions()}
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text + "\n", encoding="utf-8")
