"""Run all comparisons with released code, each in a process of its own, and write a table after each.

    OMP_NUM_THREADS=1 uv run python benchmarks/losses.py --released FOLDER --out benchmarks/results/losses_released_cpu.json

Processor time, one thread, rounds in turns in one process; the ratio is the median of released / ours over the rounds. Peak
memory of a step is measured in another process for each side, less inputs, weights and their gradients.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import detdistill.losses  # noqa: F401  (loaded once, before a process is forked for each comparison)
from detdistill.training.machine import hardware, versions
from released.measure import Case, peak_mb, timed

PLACES = {
    "maps": "fitnet fitnet_normalized pkd cwd fkd fgd mgd skd",
    "masks": "frs fgfi defeat glamd drkd pgd",
    "predictions": "bckd ld crosskd lad",
    "regions": "mimic odkd gid dsig g_detkd head labelenc lgd",
}
"""Comparisons: a function of each name in the module."""

WITHOUT = {
    "tadf": "no released code; the mask in DeFeat's repository is NumPy on the CPU, without a loss",
    "rm_pfi": "no released code",
    "tbd": "no released code",
    "scalekd": "no released code",
    "mimicdet": "no released code",
    "unikd": "no released code",
    "icd": "released code not run here: encoder, decoder and distiller are tied to detectron2's structures and a data file",
    "ssd_det": "released code not run here: its losses are methods of a RoI head that runs mmdet's whole RoI machinery",
}
"""Methods without a comparison, and why."""
ROUNDS = 9


def compare_all(folder: Path, out: Path | None, only: list[str] | None) -> None:
    """Measure the comparisons; one that fails is written down with its error, and the next one is measured."""
    torch.set_num_threads(1)
    rows: dict[str, Any] = json.loads(out.read_text())["rows"] if only and out and out.exists() else {}
    for module, names in PLACES.items():
        for name in names.split():
            if only and name not in only:
                continue
            rows[name] = _row(f"{module}.{name}", folder)
            print(name, rows[name], flush=True)
            if out:
                _write(out, rows)


def markdown(rows: dict[str, Any]) -> str:
    """The table of ``docs/results.md``: ``python benchmarks/losses.py --table FILE`` prints it."""
    lines = ["| loss | ours, s | released, s | released / ours | memory, ours / released |", "| --- | --- | --- | --- | --- |"]
    for name, row in rows.items():
        if "error" in row:
            lines.append(f"| `{name}` | {row['error']} | | | |")
            continue
        seconds = [f"{row[f'{side}_seconds']:.3g}" for side in ("ours", "released")]
        parts = [f"`{name}`", *seconds, f"{row['released_over_ours']:.2f}", f"{row['memory_ours_over_released']:.2f}"]
        lines.append(f"| {' | '.join(parts)} |")
    return "\n".join([*lines, "", *(f"- `{name}`: {why}." for name, why in WITHOUT.items())])


def _row(case: str, folder: Path) -> dict[str, Any]:
    return _in_a_process(lambda: _measured(case, folder))


def _measured(case: str, folder: Path) -> dict[str, Any]:
    module, name = case.split(".")
    built: Case = getattr(importlib.import_module(f"released.{module}"), name)(folder)
    row = _in_a_process(lambda: {**timed(built, ROUNDS), "differs": built.differs, "note": built.note})
    for side in ("ours", "released"):
        row |= _in_a_process(lambda side=side: {f"{side}_peak_mb": peak_mb(built, side)})  # type: ignore[misc]
    row["memory_ours_over_released"] = round(row["ours_peak_mb"] / max(row["released_peak_mb"], 0.1), 3)
    return row


def _in_a_process(action: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Result of an action in a forked process, which has all modules loaded; an error becomes the result."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            result = action()
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}"}
        os.write(writer, json.dumps(result).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        text = file.read()
    os.waitpid(child, 0)
    found: dict[str, Any] = json.loads(text or '{"error": "the process ended"}')
    return found


def _write(out: Path, rows: dict[str, Any]) -> None:
    sources = {
        name: getattr(importlib.import_module(f"released.{module}"), name).__doc__
        for module, names in PLACES.items()
        for name in names.split()
    }
    content = {
        "what": "value and gradient of each loss on inputs of a COCO-size batch (800x1088 pixels, 2 images), float32, one thread",
        "command": f"OMP_NUM_THREADS=1 uv run python benchmarks/losses.py --released FOLDER --out {out}",
        "rows": rows,
        "compared": {name: text for name, text in sources.items() if name in rows},
        "without": WITHOUT,
        "hardware": hardware(),
        "versions": versions(),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(content, indent=2) + "\n")
