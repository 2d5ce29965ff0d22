"""The settings of a run: typed, flat, checked, and light to import (the command line is built from these classes)."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from detdistill.errors import RunError, nearest


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How a detector is trained, alone or under a teacher.

    Args:
        epochs: passes over the training images.
        steps: optimizer steps; when given, training ends there instead of after ``epochs``.
        seed: of weights, order and augmentation.
        batch: images per step and process.
        accumulate: batches per optimizer step.
        optimizer: AdamW, or SGD with momentum 0.9.
        lr: peak learning rate.
        backbone_lr_factor: times ``lr``, for the backbone's weights; DETRs from pretrained backbones take 0.1.
        weight_decay: not applied to biases and norms.
        schedule: one_cycle (torch's, 15 % warm-up), cosine, step (x0.1 at 2/3 and 11/12 of the run) or constant.
        warmup_steps: linear warm-up for cosine, step and constant.
        clip: largest norm of the gradient; 0 turns clipping off.
        ema: decay of an exponential moving average of the student, which is then what is evaluated and exported; 0: off.
        precision: bf16 or 16 compute the networks in half precision; losses stay in float32.
        channels_last: memory layout; faster for convolutions in half precision.
        device: auto, cpu or cuda.
        devices: processes (GPUs, or CPU processes) per node.
        nodes: number of machines; start the same command on each with torchrun's environment variables.
        threads: torch threads of each process; 0 leaves torch's choice.
        workers: processes that load images; 0 loads in the training process.
        in_memory: keep decoded, resized images in memory (small sets).
        deterministic: forbid operations that differ from run to run.
        size: side of the images the detector sees (short side for resize=short_side).
        resize: letterbox keeps the aspect and pads, stretch does not, short_side keeps it and pads in the batch.
        max_size: longest side for resize=short_side.
        flip: probability of a horizontal flip.
        colour: strength of colour jitter, 0..1.
        scale_jitter: smallest and largest zoom, e.g. 0.5,1.5; none turns it off.
        scales: factors on the resized image, e.g. 0.8,1,1.2, one of which is drawn for each image; a cache can hold these.
        mosaic: probability of putting four images into one.
        evaluate_every: epochs between evaluations; the last epoch is always evaluated.
        instability: validation images on which changes of the queries' matching are counted at each evaluation; 0: off.
        checkpoint_every: steps between checkpoints beside the one of each epoch; 0: none.
        log_every: steps between rows of metrics.csv.
        monitor_every: steps between measurements of each loss term's share of the gradient; 0: never.
        track: also log to these services, which must be installed.
        strict: refuse data with defects instead of skipping them.
        out: run folder; none makes a new one under runs/.
        resume: go on with the run folder ``out``.
        report: write ``report.html`` at the end.
    """

    epochs: int = 12
    steps: int | None = None
    seed: int = 0
    batch: int = 16
    accumulate: int = 1
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = 1e-3
    backbone_lr_factor: float = 1.0
    weight_decay: float = 0.01
    schedule: Literal["one_cycle", "cosine", "step", "constant"] = "one_cycle"
    warmup_steps: int = 0
    clip: float = 5.0
    ema: float = 0.0
    precision: Literal["32", "bf16", "16"] = "32"
    channels_last: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    devices: int = 1
    nodes: int = 1
    threads: int = 0
    workers: int = 0
    in_memory: bool = False
    deterministic: bool = False
    size: int = 640
    resize: Literal["letterbox", "stretch", "short_side"] = "letterbox"
    max_size: int | None = None
    flip: float = 0.5
    colour: float = 0.0
    scale_jitter: tuple[float, float] | None = None
    scales: tuple[float, ...] = ()
    mosaic: float = 0.0
    evaluate_every: int = 1
    instability: int = 0
    checkpoint_every: int = 0
    log_every: int = 10
    monitor_every: int = 200
    track: tuple[Literal["wandb", "mlflow"], ...] = ()
    strict: bool = False
    out: Path | None = None
    resume: bool = False
    report: bool = True

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            RunError: one line naming the setting, its value and what it may be.
        """
        kinds = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):
                value = tuple(value)
                object.__setattr__(self, field.name, value)
            _check_kind(field.name, value, kinds[field.name])
            if isinstance(value, float) and not math.isfinite(value):
                raise RunError(f"{field.name}: {value} is not a number that training can use")
            if isinstance(value, int | float) and not isinstance(value, bool) and value < 0:
                raise RunError(f"{field.name}: {value} is negative; it must be {_LOWEST.get(field.name, 0)} or more")
            if field.name in _LOWEST and value is not None and value < _LOWEST[field.name]:
                raise RunError(f"{field.name}: {value} is too small; it must be {_LOWEST[field.name]} or more")
        if self.lr == 0:
            raise RunError("lr: 0 would train nothing; give a positive learning rate")
        for name in ("flip", "colour", "mosaic", "ema"):
            if getattr(self, name) > 1:
                raise RunError(f"{name}: {getattr(self, name)} must lie between 0 and 1")
        if self.ema == 1:
            raise RunError("ema: 1 would never change the average; use e.g. 0.999")
        if self.scale_jitter is not None:
            low, high = self.scale_jitter
            if not (0 < low <= high < math.inf):
                raise RunError(f"scale_jitter: {low},{high} must be two positive numbers, smaller first")


_LOWEST = {"size": 32} | dict.fromkeys(
    ("epochs", "steps", "batch", "accumulate", "devices", "nodes", "evaluate_every", "log_every", "jobs", "probe", "shard"), 1
)


@dataclass(frozen=True, kw_only=True)
class DistillSettings(TrainSettings):
    """A training run with a teacher.

    Args:
        method: one method or several joined by ``+``, each with its own settings after commas: ``fgd,temperature=0.8+pkd``.
        dis: factor on all distillation losses together.
        inherit: copy the teacher's neck and head into the student where names and shapes agree, before training.
        baseline: also train the student alone, same seeds and schedule, and compare.
        seeds: run once for each of these seeds instead of ``seed`` alone.
        jobs: runs at a time; each is a process of its own.
        score_teacher: evaluate the teacher before anything is trained.
        other_classes: the teacher may know other classes than the data has; methods on features do not mind.
        cache: folder or URL that `detdistill cache` filled; the teacher is not run, and need not be named.
        stages: where results of methods' own earlier stages are kept, to be used again by runs they fit.
    """

    method: str = "pkd"
    dis: float = 1.0
    inherit: bool = False
    baseline: bool = False
    seeds: tuple[int, ...] = ()
    jobs: int = 1
    score_teacher: bool = True
    other_classes: bool = False
    cache: str | None = None
    stages: str = "runs/stages"

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            RunError: one line naming the setting, its value and what it may be.
        """
        super().__post_init__()
        if len(set(self.seeds)) < len(self.seeds) or any(seed < 0 for seed in self.seeds):
            raise RunError(f"seeds: {','.join(map(str, self.seeds))} must be different whole numbers, 0 or more")


@dataclass(frozen=True, kw_only=True)
class CacheSettings(TrainSettings):
    """How the teacher's answers are cached: a run's image settings, and the store.

    Args:
        method: one method or several joined by ``+``, as for ``distill``.
        store: what numbers are kept as; auto: the smallest down to int8 that changes no loss of the probe by more than 1 %.
        probe: images that forecast and choice are made from.
        dry_run: stop after the forecast.
        shard: most records of one file; what a killed process has to do again.
        other_classes: the teacher may know other classes than the data has; methods on features do not mind.
        stages: where results of methods' own earlier stages are kept, to be used again by runs they fit.
    """

    method: str = "pkd"
    store: Literal["auto", "float32", "float16", "bfloat16", "int8", "int6"] = "auto"
    probe: int = 8
    dry_run: bool = False
    shard: int = 256
    other_classes: bool = False
    stages: str = "runs/stages"


def _check_kind(name: str, value: Any, kind: Any) -> None:
    """Whether a value is of its field's type; the command line has seen to it, a call from Python has not.

    Raises:
        RunError: it is not.
    """
    if not any(_fits(value, member) for member in _members(kind)):
        raise RunError(f"{name}: {value!r} is not {in_words(kind)}{nearest(str(value), choices(kind))}")


def _fits(value: Any, kind: Any) -> bool:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return value in inner
    if origin is tuple:
        items = inner[:1] * len(value) if isinstance(value, tuple) and inner[-1] is Ellipsis else inner
        return isinstance(value, tuple) and len(value) == len(items) and all(map(_fits, value, items))
    if kind in (int, float):
        return isinstance(value, kind | int) and not isinstance(value, bool)
    return isinstance(value, kind)


def _members(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)


def choices(kind: Any) -> list[str]:
    """The words that a type allows, if it is made of words."""
    return [
        word
        for member in _members(kind)
        for part in (typing.get_args(member)[:1] if typing.get_origin(member) is tuple else (member,))
        if typing.get_origin(part) is Literal
        for word in typing.get_args(part)
    ]


def in_words(kind: Any) -> str:
    """How an error names a type, after ``is not``."""

    def name(member: Any) -> str:
        if typing.get_origin(member) is Literal:
            return f"one of {', '.join(typing.get_args(member))}"
        if typing.get_origin(member) is tuple:
            first, last = typing.get_args(member)
            return f"a list, each {name(first)}" if last is Ellipsis else "two numbers"
        words = {
            int: "a whole number",
            float: "a number",
            bool: "true or false",
            Path: "a path",
            type(None): "none",
            str: "a text",
        }
        return words.get(member, str(member))

    return " or ".join(map(name, _members(kind)))


NOT_THE_RUN = ("out", "resume", "report", "jobs", "score_teacher", "stages", "instability")
"""Settings that decide nothing about what is trained: a run may be resumed with others."""


def as_plain(settings: Any) -> dict[str, Any]:
    """The settings as YAML and JSON can hold them."""

    def plain(value: Any) -> Any:
        if isinstance(value, Path):
            return str(value)
        if isinstance(value, tuple | list):
            return [plain(item) for item in value]
        return value

    return {field.name: plain(getattr(settings, field.name)) for field in dataclasses.fields(settings)}
