import json
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from detdistill.detectors import contract
from detdistill.detectors.contract import (
    CAPABILITIES,
    DenseCoding,
    DetectorSpec,
    HasBackboneFeatures,
    HasCopies,
    HasQueries,
    HasRegions,
    HasTowers,
    Teacher,
)
from detdistill.errors import ModelError
from detdistill.functional.query_seeds import query_spec
from detdistill.structures import Assignment, Batch, Look, Origin, QuerySeed, Target, View
from tests.methods.contract_checks import assert_same, without_boxes
from tests.tiny import TinyDense, TinyQueries, TinyRegions, tiny_batch

FAMILIES = [TinyDense, TinyRegions, TinyQueries]


def observed(detector_class, count=2, seed=0):
    detector, batch = detector_class(), tiny_batch(count, seed=seed)
    return detector, batch, detector(batch).prediction


def total(losses):
    return float(losses.total().detach())


# -------------------------------------------------------------------------------------------------------------- input


def test_normalized_zeroes_the_padding_after_normalising():
    detector, batch = TinyDense(), tiny_batch(2)
    images = detector.normalized(batch)
    mean, std = (torch.tensor(value)[:, None, None] for value in (detector.spec.mean, detector.spec.std))
    torch.testing.assert_close(images[0], (batch.images[0] - mean) / std)
    torch.testing.assert_close(images[1, :, :48], ((batch.images[1] - mean) / std)[:, :48])
    assert (images[1, :, 48:] == 0).all()
    assert (images[0, :, 48:] != 0).any()


def test_capabilities_are_recognised():
    protocols = (HasBackboneFeatures, HasTowers, HasRegions, HasQueries, HasCopies)
    shown = {c.__name__: [isinstance(c(), protocol) for protocol in protocols] for c in FAMILIES}
    assert shown == {
        "TinyDense": [True, True, False, False, True],
        "TinyRegions": [True, False, True, False, False],
        "TinyQueries": [True, False, False, True, False],
    }


def test_every_capability_has_a_name_for_messages():
    """``Needs`` may name any of them, and a refusal looks up its words."""
    assert set(CAPABILITIES) == {value for name, value in vars(contract).items() if name.startswith("Has")}


@pytest.mark.parametrize("detector_class", FAMILIES)
def test_forward_is_features_then_predict_and_the_export_holds_all(detector_class, tmp_path):
    detector, batch = detector_class(), tiny_batch(2)
    seen = detector(batch)
    features = detector.features(batch)
    assert_same(seen.features, features, "")
    assert_same(seen.prediction, detector.predict(features, batch), "")
    detector.export(tmp_path)
    assert_same(load_file(tmp_path / "model.safetensors"), dict(detector.state_dict()), "")


@pytest.mark.parametrize("detector_class", FAMILIES)
def test_detections_are_sorted_and_inside_the_valid_image(detector_class):
    detector, batch, prediction = observed(detector_class)
    for found, (height, width) in zip(detector.detect(prediction, batch), batch.sizes.tolist(), strict=True):
        assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)
        assert found.boxes_xyxy.min() >= 0
        assert found.boxes_xyxy[:, 2].max() <= width
        assert found.boxes_xyxy[:, 3].max() <= height
        assert set(found.labels.tolist()) <= {0, 1}


# --------------------------------------------------------------------------------------------------------- assignment


@pytest.mark.parametrize("detector_class", FAMILIES)
def test_the_own_assignment_given_back_is_the_own_loss(detector_class):
    detector, batch, prediction = observed(detector_class)
    own = detector.assign(prediction, batch)
    assert_same(detector.loss(prediction, batch, own).terms, detector.loss(prediction, batch).terms, "")
    assert_same(detector.assign(prediction, batch), own, "assign draws random numbers: ")


def test_foreign_assignment_of_a_dense_head_by_hand():
    detector, batch, prediction = observed(TinyDense)
    matched = torch.full(prediction.logits.shape[:2], -1)
    matched[0, 3], matched[1, 70], matched[1, 71] = 1, 0, -2
    weights = torch.ones(matched.shape)
    weights[0, 3] = 3.0
    losses = detector.loss(prediction, batch, Assignment(matched, weights, torch.tensor(5.0)))
    wanted = torch.zeros_like(prediction.logits)
    wanted[0, 3, batch.targets[0].labels[1]] = 1
    wanted[1, 70, batch.targets[1].labels[0]] = 1
    bce = F.softplus(prediction.logits) - wanted * prediction.logits
    by_hand = (bce.sum() + 2 * bce[0, 3].sum() - bce[1, 71].sum()) / 5
    torch.testing.assert_close(losses.terms["cls"], by_hand)
    first = (prediction.boxes_xyxy[0, 3] - batch.targets[0].boxes_xyxy[1]).abs().sum()
    second = (prediction.boxes_xyxy[1, 70] - batch.targets[1].boxes_xyxy[0]).abs().sum()
    torch.testing.assert_close(losses.terms["box"], (3 * first + second) / 64 / 5)


def test_foreign_assignment_of_regions_leaves_the_first_stage_its_own():
    detector, batch, prediction = observed(TinyRegions)
    matched = torch.full_like(prediction.origin.image, -2)
    matched[2] = 0
    losses = detector.loss(prediction, batch, Assignment(matched, normalizer=torch.tensor(1.0)))
    label, box = batch.targets[0].labels[0], batch.targets[0].boxes_xyxy[0]
    torch.testing.assert_close(losses.terms["cls"], -prediction.logits[2].log_softmax(dim=0)[label])
    torch.testing.assert_close(losses.terms["box"], (prediction.refined_xyxy[2, label] - box).abs().sum() / 64)
    own = detector.loss(prediction, batch).terms
    assert torch.equal(losses.terms["rpn_cls"], own["rpn_cls"])
    assert torch.equal(losses.terms["rpn_box"], own["rpn_box"])
    assert not torch.isclose(losses.terms["cls"], own["cls"])


def test_foreign_assignment_of_queries_by_hand():
    detector, batch, prediction = observed(TinyQueries)
    matched = torch.full(prediction.logits.shape[:3], -2)
    matched[1, 1, 4] = 0
    losses = detector.loss(prediction, batch, Assignment(matched))
    logits, label = prediction.logits[1, 1, 4], batch.targets[1].labels[0]
    torch.testing.assert_close(losses.terms["cls"], F.softplus(logits).sum() - logits[label])
    x, y, w, h = prediction.boxes_cxcywh01[1, 1, 4]
    box = torch.stack([(x - w / 2) * 64, (y - h / 2) * 48, (x + w / 2) * 64, (y + h / 2) * 48])  # 48: the valid height
    torch.testing.assert_close(losses.terms["box"], (box - batch.targets[1].boxes_xyxy[0]).abs().sum() / 64)


@pytest.mark.parametrize("detector_class", FAMILIES)
def test_training_boxes_replaced_in_the_step_change_assignment_and_loss(detector_class):
    detector, batch, prediction = observed(detector_class)
    moved = []
    for target in batch.targets:
        boxes = target.boxes_xyxy.clone()
        boxes[:, [0, 2]] = 64 - boxes[:, [2, 0]]
        moved.append(Target(boxes, 1 - target.labels, target.crowd))
    other = batch.with_targets(moved)
    assert other.images is batch.images
    assert not torch.equal(detector.assign(prediction, other).matched, detector.assign(prediction, batch).matched)
    here, there = detector.loss(prediction, batch).terms, detector.loss(prediction, other).terms
    for name in here:
        assert not torch.isclose(here[name], there[name], rtol=1e-6), name
    foreign = detector.assign(prediction, other)
    assert_same(detector.loss(prediction, other, foreign).terms, detector.loss(prediction, other).terms, "")
    positives = detector.positives(prediction, foreign, other)
    for row in range(len(positives)):
        target = moved[int(positives.image[row])]
        assert torch.equal(positives.targets_xyxy[row], target.boxes_xyxy[positives.ground_truth[row]])


@pytest.mark.parametrize("detector_class", FAMILIES)
def test_crowd_boxes_are_nobodys_and_indices_count_them(detector_class):
    detector, batch = detector_class(), tiny_batch(2)
    boxes = torch.tensor([[0.0, 0.0, 30.0, 30.0], [32.0, 8.0, 62.0, 46.0]])
    crowd = Target(boxes, torch.tensor([0, 1]), torch.tensor([True, False]))
    batch = batch.with_targets([crowd, crowd])
    prediction = detector(batch).prediction
    assignment = detector.assign(prediction, batch)
    assert set(assignment.matched.unique().tolist()) == {-1, 1}
    positives = detector.positives(prediction, assignment, batch)
    assert positives.targets_xyxy.unique(dim=0).tolist() == boxes[1:].tolist()
    assert positives.labels.unique().tolist() == [1]


@pytest.mark.parametrize("detector_class", FAMILIES)
@pytest.mark.parametrize("images", [range(1), range(2)])
def test_images_without_boxes(detector_class, images):
    detector, batch = detector_class(), without_boxes(tiny_batch(2), images)
    prediction = detector(batch).prediction
    assignment = detector.assign(prediction, batch)
    positives = detector.positives(prediction, assignment, batch)
    assert set(positives.image.tolist()) == set(range(2)) - set(images)
    assert positives.logits.shape[0] == positives.boxes_xyxy.shape[0] == len(positives)
    losses = detector.loss(prediction, batch)
    if len(images) == 2:
        assert float(losses.terms["box"].detach()) == 0.0
    assert torch.isfinite(losses.total())
    losses.total().backward()
    assert all(torch.isfinite(p.grad).all() for p in detector.parameters() if p.grad is not None)
    assert detector.backbone[0].weight.grad.abs().sum() > 0


# ---------------------------------------------------------------------------------------------------------- positives


def test_positives_of_a_dense_head_are_its_rows():
    detector, batch, prediction = observed(TinyDense, count=3)
    matched = torch.full(prediction.logits.shape[:2], -1)
    matched[0, 5], matched[2, 7], matched[2, 9] = 1, 0, -2
    positives = detector.positives(prediction, Assignment(matched), batch)
    assert positives.image.tolist() == [0, 2]
    assert positives.index.tolist() == [5, 7]
    assert positives.ground_truth.tolist() == [1, 0]
    assert positives.layer.tolist() == [0, 0]
    assert torch.equal(positives.logits, prediction.logits[[0, 2], [5, 7]])
    assert positives.labels.tolist() == [int(batch.targets[0].labels[1]), int(batch.targets[2].labels[0])]
    assert not positives.softmax


def test_positives_of_regions_take_the_box_of_the_class():
    detector, batch, prediction = observed(TinyRegions)
    batch = batch.with_targets([Target(t.boxes_xyxy, torch.ones_like(t.labels), t.crowd) for t in batch.targets])
    matched = torch.full_like(prediction.origin.image, -1)
    matched[1] = 0
    positives = detector.positives(prediction, Assignment(matched), batch)
    assert torch.equal(positives.boxes_xyxy[0], prediction.refined_xyxy[1, 1])
    assert positives.softmax
    agnostic = replace(prediction, refined_xyxy=prediction.refined_xyxy[:, :1])
    assert torch.equal(detector.positives(agnostic, Assignment(matched), batch).boxes_xyxy[0], prediction.refined_xyxy[1, 0])


@pytest.mark.parametrize(("detector_class", "boxes_from", "logits_from"), [
    (TinyDense, "head.deltas.bias", "head.logits.bias"),
    (TinyRegions, "deltas.bias", "logits.bias"),
    (TinyQueries, "deltas.bias", "logits.bias"),
])  # fmt: skip
def test_gradients_of_positives_reach_the_right_parameters_and_equal_differences(detector_class, boxes_from, logits_from):
    detector, batch = detector_class().double(), tiny_batch(2)
    batch = replace(batch, images=batch.images.double())
    parameters = dict(detector.named_parameters())
    assignment = detector.assign(detector(batch).prediction, batch)

    def value(of):
        positives = detector.positives(detector(batch).prediction, assignment, batch)
        tensor = positives.boxes_xyxy if of == "boxes" else positives.logits
        return (tensor * torch.linspace(-1, 1, tensor.numel(), dtype=torch.float64).reshape(tensor.shape)).sum()

    for of, own, foreign in (("boxes", boxes_from, logits_from), ("logits", logits_from, boxes_from)):
        detector.zero_grad()
        value(of).backward()
        assert parameters[foreign].grad is None or not parameters[foreign].grad.any()
        assert parameters["levels.convs.0.weight"].grad.abs().sum() > 0
        gradient = parameters[own].grad
        assert gradient.abs().sum() > 0
        differences = torch.zeros_like(gradient)
        for index in range(gradient.numel()):
            ends = []
            for step in (1e-6, -1e-6):
                with torch.no_grad():
                    parameters[own][index] += step
                    ends.append(float(value(of)))
                    parameters[own][index] -= step
            differences[index] = (ends[0] - ends[1]) / 2e-6
        torch.testing.assert_close(gradient, differences, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------------------- boxes and origin


def test_proposals_know_the_cell_that_made_them():
    detector, batch = TinyRegions().eval(), tiny_batch(2)
    features = detector.features(batch)
    boxes, origins = detector.proposals(features, batch)
    prediction = detector.predict(features, batch)
    first = prediction.first
    for image, (proposed, origin) in enumerate(zip(boxes, origins, strict=True)):
        assert len(proposed) == detector.num_proposals
        for box, level, cell in zip(proposed, origin.level, origin.cell, strict=True):
            made = (first.levels == level) & (first.cells == cell).all(dim=1)
            assert int(made.sum()) == 1
            height, width = batch.sizes[image].tolist()
            limit = torch.tensor([width, height, width, height])
            expected = torch.minimum(first.boxes_xyxy[image, made][0].clamp(min=0), limit)
            assert torch.equal(box, expected)
    assert_same(prediction.origin, Origin.cat(origins), "")
    assert_same(prediction.boxes_xyxy, torch.cat(boxes), "")
    assert not prediction.boxes_xyxy.requires_grad


def test_inserted_ground_truth_is_marked_and_stays_so_through_split_and_stack():
    detector, batch, prediction = observed(TinyRegions)
    inserted = prediction.origin.ground_truth >= 0
    assert inserted.sum() == sum(len(target) for target in batch.targets)
    for index in torch.nonzero(inserted).flatten():
        image, box = prediction.origin.image[index], prediction.origin.ground_truth[index]
        assert torch.equal(prediction.boxes_xyxy[index], batch.targets[image].boxes_xyxy[box])
        assert prediction.origin.level[index] == -1
    pieces = prediction.detach().split(2)
    assert [int((piece.origin.ground_truth >= 0).sum()) for piece in pieces] == [len(target) for target in batch.targets]
    assert_same(type(prediction).stack(pieces), prediction, "")
    matched = detector.assign(prediction, batch).matched
    assert (matched[inserted] == prediction.origin.ground_truth[inserted]).all()
    detector.eval()
    assert (detector(batch).prediction.origin.ground_truth == -1).all()


def test_regions_answer_about_anybodys_boxes_in_their_order():
    detector, batch = TinyRegions(), tiny_batch(2)
    features = detector.features(batch)
    prediction = detector.predict(features, batch)
    given = [prediction.boxes_xyxy[prediction.origin.image == image] for image in range(2)]
    again = detector.regions(features, given, batch)
    assert_same(again.logits, prediction.logits, "")
    assert again.first is None
    assert (again.origin.level == -1).all()
    turned = detector.regions(features, [given[0].flip(0), given[1]], batch)
    torch.testing.assert_close(turned.logits[: len(given[0])], prediction.logits[: len(given[0])].flip(0))
    assert "rpn_cls" not in detector.loss(again, batch).terms


# -------------------------------------------------------------------------------------------------------------- towers


def test_resuming_a_head_at_any_depth_is_its_prediction():
    detector, batch = TinyDense(), tiny_batch(2)
    features = detector.features(batch)
    prediction = detector.predict(features, batch)
    for depth in range(detector.tower_depth + 1):
        hidden = detector.tower(features, upto=depth)
        assert hidden.depth == depth
        assert_same(detector.finish(hidden, batch), prediction, f"depth {depth}: ")
    assert_same(detector.finish(detector.tower(features), batch), prediction, "")
    assert detector.tower(features, upto=0).classification is features.maps


def test_resuming_with_the_tower_of_another_detector():
    student, teacher, batch = TinyDense(seed=1), TinyDense(seed=2), tiny_batch(2)
    features = student.features(batch)
    crossed = teacher.finish(student.tower(features, upto=1), batch)
    by_hand = [teacher.head.classification[1](student.head.classification[0](level).relu()).relu() for level in features.maps]
    logits = [teacher.head.logits(level).flatten(2) for level in by_hand]
    assert torch.equal(crossed.logits, torch.cat(logits, dim=2).transpose(1, 2))
    own = student.predict(features, batch)
    assert not torch.allclose(crossed.logits, own.logits)
    crossed.logits.sum().backward()
    assert student.head.classification[0].weight.grad.abs().sum() > 0
    assert student.head.classification[1].weight.grad is None
    assert student.head.logits.weight.grad is None


# ------------------------------------------------------------------------------------------------------------- queries


def test_decoding_a_foreign_seed_leaves_the_own_result_bit_identical():
    student, teacher, batch = TinyQueries(seed=1), TinyQueries(seed=2), tiny_batch(2)
    features, foreign = student.features(batch), teacher.seed(teacher.features(batch), batch)
    before = student.predict(features, batch)
    more = QuerySeed(
        *(torch.cat([value, value.flip(1)], dim=1) for value in (foreign.content, foreign.position, foreign.reference))
    )
    asked = student.decode(features, more, batch)
    assert asked.logits.shape == (2, 2, 10, 2)
    assert asked.seed is more
    assert_same(student.predict(features, batch), before, "")
    assert_same(student.decode(features, student.seed(features, batch), batch), before, "")
    same = student.decode(features, foreign, batch)
    assert not torch.allclose(same.logits, before.logits)
    assert not torch.allclose(same.logits, teacher.predict(teacher.features(batch), batch).logits)
    again = teacher.decode(teacher.features(batch), foreign, batch)
    assert_same(again, teacher.predict(teacher.features(batch), batch), "")


def test_a_seed_may_lack_position_and_reference():
    detector, batch = TinyQueries(), tiny_batch(2)
    features = detector.features(batch)
    content = detector.seed(features, batch).content
    bare = detector.decode(features, QuerySeed(content), batch)
    middle = QuerySeed(content, torch.zeros_like(content), torch.full_like(content[..., :4], 0.5))
    assert_same(bare.boxes_cxcywh01, detector.decode(features, middle, batch).boxes_cxcywh01, "")


def test_attention_is_a_distribution_over_cells_that_are_not_padding():
    detector, batch = TinyQueries(), tiny_batch(2)
    features = detector.features(batch)
    seed = detector.seed(features, batch)
    queries = detector.decode(features, seed, batch, attention=True)
    torch.testing.assert_close(queries.attention.sum(dim=-1), torch.ones(2, 2, 1, 5))
    padding = torch.cat([mask.flatten(1) for mask in features.padding], dim=1)
    assert (queries.attention[:, 1, :, :, padding[1]] == 0).all()
    torch.testing.assert_close(queries.self_attention.sum(dim=-1), torch.ones(2, 2, 1, 5))
    assert_same(replace(queries, attention=None, self_attention=None), detector.decode(features, seed, batch), "")


# -------------------------------------------------------------------------------------------------------------- copies


def test_a_copied_head_is_equal_but_its_own():
    detector, batch = TinyDense(), tiny_batch(2)
    features = detector.features(batch)
    own = detector.predict(features, batch)
    copied = detector.copy_head()
    assert_same(copied.predict(features, batch), own, "")
    assert_same(copied.loss(own, batch).terms, detector.loss(own, batch).terms, "")
    assert not {id(p) for p in copied.parameters()} & {id(p) for p in detector.parameters()}
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.add_(1.0)
    assert_same(detector.predict(features, batch), own, "")
    fresh = detector.copy_head(fresh=True)
    assert not torch.allclose(fresh.predict(features, batch).logits, own.logits)


def test_a_copied_head_runs_on_another_pyramid_with_its_own_targets():
    detector, batch = TinyDense(), tiny_batch(2)
    other_batch = batch.with_targets(tiny_batch(2, seed=5).targets)
    head = detector.copy_head()
    other = TinyDense(seed=9).features(batch)
    prediction = head.predict(other, other_batch)
    losses = head.loss(prediction, other_batch)
    assert_same(losses.terms, head.loss(prediction, other_batch, head.assign(prediction, other_batch)).terms, "")
    assert total(losses) != pytest.approx(total(head.loss(prediction, batch)), rel=1e-3)
    losses.total().backward()
    assert all(parameter.grad is not None for parameter in head.parameters())
    assert all(parameter.grad is None for parameter in detector.parameters())


def test_a_copied_neck_maps_backbone_features_to_features():
    detector, batch = TinyDense(), tiny_batch(2)
    neck = detector.copy_neck()
    assert_same(neck(detector.backbone_features(batch)), detector.features(batch), "")
    assert not {id(p) for p in neck.parameters()} & {id(p) for p in detector.parameters()}
    fresh = detector.copy_neck(fresh=True)(detector.backbone_features(batch))
    assert fresh.channels == detector.spec.channels
    assert not torch.allclose(fresh.maps[0], detector.features(batch).maps[0])


# ------------------------------------------------------------------------------------------------------------- teacher


class CountingDense(TinyDense):
    """Counts how often its parts run."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.calls = []

    def backbone_features(self, batch):
        self.calls.append("backbone")
        return super().backbone_features(batch)

    def neck(self, features, batch):
        self.calls.append("neck")
        return super().neck(features, batch)

    def predict(self, features, batch):
        self.calls.append("predict")
        return super().predict(features, batch)


def test_teacher_is_frozen_in_eval_mode_and_no_module():
    detector = TinyDense().train()
    teacher = Teacher(detector)
    assert not detector.training
    assert not any(parameter.requires_grad for parameter in detector.parameters())
    assert not isinstance(teacher, torch.nn.Module)
    holder = torch.nn.Module()
    holder.teacher = teacher
    holder.train()
    assert not detector.training
    assert not holder.state_dict()
    seen = teacher.observe(tiny_batch(2), Look(prediction=True))
    assert not seen.prediction.logits.requires_grad
    assert teacher.spec is detector.spec


def test_teacher_runs_once_for_a_batch_and_answers_only_what_was_asked():
    detector, batch = CountingDense(), tiny_batch(2)
    teacher = Teacher(detector)
    first = teacher.observe(batch)
    assert (first.backbone_features, first.prediction, first.towers) == (None, None, ())
    second = teacher.observe(batch, Look(prediction=True))
    assert second.features is first.features
    assert detector.calls == ["backbone", "neck", "predict"]
    third = teacher.observe(batch, Look(towers=(1,)))
    assert (third.backbone_features, third.prediction) == (None, None)
    assert_same(third.towers, (detector.tower(first.features, 1),), "")
    fourth = teacher.observe(batch, Look(prediction=True))
    assert fourth.prediction is second.prediction
    assert fourth.towers == ()
    again = teacher.observe(batch)
    assert (again.backbone_features, again.prediction) == (None, None)
    assert detector.calls == ["backbone", "neck", "predict"]
    teacher.forget()
    teacher.observe(batch)
    teacher.observe(batch.with_targets(batch.targets))
    assert detector.calls == ["backbone", "neck", "predict", "backbone", "neck"], "the same images with other boxes are one pass"


def test_teacher_runs_once_for_all_who_ask_when_the_first_looks_at_everything():
    detector, batch = CountingDense(), tiny_batch(2)
    teacher = Teacher(detector)
    teacher.observe(batch, Look(backbone=True, towers=(2,), prediction=True))
    assert detector.calls == ["backbone", "neck"], "the prediction is finished from the tower"
    shown = [teacher.observe(batch, look) for look in (Look(backbone=True), Look(prediction=True), Look(towers=(2,)))]
    assert detector.calls == ["backbone", "neck"]
    parts = [[one.backbone_features is not None, one.prediction is not None, bool(one.towers)] for one in shown]
    assert parts == [[True, False, False], [False, True, False], [False, False, True]]


def test_a_part_that_is_asked_for_late_runs_the_features_again_and_shows_the_same():
    detector, batch = CountingDense(), tiny_batch(2)
    teacher = Teacher(detector)
    early = teacher.observe(batch, Look(prediction=True))
    late = teacher.observe(batch, Look(backbone=True, prediction=True))
    assert detector.calls == ["backbone", "neck", "predict"] * 2
    assert_same(late.prediction, early.prediction, "")
    assert_same(late.backbone_features, detector.backbone_features(batch), "")


def test_teacher_without_backbone_features_says_so():
    class Bare(TinyDense):
        backbone_features = None  # The protocol's way to say that a method is not there.

        def features(self, batch):
            return TinyDense().features(batch)

    with pytest.raises(ModelError, match=r"^tinydense:patches has no backbone features$"):
        Teacher(Bare()).observe(tiny_batch(1), Look(backbone=True))


def test_parts_that_a_detector_does_not_show_are_named():
    batch = tiny_batch(1)
    with pytest.raises(ModelError, match=r"^tinyregions:patches has no towers$"):
        TinyRegions().observe(batch, Look(towers=(1,)))
    with pytest.raises(ModelError, match=r"^tinydense:patches has no attention maps$"):
        TinyDense().observe(batch, Look(attention=True))
    with pytest.raises(ModelError, match=r"^tinydense:patches has no query decoder that accepts other queries$"):
        _ = Teacher(TinyDense()).queries


def test_what_was_seen_is_kept_when_the_head_is_looked_at():
    detector, batch = TinyDense(), tiny_batch(2)
    seen = detector.observe_features(batch, Look(backbone=True))
    assert (seen.prediction, seen.towers) == (None, ())
    whole = detector.observe_head(seen, batch, Look(towers=(1,), prediction=True))
    assert whole.features is seen.features
    assert whole.backbone_features is seen.backbone_features
    assert detector.observe_head(whole, batch, Look(towers=(1, 2), prediction=True)).prediction is whole.prediction
    assert detector.observe_head(whole, batch, Look(towers=(1, 2))).towers[0] is whole.towers[0]
    # Another detector's head on these features, as a method that swaps heads would look.
    other = TinyDense(seed=5)
    assert_same(other.observe_head(seen, batch, Look(prediction=True)).prediction, other.predict(seen.features, batch), "")


@pytest.mark.parametrize("detector_class", FAMILIES)
def test_a_spec_comes_back_from_json(detector_class):
    detector = detector_class()
    coding = DenseCoding(points=9, quality=True, anchors_wh=(((8.0, 4.0), (4.0, 8.0)), ((16.0, 8.0), (8.0, 16.0))))
    spec = replace(detector.spec, queries=query_spec(detector) if detector_class is TinyQueries else None, coding=coding)
    plain = json.loads(json.dumps(asdict(spec)))
    assert DetectorSpec.from_plain(plain) == spec
    # A cache of the first version does not know the fields that came later.
    old = {name: value for name, value in plain.items() if name not in ("backbone", "anchors", "box_bins", "coding", "queries")}
    assert DetectorSpec.from_plain(old) == replace(spec, backbone=None, anchors=(), box_bins=0, coding=None, queries=None)


def test_the_fingerprint_is_of_what_the_first_version_knew():
    """Fields that follow from the weights do not change it, so caches made before they existed still fit."""
    plain, told = TinyDense(seed=1), TinyDense(seed=1)
    told.spec = replace(told.spec, backbone=None, anchors=(), box_bins=3, coding=DenseCoding(points=9), queries=None)
    assert Teacher(told).fingerprint == Teacher(plain).fingerprint
    told = TinyDense(seed=1)
    told.spec = replace(told.spec, mean=(0.0, 0.0, 0.0))
    assert Teacher(told).fingerprint != Teacher(plain).fingerprint


def test_padding_is_judged_by_views():
    batch = tiny_batch(1, size=16)
    detector = TinyDense()
    padded = Batch(batch.images, torch.tensor([[8, 16]]), batch.targets, batch.ids, (View((8, 16), (8, 16)),))
    assert (detector.normalized(padded)[0, :, 8:] == 0).all()
    assert detector.features(batch).padding is None
    assert detector.features(padded).padding[0].tolist() == [[[False, False], [True, True]]]
