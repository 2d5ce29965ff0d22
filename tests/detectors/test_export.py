"""An exported folder works without this package: every adapter's, loaded in one process that cannot import it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from detdistill.detectors.adapters import adapter, adapter_names
from detdistill.detectors.build import build_detector
from detdistill.detectors.contract import Detector
from detdistill.detectors.load import load_detector
from detdistill.detectors.probe import tiny_name
from detdistill.detectors.save import save_student
from detdistill.structures import Batch, Detections, Target, View

CLASSES = ("apple", "pear", "plum")
SIZES = ((64, 192), (192, 128))
"""Multiples of 64: transformers' LW-DETR refuses others (its hybrid encoders ask for 32). And P7 has more than one cell, without
which GroupNorm of 32 groups refuses a single image of 32 channels."""
NAMES = [name for name in adapter_names() if getattr(adapter(name), "TINY", "") is not None]

ALONE = '''
import importlib.util, json, sys, traceback
from pathlib import Path

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "detdistill":
            raise ImportError("detdistill must not be needed")

sys.meta_path.insert(0, Refuse())
import torch
from safetensors.torch import load_file

def by_script(folder):
    spec = importlib.util.spec_from_file_location(f"load_{folder.name}", folder / "load_student.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    model = script.load(folder)
    return lambda image, score: model([image.float() / 255])[0], model.classes

def by_transformers(folder):
    from transformers import AutoImageProcessor, AutoModelForObjectDetection
    model = AutoModelForObjectDetection.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    def detect(image, score):
        outputs = model(**processor(images=image, return_tensors="pt"))
        return processor.post_process_object_detection(outputs, threshold=score, target_sizes=[image.shape[-2:]])[0]
    return detect, model.config.id2label

def by_yolo(folder):
    about = json.loads((folder / "network.json").read_text())
    return (by_libreyolo if "family" in about["description"] else by_ultralytics)(folder, about)

def by_libreyolo(folder, about):
    from libreyolo.postprocess.yolox import postprocess
    code = next(block for block in (folder / "README.md").read_text().split("```") if "import LibreYOLOXModel" in block)
    made = {}
    exec(code.removeprefix("python").replace("path/to/this/folder", str(folder)), made)
    options = about["options"]
    def detect(image, score):
        size = image.shape[-2:]
        outputs = made["model"](image[None].float().flip(1))
        found = postprocess(outputs, options["score"], options["iou"], size, (size[1], size[0]), max_det=options["dets"])
        return dict(zip(FIELDS, (torch.tensor(found[key]) for key in ("boxes", "scores", "classes"))))
    return detect, dict(enumerate(about["names"]))

def by_ultralytics(folder, about):
    from ultralytics.nn.tasks import DetectionModel
    from ultralytics.utils.nms import non_max_suppression
    model = DetectionModel(about["description"], nc=len(about["names"]), verbose=False).eval()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    def detect(image, score):
        options = about["options"]
        found = non_max_suppression(
            model(image[None].float() / 255), options["score"], options["iou"], multi_label=True, max_det=options["dets"]
        )[0]
        return {"boxes": found[:, :4], "scores": found[:, 4], "labels": found[:, 5].long()}
    return detect, dict(enumerate(about["names"]))

FIELDS = ("boxes", "scores", "labels")

def rows(boxes, scores, labels):
    """[D, 6]: within 1e-3 are pixels to 1e-3, scores to 1e-5, equal labels."""
    return torch.cat([boxes, 100 * scores[:, None], labels[:, None].to(boxes.dtype)], dim=1)

@torch.no_grad()
def check(folder, classes, score):
    loaders = {"load_student.py": by_script, "network.json": by_yolo, "config.json": by_transformers}
    detect, names = next(load for file, load in loaders.items() if (folder / file).is_file())(folder)
    expected = load_file(folder.with_suffix(".safetensors"))
    for number, image in load_file(folder.parent / "images.safetensors").items():
        found = detect(image, score)
        if names[0] is None:  # torchvision's background, which its one-stage detectors have a useless output for
            found = {key: value[found["labels"] > 0] for key, value in found.items()}
        size = torch.tensor([image.shape[2], image.shape[1]]).repeat(2)
        boxes = torch.minimum(found["boxes"].clamp(min=0), size)
        labels = torch.tensor([classes.index(names[label]) for label in found["labels"].tolist()])
        mine, theirs = rows(boxes, found["scores"], labels), rows(*(expected[f"{field}{number}"] for field in FIELDS))
        assert len(mine) == len(theirs), f"image {number}: {len(mine)} detections, expected {len(theirs)}"
        distance = torch.cdist(mine, theirs, p=torch.inf)  # whatever their order: equal scores have none
        for side in (0, 1):
            furthest = float(distance.min(dim=side).values.max())
            assert furthest < 1e-3, f"image {number}: a detection differs by {furthest:.1e}"
        assert ("masks" in found) == (f"masks{number}" in expected)
        if "masks" in found:
            torch.testing.assert_close(found["masks"][distance.argmin(dim=0)], expected[f"masks{number}"], rtol=0, atol=1e-4)

failures = {}
for name, about in json.loads(Path("about.json").read_text()).items():
    try:
        check(Path(name).absolute(), **about)
    except Exception as error:
        failures[name] = traceback.format_exc()
assert not [name for name in sys.modules if name.split(".")[0] == "detdistill"]
Path("failures.json").write_text(json.dumps(failures))
'''


def test_every_exported_folder_loads_without_this_package(tmp_path):
    """torchvision's form through ``load_student.py``, transformers' with its auto classes; same boxes, scores, names."""
    images, about = pixels(), {}
    save_file({str(number): image for number, image in enumerate(images)}, tmp_path / "images.safetensors")
    for name in NAMES:
        detector = varied(name)
        save_student(detector, tmp_path / name)
        expected: dict[str, torch.Tensor] = {}
        for number, image in enumerate(images):
            found = detections(detector, image)
            assert len(found) > 5, name
            fields = {"boxes": found.boxes_xyxy, "scores": found.scores, "labels": found.labels}
            if detector.spec.needs_masks:
                with torch.no_grad():
                    fields["masks"] = detector.model([image.float() / 255])[0]["masks"]
            expected |= {f"{field}{number}": value.contiguous() for field, value in fields.items()}
        save_file(expected, tmp_path / f"{name}.safetensors")
        about[name] = {"classes": CLASSES, "score": SCORE}
    (tmp_path / "about.json").write_text(json.dumps(about))
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", ALONE], check=True, cwd=tmp_path, env=offline, timeout=300)
    failures = json.loads((tmp_path / "failures.json").read_text())
    assert not failures, "\n".join(f"{name}: {trace}" for name, trace in failures.items())


@pytest.mark.parametrize("name", NAMES)
def test_an_exported_folder_loads_with_this_package(name, tmp_path):
    """The same detector: kind, spec and detections; and saving it again writes the same description."""
    detector = varied(name)
    folder = save_student(detector, tmp_path / "student")
    loaded = load_detector(folder).eval()
    assert loaded.spec == detector.spec
    assert type(loaded) is type(detector)
    for image in pixels():
        mine, again = detections(detector, image), detections(loaded, image)
        torch.testing.assert_close(again.boxes_xyxy, mine.boxes_xyxy, rtol=0, atol=1e-4)
        torch.testing.assert_close(again.scores, mine.scores, rtol=0, atol=1e-6)
        assert torch.equal(mine.labels, again.labels)
    save_student(loaded, tmp_path / "again")
    for file in {"model.json", "student.json"} & {path.name for path in folder.iterdir()}:
        assert (tmp_path / "again" / file).read_bytes() == (folder / file).read_bytes()


SCORE = 0.001


def varied(name: str) -> Detector:
    """An adapter's tiny model whose weights and statistics are not the initial ones, in eval mode."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        detector = build_detector(f"{tiny_name(name)},score={SCORE}", CLASSES).train()
        for parameter in detector.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        for key, parameter in detector.named_parameters():  # YOLOX's scores are products, which begin at 0.0001
            if ("obj_preds" in key or "cls_preds" in key) and key.endswith("bias"):
                parameter += 4.0
        detector.features(batch_of(torch.stack([image[:, :64, :64] for image in pixels(seed=1)])))
    return detector.eval()


def pixels(seed: int = 0) -> list[torch.Tensor]:
    """Two images, [3, H, W] uint8."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8) for size in SIZES]


def batch_of(images: torch.Tensor) -> Batch:
    """Images [B, 3, H, W] uint8 of one size, without boxes."""
    count, size = len(images), (images.shape[2], images.shape[3])
    nothing = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool))
    views = (View(size, size),) * count
    return Batch(images.float() / 255, torch.tensor([size] * count), (nothing,) * count, tuple(range(count)), views)


@torch.no_grad()
def detections(detector: Detector, image: torch.Tensor) -> Detections:
    """What it finds on one image."""
    batch = batch_of(image[None])
    (found,) = detector.detect(detector.predict(detector.features(batch), batch), batch)
    return found


def test_folders_hold_what_they_say(tmp_path):
    """The script beside torchvision's form; own models bring their files along; transformers' form has its processor."""
    for name, files in (
        ("fcos", {"load_student.py", "model.json", "model.safetensors", "student.json"}),
        ("atss", {"load_student.py", "model.json", "model.safetensors", "student.json", "models"}),
        ("detr", {"config.json", "model.safetensors", "preprocessor_config.json", "student.json"}),
    ):
        folder = save_student(varied(name), tmp_path / name)
        assert {path.name for path in folder.iterdir()} == files | {"README.md", "checksums.json"}
    assert {path.name for path in (tmp_path / "atss" / "models").iterdir()} >= {"__init__.py", "atss.py", "dense.py"}
