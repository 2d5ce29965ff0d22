import dataclasses
import math

import pytest
import torch
from torch import nn

from detdistill.cache.encoding import encode
from detdistill.detectors.build import build_detector
from detdistill.detectors.contract import PREDICTION, Teacher
from detdistill.errors import DetdistillError
from detdistill.functional.distributions import project_distribution, step_positions
from detdistill.losses import matched_log_odds, matched_pairs, matched_sides_loss, matched_terms
from detdistill.methods.matched import Matched, MatchedTaught
from detdistill.methods.shared.compose import build_method
from detdistill.methods.shared.needs import PairError
from detdistill.structures import Clock, Queries, Target
from tests.methods.contract_checks import check_method, without_boxes
from tests.tiny import TinyDense, TinyQueries, seeded, tiny_batch

CLOCK = Clock(0, 10)
SMALL = "resnet10t,channels=8-16-32-64,stem=8,dim=32,heads=4,ffn=64,encoder=1"


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_boxes(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 0.2 + 0.4 * torch.rand(count, 4, generator=generator, dtype=torch.float64)


# --------------------------------------------------------------------------------------------------- values by hand


def test_pairs_are_the_queries_of_known_objects():
    """Two layers of two images with three queries; image 0 has objects 0 and 1, of which the teacher knows 1."""
    matched = torch.tensor([[[1, -1, 0], [-1, 0, -1]], [[0, 1, -1], [-1, -1, 0]]])
    pairs = matched_pairs(matched, torch.tensor([[False, True], [True, False]]))
    assert torch.stack(list(pairs)).T.tolist() == [[0, 0, 0, 1], [0, 1, 1, 0], [1, 0, 1, 1], [1, 1, 2, 0]]
    assert pairs.of_layer(1).query.tolist() == [1, 2]


def test_terms_by_hand():
    """One class with p = 0.8 against a score of 0.5; boxes of 10 x 10 pixels side by side in an image of 40 x 20."""
    mine, theirs = torch.tensor([[0.125, 0.25, 0.25, 0.5]]), torch.tensor([[0.375, 0.25, 0.25, 0.5]])
    terms = matched_terms(torch.zeros(1, 1), mine, torch.tensor([[0.8]]), theirs, torch.tensor([[20, 40]]))
    assert float(terms.cls) == pytest.approx(math.log(2), rel=1e-6)
    assert float(terms.l1) == pytest.approx(0.25)
    assert float(terms.giou) == pytest.approx(1.0)  # they touch, and fill the enclosing box
    apart = torch.tensor([[0.625, 0.25, 0.25, 0.5]])
    assert float(matched_terms(torch.zeros(1, 1), mine, torch.tensor([[0.8]]), apart, torch.tensor([[20, 40]])).giou) == (
        pytest.approx(1 + 10 / 30, rel=1e-6)
    )


def test_class_term_sums_over_classes():
    odds, told = torch.tensor([[math.log(3.0), 0.0]]), torch.tensor([[0.25, 1.0]])
    expected = -0.25 * math.log(0.75) - 0.75 * math.log(0.25) - math.log(0.5)
    box = torch.tensor([[0.5, 0.5, 0.2, 0.2]])
    assert float(matched_terms(odds, box, told, box, torch.tensor([[8, 8]])).cls) == pytest.approx(expected, rel=1e-6)


def test_sides_by_hand():
    """The teacher's mass at 1.25 is split 3 to 1 over the steps 1 and 2; the student is even over four steps."""
    told = torch.tensor([0.0, 1.0]).expand(1, 4, 2)
    positions = torch.tensor([0.0, 1.25]).expand(1, 4, 2)
    found = matched_sides_loss(torch.zeros(1, 4, 4), told, positions, torch.arange(4.0))
    each = 0.75 * math.log(0.75 / 0.25) + 0.25 * math.log(0.25 / 0.25)
    assert float(found) == pytest.approx(4 * each, rel=1e-6)


def test_log_odds_of_a_softmax_are_those_of_its_probabilities():
    logits = random(5, 4)
    p = logits.softmax(dim=-1)[:, :-1]
    torch.testing.assert_close(matched_log_odds(logits, softmax=True), (p / (1 - p)).log())
    assert matched_log_odds(logits) is logits
    extreme = torch.tensor([[200.0, 0.0, -200.0]], requires_grad=True)
    found = matched_log_odds(extreme, softmax=True)
    assert found.tolist() == [[200.0, -200.0]]
    found.sum().backward()
    assert torch.isfinite(extreme.grad).all()


# ------------------------------------------------------------------------------------------------------- invariants


def test_no_gradient_where_both_sides_are_equal():
    odds, boxes, sides = random(6, 3).requires_grad_(), random_boxes(6).requires_grad_(), random(6, 4, 9).requires_grad_()
    terms = matched_terms(odds, boxes, odds.sigmoid(), boxes, torch.tensor([[480, 640]]).expand(6, 2))
    apart = matched_sides_loss(
        sides, sides.softmax(dim=-1), torch.arange(9.0).double().expand(6, 4, 9), torch.arange(9.0).double()
    )
    assert float(terms.l1.sum().detach()) == 0
    assert float(terms.giou.detach().abs().max()) < 1e-12
    assert float(apart.detach().abs().max()) < 1e-12
    for loss, leaf in ((terms.cls, odds), (terms.l1, boxes), (terms.giou, boxes), (apart, sides)):
        (slope,) = torch.autograd.grad(loss.sum(), leaf, retain_graph=True)
        assert float(slope.abs().max()) < 1e-12


def test_gradients_agree_with_finite_differences():
    odds, boxes, sides = random(3, 2).requires_grad_(), random_boxes(3).requires_grad_(), random(3, 4, 5).requires_grad_()
    told, targets, sizes = random(3, 2, seed=1).sigmoid(), random_boxes(3, seed=1), torch.tensor([[20, 30]]).expand(3, 2)
    assert torch.autograd.gradcheck(lambda o, b: tuple(matched_terms(o, b, told, targets, sizes)), (odds, boxes))
    theirs, positions = random(3, 4, 7, seed=2).softmax(dim=-1), 2 + random(3, 4, 7, seed=3)
    steps = torch.tensor([0.0, 0.5, 1.5, 3.0, 5.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: matched_sides_loss(s, theirs, positions, steps), (sides,))


def test_the_teacher_gets_no_gradient():
    odds, boxes = random(3, 2).requires_grad_(), random_boxes(3).requires_grad_()
    terms = matched_terms(
        random(3, 2, seed=1), random_boxes(3, seed=1), odds.sigmoid(), boxes, torch.tensor([[9, 9]]).expand(3, 2)
    )
    assert not any(term.requires_grad for term in terms)


def test_rebinning_is_exact_for_equal_frames_and_keeps_the_side_for_others():
    """Two scales of one image: the mean place of each side is that of the teacher, and follows it by finite differences."""
    mass, steps = random(5, 4, 9).softmax(dim=-1), torch.linspace(-4, 4, 9, dtype=torch.float64)
    origins, units = random(5, 4, seed=1), 0.1 * random(5, 4, seed=2)
    same = step_positions(steps, origins, units, origins, units)
    assert torch.equal(same, steps.expand(5, 4, 9))
    assert torch.equal(project_distribution(mass, same, steps), mass)
    onto = origins + 0.05, -0.2 * torch.ones_like(units)
    wide = torch.linspace(-40, 40, 33, dtype=torch.float64)

    def places(moved):
        found = project_distribution(mass, step_positions(steps, origins + moved, units, *onto), wide)
        return onto[0] + onto[1] * (found * wide).sum(dim=-1)

    torch.testing.assert_close(places(0.0), origins + units * (mass * steps).sum(dim=-1))
    torch.testing.assert_close((places(0.01) - places(-0.01)) / 0.02, torch.ones(5, 4, dtype=torch.float64))


# ------------------------------------------------------------------------------------------------------- the method


class SoftmaxQueries(TinyQueries):
    """Softmax classes with a background, as DETR has."""

    @seeded
    def __init__(self, classes=("a", "b"), channels=(8, 8)):
        super().__init__(classes, channels)
        self.spec = dataclasses.replace(self.spec, softmax=True)
        self.logits = nn.Linear(channels[0], len(classes) + 1)

    def decode(self, features, seed, batch, attention=False):
        return dataclasses.replace(super().decode(features, seed, batch, attention), softmax=True)


class OneQuery(TinyQueries):
    num_queries = 1


def learn(method, student, batch, taught=None):
    taught = method.teach(batch) if taught is None else taught
    return method.learn(student, student(batch), taught, batch, CLOCK)


def pair(teacher=None, student=None, **settings):
    teacher, student = Teacher(teacher or TinyQueries(seed=1)), student or TinyQueries(seed=2)
    return Matched(teacher, student, **settings), teacher, student


@pytest.mark.parametrize("settings", [{}, {"layers": "last", "cls_weight": 0.0}])
def test_contract(settings):
    assert check_method(Matched, **settings) == ["queries 8 -> queries 8", "queries 16 -> queries 8"]


def test_terms_are_those_of_the_matched_queries():
    """Computed again for each object, query by query, from both detectors' own assignments."""
    method, teacher, student = pair(cls_weight=0.5, l1_weight=3.0, giou_weight=4.0)
    batch = tiny_batch(3)
    losses = learn(method, student, batch)
    mine, theirs = student(batch).prediction, teacher.detector(batch).prediction
    ours, others = student.assign(mine, batch).matched, teacher.detector.assign(theirs, batch).matched[-1]
    sums, objects = torch.zeros(3), sum(len(target) for target in batch.targets)
    for layer in range(2):
        for image, target in enumerate(batch.targets):
            for box in range(len(target)):
                query, other = (int((row == box).nonzero()) for row in (ours[layer, image], others[image]))
                terms = matched_terms(
                    mine.logits[layer, image, query][None],
                    mine.boxes_cxcywh01[layer, image, query][None],
                    theirs.logits[-1, image, other].sigmoid()[None],
                    theirs.boxes_cxcywh01[-1, image, other][None],
                    batch.sizes[image][None],
                )
                sums += torch.cat(list(terms)).detach()
    expected = sums * torch.tensor([0.5, 3.0, 4.0]) / objects
    assert list(losses.terms) == ["matched_cls", "matched_l1", "matched_giou"]
    torch.testing.assert_close(torch.stack(list(losses.terms.values())).detach(), expected)
    assert float(losses.monitors["objects"]) == float(losses.monitors["covered"]) == objects


@pytest.mark.parametrize("side", ["teacher", "student"])
def test_the_order_of_queries_changes_nothing(side):
    found = []
    for order in ([0, 1, 2, 3, 4], [3, 0, 4, 2, 1]):
        detectors = {"teacher": TinyQueries(seed=1), "student": TinyQueries(seed=2)}
        for name in ("content", "position", "reference"):
            parameter = getattr(detectors[side], name)
            parameter.data = parameter.data[order]
        method, _, student = pair(**detectors)
        found.append(learn(method, student, tiny_batch(3)).total())
    torch.testing.assert_close(found[0], found[1])


def test_a_student_equal_to_the_teacher_gets_no_gradient():
    """With one decoder layer, as the teacher's last one teaches all of them."""
    teacher, student = TinyQueries(seed=1), TinyQueries(seed=1)
    for detector in (teacher, student):
        detector.layers = detector.layers[:1]
    method, _, student = pair(teacher, student)
    learn(method, student, tiny_batch(3)).total().backward()
    assert max(float(p.grad.abs().max()) for p in student.parameters() if p.grad is not None) < 1e-6


def test_another_image_size_of_the_teacher_changes_nothing_it_teaches():
    """What is taught are parts of the image: doubled sizes and boxes give the same targets for the same predictions."""
    method, teacher, _ = pair()
    batch = tiny_batch(2)
    targets = [dataclasses.replace(target, boxes_xyxy=2 * target.boxes_xyxy) for target in batch.targets]
    views = tuple(dataclasses.replace(view, size_hw=tuple(2 * side for side in view.size_hw)) for view in batch.views)
    images = nn.functional.interpolate(batch.images, scale_factor=2)
    large = dataclasses.replace(batch, images=images, sizes=2 * batch.sizes, targets=tuple(targets), views=views)
    seen = teacher.observe(batch, method.requirements.teacher)
    taught = method.teach(batch)
    teacher.observe = lambda *_: seen
    again = method.teach(large)
    torch.testing.assert_close(again.boxes_cxcywh01, taught.boxes_cxcywh01)
    torch.testing.assert_close(again.probabilities, taught.probabilities)


def test_one_assignment_serves_the_method_and_the_detection_loss():
    method, _, student = pair()
    calls, assign = [], student.assign
    student.assign = lambda *given: calls.append(1) or assign(*given)
    batch = tiny_batch(2)
    taught = method.teach(batch)
    losses = method.step(student, batch, taught, CLOCK)
    assert len(calls) == 1
    apart = {**student.loss(student(batch).prediction, batch).terms, **learn(method, student, batch, taught).terms}
    assert losses.terms.keys() == apart.keys()
    for name, term in losses.terms.items():
        torch.testing.assert_close(term, apart[name])
    together = build_method("matched+pkd", Teacher(TinyQueries(seed=1)), student)
    calls.clear()
    together.step(student, batch, together.teach(batch), CLOCK)
    assert len(calls) == 1


@pytest.mark.parametrize("teacher", [TinyQueries, SoftmaxQueries])
@pytest.mark.parametrize("student", [TinyQueries, SoftmaxQueries])
def test_sigmoid_and_softmax_classes_teach_each_other(teacher, student):
    method, theirs, mine = pair(teacher(seed=1), student(seed=2))
    batch = tiny_batch(2)
    taught = method.teach(batch)
    prediction = theirs.detector(batch).prediction
    p = prediction.logits[-1].softmax(-1)[..., :-1] if teacher is SoftmaxQueries else prediction.logits[-1].sigmoid()
    place = theirs.detector.assign(prediction, batch).matched[-1, 0].tolist().index(0)
    torch.testing.assert_close(taught.probabilities[0, 0], p[0, place])
    losses = learn(method, mine, batch, taught)
    losses.total().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in mine.parameters() if p.grad is not None)


def test_objects_of_classes_that_the_teacher_does_not_know_are_left_out():
    """The teacher calls the student's second class its first, and lacks the first one."""
    method, _, student = pair(TinyQueries(classes=("b", "z"), seed=1))
    batch = tiny_batch(3)
    taught = method.teach(batch)
    labels = [target.labels for target in batch.targets]
    assert sorted({int(label) for row in labels for label in row}) == [0, 1]
    for image, row in enumerate(labels):
        assert taught.known[image, : len(row)].tolist() == [int(label) == 1 for label in row]
    losses = learn(method, student, batch, taught)
    assert float(losses.monitors["covered"]) == sum(int((row == 1).sum()) for row in labels)
    slope = torch.autograd.grad(losses.terms["matched_cls"], student.logits.weight)[0]
    assert not slope[0].any()
    assert slope[1].any()
    with pytest.raises(PairError) as error:
        pair(TinyQueries(classes=("y", "z")))
    assert str(error.value) == (
        "matched: the teacher tinyqueries:patches knows none of the student's classes (a, b); its classes: y, z"
    )


def test_few_queries_cover_few_objects():
    batch = tiny_batch(3)
    for detectors in ({"teacher": OneQuery(seed=1)}, {"student": OneQuery(seed=2)}):
        method, _, student = pair(**detectors)
        losses = learn(method, student, batch)
        assert float(losses.monitors["covered"]) <= 3 < float(losses.monitors["objects"])
        assert bool(torch.isfinite(losses.total()))


def test_without_objects_nothing_is_lost():
    method, _, student = pair()
    batch = without_boxes(tiny_batch(2), range(2))
    total = learn(method, student, batch).total()
    assert float(total.detach()) == 0
    total.backward()
    assert all(not p.grad.any() for p in student.parameters() if p.grad is not None)


def test_crowds_are_not_covered():
    method, _, student = pair()
    batch = tiny_batch(2)
    crowds = [Target(t.boxes_xyxy, t.labels, torch.ones_like(t.crowd)) for t in batch.targets]
    losses = learn(method, student, batch.with_targets(crowds))
    assert float(losses.monitors["objects"]) == float(losses.monitors["covered"]) == float(losses.total().detach()) == 0


def test_objects_that_the_teacher_misses_are_left_out_by_min_iou():
    batch = tiny_batch(2)
    method, _, student = pair(min_iou=0.5)
    taught = method.teach(batch)
    boxes = taught.boxes_cxcywh01.clone()
    for image, (target, size) in enumerate(zip(batch.targets, batch.sizes, strict=True)):
        x1, y1, x2, y2 = (target.boxes_xyxy / size.flip(0).repeat(2)).unbind(1)
        boxes[image, : len(target)] = torch.stack([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], dim=1)
    boxes[0, 0, 0] += boxes[0, 0, 2]  # the first object's box moves by its own width
    objects = sum(len(target) for target in batch.targets)
    found = learn(method, student, batch, dataclasses.replace(taught, boxes_cxcywh01=boxes))
    assert float(found.monitors["covered"]) == objects - 1


def test_a_record_has_a_few_hundred_bytes():
    """Images with 2, 3 and 1 objects of COCO's 80 classes: for each 80 scores of a byte, their scale, a box and a flag."""
    names = [f"c{number}" for number in range(80)]
    method, _, _ = pair(TinyQueries(classes=names, seed=1), TinyQueries(classes=names, seed=2))
    batch = tiny_batch(3)
    pieces = method.teach(batch).split(3)
    counts = [len(target) for target in batch.targets]
    assert counts == [2, 3, 1]
    assert [len(encode(piece, "int8").data) for piece in pieces] == [count * (80 + 4 + 16 + 1) for count in counts]
    again = MatchedTaught.stack(pieces)
    torch.testing.assert_close(again.probabilities, method.teach(batch).probabilities)
    empty = method.teach(without_boxes(batch, range(3))).split(3)[0]
    assert len(encode(empty, "int8").data) == 0


# ------------------------------------------------------------------------------------------------- real detectors


def real(family, seed=0, queries=10, decoder=2):
    torch.manual_seed(seed)
    return build_detector(f"{family}:{SMALL},queries={queries},decoder={decoder}", ["a", "b"])


@pytest.fixture(scope="module")
def d_fine():
    return Teacher(real("d_fine", seed=1))


def test_means_of_the_taught_sides_are_the_taught_boxes(d_fine):
    batch = tiny_batch(2, 128)
    taught = Matched(d_fine, real("d_fine")).teach(batch)
    sides = taught.sides
    assert sides.probabilities.shape == (2, 3, 4, 33)
    means = sides.reference_origins + sides.reference_units * (sides.probabilities * sides.reference_steps).sum(dim=-1)
    x, y, width, height = taught.boxes_cxcywh01.unbind(-1)
    corners = torch.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], dim=-1)
    torch.testing.assert_close(means[taught.known], corners[taught.known], rtol=1e-4, atol=1e-5)


def test_the_teacher_assigns_its_last_layer_alone(d_fine):
    """The same objects for the same queries as in the assignment of all layers."""
    batch = tiny_batch(2, 128)
    prediction = d_fine.observe(batch, PREDICTION).prediction
    d_fine.forget()
    every = d_fine.detector.assign(prediction, batch).matched
    alone = d_fine.detector.assign(prediction.last_layer(), batch).matched
    assert (len(every), len(alone)) == (2, 1)
    assert torch.equal(alone[0], every[1])


@pytest.mark.parametrize(("family", "sides"), [("d_fine", True), ("deimv2", True), ("rt_detr", False)])
def test_sides_are_compared_between_families_that_predict_distributions(d_fine, family, sides):
    student, batch = real(family, **({} if sides else {"queries": 12, "decoder": 3})).train(), tiny_batch(2, 128)
    method = Matched(d_fine, student)
    losses = method.step(student, batch, method.teach(batch), CLOCK)
    assert ("matched_sides" in losses.terms) == sides
    assert float(losses.monitors["covered"]) == sum(len(target) for target in batch.targets)
    losses.total().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in student.parameters() if p.grad is not None)
    assert all(p.grad is None for p in d_fine.detector.parameters())


def test_equal_d_fines_differ_in_no_side(d_fine):
    student, batch = real("d_fine", seed=1), tiny_batch(2, 128)
    student.eval()
    method = Matched(d_fine, student, layers="last")
    terms = learn(method, student, batch).terms
    assert float(terms["matched_sides"].detach()) == pytest.approx(0, abs=1e-6)
    assert float(terms["matched_l1"].detach()) == pytest.approx(0, abs=1e-6)
    (slope,) = torch.autograd.grad(terms["matched_sides"], student.model.model.decoder.bbox_embed[-1].layers[-1].weight)
    assert float(slope.abs().max()) < 1e-6
    assert "matched_sides" not in learn(Matched(d_fine, student, sides_weight=0.0), student, batch).terms


@pytest.mark.parametrize("family", ["detr", "deformable_detr", "deimv2"])
def test_the_loss_under_the_own_assignment_is_the_loss(family):
    detector, batch = real(family).eval(), tiny_batch(2, 128)
    prediction = detector(batch).prediction
    assert isinstance(prediction, Queries)
    given = detector.loss(prediction, batch, detector.assign(prediction, batch))
    for name, term in detector.loss(prediction, batch).terms.items():
        torch.testing.assert_close(given.terms[name], term)


# ------------------------------------------------------------------------------------------------------- bad input


def test_detectors_without_queries_are_refused():
    with pytest.raises(PairError, match="matched: the teacher tinydense:patches predicts dense; it needs a teacher"):
        Matched(Teacher(TinyDense()), TinyQueries())
    with pytest.raises(PairError, match="matched: the student tinydense:patches predicts dense; it needs a student"):
        Matched(Teacher(TinyQueries()), TinyDense())


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            dict.fromkeys(("cls_weight", "l1_weight", "giou_weight", "sides_weight"), 0.0),
            "cls_weight, l1_weight, giou_weight, sides_weight are all 0; nothing would be distilled",
        ),
        ({"min_iou": 1.5}, "min_iou=1.5 is not a number from 0 to 1"),
        ({"layers": "first"}, "layers=first is not one of all, last"),
    ],
)
def test_settings_out_of_range(settings, expected):
    with pytest.raises(DetdistillError) as error:
        pair(**settings)
    assert str(error.value) == f"matched: {expected}"
