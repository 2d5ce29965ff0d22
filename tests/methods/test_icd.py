from dataclasses import replace

import pytest
import torch

from detdistill.detectors.contract import Teacher
from detdistill.errors import DetdistillError
from detdistill.functional.positions import point_descriptors
from detdistill.methods.icd import (
    ICD,
    ConditionalDecoder,
    ICDQueries,
    Tokens,
    box_prior,
    cell_positions,
    heads_of,
    icd_auxiliary_losses,
    icd_queries,
    icd_value_loss,
    icd_value_weights,
)
from detdistill.methods.icd.coco import COCO
from detdistill.structures import Clock, Target
from tests.golden import Golden, assert_golden
from tests.methods.contract_checks import check_method
from tests.tiny import TinyDense, TinyRegions, tiny_batch

LATE = Clock(step=5, total=10)


# ------------------------------------------------------------------------------------------------------------- golden


@pytest.fixture
def golden():
    return Golden("icd")


def decoder_of(golden):
    """The decoder with the released weights."""
    meta, released = golden.meta, golden.parameters("param_teacher_")
    width = meta["hidden_dim"]
    decoder = ConditionalDecoder(meta["num_classes"] + 266, width, meta["heads"], meta["att_layers"]).double()
    state = {}
    for ours, theirs in (("encoder", "encoder"), ("predictor", "predictor")):
        for index in range(3):
            for part in ("weight", "bias"):
                state[f"{ours}.{2 * index}.{part}"] = released[f"ins_encoder_{theirs}_layers_{index}_{part}"]
    names = {
        "position": "pos_projector",
        "out": "matt_out_proj",
        "rest.norm1": "norm1",
        "rest.norm2": "norm2",
        "rest.feed_forward.0": "linear_in",
        "rest.feed_forward.2": "linear_out",
    }
    for layer in range(meta["att_layers"]):
        prefix = f"attention_module_matt_{layer}_"
        for part in ("weight", "bias"):
            for ours, theirs in names.items():
                state[f"layers.{layer}.{ours}.{part}"] = released[f"{prefix}{theirs}_{part}"]
            thirds = released[f"{prefix}matt_in_proj_{part}"].chunk(3)
            for ours, third in zip(("query", "key", "value"), thirds, strict=True):
                state[f"layers.{layer}.{ours}.{part}"] = third
    decoder.load_state_dict(state)
    return decoder


def queries_of(golden):
    parts = [golden[f"in_query_{name}"] for name in ("class", "point", "ltrb", "is_real", "pad_mask")]
    return ICDQueries(parts[0], parts[1], parts[2], parts[3].bool(), parts[4])


def padding_of(golden, maps):
    """The released code's padding: the stride of a level is the mean of both ratios of padded image and map."""
    height, width = golden["in_pad_size"].tolist()
    masks = []
    for level in maps:
        stride = (height / level.shape[-2] + width / level.shape[-1]) / 2
        valid = torch.ceil(golden["in_image_sizes"] / stride)  # [B, 2]
        rows, columns = (torch.arange(count)[None] for count in level.shape[-2:])
        masks.append(~((rows < valid[:, :1])[:, :, None] & (columns < valid[:, 1:])[:, None, :]))
    return masks


def decode(golden):
    """Queries, descriptors and decoded layers."""
    queries, theirs = queries_of(golden), golden.levels("in_teacher")
    last_image = golden["in_image_sizes"][-1].flip(0)  # the released code takes its size for all images
    classes = golden.meta["num_classes"]
    descriptors = point_descriptors(queries.points_xy01, queries.sizes01 * last_image, queries.labels, classes)
    width = golden.meta["hidden_dim"]
    positions, padded = cell_positions(theirs, padding_of(golden, theirs), width)
    cells = Tokens([level.shape[1] for level in theirs], width, always=False)(theirs)
    decoder = decoder_of(golden)
    return queries, descriptors, decoder, positions, padded, decoder(descriptors, cells, positions, padded)


def test_decoder_equals_the_released_code(golden):
    _, descriptors, decoder, positions, padded, layers = decode(golden)
    assert_golden(descriptors.transpose(0, 1), golden["out_descriptor"])
    assert_golden(decoder.encoder(descriptors).transpose(0, 1), golden["out_query_embedding"])
    assert_golden(positions.transpose(0, 1), golden["out_pos_embedding"])
    assert torch.equal(padded, golden["out_padding_mask"])
    for index, layer in enumerate(layers):
        logits = layer.queries @ layer.keys.mT / layer.keys.shape[-1] ** 0.5
        expected = golden[f"out_attention_logits_{index}"]
        hidden = padded[:, None, None].expand_as(logits)
        assert bool((expected[hidden] <= -1e29).all())
        assert_golden(logits.masked_fill(hidden, 0.0), expected.masked_fill(hidden, 0.0))
        assert_golden(layer.values.transpose(0, 1), golden[f"out_teacher_value_{index}"])
        assert_golden(layer.outputs.transpose(0, 1), decoder.predictor(golden[f"out_decoded_{index}"]).detach())


def test_values_and_gradients_equal_the_released_code(golden):
    meta = golden.meta
    queries, *_, padded, layers = decode(golden)
    students = [level.requires_grad_() for level in golden.levels("in_student")]
    losses = []
    for index, layer in enumerate(layers):
        found, placed = icd_auxiliary_losses(layer.outputs, queries)
        assert_golden(found, golden[f"out_tea_{index}_prop_conf"])
        assert_golden(placed, golden[f"out_tea_{index}_prop_reg"])
        weights = icd_value_weights(layer.queries, layer.keys, queries.real, padded, meta["temperature"])
        assert_golden(weights, golden[f"out_value_mask_{index}"])
        project = Tokens([level.shape[1] for level in students], meta["hidden_dim"], always=True).double()
        released = golden.parameters(f"param_student_attention_module_matt_{index}_matt_in_proj_")
        project.layers[0].load_state_dict({name: value.chunk(3)[2] for name, value in released.items()})
        values = project(students).unflatten(-1, (meta["heads"], -1))
        norm = {"ln": "both", "tln": "teacher"}.get(meta["distill_norm"], "none")
        losses.append(icd_value_loss(values, layer.values, weights, meta["loss_form"].lower(), norm))
    total = meta["weight_value"] * torch.stack(losses).mean()
    assert_golden(total, golden["out_matt_value"])
    assert_golden(total, golden["out_total"])
    total.backward()
    for level, expected in zip(students, golden.levels("grad_student"), strict=True):
        assert_golden(level.grad, expected)


# ------------------------------------------------------------------------------------------------------------- queries


BOXES = [torch.tensor([[8.0, 8.0, 40.0, 24.0], [0.0, 0.0, 64.0, 48.0]]), torch.zeros(0, 4)]
LABELS = [torch.tensor([1, 0]), torch.zeros(0, dtype=torch.int64)]
SIZES = torch.tensor([[48, 64], [32, 32]])


def queries(seed=0, **settings):
    generator = torch.Generator().manual_seed(seed)
    return icd_queries(BOXES, LABELS, SIZES, box_prior(["a", "b"], coco=True), generator=generator, **settings)


def test_real_objects_come_first_and_have_five_invented_ones_each():
    drawn = queries()
    assert drawn.real.tolist() == [[True] * 2 + [False] * 10, [False] * 12]
    assert drawn.padded.tolist() == [[False] * 12, [False] + [True] * 11]
    assert drawn.labels[0, :2].tolist() == [1, 0]
    sizes = drawn.sizes01 * SIZES.flip(1)[:, None]
    torch.testing.assert_close(sizes[0, :2], torch.tensor([[32.0, 16.0], [64.0, 48.0]]))
    assert bool((drawn.sizes01[~drawn.padded] > 0).all())
    assert not bool(drawn.sides01[drawn.padded].any())
    assert not bool(drawn.points_xy01[drawn.padded].any())


def test_points_lie_near_the_centre_and_move_anew():
    first, second = queries(0), queries(1)
    moved = (first.sides01[..., :2] - first.sides01[..., 2:]) / 2 / first.sizes01.clamp(min=1e-6)
    assert float(moved[~first.padded].abs().max()) <= 0.3 + 1e-6
    assert not torch.equal(first.points_xy01[0, :2], second.points_xy01[0, :2])
    assert all(torch.equal(mine, again) for mine, again in zip(first, queries(0), strict=True))
    still = queries(jitter=0.0)
    torch.testing.assert_close(still.points_xy01[0, 0], torch.tensor([24.0 / 64, 16.0 / 48]))


@pytest.mark.parametrize(("most", "ratio", "expected"), [(300, 5.0, 12), (7, 5.0, 7), (1, 5.0, 2), (300, 0.0, 2), (300, 1.6, 5)])
def test_number_of_queries(most, ratio, expected):
    drawn = queries(most=most, ratio=ratio)
    assert (~drawn.padded).sum(dim=1).tolist() == [expected, 1]


def test_invented_objects_follow_the_prior_and_stay_inside():
    prior = box_prior(["person", "mouse"], coco=True)
    drawn = icd_queries(
        [torch.tensor([[0.0, 0.0, 1.0, 1.0]])] * 8,
        [torch.tensor([0])] * 8,
        torch.full((8, 2), 1),
        prior,
        ratio=299,
        jitter=0.0,
        generator=torch.Generator().manual_seed(0),
    )
    invented = ~drawn.real & ~drawn.padded
    assert float((drawn.labels[invented] == 1).float().mean()) == pytest.approx(
        COCO["mouse"][0] / (COCO["mouse"][0] + COCO["person"][0]), abs=0.01
    )
    corners = torch.cat([drawn.points_xy01 - drawn.sides01[..., :2], drawn.points_xy01 + drawn.sides01[..., 2:]], dim=-1)
    assert float(corners[invented].min()) >= -1e-6
    assert float(corners[invented].max()) <= 1 + 1e-6
    people = drawn.sizes01[invented & (drawn.labels == 0)]
    assert 0.1 < float(people[:, 0].mean()) < float(people[:, 1].mean()) < 0.35


def test_the_prior_is_uniform_unless_all_classes_are_of_coco():
    known = box_prior(["dog", "person"], coco=True)
    assert known.frequencies.tolist() == pytest.approx([COCO["dog"][0], COCO["person"][0]])
    for prior in (box_prior(["dog", "person"], coco=False), box_prior(["dog", "unicorn"], coco=True)):
        assert prior.frequencies.tolist() == [1.0, 1.0]
        assert prior.mean_wh.tolist() == prior.std_wh.tolist() == torch.full((2, 2), 0.2).tolist()
    assert len(COCO) == 80
    assert sum(row[0] for row in COCO.values()) == pytest.approx(7.6988, abs=1e-3)


# -------------------------------------------------------------------------------------------------------------- losses


def noise(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_weights_sum_to_the_number_of_objects_and_avoid_padding(monkeypatch):
    real = torch.tensor([[True, True, False, False], [False] * 4])
    padding = torch.arange(6)[None] >= torch.tensor([[6], [4]])
    heads = noise(0, 2, 3, 4, 8), noise(1, 2, 3, 6, 8)
    for temperature in (0.3, 1.0, 5.0):
        weights = icd_value_weights(*heads, real, padding, temperature)
        torch.testing.assert_close(weights.sum(dim=-1), torch.tensor([[2.0] * 3, [0.0] * 3], dtype=torch.float64))
        assert not bool(weights[padding[:, None].expand_as(weights)].any())
    monkeypatch.setattr("detdistill.methods.icd.loss.CHUNK", 1)  # one object after the other
    torch.testing.assert_close(icd_value_weights(*heads, real, padding, temperature), weights)


def test_equal_values_give_zero_and_a_scale_or_shift_of_a_head_changes_nothing():
    student, teacher, weights = noise(0, 2, 5, 2, 8), noise(1, 2, 5, 2, 8), noise(2, 2, 2, 5).abs()
    assert float(icd_value_loss(teacher, teacher, weights)) == 0.0
    once = icd_value_loss(student, teacher, weights, eps=1e-12)
    factor, shift = 1 + noise(3, 1, 1, 2, 1).abs(), noise(4, 1, 1, 2, 1)
    torch.testing.assert_close(icd_value_loss(factor * student + shift, teacher, weights, eps=1e-12), once)


@pytest.mark.parametrize("form", ["mse", "mse_batch", "l1", "smooth_l1", "l2"])
@pytest.mark.parametrize("norm", ["both", "teacher", "none"])
def test_forms_equal_a_loop(form, norm):
    student, teacher, weights = noise(0, 2, 5, 2, 8), noise(1, 2, 5, 2, 8), noise(2, 2, 2, 5).abs()
    weights[1] = 0
    mine, fixed = (
        (value - value.mean(-1, keepdim=True)) / (value.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        for value in (student, teacher)
    )
    mine, fixed = mine if norm == "both" else student, teacher if norm == "none" else fixed
    apart = (mine - fixed).abs()
    each = {"l1": apart, "smooth_l1": torch.where(apart < 1, apart.square() / 2, apart - 0.5)}.get(form, apart.square())
    weighted = torch.einsum("bshd,bhs->bhd", each, weights) / 8  # mean over channels
    if form == "mse":
        expected = sum(weighted[0, head].sum() / weights[0, head].sum() for head in range(2)) / 4  # two images, two heads
    else:
        expected = weighted.sum() / weights.sum()
    assert float(icd_value_loss(student, teacher, weights, form, norm)) == pytest.approx(
        float(expected.sqrt() if form == "l2" else expected), rel=1e-12
    )


@pytest.mark.parametrize("form", ["mse", "l2"])
def test_without_objects_the_loss_is_zero_and_connected(form):
    student = noise(0, 1, 5, 2, 8).requires_grad_()
    loss = icd_value_loss(student, noise(1, 1, 5, 2, 8), torch.zeros(1, 2, 5), form)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(student.grad, torch.zeros_like(student))


def test_auxiliary_losses_by_hand():
    drawn = queries()
    outputs = torch.zeros(2, 12, 5)
    found, placed = icd_auxiliary_losses(outputs, drawn)
    assert float(found) == pytest.approx(torch.log(torch.tensor(2.0)).item(), rel=1e-6)
    sides, sizes = drawn.sides01[0, :2], drawn.sizes01[0, :2].repeat(1, 2)
    assert float(placed) == pytest.approx(float(((0.5 - sides).abs() / sizes).sum() / 2), rel=1e-6)
    outputs[drawn.padded] = 1e4
    assert icd_auxiliary_losses(outputs, drawn) == (found, placed)


# -------------------------------------------------------------------------------------------------------------- method


def built(teacher=None, student=None, seed=0, **settings):
    torch.manual_seed(seed)
    student = student or TinyDense()
    return ICD(Teacher(teacher or TinyDense(channels=(16, 16), seed=1)), student, **settings), student


def learned(batch, clock=LATE, autocast=False, **settings):
    method, student = built(**settings)
    taught, seen = method.teach(batch), student(batch)
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        return method.learn(student, seen, taught, batch, clock), method, student


def reached(term, module):
    gradients = torch.autograd.grad(term, list(module.parameters()), allow_unused=True, retain_graph=True)
    return any(gradient is not None and bool(gradient.any()) for gradient in gradients)


def test_each_loss_trains_its_side():
    losses, method, student = learned(tiny_batch())
    sides = (student, method.projections, method.decoder)
    found = {name: [reached(term, side) for side in sides] for name, term in losses.terms.items()}
    assert found["icd_values"] == [True, True, False]
    assert found["icd_identification"] == found["icd_localization"] == [False, False, True]
    assert 0 <= float(losses.monitors["identified"]) <= 1


def test_the_student_is_bypassed_at_first():
    for clock, bypassed in ((Clock(999, 90_000), True), (Clock(1000, 90_000), False), (Clock(9, 900), True), (LATE, False)):
        losses, method, student = learned(tiny_batch(), clock)
        assert reached(losses.terms["icd_values"], student) is not bypassed
        assert reached(losses.terms["icd_values"], method.projections)
    losses, *_ = learned(tiny_batch(), LATE)
    early, *_ = learned(tiny_batch(), Clock(0, 10))
    assert torch.equal(losses.terms["icd_values"], early.terms["icd_values"])


def test_without_boxes_only_identification_learns():
    losses, _, student = learned(tiny_batch(boxes=False))
    terms = {name: term.item() for name, term in losses.terms.items()}
    assert terms["icd_values"] == terms["icd_localization"] == 0.0
    assert terms["icd_identification"] > 0
    losses.total().backward()
    assert all(torch.isfinite(p.grad).all() for p in student.parameters() if p.grad is not None)


def test_crowd_boxes_and_boxes_without_area_are_no_objects():
    batch = tiny_batch(count=1)
    target = batch.targets[0]
    flat = torch.cat([target.boxes_xyxy, torch.tensor([[5.0, 5.0, 5.0, 9.0], [1.0, 1.0, 60.0, 60.0]])])
    extra = torch.tensor([False, True])
    more = Target(flat, torch.cat([target.labels, torch.tensor([0, 0])]), torch.cat([target.crowd, extra]))
    plain, same = (learned(one)[0].terms for one in (batch, batch.with_targets([more])))
    assert all(torch.equal(plain[name], same[name]) for name in plain)


def test_one_box_over_everything_and_boxes_on_the_border():
    batch = tiny_batch(count=1)
    boxes = torch.tensor([[0.0, 0.0, 64.0, 64.0], [60.0, 60.0, 64.0, 64.0]])
    losses, *_ = learned(batch.with_targets([Target(boxes, torch.tensor([0, 1]), torch.zeros(2, dtype=torch.bool))]))
    assert all(bool(torch.isfinite(term)) for term in losses.terms.values())


def test_padding_changes_nothing_for_an_image():
    """The lower image of a batch gives the same losses as alone on its own canvas."""
    pair = tiny_batch(count=2)
    padded = replace(
        pair,
        images=pair.images[1:],
        sizes=pair.sizes[1:],
        targets=pair.targets[1:],
        ids=pair.ids[1:],
        views=pair.views[1:],
    )
    alone = replace(padded, images=padded.images[:, :, :48])
    for layers in (0, 1, 2):
        wide, narrow = (learned(batch, layers=layers)[0].terms for batch in (padded, alone))
        for name, term in wide.items():
            assert term.item() == pytest.approx(narrow[name].item(), rel=1e-5), name


def test_an_invented_query_changes_no_value_loss():
    few, many = (learned(tiny_batch(), invented=ratio, jitter=0.0)[0].terms["icd_values"] for ratio in (0.0, 5.0))
    assert few.item() == pytest.approx(many.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("teacher", "settings"),
    [
        (TinyDense(channels=(16, 24), seed=1), {}),  # levels of unequal channels
        (TinyDense(channels=(16, 16), strides=(16, 32), seed=1), {}),  # one common level
        (TinyDense(channels=(16, 16), strides=(64, 64), seed=1), {}),
        (None, {"width": 24, "heads": 3}),
        (None, {"layers": 0}),
        (None, {"final_temperature": 2.0}),
    ],
)
def test_other_pyramids_and_decoders(teacher, settings):
    student = TinyDense(channels=(8, 8), strides=(32, 64)) if teacher and teacher.spec.strides == (64, 64) else TinyDense()
    losses, method, student = learned(tiny_batch(), teacher=teacher, student=student, **settings)
    losses.total().backward()
    assert all(bool(torch.isfinite(term)) for term in losses.terms.values())
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in method.parameters())


def test_temperature_decays_linearly():
    method, _ = built(temperature=4.0, final_temperature=2.0)
    assert [method._temperature(Clock(step, 10)) for step in (0, 5, 10)] == [4.0, 3.0, 2.0]


def test_heads_divide_the_channels_and_keep_eight_of_them():
    assert [heads_of(channels, 8) for channels in (256, 96, 64, 36, 8, 4)] == [8, 8, 8, 4, 1, 1]


def test_half_precision_does_not_reach_the_losses():
    plain, mixed = (learned(tiny_batch(), autocast=autocast)[0].terms for autocast in (False, True))
    assert {name: term.dtype for name, term in mixed.items()} == dict.fromkeys(plain, torch.float32)
    assert all(torch.equal(mixed[name], term) for name, term in plain.items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": 0.0}, "weight are all 0; nothing would be distilled"),
        ({"temperature": 0.0}, "temperature=0.0 is not a number above 0"),
        ({"form": "mae"}, "form=mae is not one of mse, mse_batch, l1, smooth_l1, l2 (did you mean 'mse'?)"),
        ({"heads": 0}, "heads=0 is not a whole number, 1 or more"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(DetdistillError) as error:
        built(**settings)
    assert str(error.value) == f"icd: {message}"


def test_a_pair_without_a_common_level_is_refused():
    with pytest.raises(DetdistillError, match="icd: no common level"):
        built(student=TinyDense(strides=(64, 128)))


def test_contract():
    assert len(check_method(ICD)) == 18


def test_the_loss_falls_in_training():
    batch = tiny_batch()
    method, student = built(student=TinyRegions())
    taught = method.teach(batch)
    optimizer = torch.optim.AdamW([*student.parameters(), *method.parameters()], lr=3e-3)
    history = []
    for step in range(30):
        losses = method.learn(student, student(batch), taught, batch, Clock(step, 30))
        optimizer.zero_grad()
        losses.total().backward()
        optimizer.step()
        history.append(losses.total().item())
    assert sum(history[-5:]) < 0.85 * sum(history[:5])
