"""One run: build, train stage by stage, evaluate, export, and write down what came out."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import signal
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities.exceptions import SIGTERMException
from safetensors import SafetensorError
from torch import Tensor

from detdistill.cache.knowledge import KnowledgeCache
from detdistill.cache.storage import storage
from detdistill.data.loader import DetectionLoader
from detdistill.data.records import DataSplits, DetectionSet
from detdistill.data.transforms import ViewSettings
from detdistill.detectors.build import build_detector
from detdistill.detectors.contract import Detector, Teacher
from detdistill.detectors.inherit import inherit_head
from detdistill.detectors.load import load_detector
from detdistill.detectors.save import save_student
from detdistill.errors import RunError
from detdistill.evaluation import Scores, evaluate
from detdistill.evaluation.instability import check_queries, first_images, index_vectors
from detdistill.methods.shared.compose import build_method
from detdistill.methods.shared.contract import Method, Source, Stage, teach_by_canvas
from detdistill.progress import Progress
from detdistill.settings import NOT_THE_RUN, DistillSettings, TrainSettings, as_plain
from detdistill.structures import Batch, Clock, Losses
from detdistill.training.bar import TrainingBar
from detdistill.training.callbacks import Checkpoints, Evaluation, Records
from detdistill.training.folder import RunFolder, new_folder, resume_folder, start_folder
from detdistill.training.from_cache import open_cache, stage_from_cache
from detdistill.training.machine import check_machine, hardware, is_main_process, seed_everything, versions
from detdistill.training.matching_instability import MatchingInstability
from detdistill.training.metrics_table import MetricsTable, idle_terms, read_rows
from detdistill.training.module import StageModule
from detdistill.training.stage_results import load_result, reusable, save_result, stage_file, stage_length

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)


@dataclass(frozen=True)
class Plan:
    """All that decides a run."""

    student: str
    data: str
    settings: TrainSettings
    role: str = "train"
    """train, teacher, baseline or distilled: what reports call it."""
    teacher: str | None = None
    title: str = ""
    """What the progress bar calls it."""

    @property
    def distilling(self) -> DistillSettings | None:
        """The settings of a distilled run, under a teacher, what one said, or a method that needs none."""
        known = self.teacher is not None or self.role == "distilled"
        return self.settings if isinstance(self.settings, DistillSettings) and (known or self.settings.cache) else None

    def config(self) -> dict[str, Any]:
        """What ``config.yaml`` holds: the arguments of ``detdistill train`` or ``detdistill distill``, all of them."""
        if self.distilling is None:
            plain = as_plain(self.settings)
            plain = {name: plain[name] for name in as_plain(TrainSettings())}
            return {"model": self.student, "data": self.data, "role": self.role, **plain}
        return {"teacher": self.teacher, "student": self.student, "data": self.data, **as_plain(self.settings)}


@dataclass(frozen=True)
class Run:
    """A finished run."""

    folder: Path
    summary: dict[str, Any]
    scores: Scores
    student: Detector = field(repr=False)


def view_settings(settings: TrainSettings, **changes: Any) -> ViewSettings:
    """How this run makes images."""
    names = ("size", "resize", "max_size", "flip", "colour", "scale_jitter", "scales", "mosaic")
    return ViewSettings(**{**{name: getattr(settings, name) for name in names}, **changes})


def run(plan: Plan, splits: DataSplits, teacher: Teacher | None = None, progress: Progress | None = None) -> Run:
    """Carry out a plan.

    Args:
        plan: what to do.
        splits: the data of ``plan.data``, loaded.
        teacher: the loaded teacher of a distilled run; with a cache, only where the method needs it; none for methods without.
        progress: where to show it.

    Raises:
        RunError: the folder exists, nothing to resume, disk full, a cache that does not fit, or a loss that is not finite.
        PairError: teacher, student and method cannot work together.
        ModelError: a model cannot be built.
    """
    settings = plan.settings
    check_machine(settings)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    if progress is None:
        progress = Progress(quiet=not is_main_process())
    path = settings.out if settings.resume else _folder_for(plan)
    if settings.resume and (done := _finished(plan)) is not None:
        progress.say(f"{done.folder} is finished; nothing to resume")
        return done
    seed_everything(settings.seed)
    student = build_detector(plan.student, splits.train.classes)
    if settings.instability:
        check_queries(student)
    method = None
    inherited = None
    cache = None
    if plan.distilling is not None:
        if plan.distilling.cache is not None:
            cache = open_cache(plan.distilling.cache, plan.distilling.method, splits, view_settings(settings), teacher)
            teacher = teacher or cache.teacher()
        if plan.distilling.inherit:
            assert teacher is not None
            inherited = inherit_head(student, teacher.detector)
            progress.say(
                f"inherited {len(inherited.copied)} tensors of the teacher's neck and head, skipped {len(inherited.skipped)}"
            )
            if not inherited.copied:
                raise RunError(f"inherit: nothing of {teacher.spec.name} fits {student.spec.name}; leave out --inherit")
        method = build_method(plan.distilling.method, teacher, student)
    # Both sides of a comparison draw the same numbers from here on, whatever the method drew to initialise itself.
    seed_everything(settings.seed)
    folder = _open(plan, path)
    stages = method.stages(student) if method is not None else (plain_stage(student),)
    loop = _Loop(plan, splits, folder, student, method, progress, cache)
    for index, stage in enumerate(stages):
        loop.fit(stage, done_before=[earlier.name for earlier in stages[:index]])
    return loop.finish(teacher, inherited)


def prepare(plan: Plan, splits: DataSplits, student: Detector, method: Method, progress: Progress) -> tuple[Stage, ...]:
    """Train, or find, the earlier stages that what a method is taught depends on: before a cache is filled.

    Args:
        plan: with the settings of a run; its run folder is made only if something must be trained.
        splits: the data.
        student: any detector that the method was built with.
        method: its modules hold the results afterwards.
        progress: where to show it.

    Returns:
        The stages whose results it holds now.

    Raises:
        RunError: as ``run``; or several processes were started, of which each would train a stage for itself.
    """
    found = tuple(stage for stage in method.stages(student)[:-1] if reusable(stage, method))
    assert isinstance(plan.settings, DistillSettings)
    loop = None
    for index, stage in enumerate(found):
        if _found_result(stage, dataclasses.replace(plan.settings, **stage.overrides), splits, method, progress):
            continue
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise RunError(f"stage {stage.name} is not trained yet; first run this once in one process, with --dry_run true")
        if loop is None:
            seed_everything(plan.settings.seed)
            folder = start_folder(new_folder(plan.settings.out, f"{plan.role}-{method.slug}"), plan.config())
            loop = _Loop(plan, splits, folder, student, method, progress, None)
        loop.fit(stage, done_before=[earlier.name for earlier in found[:index]])
    return found


def _found_result(
    stage: Stage,
    settings: DistillSettings,
    splits: DataSplits,
    method: Method,
    progress: Progress,
    cache: KnowledgeCache | None = None,
) -> bool:
    """Whether an earlier run (or the cache) had the result of a stage; then it is in the method now."""
    if cache is not None and stage_from_cache(cache, stage, method):
        progress.say(f"stage {stage.name}: taken from the cache")
        return True
    folder, name = storage(settings.stages), stage_file(stage, settings, splits.train.fingerprint)
    if not load_result(folder, name, stage):
        return False
    progress.say(f"stage {stage.name}: trained before, taken from {folder.url}/{name}")
    return True


def _finished(plan: Plan) -> Run | None:
    """What a run that needs no resuming left."""
    folder = resume_folder(plan.settings.out, plan.config())
    if not (folder.path / "summary.json").exists():
        return None
    summary = json.loads((folder.path / "summary.json").read_text())
    scores = Scores(
        summary["metrics"],
        summary["per_class"],
        summary["data"]["val_images"],
        seconds=summary["evaluation_seconds"],
        errors=summary.get("errors") or {},
    )
    return Run(folder.path, summary, scores, load_detector(folder.path))


def plain_stage(student: Detector) -> Stage:
    """Training without a teacher."""

    def step(batch: Batch, taught: None, clock: Clock) -> Losses:
        seen = student(batch)
        with torch.autocast(batch.images.device.type, enabled=False):
            seen = seen.float()
            assert seen.prediction is not None
            return student.loss(seen.prediction, batch)

    return Stage("train", step, lambda clock: (student,), student)


def _folder_for(plan: Plan) -> Path:
    name = f"{plan.role}-{plan.student.split(',')[0].replace(':', '-').replace('/', '-')}-seed{plan.settings.seed}"
    if "WORLD_SIZE" in os.environ and int(os.environ["WORLD_SIZE"]) > 1 and plan.settings.out is None:
        told = os.environ.get("DETDISTILL_OUT")
        if told is None:
            raise RunError("several processes need one folder: give --out")
        return Path(told)
    if not is_main_process():
        assert plan.settings.out is not None
        return plan.settings.out
    path = new_folder(plan.settings.out, name)
    os.environ["DETDISTILL_OUT"] = str(path)
    return path


def _open(plan: Plan, path: Path | None) -> RunFolder:
    config = plan.config()
    if plan.settings.resume:
        return resume_folder(path, config)
    assert path is not None
    if not is_main_process():
        return RunFolder(path)
    return start_folder(path, config)


class _Loop:
    """The stages of one run, one after the other, in one folder."""

    def __init__(
        self,
        plan: Plan,
        splits: DataSplits,
        folder: RunFolder,
        student: Detector,
        method: Method | None,
        progress: Progress,
        cache: KnowledgeCache | None = None,
    ) -> None:
        self.cache = cache
        self.source: Source = teach_by_canvas
        if cache is not None and method is not None and plan.distilling is not None:
            self.source = cache.source(plan.distilling.method, method)
        self.plan, self.splits, self.folder, self.student, self.method = plan, splits, folder, student, method
        self.settings, self.progress = plan.settings, progress
        self.validation: DetectionLoader | None = None
        self.matched: DetectionLoader | None = None
        self.trained_steps = self.images_seen = 0
        self.seconds = 0.0
        self.module: StageModule | None = None
        self.evaluation: Evaluation | None = None
        self.resume_stage, self.resume_step = self._checkpoint()
        self.table: MetricsTable | None = None

    def _checkpoint(self) -> tuple[str | None, int]:
        """Stage and step of ``last.ckpt``, if this run goes on from there."""
        path = self.folder.checkpoints / "last.ckpt"
        if not self.settings.resume or not path.exists():
            return None, 0
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            return content["detdistill"]["stage"], int(content["global_step"])
        except Exception as error:  # torch raises pickle's, zip's and its own
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise RunError(f"cannot resume from {path}: {reason}; put best.ckpt in its place, or start anew") from error

    def loader(self, data: DetectionSet, train: bool, rank: int, world: int) -> DetectionLoader:
        settings = self.settings
        return DetectionLoader(
            data,
            view_settings(settings, masks=train and self.student.spec.needs_masks),
            settings.batch,
            train=train,
            seed=settings.seed,
            rank=rank,
            world=world,
            workers=settings.workers,
            in_memory=settings.in_memory,
        )

    def evaluate(self, detector: Detector) -> Scores:
        if self.validation is None:
            assert self.module is not None
            trainer = self.module.trainer
            self.validation = self.loader(self.splits.val, False, trainer.global_rank, trainer.world_size)
        # Errors by kind take about a tenth of the scoring again, and only the last are read.
        last = self.module is not None and self.module.trainer.global_step >= self.module.total
        return evaluate(detector, self.splits.val, view_settings(self.settings), loader=self.validation, errors=last)

    def index_vectors(self, detector: Detector) -> Tensor:
        if self.matched is None:
            self.matched = self.loader(first_images(self.splits.val, self.settings.instability), False, 0, 1)
        return index_vectors(detector, self.matched.data, self.matched.settings, loader=self.matched)

    def fit(self, stage: Stage, done_before: list[str]) -> None:
        """Train one stage, or skip it when the checkpoint shows it finished, or an earlier run has its result."""
        settings = dataclasses.replace(self.settings, **stage.overrides)
        if isinstance(settings, DistillSettings) and self.method is not None and reusable(stage, self.method):
            waiting = self.resume_stage is None or self.resume_stage in done_before
            if waiting and _found_result(stage, settings, self.splits, self.method, self.progress, self.cache):
                seed_everything(settings.seed)
                return
            if self.cache is not None and waiting:
                raise RunError(
                    f"stage {stage.name} has no result in {self.cache.folder.url} nor in {settings.stages}, and what was cached "
                    f"depends on it; run the same `detdistill cache` again, or train online (without --cache)"
                )
        world = settings.devices * settings.nodes
        batches = -(-len(self.splits.train.records) // (settings.batch * world))
        per_epoch = -(-batches // settings.accumulate)
        epochs, steps = stage_length(stage, settings)
        total = per_epoch * epochs if steps is None else steps
        epochs = -(-total // per_epoch)
        # The budget is the student's: what a method trains of its own before (UniKD's extractors) is no part of it.
        own = {id(parameter) for parameter in self.student.parameters()}
        students = any(id(p) in own for module in stage.trains(Clock(0, total)) for p in module.parameters())
        if self.resume_stage is not None and self.resume_stage not in (*done_before, stage.name):
            self.trained_steps += total if students else 0
            return
        resuming = self.resume_stage == stage.name
        if self.table is None and is_main_process():
            self.table = self._table(done_before if resuming else None)
        if stage.before is not None and not resuming:
            stage.before()
        self.module = StageModule(
            self.student,
            self.method,
            stage,
            settings,
            total,
            source=self.source,
            images=self.images_seen // world,
            seconds=self.seconds,
        )
        train_set = self.splits.train

        def train_dataloader() -> DetectionLoader:
            assert self.module is not None
            return self.loader(train_set, True, self.module.trainer.global_rank, self.module.trainer.world_size)

        self.module.train_dataloader = train_dataloader  # type: ignore[method-assign]
        self.evaluation = Evaluation(self.evaluate, settings.evaluate_every)
        callbacks: list[L.Callback] = [TrainingBar(self.progress, self.plan.title or self.plan.role, total)]
        if self.table is not None:
            records = Records(self.table, settings.log_every)
            callbacks.append(records)
            if settings.instability:
                callbacks.append(MatchingInstability(self.index_vectors, records))
        callbacks += [self.evaluation, Checkpoints(self.folder.checkpoints, settings.checkpoint_every)]
        trainer = self._trainer(settings, callbacks, epochs)
        with warnings.catch_warnings():
            # Lightning's advice on loaders and intervals is about its own defaults, which are not used here.
            warnings.filterwarnings("ignore", module="lightning")
            last = self.folder.checkpoints / "last.ckpt"
            _fit(trainer, self.module, last if resuming else None)
        self.module.restore_random_state()  # where the checkpoint was the stage's last, Lightning trained nothing
        if students:
            self.trained_steps += trainer.global_step
            self.images_seen = self.module.images * world
        self.seconds = self.module.seconds
        if self.table is not None:
            for term in idle_terms(row for row in read_rows(self.table.path) if row["stage"] == stage.name):
                self.progress.say(
                    f"[yellow]{term}: no gradient in any measurement, so it taught nothing; is its weight 0, or is there nothing "
                    "that it can tell apart (one class, no boxes, levels that nobody shares)?[/yellow]"
                )
        if isinstance(settings, DistillSettings) and self.method is not None and reusable(stage, self.method):
            self._keep(stage, settings)

    def _keep(self, stage: Stage, settings: DistillSettings) -> None:
        """Write a stage's result for later runs, and go on as they will."""
        if is_main_process():
            name = stage_file(stage, settings, self.splits.train.fingerprint)
            try:
                save_result(storage(settings.stages), name, stage)
            except OSError as error:
                why = error.strerror or error
                self.progress.say(f"[yellow]stage {stage.name}: its result is not kept in {settings.stages}: {why}[/yellow]")
        seed_everything(settings.seed)

    def _table(self, done_before: list[str] | None) -> MetricsTable:
        """metrics.csv with what the checkpoint knows of: the stages before, and this one up to its step."""
        if done_before is None:
            return MetricsTable(self.folder.metrics)

        def keep(stage: str, step: int) -> bool:
            return stage in done_before or (stage == self.resume_stage and step <= self.resume_step)

        return MetricsTable(self.folder.metrics, keep)

    def _trainer(self, settings: TrainSettings, callbacks: list[L.Callback], epochs: int) -> L.Trainer:
        accelerator = {"auto": "gpu" if torch.cuda.is_available() else "cpu", "cpu": "cpu", "cuda": "gpu"}[settings.device]
        several = settings.devices * settings.nodes > 1
        # Some methods and stages leave parameters without a gradient; DDP must look for them.
        strategy = DDPStrategy(find_unused_parameters=True) if several else "auto"
        return L.Trainer(
            accelerator=accelerator,
            devices=settings.devices,
            num_nodes=settings.nodes,
            strategy=strategy,
            precision={"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}[settings.precision],  # type: ignore[arg-type]
            max_epochs=epochs,  # never max_steps, with which Lightning goes on wrongly from the end of an epoch
            accumulate_grad_batches=settings.accumulate,
            gradient_clip_val=settings.clip or None,
            deterministic=settings.deterministic or None,
            callbacks=callbacks,
            logger=self._loggers(),
            use_distributed_sampler=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            default_root_dir=str(self.folder.path),
        )

    def _loggers(self) -> list[Logger]:
        loggers: list[Logger] = [TensorBoardLogger(self.folder.path, name="", version="tensorboard")]
        for service in self.settings.track:
            loggers.append(_service(service, self.folder, self.plan))
        return loggers

    def finish(self, teacher: Teacher | None, inherited: Any) -> Run:
        """Export the student and write ``summary.json``."""
        assert self.module is not None
        assert self.evaluation is not None
        detector = self.module.detector or self.student
        scores = self.evaluation.latest
        if scores is None:  # the run was finished before it was resumed
            views = view_settings(self.settings)
            scores = evaluate(detector, self.splits.val, views, batch_size=self.settings.batch, errors=True)
        summary = self.summary(scores, teacher, inherited)
        if is_main_process():
            try:
                save_student(detector.cpu(), self.folder.student)
                self.folder.write_json("summary.json", summary)
            except (OSError, SafetensorError) as error:
                reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
                raise RunError(
                    f"cannot write the result into {self.folder.path}: {reason}; make space and finish it with --resume true"
                ) from error
        return Run(self.folder.path, summary, scores, detector)

    def summary(self, scores: Scores, teacher: Teacher | None, inherited: Any) -> dict[str, Any]:
        """What later readers need to know of this run."""
        plan, settings, splits = self.plan, self.settings, self.splits
        distilling = plan.distilling
        assert self.evaluation is not None
        config = {key: value for key, value in plan.config().items() if key not in NOT_THE_RUN}
        return {
            "name": self.folder.path.name,
            "role": plan.role,
            "student": plan.student,
            "teacher": plan.teacher or (self.cache.about.teacher if self.cache else None),
            "teacher_metrics": None,
            "cache": {"path": self.cache.folder.url, "fingerprint": self.cache.about.fingerprint} if self.cache else None,
            "method": distilling.method if distilling else None,
            "inherit": bool(inherited and inherited.copied),
            "seed": settings.seed,
            "epochs": settings.epochs,
            "steps": self.trained_steps,
            "images_seen": self.images_seen,
            "batch": settings.batch,
            "metrics": scores.metrics,
            "per_class": scores.per_class,
            "errors": scores.errors,
            "best_ap": max(self.evaluation.best_ap, scores.metrics["AP"]),
            "seconds": round(self.seconds, 2),
            "evaluation_seconds": round(scores.seconds, 2),
            "parameters": sum(p.numel() for p in self.student.parameters()),
            "teacher_parameters": self.cache.about.teacher_parameters if self.cache else _parameters(teacher),
            "versions": versions(),
            "hardware": hardware(),
            "data": {
                "path": plan.data,
                "fingerprint": splits.train.fingerprint,
                "val_fingerprint": splits.val.fingerprint,
                "train_images": len(splits.train.records),
                "val_images": len(splits.val.records),
                "classes": list(splits.train.classes),
            },
            "config_fingerprint": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16],
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S"),
        }


def _parameters(teacher: Teacher | None) -> int | None:
    return None if teacher is None else sum(p.numel() for p in teacher.detector.parameters())


def _fit(trainer: L.Trainer, module: StageModule, checkpoint: Path | None) -> None:
    """Train; being stopped from outside looks as it does elsewhere in Python."""
    interrupt = signal.getsignal(signal.SIGINT)
    path = None if checkpoint is None else str(checkpoint)
    try:
        trainer.fit(module, ckpt_path=path, weights_only=None if checkpoint is None else True)
    except SIGTERMException as error:
        raise RunError("stopped by SIGTERM; --resume true goes on from the last checkpoint") from error
    except SystemExit as error:  # Lightning's answer to Ctrl-C, which it turns off for good
        if trainer.state.status != TrainerStatus.INTERRUPTED:
            raise
        signal.signal(signal.SIGINT, interrupt)
        raise KeyboardInterrupt from error


def _service(service: str, folder: RunFolder, plan: Plan) -> Logger:
    """A logger of somebody's service.

    Raises:
        RunError: it is not installed.
    """
    try:
        if service == "wandb":
            from lightning.pytorch.loggers import WandbLogger

            return WandbLogger(project="detdistill", name=folder.path.name, save_dir=folder.path, config=plan.config())
        from lightning.pytorch.loggers import MLFlowLogger

        return MLFlowLogger(
            experiment_name="detdistill", run_name=folder.path.name, tracking_uri=f"file:{folder.path / 'mlruns'}"
        )
    except ModuleNotFoundError as error:
        raise RunError(f"--track {service}: {service} is not installed; pip install detdistill[track]") from error
