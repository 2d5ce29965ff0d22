import pytest

from detdistill.data.discover import load_data, read_sets
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


@pytest.mark.parametrize("folder", ["annotations", "Annotation", "xmls", "labels"])
@pytest.mark.parametrize("images", ["JPEGImages", "images", "pictures", "."])
def test_any_folder_of_annotations_beside_any_folder_of_images(tmp_path, folder, images):
    for picture in (*TRAIN, *VAL):
        write_image(tmp_path / images / f"{picture.name}.jpg", picture.width, picture.height)
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / f"{picture.name}.xml").write_text(voc_xml(picture))
    data = load_data(tmp_path, strict=True)
    assert (data.train.form, len(data.train) + len(data.val)) == ("voc", 4)
    assert {name: found for split in data.sets for name, found in boxes(split).items() if name != "d"} == EXPECTED


@pytest.mark.parametrize("layout", ["{kind}/{split}", "{split}/{kind}", "{split}"])
def test_folders_of_splits(tmp_path, layout):
    for split, pictures in (("train", TRAIN), ("valid", VAL)):
        for picture in pictures:
            xml = tmp_path / layout.format(kind="annotations", split=split) / f"{picture.name}.xml"
            xml.parent.mkdir(parents=True, exist_ok=True)
            xml.write_text(voc_xml(picture))
            write_image(
                tmp_path / layout.format(kind="images", split=split) / f"{picture.name}.jpg", picture.width, picture.height
            )
    data = load_data(tmp_path, strict=True)
    assert (boxes(data.train), len(data.val)) == (EXPECTED, 1)


def test_several_folders_of_annotations_are_refused(tmp_path):
    for folder in ("xml_old", "xml_new"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.xml").write_text(voc_xml(TRAIN[0]))
    with pytest.raises(DataError, match="2 folders have VOC annotations: xml_new, xml_old"):
        load_data(tmp_path)


def test_names_in_two_subfolders_stay_apart(tmp_path):
    sizes = {"cam1": (30, 40), "cam2": (50, 60)}
    for camera, (width, height) in sizes.items():
        write_image(tmp_path / "JPEGImages" / camera / "0.png", width, height)
        (tmp_path / "Annotations" / camera).mkdir(parents=True)
        picture = Picture("0", width, height, [("ant", 1, 1, 9, 9)])
        (tmp_path / "Annotations" / camera / "0.xml").write_text(voc_xml(picture))
    data = load_data(tmp_path, strict=True)
    assert {record.path.parent.name: record.size_hw[::-1] for split in data.sets for record in split.records} == sizes
    (tmp_path / "JPEGImages" / "cam2" / "0.png").unlink()
    write_image(tmp_path / "JPEGImages" / "cam1" / "1.png", 30, 40)
    picture = Picture("1", 30, 40, [("ant", 1, 1, 9, 9)])
    (tmp_path / "Annotations" / "cam1" / "1.xml").write_text(voc_xml(picture))
    data = load_data(tmp_path)
    assert [(defect.kind, defect.skipped) for defect in data.defects] == [("missing file", "image")]


def test_an_image_belongs_to_the_annotation_of_its_name(tmp_path):
    make_voc(tmp_path)
    (tmp_path / "JPEGImages" / "a.jpg").unlink()
    data = replace_a(tmp_path, voc_xml(Picture("a", 32, 64, [("bee", 1, 1, 9, 9)])).replace("a.jpg", "b.jpg"))
    assert boxes(data.train) == {name: EXPECTED[name] for name in "bc"}
    assert [defect.kind for defect in data.defects] == ["missing file"]


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("a (copy)", "a (copy)"),
        ("a (copy) -1", "a (copy)"),
        ("a (copy).jpg", "a (copy)"),
        ("JPEGImages/a (copy).jpg", "a (copy)"),
        ("./a (copy)", "a (copy)"),
        ("D:\\VOC\\JPEGImages\\a (copy).JPG", "a (copy)"),
        ("VOC/Annotations/a.xml", "a"),
        ("JPEGImages/a.jpg Annotations/a.xml", "a"),
        ("a  1", "a"),
        ("v1.2", "v1.2"),
        ("v1.2.jpg", "v1.2"),
    ],
)
def test_lines_of_lists_name_files(tmp_path, line, name):
    objects = [("ant", 1, 1, 9, 9)]
    make_voc(tmp_path, {"train": [Picture(each, 20, 20, objects) for each in ("a", "a (copy)", "v1.2")], "val": VAL})
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_text(f"{line}\n")
    data = load_data(tmp_path, strict=True)
    assert [record.path.name for record in data.train.records] == [f"{name}.jpg"]


def test_lines_without_a_file_and_repeated_ones_are_counted(tmp_path):
    make_voc(tmp_path)
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_text("a\nb\na.jpg\n\na 2\nb\n")
    data = load_data(tmp_path)
    assert list(boxes(data.train)) == ["a", "b"]
    assert [(defect.kind, defect.file, defect.record, defect.skipped) for defect in data.defects] == [
        ("duplicate image", "ImageSets/Main/train.txt", "line 3", "image"),
        ("missing file", "Annotations/a 2.xml", "a 2", "image"),
        ("duplicate image", "ImageSets/Main/train.txt", "line 6", "image"),
    ]


@pytest.mark.parametrize("name", ["valid", "validation", "dev", "Val", "val2012", "minival"])
def test_lists_are_splits_under_every_name(tmp_path, name):
    make_voc(tmp_path, {"training": TRAIN, name: VAL, "testing": VAL})
    data = load_data(tmp_path, strict=True)
    assert (boxes(data.train), len(data.val), len(data.test)) == (EXPECTED, 1, 1)
    assert data.val.records[0].path.name == "d.jpg"


def test_lists_that_are_not_used_are_named(tmp_path):
    make_voc(tmp_path)
    lists = tmp_path / "ImageSets" / "Main"
    for name in ("trainval", "ant_train", "ant_val", "subset", "valid"):
        (lists / f"{name}.txt").write_text("a\n")
    assert load_data(tmp_path).notes == ("lists of ImageSets/Main that are not used: subset.txt, valid.txt",)


@pytest.mark.parametrize(
    ("codec", "name"),
    [
        ("gb2312", "\u732b"),
        ("GBK", "\u9f98"),
        ("big5", "\u8c93"),
        ("shift_jis", "\u732b"),
        ("euc-kr", "\uace0"),
        ("ISO-8859-1", "M\xfccke"),
        ("utf-16", "M\xfccke"),
    ],
)
def test_the_declared_encoding_is_used(tmp_path, codec, name):
    make_voc(tmp_path)
    for picture in (*TRAIN, *VAL):
        text = f'<?xml version="1.0" encoding="{codec}"?>\n' + voc_xml(picture).replace("ant", name)
        (tmp_path / "Annotations" / f"{picture.name}.xml").write_bytes(text.encode(codec))
    data = load_data(tmp_path, strict=True)
    assert data.classes == tuple(sorted((name, "bee", "cat")))
    if codec != "utf-16":
        (tmp_path / "classes.txt").write_bytes(f"{name}\nbee\ncat\n".encode(codec))
        assert load_data(tmp_path, strict=True).classes == (name, "bee", "cat")
        (tmp_path / "classes.txt").write_text(f"cat\n{name}\nbee\n", encoding="utf-8")
        assert load_data(tmp_path, strict=True).classes == ("cat", name, "bee")


@pytest.mark.parametrize(
    ("head", "codec", "message"),
    [
        ("ansi", "latin-1", "it declares the encoding 'ansi', which does not exist; save it as UTF-8"),
        ("gb2312", "latin-1", "it declares the encoding 'gb2312', but byte"),
        ("utf-8", "latin-1", "not valid XML at line 1, column"),
        ("utf-16", "latin-1", "not valid XML at line"),
        ("rot13", "latin-1", "encoding"),
    ],
)
def test_a_wrong_encoding_is_one_line(tmp_path, head, codec, message):
    make_voc(tmp_path)
    text = f'<?xml version="1.0" encoding="{head}"?>' + voc_xml(TRAIN[0]).replace("ant", "M\xfccke\xff")
    (tmp_path / "Annotations" / "a.xml").write_bytes(text.encode(codec))
    with pytest.raises(DataError, match=rf"Annotations/a.xml: .*{message}") as caught:
        load_data(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", ["classes.txt", "ImageSets/Main/train.txt"])
def test_lists_in_other_encodings(tmp_path, file):
    make_voc(tmp_path)
    content = "ant\nbee\ncat\n" if file == "classes.txt" else "a\nb\nc\n"
    for codec in ("utf-8-sig", "utf-16"):
        (tmp_path / file).write_bytes(content.encode(codec))
        assert boxes(load_data(tmp_path, strict=True).train) == EXPECTED
    (tmp_path / file).write_bytes(b"M\xfccke\n")
    with pytest.raises(DataError, match=rf"{file}: not UTF-8 text at byte 1; save the file as UTF-8"):
        load_data(tmp_path)
    (tmp_path / file).write_bytes(b"a\0b\n")
    with pytest.raises(DataError, match=rf"{file}: not a text file"):
        load_data(tmp_path)


def test_a_zero_proves_that_corners_count_from_zero(tmp_path):
    make_voc(tmp_path)
    data = replace_a(tmp_path, annotation((0, 11, 10, 48)))
    assert boxes(data.train)["a"][0] == [[0, 11, 10, 48]]
    # The other files of the set count from 0 too.
    assert boxes(data.train)["b"][0] == [[2, 3, 31, 62]]
    assert data.defects == ()
    assert "the corners count from 0: 1 of 4 boxes have a 0 in xmin or ymin" in data.notes[0]
    (tmp_path / "voc.yaml").write_text("counts_from: 1\n")
    data = load_data(tmp_path)
    assert (boxes(data.train)["b"][0], data.notes) == ([[1, 2, 31, 62]], ())
    assert [defect.kind for defect in data.defects] == ["box crosses border"]
    (tmp_path / "voc.yaml").write_text("counts_from: 0\n")
    assert boxes(load_data(tmp_path, strict=True).train)["b"][0] == [[2, 3, 31, 62]]


@pytest.mark.parametrize("text", ["counts_from: 2", "counts_from: yes", "from: 1", "[", "", "counts_from: 1\nx: 2"])
def test_the_setting_of_corners_is_checked(tmp_path, text):
    make_voc(tmp_path)
    (tmp_path / "voc.yaml").write_text(text)
    with pytest.raises(DataError, match=r"voc.yaml: "):
        load_data(tmp_path)


def test_equal_corners_are_one_pixel_wide(tmp_path):
    make_voc(tmp_path)
    data = replace_a(tmp_path, annotation((5, 5, 5, 9)))
    assert boxes(data.train)["a"][0] == [[4, 4, 5, 9]]
    assert data.defects == ()
    assert data.notes == ("1 box has xmin equal to xmax, or ymin to ymax: one pixel wide or high",)


def test_a_label_map_gives_the_order_and_the_unused(tmp_path):
    make_voc(tmp_path)
    (tmp_path / "labelmap.txt").write_text(
        "# label:color_rgb:parts:actions\nbackground:0,0,0::\nfox:1,2,3::\ncat:::\nbee:::\nant:::\n"
    )
    data = load_data(tmp_path, strict=True)
    assert data.classes == ("fox", "cat", "bee", "ant")
    assert boxes(data.train)["a"][1] == [2, 3]


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("</bndbox>", "</bndbox><bndbox><xmin>1</xmin></bndbox>", 1),
        lambda text: text.replace("</name>", "</name><name>bee</name>", 1),
        lambda text: text.replace("<xmin>", "<xmin>9</xmin><xmin>", 1),
    ],
)
def test_an_object_with_two_readings_is_a_defect(tmp_path, change):
    make_voc(tmp_path)
    data = replace_a(tmp_path, change(voc_xml(TRAIN[0])))
    assert [(defect.kind, defect.record) for defect in data.defects] == [("malformed record", "object 1")]
    assert data.train.num_boxes == 2


def test_images_without_annotation_are_counted(tmp_path):
    make_voc(tmp_path, {"train": [*TRAIN, *VAL]}, lists=False)
    write_image(tmp_path / "JPEGImages" / "e.jpg", 20, 20)
    assert "1 image has no annotation: not used, e.g. JPEGImages/e.jpg" in load_data(tmp_path).notes


def test_two_images_of_one_name_need_the_file_name(tmp_path):
    make_voc(tmp_path)
    write_image(tmp_path / "JPEGImages" / "a.png", 64, 48)
    assert load_data(tmp_path, strict=True).train.records[0].path.name == "a.jpg"
    data = replace_a(tmp_path, voc_xml(TRAIN[0]).replace("<filename>a.jpg</filename>", ""))
    assert [(defect.kind, defect.skipped) for defect in data.defects] == [("missing file", "image")]


@pytest.mark.parametrize(("corners", "box"), [((3.0, 4.0, 23.0, 34.0), [3, 4, 23, 34]), ((3, 4, 23, 34), [2, 3, 23, 34])])
def test_decimal_points_in_most_boxes_count_from_zero(tmp_path, corners, box):
    write_image(tmp_path / "JPEGImages" / "a.jpg", 64, 48)
    (tmp_path / "Annotations").mkdir()
    (tmp_path / "Annotations" / "a.xml").write_text(annotation(corners))
    sets, notes = read_sets(tmp_path)
    assert sets["train"].records[0].boxes_xyxy.tolist() == [box]
    message = (
        "the corners count from 0: those of 1 of 1 boxes have a decimal point, so they are no numbers of pixels, and 1 is not "
        "subtracted; a file voc.yaml with the line counts_from: 1 (or 0) overrules this"
    )
    assert (message in notes) == isinstance(corners[0], float)


def test_some_boxes_with_decimal_points_count_from_one(tmp_path):
    make_voc(tmp_path)
    assert boxes(replace_a(tmp_path, annotation((3.5, 4, 23, 34))).train)["a"] == ([[2.5, 3, 23, 34]], [0])


@pytest.mark.parametrize("name", ["class_names.txt", "labels.txt"])
def test_names_that_stand_for_no_object_are_no_classes(tmp_path, name):
    (make_voc(tmp_path) / name).write_text("__ignore__\n_background_\ncat\nbee\nant\n")
    assert load_data(tmp_path).classes == ("cat", "bee", "ant")
