import pytest

from detdistill.data.discover import load_data
from detdistill.errors import DataError
from tests.data.forms import CLASSES, TRAIN, VAL, Picture, make_coco, make_voc, make_yolo, real, voc_xml, write_image


def boxes(data):
    return {record.path.stem: (record.boxes_xyxy.tolist(), record.labels.tolist()) for record in data.records}


EXPECTED = {"a": ([[2, 3, 22, 33], [0, 0, 64, 48]], [1, 0]), "b": ([[1, 2, 31, 62]], [2]), "c": ([], [])}


def annotation(corners, name="<name>ant</name>", size="<size><width>64</width><height>48</height></size>"):
    sides = "".join(f"<{key}>{value}</{key}>" for key, value in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=False))
    return f"<annotation><filename>a.jpg</filename>{size}<object>{name}<bndbox>{sides}</bndbox></object></annotation>"


def replace_a(root, text):
    (root / "Annotations" / "a.xml").write_text(text)
    return load_data(root)


def test_a_voc_folder(tmp_path):
    data = load_data(make_voc(tmp_path), strict=True)
    assert (data.train.form, data.classes, data.test) == ("voc", CLASSES, None)
    assert boxes(data.train) == EXPECTED
    assert boxes(data.val) == {"d": ([[8, 8, 16, 40], [32, 32, 64, 64]], [0, 2])}


def test_pixels_count_from_one_and_the_last_belongs_to_the_box(tmp_path):
    make_voc(tmp_path)
    record = replace_a(tmp_path, annotation((1, 11, 10, 48))).train.records[0]
    assert record.boxes_xyxy.tolist() == [[0, 10, 10, 48]]
    assert record.areas.tolist() == [10 * 38]


def test_the_same_data_are_equal_in_all_forms(tmp_path):
    forms = [load_data(make(tmp_path / make.__name__), strict=True) for make in (make_coco, make_yolo, make_voc)]
    for split in ("train", "val"):
        found = [getattr(data, split) for data in forms]
        assert found[0].classes == found[1].classes == found[2].classes
        for records in zip(*(data.records for data in found), strict=True):
            for other in records[1:]:
                assert other.boxes_xyxy == pytest.approx(records[0].boxes_xyxy, abs=1e-6)
                assert other.areas == pytest.approx(records[0].areas, abs=1e-4)
                assert other.labels.tolist() == records[0].labels.tolist()
                assert (other.path.name, other.size_hw) == (records[0].path.name, records[0].size_hw)
    # Ids of the training images agree too here, so the fingerprints do.
    assert len({data.train.fingerprint for data in forms}) == 1


def test_without_lists_a_tenth_becomes_val(tmp_path):
    pictures = [Picture(f"p{index}", 20, 20, [("ant", 1, 1, 9, 9)]) for index in range(20)]
    data = load_data(make_voc(tmp_path, {"all": pictures}, lists=False))
    assert (len(data.train), len(data.val)) == (18, 2)
    assert data.notes == (
        "there are no lists in ImageSets/Main: all images are one split",
        "no val split: 2 of 20 training images, chosen by the hash of their names, are used as val",
    )


def test_trainval_serves_when_there_is_no_train(tmp_path):
    make_voc(tmp_path, {"trainval": TRAIN, "test": VAL})
    data = load_data(tmp_path)
    assert (len(data.train), len(data.val), len(data.test)) == (2, 1, 1)
    assert data.notes[0] == "ImageSets has no train.txt: trainval.txt is used as train"


def test_lists_of_single_classes_are_understood(tmp_path):
    make_voc(tmp_path)
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_text("a  1\nb -1\n")
    assert list(boxes(load_data(tmp_path).train)) == ["a", "b"]


def test_roboflow(tmp_path):
    for split, pictures in (("train", TRAIN), ("valid", VAL), ("test", VAL)):
        for picture in pictures:
            write_image(tmp_path / split / f"{picture.name}.jpg", picture.width, picture.height)
            (tmp_path / split / f"{picture.name}.xml").write_text(voc_xml(picture))
    data = load_data(tmp_path, strict=True)
    assert boxes(data.train) == EXPECTED
    assert data.val.records[0].path == tmp_path / "valid" / "d.jpg"
    assert data.test.records[0].path == tmp_path / "test" / "d.jpg"


def test_a_classes_file_gives_the_order(tmp_path):
    make_voc(tmp_path)
    (tmp_path / "classes.txt").write_text("cat\nbee\nant\n")
    data = load_data(tmp_path, strict=True)
    assert data.classes == ("cat", "bee", "ant")
    assert boxes(data.train)["a"][1] == [1, 2]
    (tmp_path / "classes.txt").write_text("bee\nant\n")
    data = load_data(tmp_path)
    assert [(defect.kind, defect.file, defect.record) for defect in data.defects] == [
        ("unknown class", "Annotations/b.xml", "object 1"),
        ("unknown class", "Annotations/d.xml", "object 2"),
    ]


@pytest.mark.parametrize(
    ("text", "kind", "skipped"),
    [
        (annotation((5, 5, 5, 5)), "empty box", "box"),
        (annotation((9, 5, 5, 9)), "inverted box", "box"),
        (annotation((70, 5, 80, 9)), "box outside image", "box"),
        (annotation((5, 5, 8, 60)), "box crosses border", "nothing"),
        (annotation((5, 5, "1_0", 9)), "not finite", "box"),
        ("<annotations><image/></annotations>", "not VOC", "image"),
        (annotation(("nan", 5, 8, 9)), "not finite", "box"),
        (annotation(("five", 5, 8, 9)), "not finite", "box"),
        (annotation((5, 5, 8)), "malformed record", "box"),
        (annotation((5, 5, 8, 9), name=""), "missing category", "box"),
        (annotation((5, 5, 8, 9), size="<size><width>0</width><height>0</height></size>"), "size differs", "nothing"),
        (annotation((5, 5, 8, 9), size="<size><width>48</width><height>64</height></size>"), "size differs", "image"),
    ],
)
def test_defects(tmp_path, text, kind, skipped):
    make_voc(tmp_path)
    data = replace_a(tmp_path, text)
    assert [(defect.kind, defect.file, defect.skipped) for defect in data.defects] == [(kind, "Annotations/a.xml", skipped)]


def test_missing_files_are_listed(tmp_path):
    make_voc(tmp_path)
    (tmp_path / "JPEGImages" / "a.jpg").unlink()
    (tmp_path / "Annotations" / "c.xml").unlink()
    data = load_data(tmp_path)
    assert [(defect.kind, defect.file) for defect in data.defects] == [
        ("missing file", "Annotations/c.xml"),
        ("missing file", "JPEGImages/a.jpg"),
    ]
    assert list(boxes(data.train)) == ["b"]


def test_renamed_files_keep_the_old_name_inside(tmp_path):
    make_voc(tmp_path)
    assert boxes(replace_a(tmp_path, voc_xml(TRAIN[0]).replace("a.jpg", "b.jpg")).train) == EXPECTED


def test_the_image_is_found_by_its_file_name_too(tmp_path):
    make_voc(tmp_path)
    (tmp_path / "JPEGImages" / "a.jpg").rename(tmp_path / "JPEGImages" / "frame_0.jpg")
    assert boxes(replace_a(tmp_path, voc_xml(TRAIN[0]).replace("a.jpg", "frame_0.jpg")).train).keys() == {"frame_0", "b", "c"}


def test_a_test_split_without_annotations_is_noted(tmp_path):
    make_voc(tmp_path)
    (tmp_path / "ImageSets" / "Main" / "test.txt").write_text("x\ny\n")
    data = load_data(tmp_path)
    assert data.test is None
    assert data.notes == ("none of the 2 test images has an annotation: there is no test split",)


@pytest.mark.parametrize("text", ["<annotation><filename>a.jpg</filename><obj", ""])
def test_broken_xml_names_the_place(tmp_path, text):
    make_voc(tmp_path)
    with pytest.raises(DataError, match=r"a.xml: not valid XML at line 1, column \d+: .*; fix the file or remove it"):
        replace_a(tmp_path, text)


def test_an_empty_list_and_no_objects_are_errors(tmp_path):
    make_voc(tmp_path / "one")
    (tmp_path / "one" / "ImageSets" / "Main" / "val.txt").write_text("\n")
    with pytest.raises(DataError, match=r"val.txt: the list is empty"):
        load_data(tmp_path / "one")
    with pytest.raises(DataError, match=r"no object with a name in 2 annotation files"):
        load_data(make_voc(tmp_path / "two", {"train": [TRAIN[2]], "val": [Picture("d", 20, 20)]}))


def test_bccd():
    data = load_data(real("bccd"))
    assert data.classes == ("Platelets", "RBC", "WBC")
    assert [(split.name, len(split), split.num_boxes) for split in data.sets] == [
        ("train", 205, 2804),
        ("val", 87, 1137),
        ("test", 72, 945),
    ]
    assert [(defect.kind, defect.file) for defect in data.defects] == [
        ("empty box", "Annotations/BloodImage_00343.xml"),
        ("empty box", "Annotations/BloodImage_00338.xml"),
    ]
    with pytest.raises(DataError, match=r"2 defects; the first: Annotations/BloodImage_00343\.xml, object 4: empty box"):
        load_data(real("bccd"), strict=True)
