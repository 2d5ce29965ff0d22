import copy
import dataclasses
import json
import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from detdistill.detectors.build import build_detector
from detdistill.detectors.contract import Teacher
from detdistill.detectors.probe import tiny_name
from detdistill.errors import DetdistillError, ModelError
from detdistill.functional.crops import clamp_boxes, crop_boxes
from detdistill.losses import dicod_classification_loss, dicod_localization_loss, dicod_pooled, dicod_sample
from detdistill.methods.dicod import DICOD, Classifier, DICODTaught, as_teacher, jittered, large_enough
from detdistill.methods.dicod import method as method_module
from detdistill.methods.shared.compose import build_method
from detdistill.methods.shared.contract import Composition
from detdistill.methods.shared.needs import PairError
from detdistill.structures import Clock, Target, TaughtTogether, map_tensors
from tests.golden import Golden, assert_golden
from tests.methods.contract_checks import check_method, run_stage, tensors, without_boxes
from tests.tiny import TinyDense, TinyQueries, TinyRegions, tiny_batch

SMALL = {"classifier": "test_resnet", "size": 32}
CLOCK = Clock(5, 10)


# ------------------------------------------------------------------------------------------ against the released code


@pytest.fixture
def golden():
    return Golden("dicod")


class GoldenNetwork(nn.Module):
    """The file's classifier, with timm's way of showing its maps."""

    def __init__(self, golden):
        super().__init__()
        state = golden.parameters("param_")
        width, inputs, side = state["conv1_weight"].shape[:3]
        self.conv1 = nn.Conv2d(inputs, width, side, 2, side // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        widths = [state[f"layer{layer}_0_weight"].shape[:2] for layer in (1, 2)]
        self.layer1 = nn.Sequential(nn.Conv2d(widths[0][1], widths[0][0], 3, padding=1), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Conv2d(widths[1][1], widths[1][0], 3, 2, 1), nn.ReLU())
        self.fc = nn.Linear(*reversed(state["fc_weight"].shape))
        endings = ("running_mean", "running_var", "weight", "bias")
        for name, tensor in state.items():
            ending = next(ending for ending in endings if name.endswith(ending))
            self.state_dict()[f"{name[: -len(ending) - 1].replace('_', '.')}.{ending}"].copy_(tensor)
        self.pretrained_cfg = {"mean": (0.0,) * inputs, "std": (1.0,) * inputs}
        self.feature_info = [{}] * 3

    def forward_intermediates(self, x, indices, intermediates_only=False, stop_early=False):
        maps = [self.bn1(self.conv1(x)).relu()]
        x = self.maxpool(maps[0])
        for layer in (self.layer1, self.layer2):
            x = layer(x)
            maps.append(x)
        maps = [maps[index] for index in indices]
        return maps if intermediates_only else (x, maps)

    def forward_head(self, x):
        return self.fc(x.mean(dim=(2, 3)))


def by_image(golden, prefix, like=None):
    """The file's entries for each image; empty for images without one."""
    found = {b: golden[f"{prefix}_{b}"] for b in range(golden.meta["shapes"]["B"]) if f"{prefix}_{b}" in golden}
    some = next(iter(found.values()))
    return [found.get(b, some[:0]) for b in range(golden.meta["shapes"]["B"])]


@pytest.mark.parametrize("form", ["softmax", "binary"])
def test_class_term_and_gradients_equal_the_released_code(golden, form):
    hyper = golden.meta["hyper"]
    student = [part.requires_grad_() for part in by_image(golden, f"in_student_logits_{form}")]
    teacher = by_image(golden, "in_teacher_logits")

    def loss(mine, theirs):
        return hyper["lambda_kc"] * dicod_classification_loss(mine, theirs, hyper["T"], form, hyper["avg_factor"])

    for one in zip(student, teacher, golden[f"out_cls_{form}_per_image"], strict=True):
        assert_golden(loss(*one[:2]), one[2])
    total = loss(torch.cat(student), torch.cat(teacher))
    assert_golden(total, golden[f"out_cls_{form}"])
    for mine, expected in zip(student, by_image(golden, f"grad_student_logits_{form}"), strict=True):
        (gradient,) = torch.autograd.grad(total, mine, retain_graph=True)
        assert_golden(gradient, expected)


def test_normalized_form_equals_the_released_code(golden):
    hyper = golden.meta["hyper"]
    logits, teacher = (torch.cat(by_image(golden, f"in_{side}")) for side in ("student_logits_binary", "teacher_logits"))
    loss = dicod_classification_loss(logits, teacher, hyper["T"], "normalized", hyper["avg_factor"])
    assert_golden(hyper["lambda_kc"] * loss, golden["out_cls_sigmoid_normalised"])


def test_localization_and_gradients_equal_the_released_code(golden):
    hyper, images = golden.meta["hyper"], golden["in_images"]
    classifier = Classifier(GoldenNetwork(golden), ["a"] * golden.meta["shapes"]["K"])
    layers = [layer for layer in hyper["layers"] if layer >= 0]
    sizes = [tuple(images.shape[-2:])] * len(images)
    predicted = [boxes.requires_grad_() for boxes in by_image(golden, "in_student_pos_boxes")]
    image = torch.cat([torch.full((len(boxes),), b) for b, boxes in enumerate(predicted)])

    def described(boxes):
        crops = crop_boxes(images, clamp_boxes(torch.cat(boxes), image, sizes), image, hyper["object_size"])
        return dicod_pooled([crops, *classifier.maps(crops, layers)], hyper["gap_size"])

    with as_teacher(classifier):
        truth = described(by_image(golden, "in_target_pos_boxes"))
        pixels, features = dicod_localization_loss(described(predicted), truth, hyper["lambda_kl"], hyper["lambda_kl"])
    assert_golden(pixels, golden["out_loc_pixels_only"])
    assert_golden(pixels + features, golden["out_loc_total"])
    (pixels + features).backward()
    for boxes, expected in zip(predicted, by_image(golden, "grad_student_boxes"), strict=True):
        assert_golden(boxes.grad, expected)
    assert all(parameter.grad is None for parameter in classifier.parameters())


def test_crops_and_class_scores_equal_the_released_code(golden):
    hyper, images = golden.meta["hyper"], golden["in_images"]
    classifier = Classifier(GoldenNetwork(golden), ["a"] * golden.meta["shapes"]["K"]).eval()
    sizes = [tuple(images.shape[-2:])] * len(images)
    box = clamp_boxes(by_image(golden, "in_student_pos_boxes")[0][:1], torch.tensor([0]), sizes)
    crop = crop_boxes(images, box, torch.tensor([0]), hyper["object_size"])
    assert_golden(crop, golden["out_crop_pred_image0_box0"])
    for index, boxes in enumerate(by_image(golden, "in_boxes")):
        if len(boxes):
            crops = crop_boxes(images, boxes, torch.full((len(boxes),), index), hyper["object_size"])
            logits, _ = classifier.describe(crops, [0])
            assert_golden(logits, golden[f"out_teacher_logits_gt_{index}"])


# ------------------------------------------------------------------------------------------------------- pure functions


def test_softmax_form_by_hand():
    logits = torch.tensor([[math.log(2.0), 0.0, 0.0]])  # 1/2, 1/4, 1/4 for the background
    loss = dicod_classification_loss(logits, torch.zeros(1, 2), temperature=1.0)
    assert float(loss) == pytest.approx(0.5 * math.log(1.0) + 0.5 * math.log(2.0), abs=1e-6)


def test_binary_form_by_hand():
    logits, teacher = torch.tensor([[math.log(3.0), 0.0]]), torch.zeros(1, 2)  # 3/4 against 1/2, and equal
    expected = (0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)) / 2
    assert float(dicod_classification_loss(logits, teacher, 1.0, "binary")) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("form", ["softmax", "binary", "normalized"])
def test_agreement_costs_nothing_and_disagreement_does(form):
    teacher = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    alike = F.pad(teacher, (0, 1), value=-1e4) if form == "softmax" else teacher
    alike.requires_grad_()
    loss = dicod_classification_loss(alike, teacher, 2.0, form)
    assert float(loss.detach()) == pytest.approx(0.0, abs=1e-7)
    (gradient,) = torch.autograd.grad(loss, alike)
    assert float(gradient.abs().max()) < 1e-7
    assert float(dicod_classification_loss(alike.detach().roll(1, dims=0), teacher, 2.0, form)) > 0.01


@pytest.mark.parametrize("form", ["softmax", "binary"])
def test_extreme_logits_are_finite(form):
    teacher = torch.tensor([[200.0, -200.0], [-200.0, 200.0]])
    student = torch.tensor([[-200.0, 200.0, 200.0], [200.0, -200.0, 200.0]])[:, : 3 if form == "softmax" else 2].requires_grad_()
    loss = dicod_classification_loss(student, teacher, 1.0, form)
    loss.backward()
    assert bool(torch.isfinite(loss))
    assert bool(torch.isfinite(student.grad).all())


def test_temperature_keeps_the_gradients_order():
    generator = torch.Generator().manual_seed(0)
    logits, teacher = torch.randn(20, 5, generator=generator), torch.randn(20, 4, generator=generator)
    norms = []
    for temperature in (1.0, 2.0, 4.0):
        mine = logits.clone().requires_grad_()
        dicod_classification_loss(mine, teacher, temperature).backward()
        norms.append(float(mine.grad.norm()))
    assert min(norms) / max(norms) > 0.4


def test_without_positives_all_terms_are_zero_and_connected():
    logits = torch.zeros(0, 4, requires_grad=True)
    maps = [torch.zeros(0, 3, 4, 4, requires_grad=True), torch.zeros(0, 8, 8, 8)]
    terms = [dicod_classification_loss(logits, torch.zeros(0, 3)), *dicod_localization_loss(maps, maps)]
    assert [float(term.detach()) for term in terms] == [0.0, 0.0, 0.0]
    sum(terms).backward()
    assert logits.grad.shape == (0, 4)


def test_localization_by_hand():
    zeros = [torch.zeros(2, 3, 2, 2), torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 8, 8)]
    ones = [torch.full_like(level, value) for level, value in zip(zeros, (1.0, 2.0, 4.0), strict=True)]
    ones[0][1] = -3.0  # positives 1 and 3: mean 2
    pixels, features = dicod_localization_loss(ones, zeros, 0.5, 0.1)
    assert (float(pixels), float(features)) == pytest.approx((1.0, 0.3))
    assert float(dicod_localization_loss(ones[:1], zeros[:1], 0.5, 0.1)[1]) == 0


def test_samples_are_unbiased():
    values = torch.arange(7.0)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([dicod_sample(7, 3, generator) for _ in range(4000)])
    assert bool((drawn.diff(dim=1) > 0).all())
    assert float(values[drawn].mean()) == pytest.approx(3.0, abs=0.05)
    torch.testing.assert_close(drawn.flatten().bincount() / 4000, torch.full((7,), 3 / 7), atol=0.03, rtol=0)
    assert dicod_sample(3, 3).tolist() == [0, 1, 2]


def test_jitter_keeps_boxes_near():
    boxes = torch.tensor([[10.0, 20.0, 50.0, 40.0]]).expand(500, -1)
    torch.manual_seed(0)
    moved = jittered(boxes, 0.1)
    centers = (moved[:, :2] + moved[:, 2:]) / 2
    assert bool(((centers - torch.tensor([30.0, 30.0])).abs() <= torch.tensor([4.0001, 2.0001])).all())
    assert float((moved[:, 2] - moved[:, 0]).min()) >= 40 * math.exp(-0.1) - 1e-3
    assert float((moved[:, 2] - moved[:, 0]).max()) <= 40 * math.exp(0.1) + 1e-3
    assert float(moved.std(dim=0).min()) > 0.5
    torch.testing.assert_close(jittered(boxes, 0.0), boxes)


# ----------------------------------------------------------------------------------------------------------- the method


def build(student=None, **options):
    torch.manual_seed(0)
    return DICOD(None, student or TinyDense(seed=2), **{**SMALL, **options})


def learn(method, student, batch, clock=CLOCK):
    torch.manual_seed(7)
    return method.learn(student, student(batch), method.teach(batch), batch, clock)


def test_contract():
    assert check_method(DICOD, **SMALL) == ["dense 8", "regions 8", "queries 8"]


def test_contract_in_all_decoder_layers_and_a_sample():
    check_method(DICOD, **SMALL, decoder_layers="all", max_crops=2, layers=(0, 2), sigmoid_form="normalized")


def with_perfect_boxes(student, batch):
    """The student's own positives, with the true boxes as predictions."""

    def positives(prediction, assignment, asked):
        found = type(student).positives(student, prediction, assignment, asked)
        return dataclasses.replace(found, boxes_xyxy=found.targets_xyxy + 0 * found.boxes_xyxy)

    student.positives = positives
    return student


@pytest.mark.parametrize("kind", [TinyDense, TinyRegions, TinyQueries])
def test_true_boxes_cost_nothing(kind):
    student, batch = kind(seed=2), tiny_batch(3)
    method = build(student)
    losses = learn(method, with_perfect_boxes(student, batch), batch)
    assert float(losses.terms["crop_pixels"].detach()) == pytest.approx(0, abs=1e-6)
    assert float(losses.terms["crop_features"].detach()) == pytest.approx(0, abs=1e-6)
    assert float(losses.monitors["cropped"]) == 1


def test_gradients_of_the_boxes_equal_finite_differences():
    """The whole chain in float64: positive boxes, crops, features of the frozen classifier."""
    batch = tiny_batch(2)
    batch = dataclasses.replace(batch, images=batch.images.double())
    method = build(max_crops=4).double()
    student = TinyDense(seed=2).double()
    taught = method.teach(batch)
    seen = student(batch)
    positives = student.positives(seen.prediction, student.assign(seen.prediction, batch), batch)
    shift = torch.tensor([0.13, 0.31, -0.17, 0.23], dtype=torch.float64)
    boxes = (positives.targets_xyxy + shift).detach().requires_grad_()

    def loss(moved):
        found = dataclasses.replace(positives, boxes_xyxy=moved)
        pixels, features, _ = method._localization(found, taught, batch, CLOCK)
        return pixels + features

    (gradient,) = torch.autograd.grad(loss(boxes), boxes)
    assert float(gradient.abs().max()) > 0
    for place in range(boxes.numel()):
        step = torch.zeros_like(boxes).flatten()
        step[place] = 1e-7
        step = step.view_as(boxes)
        with torch.no_grad():
            slope = float(loss(boxes + step) - loss(boxes - step)) / 2e-7
        assert slope == pytest.approx(float(gradient.flatten()[place]), rel=1e-4, abs=1e-5)


def test_gradients_reach_the_student_only():
    student, batch = TinyDense(seed=2), tiny_batch(3)
    method = build(student)
    losses = learn(method, student, batch)
    for name in ("crop_pixels", "crop_features"):
        (gradient,) = torch.autograd.grad(losses.terms[name], student.head.deltas.weight, retain_graph=True)
        assert float(gradient.abs().max()) > 0, name
    losses.total().backward()
    assert all(parameter.grad is None for parameter in method.parameters())
    assert all(parameter.requires_grad for parameter in method.parameters())
    assert method.classifier.training
    assert float(student.backbone[0].weight.grad.abs().max()) > 0


@pytest.mark.parametrize("kind", [TinyDense, TinyRegions, TinyQueries])
def test_classes_are_compared_by_name_and_terms_are_means_over_positives(kind):
    student, batch = kind(seed=2), tiny_batch(3)
    method = build(student)
    method.classifier.classes = ("b", "x", "a")
    method.places = torch.tensor([2, 0])
    taught = method.teach(batch)
    shuffled = torch.randn(*taught.logits.shape[:2], 3)
    taught = dataclasses.replace(taught, logits=shuffled)
    torch.manual_seed(7)
    seen = student(batch)
    losses = method.learn(student, seen, taught, batch, CLOCK)
    positives = method._positives(student, seen, batch)
    assert len(positives) > 0
    theirs = shuffled[positives.image, positives.ground_truth][:, [2, 0]] / 2
    if positives.softmax:
        mine = (positives.logits / 2).log_softmax(dim=1)[:, :-1]
        expected = (theirs.softmax(dim=1) * (theirs.log_softmax(dim=1) - mine)).sum(dim=1).mean()
    else:
        ours, wanted = (torch.distributions.Bernoulli(logits=side) for side in (positives.logits / 2, theirs))
        expected = torch.distributions.kl_divergence(wanted, ours).mean()
    torch.testing.assert_close(losses.terms["crop_classes"], 0.4 * 4 * expected, rtol=1e-5, atol=1e-6)


def test_queries_of_the_last_layer_or_of_all():
    student, batch = TinyQueries(seed=2), tiny_batch(3)
    torch.manual_seed(7)
    seen = student(batch)
    last, everything = (build(student, decoder_layers=word)._positives(student, seen, batch) for word in ("last", "all"))
    assert len(last) == sum(map(len, batch.targets))
    assert set(last.layer.tolist()) == {1}
    assert len(everything) == 2 * len(last)


def test_pixels_count_in_the_units_of_the_students_input():
    batch = tiny_batch(3)
    student = TinyDense(seed=2)
    fine = TinyDense(seed=2)
    fine.spec = dataclasses.replace(fine.spec, std=tuple(value / 10 for value in fine.spec.std))
    seen = student(batch)
    values = []
    for one in (student, fine):
        method = build(one, feature_weight=0.0, cls_weight=0.0)
        values.append(float(method.learn(one, seen, method.teach(batch), batch, CLOCK).total().detach()))
    assert values[0] > 0
    assert values[1] == pytest.approx(10 * values[0], rel=1e-5)


def test_an_image_without_boxes_changes_nothing():
    student = TinyDense(seed=2)
    method = build(student)
    three = without_boxes(tiny_batch(3), range(2, 3))
    two = dataclasses.replace(
        three, images=three.images[:2], sizes=three.sizes[:2], targets=three.targets[:2], ids=three.ids[:2], views=three.views[:2]
    )
    more, fewer = (learn(method, student, batch).terms for batch in (three, two))
    for name, term in fewer.items():
        torch.testing.assert_close(more[name], term, rtol=1e-5, atol=1e-7)


def test_without_any_boxes_all_terms_are_zero():
    student, batch = TinyDense(seed=2), without_boxes(tiny_batch(3), range(3))
    method = build(student)
    taught = method.teach(batch)
    assert taught.logits.shape == (3, 0, 2)
    assert taught.features[0].shape[:2] == (3, 0)
    losses = method.learn(student, student(batch), taught, batch, CLOCK)
    assert {name: float(term.detach()) for name, term in losses.terms.items()} == {
        "crop_classes": 0.0,
        "crop_pixels": 0.0,
        "crop_features": 0.0,
    }
    losses.total().backward()


def test_teaching_does_not_depend_on_chunks(monkeypatch):
    method, batch = build(), tiny_batch(3)
    whole = method.teach(batch)
    monkeypatch.setattr(method_module, "CHUNK", 2)
    for (path, first), (_, second) in zip(tensors(whole), tensors(method.teach(batch)), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5, msg=path)


def test_knowledge_of_an_image_does_not_depend_on_the_others():
    method, batch = build(), tiny_batch(3)
    pieces = method.teach(batch).split(3)
    assert [piece.logits.shape[1] for piece in pieces] == [len(target) for target in batch.targets]
    again = DICODTaught.stack(pieces)
    for (path, first), (_, second) in zip(tensors(again), tensors(method.teach(batch)), strict=True):
        assert torch.equal(first, second), path


def test_a_sample_has_the_mean_of_all():
    student, batch = TinyDense(seed=2), tiny_batch(3)
    whole, part = build(student), build(student, max_crops=2)
    seen, taught = student(batch), whole.teach(batch)

    def terms(method, clock):
        with torch.no_grad():
            losses = method.learn(student, seen, taught, batch, clock)
        return losses, torch.stack([losses.terms[name] for name in ("crop_pixels", "crop_features")])

    expected = terms(whole, CLOCK)[1]
    drawn = torch.stack([terms(part, Clock(step, 1000))[1] for step in range(150)])
    assert float(drawn.std(dim=0).min()) > 0
    error = drawn.std(dim=0) / 150**0.5
    assert bool(((drawn.mean(dim=0) - expected).abs() < 4 * error).all())
    assert torch.equal(terms(part, CLOCK)[1], terms(part, CLOCK)[1])  # seeded
    assert float(terms(part, CLOCK)[0].monitors["cropped"]) < 1


def test_all_predicted_boxes_go_through_the_classifier_in_one_batch():
    student, batch = TinyDense(seed=2), tiny_batch(3)
    seen = student(batch)
    positives = student.positives(seen.prediction, student.assign(seen.prediction, batch), batch)
    assert len(positives) > 3
    assert len(positives.image.unique()) > 1
    for limit in (len(positives), 3):
        method = build(student, max_crops=limit)
        taught = method.teach(batch)
        with mock.patch.object(method.classifier, "maps", wraps=method.classifier.maps) as maps:
            method.learn(student, seen, taught, batch, CLOCK)
        assert [len(call.args[0]) for call in maps.call_args_list] == [limit]


# ---------------------------------------------------------------------------------------------------------- bad boxes


def test_boxes_of_no_area_and_crowds_take_no_part():
    batch = tiny_batch(1, seed=3)
    target = batch.targets[0]
    extra = torch.tensor([[5.0, 5.0, 5.0, 20.0], [40.0, 40.0, 60.0, 60.0], [70.0, 70.0, 90.0, 90.0]])
    boxes = torch.cat([target.boxes_xyxy, extra])
    labels = torch.cat([target.labels, torch.zeros(3, dtype=torch.int64)])
    crowd = torch.tensor([False] * len(target) + [False, True, False])
    batch = batch.with_targets([Target(boxes, labels, crowd)])
    student = TinyDense(seed=2)
    method = build(student)
    taught = method.teach(batch)
    assert taught.usable[0].tolist() == [True] * len(target) + [False] * 3
    losses = learn(method, student, batch)
    losses.total().backward()
    assert all(bool(torch.isfinite(value).all()) for _, value in tensors(losses))
    assert bool(torch.isfinite(method.train_classifier(batch, None, CLOCK).total()))


def test_predicted_boxes_outside_or_without_area_are_left_out():
    student, batch = TinyDense(seed=2), tiny_batch(2)
    method = build(student)
    seen, taught = student(batch), method.teach(batch)
    positives = student.positives(seen.prediction, student.assign(seen.prediction, batch), batch)
    boxes = positives.targets_xyxy.clone() + 1
    first = map_tensors(dataclasses.replace(positives, boxes_xyxy=boxes), lambda tensor: tensor[:1])
    alone, _, _ = method._localization(first, taught, batch, CLOCK)
    boxes[1:] = torch.tensor([500.0, 500.0, 600.0, 600.0])
    boxes[2] = torch.tensor([9.0, 9.0, 9.0, 9.0])
    boxes.requires_grad_()
    pixels, features, cropped = method._localization(dataclasses.replace(positives, boxes_xyxy=boxes), taught, batch, CLOCK)
    assert cropped == 1
    torch.testing.assert_close(pixels.detach(), alone)
    (pixels + features).backward()
    assert float(boxes.grad[0].abs().max()) > 0
    assert float(boxes.grad[1:].abs().max()) == 0
    nothing = torch.full_like(boxes, torch.nan).requires_grad_()
    pixels, features, cropped = method._localization(dataclasses.replace(positives, boxes_xyxy=nothing), taught, batch, CLOCK)
    assert (float(pixels.detach()), float(features.detach()), cropped) == (0.0, 0.0, 0)


def test_large_enough():
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.9, 5.0], [5.0, 0.0, 1.0, 5.0], [torch.nan] * 4])
    assert large_enough(boxes).tolist() == [True, False, False, False]


# ---------------------------------------------------------------------------------------------------- the first stage


def test_stages_train_what_they_should():
    student, batch = TinyDense(seed=2), tiny_batch(3)
    method = build(student)
    first, last = method.stages(student)
    losses = run_stage(first, student, method, batch)
    assert set(losses.terms) == {"categorical", "focal"}
    assert 0 <= float(losses.monitors["accuracy"]) <= 1
    assert all(parameter.grad is not None for parameter in method.classifier.parameters())
    assert all(parameter.grad is None for parameter in student.parameters())
    before = copy.deepcopy(method.state_dict())
    run_stage(last, student, method, batch)
    assert all(parameter.grad is None for parameter in method.classifier.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in method.state_dict().items())  # statistics too


def test_a_classifier_for_ssds_learns_by_cross_entropy_alone():
    student = TinyDense(seed=2)
    student.spec = dataclasses.replace(student.spec, softmax=True)
    losses = build(student).train_classifier(tiny_batch(3), None, CLOCK)
    assert set(losses.terms) == {"categorical"}
    assert set(build(TinyRegions(seed=2)).train_classifier(tiny_batch(3), None, CLOCK).terms) == {"categorical", "focal"}


def test_losses_of_the_first_stage_by_value():
    method, batch = build(jitter=0.0), tiny_batch(3)
    boxes, image, _ = method._objects(batch)
    labels = torch.cat([target.labels for target in batch.targets])
    method.eval()
    logits = method.classifier(method.classifier.crops(batch, boxes, image, 32))
    losses = method.train_classifier(batch, None, CLOCK)
    torch.testing.assert_close(losses.terms["categorical"], F.cross_entropy(logits, labels))
    wanted = F.one_hot(labels, 2).float()
    p = torch.where(wanted > 0, logits.sigmoid(), 1 - logits.sigmoid())
    focal = -torch.where(wanted > 0, 0.25, 0.75) * (1 - p) ** 2 * p.log()
    torch.testing.assert_close(losses.terms["focal"], focal.sum() / len(labels))
    assert float(losses.monitors["accuracy"]) == pytest.approx(float((logits.argmax(dim=1) == labels).float().mean()))


@pytest.mark.parametrize("images", [0, 1])
def test_first_stage_with_no_or_one_object(images):
    batch = without_boxes(tiny_batch(3), range(3))
    if images:
        batch = batch.with_targets(
            [Target(*(t[:1] for t in vars(tiny_batch(1).targets[0]).values() if t is not None)), *batch.targets[1:]]
        )
    method = build()
    method.train_classifier(batch, None, CLOCK).total().backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in method.classifier.parameters())
    assert method.classifier.training


def test_the_classifier_learns_its_objects():
    """Two classes of one colour each: all objects are recognised, and the monitor of the second stage says so."""
    student, batch = TinyDense(seed=2), tiny_batch(3)
    images = batch.images * 0.2
    for index, target in enumerate(batch.targets):
        for (x1, y1, x2, y2), label in zip(target.boxes_xyxy.int().tolist(), target.labels.tolist(), strict=True):
            images[index, label, y1:y2, x1:x2] += 0.7
    batch = dataclasses.replace(batch, images=images)
    method = build(student)
    first = method.stages(student)[0]
    optimizer = torch.optim.SGD(method.classifier.parameters(), lr=first.overrides["lr"], momentum=0.9)
    for step in range(25):
        losses = first.step(batch, None, Clock(step, 25))
        optimizer.zero_grad()
        losses.total().backward()
        optimizer.step()
    assert float(losses.monitors["accuracy"]) == 1
    assert float(learn(method, student, batch).monitors["classifier_accuracy"]) == 1


def test_the_stage_depends_on_the_classifier_only():
    def key(student=None, **options):
        return build(student, **options).stages(TinyDense())[0].depends_on

    changed = [
        key(size=48),
        key(jitter=0.2),
        key(classifier="resnet10t"),
        key(classifier_lr=0.1),
        key(TinyDense(classes=("a", "c"))),
    ]
    assert len({key(), *changed}) == 6
    assert key(cls_weight=0.1, temperature=1.0, layers=(0, 1), cells=2, max_crops=9) == key()
    assert key(TinyRegions()) == key()  # one classifier for all students that learn with its losses


# ------------------------------------------------------------------------------------------------------------ weights


def test_weights_come_back_by_name(tmp_path):
    source = Classifier.build("test_resnet", ("c", "b", "a"))
    path = tmp_path / "classifier.safetensors"
    source.save(path)
    student, batch = TinyDense(seed=2), tiny_batch(3)
    method = build(student, weights=str(path))
    assert method.places.tolist() == [2, 1]
    assert [stage.name for stage in method.stages(student)] == ["distill"]
    assert method.classifier.classes == ("c", "b", "a")
    boxes, image, _ = method._objects(batch)
    expected = source.eval()(source.crops(batch, boxes, image, 32))
    torch.testing.assert_close(torch.cat([p.logits[0] for p in method.teach(batch).split(3)]), expected, rtol=1e-4, atol=1e-5)


def test_weights_with_other_classes_are_refused_with_both_lists(tmp_path):
    path = tmp_path / "classifier.safetensors"
    Classifier.build("test_resnet", ("a", "dog")).save(path)
    with pytest.raises(PairError, match=r"knows a, dog; the student's classes are a, b; it does not know b") as caught:
        build(weights=str(path))
    assert "\n" not in str(caught.value)
    assert build(weights=str(path), cls_weight=0.0).places.tolist() == []


def test_bad_weights(tmp_path):
    good = Classifier.build("test_resnet", ("a", "b"))
    with pytest.raises(ModelError, match=r"only \.safetensors files are read"):
        build(weights=str(tmp_path / "classifier.pt"))
    with pytest.raises(ModelError, match="cannot be read"):
        build(weights=str(tmp_path / "nothing.safetensors"))
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"nothing of the kind")
    with pytest.raises(ModelError, match="cannot be read"):
        build(weights=str(broken))
    named = tmp_path / "named.safetensors"
    good.save(named)
    with pytest.raises(ModelError, match="are of test_resnet, not of resnet10t; write classifier=test_resnet"):
        build(weights=str(named), classifier="resnet10t")
    plain = tmp_path / "plain.safetensors"
    save_file(good.network.state_dict(), plain)
    with pytest.raises(ModelError, match="do not fit resnet10t"):
        build(weights=str(plain), classifier="resnet10t")
    with pytest.raises(PairError, match="does not name its classes"):
        build(weights=str(plain))
    assert build(weights=str(plain), cls_weight=0.0).classifier.classes == ()  # its features need no names
    wrong = tmp_path / "wrong.safetensors"
    save_file(good.network.state_dict(), wrong, metadata={"classes": json.dumps(["a"])})
    with pytest.raises(ModelError, match="do not fit test_resnet"):
        build(weights=str(wrong))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classifier": "resnet17"}, "unknown classifier 'resnet17'.*did you mean 'resnet"),
        (
            {"cls_weight": 0.0, "pixel_weight": 0.0, "feature_weight": 0.0},
            "^dicod: cls_weight, pixel_weight, feature_weight are all 0; nothing would be distilled$",
        ),
        ({"cls_weight": float("nan")}, "^dicod: cls_weight=nan is not a number, 0 or more$"),
        ({"temperature": 0.0}, "^dicod: temperature=0.0 is not a number above 0$"),
        ({"jitter": 2.0}, "^dicod: jitter=2.0 is not a number from 0 to 1$"),
        ({"layers": (1, 0)}, "^dicod: layers=1/0 must rise; feature_weight=0 leaves them out$"),
        ({"layers": ()}, "^dicod: layers= must rise; feature_weight=0 leaves them out$"),
        ({"layers": (0, 7)}, "has the layers 0 to 4; layers=7 is none$"),
        ({"layers": (-1,)}, r"^dicod: layers=\(-1,\) is not a list, each a whole number, 0 or more$"),
        ({"size": 0}, "^dicod: size=0 is not a whole number, 1 or more$"),
        ({"classifier": "test_vit", "size": 50}, "classifier test_vit does not take crops of size=50"),
        ({"decoder_layers": "first"}, r"^dicod: decoder_layers=first is not one of last, all"),
    ],
)
def test_bad_hyper_parameters(options, message):
    with pytest.raises(DetdistillError, match=message):
        build(**options)


def test_one_class_is_refused_where_a_classifier_has_nothing_to_say(tmp_path):
    for student in (TinyDense(classes=("a",)), TinyRegions(classes=("a",))):
        with pytest.raises(PairError, match=r"with one class \(a\) a classifier has nothing to tell apart"):
            build(student)
        with pytest.raises(PairError, match="with one class"):
            build(student, cls_weight=0.0)  # nor has it learned any features
        pixels = build(student, cls_weight=0.0, feature_weight=0.0)
        assert [stage.name for stage in pixels.stages(student)] == ["distill"]
        assert set(learn(pixels, student, one_class(tiny_batch(2))).terms) == {"crop_pixels"}
    path = tmp_path / "two.safetensors"
    Classifier.build("test_resnet", ("a", "b")).save(path)
    student = TinyDense(classes=("a",), seed=2)
    losses = learn(build(student, weights=str(path)), student, one_class(tiny_batch(2)))
    assert set(losses.terms) == {"crop_classes", "crop_pixels", "crop_features"}  # a sigmoid of a classifier that knows more
    assert "classifier_accuracy" not in losses.monitors
    with pytest.raises(PairError, match="with one class"):
        build(TinyRegions(classes=("a",)), weights=str(path))


def one_class(batch):
    return batch.with_targets([dataclasses.replace(target, labels=torch.zeros_like(target.labels)) for target in batch.targets])


# ------------------------------------------------------------------------------------------------- with other methods


def test_beside_a_method_with_a_detector_teacher():
    """``dicod+fkd``: one has a classifier of its own, the other the teacher; stages, losses and knowledge of both."""
    torch.manual_seed(0)
    student, batch = TinyDense(seed=2), tiny_batch(3)
    teacher = Teacher(TinyRegions(channels=(16, 16), seed=1))
    method = build_method("dicod,classifier=test_resnet,size=32+fkd", teacher, student)
    assert isinstance(method, Composition)
    assert method.teachers() == (teacher,)
    first, last = method.stages(student)
    assert (first.name, last.name) == ("classifier", "distill")
    losses = run_stage(first, student, method, batch)
    assert set(losses.terms) == {"categorical", "focal"}
    assert all(parameter.grad is None for parameter in method.parts["fkd"].parameters())
    losses = run_stage(last, student, method, batch)
    assert {"dicod/crop_classes", "dicod/crop_pixels", "dicod/crop_features"} < set(losses.terms)
    assert any(name.startswith("fkd/") for name in losses.terms)
    assert "dicod/classifier_accuracy" in losses.monitors
    assert all(parameter.grad is None for parameter in method.parts["dicod"].parameters())
    trained = [parameter for parameter in method.parts["fkd"].parameters() if parameter.grad is not None]
    assert trained
    taught = method.teach(batch)
    assert isinstance(taught, TaughtTogether)
    again = TaughtTogether.stack(taught.split(3))
    seen = student(batch)
    for name, term in method.learn(student, seen, again, batch, CLOCK).terms.items():
        torch.testing.assert_close(term, method.learn(student, seen, taught, batch, CLOCK).terms[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["ssd", "fcos", "faster_rcnn", "rt_detr"])
def test_real_students(name):
    torch.manual_seed(0)
    student = build_detector(tiny_name(name), ("a", "b"))
    method = build(student)
    batch = tiny_batch(2, size=128)
    if student.spec.fixed_size_hw:
        batch = tiny_batch(2, size=student.spec.fixed_size_hw[0])
    first = method.stages(student)[0]
    assert bool(torch.isfinite(first.step(batch, None, CLOCK).total().detach()))
    student.train()
    with torch.no_grad():
        taught = method.teach(batch)
    seen = student(batch)
    losses = method.learn(student, seen, taught, batch, CLOCK)
    assert float(losses.monitors["cropped"]) > 0
    parameters = [p for p in student.parameters() if p.requires_grad]
    for term, value in losses.terms.items():
        assert float(value.detach()) > 0, term
        gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        assert sum(float(g.abs().sum()) for g in gradients if g is not None) > 0, term
