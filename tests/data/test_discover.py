import re
import time
from pathlib import Path

import pytest

from detdistill.data import discover
from detdistill.data.discover import load_data
from detdistill.errors import DataError
from tests.data.forms import Picture, make_coco, make_voc, make_yolo, write_image, write_json


@pytest.mark.parametrize(("make", "form"), [(make_coco, "coco"), (make_yolo, "yolo"), (make_voc, "voc")])
def test_a_lone_folder_is_entered(tmp_path, make, form):
    make(tmp_path / "archive" / "inner")
    (tmp_path / "archive" / "__MACOSX").mkdir()
    data = load_data(tmp_path / "archive")
    assert (data.train.form, data.train.root) == (form, tmp_path / "archive" / "inner")


def test_names_do_not_decide(tmp_path):
    make_yolo(tmp_path / "coco")
    (tmp_path / "coco" / "data.yaml").rename(tmp_path / "coco" / "COCO_annotations.yml")
    (tmp_path / "coco" / "package.json").write_text('{"name": "not data"}')
    assert load_data(str(tmp_path / "coco")).train.form == "yolo"


def test_a_relative_path_is_the_same_data(tmp_path, monkeypatch):
    fingerprint = load_data(make_yolo(tmp_path / "d")).train.fingerprint
    monkeypatch.chdir(tmp_path)
    assert load_data("d").train.fingerprint == fingerprint


def test_a_wrong_path_names_the_nearest(tmp_path):
    (tmp_path / "dataset").mkdir()
    with pytest.raises(DataError, match=r"datset: there is no such file or folder \(did you mean 'dataset'\?\)"):
        load_data(tmp_path / "datset")


def test_no_known_form_says_what_was_looked_for_and_found(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    expected = "no data set of a known form; looked for COCO JSON (annotations/*.json"
    with pytest.raises(DataError, match=re.escape(expected) + r".*; found images/, labels/, notes.txt"):
        load_data(tmp_path)
    with pytest.raises(DataError, match=r"notes.txt: neither a COCO JSON file nor a YOLO data.yaml"):
        load_data(tmp_path / "notes.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="found nothing"):
        load_data(tmp_path / "empty")


def test_two_forms_in_one_folder_are_an_error(tmp_path):
    make_coco(tmp_path)
    make_yolo(tmp_path)
    with pytest.raises(DataError, match=r"exist in 2 forms; pass the path of one: .*data.yaml, .*instances_train2017.json"):
        load_data(tmp_path)
    assert load_data(tmp_path / "data.yaml").train.form == "yolo"
    assert load_data(tmp_path / "annotations" / "instances_train2017.json").train.form == "coco"


def test_several_yolo_files_are_an_error(tmp_path):
    make_yolo(tmp_path)
    (tmp_path / "other.yaml").write_text((tmp_path / "data.yaml").read_text())
    with pytest.raises(DataError, match=r"several YOLO files, data.yaml, other.yaml; pass the path of one"):
        load_data(tmp_path)


def test_train_is_required(tmp_path):
    make_coco(tmp_path, {"val2017": [Picture("a", 20, 20)], "test2017": [Picture("b", 20, 20)]})
    with pytest.raises(DataError, match="no train split, only val, test"):
        load_data(tmp_path)


def test_no_usable_box_is_an_error(tmp_path):
    make_coco(tmp_path, {"train": [Picture("a", 20, 20, [("ant", 5, 5, 5, 9)])], "val": [Picture("b", 20, 20)]})
    with pytest.raises(DataError, match=r"no usable box in the 1 training images \(1 defect\)"):
        load_data(tmp_path)


def test_digits_takes_settings(tmp_path, monkeypatch):
    monkeypatch.setenv("DETDISTILL_CACHE", str(tmp_path))
    data = load_data("digits:train=6,val=3,size=64,seed=1", strict=True)
    assert (len(data.train), len(data.val), data.classes[3]) == (6, 3, "3")
    assert data.train.records[0].size_hw == (64, 64)
    with pytest.raises(DataError, match=r"'trian=6' is not a setting \(did you mean 'train'\?\)"):
        load_data("digits:trian=6")
    with pytest.raises(DataError, match="'train=many' is not a setting"):
        load_data("digits:train=many")


def test_only_headers_are_read(tmp_path, monkeypatch):
    from PIL import ImageFile

    def refuse(self):
        raise AssertionError("decoded")

    make_coco(tmp_path)
    monkeypatch.setattr(ImageFile.ImageFile, "load", refuse)
    assert len(load_data(tmp_path, strict=True).train) == 3


def test_five_thousand_images_take_seconds(tmp_path):
    # One file with many names: what counts is the reading, not the disk.
    make_voc(tmp_path, {"train": [Picture("p0", 64, 64, [("ant", 1, 1, 9, 9)] * 5)]})
    image, text = tmp_path / "JPEGImages" / "p0.jpg", (tmp_path / "Annotations" / "p0.xml").read_text()
    for index in range(1, 5000):
        (tmp_path / "JPEGImages" / f"p{index}.jpg").hardlink_to(image)
        (tmp_path / "Annotations" / f"p{index}.xml").write_text(text)
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_text("\n".join(f"p{index}" for index in range(5000)))
    begin = time.perf_counter()
    assert len(load_data(tmp_path).train) == 4500
    assert time.perf_counter() - begin < 30


def test_many_coco_images_take_seconds(tmp_path):
    # Twice the images may not take four times as long: the reading is linear.
    image = write_image(tmp_path / "train" / "000.png", 64, 48)
    content = {"images": [], "annotations": [], "categories": [{"id": 5, "name": "ant"}]}
    for index in range(10_000):
        content["images"].append({"id": index, "file_name": f"{index}.png", "width": 64, "height": 48})
        content["annotations"].append({"id": index, "image_id": index, "category_id": 5, "bbox": [1, 2, 3, 4]})
        (tmp_path / "train" / f"{index}.png").hardlink_to(image)
    write_json(tmp_path / "annotations" / "instances_train.json", content)
    begin = time.perf_counter()
    assert len(load_data(tmp_path).train) == 9000
    assert time.perf_counter() - begin < 30


def test_every_module_knows_its_own_form_only(tmp_path):
    assert [function(make_voc(tmp_path / "v")) for function in (discover.find_yolo, discover.find_coco)] == [None, []]
    assert [function(make_yolo(tmp_path / "y")) for function in (discover.find_coco, discover.find_voc)] == [[], None]
    assert [function(make_coco(tmp_path / "c")) for function in (discover.find_yolo, discover.find_voc)] == [None, None]


CVAT = '<annotations><image id="0" name="a.png" width="64" height="64"><box label="cat" xtl="5" ytl="5"/></image></annotations>'


@pytest.mark.parametrize(
    ("name", "content", "form"),
    [
        ("annotations.xml", CVAT, "CVAT for images XML"),
        ("Annotations/a.xml", CVAT, "CVAT for images XML"),
        ("images/a.json", '{"version": "5", "shapes": [], "imagePath": "a.png"}', "labelme JSON"),
        ("tasks.json", '[{"id": 1, "annotations": [{"id": 2, "completed_by": 1}]}]', "Label Studio JSON"),
        ("via.json", '{"_via_settings": {}}', "VGG Image Annotator JSON"),
        ("a.json", '[{"image": "a.png", "annotations": [{"label": "x", "coordinates": {}}]}]', "CreateML JSON"),
        ("results.json", '[{"image_id": 1, "category_id": 2, "bbox": [1, 2, 3, 4]}]', "COCO results"),
        ("label_2/0.txt", "Car 0.00 0 -1.58 587.01 173.33 614.12 200.12 1.65 1.67 3.64 -0.65 1.71 46.70 -1.59", "KITTI"),
        ("boxes.csv", "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax\n", "Open Images CSV"),
        ("labels.csv", "filename,width,height,class,xmin,ymin,xmax,ymax\n", "a table of boxes (CSV)"),
    ],
)
def test_other_forms_are_named(tmp_path, name, content, form):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(content)
    write_image(tmp_path / "images" / "a.png", 64, 64)
    with pytest.raises(DataError, match=re.escape(f"{name} is {form}")):
        load_data(tmp_path)


def test_the_way_from_labelme_is_told_and_is_that_of_the_page(tmp_path):
    """Without the flags, images without objects are left out, and classes may have other numbers in the next conversion."""
    (tmp_path / "a.json").write_text('{"version": "5", "shapes": [], "imagePath": "a.png"}')
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    flags = "--output_dir yolo --include_background --deterministic_labels`"
    assert flags.strip("`").replace("yolo ", "yolo/ ") in page
    with pytest.raises(DataError, match=re.escape(f"`labelme2yolo --json_dir FOLDER {flags}, and pass yolo")):
        load_data(tmp_path)


def test_cvat_beside_coco_is_no_second_form(tmp_path):
    make_coco(tmp_path)
    (tmp_path / "annotations.xml").write_text(CVAT)
    assert load_data(tmp_path, strict=True).train.form == "coco"
