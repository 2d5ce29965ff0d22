"""Check the maps that a loss compares, so that a mistake is named and no map is broadcast to another."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from detdistill.errors import DetdistillError


def paired_levels(
    loss: str, student: Sequence[Tensor], teacher: Sequence[Tensor], *, any_size: bool = False
) -> list[tuple[Tensor, Tensor]]:
    """Pair the maps of each level.

    Args:
        loss: name of the loss, for messages.
        student: L maps [B, C, H, W].
        teacher: L maps [B, C, H, W].
        any_size: height and width may differ.

    Returns:
        L pairs of a student map and a teacher map.

    Raises:
        DetdistillError: one of the two is a tensor instead of a list of maps, the numbers of levels differ, or the maps of a
            level do not fit.

    Example:
        >>> import torch
        >>> paired_levels("pkd_loss", torch.ones(1, 2, 3, 3), [torch.ones(1, 2, 3, 3)])
        Traceback (most recent call last):
        detdistill.errors.DetdistillError: pkd_loss: student is a tensor [1, 2, 3, 3]; give a list with a map per level: [student]
    """
    for side, maps in (("student", student), ("teacher", teacher)):
        if isinstance(maps, Tensor):
            raise DetdistillError(f"{loss}: {side} is a tensor {list(maps.shape)}; give a list with a map per level: [{side}]")
        if not isinstance(maps, Sequence) or not all(isinstance(level, Tensor) for level in maps):
            raise DetdistillError(f"{loss}: {side} is no list of tensors [B, C, H, W] but a {type(maps).__name__}")
    if len(student) != len(teacher) or not len(student):
        raise DetdistillError(f"{loss}: {len(student)} student maps and {len(teacher)} teacher maps; give one of each per level")
    pairs = list(zip(student, teacher, strict=True))
    for level, (mine, theirs) in enumerate(pairs):
        check_maps(f"{loss}: level {level}", mine, theirs, any_size=any_size)
    return pairs


def check_maps(where: str, student: Tensor, teacher: Tensor, *, any_size: bool = False) -> None:
    """Check that two maps can be compared.

    Args:
        where: the loss, and the level if there are several, for messages.
        student: [B, C, H, W].
        teacher: [B, C, H, W].
        any_size: height and width may differ.

    Raises:
        DetdistillError: a map is no tensor of four dimensions, or images, channels or sizes differ.
    """
    for side, level in (("student", student), ("teacher", teacher)):
        if not isinstance(level, Tensor):
            raise DetdistillError(f"{where}: {side} is a {type(level).__name__}, not a map [B, C, H, W]; call it for each level")
    shapes = f"student map {list(student.shape)} and teacher map {list(teacher.shape)}"
    if student.ndim != 4 or teacher.ndim != 4:
        raise DetdistillError(f"{where}: {shapes} must be [B, C, H, W]")
    if student.shape[0] != teacher.shape[0]:
        raise DetdistillError(f"{where}: {shapes} are of different numbers of images")
    if student.shape[1] != teacher.shape[1]:
        raise DetdistillError(
            f"{where}: {shapes} differ in channels; adapt the student's first, e.g. by "
            f"torch.nn.Conv2d({student.shape[1]}, {teacher.shape[1]}, 1)"
        )
    if not any_size and student.shape[2:] != teacher.shape[2:]:
        raise DetdistillError(f"{where}: {shapes} differ in size; resize first, e.g. by torch.nn.functional.interpolate")
