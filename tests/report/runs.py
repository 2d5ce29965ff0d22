"""Run folders as training leaves them, written by hand: every number on the page can be foretold."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import yaml

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
CLASSES = ("cat", "<b>dog</b>", "$a_b$")


def write_run(
    folder: Path,
    role: str,
    ap: float,
    *,
    seed: int = 0,
    method: str | None = None,
    teacher_ap: float | None = 0.4,
    share: float | None = 0.3,
    kd_terms: tuple[str, ...] = ("pkd",),
    seconds: float = 100.0,
    per_class: dict[str, float] | None = None,
    rising: bool = False,
    **changes: Any,
) -> Path:
    folder.mkdir(parents=True)
    metrics = dict.fromkeys(METRICS, ap) | {"APl": -1.0, "AP50": ap + 0.1}
    config: dict[str, Any] = {"data": "nowhere/data.yaml", "epochs": 12, "batch": 8, "lr": 0.001, "size": 128, "seed": seed}
    config |= changes.pop("config", {})
    summary = {
        "name": folder.name,
        "role": role,
        "student": "fcos:small" if role != "teacher" else "fcos:large",
        "teacher": "runs/teacher" if role == "distilled" else None,
        "teacher_metrics": None if teacher_ap is None or role != "distilled" else dict.fromkeys(METRICS, teacher_ap),
        "teacher_per_class": dict.fromkeys(CLASSES, 0.5) if role == "distilled" else None,
        "method": method,
        "inherit": False,
        "seed": seed,
        "epochs": 12,
        "steps": 120,
        "images_seen": 960,
        "batch": 8,
        "metrics": metrics,
        "per_class": per_class or dict.fromkeys(CLASSES, ap),
        "best_ap": ap,
        "seconds": seconds,
        "parameters": 1_500_000,
        "versions": {"detdistill": "0.1.0", "torch": "2.11"},
        "hardware": "2 CPU cores",
        "data": {
            "path": "nowhere/data.yaml",
            "fingerprint": "train-print",
            "val_fingerprint": "val-print",
            "train_images": 80,
            "val_images": 40,
            "classes": list(CLASSES),
        },
        "config_fingerprint": "0123abcd",
        "finished": "2026-01-02T03:04:05",
        **changes,
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    terms = ("classification", *(kd_terms if role == "distilled" else ()))
    columns = [
        "stage",
        "step",
        "total",
        "epoch",
        "lr",
        "seconds",
        "loss",
        *[f"train/{term}" for term in terms],
        "val/AP",
        "val/AP50",
    ]
    if share is not None:
        columns += [f"share/{term}" for term in terms]
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for epoch in range(12):
            step = 10 * (epoch + 1)
            row: dict[str, Any] = {"stage": "train", "step": step, "total": 120, "epoch": epoch, "lr": 0.001, "seconds": step}
            losses = {f"train/{term}": 2.0 / step for term in terms}
            shares = {} if share is None else {f"share/{term}": share if term in kd_terms else 1 - share for term in terms}
            writer.writerow({**row, "loss": 4.0 / step, **losses, **shares})
            now = ap * (epoch + 1) / 12 if rising else ap
            writer.writerow({**row, "val/AP": now, "val/AP50": now + 0.1})
    return folder


def write_experiment(folder: Path, method: str, baselines: list[float], distilled: list[float], **changes: Any) -> list[Path]:
    """Baseline and distilled runs of seeds 0, 1, ..."""
    runs = []
    for seed, (plain, taught) in enumerate(zip(baselines, distilled, strict=True)):
        runs.append(write_run(folder / f"baseline-seed{seed}", "baseline", plain, seed=seed))
        runs.append(write_run(folder / f"distilled-seed{seed}", "distilled", taught, seed=seed, method=method, **changes))
    return runs


def errors(**changes: float) -> dict[str, float]:
    """What AP50 is lost to, as a summary notes it."""
    lost = {"Cls": 0.05, "Loc": 0.10, "Both": 0.01, "Dupe": 0.0, "Bkg": 0.02, "Miss": 0.20, "FalsePos": 0.12, "FalseNeg": 0.30}
    return lost | changes
