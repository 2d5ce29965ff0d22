import copy
import dataclasses
import itertools

import pytest
import torch
from torch import nn

from detdistill.detectors.build import build_detector
from detdistill.detectors.contract import Teacher
from detdistill.errors import DetdistillError
from detdistill.functional import (
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
from detdistill.methods.contract import PairError
from detdistill.methods.detrdistill import ContrastiveHead, DETRDistill, LogitsWeights
from detdistill.structures import Assignment, Batch, Clock, Queries, QuerySeed, Target, View
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


def test_feature_term_equals_the_released_code(released):
    hyper = released.hyper
    teacher_logits, teacher_boxes, sizes = released.teacher()
    shares = detrdistill_query_weights(teacher_logits, teacher_boxes, released.boxes, sizes, hyper["max_per_img"])
    total, level = torch.zeros(len(teacher_logits), dtype=torch.float64), 0
    while f"in_student_{level}" in released.file:
        student, teacher = released.leaf(f"in_student_{level}"), released[f"in_teacher_{level}"]
        masks = detrdistill_masks(shares, released["in_teacher_queries"], teacher, hyper["mask_min"])
        losses = hyper["feature_weight"] * detrdistill_feature_loss(student, teacher, masks.square())
        losses.sum().backward()
        assert_golden(student.grad, released[f"grad_student_feature_{level}"])
        total, level = total + losses.detach(), level + 1
    assert_golden(total, released["out_feature"])


def test_total_of_the_released_code(released):
    """What its losses add up to, without the contrastive term."""
    names = ("logits_cls", "logits_l1", "logits_giou", "feature", "assign_cls", "assign_l1", "assign_giou")
    near(sum(released[f"out_{name}"].double().sum() for name in names), released["out_total"], 1e-6)


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
