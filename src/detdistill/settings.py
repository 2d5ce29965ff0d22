"""The settings of a run: typed, flat, checked, and light to import (the command line is built from these classes)."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from detdistill.errors import RunError
from detdistill.values import Count, Fraction, Index, Limits, Positive, Weight, check


@dataclass(frozen=True)
class Effect:
    """What a setting decides; it stands in the setting's annotation."""

    run: bool = True
    """What the run does: a run can be resumed with no other value."""
    stage: bool = True
    """What an earlier stage of a method learns: its result serves runs with other values if this is False."""
    views: bool = False
    """How images are made."""
    cache: bool = True
    """Something that `detdistill cache` does."""


LEARNING = Effect()
VIEWS = Effect(views=True)
CHANCE = Effect(stage=False)
"""The run is another one, but not in kind: its random numbers, the machine it uses."""
RUN_ONLY = Effect(stage=False, cache=False)
"""Watching, saving, averaging: of the run alone."""
NOTHING = Effect(run=False, stage=False)
"""Neither weights nor numbers."""
NOTHING_FOR_CACHES = Effect(run=False, stage=False, cache=False)


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

    epochs: Annotated[Count, CHANCE] = 12
    steps: Count | None = None
    seed: Annotated[Index, CHANCE] = 0
    batch: Count = 16
    accumulate: Count = 1
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: Positive = 1e-3
    backbone_lr_factor: Weight = 1.0
    weight_decay: Weight = 0.01
    schedule: Literal["one_cycle", "cosine", "step", "constant"] = "one_cycle"
    warmup_steps: Index = 0
    clip: Weight = 5.0
    ema: Annotated[float, Limits(0, 1, below=True), RUN_ONLY] = 0.0
    precision: Literal["32", "bf16", "16"] = "32"
    channels_last: bool = False
    device: Annotated[Literal["auto", "cpu", "cuda"], CHANCE] = "auto"
    devices: Annotated[Count, CHANCE] = 1
    nodes: Annotated[Count, CHANCE] = 1
    threads: Annotated[Index, CHANCE] = 0
    workers: Annotated[Index, CHANCE] = 0
    in_memory: Annotated[bool, RUN_ONLY] = False
    deterministic: Annotated[bool, RUN_ONLY] = False
    size: Annotated[int, Limits(32), VIEWS] = 640
    resize: Annotated[Literal["letterbox", "stretch", "short_side"], VIEWS] = "letterbox"
    max_size: Annotated[Index | None, VIEWS] = None
    flip: Annotated[Fraction, VIEWS] = 0.5
    colour: Annotated[Fraction, VIEWS] = 0.0
    scale_jitter: Annotated[tuple[Positive, Positive] | None, VIEWS] = None
    scales: Annotated[tuple[Weight, ...], VIEWS] = ()
    mosaic: Annotated[Fraction, VIEWS] = 0.0
    evaluate_every: Annotated[Count, RUN_ONLY] = 1
    instability: Annotated[Index, NOTHING_FOR_CACHES] = 0
    checkpoint_every: Annotated[Index, RUN_ONLY] = 0
    log_every: Annotated[Count, RUN_ONLY] = 10
    monitor_every: Annotated[Index, RUN_ONLY] = 200
    track: Annotated[tuple[Literal["wandb", "mlflow"], ...], RUN_ONLY] = ()
    strict: Annotated[bool, CHANCE] = False
    out: Annotated[Path | None, NOTHING_FOR_CACHES] = None
    resume: Annotated[bool, NOTHING_FOR_CACHES] = False
    report: Annotated[bool, NOTHING_FOR_CACHES] = True

    def __post_init__(self) -> None:
        """Check every value by its type.

        Raises:
            RunError: one line naming the setting, its value and what it may be.
        """
        kinds = typing.get_type_hints(type(self), include_extras=True)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            try:
                object.__setattr__(self, field.name, check(kinds[field.name], value))
            except ValueError as error:
                raise RunError(f"{field.name}: {value!r} {error}") from error
        if self.scale_jitter is not None and self.scale_jitter[0] > self.scale_jitter[1]:
            raise RunError(f"scale_jitter: {self.scale_jitter[0]},{self.scale_jitter[1]} must be two numbers, smaller first")


@dataclass(frozen=True, kw_only=True)
class DistillSettings(TrainSettings):
    """A training run with a teacher.

    Args:
        method: one method or several joined by ``+``, each with its own settings after commas: ``fgd,temperature=0.8+pkd``.
        distill_weight: factor on all distillation losses together.
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
    distill_weight: Weight = 1.0
    inherit: bool = False
    baseline: bool = False
    seeds: tuple[Index, ...] = ()
    jobs: Annotated[Count, NOTHING] = 1
    score_teacher: Annotated[bool, NOTHING] = True
    other_classes: bool = False
    cache: str | None = None
    stages: Annotated[str, NOTHING] = "runs/stages"

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            RunError: one line naming the setting, its value and what it may be.
        """
        super().__post_init__()
        if len(set(self.seeds)) < len(self.seeds):
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
    probe: Count = 8
    dry_run: bool = False
    shard: Count = 256
    other_classes: bool = False
    stages: Annotated[str, NOTHING] = "runs/stages"


def effects(kind: type[TrainSettings]) -> Mapping[str, Effect]:
    """What each setting of one of the classes above decides, by its annotation."""
    hints = typing.get_type_hints(kind, include_extras=True)
    notes = {field.name: getattr(hints[field.name], "__metadata__", ()) for field in dataclasses.fields(kind)}
    return {name: next((note for note in given if isinstance(note, Effect)), LEARNING) for name, given in notes.items()}


def names_where(kind: type[TrainSettings], decides: str, yes: bool = True) -> tuple[str, ...]:
    """Settings of a class that decide something (a field of ``Effect``), or that do not.

    Example:
        >>> names_where(TrainSettings, "views")[:3]
        ('size', 'resize', 'max_size')
    """
    return tuple(name for name, effect in effects(kind).items() if getattr(effect, decides) == yes)


RENAMED = {"dis": "distill_weight"}
"""Settings that had another name in earlier versions: the old name, and the new one."""


def renamed(config: Mapping[str, Any]) -> dict[str, Any]:
    """A run's ``config.yaml`` with today's names."""
    return {RENAMED.get(key, key): value for key, value in config.items()}


def as_plain(settings: Any) -> dict[str, Any]:
    """The settings as YAML and JSON can hold them."""

    def plain(value: Any) -> Any:
        if isinstance(value, Path):
            return str(value)
        if isinstance(value, tuple | list):
            return [plain(item) for item in value]
        return value

    return {field.name: plain(getattr(settings, field.name)) for field in dataclasses.fields(settings)}
