"""The origin of a trained student for its card and its exported files, from what a run writes about itself."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from detdistill.card import Origin
from detdistill.detectors.save import revise_origin
from detdistill.methods.shared.catalogue import entry, split_methods
from detdistill.settings import BUDGET, renamed

KEPT = (
    "role", "student", "teacher", "teacher_model", "teacher_parameters", "method", "inherit", "init", "seed", "steps",
    "images_seen", "stopped_early", "metrics", "data",
)  # fmt: skip
"""Keys of ``summary.json`` that an origin holds."""


def origin_of(summary: Mapping[str, Any], config: Mapping[str, Any]) -> Origin:
    """The origin of a run's student.

    Args:
        summary: content of ``summary.json``.
        config: settings of the run.
    """
    run: dict[str, Any] = {key: summary.get(key) for key in KEPT}
    run["config"] = {key: config[key] for key in (*BUDGET, "distill_weight") if key in config}
    if config.get("balance") is not None:
        run["config"]["balance"] = config["balance"]
    run["student"], run["teacher"] = shortened(run["student"]), shortened(run["teacher"])
    run["data"] = {**run["data"], "path": shortened(run["data"].get("path"))}
    if run["init"]:
        run["init"] = {**run["init"], "from": shortened(run["init"].get("from"))}
    method = run["method"]
    bibtex = tuple(entry(slug).bibtex for slug, *_ in split_methods(method)) if method else ()
    teacher = summary.get("teacher_metrics") or {}
    return Origin(run, bibtex, teacher.get("AP"))


def known_origin(model: str) -> Origin | None:
    """The origin of a saved student, by the path of its run, its folder or a checkpoint; None: nothing is known.

    ``student.json`` says it; for runs of earlier versions, ``summary.json`` and ``config.yaml`` of the run. The scores of a run
    are those of its last weights, so a checkpoint has none.
    """
    path = Path(model)
    if path.is_file():
        found = known_origin(str(path.parent.parent))
        return None if found is None else replace(found, run={**found.run, "metrics": {}}, seeds=None)
    for folder in (path, path / "student"):
        if (found := Origin.from_plain(_mapping(folder / "student.json").get("origin"))) is not None:
            return found
    for folder in (path, path.parent):
        summary, config = _mapping(folder / "summary.json"), _mapping(folder / "config.yaml")
        if summary and config and {"metrics", "data"} <= summary.keys():
            return origin_of(summary, renamed(config))
    return None


def shortened(name: str | None) -> str | None:
    """The last two parts of a path; model strings stay. Cards and exported files leave the machine on which they were made."""
    if not name or not (os.path.isabs(name) or name.startswith(("~", "."))):
        return name
    return "/".join(Path(name).parts[-2:]).lstrip("/")


def note_in_card(run: Path, **changes: Any) -> None:
    """Change fields of the origin of a run's student; see ``revise_origin``. Runs without a student folder stay as they are."""
    if (run / "student" / "student.json").is_file():
        revise_origin(run / "student", **changes)


def _mapping(path: Path) -> dict[str, Any]:
    """Content of a JSON or YAML file; empty if there is none, or if it holds something else."""
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}
