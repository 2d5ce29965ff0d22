import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from detdistill.data.inspect import inspect_data
from detdistill.data.pixels import Range, look
from detdistill.errors import DataError
from tests.data.forms import Picture, make_coco, make_voc, make_yolo, real


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


def notes(path, **settings):
    return " | ".join(inspect_data(path, **settings).notes)


def paint(path, *levels):
    """Overwrite an image with pixels drawn from the grey levels."""
    with Image.open(path) as image:
        width, height = image.size
    values = np.random.default_rng(0).choice(np.array(levels, dtype=np.uint8), (height, width, 1)).repeat(3, axis=2)
    Image.fromarray(values).save(path.with_suffix(".png"))
    path.unlink()
    path.with_suffix(".png").rename(path)


def test_data_that_training_refuses_are_listed(tmp_path):
    pictures = [Picture("a", 64, 48, [("bee", 5, 5, 5, 9)]), Picture("b", 64, 48)]
    make_coco(tmp_path, {"train": pictures})
    report = inspect_data(tmp_path)
    assert [(split, defect.kind, defect.record) for split, defect in report.defects] == [
        ("train", "empty box", "annotation 1 of image 1")
    ]
    assert report.splits[0].images == 2
    assert report.notes[-1].startswith(f"training refuses these data: {tmp_path}: no usable box in the 1 training images")
    assert "annotation 1 of image 1: empty box" in report.notes[-1]
    with pytest.raises(DataError, match="no usable box"):
        inspect_data(tmp_path, strict=True)
    json.loads(report.to_json())


def test_sets_without_any_image_or_without_train_are_listed(tmp_path):
    make_coco(tmp_path / "one", {"val": [Picture("a", 64, 48, [("bee", 5, 5, 9, 9)])]})
    report = inspect_data(tmp_path / "one" / "annotations" / "instances_val.json")
    assert report.splits[0].boxes == 1
    make_coco(tmp_path / "two")
    shutil.rmtree(tmp_path / "two" / "val2017")
    report = inspect_data(tmp_path / "two", deep=True)
    val = report.splits[1]
    assert (val.images, val.skipped_images, val.boxes_per_image) == (0, 1, (0, 0.0, 0))
    assert "none of its 1 images was found, e.g. d.jpg" in text(report)
    json.loads(report.to_json())


def test_broken_xml_is_listed(tmp_path):
    make_voc(tmp_path)
    (tmp_path / "Annotations" / "b.xml").write_text("<annotation><filename>b.jpg</filename><obj")
    report = inspect_data(tmp_path)
    assert [(defect.kind, defect.file, defect.skipped) for _, defect in report.defects] == [
        ("broken annotation file", "Annotations/b.xml", "image")
    ]
    assert report.splits[0].images == 2
    with pytest.raises(DataError, match=r"b.xml: not valid XML"):
        inspect_data(tmp_path, strict=True)


def test_classes_that_only_val_has(tmp_path):
    make_coco(
        tmp_path,
        {
            "train": [Picture("a", 64, 48, [("bee", 5, 5, 9, 9)])],
            "val": [Picture("b", 64, 48, [("ant", 5, 5, 9, 9), ("ant", 1, 1, 9, 9), ("bee", 5, 5, 9, 9)])],
            "test": [Picture("c", 64, 48, [("cat", 5, 5, 9, 9)])],
        },
    )
    assert notes(tmp_path) == (
        "val has boxes of classes that train has none of: ant (2) | test has boxes of classes that train has none of: cat (1)"
    )


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("DontCare", True),
        ("ignored regions", True),
        ("ignore", True),
        ("Ignored-Region_1", True),
        ("group", True),
        ("background", True),
        ("grouper", False),
        ("crow", False),
        ("void fill", False),
    ],
)
def test_names_that_mean_regions_to_ignore(tmp_path, name, told):
    make_yolo(tmp_path, f"train: images/train\nval: images/val\nnames: ['{name}', bee, cat]\n")
    assert (f"classes whose names mean regions to ignore, not objects: {name};" in notes(tmp_path)) is told


def test_yolo_rows_that_count_from_one(tmp_path):
    make_yolo(tmp_path)
    (tmp_path / "labels" / "train" / "a.txt").write_text("1 0.5 0.5 0.2 0.2\n3 0.5 0.5 0.3 0.2\n")
    (tmp_path / "labels" / "val" / "d.txt").write_text("2 0.5 0.5 0.2 0.2\n")
    assert "the classes of the rows count from 1: class 0 is never used, but class 3 of 0 .. 2 is" in notes(tmp_path)
    (tmp_path / "labels" / "val" / "d.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    assert "count from 1" not in notes(tmp_path)


def test_pictures_of_one_colour_or_few_levels(tmp_path):
    make_coco(tmp_path)
    paint(tmp_path / "train2017" / "a.jpg", 0)
    paint(tmp_path / "train2017" / "b.jpg", 3, 9, 18)
    paint(tmp_path / "val2017" / "d.jpg", 0, 255)
    assert notes(tmp_path) == (
        "train: 1 of 3 images looked at are of one colour, e.g. train2017/a.jpg; --deep true lists all | "
        "train: 1 of 3 images looked at use few of the 256 levels, e.g. train2017/b.jpg; --deep true lists all"
    )
    report = inspect_data(tmp_path, deep=True)
    assert [(defect.kind, defect.file, defect.message) for _, defect in report.defects] == [
        ("one colour", "train2017/a.jpg", "every pixel is red, green, blue = (0, 0, 0)"),
        ("few levels", "train2017/b.jpg", "its values go from 3 to 18: 16 of 256 levels"),
    ]


def test_a_bright_spot_is_not_missed(tmp_path):
    image = np.zeros((1000, 1000), dtype=np.uint8)
    image[501, 777] = 200
    Image.fromarray(image).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as opened:
        assert look(opened) == Range(0, 200)


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize(
    ("values", "told"),
    [
        (np.arange(3072, dtype=np.uint16).reshape(48, 64), ""),
        (np.arange(3072, dtype=np.int32).reshape(48, 64), ""),
        (np.linspace(0, 1, 3072, dtype=np.float32).reshape(48, 64), ""),
        (np.linspace(0, 65535, 3072).astype(np.uint16).reshape(48, 64), None),
        (np.linspace(0, 65535, 3072).astype(np.int32).reshape(48, 64), None),
        (np.linspace(0, 255, 3072, dtype=np.float32).reshape(48, 64), None),
    ],
)
def test_greys_of_many_bits_and_few_levels(tmp_path, values, told, deep):
    make_coco(tmp_path)
    content = json.loads((tmp_path / "annotations" / "instances_train2017.json").read_text())
    content["images"][0]["file_name"] = "a.tif"
    (tmp_path / "annotations" / "instances_train2017.json").write_text(json.dumps(content))
    Image.fromarray(values).save(tmp_path / "train2017" / "a.tif")
    found = [defect for _, defect in inspect_data(tmp_path, deep=deep).defects if defect.kind == "low range"]
    assert len(found) == (told is not None)
    if found:
        assert found[0].file == "train2017/a.tif"
        assert f"with values from 0 to {values.max():g}: a detector gets" in found[0].message


def test_the_same_picture_under_two_names(tmp_path):
    train = [Picture("a", 20, 20, [("ant", 1, 1, 9, 9)]), Picture("b", 20, 20)]
    make_coco(tmp_path, {"train": train, "val": [Picture("cc", 20, 20)]})
    shutil.copy(tmp_path / "train" / "a.jpg", tmp_path / "train" / "b.jpg")
    report = inspect_data(tmp_path, deep=True)
    assert [(split, defect.kind, defect.file, defect.message) for split, defect in report.defects] == [
        ("train", "same picture", "train/b.jpg", "the same bytes as train/a.jpg (image 1)")
    ]


def test_coco128():
    unseen = "fire hydrant (2), sheep (9), surfboard (7), apple (2), keyboard (9)"
    assert f"val has boxes of classes that train has none of: {unseen}" in notes(real("coco128"))
