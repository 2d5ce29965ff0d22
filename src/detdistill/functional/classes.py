"""Match the class outputs of two detectors by name."""

from __future__ import annotations

from collections.abc import Sequence

from detdistill.errors import DetdistillError, name_list


def class_columns(student: Sequence[str], teacher: Sequence[str], softmax: bool) -> list[int]:
    """Index of each of the student's class outputs in the teacher: ``teacher_logits[..., columns]`` is in the student's order.

    Args:
        student: class names of the student, in the order of its outputs.
        teacher: class names of the teacher, in the order of its outputs; classes that the student lacks are left out.
        softmax: both detectors have one more output, the background, which comes last.

    Returns:
        K indices; K+1 with ``softmax``.

    Raises:
        DetdistillError: the teacher lacks one of the student's classes.

    Example:
        >>> class_columns(["b", "a"], ["a", "c", "b"], softmax=True)
        [2, 0, 3]
    """
    if unknown := [name for name in student if name not in teacher]:
        raise DetdistillError(
            f"class outputs are matched by name, but the teacher does not know {name_list(unknown)}; its classes are "
            f"{name_list(teacher)}; take a teacher that knows all classes of the student"
        )
    return [teacher.index(name) for name in student] + ([len(teacher)] if softmax else [])
