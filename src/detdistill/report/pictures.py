"""Pictures for the report: detections of teacher, baseline and student on the same images, and activations of their necks."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from detdistill.report.runs import Group, Run, baselines_for

if TYPE_CHECKING:
    from PIL.Image import Image

    from detdistill.data.records import DataSplits, DetectionSet, Record
    from detdistill.data.transforms import ViewSettings
    from detdistill.detectors.contract import Detector

CANDIDATES = 32
"""Number of validation images, evenly spaced over the set, from which the pictures are chosen."""
SHOWN = 6
MOST_METHODS = 3
MOST_BOXES = 40
MIN_IOU = 0.5
TILE_PX, MAP_PX = 360, 150
JPEG_QUALITY = 78


@dataclass(frozen=True)
class Found:
    """Detections on one image in pixels of the original image, highest score first; labels are those of the data."""

    boxes_xyxy: np.ndarray
    scores: np.ndarray
    labels: np.ndarray

    def above(self, score: float) -> Found:
        """The detections with at least this score."""
        keep = self.scores >= score
        return Found(self.boxes_xyxy[keep], self.scores[keep], self.labels[keep])


@dataclass(eq=False)
class Model:
    """A detector of the comparison, with its detections on the candidate images (by image id)."""

    title: str
    detector: Detector
    found: dict[int, Found] = field(default_factory=dict)
    threshold: float = 0.0
    """Score threshold with the best F1 on the candidates, because the scores of different detectors are not comparable."""
    quality: dict[int, float] = field(default_factory=dict)
    """F1 at ``threshold`` for each candidate, by image id."""


@dataclass(frozen=True)
class Tile:
    """A picture with its caption."""

    title: str
    source: str
    """The picture as a ``data:`` URL."""
    alt: str
    note: str = ""


@dataclass(frozen=True)
class Row:
    """One validation image."""

    title: str
    note: str
    tiles: tuple[Tile, ...]
    maps: tuple[tuple[str, tuple[Tile, ...]], ...]
    """For each model, its title and a heat map per level."""


@dataclass(frozen=True)
class Gallery:
    """The two picture sections."""

    rows: tuple[Row, ...] = ()
    notes: tuple[str, ...] = ()
    """How the images were chosen, and the reasons for missing pictures."""


def gallery(groups: Sequence[Group], splits: DataSplits, progress: Callable[[int, int], None]) -> Gallery:
    """Run the models on a few validation images and draw what they find.

    Args:
        groups: all runs of the page; the first seed of each is shown.
        splits: the data of the runs.
        progress: called with (pictures done, total pictures).

    Returns:
        The pictures. Models that cannot be loaded are left out, and a note gives the reason.
    """
    import torch

    notes: list[str] = []
    subject, models = _models(groups, splits, notes)
    if not models:
        return Gallery(notes=tuple(notes))
    settings = _view_settings(subject.config)
    device = "cuda" if torch.cuda.is_available() and subject.config.get("device") != "cpu" else "cpu"
    chosen = splits.val.records
    step = max(1, len(chosen) / CANDIDATES)
    candidates = [chosen[int(index * step)] for index in range(min(CANDIDATES, len(chosen)))]
    total = len(candidates) * len(models)
    for model in models:
        model.detector.eval().to(device)
    for index, record in enumerate(candidates):
        for model in models:
            model.found[record.id] = look(model.detector, record, settings, splits.val, device)[0]
        progress((index + 1) * len(models), total)
    for model in models:
        model.threshold = best_threshold(model.found, candidates)
        model.quality = {record.id: f1(model.found[record.id].above(model.threshold), record) for record in candidates}
    picked = pick(models, candidates)
    notes += _choice_notes(models, candidates)
    rows = [_row(record, why, models, settings, splits.val, device) for record, why in picked]
    return Gallery(tuple(rows), tuple(notes))


def _models(groups: Sequence[Group], splits: DataSplits, notes: list[str]) -> tuple[Run, list[Model]]:
    """Run whose seed is shown, and the models: teacher, baseline and students of this seed, or a single model."""
    from detdistill.detectors.load import load_detector

    distilled = [group for group in groups if group.role == "distilled"]
    wanted: list[tuple[str, str]] = []
    if not distilled:
        shown = [group for group in groups if group.role != "distilled"][: MOST_METHODS + 1]
        wanted = [(group.label, str(group.runs[0].folder)) for group in shown]
        subject = shown[-1].runs[0]
    else:
        subject = distilled[0].runs[0]
        runs = [run for group in groups for run in group.runs]
        if reason := _no_single_teacher(subject):
            notes.append(f"No teacher is shown: {reason}.")
        else:
            wanted.append(("teacher", _teacher_place(subject, runs)))
        wanted += [("baseline", str(run.folder)) for run in baselines_for(distilled[0], runs)[:1]]
        wanted += [(group.label, str(group.runs[0].folder)) for group in distilled[:MOST_METHODS]]
        if len(distilled) > MOST_METHODS:
            notes.append(f"Pictures show the first {MOST_METHODS} of {len(distilled)} methods.")
    models = []
    for title, place in wanted:
        try:
            models.append(Model(title, load_detector(place, splits.classes)))
        except Exception as error:  # a page about finished runs must not be lost because one model cannot be read
            notes.append(f"{title} is not shown: {one_line(error)}")
    if models:
        notes.append(f"Models of seed {subject.seed}.")
    return subject, models


def _no_single_teacher(run: Run) -> str:
    """Why there is no single trained teacher to show; empty if there is one."""
    if str(run.summary.get("teacher")).startswith("self:"):
        return "it was the student's own average"
    return "there were several" if len(run.summary.get("teachers") or ()) > 1 else ""


def _teacher_place(run: Run, runs: Sequence[Run]) -> str:
    """The teacher of a distilled run; a folder that does not exist from here is searched by name among the page's runs."""
    place = str(run.summary.get("teacher"))
    if Path(place).exists():
        return place
    named = [other.folder for other in runs if other.role in ("teacher", "train") and other.folder.name == Path(place).name]
    return str(named[0]) if named else place


def one_line(error: Exception) -> str:
    """Message of an error without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def _view_settings(config: dict[str, Any]) -> ViewSettings:
    from detdistill.data.transforms import ViewSettings

    return ViewSettings(**{name: config[name] for name in ("size", "resize", "max_size") if name in config})


def look(
    detector: Detector, record: Record, settings: ViewSettings, data: DetectionSet, device: str
) -> tuple[Found, tuple[np.ndarray, ...]]:
    """Run a detector on one image.

    Returns:
        The detections, with the data's labels, and for each level of the neck the mean absolute activation over channels,
        [h, w] without the cells of the padding.
    """
    import torch

    from detdistill.data.loader import collate, read_image
    from detdistill.data.transforms import make_view

    with torch.no_grad():
        pixels, target, view = make_view(read_image(record.path), record, settings, torch.Generator(), train=False)
        batch = collate([(pixels, target, view, record.id)], settings).to(device)
        features = detector.features(batch)
        found = detector.detect(detector.predict(features, batch), batch)[0]
        height, width = view.size_hw
        levels = tuple(
            level[0].float().abs().mean(0)[: max(1, round(height / stride)), : max(1, round(width / stride))].cpu().numpy()
            for level, stride in zip(features.maps, features.strides, strict=True)
        )
    column = {index: data.classes.index(name) for index, name in enumerate(detector.spec.classes) if name in data.classes}
    boxes = view.to_original(found.boxes_xyxy.float().cpu()).numpy()
    labels = np.array([column.get(label, -1) for label in found.labels.tolist()], dtype=np.int64)
    scores = found.scores.float().cpu().numpy()
    order = np.argsort(-scores, kind="stable")
    order = order[labels[order] >= 0]
    return Found(boxes[order], scores[order], labels[order]), levels


# ------------------------------------------------------------------------------------------------- which images to show


def hits(found: Found, record: Record) -> np.ndarray:
    """[D] bool: True for the highest-scored detection of each ground-truth box of its class (IoU 0.5 or more)."""
    right = np.zeros(len(found.scores), dtype=bool)
    free = ~record.crowd.copy()
    for index, (box, label) in enumerate(zip(found.boxes_xyxy, found.labels, strict=True)):
        overlap = np.where(free & (record.labels == label), iou(box, record.boxes_xyxy), 0.0)
        if overlap.size and overlap.max() >= MIN_IOU:
            free[int(overlap.argmax())] = False
            right[index] = True
    return right


def iou(box_xyxy: np.ndarray, boxes_xyxy: np.ndarray) -> np.ndarray:
    """[G] intersection over union of one box [4] with boxes [G, 4]."""
    low, high = np.maximum(box_xyxy[:2], boxes_xyxy[:, :2]), np.minimum(box_xyxy[2:], boxes_xyxy[:, 2:])
    common = (high - low).clip(min=0).prod(axis=1)
    areas = (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).prod(axis=1) + (box_xyxy[2:] - box_xyxy[:2]).prod()
    return np.asarray(common / np.maximum(areas - common, 1e-9))


def best_threshold(found: dict[int, Found], records: Sequence[Record]) -> float:
    """The score threshold with the best F1 on these images; 1 if no detection is right."""
    scores = np.concatenate([found[record.id].scores for record in records])
    right = np.concatenate([hits(found[record.id], record) for record in records])
    if not right.any():
        return 1.0
    order = np.argsort(-scores, kind="stable")
    truth = sum(int((~record.crowd).sum()) for record in records)
    f1_at = 2 * np.cumsum(right[order]) / (np.arange(1, len(order) + 1) + truth)
    return float(scores[order][int(f1_at.argmax())])


def f1(found: Found, record: Record) -> float:
    """F1 = 2 hits / (detections + ground truth); 1 for an image without objects and detections."""
    both = len(found.scores) + int((~record.crowd).sum())
    return 2 * float(hits(found, record).sum()) / both if both else 1.0


def pick(models: Sequence[Model], candidates: Sequence[Record]) -> list[tuple[Record, str]]:
    """Choose the images to show: those where student and baseline differ most in F1, in both directions.

    Without a baseline, the images are spread evenly from the best F1 to the worst.

    Returns:
        At most ``SHOWN`` images, each with the reason for its choice.
    """
    student = models[-1]
    baseline = next((model for model in models if model.title == "baseline"), None)
    if baseline is not None and len(models) > 1:
        student = models[models.index(baseline) + 1] if baseline is not models[-1] else student
    if baseline is None or baseline is student:
        order = sorted(candidates, key=lambda record: (-student.quality[record.id], record.id))
        places = sorted({round(index * (len(order) - 1) / max(1, SHOWN - 1)) for index in range(min(SHOWN, len(order)))})
        return [(order[place], f"F1 {student.quality[order[place].id]:.2f}") for place in places]
    gain = {record.id: student.quality[record.id] - baseline.quality[record.id] for record in candidates}
    order = sorted(candidates, key=lambda record: (-gain[record.id], record.id))
    better = [record for record in order if gain[record.id] > 0]
    worse = [record for record in reversed(order) if gain[record.id] < 0]
    # Half of them better, two worse, one in the middle.
    chosen = [*better[: SHOWN // 2], *worse[:2], order[len(order) // 2], *better[SHOWN // 2 :], *worse[2:], *order]
    shown = list({record.id: record for record in chosen}.values())[:SHOWN]
    words = {1: f"{student.title} better than the baseline", 0: "no difference", -1: f"{student.title} worse than the baseline"}
    return [(record, words[int(np.sign(gain[record.id]))]) for record in sorted(shown, key=lambda r: (-gain[r.id], r.id))]


def _choice_notes(models: Sequence[Model], candidates: Sequence[Record]) -> list[str]:
    drawn = ", ".join(f"{model.title} {model.threshold:.2f}" for model in models if model.threshold < 1)
    blind = [model.title for model in models if model.threshold >= 1]
    notes = [
        f"Chosen by a rule from {len(candidates)} validation images, evenly spaced over the set: those where student and "
        "baseline differ most in F1 (IoU 0.5), in both directions, and one in the middle."
        if any(model.title == "baseline" for model in models)
        else f"Chosen by a rule from {len(candidates)} validation images, evenly spaced over the set: from the best F1 (IoU 0.5) "
        "to the worst."
    ]
    if drawn:
        notes.append(f"Boxes are drawn above the score with the model's best F1 on these images: {drawn}.")
    if blind:
        notes.append(f"{', '.join(blind)}: no right box on these images.")
    baseline = next((model for model in models if model.title == "baseline"), None)
    for student in models:
        if baseline is None or student.title in ("teacher", "baseline"):
            continue
        gains = [student.quality[record.id] - baseline.quality[record.id] for record in candidates]
        better, worse = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
        notes.append(
            f"Of all {len(candidates)}, {student.title} was better than the baseline on {better}, worse on {worse}, "
            f"equal on {len(gains) - better - worse}."
        )
    return notes


# ---------------------------------------------------------------------------------------------------------------- drawing


def _row(record: Record, why: str, models: Sequence[Model], settings: ViewSettings, data: DetectionSet, device: str) -> Row:
    image = _open(record.path)
    truth = Found(record.boxes_xyxy, np.ones(len(record)), record.labels)
    count = int((~record.crowd).sum())
    labelled = f"{count} box{'' if count == 1 else 'es'}"
    tiles = [Tile("ground truth", _jpeg(_draw(image, truth, data.classes, False)), labelled, labelled)]
    maps = []
    for model in models:
        shown = model.found[record.id].above(model.threshold)
        right = int(hits(shown, record).sum())
        note = f"{right} right, {len(shown.scores) - right} wrong, {count - right} missed"
        drawn = _draw(image, shown, data.classes, True)
        tiles.append(Tile(model.title, _jpeg(drawn), f"detections of {model.title}: {note}", note))
        levels = look(model.detector, record, settings, data, device)[1]
        heats = [
            Tile(f"stride {stride}", _jpeg(_heat(image, level)), f"activation of {model.title}, stride {stride}")
            for level, stride in zip(levels, model.detector.spec.strides, strict=True)
        ]
        maps.append((model.title, tuple(heats)))
    return Row(record.path.name, why, tuple(tiles), tuple(maps))


def _open(path: Path) -> Image:
    from PIL import Image as Images

    from detdistill.data.loader import read_image

    return Images.fromarray(read_image(path).permute(1, 2, 0).numpy())


def _fit(image: Image, side: int) -> Image:
    """Resize to a long side of ``side`` pixels; small images are enlarged, so that thin boxes and text stay sharp."""
    from PIL.Image import Resampling

    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Resampling.LANCZOS)


def _draw(image: Image, found: Found, classes: Sequence[str], scores: bool) -> Image:
    """Draw boxes with class and score; higher scores are drawn on top, and labels do not overlap."""
    from detdistill.evaluation.drawing import draw_boxes

    drawn = _fit(image, TILE_PX)
    labels = [int(label) for label in found.labels[:MOST_BOXES]]
    texts = [
        classes[label][:18] + (f" {score:.2f}" if scores else "")
        for label, score in zip(labels, found.scores[:MOST_BOXES].tolist(), strict=True)
    ]
    draw_boxes(drawn, found.boxes_xyxy[:MOST_BOXES] * (drawn.width / image.width), labels, texts)
    return drawn


def _heat(image: Image, level: np.ndarray) -> Image:
    """Heat map over the image in grey; the colours span the map's own 1st to 99th percentile."""
    from matplotlib import colormaps
    from PIL import Image as Images
    from PIL.Image import Resampling

    below = _fit(image, MAP_PX).convert("L").convert("RGB")
    low, high = np.percentile(level, (1, 99))
    scaled = ((level - low) / max(float(high - low), 1e-12)).clip(0, 1)
    enlarged = Images.fromarray((255 * scaled).astype(np.uint8)).resize(below.size, Resampling.BILINEAR)
    colours = colormaps["inferno"](np.asarray(enlarged))[..., :3]
    return Images.blend(below, Images.fromarray((255 * colours).astype(np.uint8)), 0.65)


def _jpeg(image: Image) -> str:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
