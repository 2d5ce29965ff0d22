"""The README of a student folder and of an exported file, as a model card in the form of the Hugging Face hub.

A card starts with a block of metadata between two lines ``---`` (YAML), which the hub reads; the rest is Markdown for people.
Names come from the data and from the user: they are quoted as JSON, so they stay on their line and are not read as Markdown.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

TAG = "detdistill"
"""A tag of every card, by which this package knows its own."""
TRAINING, RESULTS = "Training", "Results"
"""Headings of the sections that are written anew when more is known about a run."""


@dataclass(frozen=True)
class Origin:
    """How a detector was made, as far as a card tells it and as a comparison of exported files needs it."""

    run: Mapping[str, Any]
    """Excerpt of the run's ``summary.json`` and settings; the paths in it are shortened to their last parts."""
    bibtex: tuple[str, ...] = ()
    """Of the methods."""
    teacher_ap: float | None = None
    """AP of the teacher on the validation images, 0..1."""
    seeds: Mapping[str, Any] | None = None
    """Of several runs that differ by their seed: ``seeds``, and ``AP`` and ``gain`` (mean, low, high; 0..1) with ``verdict``."""

    def to_plain(self) -> dict[str, Any]:
        """The origin as JSON."""
        return asdict(self)

    @staticmethod
    def from_plain(content: object) -> Origin | None:
        """Invert ``to_plain``; None: ``content`` is in no such form."""
        if not isinstance(content, Mapping) or not isinstance(content.get("run"), Mapping):
            return None
        return Origin(
            dict(content["run"]), tuple(content.get("bibtex") or ()), content.get("teacher_ap"), content.get("seeds") or None
        )


@dataclass(frozen=True)
class Card:
    """Everything that a card says."""

    library: str
    """The library that loads the folder, in the hub's words."""
    name: str
    """Model string of the detector."""
    about: str
    """What the folder holds, in a sentence or two of Markdown."""
    images: str
    """Size of the images and their normalisation."""
    classes: Sequence[str]
    use: Sequence[str]
    """Paragraphs of Markdown about loading; the first has the five lines for readers with this package."""
    origin: Origin | None = None
    results: str = ""
    """Markdown that follows the AP, for example a table of the exported files."""

    def text(self) -> str:
        """The whole card."""
        names = "\n".join(f"    {index} {json.dumps(name, ensure_ascii=False)}" for index, name in enumerate(self.classes))
        parts = [
            f"---\n{self._metadata()}---",
            f"# {self._title()}",
            f"    {json.dumps(self.name, ensure_ascii=False)}",
            self.about,
            "## Use",
            *self.use,
            "## Images",
            self.images,
            f"## {RESULTS}",
            results(self.origin),
            *([self.results] if self.results else []),
            f"## {TRAINING}",
            training(self.origin),
            "## Licence",
            licence(self.origin, self._kind()),
            "## Citation",
            citation(self.origin),
            "## Classes",
            names + "\n",
        ]
        return "\n\n".join(parts)

    def _kind(self) -> str:
        """The detector's family in the model string, e.g. ``fcos``; empty if it is no plain word."""
        word = self.name.partition(":")[0]
        return word if re.fullmatch(r"\w[\w-]*", word) else ""

    def _title(self) -> str:
        method = self.origin.run.get("method") if self.origin else None
        slugs = " and ".join(re.findall(r"(?:^|\+)([a-z_]\w*)", str(method))) if method else ""
        return f"{self._kind() or 'A detector'} {f'distilled with {slugs}' if slugs else 'trained by detdistill'}"

    def _metadata(self) -> str:
        distilled = self.origin is not None and bool(self.origin.run.get("method"))
        tags = ["object-detection", TAG, *(["knowledge-distillation"] if distilled else []), self._kind()]
        content: dict[str, Any] = {
            "library_name": self.library,
            "pipeline_tag": "object-detection",
            "tags": [tag for tag in dict.fromkeys(tags) if tag],
        }
        note = (
            "# license: yours to choose; see the section Licence\n# datasets: names of the data on the hub, if they are there\n"
        )
        return note + yaml.safe_dump(content | self._scores(), sort_keys=False, allow_unicode=True)

    def _scores(self) -> dict[str, Any]:
        """AP in the hub's form, if it is known; the hub shows points of 100 as they are written."""
        ap = None if self.origin is None else self.origin.run["metrics"].get("AP")
        if self.origin is None or ap is None or ap < 0:
            return {}
        data = str(self.origin.run["data"].get("path") or "data")
        result = {
            "task": {"type": "object-detection"},
            "dataset": {"name": data, "type": re.sub(r"\W+", "-", data).strip("-").lower() or "data", "split": "val"},
            "metrics": [{"type": "AP", "name": "AP (COCO, 50:95)", "value": round(100 * ap, 2)}],
        }
        return {"model-index": [{"name": self._kind() or TAG, "results": [result]}]}


def is_own(path: Path) -> bool:
    """Whether a README was written by this package."""
    try:
        head = path.read_text(encoding="utf-8").partition("---\n")[2].partition("\n---")[0]
    except (OSError, UnicodeDecodeError):
        return False
    return f"- {TAG}\n" in f"{head}\n"


def replaced(text: str, origin: Origin) -> str:
    """A card whose sections about training and results are written anew; all else stays."""
    for heading, body in ((RESULTS, results(origin)), (TRAINING, training(origin))):
        before, title, rest = text.partition(f"## {heading}\n\n")
        if title:
            after = rest.partition("\n## ")[2]
            text = f"{before}{title}{body}\n\n## {after}"
    return text


def quoted(text: object) -> str:
    """A name as code on one line."""
    return "`" + json.dumps(str(text), ensure_ascii=False)[1:-1].replace("`", "'") + "`"


def results(origin: Origin | None) -> str:
    """AP of this detector; with several seeds also mean and interval, and the gain over training alone."""
    if origin is None:
        return "Not known: these weights come from no run of detdistill. `detdistill eval` computes them."
    run, ap = origin.run, origin.run["metrics"].get("AP")
    if ap is None:
        return "AP of these weights was not measured in their run."
    count = run["data"].get("val_images")
    on = f"{count} validation images" if count else "the validation images"
    if ap < 0:
        return f"AP is undefined on {on}."
    lines = [
        f"AP {100 * ap:.1f}, AP50 {_points(run['metrics'].get('AP50'))} (COCO, in points of 100) on {on}, seed {run['seed']}."
    ]
    if origin.seeds:
        several, gain = origin.seeds, origin.seeds.get("gain")
        lines.append(f"Over {_seeds(several['seeds'])}: AP {_interval(several['AP'], '')}.")
        if gain:
            lines.append(
                f"Gain over the same student trained alone, paired by seed: {_interval(gain, '+')}; {several['verdict']}."
            )
    elif run.get("role") == "distilled":
        lines.append("One run shows no gain: whether distillation helped, only several seeds with baselines tell.")
    return "\n".join(lines)


def training(origin: Origin | None) -> str:
    """Teacher, method, data and length of the training, as a list."""
    if origin is None:
        return "Not known."
    run, data = origin.run, origin.run["data"]
    images = f", {data['train_images']} training images" if data.get("train_images") else ""
    lines = [f"- data: {quoted(data.get('path') or 'unknown')}{images}"]
    if run.get("teacher"):
        score = "" if origin.teacher_ap is None or origin.teacher_ap < 0 else f", AP {100 * origin.teacher_ap:.1f}"
        size = f", {run['teacher_parameters'] / 1e6:.2f} M parameters" if run.get("teacher_parameters") else ""
        model = f" ({quoted(run['teacher_model'])}{size}{score})" if run.get("teacher_model") else f"{size}{score}"
        lines.append(f"- teacher: {quoted(run['teacher'])}{model}")
    lines.append(f"- method: {_method(run)}")
    start = run.get("init")
    first = quoted(start.get("from")) if start else "as the model string says, without --init"
    copied = "; neck and head copied from the teacher, as far as names and shapes agree (--inherit)" if run.get("inherit") else ""
    lines.append(f"- first weights: {first}{copied}")
    lines.append(f"- length: {run['steps']} steps, {run['images_seen']} images seen; the last weights, not the best")
    return "\n".join(lines)


def _method(run: Mapping[str, Any]) -> str:
    """The method of a run, with what changed its weight beside its own settings."""
    if not run.get("method"):
        return "none, trained on the ground truth alone"
    config = run.get("config") or {}
    weight, share = config.get("distill_weight", 1), config.get("balance")
    times = f", --distill_weight {weight:g}" if weight != 1 else ""
    held = f", --balance {share:g}" if share is not None else ""
    return f"{quoted(run['method'])}{times}{held}"


LICENCES = {"ultralytics": "AGPL-3.0"}
"""Licences, other than permissive ones, of the packages whose networks a detector runs, by the family in its model string."""


def licence(origin: Origin | None, kind: str = "") -> str:
    """The facts that bear on the licence of the weights, which their author chooses; ``kind`` is the detector's family."""
    sources = ["- the code of detdistill, also the files that it copies into student folders, is under Apache-2.0;"]
    if kind in LICENCES:
        sources.append(f"- the network runs by the package {kind}, which is under {LICENCES[kind]};")
    if origin is not None and origin.run.get("init"):
        sources.append(f"- the first weights, {quoted(origin.run['init'].get('from'))}, have a licence of their own;")
    else:
        sources.append(
            "- pretrained weights that the student started from, if its model string names any, have a licence of their own;"
        )
    if origin is not None and origin.run.get("teacher"):
        copied = ", whose neck and head were copied" if origin.run.get("inherit") else ""
        allowed = "look whether it allows models trained on its outputs"
        sources.append(f"- so has the teacher, {quoted(origin.run['teacher'])}{copied}: {allowed};")
    name = quoted(origin.run["data"].get("path") or "unknown") if origin is not None else "which are not known here"
    sources.append(f"- so have the training data, {name}: some forbid commercial use of what is trained on them.")
    head = "Not stated yet. The author of these weights writes `license:` into the first block of this file. What bears on it:"
    return head + "\n\n" + "\n".join(sources)


def citation(origin: Origin | None) -> str:
    """BibTeX of the methods."""
    if origin is None or not origin.bibtex:
        return "No distillation method to cite."
    return "\n\n".join(f"```bibtex\n{text.strip()}\n```" for text in origin.bibtex)


def _points(value: float | None) -> str:
    return "-" if value is None or value < 0 else f"{100 * value:.1f}"


def _seeds(seeds: Sequence[int]) -> str:
    return f"seeds {', '.join(map(str, seeds))}"


def _interval(values: Sequence[float | None], sign: str) -> str:
    """Mean and 95 % interval in points of 100."""
    mean, low, high = values
    text = f"{100 * (mean or 0):{sign}.1f}"
    return text if low is None or high is None else f"{text} ({100 * low:{sign}.1f} .. {100 * high:{sign}.1f}, 95 % interval)"
