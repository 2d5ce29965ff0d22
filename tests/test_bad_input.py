"""Every way to give bad input that we know: one clear line, exit code 2, and nothing half-written."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from detdistill import cli
from detdistill.detectors.build import build_detector
from detdistill.detectors.save import save_student
from tests.data.forms import TRAIN, VAL, Picture, make_coco

MODEL = "fcos:resnet10t,channels=16-16-16-16,stem=8,neck=32,levels=3-4,convs=1"
DIGITS = "digits:train=24,val=8,size=64,seed=0"
QUICK = ["--size", "64", "--batch", "4", "--device", "cpu", "--threads", "1", "--epochs", "1", "--report", "false"]


@pytest.fixture
def refused(capsys, tmp_path):
    """The one line on stderr of a run that cannot be; its folder must not have come to be."""

    def call(verb, *arguments, out=None):
        folder = out or tmp_path / "run"
        with pytest.raises(SystemExit) as ended:
            cli.main([verb, *map(str, arguments), *QUICK, "--out", str(folder)])
        assert ended.value.code == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert not any("Traceback" in line for line in lines)
        assert out is not None or not folder.exists()
        return lines[-1]

    return call


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A saved detector of the ten digits and what else they are called."""
    from detdistill.data.discover import load_data

    classes = load_data(DIGITS).train.classes
    return save_student(build_detector(MODEL, classes), tmp_path_factory.mktemp("saved") / "student")


# ---------------------------------------------------------------------------------------------------------------- data


def test_a_path_that_is_wrong(refused, tmp_path):
    (tmp_path / "coco").mkdir()
    line = refused("train", "--model", MODEL, "--data", tmp_path / "cocco")
    assert line == f"detdistill: {tmp_path}/cocco: there is no such file or folder (did you mean 'coco'?)"


def test_data_of_no_known_form(refused, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "readme.txt").write_text("nothing")
    line = refused("train", "--model", MODEL, "--data", tmp_path / "data")
    assert "data: no data set of a known form; looked for COCO JSON" in line
    assert "found readme.txt" in line


def test_a_truncated_annotation_file(refused, tmp_path):
    root = make_coco(tmp_path / "data")
    file = root / "annotations" / "instances_train2017.json"
    file.write_text(file.read_text()[:-40])
    line = refused("train", "--model", MODEL, "--data", root)
    assert "instances_train2017.json" in line
    assert "JSON" in line


def test_no_box_at_all(refused, tmp_path):
    root = make_coco(tmp_path / "data", {"train2017": [Picture("a", 64, 48), Picture("b", 64, 48)], "val2017": VAL})
    line = refused("train", "--model", MODEL, "--data", root)
    assert "no usable box in the 2 training images (no defects); there is nothing to learn from" in line


def test_strict_data_with_a_defect(refused, tmp_path):
    root = make_coco(tmp_path / "data", {"train2017": [*TRAIN, Picture("e", 32, 32, [("ant", 9, 9, 9, 20)])], "val2017": VAL})
    line = refused("train", "--model", MODEL, "--data", root, "--strict")
    assert "1 defect; the first: annotations/instances_train2017.json" in line


def test_an_image_that_cannot_be_decoded_stops_training_with_its_name(refused, tmp_path):
    root = make_coco(tmp_path / "data")
    image = root / "train2017" / "b.jpg"
    image.write_bytes(image.read_bytes()[:-400])  # the head with the size is whole
    line = refused("train", "--model", MODEL, "--data", root, out=tmp_path / "run")
    assert f"{image}: the image cannot be decoded" in line
    assert not (tmp_path / "run" / "summary.json").exists()


# -------------------------------------------------------------------------------------------------------------- models


def test_names_of_models(refused):
    assert "unknown detector 'fcoss' (did you mean 'fcos'?)" in refused("train", "--model", "fcoss:resnet10t", "--data", DIGITS)
    assert "fcos has no option 'nek' (did you mean 'neck'?); it has: " in refused(
        "train", "--model", "fcos:resnet10t,nek=3", "--data", DIGITS
    )
    assert "expected detector:backbone" in refused("train", "--model", "fcos", "--data", DIGITS)
    assert "resnet10tt" in refused("train", "--model", "fcos:resnet10tt", "--data", DIGITS)


def test_a_teacher_that_is_not_there(refused, tmp_path):
    line = refused("distill", "--teacher", tmp_path / "nowhere", "--student", MODEL, "--data", DIGITS)
    assert "is no folder, no file and no model string" in line
    (tmp_path / "empty").mkdir()
    line = refused("distill", "--teacher", tmp_path / "empty", "--student", MODEL, "--data", DIGITS)
    assert "no student in it (student/student.json is missing)" in line


def test_a_checkpoint_with_another_number_of_classes(refused, tmp_path):
    folder = save_student(build_detector(MODEL, ("a", "b")), tmp_path / "student")
    line = refused("distill", "--teacher", folder, "--student", MODEL, "--data", DIGITS)
    assert "has 2 classes (a, b), but 10 are wanted" in line


def test_a_checkpoint_of_another_model_says_how_many_keys_match(refused, tmp_path, student):
    run = tmp_path / "other"
    detector = build_detector(MODEL, [str(digit) for digit in range(10)])
    save_student(detector, run / "student")
    own = detector.state_dict()
    some = dict(list(own.items())[:3])
    (run / "checkpoints").mkdir()
    state = {f"student.{name}": value for name, value in some.items()} | {"student.foreign": torch.zeros(1)}
    torch.save({"state_dict": state}, run / "checkpoints" / "best.ckpt")
    line = refused("distill", "--teacher", run / "checkpoints" / "best.ckpt", "--student", MODEL, "--data", DIGITS)
    assert f"matches 3 of {len(own)} keys of {MODEL}" in line
    assert "it belongs to another model" in line


def test_broken_weights(refused, tmp_path, student):
    folder = tmp_path / "student"
    folder.mkdir()
    for file in student.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "checksums.json").unlink(missing_ok=True)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    assert str(weights) in refused("distill", "--teacher", folder, "--student", MODEL, "--data", DIGITS)
    save_file(dict(list(load_file(student / "model.safetensors").items())[:3]), weights)
    assert "matches 3 of " in refused("distill", "--teacher", folder, "--student", MODEL, "--data", DIGITS)


def test_a_pair_that_the_method_cannot_serve(refused):
    teacher = "faster_rcnn:resnet10t,channels=16-16-16-16,stem=8,neck=32,levels=3-4,mlp=16"
    line = refused("distill", "--teacher", teacher, "--student", MODEL, "--data", DIGITS, "--method", "cwd,on=logits")
    reason, _, others = line.partition("; methods that could serve this pair: ")
    assert reason == f"detdistill: cwd: the teacher {teacher} predicts regions; it needs a teacher that predicts dense"
    assert {"fgd", "fitnet", "fkd", "mgd", "pkd", "unikd"} <= set(others.split(", "))
    assert not {"cwd", "kd_detr", "d3etr"} & set(others.split(", "))


# ------------------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--lr", "-1"], "lr: -1.0 is not a number above 0"),
        (["--lr", "0"], "lr: 0.0 is not a number above 0"),
        (["dis=nan"], "distill_weight: 'nan' is not a number"),
        (["dis=-2"], "distill_weight: -2.0 is not a number, 0 or more"),
        (["balance=1"], "balance: 1.0 is not a number above 0 and below 1 or none"),
        (["--method", "pkd,weight=nan"], "pkd: weight=nan is not a number, 0 or more"),
        (["--method", "pkd,weight=-1"], "pkd: weight=-1 is not a number, 0 or more"),
        (["--method", "cwd,temperature=0"], "cwd: temperature=0 is not a number above 0"),
        (["--method", "pdk"], "no method 'pdk' (did you mean 'pkd'?)"),
        (["--method", "pkd,levels=7"], "pkd: "),
        (["--seeds", "0,0"], "seeds: 0,0 must be different whole numbers"),
        (["--flip", "1.5"], "flip: 1.5 is not a number from 0 to 1"),
        (["--max_size", "20", "--resize", "short_side"], "max_size"),
    ],
)
def test_impossible_numbers(refused, given, expected):
    assert expected in refused("distill", "--teacher", MODEL, "--student", MODEL, "--data", DIGITS, *given)


def test_a_run_folder_that_is_taken_stays_as_it_is(refused, tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine.txt").write_text("precious")
    for verb in (["train", "--model"], ["distill", "--teacher", MODEL, "--student"]):
        line = refused(*verb, MODEL, "--data", DIGITS, out=taken)
        assert line == f"detdistill: run folder {taken} exists; give another --out, or --resume true to continue the run"
    assert os.listdir(taken) == ["mine.txt"]


def test_nothing_to_resume(refused, tmp_path):
    line = refused("train", "--model", MODEL, "--data", DIGITS, "--resume")
    assert "contains no run to resume" in line


# ---------------------------------------------------------------------------------------------------- while it is running


def test_a_disk_that_is_full(refused, tmp_path, monkeypatch):
    import lightning

    def full(self, path, *arguments, **options):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lightning.Trainer, "save_checkpoint", full)
    line = refused("train", "--model", MODEL, "--data", DIGITS, out=tmp_path / "run")
    assert "cannot save" in line
    assert "No space left on device; there is no earlier one. Make space and continue with --resume true" in line
    assert os.listdir(tmp_path / "run" / "checkpoints") == []
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_teacher_that_knows_nothing_is_said_loudly_before_anything_is_trained(capsys, tmp_path, monkeypatch):
    from detdistill.training import run as training

    class Stop(Exception):
        pass

    def stop(*arguments, **options):
        raise Stop

    monkeypatch.setattr(training, "run", stop)
    words = ["distill", "--teacher", MODEL, "--student", MODEL, "--data", DIGITS, *QUICK, "--out", str(tmp_path / "run")]
    with pytest.raises(Stop):
        cli.main(words)
    said = " ".join(capsys.readouterr().err.split())
    assert "WARNING: the teacher's AP is 0." in said
    assert "so a student can learn next to nothing from it" in said


def test_comparing_what_is_no_run(capsys, tmp_path):
    (tmp_path / "summary.json").write_text("{broken")
    for runs, expected in (([tmp_path], "is not a complete run"), ([tmp_path / "no"], "holds no finished run (no summary.json)")):
        with pytest.raises(SystemExit) as ended:
            cli.main(["compare", *map(str, runs)])
        assert ended.value.code == 2
        assert expected in capsys.readouterr().err


def test_predicting_what_is_no_image(capsys, tmp_path, student):
    (tmp_path / "a.png").write_bytes(b"no image")
    words = ["predict", "--model", str(student), "--images", str(tmp_path / "a.png"), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as ended:
        cli.main([*words, "--size", "64"])
    assert ended.value.code == 2
    assert "a.png: the image cannot be decoded" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_broken_images_among_others_end_with_exit_code_1(capsys, tmp_path, student):
    from PIL import Image

    images = tmp_path / "images"
    images.mkdir()
    (images / "a.png").write_bytes(b"no image")
    (images / "notes.txt").write_text("")
    Image.new("RGB", (40, 30)).save(images / "b.png")
    words = ["predict", "--model", str(student), "--images", str(images), "--out", str(tmp_path / "out"), "--size", "64"]
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 1
    said = capsys.readouterr()
    assert said.out.startswith("1 image with ")
    assert said.out.endswith(f"boxes and detections.json are in {tmp_path / 'out'}\n")
    assert "a.png: the image cannot be decoded" in said.err
    assert "left out 1 file that is no image Pillow can open: 1 .txt" in said.err
    assert said.err.endswith("1 image could not be read (named above)\n")
    (images / "a.png").unlink()
    cli.main(words)


def test_numbers_that_cannot_be_written(capsys, tmp_path, student):
    (tmp_path / "file").write_text("")
    words = ["eval", "--model", str(student), "--data", DIGITS, "--size", "64", "--out", str(tmp_path / "file" / "x.json")]
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 2
    assert "cannot write" in capsys.readouterr().err
    cli.main([*words[:-1], str(tmp_path / "new" / "x.json")])
    assert json.loads((tmp_path / "new" / "x.json").read_text())["images"] == 8
