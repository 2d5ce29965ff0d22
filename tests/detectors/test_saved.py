import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from detdistill.detectors.adapters import adapter_names, wrap_torchvision
from detdistill.detectors.build import build_detector
from detdistill.detectors.load import load_detector, load_state
from detdistill.detectors.save import installed_versions, save_student
from detdistill.detectors.student_files import load_student
from detdistill.errors import ModelError
from tests.detectors.dense.shared import library_images, randomize_outputs, unequal_batch
from tests.tiny import TinyDense

FCOS = "fcos:resnet10t,channels=16-32-64-128,stem=16,neck=32,levels=3-6,convs=1,score=0.01,dets=20"
RETINANET = "retinanet:resnet10t,width=0.25,neck=32,levels=3-5,convs=2,score=0.01,dets=20"


def detections(detector, batch):
    with torch.no_grad():
        return detector.detect(detector.eval()(batch).prediction, batch)


def build(name):
    """A detector whose statistics and outputs are not the initial ones."""
    torch.manual_seed(3)
    detector = randomize_outputs(build_detector(name, ["apple", "pear", "plum"]))
    detector.train()
    with torch.no_grad():
        detector.features(unequal_batch(seed=1))
    return detector


@pytest.mark.parametrize("name", [FCOS, RETINANET])
def test_a_folder_loads_with_its_script_and_with_this_package(name, tmp_path):
    detector, batch = build(name), unequal_batch()
    expected = detections(detector, batch)
    assert min(map(len, expected)) > 5
    folder = save_student(detector, tmp_path / "student")
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "checksums.json",
        "load_student.py",
        "model.json",
        "model.safetensors",
        "student.json",
    ]
    assert load_file(folder / "model.safetensors").keys() == detector.model.state_dict().keys()

    model = load_student.load(folder)  # the script beside the model; test_export runs it without this package
    with torch.no_grad():
        found = model(library_images(batch))
    labels = model.classes
    assert labels == [None, "apple", "pear", "plum"]
    for mine, theirs in zip(expected, found, strict=True):
        known = theirs["labels"] > 0
        torch.testing.assert_close(theirs["boxes"][known], mine.boxes_xyxy, rtol=0, atol=1e-5 * 128)
        torch.testing.assert_close(theirs["scores"][known], mine.scores, rtol=0, atol=1e-5)
        assert [labels[label] for label in theirs["labels"][known].tolist()] == [
            detector.spec.classes[label] for label in mine.labels.tolist()
        ]

    loaded = load_detector(folder)
    assert loaded.spec == detector.spec
    assert type(loaded) is type(detector)
    for mine, again in zip(expected, detections(loaded, batch), strict=True):
        assert torch.equal(mine.boxes_xyxy, again.boxes_xyxy)
        assert torch.equal(mine.labels, again.labels)
    save_student(loaded, tmp_path / "again")
    assert (tmp_path / "again" / "model.json").read_bytes() == (folder / "model.json").read_bytes()


@pytest.fixture
def student(tmp_path):
    return save_student(build(FCOS), tmp_path / "run" / "student")


def test_a_run_folder_is_its_student(student):
    about = json.loads((student / "student.json").read_text())
    assert about["name"] == FCOS
    assert about["classes"] == ["apple", "pear", "plum"]
    assert about["spec"]["strides"] == [8, 16, 32, 64]
    assert set(about["versions"]) >= {"torch", "torchvision", "timm", "safetensors", "detdistill"}
    assert load_detector(student.parent).spec.name == FCOS
    with pytest.raises(ModelError, match=r"no student in it .*did you mean .*run\?"):
        load_detector(student.parent.parent)


def test_a_checkpoint_is_read_beside_its_student(student):
    detector = load_detector(student)
    state = {f"student.{key}": value + 1 for key, value in detector.state_dict().items()}
    checkpoints = student.parent / "checkpoints"
    checkpoints.mkdir()
    torch.save({"state_dict": {**state, "method.adapters.weight": torch.zeros(1)}}, checkpoints / "best.ckpt")
    loaded = load_detector(checkpoints / "best.ckpt")
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, state[f"student.{key}"]), key
    (checkpoints / "broken.ckpt").write_bytes(b"no checkpoint")
    with pytest.raises(ModelError, match="no readable checkpoint"):
        load_detector(checkpoints / "broken.ckpt")


def test_an_unfinished_run_names_its_model_in_the_config(student, tmp_path):
    detector = load_detector(student)
    run = tmp_path / "unfinished"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text(f"student: '{FCOS}'\n")
    torch.save({"state_dict": {f"student.{k}": v for k, v in detector.state_dict().items()}}, run / "checkpoints" / "last.ckpt")
    with pytest.raises(ModelError, match="classes are unknown"):
        load_detector(run / "checkpoints" / "last.ckpt")
    loaded = load_detector(run / "checkpoints" / "last.ckpt", ["a", "b", "c"])
    assert torch.equal(next(loaded.parameters()), next(detector.parameters()))


def test_class_counts_that_differ_are_named(student):
    with pytest.raises(ModelError, match=r"has 3 classes \(apple, pear, plum\), but 2 are wanted \(red, blue\)"):
        load_detector(student, ["red", "blue"])


def test_another_models_weights_are_refused(student):
    (student / "checksums.json").unlink()  # changed on purpose
    state = load_file(student / "model.safetensors")
    few = dict(list(state.items())[:7])
    save_file(few, student / "model.safetensors")
    with pytest.raises(ModelError, match=rf"matches 7 of {len(state)} keys of fcos:.*is missing"):
        load_detector(student)
    save_file({**state, "extra": torch.zeros(1)}, student / "model.safetensors")
    with pytest.raises(ModelError, match=r"extra is unknown"):
        load_detector(student)
    (student / "model.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(ModelError, match="cannot be read"):
        load_detector(student)


def test_shapes_that_differ_are_named(tmp_path):
    two = build_detector(FCOS, ["a", "b"])
    with pytest.raises(ModelError, match=r"cls_logits\.bias is \[3\], fcos needs \[4\]|cls_logits\.weight is \[3, .*needs \[4, "):
        load_state(build_detector(FCOS, ["a", "b", "c"]).model, two.model.state_dict(), tmp_path / "x.safetensors", "fcos")


def test_broken_descriptions_are_one_line(student):
    (student / "checksums.json").unlink()  # changed on purpose
    (student / "student.json").write_text("{}")
    with pytest.raises(ModelError, match="no 'name' in it"):
        load_detector(student)
    (student / "student.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read as JSON"):
        load_detector(student)


def test_what_cannot_be_loaded(tmp_path):
    with pytest.raises(ModelError, match="is no folder, no file and no model string"):
        load_detector("runs/none")
    (tmp_path / "weights.pth").write_bytes(b"")
    with pytest.raises(ModelError, match="not a checkpoint"):
        load_detector(tmp_path / "weights.pth")
    with pytest.raises(ModelError, match="has no weights, so no classes"):
        load_detector(FCOS)


def test_a_description_calls_nothing_but_torchvision():
    from detdistill.detectors.student_files.load_student import make

    with pytest.raises(ValueError, match="no part of torchvision"):
        make({"call": "os.system", "command": "true"})
    with pytest.raises(ValueError, match="is unknown here"):
        make({"call": "eval"})


def test_files_are_whole_or_not_there(student, monkeypatch):
    before = (student / "model.safetensors").read_bytes()
    detector = build_detector(FCOS, ["apple", "pear", "plum"])

    def half(state, path):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("detdistill.detectors.torchvision.detector.save_file", half)
    with pytest.raises(OSError, match="disk full"):
        save_student(detector, student)
    assert (student / "model.safetensors").read_bytes() == before
    assert not [path for path in student.iterdir() if path.name.startswith(".")]


def test_a_detector_wrapped_in_python_is_not_loaded_by_name(tmp_path):
    save_student(TinyDense(("a", "b")), tmp_path / "tiny")
    (tmp_path / "tiny" / "checksums.json").unlink()
    about = json.loads((tmp_path / "tiny" / "student.json").read_text())
    about["adapter"] = "wrap"
    (tmp_path / "tiny" / "student.json").write_text(json.dumps(about))
    with pytest.raises(ModelError, match="wrapped in Python"):
        load_detector(tmp_path / "tiny")


def test_versions_name_what_is_installed():
    assert installed_versions()["torch"].split("+")[0] == torch.__version__.split("+")[0]


def test_adapters_are_found_by_looking():
    assert {"fcos", "retinanet"} <= set(adapter_names()) & set(adapter_names("wrap_model"))
    with pytest.raises(ModelError, match="no adapter for a Linear"):
        wrap_torchvision(torch.nn.Linear(1, 1), ["a"], "odd")


def test_names_of_version_01_are_still_found():
    from detdistill.detectors import saved

    assert (saved.load_detector, saved.save_student) == (load_detector, save_student)
