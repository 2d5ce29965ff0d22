import numpy as np
import pytest
import torch
from PIL import Image

from detdistill.data.records import DetectionSet, Record
from detdistill.data.transforms import ViewSettings
from detdistill.errors import DataError, ModelError
from detdistill.evaluation import evaluate
from detdistill.structures import Detections
from tests.tiny import TinyDense

SIZES_HW = ((60, 100), (100, 60), (45, 45), (37, 91))


def make_set(folder, classes=("a", "b"), sizes_hw=SIZES_HW, boxes=3):
    """Noise with boxes at odd places; labels go round."""
    generator = np.random.default_rng(0)
    records = []
    for index, (height, width) in enumerate(sizes_hw):
        path = folder / f"{index}.png"
        Image.fromarray(generator.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(path)
        corner = generator.uniform(0, 0.5, (boxes, 2)) * (width, height)
        size = generator.uniform(0.2, 0.45, (boxes, 2)) * (width, height)
        labels = (np.arange(boxes) + index) % len(classes)
        none = np.zeros(boxes, dtype=bool)
        records.append(
            Record(10 + index, path, (height, width), np.concatenate([corner, corner + size], 1), labels, none, size.prod(axis=1))
        )
    return DetectionSet.of("val", "coco", folder, classes, records)


class Oracle(TinyDense):
    """Answers with the boxes of the batch, under its own numbers for the data's classes."""

    def __init__(self, classes, truth):
        super().__init__(classes)
        self.truth = truth

    def detect(self, prediction, batch):
        number = torch.tensor([self.spec.classes.index(name) for name in self.truth])
        return [Detections(t.boxes_xyxy, torch.linspace(0.9, 0.5, len(t)), number[t.labels]) for t in batch.targets]


VIEWS = {
    "letterbox": ViewSettings(size=64, resize="letterbox"),
    "stretch": ViewSettings(size=64, resize="stretch"),
    "short_side": ViewSettings(size=48, resize="short_side", max_size=80),
}


@pytest.mark.parametrize("resize", VIEWS)
def test_boxes_are_compared_in_pixels_of_the_originals(tmp_path, resize):
    data = make_set(tmp_path)
    scores = evaluate(Oracle(("a", "b"), data.classes), data, VIEWS[resize], batch_size=3)
    assert scores.metrics["AP"] == pytest.approx(1.0)
    assert scores.metrics["AR100"] == pytest.approx(1.0)
    assert scores.per_class == pytest.approx({"a": 1.0, "b": 1.0})
    assert scores.images == 4
    assert scores.seconds > 0


def test_sizes_of_objects_are_those_of_the_originals(tmp_path):
    data = make_set(tmp_path, sizes_hw=((300, 400), (400, 300)))  # boxes of 60 .. 180 pixels: none is small
    scores = evaluate(Oracle(("a", "b"), data.classes), data, ViewSettings(size=32))
    assert scores.metrics["APs"] == -1
    assert scores.metrics["APl"] > 0.9


def test_classes_are_matched_by_name_whatever_their_order(tmp_path):
    data = make_set(tmp_path, classes=("a", "b", "c"))
    scores = evaluate(Oracle(("c", "a", "b"), data.classes), data, VIEWS["letterbox"])
    assert scores.metrics["AP"] == pytest.approx(1.0)
    swapped = evaluate(Oracle(("c", "a", "b"), ("b", "a", "c")), data, VIEWS["letterbox"])
    assert swapped.per_class["c"] == pytest.approx(1.0)
    assert max(swapped.per_class["a"], swapped.per_class["b"]) < 0.3


def test_classes_that_the_data_lack_are_left_out(tmp_path):
    class Talkative(Oracle):
        def detect(self, prediction, batch):
            more = super().detect(prediction, batch)
            extra = torch.tensor([[0.0, 0.0, 20.0, 20.0]])
            return [
                Detections(
                    torch.cat([extra, d.boxes_xyxy]),
                    torch.cat([torch.ones(1), d.scores]),
                    torch.cat([torch.zeros(1, dtype=torch.long), d.labels]),
                )
                for d in more
            ]

    data = make_set(tmp_path)
    scores = evaluate(Talkative(("zebra", "b", "a", "car"), data.classes), data, VIEWS["stretch"])
    assert scores.metrics["AP"] == pytest.approx(1.0)
    assert tuple(scores.per_class) == ("a", "b")


def test_an_unknown_class_is_refused_with_both_lists(tmp_path):
    data = make_set(tmp_path, classes=("a", "dog"))
    with pytest.raises(ModelError) as error:
        evaluate(TinyDense(("a", "b")), data, VIEWS["letterbox"])
    assert str(error.value) == ("tinydense:patches does not know 1 of the data's 2 classes (dog of a, dog); it knows 2: a, b")


def test_batch_size_changes_nothing_and_the_mode_comes_back(tmp_path):
    data = make_set(tmp_path)
    detector = TinyDense(data.classes).train()
    scores = [evaluate(detector, data, VIEWS["letterbox"], batch_size=size).metrics for size in (1, 3)]
    assert scores[0] == pytest.approx(scores[1])
    assert detector.training
    assert evaluate(detector.eval(), data, VIEWS["letterbox"]).metrics == pytest.approx(scores[0])
    assert not detector.training


def test_progress_counts_images(tmp_path):
    seen = []
    data = make_set(tmp_path)
    evaluate(
        TinyDense(data.classes), data, VIEWS["letterbox"], batch_size=3, progress=lambda done, all_: seen.append((done, all_))
    )
    assert seen == [(3, 4), (4, 4)]


def test_images_without_boxes_or_detections(tmp_path):
    data = make_set(tmp_path, boxes=0)
    scores = evaluate(Oracle(("a", "b"), data.classes), data, VIEWS["letterbox"])
    assert set(scores.metrics.values()) == {-1.0}


def test_half_precision_gives_boxes_in_full(tmp_path):
    data = make_set(tmp_path)
    scores = evaluate(Oracle(("a", "b"), data.classes), data, VIEWS["letterbox"], precision=torch.bfloat16)
    assert scores.metrics["AP"] == pytest.approx(1.0)


def test_an_image_that_cannot_be_decoded_is_named(tmp_path):
    data = make_set(tmp_path)
    (tmp_path / "2.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"2\.png: the image cannot be decoded"):
        evaluate(TinyDense(data.classes), data, VIEWS["letterbox"])
