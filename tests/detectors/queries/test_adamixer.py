"""AdaMixer against its released code (golden file ``_adamixer``), and its adapter against the model's own forward."""

import pytest
import torch

from detdistill.detectors.build import build_detector
from detdistill.detectors.contract import CAPABILITIES, HasBackboneFeatures, HasCopies, HasMapsBeforeEncoder, HasQueries
from detdistill.detectors.inherit import inherit_head
from detdistill.detectors.student_files.models.adamixer import Stage, position_embedding, sample, to_corners, to_cxcywh, to_xyzr
from detdistill.errors import ModelError
from detdistill.structures import Assignment, Batch, Queries, QuerySeed, View
from tests.detectors.dense.shared import EMPTY, FULL, SIZES, library_images, target, unequal_batch
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
    width, classes, heads = meta["content_dim"], meta["num_classes"], meta["heads"]
    stage = Stage(width, classes, heads, meta["ffn"], groups, points, meta["out_points"], meta["tau"])
    state = {}
    for name, value in golden.parameters("param_").items():
        if name != "init_content":
            theirs = max((part for part in PARTS if name.startswith(part)), key=len)
            state[PARTS[theirs] + name[len(theirs) :]] = value
    stage = stage.to(next(iter(state.values())).dtype)
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
    samples = sample(maps, strides, points, golden.meta["tau"])
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


# ------------------------------------------------------------------------------------------------------------ results


def test_detections_equal_the_models_own_forward(detector):
    batch = unequal_batch()
    detector.eval()
    with torch.no_grad():
        prediction = detector(batch).prediction
        mine = detector.detect(prediction, batch)
        theirs = detector.model(library_images(batch))
    for index, (one, other) in enumerate(zip(mine, theirs, strict=True)):
        assert len(one) == 30  # every pair of query and class, of which at most 100 are kept
        assert torch.equal(one.boxes_xyxy, other["boxes"])
        assert torch.equal(one.scores, other["scores"])
        assert torch.equal(one.labels, other["labels"] - 1)
        assert one.scores.tolist() == sorted(one.scores.tolist(), reverse=True)
        height, width = SIZES[index]
        query = one.origin.anchor
        whole = to_corners(prediction.boxes_cxcywh01[-1, index, query]) * torch.tensor([width, height, width, height])
        clipped = torch.minimum(whole.clamp(min=0), torch.tensor([width, height, width, height]))
        torch.testing.assert_close(one.boxes_xyxy, clipped)
        torch.testing.assert_close(one.scores, prediction.logits[-1, index, query, one.labels].sigmoid())
        assert one.origin.image.unique().tolist() == [index]


def test_a_padded_image_is_decoded_in_its_own_frame(detector):
    """An image's own features give the same boxes whatever its neighbours are; zero padding of the maps changes nothing."""
    batch = unequal_batch()
    detector.eval()
    with torch.no_grad():
        features = detector.features(batch)
        together = detector.predict(features, batch)
        for index, (size, single) in enumerate(zip(SIZES, features.split(3), strict=True)):
            images = batch.images[index : index + 1]
            alone = Batch(images, torch.tensor([size]), batch.targets[index : index + 1], (index,), (View(size, size),))
            wider = Batch(torch.nn.functional.pad(images, (0, 64)), alone.sizes, alone.targets, (index,), alone.views)
            padded = [
                torch.nn.functional.pad(level, (0, 64 // stride))
                for level, stride in zip(single.maps, single.strides, strict=True)
            ]
            for features_of_one, one in ((single, alone), (type(single)(tuple(padded), single.strides), wider)):
                prediction = detector.predict(features_of_one, one)
                torch.testing.assert_close(prediction.logits[:, 0], together.logits[:, index], rtol=1e-4, atol=1e-5)
                boxes = prediction.boxes_cxcywh01[:, 0]
                torch.testing.assert_close(boxes, together.boxes_cxcywh01[:, index], rtol=1e-4, atol=1e-5)


def test_score_threshold_and_number_of_detections():
    torch.manual_seed(0)
    detector = randomize(build_detector(f"{NAME},score=0.01,dets=7", CLASSES)).eval()
    batch = unequal_batch()
    with torch.no_grad():
        found = detector.detect(detector(batch).prediction, batch)
    assert [len(one) for one in found] == [7, 7, 7]
    detector.model.score_thresh = 0.999
    found = detector.detect(detector(batch).prediction, batch)
    assert [len(one) for one in found] == [0, 0, 0]
    assert found[0].boxes_xyxy.shape == (0, 4)
    assert found[0].origin.cell.shape == (0, 2)


# ------------------------------------------------------------------------------------------------ matching and losses


def test_assignment_is_the_cheapest_matching(detector):
    """Queries that predict the boxes themselves are matched to them; crowd boxes keep their number and are never matched."""
    batch = unequal_batch()
    prediction = detector(batch).prediction
    logits, boxes = torch.full_like(prediction.logits, -4.0), torch.full_like(prediction.boxes_cxcywh01, 0.5)
    for layer, image, query, truth in ((0, 0, 3, 0), (0, 0, 5, 1), (0, 0, 9, 2), (1, 0, 8, 0), (1, 1, 2, 0), (1, 1, 7, 1)):
        one = batch.targets[image]
        height, width = SIZES[image]
        x1, y1, x2, y2 = one.boxes_xyxy[truth] / torch.tensor([width, height, width, height])
        boxes[layer, image, query] = torch.stack([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1])
        logits[layer, image, query, one.labels[truth]] = 3.0
    perfect = Queries(logits, boxes, prediction.embedding, prediction.seed)
    matched = detector.assign(perfect, batch).matched
    assert {query: box for query, box in enumerate(matched[0, 0].tolist()) if box >= 0} == {3: 0, 5: 1, 9: 2}
    assert matched[1, 0, 8] == 0
    assert matched[1, 1].tolist() == [-1] * 7 + [1, -1, -1]  # not query 2, whose box is a crowd
    assert (matched >= 0).sum(dim=-1).tolist() == [[3, 1, 0], [3, 1, 0]]


@pytest.mark.parametrize("targets", [FULL, EMPTY])
def test_losses_are_finite_and_reach_every_parameter(targets):
    torch.manual_seed(0)
    detector = randomize(build_detector(NAME, CLASSES)).train()
    batch = unequal_batch(targets)
    losses = detector.loss(detector(batch).prediction, batch)
    losses.total().backward()
    assert torch.isfinite(losses.total().detach())
    for name, parameter in detector.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        if targets is FULL and "backbone" not in name:  # timm's residual branches begin as zeros
            assert float(parameter.grad.abs().sum()) > 0, name
    if targets is EMPTY:
        assert float(losses.terms["bbox_regression"].detach()) == float(losses.terms["giou"].detach()) == 0
        assert float(losses.terms["classification"].detach()) > 0


def test_losses_by_hand(detector):
    """One image and one box of half the image, two stages, all scores 1/2: the sums written out."""
    batch = unequal_batch((target([[0, 0, 64, 50]], [1]), *EMPTY[1:]))
    whole = torch.tensor([0.5, 0.5, 1.0, 1.0]).repeat(2, 3, 10, 1)
    zeros = torch.zeros(2, 3, 10, 3)
    queries = Queries(zeros, whole, torch.zeros(2, 3, 10, 32), QuerySeed(torch.zeros(3, 10, 32)))
    losses = {name: float(term) for name, term in detector.loss(queries, batch).terms.items()}
    bce = float(torch.tensor(2.0).log()) / 4  # (1 - p)^2 of ln 2
    assert losses["classification"] == pytest.approx(2 * 2.0 * bce * (0.25 + 0.75 * (3 * 10 * 3 - 1)), rel=1e-5)
    assert losses["bbox_regression"] == pytest.approx(2 * 5.0 * (0.5 + 0.5), rel=1e-5)  # the right and the lower side
    assert losses["giou"] == pytest.approx(2 * 2.0 * (1 - 0.25), rel=1e-5)  # IoU 1/4, nothing enclosed beside


def test_own_assignment_given_back_changes_nothing(detector):
    batch = unequal_batch()
    prediction = detector(batch).prediction
    own = detector.loss(prediction, batch).terms
    given = detector.loss(prediction, batch, detector.assign(prediction, batch)).terms
    for name, term in own.items():
        assert torch.equal(given[name], term)


def test_foreign_weights_ignored_and_normalizer(detector):
    batch = unequal_batch()
    prediction = detector(batch).prediction
    own = detector.assign(prediction, batch)
    plain = detector.loss(prediction, batch, own).terms
    halved = detector.loss(prediction, batch, Assignment(own.matched, normalizer=torch.tensor(8.0))).terms  # own: 4 a stage
    weighted = detector.loss(prediction, batch, Assignment(own.matched, weights=torch.full(own.matched.shape, 2.0))).terms
    for name, term in plain.items():
        torch.testing.assert_close(halved[name], term / 2)
        torch.testing.assert_close(weighted[name], 2 * term)
    ignored = detector.loss(prediction, batch, own.as_ignored(own.matched == -1)).terms
    assert float(ignored["classification"].detach()) < float(plain["classification"].detach())
    assert torch.equal(ignored["bbox_regression"], plain["bbox_regression"])
    one_to_many = own.matched.clone()
    one_to_many[:, 0] = 2
    torch.testing.assert_close(
        float(detector.loss(prediction, batch, Assignment(one_to_many)).total().detach()),
        float(detector.loss(prediction, batch, Assignment(one_to_many, normalizer=torch.tensor(11.0))).total().detach()),
    )


def test_positives_are_differentiable_and_in_place(detector):
    batch = unequal_batch()
    prediction = detector(batch).prediction
    assignment = detector.assign(prediction, batch)
    positives = detector.positives(prediction, assignment, batch)
    assert len(positives) == 8  # 3 + 1 + 0 boxes in two stages
    assert positives.layer.tolist() == [0] * 4 + [1] * 4
    mine = positives.image == 1
    assert torch.equal(positives.targets_xyxy[mine], torch.tensor([[0.0, 0.0, 50.0, 88.0]] * 2))
    positives.boxes_xyxy.sum().backward()
    assert all(float(stage.position_delta.bias.grad.abs().sum()) > 0 for stage in detector.model.stages)


def test_boxes_of_a_stage_do_not_train_the_positions_before_it(detector):
    """Positions are detached between stages, contents are not (the released code)."""
    batch = unequal_batch()
    detector(batch).prediction.boxes_cxcywh01[1].sum().backward()
    first, second = detector.model.stages
    assert float(first.position_delta.weight.grad.abs().sum()) == 0
    assert float(second.position_delta.weight.grad.abs().sum()) > 0
    assert float(first.mixing.matrices.weight.grad.abs().sum()) > 0


def test_mixed_precision_keeps_boxes_in_float32(detector):
    batch = unequal_batch()
    expected = detector(batch).prediction
    with torch.autocast("cpu", dtype=torch.bfloat16):
        prediction = detector(batch).prediction
        losses = detector.loss(prediction, batch)
    losses.total().backward()
    assert prediction.boxes_cxcywh01.dtype == prediction.logits.dtype == prediction.embedding.dtype == torch.float32
    assert torch.isfinite(losses.total().detach())
    assert all(torch.isfinite(parameter.grad).all() for parameter in detector.parameters())
    torch.testing.assert_close(prediction.boxes_cxcywh01, expected.boxes_cxcywh01, rtol=0.1, atol=0.1)


# ------------------------------------------------------------------------------------------------------- capabilities


def test_capabilities(detector):
    mine = {protocol for protocol in CAPABILITIES if isinstance(detector, protocol)}
    assert mine == {HasBackboneFeatures, HasQueries, HasMapsBeforeEncoder, HasCopies}
    assert detector.spec.family == "queries"
    assert detector.spec.strides == (4, 8, 16, 32)
    assert detector.spec.channels == (32, 32, 32, 32)
    assert not detector.spec.softmax


def test_a_foreign_group_is_decoded_alone(detector):
    """Its own queries decoded again are bit-identical, and a second group neither sees nor changes them."""
    batch = unequal_batch()
    features = detector.features(batch)
    seed = detector.seed(features, batch)
    own = detector.predict(features, batch)
    generator = torch.Generator().manual_seed(5)
    reference = torch.rand(3, 4, 4, generator=generator) * 0.4 + 0.3
    foreign = QuerySeed(torch.randn(3, 4, 32, generator=generator), torch.zeros(3, 4, 32), reference)
    other = detector.decode(features, foreign, batch)
    again = detector.decode(features, seed, batch)
    assert torch.equal(again.logits, own.logits)
    assert torch.equal(again.boxes_cxcywh01, own.boxes_cxcywh01)
    assert torch.equal(again.embedding, own.embedding)
    assert other.logits.shape == (2, 3, 4, 3)
    assert other.seed is foreign
    half = detector.decode(features, QuerySeed(foreign.content, None, reference[..., :2]), batch)
    wide = QuerySeed(foreign.content, None, torch.cat([reference[..., :2], torch.ones(3, 4, 2)], dim=-1))
    assert torch.equal(half.logits, detector.decode(features, wide, batch).logits)
    nowhere = detector.decode(features, QuerySeed(seed.content), batch)
    assert torch.equal(nowhere.logits, own.logits)


def test_a_stage_that_moves_nothing_returns_its_references():
    torch.manual_seed(0)
    detector = build_detector(NAME, CLASSES)  # fresh: positions stay where they are
    batch = unequal_batch()
    reference = torch.rand(3, 6, 4) * 0.4 + 0.3
    found = detector.decode(detector.features(batch), QuerySeed(torch.randn(3, 6, 32), None, reference), batch)
    torch.testing.assert_close(found.boxes_cxcywh01, reference.expand(2, 3, 6, 4), rtol=1e-5, atol=1e-6)


def test_reference_without_an_area_is_finite(detector):
    batch = unequal_batch()
    seed = QuerySeed(torch.randn(3, 6, 32), None, torch.zeros(3, 6, 4))
    found = detector.decode(detector.features(batch), seed, batch)
    assert torch.isfinite(found.boxes_cxcywh01).all()
    assert torch.isfinite(found.logits).all()


def test_what_cannot_be_decoded_is_refused(detector):
    batch = unequal_batch()
    features = detector.features(batch)
    with pytest.raises(ModelError, match="the queries given have 16 channels, the decoder 32"):
        detector.decode(features, QuerySeed(torch.zeros(3, 2, 16)), batch)
    with pytest.raises(ModelError, match="no attention maps"):
        detector.decode(features, detector.seed(features, batch), batch, attention=True)


def test_backbone_features_and_neck_copy(detector):
    batch = unequal_batch()
    detector.eval()
    bottom = detector.backbone_features(batch)
    assert bottom.channels == (8, 16, 32, 64)
    assert bottom.strides == (4, 8, 16, 32)
    features = detector.features(batch)
    copied = detector.copy_neck()(bottom)
    for mine, theirs, padding, other in zip(copied.maps, features.maps, copied.padding, features.padding, strict=True):
        assert torch.equal(mine, theirs)
        assert torch.equal(padding, other)
    fresh = detector.copy_neck(fresh=True)
    assert not torch.equal(fresh(bottom).maps[0], features.maps[0])
    assert {id(parameter) for parameter in fresh.parameters()}.isdisjoint(map(id, detector.parameters()))


def test_head_copy_runs_alone_on_its_own_parameters(detector):
    batch = unequal_batch()
    detector.requires_grad_(False)
    features = detector.features(batch)
    head = detector.copy_head()
    assert {name.split(".")[1] for name, _ in head.named_parameters()} == {"generator", "stages"}
    prediction = head.predict(features, batch)
    assert torch.equal(prediction.logits, detector.predict(features, batch).logits)
    head.loss(prediction, batch, head.assign(prediction, batch)).total().backward()
    assert all(parameter.grad is not None for parameter in head.parameters())
    fresh = detector.copy_head(fresh=True)
    bias = fresh.model.stages[0].classifier.bias
    torch.testing.assert_close(bias.sigmoid(), torch.full_like(bias, 0.01))
    assert not torch.equal(fresh.predict(features, batch).logits, prediction.logits)
    upper = head.predict(features.take([1, 2]), batch)  # another pyramid
    assert upper.logits.shape == prediction.logits.shape
    assert not torch.equal(upper.logits, prediction.logits)


def test_head_is_inherited_by_class_name(detector):
    torch.manual_seed(1)
    student = build_detector(f"adamixer:resnet10t,{TINY.replace('8-16-32-64', '4-8-16-32')}", ["c", "x", "a"])
    before = student.model.stages[1].classifier.weight.clone()
    inherited = inherit_head(student, detector)
    mine, theirs = student.model.stages[1].classifier.weight, detector.model.stages[1].classifier.weight
    assert torch.equal(mine[[0, 2]], theirs[[2, 0]])
    assert torch.equal(mine[1], before[1])
    assert torch.equal(student.model.generator.content, detector.model.generator.content)
    assert {name for name, _ in inherited.skipped} == {f"model.neck.convolutions.{level}.weight" for level in range(4)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("dim=40", "dim=40 must be a multiple of 32"),
        ("dim=32,heads=3", "cannot be cut into heads=3 equal parts"),
        ("dim=32,groups=5", "cannot be cut into groups=5 equal parts"),
        ("levels=2-6", "levels must end at 5 or below, the deepest level of resnet10t"),
        ("neck=64", "adamixer has no option 'neck'"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ModelError, match=message):
        build_detector(f"adamixer:resnet10t,{options}", ["a"])


def test_levels_can_be_chosen():
    detector = build_detector(f"{NAME},levels=3-5", CLASSES)
    assert detector.spec.strides == (8, 16, 32)
    batch = unequal_batch()
    assert detector(batch).prediction.logits.shape == (2, 3, 10, 3)


# ----------------------------------------------------------------------------------------------------------- learning
