import pytest
import torch

from detdistill.errors import DetdistillError
from detdistill.functional.classes import class_columns


def test_columns_put_the_teachers_outputs_into_the_students_order():
    teacher, student = ("cat", "dog", "bird", "fish"), ["fish", "cat"]
    logits = torch.tensor([[1.0, 2.0, 3.0, 4.0, 9.0]])
    assert logits[..., class_columns(student, teacher, softmax=False)].tolist() == [[4.0, 1.0]]
    assert logits[..., class_columns(student, teacher, softmax=True)].tolist() == [[4.0, 1.0, 9.0]]


def test_equal_classes_are_all_columns_in_order():
    names = [f"class {number}" for number in range(80)]
    assert class_columns(names, tuple(names), softmax=True) == list(range(81))
    assert class_columns([], names, softmax=False) == []


def test_a_class_that_the_teacher_does_not_know_is_named():
    with pytest.raises(DetdistillError, match=r"does not know horse; its classes are cat, dog; take a teacher"):
        class_columns(["cat", "horse"], ["cat", "dog"], softmax=False)
