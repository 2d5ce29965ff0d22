"""The entry point of ``detdistill``, and the table of its commands."""

from __future__ import annotations

import errno
import os
import sys
import warnings
from collections.abc import Callable, Sequence

from jsonargparse import Namespace

from detdistill.cli import lists, models, runs
from detdistill.cli.arguments import Parser, json_flag, normalized
from detdistill.cli.output import fail, notes_on, say
from detdistill.cli.starting import check_paths, load_torch
from detdistill.errors import DetdistillError, nearest
from detdistill.processes import end_with_parent

Describe = Callable[[Parser], None]
Act = Callable[[Namespace], None]


VERB_SYNONYMS = {
    "benchmark": "bench", "convert": "export", "detect": "predict", "evaluate": "eval", "fit": "train",
    "infer": "predict", "inference": "predict", "inspect": "data inspect",
    "list": "methods", "models": "detectors", "serve": "teach", "test": "eval", "val": "eval", "validate": "eval",
    "verify": "cache verify",
}  # fmt: skip
"""Commands of other tools and words for the same thing; our command for each."""


DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
"""Errors of a disk that is full or not writable. They are reported as user errors, wherever they occur."""


VERBS: dict[str, tuple[Describe, Act, str]] = {
    "demo": (runs.demo_flags, runs.demo, "run the built-in example, data to report, in minutes on a CPU"),
    "train": (runs.train_flags, runs.train, "train a detector alone: a teacher or a baseline"),
    "distill": (runs.distill_flags, runs.distill, "distil a teacher into a student, and measure the gain"),
    "doctor": (runs.doctor_flags, runs.doctor, "check data, teacher, pair and method before a run, in minutes"),
    "schedules": (runs.schedules_flags, runs.schedules, "distil at several lengths: a better student, or a faster one?"),
    "find": (runs.find_flags, runs.find, "search weights and learning rate on held-out training images"),
    "cache": (runs.cache_flags, runs.cache, "store a teacher's outputs, so that later runs need no teacher"),
    "cache-verify": (runs.verify_flags, runs.verify, "check a cache's checksums, and compare it with its teacher"),
    "teach": (runs.teach_flags, runs.teach, "serve a teacher to students elsewhere, also several at once"),
    "eval": (models.eval_flags, models.evaluate, "compute the 12 COCO numbers and the AP of each class"),
    "predict": (models.predict_flags, models.predict, "draw a detector's boxes on images"),
    "label": (models.label_flags, models.label, "label images by a model, also by one that is told in words"),
    "student": (models.student_flags, models.student, "write a student folder from a checkpoint, e.g. best.ckpt"),
    "export": (models.export_flags, models.export, "write a model as ONNX, OpenVINO or int8, and prove the file"),
    "bench": (models.bench_flags, models.bench, "measure the latency of models and exported files in turns"),
    "push": (models.push_flags, models.push, "upload a student or an exported file to the Hugging Face hub"),
    "compare": (lists.compare_flags, lists.compare, "pair runs by seed: gain, 95 % interval, verdict"),
    "report": (lists.report_flags, lists.report, "write one self-contained HTML page about runs"),
    "methods": (lists.methods_flags, lists.methods, "list the methods, and which of them work with a pair"),
    "detectors": (lists.detectors_flags, lists.detectors, "list the detectors and their capabilities"),
    "recipes": (json_flag, lists.recipes, "list the ready-made settings for --recipe"),
    "cite": (lists.cite_flags, lists.cite, "print the BibTeX of a method"),
    "data-inspect": (lists.inspect_flags, lists.inspect, "show counts, sizes, class balance and every defect of a data set"),
}
"""Each command: the function that adds its flags, the function that runs it, and its summary in one line."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command. User errors end with one line and exit code 2, Ctrl-C with 130.

    Args:
        arguments: the words after ``detdistill``; None: those of this process.
    """
    end_with_parent()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = notes_on(warnings.showwarning)
            _run(list(sys.argv[1:] if arguments is None else arguments))
    except DetdistillError as error:
        fail(str(error))
    except BrokenPipeError:  # the reader closed the pipe; without this, Python would fail when it flushes stdout at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.errno not in DISK:
            raise
        name = error.filename or "a file"
        if error.errno == errno.EACCES and os.path.exists(name) and not os.access(name, os.R_OK):
            fail(f"cannot read {name}: {error.strerror}; change its permissions")
        fail(f"cannot write {name}: {error.strerror}; make space or write elsewhere")
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted; --resume true goes on from the last checkpoint\n")
        sys.exit(130)


def _run(given: list[str]) -> None:
    if given[:2] in (["data", "inspect"], ["cache", "verify"]):
        given = ["-".join(given[:2]), *given[2:]]
    if not given or given[0] in ("-h", "--help", "help"):
        say(overview())
        return
    if given[0] == "--version":
        from detdistill import __version__

        say(f"detdistill {__version__}")
        return
    verb, *rest = given
    names = {verb: verb.replace("-", " ") for verb in VERBS}
    if verb not in VERBS:
        typed = " ".join(given[:2]) if verb == "data" else verb
        known = VERB_SYNONYMS.get(typed)
        hint = f" (did you mean {known!r}?)" if known else nearest(typed, names.values())
        fail(f"no command {typed!r}{hint}; commands: {', '.join(names.values())}")
    describe, act, summary = VERBS[verb]
    parser = Parser(prog=f"detdistill {names[verb]}", description=summary, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file with any of these settings")
    describe(parser)
    chosen = parser.parse_args(normalized(parser, rest))
    check_paths(chosen)
    load_torch(verb)
    act(chosen)


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
