"""Build a self-contained HTML page about finished runs: the verdict first, then the evidence for and against it."""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from detdistill.errors import RunError
from detdistill.report import figures, pictures, words
from detdistill.report.exports import HEAD, exports_of
from detdistill.report.pictures import Gallery
from detdistill.report.runs import Group, Run, baselines_for, data_name, defined, distillation_terms, group, paired, read
from detdistill.report.specialists import specialties

if TYPE_CHECKING:
    from detdistill.data.records import DataSplits
    from detdistill.progress import Progress

NOT_SETTINGS = ("out", "resume", "jobs", "on", "seed", "seeds", "role", "method", "student", "teacher", "model", "baseline")
"""Settings left out of the table of differences: they differ by design or do not affect training."""


Entry = tuple[str, str, str, str]
"""Entry of a legend: label, colour, style of the line, and a remark on its seeds."""
MOST_CARDS = 4
"""Verdicts of more methods stand in a table, best first, instead of a card each."""
MOST_RUNS = 12
"""The table of more single runs is folded."""


@dataclass(frozen=True)
class Line:
    """A row of a table of numbers, with formatted cells."""

    title: str
    style: str
    cells: tuple[str, ...]


@dataclass(frozen=True)
class Panels:
    """Figures side by side with a common title and legend."""

    title: str
    figures: tuple[str, ...]


@dataclass(frozen=True)
class Errors:
    """Section on AP50 lost by kind of error: legend, chart, table, and sentences on the changes by distillation."""

    legend: tuple[tuple[str, str], ...]
    """Pairs of label and colour."""
    svg: str
    lines: tuple[Line, ...]
    sentences: tuple[str, ...]


@dataclass(frozen=True)
class ClassChart:
    """Per-class gains of one method."""

    label: str
    colour: str
    svg: str
    left_out: int
    teacher: bool


def build_report(runs: Sequence[Path], page: Path, *, progress: Progress | None = None) -> Path:
    """Write an HTML page about finished runs.

    Args:
        runs: run folders: a single run, or teacher, baselines and distilled students of any methods and seeds.
        page: the HTML file; its folder is created if missing.
        progress: shows the progress of the pictures.

    Returns:
        ``page``.

    Raises:
        RunError: no run is given, or a run is incomplete.
        OSError: the page cannot be written.
    """
    if not runs:
        raise RunError("a report needs at least one run folder")
    read_runs = [read(Path(folder)) for folder in runs]
    groups = group(read_runs)
    splits, data_note = _load(read_runs)
    gallery = _gallery(groups, splits, data_note, progress)
    html = render(groups, splits, data_note, gallery)
    page.parent.mkdir(parents=True, exist_ok=True)
    temporary = page.with_name(page.name + ".tmp")
    try:
        temporary.write_text(html, encoding="utf-8")
        os.replace(temporary, page)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return page


def _load(runs: Sequence[Run]) -> tuple[DataSplits | None, str]:
    """The data of the last run (None if they cannot be read), and a note on what is wrong with them (or an empty text)."""
    from detdistill.data.discover import load_data

    path = str(runs[-1].summary["data"].get("path", ""))
    try:
        splits = load_data(path, held_out=runs[-1].config.get("held_out"))
    except Exception as error:  # the data may be on another machine; the rest of the page is made anyway
        return None, f"the data {path} cannot be read here: {pictures.one_line(error)}"
    if splits.val.fingerprint != runs[-1].summary["data"].get("val_fingerprint"):
        return splits, f"the data at {path} have changed since the runs (different fingerprint)"
    return splits, ""


def _gallery(groups: Sequence[Group], splits: DataSplits | None, data_note: str, progress: Progress | None) -> Gallery:
    if splits is None:
        return Gallery(notes=(f"No pictures: {data_note}.",))
    bar = progress.bar("pictures of the report", 1) if progress is not None else None

    def show(done: int, total: int) -> None:
        if bar is not None:
            bar.resize(total)
            bar.update(done)

    try:
        return pictures.gallery(groups, splits, show)
    except Exception as error:  # as above
        return Gallery(notes=(f"No pictures: {pictures.one_line(error)}.",))


def render(groups: Sequence[Group], splits: DataSplits | None, data_note: str, gallery: Gallery) -> str:
    """Render the page as HTML text."""
    import jinja2

    from detdistill.evaluation import ERRORS, METRICS

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("detdistill.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    runs = [run for one in groups for run in one.runs]
    distilled = [one for one in groups if one.role == "distilled"]
    palette = figures.Palette(groups)
    shares = [
        (one, words.share_sentence(one, baselines_for(one, runs)) + words.balance_sentence(one), _shares(one, palette, runs))
        for one in distilled
        if one.runs[0].rows
    ]
    legend = [(one.label, palette.name(one), palette.line(one), _seeds(one, groups)) for one in groups]
    verdicts = [words.verdict(one, groups) for one in distilled]
    return environment.get_template("template.html.jinja").render(
        title=_title(groups),
        subtitle=_subtitle(runs),
        verdicts=verdicts if len(verdicts) <= MOST_CARDS else [],
        ranking=_ranking(verdicts) if len(verdicts) > MOST_CARDS else [],
        notes=words.shared_notes(verdicts) if len(verdicts) > MOST_CARDS else [],
        plain=[one for one in groups if one.role in ("train", "teacher", "baseline")] if not distilled else [],
        points=words.points,
        metrics=METRICS,
        table=_table(groups),
        per_run=[_run_line(one, run) for one in groups for run in one.runs],
        folded=len(runs) > MOST_RUNS,
        legend=legend,
        score_legend=_score_legend(groups, legend),
        scores=_score_panels(groups, palette),
        matching=_matching_panels(groups, palette),
        matching_sentence=words.instability_sentence(groups),
        losses=_loss_panels(groups, palette),
        shares=shares,
        errors=_errors(groups, palette),
        error_names=ERRORS,
        classes=_class_charts(groups, palette),
        specialties=specialties(groups),
        gallery=gallery,
        exports=exports_of(groups),
        exports_head=HEAD,
        commands=[_command(run) for run in runs],
        again=f"detdistill report {' '.join(shlex.quote(str(run.folder)) for run in runs)}",
        settings=_differences(groups),
        labels=[one.label for one in groups],
        configs=[(one.label, yaml.safe_dump(one.runs[0].config, sort_keys=False)) for one in groups],
        facts=_facts(runs, groups),
        data_note=data_note,
        defects=Counter(f"{defect.kind} ({defect.skipped} skipped)" for defect in splits.defects).most_common()
        if splits
        else None,
    )


def _title(groups: Sequence[Group]) -> str:
    distilled = [one for one in groups if one.role == "distilled"]
    if not distilled:
        return f"Training of {str(groups[-1].runs[0].summary['student']).split(',')[0]}"
    names = ", ".join(one.label for one in distilled[:3]) + (" ..." if len(distilled) > 3 else "")
    return f"Distillation with {names}"


def _subtitle(runs: Sequence[Run]) -> str:
    """Student or model, teacher and data of the runs; of the last run, if there are several."""
    last = runs[-1].summary
    data = {run.summary["data"].get("fingerprint"): run for run in runs}
    teachers = {run.summary["teacher"] for run in runs if run.summary.get("teacher")}
    students = {run.summary["student"] for run in runs if run.role != "teacher"} or {last["student"]}
    teacher = f", teacher {teachers.pop()}" if len(teachers) == 1 else f", {len(teachers)} teachers" if teachers else ""
    name = f"{'student' if teacher else 'model'} {students.pop()}" if len(students) == 1 else f"{len(students)} models"
    if len(data) > 1:
        return (
            f"{name}{teacher}, {len(data)} data sets: {', '.join(data_name(run, list(data.values())) for run in data.values())}"
        )
    images = f"{last['data'].get('train_images')} training and {last['data'].get('val_images')} validation images"
    return f"{name}{teacher}, data {last['data'].get('path')} ({images})"


# ----------------------------------------------------------------------------------------------------------------- tables


def _seeds(one: Group, groups: Sequence[Group]) -> str:
    """What the lines of a group in the figures say of its seeds."""
    count = len(one.runs)
    if count == 1:
        return ""
    return f"mean of {count} seeds" if len(groups) > figures.MOST_WITH_SEEDS else f"{count} seeds thin, mean thick"


def _ranking(verdicts: Sequence[words.Verdict]) -> list[Line]:
    """Rows of the table of verdicts: the highest mean gain first, methods without a comparison last."""
    ordered = sorted(verdicts, key=lambda one: -one.gain.mean if one.gain is not None else float("inf"))
    return [Line(one.label, one.tone, words.verdict_cells(one)) for one in ordered]


def _table(groups: Sequence[Group]) -> list[Line]:
    """Table rows of teacher, baseline and students (means over the seeds); the gain follows each method."""
    from detdistill.evaluation.scores import METRICS

    lines = []
    distilled = [one for one in groups if one.role == "distilled"]
    runs = [run for one in groups for run in one.runs]
    if distilled and not any(one.role == "teacher" for one in groups):
        numbers = [words.teacher_metric(distilled[0], groups, name) for name in METRICS]
        size = _millions(distilled[0].runs[0].summary.get("teacher_parameters"))
        lines.append(Line("teacher", "teacher", (*map(words.points, numbers), size, words.points(None))))
    for one in groups:
        seeds = f", mean of {len(one.runs)} seeds" if len(one.runs) > 1 else f", seed {one.runs[0].seed}"
        metric = [one.metric(name) for name in METRICS]
        if one.role == "teacher" and len(groups) > 1 and distilled:
            # As measured in the students' runs, with their data and image size.
            metric = [words.teacher_metric(distilled[0], groups, name) for name in METRICS]
        size, time = (
            _millions(one.mean(lambda run: run.summary.get("parameters"))),
            _time(one.mean(lambda run: run.summary.get("seconds"))),
        )
        lines.append(Line(one.label + seeds, one.role, (*map(words.points, metric), size, time)))
        pair = paired(one, runs) if one.role == "distilled" else None
        if pair is not None:
            gains = [
                words.points(mine - theirs, signed=True) if mine is not None and theirs is not None else words.points(None)
                for theirs, mine in ((pair[0].metric(name), pair[1].metric(name)) for name in METRICS)
            ]
            lines.append(Line("gain", "gain", (*gains, "", "")))
    return lines


def _run_line(one: Group, run: Run) -> Line:
    from detdistill.evaluation.scores import METRICS

    numbers = [words.points(defined(run.summary["metrics"].get(name))) for name in METRICS]
    best = words.points(defined(run.summary.get("best_ap")))
    return Line(f"{one.label}, seed {run.seed}", run.role, (*numbers, best, _time(run.summary.get("seconds"))))


def _millions(count: float | None) -> str:
    return words.points(None) if count is None else f"{count / 1e6:.2f} M"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return words.points(None)
    if seconds < 600:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 36000 else f"{seconds / 3600:.1f} h"


# ---------------------------------------------------------------------------------------------------------------- figures


def _lone_teacher(groups: Sequence[Group], metric: str) -> float | None:
    """The teacher's metric, if the teacher's own run is not on the page; else None."""
    distilled = [one for one in groups if one.role == "distilled"]
    if not distilled or any(one.role == "teacher" for one in groups):
        return None
    return words.teacher_metric(distilled[0], groups, metric)


def _score_legend(groups: Sequence[Group], legend: Sequence[Entry]) -> list[Entry]:
    known = _lone_teacher(groups, "AP") is not None
    return [*([("teacher (as it is)", "teacher", "dashed", "")] if known else []), *legend]


def _against(groups: Sequence[Group]) -> str:
    """The x axis of score curves: epochs, or steps if no run was evaluated in more than one epoch."""
    epochs = any(len({row["epochs"] for row in run.rows if "val/AP" in row}) > 1 for one in groups for run in one.runs)
    return "epochs" if epochs else "steps"


def _score_panels(groups: Sequence[Group], palette: figures.Palette) -> Panels:
    against = _against(groups)
    ap, ap50 = (None if level is None else 100 * level for level in (_lone_teacher(groups, name) for name in ("AP", "AP50")))
    drawn = [
        figures.curves(groups, palette, "val/AP", against, factor=100, label="AP", level=ap),
        figures.curves(groups, palette, "val/AP50", against, factor=100, label="AP50", level=ap50),
        figures.curves(groups, palette, "val/AP", "seconds", factor=100, label="AP for the time spent", level=ap),
    ]
    return Panels("validation", tuple(svg for svg in drawn if svg))


def _matching_panels(groups: Sequence[Group], palette: figures.Palette) -> Panels:
    """Curves of the matching instability of the runs that measured it."""
    drawn = [
        figures.curves(groups, palette, "val/IS", _against(groups), label="changed matches, between evaluations"),
        figures.curves(groups, palette, "val/IS_layers", _against(groups), label="changed matches, between decoder layers"),
    ]
    return Panels("Matching instability", tuple(svg for svg in drawn if svg))


def _loss_panels(groups: Sequence[Group], palette: figures.Palette) -> list[Panels]:
    """Curves of the detector's own loss terms, the distillation terms, and the methods' monitors."""
    runs = [run for one in groups for run in one.runs]
    columns = list(dict.fromkeys(name for run in runs for name in run.columns))
    added = {
        f"train/{term}"
        for one in groups
        if one.role == "distilled"
        for term in distillation_terms(one.runs[0], baselines_for(one, runs))
    }
    terms = [name for name in columns if name.startswith("train/")]
    base = {"step", "total", "epoch", "lr", "seconds", "loss", "steps", "epochs"}
    monitors = [name for name in columns if name not in base and not name.startswith(("train/", "val/", "share/", "balance/"))]
    balance = [name for name in columns if name.startswith("balance/")]
    sections = (
        ("The detector's own loss", [name for name in terms if name not in added]),
        ("What distillation added", [name for name in terms if name in added]),
        ("Monitors of the methods (watched, not trained)", monitors),
        ("Balance: share of the student's gradient, and the factor that holds it", balance),
    )
    panels = []
    for title, names in sections:
        drawn = [figures.curves(groups, palette, name, label=name.removeprefix("train/")) for name in names]
        if any(drawn):
            panels.append(Panels(title, tuple(svg for svg in drawn if svg)))
    return panels


def _shares(one: Group, palette: figures.Palette, runs: Sequence[Run]) -> str:
    return figures.shares(one, palette, distillation_terms(one.runs[0], baselines_for(one, runs)))


def _errors(groups: Sequence[Group], palette: figures.Palette) -> Errors | None:
    """The section on kinds of errors; None if no run recorded them (older runs, or no ground truth)."""
    from detdistill.evaluation import ERRORS, KINDS

    distilled = [one for one in groups if one.role == "distilled"]
    runs = [run for one in groups for run in one.runs]
    taught = words.teacher_errors(distilled[0], groups) if distilled else {}
    models: list[tuple[str, str, dict[str, float], float | None, str]] = []
    if taught and not any(one.role == "teacher" for one in groups):
        models.append(("teacher", "teacher", taught, words.teacher_metric(distilled[0], groups, "AP50"), "teacher"))
    for one in groups:
        lost, ap50 = one.errors(), one.metric("AP50")
        if one.role == "teacher" and taught:
            lost, ap50 = taught, words.teacher_metric(distilled[0], groups, "AP50")
        if lost:
            models.append((one.label, palette.name(one), lost, ap50, one.role))
    if not models:
        return None
    lines = []
    for label, _, lost, ap50, role in models:
        lines.append(Line(label, role, (words.points(ap50), *(words.points(lost.get(name)) for name in ERRORS))))
    sentences = []
    for one in distilled:
        pair = paired(one, runs)
        if pair is not None and one.errors():
            sentences.append(words.error_sentence(one.label, *pair))
    return Errors(
        tuple((label, colour) for label, colour, *_ in models),
        figures.error_bars([(colour, lost) for _, colour, lost, *_ in models], KINDS),
        tuple(lines),
        tuple(sentences),
    )


def _class_charts(groups: Sequence[Group], palette: figures.Palette) -> list[ClassChart]:
    runs = [run for one in groups for run in one.runs]
    charts = []
    for one in (one for one in groups if one.role == "distilled"):
        pair = paired(one, runs)
        if pair is None:
            continue
        noted = [run.summary["teacher_per_class"] for run in one.runs if run.summary.get("teacher_per_class")]
        teachers = [other.per_class() for other in groups if other.role == "teacher"]
        teacher = {name: ap for name, ap in (noted or teachers or [{}])[0].items() if ap >= 0}
        svg, left_out = figures.class_gains(one, palette, pair[0].per_class(), pair[1].per_class(), teacher)
        if svg:
            charts.append(ClassChart(one.label, palette.name(one), svg, left_out, bool(teacher)))
    return charts


# ----------------------------------------------------------------------------------------------------------- how to repeat


def _command(run: Run) -> str:
    verb = "distill" if run.role == "distilled" else "train"
    config = shlex.quote(str(run.folder / "config.yaml"))
    return f"detdistill {verb} --config {config} --out {shlex.quote(f'{run.folder}-again')}"


def _differences(groups: Sequence[Group]) -> list[tuple[str, list[str]]]:
    """Settings that differ between the groups: name, and a cell for each group."""
    keys = list(dict.fromkeys(key for one in groups for run in one.runs for key in run.config))
    differing = []
    for key in keys:
        if key in NOT_SETTINGS:
            continue
        cells = [" / ".join(dict.fromkeys(_plain(run.config[key]) for run in one.runs if key in run.config)) for one in groups]
        known = {cell for cell in cells if cell}
        if len(known) > 1:
            differing.append((key, [cell or "\N{EN DASH}" for cell in cells]))
    return differing


def _plain(value: Any) -> str:
    if value is None:
        return "none"
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _facts(runs: Sequence[Run], groups: Sequence[Group]) -> list[tuple[str, list[str]]]:
    """Facts for the page (seeds, data, versions, machines): name, and the different values among the runs."""
    data = [run.summary["data"] for run in runs]
    versions = [run.summary.get("versions") or {} for run in runs]
    students = [run.summary["student"] for run in runs if run.role in ("baseline", "distilled")]
    facts = {
        "student": students,
        "teacher": [run.summary.get("teacher") for run in runs],
        "model": [run.summary["student"] for run in runs if run.role in ("teacher", "train")],
        "seeds": [f"{one.label}: {', '.join(str(run.seed) for run in one.runs)}" for one in groups],
        "budget": [
            ("" if run.config.get("steps") else f"{run.summary.get('epochs')} epochs, ")
            + f"{run.summary.get('steps')} steps, {run.summary.get('images_seen')} images seen"
            f" ({run.role})"
            for run in runs
        ],
        "data": [item.get("path") for item in data],
        "images": [f"{item.get('train_images')} for training, {item.get('val_images')} for validation" for item in data],
        "classes": [f"{len(item.get('classes') or [])}" for item in data],
        "fingerprint of the training data": [item.get("fingerprint") for item in data],
        "fingerprint of the validation data": [item.get("val_fingerprint") for item in data],
        "hardware": [run.summary.get("hardware") for run in runs],
        "versions": [", ".join(f"{name} {number}" for name, number in item.items()) for item in versions],
        "fingerprints of the settings": [run.summary.get("config_fingerprint") for run in runs],
        "finished": [run.summary.get("finished") for run in runs][-1:],
    }
    return [(name, known) for name, values in facts.items() if (known := list(dict.fromkeys(str(v) for v in values if v)))]
