"""Names of forms that are not read, so that a refusal can say what was found instead."""

from __future__ import annotations

import re
from pathlib import Path

HEAD = 4000
"""Bytes at the beginning of a file that are looked at."""
SIGNS: tuple[tuple[str, str, str], ...] = (
    ("CVAT for images XML (<annotations>)", ".xml", r"<annotations[\s>]"),
    ("labelme JSON", ".json", r'"shapes"\s*:.*"imagePath"|"imagePath"\s*:.*"shapes"|"shape_type"\s*:'),
    ("Datumaro JSON", ".json", r'"categories"\s*:\s*\{|"dm_format_version"'),
    ("Label Studio JSON", ".json", r'"from_name"\s*:|"rectanglelabels"|"annotations"\s*:\s*\[\s*\{[^{]*"completed_by"'),
    ("VGG Image Annotator JSON", ".json", r'"_via_settings"|"shape_attributes"'),
    ("CreateML JSON", ".json", r'^\s*\[.*"annotations"\s*:.*"coordinates"'),
    ("Supervisely JSON", ".json", r'"classTitle"|"geometryType"'),
    ("COCO results without images", ".json", r'^\s*\[\s*\{[^{]*"image_id"'),
    ("KITTI label text", ".txt", r"^\w+ -?\d+(\.\d+)? -?\d -?\d+\.\d+( -?\d+(\.\d+)?){11}"),
    ("Open Images CSV", ".csv", r"ImageID,.*XMin,.*YMax"),
    ("a table of boxes (CSV)", ".csv", r"(?i)xmin\W+.*ymin\W+"),
)
"""Name of a form, suffix of its files, and what their beginning looks like."""
WAYS = {
    "labelme JSON": "convert it, e.g. `pip install labelme2yolo` and `labelme2yolo --json_dir FOLDER --output_dir yolo "
    "--include_background --deterministic_labels`, and pass yolo",
    "Label Studio JSON": "export the project as YOLO or COCO with images",
}
"""What to do with a form that has a way of its own."""


def other_form(path: Path) -> str:
    """Say which form that is not read a file, or one of a folder or its subfolders, has, and what to do; else an empty text."""
    files = [path] if path.is_file() else [*_some(path), *(file for place in sorted(path.iterdir()) for file in _some(place))]
    for file in files:
        try:
            with file.open("rb") as stream:
                text = stream.read(HEAD).decode("utf-8", "replace")
        except OSError:
            continue
        for name, suffix, sign in SIGNS:
            if file.suffix.lower() == suffix and re.search(sign, text, re.DOTALL):
                way = WAYS.get(name, "export it as COCO, YOLO or Pascal VOC")
                return f"{file.name if file == path else file.relative_to(path)} is {name}, which is not read; {way}"
    return ""


def _some(place: Path, most: int = 5) -> list[Path]:
    """A few files of each suffix of a folder."""
    if not place.is_dir():
        return []
    suffixes = {suffix for _, suffix, _ in SIGNS}
    files = [file for file in sorted(place.iterdir()) if file.suffix.lower() in suffixes and file.is_file()]
    return [file for suffix in sorted(suffixes) for file in [one for one in files if one.suffix.lower() == suffix][:most]]
