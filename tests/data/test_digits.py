import hashlib
import json

import numpy as np
import pytest
from PIL import Image

from detdistill.data import digits
from detdistill.data.digits import digits_folder
from detdistill.errors import DataError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return digits_folder(train=12, val=6, size=96, seed=0, cache=tmp_path_factory.mktemp("cache"))


def annotations(folder, split):
    return json.loads((folder / "annotations" / f"instances_{split}.json").read_text())


def test_is_a_coco_folder_with_ten_classes(folder):
    assert folder.name == "digits-v1-train12-val6-size96-seed0"
    for split, count in (("train", 12), ("val", 6)):
        content = annotations(folder, split)
        assert [category["name"] for category in content["categories"]] == list("0123456789")
        assert [image["id"] for image in content["images"]] == list(range(1, count + 1))
        for image in content["images"]:
            with Image.open(folder / "images" / split / image["file_name"]) as file:
                assert (file.format, file.mode, file.size) == ("JPEG", "RGB", (96, 96))
        per_image = np.bincount([a["image_id"] for a in content["annotations"]], minlength=count + 1)[1:]
        assert per_image.min() >= 1
        assert per_image.max() <= digits.MOST_OBJECTS
    assert json.loads((folder / "digits.json").read_text()) == {"format": 1, "train": 12, "val": 6, "size": 96, "seed": 0}


def test_boxes_lie_inside_and_hardly_overlap(folder):
    for annotation in annotations(folder, "train")["annotations"]:
        left, top, width, height = annotation["bbox"]
        assert left >= 0
        assert top >= 0
        assert left + width <= 96
        assert top + height <= 96
        assert annotation["area"] == width * height
        # A digit fills 8 of its 10 padded cells, and rotating by 12 degrees makes it up to 1.19 times as large.
        assert 0.18 * 96 * 0.3 <= height <= 0.42 * 96 * 1.25
    by_image = {}
    for annotation in annotations(folder, "train")["annotations"]:
        left, top, width, height = annotation["bbox"]
        by_image.setdefault(annotation["image_id"], []).append((left, top, left + width, top + height))
    for boxes in by_image.values():
        for i, first in enumerate(boxes):
            assert all(digits._overlap(first, second) <= 0.1 for second in boxes[i + 1 :])


def test_a_second_run_writes_the_same_bytes_and_a_smaller_set_is_its_beginning(folder, tmp_path):
    again = digits_folder(train=12, val=6, size=96, seed=0, cache=tmp_path)
    for file in sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file()):
        assert (again / file).read_bytes() == (folder / file).read_bytes(), file
    smaller = digits_folder(train=3, val=1, size=96, seed=0, cache=tmp_path)
    of_three = [a for a in annotations(folder, "train")["annotations"] if a["image_id"] <= 3]
    assert annotations(smaller, "train")["annotations"] == of_three


def test_annotations_are_those_of_every_machine():
    """A change here changes every published number on the set: raise ``digits.FORMAT`` with it."""
    scans, labels = digits._scans()
    photos = [digits._photo(name) for name in digits.TRAIN_PHOTOS]
    seen = []
    for index in range(4):
        rng = np.random.default_rng([0, index])
        seen.append(digits.draw_image(rng, photos, scans[: digits.TRAIN_DIGITS], labels[: digits.TRAIN_DIGITS], 128)[1:])
    assert hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:16] == "f12561014914e592"


def test_the_digit_is_where_its_box_says():
    photo = np.full((64, 64, 3), 20, dtype=np.uint8)
    scan = np.ones((1, 8, 8))
    pixels, boxes, labels = digits.draw_image(np.random.default_rng(3), [photo], scan, np.array([7]), 128)
    assert set(labels) == {7}
    inside = np.zeros((128, 128), dtype=bool)
    for left, top, right, bottom in boxes:
        inside[top:bottom, left:right] = True
        middle = pixels[(top + bottom) // 2, (left + right) // 2].astype(float).mean()
        assert middle > 20 + 40 + 0.75 * digits.CONTRAST - 40
    flat = pixels[~inside].astype(float)
    assert flat.std() < 12  # the background is one grey plus noise of at most 8


def test_the_cache_is_used_and_a_failed_run_leaves_nothing(tmp_path, monkeypatch):
    seen = []
    folder = digits_folder(2, 1, 64, cache=tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert digits_folder(2, 1, 64, cache=tmp_path, progress=lambda *_: pytest.fail("made again")) == folder
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        digits_folder(3, 1, 64, cache=tmp_path, progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    monkeypatch.setenv("DETDISTILL_CACHE", str(tmp_path))
    assert digits_folder(2, 1, 64) == folder


def test_errors_say_what_to_do(tmp_path):
    with pytest.raises(DataError, match=r"train >= 1.*got train=0"):
        digits_folder(train=0, cache=tmp_path)
    with pytest.raises(DataError, match=r"scikit-image has no data/nothing.png; install another version"):
        digits._photo("skimage/data/nothing.png")
