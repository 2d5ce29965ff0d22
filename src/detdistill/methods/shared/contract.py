"""What a distillation method is: teach (frozen, cacheable) and learn (everything that trains).

    taught = method.teach(batch)
    losses = method.learn(student, seen, taught, batch, clock)

The loop knows no method by name. A method is one file with a pure function and a subclass of ``Method``; the class's
constructor takes the teacher and the student, then its hyper-parameters as keyword arguments with the paper's defaults.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Generic, Self, TypeVar, cast

from torch import nn

from detdistill.detectors.contract import PREDICTION, Detector, Teacher
from detdistill.functional.precision import full_precision
from detdistill.methods.shared.hyper_parameters import checked_settings
from detdistill.methods.shared.needs import Needs, PairError, check_pair
from detdistill.structures import Batch, Clock, Features, Look, Losses, Observation, Taught, TaughtTogether

T = TypeVar("T", bound=Taught | None)
StageStep = Callable[[Batch, Any, Clock], Losses]
Source = Callable[["Method[Any]", Batch], Taught | None]
"""Where a step gets what a method is taught about a batch: from the teacher (``teach_by_canvas``) or from a cache."""


@dataclass(frozen=True)
class Stage:
    """A part of training. Most methods have one; UniKD, LabelEnc and DICOD train something of their own first."""

    name: str
    step: StageStep
    """A batch, what ``learns_from`` was taught about it, and the clock in; all losses out."""
    trains: Callable[[Clock], Sequence[nn.Module]]
    """Modules that get gradients at this moment; the rest of student and method is frozen."""
    evaluates: Detector | None
    """The detector whose AP is followed, or None."""
    learns_from: Method[Any] | None = None
    """The method whose ``teach`` the loop asks for each batch, online or from a cache; None: the step is given None."""
    share: float = 1.0
    """Length as a multiple of the run's ``epochs``, or of its ``steps`` when those are given."""
    depends_on: str = ""
    """Fingerprint of all its result depends on beside data and schedule; a finished stage with the same one is reused.
    Empty: never reused."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Training settings of this stage that differ from the run's: ``{"optimizer": "adamw", "lr": 2e-4}``."""
    before: Callable[[], None] | None = None
    """Called once when the stage starts, not when it is resumed: hands weights over from the stage before."""


class Method(nn.Module, Generic[T]):
    """One distillation method for one pair. ``T`` is what its ``teach`` returns.

    Trainable parts (adapters, attention) are submodules; the teacher is not, because ``Teacher`` is no module.
    """

    slug: ClassVar[str]
    """The method's name on the command line and its file's name."""
    title: ClassVar[str]
    """Title of the paper, with venue and year."""
    bibtex: ClassVar[str]
    """The text that ``detdistill cite`` prints."""
    teach_settings: ClassVar[tuple[str, ...] | None] = None
    """Names of the hyper-parameters that change what ``teach`` returns; only these enter a cache's identity.
    None: all, if the class overrides ``teach``; those that change ``needs``, if it inherits it."""
    settings: dict[str, Any]
    """Values of all hyper-parameters, checked against the types of the constructor before it runs."""

    def __new__(cls, *sides: Any, **given: Any) -> Self:
        """Check the hyper-parameters.

        Raises:
            MethodError: one is unknown, or its value is not of its type.
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
        """What the method asks of both sides.

        Args:
            settings: all hyper-parameters, by name.
        """
        return Needs()

    @property
    def teacher(self) -> Teacher:
        """The frozen teacher (an ``AssertionError`` in a method that has none)."""
        assert self._teacher is not None, f"{self.slug} has no teacher"
        return self._teacher

    def teach(self, batch: Batch) -> T:
        """What the teacher says about a batch: no gradient, depends on the batch and on frozen weights only.

        Plain per-image data, so it may come from a cache instead. Randomness is seeded by image id and view. By default the
        teacher is observed as ``needs`` says.
        """
        if self._teacher is None or self.requirements.teacher is None:
            return cast(T, None)
        return cast(T, self._teacher.observe(batch, self.requirements.teacher))

    def learn(self, student: Detector, seen: Observation, taught: T, batch: Batch, clock: Clock) -> Losses:
        """Losses that make the student (and this method's modules) follow what was taught.

        Runs in the precision of the caller, so that parts of the networks may be run again; ``seen`` and ``taught`` are
        float32. The arithmetic of losses belongs into ``with full_precision(batch.images.device)``.
        """
        raise TypeError(f"{type(self).__name__} must define learn()")

    def supervise(self, student: Detector, seen: Observation, taught: T, batch: Batch) -> Losses:
        """The student's own detection loss, in full precision. A composition holds at most one override."""
        assert seen.prediction is not None
        return student.loss(seen.prediction, batch)

    def relabel(self, student: Detector, features: Features, batch: Batch, clock: Clock) -> tuple[Batch, Losses]:
        """Other targets for the batch, chosen between the student's features and its prediction, and the losses of choosing.

        A composition holds at most one override.
        """
        return batch, Losses({})

    def step(self, student: Detector, batch: Batch, taught: T, clock: Clock) -> Losses:
        """One student pass, supervise, learn: the step of the stage ``distill``.

        The networks run in the caller's precision. The student's pass and ``taught`` are turned into float32.
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
            supervised = self.supervise(student, seen, taught, batch)
        learned = self.learn(student, seen, taught, batch, clock)
        return Losses.merge([supervised, relabelled.as_distilled(), learned.as_distilled()])

    def _relabels(self) -> bool:
        return type(self).relabel is not Method.relabel

    def stages(self, student: Detector) -> tuple[Stage, ...]:
        """By default one. The last stage is always ``step`` with the student: earlier stages are the method's own."""
        return (self.distill_stage(student, (student, self)),)

    def distill_stage(self, student: Detector, trains: Sequence[nn.Module]) -> Stage:
        """The last stage, in which some modules train."""
        return Stage(
            "distill",
            step=lambda batch, taught, clock: self.step(student, batch, taught, clock),
            trains=lambda clock: trains,
            evaluates=student,
            learns_from=self,
        )

    def teachers(self) -> tuple[Teacher, ...]:
        """All frozen teachers, for moving them to a device."""
        return () if self._teacher is None else (self._teacher,)


class TeacherFree(Method[T]):
    """A method without a teacher: labels, or networks of its own, take the teacher's place."""

    def __init__(self, teacher: Teacher | None, student: Detector) -> None:
        """Check the student; a teacher, which the other methods of a composition may have, is not looked at."""
        super().__init__(None, student)

    @classmethod
    def needs(cls, **settings: Any) -> Needs:
        """No teacher."""
        return Needs(teacher=None)


class Composition(Method[TaughtTogether]):
    """Several methods at once: ``fgd+pkd``. Their losses are added under their names."""

    slug = "composition"
    title = "several methods at once"
    bibtex = ""

    def __init__(self, methods: Sequence[Method[Any]], student: Detector) -> None:
        """Put methods together.

        Raises:
            PairError: two of them replace the student's own loss or its targets, or a method is named twice.
        """
        super().__init__(None, student)
        slugs = [method.slug for method in methods]
        if len(set(slugs)) < len(slugs):
            raise PairError(f"method {'+'.join(slugs)}: each method may be named once")
        self._supervisor = _only_one(methods, lambda method: type(method).supervise is not Method.supervise, "own loss")
        self._relabeler = _only_one(methods, lambda method: method._relabels(), "targets")
        self.parts = nn.ModuleDict(dict(zip(slugs, methods, strict=True)))
        student_look = Look()
        self._teacher_looks: dict[Teacher, Look] = {}
        for method in methods:
            student_look |= method.requirements.student
            if method._teacher is not None and method.requirements.teacher is not None:
                before = self._teacher_looks.get(method._teacher, Look())
                self._teacher_looks[method._teacher] = before | method.requirements.teacher
        self.requirements = replace(self.requirements, student=student_look)

    @classmethod
    def needs(cls, **settings: Any) -> Needs:
        """Each member has asked for itself."""
        return Needs(teacher=None)

    @property
    def methods(self) -> tuple[Method[Any], ...]:
        """In the order they were named."""
        return tuple(self.parts.values())  # type: ignore[arg-type]

    def look_at_teachers(self, batch: Batch) -> None:
        """One pass of each teacher that shows all that the members will look at."""
        for teacher, look in self._teacher_looks.items():
            teacher.observe(batch, look)

    def teach(self, batch: Batch) -> TaughtTogether:
        """What each method was taught, in order."""
        self.look_at_teachers(batch)
        return TaughtTogether(tuple(method.teach(batch) for method in self.methods))

    def learn(self, student: Detector, seen: Observation, taught: TaughtTogether, batch: Batch, clock: Clock) -> Losses:
        """All losses, each under ``<slug>/``."""
        pairs = zip(self.methods, taught.parts, strict=True)
        return Losses.merge([m.learn(student, seen, part, batch, clock).prefixed(m.slug) for m, part in pairs])

    def supervise(self, student: Detector, seen: Observation, taught: TaughtTogether, batch: Batch) -> Losses:
        """The override of the one method that has one, else the student's own loss."""
        if self._supervisor is None:
            return super().supervise(student, seen, taught, batch)
        return self.methods[self._supervisor].supervise(student, seen, taught.parts[self._supervisor], batch)

    def relabel(self, student: Detector, features: Features, batch: Batch, clock: Clock) -> tuple[Batch, Losses]:
        """That of the one method that has one."""
        assert self._relabeler is not None
        method = self.methods[self._relabeler]
        changed, losses = method.relabel(student, features, batch, clock)
        return changed, losses.prefixed(method.slug)

    def _relabels(self) -> bool:
        return self._relabeler is not None

    def stages(self, student: Detector) -> tuple[Stage, ...]:
        """The methods' own earlier stages, one after the other, then everybody's last stage together."""
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
        """Of all methods, each once."""
        return tuple(dict.fromkeys(teacher for method in self.methods for teacher in method.teachers()))


def _only_one(methods: Sequence[Method[Any]], does: Callable[[Method[Any]], bool], what: str) -> int | None:
    """Index of the only method that replaces something of the student's; None: no method does.

    Raises:
        PairError: several do.
    """
    found = [index for index, method in enumerate(methods) if does(method)]
    if len(found) > 1:
        names = " and ".join(methods[index].slug for index in found)
        raise PairError(f"{names} both replace the student's {what}; a composition can hold only one of them")
    return found[0] if found else None


def part_of(taught: Taught, root: Method[Any], member: Method[Any]) -> Taught | None:
    """What one method was taught, of what the whole composition ``root`` was taught; all of it where they are one."""
    if member is root:
        return taught
    assert isinstance(root, Composition)
    assert isinstance(taught, TaughtTogether)
    return taught.parts[root.methods.index(member)]


def teach_by_canvas(method: Method[Any], batch: Batch) -> Taught | None:
    """What a method is taught about a batch, each image on the canvas that it has in a batch of its own.

    The knowledge about an image then does not depend on the others of its batch, so online and offline training learn the
    same. With ``letterbox`` all canvases are equal.
    """
    groups = batch.by_canvas()
    if len(groups) == 1 and groups[0][1] is batch:
        return cast(Taught | None, method.teach(batch))
    pieces: list[tuple[int, Taught]] = []
    for chosen, part in groups:
        taught = method.teach(part)
        if taught is None:
            return None
        pieces += zip(chosen, taught.split(len(part)), strict=True)
    ordered = [piece for _, piece in sorted(pieces, key=lambda pair: pair[0])]
    return type(ordered[0]).stack(ordered)
