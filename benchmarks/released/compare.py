"""Run all comparisons with released code, each in processes of its own, and write a table after each.

    OMP_NUM_THREADS=1 uv run python benchmarks/losses.py --released FOLDER --out benchmarks/results/losses_released_cpu.json

Processor time, one thread, rounds in turns in one process; the ratio is the median of released / ours over the rounds. Peak memory
of a step is measured in another process for each side, less inputs, weights and their gradients.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

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
    rows: dict[str, Any] = json.loads(out.read_text())["rows"] if only and out and out.exists() else {}
    for module, names in PLACES.items():
        for name in names.split():
            if only and name not in only:
                continue
            rows[name] = _row(f"{module}.{name}", folder)
            print(name, rows[name], flush=True)
            if out:
                _write(out, rows)


def _row(case: str, folder: Path) -> dict[str, Any]:
    try:
        row = _measured(case, folder, "time")
        for side in ("ours", "released"):
            row[f"{side}_peak_mb"] = _measured(case, folder, side)
        row["memory_ours_over_released"] = round(row["ours_peak_mb"] / max(row["released_peak_mb"], 0.1), 3)
    except subprocess.CalledProcessError as error:
        return {"error": error.stderr.strip().splitlines()[-1]}
    return row


def _measured(case: str, folder: Path, what: str) -> Any:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-m", "released.compare", "--case", case, "--folder", str(folder), "--what", what]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def _write(out: Path, rows: dict[str, Any]) -> None:
    from detdistill.training.machine import hardware, versions

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


def main() -> None:
    """Measure one comparison in this process and print the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--case", "--folder", "--what"):
        parser.add_argument(name, required=True)
    chosen = parser.parse_args()
    import torch

    from released.measure import peak_mb, timed

    torch.set_num_threads(1)
    module, name = chosen.case.split(".")
    case = getattr(importlib.import_module(f"released.{module}"), name)(Path(chosen.folder))
    if chosen.what == "time":
        print(json.dumps({**timed(case, ROUNDS), "differs": case.differs, "note": case.note}))
    else:
        print(json.dumps(peak_mb(case, chosen.what)))


if __name__ == "__main__":
    main()
