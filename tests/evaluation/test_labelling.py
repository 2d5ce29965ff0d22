"""``detdistill label``: a COCO data set with scores, and training on it."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from detdistill import api, cli
from detdistill.data.discover import load_data
from detdistill.data.loader import DetectionLoader
from detdistill.data.transforms import ViewSettings
from detdistill.errors import RunError
from detdistill.evaluation.labelling import each_image, label_folder
from detdistill.progress import Progress
from detdistill.structures import Detections

NAMES = ("helmet", "<b>vest</b>")


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images in"
    (folder / "sub").mkdir(parents=True)
    for index, name in enumerate(("a.png", "b.png", "sub/a.png")):
        Image.fromarray(np.full((40, 60, 3), 40 * index + 20, dtype=np.uint8)).save(folder / name)
    (folder / "broken.png").write_bytes(b"no image")
    return folder


def finder(scores):
    """A model that finds a helmet and a vest in each image but the last, with the given scores."""
    boxes = torch.tensor([[10.0, 10, 30, 30], [20, 5, 50, 35]])

    def detect(image):
        count = 0 if image.getpixel((0, 0))[0] == 100 else 2
        return Detections(boxes[:count], torch.tensor(scores)[:count], torch.tensor([0, 1])[:count])

    return detect


def labelled(images, out, scores=(0.9, 0.4), score=0.3, review=10):
    from functools import partial

    with Progress(quiet=True) as progress:
        detect = partial(each_image, finder(scores), NAMES)
        return label_folder(detect, "a model", NAMES, images, out, score=score, review=review, bar=progress.bar("label", 1))


def test_data_set_with_scores(images, tmp_path):
    found = labelled(images, tmp_path / "out")
    assert (found.images, found.boxes, len(found.unreadable)) == (3, {"helmet": 2, NAMES[1]: 2}, 1)
    assert repr(found) == f"Labelled(4 boxes on 3 images, 1 image unreadable; {tmp_path / 'out'})"
    document = json.loads((tmp_path / "out/annotations/instances_train.json").read_text())
    assert [one["file_name"] for one in document["images"]] == ["a.png", "b.png", "sub/a.png"]
    assert document["annotations"][1]["bbox"] == [20, 5, 30, 30]
    assert [one["score"] for one in document["annotations"]] == pytest.approx([0.9, 0.4] * 2)
    splits = load_data(str(tmp_path / "out"))
    assert "train: 4 boxes have a score below 1: each counts as much as its score in the training" in splits.notes
    records = [*splits.train.records, *splits.val.records]
    assert sorted(len(record) for record in records) == [0, 2, 2]
    assert next(record for record in records if len(record)).scores.tolist() == pytest.approx([0.9, 0.4])
    assert splits.defects == ()


def test_scores_reach_the_batch_through_every_view(images, tmp_path):
    labelled(images, tmp_path / "out")
    splits = load_data(str(tmp_path / "out"))
    again = load_data(str(tmp_path / "out"))  # from the kept scan
    assert again.train.fingerprint == splits.train.fingerprint
    for settings in (ViewSettings(size=64), ViewSettings(size=64, mosaic=1.0), ViewSettings(size=64, scale_jitter=(0.5, 2.0))):
        loader = DetectionLoader(again.train, settings, 2, train=True, workers=0)
        for batch in loader:
            for target in batch.targets:
                if target.scores is not None:
                    assert len(target.scores) == len(target)
                    assert set(np.round(target.scores.tolist(), 3)) <= {0.9, 0.4}
        assert any(target.scores is not None and len(target) for target in batch.targets)


def test_fingerprint_depends_on_scores_only_if_there_are_any(images, tmp_path):
    prints = []
    for place, scores in enumerate(((0.9, 0.4), (0.9, 0.5), (1.0, 1.0))):
        labelled(images, tmp_path / str(place), scores)
        prints.append(load_data(str(tmp_path / str(place))).train)
    assert len({one.fingerprint for one in prints}) == 3
    assert all(record.scores is None for record in prints[2].records)
    file = tmp_path / "2/annotations/instances_train.json"
    document = json.loads(file.read_text())
    for one in document["annotations"]:
        del one["score"]
    file.write_text(json.dumps(document))
    assert load_data(str(tmp_path / "2")).train.fingerprint == prints[2].fingerprint


@pytest.mark.parametrize("score", [97, -0.1, "0.9", True])
def test_scores_that_are_none_are_defects(images, tmp_path, score):
    labelled(images, tmp_path / "out")
    file = tmp_path / "out/annotations/instances_train.json"
    document = json.loads(file.read_text())
    document["annotations"][0]["score"] = score
    file.write_text(json.dumps(document))
    splits = load_data(str(tmp_path / "out"))
    (defect,) = splits.defects
    assert (defect.kind, defect.skipped) == ("malformed score", "nothing")
    assert defect.message == f"score is {score!r}, not a number from 0 to 1; the box counts fully"


def test_page(images, tmp_path):
    labelled(images, tmp_path / "out", review=1)
    page = (tmp_path / "out/review.html").read_text()
    assert "<b>vest</b>" not in page
    assert page.count("<figure>") == 1
    assert 'data-score="0.4000"' in page
    assert "3 images, boxes with a score of at least 0.3. Shown are 1 images" in page


def test_nothing_is_written_without_boxes_or_into_a_full_folder(images, tmp_path):
    with pytest.raises(RunError, match=r"a model: no box of helmet, <b>vest</b> with a score of 0.95 or more; lower --score"):
        labelled(images, tmp_path / "out", score=0.95)
    assert not (tmp_path / "out").exists()
    with pytest.raises(RunError, match="exists; give another --out"):
        labelled(images, images)


def test_the_command_with_a_detector(tmp_path, capsys):
    model = "fcos:resnet10t,channels=8-8-8-8,stem=8,neck=32,levels=3-4,convs=1,score=0"
    data = "digits:train=8,val=4,size=64,seed=0"
    common = ["--data", data, "--size", "64", "--batch", "4", "--device", "cpu"]
    cli.main(["train", "--model", model, "--out", str(tmp_path / "run"), "--steps", "1", "--report", "false", *common])
    from detdistill.data.digits import digits_folder

    images = next(
        path for path in digits_folder(train=8, val=4, size=64, seed=0).rglob("*") if path.suffix in (".jpg", ".png")
    ).parent
    words = ["label", "--teacher", str(tmp_path / "run"), "--images", str(images), "--score", "0.001"]
    cli.main([*words, "--classes", "3,7", "--out", str(tmp_path / "out")])
    assert "look through it" in capsys.readouterr().out
    splits = load_data(str(tmp_path / "out"))
    assert splits.classes == ("3", "7")
    assert all(record.scores is not None for record in splits.train.records if len(record))
    with pytest.raises(RunError, match="does not know 'nine'; its classes: 0, 1, 2, 3, 4, 5 and 4 more"):
        api.label(tmp_path / "run", images, tmp_path / "other", classes=["nine"])
    # Training on the labels, whose boxes weigh next to nothing.
    again = ["--data", str(tmp_path / "out"), "--size", "64", "--batch", "4", "--device", "cpu"]
    cli.main(["train", "--model", model, "--out", str(tmp_path / "again"), "--steps", "1", "--report", "false", *again])
