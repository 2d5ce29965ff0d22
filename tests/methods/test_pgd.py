from dataclasses import replace

import pytest
import torch

from detdistill.cache.encoding import decode, encode
from detdistill.detectors.contract import Teacher
from detdistill.errors import DetdistillError
from detdistill.functional.attention import spatial_attention
from detdistill.functional.boxes import boxes_from_distances
from detdistill.methods.pgd import (
    PGD,
    PGDBoxTerms,
    PGDClassTerms,
    pgd_background,
    pgd_box_terms,
    pgd_candidates,
    pgd_class_terms,
    pgd_loss,
    pgd_normalized,
    pgd_weights,
)
from detdistill.methods.shared.contract import teach_by_canvas
from detdistill.methods.shared.needs import PairError
from detdistill.structures import Clock, Look, Target
from tests.golden import Golden, assert_golden
from tests.methods.contract_checks import check_method
from tests.tiny import TinyDense, TinyHead, TinyQueries, tiny_batch


@pytest.fixture
def golden():
    return Golden("pgd")


def golden_images(golden):
    """For each image: scores [P, classes], predicted boxes [P, 4], ground truth [G, 4] and labels [G]."""
    logits, distances = (
        torch.cat([level.flatten(2) for level in golden.levels(f"in_pred_{kind}")], dim=2).transpose(1, 2)
        for kind in ("cls", "dist")
    )
    boxes = boxes_from_distances(torch.cat(golden.levels("in_points")), distances)
    for image in range(len(logits)):
        truth = golden[f"in_boxes_{image}"].reshape(-1, 4), golden[f"in_labels_{image}"].reshape(-1).long()
        yield image, logits[image].sigmoid(), boxes[image], *truth


def noise(golden, kind, image):
    """[G, K, 2] numbers of the released run; a file may leave out an image without boxes."""
    name = f"in_noise_{kind}_{image}"
    return golden[name] if name in golden else torch.zeros(0, golden.meta["topk"], 2)


def flat(levels, image):
    return torch.cat([level[image].flatten() for level in levels])


def test_maps_equal_the_released_code(golden):
    exponents = golden.meta["quality_exponent_cls"], golden.meta["quality_exponent_reg"]
    points = torch.cat(golden.levels("in_points"))
    for image, scores, predicted, boxes, labels in golden_images(golden):
        both = pgd_candidates(scores, predicted, boxes, labels, exponents, golden.meta["topk"])
        for kind, candidates in zip(("cls", "reg"), both, strict=True):
            weights = pgd_weights(candidates, points, boxes, noise(golden, kind, image), in_box_test="official")
            assert_golden(weights, flat(golden.levels(f"out_map_{kind}"), image))
        background = pgd_background(points, boxes, "official")
        assert_golden(background, flat(golden.levels("out_map_back"), image))
        assert_golden(pgd_background(points, boxes), golden[f"out_fixed_back_{image}"])
        fixed = pgd_weights(both[0], points, boxes, noise(golden, "fixed", image))
        assert_golden(fixed, golden[f"out_fixed_w_{image}"])


def test_maps_of_anchors_equal_the_released_code(golden):
    anchors = golden["in_anchors"]
    centers = (anchors[:, :2] + anchors[:, 2:]) / 2
    for image, scores, predicted, boxes, labels in golden_images(golden):
        exponents = (golden.meta["quality_exponent_cls"],)
        (candidates,) = pgd_candidates(scores, predicted, boxes, labels, exponents, golden.meta["topk_anchor"])
        weights = pgd_weights(candidates, centers, boxes, noise(golden, "anchor", image))
        assert_golden(weights, golden[f"out_anchor_w_{image}"])
        assert_golden(pgd_background(centers, boxes), golden[f"out_anchor_back_{image}"])


def golden_level(golden, level, per_image=False, images=slice(None)):
    """The student's maps, and the terms of one level, from the released maps."""
    temperature = golden.meta["params"]["temp"]
    student, teacher = (golden[f"in_{side}_cls_{level}"][images] for side in ("student", "teacher"))
    maps = {name: golden[f"out_map_{name}_{level}"][images, 0] for name in ("cls", "reg", "back")}
    foreground, background = pgd_normalized(maps["cls"]), pgd_normalized(maps["back"])
    student.requires_grad_()
    classes = pgd_class_terms(student, teacher, foreground, background, temperature, per_image)
    box_student, box_teacher = (golden[f"in_{side}_reg_{level}"][images] for side in ("student", "teacher"))
    image, row, column = torch.nonzero(maps["reg"], as_tuple=True)
    box_student.requires_grad_()
    cells = box_student[image, :, row, column], box_teacher[image, :, row, column], maps["reg"][image, row, column]
    return student, box_student, classes, pgd_box_terms(*cells, temperature)


def golden_weights(golden, level):
    params = golden.meta["params"]
    names = {"foreground": "alpha", "background": "beta", "box": "gamma", "attention": "delta"}
    return {ours: params[theirs] for ours, theirs in names.items()} | {"level": params["lw"][level]}


NO_CLASS, NO_BOX = PGDClassTerms(*torch.zeros(3)), PGDBoxTerms(*torch.zeros(2))


def test_values_and_gradients_equal_the_released_code(golden):
    count = len(golden.levels("in_student_cls"))
    levels = [golden_level(golden, level) for level in range(count)]
    total = torch.zeros((), dtype=torch.float64)
    for index, (_, _, classes, boxes) in enumerate(levels):
        weights = golden_weights(golden, index)
        assert_golden(pgd_loss(classes, NO_BOX, **weights), golden[f"out_cls_loss_{index}"])
        assert_golden(pgd_loss(NO_CLASS, boxes, **weights), golden[f"out_reg_loss_{index}"])
        total = total + pgd_loss(classes, boxes, **weights)
    assert_golden(total, golden["out_total"])
    total.backward()
    for index, (student, box_student, _, _) in enumerate(levels):
        assert_golden(student.grad, golden[f"grad_student_cls_{index}"])
        assert_golden(box_student.grad, golden[f"grad_student_reg_{index}"])


def test_parts_equal_the_released_code(golden):
    for level, teacher in enumerate(golden.levels("in_teacher_cls")):
        classes = golden_level(golden, level)[2]
        weights = golden_weights(golden, level)
        attention = spatial_attention(teacher, golden.meta["params"]["temp"])
        assert_golden(attention, golden[f"out_teacher_spatial_attention_{level}"])
        assert attention.mean().item() == pytest.approx(1.0)
        for name, value in zip(("fg", "bg", "attention"), classes, strict=True):
            assert_golden(value, golden[f"out_cls_{name}_{level}"])
        alone = golden[f"out_cls_loss_perimage_{level}"]
        for image in range(len(alone)):
            for per_image in (True, False):
                one = golden_level(golden, level, per_image, slice(image, image + 1))[2]
                assert_golden(pgd_loss(one, NO_BOX, **weights), alone[image])
        together = golden_level(golden, level, per_image=True)[2]
        assert_golden(pgd_loss(together, NO_BOX, **weights), alone.mean())


def test_without_key_regions_the_box_term_equals_the_released_zero(golden):
    nothing = torch.zeros(0, 6, dtype=torch.float64, requires_grad=True)
    terms = pgd_box_terms(nothing, torch.zeros(0, 6), torch.zeros(0))
    assert_golden(terms.foreground + terms.attention, golden["out_reg_loss_nofg"])
    (terms.foreground + terms.attention).backward()
    assert nothing.grad.shape == (0, 6)


# ------------------------------------------------------------------------------------------------------------ key regions

GRID = torch.stack(torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="xy"), dim=-1).reshape(-1, 2) * 8 + 4
BOXES = torch.tensor([[10.0, 10.0, 40.0, 30.0], [28.0, 4.0, 60.0, 60.0], [0.0, 0.0, 64.0, 64.0]])
LABELS = torch.tensor([0, 1, 1])


def predictions(seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(len(GRID), 2, generator=generator)
    reach = 30 * torch.rand(len(GRID), 4, generator=generator)
    return scores, torch.cat([GRID - reach[:, :2], GRID + reach[:, 2:]], dim=1)


def noise_for(boxes, count=9, seed=0):
    return torch.rand(len(boxes), count, 2, generator=torch.Generator().manual_seed(seed))


def weights_of(boxes, labels, count=9, drawn=None):
    (candidates,) = pgd_candidates(*predictions(0), boxes, labels, (0.7,), count)
    return pgd_weights(candidates, GRID, boxes, noise_for(boxes, count) if drawn is None else drawn)


def test_weights_are_at_most_one_inside_the_boxes_and_at_most_k_for_each():
    weights = weights_of(BOXES[:2], LABELS[:2])
    assert 0 <= float(weights.min()) < float(weights.max()) <= 1
    assert not bool((weights > 0)[pgd_background(GRID, BOXES[:2])].any())
    for box, label in zip(BOXES, LABELS, strict=True):
        assert 0 < int((weights_of(box[None], label[None], 7) > 0).sum()) <= 7


def test_the_order_of_boxes_does_not_matter_and_many_boxes_equal_one_after_the_other(monkeypatch):
    drawn, order = noise_for(BOXES), [2, 0, 1]
    expected, background = weights_of(BOXES, LABELS, drawn=drawn), pgd_background(GRID, BOXES[:2])
    assert torch.equal(weights_of(BOXES[order], LABELS[order], drawn=drawn[order]), expected)
    monkeypatch.setattr("detdistill.methods.pgd.loss.CHUNK", len(GRID))
    assert torch.equal(weights_of(BOXES, LABELS, drawn=drawn), expected)
    assert torch.equal(pgd_background(GRID, BOXES[:2]), background)
    assert 0 < int(background.sum()) < len(GRID)


def test_one_candidate_has_the_weight_one_at_the_best_prediction():
    scores, predicted = predictions(0)
    predicted[9] = BOXES[0]  # the cell at (12, 12), inside
    scores[9, 0] = 1.0
    (candidates,) = pgd_candidates(scores, predicted, BOXES[:1], LABELS[:1], (0.5,), 1)
    weights = pgd_weights(candidates, GRID, BOXES[:1], noise_for(BOXES[:1], 1))
    assert weights.nonzero().tolist() == [[9]]
    assert weights[9].item() == 1.0


def test_candidates_by_hand_and_more_than_there_are_predictions():
    scores = torch.tensor([[0.9], [0.4], [0.1]])
    predicted = torch.tensor([[0.0, 0.0, 5.0, 10.0], [0.0, 0.0, 10.0, 10.0], [50.0, 50.0, 60.0, 60.0]])
    box, label = torch.tensor([[0.0, 0.0, 10.0, 10.0]]), torch.tensor([0])
    by_score, by_overlap = pgd_candidates(scores, predicted, box, label, (0.0, 1.0), 30)
    assert by_score.tolist() == [[0, 1, 2]]
    assert by_overlap.tolist() == [[1, 0, 2]]


@pytest.mark.parametrize("jitter", [0.1, 1e-9])
def test_candidates_on_a_line_or_on_one_point_have_finite_weights(jitter):
    points = torch.stack([torch.arange(30.0) * 37, torch.arange(30.0) * 41], dim=1)
    box = torch.tensor([[-1.0, -1.0, 2000.0, 2000.0]])
    for candidates in (torch.arange(30)[None], torch.zeros(1, 30, dtype=torch.int64)):
        weights = pgd_weights(candidates, points, box, noise_for(box, 30), jitter)
        assert bool(torch.isfinite(weights).all())
        assert 0 <= float(weights.min()) <= float(weights.max()) <= 1


def test_a_centre_on_a_side_is_background():
    box = torch.tensor([[4.0, 0.0, 21.0, 8.0]])
    assert pgd_background(GRID[:4], box).tolist() == [True, False, False, True]
    weights = pgd_weights(torch.tensor([[0, 1, 2]]), GRID[:4], box, noise_for(box, 3))
    assert (weights > 0).tolist() == [False, True, True, False]


def test_no_boxes_and_weights_sum_to_at_most_one():
    nothing = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    for selected in pgd_candidates(*predictions(0), *nothing, (0.8, 0.6)):
        assert not bool(pgd_weights(selected, GRID, nothing[0], torch.zeros(0, 30, 2)).any())
    assert bool(pgd_background(GRID, nothing[0]).all())
    regions = weights_of(BOXES[:2], LABELS[:2]).view(1, 8, 8)
    assert 0 < float(pgd_normalized(regions).sum()) <= 1
    assert float(pgd_normalized(pgd_background(GRID, BOXES[:2]).view(1, 8, 8).float()).sum()) == pytest.approx(1.0)
    assert not bool(pgd_normalized(torch.zeros(1, 8, 8)).any())


# ----------------------------------------------------------------------------------------------------------------- losses


def maps(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_equal_towers_have_no_loss_and_no_gradient():
    student = maps(0, 2, 5, 4, 6).requires_grad_()
    weights = torch.rand(2, 4, 6, dtype=torch.float64)
    classes = pgd_class_terms(student, student.detach(), weights, weights)
    boxes = pgd_box_terms(student[:, :, 0, 0], student.detach()[:, :, 0, 0], weights[:, 0, 0])
    total = pgd_loss(classes, boxes)
    total.backward()
    assert total.item() == 0.0
    assert not bool(student.grad.any())


def test_the_teacher_gets_no_gradient_and_padding_is_as_if_it_were_cut_off():
    student, teacher = maps(1, 2, 5, 4, 6), maps(2, 2, 5, 4, 6).requires_grad_()
    foreground, background = torch.rand(2, 2, 4, 6, dtype=torch.float64)
    padding = torch.zeros(2, 4, 6, dtype=torch.bool)
    padding[:, 3:], padding[:, :, 4:] = True, True
    foreground, background = (value.masked_fill(padding, 0) for value in (foreground, background))
    student.requires_grad_()
    whole = pgd_class_terms(student, teacher, foreground, background, padding=padding)
    cut = pgd_class_terms(
        student[..., :3, :4], teacher[..., :3, :4], foreground[:, :3, :4].contiguous(), background[:, :3, :4].contiguous()
    )
    assert [term.item() for term in whole] == pytest.approx([term.item() for term in cut], rel=1e-12)
    sum(whole).backward()
    assert teacher.grad is None
    assert bool(torch.isfinite(student.grad).all())
    assert not bool(student.grad.masked_select(padding[:, None]).any())
    nowhere = pgd_class_terms(student, teacher, foreground, background, padding=torch.zeros_like(padding))
    plain = pgd_class_terms(student, teacher, foreground, background)
    assert [term.item() for term in nowhere] == pytest.approx([term.item() for term in plain], rel=1e-12)


def test_class_terms_by_hand():
    student, teacher = torch.zeros(1, 2, 1, 2), torch.tensor([[[[1.0, 0.0]], [[0.0, 0.0]]]])
    temperature = 0.5
    channel = 2 * torch.tensor(1 / temperature).exp() / (1 + torch.tensor(1 / temperature).exp())
    cell = 2 * torch.tensor(0.5 / temperature).exp() / (1 + torch.tensor(0.5 / temperature).exp())
    terms = pgd_class_terms(student, teacher, torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]]), temperature)
    assert terms.foreground.item() == pytest.approx(float(channel * cell))
    assert terms.background.item() == 0.0
    # Channels differ at the first cell only, by channel - 1 each; cells by cell - 1 each.
    assert terms.attention.item() == pytest.approx(float(2 * (channel - 1) / 2 + 2 * (cell - 1)))


# ----------------------------------------------------------------------------------------------------------------- method


def built(student=None, teacher=None, **settings):
    torch.manual_seed(0)
    teacher = Teacher(teacher or TinyDense(channels=(12, 12), seed=1))
    return PGD(teacher, student or TinyDense(), **settings)


def learned(batch, student=None, teacher=None, **settings):
    student = student or TinyDense()
    method = built(student, teacher, **settings)
    seen = student(batch, Look(towers=(settings.get("depth", 1),)))
    return method.learn(student, seen, teach_by_canvas(method, batch), batch, Clock(0, 1)).terms


def test_terms_are_the_weighted_sums_over_levels():
    batch = tiny_batch(1)
    method, student = built(), TinyDense()
    taught, seen = method.teach(batch), student(batch, Look(towers=(1,)))
    terms = method.learn(student, seen, taught, batch, Clock(0, 1)).terms
    tower, expected = seen.tower(1), torch.zeros(())
    for level in range(2):
        mine = method.class_adapters[level](tower.classification[level])
        background = pgd_normalized(taught.background[level].float())
        classes = pgd_class_terms(mine, taught.classification[level], taught.foreground[level], background)
        cells = taught.regression[level]
        assert bool(cells.filled.all())
        rows, columns = cells.places[0].unbind(dim=1)
        mine = method.box_adapters[level](tower.regression[level])[0, :, rows, columns].T
        boxes = pgd_box_terms(mine, cells.features[0], cells.weights[0])
        expected = expected + pgd_loss(classes, boxes, level=(1.0, 1.25)[level])
    assert sum(terms.values()).item() == pytest.approx(expected.item(), rel=1e-5)
    assert set(terms) == {f"pgd_{name}" for name in ("foreground", "background", "attention", "box_foreground", "box_attention")}


def test_the_weights_follow_the_first_and_zeros_leave_terms_out():
    assert built(foreground_weight=0.08).weights == {
        "foreground": 0.08,
        "background": 0.04,
        "attention": 8e-4,
        "box_foreground": pytest.approx(0.128),
        "box_attention": 8e-4,
    }
    terms = learned(tiny_batch(), background_weight=0.0, attention_weight=0.0)
    assert set(terms) == {"pgd_foreground", "pgd_box_foreground"}


def test_what_is_taught_has_towers_cells_and_their_weights():
    batch, method = tiny_batch(3), built()
    taught = method.teach(batch)
    seen = method.teacher.observe(batch, Look(towers=(1,), prediction=True))
    found = 0
    for level, cells in enumerate(taught.regression):
        image, entry = torch.nonzero(cells.filled, as_tuple=True)
        row, column = cells.places[image, entry].unbind(dim=1)
        assert torch.equal(cells.features[image, entry], seen.tower(1).regression[level][image, :, row, column])
        assert float(cells.weights[image, entry].min()) > 0
        assert not bool(taught.background[level][image, row, column].any())
        found += len(image)
    assert found > 0
    padding = seen.features.padding
    assert padding is not None
    for level, mask in enumerate(padding):
        assert not bool((taught.background[level] | (taught.foreground[level] > 0))[mask].any())
    stored = sum(piece.features.numel() for piece in taught.regression)
    assert stored < sum(level.numel() for level in taught.classification) / 3


def test_an_image_in_a_padded_batch_is_taught_as_alone():
    batch = replace(tiny_batch(2), canvases_hw=((64, 64), (48, 64)))
    together = learned(batch)
    assert all(bool(torch.isfinite(term)) for term in together.values())
    method = built()
    taught = teach_by_canvas(method, batch)
    alone = built().teach(batch._on_canvas([1], (48, 64)))
    for level in range(2):
        rows = alone.foreground[level].shape[1]
        assert torch.equal(taught.foreground[level][1, :rows], alone.foreground[level][0])
        assert not bool(taught.foreground[level][1, rows:].any())
        assert int(taught.regression[level].filled[1].sum()) == int(alone.regression[level].filled.sum())


def test_boxes_of_all_sizes_and_places_are_finite():
    whole, point, outside = [0.0, 0.0, 64.0, 64.0], [10.0, 10.0, 10.0, 10.0], [-20.0, 50.0, 80.0, 64.0]
    for boxes in ([whole], [point], [outside], [whole, point, outside] * 40):
        target = Target(torch.tensor(boxes), torch.zeros(len(boxes)).long(), torch.zeros(len(boxes)).bool())
        student = TinyDense()
        terms = learned(tiny_batch(1).with_targets([target]), student)
        assert all(bool(torch.isfinite(term)) for term in terms.values())
        sum(terms.values()).backward()
        assert all(bool(torch.isfinite(p.grad).all()) for p in student.parameters() if p.grad is not None)


def test_a_level_of_one_cell_and_a_teacher_with_fewer_levels():
    student = TinyDense(channels=(8, 8, 8), strides=(8, 16, 64))
    one_cell = TinyDense(channels=(8, 8, 8), strides=(8, 16, 64), seed=1)
    for teacher, pairs in ((one_cell, 3), (TinyDense(seed=1), 2)):
        method = built(student, teacher)
        assert len(method.pairs) == pairs
        terms = learned(tiny_batch(), student, teacher)
        assert all(bool(torch.isfinite(term)) for term in terms.values())


def test_images_without_boxes_keep_the_background():
    terms = learned(tiny_batch(boxes=False))
    assert terms["pgd_foreground"].item() == terms["pgd_box_foreground"].item() == terms["pgd_box_attention"].item() == 0.0
    assert terms["pgd_background"].item() > 0
    assert terms["pgd_box_foreground"].requires_grad


def test_crowd_boxes_have_no_key_region():
    batch = tiny_batch(1)
    crowd = batch.with_targets([replace(batch.targets[0], crowd=torch.ones(len(batch.targets[0]), dtype=torch.bool))])
    assert learned(crowd)["pgd_foreground"].item() == 0.0
    assert learned(batch)["pgd_foreground"].item() > 0.0


def test_gradients_stop_at_the_depth_of_the_towers():
    student = TinyDense()
    sum(learned(tiny_batch(), student).values()).backward()
    head = student.head
    for side in (head.classification, head.regression):
        assert float(side[0].weight.grad.abs().max()) > 0
        assert side[1].weight.grad is None
    assert head.logits.weight.grad is None
    assert head.deltas.weight.grad is None
    sum(learned(tiny_batch(), student, depth=2).values()).backward()
    assert float(head.regression[1].weight.grad.abs().max()) > 0


def test_classes_are_matched_by_name():
    """A teacher with its class outputs in another order teaches the same."""
    plain, turned = TinyDense(("a", "b"), seed=1), TinyDense(("b", "a"), seed=1)
    with torch.no_grad():
        turned.head.logits.weight.copy_(plain.head.logits.weight.flip(0))
        turned.head.logits.bias.copy_(plain.head.logits.bias.flip(0))
    found = [learned(tiny_batch(), teacher=teacher) for teacher in (plain, turned)]
    assert [term.item() for term in found[0].values()] == [term.item() for term in found[1].values()]


def test_released_options_change_what_they_name():
    batch = tiny_batch(3)
    ours, broadcast, swapped = learned(batch), learned(batch, per_image=False), learned(batch, in_box_test="official")
    assert broadcast["pgd_foreground"].item() > ours["pgd_foreground"].item()
    assert broadcast["pgd_attention"].item() == ours["pgd_attention"].item()
    assert swapped["pgd_foreground"].item() != ours["pgd_foreground"].item()
    alone = tiny_batch(1)
    assert learned(alone, per_image=False)["pgd_foreground"].item() == learned(alone)["pgd_foreground"].item()


@pytest.mark.parametrize("store", ["float16", "int8"])
def test_coarse_records_keep_the_cells(store):
    method, batch, student = built(), tiny_batch(2), TinyDense()
    taught, seen = method.teach(batch), student(batch, Look(towers=(1,)))
    record = encode(taught, store)
    again = decode(record.layout, bytearray(record.data))
    for before, after in zip(taught.regression, again.regression, strict=True):
        assert torch.equal(before.places, after.places)
        assert torch.equal(before.filled, after.filled)
    exact, coarse = (method.learn(student, seen, value, batch, Clock(0, 1)).total() for value in (taught, again))
    assert coarse.item() == pytest.approx(exact.item(), rel=0.05)


class FlatHead(TinyHead):
    """A head without blocks before its output layers."""

    tower_depth = 0


class FlatDense(TinyDense):
    tower_depth = 0


@pytest.mark.parametrize(
    ("student", "settings", "message"),
    [
        (
            TinyDense,
            {"depth": 3},
            "pgd: it looks at the towers of the student tinydense:patches after 3 blocks",
        ),
        (FlatDense, {}, "pgd: it looks at the towers of the student tinydense:patches after 1 blocks"),
        (TinyQueries, {}, "pgd: the student tinyqueries:patches predicts queries; it needs a student that predicts dense"),
    ],
)
def test_pairs_that_cannot_be_used_are_refused(student, settings, message):
    with pytest.raises(PairError) as error:
        PGD(Teacher(TinyDense()), student(), **settings)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"candidates": 0}, "candidates=0 is not a whole number, 1 or more"),
        ({"temperature": 0.0}, "temperature=0.0 is not a number above 0"),
        ({"class_exponent": 1.5}, "class_exponent=1.5 is not a number from 0 to 1"),
        ({"level_weights": ()}, "level_weights is empty; give at least one number, which then serves all levels"),
        ({"in_box_test": "fix"}, "in_box_test=fix is not one of fixed, official (did you mean 'fixed'?)"),
        (
            {"foreground_weight": 0.0, "attention_weight": 0.0},
            "foreground, background, attention, box_foreground, box_attention are all 0; nothing would be distilled",
        ),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(DetdistillError) as error:
        built(**settings)
    assert str(error.value) == f"pgd: {message}"


def test_contract():
    assert check_method(PGD) == ["dense 8 -> dense 8", "dense 16 -> dense 8"]
