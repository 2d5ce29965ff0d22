import os

import pytest

from detdistill.data.discover import load_data
from detdistill.data.yolo import label_path
from detdistill.errors import DataError
from tests.data.forms import CLASSES, YAML, make_yolo, real, write_image


def boxes(data):
    return {record.path.stem: (record.boxes_xyxy.round(4).tolist(), record.labels.tolist()) for record in data.records}


EXPECTED = {"a": ([[2, 3, 22, 33], [0, 0, 64, 48]], [1, 0]), "b": ([[1, 2, 31, 62]], [2]), "c": ([], [])}
NAMES = "names: [ant, bee, cat]\n"


def test_a_yolo_folder(tmp_path):
    data = load_data(make_yolo(tmp_path), strict=True)
    assert (data.train.form, data.train.root) == ("yolo", tmp_path)
    assert data.classes == CLASSES
    assert boxes(data.train) == EXPECTED
    assert boxes(data.val) == {"d": ([[8, 8, 16, 40], [32, 32, 64, 64]], [0, 2])}
    assert load_data(tmp_path / "data.yaml").train.fingerprint == data.train.fingerprint


@pytest.mark.parametrize(
    "yaml",
    [
        "path: .\ntrain: images/train\nval: images/val\nnames: {0: ant, 1: bee, 2: cat}\nnc: 3\n",
        "path: ../nowhere\ntrain: [images/train]\nvalidation: ./images/val\n" + NAMES,
        "train: ../images/train\nval: ../images/val\ntest:\n" + NAMES,
        "path: images\ntrain: train\nval: val\n" + NAMES,
    ],
)
def test_ways_to_write_the_yaml(tmp_path, yaml):
    data = load_data(make_yolo(tmp_path, yaml), strict=True)
    assert boxes(data.train) == EXPECTED
    assert data.classes == CLASSES
    assert data.test is None


def test_roboflow(tmp_path):
    splits = dict(zip(("train", "valid", "test"), _splits(), strict=True))
    yaml = "train: ../train/images\nval: ../valid/images\ntest: ../test/images\n\nnc: 3\n" + NAMES
    data = load_data(make_yolo(tmp_path, yaml, "{split}/{kind}", splits), strict=True)
    assert boxes(data.train) == EXPECTED
    assert (len(data.val), len(data.test)) == (1, 1)
    assert {record.id for part in data.sets for record in part.records} == {1, 2, 3, 4, 5}


def _splits():
    from tests.data.forms import TRAIN, VAL

    return TRAIN, VAL, VAL


def test_lists_of_images(tmp_path):
    make_yolo(tmp_path, "train: train.txt\nval: [lists/val.txt]\n" + NAMES)
    (tmp_path / "train.txt").write_text("images/train/a.jpg\n\n./images/train/b.jpg\nimages\\train\\gone.jpg\n")
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "val.txt").write_text(f"{tmp_path}/images/val/d.jpg\n")
    data = load_data(tmp_path)
    assert boxes(data.train) == {name: EXPECTED[name] for name in "ab"}
    assert [(defect.kind, defect.file) for defect in data.defects] == [("missing file", "images/train/gone.jpg")]
    assert len(data.val) == 1


def test_no_val_is_cut_off_train(tmp_path):
    data = load_data(make_yolo(tmp_path, "train: images\nval:\n" + NAMES))
    assert (len(data.train), len(data.val)) == (3, 1)
    assert data.notes[0].startswith("no val split: 1 of 4 training images")


def test_the_same_folder_for_train_and_val_is_noted(tmp_path):
    data = load_data(make_yolo(tmp_path, "train: images/train\nval: images/train\n" + NAMES))
    assert data.notes == ("3 images are in both train and val, so scores on val do not show performance on new images",)


def test_an_image_without_labels_has_no_objects(tmp_path):
    make_yolo(tmp_path)
    (tmp_path / "labels" / "train" / "a.txt").unlink()
    data = load_data(tmp_path, strict=True)
    assert boxes(data.train)["a"] == ([], [])
    assert data.notes == ("1 of 3 train images have no label file: they count as images without objects",)


def test_no_label_at_all_is_an_error_but_not_in_test(tmp_path):
    make_yolo(tmp_path, YAML + "test: other\n")
    write_image(tmp_path / "other" / "x.jpg", 20, 20)
    data = load_data(tmp_path)
    assert data.test is None
    assert data.notes == ("none of the 1 test images has a label file: there is no test split",)
    (tmp_path / "labels").rename(tmp_path / "label")
    with pytest.raises(DataError, match=r"train: no image has a label file; looked for .*labels/train/a.txt"):
        load_data(tmp_path)


def test_empty_labels_only_are_an_error(tmp_path):
    make_yolo(tmp_path)
    for file in (tmp_path / "labels" / "train").iterdir():
        file.write_text("")
    with pytest.raises(DataError, match="no usable box in the 3 training images"):
        load_data(tmp_path)


def test_polygons_give_their_tight_box_and_stay(tmp_path):
    make_yolo(tmp_path)
    (tmp_path / "labels" / "train" / "a.txt").write_text("1 0.25 0.5 0.5 0.25 0.75 0.75\n0 0.5 0.5 0.25 0.25\n")
    record = load_data(tmp_path, strict=True).train.records[0]
    assert record.boxes_xyxy.tolist() == [[16, 12, 48, 36], [24, 18, 40, 30]]
    assert record.segmentation == ([[16.0, 24.0, 32.0, 12.0, 48.0, 36.0]], None)


def test_keypoints_are_not_taken_for_polygons(tmp_path):
    make_yolo(tmp_path, YAML + "kpt_shape: [2, 3]\n")
    (tmp_path / "labels" / "train" / "a.txt").write_text("1 0.5 0.5 0.25 0.25 0.1 0.1 2 0.9 0.9 2\n")
    assert load_data(tmp_path).train.records[0].boxes_xyxy.tolist() == [[24, 18, 40, 30]]


def test_bad_rows_are_listed(tmp_path):
    make_yolo(tmp_path)
    rows = [
        "0 0.5 0.5 0.2 0.2",
        "x 0.5 0.5 0.2 0.2",
        "0 0.5 0.5 0.2",
        "0 0.5 0.5 0.2 0.2 0.9",
        "3 0.5 0.5 0.2 0.2",
        "-1 0.5 0.5 0.2 0.2",
        "0.5 0.5 0.5 0.2 0.2",
        "0 32 24 10 10",
        "0 nan 0.5 0.2 0.2",
        "0 0.5 0.5 0 0.2",
        "0 0.5 0.5 -0.2 0.2",
        "",
        "0 1.3 0.5 0.2 0.2",
        "0 0.95 0.5 0.2 0.2",
        "0 0.5 0.5 0.2 0.2",
    ]
    (tmp_path / "labels" / "train" / "a.txt").write_text("\n".join(rows))
    (tmp_path / "labels" / "train" / "alone.txt").write_text("0 0.5 0.5 0.2 0.2")
    data = load_data(tmp_path)
    assert [(defect.kind, defect.record, defect.skipped) for defect in data.defects] == [
        ("missing file", "image", "image"),
        ("malformed record", "row 2", "box"),
        ("malformed record", "row 3", "box"),
        ("malformed record", "row 4", "box"),
        ("unknown class", "row 5", "box"),
        ("unknown class", "row 6", "box"),
        ("unknown class", "row 7", "box"),
        ("not normalised", "row 8", "box"),
        ("not finite", "row 9", "box"),
        ("empty box", "row 10", "box"),
        ("inverted box", "row 11", "box"),
        ("box outside image", "row 13", "box"),
        ("box crosses border", "row 14", "nothing"),
        ("duplicate box", "row 15", "nothing"),
    ]
    assert {defect.file for defect in data.defects[1:]} == {"labels/train/a.txt"}
    assert data.defects[0].file == "labels/train/alone.txt"
    assert len(data.train.records[0]) == 3


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("train: images/train\nnames: [ant, bee\n", r"data.yaml: not valid YAML at line 3, column 1: .*fix that line"),
        (YAML + "nc: 4\n", "nc says 4 classes but names has 3"),
        ("train: images/train\nnames: {1: ant, 2: bee}\n", "numbered 0 to 1 without gaps; they are 1, 2"),
        ("train: images/train\nnames: ant\n", "names is 'ant'; it must be a list"),
        ("train: images/train\nnames: [ant, ant]\n", "class names occur twice: ant"),
        ("train: images/trian\n" + NAMES, "train: images/trian does not exist; looked at"),
        ("train: labels\n" + NAMES, "train: no images in 'labels'"),
        ("val: images/val\n" + NAMES, "no train split, only val"),
    ],
)
def test_broken_yaml(tmp_path, yaml, message):
    with pytest.raises(DataError, match=message):
        load_data(make_yolo(tmp_path, yaml))


def test_nc_alone_numbers_the_classes(tmp_path):
    data = load_data(make_yolo(tmp_path, "train: images/train\nval: images/val\nnc: 3\n"))
    assert data.classes == ("class0", "class1", "class2")


def test_linked_image_folders_keep_their_labels(tmp_path):
    make_yolo(tmp_path / "data")
    (tmp_path / "data" / "images" / "train").rename(tmp_path / "store")
    os.symlink(tmp_path / "store", tmp_path / "data" / "images" / "train")
    assert boxes(load_data(tmp_path / "data", strict=True).train) == EXPECTED
    os.rename(tmp_path / "data" / "data.yaml", tmp_path / "old.yaml")
    (tmp_path / "data" / "data.yaml").write_text("train: images\nval: images/val\n" + NAMES)
    assert len(load_data(tmp_path / "data").train) == 4


def test_label_path(tmp_path):
    assert label_path(tmp_path / "images" / "x" / "images" / "train" / "1.jpg") == tmp_path / "images/x/labels/train/1.txt"
    image = tmp_path / "pictures" / "1.jpg"
    assert label_path(image) == tmp_path / "pictures" / "1.txt"


def test_coco128():
    data = load_data(real("coco128"))
    assert (len(data.train), len(data.val), data.test) == (128, 128, None)
    assert (data.train.num_boxes, data.val.num_boxes) == (929, 898)
    assert len(data.classes) == 80
    assert data.notes == ("2 of 128 train images have no label file: they count as images without objects",)
    assert [(defect.kind, defect.file) for defect in data.defects] == [
        ("missing file", "labels/train2017/000000000656.txt"),
        ("missing file", "labels/train2017/000000000659.txt"),
    ]
    first = data.train.records[0]
    assert (first.id, first.size_hw, data.classes[first.labels[0]]) == (9, (480, 640), "bowl")
    assert first.boxes_xyxy[0].tolist() == pytest.approx([1.08, 187.69, 612.67, 473.53], abs=0.01)
