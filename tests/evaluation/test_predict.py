import json

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from detdistill.data.transforms import ViewSettings
from detdistill.errors import DataError, RunError
from detdistill.evaluation.drawing import class_colour, draw_boxes
from detdistill.evaluation.image_files import as_pixels, drawing_names, find_images
from detdistill.evaluation.predict import detect_all, predict_folder, predict_image
from detdistill.progress import Progress
from detdistill.structures import Detections
from tests.tiny import TinyDense


class TwoBoxes(TinyDense):
    """Sees a box of class b in the upper left quarter of what it is shown, and surely nothing else."""

    def detect(self, prediction, batch):
        found = []
        for height, width in batch.sizes.tolist():
            boxes = torch.tensor([[0.0, 0.0, width / 2, height / 2], [-9.0, 0.0, width + 9.0, height]])
            found.append(Detections(boxes, torch.tensor([0.8, 0.1]), torch.tensor([1, 0])))
        return found


def bar():
    return Progress(Console(quiet=True)).bar("predict", 1)


def boxes_of(out):
    return json.loads((out / "detections.json").read_text())["annotations"]


def save(path, height, width, colour=(90, 90, 90), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), colour).save(path, **options)
    return path


SETTINGS = ViewSettings(size=64)


@pytest.mark.parametrize("resize", ["letterbox", "stretch", "short_side"])
def test_boxes_are_in_pixels_of_the_image_and_inside_it(resize):
    image = torch.zeros(3, 50, 100, dtype=torch.uint8)
    boxes, scores, labels = predict_image(TwoBoxes().eval(), image, ViewSettings(size=64, resize=resize))
    torch.testing.assert_close(boxes, torch.tensor([[0.0, 0.0, 50.0, 25.0], [0.0, 0.0, 100.0, 50.0]]))
    assert scores.tolist() == pytest.approx([0.8, 0.1])
    assert labels.tolist() == [1, 0]


def test_every_image_is_drawn_and_every_box_above_the_score_is_written(tmp_path):
    images, out = tmp_path / "images", tmp_path / "new" / "out"
    save(images / "first.png", 40, 80)
    save(images / "deep" / "second.jpg", 100, 60)
    found = predict_folder(TwoBoxes().eval(), images, out, SETTINGS, score=0.5, bar=bar())
    assert (found.folder, found.images, found.boxes, found.unreadable, found.left_out) == (out, 2, 2, (), "")
    written = json.loads((out / "detections.json").read_text())
    assert written["images"] == [
        {"id": 1, "file_name": "deep/second.jpg", "width": 60, "height": 100},
        {"id": 2, "file_name": "first.png", "width": 80, "height": 40},
    ]
    assert written["categories"] == [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]
    first, second = written["annotations"]
    assert first["bbox"] == pytest.approx([0, 0, 30, 50])
    assert first["score"] == pytest.approx(0.8)
    assert {**second, "bbox": None, "score": None} == {
        "id": 2, "image_id": 2, "file_name": "first.png", "category_id": 2, "category": "b", "bbox": None, "score": None,
        "area": 800.0, "iscrowd": 0,
    }  # fmt: skip
    assert second["bbox"] == pytest.approx([0, 0, 40, 20])
    drawn = np.asarray(Image.open(out / "first.jpg")).astype(int)
    assert drawn.shape == (40, 80, 3)
    plain = np.abs(drawn - 90).max(axis=2)
    assert plain[19, 20] > 40, "the lower edge of the box"
    assert plain[36:, 55:].max() < 10, "nothing is drawn far from it"
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()) == [
        "deep/second.jpg",
        "detections.json",
        "first.jpg",
    ]


def test_images_without_boxes_are_listed_and_pycocotools_reads_the_file(tmp_path):
    pycocotools = pytest.importorskip("pycocotools.coco")
    save(tmp_path / "images" / "a.png", 40, 80)
    predict_folder(TwoBoxes().eval(), tmp_path / "images", tmp_path / "out", SETTINGS, score=0.9, bar=bar())
    written = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert [len(written[key]) for key in ("images", "annotations")] == [1, 0]
    predict_folder(TwoBoxes().eval(), tmp_path / "images", tmp_path / "out", SETTINGS, score=0.5, bar=bar())
    document = pycocotools.COCO(tmp_path / "out" / "detections.json")
    (annotation,) = document.loadAnns(document.getAnnIds(imgIds=[1]))
    results = document.loadRes(document.dataset["annotations"])
    assert annotation["bbox"] == results.loadAnns([1])[0]["bbox"]
    assert document.loadCats([annotation["category_id"]])[0]["name"] == "b"


def test_broken_images_are_passed_over_and_named(tmp_path):
    images = tmp_path / "images"
    for name in ("a.png", "c.png", "e.png"):
        save(images / name, 40, 80)
    save(images / "whole.jpg", 400, 300)
    (images / "b.jpg").write_bytes((images / "whole.jpg").read_bytes()[:900])
    (images / "d.ico").write_bytes(b"\0\0\1\0\1\0 no icon")
    for threads in (1, 3):
        found = predict_folder(
            TwoBoxes().eval(), images, tmp_path / "out", SETTINGS, score=0.5, bar=bar(), batch=2, threads=threads
        )
        assert found.images == 4
        assert [line.partition(":")[0] for line in found.unreadable] == [str(images / "b.jpg"), str(images / "d.ico")]
        assert "the image cannot be decoded (" in found.unreadable[0]
        written = json.loads((tmp_path / "out" / "detections.json").read_text())
        assert [entry["file_name"] for entry in written["images"]] == ["a.png", "c.png", "e.png", "whole.jpg"]
        assert [entry["id"] for entry in written["images"]] == [1, 3, 5, 6]
        assert [entry["file_name"] for entry in written["unreadable"]] == ["b.jpg", "d.ico"]
        assert (tmp_path / "out" / "e.jpg").exists()


class Counting(TwoBoxes):
    """Keeps the shapes of the batches."""

    def features(self, batch):
        self.shapes = [*getattr(self, "shapes", []), tuple(batch.images.shape)]
        return super().features(batch)


def test_images_of_one_padded_size_share_a_batch_and_find_what_they_find_alone(tmp_path):
    images = [torch.randint(0, 256, (3, height, width), dtype=torch.uint8) for height, width in [(40, 80), (80, 40)] * 3]
    settings = ViewSettings(size=64, resize="short_side")
    detector = Counting(seed=3).eval()
    together = detect_all(detector, images, settings, batch=2)
    assert sorted(detector.shapes) == [(1, 3, 64, 128), (1, 3, 128, 64), (2, 3, 64, 128), (2, 3, 128, 64)]
    for image, found in zip(images, together, strict=True):
        boxes, scores, labels = predict_image(detector, image, settings)
        torch.testing.assert_close(found.boxes_xyxy, boxes)
        torch.testing.assert_close(found.scores, scores)
        assert found.labels.tolist() == labels.tolist()
        assert found.names == ["b", "a"]


def test_few_images_of_many_sizes_are_held_at_a_time():
    images = [torch.zeros(3, 32 + 40 * index, 32, dtype=torch.uint8) for index in range(20)]
    detector = Counting().eval()
    assert len(detect_all(detector, images, ViewSettings(size=32, resize="short_side"), batch=2)) == 20
    assert {shape[0] for shape in detector.shapes} <= {1, 2}


def test_boxes_have_the_colour_of_their_class_and_labels_a_background():
    picture = Image.new("RGB", (200, 100), (90, 90, 90))
    draw_boxes(picture, np.array([[20.0, 40.0, 80.0, 90.0], [120.0, 40.0, 180.0, 90.0]]), [0, 1], ["a 0.90", "b 0.80"])
    pixels = np.asarray(picture)
    first, second = class_colour(0)[0], class_colour(1)[0]
    assert first != second
    assert tuple(pixels[89, 50]) == first
    assert tuple(pixels[89, 150]) == second
    for left, colour in ((20, first), (120, second)):
        label = pixels[26:39, left : left + 45].reshape(-1, 3)
        assert (label == colour).all(axis=1).mean() > 0.4, "the background of the label"
        assert len(np.unique(label, axis=0)) > 3, "and the text on it"


def test_one_image_alone(tmp_path):
    path = save(tmp_path / "one.png", 40, 80)
    predict_folder(TwoBoxes().eval(), path, tmp_path / "out", SETTINGS, score=0.0, bar=bar())
    assert [entry["category"] for entry in boxes_of(tmp_path / "out")] == ["b", "a"]
    assert (tmp_path / "out" / "one.jpg").exists()


def test_images_are_turned_as_their_exif_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by a quarter
    path = save(tmp_path / "turned.jpg", 40, 80, exif=exif)
    predict_folder(TwoBoxes().eval(), path, tmp_path / "out", SETTINGS, score=0.5, bar=bar())
    assert Image.open(tmp_path / "out" / "turned.jpg").size == (40, 80)
    (entry,) = boxes_of(tmp_path / "out")
    assert entry["bbox"] == pytest.approx([0, 0, 20, 40])


def test_no_two_drawings_share_a_name_and_drawings_are_not_drawn_again(tmp_path):
    names = drawing_names([tmp_path / "a.jpg", tmp_path / "a.png", tmp_path / "b.png", tmp_path / "x" / "b.png"], tmp_path)
    assert list(map(str, names)) == ["a.jpg.jpg", "a.png.jpg", "b.jpg", "x/b.jpg"]
    save(tmp_path / "a.png", 40, 40)
    for _ in range(2):
        predict_folder(TwoBoxes().eval(), tmp_path, tmp_path / "out", SETTINGS, score=0.5, bar=bar())
        assert len(boxes_of(tmp_path / "out")) == 1


def test_what_cannot_be_read_is_named(tmp_path):
    def predict(images):
        predict_folder(TwoBoxes().eval(), images, tmp_path / "out", SETTINGS, score=0.5, bar=bar())

    with pytest.raises(DataError, match="nowhere: there is no such file or folder"):
        predict(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: no images in it; give an image"):
        predict(tmp_path / "empty")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG but no more")
    with pytest.raises(DataError, match=r"broken\.png: the image cannot be decoded"):
        predict(tmp_path / "broken.png")
    assert not (tmp_path / "out").exists()


def test_what_is_no_image_is_counted_by_suffix(tmp_path):
    for name in ("a.txt", "b.TXT", "c.heic", "clip.mp4", "LICENSE", ".DS_Store", "._d.png"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError, match=r"no images in it; .*; left out 7 files .*: 2 hidden, 2 \.txt, 1 no suffix"):
        find_images(tmp_path)
    save(tmp_path / "deep" / "d.png", 9, 9)
    save(tmp_path / "e.tga", 9, 9)
    found = find_images(tmp_path)
    assert [path.name for path in found.paths] == ["d.png", "e.tga"]
    assert found.left_out == {".txt": 2, "hidden": 2, "no suffix": 1, ".heic": 1, ".mp4": 1}
    assert "(no video reader is installed; extract the frames into a folder" in str(found)
    with pytest.raises(DataError, match=r"clip\.mp4: no video reader is installed; extract the frames"):
        find_images(tmp_path / "clip.mp4")


def test_images_in_memory_are_read_as_the_same_pixels(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    path = tmp_path / "a.png"
    Image.fromarray(pixels).save(path)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    rgba = np.concatenate([pixels, pixels[..., :1]], axis=2)
    for given in (path, str(path), Image.open(path), pixels, tensor, tensor.float() / 255, rgba):
        assert torch.equal(as_pixels(given), tensor), type(given)
    assert torch.equal(as_pixels(pixels[..., 0]), tensor[:1].expand(3, -1, -1))
    for given, said in (
        (pixels.astype(np.float32), r"array \[20, 30, 3\] of float32 is no image; give uint8"),
        (tensor[None], r"tensor \[1, 3, 20, 30\] is no image; give \[3, h, w\] RGB; give 1 images as a list"),
        (tensor.float(), "floats from 0 to 255 is no image; floats must be in 0..1"),
        (tensor.long(), "tensor of torch.int64 is no image"),
        (3, "a int is no image; give a path"),
    ):
        with pytest.raises(DataError, match=said):
            as_pixels(given)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot write to .*file: .*give another --out"):
        predict_folder(TwoBoxes().eval(), save(tmp_path / "a.png", 9, 9), tmp_path / "file", SETTINGS, score=0.5, bar=bar())
