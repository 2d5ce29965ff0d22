import copy
import dataclasses

import pytest
import torch
from torchvision.ops import box_convert, box_iou

from detdistill.detectors.contract import Teacher
from detdistill.errors import DetdistillError
from detdistill.functional.deformable import (
    Cells,
    DeformableAttention,
    DeformableDecoderLayer,
    DeformableEncoderLayer,
    places_of_cells,
    valid_ratios,
)
from detdistill.losses import unikd_boxes, unikd_loss
from detdistill.methods.unikd import LevelSource, UniKD, level_sources, pyramid_of
from detdistill.structures import Clock, Target
from tests.golden import Golden
from tests.methods.contract_checks import check_method, run_stage, without_boxes
from tests.tiny import TinyDense, TinyQueries, TinyRegions, tiny_batch


@pytest.fixture
def golden():
    return Golden("unikd")


# ----------------------------------------------------------------------------- building blocks against released code


class Pyramid:
    """The golden file's pyramid and sizes."""

    def __init__(self, golden):
        self.hyper = golden.meta["hyper"]
        self.shapes = [tuple(size) for size in self.hyper["sizes_hw"]]
        self.masks = golden.levels("in_padding_mask")
        self.ratios = valid_ratios(self.masks)
        self.cells = Cells.of(golden.levels("in_feature"), self.masks)
        assert self.cells.spatial_shapes == tuple(self.shapes)

    def arguments(self):
        return self.cells.cells, self.shapes, self.ratios.double(), self.cells.padding

    def module(self, kind, **options):
        hyper = self.hyper
        if kind is not DeformableAttention:
            options["width"] = hyper["ffn"]
        return kind(hyper["D"], len(self.shapes), hyper["heads"], hyper["points"], **options).double()


def load(module, golden, prefix, names):
    """The file's weights under our names; ``names`` maps beginnings."""
    state = {}
    for name, tensor in golden.parameters(prefix).items():
        start = next(start for start in names if name.startswith(start))
        rest = name[len(start) :]
        for kind in ("weight", "bias"):
            if rest.endswith(f"_{kind}"):
                rest = f"{rest[: -len(kind) - 1]}.{kind}".lstrip("_").replace("attn_out_proj", "out_proj")
        rest = rest.replace("attn_in_proj.", "in_proj_").lstrip(".")
        state[f"{names[start]}{rest}"] = tensor
    module.load_state_dict(state)
    return module


def test_valid_ratios_equal_mmdet(golden):
    torch.testing.assert_close(valid_ratios(golden.levels("in_padding_mask")), golden["out_valid_ratios"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["2d", "4d"])
def test_cross_attention_equals_mmcv(golden, kind):
    pyramid = Pyramid(golden)
    attention = load(pyramid.module(DeformableAttention), golden, "param_cross_", {"": ""})
    queries = golden["in_query"] + golden["in_query_pos"]
    cells, *rest = pyramid.arguments()
    assert_golden_places(attention(queries, golden[f"in_reference_{kind}"], cells, *rest), golden[f"out_cross_attention_{kind}"])


@pytest.mark.parametrize("kind", ["2d", "4d"])
def test_decoder_layer_equals_mmcv(golden, kind):
    pyramid = Pyramid(golden)
    names = {
        "attentions_0_": "self_attention.",
        "attentions_1_": "cross_attention.",
        "ffns_0_layers_0_0": "feed_forward.0.",
        "ffns_0_layers_1": "feed_forward.2.",
        "norms_0": "self_attention_norm.",
        "norms_1": "cross_attention_norm.",
        "norms_2": "feed_forward_norm.",
    }
    layer = load(pyramid.module(DeformableDecoderLayer), golden, "param_decoder_", names)
    cells, *rest = pyramid.arguments()
    found = layer(golden["in_query"], golden[f"in_reference_{kind}"], cells, *rest, golden["in_query_pos"])
    assert_golden_places(found, golden[f"out_decoder_layer_{kind}"])


def test_encoder_layer_equals_mmcv(golden):
    pyramid = Pyramid(golden)
    names = {
        "attentions_0_": "attention.",
        "ffns_0_layers_0_0": "feed_forward.0.",
        "ffns_0_layers_1": "feed_forward.2.",
        "norms_0": "attention_norm.",
        "norms_1": "feed_forward_norm.",
    }
    layer = load(pyramid.module(DeformableEncoderLayer), golden, "param_encoder_", names)
    places = places_of_cells(pyramid.shapes, pyramid.ratios)
    references = places[:, :, None] * pyramid.ratios[:, None]
    torch.testing.assert_close(references, golden["out_encoder_reference_points"], rtol=1e-6, atol=1e-6)
    cells, *rest = pyramid.arguments()
    found = layer(cells, golden["in_encoder_pos"], places.double(), *rest)
    assert_golden_places(found, golden["out_encoder_layer"])


def assert_golden_places(actual, expected):
    """The file's valid ratios are float32, so places agree to about 1e-7 of the map, not to 1e-9."""
    torch.testing.assert_close(actual.detach(), expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


# ------------------------------------------------------------------------------------------------------------- the loss


def test_loss_by_hand():
    student = torch.tensor([[[1.0, 3.0], [2.0, 0.0], [0.0, 0.0]], [[4.0, 0.0], [0.0, 0.0], [0.0, 2.0]]], requires_grad=True)
    positive = torch.tensor([[True, False, False], [True, False, False]])
    # positives: (1 + 9) / 2 = 5 and 16 / 2 = 8, mean 6.5; negatives: 2, 0, 0, 2, mean 1
    loss = unikd_loss(student, torch.zeros(2, 3, 2), positive)
    assert float(loss.detach()) == pytest.approx(7.5)
    (gradient,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(gradient[0, 0], torch.tensor([1.0, 3.0]) / 2)  # 2 x / (2 channels * 2 positives)
    torch.testing.assert_close(gradient[1, 2], torch.tensor([0.0, 2.0]) / 4)


def test_loss_is_decoupled_and_quadratic():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 6, 4, generator=generator), torch.randn(2, 6, 4, generator=generator)
    positive = torch.zeros(2, 6, dtype=torch.bool)
    positive[:, :2] = True
    loss = unikd_loss(student, teacher, positive)
    doubled = [torch.cat([one, one[:, 2:]], dim=1) for one in (student, teacher, positive)]
    torch.testing.assert_close(unikd_loss(*doubled), loss)
    torch.testing.assert_close(unikd_loss(teacher + 3 * (student - teacher), teacher, positive), 9 * loss)


@pytest.mark.parametrize("positive", [True, False])
def test_one_kind_alone(positive):
    mask = torch.full((1, 3), positive)
    assert float(unikd_loss(torch.ones(1, 3, 2), torch.zeros(1, 3, 2), mask)) == 1.0


# ------------------------------------------------------------------------------------------------------------ the boxes


@pytest.mark.parametrize("seed", range(5))
def test_boxes_keep_their_overlaps(seed):
    objects = torch.tensor([[10.0, 10.0, 40.0, 60.0], [50.0, 20.0, 90.0, 40.0], [0.0, 0.0, 12.0, 12.0]])
    boxes, near = unikd_boxes(objects, (80, 100), 50, torch.Generator().manual_seed(seed))
    assert boxes.shape == (50, 4)
    assert near == 3
    overlap = box_iou(boxes, objects)
    assert bool((overlap[:3].diagonal() > 0.6).all())
    assert not torch.equal(boxes[:3], objects)
    assert bool((overlap[3:].amax(dim=1) < 0.4).all())
    assert bool((boxes[:, :2] >= 0).all())
    assert bool((boxes[:, 2] <= 100).all())
    assert bool((boxes[:, 3] <= 80).all())
    assert bool((boxes[:, 2:] - boxes[:, :2] >= 1).all())
    again, _ = unikd_boxes(objects, (80, 100), 50, torch.Generator().manual_seed(seed))
    assert torch.equal(boxes, again)


def test_without_objects_all_boxes_are_background():
    boxes, near = unikd_boxes(torch.zeros(0, 4), (64, 64), 20, torch.Generator().manual_seed(0))
    assert near == 0
    assert boxes.shape == (20, 4)


def test_more_objects_than_queries_keep_the_largest():
    sides = torch.arange(1.0, 11.0) * 4
    objects = torch.stack([torch.zeros(10), torch.zeros(10), sides, sides], dim=1)
    boxes, near = unikd_boxes(objects, (64, 64), 6, torch.Generator().manual_seed(0))
    assert near == 5
    assert bool((box_iou(boxes[:5], objects[5:]).diagonal() > 0.6).all())
    assert bool((box_iou(boxes[5:], objects[5:]).amax() < 0.4).all())


def test_an_object_that_fills_the_image_leaves_room_for_background():
    boxes, near = unikd_boxes(torch.tensor([[0.0, 0.0, 8.0, 8.0]]), (8, 8), 12, torch.Generator().manual_seed(0))
    assert near == 1
    assert bool((box_iou(boxes[1:], torch.tensor([[0.0, 0.0, 8.0, 8.0]])) < 0.4).all())


def test_boxes_are_seeded_by_image_and_view():
    method, batch = build(), tiny_batch(2)
    boxes = method.teach(batch).boxes_cxcywh01
    assert torch.equal(boxes[1:], method.teach(batch_of(batch, 1)).boxes_cxcywh01)  # whatever else is in the batch
    flipped = dataclasses.replace(batch, views=tuple(dataclasses.replace(view, flip=True) for view in batch.views))
    method.teacher.forget()
    assert not torch.equal(method.teach(flipped).boxes_cxcywh01, boxes)


def batch_of(batch, image):
    pieces = {name: (getattr(batch, name)[image],) for name in ("targets", "ids", "views")}
    return dataclasses.replace(batch, images=batch.images[image : image + 1], sizes=batch.sizes[image : image + 1], **pieces)


# ----------------------------------------------------------------------------------------------------------- the method


def build(teacher=None, student=None, **options):
    torch.manual_seed(0)
    options = {"queries": 12, **options}
    return UniKD(Teacher(teacher or TinyDense(channels=(16, 16), seed=1)), student or TinyDense(seed=2), **options)


def test_contract():
    pairs = check_method(UniKD, queries=8)
    assert "queries 16 -> dense 8" in pairs
    assert "regions 8 -> queries 8" in pairs
    assert len(pairs) == 18


def test_paper_parameter_count():
    """1.56 M: two layers of an extractor, 256 channels, 5 levels, 8 heads, 4 points, feed-forward 1024."""
    method = build(TinyDense(channels=(256,) * 5, strides=(8, 16, 32, 64, 128)), queries=4)
    for kind in ("content", "positional"):
        extractor = method.extractors[kind]
        layers = [*extractor.generator.parameters(), *extractor.extractor.parameters()]
        assert sum(parameter.numel() for parameter in layers) == 1_563_072


def test_student_with_the_teachers_features_has_no_loss():
    method, batch = build(), tiny_batch(3)
    taught = method.teach(batch)
    features = method.teacher.observe(batch).features
    method._modules["adaptor"] = torch.nn.Identity()
    method.adaptor.forward = lambda seen, strides, batch: method._pyramid(features, batch)
    losses = method.learn(None, method.teacher.observe(batch), taught, batch, Clock(0, 1))
    assert {name: float(term.detach()) for name, term in losses.terms.items()} == {"content": 0.0, "positional": 0.0}
    assert float(losses.monitors["content_cosine"]) == pytest.approx(1)


def test_gradients_reach_student_and_adaptor_only():
    student = TinyDense(seed=2)
    method, batch = build(student=student), tiny_batch(3)
    losses = method.learn(student, student(batch), method.teach(batch), batch, Clock(0, 1))
    losses.total().backward()
    assert all(parameter.grad is not None for parameter in method.adaptor.parameters())
    assert all(float(layer.weight.grad.abs().max()) > 0 for layer in method.adaptor.linear)
    assert all(parameter.grad is None for parameter in method.extractors.parameters())
    assert all(parameter.requires_grad for parameter in method.extractors.parameters())
    assert float(student.backbone[0].weight.grad.abs().max()) > 0
    assert student.head.logits.weight.grad is None


def test_stages_train_what_they_should():
    student = TinyDense(seed=2)
    method, batch = build(student=student), tiny_batch(3)
    first, last = method.stages(student)
    losses = run_stage(first, student, method, batch)
    assert set(losses.terms) == {f"{kind}_{name}" for kind in ("content", "positional") for name in ("cls", "l1", "giou")}
    assert all(parameter.grad is not None for parameter in method.extractors.parameters())
    assert all(parameter.grad is None for parameter in (*method.adaptor.parameters(), *student.parameters()))
    run_stage(last, student, method, batch)
    assert all(parameter.grad is None for parameter in method.extractors.parameters())
    assert all(parameter.grad is not None for parameter in method.adaptor.parameters())


def test_a_stage_depends_on_teacher_and_settings():
    def key(**options):
        teacher = TinyDense(channels=(16, 16), seed=options.pop("seed", 1))
        method = build(teacher, **options)
        return method.stages(TinyDense())[0].depends_on

    assert key() == key()
    assert len({key(), key(seed=5), key(queries=13), key(alpha=0.7), key(student=TinyDense(classes=("a", "c")))}) == 5
    assert key(content_weight=5.0, adaptor_layers=0) == key()  # neither has a part in the extractors


def test_extractors_learn_to_detect_on_a_frozen_teacher():
    method, batch = build(), tiny_batch(3)
    stage = method.stages(TinyDense(seed=2))[0]
    optimizer = torch.optim.AdamW(method.extractors.parameters(), lr=3e-3)
    first = last = None
    for step in range(60):
        method.teacher.forget()
        losses = stage.step(batch, None, Clock(step, 60))
        optimizer.zero_grad()
        losses.total().backward()
        optimizer.step()
        last = float(losses.total().detach())
        first = first or last
    assert last < 0.6 * first


def test_known_matches_of_jittered_boxes():
    method, batch = build(), tiny_batch(3)
    boxes, near = method._boxes(batch)
    matched = method._known(boxes, near, batch)
    for image, target in enumerate(batch.targets):
        assert matched[image].tolist() == list(range(len(target))) + [-1] * (12 - len(target))
        size = batch.sizes[image].flip(0).repeat(2)
        corners = box_convert(boxes[image, : len(target)] * size, "cxcywh", "xyxy")
        assert bool((box_iou(corners, target.boxes_xyxy).diagonal() > 0.6).all())


def test_known_matches_when_boxes_outnumber_queries():
    sides = torch.arange(1.0, 15.0) * 4
    boxes = torch.stack([torch.zeros(14), torch.zeros(14), sides, sides], dim=1)
    batch = tiny_batch(1)
    batch = batch.with_targets([Target(boxes, torch.zeros(14, dtype=torch.int64), torch.zeros(14, dtype=torch.bool))])
    method = build()
    drawn, near = method._boxes(batch)
    matched = method._known(drawn, near, batch)[0]
    assert matched[11].item() == -1
    assert bool(
        ((matched[:11] - torch.arange(3, 14)).abs() <= 1).all()
    )  # nested boxes: a jittered one may lie nearer to the next
    taught = method.teach(batch)
    assert int(taught.content_positive.sum()) == 12  # every query found one
    assert torch.isfinite(method.pretrain(batch, None, Clock(0, 1)).total().detach())


def test_crowd_boxes_are_no_objects():
    batch = tiny_batch(1)
    target = batch.targets[0]
    crowd = torch.ones(len(target), dtype=torch.bool)
    taught = build().teach(batch.with_targets([dataclasses.replace(target, crowd=crowd)]))
    assert not taught.positional_positive.any()
    assert not taught.content_positive.any()


def test_no_boxes_leave_the_negative_term():
    method, batch = build(), without_boxes(tiny_batch(3), range(3))
    taught = method.teach(batch)
    assert not taught.content_positive.any()
    assert not taught.positional_positive.any()
    student = TinyDense(seed=2)
    losses = method.learn(student, student(batch), taught, batch, Clock(0, 1))
    assert all(float(term.detach()) > 0 for term in losses.terms.values())
    pretrained = method.pretrain(batch, None, Clock(0, 1)).terms
    assert float(pretrained["content_l1"].detach()) == 0
    assert float(pretrained["content_cls"].detach()) > 0


def test_more_padding_does_not_change_what_is_read():
    """The teacher's maps with more padded cells give the same embeddings."""
    method, batch = build(), tiny_batch(2)
    maps = [level.detach() for level in method.teacher.observe(batch).features.maps]
    boxes, _ = method._boxes(batch)
    wide = [torch.nn.functional.pad(level, (0, 5, 0, 4), value=7.0) for level in maps]
    for kind in ("content", "positional"):
        extractor = method.extractors[kind]
        read = []
        for pyramid in (pyramid_of(maps, (8, 16), batch), pyramid_of(wide, (8, 16), batch)):
            queries = extractor.generate(boxes, pyramid)
            read.append(extractor.extract(queries, boxes, pyramid))
        torch.testing.assert_close(read[1], read[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        ((8, 16), (8, 16), [(0, 0, 1.0), (1, 0, 1.0)]),
        ((8, 16), (8, 16, 32, 64), [(0, 0, 1.0), (1, 0, 1.0), (1, 1, 1.0), (1, 2, 1.0)]),
        ((8, 16), (4, 32), [(0, 0, 2.0), (1, 1, 1.0)]),
        ((32,), (8, 16, 32), [(0, 0, 4.0), (0, 0, 2.0), (0, 0, 1.0)]),
        ((8, 16, 32), (16,), [(1, 0, 1.0)]),
        ((8, 16), (24,), [(1, 1, 32 / 24)]),
    ],
)
def test_levels_by_nearest_stride(student, teacher, expected):
    specs = [TinyDense(channels=(8,) * len(strides), strides=strides).spec for strides in (student, teacher)]
    assert list(level_sources(*specs)) == [LevelSource(*one) for one in expected]


@pytest.mark.parametrize(
    ("teacher", "student"),
    [
        (TinyDense(channels=(16,), strides=(32,)), TinyDense()),  # one level only, coarser than the student has
        (TinyDense(channels=(16, 16, 16), strides=(4, 8, 16)), TinyQueries()),
        (TinyRegions(channels=(16, 16)), TinyDense(channels=(8,), strides=(16,))),
        (TinyDense(channels=(12, 20)), TinyDense(channels=(8, 8))),  # levels of different width
    ],
)
def test_unequal_pyramids(teacher, student):
    method, batch = build(teacher, student), tiny_batch(3)
    assert method.channels == max(teacher.spec.channels)
    losses = method.step(student, batch, method.teach(batch), Clock(0, 1))
    losses.total().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in student.parameters() if p.grad is not None)
    assert float(student.backbone[0].weight.grad.abs().max()) > 0


def test_one_kind_of_queries_alone():
    student = TinyDense(seed=2)
    method, batch = build(student=student, positional_weight=0.0), tiny_batch(3)
    assert set(method.learn(student, student(batch), method.teach(batch), batch, Clock(0, 1)).terms) == {"content"}


def test_class_loss_over_queries():
    batch = tiny_batch(3)
    by_objects, by_queries = build(), build(cls_norm="num_queries")
    by_queries.load_state_dict(copy.deepcopy(by_objects.state_dict()))
    first, second = (method.pretrain(batch, None, Clock(0, 1)).terms for method in (by_objects, by_queries))
    objects = sum(map(len, batch.targets))
    torch.testing.assert_close(first["content_cls"] * objects, second["content_cls"] * 3 * 12)
    torch.testing.assert_close(first["content_l1"], second["content_l1"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"queries": 1}, "queries=1 is not a whole number, 2 or more"),
        (
            {"content_weight": 0.0, "positional_weight": 0.0},
            "content_weight, positional_weight are all 0; nothing would be distilled",
        ),
        ({"content_weight": float("nan")}, "content_weight=nan is not a number, 0 or more"),
        ({"alpha": 1.5}, "alpha=1.5 is not a number from 0 to 1"),
        ({"cls_norm": "num_boxes"}, "cls_norm=num_boxes is not one of num_gt, num_queries (did you mean 'num_queries'?)"),
    ],
)
def test_bad_hyper_parameters(options, message):
    with pytest.raises(DetdistillError) as error:
        build(**options)
    assert str(error.value) == f"unikd: {message}"
