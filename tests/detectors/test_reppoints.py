import math

import pytest
import torch

from detdistill.detectors.build import build_detector
from detdistill.detectors.models.dense import flat
from detdistill.detectors.models.reppoints import points_to_boxes
from detdistill.structures import Batch, View
from tests.detectors.dense import target
from tests.golden import Golden, assert_golden

NAME = "reppoints:resnet10t,channels=8-16-32-64,stem=8,neck=32,levels=3-5,convs=2,score=0.01"


@pytest.fixture
def detector():
    torch.manual_seed(0)
    return build_detector(NAME, ["a", "b", "c"])


# ------------------------------------------------------------------------------------------------------ released numbers


def golden_case():
    """The released head's outputs as a prediction of a detector of ours, the batch, and the leaves of the graph."""
    golden = Golden("_reppoints")
    strides, (height, width) = golden["in_strides"].tolist(), golden["in_pad_size"].tolist()
    levels = f"{int(math.log2(strides[0]))}-{int(math.log2(strides[-1]))}"
    classes = [str(number) for number in range(golden.meta["num_classes"])]
    detector = build_detector(f"reppoints:resnet10t,channels=8-16-32-64,stem=8,neck=32,levels={levels},convs=0", classes)
    assert detector.spec.strides == tuple(strides)
    detector.double().point_scale, detector.least_iou = golden.meta["point_base_scale"], 0.0
    detector.model.head.moment.data = golden["param_moment_transfer"]
    leaves = {name: golden.levels(f"in_{name}") for name in ("cls", "pts_init", "pts_refine")}
    for level in sum(leaves.values(), []):
        level.requires_grad_()
    names = ("cls_logits", "first_points", "bbox_regression")
    outputs = {name: flat(maps) for name, maps in zip(names, leaves.values(), strict=True)}
    images = len(golden["in_image_sizes"])
    size = (height, width)  # the released code trains on all cells of the padded image
    targets = tuple(target(golden[f"in_boxes_{i}"].tolist(), golden[f"in_labels_{i}"].tolist()) for i in range(images))
    batch = Batch(
        torch.zeros(images, 3, height, width, dtype=torch.float64),
        torch.tensor([size] * images),
        targets,
        tuple(range(images)),
        (View(size, size),) * images,
    )
    shapes = [tuple(level.shape[-2:]) for level in leaves["cls"]]
    return golden, detector, detector.placed(outputs, shapes, batch), batch, leaves


def test_boxes_equal_the_released_code():
    golden, detector, prediction, _, _ = golden_case()
    for level, expected in enumerate(golden.levels("out_bbox_init")):  # in strides, without the centre
        here = prediction.levels == level
        corners = prediction.priors_xyxy[:, here]
        centers = (corners[..., :2] + corners[..., 2:]).repeat(1, 1, 2) / 2
        boxes = (detector.first_boxes(prediction)[:, here] - centers) / golden["in_strides"][level]
        assert_golden(boxes.transpose(1, 2).unflatten(-1, expected.shape[-2:]), expected)


def test_losses_and_gradients_equal_the_released_code():
    golden, detector, prediction, batch, leaves = golden_case()
    values = detector.loss_values(prediction, batch, detector.assign(prediction, batch))
    pairs = {"loss_cls": "classification", "loss_pts_init": "first_points", "loss_pts_refine": "refined_points"}
    for theirs, mine in pairs.items():
        for level, expected in enumerate(golden.levels(f"out_{theirs}")):
            assert_golden(values[mine][:, prediction.levels == level].sum(), expected)
    total = detector.loss(prediction, batch).total()
    assert_golden(total, golden["out_total"])
    total.backward()
    for name, maps in leaves.items():
        for level, expected in zip(maps, golden.levels(f"grad_student_{name}"), strict=True):
            assert_golden(level.grad, expected)
    assert_golden(detector.model.head.moment.grad, golden["grad_param_moment_transfer"])
