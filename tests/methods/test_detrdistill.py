import copy
import dataclasses
import itertools

import pytest
import torch
from torch import nn

from detdistill.detectors import probe
from detdistill.detectors.build import build_detector
from detdistill.detectors.contract import PREDICTION, Teacher
from detdistill.errors import DetdistillError
from detdistill.losses import (
    detrdistill_contrastive_loss,
    detrdistill_feature_loss,
    detrdistill_layers,
    detrdistill_logits_loss,
    detrdistill_masks,
    detrdistill_match,
    detrdistill_quality,
    detrdistill_quality_weights,
    detrdistill_query_weights,
    detrdistill_split_loss,
)
from detdistill.methods.detrdistill import ContrastiveHead, DETRDistill, LogitsWeights
from detdistill.methods.shared.needs import PairError
from detdistill.structures import Assignment, Batch, Clock, Queries, QuerySeed, Target, View
from tests.detectors.dense.shared import unequal_batch
from tests.golden import Golden, assert_golden
from tests.methods.contract_checks import check_method, without_boxes
from tests.tiny import TinyDense, TinyQueries, tiny_batch

NOW = Clock(0, 1)

# ------------------------------------------------------------------------------------------------- the released numbers


class Released:
    """The golden file: inputs with gradients, and the hyper-parameters."""

    def __init__(self):
        self.file = Golden("detrdistill")
        self.hyper = self.file.meta["hyper"]
        self.sizes_hw = self.file["in_image_sizes_wh"].flip(1)
        self.boxes = [boxes.reshape(-1, 4) for boxes in self.file.levels("in_boxes")]
        self.labels = [labels.reshape(-1) for labels in self.file.levels("in_labels")]
        self.costs = LogitsWeights(self.hyper["cost_cls"], self.hyper["cost_l1"], self.hyper["cost_giou"])
        self.weights = LogitsWeights(*(self.hyper[f"loss_{name}_distill"] for name in ("cls", "bbox", "iou")))

    def __getitem__(self, name):
        return self.file[name]

    def leaf(self, name):
        return self.file[name].requires_grad_(True)

    def teacher(self):
        return self["in_teacher_logits"], self["in_teacher_boxes"], self.sizes_hw

    def targets(self):
        pairs = zip(self.boxes, self.labels, strict=True)
        return tuple(Target(boxes, labels, torch.zeros(len(labels), dtype=torch.bool)) for boxes, labels in pairs)

    def batch(self):
        height, width = (int(side) for side in self.sizes_hw.amax(dim=0))
        views = tuple(View((h, w), (h, w)) for h, w in self.sizes_hw.tolist())
        images = torch.zeros(len(views), 3, height, width, dtype=torch.float64)
        return Batch(images, self.sizes_hw, self.targets(), tuple(range(len(views))), views)


@pytest.fixture
def released():
    return Released()


def near(actual, expected, tolerance=1e-6):
    """Where the released code rounds to float32 inside."""
    scale = float(expected.abs().max()) if expected.numel() else 1.0
    torch.testing.assert_close(actual.detach().to(expected), expected, rtol=tolerance, atol=tolerance * scale)


def test_matches_equal_the_released_code(released):
    matched = detrdistill_match(
        released["in_student_logits"], released["in_student_boxes"], *released.teacher(), costs=released.costs
    )
    assert torch.equal(matched, released["out_match"])


def test_losses_of_predictions_equal_the_released_code(released):
    logits, boxes = released.leaf("in_student_logits"), released.leaf("in_student_boxes")
    terms = detrdistill_logits_loss(logits, boxes, *released.teacher(), released["out_match"], released.weights)
    near(terms.cls, released["out_logits_cls"], 1e-5)
    assert_golden(terms.l1, released["out_logits_l1"])
    assert_golden(terms.giou, released["out_logits_giou"])
    torch.stack(terms).sum().backward()
    near(logits.grad, released["grad_student_logits"])  # soft targets are float32 there
    assert_golden(boxes.grad, released["grad_student_boxes"])


def feature_levels(released):
    """Of each level the student's map, and the losses of all decoder layers."""
    teacher_logits, teacher_boxes, sizes = released.teacher()
    hyper, level = released.hyper, 0
    shares = detrdistill_query_weights(teacher_logits, teacher_boxes, released.boxes, sizes, hyper["max_per_img"])
    while f"in_student_{level}" in released.file:
        student, teacher = released.leaf(f"in_student_{level}"), released[f"in_teacher_{level}"]
        masks = detrdistill_masks(shares, released["in_teacher_queries"], teacher, hyper["mask_min"])
        yield student, hyper["feature_weight"] * detrdistill_feature_loss(student, teacher, masks.square())
        level += 1


def test_feature_term_equals_the_released_code(released):
    found = list(feature_levels(released))
    assert len(found) == len(released.file.meta["shapes"]["sizes"])
    total = sum(losses for _, losses in found)
    total.sum().backward()
    assert_golden(total, released["out_feature"])
    for level, (student, _) in enumerate(found):
        assert_golden(student.grad, released[f"grad_student_feature_{level}"])


def test_total_of_the_released_code(released, deformable):
    predictions = (released["in_student_logits"], released["in_student_boxes"], *released.teacher())
    matched = detrdistill_match(*predictions, costs=released.costs)
    total = torch.stack(detrdistill_logits_loss(*predictions, matched, released.weights)).sum()
    total = total + sum(losses.sum() for _, losses in feature_levels(released))
    auxiliary = queries_of(released["in_student_aux_logits"], released["in_student_aux_boxes"])
    scale = released.hyper["det_cls_weight"]  # the library's class loss has weight 1
    for name, term in deformable.loss(auxiliary, released.batch()).terms.items():
        total = total + (scale if name.startswith("loss_ce") else 1.0) * term
    near(total, released["out_total"])


def test_contrastive_term_equals_the_released_code(released):
    hyper, queries = released.hyper, released.leaf("in_student_queries")
    teacher, match = released["in_teacher_queries"], released["out_match"]
    head = ContrastiveHead(queries.shape[-1], teacher.shape[-1], hyper["mid_channels"]).double().train()
    names = {"projs_0_0": 0, "encoder_{}_0": 1, "encoder_{}_1": 2, "encoder_{}_3": 4}
    state = {}
    for side, theirs in (("student", "img"), ("teacher", "pts")):
        for name, place in names.items():
            whole = name.format(theirs) if "{}" in name else f"{theirs}_{name}"
            for kind in ("weight", "bias"):
                state[f"{side}.{place}.{kind}"] = released[f"param_cl_{whole}_{kind}"]
    missing, unexpected = head.load_state_dict(state, strict=False)
    assert not unexpected
    assert all("running" in name or "tracked" in name for name in missing)
    losses = []
    for layer in range(len(match)):
        rows = teacher[layer].gather(1, match[layer][..., None].expand(-1, -1, teacher.shape[-1]))
        pair = head(queries[layer].flatten(0, 1), rows.flatten(0, 1))
        losses.append(hyper["contrastive_weight"] * detrdistill_contrastive_loss(*pair, hyper["contrastive_T"]))
    assert_golden(torch.stack(losses), released["out_contrastive"])
    torch.stack(losses).sum().backward()
    assert_golden(queries.grad, released["grad_student_contrastive_queries"])


@pytest.fixture
def deformable(released):
    """The student whose own loss the released assignment term is."""
    count = released["in_teacher_logits"].shape[-1]
    torch.manual_seed(0)
    detector = build_detector(f"deformable_detr:{TINY}", [f"class{index}" for index in range(count)])
    detector.config.class_cost = int(released.hyper["det_cls_weight"])
    return detector


@pytest.mark.parametrize("assignment", ["teacher", "self"])
def test_assignment_term_equals_the_released_code(released, deformable, assignment):
    logits, boxes = released.leaf("in_student_aux_logits"), released.leaf("in_student_aux_boxes")
    auxiliary, batch = queries_of(logits, boxes), released.batch()
    taught = queries_of(released["in_teacher_logits"], released["in_teacher_boxes"])
    matched = deformable.assign(taught, batch).matched
    assert torch.equal(matched, released["out_teacher_assignment"])
    losses = deformable.loss(auxiliary, batch, Assignment(matched) if assignment == "teacher" else None).terms
    prefix, grads = ("out_paperassign", "paperassign") if assignment == "teacher" else ("out_assign", "aux")
    scale = released.hyper["det_cls_weight"]  # the library's class loss has weight 1
    total = 0
    for name, theirs, factor in (("loss_ce", "cls", scale), ("loss_bbox", "l1", 1.0), ("loss_giou", "giou", 1.0)):
        last = len(logits) - 1
        found = torch.stack([factor * losses[name if layer == last else f"{name}_{layer}"] for layer in range(last + 1)])
        near(found, released[f"{prefix}_{theirs}"])
        total = total + found.sum()
    total.backward()
    near(logits.grad, released[f"grad_student_{grads}_logits"])
    near(boxes.grad, released[f"grad_student_{grads}_boxes"])


def queries_of(logits, boxes, width=4):
    embedding = torch.zeros(*logits.shape[:3], width, dtype=logits.dtype)
    return Queries(logits, boxes, embedding, QuerySeed(embedding[0]))


TINY = "resnet10t,channels=8-16-32-64,stem=8,dim=32,heads=4,ffn=64,queries=10,encoder=1,decoder=2"


# -------------------------------------------------------------------------------------------------------- the functions


class Random:
    """Predictions of a teacher and a student, boxes inside of the image, on maps of two sizes."""

    def __init__(self, student=6, teacher=9, layers=2, classes=4, width=8, images=2, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def noise(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        def boxes(count):
            side = 0.1 + 0.3 * torch.rand(layers, images, count, 2, generator=generator, dtype=torch.float64)
            centre = side / 2 + torch.rand(layers, images, count, 2, generator=generator, dtype=torch.float64) * (1 - side)
            return torch.cat([centre, side], dim=-1)

        self.student = noise(layers, images, student, classes), boxes(student)
        self.teacher = noise(layers, images, teacher, classes), boxes(teacher)
        self.embedding = noise(layers, images, teacher, width)
        self.maps = [noise(images, width, 4, 6), noise(images, width, 2, 3)]
        self.sizes = torch.tensor([[64, 96], [48, 96]])[:images]
        self.boxes = [torch.tensor([[8.0, 8.0, 40.0, 40.0], [50.0, 10.0, 90.0, 30.0]]), torch.tensor([[0.0, 0.0, 30.0, 40.0]])]
        self.labels = [torch.tensor([1, 3]), torch.tensor([0])]

    def shares(self):
        return detrdistill_query_weights(*self.teacher, self.boxes, self.sizes, 20)

    def masks(self):
        return [detrdistill_masks(self.shares(), self.embedding, level) for level in self.maps]


def test_layers_in_groups():
    assert detrdistill_layers(6, 6) == [0, 1, 2, 3, 4, 5]
    assert detrdistill_layers(3, 6) == [1, 3, 5]
    assert detrdistill_layers(2, 5) == [2, 4]
    assert detrdistill_layers(1, 6) == [5]
    assert detrdistill_layers(6, 3) == [0, 0, 1, 1, 2, 2]
    for depths in ((0, 6), (6, 0)):
        with pytest.raises(ValueError, match="one layer or more"):
            detrdistill_layers(*depths)


def test_losses_of_predictions_by_hand():
    """Two student queries, three of the teacher, one class: who follows whom, and every number."""
    student = torch.zeros(1, 1, 2, 1), torch.tensor([[[[0.5, 0.5, 0.2, 0.2], [0.2, 0.2, 0.2, 0.2]]]])
    teacher_boxes = torch.tensor([[[[0.2, 0.2, 0.2, 0.2], [0.8, 0.8, 0.1, 0.1], [0.5, 0.5, 0.2, 0.4]]]])
    teacher, sizes = (torch.zeros(1, 1, 3, 1), teacher_boxes), torch.tensor([[100, 100]])
    matched = detrdistill_match(*student, *teacher, sizes)
    assert matched.tolist() == [[[2, 0]]]
    terms = detrdistill_logits_loss(*student, *teacher, sizes, matched)
    assert float(terms.cls) == pytest.approx(0.693147, abs=1e-5)  # the entropy of one half
    assert float(terms.l1) == pytest.approx(5 * 0.2 / 2)
    assert float(terms.giou) == pytest.approx(2 * 0.5 / 2)  # one box is half of the other


def test_equal_detectors_have_nothing_to_learn_from_predictions():
    random = Random()
    logits, boxes = (value.clone().requires_grad_(True) for value in random.teacher)
    matched = detrdistill_match(logits, boxes, *random.teacher, random.sizes)
    assert torch.equal(matched, torch.arange(9).expand_as(matched))
    terms = detrdistill_logits_loss(logits, boxes, *random.teacher, random.sizes, matched)
    assert float(terms.l1.detach().abs().max()) < 1e-12
    assert float(terms.giou.detach().abs().max()) < 1e-6
    assert float(terms.cls.detach().min()) > 0.1  # the teacher's own entropy
    terms.cls.sum().backward()
    assert float(logits.grad.abs().max()) < 1e-12


def test_teacher_boxes_are_cut_off_at_the_image():
    boxes = torch.tensor([[[[0.1, 0.5, 0.4, 0.2]]]])
    logits, sizes, matched = torch.zeros(1, 1, 1, 1), torch.tensor([[10, 10]]), torch.zeros(1, 1, 1, dtype=torch.int64)
    terms = detrdistill_logits_loss(logits, boxes, logits, boxes, sizes, matched)
    assert float(terms.l1) == pytest.approx(5 * (0.05 + 0.1))  # the target is 0 .. 0.3, centre 0.15


def test_order_of_the_teachers_queries_means_nothing():
    random, order = Random(), torch.tensor([4, 0, 8, 2, 6, 1, 3, 7, 5])
    shuffled = copy.copy(random)
    shuffled.teacher = tuple(value[:, :, order] for value in random.teacher)
    shuffled.embedding = random.embedding[:, :, order]
    found = []
    for one in (random, shuffled):
        matched = detrdistill_match(*one.student, *one.teacher, one.sizes)
        found.append([*detrdistill_logits_loss(*one.student, *one.teacher, one.sizes, matched), *one.masks()])
    for first, second in zip(*found, strict=True):
        torch.testing.assert_close(second, first, rtol=1e-12, atol=1e-12)


def test_too_few_teacher_queries_leave_student_queries_alone():
    random = Random(student=6, teacher=4)
    matched = detrdistill_match(*random.student, *random.teacher, random.sizes)
    assert bool(((matched == -1).sum(dim=2) == 2).all())
    logits, boxes = (value.clone().requires_grad_(True) for value in random.student)
    terms = detrdistill_logits_loss(logits, boxes, *random.teacher, random.sizes, matched)
    torch.stack(terms).sum().backward()
    for gradient in (logits.grad, boxes.grad):
        assert float(gradient[matched == -1].abs().max()) == 0
        assert float(gradient[matched >= 0].abs().sum(dim=-1).min()) > 0
    chosen, entropy = logits[0][matched[0] >= 0], torch.nn.functional.binary_cross_entropy_with_logits
    image, _ = torch.nonzero(matched[0] >= 0, as_tuple=True)
    wanted = random.teacher[0][0][image, matched[0][matched[0] >= 0]].sigmoid()
    torch.testing.assert_close(terms.cls[0], entropy(chosen, wanted, reduction="sum") / 8, rtol=1e-6, atol=0)


def test_split_into_positives_and_negatives():
    random = Random(student=6, teacher=9)
    positive = torch.zeros(2, 2, 9, dtype=torch.bool)
    positive[:, 0, :2], positive[:, 1, 5] = True, True  # the second image has one
    predictions = (*random.student, *random.teacher, random.sizes)
    matched = detrdistill_match(*predictions, positive)
    assert (matched >= 0).sum(dim=2).tolist() == [[2, 1], [2, 1]]
    assert bool((matched[:, 0].sort(dim=1).values[:, -2:] == torch.tensor([0, 1])).all())
    assert matched[:, 1].amax(dim=1).tolist() == [5, 5]
    costs, mine = pair_costs(random), matched[0, 0]
    least = min(costs[list(queries), [0, 1]].sum() for queries in itertools.permutations(range(6), 2))
    assert float(sum(costs[query, mine[query]] for query in range(6) if mine[query] >= 0)) == pytest.approx(float(least))

    logits, boxes = (value.clone().requires_grad_(True) for value in random.student)
    predictions = (logits, boxes, *random.teacher, random.sizes)
    terms = detrdistill_split_loss(*predictions, positive)
    others = detrdistill_match(*predictions, ~positive)
    first, second = (detrdistill_logits_loss(*predictions, found) for found in (matched, others))
    torch.testing.assert_close(terms.cls, first.cls)
    torch.testing.assert_close(terms.l1, first.l1 + second.l1)
    torch.testing.assert_close(terms.giou, first.giou + second.giou)
    terms.cls.sum().backward()
    assert float(logits.grad[matched < 0].abs().max()) == 0
    nobody = detrdistill_split_loss(*predictions, torch.zeros_like(positive))
    assert nobody.cls.tolist() == [0, 0]
    assert bool((nobody.l1 > 0).all())


def pair_costs(random):
    """[N, M] of the first layer and image, with the loss of a single pair."""
    one = torch.zeros(1, 1, 1, dtype=torch.int64)
    rows = []
    for query in range(6):
        row = []
        for target in range(9):
            sides = [
                value[:1, :1, index : index + 1]
                for side, index in ((random.student, query), (random.teacher, target))
                for value in side
            ]
            row.append(torch.stack(detrdistill_logits_loss(*sides, random.sizes[:1], one)).sum())
        rows.append(torch.stack(row))
    return torch.stack(rows)


def test_masks_are_scaled_to_one_and_know_directions_only():
    random = Random()
    for level, mask in zip(random.maps, random.masks(), strict=True):
        torch.testing.assert_close(mask.amax(dim=(2, 3)), torch.ones(2, 2, dtype=torch.float64))
        assert float(mask.min()) > 0
        scaled = detrdistill_masks(random.shares(), 3 * random.embedding, 0.1 * level)
        torch.testing.assert_close(scaled, mask, rtol=1e-9, atol=1e-9)
    away = detrdistill_masks(random.shares(), random.embedding, 0 * random.maps[0])
    assert bool((away == 1).all())  # nothing reaches the floor


def test_shares_of_queries_by_hand():
    """Two queries, two classes: best two pairs of each image, IoU where there are boxes."""
    logits = torch.tensor([[[[2.0, 1.0], [0.0, -1.0]], [[0.0, -3.0], [1.0, -3.0]]]])
    boxes = torch.tensor([0.5, 0.5, 1.0, 1.0]).repeat(1, 2, 2, 1)
    sizes = torch.tensor([[10, 20], [10, 20]])
    ground_truth = [torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 5.0, 10.0]]), torch.zeros(0, 4)]
    shares = detrdistill_query_weights(logits, boxes, ground_truth, sizes, 2)
    two, one, zero = (float(torch.tensor(value).sigmoid()) for value in (2.0, 1.0, 0.0))
    torch.testing.assert_close(shares, torch.tensor([[[(two + one) / 2, 0.0], [zero, one]]]))
    everything = detrdistill_query_weights(logits, boxes, ground_truth, sizes, 100)  # more than there are
    torch.testing.assert_close(everything[0, 1], logits[0, 1].sigmoid().sum(dim=1))


def test_feature_loss_is_zero_at_equality_and_counts_by_the_mask():
    random = Random()
    for level, mask in zip(random.maps, random.masks(), strict=True):
        assert detrdistill_feature_loss(level, level, mask.square()).tolist() == [0, 0]
        student = torch.zeros_like(level).requires_grad_(True)
        losses = detrdistill_feature_loss(student, level, mask.square())
        torch.testing.assert_close(losses, (mask[:, :, None] * level).square().mean(dim=(1, 2, 3, 4)))


def test_paper_masks_by_hand():
    random = Random()
    matched = torch.full((2, 2, 9), -1)
    matched[0, 0, 3], matched[1, 0, 5], matched[:, 1, 0] = 1, 0, 0
    quality = detrdistill_quality(*random.teacher, matched, random.boxes, random.labels, random.sizes, 0.3)
    assert bool(((quality > 0) <= (matched >= 0)).all())
    logits, boxes = (value[0, 0, 3] for value in random.teacher)
    scale = torch.tensor([96, 64], dtype=torch.float64)
    corners = torch.cat([(boxes[:2] - boxes[2:] / 2) * scale, (boxes[:2] + boxes[2:] / 2) * scale])
    inside = (
        (torch.minimum(corners[2:], torch.tensor([90.0, 30.0])) - torch.maximum(corners[:2], torch.tensor([50.0, 10.0])))
        .clamp(min=0)
        .prod()
    )
    overlap = inside / ((corners[2:] - corners[:2]).prod() + 800 - inside)
    torch.testing.assert_close(quality[0, 0, 3], logits[3].sigmoid() ** 0.3 * overlap**0.7)

    shares = torch.rand(2, 2, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for level in random.maps:
        products = torch.einsum("lbmd,bdhw->lbmhw", random.embedding, level)
        expected = (shares[..., None, None] * products.square()).sum(dim=2) / 9
        torch.testing.assert_close(detrdistill_quality_weights(shares, random.embedding, level), expected)


# ----------------------------------------------------------------------------------------------------------- the method


def build(student=None, teacher=None, **options):
    torch.manual_seed(0)
    return DETRDistill(Teacher(teacher or TinyQueries(seed=1)), student or TinyQueries(seed=2), **options)


def learned(method, student, batch):
    return method.learn(student, student(batch), method.teach(batch), batch, NOW).terms


def test_contract():
    assert check_method(DETRDistill) == ["queries 8 -> queries 8"]  # decoders of equal width


def test_contract_without_the_assignment_term():
    options = {"assignment_weight": 0.0, "mask": "paper", "split": True, "contrastive_weight": 0.2, "contrastive_width": 8}
    assert check_method(DETRDistill, **options) == ["queries 8 -> queries 8", "queries 16 -> queries 8"]


def test_terms_and_weights():
    student, batch = TinyQueries(seed=2), tiny_batch(3)
    plain = learned(build(student), student, batch)
    assert list(plain) == ["logits_cls", "logits_l1", "logits_giou", "feature", "assignment"]
    twice = learned(build(student, logits_weight=2.0, feature_weight=3.0, assignment_weight=5.0), student, batch)
    for name, factor in zip(plain, (2, 2, 2, 3, 5), strict=True):
        torch.testing.assert_close(twice[name], factor * plain[name])
    inner = learned(build(student, cls_weight=2.0, l1_weight=10.0, giou_weight=1.0), student, batch)
    for name, factor in zip(plain, (2, 2, 0.5, 1, 1), strict=True):
        torch.testing.assert_close(inner[name], factor * plain[name])
    assert list(learned(build(student, logits_weight=0.0, feature_weight=0.0), student, batch)) == ["assignment"]
    assert "contrastive" in learned(build(student, contrastive_weight=0.2), student, batch)
    paper = build(student, mask="paper")
    assert paper.feature_weight == 20
    assert float(learned(paper, student, batch)["feature"].detach()) > 0


def test_method_adds_up_layers_and_levels():
    student, batch = TinyQueries(seed=2), tiny_batch(3)
    method = build(student)
    taught, seen = method.teach(batch), student(batch)
    terms = method.learn(student, seen, taught, batch, NOW).terms
    mine, said = seen.prediction, taught.prediction
    predictions = (mine.logits, mine.boxes_cxcywh01, said.logits, said.boxes_cxcywh01, batch.sizes)
    expected = detrdistill_logits_loss(*predictions, detrdistill_match(*predictions))
    for name, value in expected._asdict().items():
        torch.testing.assert_close(terms[f"logits_{name}"], value.sum())
    boxes = [target.boxes_xyxy for target in batch.targets]
    shares = detrdistill_query_weights(said.logits, said.boxes_cxcywh01, boxes, batch.sizes, 100)
    feature = 0
    for student_map, teacher_map in zip(seen.features.maps, taught.features.maps, strict=True):
        mask = detrdistill_masks(shares, said.embedding, teacher_map)
        feature = feature + detrdistill_feature_loss(student_map, teacher_map, mask.square()).sum()
    torch.testing.assert_close(terms["feature"], feature)


def test_student_decodes_the_teachers_queries_under_the_teachers_assignment():
    student, batch = TinyQueries(seed=2), tiny_batch(3)
    seen = student(batch)
    found = {}
    for assignment in ("teacher", "self"):
        method = build(student, assignment=assignment)
        taught = method.teach(batch)
        auxiliary = student.decode(seen.features, taught.prediction.seed, batch)
        given = Assignment(taught.matched) if assignment == "teacher" else student.assign(auxiliary, batch)
        found[assignment] = method.learn(student, seen, taught, batch, NOW).terms["assignment"]
        torch.testing.assert_close(found[assignment], student.loss(auxiliary, batch, given).total())
    assert float(found["teacher"].detach()) != float(found["self"].detach())


def test_assignment_does_not_ask_whom_the_student_would_match():
    """A student whose boxes lie on the ground truth of somebody else still has to find the teacher's."""
    student, batch = TinyQueries(seed=2), tiny_batch(3)
    method, seen = build(student), student(batch)
    taught = method.teach(batch)
    before = method.learn(student, seen, taught, batch, NOW).terms["assignment"]
    student.assign = lambda prediction, batch: pytest.fail("the student matched anew")
    torch.testing.assert_close(method.learn(student, seen, taught, batch, NOW).terms["assignment"], before)


def test_gradients_reach_what_they_should():
    student, batch = TinyQueries(seed=2), tiny_batch(3)
    own = [student.content, student.position, student.reference]

    def reached(**options):
        method, seen = build(student, **options), student(batch)
        taught = method.teach(batch)
        assert not any(
            value.requires_grad for value in (taught.prediction.logits, *taught.features.maps, taught.prediction.seed.content)
        )
        student.zero_grad()
        method.learn(student, seen, taught, batch, NOW).total().backward()
        return {name for name, p in student.named_parameters() if p.grad is not None and float(p.grad.abs().max()) > 0}

    off = {"logits_weight": 0.0, "feature_weight": 0.0, "assignment_weight": 0.0}
    assignment = reached(**{**off, "assignment_weight": 1.0})
    assert {"layers.0.weight", "logits.weight", "deltas.weight", "levels.convs.0.weight", "backbone.0.weight"} <= assignment
    assert not any(parameter.grad is not None and float(parameter.grad.abs().max()) > 0 for parameter in own)
    feature = reached(**{**off, "feature_weight": 1.0})
    assert all(name.startswith(("backbone.", "levels.")) for name in feature)
    assert {"content", "position", "reference", "logits.weight", "backbone.0.weight"} <= reached(**{**off, "logits_weight": 1.0})


def test_without_boxes():
    student, batch = TinyQueries(seed=2), without_boxes(tiny_batch(3), range(3))
    method, seen = build(student), student(batch)
    taught = method.teach(batch)
    assert bool((taught.matched == -1).all())
    terms = method.learn(student, seen, taught, batch, NOW).terms
    assert all(bool(torch.isfinite(term)) for term in terms.values())
    auxiliary = student.decode(seen.features, taught.prediction.seed, batch)
    torch.testing.assert_close(terms["assignment"], torch.nn.functional.softplus(auxiliary.logits).sum())  # all background / 1
    shares = detrdistill_query_weights(
        taught.prediction.logits, taught.prediction.boxes_cxcywh01, [torch.zeros(0, 4)] * 3, batch.sizes
    )
    torch.testing.assert_close(shares, taught.prediction.logits.sigmoid().sum(dim=-1))
    assert float(learned(build(student, mask="paper"), student, batch)["feature"].detach()) == 0  # no query has a quality


class Deep(TinyQueries):
    num_layers = 6


class Few(TinyQueries):
    num_queries = 3


def test_a_student_of_half_the_layers_follows_every_second():
    teacher, student, batch = Deep(seed=1), TinyQueries(seed=2), tiny_batch(2)
    for progressive, layers in ((True, [2, 5]), (False, [5, 5])):
        method, seen = build(student, teacher, progressive=progressive), student(batch)
        taught = method.teach(batch)
        said = taught.prediction
        cut = Queries(said.logits[layers], said.boxes_cxcywh01[layers], said.embedding[layers], said.seed)
        expected = method.learn(
            student, seen, dataclasses.replace(taught, prediction=cut, matched=taught.matched[layers]), batch, NOW
        )
        found = method.learn(student, seen, taught, batch, NOW)
        for name, term in found.terms.items():
            torch.testing.assert_close(term, expected.terms[name])
    deeper = Deep(seed=2)
    assert all(bool(torch.isfinite(term)) for term in learned(build(deeper, TinyQueries(seed=1)), deeper, batch).values())


@pytest.mark.parametrize(("teacher", "student"), [(Few, TinyQueries), (TinyQueries, Few)])
def test_unequal_numbers_of_queries(teacher, student):
    mine, batch = student(seed=2), tiny_batch(3)
    method = build(mine, teacher(seed=1), contrastive_weight=0.2, split=True)
    losses = method.step(mine, batch, method.teach(batch), NOW)
    losses.total().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in mine.parameters() if p.grad is not None)


def test_classes_are_found_by_name():
    teacher, student, batch = TinyQueries(classes=("x", "b", "a"), seed=1), TinyQueries(classes=("a", "b"), seed=2), tiny_batch(3)
    renamed = copy.deepcopy(teacher)
    order = [2, 1]
    renamed.logits = nn.Linear(8, 2)
    renamed.logits.weight.data, renamed.logits.bias.data = teacher.logits.weight.data[order], teacher.logits.bias.data[order]
    renamed.spec = dataclasses.replace(teacher.spec, classes=("a", "b"))
    found, expected = (learned(build(student, one), student, batch) for one in (teacher, renamed))
    for name, term in found.items():
        torch.testing.assert_close(term, expected[name])


def test_crowd_boxes_teach_nothing():
    student, batch = TinyQueries(seed=2), tiny_batch(3)
    crowd = torch.tensor([[0.0, 0.0, 60.0, 40.0]])
    more = [
        Target(
            torch.cat([crowd, t.boxes_xyxy]), torch.cat([torch.tensor([1]), t.labels]), torch.cat([torch.tensor([True]), t.crowd])
        )
        for t in batch.targets
    ]
    for mask in ("released", "paper"):
        method = build(student, mask=mask)
        expected = learned(method, student, batch)
        method.teacher.forget()
        found = learned(method, student, batch.with_targets(more))
        for name, term in found.items():
            torch.testing.assert_close(term, expected[name])


class Softmax(TinyQueries):
    def __init__(self, **options):
        super().__init__(**options)
        self.spec = dataclasses.replace(self.spec, softmax=True, name="detr:tiny")


class Pointed(TinyQueries):
    """Queries of points, not of boxes."""

    def seed(self, features, batch):
        seed = super().seed(features, batch)
        return dataclasses.replace(seed, reference=seed.reference[..., :2])

    def decode(self, features, seed, batch, attention=False):
        whole = torch.cat([seed.reference, torch.full_like(seed.reference, 0.5)], dim=-1) if seed.reference is not None else None
        return dataclasses.replace(
            super().decode(features, dataclasses.replace(seed, reference=whole), batch, attention), seed=seed
        )


class Wide(TinyQueries):
    """Embeddings wider than the features."""

    def decode(self, features, seed, batch, attention=False):
        found = super().decode(features, seed, batch, attention)
        return dataclasses.replace(found, embedding=found.embedding.repeat(1, 1, 1, 2))


@pytest.mark.parametrize(
    ("teacher", "student", "message"),
    [
        (Softmax(), TinyQueries(), "the teacher detr:tiny has softmax classes"),
        (TinyQueries(), Softmax(), "the student detr:tiny has softmax classes"),
        (TinyQueries(classes=("a", "c")), TinyQueries(), "the teacher does not know b"),
        (
            TinyDense(),
            TinyQueries(),
            "the teacher tinydense:patches predicts dense; it needs a teacher that predicts queries; methods",
        ),
        (
            TinyQueries(),
            TinyDense(),
            "the student tinydense:patches predicts dense; it needs a student that predicts queries; methods",
        ),
        (
            TinyQueries(channels=(16, 16)),
            TinyQueries(),
            "decodes content of width 8 with positions of width 8 and boxes, the teacher",
        ),
        (Pointed(), TinyQueries(), "has content of width 8 with positions of width 8 and points; set assignment_weight=0"),
        (Wide(), TinyQueries(), "queries of width 16 and features of \\[8\\] channels; set feature_weight=0"),
    ],
)
def test_pairs_that_cannot_work(teacher, student, message):
    with pytest.raises(PairError, match=message):
        build(student, teacher)


def test_pairs_that_work_without_a_term():
    batch = tiny_batch(2)
    for teacher, options in ((Pointed(), {"assignment_weight": 0.0}), (Wide(), {"feature_weight": 0.0})):
        student = TinyQueries(seed=2)
        assert all(bool(torch.isfinite(term)) for term in learned(build(student, teacher, **options), student, batch).values())


def test_the_students_points_are_its_own():
    """Where points are made of positions, the teacher's positions come without its points."""
    student, batch = Pointed(seed=2), tiny_batch(2)
    given = []
    decode = student.decode
    student.decode = lambda features, seed, batch, attention=False: given.append(seed) or decode(features, seed, batch, attention)
    method = build(student, Pointed(seed=1))
    given.clear()
    method.step(student, batch, method.teach(batch), NOW)
    assert [seed.reference is None for seed in given] == [False, True]


def test_the_check_leaves_the_student_as_it_was():
    student = TinyQueries(seed=2).train()
    student.levels.eval()
    state = copy.deepcopy(student.state_dict())
    build(student)
    assert student.training
    assert not student.levels.training
    assert all(torch.equal(state[name], value) for name, value in student.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"logits_weight": 0.0, "feature_weight": 0.0, "assignment_weight": 0.0},
            "logits_weight, feature_weight, assignment_weight, contrastive_weight are all 0; nothing would be distilled",
        ),
        ({"logits_weight": -1.0}, "logits_weight=-1.0 is not a number, 0 or more"),
        ({"l1_cost": float("nan")}, "l1_cost=nan is not a number, 0 or more"),
        ({"mask": "paperr"}, "mask=paperr is not one of released, paper (did you mean 'paper'?)"),
        ({"assignment": "students"}, "assignment=students is not one of teacher, self"),
        ({"gamma": 2.0}, "gamma=2.0 is not a number from 0 to 1"),
        ({"mask_floor": 0.0}, "mask_floor=0.0 is not a number above 0"),
        ({"max_per_img": 0}, "max_per_img=0 is not a whole number, 1 or more"),
    ],
)
def test_bad_hyper_parameters(options, message):
    with pytest.raises(DetdistillError) as error:
        build(**options)
    assert str(error.value) == f"detrdistill: {message}"


def test_distillation_follows_the_teacher():
    """Alone, without the student's own loss, the three terms pull predictions and features to the teacher's."""
    student, batch = TinyQueries(seed=2), tiny_batch(3)
    method = build(student, assignment_weight=0.1)
    optimizer = torch.optim.AdamW(student.parameters(), lr=5e-3)
    history = []
    for _ in range(60):
        terms = learned(method, student, batch)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        history.append({name: float(term.detach()) for name, term in terms.items()})
    for name, part in (("logits_l1", 0.5), ("logits_giou", 0.5), ("feature", 0.7)):
        assert history[-1][name] < part * history[0][name], name


# ---------------------------------------------------------------------------------------------------- library detectors

ADAMIXER = "resnet10t,channels=8-16-32-64,stem=8,dim=32,heads=4,ffn=64,queries=10,decoder=2,groups=2,points=4"
KINDS = {
    "deformable_detr": TINY,
    "deformable_detr two-stage": f"{TINY},two_stage=true",
    "conditional_detr": TINY,
    "dab_detr": TINY,
    "adamixer": ADAMIXER,
    "rt_detr": TINY,
    "rt_detr_v2": TINY,
    "d_fine": TINY,
}


def tiny_detector(kind, seed, classes=("a", "b")):
    torch.manual_seed(seed)
    return build_detector(f"{kind.split()[0]}:{KINDS[kind]}", list(classes))


def check_library_pair(kind):
    """A pair of one kind learns; equal detectors agree; single images make the batch."""
    batch = tiny_batch(2)
    teacher, student = tiny_detector(kind, 1), tiny_detector(kind, 2)
    method = DETRDistill(Teacher(teacher), student)
    losses = method.step(student, batch, method.teach(batch), NOW)
    assert {"logits_cls", "logits_l1", "logits_giou", "feature", "assignment"} <= losses.terms.keys()
    assert all(bool(torch.isfinite(term)) for term in losses.terms.values())
    losses.total().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in student.parameters() if p.grad is not None)

    same = copy.deepcopy(teacher).requires_grad_(True).eval()
    method = DETRDistill(Teacher(teacher), same)
    taught, seen = method.teach(batch), same(batch)
    terms = method.learn(same, seen, taught, batch, NOW).terms
    assert float(terms["feature"].detach()) == pytest.approx(0, abs=1e-9)
    own = same.decode(seen.features, same.seed(seen.features, batch), batch)
    expected = same.loss(own, batch, Assignment(taught.matched)).total()
    torch.testing.assert_close(terms["assignment"], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(terms["assignment"], same.loss(own, batch).total(), rtol=1e-4, atol=1e-4)  # its own matching
    stacked = type(taught).stack(taught.split(len(batch)))
    for name, term in method.learn(same, seen, stacked, batch, NOW).terms.items():
        torch.testing.assert_close(term, terms[name], rtol=1e-5, atol=1e-6)


def test_deformable_detr_teaches_deformable_detr():
    check_library_pair("deformable_detr")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "deformable_detr"])
def test_every_kind_teaches_its_own(kind):
    check_library_pair(kind)


def test_kinds_that_meet_and_kinds_that_do_not():
    batch, student = tiny_batch(2), tiny_detector("deformable_detr", 2)
    terms = learned(DETRDistill(Teacher(tiny_detector("conditional_detr", 1)), student), student, batch)  # one level in common
    assert all(bool(torch.isfinite(term)) for term in terms.values())
    teacher = Teacher(tiny_detector("rt_detr", 1))
    with pytest.raises(PairError, match="has content of width 32 with boxes; set assignment_weight=0"):
        DETRDistill(teacher, student)
    terms = learned(DETRDistill(teacher, student, assignment_weight=0.0), student, batch)
    assert set(terms) == {"logits_cls", "logits_l1", "logits_giou", "feature"}
    with pytest.raises(PairError, match="softmax classes with a background"):
        DETRDistill(Teacher(build_detector(f"detr:{TINY}", ["a", "b"])), student)


# ------------------------------------------------------------------------------------------------- before the encoder


def read_by_the_encoder(detector, batch):
    """What the encoder gets in a pass, as maps [B, D, S] with the cells of all levels side by side."""
    found = []

    def record(module, given, named):
        tokens = named.get("inputs_embeds", given[0] if given else None)
        found.append(torch.cat([x.flatten(2) for x in tokens], dim=2) if isinstance(tokens, list) else tokens.transpose(1, 2))

    handle = detector.model.model.encoder.register_forward_pre_hook(record, with_kwargs=True)
    detector.features(batch)
    handle.remove()
    return found[0]


@pytest.mark.parametrize("kind", ["deformable_detr", "conditional_detr", "dab_detr", "rt_detr", "deimv2", "adamixer", "lw_detr"])
def test_the_projection_is_what_the_encoder_reads(kind):
    detector, batch = probe.tiny_detector(kind).eval(), unequal_batch()
    with torch.no_grad():
        below = detector.backbone_features(batch)
        projected = detector.before_encoder(below, batch)
        features = detector.features(batch)
        assert (projected.channels, projected.strides) == (detector.spec.channels, detector.spec.strides)
        assert (projected.padding is None) == (features.padding is None)
        if kind in ("adamixer", "lw_detr"):  # no encoder
            assert all(torch.equal(*pair) for pair in zip(projected.maps, features.maps, strict=True))
        else:
            wanted = read_by_the_encoder(detector, batch)
            torch.testing.assert_close(torch.cat([level.flatten(2) for level in projected.maps], dim=2), wanted)
            assert not torch.allclose(projected.maps[0], features.maps[0], atol=1e-3)


@pytest.mark.parametrize("kind", ["deformable_detr", "rt_detr"])
def test_the_released_tap_compares_the_maps_before_the_encoder(kind):
    batch, (teacher, student) = unequal_batch(), (tiny_detector(kind, seed, ("a", "b", "c")).eval() for seed in (1, 2))
    method = DETRDistill(Teacher(teacher), student, tap="neck")
    taught, seen = method.teach(batch), student.observe(batch, PREDICTION | method.requirements.student)
    with torch.no_grad():
        mine, theirs = (one.before_encoder(one.backbone_features(batch), batch) for one in (student, teacher))
        by_hand = 0.0
        boxes = [target.without_crowd().boxes_xyxy for target in batch.targets]
        said = taught.prediction
        shares = detrdistill_query_weights(said.logits, said.boxes_cxcywh01, boxes, batch.sizes, 100)
        for level, fixed in zip(mine.maps, theirs.maps, strict=True):
            masks = detrdistill_masks(shares, said.embedding, fixed, 0.01)
            by_hand += ((masks[:, :, None] * (level - fixed)) ** 2).mean(dim=(1, 2, 3, 4)).sum()
    terms = method.learn(student, seen, taught, batch, NOW).terms
    torch.testing.assert_close(terms["feature"], by_hand, rtol=1e-4, atol=1e-6)
    gradients = torch.autograd.grad(terms["feature"], list(student.parameters()), allow_unused=True)
    reached = {id(p) for p, g in zip(student.parameters(), gradients, strict=True) if g is not None and bool(g.any())}
    assert not reached & {id(p) for p in student.model.model.encoder.parameters()}
    assert reached & {id(p) for p in student.parts().parameters(student.parts().backbone)}
    plain = DETRDistill(Teacher(teacher), student)
    assert set(plain.learn(student, seen, plain.teach(batch), batch, NOW).terms) == set(terms)


def test_running_statistics_are_updated_once():
    """RT-DETR's projection has BatchNorm, and it runs twice."""
    batch, teacher = tiny_batch(2), Teacher(tiny_detector("rt_detr", 1))
    states = []
    for tap in ("encoder", "neck"):
        student = tiny_detector("rt_detr", 2).train()
        method = DETRDistill(teacher, student, tap=tap)
        torch.manual_seed(0)
        method.step(student, batch, method.teach(batch), NOW)
        states.append([value for name, value in student.state_dict().items() if "running" in name])
    assert all(torch.equal(one, other) for one, other in zip(*states, strict=True))


def test_a_detector_that_does_not_show_the_maps_is_refused():
    with pytest.raises(PairError, match=r"the student .* lacks maps before the encoder; set tap=encoder"):
        build(tap="neck")
    assert build(tap="neck", feature_weight=0.0).requirements.student.backbone is False
