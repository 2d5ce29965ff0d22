import json
import os

import numpy as np
import pytest

from detdistill.data.coco import write_coco
from detdistill.data.discover import load_data, read_sets
from detdistill.errors import DataError
from tests.data.forms import CLASSES, TRAIN, VAL, Picture, coco_content, make_coco, write_image, write_json


def boxes(data):
    return {record.path.stem: (record.boxes_xyxy.tolist(), record.labels.tolist()) for record in data.records}


EXPECTED = {"a": ([[2, 3, 22, 33], [0, 0, 64, 48]], [1, 0]), "b": ([[1, 2, 31, 62]], [2]), "c": ([], [])}


def test_a_coco_folder(tmp_path):
    data = load_data(make_coco(tmp_path), strict=True)
    assert (data.train.form, data.train.name, data.val.name, data.test) == ("coco", "train", "val", None)
    assert data.classes == CLASSES
    assert boxes(data.train) == EXPECTED
    assert boxes(data.val) == {"d": ([[8, 8, 16, 40], [32, 32, 64, 64]], [0, 2])}
    assert [record.id for record in data.train.records] == [1, 2, 3]
    assert data.train.records[0].path == tmp_path / "train2017" / "a.jpg"
    assert data.notes == ()


def test_category_ids_may_be_sparse_and_unordered(tmp_path):
    data = load_data(make_coco(tmp_path, ids=(90, 3, 17)))
    assert data.classes == ("bee", "cat", "ant")
    assert boxes(data.train)["a"][1] == [0, 2]


def test_splits_are_matched_by_name_not_by_id(tmp_path):
    make_coco(tmp_path)
    write_json(tmp_path / "annotations" / "instances_val2017.json", coco_content(VAL, ids=(7, 6, 5)))
    data = load_data(tmp_path)
    assert data.val.classes == data.train.classes == CLASSES
    assert boxes(data.val)["d"][1] == [0, 2]


def test_a_class_that_train_lacks_is_an_error(tmp_path):
    make_coco(tmp_path)
    content = coco_content(VAL)
    content["categories"][0]["name"] = "aunt"
    write_json(tmp_path / "annotations" / "instances_val2017.json", content)
    with pytest.raises(DataError, match=r"aunt, bee, cat against ant, bee, cat"):
        load_data(tmp_path)


def test_a_class_that_val_lacks_is_a_note(tmp_path):
    make_coco(tmp_path)
    content = coco_content(VAL)
    del content["categories"][1]
    write_json(tmp_path / "annotations" / "instances_val2017.json", content)
    data = load_data(tmp_path)
    assert data.notes == ("the val split does not list these classes: bee",)
    assert boxes(data.val)["d"][1] == [0, 2]


@pytest.mark.parametrize("layout", ["{split}/_annotations.coco.json", "{split}.json", "annotations/{split}.json"])
def test_other_layouts(tmp_path, layout):
    for split, pictures in (("train", TRAIN), ("valid", VAL), ("test", VAL)):
        write_json(tmp_path / layout.format(split=split), coco_content(pictures))
        for picture in pictures:
            write_image(tmp_path / split / f"{picture.name}.jpg", picture.width, picture.height)
    data = load_data(tmp_path, strict=True)
    assert boxes(data.train) == EXPECTED
    assert len(data.val) == 1
    assert data.test is not None
    assert data.test.records[0].path == tmp_path / "test" / "d.jpg"


def test_roboflow_group_category_is_dropped(tmp_path):
    for split, pictures in (("train", TRAIN), ("valid", VAL)):
        content = coco_content(pictures)
        group = {"id": 0, "name": "animal", "supercategory": "none"}
        write_json(tmp_path / split / "_annotations.coco.json", {**content, "categories": [group, *content["categories"]]})
        for picture in pictures:
            write_image(tmp_path / split / f"{picture.name}.jpg", picture.width, picture.height)
    data = load_data(tmp_path)
    assert data.classes == CLASSES
    assert boxes(data.train) == EXPECTED
    assert data.notes == ("category animal groups the others or is the background and has no boxes: it is not used as a class",)
    # As soon as it owns a box, it is a class.
    content = coco_content(VAL)
    content["categories"].insert(0, group)
    content["annotations"][0]["category_id"] = 0
    write_json(tmp_path / "valid" / "_annotations.coco.json", content)
    assert load_data(tmp_path).classes == ("animal", *CLASSES)


def test_a_background_without_boxes_is_no_class(tmp_path):
    make_coco(tmp_path)
    for split in ("train2017", "val2017"):
        file = tmp_path / "annotations" / f"instances_{split}.json"
        content = json.loads(file.read_text())
        content["categories"].insert(0, {"id": 0, "name": "_background_", "supercategory": None})  # labelme's example
        write_json(file, content)
    data = load_data(tmp_path)
    assert data.classes == CLASSES
    assert boxes(data.train) == EXPECTED
    assert data.notes == (
        "category _background_ groups the others or is the background and has no boxes: it is not used as a class",
    )
    content["annotations"][0]["category_id"] = 0
    write_json(file, content)
    assert load_data(tmp_path).classes == ("_background_", *CLASSES)


@pytest.mark.parametrize(
    ("ids", "noted"), [((0, 1, 2), True), ((1, 2, 3), False), ((0, 2, 3), False), ((0, 0, 0), True), ((1, 1, 2), False)]
)
def test_category_ids_that_count_from_another_number_than_the_list_are_noted(tmp_path, ids, noted):
    content = coco_content(TRAIN, ids)
    content["categories"] = [{"id": number, "name": name} for number, name in enumerate(CLASSES, start=1)]
    write_json(tmp_path / "train.json", content)
    for picture in TRAIN:
        write_image(tmp_path / f"{picture.name}.jpg", picture.width, picture.height)
    notes = [note for note in read_sets(tmp_path)[1] if "count from 0" in note]
    message = (
        "train: the category ids of the annotations count from 0, those of the list from 1: id 0 is used and not listed, id 3 "
        "listed and never used; most boxes have a wrong class until 1 is added to every category_id"
    )
    assert notes == ([message] if noted else [])


def test_one_file_with_images_beside_it(tmp_path):
    pictures = [Picture(f"p{index}", 20, 20, [("ant", 1, 1, 9, 9)]) for index in range(10)]
    file = write_json(tmp_path / "labels.json", coco_content(pictures))
    for picture in pictures:
        write_image(tmp_path / "pictures" / f"{picture.name}.jpg", 20, 20)
    data = load_data(file)
    assert (len(data.train), len(data.val)) == (9, 1)
    assert data.notes == ("no val split: 1 of 10 training images, chosen by the hash of their names, are used as val",)
    assert load_data(tmp_path).val.fingerprint == data.val.fingerprint


def test_the_training_file_brings_its_siblings(tmp_path):
    make_coco(tmp_path)
    data = load_data(tmp_path / "annotations" / "instances_train2017.json")
    assert (len(data.train), len(data.val)) == (3, 1)
    assert "instances_val2017.json" in data.notes[0]


def test_captions_and_keypoints_are_left_alone(tmp_path):
    make_coco(tmp_path)
    write_json(tmp_path / "annotations" / "captions_train2017.json", {"images": [], "annotations": []})
    write_json(tmp_path / "annotations" / "person_keypoints_train2017.json", coco_content([]))
    assert boxes(load_data(tmp_path).train) == EXPECTED


def test_two_files_for_one_split_are_an_error(tmp_path):
    make_coco(tmp_path)
    write_json(tmp_path / "annotations" / "instances_train_old.json", coco_content(TRAIN))
    with pytest.raises(DataError, match=r"both annotations/instances_train2017.json and annotations/instances_train_old.json"):
        load_data(tmp_path)


def test_the_same_name_in_another_split_is_another_picture(tmp_path):
    make_coco(
        tmp_path,
        {"train2017": [Picture("a", 64, 48, [("ant", 1, 1, 9, 9)]), TRAIN[1]], "val2017": [Picture("a", 20, 20), VAL[0]]},
    )
    data = load_data(tmp_path, strict=True)
    assert data.val.records[0].path == tmp_path / "val2017" / "a.jpg"
    (tmp_path / "val2017" / "a.jpg").unlink()
    data = load_data(tmp_path)
    assert [(defect.kind, defect.file) for defect in data.val.defects] == [("missing file", "val2017/a.jpg")]


def test_crowd_area_and_masks_survive(tmp_path):
    make_coco(tmp_path)
    content = coco_content(TRAIN)
    runs = {"counts": [10, 5, 3057], "size": [48, 64]}
    content["annotations"][0] |= {"iscrowd": 1, "area": 5, "segmentation": runs}
    content["annotations"][1] |= {"area": 7.5, "segmentation": [[0, 0, 64, 0, 64, 48]]}
    write_json(tmp_path / "annotations" / "instances_train2017.json", content)
    record = load_data(tmp_path).train.records[0]
    assert record.crowd.tolist() == [True, False]
    assert record.areas.tolist() == [5.0, 7.5]
    assert record.segmentation == (runs, [[0, 0, 64, 0, 64, 48]])
    write_coco(load_data(tmp_path).train, tmp_path / "copy")
    written = json.loads((tmp_path / "copy" / "annotations" / "instances_train.json").read_text())
    assert written["annotations"][0]["segmentation"] == runs


def spoiled():
    """One annotation for each defect of the file's bookkeeping."""
    content = coco_content(TRAIN)
    good = content["annotations"][0]
    content["annotations"] += [
        {**good, "id": 1, "bbox": [1, 1, 5, 5]},
        {**good, "id": 10, "image_id": 77},
        {**good, "id": 11, "category_id": 55},
        {key: value for key, value in good.items() if key != "category_id"} | {"id": 12},
        {**good, "id": 13, "bbox": [1, 2, 3]},
        {**good, "id": 14, "bbox": ["1", "2", "3", "4"]},
        {**good, "id": 15, "bbox": [1, 2, float("nan"), 4]},
        {**good, "id": 16, "bbox": [10, 2, -5, 4]},
        "text",
    ]
    content["images"] += [content["images"][0] | {"file_name": "again.jpg"}, {"id": 99}]
    return content


def test_each_defect_of_the_file_is_listed_once(tmp_path):
    make_coco(tmp_path)
    file = write_json(tmp_path / "annotations" / "instances_train2017.json", spoiled())
    data = load_data(tmp_path)
    assert sorted((defect.kind, defect.record, defect.skipped) for defect in data.train.defects) == [
        ("duplicate annotation id", "annotation 1 of image 1", "nothing"),
        ("duplicate image id", "image 1", "image"),
        ("inverted box", "annotation 16 of image 1", "box"),
        ("malformed record", "annotation 13 of image 1", "box"),
        ("malformed record", "annotation 14 of image 1", "box"),
        ("malformed record", "annotations[11]", "box"),
        ("malformed record", "images[4]", "image"),
        ("missing category", "annotation 12 of image 1", "box"),
        ("not finite", "annotation 15 of image 1", "box"),
        ("unknown class", "annotation 11 of image 1", "box"),
        ("unknown image", "annotation 10 of image 77", "box"),
    ]
    assert {defect.file for defect in data.train.defects} == {"annotations/instances_train2017.json"}
    assert boxes(data.train)["a"][0] == [[2, 3, 22, 33], [0, 0, 64, 48], [1, 1, 6, 6]]
    with pytest.raises(DataError, match=r"11 defects; the first: .*images\[4\]|11 defects; the first: .*image 1"):
        load_data(file, strict=True)


def test_a_file_cut_off_names_the_place(tmp_path):
    make_coco(tmp_path)
    file = tmp_path / "annotations" / "instances_train2017.json"
    file.write_text(file.read_text()[:-40])
    with pytest.raises(DataError, match=r"instances_train2017.json: not valid JSON at line 1, column \d+ \(character \d+\)"):
        load_data(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.pop("categories"), "no list 'categories'"),
        (lambda content: content.update(categories=[]), "no categories"),
        (lambda content: content["categories"].append({"id": 9}), "needs an integer id and a name"),
        (lambda content: content["categories"].append({"id": 1, "name": "dog"}), "category id 1 occurs twice"),
        (lambda content: content["categories"].append({"id": 9, "name": "ant"}), "two categories are called 'ant'"),
    ],
)
def test_broken_lists(tmp_path, change, message):
    make_coco(tmp_path)
    content = coco_content(TRAIN)
    change(content)
    write_json(tmp_path / "annotations" / "instances_train2017.json", content)
    with pytest.raises(DataError, match=message):
        load_data(tmp_path)


def test_images_that_are_nowhere(tmp_path):
    write_json(tmp_path / "annotations" / "instances_train.json", coco_content(TRAIN))
    with pytest.raises(DataError, match=r"none of its 3 images was found, e.g. a.jpg; looked in"):
        load_data(tmp_path)


def test_names_with_folders_and_backslashes(tmp_path):
    content = coco_content(TRAIN)
    for entry, folder in zip(content["images"], ("sub/", "sub\\", "elsewhere/"), strict=True):
        entry["file_name"] = folder + entry["file_name"]
    write_json(tmp_path / "annotations" / "instances_train.json", content)
    write_json(tmp_path / "annotations" / "instances_val.json", coco_content(VAL))
    for picture, folder in zip([*TRAIN, *VAL], ("images/sub", "images/sub", "images", "images"), strict=True):
        write_image(tmp_path / folder / f"{picture.name}.jpg", picture.width, picture.height)
    assert boxes(load_data(tmp_path, strict=True).train) == EXPECTED


def test_ids_that_are_texts_become_positions(tmp_path):
    make_coco(tmp_path)
    content = coco_content(TRAIN)
    for entry in (*content["images"], *content["annotations"]):
        key = "image_id" if "image_id" in entry else "id"
        entry[key] = f"img{entry[key]}"
    write_json(tmp_path / "annotations" / "instances_train2017.json", content)
    data = load_data(tmp_path, strict=True)
    assert [record.id for record in data.train.records] == [1, 2, 3]
    assert boxes(data.train) == EXPECTED


def test_writing_keeps_images_that_share_a_name_apart(tmp_path):
    content = coco_content([TRAIN[0], TRAIN[0]])
    content["images"][1]["file_name"] = "two/a.jpg"
    write_json(tmp_path / "annotations" / "train.json", content)
    write_json(tmp_path / "annotations" / "val.json", coco_content(VAL))
    for name in ("a.jpg", "two/a.jpg"):
        write_image(tmp_path / "images" / name, 64, 48)
    write_image(tmp_path / "images" / "d.jpg", 64, 64)
    data = load_data(tmp_path, strict=True)
    for split in data.sets:
        write_coco(split, tmp_path / "copy")
        write_coco(split, tmp_path / "copy")
    again = load_data(tmp_path / "copy", strict=True)
    assert [record.path.name for record in again.train.records] == ["a.jpg", "2_a.jpg"]
    assert sorted(path.name for path in (tmp_path / "copy" / "images" / "train").iterdir()) == ["2_a.jpg", "a.jpg"]
    for old, new in zip(data.train.records, again.train.records, strict=True):
        assert np.array_equal(old.boxes_xyxy, new.boxes_xyxy)
        assert old.path.read_bytes() == new.path.read_bytes()


def test_writing_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    data = load_data(make_coco(tmp_path / "data"))
    file = write_coco(data.train, tmp_path / "copy")
    before = file.read_bytes()

    def refuse(source, target):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        write_coco(data.train.take(1), tmp_path / "copy")
    assert file.read_bytes() == before
    assert [path.name for path in (tmp_path / "copy").rglob("*") if path.name.startswith(".")] == []


def changed(root, change, split="train2017"):
    """Read the set after a change of the split's JSON content."""
    make_coco(root)
    content = coco_content(TRAIN if split.startswith("train") else VAL)
    change(content)
    write_json(root / "annotations" / f"instances_{split}.json", content)
    return load_data(root)


def accounted(data, content):
    """Records in are records kept and records left out with a defect."""
    skipped = [sum(defect.skipped == what for defect in data.defects) for what in ("image", "box")]
    assert len(data) + skipped[0] == len(content["images"])
    assert data.num_boxes + skipped[1] == len(content["annotations"])


@pytest.mark.parametrize(
    ("key", "value", "crowd"),
    [
        ("iscrowd", "0", False),
        ("iscrowd", "false", False),
        ("iscrowd", "no", False),
        ("iscrowd", False, False),
        ("iscrowd", None, False),
        ("iscrowd", "1", True),
        ("iscrowd", "True", True),
        ("iscrowd", 1.0, True),
        ("ignore", 0, False),
        ("ignore", "false", False),
        ("ignore", 1, True),
        ("ignore", True, True),
        ("ignored", "yes", True),
        ("is_group_of", 1, True),
    ],
)
def test_flags_count_by_their_meaning(tmp_path, key, value, crowd):
    data = changed(tmp_path, lambda content: content["annotations"][0].update({key: value}))
    assert data.train.records[0].crowd.tolist() == [crowd, False]
    assert data.defects == ()
    notes = [f"train: 1 box is marked '{key}': like crowds, neither trained on nor counted as mistakes"]
    assert list(data.notes) == (notes if crowd and key != "iscrowd" else [])


@pytest.mark.parametrize("value", [2, "maybe", "", [1], {}, float("nan")])
@pytest.mark.parametrize("key", ["iscrowd", "ignore"])
def test_a_flag_that_is_neither_is_a_defect(tmp_path, key, value):
    data = changed(tmp_path, lambda content: content["annotations"][0].update({key: value}))
    assert [(defect.kind, defect.record, defect.skipped) for defect in data.defects] == [
        ("malformed record", "annotation 1 of image 1", "box")
    ]
    assert boxes(data.train)["a"] == ([[0, 0, 64, 48]], [0])


def test_a_segmentation_gives_the_box_that_is_missing(tmp_path):
    def change(content):
        first, second, third = content["annotations"]
        first |= {"segmentation": [[5, 5, 25, 5, 25, 15], [4, 6, 9, 6, 9, 20]]}
        second |= {"segmentation": {"size": [48, 64], "counts": [100, 2, 46, 2, 2922]}}
        third |= {"segmentation": [[1, 2]]}
        for annotation in content["annotations"]:
            del annotation["bbox"]

    data = changed(tmp_path, change)
    assert boxes(data.train) == {"a": ([[4, 5, 25, 20], [2, 4, 4, 6]], [1, 0]), "b": ([], []), "c": ([], [])}
    assert data.notes == ("train: 2 annotations have no bbox: the tight box of the segmentation is used",)
    assert [(defect.kind, defect.record, defect.skipped) for defect in data.defects] == [
        ("malformed record", "annotation 3 of image 2", "box")
    ]


@pytest.mark.parametrize("bbox", ["5 5 9 9", [True, 5, 9, 9], [5, 5, 9, 9, 30], {"x": 1}, [[5, 5, 9, 9]], [5, 5, None, 9]])
def test_a_box_that_is_there_but_no_box_is_not_replaced(tmp_path, bbox):
    data = changed(tmp_path, lambda content: content["annotations"][0].update(bbox=bbox, segmentation=[[5, 5, 25, 5, 25, 15]]))
    assert [(defect.kind, defect.skipped) for defect in data.defects] == [("malformed record", "box")]
    assert data.train.num_boxes == 2


@pytest.mark.parametrize("number", [10**400, -(10**400), float("inf"), float("nan")])
def test_numbers_beyond_float_are_not_finite(tmp_path, number):
    data = changed(tmp_path, lambda content: content["annotations"][0].update(bbox=[number, 1, 2, 3], area=number))
    assert [(defect.kind, defect.skipped) for defect in data.defects] == [("malformed area", "nothing"), ("not finite", "box")]


def test_an_integer_of_thousands_of_digits_is_not_finite(tmp_path):
    make_coco(tmp_path)
    file = tmp_path / "annotations" / "instances_train2017.json"
    file.write_text(file.read_text().replace('"bbox": [2,', '"bbox": [' + "9" * 5000 + ",", 1))
    assert [defect.kind for defect in load_data(tmp_path).defects] == ["not finite"]


def test_masks_that_cannot_be_drawn_are_left_out_and_their_boxes_kept(tmp_path):
    def change(content):
        content["annotations"][0]["segmentation"] = [5, 5, 25, 5, 25, 15]
        content["annotations"][1]["segmentation"] = [[5, 5, 25, 5]]
        content["annotations"][2]["segmentation"] = {"size": [9, 9], "counts": [81]}

    data = changed(tmp_path, change)
    assert boxes(data.train) == EXPECTED
    assert data.train.records[0].segmentation == ([[5, 5, 25, 5, 25, 15]], None)
    assert data.train.records[1].segmentation is None
    assert [(defect.kind, defect.record, defect.skipped) for defect in data.defects] == [
        ("unusable mask", "annotation 2 of image 1", "mask"),
        ("unusable mask", "annotation 3 of image 2", "mask"),
    ]


def test_ids_are_matched_by_their_meaning(tmp_path):
    def change(content):
        for number, entry in enumerate(content["images"], start=1):
            entry["id"] = [float(number), str(number), number][number - 1]
        for entry in content["annotations"]:
            entry["category_id"] = str(entry["category_id"])
        content["categories"][0]["id"] = 1.0

    data = changed(tmp_path, change)
    assert boxes(data.train) == EXPECTED
    assert data.defects == ()


def test_a_flag_is_no_id(tmp_path):
    data = changed(tmp_path, lambda content: content["images"][0].update(id=True))
    assert [(defect.kind, defect.record) for defect in data.defects] == [
        ("malformed record", "images[0]"),
        ("unknown image", "annotation 1 of image 1"),
        ("unknown image", "annotation 2 of image 1"),
    ]


def test_a_base_name_does_not_stand_for_a_path(tmp_path):
    pictures = [Picture(f"{camera}/{index}", 48, 32, [("ant", 1, 1, 9, 9)]) for camera in ("cam2", "cam1") for index in range(3)]
    content = coco_content(pictures)
    for entry in content["images"]:
        entry["file_name"] = f"/somewhere/images/{entry['file_name']}"
    for picture in pictures[:5]:
        write_image(tmp_path / "images" / f"{picture.name}.jpg", 48, 32)
    data = load_data(write_json(tmp_path / "annotations.json", content))
    found = {record.id: record.path.relative_to(tmp_path / "images").as_posix() for part in data.sets for record in part.records}
    assert found == {number: f"{picture.name}.jpg" for number, picture in enumerate(pictures[:5], start=1)}
    assert [defect.kind for defect in data.defects] == ["missing file"]


def test_lvis_names_images_by_their_address(tmp_path):
    make_coco(tmp_path)
    content = coco_content(TRAIN)
    for entry in content["images"]:
        entry["coco_url"] = f"http://images.cocodataset.org/train2017/{entry.pop('file_name')}"
    file = write_json(tmp_path / "annotations" / "instances_train2017.json", content)
    assert boxes(load_data(tmp_path, strict=True).train) == EXPECTED
    for entry in content["images"]:
        del entry["coco_url"]
    write_json(file, content)
    with pytest.raises(DataError, match=r"instances_train2017.json: 3 of 3 images have no file_name"):
        load_data(tmp_path)


def test_roboflow_group_called_like_a_class(tmp_path):
    for split, pictures in (("train", TRAIN), ("valid", VAL)):
        content = coco_content(pictures)
        group = {"id": 0, "name": "ant", "supercategory": "none"}
        others = [{**category, "supercategory": "ant"} for category in content["categories"]]
        write_json(tmp_path / split / "_annotations.coco.json", {**content, "categories": [group, *others]})
        for picture in pictures:
            write_image(tmp_path / split / f"{picture.name}.jpg", picture.width, picture.height)
    data = load_data(tmp_path, strict=True)
    assert (data.classes, boxes(data.train)) == (CLASSES, EXPECTED)
    # With a box of its own, it is a second class of the same name.
    content["annotations"][0]["category_id"] = 0
    write_json(tmp_path / "valid" / "_annotations.coco.json", {**content, "categories": [group, *others]})
    with pytest.raises(DataError, match="two categories are called 'ant'"):
        load_data(tmp_path)


@pytest.mark.parametrize("size", [0, 60])
@pytest.mark.parametrize(
    "layout", ["annotations/instances_{}.json", "annotations/{}.json", "{}.json", "{}/_annotations.coco.json"]
)
def test_a_broken_file_of_annotations_is_an_error(tmp_path, layout, size):
    for split, pictures in (("train", TRAIN), ("val", VAL)):
        file = write_json(tmp_path / layout.format(split), coco_content(pictures))
        for picture in pictures:
            write_image(tmp_path / split / f"{picture.name}.jpg", picture.width, picture.height)
    os.truncate(file, size)
    with pytest.raises(DataError, match=rf"{file}: not valid JSON at line 1"):
        load_data(tmp_path)
    with pytest.raises(DataError, match=rf"{file}: not valid JSON at line 1"):
        load_data(file)


def test_a_folder_in_the_place_of_a_file_is_an_error(tmp_path):
    make_coco(tmp_path)
    (tmp_path / "annotations" / "instances_test2017.json").mkdir()
    with pytest.raises(DataError, match=r"instances_test2017.json: cannot be read: Is a directory"):
        load_data(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"images": [], "annotations": [], "categories": [], "annotations": [1]}', "the key 'annotations' occurs twice"),
        ('{"images": [], "annotations": [{"id": 4, "bbox": [], "bbox": []}]}', "'bbox' occurs twice in one object with id 4"),
        ('{"images": [], "annotations": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
        ('{"images": [], "annotations": [], "x": "\xe4"}', "not UTF-8 text at byte"),
        ('{"images": [], "annotations": {}}', "no list 'annotations'"),
    ],
)
def test_json_with_two_readings_or_none_is_refused(tmp_path, text, message):
    make_coco(tmp_path)
    (tmp_path / "annotations" / "instances_train2017.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=message):
        load_data(tmp_path)


@pytest.mark.parametrize("codec", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_json_in_other_encodings(tmp_path, codec):
    make_coco(tmp_path)
    for file in (tmp_path / "annotations").iterdir():
        file.write_bytes(file.read_text().encode(codec))
    assert boxes(load_data(tmp_path, strict=True).train) == EXPECTED


def test_names_of_classes_are_texts(tmp_path):
    data = changed(tmp_path, lambda content: content["categories"].append({"id": 9, "name": 7}))
    assert data.classes == (*CLASSES, "7")
    for name in ("", " ", "\ud800", None, ["ant"], True):
        with pytest.raises(DataError, match="category"):
            changed(tmp_path, lambda content, name=name: content["categories"].append({"id": 9, "name": name}))


def test_every_record_is_kept_or_listed(tmp_path):
    make_coco(tmp_path)
    write_json(tmp_path / "annotations" / "instances_train2017.json", spoiled())
    accounted(load_data(tmp_path).train, spoiled())


def test_images_outside_the_folder_are_told(tmp_path):
    make_coco(tmp_path / "root")
    (tmp_path / "root" / "train2017").rename(tmp_path / "away")
    (tmp_path / "root" / "train2017").symlink_to(tmp_path / "away")
    data = load_data(tmp_path / "root", strict=True)
    assert data.notes == (f"train: 3 images lie outside the data's folder, e.g. {tmp_path / 'away' / 'a.jpg'}",)


@pytest.mark.parametrize("key", [10**400, 2**63, 1.5, "one"])
def test_ids_that_are_no_small_integers_become_positions(tmp_path, key):
    def change(content):
        content["images"][0]["id"] = key
        for annotation in content["annotations"][:2]:
            annotation["image_id"] = key

    data = changed(tmp_path, change)
    assert [record.id for record in data.train.records] == [1, 2, 3]
    assert (boxes(data.train), data.defects) == (EXPECTED, ())


def test_a_file_name_that_is_null_is_none(tmp_path):
    def change(content):
        for entry in content["images"]:
            entry |= {"coco_url": f"http://x/{entry['file_name']}", "file_name": None}

    assert boxes(changed(tmp_path, change).train) == EXPECTED
