"""Training of the stages of a run with Lightning, one after the other."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import signal
import warnings
from collections.abc import Callable
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from detdistill.cache.knowledge import KnowledgeSource
from detdistill.cache.storage import masked, storage
from detdistill.data.loader import DetectionLoader
from detdistill.data.records import DataSplits, DetectionSet
from detdistill.detectors.contract import Detector
from detdistill.errors import RunError, StoppedError, counted
from detdistill.evaluation import Scores, evaluate
from detdistill.evaluation.instability import first_images, index_vectors
from detdistill.files import damage
from detdistill.functional.label_scores import detection_loss
from detdistill.methods.shared.contract import Method, Stage
from detdistill.processes import is_main_process, restarts
from detdistill.progress import Progress
from detdistill.settings import DistillSettings, TrainSettings
from detdistill.structures import Batch, Clock, Losses
from detdistill.training.agreement import Agreement, Facts
from detdistill.training.bar import TrainingBar
from detdistill.training.callbacks import Checkpoints, Evaluation, Records
from detdistill.training.folder import RunFolder
from detdistill.training.from_cache import stage_from_cache
from detdistill.training.machine import seed_everything
from detdistill.training.matching_instability import MatchingInstability
from detdistill.training.metrics_table import MetricsTable, idle_terms, read_rows
from detdistill.training.module import NonFiniteLoss, StageModule
from detdistill.training.plan import view_settings
from detdistill.training.rendezvous import ElasticDDP, ElasticSharding, launcher, unreachable
from detdistill.training.session import Session
from detdistill.training.sharded import ShardedModule, by_parts
from detdistill.training.signals import EndTogether, wait_for_the_end
from detdistill.training.stage_results import load_result, reusable, save_result, stage_file, stage_length
from detdistill.training.trackers import tracker
from detdistill.training.workers import workers_run

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)


class StageLoop:
    """Trains the stages of one run, one after the other, in one run folder."""

    def __init__(
        self,
        session: Session,
        folder: RunFolder,
        progress: Progress,
        facts: Facts | None = None,
        saved: Callable[[], None] | None = None,
    ) -> None:
        """Read stage and step of the checkpoint if the run is resumed.

        Args:
            session: plan, data, student and method.
            folder: the run folder.
            progress: display of the progress.
            facts: what all processes of the run must have in common.
            saved: called after each checkpoint, in the main process.

        Raises:
            RunError: the checkpoint cannot be read.
        """
        self.session, self.folder, self.progress, self.facts, self.saved = session, folder, progress, facts or {}, saved
        self.plan, self.splits, self.settings = session.plan, session.splits, session.plan.settings
        self.student, self.method, self.cache = session.student, session.method, session.cache
        self.validation: DetectionLoader | None = None
        self.matched: DetectionLoader | None = None
        self.trained_steps = self.images_seen = 0
        self.seconds = 0.0
        self.module: StageModule | None = None
        self.evaluation: Evaluation | None = None
        self.resume_from = self._resume_from()
        self.resume_stage: str | None = None
        self.resume_step = 0
        if self.resume_from is not None:
            self.resume_stage, self.resume_step = _stage_and_step(self.resume_from)
            if restarts():
                where = f"{self.resume_from.name} (stage {self.resume_stage}, step {self.resume_step})"
                self.progress.say(f"torchrun has started the processes again (restart {restarts()}): continuing from {where}")
        self.table: MetricsTable | None = None

    def _resume_from(self) -> Path | None:
        """The checkpoint to continue from: ``last.ckpt``, or ``best.ckpt`` if there is no ``last.ckpt``; None: from step 0."""
        if not self.settings.resume:
            return None
        for name in ("last.ckpt", "best.ckpt"):
            path = self.folder.checkpoints / name
            if path.exists():
                if name != "last.ckpt":
                    self.progress.say(f"no last.ckpt in {self.folder.path}: continuing from {name}", "yellow")
                return path
        self.progress.say(f"no checkpoint in {self.folder.path} yet: starting from step 0", "yellow")
        return None

    def loader(
        self, data: DetectionSet, train: bool, rank: int, world: int, ahead: Callable[[Batch], None] | None = None
    ) -> DetectionLoader:
        """The batches of a data set under the run's settings, for process ``rank`` of ``world`` processes.

        ``ahead`` is told of each batch before it is used.
        """
        settings = self.settings
        views = view_settings(settings, masks=train and self.student.spec.needs_masks)
        stored = self.cache is not None and self.cache.ahead is None
        if not train or self.method is None or stored:  # the teacher sees nothing
            views = dataclasses.replace(views, teacher_size=None)
        return DetectionLoader(
            data,
            views,
            settings.batch,
            train=train,
            seed=settings.seed,
            rank=rank,
            world=world,
            workers=settings.workers,
            in_memory=settings.in_memory,
            ahead=ahead,
        )

    def evaluate(self, detector: Detector) -> Scores:
        """Evaluate a detector on the validation images."""
        if self.validation is None:
            assert self.module is not None
            trainer = self.module.trainer
            self.validation = self.loader(self.splits.val, False, trainer.global_rank, trainer.world_size)
        # Errors by kind add about a tenth to the time of an evaluation, and only those of the last one are used.
        last = self.module is not None and self.module.trainer.global_step >= self.module.total
        last |= self.evaluation is not None and self.evaluation.may_be_last
        return evaluate(detector, self.splits.val, view_settings(self.settings), loader=self.validation, errors=last)

    def index_vectors(self, detector: Detector) -> Tensor:
        """Index [L, I, N] of the box that each query is matched to, on the first validation images (``--instability``)."""
        if self.matched is None:
            self.matched = self.loader(first_images(self.splits.val, self.settings.instability), False, 0, 1)
        return index_vectors(detector, self.matched.data, self.matched.settings, loader=self.matched)

    def fit(self, stage: Stage, done_before: list[str]) -> None:
        """Train one stage. It is skipped if the checkpoint belongs to a later stage, or if a stored result of it can be reused.

        Args:
            stage: the stage.
            done_before: names of the stages before it.

        Raises:
            RunError: training fails, or a cache lacks the result of this stage.
        """
        settings = dataclasses.replace(self.settings, **stage.overrides)
        if self._reused(stage, settings, done_before):
            return
        world = settings.devices * settings.nodes
        total, epochs = self._length(stage, settings)
        # Only training of the student counts as budget: networks that a method trains beforehand (UniKD's extractors) do not.
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
        self.module = self._module(stage, settings, total)
        self.evaluation = Evaluation(self.evaluate, settings.evaluate_every, settings.patience)
        trainer = self._trainer(settings, self._callbacks(stage, settings, total, self.evaluation), epochs)
        with warnings.catch_warnings():
            # Lightning's warnings about loaders and intervals concern its own defaults, which are not used here.
            warnings.filterwarnings("ignore", module="lightning")
            with workers_run(self.folder.path, self.plan):
                _fit(trainer, self.module, self.folder.checkpoints, self.resume_from if resuming else None)
        self.module.refresh()
        self.module.restore_random_state()  # needed if the checkpoint is from the last step: Lightning then trains nothing
        if self.evaluation.stopped:
            why = f"no better AP in {counted(settings.patience, 'evaluation')}"
            self.progress.say(f"stopped early at step {trainer.global_step} of {total}: {why}", "yellow")
        if students:
            self.trained_steps += trainer.global_step
            self.images_seen = self.module.images * world
        self.seconds = self.module.seconds
        self._warn_about_idle_terms(stage)
        if isinstance(settings, DistillSettings) and self.method is not None and reusable(stage, self.method):
            self._keep(stage, settings)

    def _reused(self, stage: Stage, settings: TrainSettings, done_before: list[str]) -> bool:
        """Load the result of the stage from the cache or from an earlier run; return whether there was one.

        Raises:
            RunError: the run learns from a cache, and neither the cache nor the folder of stages has the result.
        """
        if not isinstance(settings, DistillSettings) or self.method is None or not reusable(stage, self.method):
            return False
        if self.resume_stage is not None and self.resume_stage not in done_before:
            return False  # the checkpoint is from this stage or a later one
        if found_result(stage, settings, self.splits, self.method, self.progress, self.cache):
            seed_everything(settings.seed)
            return True
        if self.cache is not None:
            raise RunError(
                f"stage {stage.name} has no result in {self.cache.folder.url} nor in {masked(settings.stages)}, and the "
                + (
                    "cached knowledge depends on it; run the same `detdistill cache` again, or train online (without --cache)"
                    if self.cache.ahead is None
                    else "knowledge that is taught depends on it; start `detdistill teach` with the --data of this run"
                )
            )
        return False

    def _length(self, stage: Stage, settings: TrainSettings) -> tuple[int, int]:
        """Optimizer steps of the stage, and the epochs that contain them (the last may be cut short)."""
        batches = -(-len(self.splits.train.records) // (settings.batch * settings.devices * settings.nodes))
        per_epoch = -(-batches // settings.accumulate)
        epochs, steps = stage_length(stage, settings)
        total = per_epoch * epochs if steps is None else steps
        return total, -(-total // per_epoch)

    def _module(self, stage: Stage, settings: TrainSettings, total: int) -> StageModule:
        """The Lightning module of the stage, with its training loader."""
        sharded = settings.strategy == "fsdp"
        if sharded and settings.monitor_every:
            self.progress.say("strategy fsdp: shares of the gradient are not measured, which would need whole weights", "dim")
            settings = dataclasses.replace(settings, monitor_every=0)
        module = (ShardedModule if sharded else StageModule)(
            self.student,
            self.method,
            stage,
            settings,
            total,
            source=self.session.source,
            images=self.images_seen // (settings.devices * settings.nodes),
            seconds=self.seconds,
            unlabelled=self.session.unlabelled,
        )
        train_set = self.splits.train
        ahead = None if self.cache is None or stage.learns_from is None else self.cache.ahead

        def train_dataloader() -> DetectionLoader:
            return self.loader(train_set, True, module.trainer.global_rank, module.trainer.world_size, ahead)

        module.train_dataloader = train_dataloader  # type: ignore[method-assign]
        return module

    def _callbacks(self, stage: Stage, settings: TrainSettings, total: int, evaluation: Evaluation) -> list[L.Callback]:
        """The callbacks of the stage; the checkpoint comes after the evaluation, so that it contains the scores."""
        title = self.plan.title or self.plan.role
        title = title if stage.evaluates else f"{title}: {stage.name}"
        callbacks: list[L.Callback] = [TrainingBar(self.progress, title, total)]
        if settings.devices * settings.nodes > 1:
            place = {"stage": stage.name, "steps": str(total), "checkpoint": f"{self.resume_stage} {self.resume_step}"}
            callbacks.append(Agreement({**self.facts, **place}))
        if self.table is not None:
            records = Records(self.table, settings.log_every)
            callbacks.append(records)
            if settings.instability:
                callbacks.append(MatchingInstability(self.index_vectors, records))
        checkpoints = Checkpoints(self.folder.checkpoints, settings.checkpoint_every, self.saved)
        return [*callbacks, evaluation, checkpoints, EndTogether()]

    def _warn_about_idle_terms(self, stage: Stage) -> None:
        """Name the loss terms of the stage that had no gradient in any measurement, except those that train the method alone."""
        if self.table is None:
            return
        alone = () if self.method is None else self.method.trains_alone
        for term in idle_terms(row for row in read_rows(self.table.path) if row["stage"] == stage.name):
            if term in alone:
                continue
            self.progress.say(
                f"{term}: no gradient in any measurement, so the term had no effect; check its weight, and whether the "
                "data give it something to compare (several classes, boxes, levels of both detectors)",
                "yellow",
            )

    def _keep(self, stage: Stage, settings: DistillSettings) -> None:
        """Store a stage's result for later runs, and reset the random state as those runs do."""
        if is_main_process():
            name = stage_file(stage, settings, self.splits.train.fingerprint)
            try:
                save_result(storage(settings.stages), name, stage)
            except OSError as error:
                why = error.strerror or error
                self.progress.say(
                    f"stage {stage.name}: its result cannot be stored in {masked(settings.stages)}: {why}", "yellow"
                )
        seed_everything(settings.seed)

    def _table(self, done_before: list[str] | None) -> MetricsTable:
        """Open metrics.csv. A resumed run keeps the rows of the stages before, and of its own stage up to the checkpoint."""
        if done_before is None:
            return MetricsTable(self.folder.metrics)

        def keep(stage: str, step: int) -> bool:
            return stage in done_before or (stage == self.resume_stage and step <= self.resume_step)

        return MetricsTable(self.folder.metrics, keep)

    def _trainer(self, settings: TrainSettings, callbacks: list[L.Callback], epochs: int) -> L.Trainer:
        accelerator = {"auto": "gpu" if torch.cuda.is_available() else "cpu", "cpu": "cpu", "cuda": "gpu"}[settings.device]
        several = settings.devices * settings.nodes > 1
        # Some methods and stages leave parameters without a gradient; DDP must search for them.
        strategy: Strategy | str = ElasticDDP(find_unused_parameters=True) if several else "auto"
        if settings.strategy == "fsdp":
            strategy = ElasticSharding(settings.devices * settings.nodes)
        return L.Trainer(
            accelerator=accelerator,
            devices=settings.devices,
            num_nodes=settings.nodes,
            strategy=strategy,
            plugins=launcher(),
            precision={"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}[settings.precision],  # type: ignore[arg-type]
            max_epochs=epochs,  # not max_steps: with it, Lightning resumes wrongly from the end of an epoch
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
            loggers.append(tracker(service, self.folder.path, self.plan.config()))
        return loggers


def _stage_and_step(path: Path) -> tuple[str, int]:
    """Stage and step of a checkpoint, which is compared with its checksum.

    Raises:
        RunError: the checkpoint is damaged or cannot be read; the other checkpoint of the run is offered if it is whole.
    """
    try:
        reason = damage(path)
        if not reason:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            return content["detdistill"]["stage"], int(content["global_step"])
    except Exception as error:  # torch raises errors of pickle, of zip files and of its own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise RunError(f"cannot resume from {path}: {reason}; {_instead(path)}")


def _instead(path: Path) -> str:
    """What to do about a damaged checkpoint, in words."""
    best = path.with_name("best.ckpt")
    if path.name != best.name and best.exists():
        with contextlib.suppress(RunError):
            step = _stage_and_step(best)[1]
            return f"delete it, then --resume true continues from {best.name} (step {step}), which is whole"
    return "there is no whole checkpoint beside it: start a new run (another --out)"


def found_result(
    stage: Stage,
    settings: DistillSettings,
    splits: DataSplits,
    method: Method,
    progress: Progress,
    cache: KnowledgeSource | None = None,
) -> bool:
    """Load the result of a stage into the method, from cache, server or folder ``stages``; return whether there was one."""
    if cache is not None and stage_from_cache(cache, stage, method):
        progress.say(f"stage {stage.name}: taken from {'the cache' if cache.ahead is None else cache.folder.url}")
        return True
    folder, name = storage(settings.stages), stage_file(stage, settings, splits.train.fingerprint)
    if not load_result(folder, name, stage):
        return False
    progress.say(f"stage {stage.name}: trained before, taken from {folder.url}/{name}")
    return True


def plain_stage(student: Detector) -> Stage:
    """The only stage of training without a teacher: the detector's own losses."""

    def step(batch: Batch, taught: None, clock: Clock) -> Losses:
        seen = student(batch)
        with torch.autocast(batch.images.device.type, enabled=False):
            seen = seen.float()
            assert seen.prediction is not None
            return detection_loss(student, seen.prediction, batch)

    return Stage("train", step, lambda clock: (student,), student)


def _fit(trainer: L.Trainer, module: StageModule, checkpoints: Path, resume_from: Path | None) -> None:
    """Train, and turn Lightning's reactions to SIGTERM and Ctrl-C into a ``RunError`` and ``KeyboardInterrupt``."""
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        path = None if resume_from is None else str(resume_from)
        trainer.fit(module, ckpt_path=path, weights_only=None if resume_from is None else True)
    except NonFiniteLoss as error:
        last = checkpoints / "last.ckpt"
        kept = f"the last good checkpoint is {last}" if last.is_file() else "there is no checkpoint yet"
        raise NonFiniteLoss(f"{error}; {kept}") from error
    except SIGTERMException as error:
        start = "from the last checkpoint" if any(checkpoints.glob("*.ckpt")) else "from step 0, since there is no checkpoint yet"
        raise StoppedError(f"stopped by SIGTERM; --resume true continues {start}") from error
    except (torch.distributed.DistNetworkError, torch.distributed.DistStoreError) as error:
        raise unreachable(error) from error
    except RuntimeError as error:
        if "mixed torch.Tensor and DTensor" in str(error):
            raise RunError(by_parts(module)) from error
        if trainer.world_size > 1:  # the connection to a process that has ended
            wait_for_the_end()
        raise
    except SystemExit as error:  # Lightning exits on Ctrl-C, and ignores the signal afterwards
        if trainer.state.status != TrainerStatus.INTERRUPTED:
            raise
        signal.signal(signal.SIGINT, interrupt)
        raise KeyboardInterrupt from error
