"""YOLOX and YOLO9 of libreyolo, stage by stage, against the package's own forward passes, losses, postprocessing and files."""

import copy
import importlib.util
import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from detdistill.detectors.build import build_detector
from detdistill.detectors.contract import HasBoxDistributions, HasSchedule, HasTowers, Teacher
from detdistill.detectors.load import load_detector
from detdistill.detectors.save import save_student
from detdistill.detectors.yolo.shared.libreyolo_networks import build_network
from detdistill.errors import ModelError
from detdistill.methods.shared.compose import build_method
from detdistill.methods.shared.needs import PairError
from detdistill.structures import Assignment, Batch, Clock, View
from tests.detectors.checks import check_detector
from tests.detectors.dense.shared import FULL, target, unequal_batch

if importlib.util.find_spec("libreyolo") is None:
    pytest.skip("needs libreyolo", allow_module_level=True)

SMALL = "width=0.0625"
NAMES = (f"yolox-n,{SMALL}", f"yolox-s,{SMALL}", "yolo9-t", "yolo9_p2-t")
CLASSES = ("a", "b", "c")


def built(name, classes=CLASSES, seed=0):
    torch.manual_seed(seed)
    detector = build_detector(f"libreyolo:{name}", classes)
    with torch.no_grad():  # outputs spread out, so that scores and boxes and their order are a real test
        for key, parameter in detector.head.named_parameters():
            if "_preds" in key or (key.startswith("cv") and ".2." in key):
                parameter.add_(0.3 * torch.randn(parameter.shape))
                if key.endswith("bias") and ("cls" in key or "obj" in key or "cv3" in key):
                    parameter.fill_(-2.0)
    return detector


def with_statistics(detector):
    """BatchNorms know the test images, without which the outputs of all cells are nearly equal."""
    norms = [module for module in detector.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        detector.train()(full_batch())
    for norm in norms:
        norm.momentum = 0.03
    return detector.eval()


def full_batch(dtype=torch.float32):
    """Images that fill the tensor, because the package knows no padding; one has no boxes, none has a crowd box.

    Sides are powers of two, so that boxes survive the package's division by them bit by bit.
    """
    targets = (FULL[0], target([[1, 1, 60, 60], [0, 0, 50, 88]], [1, 2]), target([], []))
    images = torch.rand(3, 3, 128, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    return Batch(images, torch.tensor([[128, 64]] * 3), targets, (0, 1, 2), (View((128, 64), (128, 64)),) * 3)


def library_targets(detector, batch):
    """The targets in the package's form, [B, N, 5], filled up with zeros."""
    found = batch.images.new_zeros(len(batch), max(map(len, batch.targets)), 5)
    height, width = batch.padding_hw
    for rows, one in zip(found, batch.targets, strict=True):
        corners = one.boxes_xyxy.to(found.dtype)
        rows[: len(one), 0] = one.labels.to(found.dtype)
        if "yolox" in detector.spec.name:  # centre and size in pixels
            rows[: len(one), 1:3] = (corners[:, :2] + corners[:, 2:]) / 2
            rows[: len(one), 3:] = corners[:, 2:] - corners[:, :2]
        else:  # corners in parts of the image
            rows[: len(one), 1:] = corners / corners.new_tensor([width, height, width, height])
    return found


def library_loss(detector, batch, l1=False):
    """Loss terms and gradients by the package alone."""
    model = copy.deepcopy(detector.model).train()
    model.head.use_l1 = l1
    found = model(detector.normalized(batch), library_targets(detector, batch))
    found["total_loss"].backward()
    return found, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "l1"), [*((name, False) for name in NAMES), (NAMES[0], True)])
def test_losses_and_gradients_equal_the_packages(name, l1, dtype):
    detector, batch = built(name).to(dtype).train(), full_batch(dtype)
    theirs, gradients = library_loss(detector, batch, l1)
    if l1:
        detector.schedule(Clock(step=0, total=100, epoch=85, epochs=100))
    losses = detector.loss(detector(batch).prediction, batch)
    losses.total().backward()
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    assert ("l1_loss" in losses.terms) == l1
    for key, value in losses.terms.items():
        assert float(value.detach()) > 0
        torch.testing.assert_close(value.detach(), theirs[key].detach().to(dtype), rtol=tolerance, atol=0)
    torch.testing.assert_close(losses.total().detach(), theirs["total_loss"].detach().to(dtype), rtol=tolerance, atol=0)
    mine = {name: p.grad for name, p in detector.model.named_parameters() if p.grad is not None}
    assert mine.keys() == gradients.keys()
    assert len(mine) > 100
    whole = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    difference = torch.stack([(mine[key] - gradients[key]).norm() for key in mine]).norm()
    assert difference <= (1e-5 if dtype == torch.float32 else tolerance) * whole


@pytest.mark.parametrize("name", NAMES[1:3])
def test_no_objects_at_all_are_the_packages_loss_too(name):
    detector, batch = built(name).train(), full_batch()
    batch = replace(batch, targets=(target([], []),) * 3)
    theirs, _ = library_loss(detector, replace(batch, targets=(target([[0, 0, 0, 0]], [0]),) * 3))  # a row of zeros is no object
    total = detector.loss(detector(batch).prediction, batch).total()
    torch.testing.assert_close(total.detach(), theirs["total_loss"].detach(), rtol=1e-6, atol=0)
    total.backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in detector.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", NAMES)
def test_detections_equal_the_packages(name):
    detector, batch = with_statistics(built(name)), full_batch()
    if "yolox" in name:
        from libreyolo.postprocess.yolox import postprocess
    else:
        from libreyolo.postprocess.yolo9 import postprocess
    with torch.no_grad():
        prediction = detector(batch).prediction
        mine = detector.detect(prediction, batch)
        outputs = detector.model(detector.normalized(batch))
        for image, one in enumerate(mine):
            alone = slice(image, image + 1)
            output = {"predictions": outputs["predictions"][alone]} if "yolo9" in name else [level[alone] for level in outputs]
            other = postprocess(output, 0.001, 0.6, input_size=(128, 64), original_size=(64, 128), max_det=300)
            assert len(one) == other["num_detections"] > 5
            assert one.boxes_xyxy.tolist() == other["boxes"]
            assert one.scores.tolist() == other["scores"]
            assert one.labels.tolist() == other["classes"]
            same = (prediction.levels == one.origin.level[:, None]) & (prediction.cells == one.origin.cell[:, None]).all(dim=2)
            boxes = prediction.boxes_xyxy[image, same.int().argmax(dim=1)].clamp(min=0)
            boxes = boxes.minimum(torch.tensor([64.0, 128, 64, 128]))
            torch.testing.assert_close(boxes, one.boxes_xyxy, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", NAMES[1:])
def test_what_every_detector_keeps(name):
    assert {"neck", "spec", "parts", "looks", "teacher_runs_once", "towers"} <= set(check_detector(built(name)))


def test_capabilities_and_specs_are_those_of_the_network():
    x, nine, fine = built(NAMES[0]), built("yolo9-t"), built("yolo9_p2-t")
    assert isinstance(x, HasSchedule)
    assert not isinstance(x, HasBoxDistributions)
    assert not isinstance(nine, HasSchedule)
    assert isinstance(nine, HasBoxDistributions)
    assert isinstance(x, HasTowers)
    assert isinstance(nine, HasTowers)
    assert (x.tower_depth, nine.tower_depth) == (3, 2)
    assert (x.spec.box_bins, nine.spec.box_bins) == (0, 16)
    assert (x.spec.channels, x.spec.strides) == ((16, 32, 64), (8, 16, 32))
    assert (nine.spec.channels, fine.spec.channels) == ((64, 96, 128), (32, 64, 96, 128))
    assert fine.spec.strides == (4, 8, 16, 32)
    assert built("yolox-n").spec.channels == (64, 128, 256)


@pytest.mark.parametrize("name", ["yolox-n", "yolo9-t"])
def test_images_enter_the_network_as_in_the_package(name):
    """Order of colours, range and padding: the package letterboxes an image of the right size to the corner."""
    detector = built(f"{name},{SMALL}" if name == "yolox-n" else name)
    pixels = np.random.default_rng(0).integers(0, 256, (96, 64, 3), dtype=np.uint8)
    if name == "yolox-n":
        from libreyolo.preprocess.yolox import preprocess_numpy
    else:
        from libreyolo.preprocess.yolo9 import preprocess_numpy
    theirs, ratio = preprocess_numpy(pixels, (96, 96))
    assert ratio == 1
    images = torch.zeros(1, 3, 96, 96)
    images[0, :, :, :64] = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
    batch = Batch(images, torch.tensor([[96, 64]]), (target([], []),), (0,), (View((96, 64), (96, 64)),))
    torch.testing.assert_close(detector.normalized(batch)[0], torch.from_numpy(theirs), rtol=1e-6, atol=0)
    unequal = detector.normalized(unequal_batch())
    grey = 114.0 if name == "yolox-n" else 114 / 255
    assert unequal.shape[-2:] == (128, 128)
    torch.testing.assert_close(unequal[1, :, 90:], torch.full_like(unequal[1, :, 90:], grey))
    torch.testing.assert_close(unequal[1, :, :, 70:], torch.full_like(unequal[1, :, :, 70:], grey))


def test_means_of_the_distributions_are_the_boxes():
    detector, batch = built("yolo9-t"), full_batch()
    prediction = detector(batch).prediction
    found = detector.distributions(prediction, batch)
    means = found.logits.softmax(dim=-1) @ found.steps
    torch.testing.assert_close(found.origins + means * found.units, prediction.boxes_xyxy, rtol=1e-5, atol=1e-3)


def test_weights_of_simota_are_the_ious_of_its_pairs():
    from torchvision.ops import box_iou

    detector, batch = built(NAMES[1]).train(), full_batch()
    prediction = detector(batch).prediction
    own = detector.assign(prediction, batch)
    for image, one in enumerate(batch.targets):
        positive = own.matched[image] >= 0
        assert bool(positive.any()) == (len(one) > 0)
        if len(one):
            overlap = box_iou(prediction.boxes_xyxy[image][positive], one.boxes_xyxy)
            wanted = overlap.gather(1, own.matched[image][positive][:, None])[:, 0]
            torch.testing.assert_close(own.weights[image][positive], wanted.detach(), rtol=1e-4, atol=1e-5)
    assert len(own.matched[0].unique()) > 2  # cells of several objects, and cells without
    assert bool((own.weights[own.matched < 0] == 1).all())


@pytest.mark.parametrize("name", NAMES[1:3])
def test_a_foreign_assignment_is_used_and_ignored_cells_cost_nothing(name):
    detector, batch = built(name).train(), full_batch()
    prediction = detector(batch).prediction
    own = detector.assign(prediction, batch)
    positive = own.matched >= 0
    assert 0 < int(positive.sum()) < positive.numel()
    assert not positive[2].any()
    term, output = ("obj_loss", prediction.quality) if "yolox" in name else ("cls_loss", prediction.logits)
    (gradient,) = torch.autograd.grad(detector.loss(prediction, batch).terms[term], output, retain_graph=True)
    ignored = own.as_ignored(~positive)
    (without,) = torch.autograd.grad(detector.loss(prediction, batch, ignored).terms[term], output, retain_graph=True)
    assert gradient[~positive].any()
    assert not without[~positive].any()
    torch.testing.assert_close(without[positive], gradient[positive])
    hard = detector.loss(prediction, batch, Assignment(own.matched)).terms["cls_loss"]
    assert not torch.isclose(hard, detector.loss(prediction, batch, own).terms["cls_loss"])
    divided = detector.loss(prediction, batch, replace(own, normalizer=torch.tensor(2.0)))
    again = detector.loss(prediction, batch, replace(own, normalizer=torch.tensor(4.0)))
    torch.testing.assert_close(divided.total(), 2 * again.total())


def test_an_assignment_by_another_detector_trains_yolox():
    detector, batch = built(NAMES[1]).train(), full_batch()
    other = built("yolo9-t", seed=1)
    given = other.assign(other(batch).prediction, batch)
    prediction = detector(batch).prediction
    terms = detector.loss(prediction, batch, given).terms
    positive = given.matched >= 0
    labels = torch.cat([one.labels[row[row >= 0]] for one, row in zip(batch.targets, given.matched, strict=True)])
    wanted = torch.zeros(len(labels), 3)
    wanted[torch.arange(len(labels)), labels] = given.weights[positive]
    logits = prediction.logits[positive]
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, wanted, reduction="sum") / len(labels)
    torch.testing.assert_close(terms["cls_loss"], expected)
    found = detector.positives(prediction, given, batch)
    assert found.labels.tolist() == labels.tolist()
    torch.testing.assert_close(found.boxes_xyxy, prediction.boxes_xyxy[positive])


@pytest.mark.parametrize("name", NAMES[1:3])
def test_crowd_boxes_are_nobodys(name):
    detector, batch = built(name).train(), unequal_batch()
    matched = detector.assign(detector(batch).prediction, batch).matched
    assert set(matched[1].unique().tolist()) == {-1, 1}  # box 0 of the second image is a crowd


@pytest.mark.parametrize(
    ("options", "epochs", "wanted"),
    [("", 17, [False, False] + 15 * [True]), ("", 3, 3 * [True]), (",l1=1", 3, [False, False, True]), (",l1=0", 2, 2 * [False])],
)
def test_the_l1_loss_is_on_in_the_last_epochs(options, epochs, wanted):
    detector = built(NAMES[0] + options)
    found = []
    for epoch in range(epochs):
        detector.schedule(Clock(step=epoch, total=epochs, epoch=epoch, epochs=epochs))
        found.append(detector.l1)
    assert found == wanted


def test_the_stem_sees_shared_maps_once():
    detector, batch = built(NAMES[1]).train(), full_batch()
    features = detector.features(batch)
    before = int(detector.head.stems[0].bn.num_batches_tracked)
    detector.predict(features, batch)
    assert int(detector.head.stems[0].bn.num_batches_tracked) == before + 1


def test_a_cached_prediction_of_one_image_has_its_detections_and_loss():
    detector, batch = built(NAMES[1]).eval(), full_batch()
    with torch.no_grad():
        prediction = detector(batch).prediction
        whole = detector.detect(prediction, batch)
        pieces = type(prediction).stack(prediction.split(3))
        again = detector.detect(pieces, batch)
    assert all(torch.equal(one.boxes_xyxy, other.boxes_xyxy) for one, other in zip(whole, again, strict=True))
    torch.testing.assert_close(detector.loss(pieces, batch).total(), detector.loss(prediction, batch).total())


@pytest.mark.parametrize(
    ("method", "teacher", "student", "terms"),
    [
        ("crosskd", NAMES[0], NAMES[0], {"crosskd_cls", "crosskd_box", "crosskd_centerness"}),
        ("ld", "yolo9-t", "yolo9-t", {"ld_box", "ld_cls", "ld_valuable"}),
        ("fkd", "yolo9-t", NAMES[0], {"fkd_feature", "fkd_channel", "fkd_spatial", "fkd_relation"}),
        ("unikd", NAMES[0], NAMES[1], {"content", "positional"}),
        ("dicod,classifier=test_resnet,size=32", None, NAMES[0], {"crop_classes", "crop_pixels", "crop_features"}),
    ],
)
def test_methods_teach_it(method, teacher, student, terms):
    """Each kind of capability once: towers and quality, distributions, maps, a decoder on positives, positive boxes."""
    frozen = None if teacher is None else Teacher(built(teacher, seed=1))
    learner, batch = built(student).train(), full_batch()
    taught = build_method(method, frozen, learner)
    losses = taught.step(learner, batch, taught.teach(batch), Clock(0, 10))
    distilled = {name: value for name, value in losses.terms.items() if name in terms}
    assert distilled.keys() == terms
    assert losses.terms.keys() - terms == learner.loss(learner(batch).prediction, batch).terms.keys()
    assert all(bool(torch.isfinite(value)) for value in distilled.values())
    backbone = learner.parts().parameters(learner.parts().backbone)
    reached = torch.autograd.grad(sum(distilled.values()), backbone, allow_unused=True)
    assert sum(gradient is not None and bool(gradient.any()) for gradient in reached) > 0.5 * len(backbone)


def test_gid_cannot_compare_instances_of_levels_with_different_channels():
    frozen, learner = Teacher(built(NAMES[0], seed=1)), built(NAMES[1])
    expected = r"^gid: the levels of the teacher libreyolo:yolox-n,width=0\.0625 have \(16, 32, 64\) channels, and instances of"
    with pytest.raises(PairError, match=expected):
        build_method("gid", frozen, learner)
    build_method("gid,feature_weight=0,relation_weight=0", frozen, learner)


# ---------------------------------------------------------------------------------------------------------------- files


def opened(path):
    """The file as the package opens it."""
    from libreyolo import LibreYOLO

    return LibreYOLO(str(path), device="cpu")


@pytest.mark.parametrize("name", ["yolox-n", "yolo9-t", "yolo9_p2-t"])
def test_a_pt_file_is_read_bit_by_bit_and_the_package_opens_ours(name, tmp_path):
    detector, batch = built(name).eval(), full_batch()
    detector.save_pt(tmp_path / "best.pt")
    loaded = load_detector(f"libreyolo:{tmp_path / 'best.pt'}").eval()
    assert loaded.spec.classes == CLASSES
    theirs = opened(tmp_path / "best.pt")
    assert theirs.names == dict(enumerate(CLASSES))
    theirs.save(str(tmp_path / "theirs.pt"))
    again = load_detector(f"libreyolo:{tmp_path / 'theirs.pt'}").eval()
    with torch.no_grad():
        wanted = detector(batch).prediction
        for found in (loaded, again):
            assert torch.equal(found(batch).prediction.logits, wanted.logits)
            assert torch.equal(found(batch).prediction.boxes_xyxy, wanted.boxes_xyxy)
        state = theirs.model.state_dict()
        assert all(torch.equal(tensor, state[key]) for key, tensor in detector.model.state_dict().items())


def test_class_layers_of_a_fine_tuned_yolo9_keep_their_width(tmp_path):
    """The package replaces the last layer only, so the inner ones are as wide as for the classes of its first training."""
    torch.manual_seed(0)
    network = build_network({"family": "yolo9", "size": "t", "class_width": 80}, 3)
    assert network.head.cv3[0][0].conv.out_channels == 80
    assert build_network({"family": "yolo9", "size": "t"}, 3).head.cv3[0][0].conv.out_channels == 64
    content = {"model": {**network.state_dict(), "aux.spp.weight": torch.zeros(1)}, "model_family": "yolo9", "size": "t"}
    content |= {"task": "detect", "nc": 3, "names": list(CLASSES), "imgsz": 64, "schema_version": "1.0", "libreyolo_version": "1"}
    torch.save(content, tmp_path / "tuned.pt")
    detector = load_detector(f"libreyolo:{tmp_path / 'tuned.pt'}").eval()
    images = full_batch().images
    with torch.no_grad():
        assert torch.equal(detector.model(images)["predictions"], network.eval()(images)["predictions"])
        detector.save_pt(tmp_path / "again.pt")
        assert torch.equal(opened(tmp_path / "again.pt").model.eval()(images)["predictions"], network(images)["predictions"])
    again = load_detector(save_student(detector, tmp_path / "student"))
    assert again.model.head.cv3[0][0].conv.out_channels == 80


@pytest.mark.parametrize("name", ["yolox-n", "yolo9-t"])
def test_other_classes_keep_what_fits(name, tmp_path):
    detector, batch = built(name).eval(), full_batch()
    detector.save_pt(tmp_path / "best.pt")
    some = load_detector(f"libreyolo:{tmp_path / 'best.pt'}", ("c", "a")).eval()
    with torch.no_grad():
        assert torch.equal(some(batch).prediction.logits, detector(batch).prediction.logits[..., [2, 0]])
        for one in some.detect(some(batch).prediction, batch):
            assert set(one.labels.tolist()) <= {0, 1}
    again = load_detector(save_student(some, tmp_path / "student")).eval()
    assert again.spec == some.spec
    with torch.no_grad():
        assert torch.equal(again(batch).prediction.logits, some(batch).prediction.logits)
    new = build_detector(f"libreyolo:{tmp_path / 'best.pt'}", ("x", "y"))
    own, before = new.model.state_dict(), detector.model.state_dict()
    outputs = {key for key in own if own[key].shape != before[key].shape}
    assert {own[key].shape[0] for key in outputs} == {2}
    assert len(outputs) == 6
    kept = [key for key in own if key not in outputs]
    assert all(torch.equal(own[key], before[key]) for key in kept)


def content_of(name="yolox-n", **changes):
    detector = built(name)
    content = {"model": detector.model.state_dict(), "model_family": "yolox", "size": "n", "task": "detect", "nc": 3}
    content |= {"names": dict(enumerate(CLASSES)), "imgsz": 416, "schema_version": "1.0", "libreyolo_version": "1.6.0"}
    return {key: value for key, value in {**content, **changes}.items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model": None}, r"holds no weights of libreyolo \(no entry 'model' with tensors\)"),
        ({"model_family": None}, r"does not say which network its weights fit .*LibreYOLO\(FILE\)\.save\(NEW\)"),
        ({"schema_version": "2.0"}, "is of version 2.0 of the form of libreyolo's files; 1.0 is read here"),
        ({"task": "segment"}, "is for the task 'segment'; give a detector of boxes"),
        ({"model_family": "rtmdet"}, "holds a rtmdet, which cannot be built here; families: yolox, yolo9, yolo9_p2"),
        (
            {"size": "z"},
            r"holds a yolox of size 'z', which libreyolo [\d.]+ does not have; if the file is of a newer",
        ),
        ({"quant": {}}, "is quantised"),
        ({"names": ["a"]}, "names 1 classes, but its network has 3"),
        ({"size": "t"}, r"matches \d+ of \d+ tensors of its own network \(backbone\.backbone\.\S+ does not fit\)"),
        ({"model": {"x": torch.zeros(1)}}, r"matches 0 of \d+ tensors"),
    ],
)
def test_files_that_do_not_fit_are_named(changes, expected, tmp_path):
    torch.save(content_of(**changes), tmp_path / "x.pt")
    with pytest.raises(ModelError, match=expected):
        load_detector(f"libreyolo:{tmp_path / 'x.pt'}")


def test_other_classes_do_not_hide_that_a_file_is_of_another_network(tmp_path):
    torch.save(content_of(size="t"), tmp_path / "x.pt")
    with pytest.raises(ModelError, match=r"matches \d+ of \d+ tensors"):
        build_detector(f"libreyolo:{tmp_path / 'x.pt'}", ("x", "y"))


def test_reading_a_file_runs_nothing_of_it(tmp_path):
    ran = tmp_path / "ran"

    class Marker:
        def __reduce__(self):
            return (open, (str(ran), "w"))

    torch.save(content_of(optimizer=Marker()), tmp_path / "marked.pt")
    assert load_detector(f"libreyolo:{tmp_path / 'marked.pt'}").spec.classes == CLASSES
    assert not ran.exists()


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("yolox-q", "yolox has the sizes n, t, s, m, l, x; write e.g. yolox-n"),
        ("yolox", "yolox has the sizes n, t, s, m, l, x; write e.g. yolox-n"),
        ("yolo9-x", "yolo9 has the sizes t, s, m, c; write e.g. yolo9-t"),
        (
            "yoloxn",
            r"'yoloxn' is no network of libreyolo that is built here \(did you mean 'yolox-n'\?\); families: yolox, ",
        ),
        ("rtmdet-t", "'rtmdet-t' is no network of libreyolo that is built here"),
        ("yolo9-t,width=0.5", "depth and width are there for yolox only; yolo9 has fixed channels"),
        ("yolo9-t,l1=5", "l1 is there for yolox only"),
        ("missing.pt", "missing.pt: there is no such file"),
        ("x.pt,width=0.5", "depth and width belong to its file and cannot be changed"),
        ("yolox-n,neck=9", "libreyolo has no option 'neck'"),
    ],
)
def test_mistakes_in_model_strings(model, expected):
    with pytest.raises(ModelError, match=expected):
        build_detector(f"libreyolo:{model}", CLASSES)


def test_networks_without_weights_have_no_classes_of_their_own():
    with pytest.raises(ModelError, match="has no weights, so no classes of its own; give its"):
        load_detector("libreyolo:yolox-n")


def test_importing_the_package_changes_nothing_elsewhere():
    """Nothing is replaced, and none of its loggers writes; OpenCV, which it imports, sets paths of its own in the environment."""
    code = (
        "import logging, numpy, random, torch, torchvision, warnings\nfrom PIL import Image, ImageFile\n"
        "modules = torch, torch.nn, torch.nn.functional, torch.optim, torchvision.ops, Image, ImageFile, random, warnings\n"
        "def state():\n"
        "    names = {(m.__name__, k): id(v) for m in modules for k, v in vars(m).items() if k != '__warningregistry__'}\n"
        "    return (names, numpy.get_printoptions(), repr(torch.tensor([1 / 3] * 40)), torch.get_num_threads(),\n"
        "            torch.get_rng_state().tolist(), random.getstate(), list(logging.root.handlers), logging.root.level,\n"
        "            torch.serialization.get_safe_globals(), torch.get_default_dtype())\n"
        "before = state()\n"
        "from detdistill.detectors.yolo.shared.libreyolo_networks import need_library\nneed_library('x')\n"
        "after = state()\n"
        "changed = [key for key in before[0] if before[0][key] != after[0][key]]\n"
        "assert not changed, changed\n"
        "assert before[1:] == after[1:], [one == two for one, two in zip(before, after)]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_missing_package_is_named_with_its_licence(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "libreyolo" else find(name, *a))
    with pytest.raises(ModelError, match=r"needs the package libreyolo \(MIT\): pip install 'detdistill\[libreyolo\]'"):
        build_detector("libreyolo:yolox-n", CLASSES)


@pytest.mark.parametrize("name", [f"yolox-n,{SMALL},score=0.01", "yolox-n", "yolo9-t"])
def test_a_student_folder_loads_here_and_by_the_lines_of_its_readme(name, tmp_path, monkeypatch):
    detector, batch = built(name).eval(), full_batch()
    folder = save_student(detector, tmp_path / "student")
    loaded = load_detector(folder).eval()
    assert loaded.options == replace(detector.options, name=loaded.options.name)
    text = (folder / "README.md").read_text()
    code = next(block for block in text.split("```python\n")[1:] if "libreyolo" in block).split("```")[0]
    assert ("best.pt" in text) == ("width" not in name)
    found = {}
    exec(code.replace("path/to/this/folder", str(folder)), found)
    images = detector.normalized(batch)
    with torch.no_grad():
        wanted = flat(detector.model(images))
        assert torch.equal(flat(loaded.model(images)), wanted)
        assert torch.equal(flat(found["model"](images)), wanted)
    (folder / "network.json").unlink()
    with pytest.raises(ModelError, match=r"save it again|save the student again"):
        load_detector(folder)


def flat(output):
    """The outputs of the package's network as one tensor."""
    levels = output["raw_outputs"] if isinstance(output, dict) else output
    return torch.cat([level.flatten(2) for level in levels], dim=2)


def test_the_command_writes_a_file_for_the_package(tmp_path, capsys):
    from detdistill import cli
    from detdistill.files import folder_damage

    folder = save_student(built("yolox-n").eval(), tmp_path / "student")
    cli.main(["student", "--model", str(folder), "--out", str(tmp_path / "out"), "--pt", "--size", "64"])
    assert capsys.readouterr().out == f"student folder {tmp_path / 'out'}\n"
    assert opened(tmp_path / "out" / "best.pt").names == dict(enumerate(CLASSES))
    assert not folder_damage(tmp_path / "out")
    small = save_student(built(NAMES[0]).eval(), tmp_path / "small")
    with pytest.raises(SystemExit):
        cli.main(["student", "--model", str(small), "--out", str(tmp_path / "none"), "--pt", "--size", "64"])
    assert "does not fit into a .pt file" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_yolox_learns_from_a_detr_and_goes_on_from_its_folder(tmp_path):
    import detdistill

    data = "digits:train=8,val=4,size=64,seed=0"
    quick = {"size": 64, "steps": 2, "batch": 4, "workers": 0, "device": "cpu", "report": False}
    teacher = detdistill.train(
        "rt_detr:resnet10t,width=0.25,dim=32,heads=2,ffn=32,queries=10,decoder=2", data, out=tmp_path / "t", **quick
    )
    run = detdistill.distill(teacher, f"libreyolo:yolox-n,{SMALL}", data, "pkd", out=tmp_path / "s", score_teacher=False, **quick)
    terms = (run.folder / "metrics.csv").read_text().splitlines()[0]
    assert "obj_loss" in terms
    assert "l1_loss" in terms
    assert "pkd" in terms
    again = load_detector(run.folder)
    assert again.spec.classes == tuple(str(digit) for digit in range(10))
    assert json.loads((run.folder / "student" / "network.json").read_text())["description"]["family"] == "yolox"
