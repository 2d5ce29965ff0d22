import math
import shutil

import numpy as np
import pytest
from PIL import Image

from detdistill.data.coco import write_coco
from detdistill.data.discover import load_data
from detdistill.data.records import Defect, DetectionSet, RawBox, RawImage, assemble, image_ids, read_header, split_of, split_off
from detdistill.errors import DataError
from tests.data.forms import Picture, make_coco, write_image


def raw(root, *boxes, size_hw=(48, 64), name="a.png", number=7):
    path = root / name
    if not path.exists():
        write_image(path, 64, 48)
    numbered = [RawBox(tuple(map(float, box)), 0, f"row {row}") for row, box in enumerate(boxes, start=1)]
    return RawImage(number, path, numbered, "labels.txt", size_hw)


def read(root, *images):
    return assemble("train", "coco", root, ("ant", "bee"), list(images))


def kinds(data):
    return [(defect.kind, defect.record, defect.skipped) for defect in data.defects]


def test_a_good_box_is_kept_as_it_is(tmp_path):
    data = read(tmp_path, raw(tmp_path, (1.5, 2, 10, 20)))
    record = data.records[0]
    assert (record.id, record.size_hw, record.path) == (7, (48, 64), tmp_path / "a.png")
    assert record.boxes_xyxy.tolist() == [[1.5, 2, 10, 20]]
    assert record.areas.tolist() == [8.5 * 18]
    assert record.boxes_xyxy.dtype == np.float64
    assert record.labels.dtype == np.int64
    assert data.defects == ()


@pytest.mark.parametrize(
    ("box", "kind", "skipped"),
    [
        ((5, 5, 5, 9), "empty box", "box"),
        ((5, 9, 8, 9), "empty box", "box"),
        ((9, 5, 5, 9), "inverted box", "box"),
        ((5, 9, 9, 5), "inverted box", "box"),
        ((64, 5, 80, 9), "box outside image", "box"),
        ((-20, 5, 0.05, 9), "box outside image", "box"),
        ((5, -9, 9, -2), "box outside image", "box"),
        ((math.nan, 5, 8, 9), "not finite", "box"),
        ((1, 5, math.inf, 9), "not finite", "box"),
        ((-3, 5, 8, 9), "box crosses border", "nothing"),
        ((5, 5, 8, 60), "box crosses border", "nothing"),
    ],
)
def test_a_bad_box_is_listed(tmp_path, box, kind, skipped):
    data = read(tmp_path, raw(tmp_path, (1, 1, 4, 4), box))
    assert kinds(data) == [(kind, "row 2", skipped)]
    assert data.defects[0].file == "labels.txt"
    assert len(data.records[0]) == (1 if skipped == "box" else 2)


def test_a_box_over_the_border_is_clipped_and_so_is_its_area(tmp_path):
    data = read(tmp_path, raw(tmp_path, (-3, 5, 8, 60)))
    assert data.records[0].boxes_xyxy.tolist() == [[0, 5, 8, 48]]
    assert data.records[0].areas.tolist() == [8 * 43]


def test_rounding_over_the_border_is_no_defect(tmp_path):
    data = read(tmp_path, raw(tmp_path, (-0.04, 5, 64.03, 48.09)))
    assert data.records[0].boxes_xyxy.tolist() == [[0, 5, 64, 48]]
    assert data.defects == ()


def test_duplicate_boxes_are_counted_and_kept(tmp_path):
    data = read(tmp_path, raw(tmp_path, (1, 1, 4, 4), (1, 1, 4, 4), (1, 1, 4, 5)))
    assert kinds(data) == [("duplicate box", "row 2", "nothing")]
    assert data.num_boxes == 3


def test_bad_images_are_listed_and_left_out(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").write_text("")
    data = read(
        tmp_path,
        raw(tmp_path, (1, 1, 4, 4)),
        raw(tmp_path, (1, 1, 4, 4), number=8),
        RawImage(9, tmp_path / "gone.png", (), "labels.txt"),
        RawImage(10, tmp_path / "text.png", (), "labels.txt"),
        RawImage(11, tmp_path / "empty.png", (), "labels.txt"),
        raw(tmp_path, (1, 1, 4, 4), name="b.png", number=12, size_hw=(64, 48)),
    )
    assert [record.id for record in data.records] == [7]
    assert [(defect.kind, defect.file, defect.record, defect.skipped) for defect in data.defects] == [
        ("duplicate image", "a.png", "image 8", "image"),
        ("missing file", "gone.png", "image 9", "image"),
        ("unreadable image", "text.png", "image 10", "image"),
        ("unreadable image", "empty.png", "image 11", "image"),
        ("size differs", "labels.txt", "image 12", "image"),
    ]
    assert "48x64, the file has 64x48" in data.defects[-1].message


def test_a_size_of_zero_is_taken_from_the_file(tmp_path):
    data = read(tmp_path, raw(tmp_path, (1, 1, 4, 4), size_hw=(0, 0)))
    assert data.records[0].size_hw == (48, 64)
    assert kinds(data) == [("size differs", "image 7", "nothing")]


def test_fractions_become_pixels_polygons_too(tmp_path):
    path = write_image(tmp_path / "a.png", 64, 48)
    box = RawBox((0.25, 0.5, 0.5, 1.0), 1, "row 1", segmentation=[[0.25, 0.5, 0.5, 1.0, 0.25, 1.0]])
    plain = RawBox((0.0, 0.0, 0.5, 0.5), 0, "row 2")
    record = read(tmp_path, RawImage(1, path, [box, plain], "labels.txt", fractions=True)).records[0]
    assert record.boxes_xyxy.tolist() == [[16, 24, 32, 48], [0, 0, 32, 24]]
    assert record.segmentation == ([[16.0, 24.0, 32.0, 48.0, 16.0, 48.0]], None)


def test_the_size_is_that_of_the_upright_image(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 48)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_header(tmp_path / "turned.jpg").size_hw == (64, 48)
    write_image(tmp_path / "plain.jpg", 64, 48)
    assert read_header(tmp_path / "plain.jpg").size_hw == (48, 64)


def test_a_set_may_be_empty_but_is_not_loaded(tmp_path):
    data = read(tmp_path, RawImage(9, tmp_path / "gone.png", (), "labels.txt"))
    assert len(data) == 0
    assert [(defect.kind, defect.file, defect.message) for defect in data.defects] == [
        ("missing file", "gone.png", "the image file does not exist")
    ]
    make_coco(tmp_path)
    (tmp_path / "val2017" / "d.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"none of the 1 images of the val split is usable: val2017/d.jpg: not an image"):
        load_data(tmp_path)


def test_texts_of_defects_are_one_line_and_not_endless():
    defect = Defect("kind", "a\n\x1b[31m.txt", "row 1", "x" * 1000, "box")
    assert (defect.file, defect.message) == ("a\\n\\x1b[31m.txt", "x" * 500 + " ...")


def test_ids_are_the_file_names_where_these_are_numbers(tmp_path):
    train, val = [tmp_path / "train" / "000012.jpg"], [tmp_path / "val" / "000003.jpg"]
    assert image_ids([train, val]) == {train[0]: 12, val[0]: 3}
    clash = [tmp_path / "val" / "12.jpg"]
    assert image_ids([train, clash]) == {train[0]: 1, clash[0]: 2}


@pytest.mark.parametrize(
    ("texts", "split"),
    [
        (("instances_train2017",), "train"),
        (("instances_val2014", "train"), "val"),
        (("_annotations.coco", "valid"), "val"),
        (("test-dev",), "test"),
        (("pretrained", "images"), None),
    ],
)
def test_split_of(texts, split):
    assert split_of(*texts) == split


@pytest.fixture
def twenty(tmp_path):
    pictures = [Picture(f"p{index:02}", 20, 20, [("ant", 1, 1, 9, 9 + index % 3)]) for index in range(20)]
    return load_data(make_coco(tmp_path / "data", {"train": pictures, "val": pictures[:1]})).train


def test_take_keeps_order_and_depends_on_the_seed(twenty):
    some = twenty.take(5, seed=1)
    ids = [record.id for record in some.records]
    assert len(ids) == 5
    assert ids == sorted(ids)
    assert [record.id for record in twenty.take(5, seed=1).records] == ids
    assert [record.id for record in twenty.take(5, seed=2).records] != ids
    assert some.fingerprint == twenty.take(5, seed=1).fingerprint != twenty.fingerprint
    assert twenty.take(99) is twenty
    with pytest.raises(DataError, match="at least 1"):
        twenty.take(0)


def test_split_off_is_a_tenth_and_does_not_depend_on_order(twenty):
    remaining, cut = split_off(twenty, "val")
    assert (len(remaining), len(cut)) == (18, 2)
    assert (remaining.name, cut.name) == ("train", "val")
    assert {record.id for record in (*remaining.records, *cut.records)} == set(range(1, 21))
    turned = DetectionSet.of("train", "coco", twenty.root, twenty.classes, twenty.records[::-1])
    assert {record.id for record in split_off(turned, "val")[1].records} == {record.id for record in cut.records}


def test_one_image_cannot_be_split(twenty):
    with pytest.raises(DataError, match="1 usable images cannot be split"):
        split_off(twenty.take(1), "val")


def test_fingerprint_moves_with_the_data_and_sees_every_change(twenty, tmp_path):
    shutil.move(tmp_path / "data", tmp_path / "moved")
    assert load_data(tmp_path / "moved").train.fingerprint == twenty.fingerprint
    record = load_data(tmp_path / "moved").train.records[0]

    def changed(**values):
        fields = {name: getattr(record, name) for name in ("id", "path", "size_hw", "boxes_xyxy", "labels", "crowd", "areas")}
        return DetectionSet.of("train", "coco", tmp_path, values.pop("classes", "abc"), [type(record)(**{**fields, **values})])

    prints = [
        changed(),
        changed(classes="abd"),
        changed(id=99),
        changed(boxes_xyxy=record.boxes_xyxy + 0.01),
        changed(labels=record.labels + 1),
        changed(crowd=~record.crowd),
        changed(path=write_image(tmp_path / "other.jpg", 90, 90)),
    ]
    assert len({data.fingerprint for data in prints}) == len(prints)
    assert changed(boxes_xyxy=record.boxes_xyxy + 1e-9).fingerprint == prints[0].fingerprint


def test_ground_truth_is_coco(tmp_path):
    path = write_image(tmp_path / "a.png", 64, 48)
    boxes = [
        RawBox((1.0, 2.0, 11.0, 22.0), 1, "row 1", area=50.0, segmentation=[[1, 2, 11, 2, 11, 22]]),
        RawBox((0.0, 0.0, 64.0, 48.0), 0, "row 2", crowd=True, area=float("nan")),
    ]
    truth = read(tmp_path, RawImage(42, path, boxes, "labels.txt")).coco_ground_truth()
    assert truth["images"] == [{"id": 42, "file_name": "a.png", "height": 48, "width": 64}]
    assert [category["name"] for category in truth["categories"]] == ["ant", "bee"]
    assert [category["id"] for category in truth["categories"]] == [1, 2]
    first, second = truth["annotations"]
    assert first == {
        "id": 1,
        "image_id": 42,
        "category_id": 2,
        "bbox": [1.0, 2.0, 10.0, 20.0],
        "area": 50.0,
        "iscrowd": 0,
        "segmentation": [[1, 2, 11, 2, 11, 22]],
    }
    assert (second["category_id"], second["iscrowd"], second["area"]) == (1, 1, 64 * 48)
    assert "segmentation" not in second


def test_ground_truth_scores_itself_perfectly(twenty):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth = COCO()
    truth.dataset = twenty.coco_ground_truth()
    truth.createIndex()
    results = truth.loadRes(
        [{key: a[key] for key in ("image_id", "category_id", "bbox")} | {"score": 1.0} for a in truth.dataset["annotations"]]
    )
    evaluation = COCOeval(truth, results, "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1.0)


def test_write_coco_then_load_is_the_same(twenty, tmp_path):
    for name in ("train", "val"):
        renamed = DetectionSet.of(name, "coco", twenty.root, twenty.classes, twenty.records)
        write_coco(renamed, tmp_path / "copy")
    again = load_data(tmp_path / "copy", strict=True).train
    assert again.fingerprint == twenty.fingerprint
    assert again.records[3].path == tmp_path / "copy" / "images" / "train" / twenty.records[3].path.name
    assert sorted(path.name for path in (tmp_path / "copy" / "annotations").iterdir()) == [
        "instances_train.json",
        "instances_val.json",
    ]
