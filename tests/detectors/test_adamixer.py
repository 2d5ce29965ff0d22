"""AdaMixer against its released code (golden file ``_adamixer``), and its adapter against the model's own forward."""

import copy
import subprocess
import sys

import pytest
import torch

from detdistill.detectors.build import build_detector, load_detector
from detdistill.detectors.contract import CAPABILITIES, HasBackboneFeatures, HasCopies, HasQueries
from detdistill.detectors.inherit import inherit_head
from detdistill.detectors.models.adamixer import Stage, position_embedding, sample, to_corners, to_cxcywh, to_xyzr
from detdistill.detectors.saved import save_student
from detdistill.errors import ModelError
from detdistill.structures import Assignment, Batch, Queries, QuerySeed, View
from tests.detectors.dense import EMPTY, FULL, SIZES, library_images, target, unequal_batch
from tests.detectors.test_saved import ALONE
from tests.golden import Golden, assert_golden

TINY = "channels=8-16-32-64,stem=8,dim=32,queries=10,decoder=2,heads=4,ffn=64,groups=2,points=4"
NAME = f"adamixer:resnet10t,{TINY}"
CLASSES = ["a", "b", "c"]


def randomize(detector, seed=0):
    """Weights that the initialisation sets to zero get values, so that scores, positions and samples are a real test."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in detector.named_parameters():
        if name.endswith(("position_delta.weight", "offsets.weight", "matrices.weight", "classifier.weight")):
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return detector


@pytest.fixture
def detector():
    torch.manual_seed(0)
    return randomize(build_detector(NAME, CLASSES))


# -------------------------------------------------------------------------------------------------- the released code

PARTS = {
    "iof_tau": "attention.tau",
    "attention_attn_in_proj_": "attention.project_in.",
    "attention_attn_out_proj_": "attention.project_out.",
    "attention_norm_": "attention_norm.",
    "sampling_n_mixing_sampling_offset_generator_0_": "sampling.offsets.",
    "sampling_n_mixing_adaptive_mixing_parameter_generator_0_": "mixing.matrices.",
    "sampling_n_mixing_adaptive_mixing_out_proj_": "mixing.project_out.",
    "sampling_n_mixing_norm_": "mixing_norm.",
    "ffn_layers_0_0_": "feedforward.0.",
    "ffn_layers_1_": "feedforward.2.",
    "ffn_norm_": "feedforward_norm.",
    "cls_fcs_0_": "class_tower.0.",
    "cls_fcs_1_": "class_tower.1.",
    "reg_fcs_0_": "position_tower.0.",
    "reg_fcs_1_": "position_tower.1.",
    "fc_cls_": "classifier.",
    "fc_reg_": "position_delta.",
}
"""Beginnings of the released names, and ours."""


@pytest.fixture
def golden():
    return Golden("_adamixer")


def golden_stage(golden):
    """Our stage with the file's weights."""
    meta = golden.meta
    groups, points = meta["groups"], meta["in_points"]
    stage = Stage(meta["content_dim"], meta["num_classes"], meta["heads"], meta["ffn"], groups, points, meta["out_points"])
    state = {}
    for name, value in golden.parameters("param_").items():
        if name != "init_content":
            theirs = max((part for part in PARTS if name.startswith(part)), key=len)
            state[PARTS[theirs] + name[len(theirs) :]] = value
    stage = stage.to(torch.get_default_dtype() if not state else next(iter(state.values())).dtype)
    stage.load_state_dict(state)
    return stage


def golden_batch(golden):
    """The file's targets: query i's own box is ground truth i, unless its label says background."""
    sizes = golden["in_image_sizes"]
    labels, boxes = golden["in_target_labels"], golden["in_target_boxes"]
    height, width = (golden["in_feat_0"].shape[dim] * golden.meta["featmap_strides"][0] for dim in (-2, -1))
    matched = torch.where(labels < golden.meta["num_classes"], torch.arange(labels.shape[1]), -1)
    targets = []
    for box, row in zip(boxes, matched, strict=True):
        plain = target([], [])
        index = len(targets)
        found = labels[index].where(row >= 0, 0)
        targets.append(type(plain)(box, found, torch.zeros_like(found, dtype=torch.bool)))
    views = tuple(View((int(h), int(w)), (int(h), int(w))) for h, w in sizes.tolist())
    images = torch.zeros(len(sizes), 3, height, width, dtype=boxes.dtype)
    return Batch(images, sizes, tuple(targets), tuple(range(len(sizes))), views), Assignment(matched[None])


def test_a_stage_equals_the_released_code_step_by_step(golden):
    stage = golden_stage(golden)
    maps, strides = golden.levels("in_feat"), golden.meta["featmap_strides"]
    content, xyzr = golden["in_query_content"], golden["in_query_xyzr"]
    assert_golden(to_corners(to_cxcywh(xyzr)), golden["out_boxes_in"])
    assert_golden(position_embedding(xyzr, content.shape[-1]), golden["out_position_embedding"])
    attended = stage.attention_norm(stage.attention(content, xyzr))
    assert_golden(attended, golden["out_after_attention"])
    points = stage.sampling(attended, xyzr)
    assert_golden(points.flatten(2, 3), golden["out_sample_points"])
    samples = sample(maps, strides, points)
    assert_golden(samples, golden["out_sampled"])
    mixed = stage.mixing_norm(attended + stage.mixing(samples, attended))
    assert_golden(mixed, golden["out_after_mixing"])
    logits, refined, content = stage(maps, strides, content, xyzr)
    assert_golden(logits, golden["out_cls"])
    assert_golden(stage.position_delta(stage.position_tower(content)), golden["out_delta"])
    assert_golden(refined, golden["out_xyzr"])
    assert_golden(to_corners(to_cxcywh(refined)), golden["out_boxes"])
    assert_golden(content, golden["out_content"])


def test_losses_and_gradients_equal_the_released_code(golden, detector):
    stage = golden_stage(golden)
    maps = [level.requires_grad_() for level in golden.levels("in_feat")]
    content = golden["in_query_content"].requires_grad_()
    logits, refined, embedding = stage(maps, golden.meta["featmap_strides"], content, golden["in_query_xyzr"])
    batch, assignment = golden_batch(golden)
    size = batch.sizes[:, None, [1, 0, 1, 0]]
    queries = Queries(logits[None], (to_cxcywh(refined) / size)[None], embedding[None], QuerySeed(content))
    losses = detector.loss(queries, batch, assignment)
    for mine, theirs in (("classification", "cls"), ("bbox_regression", "bbox"), ("giou", "giou")):
        assert_golden(losses.terms[mine], golden[f"out_loss_{theirs}"])
    assert_golden(losses.total(), golden["out_total"])
    losses.total().backward()
    assert_golden(content.grad, golden["grad_student_query_content"])
    assert_golden(maps[-1].grad, golden["grad_student_feat_last"])


def test_initial_queries_equal_the_released_code(golden, detector):
    generator = detector.model.generator
    generator.content = torch.nn.Parameter(golden["param_init_content"])
    sizes = golden["in_image_sizes"]
    content, reference = generator(len(sizes), generator.content.dtype)
    assert_golden(content, golden["out_init_content"])
    assert_golden(to_xyzr(reference * sizes[:, None, [1, 0, 1, 0]]), golden["out_init_xyzr"])
