"""Commands that train, or that prepare a training: demo, train, distill, doctor, schedules, find, cache, teach."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jsonargparse import Namespace

from detdistill.cli.arguments import Parser, device_flag, json_flag, plain
from detdistill.cli.output import FRACTIONS, say, show
from detdistill.processes import is_main_process
from detdistill.settings import CacheSettings, DistillSettings, TeachSettings, TrainSettings, names_where

if TYPE_CHECKING:
    from detdistill.doctor.findings import Diagnosis


def demo_flags(parser: Parser) -> None:
    parser.add_argument("--out", type=Path | None, default=None, help="folder; none: a new one under runs/")
    parser.add_argument(
        "--seeds",
        type=tuple[int, ...],
        default=(0,),
        help="seeds of the students; a proof of the gain needs several, e.g. 0,1,2 or 0-2",
    )
    parser.add_argument("--method", type=str, default="pkd", help="one method, or several: fgd+pkd")
    parser.add_argument("--train_images", type=int, default=2000, help="number of images drawn for training")
    parser.add_argument("--val_images", type=int, default=400, help="number of images drawn for validation")
    parser.add_argument("--teacher_epochs", type=int, default=5, help="epochs of the teacher")
    parser.add_argument("--epochs", type=int, default=3, help="epochs of the students")


def demo(chosen: Namespace) -> None:
    from detdistill.demo import demo as run_demo

    run_demo(**plain(chosen))


def train_flags(parser: Parser) -> None:
    parser.add_argument("--model", type=str, required=True, help="detector:backbone[,key=value ...] or torchvision:NAME")
    parser.add_argument("--data", type=str, default="digits", help="COCO, YOLO, VOC or Roboflow data, or digits")
    parser.add_argument(
        "--role", type=Literal["train", "teacher", "baseline"], default="train", help="name of the run in reports"
    )
    parser.add_class_arguments(TrainSettings, None)


def train(chosen: Namespace) -> None:
    from detdistill import api

    result = api.train(**plain(chosen))
    page = f"; report {result.folder / 'report.html'}" if chosen.report else ""
    from detdistill.evaluation.scores import points

    say(f"AP {points(result.scores.metrics['AP'])}; run folder {result.folder}{page}")


def distill_flags(parser: Parser) -> None:
    parser.add_argument(
        "--teacher",
        type=str | None,
        default=None,
        help="run folder, checkpoint, or torchvision:NAME,weights=...; several as a=RUN1,b=RUN2 (--method pkd@a+pkd@b); "
        "self:ema or self:trained for the student itself; leave it out with --cache or --served and for dicod",
    )
    parser.add_argument("--student", type=str, required=True, help="detector:backbone[,key=value ...] or torchvision:NAME")
    parser.add_argument("--data", type=str, default="digits", help="COCO, YOLO, VOC or Roboflow data, or digits")
    parser.add_argument("--recipe", type=str | None, default=None, help="name of ready-made settings; see `detdistill recipes`")
    parser.add_class_arguments(DistillSettings, None)


def distill(chosen: Namespace) -> None:
    from detdistill import api

    result = api.distill(**plain(chosen))
    if not is_main_process():  # the first process writes the run's summary
        return
    if result.gains:
        from detdistill.compare import show_gains

        show_gains(result.gains)
    page = f"; report {result.report}" if chosen.report else ""
    if len(result.runs) > 1:
        say(f"runs in {result.folder}{page}")
        return
    from detdistill.compare import read_run
    from detdistill.evaluation.scores import points

    say(f"AP {points(read_run(result.runs[0])['metrics']['AP'])}; run folder {result.folder}{page}")
    say("whether that is a gain, --baseline true --seeds 0,1,2 tells")


def doctor_flags(parser: Parser) -> None:
    distill_flags(parser)
    parser.add_argument("--images", type=int, default=100, help="largest number of validation images for the teacher's AP")
    parser.add_argument("--probe_steps", type=int, default=15, help="steps of each of the four short trainings")
    json_flag(parser, "; AP and shares in it are fractions 0..1")


def doctor(chosen: Namespace) -> None:
    from detdistill import api, printing

    found: list[Diagnosis] = []

    def made() -> Diagnosis:
        found.append(api.doctor(**plain(chosen)))
        return found[0]

    show(chosen, made, lambda diagnosis: diagnosis.render(printing.stdout()), lambda diagnosis: diagnosis.document())
    if found[0].exit_code:
        sys.exit(found[0].exit_code)


def schedules_flags(parser: Parser) -> None:
    distill_flags(parser)
    parser.add_argument("--at", type=tuple[float, ...], default=(1, 3), help="lengths, as multiples of the epochs or steps")
    json_flag(parser, FRACTIONS)


def schedules(chosen: Namespace) -> None:
    from detdistill import api
    from detdistill.schedules import schedules_json, show_schedules

    show(chosen, lambda: api.schedules(**plain(chosen)), show_schedules, schedules_json)


def find_flags(parser: Parser) -> None:
    distill_flags(parser)
    parser.add_argument(
        "--over",
        type=tuple[str, ...],
        default=("lr", "distill_weight"),
        help="what is searched: lr, distill_weight, balance, METHOD.NAME=LOW..HIGH",
    )
    parser.add_argument("--trials", type=int, default=12, help="number of trials; the first has the settings as given")
    parser.add_argument("--at_once", type=int, default=1, help="trials that are suggested together, before they have results")
    json_flag(parser, FRACTIONS)


def find(chosen: Namespace) -> None:
    from detdistill import api
    from detdistill.find import found_json, show_found

    show(chosen, lambda: api.find(**plain(chosen)), show_found, found_json)


def cache_flags(parser: Parser) -> None:
    parser.add_argument("--teacher", type=str, required=True, help="run folder, checkpoint, or torchvision:NAME,weights=...")
    parser.add_argument(
        "--out", type=str, required=True, help="folder or URL (s3://...) of the cache; an unfinished cache is continued"
    )
    parser.add_argument("--data", type=str, default="digits", help="COCO, YOLO, VOC or Roboflow data, or digits")
    parser.add_argument("--student", type=str | None, default=None, help="student of the later runs; some methods need it")
    parser.add_class_arguments(CacheSettings, None, skip=set(names_where(CacheSettings, "cache", False)))


def cache(chosen: Namespace) -> None:
    from detdistill import api

    made = api.cache(**plain(chosen))
    if not chosen.dry_run:
        say(
            f"cache {made.folder}: {made.records} records as {made.store}"
            + ("" if made.complete else "; other processes are still writing")
        )


def verify_flags(parser: Parser) -> None:
    parser.add_argument("out", type=str, help="folder or URL of a cache")
    parser.add_argument("--teacher", type=str | None, default=None, help="compare with this teacher; none: only checksums")
    parser.add_argument(
        "--data", type=str | None, default=None, help="the training data, if it was moved since the cache was made"
    )
    parser.add_argument("--records", type=int, default=20, help="number of records that are compared")
    device_flag(parser)


def verify(chosen: Namespace) -> None:
    from detdistill import api

    say(api.verify_cache(**plain(chosen)))


def teach_flags(parser: Parser) -> None:
    parser.add_argument("--teacher", type=str, required=True, help="run folder, checkpoint, or torchvision:NAME,weights=...")
    parser.add_argument("--listen", type=str, default="127.0.0.1:8765", help="HOST:PORT; 0.0.0.0:PORT for other machines")
    parser.add_argument("--data", type=str | None, default=None, help="the students' data; none: they have the teacher's classes")
    parser.add_argument("--student", type=str | None, default=None, help="student of the runs; some methods need it")
    parser.add_argument("--out", type=str | None, default=None, help="folder or URL of a cache that is written on the way")
    skipped = {*names_where(TeachSettings, "cache", False), "devices", "nodes"}
    parser.add_class_arguments(TeachSettings, None, skip=skipped)


def teach(chosen: Namespace) -> None:
    from detdistill import api

    server = api.teach(**plain(chosen))
    say(f"students learn with --served {server.url}; Ctrl-C ends it")
    server.wait()
    say(server.in_words())
