"""``detdistill export`` and ``bench`` from a student folder to the proof, and files as models of other commands."""

import json
import re
import shutil
import sys
import types
from dataclasses import replace

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from torchvision.io import write_png
from torchvision.ops import batched_nms

from detdistill import api, cli
from detdistill.data.discover import load_split
from detdistill.detectors.build import build_detector
from detdistill.detectors.load import load_detector
from detdistill.detectors.save import save_student
from detdistill.errors import ModelError, RunError
from detdistill.export import selection
from detdistill.export.file_detector import load_file
from detdistill.export.proof import Stage, judged, set_difference
from detdistill.export.run import Wanted, export_detector
from detdistill.export.selection import Rule, select, suppressed
from detdistill.progress import Progress
from detdistill.report.page import build_report
from detdistill.settings import TrainSettings
from detdistill.training.plan import view_settings
from tests.data.forms import make_yolo
from tests.test_compare import make_run

pytest.importorskip("onnxruntime")
MODEL = "fcos:resnet10t,channels=16-16-16-16,stem=8,neck=32,levels=3-4,convs=1,score=0.01"
DIGITS = "digits:train=24,val=8,size=64,seed=0"
CLASSES = tuple(str(digit) for digit in range(10))


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    torch.manual_seed(0)
    detector = build_detector(MODEL, CLASSES)
    # A random head finds nothing; this one has boxes of each class all over the image, and AP is small but not 0.
    detector.model.head.classification_head.cls_logits.bias.data[1:] = 0.0
    detector.model.head.regression_head.bbox_reg.bias.data.fill_(1.5)
    return save_student(detector, tmp_path_factory.mktemp("saved") / "student")


@pytest.fixture(scope="module")
def exported(student, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "model.onnx"
    with Progress(quiet=True) as progress:
        return api.export(str(student), out, DIGITS, int8=True, size=64, calibration=8, progress=progress)


def test_the_proof(exported):
    torch_stage, file, int8 = exported.stages
    assert (torch_stage.name, file.name, int8.name) == ("torch", "onnx", "onnx int8")
    assert pytest.approx(torch_stage.AP, abs=1e-3) == file.AP
    assert file.difference.boxes_px < 1e-3
    assert file.difference.scores < 1e-5
    assert int8.difference.scores > 1e-4
    assert file.passed
    assert file.milliseconds > 0
    assert int8.megabytes < file.megabytes
    notes = json.loads(exported.notes.read_text())["model.onnx"]
    assert [stage["name"] for stage in notes["stages"]] == ["torch", "onnx", "onnx int8"]
    assert notes["stages"][1]["AP"] == file.AP
    about = notes["about"]
    assert about["spec"]["classes"] == list(CLASSES)
    assert (about["size"], about["resize"], about["opset"], about["free"]) == (64, "letterbox", 17, ["batch", "size"])
    assert repr(exported).startswith(f"Exported(AP of torch {100 * torch_stage.AP:.1f}, AP of onnx {100 * file.AP:.1f}, AP of")
    assert repr(exported).endswith(f"{exported.file} and {exported.int8})")
    assert ">AP of onnx int8</th>" in exported._repr_html_()
    assert {path.name for path in exported.file.parent.iterdir()} == {"model.onnx", "model.int8.onnx", "export.json", "README.md"}


def test_a_file_is_evaluated_like_every_model(student, exported):
    with Progress(quiet=True) as progress:
        wanted = api.evaluate(str(student), DIGITS, size=64, batch=3, progress=progress)
        found = api.evaluate(str(exported.file), DIGITS, batch=3, progress=progress)  # the size stands in the file
    assert found.metrics == pytest.approx(wanted.metrics, abs=1e-3)
    assert max(wanted.metrics.values()) > 0


def test_a_file_predicts(exported, tmp_path):
    from detdistill.data.digits import digits_folder

    images = next(digits_folder(train=24, val=8, size=64, seed=0).rglob("*.jpg"), None) or next(
        path for path in digits_folder(train=24, val=8, size=64, seed=0).rglob("*") if path.suffix in (".png", ".jpeg")
    )
    with Progress(quiet=True) as progress:
        api.predict(str(exported.file), images, tmp_path / "drawn", score=0.01, progress=progress)
    assert json.loads((tmp_path / "drawn" / "detections.json").read_text())


def test_a_file_cannot_be_trained_or_exported_again(exported, tmp_path):
    with pytest.raises(RunError, match="is an exported file; export the run"):
        api.export(str(exported.file), tmp_path / "again.onnx")


def test_bench(student, exported, capsys):
    cli.main(["bench", "--model", str(student), str(exported.file), "--size", "64", "--rounds", "2", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert list(found) == [str(student), str(exported.file)]
    assert all(timing["milliseconds"] >= timing["least"] > 0 for timing in found.values())


def test_what_the_package_gives_is_exported_and_timed(student, exported, tmp_path):
    detector = load_detector(student)
    with Progress(quiet=True) as progress:
        again = api.export(detector, tmp_path / "memory" / "model.onnx", size=64, progress=progress)
        timed = api.bench([detector, exported.file], size=64, rounds=1, progress=progress)
    assert again.stages[1].difference.scores < 1e-5
    assert list(timed) == [detector.spec.name, str(exported.file)]
    with pytest.raises(ModelError, match="a detector in memory has no folder; give the run"):
        api.export_student(detector, tmp_path / "student")
    assert api.export_student(student, tmp_path / "student", size=64) == tmp_path / "student"  # a Path


def test_too_much_lost_ends_with_1(student, tmp_path, capsys, monkeypatch):
    from detdistill.export import proof

    monkeypatch.setattr(proof, "MOST_LOST", -200.0)
    arguments = ["export", "--model", str(student), "--data", DIGITS, "--size", "64", "--out"]
    with pytest.raises(SystemExit) as done:
        cli.main([*arguments, str(tmp_path / "first.onnx")])
    said = capsys.readouterr()
    assert done.value.code == 1
    assert "more than allowed; --allow_loss true accepts it" in said.err
    assert "TOO MUCH LOST" in said.out
    cli.main([*arguments, str(tmp_path / "second.onnx"), "--allow_loss"])
    assert set(json.loads((tmp_path / "export.json").read_text())) == {"first.onnx", "second.onnx"}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"out": "model.bin"}, "must end in .onnx for --format onnx"),
        ({"format": "onxx"}, "format: 'onxx' is unknown .did you mean 'onnx'"),
        ({"format": "openvino"}, "must end in .xml for --format openvino"),
        ({"int8": True}, "int8: needs training images to calibrate with; give --data"),
        ({"int8": True, "calibration": 0, "data": DIGITS}, "calibration: 0 training images are none"),
        ({"dynamic": ("batch", "height")}, "dynamic: 'height' is unknown"),
        ({"opset": 9}, "opset=9: .* needs an opset from 17 to 20"),
    ],
)
def test_bad_input(student, tmp_path, settings, expected):
    out = tmp_path / settings.pop("out", "model.onnx")
    with Progress(quiet=True) as progress, pytest.raises((RunError, ModelError), match=expected):
        api.export(str(student), out, size=64, progress=progress, **settings)
    assert list(tmp_path.iterdir()) == []


def test_defects_of_both_splits_are_told_once(tmp_path):
    """Training images are read for int8, too; two lines about one data set looked like a repetition."""
    root = make_yolo(tmp_path / "data")
    for split in ("train", "val"):
        (next((root / "labels" / split).glob("*.txt"))).write_text("0 0.5 0.5 0 0\n")
    student = save_student(build_detector(MODEL, ("ant", "bee", "cat")), tmp_path / "student")
    said = []
    with Progress(quiet=True) as progress:
        progress.say = lambda text, style="": said.append(str(text))
        api.export(str(student), tmp_path / "model.onnx", str(root), int8=True, size=64, progress=progress)
    assert [line for line in said if "data inspect" in line] == [
        f"2 defects in {root}: 2 empty box; see `detdistill data inspect {root}`"
    ]


def test_what_exists_is_kept(student, tmp_path):
    out = tmp_path / "model.onnx"
    out.write_text("mine")
    with pytest.raises(RunError, match="exists; give another --out, or --overwrite true"):
        api.export(str(student), out)
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(RunError, match="is a folder; name a file in it"):
        api.export(str(student), tmp_path / "folder.onnx")
    assert out.read_text() == "mine"


def test_what_may_vary_can_be_less(student, tmp_path):
    for given, free in (("none", ()), ("batch", ("batch",)), ("size", ("size",))):
        path = tmp_path / f"{given}.onnx"
        cli.main(["export", "--model", str(student), "--out", str(path), "--size", "64", "--dynamic", given])
        assert load_file(path).about.free == free


def test_weights_that_are_no_numbers(student, tmp_path):
    detector = load_detector(student)
    detector.model.head.classification_head.cls_logits.bias.data[3] = torch.nan
    with pytest.raises(ModelError, match=r"1 tensors hold NaN or infinite weights, e.g. model.head.classification_head"):
        export_detector(detector, Wanted(tmp_path / "model.onnx"), view_settings(TrainSettings(size=64)))
    assert not (tmp_path / "model.onnx").exists()


def test_a_train_split_without_images(student, tmp_path):
    empty = replace(load_split(DIGITS, "train")[0], records=())
    wanted = Wanted(tmp_path / "model.onnx", int8=True)
    with pytest.raises(RunError, match="int8: needs training images to calibrate with; give --data with a train split"):
        export_detector(load_detector(student), wanted, view_settings(TrainSettings(size=64)), None, empty)
    assert not (tmp_path / "model.onnx").exists()


def test_data_of_other_classes(tmp_path):
    folder = save_student(build_detector(MODEL, ("cat", "dog")), tmp_path / "student")
    with Progress(quiet=True) as progress, pytest.raises(ModelError, match="does not know 10 of the data's 10 classes"):
        api.export(str(folder), tmp_path / "model.onnx", DIGITS, progress=progress)


@pytest.mark.parametrize(("package", "extra"), [("onnx", "export"), ("onnxruntime", "export"), ("openvino", "openvino")])
def test_a_missing_package_names_its_extra(student, tmp_path, monkeypatch, package, extra):
    monkeypatch.setitem(sys.modules, package, None)
    kind, suffix = ("openvino", ".xml") if package == "openvino" else ("onnx", ".onnx")
    expected = rf"the package {package} is missing: pip install 'detdistill\[{extra}\]'"
    with Progress(quiet=True) as progress, pytest.raises(RunError, match=expected):
        api.export(str(student), tmp_path / f"model{suffix}", size=64, format=kind, progress=progress)
    assert not (tmp_path / "export.json").exists()


def test_files_that_are_no_exports(tmp_path):
    (tmp_path / "broken.onnx").write_bytes(b"nothing")
    with pytest.raises(ModelError, match=r"broken.onnx: cannot be opened"):
        api.evaluate(str(tmp_path / "broken.onnx"), DIGITS)


def test_what_may_be_lost():
    assert judged(Stage("onnx", None, 1.0, 0.4991, 1.0), 0.5, int8=False).passed
    assert not judged(Stage("onnx", None, 1.0, 0.498, 1.0), 0.5, int8=False).passed
    assert judged(Stage("onnx int8", None, 1.0, 0.491, 1.0), 0.5, int8=True).passed
    assert not judged(Stage("onnx int8", None, 1.0, 0.489, 1.0), 0.5, int8=True).passed
    assert judged(Stage("onnx", None, 1.0, -1.0, 1.0), -1.0, int8=False).lost is None


def test_sets_do_not_depend_on_the_order():
    boxes, scores = torch.rand(6, 4) * 100, torch.rand(6, 3)
    order = torch.randperm(6)
    found = set_difference({"boxes": boxes, "scores": scores}, {"boxes": boxes[order], "scores": scores[order] + 0.001})
    assert found.boxes_px == 0
    assert found.scores == pytest.approx(0.001, rel=1e-3)
    fewer = set_difference({"boxes": boxes, "scores": scores}, {"boxes": boxes[:4], "scores": scores[:4]})
    assert (fewer.unmatched, fewer.boxes_px) == (2, 0)


@pytest.mark.parametrize(("spread", "first_is_enough"), [(400, True), (3, False)])
def test_suppressing_the_best_first_equals_nms_of_all(spread, first_is_enough, monkeypatch):
    noise = torch.Generator().manual_seed(0)
    corner = torch.rand(900, 2, generator=noise) * spread
    boxes = torch.cat([corner, corner + 20 + torch.rand(900, 2, generator=noise)], dim=1)
    scores = (torch.rand(900, generator=noise) * 200).round() / 200  # many are equal
    labels = torch.randint(0, 3, (900,), generator=noise)
    wanted = batched_nms(boxes, scores, labels, 0.5)[:50]
    calls = []
    monkeypatch.setattr(selection, "batched_nms", lambda *given: calls.append(len(given[0])) or batched_nms(*given))
    assert torch.equal(suppressed(boxes, scores, labels, 0.5, 50), wanted)
    assert calls == ([200] if first_is_enough else [200, 900])


def test_each_query_gives_its_best_class_only_under_softmax():
    found = {"boxes": torch.arange(8.0).view(2, 4), "scores": torch.tensor([[0.5, 0.4], [0.1, 0.6]])}
    assert select(found, Rule("query")).labels.tolist() == [1, 0]
    assert select(found, Rule("pair", detections=3)).scores.tolist() == pytest.approx([0.6, 0.5, 0.4])
    assert select(found, Rule("pair", score=0.45)).labels.tolist() == [1, 0]


def test_functions_stay_functions_after_their_module_is_imported():
    import detdistill.compare
    import detdistill.export.run

    assert isinstance(detdistill.compare, types.FunctionType)
    assert isinstance(detdistill.export, types.FunctionType)


@pytest.mark.parametrize("kind", ["onnx", "torchscript", "openvino"])
def test_the_card_of_a_file_loads_it(student, tmp_path, kind):
    """Its lines run as they stand, with the paths filled in."""
    if kind == "openvino":
        pytest.importorskip("openvino")
    suffix = {"onnx": ".onnx", "torchscript": ".torchscript", "openvino": ".xml"}[kind]
    made = api.export(str(student), tmp_path / f"model{suffix}", size=64, format=kind, progress=Progress(quiet=True))
    text = made.card.read_text()
    data = ModelCard.load(made.card).data
    assert data.library_name == {"torchscript": "pytorch"}.get(kind, kind)
    write_png((torch.rand(3, 64, 48) * 255).byte(), str(tmp_path / "image.png"))
    text = text.replace("path/to/this/folder", str(tmp_path)).replace("image.jpg", str(tmp_path / "image.png"))
    short, alone = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len([line for line in short.splitlines() if line.strip()]) <= 5
    space = {"images": np.random.default_rng(0).random((2, 3, 64, 96), np.float32), "sizes": np.array([[64, 96], [64, 80]])}
    space["np"], space["torch"] = np, torch
    exec(short + alone, space)
    found = {name: np.asarray(value) for name, value in space["found"].items()}
    assert (found["boxes"].shape[-1], found["scores"].shape[-1], len(found["boxes"])) == (4, 10, 2)
    assert found["boxes"].shape[1] == found["scores"].shape[1] == len(found["levels"])
    assert tuple(space["about"]["spec"]["classes"]) == CLASSES


def test_the_card_has_every_file_of_the_folder_and_leaves_other_readmes(student, tmp_path):
    for name in ("first.onnx", "second.onnx"):
        made = api.export(str(student), tmp_path / name, size=64, progress=Progress(quiet=True))
    assert "| first.onnx |" in made.card.read_text()
    assert "`second.onnx`: onnx, opset 17, 10 classes." in made.card.read_text()
    (tmp_path / "README.md").write_text("# My project\n")
    made = api.export(str(student), tmp_path / "third.onnx", size=64, progress=Progress(quiet=True))
    assert made.card is None
    assert (tmp_path / "README.md").read_text() == "# My project\n"


def test_the_table_is_in_the_report_of_the_run(student, tmp_path):
    run = make_run(tmp_path / "run", "baseline", 0, 0.2)
    shutil.copytree(student, run / "student")
    (run / "report.html").write_text("before the export")
    made = api.export(str(run), tmp_path / "exported" / "model.onnx", DIGITS, size=64, progress=Progress(quiet=True))
    page = (run / "report.html").read_text()
    assert '<h2 id="exports">Exported files</h2>' in page
    file = made.stages[1]
    cells = "".join(f"<td>{cell}</td>" for cell in (*file.cells, ""))
    assert f'<th scope="row">baseline, seed 0: onnx ({made.file})</th>{cells}' in page
    assert made.about.origin["run"]["seed"] == 0
    assert set(json.loads((run / "export.json").read_text())) == {str(made.file)}
    inside = api.export(str(run / "student"), run / "inside.onnx", size=64, progress=Progress(quiet=True))
    assert set(json.loads((run / "export.json").read_text())) == {str(made.file), "inside.onnx"}
    assert inside.card == run / "README.md"
    (run / "export.json").write_text("[1]")
    build_report([run], run / "report.html")
    assert "is no notes of exports" in (run / "report.html").read_text()
