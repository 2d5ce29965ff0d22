"""A student's folder says its image size, and whoever loads it needs to know nothing else."""

from __future__ import annotations

import json
import re
import shutil
import sys
import warnings

import pytest
import torch
from torchvision.io import write_png

from detdistill.data.transforms import ViewSettings
from detdistill.detectors.build import build_detector
from detdistill.detectors.contract import Detector
from detdistill.detectors.load import trained_resizing
from detdistill.detectors.save import save_student
from detdistill.detectors.student_files import load_student
from detdistill.evaluation.predict import predict_image
from detdistill.structures import Resizing

SHORT = "resnet10t,channels=16-32-64-128,stem=16"
FCOS = f"fcos:{SHORT},neck=32,levels=3-5,convs=1,score=0.001"
ALL_LEVELS = FCOS.replace("levels=3-5,", "")
RCNN = f"faster_rcnn:{SHORT},neck=32,mlp=32,score=0.001"
MASK = f"mask_rcnn:{SHORT},neck=32,mlp=32,score=0.001"
RT_DETR = f"rt_detr:{SHORT},dim=32,heads=2,ffn=32,decoder=1,queries=10,score=0.001"
DETR = f"detr:{SHORT},dim=32,heads=2,ffn=32,encoder=1,decoder=1,queries=10,score=0.001"
SHORT_SIDE = Resizing(96, "short_side", 128)
POLICIES = (Resizing(128, "letterbox"), Resizing(100, "stretch"), Resizing(96, "short_side", 120), Resizing(72, "letterbox"))


def varied(name: str) -> Detector:
    torch.manual_seed(0)
    detector = build_detector(name, ("a `b`\n# c", "d")).eval()
    with torch.no_grad():
        for parameter in detector.parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
    return detector


def picture(height: int = 133, width: int = 87) -> torch.Tensor:
    return torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def as_evaluated(detector, image, resizing):
    return predict_image(detector, image, ViewSettings(**resizing.plain()))


def same_rows(found, expected):
    """Boxes, scores and labels in any order: equal scores have none."""
    rows = [torch.cat([boxes, 100 * scores[:, None], labels[:, None].float()], 1) for boxes, scores, labels in (found, expected)]
    assert len(rows[0]) == len(rows[1]) > 5
    distance = torch.cdist(*rows, p=torch.inf)
    assert max(float(distance.min(dim=side).values.max()) for side in (0, 1)) < 1e-2


@pytest.mark.parametrize(
    ("name", "resizing"),
    [
        *((FCOS, resizing) for resizing in POLICIES),
        (RCNN, POLICIES[0]),
        *((name, Resizing(256, "letterbox")) for name in (ALL_LEVELS, ALL_LEVELS.replace("fcos", "retinanet"))),
        ("ssd:vgg16,score=0.001", Resizing(300, "letterbox")),
    ],
    ids=str,
)
def test_the_loaded_model_resizes_as_evaluation_does(name, resizing, tmp_path):
    """The same pixels, padding and boxes, for uint8 and for floats; scripted too."""
    detector = varied(name)
    detector.export(tmp_path, resizing)
    model = load_student.load(tmp_path)
    assert model.images == resizing.plain()
    image = picture()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # scripting is deprecated, and torchvision announces its form of results
        of_script = torch.jit.script(model)([image])[1][0]
    with torch.no_grad():
        for found in (model([image])[0], model([image / 255])[0], of_script):
            known = found["labels"] > 0
            values = (found["boxes"][known], found["scores"][known], found["labels"][known] - 1)
            same_rows(values, as_evaluated(detector, image, resizing))


def test_sizes_are_those_of_the_views():
    generator = torch.Generator().manual_seed(0)
    for resizing in (*POLICIES, Resizing(33, "short_side")):
        plain = load_student.GeneralizedRCNNTransform(800, 1333, [0.0] * 3, [1.0] * 3)
        transform, views = load_student.Resized(plain, **resizing.plain()), ViewSettings(**resizing.plain())
        for height, width in torch.randint(1, 700, (300, 2), generator=generator).tolist():
            assert transform.resized_hw(height, width) == views.resized_hw(height, width)
        for image in (picture(20, 31), picture(300, 7)):
            batch, _ = transform([image])
            assert tuple(batch.tensors.shape[-2:]) == views.padded_hw([views.resized_hw(*image.shape[-2:])])


def test_targets_and_masks_are_resized_with_the_image():
    plain = load_student.GeneralizedRCNNTransform(800, 1333, [0.0] * 3, [1.0] * 3)
    masks = torch.zeros(1, 40, 20, dtype=torch.uint8)
    masks[:, 10:20, 4:8] = 1
    target = {"boxes": torch.tensor([[4.0, 10.0, 8.0, 20.0]]), "labels": torch.tensor([1]), "masks": masks}
    _, (moved,) = load_student.Resized(plain, 80, "letterbox")([picture(40, 20)], [target])
    assert moved["boxes"].tolist() == [[8, 20, 16, 40]]
    assert torch.equal(moved["masks"][0].nonzero().amin(0), torch.tensor([20, 8]))
    assert moved["masks"].sum() == 4 * masks.sum()
    assert target["boxes"].tolist() == [[4, 10, 8, 20]]


def test_masks_come_back_at_the_size_of_the_given_image(tmp_path):
    varied(MASK).export(tmp_path, POLICIES[0])
    with torch.no_grad():
        found = load_student.load(tmp_path)([picture()])[0]
    assert found["masks"].shape[-2:] == (133, 87)


def test_folders_that_say_nothing_warn_and_keep_images_as_they_are(tmp_path):
    detector, image = varied(FCOS), picture(128, 64)
    detector.export(tmp_path)
    with pytest.warns(UserWarning, match=r"does not say its image size: give images resized as in training"):
        older = load_student.load(tmp_path)
    detector.export(tmp_path, POLICIES[0])
    as_it_is, resizing = load_student.load(tmp_path, resize=False), load_student.load(tmp_path)
    with torch.no_grad():
        boxes = [model([image / 255])[0]["boxes"] for model in (older, as_it_is, resizing)]
    assert torch.equal(boxes[0], boxes[1])
    assert boxes[1].shape != boxes[2].shape or not torch.equal(boxes[1], boxes[2])  # 128 x 64 is padded to a square


@pytest.mark.parametrize(
    ("name", "resizing"),
    [
        (FCOS, POLICIES[0]),
        (DETR, POLICIES[0]),
        (RT_DETR, POLICIES[3]),
        (RT_DETR, POLICIES[1]),
        (DETR, SHORT_SIDE),
    ],
    ids=["fcos", "detr", "rt_detr-letterbox", "rt_detr-stretch", "detr-short_side"],
)
def test_the_readme_of_the_folder_finds_the_objects(name, resizing, tmp_path, monkeypatch):
    """Its lines run as they stand, with the two paths filled in."""
    detector = varied(name)
    folder = save_student(detector, tmp_path / "moved", resizing)
    write_png(picture(128, 96), str(tmp_path / "image.png"))
    text = (folder / "README.md").read_text()
    assert f"{resizing.size} pixels, {resizing.resize}" in text
    assert '    0 "a `b`\\n# c"\n    1 "d"\n' in text
    text = text.replace("path/to/this/folder", str(folder)).replace("image.jpg", str(tmp_path / "image.png"))
    short, code = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len([line for line in short.splitlines() if line.strip()]) <= 5
    space: dict = {}
    exec(short, space)
    assert set(space["found"].names) <= set(detector.spec.classes)
    monkeypatch.setattr("sys.path", [*sys.path])
    space: dict = {}
    exec(code.replace("threshold=0.3", "threshold=0.001"), space)
    sys.modules.pop("load_student", None)
    boxes, scores, labels = as_evaluated(detector, picture(128, 96), resizing)
    found = space["found"]
    assert not any(value.requires_grad for value in found.values())  # else .numpy() fails
    known = torch.tensor([name is not None for name in space["names"]])
    corners = found["boxes"][known].clamp(min=0).minimum(torch.tensor([96.0, 128.0, 96.0, 128.0]))
    names = [detector.spec.classes.index(name) for name in space["names"] if name is not None]
    same_rows((corners, found["scores"][known], torch.tensor(names)), (boxes, scores, labels))


def test_a_moved_folder_knows_its_size_and_an_older_one_does_not(tmp_path):
    folder = save_student(varied(FCOS), tmp_path / "run" / "student", POLICIES[2])
    moved = shutil.move(folder, tmp_path / "elsewhere")
    assert trained_resizing(moved) == POLICIES[2]
    assert trained_resizing("hf:" + str(moved)) == POLICIES[2]
    about = json.loads((moved / "student.json").read_text())
    assert about["images"] == {"size": 96, "resize": "short_side", "max_size": 120}
    assert json.loads((moved / "model.json").read_text())["images"] == about["images"]
    assert trained_resizing(save_student(varied(FCOS), tmp_path / "older" / "student")) is None
    (tmp_path / "older" / "config.yaml").write_text("size: 77\nresize: stretch\n")
    for inside in ("", "student", "checkpoints/best.ckpt"):
        (tmp_path / "older" / "checkpoints").mkdir(exist_ok=True)
        (tmp_path / "older" / "checkpoints" / "best.ckpt").touch()
        assert trained_resizing(tmp_path / "older" / inside) == Resizing(77, "stretch")
    assert trained_resizing("fcos:resnet18") is None
