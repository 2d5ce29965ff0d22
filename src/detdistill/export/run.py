"""Export a detector with proof: write the file, read it back, compare, quantise, and note everything in ``export.json``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from detdistill.card import Origin
from detdistill.data.loader import DetectionLoader
from detdistill.data.records import DetectionSet
from detdistill.data.transforms import PADDING_MULTIPLE, ViewSettings
from detdistill.detectors.contract import Detector
from detdistill.errors import ModelError, RunError, nearest
from detdistill.evaluation import evaluate
from detdistill.evaluation.run import check_classes
from detdistill.evaluation.scores import points
from detdistill.export.about import About
from detdistill.export.bench import interleaved
from detdistill.export.card import write_card
from detdistill.export.file_detector import FileDetector
from detdistill.export.formats import SUFFIXES
from detdistill.export.graphs import Graph, graph_of
from detdistill.export.int8 import quantise
from detdistill.export.proof import Difference, Stage, judged, largest_difference
from detdistill.export.selection import Rule, rule_of
from detdistill.export.write import check_opset, write
from detdistill.files import checksum, write_atomically
from detdistill.printing import html_table
from detdistill.progress import Progress
from detdistill.structures import Batch, Target, View

NOTES = "export.json"
"""Name of the file with the proof, beside the exported files; one entry for each of them."""


@dataclass(frozen=True)
class Wanted:
    """Settings of an export."""

    out: Path
    format: str = "onnx"
    int8: bool = False
    nms: bool = False
    dynamic: tuple[str, ...] | None = None
    opset: int | None = None
    calibration: int = 64
    batch: int = 8
    rounds: int = 10
    overwrite: bool = False


@dataclass(frozen=True, repr=False)
class Exported:
    """Result of ``export``."""

    file: Path
    int8: Path | None
    stages: tuple[Stage, ...]
    """torch, the file, its int8 form."""
    about: About
    notes: Path
    """``export.json``."""
    card: Path | None = None
    """``README.md``; None: there is one of somebody else, which stays."""

    def __repr__(self) -> str:
        """The AP of each form and the files."""
        files = " and ".join(str(path) for path in (self.file, self.int8) if path is not None)
        return f"Exported({', '.join(map(' '.join, self._rows()))}; {'' if self.passed else 'too much AP lost; '}{files})"

    def _repr_html_(self) -> str:
        """A small table for notebooks."""
        return html_table([*self._rows(), ("file", str(self.file)), ("int8", str(self.int8))])

    def _rows(self) -> list[tuple[str, str]]:
        return [(f"AP of {stage.name}", "-" if stage.AP is None else points(stage.AP)) for stage in self.stages]

    @property
    def passed(self) -> bool:
        """No file lost more AP than allowed."""
        return all(stage.passed for stage in self.stages)


def check_wanted(wanted: Wanted) -> None:
    """Check what can be checked before a model is loaded.

    Raises:
        RunError: format and suffix do not fit, or a file exists.
    """
    suffixes = {kind: suffix for suffix, kind in SUFFIXES.items()}
    if wanted.format not in suffixes:
        raise RunError(f"format: {wanted.format!r} is unknown{nearest(wanted.format, suffixes)}; use {', '.join(suffixes)}")
    if wanted.out.suffix != suffixes[wanted.format]:
        raise RunError(f"out: {wanted.out} must end in {suffixes[wanted.format]} for --format {wanted.format}")
    for path in (wanted.out, *([int8_path(wanted.out)] if wanted.int8 else [])):
        if path.is_dir():
            raise RunError(f"out: {path} is a folder; name a file in it, e.g. {path / ('model' + wanted.out.suffix)}")
        if path.exists() and not wanted.overwrite:
            raise RunError(f"out: {path} exists; give another --out, or --overwrite true")
    if wanted.int8 and wanted.calibration < 1:
        raise RunError(f"calibration: {wanted.calibration} training images are none; int8 needs at least 1")


def int8_path(path: Path) -> Path:
    """Path of the int8 form: ``model.onnx`` -> ``model.int8.onnx``."""
    return path.with_name(f"{path.stem}.int8{path.suffix}")


def export_detector(
    detector: Detector,
    wanted: Wanted,
    settings: ViewSettings,
    val: DetectionSet | None = None,
    train: DetectionSet | None = None,
    progress: Progress | None = None,
    origin: Origin | None = None,
) -> Exported:
    """Write a detector into a file and prove it.

    Args:
        detector: with weights; it is moved to the CPU.
        wanted: file, format and kind.
        settings: size and resizing of the images.
        val: images for the proof; None: two random images, and no AP.
        train: images to calibrate int8 with.
        progress: display.
        origin: the run that trained the detector, for the file's description and its card; None: unknown.

    Raises:
        ModelError: the detector cannot be exported like this, knows other classes than the data, or has weights that are no
            numbers.
        RunError: the request is wrong, or a package is missing.
    """
    check_wanted(wanted)
    if val is not None:
        check_classes(detector, val)
    if wanted.int8 and (train is None or not train.records):
        raise RunError("int8: needs training images to calibrate with; give --data with a train split")
    check_weights(detector)
    detector = detector.eval().cpu()
    graph = graph_of(detector, wanted.nms)
    about = replace(description(detector, graph, wanted, settings), origin=None if origin is None else origin.to_plain())
    with progress or Progress(quiet=True) as shown:
        shown.say(f"writing {wanted.out}")
        about = write(graph, about, example(about), wanted.out)
        batches = proof_batches(about, settings, val)
        stages = [_torch_stage(detector, settings, val, wanted, shown)]
        stages.append(_file_stage(wanted.out, graph, batches, settings, val, wanted, stages[0].AP, shown))
        int8 = None
        if wanted.int8:
            assert train is not None
            int8 = int8_path(wanted.out)
            shown.say(f"quantising {int8}")
            quantise(wanted.out, int8, calibration_batches(train, settings, wanted.calibration))
            stages.append(_file_stage(int8, graph, batches, settings, val, wanted, stages[0].AP, shown))
        files = [Path(stage.file) for stage in stages if stage.file]
        models = {"torch": detector, **{path.name: FileDetector(path) for path in files}}
        times = interleaved(models, one_image(batches[0]), wanted.rounds)
        named = ["torch", *(path.name for path in files)]
        stages = [replace(one, milliseconds=times[name].milliseconds) for one, name in zip(stages, named, strict=True)]
    folder = wanted.out.parent
    entries = note(folder / NOTES, wanted.out.name, entry_of(about, stages, val))
    card = write_card(folder, wanted.out.name, about, entries)
    return Exported(wanted.out, int8, tuple(stages), about, folder / NOTES, card)


def check_weights(detector: Detector) -> None:
    """Check that all weights are numbers.

    Raises:
        ModelError: a weight is NaN or infinite; the message names it.
    """
    wrong = [name for name, value in detector.state_dict().items() if not bool(torch.isfinite(value).all())]
    if wrong:
        raise ModelError(
            f"{detector.spec.name}: {len(wrong)} tensors hold NaN or infinite weights, e.g. {wrong[0]}; the run diverged, "
            f"export an earlier checkpoint"
        )


def description(detector: Detector, graph: Graph, wanted: Wanted, settings: ViewSettings) -> About:
    """Describe the file to be written.

    Raises:
        ModelError: a free dimension is asked for that the detector cannot have, or the opset does not fit.
    """
    free = graph.free if wanted.dynamic is None else tuple(wanted.dynamic)
    for name in free:
        if name not in ("batch", "size"):
            raise ModelError(f"dynamic: {name!r} is unknown{nearest(name, ('batch', 'size'))}; use batch, size, both or none")
        if name not in graph.free:
            possible = ", ".join(graph.free) or "none"
            raise ModelError(f"{detector.spec.name}: {name} cannot vary in its file; use --dynamic {possible}")
    side = settings.size if settings.resize != "short_side" else settings.max_size or settings.size
    canvas = -(-side // PADDING_MULTIPLE) * PADDING_MULTIPLE
    rule = Rule("inside") if "labels" in graph.outputs else rule_of(detector)
    opset = check_opset(graph, wanted.opset) if wanted.format == "onnx" else None
    return About(
        detector.spec,
        rule,
        settings.size,
        settings.resize,
        settings.max_size,
        (canvas, canvas),
        free,
        graph.outputs,
        wanted.format,
        opset,
        multiple=PADDING_MULTIPLE,
    )


def example(about: About) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and sizes to trace with: two images, or one if the number is fixed; the last is partly padding."""
    height, width = about.canvas_hw
    count = 2 if "batch" in about.free else 1
    sizes = torch.tensor([[height, width], [height * 3 // 4, width]])[:count]
    images = torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0))
    return images, sizes


def proof_batches(about: About, settings: ViewSettings, val: DetectionSet | None) -> list[Batch]:
    """Two batches of different numbers of images, the second at another size where it may vary."""
    second = settings
    if "size" in about.free:
        side = max(2 * PADDING_MULTIPLE, settings.size * 3 // 4 // PADDING_MULTIPLE * PADDING_MULTIPLE)
        side = side if side != settings.size else side + PADDING_MULTIPLE
        second = replace(settings, size=side, max_size=None if settings.max_size is None else max(side, settings.max_size))
    batches = []
    for count, view in ((2, settings), (3, second)):
        batches.append(random_batch(count, view.size) if val is None else first_batch(val, view, count))
    return batches


def first_batch(data: DetectionSet, settings: ViewSettings, count: int) -> Batch:
    """The first ``count`` images of a set as one batch, without augmentation."""
    few = replace(data, records=data.records[:count])
    return next(iter(DetectionLoader(few, settings, count, train=False)))


def random_batch(count: int, side: int) -> Batch:
    """Noise, where there are no images."""
    canvas = -(-side // PADDING_MULTIPLE) * PADDING_MULTIPLE
    images = torch.rand(count, 3, canvas, canvas, generator=torch.Generator().manual_seed(0))
    empty = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool))
    size = (canvas, canvas)
    return Batch(images, torch.tensor([size] * count), (empty,) * count, tuple(range(count)), (View(size, size),) * count)


def one_image(batch: Batch) -> Batch:
    """The first image of a batch."""
    return Batch(batch.images[:1], batch.sizes[:1], batch.targets[:1], batch.ids[:1], batch.views[:1])


def calibration_batches(train: DetectionSet, settings: ViewSettings, count: int) -> list[Batch]:
    """Training images, evenly spread over the set, without augmentation."""
    count = min(count, len(train.records))
    chosen = [train.records[index * len(train.records) // count] for index in range(count)]
    return list(DetectionLoader(replace(train, records=tuple(chosen)), settings, 1, train=False))


def _torch_stage(detector: Detector, settings: ViewSettings, val: DetectionSet | None, wanted: Wanted, shown: Progress) -> Stage:
    size = sum(value.numel() * value.element_size() for value in detector.inference_state().values()) / 1e6
    metrics = _metrics(detector, settings, val, wanted, shown, "torch")
    return Stage("torch", None, size, None if metrics is None else metrics["AP"], None, metrics=metrics)


def _file_stage(
    path: Path,
    graph: Graph,
    batches: Sequence[Batch],
    settings: ViewSettings,
    val: DetectionSet | None,
    wanted: Wanted,
    torch_ap: float | None,
    shown: Progress,
) -> Stage:
    file = FileDetector(path)
    difference: Difference = largest_difference(graph, file, batches)
    name = f"{file.about.format} int8" if file.about.int8 else file.about.format
    size = (path.stat().st_size + (path.with_suffix(".bin").stat().st_size if path.suffix == ".xml" else 0)) / 1e6
    metrics = _metrics(file, settings, val, wanted, shown, name)
    stage = Stage(
        name,
        str(path),
        size,
        None if metrics is None else metrics["AP"],
        None,
        difference,
        metrics=metrics,
        checksum=checksum(path),
    )
    return judged(stage, torch_ap, file.about.int8)


def _metrics(
    detector: Detector, settings: ViewSettings, val: DetectionSet | None, wanted: Wanted, shown: Progress, name: str
) -> dict[str, float] | None:
    if val is None:
        return None
    bar = shown.bar(f"AP of {name}", len(val.records))
    return evaluate(detector, val, settings, batch_size=wanted.batch, device="cpu", progress=bar.follow).metrics


def entry_of(about: About, stages: Sequence[Stage], val: DetectionSet | None) -> dict[str, Any]:
    """The entry of a file in ``export.json``: its description, the images of the proof, all stages, and whether it passed."""
    return {
        "about": json.loads(about.to_text()),
        "data": None if val is None else {"val_fingerprint": val.fingerprint, "val_images": len(val.records)},
        "stages": [{**stage.to_plain(), "file": Path(stage.file).name if stage.file else None} for stage in stages],
        "passed": all(stage.passed for stage in stages),
    }


def note(path: Path, name: str, entry: dict[str, Any]) -> dict[str, Any]:
    """Write an entry into ``export.json``; the entries of other files stay.

    Returns:
        All entries.

    Raises:
        RunError: the file exists and is not such a file.
    """
    entries = {**read_notes(path), name: entry}
    text = json.dumps(entries, indent=2) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return entries


def read_notes(path: Path) -> dict[str, Any]:
    """The entries of ``export.json`` by the name of the file; empty if it does not exist.

    Raises:
        RunError: it is not such a file.
    """
    if not path.exists():
        return {}
    try:
        entries = dict(json.loads(path.read_text(encoding="utf-8")))
        for entry in entries.values():
            About.from_text(json.dumps(entry["about"]), path)
            [Stage.from_plain(stage) for stage in entry["stages"]]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise RunError(f"{path}: is no notes of exports ({' '.join(str(error).split())}); move it away") from error
    return entries
