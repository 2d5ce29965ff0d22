"""What a distillation method is: teach (frozen, cacheable) and learn (everything that trains).

    taught = method.teach(batch)
    losses = method.learn(student, seen, taught, batch, clock)

The loop knows no method by name. A method is one file with a pure function and a subclass of ``Method``; the class's
constructor takes the teacher and the student, then its hyper-parameters as keyword arguments with the paper's defaults.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from detdistill.detectors.contract import CAPABILITIES, Detector, Teacher
from detdistill.errors import DetdistillError
from detdistill.structures import Batch, Clock, Losses, Observation, Taught, TaughtTogether


class PairError(DetdistillError):
    """This teacher, this student and this method cannot work together; the message says why and what would."""


@dataclass(frozen=True)
class Needs:
    """What a method asks of both sides, beside ``features``, which every detector has."""

    teacher: bool = True
    """False for teacher-free methods."""
    teacher_backbone: bool = False
    """``teach`` observes the teacher's backbone features too."""
    teacher_prediction: bool = False
    """``teach`` observes the teacher's prediction too."""
    teacher_capabilities: tuple[type, ...] = ()
    student_capabilities: tuple[type, ...] = ()
    teacher_families: tuple[str, ...] = ()
    """Families that can serve; empty: any."""
    student_families: tuple[str, ...] = ()
    same_classes: bool = False
    """Class logits are compared: every class of the student must be known to the teacher by name."""


StageStep = Callable[[Batch, Clock], Losses]
Source = Callable[[Batch], Taught]


@dataclass(frozen=True)
class Stage:
    """A part of training. Most methods have one; UniKD, LabelEnc and DICOD train something of their own first."""

    name: str
    step: StageStep
    """One batch in, all losses out."""
    trains: Callable[[Clock], Sequence[nn.Module]]
    """Which modules get gradients at this moment; the rest of student and method is frozen."""
    evaluates: Detector | None
    """Which detector's AP is followed, or None."""
    share: float = 1.0
    """Length as a multiple of the run's ``epochs``, or of its ``steps`` when those are given."""
    depends_on: str = ""
    """Fingerprint of all its result depends on beside data and schedule; a finished stage with the same one is reused.
    Empty: never reused."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Training settings of this stage that differ from the run's: ``{"optimizer": "adamw", "lr": 2e-4}``."""


class Method(nn.Module):
    """One distillation method for one pair.

    Trainable parts (adapters, attention) are submodules; the teacher is not, because ``Teacher`` is no module.
    """

    slug: ClassVar[str]
    """The method's name on the command line and its file's name."""
    title: ClassVar[str]
    """Title of the paper, with venue and year."""
    bibtex: ClassVar[str]
    """What ``detdistill cite`` prints."""
    needs: ClassVar[Needs] = Needs()
    teach_settings: ClassVar[tuple[str, ...] | None] = None
    """Hyper-parameters on which the result of ``teach`` depends, so that one cache serves all values of the others. None: all of
    them where the class defines ``teach``, and none where it does not."""

    def __init__(self, teacher: Teacher | None, student: Detector) -> None:
        """Check the pair.

        Raises:
            PairError: teacher or student lacks something that ``needs`` names.
        """
        super().__init__()
        check_pair(self.slug, self.needs, teacher, student)
        self._teacher = teacher
        self.strength = 1.0
        """Factor on what ``learn`` returns; the run's ``dis``."""
        self.source: Source | None = None
        """Where ``taught`` comes from instead of the teacher: a cache."""

    @classmethod
    def why_live_teacher(cls, settings: Mapping[str, Any]) -> str:
        """Why a cache of what was taught is not enough, and the teacher must be there too; empty: it is enough.

        Args:
            settings: hyper-parameters that differ from their defaults.
        """
        return "uses modules of the teacher when it learns, which a cache does not hold" if cls.needs.teacher_capabilities else ""

    @property
    def teacher(self) -> Teacher:
        """The frozen teacher (an ``AssertionError`` in a teacher-free method, which has none)."""
        assert self._teacher is not None, f"{self.slug} has no teacher"
        return self._teacher

    def teach(self, batch: Batch) -> Taught | None:
        """What the teacher says about a batch: no gradient, depends on the batch and on frozen weights only.

        Plain per-image data, so it may come from a cache instead. Randomness is seeded by image id and view.
        """
        if self._teacher is None:
            return None
        return self._teacher.observe(batch, backbone=self.needs.teacher_backbone, prediction=self.needs.teacher_prediction)

    def taught(self, batch: Batch) -> Taught | None:
        """What steps use: from the cache when there is one, else ``teach``, each image on its own canvas.

        The canvas is the padding that an image has in a batch of its own; what is taught about an image does not depend on
        the others of its batch, so online and offline training learn the same. With ``letterbox`` all canvases are equal.
        """
        if self.source is not None:
            return self.source(batch)
        groups = batch.by_canvas()
        if len(groups) == 1 and groups[0][1] is batch:
            return self.teach(batch)
        pieces: list[tuple[int, Taught]] = []
        for chosen, part in groups:
            taught = self.teach(part)
            if taught is None:
                return None
            pieces += zip(chosen, taught.split(len(part)), strict=True)
        ordered = [piece for _, piece in sorted(pieces, key=lambda pair: pair[0])]
        return type(ordered[0]).stack(ordered)

    def learn(self, student: Detector, seen: Observation, taught: Taught | None, batch: Batch, clock: Clock) -> Losses:
        """Losses that make the student (and this method's modules) follow what was taught."""
        raise TypeError(f"{type(self).__name__} must define learn()")

    def supervise(self, student: Detector, seen: Observation, taught: Taught | None, batch: Batch) -> Losses:
        """The student's own detection loss. A composition holds at most one override."""
        assert seen.prediction is not None
        return student.loss(seen.prediction, batch)

    def step(self, student: Detector, batch: Batch, clock: Clock) -> Losses:
        """Teach, one student pass, supervise, learn: the step of the stage ``distill``.

        The networks run in the caller's precision; all losses, and the method's own modules, in float32.
        """
        taught = self.taught(batch)
        seen = student(batch)
        with torch.autocast(batch.images.device.type, enabled=False):
            seen, taught = seen.float(), None if taught is None else taught.float()
            supervised = self.supervise(student, seen, taught, batch)
            learned = self.learn(student, seen, taught, batch, clock)
        if self.strength != 1.0:
            learned = Losses({name: self.strength * term for name, term in learned.terms.items()}, learned.monitors)
        return Losses.merge([supervised, learned])

    def stages(self, student: Detector) -> tuple[Stage, ...]:
        """By default one. The last stage is always ``step`` with the student: earlier stages are the method's own."""
        return (
            Stage(
                "distill",
                step=lambda batch, clock: self.step(student, batch, clock),
                trains=lambda clock: (student, self),
                evaluates=student,
            ),
        )

    def teachers(self) -> tuple[Teacher, ...]:
        """All frozen teachers, for moving them to a device."""
        return () if self._teacher is None else (self._teacher,)


class Composition(Method):
    """Several methods at once: ``fgd+pkd``. Their losses are added under their names."""

    slug = "composition"
    title = "several methods at once"
    bibtex = ""
    needs = Needs(teacher=False)

    def __init__(self, methods: Sequence[Method], student: Detector) -> None:
        """Put methods together.

        Raises:
            PairError: two of them replace the student's own loss, or a method is named twice.
        """
        super().__init__(None, student)
        slugs = [method.slug for method in methods]
        if len(set(slugs)) < len(slugs):
            raise PairError(f"method {'+'.join(slugs)}: each method may be named once")
        supervising = [method for method in methods if type(method).supervise is not Method.supervise]
        if len(supervising) > 1:
            names = " and ".join(method.slug for method in supervising)
            raise PairError(f"{names} both replace the student's own loss; a composition can hold only one of them")
        self.parts = nn.ModuleDict(dict(zip(slugs, methods, strict=True)))
        self._supervisor = supervising[0].slug if supervising else None

    @property
    def methods(self) -> tuple[Method, ...]:
        """In the order they were named."""
        return tuple(self.parts.values())  # type: ignore[arg-type]

    def teach(self, batch: Batch) -> TaughtTogether:
        """What each method was taught, in order."""
        return TaughtTogether(tuple(method.teach(batch) for method in self.methods))

    def learn(self, student: Detector, seen: Observation, taught: Taught | None, batch: Batch, clock: Clock) -> Losses:
        """All losses, each under ``<slug>/``."""
        assert isinstance(taught, TaughtTogether)
        pairs = zip(self.methods, taught.parts, strict=True)
        return Losses.merge([m.learn(student, seen, part, batch, clock).prefixed(m.slug) for m, part in pairs])

    def supervise(self, student: Detector, seen: Observation, taught: Taught | None, batch: Batch) -> Losses:
        """The override of the one method that has one, else the student's own loss."""
        if self._supervisor is None:
            return super().supervise(student, seen, taught, batch)
        assert isinstance(taught, TaughtTogether)
        index = list(self.parts).index(self._supervisor)
        return self.methods[index].supervise(student, seen, taught.parts[index], batch)

    def stages(self, student: Detector) -> tuple[Stage, ...]:
        """The methods' own earlier stages, one after the other, then everybody's last stage together."""
        earlier = [stage for method in self.methods for stage in method.stages(student)[:-1]]
        last = [method.stages(student)[-1] for method in self.methods]

        def trains(clock: Clock) -> Sequence[nn.Module]:
            return [module for stage in last for module in stage.trains(clock)]

        together = Stage("distill", lambda batch, clock: self.step(student, batch, clock), trains, student)
        return (*earlier, together)

    def teachers(self) -> tuple[Teacher, ...]:
        """Of all methods, each once."""
        return tuple(dict.fromkeys(teacher for method in self.methods for teacher in method.teachers()))


def check_pair(slug: str, needs: Needs, teacher: Teacher | None, student: Detector) -> None:
    """Say what is missing before the first image.

    Raises:
        PairError: naming the side, its detector, and all that is missing.
    """
    if needs.teacher and teacher is None:
        raise PairError(f"{slug}: needs a teacher; give one with --teacher")
    sides: list[tuple[str, Detector, tuple[type, ...], tuple[str, ...]]] = [
        ("student", student, needs.student_capabilities, needs.student_families)
    ]
    if teacher is not None:
        sides.append(("teacher", teacher.detector, needs.teacher_capabilities, needs.teacher_families))
    for side, detector, capabilities, families in sides:
        if families and detector.spec.family not in families:
            raise PairError(
                f"{slug}: the {side} {detector.spec.name} predicts {detector.spec.family}; "
                f"{slug} needs a {side} that predicts {' or '.join(families)}"
            )
        missing = [CAPABILITIES[capability] for capability in capabilities if not isinstance(detector, capability)]
        if missing:
            raise PairError(
                f"{slug}: the {side} {detector.spec.name} lacks {', '.join(missing)}; "
                f"run `detdistill methods --student {detector.spec.name}` for the methods that serve it"
            )
    if needs.same_classes and teacher is not None:
        unknown = [name for name in student.spec.classes if name not in teacher.spec.classes]
        if unknown:
            raise PairError(
                f"{slug}: compares class scores, but the teacher does not know {', '.join(unknown[:5])}"
                f"{' ...' if len(unknown) > 5 else ''}; teacher classes: {', '.join(teacher.spec.classes[:10])}"
                f"; use a method on features (fitnet, pkd, cwd, fkd, fgd, mgd)"
            )
