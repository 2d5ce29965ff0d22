"""How to load an exported folder with the package libreyolo: text for the folder's README."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from detdistill.detectors.yolo.shared.libreyolo_networks import BINS, FAMILIES

LOAD = """```python
from libreyolo.{module} import {names}  # MIT
from safetensors.torch import load_file
{more}
model = {kind}("{size}", nb_classes={classes})
{steps}model.load_state_dict(load_file("path/to/this/folder/model.safetensors"))
model.eval()
```

{colours}; `libreyolo.postprocess.{post}.postprocess` makes boxes of the results. The classes are `names` in `network.json`."""

RESIZED = """model.backbone = YOLOPAFPN({depth}, {width}, depthwise={depthwise})
model.head = YOLOXHead({classes}, {width}, depthwise={depthwise})
for module in model.modules():
    if isinstance(module, BatchNorm2d):
        module.eps = 1e-3
"""

WIDER = """for tower in model.head.cv3:
    tower[-1] = Conv2d({width}, {classes}, 1)
model.nc = model.head.nc = {classes}
model.head.no = {classes} + 4 * {bins}
"""

FILE = """

`detdistill student --model FOLDER --out OTHER --pt` also writes `best.pt`, which `libreyolo.LibreYOLO("OTHER/best.pt")` opens."""


def usage(description: Mapping[str, Any], classes: int, own: bool) -> str:
    """Markdown with a few lines of Python.

    Args:
        description: of the network; see ``libreyolo_networks.build_network``.
        classes: number of the network's outputs for classes.
        own: the network differs from the package's for this size and number of classes.
    """
    family, size = description["family"], description["size"]
    module, kind = FAMILIES[family]
    names, more, steps, built = kind, "", "", classes
    if own and family == "yolox":
        names, more = f"{kind}, YOLOPAFPN, YOLOXHead", "from torch.nn import BatchNorm2d\n"
        steps = RESIZED.format(**description, depthwise=size == "n", classes=classes)
    elif own:
        more, built = "from torch.nn import Conv2d\n", description["class_width"]
        steps = WIDER.format(width=built, classes=classes, bins=BINS)
    colours = "It takes BGR in 0..255, padded with 114" if family == "yolox" else "It takes RGB in 0..1, padded with 114/255"
    post = "yolox" if family == "yolox" else "yolo9"
    text = LOAD.format(
        module=module, names=names, more=more, kind=kind, size=size, classes=built, steps=steps, colours=colours, post=post
    )
    return text + ("" if "width" in description else FILE)
