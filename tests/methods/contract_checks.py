"""What every method must keep, in one call: ``check_method(PKD)``, on every pair of tiny detectors that it accepts."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from detdistill.detectors.contract import PREDICTION, Detector
from detdistill.methods.shared.contract import Method
from detdistill.methods.shared.hyper_parameters import checked_settings
from detdistill.methods.shared.needs import PairError
from detdistill.structures import Batch, Clock, Losses, Observation, Target, Taught
from tests.methods.offline_checks import check_earlier_stages_and_caches
from tests.methods.tiny_pairs import MIDDLE, _Pair, assert_same, run_stage, stage_losses, tensors
from tests.tiny import TinyDense, TinyQueries, TinyRegions, tiny_batch


def check_method(method_class: type[Method], **hyperparameters: Any) -> list[str]:
    """Assert the contract of ``methods/contract.py`` on all pairs of tiny detectors that the method does not refuse.

    Returns:
        The pairs that were checked, e.g. ``dense 16 -> regions 8`` (teacher's family and channels, then the student's);
        a test may assert what is in it, so that a method does not pass by refusing.
    """
    checked = []
    students: list[type[Detector]] = [TinyDense, TinyRegions, TinyQueries]
    needs = method_class.needs(**checked_settings(method_class.slug, method_class, hyperparameters))
    teachers: list[type[Detector] | None] = [None] if needs.teacher is None else [*students]
    for teacher_class in teachers:
        for student_class in students:
            for channels in (8, 16) if teacher_class else (8,):
                pair = _Pair(method_class, hyperparameters, teacher_class, student_class, channels)
                try:
                    pair.build()
                except PairError:
                    continue
                name = f"{pair.teacher.spec.family} {channels} -> " if pair.teacher else ""
                name += f"{pair.student.spec.family} 8"
                try:
                    _check_pair(pair)
                except Exception as error:
                    error.add_note(f"{method_class.slug}: {name}")
                    raise
                checked.append(name)
    assert checked, f"{method_class.slug} refuses every pair of tiny detectors"
    return checked


def _check_pair(pair: _Pair) -> None:
    check_teach_is_independent_of_student(pair)
    check_gradients(pair)
    check_state_dict(pair)
    check_images_without_boxes(pair)
    check_half_precision(pair)
    check_arithmetic_is_exact_under_autocast(pair)
    check_one_image(pair)
    check_split_and_stack(pair)
    check_distill_weight(pair)
    check_earlier_stages_and_caches(pair)


def observe(method: Method, student: Detector, batch: Batch) -> Observation:
    """The student's pass, with all that the method looks at."""
    return student(batch, PREDICTION | method.requirements.student)


def learn(method: Method, student: Detector, batch: Batch, taught: Taught | None, clock: Clock = MIDDLE) -> Losses:
    """One seeded student pass and what the method makes of it, new targets included."""
    torch.manual_seed(7)
    if not method._relabels():
        return method.learn(student, observe(method, student, batch), taught, batch, clock)
    look = PREDICTION | method.requirements.student
    seen = student.observe_features(batch, look)
    changed, relabelled = method.relabel(student, seen.features, batch, clock)
    seen = student.observe_head(seen, changed, look)
    return Losses.merge([relabelled, method.learn(student, seen, taught, changed, clock)])


def check_teach_is_independent_of_student(pair: _Pair) -> None:
    """``teach`` depends on the batch and on frozen weights only, and its randomness on image ids and views."""
    method, batch = pair.build(), tiny_batch(3)
    student = pair.student
    torch.manual_seed(0)
    before = method.teach(batch)
    for path, tensor in tensors(before):
        assert not tensor.requires_grad, f"teach{path} carries a gradient"
    kept = copy.deepcopy(before)
    supervised = method.supervise(student, observe(method, student, batch), before, batch)
    losses = Losses.merge([supervised, learn(method, student, batch, before)])
    losses.total().backward()
    assert_same(before, kept, "supervise or learn changed what was taught in place: ")
    with torch.no_grad():
        learning = [parameter for parameter in (*student.parameters(), *method.parameters()) if parameter.grad is not None]
        for parameter in learning:
            parameter.add_(1.0)
    pair.forget()
    torch.manual_seed(1)
    assert_same(method.teach(batch), kept, "teach changed with the student, the method's trainables or the random state: ")


def check_gradients(pair: _Pair) -> None:
    """Of ``learn`` alone to the student (of ``supervise`` where only that is taught); of all stages to everything trainable;
    none to the teacher."""
    method, batch = pair.build(), tiny_batch(3)
    student = pair.student
    teacher_state = copy.deepcopy(pair.teacher.detector.state_dict()) if pair.teacher else {}
    taught = method.teach(batch)
    losses = learn(method, student, batch, taught)
    if not losses.terms:
        losses = method.supervise(student, observe(method, student, batch), taught, batch)
    total = losses.total()
    own = [p for p in student.parameters() if p.requires_grad]
    reached = [g for g in torch.autograd.grad(total, own, allow_unused=True) if g is not None]
    assert any(float(g.abs().sum()) > 0 for g in reached), "no gradient of learn() reaches the student"
    trainable = {name: p for name, p in method.named_parameters() if p.requires_grad}
    missed = set(trainable)
    for stage in method.stages(student):
        pair.forget()
        run_stage(stage, student, method, batch)
        missed -= {name for name, p in trainable.items() if p.grad is not None}
        for name, p in (*student.named_parameters(), *trainable.items()):
            assert p.grad is None or bool(torch.isfinite(p.grad).all()), f"gradient of {name} in stage {stage.name} is not finite"
    assert not missed, f"no gradient reaches the method's own {sorted(missed)}"
    if pair.teacher is not None:
        detector = pair.teacher.detector
        assert not any(module.training for module in detector.modules()), "the teacher left eval mode"
        assert all(p.grad is None and not p.requires_grad for p in detector.parameters()), "a gradient reached the teacher"
        assert_same(detector.state_dict(), teacher_state, "training changed the teacher: ")


def check_state_dict(pair: _Pair) -> None:
    """Without the teacher's own tensors; loading it gives the same losses."""
    method, batch = pair.build(), tiny_batch(3)
    first_student = pair.student
    if pair.teacher is not None:
        theirs = {tensor.data_ptr() for tensor in pair.teacher.detector.state_dict().values()}
        inside = [name for name, tensor in method.state_dict().items() if tensor.data_ptr() in theirs]
        assert not inside, f"the state dict holds the teacher's {inside[:3]}; keep a copy of what learning needs"
    expected = learn(method, first_student, batch, method.teach(batch)).terms
    state = copy.deepcopy(pair.build(seed=2).state_dict())
    other = pair.build(seed=3)
    other.load_state_dict(state)
    pair.student.load_state_dict(first_student.state_dict())
    pair.forget()
    assert_same(learn(other, pair.student, batch, other.teach(batch)).terms, expected, "a loaded method learns otherwise: ")


def without_boxes(batch: Batch, images: range) -> Batch:
    """The batch with no boxes in some images."""
    empty = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool))
    return batch.with_targets([empty if index in images else target for index, target in enumerate(batch.targets)])


def check_images_without_boxes(pair: _Pair) -> None:
    """One image, then the whole batch without boxes; at the first and the last step: finite, with finite gradients."""
    method = pair.build()
    student = pair.student
    for images in (range(1), range(3)):
        batch = without_boxes(tiny_batch(3), images)
        for clock in (Clock(0, 10), Clock(9, 10, 1)):
            pair.forget()
            student.zero_grad(), method.zero_grad()
            taught = method.teach(batch)
            supervised = method.supervise(student, observe(method, student, batch), taught, batch)
            losses = Losses.merge([supervised, learn(method, student, batch, taught, clock)])
            for name, value in (*losses.terms.items(), *losses.monitors.items()):
                assert bool(torch.isfinite(value).all()), f"{name} is {value} with {len(images)} images without boxes"
            losses.total().backward()
            for name, p in (*student.named_parameters(), *method.named_parameters()):
                finite = p.grad is None or bool(torch.isfinite(p.grad).all())
                assert finite, f"gradient of {name} is not finite with {len(images)} images without boxes"


def check_half_precision(pair: _Pair) -> None:
    """In a bf16 run the losses of every stage are float32 scalars, finite and differentiable."""
    method, batch = pair.build(), tiny_batch(3)
    for stage in method.stages(pair.student):
        pair.forget()
        pair.student.zero_grad(), method.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            losses = stage_losses(stage, batch)
        for name, value in losses.terms.items():
            assert value.dtype == torch.float32, f"{name} is {value.dtype} in a bf16 run; compute it in full_precision"
            assert value.shape == (), f"{name} is no scalar: {tuple(value.shape)}"
            assert bool(torch.isfinite(value)), f"{name} is {value} in a bf16 run"
        losses.total().backward()
        for name, p in (*pair.student.named_parameters(), *method.named_parameters()):
            assert p.grad is None or bool(torch.isfinite(p.grad).all()), f"gradient of {name} is not finite in a bf16 run"


def check_arithmetic_is_exact_under_autocast(pair: _Pair) -> None:
    """Networks apart, a step computes in a bf16 run just what it computes without autocast."""
    found = []
    for enabled in (False, True):
        method, batch = pair.build(), tiny_batch(3)
        networks = [part for part in method.modules() if any(hasattr(part, name) for name in ("predict", "regions", "tower"))]
        for detector in (pair.student, *([pair.teacher.detector] if pair.teacher else []), *networks):
            keep_exact(detector)
        pair.forget()
        torch.manual_seed(7)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found.append(stage_losses(method.stages(pair.student)[-1], batch).terms)
    assert_same(found[1], found[0], "a loss is computed in half precision in a bf16 run: ")


def keep_exact(detector: nn.Module) -> None:
    """Let the parts of a detector, or of a network of the method, run without autocast, whatever the caller does."""
    for name in ("observe_features", "observe_head", "decode", "predict", "tower", "finish", "regions", "proposals", "neck"):
        part = getattr(detector, name, None)
        if callable(part) and not isinstance(part, nn.Module):  # a method may have a hyper-parameter of such a name
            setattr(detector, name, torch.autocast("cpu", enabled=False)(part))


def check_distill_weight(pair: _Pair) -> None:
    """The terms of the distillation say that they are, in every stage that learns from what was taught."""
    method, batch = pair.build(), tiny_batch(3)
    for stage in method.stages(pair.student):
        pair.forget()
        losses = stage_losses(stage, batch)
        if stage.learns_from is None:
            assert not losses.distilled, f"stage {stage.name} distils nothing"
            continue
        own = set(pair.student.loss(pair.student(batch).prediction, batch).terms)
        assert losses.distilled >= set(losses.terms) - own, f"stage {stage.name}: {set(losses.terms) - losses.distilled - own}"
        doubled = losses.with_distilled_scaled(2.0)
        for name, term in losses.terms.items():
            assert torch.equal(doubled.terms[name], 2 * term if name in losses.distilled else term), name


def check_one_image(pair: _Pair) -> None:
    """A batch of one image is finite, and the student stays as the loop set it."""
    method, batch = pair.build(), tiny_batch(1)
    student = pair.student.train()
    pair.forget()
    losses = learn(method, student, batch, method.teach(batch))
    for name, value in losses.terms.items():
        assert bool(torch.isfinite(value)), f"{name} is {value} for a batch of one image"
    assert student.training, "teach or learn left the student in eval mode"
    assert all(p.requires_grad for p in student.parameters()), "teach or learn froze the student"


def check_split_and_stack(pair: _Pair) -> None:
    """What was taught, split by image and stacked again (as a cache does), gives the same loss."""
    method, batch = pair.build(), tiny_batch(3)
    pair.forget()
    taught = method.teach(batch)
    if taught is None:
        return
    again = type(taught).stack([copy.deepcopy(piece) for piece in taught.split(len(batch))])
    state = copy.deepcopy(method.state_dict())
    expected = learn(method, pair.student, batch, taught).terms
    method.load_state_dict(state)
    actual = learn(method, pair.student, batch, again).terms
    assert_same(actual, expected, "split and stacked knowledge gives another loss: ", rtol=1e-6, atol=1e-7)
