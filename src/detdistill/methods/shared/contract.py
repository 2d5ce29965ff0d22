"""Base classes of distillation methods: ``teach`` (frozen, cacheable) and ``learn`` (everything that is trained).

    taught = method.teach(batch)
    losses = method.learn(student, seen, taught, batch, clock)

A method is one file with a pure function and a subclass of ``Method``. The class's constructor takes the teacher and the
student, then the hyper-parameters as keyword arguments with the paper's defaults. The training loop knows no method by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Generic, Self, TypeVar, cast

import torch
from torch import nn

from detdistill.detectors.contract import PREDICTION, Detector, Teacher
from detdistill.functional.label_scores import detection_loss
from detdistill.functional.precision import full_precision
from detdistill.methods.shared.hyper_parameters import checked_settings
from detdistill.methods.shared.needs import Needs, PairError, check_pair
from detdistill.structures import Batch, Clock, Features, Look, Losses, Observation, Taught, TaughtTogether

T = TypeVar("T", bound=Taught | None)
StageStep = Callable[[Batch, Any, Clock], Losses]
Source = Callable[["Method[Any]", Batch], Taught | None]
"""A function that returns a method's ``taught`` for a batch: from the teacher (``teach_by_canvas``) or from a cache."""


@dataclass(frozen=True)
class Stage:
    """A part of a training run. Most methods have one; UniKD, LabelEnc and DICOD first train networks of their own."""

    name: str
    step: StageStep
    """Computes all losses from a batch, ``taught`` of ``learns_from`` for it, and the clock."""
    trains: Callable[[Clock], Sequence[nn.Module]]
    """Modules that are trained at a given time; all other modules of student and method are frozen."""
    evaluates: Detector | None
    """The detector that is evaluated during the stage, or None."""
    learns_from: Method[Any] | None = None
    """The method whose ``taught`` the loop passes to ``step``, from the teacher or from a cache. None: ``step`` gets None."""
    share: float = 1.0
    """Length as a multiple of the run's ``epochs``, or of its ``steps`` if these are given."""
    depends_on: str = ""
    """Fingerprint of everything the result depends on besides data and schedule. A finished stage with the same fingerprint is
    reused. Empty: never reused."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Training settings of this stage that differ from the run's: ``{"optimizer": "adamw", "lr": 2e-4}``."""
    before: Callable[[], None] | None = None
    """Called once at the start of the stage, but not when it is resumed; used to copy weights from the previous stage."""


class Method(nn.Module, Generic[T]):
    """A distillation method for a pair of teacher and student. ``T`` is the type that its ``teach`` returns.

    Trainable parts (adapters, attention) are submodules. The teacher is not a submodule, because ``Teacher`` is not a module.
    """

    slug: ClassVar[str]
    """Name of the method on the command line, and of its file."""
    title: ClassVar[str]
    """Title of the paper, with venue and year; of a method without a paper, what it is."""
    bibtex: ClassVar[str]
    """The text that ``detdistill cite`` prints."""
    published: ClassVar[bool] = True
    """The method is that of a paper. False: it is this library's own; its page and ``bibtex`` name the papers it builds on."""
    teach_settings: ClassVar[tuple[str, ...] | None] = None
    """Names of the hyper-parameters that change what ``teach`` returns; only these enter a cache's identity.
    None: all, if the class overrides ``teach``; those that change ``needs``, if it inherits ``teach``."""
    teaches_parts: ClassVar[bool] = False
    """The class overrides ``teach``, and its result holds no cells and no pixels, only parts of the image: so with
    ``--teacher_size`` it is given the larger images themselves. Other methods are given the student's, and ``Teacher.observe``
    converts what the teacher saw in the larger ones."""
    trains_alone: tuple[str, ...] = ()
    """Names of terms that train only modules of the method; a run does not warn that they give the student no gradient."""
    settings: dict[str, Any]
    """Values of all hyper-parameters, checked against the types of the constructor before it runs."""

    def __new__(cls, *sides: Any, **given: Any) -> Self:
        """Check the hyper-parameters.

        Raises:
            MethodError: a hyper-parameter is unknown, or its value is not of its type.
        """
        method = super().__new__(cls)
        method.settings = checked_settings(cls.slug, cls, given)
        return method

    def __init__(self, teacher: Teacher | None, student: Detector) -> None:
        """Check the pair.

        Raises:
            PairError: teacher or student lacks something that ``needs`` names.
        """
        super().__init__()
        self.requirements = self.needs(**self.settings)
        check_pair(self.slug, self.requirements, teacher, student)
        self._teacher = teacher

    @classmethod
    def needs(cls, **settings: Any) -> Needs:
        """Requirements on teacher and student.

        Args:
            settings: values of all hyper-parameters, by name.
        """
        return Needs()

    @property
    def teacher(self) -> Teacher:
        """The frozen teacher.

        Raises:
            AssertionError: the method has no teacher.
        """
        assert self._teacher is not None, f"{self.slug} has no teacher"
        return self._teacher

    @property
    def members(self) -> tuple[str, ...]:
        """Slugs of the methods that this one is made of: its own, unless it is a composition."""
        return (self.slug,)

    def teach(self, batch: Batch) -> T:
        """Compute the teacher's part for a batch, without gradient, from the batch and frozen weights only.

        The result can be split by image, so that a cache can store it. Random numbers must be seeded by image id and view. By
        default the result is the teacher's ``Observation`` of the parts in ``needs(...).teacher``; None without a teacher.
        """
        if self._teacher is None or self.requirements.teacher is None:
            return cast(T, None)
        return cast(T, self._teacher.observe(batch, self.requirements.teacher))

    def learn(self, student: Detector, seen: Observation, taught: T, batch: Batch, clock: Clock) -> Losses:
        """Compute the distillation losses of the student and of this method's modules.

        ``learn`` runs in the precision of the caller, so that it may run parts of the networks again. ``seen`` and ``taught``
        are float32. Compute losses inside ``with full_precision(batch.images.device)``.
        """
        raise TypeError(f"{type(self).__name__} must define learn()")

    def supervise(self, student: Detector, seen: Observation, taught: T, batch: Batch) -> Losses:
        """Compute the student's detection loss, in full precision. At most one method of a composition may override this."""
        assert seen.prediction is not None
        return detection_loss(student, seen.prediction, batch, seen.assignment)

    def relabel(self, student: Detector, features: Features, batch: Batch, clock: Clock) -> tuple[Batch, Losses]:
        """Replace the targets of the batch, after the student's features and before its prediction.

        At most one method of a composition may override this. By default the batch is returned unchanged.

        Returns:
            The batch with its new targets, and losses of computing them.
        """
        return batch, Losses({})

    def step(self, student: Detector, batch: Batch, taught: T, clock: Clock) -> Losses:
        """Run the step of the stage ``distill``: the student's forward pass, ``relabel``, ``supervise`` and ``learn``.

        The networks run in the caller's precision. ``seen`` and ``taught`` are converted to float32.
        """
        look, relabelled = PREDICTION | self.requirements.student, Losses({})
        if self._relabels():
            seen = student.observe_features(batch, look)
            batch, relabelled = self.relabel(student, seen.features, batch, clock)
            seen = student.observe_head(seen, batch, look)
        else:
            seen = student(batch, look)
        seen, taught = seen.float(), cast(T, None if taught is None else taught.float())
        with full_precision(batch.images.device):
            if self.requirements.assignment:
                seen = _with_assignment(student, seen, batch)
            supervised = self.supervise(student, seen, taught, batch)
        learned = self.learn(student, seen, taught, batch, clock)
        return Losses.merge([supervised, relabelled.as_distilled(), learned.as_distilled()])

    def _relabels(self) -> bool:
        return type(self).relabel is not Method.relabel

    def stages(self, student: Detector) -> tuple[Stage, ...]:
        """The stages of training; by default only ``distill``, which runs ``step`` and is always the last stage."""
        return (self.distill_stage(student, (student, self)),)

    def distill_stage(self, student: Detector, trains: Sequence[nn.Module]) -> Stage:
        """The last stage, ``distill``, in which the modules ``trains`` are trained."""
        return Stage(
            "distill",
            step=lambda batch, taught, clock: self.step(student, batch, taught, clock),
            trains=lambda clock: trains,
            evaluates=student,
            learns_from=self,
        )

    def teachers(self) -> tuple[Teacher, ...]:
        """All frozen teachers; the training loop moves them to its device."""
        return () if self._teacher is None else (self._teacher,)

    def looks(self) -> dict[Teacher, Look]:
        """The parts of each teacher's pass that ``teach`` requests."""
        return looks_of([self])


class TeacherFree(Method[T]):
    """A method without a teacher; it learns from labels or from networks of its own."""

    def __init__(self, teacher: Teacher | None, student: Detector) -> None:
        """Check the student. ``teacher`` is ignored; other methods of a composition may use it."""
        super().__init__(teacher, student)  # a teacher, if there is one, decides which other methods are recommended
        self._teacher = None

    @classmethod
    def needs(cls, **settings: Any) -> Needs:
        """Requirements on the student; no teacher is needed."""
        return Needs(teacher=None)


class Composition(Method[TaughtTogether]):
    """Several methods at once, such as ``fgd+pkd``. All losses are added; names of the terms begin with the method's slug.

    With named teachers (``pkd@a+pkd@b``) they begin with slug and name: ``pkd@a/...``.
    """

    slug = "composition"
    title = "several methods at once"
    bibtex = ""

    def __init__(self, methods: Sequence[Method[Any]], student: Detector, names: Sequence[str] = ()) -> None:
        """Combine methods.

        Args:
            methods: the methods.
            student: the detector that is trained.
            names: what the terms of each method begin with; none: the slugs.

        Raises:
            PairError: two methods replace the student's own loss or its targets, or a method is named twice (for one teacher).
        """
        super().__init__(None, student)
        slugs = list(names) or [method.slug for method in methods]
        if len(set(slugs)) < len(slugs):
            raise PairError(f"method {'+'.join(slugs)}: each method may be named once")
        self._supervisor = _only_one(methods, lambda method: type(method).supervise is not Method.supervise, "own loss")
        self._relabeler = _only_one(methods, lambda method: method._relabels(), "targets")
        named = dict(zip(slugs, methods, strict=True))
        self.parts = nn.ModuleDict(named)
        student_look = Look()
        for method in methods:
            student_look |= method.requirements.student
        self._teacher_looks = looks_of(methods)
        assignment = any(method.requirements.assignment for method in methods)
        self.requirements = replace(self.requirements, student=student_look, assignment=assignment)
        self.trains_alone = tuple(f"{slug}/{name}" for slug, method in named.items() for name in method.trains_alone)

    @classmethod
    def needs(cls, **settings: Any) -> Needs:
        """No requirements: each method has already checked its own."""
        return Needs(teacher=None)

    @property
    def methods(self) -> tuple[Method[Any], ...]:
        """The methods, in the order in which they were named."""
        return tuple(self.parts.values())  # type: ignore[arg-type]

    @property
    def members(self) -> tuple[str, ...]:
        """Slugs of the methods, with the name of a method's teacher if it has one; the names of their terms begin with them."""
        return tuple(self.parts)

    def look_at_teachers(self, batch: Batch) -> None:
        """Run each teacher once with everything that the methods request; their ``teach`` then reuses this pass."""
        for teacher, look in self._teacher_looks.items():
            teacher.observe(batch if batch.large is None else batch.large, look)

    def teach(self, batch: Batch) -> TaughtTogether:
        """The result of ``teach`` of each method, in order."""
        self.look_at_teachers(batch)
        return TaughtTogether(tuple(teach_in_view(method, batch) for method in self.methods))

    def learn(self, student: Detector, seen: Observation, taught: TaughtTogether, batch: Batch, clock: Clock) -> Losses:
        """The losses of all methods; names begin with ``<slug>/`` or ``<slug>@<teacher>/``."""
        all_three = zip(self.members, self.methods, taught.parts, strict=True)
        return Losses.merge([m.learn(student, seen, part, batch, clock).prefixed(name) for name, m, part in all_three])

    def supervise(self, student: Detector, seen: Observation, taught: TaughtTogether, batch: Batch) -> Losses:
        """``supervise`` of the method that overrides it, else the student's own loss."""
        if self._supervisor is None:
            return super().supervise(student, seen, taught, batch)
        return self.methods[self._supervisor].supervise(student, seen, taught.parts[self._supervisor], batch)

    def relabel(self, student: Detector, features: Features, batch: Batch, clock: Clock) -> tuple[Batch, Losses]:
        """``relabel`` of the method that overrides it."""
        assert self._relabeler is not None
        method = self.methods[self._relabeler]
        changed, losses = method.relabel(student, features, batch, clock)
        return changed, losses.prefixed(self.members[self._relabeler])

    def _relabels(self) -> bool:
        return self._relabeler is not None

    def stages(self, student: Detector) -> tuple[Stage, ...]:
        """The earlier stages of all methods, one after the other, then one last stage for all methods together."""
        earlier = [stage for method in self.methods for stage in method.stages(student)[:-1]]
        last = [method.stages(student)[-1] for method in self.methods]

        def trains(clock: Clock) -> Sequence[nn.Module]:
            return [module for stage in last for module in stage.trains(clock)]

        def before() -> None:
            for stage in last:
                if stage.before is not None:
                    stage.before()

        together = replace(self.distill_stage(student, ()), trains=trains)
        return (*earlier, replace(together, before=before) if any(stage.before for stage in last) else together)

    def teachers(self) -> tuple[Teacher, ...]:
        """The teachers of all methods, without duplicates."""
        return tuple(dict.fromkeys(teacher for method in self.methods for teacher in method.teachers()))

    def looks(self) -> dict[Teacher, Look]:
        """The parts of each teacher's pass that the methods request together."""
        return self._teacher_looks


def looks_of(methods: Sequence[Method[Any]]) -> dict[Teacher, Look]:
    """The parts of each teacher's pass that methods request together."""
    looks: dict[Teacher, Look] = {}
    for method in methods:
        if method._teacher is not None and method.requirements.teacher is not None:
            looks[method._teacher] = looks.get(method._teacher, Look()) | method.requirements.teacher
    return looks


@torch.no_grad()
def _with_assignment(student: Detector, seen: Observation, batch: Batch) -> Observation:
    """The student's pass with its own assignment."""
    assert seen.prediction is not None
    return replace(seen, assignment=student.assign(seen.prediction, batch))


def _only_one(methods: Sequence[Method[Any]], does: Callable[[Method[Any]], bool], what: str) -> int | None:
    """Index of the only method for which ``does`` is true; None if there is no such method.

    Raises:
        PairError: there are several.
    """
    found = [index for index, method in enumerate(methods) if does(method)]
    if len(found) > 1:
        names = " and ".join(methods[index].slug for index in found)
        raise PairError(f"{names} both replace the student's {what}; a composition can hold only one of them")
    return found[0] if found else None


def part_of(taught: Taught, root: Method[Any], member: Method[Any]) -> Taught | None:
    """The part of ``taught`` that belongs to ``member``, where ``taught`` was computed by ``root``.

    ``root`` is the composition that contains ``member``, or ``member`` itself; then the part is all of ``taught``.
    """
    if member is root:
        return taught
    assert isinstance(root, Composition)
    assert isinstance(taught, TaughtTogether)
    return taught.parts[root.methods.index(member)]


def teach_in_view(method: Method[Any], batch: Batch) -> Taught | None:
    """Run ``method.teach`` on a batch, or on ``batch.large`` if its result is the same in both views (``teaches_parts``)."""
    return cast(Taught | None, method.teach(batch.large if method.teaches_parts and batch.large is not None else batch))


def teach_by_canvas(method: Method[Any], batch: Batch) -> Taught | None:
    """Run ``method.teach`` on a batch, with each image padded as in a batch of its own.

    The result for an image then does not depend on the other images of the batch, so training from a cache and from the teacher
    itself give the same losses. With ``letterbox`` all padded sizes are equal, and the batch is used as it is.
    """
    groups = batch.by_canvas()
    if groups[0][1] is batch:
        return teach_in_view(method, batch)
    pieces: list[tuple[int, Taught]] = []
    for chosen, part in groups:
        taught = teach_in_view(method, part)
        if taught is None:
            return None
        pieces += zip(chosen, taught.split(len(part)), strict=True)
    ordered = [piece for _, piece in sorted(pieces, key=lambda pair: pair[0])]
    return type(ordered[0]).stack(ordered)
