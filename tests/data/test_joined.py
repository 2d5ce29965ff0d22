"""Data sets with classes of their own as one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from detdistill.data.discover import load_data, load_split
from detdistill.data.joined import OFFSET, only_classes, parts_of
from detdistill.data.records import DataSplits, fingerprint
from detdistill.errors import DataError
from detdistill.evaluation.run import _labelled
from tests.data.forms import make_coco, make_yolo


@pytest.fixture
def digits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("DETDISTILL_CACHE", str(tmp_path / "cache"))
    return "digits:train=6,val=3,size=32"


def test_digits_of_some_classes_show_the_others_without_labels(digits: str):
    whole, some = load_data(digits), load_data(f"{digits},classes=7/0/1")
    assert some.classes == ("7", "0", "1")
    for all_of, part in zip(whole.train.records, some.train.records, strict=True):
        assert part.path.read_bytes() == all_of.path.read_bytes()
        wanted = [
            (box.tolist(), str(label)) for box, label in zip(all_of.boxes_xyxy, all_of.labels, strict=True) if label in (0, 1, 7)
        ]
        found = [(box.tolist(), some.classes[label]) for box, label in zip(part.boxes_xyxy, part.labels, strict=True)]
        assert found == wanted
        assert part.labelled is None


@pytest.mark.parametrize("classes", ["11", "0/0", "a", ""])
def test_impossible_digits_are_refused(digits: str, classes: str):
    with pytest.raises(DataError, match="classes"):
        load_data(f"{digits},classes={classes}")


def test_classes_are_joined_by_name_and_images_are_labelled_for_their_own(digits: str):
    joined = load_data(f"{digits},classes=0/1/2+{digits},classes=2/3,seed=4")
    assert joined.classes == ("0", "1", "2", "3")
    assert [record.labelled for record in joined.train.records] == [(0, 1, 2)] * 6 + [(2, 3)] * 6
    assert len({record.id for record in joined.train.records}) == 12
    assert joined.train.records[6].id == joined.train.records[0].id + OFFSET
    alone = load_data(f"{digits},classes=2/3,seed=4")
    for mine, theirs in zip(joined.train.records[6:], alone.train.records, strict=True):
        assert [joined.classes[label] for label in mine.labels] == [alone.classes[label] for label in theirs.labels]
        assert np.array_equal(mine.boxes_xyxy, theirs.boxes_xyxy)


def test_a_part_for_validation_gives_no_training_images(digits: str):
    new, old = f"{digits},classes=5/6", f"{digits},classes=0/1"
    joined = load_data(f"{new}+val={old}")
    assert joined.classes == ("5", "6", "0", "1")
    assert [record.labelled for record in joined.train.records] == [(0, 1)] * 6
    assert [record.labelled for record in joined.val.records] == [(0, 1)] * 3 + [(2, 3)] * 3
    with pytest.raises(DataError, match="no part gives training images"):
        load_data(f"val={new}+val={old}")
    split, _ = load_split(f"{new}+{old}", "val")
    assert split.fingerprint == joined.val.fingerprint


def test_equal_classes_leave_nothing_unlabelled(tmp_path: Path):
    joined = load_data(f"{make_coco(tmp_path / 'a')}+{make_yolo(tmp_path / 'b')}")
    assert {record.labelled for record in joined.train.records} == {None}


def test_a_folder_with_a_plus_is_one_folder(tmp_path: Path):
    folder = make_coco(tmp_path / "a+b")
    assert parts_of(folder) == (str(folder),)
    assert load_data(folder).classes == ("ant", "bee", "cat")


def test_what_is_labelled_enters_the_fingerprint(tmp_path: Path):
    train = load_data(make_coco(tmp_path / "a")).train
    some = [replace(record, labelled=(0, 1)) for record in train.records]
    assert fingerprint(train.classes, some) != train.fingerprint
    assert fingerprint(train.classes, [replace(record, labelled=(0,)) for record in some]) != fingerprint(train.classes, some)


def joined_val(digits: str) -> DataSplits:
    return load_data(f"{digits},classes=0/1/2+{digits},classes=2/3,seed=4")


def test_detections_of_classes_that_an_image_is_not_labelled_for_do_not_count(digits: str):
    val = joined_val(digits).val
    first, last = val.records[0].id, val.records[-1].id
    results = [{"image_id": image, "category_id": label + 1} for image in (first, last) for label in range(4)]
    kept = [(one["image_id"], one["category_id"] - 1) for one in _labelled(results, val)]
    assert kept == [(first, 0), (first, 1), (first, 2), (last, 2), (last, 3)]


def test_the_part_of_some_classes_has_the_images_labelled_for_one_of_them(digits: str):
    val = joined_val(digits).val
    part = only_classes(val, ("3", "2"))
    assert part.classes == ("3", "2")
    assert [record.labelled for record in part.records] == [(1,)] * 3 + [None] * 3
    assert part.num_boxes == sum(int(np.isin(record.labels, (2, 3)).sum()) for record in val.records)
    assert [record.id for record in only_classes(val, ("3",)).records] == [record.id for record in val.records[3:]]
