import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from detdistill.data.transforms import ViewSettings
from detdistill.errors import DataError, RunError
from detdistill.evaluation.predict import drawing_names, predict_folder, predict_image
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
    predict_folder(TwoBoxes().eval(), images, out, SETTINGS, score=0.5, bar=bar())
    written = json.loads((out / "detections.json").read_text())
    assert [(Path(entry["file"]).name, entry["class"]) for entry in written] == [("second.jpg", "b"), ("first.png", "b")]
    assert written[0]["bbox"] == pytest.approx([0, 0, 30, 50])
    assert written[1]["bbox"] == pytest.approx([0, 0, 40, 20])
    assert written[1]["score"] == pytest.approx(0.8)
    drawn = np.asarray(Image.open(out / "first.jpg")).astype(int)
    assert drawn.shape == (40, 80, 3)
    plain = np.abs(drawn - 90).max(axis=2)
    assert plain[19, 20] > 40, "the lower edge of the box"
    assert plain[30:, 50:].max() < 10, "nothing is drawn far from it"
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()) == [
        "deep/second.jpg",
        "detections.json",
        "first.jpg",
    ]


def test_one_image_alone(tmp_path):
    path = save(tmp_path / "one.png", 40, 80)
    predict_folder(TwoBoxes().eval(), path, tmp_path / "out", SETTINGS, score=0.0, bar=bar())
    assert [entry["class"] for entry in json.loads((tmp_path / "out" / "detections.json").read_text())] == ["b", "a"]
    assert (tmp_path / "out" / "one.jpg").exists()


def test_images_are_turned_as_their_exif_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by a quarter
    path = save(tmp_path / "turned.jpg", 40, 80, exif=exif)
    predict_folder(TwoBoxes().eval(), path, tmp_path / "out", SETTINGS, score=0.5, bar=bar())
    assert Image.open(tmp_path / "out" / "turned.jpg").size == (40, 80)
    (entry,) = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert entry["bbox"] == pytest.approx([0, 0, 20, 40])


def test_no_two_drawings_share_a_name_and_drawings_are_not_drawn_again(tmp_path):
    names = drawing_names([tmp_path / "a.jpg", tmp_path / "a.png", tmp_path / "b.png", tmp_path / "x" / "b.png"], tmp_path)
    assert list(map(str, names)) == ["a.jpg.jpg", "a.png.jpg", "b.jpg", "x/b.jpg"]
    save(tmp_path / "a.png", 40, 40)
    for _ in range(2):
        predict_folder(TwoBoxes().eval(), tmp_path, tmp_path / "out", SETTINGS, score=0.5, bar=bar())
        assert len(json.loads((tmp_path / "out" / "detections.json").read_text())) == 1


def test_what_cannot_be_read_is_named(tmp_path):
    def predict(images):
        predict_folder(TwoBoxes().eval(), images, tmp_path / "out", SETTINGS, score=0.5, bar=bar())

    with pytest.raises(DataError, match="nowhere: there is no such file or folder"):
        predict(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: no images in it"):
        predict(tmp_path / "empty")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG but no more")
    with pytest.raises(DataError, match=r"broken\.png: the image cannot be decoded"):
        predict(tmp_path / "broken.png")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot write to .*file: .*give another --out"):
        predict_folder(TwoBoxes().eval(), save(tmp_path / "a.png", 9, 9), tmp_path / "file", SETTINGS, score=0.5, bar=bar())
