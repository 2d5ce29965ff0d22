"""Annotation files with mistakes end with data and defects, or with one line; never with a traceback, a hang or a silent loss.

100 mistakes a form by default; ``DETDISTILL_FUZZ=2000`` makes 2,000.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from detdistill.data.discover import load_data
from detdistill.data.inspect import inspect_data
from detdistill.errors import DataError
from tests.data.forms import TRAIN, VAL, coco_content, make_coco, make_voc, make_yolo, write_image, write_json

COUNT = int(os.environ.get("DETDISTILL_FUZZ", "100"))
BOXES = sum(len(picture.objects) for picture in (*TRAIN, *VAL))
JUNK: tuple[Any, ...] = (
    None, True, "", " ", "x", "nan", "inf", "-inf", "1e400", "0x10", "1_0", "12", "-3", "\u0661", -1, 0, 3, 2**70, 10**30, 1e308,
    -1e308, float("nan"), float("inf"), 0.5, [], {}, [1, 2], [[1, 2, 3]], {"a": 1}, "a" * 300, "../x", "/", ".", "\n", "\0",
    "<b>", "&amp;", "'",
)  # fmt: skip
TOKENS = (
    b"nan", b"inf", b"1e400", b"-1", b"0", b"99", b"3.5", b"1,5", b"1e-400", b"9" * 400, b"x", b"\t", b"\r", b"\xe9", b"\xff\xfe",
    b"\x00", b"<", b">", b"&", b"&x;", b'"', b"{", b"}", b"[", b"]", b":", b",", b"#", b"- ", b"!!python/x", b"2020-01-01",
    b"\xd9\xa1", b"_", b"",
)  # fmt: skip


def make_roboflow(root: Path) -> Path:
    """The COCO form of Roboflow: a file beside the images of each split."""
    for split, pictures in (("train", TRAIN), ("valid", VAL)):
        write_json(root / split / "_annotations.coco.json", coco_content(pictures, (1, 2, 3)))
        for picture in pictures:
            write_image(root / split / f"{picture.name}.jpg", picture.width, picture.height)
    return root


FORMS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "coco": (make_coco, "annotations/*.json"),
    "roboflow": (make_roboflow, "*/_annotations.coco.json"),
    "yolo": (make_yolo, "labels/*/*.txt"),
    "yaml": (make_yolo, "data.yaml"),
    "voc": (make_voc, "Annotations/*.xml"),
    "lists": (make_voc, "ImageSets/Main/*.txt"),
}


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every place in nested JSON values: the container and the key or index."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [place for key in keys for place in ((value, key), *places(value[key]))]


def change_json(path: Path, chance: random.Random) -> None:
    """Replace a value by another kind of value, leave it out, double it, or rename its key."""
    content = json.loads(path.read_text())
    container, key = chance.choice(places(content))
    kind = chance.randrange(5)
    if kind < 3:
        container[key] = chance.choice(JUNK)
    elif kind == 3 and isinstance(container, dict):
        container[chance.choice(("", "Bbox", "class", f"{key}s", str(key).upper()))] = container.pop(key)
    elif isinstance(container, list):
        container.insert(key, container[key])
    else:
        del container[key]
    path.write_text(json.dumps(content))


def change_bytes(path: Path, chance: random.Random) -> None:
    """Replace a word or a piece of the file by another, cut it, or write it in another encoding."""
    content = path.read_bytes()
    kind = chance.randrange(6)
    words = [found.span() for found in re.finditer(rb"[\w.\-]+", content)] or [(0, 0)]
    start, end = chance.choice(words)
    if kind < 3:
        content = content[:start] + chance.choice(TOKENS) + content[end:]
    elif kind == 3:
        content = content[: chance.randrange(len(content) + 1)]
    elif kind == 4:
        place = chance.randrange(len(content) + 1)
        content = content[:place] + chance.choice(TOKENS) + content[place:]
    else:
        content = content.decode().encode(chance.choice(("utf-16", "utf-32", "utf-8-sig", "cp037", "utf-16-le")))
    path.write_bytes(content)


def read(root: Path) -> str:
    """Read and inspect a data set, and check what must hold whatever is in its files; returns what was said."""
    said = []
    for action in (load_data, inspect_data):
        try:
            result = action(root)
        except DataError as error:
            text = str(error)
            assert text, "an error without words"
            assert "\n" not in text, text
            said.append(text)
        else:
            said.append("")
            if action is load_data:
                for data in result.sets:
                    for record in data.records:
                        boxes, (height, width) = record.boxes_xyxy, record.size_hw
                        assert ((boxes >= 0).all(axis=1) & (boxes[:, 2:] > boxes[:, :2]).all(axis=1)).all()
                        assert (boxes[:, 2] <= width).all()
                        assert (boxes[:, 3] <= height).all()
                        assert ((record.labels >= 0) & (record.labels < len(data.classes))).all()
    return said[0]


@pytest.mark.parametrize("form", FORMS)
def test_mistakes_end_with_data_and_defects_or_with_one_line(form: str, tmp_path: Path):
    make, pattern = FORMS[form]
    good = make(tmp_path / "good")
    assert sum(data.num_boxes for data in load_data(good).sets) == BOXES
    (tmp_path / "bad").mkdir()
    root = Path(shutil.copytree(good, tmp_path / "bad" / "set"))
    files = sorted(root.glob(pattern))
    before = {path: path.read_bytes() for path in files}
    for seed in range(COUNT):
        chance = random.Random(f"{form} {seed}")
        path = chance.choice(files)
        structural = path.suffix == ".json" and chance.random() < 0.7
        (change_json if structural else change_bytes)(path, chance)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                read(root)
        except Exception as error:
            raise AssertionError(f"{form} {seed}: {path.name} with {path.read_bytes()[:2000]!r}") from error
        path.write_bytes(before[path])


def accounted(root: Path) -> float:
    """Boxes of the training set that are kept, and defects that tell of left out ones; infinite if the data are refused."""
    try:
        data = load_data(root).train
    except DataError:
        return float("inf")
    return data.num_boxes + sum(defect.skipped in ("box", "image") for defect in data.defects)


BROKEN = (
    None, True, "", "x", "nan", "1e400", -1, 2**70, 10**30, 1e308, float("nan"), float("inf"), 0.5, [], {}, [1, 2], [[1, 2, 3]],
    "a" * 300,
)  # fmt: skip


@pytest.mark.parametrize("key", ["image_id", "category_id", "bbox"])
def test_no_coco_box_is_lost_unsaid(key: str, tmp_path: Path):
    """Boxes in = boxes kept + defects shown."""
    root = make_coco(tmp_path)
    path = root / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    count = len(content["annotations"])
    for junk in BROKEN:
        content["annotations"][0][key] = junk
        write_json(path, content)
        assert accounted(root) >= count, (key, junk)


@pytest.mark.parametrize("place", range(5))
def test_no_yolo_row_is_lost_unsaid(place: int, tmp_path: Path):
    root = make_yolo(tmp_path)
    path = root / "labels" / "train" / "a.txt"
    good = path.read_text()
    for junk in ("nan", "inf", "1e400", "x", "-1", "99", "0x1", "", "\u0661", "1,5", "9" * 400):
        rows = [row.split() for row in good.splitlines()]
        rows[0][place] = junk
        path.write_text("\n".join(" ".join(row) for row in rows), encoding="utf-8")
        assert accounted(root) >= 3, (place, junk)


@pytest.mark.parametrize("key", ["name", "xmin", "ymax", "bndbox"])
def test_no_voc_object_is_lost_unsaid(key: str, tmp_path: Path):
    root = make_voc(tmp_path)
    path = root / "Annotations" / "a.xml"
    good = path.read_text()
    for junk in ("", "nan", "inf", "1e400", "x", "-9", "99999", "9" * 400, "1,5", "<b/>"):
        path.write_text(re.sub(rf"<{key}>.*?</{key}>", f"<{key}>{junk}</{key}>", good, count=1))
        assert accounted(root) >= 3, (key, junk)
