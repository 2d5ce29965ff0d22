"""Settings of a run: typed, flat and checked. The module imports quickly; the command line is built from its classes."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from detdistill.errors import RunError, nearest
from detdistill.values import Count, Fraction, Index, Limits, Positive, Share, Weight, check


@dataclass(frozen=True)
class Effect:
    """Parts of the program that a setting affects; given in the setting's annotation."""

    run: bool = True
    """It affects the run: a run can be resumed only with the same value."""
    stage: bool = True
    """It affects the result of a method's earlier stage: only runs with the same value reuse that result."""
    views: bool = False
    """It affects how images are resized and augmented."""
    cache: bool = True
    """`detdistill cache` has this setting."""
    budget: bool = False
    """It belongs to the budget of a training: a comparison is fair only between runs with the same value."""

    def of_budget(self) -> Effect:
        """The same effect of a setting that belongs to the budget."""
        return dataclasses.replace(self, budget=True)


LEARNING = Effect()
OPTIMIZATION = Effect(budget=True)
"""Effect of the optimizer's settings, of the length in steps and of the precision."""
VIEWS = Effect(views=True, budget=True)
CHANCE = Effect(stage=False)
"""Effect of random seeds and of the machine: results of earlier stages are reused with other values. Also the effect of
``epochs``, because a stage's own length is compared instead."""
RUN_ONLY = Effect(stage=False, cache=False)
"""Effect of logging, saving and averaging: the run only."""
NOTHING = Effect(run=False, stage=False)
"""No effect on weights or measured numbers."""
NOTHING_FOR_CACHES = Effect(run=False, stage=False, cache=False)
"""No effect on weights or measured numbers, and no setting of `detdistill cache`."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How a detector is trained, alone or under a teacher.

    Args:
        epochs: passes over the training images.
        steps: optimizer steps; if given, this is the length of the training instead of ``epochs``.
        seed: random seed of weights, order of images and augmentation.
        init: start from the weights of a run folder, checkpoint, student folder, hf:... or torchvision:...; none: fresh weights.
        batch: images per step and process.
        accumulate: batches per optimizer step.
        optimizer: AdamW, or SGD with momentum 0.9.
        lr: peak learning rate.
        backbone_lr_factor: factor on ``lr`` for the backbone's weights; 0.1 is usual for DETRs with a pretrained backbone.
        weight_decay: not applied to biases and norms.
        schedule: one_cycle (torch's, 15 % warm-up), cosine, step (x0.1 at 2/3 and 11/12 of the run) or constant.
        warmup_steps: linear warm-up for cosine, step and constant.
        clip: largest norm of the gradient; 0 turns clipping off.
        ema: decay of an exponential moving average of the student, which is evaluated and exported instead of it; 0: off.
        precision: of the networks; bf16 and 16 are half precision. Losses are always computed in float32.
        channels_last: use the channels-last memory layout; faster for convolutions in half precision.
        device: auto, cpu or cuda.
        devices: processes (GPUs, or CPU processes) per node.
        nodes: number of machines; start the same command on each with torchrun or srun.
        strategy: ddp keeps all weights in each process; fsdp shares out weights, gradients and optimizer states (large models).
        sync_bn: batch norms use the statistics of the images of all processes, not only of their own.
        threads: torch threads of each process; 0: torch's default.
        workers: processes that load images; 0 loads in the training process.
        in_memory: keep decoded, resized images in memory (for small data sets).
        deterministic: forbid operations whose results differ from run to run.
        size: side of the detector's input images in pixels (short side for resize=short_side).
        resize: letterbox keeps the aspect and pads to a square; stretch changes it; short_side keeps it and pads in the batch.
        max_size: largest long side in pixels for resize=short_side.
        flip: probability of a horizontal flip.
        colour: strength of colour jitter, 0..1.
        hue: how colour jitter turns the hue: yiq by one matrix around the grey axis (fast), hsv in HSV (slow, as torchvision).
        scale_jitter: smallest and largest zoom, e.g. 0.5,1.5; none turns it off.
        scales: factors on the size of the resized image, one drawn for each image, e.g. 0.8,1,1.2; caches support them.
        mosaic: probability of combining four images into one.
        evaluate_every: epochs between evaluations; the last epoch is always evaluated.
        patience: stop after this many evaluations without a better AP; 0: train to the end.
        instability: number of validation images for measuring how much the matching of queries changes; 0: off.
        checkpoint_every: steps between further checkpoints within an epoch; 0: none.
        log_every: steps between rows of metrics.csv.
        monitor_every: steps between measurements of each loss term's share of the gradient; 0: never.
        track: further services to log to; their packages must be installed.
        strict: refuse data with defects instead of skipping them.
        rescan: read every file of the data, even if none has changed since they were last read.
        held_out: validate on this part of the training images, which are not trained on, instead of on the validation images.
        out: run folder, also at a URL (s3://...); none creates a new one under runs/.
        resume: continue the run in the folder ``out``.
        allow_changes: resume although the data or the teacher changed since the run started.
        report: write ``report.html`` at the end.
    """

    epochs: Annotated[Count, CHANCE.of_budget()] = 12
    steps: Annotated[Count | None, OPTIMIZATION] = None
    seed: Annotated[Index, CHANCE] = 0
    init: Annotated[str | None, RUN_ONLY] = None
    batch: Annotated[Count, OPTIMIZATION] = 16
    accumulate: Annotated[Count, OPTIMIZATION] = 1
    optimizer: Annotated[Literal["adamw", "sgd"], OPTIMIZATION] = "adamw"
    lr: Annotated[Positive, OPTIMIZATION] = 1e-3
    backbone_lr_factor: Annotated[Weight, OPTIMIZATION] = 1.0
    weight_decay: Annotated[Weight, OPTIMIZATION] = 0.01
    schedule: Annotated[Literal["one_cycle", "cosine", "step", "constant"], OPTIMIZATION] = "one_cycle"
    warmup_steps: Annotated[Index, OPTIMIZATION] = 0
    clip: Annotated[Weight, OPTIMIZATION] = 5.0
    ema: Annotated[float, Limits(0, 1, below=True), RUN_ONLY.of_budget()] = 0.0
    precision: Annotated[Literal["32", "bf16", "16"], OPTIMIZATION] = "32"
    channels_last: bool = False
    device: Annotated[Literal["auto", "cpu", "cuda"], CHANCE] = "auto"
    devices: Annotated[Count, CHANCE.of_budget()] = 1
    nodes: Annotated[Count, CHANCE.of_budget()] = 1
    strategy: Annotated[Literal["ddp", "fsdp"], RUN_ONLY] = "ddp"
    sync_bn: Annotated[bool, RUN_ONLY.of_budget()] = False
    threads: Annotated[Index, CHANCE] = 0
    workers: Annotated[Index, CHANCE] = 0
    in_memory: Annotated[bool, RUN_ONLY] = False
    deterministic: Annotated[bool, RUN_ONLY] = False
    size: Annotated[int, Limits(32), VIEWS] = 640
    resize: Annotated[Literal["letterbox", "stretch", "short_side"], VIEWS] = "letterbox"
    max_size: Annotated[Index | None, VIEWS] = None
    flip: Annotated[Fraction, VIEWS] = 0.5
    colour: Annotated[Fraction, VIEWS] = 0.0
    hue: Annotated[Literal["yiq", "hsv"], VIEWS] = "yiq"
    scale_jitter: Annotated[tuple[Positive, Positive] | None, VIEWS] = None
    scales: Annotated[tuple[Weight, ...], VIEWS] = ()
    mosaic: Annotated[Fraction, VIEWS] = 0.0
    evaluate_every: Annotated[Count, RUN_ONLY] = 1
    patience: Annotated[Index, RUN_ONLY] = 0
    instability: Annotated[Index, NOTHING_FOR_CACHES] = 0
    checkpoint_every: Annotated[Index, RUN_ONLY] = 0
    log_every: Annotated[Count, RUN_ONLY] = 10
    monitor_every: Annotated[Index, RUN_ONLY] = 200
    track: Annotated[tuple[Literal["wandb", "mlflow"], ...], RUN_ONLY] = ()
    strict: Annotated[bool, CHANCE] = False
    rescan: Annotated[bool, NOTHING] = False
    held_out: Annotated[Share | None, RUN_ONLY.of_budget()] = None
    out: Annotated[Path | None, NOTHING_FOR_CACHES] = None
    resume: Annotated[bool, NOTHING_FOR_CACHES] = False
    allow_changes: Annotated[bool, NOTHING_FOR_CACHES] = False
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
        balance: hold the distillation terms at this share of the student's gradient, e.g. 0.3; none: their weights stay fixed.
        inherit: before training, copy the teacher's neck and head weights whose names and shapes agree into the student.
        baseline: also train the student without a teacher, with the same seeds and schedule, and compare.
        seeds: run once for each of these seeds instead of for ``seed``.
        jobs: number of runs at the same time, each in its own process; on Ray, 1 is as many as the cluster has room for.
        on: where runs take place: local (this machine), ray (the cluster of this machine) or ray://HOST:10001.
        score_teacher: evaluate the teacher before training.
        other_classes: allow a teacher that lacks some classes of the data; enough for methods that compare features only.
        teacher_size: ``size`` of the images that the teacher sees, larger than ``size``; none: the same.
        unlabelled: what a teacher's boxes are where the labels lack the class (data joined by +): label, ignore or background.
        unlabelled_score: smallest score of such boxes.
        cache: folder or URL written by `detdistill cache`; the teacher is not run, and --teacher is optional.
        served: address of a teacher that `detdistill teach` serves, http://HOST:PORT; --teacher is optional.
        timeout: seconds for which the run waits for an answer of a served teacher.
        stages: folder for the results of methods' earlier stages, which later runs reuse.
    """

    method: str = "pkd"
    distill_weight: Weight = 1.0
    balance: Annotated[Share | None, RUN_ONLY] = None
    inherit: bool = False
    baseline: bool = False
    seeds: tuple[Index, ...] = ()
    jobs: Annotated[Count, NOTHING] = 1
    on: Annotated[str, NOTHING] = "local"
    score_teacher: Annotated[bool, NOTHING] = True
    other_classes: bool = False
    teacher_size: Annotated[int, Limits(32)] | None = None
    unlabelled: Literal["label", "ignore", "background"] = "label"
    unlabelled_score: Fraction = 0.3
    cache: str | None = None
    served: Annotated[str | None, NOTHING] = None
    timeout: Annotated[Positive, NOTHING] = 300.0
    stages: Annotated[str, NOTHING] = "runs/stages"

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            RunError: one line naming the setting, its value and what it may be.
        """
        super().__post_init__()
        check_on(self.on, self.nodes)
        if len(set(self.seeds)) < len(self.seeds):
            raise RunError(f"seeds: {','.join(map(str, self.seeds))} must be different whole numbers, 0 or more")
        if self.balance is not None and self.distill_weight == 0:
            raise RunError("balance: distill_weight is 0, so there is no distillation to balance; leave out one of them")
        if self.cache is not None and self.served is not None:
            raise RunError("served: the knowledge comes from one place; leave out --cache or --served")
        if self.held_out is not None and self.cache is not None:
            raise RunError("held_out: a cache holds all training images; leave out --cache or --held_out")
        if self.baseline and self.patience:
            raise RunError("patience: baseline and student would stop at different steps; leave out --patience or --baseline")


@dataclass(frozen=True, kw_only=True)
class CacheSettings(TrainSettings):
    """Cache of a teacher's outputs: image settings of the run, and number format.

    Args:
        method: one method or several joined by ``+``, as for ``distill``.
        store: number format; auto: the smallest, down to int8, that changes no loss on the probe images by more than 1 %.
        probe: number of images for the forecast and for the choice of the number format.
        dry_run: stop after the forecast.
        shard: largest number of records in a file; a killed process has to repeat at most this many.
        on: where the writers (as many as ``devices``) run: local (this machine), ray or ray://HOST:10001.
        other_classes: allow a teacher that lacks some classes of the data; enough for methods that compare features only.
        teacher_size: ``size`` of the images that the teacher sees, larger than ``size``; none: the same.
        stages: folder for the results of methods' earlier stages, which later runs reuse.
    """

    method: str = "pkd"
    store: Literal["auto", "float32", "float16", "bfloat16", "int8", "int6"] = "auto"
    probe: Count = 8
    dry_run: bool = False
    shard: Count = 256
    on: Annotated[str, NOTHING] = "local"
    other_classes: bool = False
    teacher_size: Annotated[int, Limits(32)] | None = None
    stages: Annotated[str, NOTHING] = "runs/stages"

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            RunError: one line naming the setting, its value and what it may be.
        """
        super().__post_init__()
        check_on(self.on, self.nodes)


def check_on(on: str, nodes: int) -> None:
    """Check where runs take place.

    Args:
        on: the setting ``on``.
        nodes: the setting ``nodes``.

    Raises:
        RunError: it is not ``local``, ``ray`` or ``ray://HOST:PORT``, or a run would need several nodes of a Ray cluster.
    """
    if on not in ("local", "ray") and not re.fullmatch(r"ray://[^/\s:@]+:\d{1,5}", on):
        hint = "" if on.startswith("ray:") else nearest(on, ("local", "ray"))
        raise RunError(f"on: {on!r} is not local, ray or ray://HOST:PORT{hint}")
    if on != "local" and nodes > 1:
        raise RunError("nodes: on Ray, a run has the devices of one node; leave out --nodes, or start it with torchrun or srun")


@dataclass(frozen=True, kw_only=True)
class TeachSettings(TrainSettings):
    """A served teacher: number format, queue, and views of the cache it writes.

    Args:
        method: one method or several joined by ``+``, as for ``distill``; students may use some of them.
        store: number format of what is sent, and written.
        batch: largest number of images in a pass of the teacher; images of several students share a pass.
        queue: largest number of questions that are worked on or wait; further ones are asked to come back.
        shard: largest number of records in a file of the cache; a killed process loses at most this many.
        other_classes: allow a teacher that lacks some classes of the data; enough for methods that compare features only.
        teacher_size: ``size`` of the images that the teacher sees, in the cache; none: the same.
        stages: folder for the results of methods' earlier stages, which later runs reuse.
    """

    method: str = "pkd"
    store: Literal["float32", "float16", "bfloat16", "int8", "int6"] = "float32"
    queue: Count = 8
    shard: Count = 256
    other_classes: bool = False
    teacher_size: Annotated[int, Limits(32)] | None = None
    stages: Annotated[str, NOTHING] = "runs/stages"


def effects(kind: type[TrainSettings]) -> Mapping[str, Effect]:
    """The ``Effect`` of each setting of one of the classes above, from its annotation."""
    hints = typing.get_type_hints(kind, include_extras=True)
    notes = {field.name: getattr(hints[field.name], "__metadata__", ()) for field in dataclasses.fields(kind)}
    return {name: next((note for note in given if isinstance(note, Effect)), LEARNING) for name, given in notes.items()}


def names_where(kind: type[TrainSettings], decides: str, yes: bool = True) -> tuple[str, ...]:
    """Names of the settings of a class for which a field of ``Effect`` has a given value.

    Args:
        kind: one of the classes above.
        decides: name of the field of ``Effect``.
        yes: the wanted value of the field.

    Example:
        >>> names_where(TrainSettings, "views")[:3]
        ('size', 'resize', 'max_size')
    """
    return tuple(name for name, effect in effects(kind).items() if getattr(effect, decides) == yes)


BUDGET = names_where(TrainSettings, "budget")
"""Settings that must agree for a comparison to be fair."""


RENAMED = {"dis": "distill_weight"}
"""New names of settings that were renamed, by their old names."""


def renamed(config: Mapping[str, Any]) -> dict[str, Any]:
    """A run's ``config.yaml`` with old names of settings replaced by the current ones."""
    return {RENAMED.get(key, key): value for key, value in config.items()}


def as_plain(settings: Any) -> dict[str, Any]:
    """The settings as plain values for YAML and JSON: paths become texts, tuples become lists."""

    def plain(value: Any) -> Any:
        if isinstance(value, Path):
            return str(value)
        if isinstance(value, tuple | list):
            return [plain(item) for item in value]
        return value

    return {field.name: plain(getattr(settings, field.name)) for field in dataclasses.fields(settings)}


SYNONYMS = {
    "amp": "precision", "batch_size": "batch", "bs": "batch", "checkpoint": "model", "conf": "score",
    "conf_thres": "score", "cos_lr": "schedule", "epoch": "epochs",
    "fliplr": "flip", "fp16": "precision",
    "grad_clip": "clip", "half": "precision", "hsv_h": "colour", "image_size": "size", "img": "size", "img_size": "size",
    "imgsz": "size", "input_size": "size", "learning_rate": "lr", "loss_weight": "distill_weight", "lr0": "lr",
    "max_epochs": "epochs", "max_steps": "steps", "momentum": "optimizer", "name": "out", "num_epochs": "epochs",
    "num_workers": "workers", "output": "out", "output_dir": "out", "pretrained": "model", "project": "out",
    "save_dir": "out", "source": "images", "wandb": "track", "warmup_epochs": "warmup_steps", "wd": "weight_decay",
    "weights": "model", "work_dir": "out", "yaml": "data",
}  # fmt: skip
"""Flags of other tools and words for the same thing, for suggestions; our name for each."""


def meant(name: str, known: Collection[str]) -> str:
    """`` (did you mean 'x'?)`` with our word for the word of another tool, or with the closest name; empty if there is none."""
    ours = SYNONYMS.get(name.replace("-", "_").lower())
    if ours == "model" and "init" in known:  # where a training may start from weights, these are meant
        ours = "init"
    if ours in known:
        return f" (did you mean {ours!r}?)"
    return "" if ours else nearest(name, known)  # a word whose meaning is known, and is none of these, has no near miss
