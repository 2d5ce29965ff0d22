"""The card of a folder with exported files: README.md in the form of the Hugging Face hub, see ``detdistill.card``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detdistill.card import Card, Origin, is_own
from detdistill.detectors.save import in_words
from detdistill.export.about import About
from detdistill.export.proof import Stage
from detdistill.files import write_atomically
from detdistill.structures import Resizing

LIBRARIES = {"onnx": "onnx", "openvino": "openvino", "torchscript": "pytorch", "pt2": "pytorch"}
"""Library of a format, in the words of the hub."""

USE = """```python
import detdistill

found = detdistill.detect("path/to/this/folder/{file}", "image.jpg")
print(found.names, found.scores, found.boxes_xyxy)
```"""

ALONE = {
    "onnx": """import json
import onnxruntime

session = onnxruntime.InferenceSession("path/to/this/folder/{file}")
about = json.loads(session.get_modelmeta().custom_metadata_map["detdistill"])
found = dict(zip(about["outputs"], session.run(None, {{"images": images, "sizes": sizes}})))""",
    "openvino": """import json
import openvino

model = openvino.Core().read_model("path/to/this/folder/{file}")
about = json.loads(model.get_rt_info(["detdistill"]).astype(str))
results = openvino.compile_model(model, "CPU")({{"images": images, "sizes": sizes}})
found = dict(zip(about["outputs"], results.values()))""",
    "torchscript": """import json
import torch

extra = {{"detdistill": ""}}
model = torch.jit.load("path/to/this/folder/{file}", _extra_files=extra)
about = json.loads(extra["detdistill"])
found = dict(zip(about["outputs"], model(torch.from_numpy(images), torch.from_numpy(sizes))))""",
    "pt2": """import json
import torch

extra = {{"detdistill": ""}}
model = torch.export.load("path/to/this/folder/{file}", extra_files=extra).module()
about = json.loads(extra["detdistill"])
found = dict(zip(about["outputs"], model(torch.from_numpy(images), torch.from_numpy(sizes))))""",
}
"""How to load a file without this package."""

INSIDE = (
    "`images` [B, 3, H, W] are float32 and RGB in 0..1, padded with zeros on the right and at the bottom; `sizes` [B, 2] int64 "
    "are height and width of each image inside the padding. `about` says the rest: classes, outputs, and the rule by which "
    "detections are chosen from boxes and scores."
)


def write_card(folder: Path, file: str, about: About, entries: Mapping[str, Any]) -> Path | None:
    """Write the card of a folder; a README that this package did not write stays.

    Args:
        folder: folder of the files.
        file: name of the file that the card is about.
        about: its description.
        entries: content of ``export.json``, whose files stand in the table.

    Returns:
        Path of the card; None: there is a README of somebody else.
    """
    path = folder / "README.md"
    if path.exists() and not is_own(path):
        return None
    text = file_card(file, about, entries).text()
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return path


def file_card(file: str, about: About, entries: Mapping[str, Any]) -> Card:
    """The card of an exported file."""
    free = {"batch": "the number of images", "size": f"height and width (multiples of {about.multiple})"}
    height, width = about.canvas_hw
    varying = " and ".join(free[name] for name in about.free) or "nothing"
    fixed = "" if "size" in about.free else f" Images are {height}x{width} pixels with their padding."
    size = in_words(Resizing(about.size, about.resize, about.max_size))
    return Card(
        library=LIBRARIES[about.format],
        name=about.spec.name,
        about=f"`{file}`: {about.format}{f', opset {about.opset}' if about.opset else ''}, {len(about.spec.classes)} classes. "
        f"`export.json` has the comparison with the detector in torch.",
        images=f"{size}. The file normalises. What may vary: {varying}.{fixed}",
        classes=about.spec.classes,
        use=(
            f"With detdistill, which resizes the image and chooses the detections:\n\n{USE.format(file=file)}",
            "Without it:",
            f"```python\n{ALONE[about.format].format(file=file)}\n```",
            INSIDE,
        ),
        origin=Origin.from_plain(about.origin),
        results=table(entries),
    )


def table(entries: Mapping[str, Any]) -> str:
    """A Markdown table of all files of ``export.json``, each beside its detector in torch."""
    head = ("file", *Stage.HEAD)
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for entry in entries.values():
        for stage in map(Stage.from_plain, entry["stages"]):
            lines.append(f"| {' | '.join((stage.file or 'torch', *stage.cells))} |")
    note = (
        "AP in points of 100 on the validation images; largest differences of boxes and scores from torch; milliseconds of one "
        "image from pixels to detections, one after the other on the same machine."
    )
    return "\n".join([*lines, "", note])
