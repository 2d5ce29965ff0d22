"""Tiny data sets in every form, written by hand so that no reader is tested against its own writer."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

CLASSES = ("ant", "bee", "cat")
REAL = Path(__file__).parents[3] / "shared" / "data"


def real(name: str) -> Path:
    """A real data set beside the checkout; the test is skipped where there is none."""
    if not (REAL / name).exists():
        pytest.skip(f"no real data {name}")
    return REAL / name


@dataclass
class Picture:
    """An image and its objects: (class name, x1, y1, x2, y2) in pixels counted from 0, ends not included."""

    name: str
    width: int
    height: int
    objects: list[tuple[str, float, float, float, float]] = field(default_factory=list)


TRAIN = [
    Picture("a", 64, 48, [("bee", 2, 3, 22, 33), ("ant", 0, 0, 64, 48)]),
    Picture("b", 32, 64, [("cat", 1, 2, 31, 62)]),
    Picture("c", 40, 40),
]
VAL = [Picture("d", 64, 64, [("ant", 8, 8, 16, 40), ("cat", 32, 32, 64, 64)])]


def write_image(path: Path, width: int, height: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(path.stem)).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def coco_content(pictures: list[Picture], ids: tuple[int, ...] = (1, 2, 3), suffix: str = ".jpg") -> dict:
    """A COCO dictionary whose category ids are ``ids``, in the order of ``CLASSES``."""
    images, annotations = [], []
    for number, picture in enumerate(pictures, start=1):
        images.append({"id": number, "file_name": picture.name + suffix, "width": picture.width, "height": picture.height})
        for name, x1, y1, x2, y2 in picture.objects:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": ids[CLASSES.index(name)],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": 0,
                }
            )
    categories = [{"id": key, "name": name, "supercategory": "animal"} for key, name in zip(ids, CLASSES, strict=True)]
    return {"images": images, "annotations": annotations, "categories": categories}


def write_json(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def make_coco(root: Path, splits: dict[str, list[Picture]] | None = None, ids: tuple[int, ...] = (1, 2, 3)) -> Path:
    for split, pictures in (splits or {"train2017": TRAIN, "val2017": VAL}).items():
        write_json(root / "annotations" / f"instances_{split}.json", coco_content(pictures, ids))
        for picture in pictures:
            write_image(root / split / f"{picture.name}.jpg", picture.width, picture.height)
    return root


def yolo_rows(picture: Picture) -> str:
    rows = []
    for name, x1, y1, x2, y2 in picture.objects:
        values = ((x1 + x2) / 2 / picture.width, (y1 + y2) / 2 / picture.height)
        values += ((x2 - x1) / picture.width, (y2 - y1) / picture.height)
        rows.append(" ".join([str(CLASSES.index(name)), *(f"{value:.10f}" for value in values)]))
    return "\n".join(rows)


YAML = "train: images/train\nval: images/val\nnames: [ant, bee, cat]\n"


def make_yolo(
    root: Path, yaml: str = YAML, layout: str = "{kind}/{split}", splits: dict[str, list[Picture]] | None = None
) -> Path:
    for split, pictures in (splits or {"train": TRAIN, "val": VAL}).items():
        for picture in pictures:
            place = root / layout.format(kind="images", split=split)
            write_image(place / f"{picture.name}.jpg", picture.width, picture.height)
            labels = root / layout.format(kind="labels", split=split)
            labels.mkdir(parents=True, exist_ok=True)
            (labels / f"{picture.name}.txt").write_text(yolo_rows(picture))
    (root / "data.yaml").write_text(yaml)
    return root


def voc_xml(picture: Picture) -> str:
    objects = "".join(
        f"<object><name>{name}</name><difficult>0</difficult><bndbox><xmin>{x1 + 1}</xmin><ymin>{y1 + 1}</ymin>"
        f"<xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
        for name, x1, y1, x2, y2 in picture.objects
    )
    size = f"<size><width>{picture.width}</width><height>{picture.height}</height><depth>3</depth></size>"
    return f"<annotation><filename>{picture.name}.jpg</filename>{size}{objects}</annotation>"


def make_voc(root: Path, splits: dict[str, list[Picture]] | None = None, lists: bool = True) -> Path:
    for split, pictures in (splits or {"train": TRAIN, "val": VAL}).items():
        for picture in pictures:
            write_image(root / "JPEGImages" / f"{picture.name}.jpg", picture.width, picture.height)
            (root / "Annotations").mkdir(exist_ok=True)
            (root / "Annotations" / f"{picture.name}.xml").write_text(voc_xml(picture))
        if lists:
            (root / "ImageSets" / "Main").mkdir(parents=True, exist_ok=True)
            (root / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{picture.name}\n" for picture in pictures))
    return root
