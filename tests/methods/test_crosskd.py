import copy
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from detdistill.detectors.build import build_detector
from detdistill.detectors.contract import Detector, DetectorSpec, Teacher, dense_positives
from detdistill.functional.assign import max_iou_assign
from detdistill.functional.atss import atss_assign
from detdistill.functional.boxes import boxes_from_distances, distances_to_sides
from detdistill.functional.focal import distribution_mean
from detdistill.functional.regions import decode_boxes
from detdistill.losses import (
    crosskd_align,
    crosskd_box_loss,
    crosskd_centerness_loss,
    crosskd_class_loss,
    crosskd_distribution_loss,
    crosskd_moments,
    crosskd_scores,
    pkd_loss,
)
from detdistill.methods.crosskd import CrossKD, CrossKDMoments
from detdistill.methods.shared.contract import teach_by_canvas
from detdistill.methods.shared.hyper_parameters import MethodError
from detdistill.methods.shared.needs import PairError
from detdistill.structures import IGNORED, Assignment, Batch, Clock, Dense, Features, Look, Target, Tower, View
from tests.detectors.dense.own import CLASSES
from tests.detectors.dense.shared import unequal_batch
from tests.golden import Golden, assert_golden
from tests.methods.contract_checks import check_method
from tests.tiny import TinyDense, TinyRegions, tiny_batch

# ---------------------------------------------------------------------------------------------------------- the numbers


def released_anchors(words, strides, shapes):
    """Anchors of one cell from the file's description, on the corners of cells; for FCOS points in their middle."""
    if words.startswith("points"):
        scales, ratios, offset = [1.0], [1.0], 0.5
    else:
        base = float(re.search(r"octave_base_scale (\d+)", words)[1])
        octaves = int(found[1]) if (found := re.search(r"(\d+) scales", words)) else 1
        scales, offset = [base * 2 ** (i / octaves) for i in range(octaves)], 0
        ratios = [float(r) for r in found[1].split(",")] if (found := re.search(r"ratios ([\d.,]+)", words)) else [1.0]
    levels, cells, numbers, anchors = [], [], [], []
    for level, (stride, (height, width)) in enumerate(zip(strides, shapes, strict=True)):
        for row in range(height):
            for column in range(width):
                center = torch.tensor([(column + offset) * stride, (row + offset) * stride], dtype=torch.float64)
                for number, (ratio, scale) in enumerate((r, s) for r in ratios for s in scales):
                    half = torch.tensor([ratio**-0.5, ratio**0.5], dtype=torch.float64) * scale * stride / 2
                    levels.append(level), cells.append((row, column)), numbers.append(number)
                    anchors.append(torch.cat([center - half, center + half]))
    return torch.stack(anchors), torch.tensor(levels), torch.tensor(cells), torch.tensor(numbers)


class ReleasedHead(Detector):
    """A head of mmdet with the file's parameters and, as its features, the file's maps."""

    def __init__(self, golden, side, kind, dtype):
        super().__init__()
        meta = golden.meta
        self.kind, self.words, self.groups = kind, meta["anchors"], int((re.findall(r"GN\((\d+)", meta["norm"]) or [0])[0])
        self.weights = {n: p.to(dtype).requires_grad_() for n, p in golden.parameters(f"param_{side}_").items()}
        for name, parameter in self.weights.items():
            self.register_parameter(name, torch.nn.Parameter(parameter.detach().clone()))
        self.maps = [level.to(dtype) for level in golden.levels(f"in_{side}")]
        self.bins = (meta["reg_max"] or 0) + 1 if kind == "gfl" else 0
        self.tower_depth = meta["stacked_convs"]
        self.ranges = [tuple(map(float, pair)) for pair in re.findall(r"\((-?[\d.e]+),([\d.e]+)\)", self.words)]
        strides = tuple(golden["in_strides"].tolist())
        shapes = [tuple(level.shape[-2:]) for level in self.maps]
        self.layout = released_anchors(self.words, strides, shapes)
        classes = tuple(str(index) for index in range(meta["num_classes"]))
        anchors = (int(self.layout[3].max()) + 1,) * len(strides)
        channels = (meta["feat_channels"],) * len(strides)
        self.spec = DetectorSpec(f"{kind}:{side}", "dense", classes, channels, strides, anchors=anchors, box_bins=self.bins)

    def features(self, batch):
        return Features(tuple(self.maps), self.spec.strides)

    def tower(self, features, upto=None):
        whole = Tower(features.maps, features.maps, 0, features.strides)
        return self.advance(whole, self.tower_depth if upto is None else upto)

    def advance(self, hidden, upto):
        branches = {"cls": hidden.classification, "reg": hidden.regression}
        for block in range(hidden.depth, upto):
            for branch, levels in branches.items():
                name = f"{branch}_convs_{block}"
                done = []
                for level in levels:
                    level = F.conv2d(level, self.get_parameter(f"{name}_conv_weight"), self.bias(f"{name}_conv_bias"), padding=1)
                    if self.groups:
                        scale, shift = (self.get_parameter(f"{name}_gn_{part}") for part in ("weight", "bias"))
                        level = F.group_norm(level, self.groups, scale, shift)
                    done.append(level.relu())
                branches[branch] = tuple(done)
        return Tower(branches["cls"], branches["reg"], upto, hidden.strides)

    def bias(self, name):
        return dict(self.named_parameters()).get(name)

    def output(self, name, level):
        return F.conv2d(level, self.get_parameter(f"{name}_weight"), self.get_parameter(f"{name}_bias"), padding=1)

    def finish(self, hidden, batch):
        last = self.advance(hidden, self.tower_depth)
        prefix = {"gfl": "gfl_", "atss": "atss_", "retinanet": "retina_", "fcos": "conv_"}[self.kind]
        count = self.spec.anchors[0]

        def flat(maps, numbers):
            rows = [m.unflatten(1, (count, numbers)).permute(0, 3, 4, 1, 2).flatten(1, 3) for m in maps]
            return torch.cat(rows, dim=1)

        logits = flat([self.output(f"{prefix}cls", level) for level in last.classification], len(self.spec.classes))
        boxes = [self.output(f"{prefix}reg", level) for level in last.regression]
        if self.kind != "retinanet":
            boxes = [level * self.get_parameter(f"scales_{index}_scale") for index, level in enumerate(boxes)]
        deltas = flat(boxes, 4 * max(1, self.bins))
        quality = None
        if self.kind == "atss":
            quality = flat([self.output("atss_centerness", level) for level in last.regression], 1)[..., 0]
        anchors, levels, cells, numbers = self.layout
        priors = anchors.to(deltas.dtype).expand(len(batch), -1, -1)
        return Dense(logits, deltas, self.decode(deltas, priors, levels), priors, levels, cells, numbers, quality)

    def decode(self, deltas, priors, levels):
        if self.kind in ("atss", "retinanet"):
            return decode_boxes(deltas, priors, (10.0, 10.0, 5.0, 5.0) if self.kind == "atss" else (1.0,) * 4, True)
        centers = (priors[..., :2] + priors[..., 2:]) / 2
        if self.kind == "fcos":
            return boxes_from_distances(centers, deltas.exp())
        stride = torch.tensor(self.spec.strides, dtype=deltas.dtype)[levels][:, None]
        return boxes_from_distances(centers, distribution_mean(deltas, self.bins) * stride)

    def predict(self, features, batch):
        return self.finish(self.tower(features), batch)

    def assign(self, prediction, batch):
        rows = []
        for target in batch.targets:
            boxes, anchors = target.boxes_xyxy, self.layout[0]
            if self.kind in ("gfl", "atss"):
                rows.append(atss_assign(anchors, self.layout[1], boxes, 9)[0])
            elif self.kind == "retinanet":
                rows.append(max_iou_assign(anchors, boxes, positive=0.5, negative=0.4))
            else:
                rows.append(self.points(anchors, boxes))
        return Assignment(torch.stack(rows))

    def points(self, anchors, boxes):
        """FCOS without centre sampling: the smallest box that contains a point and whose size belongs to its level."""
        if len(boxes) == 0:
            return torch.full((len(anchors),), -1)
        sides = distances_to_sides((anchors[:, None, :2] + anchors[:, None, 2:]) / 2, boxes[None])
        low, high = torch.tensor(self.ranges, dtype=torch.float64)[self.layout[1]].unbind(1)
        farthest = sides.amax(dim=-1)
        fits = (sides.amin(dim=-1) > 0) & (farthest >= low[:, None]) & (farthest <= high[:, None])
        area = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1).expand(len(anchors), -1).masked_fill(~fits, torch.inf)
        value, index = area.min(dim=1)
        return torch.where(value < torch.inf, index, -1)

    def positives(self, prediction, assignment, batch):
        return dense_positives(prediction, assignment, batch)

    loss = detect = export = None


FILES = {"crosskd": "gfl", "crosskd_retinanet": "retinanet", "crosskd_atss": "atss", "crosskd_fcos": "fcos"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("file", FILES)
def test_values_and_gradients_equal_the_released_code(file, dtype):
    golden = Golden(file)
    meta, kind = golden.meta, FILES[file]
    student, other = (ReleasedHead(golden, side, kind, dtype) for side in ("student", "teacher"))
    leaves = student.maps = [level.requires_grad_() for level in student.maps]
    kd = meta["kd"]
    method = CrossKD(
        Teacher(other),
        student,
        profile=kind,
        depth=meta["reused_teacher_head_idx"],
        cls_weight=float(kd["loss_cls_kd"]["loss_weight"]),
        box_weight=float(kd["loss_reg_kd"]["loss_weight"]),
        centerness_weight=float(kd.get("loss_center_kd", {}).get("loss_weight", 0)),
        beta=float(kd["loss_cls_kd"]["beta"]),
        temperature=float(kd["loss_reg_kd"].get("T", 1)),
    )
    height, width = golden["in_pad_size"].tolist()
    targets = tuple(
        Target(boxes.reshape(-1, 4), labels, torch.zeros(len(labels), dtype=torch.bool))
        for boxes, labels in zip(golden.levels("in_boxes"), golden.levels("in_labels"), strict=True)
    )
    count = len(targets)
    view = View((height, width), (height, width))
    batch = Batch(
        torch.zeros(count, 3, height, width),
        torch.tensor([[height, width]] * count),
        targets,
        tuple(range(count)),
        (view,) * count,
    )
    seen = student(batch, Look(prediction=True) | method.requirements.student)
    terms = method.learn(student, seen, method.teach(batch), batch, Clock(1, 10)).terms
    for ours, names in {
        "cls": ["loss_cls_kd"],
        "box": ["loss_reg_kd"],
        "centerness": ["losses_center_kd", "loss_center_kd"],
    }.items():
        expected = [level for name in names for level in golden.levels(f"out_{name}")]
        if expected:
            assert_golden(terms[f"crosskd_{ours}"], torch.stack(expected).sum().to(dtype))
    total = torch.stack(list(terms.values())).sum()
    feature = [settings for name, settings in kd.items() if "feat" in name and settings]
    if feature:
        total = total + pkd_loss(leaves, other.maps, float(feature[0]["loss_weight"]))
    assert_golden(total, golden["out_total"].to(dtype))
    total.backward()
    for level, expected in zip(leaves, golden.levels("grad_student"), strict=True):
        assert_golden(level.grad, expected.to(dtype))
    for name, expected in golden.parameters("grad_param_student_").items():
        assert_golden(student.get_parameter(name).grad, expected.to(dtype))
    reached = {name for name, parameter in student.named_parameters() if parameter.grad is not None and parameter.grad.any()}
    assert reached == {name.replace(".", "_") for name in meta["student_params_with_gradient"]}
    assert all(parameter.grad is None for parameter in other.parameters())


# ------------------------------------------------------------------------------------------------------- the functions


def random(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments_of(maps):
    flat = maps.flatten(2)
    mean = flat.mean(dim=2)
    counts = torch.full((len(maps),), flat.shape[2], dtype=maps.dtype)
    return crosskd_moments(counts, mean, (flat - mean[..., None]).square().sum(dim=2))


def test_moments_of_images_are_those_of_the_batch():
    maps = random(0, 3, 4, 5, 6)
    found = moments_of(maps)
    torch.testing.assert_close(found.mean, maps.mean(dim=(0, 2, 3)))
    torch.testing.assert_close(found.std, maps.std(dim=(0, 2, 3)))


def test_moments_of_images_of_unequal_size():
    wide, narrow = random(1, 1, 4, 6), random(2, 1, 4, 5)
    parts = [(m.mean(dim=2), m.var(dim=2, correction=0) * m.shape[2]) for m in (wide, narrow)]
    means, squares = (torch.cat(values) for values in zip(*parts, strict=True))
    together = torch.cat([wide, narrow], dim=2)[0]
    found = crosskd_moments(torch.tensor([6.0, 5.0]).double(), means, squares)
    torch.testing.assert_close(found.mean, together.mean(dim=1))
    torch.testing.assert_close(found.std, together.std(dim=1))


def test_aligned_maps_have_the_teachers_moments_and_do_not_see_affine_changes():
    student, teacher = random(0, 3, 4, 5, 6), 3 * random(1, 3, 4, 5, 6) + 2
    moments = moments_of(teacher)
    aligned = crosskd_align(student, moments, rectify=False)
    torch.testing.assert_close(aligned.mean(dim=(0, 2, 3)), moments.mean)
    torch.testing.assert_close(aligned.std(dim=(0, 2, 3)), moments.std, rtol=1e-5, atol=0)
    changed = student * random(2, 4, 1, 1).exp() + random(3, 4, 1, 1)
    torch.testing.assert_close(crosskd_align(changed, moments, rectify=False), aligned, rtol=1e-4, atol=1e-4)
    assert torch.equal(crosskd_align(student, moments), aligned.relu())
    torch.testing.assert_close(crosskd_align(teacher, moments, rectify=False), teacher, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (2, 3, 4, 4)], ids=["a single cell", "dead channels"])
def test_constant_channels_are_finite(shape):
    maps = torch.ones(shape, requires_grad=True)
    aligned = crosskd_align(maps, CrossKDMoments(torch.full((3,), 2.0), torch.ones(3)))
    aligned.sum().backward()
    torch.testing.assert_close(aligned, torch.full_like(aligned, 2.0))
    assert bool(torch.isfinite(maps.grad).all())
    assert moments_of(torch.ones(shape)).std.tolist() == [0, 0, 0]


def test_equal_predictions_have_no_loss_and_ignored_ones_no_gradient():
    logits, sides, weights = random(0, 2, 5, 3), random(1, 2, 5, 4, 7), torch.ones(2, 5, dtype=torch.float64)
    weights[0, 3] = 0
    scores = crosskd_scores(logits, weights)
    assert scores[0, 3] == 0
    torch.testing.assert_close(scores[1], logits[1].sigmoid().amax(dim=-1))
    corner = random(2, 2, 5, 2)
    boxes = torch.cat([corner, corner + random(3, 2, 5, 2).exp()], dim=-1)
    assert crosskd_class_loss(logits, logits, weights, 3.0).item() == 0
    assert crosskd_distribution_loss(sides, sides, scores).item() == 0
    for kind in ("giou", "log_iou"):
        assert crosskd_box_loss(boxes, boxes, scores, 3.0, kind).item() == pytest.approx(0, abs=1e-12)
    other = [(value + 0.1).requires_grad_() for value in (logits, sides, boxes)]
    total = crosskd_class_loss(other[0], logits, weights, 3.0) + crosskd_distribution_loss(other[1] * 2, sides, scores)
    total = total + crosskd_box_loss(other[2], boxes, scores, 3.0) + crosskd_box_loss(other[2], boxes, scores, 3.0, "log_iou")
    total.backward()
    assert all(not value.grad[0, 3].any() and value.grad[1].any() for value in other)


def test_no_score_gives_zero_and_boxes_apart_stay_finite():
    sides = random(0, 2, 5, 4, 7).requires_grad_()
    loss = crosskd_distribution_loss(sides, random(1, 2, 5, 4, 7), torch.zeros(2, 5).double())
    loss.backward()
    assert loss.item() == 0
    assert not sides.grad.any()
    far = crosskd_box_loss(torch.tensor([[0.0, 0, 1, 1]]), torch.tensor([[5.0, 5, 6, 6]]), torch.ones(1), 1.0, "log_iou")
    assert far.item() == pytest.approx(13.8155, rel=1e-4)


def test_centerness_is_the_cross_entropy():
    quality, fixed = random(0, 6), random(1, 6)
    t, c = fixed.sigmoid(), quality.sigmoid()
    expected = -(t * c.log() + (1 - t) * (1 - c).log()).sum() / 2
    torch.testing.assert_close(crosskd_centerness_loss(quality, fixed, 2.0), expected)
    assert crosskd_centerness_loss(quality[:0], fixed[:0], 2.0).item() == 0


# ---------------------------------------------------------------------------------------------------------- the method


@pytest.mark.parametrize(
    ("settings", "pairs"),
    [
        ({"depth": 1}, ["dense 8 -> dense 8"]),
        ({"depth": 0, "adapt": True, "profile": "fcos"}, ["dense 8 -> dense 8", "dense 16 -> dense 8"]),
    ],
    ids=["atss", "fcos, adapted"],
)
def test_contract(settings, pairs):
    assert check_method(CrossKD, **settings) == pairs


def learned(student, teacher, batch, **settings):
    method = CrossKD(Teacher(teacher), student, **settings)
    taught = teach_by_canvas(method, batch)
    seen = student(batch, Look(prediction=True) | method.requirements.student)
    return method.learn(student, seen.float(), taught.float(), batch, Clock(1, 10)).terms


def finite(student, terms):
    sum(terms.values()).backward()
    assert all(bool(torch.isfinite(term)) for term in terms.values())
    assert all(bool(torch.isfinite(p.grad).all()) for p in student.parameters() if p.grad is not None)


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_gradient_stops_after_the_held_block(depth):
    student, teacher = TinyDense(seed=1), TinyDense(seed=2)
    finite(student, learned(student, teacher, tiny_batch(3), depth=depth))
    moved = {name for name, parameter in student.named_parameters() if parameter.grad is not None and parameter.grad.any()}
    assert {name for name in moved if name.startswith("head.")} == {
        f"head.{branch}.{block}.{part}"
        for branch in ("classification", "regression")
        for block in range(depth)
        for part in ("weight", "bias")
    }
    assert any(name.startswith("backbone.") for name in moved)


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_an_equal_student_has_no_loss(depth):
    terms = learned(TinyDense(seed=1), TinyDense(seed=1), tiny_batch(2), depth=depth)
    assert all(term.item() == pytest.approx(0, abs=1e-3) for term in terms.values())


def test_classes_are_matched_by_name():
    student, batch = TinyDense(seed=1), tiny_batch()
    teacher, same = TinyDense(classes=("b", "c", "a"), seed=2), TinyDense(seed=2)
    state = teacher.state_dict()
    for name in ("head.logits.weight", "head.logits.bias"):
        state[name] = state[name][[2, 0]]
    same.load_state_dict(state)
    expected, found = (learned(student, other, batch, depth=1) for other in (same, teacher))
    assert [term.item() for term in found.values()] == pytest.approx([term.item() for term in expected.values()], rel=1e-5)


class AllIgnored(TinyDense):
    def assign(self, prediction, batch):
        return Assignment(torch.full(prediction.logits.shape[:2], IGNORED))


@pytest.mark.parametrize("normalizer", ["positives", "centerness"])
def test_no_positives_are_finite_and_ignored_locations_count_nothing(normalizer):
    student = TinyDense(seed=1)
    finite(student, learned(student, TinyDense(seed=2), tiny_batch(boxes=False), depth=1, normalizer=normalizer))
    terms = learned(AllIgnored(seed=1), TinyDense(seed=2), tiny_batch(), depth=1, normalizer=normalizer)
    assert [term.item() for term in terms.values()] == [0, 0]


ALL, CORNER, EMPTY = [0.0, 0.0, 64.0, 64.0], [60.0, 60.0, 64.0, 64.0], [0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("boxes", [[ALL], [CORNER, EMPTY]], ids=["all", "border"])
def test_odd_boxes_are_finite(boxes):
    count = len(boxes)
    target = Target(torch.tensor(boxes), torch.zeros(count, dtype=torch.int64), torch.zeros(count, dtype=torch.bool))
    batch = tiny_batch(1).with_targets([target])
    for settings in ({}, {"normalizer": "centerness", "box_loss": "log_iou"}):
        student = TinyDense(strides=(8, 64), seed=1)  # one cell on the second level
        finite(student, learned(student, TinyDense(strides=(8, 64), seed=2), batch, depth=1, **settings))


def test_cells_that_the_teacher_did_not_see_count_nothing():
    """An image that is lower than its batch: the teacher saw it alone, so the cells below have no target."""
    batch = tiny_batch(2)
    batch = replace(batch, canvases_hw=tuple(view.size_hw for view in batch.views))
    student, teacher = TinyDense(seed=1), TinyDense(seed=2)
    taught = teach_by_canvas(CrossKD(Teacher(teacher), student, depth=1), batch)
    assert taught.counts.tolist() == [[64, 16], [48, 12]]
    assert taught.prediction.padding.any()
    finite(student, learned(student, teacher, batch, depth=1))


SMALL = "resnet10t,channels=8-16-32-64,stem=8,neck=32,levels=3-5,convs=2"


@pytest.mark.parametrize("pair", ["gfl->gfl", "atss->gfl", "fcos->fcos", "retinanet->retinanet"])
def test_heads_of_the_library(pair):
    """Terms by the teacher's kind; finite in a half-precision run; nothing of the teacher changes."""
    kinds = pair.split("->")
    teacher, student = (build_detector(f"{kind}:{SMALL}", CLASSES) for kind in kinds)
    before = copy.deepcopy(teacher.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        terms = learned(student.train(), teacher, unequal_batch(), depth=1)
    finite(student, terms)
    assert terms.keys() == {"crosskd_cls", "crosskd_box", *(["crosskd_centerness"] if kinds[0] in ("atss", "fcos") else [])}
    assert all(term.dtype == torch.float32 for term in terms.values())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_the_teachers_head_runs_in_the_callers_precision_and_with_gradient(monkeypatch):
    student, teacher = (build_detector(f"gfl:{SMALL}", CLASSES) for _ in range(2))
    outputs, seen = type(teacher).outputs, []

    def watched(self, class_maps, box_maps):
        found = outputs(self, class_maps, box_maps)
        seen.append((self is teacher, torch.is_grad_enabled(), found["cls_logits"].dtype))
        return found

    monkeypatch.setattr(type(teacher), "outputs", watched)
    with torch.autocast("cpu", torch.bfloat16):
        learned(student, teacher, tiny_batch(1), depth=1)
    assert (True, True, torch.bfloat16) in seen


@pytest.mark.parametrize(
    ("teacher", "student", "settings", "message"),
    [
        (TinyRegions, TinyDense, {"depth": 1}, "the teacher .* predicts regions"),
        (TinyDense, TinyDense, {}, "the towers of the student tinydense:patches after 3 blocks, but they have 2"),
        (lambda: TinyDense(channels=(16, 16)), TinyDense, {"depth": 1}, "reads 16 channels.* have 8; .*adapt=true"),
        (lambda: TinyDense(classes=("a", "c")), TinyDense, {"depth": 1}, "the teacher does not know b"),
        (TinyDense, lambda: TinyDense(channels=(8,), strides=(8,)), {"depth": 1}, r"strides \(8,\), the teacher .*\(8, 16\)"),
        (TinyDense, TinyDense, {"depth": 1, "profile": "gfl"}, "each box side as one number"),
    ],
)
def test_pairs_that_do_not_fit_are_refused(teacher, student, settings, message):
    with pytest.raises(PairError, match=f"crosskd: .*{message}"):
        CrossKD(Teacher(teacher()), student(), **settings)


def test_other_anchors_and_missing_centerness_are_refused_before_the_first_image():
    student, teacher = (build_detector(f"retinanet:{SMALL}{more}", CLASSES) for more in ("", ",anchors=2"))
    with pytest.raises(PairError, match=r"crosskd: .*anchor 0 of stride 8 has 46x22 pixels in the student"):
        CrossKD(Teacher(teacher), student, depth=1)
    with pytest.raises(PairError, match="the teacher tinydense:patches predicts no centerness; set crosskd,centerness_weight=0"):
        CrossKD(Teacher(TinyDense(seed=1)), TinyDense(seed=2), depth=1, centerness_weight=1.0)
    CrossKD(
        Teacher(build_detector(f"fcos:{SMALL}", CLASSES)),
        build_detector(f"fcos:{SMALL}", CLASSES),
        centerness_weight=1.0,
        depth=1,
    )


def test_what_no_description_states_is_refused_by_the_first_batch():
    student, teacher = (build_detector(f"retinanet:{SMALL}{more}", CLASSES) for more in ("", ",anchors=2"))
    silent = TinyDense(seed=1)
    for detector in (teacher, silent):
        detector.spec = replace(detector.spec, coding=None)
    with pytest.raises(PairError, match=r"crosskd: .*anchor 0 of level 0 has 46x22 pixels"):
        learned(student, teacher, unequal_batch(), depth=1)
    with pytest.raises(PairError, match="predicts no centerness; set crosskd,centerness_weight=0"):
        learned(silent, TinyDense(seed=2), tiny_batch(), depth=1, centerness_weight=1.0)


NOTHING = {"cls_weight": 0, "box_weight": 0, "centerness_weight": 0}


@pytest.mark.parametrize("settings", [{"beta": 0.5}, NOTHING, {"profile": "paa"}])
def test_hyper_parameters_are_checked(settings):
    with pytest.raises(MethodError, match="crosskd"):
        CrossKD(Teacher(TinyDense()), TinyDense(), depth=1, **settings)
