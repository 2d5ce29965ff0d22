import json
import shutil

import pytest

from detdistill.data.discover import load_data, read_sets
from detdistill.errors import DataError
from tests.data.forms import CLASSES, TRAIN, VAL, make_coco, make_voc, make_yolo, yolo_rows

EXPECTED = {"a": ([[2, 3, 22, 33], [0, 0, 64, 48]], [1, 0]), "b": ([[1, 2, 31, 62]], [2]), "c": ([], [])}


def boxes(data):
    return {record.path.stem: (record.boxes_xyxy.round(6).tolist(), record.labels.tolist()) for record in data.records}


def without_yaml(root, layout="{kind}", splits=None):
    """Images and labels in the forms' layout, without the data.yaml."""
    make_yolo(root, layout=layout, splits=splits or {"train": TRAIN})
    (root / "data.yaml").unlink()
    return root


def test_label_studio_export(tmp_path):
    (without_yaml(tmp_path) / "classes.txt").write_text("ant\nbee\ncat\n")
    sets, notes = read_sets(tmp_path)
    assert sets["train"].classes == CLASSES
    assert boxes(sets["train"]) == EXPECTED
    assert notes == ["no data.yaml names the splits: classes from classes.txt, train: images"]


def test_ids_of_label_studio_go_before_the_order_of_the_list(tmp_path):
    (without_yaml(tmp_path) / "classes.txt").write_text("cat\nant\nbee\n")
    categories = [{"id": CLASSES.index(name), "name": name} for name in ("cat", "ant", "bee")]
    (tmp_path / "notes.json").write_text(json.dumps({"categories": categories, "info": {"contributor": "Label Studio"}}))
    sets, notes = read_sets(tmp_path)
    assert sets["train"].classes == CLASSES
    assert notes[0] == (
        "classes.txt lists cat, ant, bee, but the rows have the ids of notes.json, in the order ant, bee, cat: these are used"
    )
    (tmp_path / "notes.json").write_text(json.dumps({"about": "another file of this name"}))
    assert read_sets(tmp_path)[0]["train"].classes == ("cat", "ant", "bee")


def test_names_without_splits(tmp_path):
    without_yaml(tmp_path, "{split}/{kind}", {"train": TRAIN, "valid": VAL})
    (tmp_path / "data.yaml").write_text("nc: 3\nnames: [ant, bee, cat]\n")
    data = load_data(tmp_path)
    assert (data.classes, boxes(data.train)) == (CLASSES, EXPECTED)
    assert boxes(data.val) == {"d": ([[8, 8, 16, 40], [32, 32, 64, 64]], [0, 2])}
    assert data.notes == ("no data.yaml names the splits: classes from data.yaml, train: train; val: valid",)


@pytest.mark.parametrize("layout", ["{kind}/{split}", "obj_{split}_data", "{split}"])
def test_folders_of_splits(tmp_path, layout):
    (without_yaml(tmp_path, layout, {"train": TRAIN, "val": VAL}) / "obj.names").write_text("ant\nbee\ncat\n")
    data = load_data(tmp_path)
    assert (data.classes, boxes(data.train), len(data.val)) == (CLASSES, EXPECTED, 1)


def test_labels_among_the_images(tmp_path):
    (without_yaml(tmp_path, ".") / "classes.txt").write_text("ant\nbee\ncat\n")
    assert boxes(read_sets(tmp_path)[0]["train"]) == EXPECTED


@pytest.mark.parametrize("make", [make_coco, make_voc, make_yolo])
def test_other_forms_go_first(tmp_path, make):
    before = read_sets(make(tmp_path))[0]["train"].fingerprint
    (tmp_path / "classes.txt").write_text("ant\nbee\ncat\n")
    (tmp_path / "labels").mkdir(exist_ok=True)
    (tmp_path / "labels" / "a.txt").write_text(yolo_rows(TRAIN[1]))
    assert read_sets(tmp_path, rescan=True)[0]["train"].fingerprint == before


def test_a_list_of_classes_without_labels_is_no_data(tmp_path):
    (without_yaml(tmp_path) / "classes.txt").write_text("ant\nbee\ncat\n")
    shutil.rmtree(tmp_path / "labels")
    with pytest.raises(DataError, match=r"no data set of a known form.*found classes\.txt, images/"):
        load_data(tmp_path)
