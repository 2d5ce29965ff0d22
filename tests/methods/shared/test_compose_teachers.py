"""``pkd@a+fkd@b``: several teachers for one student."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from detdistill.detectors.contract import PREDICTION, Teacher
from detdistill.methods.shared.compose import build_method, match_teachers
from detdistill.methods.shared.contract import Composition
from detdistill.methods.shared.hyper_parameters import MethodError
from detdistill.methods.shared.needs import PairError
from detdistill.structures import Clock
from tests.tiny import TinyDense, TinyRegions, tiny_batch


def teachers(*names: str) -> dict[str, Teacher]:
    return {name: Teacher(TinyDense(seed=number + 1)) for number, name in enumerate(names)}


def test_each_method_learns_from_its_own_teacher():
    student, both, batch = TinyDense(), teachers("a", "b"), tiny_batch()
    method = build_method("pkd@a+pkd@b", both, student)
    assert isinstance(method, Composition)
    assert method.members == ("pkd@a", "pkd@b")
    assert method.teachers() == tuple(both.values())
    losses = method.step(student, batch, method.teach(batch), Clock(0, 10))
    for name, teacher in both.items():
        alone = build_method("pkd", teacher, student)
        expected = alone.learn(student, student(batch, PREDICTION).float(), alone.teach(batch), batch, Clock(0, 10))
        assert {f"pkd@{name}/{term}" for term in expected.terms} <= losses.distilled
        for term, value in expected.terms.items():
            torch.testing.assert_close(losses.terms[f"pkd@{name}/{term}"], value)


def test_one_teacher_serves_methods_without_a_name_and_others_only_by_name():
    one = teachers("a")
    assert match_teachers("pkd+fkd@a", one) == ["a", "a"]
    assert match_teachers("pkd+lgd", [""]) == ["", ""]
    assert match_teachers("pkd@a+lgd", one) == ["a", ""]
    assert build_method("pkd", one, TinyDense()).teachers() == tuple(one.values())


@pytest.mark.parametrize(
    ("text", "names", "said"),
    [
        ("pkd@c+fkd@b", ("a", "b"), "pkd@c: there is no teacher 'c'; the teachers are a, b"),
        ("pkd@a", ("",), "pkd@a: there is no teacher 'a'; name it: --teacher a=RUN"),
        ("pkd+fkd@b", ("a", "b"), "pkd: say which teacher it learns from: pkd@a or pkd@b"),
        ("pkd@a+fkd@a", ("a", "b"), "teacher b: no method learns from it; write e.g. pkd@b, or leave it out"),
        ("pkd@", ("a",), "method 'pkd@': '' is no name of a teacher; write e.g. pkd@a"),
    ],
)
def test_names_that_do_not_fit(text, names, said):
    with pytest.raises(MethodError) as error:
        match_teachers(text, names)
    assert str(error.value) == said


def test_the_teacher_that_fails_a_check_is_named():
    given = {"a": Teacher(TinyDense()), "b": Teacher(TinyRegions())}
    with pytest.raises(
        PairError, match=r"^teacher b: cwd: the teacher tiny regions predicts regions|^teacher b: cwd: the teacher "
    ):
        build_method("pkd@a+cwd@b,on=logits", given, TinyDense())
    few = Teacher(TinyDense())
    few.detector.spec = replace(few.detector.spec, classes=("b",))
    with pytest.raises(
        PairError, match=r"^teacher b: bckd: it compares class scores, but the teacher does not know a; its classes: b"
    ):
        build_method("pkd@a+bckd@b", {"a": given["a"], "b": few}, TinyDense())
