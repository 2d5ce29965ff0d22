import os
import time

import pytest

from detdistill.data.discover import load_data, load_split
from detdistill.data.inspect import inspect_data
from detdistill.data.yolo import label_path
from detdistill.errors import DataError, RunError
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


def rows(root, text, split="train", name="a"):
    (root / "labels" / split / f"{name}.txt").write_text(text)


def kinds(data):
    return [(defect.kind, defect.file, defect.record, defect.skipped) for defect in data.defects]


BOX = "0 0.5 0.5 0.25 0.5"
PIXELS = [24, 12, 40, 36]  # that box in image a, of 64x48


@pytest.mark.parametrize(
    ("more", "form"),
    [
        (" 0.45 0.45 0.55 0.45 0.5 0.5 -1 -1 -1 -1", "boxes with 10 values of points"),
        (" -1 -1 -1 -1 -1 -1", "boxes with 6 values of points"),
        (" 0.45 0.45 2 0.55 0.45 2 0 0 0", "boxes with 9 values of points"),
        (" 0.87", "boxes with a confidence or a track number"),
        (" 17", "boxes with a confidence or a track number"),
        (" 0.87 17", "boxes with a confidence or a track number"),
    ],
)
def test_boxes_with_more_values_stay_boxes(tmp_path, more, form):
    make_yolo(tmp_path)
    rows(tmp_path, f"{BOX}{more}\n1{BOX[1:]}{more}\n{BOX.replace('0.25', '0.2')}{more}\n")
    rows(tmp_path, "", name="b")
    rows(tmp_path, f"{BOX}{more}", "val", "d")
    data = load_data(tmp_path, strict=True)
    assert data.train.records[0].boxes_xyxy[:2].tolist() == [PIXELS, PIXELS]
    assert data.train.records[0].segmentation is None
    assert data.notes == (f"4 of 4 rows are {form}: only the boxes are used",)


OBB = "0 0.4 0.3 0.6 0.3 0.6 0.7 0.4 0.7"
TURNED = "1 0.5 0.3 0.7 0.5 0.5 0.7 0.3 0.5"


def test_oriented_boxes_give_their_tight_box(tmp_path):
    make_yolo(tmp_path)
    rows(tmp_path, f"{OBB}\n{TURNED}\n")
    for split, name in (("train", "b"), ("val", "d")):
        rows(tmp_path, TURNED, split, name)
    record = load_data(tmp_path, strict=True).train.records[0]
    assert record.boxes_xyxy.round(6).tolist() == [[25.6, 14.4, 38.4, 33.6], [19.2, 14.4, 44.8, 33.6]]


def test_polygons_with_confidence_and_track_lose_these(tmp_path):
    make_yolo(tmp_path)
    triangle, square = "0.25 0.5 0.5 0.25 0.75 0.75", "0.1 0.1 0.9 0.1 0.9 0.9 0.1 0.9"
    for split, name in (("train", "a"), ("train", "b"), ("val", "d")):
        rows(tmp_path, f"0 {triangle} 0.8\n1 {square} 0.7\n", split, name)
    assert load_data(tmp_path, strict=True).train.records[0].boxes_xyxy.round(6).tolist() == [
        [16, 12, 48, 36],
        [6.4, 4.8, 57.6, 43.2],
    ]
    for split, name in (("train", "a"), ("train", "b"), ("val", "d")):
        rows(tmp_path, f"0 {triangle} 0.8 4\n1 {square} 0.7 12\n", split, name)
    data = load_data(tmp_path, strict=True)
    assert data.train.records[0].boxes_xyxy.round(6).tolist() == [[16, 12, 48, 36], [6.4, 4.8, 57.6, 43.2]]
    assert data.notes == ("6 of 6 rows are polygons with a confidence and a track number: only the polygons are used",)


DOUBT = "0 0.5 0.5 0.4 0.4 0.45 0.45 0.55 0.45 0.5 0.6"


def test_rows_that_fit_two_forms_are_refused_until_the_task_is_given(tmp_path):
    make_yolo(tmp_path)
    for split, name in (("train", "a"), ("train", "b"), ("val", "d")):
        rows(tmp_path, DOUBT, split, name)
    message = (
        r"data.yaml: 3 of 3 rows have 10 values after the class, which may be boxes with 6 values of points or polygons; "
        r"write 'task: segment' .*'task: obb' .*'task: detect'"
    )
    with pytest.raises(DataError, match=message):
        load_data(tmp_path)
    expected = {"detect": [19.2, 14.4, 44.8, 33.6], "pose": [19.2, 14.4, 44.8, 33.6], "segment": [25.6, 19.2, 35.2, 28.8]}
    for task, box in expected.items():
        (tmp_path / "data.yaml").write_text(f"{YAML}task: {task}\n")
        assert load_data(tmp_path, strict=True).train.records[0].boxes_xyxy.round(6).tolist() == [box]
    (tmp_path / "data.yaml").write_text(f"{YAML}task: obb\n")
    assert {(defect.kind, defect.skipped) for defect in inspect_data(tmp_path).by_kind()["malformed record"][0][1:]} == {
        ("malformed record", "box")
    }
    (tmp_path / "data.yaml").write_text(f"{YAML}task: segmnt\n")
    with pytest.raises(DataError, match=r"task is 'segmnt' \(did you mean 'segment'\?\); use one of detect, segment, pose, obb"):
        load_data(tmp_path)


def test_a_few_doubtful_rows_are_defects(tmp_path):
    make_yolo(tmp_path)
    rows(tmp_path, "\n".join([f"0 0.5 0.5 0.{number:03} 0.2" for number in range(100, 160)] + [DOUBT]))
    data = load_data(tmp_path)
    assert kinds(data) == [("malformed record", "labels/train/a.txt", "row 61", "box")]
    assert len(data.train.records[0]) == 60


def test_keypoints_must_be_as_many_as_the_yaml_says(tmp_path):
    make_yolo(tmp_path, YAML + "kpt_shape: [2, 2]\n")
    rows(tmp_path, f"{BOX} 0.1 0.1 0.9 0.9\n{BOX} 0.1 0.1 0.9\n")
    data = load_data(tmp_path)
    assert data.train.records[0].boxes_xyxy.tolist() == [PIXELS]
    assert kinds(data) == [("malformed record", "labels/train/a.txt", "row 2", "box")]
    for shape in ("[2]", "[2, 4]", "17", "[a, 3]", "{a: 2}"):
        (tmp_path / "data.yaml").write_text(f"{YAML}kpt_shape: {shape}\n")
        with pytest.raises(DataError, match=r"kpt_shape is .*number of points, 2 or 3 values"):
            load_data(tmp_path)


def test_files_that_mix_boxes_and_polygons_are_noted(tmp_path):
    make_yolo(tmp_path)
    rows(tmp_path, f"0 0.25 0.5 0.5 0.25 0.75 0.75\n0 0.1 0.1 0.9 0.1 0.9 0.9 0.1 0.9\n{BOX}")
    assert load_data(tmp_path, strict=True).notes == (
        "1 label file mixes boxes and polygons: all are read here, but Ultralytics leaves out such files",
    )


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("0,0.5,0.5,0.2,0.2", "malformed record"),
        ("ant 0.5 0.5 0.2 0.2", "malformed record"),
        ("0 0,5 0,5 0,2 0,2", "malformed record"),
        ("0 0.5 0.5 0_1 0.2", "malformed record"),
        ("0 0.5", "malformed record"),
        ("7 0.5 0.5 0.2 0.2", "unknown class"),
        ("0 32 24 10 10", "not normalised"),
        ("0 nan 0.5 0.2 0.2", "not finite"),
        (f"0 0.5 0.5 0.2 1{'0' * 400}", "not finite"),
    ],
)
def test_an_image_whose_rows_cannot_be_read_is_no_negative(tmp_path, text, kind):
    make_yolo(tmp_path)
    rows(tmp_path, f"{text}\n")
    data = load_data(tmp_path)
    assert sorted(boxes(data.train)) == ["b", "c"]
    assert kinds(data) == [
        (kind, "labels/train/a.txt", "row 1", "box"),
        ("unreadable labels", "labels/train/a.txt", "image 1", "image"),
    ]


@pytest.mark.parametrize("content", [b"0 0.5 0.5 0.2 0.2 \xe9", "0 0.5 0.5 0.2 0.2".encode("utf-16-le"), None])
def test_an_image_whose_label_file_is_no_text_is_left_out(tmp_path, content):
    make_yolo(tmp_path)
    file = tmp_path / "labels" / "train" / "a.txt"
    file.unlink()
    file.mkdir() if content is None else file.write_bytes(content)
    data = load_data(tmp_path)
    assert sorted(boxes(data.train)) == ["b", "c"]
    assert kinds(data) == [("unreadable labels", "labels/train/a.txt", "image 1", "image")]


@pytest.mark.parametrize("codec", ["utf-8-sig", "utf-16", "utf-32"])
def test_files_with_a_byte_order_mark(tmp_path, codec):
    make_yolo(tmp_path, "train: train.txt\nval: images/val\nnames: [ant, bee, cat]\n")
    (tmp_path / "train.txt").write_text("images/train/a.jpg\nimages/train/b.jpg\n")
    for file in (tmp_path / "data.yaml", tmp_path / "train.txt", tmp_path / "labels" / "train" / "a.txt"):
        file.write_text(file.read_text(), encoding=codec)
    assert boxes(load_data(tmp_path, strict=True).train) == {name: EXPECTED[name] for name in "ab"}


@pytest.mark.parametrize("file", ["data.yaml", "train.txt"])
@pytest.mark.parametrize("codec", ["latin-1", "gbk", "utf-16-le"])
def test_files_in_unknown_encodings_are_refused_in_one_line(tmp_path, codec, file):
    make_yolo(tmp_path, "train: train.txt\nval: images/val\nnames: [ant, bee, cat]\n")
    (tmp_path / "train.txt").write_text("images/train/a.jpg\n")
    text = (tmp_path / file).read_text() + {"gbk": "# 中", "latin-1": "# é", "utf-16-le": ""}[codec]
    (tmp_path / file).write_bytes(text.encode(codec))
    with pytest.raises(DataError, match=rf"{file}: .*save it as UTF-8$"):
        load_data(tmp_path)


def test_rows_that_count_from_one_are_told(tmp_path):
    make_yolo(tmp_path)
    rows(tmp_path, "1 0.5 0.5 0.2 0.2\n3 0.5 0.5 0.4 0.4\n")
    rows(tmp_path, "2 0.5 0.5 0.2 0.2", "val", "d")
    data = load_data(tmp_path)
    assert data.notes == (
        "the classes of the rows count from 1: class 0 is never used, but class 3 of 0 .. 2 is; "
        "subtract 1 from the class of every row",
    )
    assert data.defects[0].message == "class 3 is not in 0 .. 2; the rows seem to count from 1"


# The name of the image, and other ways to write the same one.
@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("my pic 1", "my%20pic%201"),
        ("my%20pic%201", "my pic 1"),
        ("caf\u00e9", "cafe\u0301"),
        ("cafe\u0301", "caf\u00e9"),
        ("caf\u00e9", "caf%C3%A9"),
        ("IMG_1", "img_1"),
        ("p", "p.jpg"),
        ("p q", "p+q"),
    ],
)
def test_names_of_labels_match_in_other_writing(tmp_path, image, label):
    make_yolo(tmp_path)
    write_image(tmp_path / "images" / "train" / f"{image}.jpg", 64, 48)
    rows(tmp_path, BOX, name=label)
    data = load_data(tmp_path, strict=True)
    assert boxes(data.train)[image] == ([PIXELS], [0])
    assert data.notes == ()


def test_a_label_of_another_name_leaves_the_image_out(tmp_path):
    make_yolo(tmp_path)
    (tmp_path / "labels" / "train" / "a.txt").rename(tmp_path / "labels" / "train" / "a_renamed.txt")
    data = load_data(tmp_path)
    assert sorted(boxes(data.train)) == ["b", "c"]
    assert kinds(data) == [
        ("missing file", "labels/train/a_renamed.txt", "image", "image"),
        ("missing labels", "images/train/a.jpg", "image 1", "image"),
    ]


def test_a_label_of_another_number_is_none_of_the_image(tmp_path):
    make_yolo(tmp_path)
    write_image(tmp_path / "images" / "train" / "frame_0034.jpg", 64, 48)
    rows(tmp_path, BOX, name="frame_0012")
    data = load_data(tmp_path)
    assert boxes(data.train)["frame_0034"] == ([], [])
    assert kinds(data) == [("missing file", "labels/train/frame_0012.txt", "image", "image")]


def test_two_candidates_are_no_match(tmp_path):
    make_yolo(tmp_path)
    for name in ("P", "p"):
        write_image(tmp_path / "images" / "train" / f"{name}.jpg", 64, 48)
    rows(tmp_path, BOX, name="p.jpg")
    assert [defect.kind for defect in load_data(tmp_path).defects] == ["missing file", "missing labels", "missing labels"]


def test_notes_beside_the_images_are_no_labels(tmp_path):
    make_yolo(tmp_path, layout="{split}")
    (tmp_path / "data.yaml").write_text("train: train\nval: val\n" + NAMES)
    (tmp_path / "train" / "a.txt").rename(tmp_path / "train" / "A.txt")
    (tmp_path / "train" / "readme.txt").write_text("from the web")
    write_image(tmp_path / "train" / "empty.jpg", 32, 32)
    assert boxes(load_data(tmp_path, strict=True).train) == {**EXPECTED, "empty": ([], [])}
    (tmp_path / "train" / "other.txt").write_text(BOX)
    assert [defect.kind for defect in load_data(tmp_path).defects] == ["missing file", "missing labels"]


def test_a_test_split_that_was_not_exported_is_a_note(tmp_path):
    make_yolo(tmp_path, "train: images/train\nval: images/val\ntest: ../test/images\n" + NAMES)
    for _ in range(2):
        data = load_data(tmp_path, strict=True)
        assert (data.test, len(data.notes)) == (None, 1)
        assert data.notes[0].startswith("data.yaml: test: ")
        assert data.notes[0].endswith("there is no test split")
        with pytest.raises(RunError, match=r"no split 'test' in .*; there are train, val; data.yaml: test: "):
            load_split(tmp_path, "test")
        (tmp_path / "test" / "images").mkdir(parents=True, exist_ok=True)


@pytest.mark.parametrize("entry", ["images/none", "none.txt"])
def test_an_empty_val_folder_or_list_is_a_note(tmp_path, entry):
    make_yolo(tmp_path, f"train: images/train\nval: {entry}\n" + NAMES)
    if entry.endswith(".txt"):
        (tmp_path / entry).write_text("\n")
    else:
        (tmp_path / entry).mkdir()
        (tmp_path / entry / ".gitkeep").touch()
    data = load_data(tmp_path)
    assert data.notes[0].startswith(f"data.yaml: val: no images in '{entry}'; it is empty")
    assert data.notes[1].startswith("no val split: 1 of 3 training images")
    (tmp_path / "images" / "none").mkdir(exist_ok=True)
    (tmp_path / "images" / "none" / "x.heic").touch()
    (tmp_path / "none.txt").write_text("images/val/gone.jpg\n")
    with pytest.raises(DataError, match=r"val: no images in|no image has a label file"):
        load_data(tmp_path)


def test_labels_that_were_exported_without_their_images_say_what_to_do(tmp_path):
    """Label Studio and CVAT write them so: ``labels`` is full, ``images`` is empty or not there."""
    (tmp_path / "labels").mkdir()
    (tmp_path / "images").mkdir()
    for name in ("a", "b"):
        (tmp_path / "labels" / f"{name}.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    (tmp_path / "notes.json").write_text('{"categories": [{"id": 0, "name": "ant"}]}')
    todo = "it is empty, but labels has 2 label files: export the data with their images, or copy the images into images"
    with pytest.raises(DataError) as error:
        load_data(tmp_path)
    assert str(error.value) == f"{tmp_path}/notes.json: train: no images in 'images'; {todo}"
    report = inspect_data(tmp_path)
    ((_, defect),) = report.defects
    assert (defect.record, defect.message) == ("train", f"no images in 'images'; {todo}")
    assert report.splits[0].skipped_images == 0


def test_inspect_lists_what_there_is_beside_a_missing_split(tmp_path):
    report = inspect_data(make_yolo(tmp_path, "train: images/train\nval: nowhere\n" + NAMES))
    assert [(split.name, split.images) for split in report.splits] == [("train", 3), ("val", 0)]
    assert report.notes[-1].startswith("training refuses these data: ")
    assert "val: nowhere does not exist" in report.notes[-1]


@pytest.mark.parametrize(
    ("yaml", "classes"),
    [
        ("names: {'0': ant, \"1\": bee, 2: cat}\nnc: '3'\n", CLASSES),
        ("names: [no, on, ~]\nnc: 3.0\n", ("no", "on", "~")),
        ("names: [1.10, 007, 2024-01-01]\n", ("1.10", "007", "2024-01-01")),
        ("names: [null, 1e3, 0x10]\n", ("null", "1e3", "0x10")),
        ("names:\n- 1:30\n- yes\n- 'true'\n", ("1:30", "yes", "true")),
        ('nc: "3"\n', ("class0", "class1", "class2")),
    ],
)
def test_names_stay_as_written_and_numbers_may_be_texts(tmp_path, yaml, classes):
    data = load_data(make_yolo(tmp_path, "train: images/train\nval: images/val\ntest: null\n" + yaml), strict=True)
    assert data.classes == classes


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("nc: 3000000\n", "more than 50000 classes"),
        ("nc: " + "9" * 5000 + "\n" + NAMES, "nc is '9999.*it must be the number of classes"),
        ("nc: many\n" + NAMES, "nc is 'many'"),
        ("nc: -3\n" + NAMES, "nc is '-3'"),
        ("nc: !!int x\n" + NAMES, "not valid YAML"),
        ("when: !!timestamp x\n" + NAMES, "not valid YAML"),
        ("x: !!python/object:os.system {}\n" + NAMES, "line 3, column 4: could not determine a constructor"),
        (NAMES + "names: [x, y, z]\n", "line 4, column 1: the key 'names' occurs twice"),
        ("names: {0: ant, 1: bee, 1: cat}\n", "the key '1' occurs twice"),
        ("names: {0: ant, 1: bee, 01: cat}\n", "numbered 0 to 2 without gaps"),
        ("names: [ant, '', cat]\n", "the name of class 1 is ''"),
        ("names: [ant, [bee], cat]\n", r"the name of class 1 is \['bee'\]"),
        ('names: [ant, "\\ud800", cat]\n', "the name of class 1 is"),
        ("x: " + "[" * 5000 + "\n" + NAMES, "nested too deeply"),
        ("x: " + "y" * 1_000_001 + "\n" + NAMES, "more than the 1000000 of any data.yaml"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nnames: &c [*b, *c]\n", "the name of class 0 is"),
        ("test: {a: b}\n" + NAMES, "test is {'a': 'b'}; it must be a folder"),
        ("test: [[a]]\n" + NAMES, r"test is \[\['a'\]\]; it must be a folder"),
    ],
)
def test_odd_yaml_is_refused_in_one_line(tmp_path, yaml, message):
    make_yolo(tmp_path, "train: images/train\nval: images/val\n" + yaml)
    begin = time.perf_counter()
    with pytest.raises(DataError, match=message) as error:
        load_data(tmp_path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000
    assert time.perf_counter() - begin < 10


@pytest.mark.parametrize("entry", ["x" * 300, "a/" * 3000, "'a\\0b'", '"a\\0b"', "images/train/a.jpg/b"])
def test_paths_that_no_file_can_have_are_missing(tmp_path, entry):
    make_yolo(tmp_path, f"train: images/train\nval: {entry}\n" + NAMES)
    with pytest.raises(DataError, match=r"val: .* does not exist"):
        load_data(tmp_path)
    (tmp_path / "data.yaml").write_text("train: train.txt\nval: images/val\n" + NAMES)
    (tmp_path / "train.txt").write_text(f"images/train/a.jpg\n{entry}.jpg\n")
    (defect,) = load_data(tmp_path).defects
    assert defect.kind in ("missing file", "unreadable image")


def test_listed_names_match_in_other_writing(tmp_path):
    make_yolo(tmp_path, "train: train.txt\nval: images/val/d.jpg\n" + NAMES)
    write_image(tmp_path / "images" / "train" / "caf\u00e9 1.jpg", 64, 48)
    rows(tmp_path, BOX, name="caf\u00e9 1")
    for line in ("cafe\u0301 1", "caf%C3%A9%201"):
        (tmp_path / "train.txt").write_text(f"images/train/{line}.jpg\nimages/train/a.jpg\n")
        assert boxes(load_data(tmp_path, strict=True).train) == {"a": EXPECTED["a"], "caf\u00e9 1": ([PIXELS], [0])}


def test_each_real_file_is_used_once(tmp_path):
    make_yolo(tmp_path)
    os.symlink(tmp_path / "images" / "train", tmp_path / "images" / "train" / "again")
    os.symlink(tmp_path / "images" / "train" / "a.jpg", tmp_path / "images" / "train" / "z.jpg")
    data = load_data(tmp_path)
    assert boxes(data.train) == EXPECTED
    assert kinds(data) == [("duplicate image", "images/train/z.jpg", "image 4", "image")]


def test_images_outside_the_folder_are_noted(tmp_path):
    make_yolo(tmp_path / "data", "train: images/train\nval: ../other\n" + NAMES)
    (tmp_path / "data" / "images" / "val").rename(tmp_path / "other")
    (tmp_path / "data" / "labels" / "val" / "d.txt").rename(tmp_path / "other" / "d.txt")
    assert load_data(tmp_path / "data", strict=True).notes == (
        f"val: 1 image lies outside the data's folder, e.g. {tmp_path}/other/d.jpg",
    )


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
