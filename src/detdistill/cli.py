"""The command line, ``detdistill COMMAND``: each command reads flags and YAML with jsonargparse and calls a Python function.

Heavy modules are imported only when a command runs, so ``--help`` is quick.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar, get_args

from jsonargparse import ArgumentParser, Namespace

from detdistill.errors import DetdistillError, DetdistillWarning, nearest
from detdistill.processes import end_with_parent, is_main_process
from detdistill.settings import RENAMED, CacheSettings, DistillSettings, TeachSettings, TrainSettings, meant, names_where, renamed
from detdistill.values import choices, in_words

if TYPE_CHECKING:
    from detdistill.data.inspect import DataReport
    from detdistill.doctor.findings import Diagnosis
    from detdistill.methods.shared.catalogue import Entry

T = TypeVar("T")

ALIASES = {"distill_model": "teacher", "distill-model": "teacher", **RENAMED}
"""Names of flags in other tools or earlier versions, and our name for each."""

RANGE = re.compile(r"\b(\d+)-(\d+)\b")
"""``0-2`` in a list of numbers."""

VERB_SYNONYMS = {
    "benchmark": "bench", "convert": "export", "detect": "predict", "evaluate": "eval", "fit": "train",
    "infer": "predict", "inference": "predict", "inspect": "data inspect",
    "list": "methods", "models": "detectors", "serve": "teach", "test": "eval", "val": "eval", "validate": "eval",
    "verify": "cache verify",
}  # fmt: skip
"""Commands of other tools and words for the same thing; our command for each."""

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
"""Errors of a disk that is full or not writable. They are reported as user errors, wherever they occur."""


class Parser(ArgumentParser):
    """A parser that reports each mistake in one line, with the nearest known name."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the mistake in one line and exit with code 2."""
        text = " ".join(str(message).split()) or "wrong arguments"
        text = re.sub(r"^the following arguments are required:", "missing, but required:", text)
        hint = ""
        flags = [option.lstrip("-") for action in self._actions for option in action.option_strings]
        unknown = re.search(r"(?:[Uu]nrecognized arguments:\s*-*|Option '(?=[\w.]+' is not accepted))([\w./-]+)", text)
        value = re.match(r"Parser key \"(\w+)\": .*(?:Got|Given) value: (.+)$", text)
        if value:
            name, given = value.group(1), value.group(2).strip("[]")
            kind = next(getattr(action, "_typehint", None) for action in self._actions if action.dest == name)
            if len(get_args(kind)) == 2 and get_args(kind)[1] is Ellipsis:  # for a list, the message shows the type of an item
                kind = get_args(kind)[0]
            text = f"{name}: {given!r} is not {in_words(kind)}"
            hint = nearest(given, choices(kind))
            if name == "device" and re.fullmatch(r"(cuda:|gpu:?)?\d+", given):
                hint = " (did you mean 'cuda'? the environment variable CUDA_VISIBLE_DEVICES chooses among GPUs)"
        elif unknown:
            name = unknown.group(1).partition("=")[0]
            text, hint = self._about_unknown(name, flags)
        sys.stderr.write(f"{self.prog}: {text}{hint}\n")
        sys.exit(2)

    def _about_unknown(self, name: str, flags: Sequence[str]) -> tuple[str, str]:
        """What to say of a word that is no flag, and what may be meant."""
        positional = [action.dest for action in self._actions if not action.option_strings]
        if name in positional:
            return f"{name} is given without --{name}", f"; write `{self.prog} {name.upper()}`"
        if "/" in name or os.path.exists(name):
            flag = next((flag for flag in ("model", "data", "images") if flag in flags), None)
            return f"{name!r} stands without a flag", f" (did you mean --{flag} {name}?)" if flag else ""
        hint = meant(name, flags) or f"; `{self.prog} --help` lists what there is"
        return f"no flag or key {name!r}", hint


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command. User errors end with one line and exit code 2, Ctrl-C with 130.

    Args:
        arguments: the words after ``detdistill``; None: those of this process.
    """
    end_with_parent()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _notes_on(warnings.showwarning)
            _run(list(sys.argv[1:] if arguments is None else arguments))
    except DetdistillError as error:
        _fail(str(error))
    except BrokenPipeError:  # the reader closed the pipe; without this, Python would fail when it flushes stdout at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.errno not in DISK:
            raise
        name = error.filename or "a file"
        if error.errno == errno.EACCES and os.path.exists(name) and not os.access(name, os.R_OK):
            _fail(f"cannot read {name}: {error.strerror}; change its permissions")
        _fail(f"cannot write {name}: {error.strerror}; make space or write elsewhere")
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted; --resume true goes on from the last checkpoint\n")
        sys.exit(130)


def _run(given: list[str]) -> None:
    if given[:2] in (["data", "inspect"], ["cache", "verify"]):
        given = ["-".join(given[:2]), *given[2:]]
    if not given or given[0] in ("-h", "--help", "help"):
        _say(overview())
        return
    if given[0] == "--version":
        from detdistill import __version__

        _say(f"detdistill {__version__}")
        return
    verb, *rest = given
    names = {verb: verb.replace("-", " ") for verb in VERBS}
    if verb not in VERBS:
        typed = " ".join(given[:2]) if verb == "data" else verb
        known = VERB_SYNONYMS.get(typed)
        hint = f" (did you mean {known!r}?)" if known else nearest(typed, names.values())
        _fail(f"no command {typed!r}{hint}; commands: {', '.join(names.values())}")
    describe, act, summary = VERBS[verb]
    parser = Parser(prog=f"detdistill {names[verb]}", description=summary, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file with any of these settings")
    describe(parser)
    act(parser.parse_args(_normalized(parser, rest)))


def overview() -> str:
    """The text that ``detdistill --help`` prints."""
    width = max(len(verb) for verb in VERBS) + 2
    lines = [f"  {verb.replace('-', ' '):{width}}{summary}" for verb, (_, _, summary) in VERBS.items()]
    return "\n".join(
        [
            "usage: detdistill COMMAND [--flag VALUE ...]",
            "",
            "Make compact object detectors better by knowledge distillation.",
            "",
            *lines,
            "",
            "`detdistill COMMAND --help` lists a command's flags.",
            "Start with `detdistill demo`.",
        ]
    )


def _fail(text: str) -> NoReturn:
    _tell(f"detdistill: {' '.join(text.split())}")
    sys.exit(2)


def _tell(text: str) -> None:
    """Write to stderr: wrapped between words on a terminal, else as one line, which logs and scripts can search."""
    if sys.stderr.isatty():
        from rich.console import Console

        from detdistill.printing import wrap

        text = "\n".join(str(line) for line in wrap(text, Console(stderr=True).width))
    sys.stderr.write(f"{text}\n")


def _notes_on(show: Callable[..., None]) -> Callable[..., None]:
    """How warnings are shown: this project's as one line, all others by ``show``."""

    def shown(message: Warning | str, category: type[Warning], *where: Any) -> None:
        if issubclass(category, DetdistillWarning):
            _tell(f"note: {message}")
        else:
            show(message, category, *where)

    return shown


def _normalized(parser: Parser, arguments: Sequence[str]) -> list[str]:
    """Rewrite the typed arguments into the form that jsonargparse reads.

    ``key=value`` becomes ``--key=value``, ``--baseline`` becomes ``--baseline=true``, ``--seeds 0,1,2`` or
    ``--seeds 0-2`` becomes ``--seeds=[0,1,2]``, and ``--recipe NAME`` becomes ``--config=FILE``. Names of other tools and dashes
    inside names are replaced. Files are moved to the front, so that a typed value overrides a file's, wherever it is typed.
    """
    types = {action.dest: getattr(action, "_typehint", str) for action in parser._actions}
    positional = any(not action.option_strings for action in parser._actions)
    several = {option.lstrip("-") for action in parser._actions if action.nargs == "+" for option in action.option_strings}
    files: list[str] = []
    normal: list[str] = []
    waiting = list(arguments)
    while waiting:
        argument = waiting.pop(0)
        if re.match(r"^[a-z_]+=", argument):
            argument = f"--{argument}"
        match = re.match(r"^--([\w-]+)(?:=(.*))?$", argument, re.DOTALL)
        if not match:
            normal.append(argument)
            continue
        name, value = ALIASES.get(match.group(1), match.group(1)).replace("-", "_"), match.group(2)
        wanted = types.get(name)
        flag = wanted is bool
        # In a command with positional arguments, the word after a flag is the flag's value only if it is true or false.
        alone = flag and positional and waiting[:1] not in (["true"], ["false"])
        if value is None and waiting and not waiting[0].startswith("--") and not alone:
            value = waiting.pop(0)
        if name in several:  # ``--model A B``: all words up to the next flag
            normal += [f"--{name}", *([] if value is None else [value])]
            while waiting and not re.match(r"^--|^[a-z_]+=", waiting[0]):
                normal.append(waiting.pop(0))
        elif name == "recipe" and name in types:
            files.append(f"--config={recipe_path(value or '')}")
        elif name == "config" and value:
            files.append(f"--config={_checked_config(parser, Path(value))}")
        elif value is None:
            normal.append(f"--{name}=true" if flag else f"--{name}")
        elif value in ("none", "null") and type(None) in get_args(wanted):
            normal.append(f"--{name}=null")
        elif "tuple[" in str(wanted) and not value.startswith("["):
            normal.append(f"--{name}=[{'' if value == 'none' else re.sub(RANGE, _numbers, value)}]")
        else:
            normal.append(f"--{name}={value}")
    return files + normal


def _numbers(found: re.Match[str]) -> str:
    """The numbers of a range such as ``0-2``, ends included: ``0,1,2``; a range that runs backwards stays as it is."""
    first, last = int(found[1]), int(found[2])
    return ",".join(map(str, range(first, min(last, first + 1000) + 1))) or found[0]


def _checked_config(parser: Parser, path: Path) -> str:
    """Check a settings file.

    Returns:
        What jsonargparse reads: the path of the file, or, if the file has names of earlier versions, its text with today's names.

    Raises:
        DetdistillError: the file is missing, is not YAML, holds no settings, or has a key that the command does not have.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DetdistillError(f"config: cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DetdistillError(f"config: {path} is not valid YAML: {error}") from error
    if not isinstance(content, dict) or not content:
        raise DetdistillError(f"config: {path} holds no settings; write lines such as `epochs: 12`")
    known = [action.dest for action in parser._actions if action.dest not in ("help", "config", "recipe")]
    content = {"on" if key is True else key: value for key, value in content.items()}  # in YAML 1.1, the word on is true
    today = renamed(content)
    for key in today:
        if key not in known:
            raise DetdistillError(f"config: {path}: no key {key!r}{meant(str(key), known)}")
    return str(path) if today == content and "on" not in today else yaml.safe_dump(today)


# ---------------------------------------------------------------------------------------------------- the commands


FRACTIONS = "; in it, AP and the other scores are fractions 0..1, and -1 where undefined"


def _json_flag(parser: Parser, more: str = "") -> None:
    parser.add_argument("--json", type=bool, default=False, help=f"print one JSON document and nothing else on stdout{more}")


def _show(
    chosen: Namespace,
    make: Callable[[], T],
    show: Callable[[T], None],
    document: Callable[[T], dict[str, Any]],
    out: Path | None = None,
) -> None:
    """Compute a result and print it: as text, or with ``--json`` as one JSON document. ``out`` always gets the JSON document."""
    if chosen.json:
        with contextlib.redirect_stdout(sys.stderr):  # libraries print there too, e.g. when they download weights
            made = make()
        _say(json.dumps(document(made), indent=2))
    else:
        made = make()
        show(made)
    if out is not None:
        from detdistill import api

        api.write(out, json.dumps(document(made), indent=2) + "\n")


def _train_flags(parser: Parser) -> None:
    parser.add_argument("--model", type=str, required=True, help="detector:backbone[,key=value ...] or torchvision:NAME")
    parser.add_argument("--data", type=str, default="digits", help="COCO, YOLO, VOC or Roboflow data, or digits")
    parser.add_argument(
        "--role", type=Literal["train", "teacher", "baseline"], default="train", help="name of the run in reports"
    )
    parser.add_class_arguments(TrainSettings, None)


def _train(chosen: Namespace) -> None:
    from detdistill import api

    result = api.train(**_plain(chosen))
    page = f"; report {result.folder / 'report.html'}" if chosen.report else ""
    from detdistill.evaluation.scores import points

    _say(f"AP {points(result.scores.metrics['AP'])}; run folder {result.folder}{page}")


def _distill_flags(parser: Parser) -> None:
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


def _distill(chosen: Namespace) -> None:
    from detdistill import api

    result = api.distill(**_plain(chosen))
    if not is_main_process():  # the first process writes the run's summary
        return
    if result.gains:
        from detdistill.compare import show_gains

        show_gains(result.gains)
    page = f"; report {result.report}" if chosen.report else ""
    if len(result.runs) > 1:
        _say(f"runs in {result.folder}{page}")
        return
    from detdistill.compare import read_run
    from detdistill.evaluation.scores import points

    _say(f"AP {points(read_run(result.runs[0])['metrics']['AP'])}; run folder {result.folder}{page}")
    _say("whether that is a gain, --baseline true --seeds 0,1,2 tells")


def _doctor_flags(parser: Parser) -> None:
    _distill_flags(parser)
    parser.add_argument("--images", type=int, default=100, help="largest number of validation images for the teacher's AP")
    parser.add_argument("--probe_steps", type=int, default=15, help="steps of each of the four short trainings")
    _json_flag(parser, "; AP and shares in it are fractions 0..1")


def _doctor(chosen: Namespace) -> None:
    from detdistill import api, printing

    found: list[Diagnosis] = []

    def made() -> Diagnosis:
        found.append(api.doctor(**_plain(chosen)))
        return found[0]

    _show(chosen, made, lambda diagnosis: diagnosis.render(printing.stdout()), lambda diagnosis: diagnosis.document())
    if found[0].exit_code:
        sys.exit(found[0].exit_code)


def _cache_flags(parser: Parser) -> None:
    parser.add_argument("--teacher", type=str, required=True, help="run folder, checkpoint, or torchvision:NAME,weights=...")
    parser.add_argument(
        "--out", type=str, required=True, help="folder or URL (s3://...) of the cache; an unfinished cache is continued"
    )
    parser.add_argument("--data", type=str, default="digits", help="COCO, YOLO, VOC or Roboflow data, or digits")
    parser.add_argument("--student", type=str | None, default=None, help="student of the later runs; some methods need it")
    parser.add_class_arguments(CacheSettings, None, skip=set(names_where(CacheSettings, "cache", False)))


def _cache(chosen: Namespace) -> None:
    from detdistill import api

    made = api.cache(**_plain(chosen))
    if not chosen.dry_run:
        _say(
            f"cache {made.folder}: {made.records} records as {made.store}"
            + ("" if made.complete else "; other processes are still writing")
        )


def _verify_flags(parser: Parser) -> None:
    parser.add_argument("out", type=str, help="folder or URL of a cache")
    parser.add_argument("--teacher", type=str | None, default=None, help="compare with this teacher; none: only checksums")
    parser.add_argument(
        "--data", type=str | None, default=None, help="the training data, if it was moved since the cache was made"
    )
    parser.add_argument("--records", type=int, default=20, help="number of records that are compared")
    parser.add_argument("--device", type=Literal["auto", "cpu", "cuda"], default="auto")


def _verify(chosen: Namespace) -> None:
    from detdistill import api

    _say(api.verify_cache(**_plain(chosen)))


def _teach_flags(parser: Parser) -> None:
    parser.add_argument("--teacher", type=str, required=True, help="run folder, checkpoint, or torchvision:NAME,weights=...")
    parser.add_argument("--listen", type=str, default="127.0.0.1:8765", help="HOST:PORT; 0.0.0.0:PORT for other machines")
    parser.add_argument("--data", type=str | None, default=None, help="the students' data; none: they have the teacher's classes")
    parser.add_argument("--student", type=str | None, default=None, help="student of the runs; some methods need it")
    parser.add_argument("--out", type=str | None, default=None, help="folder or URL of a cache that is written on the way")
    skipped = {*names_where(TeachSettings, "cache", False), "devices", "nodes"}
    parser.add_class_arguments(TeachSettings, None, skip=skipped)


def _teach(chosen: Namespace) -> None:
    from detdistill import api

    server = api.teach(**_plain(chosen))
    _say(f"students learn with --served {server.url}; Ctrl-C ends it")
    server.wait()
    _say(server.in_words())


def _eval_flags(parser: Parser) -> None:
    parser.add_argument("--model", type=str, required=True, help="run or student folder, torchvision:NAME,weights=..., .onnx")
    parser.add_argument("--data", type=str, default="digits", help="COCO, YOLO, VOC or Roboflow data, or digits")
    parser.add_argument("--split", type=Literal["val", "test", "train"], default="val")
    parser.add_argument("--batch", type=int, default=8, help="images per batch")
    parser.add_argument("--size", type=int | None, default=None, help="side of the images in pixels; none: the run's size")
    parser.add_argument("--resize", type=Literal["letterbox", "stretch", "short_side"] | None, default=None)
    parser.add_argument("--max_size", type=int | None, default=None)
    parser.add_argument("--device", type=Literal["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--strict", type=bool, default=False)
    parser.add_argument("--out", type=Path | None, default=None, help="also write the numbers to this JSON file")
    _json_flag(parser, FRACTIONS)


def _eval(chosen: Namespace) -> None:
    from dataclasses import asdict

    from detdistill import api
    from detdistill.listing import show_scores

    values = {key: value for key, value in _plain(chosen).items() if value is not None}
    out = values.pop("out", None)
    _show(chosen, lambda: api.evaluate(**values), show_scores, asdict, out)


def _predict_flags(parser: Parser) -> None:
    parser.add_argument("--model", type=str, required=True, help="run or student folder, torchvision:NAME,weights=..., .onnx")
    parser.add_argument("--images", type=Path, required=True, help="an image, or a folder of images with its sub-folders")
    parser.add_argument("--out", type=Path, required=True, help="folder for drawn images and detections.json (COCO)")
    parser.add_argument("--score", type=float, default=0.3, help="boxes below this score are neither drawn nor written")
    parser.add_argument("--size", type=int | None, default=None, help="side of the images in pixels; none: the run's size")
    parser.add_argument("--batch", type=int | None, default=None, help="images per batch; none: 8 on a GPU, 1 on a CPU")
    parser.add_argument("--device", type=Literal["auto", "cpu", "cuda"], default="auto")


def _predict(chosen: Namespace) -> None:
    from detdistill import api

    found = api.predict(**_plain(chosen))
    images = f"{found.images} image{'s' if found.images != 1 else ''}"
    _say(f"{images} with {found.boxes} boxes and detections.json are in {found.folder}")
    if found.unreadable:
        count = len(found.unreadable)
        sys.stderr.write(f"detdistill: {count} image{'s' if count > 1 else ''} could not be read (named above)\n")
        sys.exit(1)


def _label_flags(parser: Parser) -> None:
    parser.add_argument(
        "--teacher", type=str, required=True, help="a detector, or hf:NAME of one that is told by text what to find"
    )
    parser.add_argument("--images", type=Path, required=True, help="an image, or a folder of images with its sub-folders")
    parser.add_argument("--out", type=Path, required=True, help="folder for the COCO data set; it must not exist")
    parser.add_argument("--classes", type=str, default="", help="what to find, e.g. helmet,person; none: all of the detector's")
    parser.add_argument("--score", type=float, default=0.3, help="lowest score of a box, 0..1")
    parser.add_argument("--size", type=int | None, default=None, help="side of the images in pixels; none: that of the training")
    parser.add_argument("--nms", type=float, default=0.7, help="largest IoU of two boxes of a class, for models told by text")
    parser.add_argument("--review", type=int, default=200, help="number of images on the page review.html")
    parser.add_argument("--device", type=Literal["auto", "cpu", "cuda"], default="auto")


def _label(chosen: Namespace) -> None:
    from detdistill import api
    from detdistill.errors import counted

    values = _plain(chosen)
    values["classes"] = [name.strip() for name in values["classes"].split(",") if name.strip()]
    found = api.label(**values)
    for name, count in found.boxes.items():
        _say(f"{count:>8}  {name}")
    _say(f"{counted(sum(found.boxes.values()), 'box', 'boxes')} on {counted(found.images, 'image')}")
    _say(f"data set {found.folder}; look through it: {found.folder / 'review.html'}")
    if found.unreadable:
        sys.exit(1)


def _student_flags(parser: Parser) -> None:
    parser.add_argument(
        "--model", type=str, required=True, help="checkpoint (runs/x/checkpoints/best.ckpt), run folder or student folder"
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--data", type=str | None, default=None, help="the run's data, if an unfinished run's data have moved")
    parser.add_argument("--size", type=int | None, default=None, help="image size to be noted; none: that of the training")
    parser.add_argument("--resize", type=Literal["letterbox", "stretch", "short_side"] | None, default=None)
    parser.add_argument("--max_size", type=int | None, default=None)
    parser.add_argument("--pt", type=bool, default=False, help="also write best.pt for ultralytics.YOLO or libreyolo.LibreYOLO")


def _student(chosen: Namespace) -> None:
    from detdistill import api

    _say(f"student folder {api.export_student(**_plain(chosen))}")


def _view_flags(parser: Parser, whose: str) -> None:
    parser.add_argument("--size", type=int | None, default=None, help=f"side of the images in pixels; none: {whose}")
    parser.add_argument("--resize", type=Literal["letterbox", "stretch", "short_side"] | None, default=None)
    parser.add_argument("--max_size", type=int | None, default=None)


def _export_flags(parser: Parser) -> None:
    parser.add_argument("--model", type=str, required=True, help="run folder, student folder, or torchvision:NAME,weights=...")
    parser.add_argument("--out", type=Path, required=True, help="file: .onnx, .xml (openvino), .torchscript or .pt2")
    parser.add_argument("--data", type=str | None, default=None, help="images for the proof and for int8; none: noise, no AP")
    parser.add_argument("--format", type=Literal["onnx", "openvino", "torchscript", "pt2"], default="onnx")
    parser.add_argument("--int8", type=bool, default=False, help="also write the int8 form, calibrated on training images")
    parser.add_argument("--nms", type=bool, default=False, help="NMS inside the file: dense heads, one image at a time")
    parser.add_argument(
        "--dynamic", type=str, default="all", help="what may vary: batch,size, one of them, none, or all that can"
    )
    parser.add_argument("--opset", type=int | None, default=None, help="of ONNX; none: the smallest that suffices")
    parser.add_argument("--calibration", type=int, default=64, help="number of training images for int8")
    parser.add_argument("--batch", type=int, default=8, help="images per batch of the evaluations")
    parser.add_argument("--overwrite", type=bool, default=False, help="replace files that exist")
    parser.add_argument("--allow_loss", type=bool, default=False, help="exit with 0 although a file lost AP")
    _view_flags(parser, "the run's size")
    parser.add_argument("--strict", type=bool, default=False)


def _export(chosen: Namespace) -> None:
    from detdistill import api
    from detdistill.listing import show_export

    values = _plain(chosen)
    allowed, free = values.pop("allow_loss"), values.pop("dynamic")
    values["dynamic"] = None if free == "all" else () if free == "none" else tuple(free.split(","))
    made = api.export(**values)
    show_export(made)
    if not made.passed and not allowed:
        lost = ", ".join(f"{stage.name} lost {stage.lost:.2f} AP" for stage in made.stages if not stage.passed)
        sys.stderr.write(f"detdistill: {lost}, more than allowed; --allow_loss true accepts it\n")
        sys.exit(1)


def _push_flags(parser: Parser) -> None:
    parser.add_argument("--model", type=Path, required=True, help="run folder, student folder, or a file that export wrote")
    parser.add_argument("--to", type=str, required=True, help="hub:NAME or hub:OWNER/NAME")
    parser.add_argument("--private", type=bool, default=True, help="a new repository is private")
    parser.add_argument("--message", type=str, default="Upload by detdistill", help="message of the commit")


def _push(chosen: Namespace) -> None:
    from detdistill import api

    _say(f"uploaded to {api.push(**_plain(chosen))}")


def _bench_flags(parser: Parser) -> None:
    parser.add_argument(
        "--model",
        dest="models",
        nargs="+",
        type=str,
        required=True,
        help="runs, student folders, exported files, model strings",
    )
    parser.add_argument("--data", type=str | None, default=None, help="images of its val split; none: noise")
    parser.add_argument("--batch", type=int, default=1, help="images at a time")
    parser.add_argument("--rounds", type=int, default=30, help="how often each model runs; the median counts")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch and of the other runtimes")
    parser.add_argument("--device", type=Literal["auto", "cpu", "cuda"], default="cpu")
    _view_flags(parser, "that of the first model")
    parser.add_argument("--strict", type=bool, default=False)
    _json_flag(parser)


def _bench(chosen: Namespace) -> None:
    from dataclasses import asdict

    from detdistill import api
    from detdistill.listing import show_bench

    _show(
        chosen,
        lambda: api.bench(**_plain(chosen)),
        show_bench,
        lambda found: {name: asdict(timing) for name, timing in found.items()},
    )


def _compare_flags(parser: Parser) -> None:
    parser.add_argument("runs", nargs="+", type=str, help="run folders, folders that hold them, or exported files of runs")
    parser.add_argument("--data", type=str | None, default=None, help="evaluate the files here; none: scores of export.json")
    parser.add_argument("--metric", type=str, default="AP", help="one of the 12 COCO numbers")
    parser.add_argument("--allow_unequal", type=bool, default=False, help="compare runs whose budgets differ")
    parser.add_argument("--out", type=Path | None, default=None, help="also write the result to this JSON file")
    _json_flag(parser, FRACTIONS)


def _compare(chosen: Namespace) -> None:
    from detdistill import api
    from detdistill.compare import gains_json, show_gains

    _show(chosen, lambda: api.compare(**_plain(chosen)), show_gains, gains_json)


def _report_flags(parser: Parser) -> None:
    parser.add_argument("runs", nargs="+", type=str, help="run folders, or folders that hold them")
    parser.add_argument("--out", type=Path | None, default=None, help="path of the page; none: report.html in the first folder")


def _report(chosen: Namespace) -> None:
    from detdistill import api

    _say(f"report {api.report(**_plain(chosen))}")


def _demo_flags(parser: Parser) -> None:
    parser.add_argument("--out", type=Path | None, default=None, help="folder; none: a new one under runs/")
    parser.add_argument(
        "--seeds",
        type=tuple[int, ...],
        default=(0,),
        help="seeds of the students; a proof of the gain needs several, e.g. 0,1,2 or 0-2",
    )
    parser.add_argument("--method", type=str, default="pkd", help="one method, or several: fgd+pkd")
    parser.add_argument("--train_images", type=int, default=2000)
    parser.add_argument("--val_images", type=int, default=400)
    parser.add_argument("--teacher_epochs", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=3, help="epochs of the students")


def _demo(chosen: Namespace) -> None:
    from detdistill.demo import demo

    demo(**_plain(chosen))


def _methods_flags(parser: Parser) -> None:
    build = "without --{0}: with a {0} of the same build"
    parser.add_argument(
        "--teacher", type=str | None, default=None, help=f"show which methods work with this teacher; {build.format('student')}"
    )
    parser.add_argument(
        "--student", type=str | None, default=None, help=f"show which methods work with this student; {build.format('teacher')}"
    )
    _json_flag(parser)


def _methods(chosen: Namespace) -> None:
    from dataclasses import asdict

    from detdistill.listing import list_methods, show_methods

    _show(chosen, lambda: list_methods(**_plain(chosen)), show_methods, asdict)


def _detectors_flags(parser: Parser) -> None:
    parser.add_argument("--probe", type=bool, default=False, help="try the detectors again, even if the result is kept")
    _json_flag(parser)


def _detectors(chosen: Namespace) -> None:
    from detdistill.listing import detectors_json, list_detectors, show_detectors

    _show(chosen, lambda: list_detectors(**_plain(chosen)), show_detectors, detectors_json)


def _recipes(chosen: Namespace) -> None:
    from dataclasses import asdict

    from detdistill.listing import list_recipes, show_recipes

    _show(chosen, list_recipes, show_recipes, lambda found: {"recipes": [asdict(recipe) for recipe in found]})


def _cite_flags(parser: Parser) -> None:
    parser.add_argument("method", type=str, help="a method, or several joined by +")
    _json_flag(parser)


def _cite(chosen: Namespace) -> None:
    from detdistill.methods.shared.catalogue import entry, split_methods  # not `listing`, whose tables take longer to import

    def show(found: Sequence[Entry]) -> None:
        for method in found:
            _say(method.bibtex)

    def document(found: Sequence[Entry]) -> dict[str, Any]:
        return {"methods": [{"name": method.slug, "title": method.title, "bibtex": method.bibtex} for method in found]}

    _show(chosen, lambda: [entry(slug) for slug, *_ in split_methods(chosen.method)], show, document)


def _inspect_flags(parser: Parser) -> None:
    parser.add_argument("data", type=str, help="COCO, YOLO, VOC or Roboflow data, or digits")
    parser.add_argument("--strict", type=bool, default=False, help="fail at the first defect")
    parser.add_argument("--deep", type=bool, default=False, help="decode every image")
    parser.add_argument("--out", type=Path | None, default=None, help="also write the report to this JSON file")
    _json_flag(parser)


def _inspect(chosen: Namespace) -> None:
    from detdistill import api, printing

    values = _plain(chosen)
    out = values.pop("out")

    def document(found: DataReport) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(found.to_json())
        return content

    _show(chosen, lambda: api.inspect_data(**values), lambda found: found.render(printing.stdout()), document, out)


Describe = Callable[[Parser], None]
Act = Callable[[Namespace], None]


def _schedules_flags(parser: Parser) -> None:
    _distill_flags(parser)
    parser.add_argument("--at", type=tuple[float, ...], default=(1, 3), help="lengths, as multiples of the epochs or steps")
    _json_flag(parser, FRACTIONS)


def _schedules(chosen: Namespace) -> None:
    from detdistill import api
    from detdistill.schedules import schedules_json, show_schedules

    _show(chosen, lambda: api.schedules(**_plain(chosen)), show_schedules, schedules_json)


def _find_flags(parser: Parser) -> None:
    _distill_flags(parser)
    parser.add_argument(
        "--over",
        type=tuple[str, ...],
        default=("lr", "distill_weight"),
        help="what is searched: lr, distill_weight, balance, METHOD.NAME=LOW..HIGH",
    )
    parser.add_argument("--trials", type=int, default=12, help="number of trials; the first has the settings as given")
    parser.add_argument("--at_once", type=int, default=1, help="trials that are suggested together, before they have results")
    _json_flag(parser, FRACTIONS)


def _find(chosen: Namespace) -> None:
    from detdistill import api
    from detdistill.find import found_json, show_found

    _show(chosen, lambda: api.find(**_plain(chosen)), show_found, found_json)


VERBS: dict[str, tuple[Describe, Act, str]] = {
    "demo": (_demo_flags, _demo, "run the built-in example, data to report, in minutes on a CPU"),
    "train": (_train_flags, _train, "train a detector alone: a teacher or a baseline"),
    "distill": (_distill_flags, _distill, "distil a teacher into a student, and measure the gain"),
    "doctor": (_doctor_flags, _doctor, "check data, teacher, pair and method before a run, in minutes"),
    "schedules": (_schedules_flags, _schedules, "distil at several lengths: a better student, or a faster one?"),
    "find": (_find_flags, _find, "search weights and learning rate on held-out training images"),
    "cache": (_cache_flags, _cache, "store a teacher's outputs, so that later runs need no teacher"),
    "cache-verify": (_verify_flags, _verify, "check a cache's checksums, and compare it with its teacher"),
    "teach": (_teach_flags, _teach, "serve a teacher to students elsewhere, also several at once"),
    "eval": (_eval_flags, _eval, "compute the 12 COCO numbers and the AP of each class"),
    "predict": (_predict_flags, _predict, "draw a detector's boxes on images"),
    "label": (_label_flags, _label, "label images by a model, also by one that is told in words"),
    "student": (_student_flags, _student, "write a student folder from a checkpoint, e.g. best.ckpt"),
    "export": (_export_flags, _export, "write a model as ONNX, OpenVINO or int8, and prove the file"),
    "bench": (_bench_flags, _bench, "measure the latency of models and exported files in turns"),
    "push": (_push_flags, _push, "upload a student or an exported file to the Hugging Face hub"),
    "compare": (_compare_flags, _compare, "pair runs by seed: gain, 95 % interval, verdict"),
    "report": (_report_flags, _report, "write one self-contained HTML page about runs"),
    "methods": (_methods_flags, _methods, "list the methods, and which of them work with a pair"),
    "detectors": (_detectors_flags, _detectors, "list the detectors and their capabilities"),
    "recipes": (_json_flag, _recipes, "list the ready-made settings for --recipe"),
    "cite": (_cite_flags, _cite, "print the BibTeX of a method"),
    "data-inspect": (_inspect_flags, _inspect, "show counts, sizes, class balance and every defect of a data set"),
}
"""Each command: the function that adds its flags, the function that runs it, and its summary in one line."""


def recipe_path(name: str) -> Path:
    """Path of a recipe's YAML file.

    Raises:
        DetdistillError: there is no recipe of this name.
    """
    folder = Path(__file__).parent / "recipes"
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    if not name:
        raise DetdistillError(f"recipe: needs a name; recipes: {', '.join(names)}")
    if name not in names:
        raise DetdistillError(f"no recipe {name!r}{nearest(name, names)}; recipes: {', '.join(names)}")
    return folder / f"{name}.yaml"


def _plain(chosen: Namespace) -> dict[str, Any]:
    """The chosen values as keyword arguments for a Python function."""
    return {key: value for key, value in vars(chosen).items() if key not in ("config", "json", "recipe", "__path__")}


def _say(text: str) -> None:
    if is_main_process():  # only the first process of a distributed run prints
        print(text, flush=True)  # flushed here, where ``main`` still catches a closed pipe
