"""YOLO of ultralytics, stage by stage, against the package's own forward passes, losses and files."""

import copy
import importlib.util
import json
import pickle
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from detdistill.detectors.build import build_detector
from detdistill.detectors.contract import HasBoxDistributions, HasSchedule, HasTowers
from detdistill.detectors.load import load_detector
from detdistill.detectors.save import save_student
from detdistill.detectors.yolo.shared.networks import need_library
from detdistill.errors import ModelError
from detdistill.structures import Assignment, Batch, Clock, View
from tests.detectors.checks import check_detector
from tests.detectors.dense.shared import FULL, target, unequal_batch

if importlib.util.find_spec("ultralytics") is None:
    pytest.skip("needs ultralytics", allow_module_level=True)
need_library("these tests")  # first of all, so that the package's import changes nothing for other tests
SMALL = "width=0.0625"
NAMES = ("yolov8n", "yolov9t", "yolov10n", "yolo11n", "yolo12n", "yolo26n")
OPTIONS = {"yolov9t": "", "yolo12n": ""}
"""Networks that cannot be made narrower."""
CLASSES = ("a", "b", "c")


def built(name, classes=CLASSES, seed=0, options=SMALL):
    torch.manual_seed(seed)
    detector = build_detector(f"ultralytics:{name},{options}" if options else f"ultralytics:{name}", classes)
    with torch.no_grad():  # outputs spread out, so that scores and boxes and their order are a real test
        for key, parameter in detector.model.model[-1].named_parameters():
            if key.endswith("2.weight"):
                parameter.add_(0.3 * torch.randn(parameter.shape))
            elif "cv3" in key and key.endswith("2.bias"):
                parameter.fill_(-2.0)
    return detector


def full_batch(dtype=torch.float32):
    """Images that fill the tensor, because the package knows no padding; one has no boxes, none has a crowd box."""
    targets = (FULL[0], target([[1, 1, 60, 60], [0, 0, 50, 88]], [1, 2]), target([], []))
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(3, 3, 128, 160, generator=generator).to(dtype)
    return Batch(images, torch.tensor([[128, 160]] * 3), targets, (0, 1, 2), (View((128, 160), (128, 160)),) * 3)


def library_batch(batch):
    """The targets in the package's form: centre and size in parts of the image."""
    height, width = batch.padding_hw
    rows, boxes, labels = [], [], []
    for image, one in enumerate(batch.targets):
        corners = one.boxes_xyxy.to(batch.images.dtype)
        size = corners.new_tensor([width, height, width, height])
        boxes.append(torch.cat([corners[:, :2] + corners[:, 2:], 2 * (corners[:, 2:] - corners[:, :2])], dim=1) / 2 / size)
        labels.append(one.labels)
        rows.append(torch.full_like(one.labels, image))
    return {"img": batch.images, "batch_idx": torch.cat(rows), "cls": torch.cat(labels), "bboxes": torch.cat(boxes)}


def library_loss(model, batch, epoch=0, epochs=1):
    """Loss and gradients by the package alone."""
    from ultralytics.cfg import get_cfg

    model = copy.deepcopy(model)
    model.args = get_cfg(overrides={"epochs": epochs})
    model.criterion = model.init_criterion()
    for _ in range(epoch if hasattr(model.criterion, "update") else 0):
        model.criterion.update()
    torch.set_default_dtype(batch.images.dtype)  # in which the package keeps its targets
    try:
        total = model.loss(library_batch(batch))[0].sum()
    finally:
        torch.set_default_dtype(torch.float32)
    total.backward()
    return total.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_losses_and_gradients_equal_the_packages(name, dtype):
    detector = built(name, options=OPTIONS.get(name, SMALL)).to(dtype).train()
    batch, epoch, epochs = full_batch(dtype), 3, 10
    theirs, gradients = library_loss(detector.model, batch, epoch, epochs)
    if isinstance(detector, HasSchedule):
        detector.schedule(Clock(step=30, total=100, epoch=epoch, epochs=epochs))
    losses = detector.loss(detector(batch).prediction, batch)
    losses.total().backward()
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(losses.total().detach(), theirs, rtol=tolerance, atol=0)
    mine = {name: p.grad for name, p in detector.model.named_parameters() if p.grad is not None}
    assert mine.keys() == gradients.keys()
    assert len(mine) > 100
    whole = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    difference = torch.stack([(mine[key] - gradients[key]).norm() for key in mine]).norm()
    assert difference <= (1e-5 if dtype == torch.float32 else tolerance) * whole


def test_no_objects_at_all_are_the_packages_loss_too():
    for name in ("yolo11n", "yolo26n"):
        detector, batch = built(name).train(), full_batch()
        batch = replace(batch, targets=(target([], []),) * 3)
        theirs, _ = library_loss(detector.model, batch)
        torch.testing.assert_close(detector.loss(detector(batch).prediction, batch).total().detach(), theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_detections_equal_the_packages(name):
    from ultralytics.utils.nms import non_max_suppression

    detector, batch = built(name, options=OPTIONS.get(name, SMALL)).eval(), full_batch()
    with torch.no_grad():
        mine = detector.detect(detector(batch).prediction, batch)
        theirs = non_max_suppression(detector.model(batch.images), 0.001, 0.7, multi_label=True, max_det=300)
    for one, other in zip(mine, theirs, strict=True):
        assert len(one) == len(other) > 10
        clipped = other[:, :4].clamp(min=0).minimum(torch.tensor([160.0, 128, 160, 128]))
        assert torch.equal(one.boxes_xyxy, clipped)
        assert torch.equal(one.scores, other[:, 4])
        assert torch.equal(one.labels, other[:, 5].long())


@pytest.mark.parametrize("name", ["yolov10n", "yolo26n"])
def test_detections_without_nms_equal_the_packages(name):
    detector, batch = built(name, options=f"{SMALL},nms=false").eval(), full_batch()
    model = copy.deepcopy(detector.model)
    model.end2end = True
    with torch.no_grad():
        mine = detector.detect(detector(batch).prediction, batch)
        theirs = model(batch.images)[0]
    for one, other in zip(mine, theirs, strict=True):
        other = other[other[:, 4] > 0.001]
        assert len(one) == len(other) > 10
        clipped = other[:, :4].clamp(min=0).minimum(torch.tensor([160.0, 128, 160, 128]))
        torch.testing.assert_close(one.boxes_xyxy, clipped, rtol=1e-6, atol=1e-5)
        assert torch.equal(one.scores, other[:, 4])
        assert torch.equal(one.labels, other[:, 5].long())


@pytest.mark.parametrize("name", ["yolo11n", "yolo26n"])
def test_what_every_detector_keeps(name):
    checked = check_detector(built(name))
    assert ("towers" in checked) == (name == "yolo11n")


def test_capabilities_are_those_of_the_network():
    eleven, twenty_six = built("yolo11n"), built("yolo26n")
    assert isinstance(eleven, HasTowers)
    assert not isinstance(eleven, HasSchedule)
    assert not isinstance(twenty_six, HasTowers)  # a stopped head would lose the one-to-one branch
    assert isinstance(twenty_six, HasSchedule)
    assert (eleven.spec.box_bins, twenty_six.spec.box_bins) == (16, 0)
    assert isinstance(eleven, HasBoxDistributions)
    with pytest.raises(ModelError, match="are numbers, not distributions"):
        twenty_six.distributions(None, None)


def test_padding_is_grey_before_the_network():
    detector, batch = built("yolo11n"), unequal_batch()
    images = detector.normalized(batch)
    assert images.shape[-2:] == (128, 128)
    grey = torch.full((), 114 / 255)
    assert bool((images[:, :, 100:] == grey).all())
    assert bool((images[1, :, 90:] == grey).all())
    assert bool((images[1, :, :, 70:] == grey).all())
    assert torch.equal(images[1, :, :90, :70], batch.images[1, :, :90, :70])


def test_means_of_the_distributions_are_the_boxes():
    detector, batch = built("yolo11n"), full_batch()
    prediction = detector(batch).prediction
    found = detector.distributions(prediction, batch)
    means = found.logits.softmax(dim=-1) @ found.steps
    torch.testing.assert_close(found.origins + means * found.units, prediction.boxes_xyxy, rtol=1e-5, atol=1e-3)


def test_weights_of_positives_are_their_class_targets_and_ignored_cells_cost_nothing():
    detector, batch = built("yolo11n").train(), full_batch()
    prediction = detector(batch).prediction
    own = detector.assign(prediction, batch)
    positive = own.matched >= 0
    assert 0 < int(positive.sum()) < positive.numel()
    assert bool((own.weights[positive] > 0).all())
    assert bool((own.weights[positive] <= 1).all())
    assert bool((own.weights[~positive] == 1).all())
    assert not positive[2].any()
    (gradient,) = torch.autograd.grad(detector.loss(prediction, batch).terms["cls_loss"], prediction.logits, retain_graph=True)
    ignored = own.as_ignored(torch.ones_like(positive) & ~positive)
    (without,) = torch.autograd.grad(detector.loss(prediction, batch, ignored).terms["cls_loss"], prediction.logits)
    assert not without[~positive].any()
    torch.testing.assert_close(without[positive], gradient[positive])
    hard = detector.loss(prediction, batch, Assignment(own.matched)).terms["cls_loss"]
    assert not torch.isclose(hard, detector.loss(prediction, batch, own).terms["cls_loss"])


def test_crowd_boxes_are_nobodys():
    detector, batch = built("yolo11n").train(), unequal_batch()
    matched = detector.assign(detector(batch).prediction, batch).matched
    assert set(matched[1].unique().tolist()) == {-1, 1}  # box 0 of the second image is a crowd


def test_the_dense_branch_weighs_less_from_epoch_to_epoch():
    detector = built("yolo26n")
    weights = []
    for epoch in range(5):
        detector.schedule(Clock(step=epoch, total=5, epoch=epoch, epochs=5))
        weights.append(detector.many)
    assert weights == pytest.approx([0.8, 0.625, 0.45, 0.275, 0.1])
    detector.schedule(Clock(step=0, total=1))
    assert detector.many == pytest.approx(0.8)


def test_an_image_of_a_cached_prediction_has_its_detections_and_needs_its_second_branch_for_a_loss():
    detector, batch = built("yolo26n").eval(), full_batch()
    with torch.no_grad():
        prediction = detector(batch).prediction
        whole = detector.detect(prediction, batch)
        again = detector.detect(replace(prediction, own=None), batch)
    assert all(torch.equal(one.boxes_xyxy, other.boxes_xyxy) for one, other in zip(whole, again, strict=True))
    with pytest.raises(ValueError, match="has no one-to-one branch; call predict again"):
        detector.loss(replace(prediction, own=None), batch)


# ---------------------------------------------------------------------------------------------------------------- files


def write_pt(detector, path):
    detector.save_pt(path)
    return path


@pytest.mark.parametrize("name", ["yolo11n", "yolo26n"])
def test_a_pt_file_is_read_bit_by_bit_and_the_package_opens_ours(name, tmp_path):
    from ultralytics import YOLO

    detector, batch = built(name).eval(), full_batch()
    path = write_pt(detector, tmp_path / "best.pt")
    loaded = load_detector(f"ultralytics:{path}").eval()
    assert loaded.spec.classes == CLASSES
    with torch.no_grad():
        mine, theirs = loaded(batch).prediction, detector(batch).prediction
        assert torch.equal(mine.logits, theirs.logits)
        assert torch.equal(mine.boxes_xyxy, theirs.boxes_xyxy)
        opened = YOLO(path)
        assert opened.names == dict(enumerate(CLASSES))
        assert torch.equal(opened.model.eval()(batch.images)[0], detector.model(batch.images)[0])


def test_other_classes_keep_what_fits(tmp_path):
    detector, batch = built("yolo11n").eval(), full_batch()
    path = write_pt(detector, tmp_path / "best.pt")
    some = load_detector(f"ultralytics:{path}", ("c", "a")).eval()
    with torch.no_grad():
        assert torch.equal(some(batch).prediction.logits, detector(batch).prediction.logits[..., [2, 0]])
        for one in some.detect(some(batch).prediction, batch):
            assert set(one.labels.tolist()) <= {0, 1}
    again = load_detector(save_student(some, tmp_path / "student")).eval()
    assert again.spec == some.spec
    with torch.no_grad():
        assert torch.equal(again(batch).prediction.logits, some(batch).prediction.logits)
    new = build_detector(f"ultralytics:{path}", ("x", "y"))
    own, before = new.model.state_dict(), detector.model.state_dict()
    assert own["model.23.cv3.0.2.weight"].shape[0] == 2
    assert torch.equal(own["model.0.conv.weight"], before["model.0.conv.weight"])


def test_reading_a_file_runs_nothing_of_it(tmp_path):
    ran = tmp_path / "ran"

    class Marker:
        def __reduce__(self):
            return (open, (str(ran), "w"))

    torch.save({"model": Marker(), "weights": torch.ones(2)}, tmp_path / "marked.pt")
    with pytest.raises(ModelError, match="holds no network of ultralytics"):
        load_detector(f"ultralytics:{tmp_path / 'marked.pt'}")
    assert not ran.exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "cannot be read as a checkpoint of torch"),
        (b"PK\x03\x04 cut", "cannot be read as a checkpoint of torch"),
        (pickle.dumps({"model": 1}), "cannot be read as a checkpoint of torch"),
    ],
)
def test_files_that_are_no_checkpoints(tmp_path, content, expected):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(ModelError, match=expected):
        load_detector(f"ultralytics:{tmp_path / 'x.pt'}")


def test_torchscript_weights_alone_and_other_tasks_are_named(tmp_path):
    from ultralytics.nn.tasks import SegmentationModel

    torch.jit.script(torch.nn.Linear(1, 1)).save(tmp_path / "script.pt")
    with pytest.raises(ModelError, match="is a TorchScript archive"):
        load_detector(f"ultralytics:{tmp_path / 'script.pt'}")
    torch.save(torch.nn.Linear(1, 1).state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ModelError, match="weights alone do not say which network they fit"):
        load_detector(f"ultralytics:{tmp_path / 'weights.pt'}")
    torch.save({"model": SegmentationModel("yolo11n-seg.yaml", nc=1, verbose=False)}, tmp_path / "seg.pt")
    with pytest.raises(ModelError, match="holds a SegmentationModel, which is no detector of boxes"):
        load_detector(f"ultralytics:{tmp_path / 'seg.pt'}")


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("yolo11q", r"ultralytics has no 'yolo11q' \(did you mean 'yolo11"),
        ("yolo11", "yolo11 has the sizes n, s, m, l, x; write e.g. yolo11n"),
        ("yolo11n-seg", "its head is Segment, which segments; give a detector of boxes"),
        ("rtdetr-l", r"its head is RTDETRDecoder, which is an RT-DETR \(use rt_detr:\)"),
        ("missing.yaml", "there is no file missing.yaml"),
        ("missing.pt", "missing.pt: there is no such file"),
        ("yolo11n,nms=false", "nms=false needs a network with a one-to-one branch"),
        ("yolo11n,neck=9", "ultralytics has no option 'neck'"),
    ],
)
def test_mistakes_in_model_strings(model, expected):
    with pytest.raises(ModelError, match=expected):
        build_detector(f"ultralytics:{model}", CLASSES)


def test_descriptions_are_checked_before_anything_is_built(tmp_path):
    import yaml

    detector = built("yolo11n")
    for change, expected in (
        ({"activation": "print('ran')"}, "is no layer such as nn.SiLU"),
        (
            {"head": [[-1, 1, "torch_safe_load", ["x.pt"]], *detector.description["head"][-1:]]},
            "layer 'torch_safe_load' is unknown",
        ),
        ({"head": [[-1, 1, "FutureBlock", [64]], *detector.description["head"][-1:]]}, "layer 'FutureBlock' is unknown"),
        ({"backbone": [], "head": []}, "does not describe a network of ultralytics"),
    ):
        path = tmp_path / "own.yaml"
        path.write_text(yaml.safe_dump({**detector.description, **change}))
        with pytest.raises(ModelError, match=expected):
            build_detector(f"ultralytics:{path}", CLASSES)
    path.write_text(yaml.safe_dump(detector.description))
    assert build_detector(f"ultralytics:{path}", CLASSES).spec.channels == detector.spec.channels


def test_importing_the_package_changes_nothing_elsewhere():
    code = (
        "import numpy, torch\nfrom PIL import Image\n"
        "before = Image.open, torch.save, numpy.get_printoptions(), repr(torch.tensor([1 / 3] * 40))\n"
        "from detdistill.detectors.yolo.shared.networks import need_library\nneed_library('x')\nimport ultralytics.utils\n"
        "after = Image.open, torch.save, numpy.get_printoptions(), repr(torch.tensor([1 / 3] * 40))\n"
        "assert before == after, [one == two for one, two in zip(before, after)]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_missing_package_is_named_with_its_licence(monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "ultralytics" else find(name, *a))
    with pytest.raises(ModelError, match=r"needs the package ultralytics \(AGPL-3\.0\): pip install 'detdistill\[ultralytics\]'"):
        build_detector("ultralytics:yolo11n", CLASSES)


def test_a_student_folder_loads_here_and_with_the_package(tmp_path):
    from safetensors.torch import load_file
    from ultralytics.nn.tasks import DetectionModel

    detector, batch = built("yolo26n", options=f"{SMALL},score=0.01").eval(), full_batch()
    folder = save_student(detector, tmp_path / "student")
    assert "runs by the package ultralytics, which is under AGPL-3.0;" in (folder / "README.md").read_text()
    loaded = load_detector(folder).eval()
    assert loaded.options == detector.options
    about = json.loads((folder / "network.json").read_text())
    model = DetectionModel(about["description"], nc=len(about["names"]), verbose=False)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    with torch.no_grad():
        wanted = detector.model(batch.images)[0]
        assert torch.equal(loaded.model(batch.images)[0], wanted)
        assert torch.equal(model.eval()(batch.images)[0], wanted)
    (folder / "network.json").unlink()
    with pytest.raises(ModelError, match=r"save it again|save the student again"):
        load_detector(folder)


def test_the_command_writes_a_file_for_the_package(tmp_path, capsys):
    from ultralytics import YOLO

    from detdistill import cli
    from detdistill.files import folder_damage

    detector = built("yolo11n").eval()
    folder = save_student(detector, tmp_path / "student")
    cli.main(["student", "--model", str(folder), "--out", str(tmp_path / "out"), "--pt", "--size", "64"])
    assert capsys.readouterr().out == f"student folder {tmp_path / 'out'}\n"
    assert YOLO(tmp_path / "out" / "best.pt").names == dict(enumerate(CLASSES))
    assert not folder_damage(tmp_path / "out")
    other = save_student(build_detector("fcos:resnet10t,neck=32,convs=1", CLASSES), tmp_path / "fcos")
    with pytest.raises(SystemExit):
        cli.main(["student", "--model", str(other), "--out", str(tmp_path / "none"), "--pt", "--size", "64"])
    assert "does not fit into a .pt file: only networks of ultralytics do" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_yolo_learns_from_a_detr_and_goes_on_from_its_own_file(tmp_path):
    import detdistill

    data = "digits:train=8,val=4,size=64,seed=0"
    quick = {"size": 64, "steps": 2, "batch": 4, "workers": 0, "device": "cpu", "report": False}
    teacher = detdistill.train(
        "rt_detr:resnet10t,width=0.25,dim=32,heads=2,ffn=32,queries=10,decoder=2", data, out=tmp_path / "t", **quick
    )
    run = detdistill.distill(
        teacher, f"ultralytics:yolo26n,{SMALL}", data, "pkd", out=tmp_path / "s", score_teacher=False, **quick
    )
    terms = (run.folder / "metrics.csv").read_text().splitlines()[0]
    assert "one_to_one_box_loss" in terms
    assert "pkd" in terms
    folder = detdistill.export_student(str(run.folder), tmp_path / "moved", pt=True)
    again = detdistill.train(f"ultralytics:{folder / 'best.pt'}", data, out=tmp_path / "again", **quick)
    assert again.student.spec.classes == tuple(str(digit) for digit in range(10))
