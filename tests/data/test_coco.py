import json
import os

import numpy as np
import pytest

from detdistill.data.coco import write_coco
from detdistill.data.discover import load_data
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
    assert data.notes == ("category animal only groups the others and has no boxes: it is not used as a class",)
    # As soon as it owns a box, it is a class.
    content = coco_content(VAL)
    content["categories"].insert(0, group)
    content["annotations"][0]["category_id"] = 0
    write_json(tmp_path / "valid" / "_annotations.coco.json", content)
    assert load_data(tmp_path).classes == ("animal", *CLASSES)


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
