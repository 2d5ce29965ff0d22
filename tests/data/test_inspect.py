import io
import json
import shutil

import pytest
from rich.console import Console

from detdistill.data.inspect import inspect_data
from detdistill.errors import DataError
from tests.data.forms import Picture, make_coco, make_yolo, real


def text(report, width=200):
    console = Console(file=io.StringIO(), width=width)
    report.render(console)
    return console.file.getvalue()


def test_counts(tmp_path):
    pictures = [
        Picture("a", 200, 120, [("bee", 0, 0, 33, 32), ("ant", 0, 0, 96, 97), ("ant", 0, 0, 31, 32), ("ant", 0, 0, 32, 32)]),
        Picture("b", 120, 200),
        Picture("c", 200, 120, [("cat", 0, 0, 96, 96), ("cat", 5, 5, 5, 9)]),
    ]
    report = inspect_data(make_coco(tmp_path, {"train": pictures, "val": [Picture("d", 64, 64)]}))
    train, val = report.splits
    assert (train.images, train.boxes, train.without_boxes, train.crowd) == (3, 5, 1, 0)
    # 32x32 and 96x96 are both medium, as in COCO's evaluation.
    assert train.box_sizes == {"small": 1, "medium": 3, "large": 1}
    assert train.per_class == {"ant": 3, "bee": 1, "cat": 1}
    assert train.image_sizes == {"200x120": 2, "120x200": 1}
    assert (train.shorter_side, train.longer_side) == ((120, 120, 120), (200, 200, 200))
    assert train.boxes_per_image == (0, pytest.approx(5 / 3), 4)
    assert (train.skipped_images, train.skipped_boxes) == (0, 1)
    assert (val.images, val.boxes, val.per_class) == (1, 0, {"ant": 0, "bee": 0, "cat": 0})
    assert (report.form, report.classes) == ("coco", ("ant", "bee", "cat"))


def test_tables_show_twenty_defects_of_a_kind_and_count_the_rest(tmp_path):
    make_yolo(tmp_path)
    rows = ["0 0.5 0.5 0.2 0.2", *["0 0.5 0.5 0 0.2"] * 23, "7 0.5 0.5 0.2 0.2"]
    (tmp_path / "labels" / "train" / "a.txt").write_text("\n".join(rows))
    shown = text(inspect_data(tmp_path))
    assert "empty box: 23" in shown
    assert "... and 3 more" in shown
    assert shown.count("has no area") == 20
    assert "unknown class: 1" in shown
    assert "class 7 is not in 0 .. 2" in shown
    assert "24 defects (headers checked, images not decoded)" in shown
    assert "labels/train/a.txt" in shown


def test_no_defects_and_names_in_brackets(tmp_path):
    make_yolo(tmp_path, "train: images/train\nval: images/val\nnames: ['[red]', bee, cat]\n")
    shown = text(inspect_data(tmp_path, deep=True))
    assert "no defects (every image decoded)" in shown
    assert "[red]" in shown


def test_json_has_every_defect_under_its_kind(tmp_path):
    make_yolo(tmp_path)
    (tmp_path / "labels" / "val" / "d.txt").write_text("0 0.5 0.5 0.2 0.2\n0 0.5 0.5 0 0.2\n")
    report = inspect_data(tmp_path)
    content = json.loads(report.to_json())
    defect = content["defects"]["empty box"][0]
    assert (defect["split"], defect["file"], defect["record"]) == ("val", "labels/val/d.txt", "row 2")
    assert content["splits"][0]["per_class"] == {"ant": 1, "bee": 1, "cat": 1}
    assert set(content["fingerprints"]) == {"train", "val"}
    assert content["classes"] == ["ant", "bee", "cat"]


def test_only_deep_finds_an_image_that_is_cut_off(tmp_path):
    make_coco(tmp_path)
    image = tmp_path / "train2017" / "a.jpg"
    image.write_bytes(image.read_bytes()[:-400])
    assert inspect_data(tmp_path).defects == ()
    report = inspect_data(tmp_path, deep=True)
    assert [(split, defect.kind, defect.file) for split, defect in report.defects] == [
        ("train", "unreadable image", "train2017/a.jpg")
    ]
    with pytest.raises(DataError, match=r"1 images cannot be decoded; the first: train: train2017/a.jpg"):
        inspect_data(tmp_path, deep=True, strict=True)


def test_deep_finds_pictures_that_are_in_train_and_val(tmp_path):
    make_coco(tmp_path, {"train": [Picture("a", 20, 20, [("ant", 1, 1, 9, 9)])], "val": [Picture("b", 20, 20)]})
    shutil.copy(tmp_path / "train" / "a.jpg", tmp_path / "val" / "b.jpg")
    assert inspect_data(tmp_path).notes == ()
    assert inspect_data(tmp_path, deep=True).notes == ("1 pictures of train are also in val, with identical bytes",)


def test_bccd():
    report = inspect_data(real("bccd"), deep=True)
    train, val, test = report.splits
    assert (train.per_class, train.box_sizes) == (
        {"Platelets": 209, "RBC": 2381, "WBC": 214},
        {"small": 20, "medium": 778, "large": 2006},
    )
    assert (val.per_class, test.per_class) == (
        {"Platelets": 83, "RBC": 967, "WBC": 87},
        {"Platelets": 69, "RBC": 805, "WBC": 71},
    )
    assert [len(found) for found in report.by_kind().values()] == [2]
