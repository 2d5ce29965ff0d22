"""Speed of exported files beside eager torch: one thread, processor time, in turns; and the time that an export takes.

    uv run python benchmarks/export_speed.py --out benchmarks/results/export_speed_cpu.json

``network`` is from pixels to boxes and scores (the graph in torch, the file in its runtime), ``whole`` from pixels to detections.
Weights are random, on which a network's time does not depend; so that NMS has no thousands of chance candidates, only scores over
0.5 count. ``--student NAME=FOLDER`` adds trained students. ``fixed`` is a file for one image of one size (``--dynamic none``).
"""

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from _runs import markdown, write
from detdistill.data.digits import digits_folder
from detdistill.data.discover import load_split
from detdistill.data.transforms import ViewSettings
from detdistill.detectors.build import build_detector
from detdistill.detectors.contract import Detector
from detdistill.detectors.load import load_detector
from detdistill.export.bench import interleaved
from detdistill.export.file_detector import FileDetector
from detdistill.export.graphs import graph_of
from detdistill.export.int8 import quantise
from detdistill.export.run import Wanted, calibration_batches, description, example, first_batch, int8_path
from detdistill.export.write import write as write_file
from detdistill.structures import Batch
from detdistill.training.machine import hardware, versions

FORMS = ("torch", "onnx", "fixed", "int8")
BACKBONE = "resnet10t,channels=16-32-64-128,stem=16"
DENSE = {name: f"{name}:{BACKBONE},neck=64,levels=3-5,convs=2" for name in ("fcos", "retinanet", "atss", "gfl", "reppoints")}
DENSE["fcos-resnet18"] = "fcos:resnet18,neck=128,levels=3-5"
DETRS = {
    "rt_detr": f"rt_detr:{BACKBONE},dim=64,queries=50,decoder=2",
    "deformable_detr": f"deformable_detr:{BACKBONE},dim=64,queries=50,encoder=2,decoder=2",
    "d_fine": f"d_fine:{BACKBONE},dim=64,queries=50,decoder=2",
    "adamixer": f"adamixer:{BACKBONE},dim=64,queries=30,decoder=2",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="*", default=[*DENSE, *DETRS], help="names of the tables in this file")
    parser.add_argument("--student", nargs="*", default=[], metavar="NAME=FOLDER", help="trained students of the digits")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--images", type=int, default=16, help="images to calibrate int8 with")
    given = parser.parse_args()
    torch.set_num_threads(1)
    # Models that are not measured this time keep their numbers.
    before = json.loads(given.out.read_text())["models"] if given.out.exists() else {}
    found: dict[str, Any] = {"hardware": hardware(), "versions": versions(), "size": given.size, "models": before}
    trained = dict(one.split("=", 1) for one in given.student)
    for name in [*trained, *given.models]:
        model = trained.get(name) or {**DENSE, **DETRS}[name]
        found["models"][name] = measured(model, given.size, given.rounds, given.images)
        write(given.out, found)
        print(name, found["models"][name], flush=True)
    print("\n".join(markdown(table(found["models"]))))


def measured(name: str, size: int, rounds: int, images: int) -> dict[str, Any]:
    """Export a model, quantise it, and time all forms."""
    torch.manual_seed(0)
    data = load_split(str(digits_folder(train=max(images, 8), val=8, size=size, seed=0)), "train")[0]
    detector: Any = (load_detector(name) if Path(name).exists() else build_detector(name, data.classes)).eval()
    if not Path(name).exists() and hasattr(getattr(detector, "model", None), "score_thresh"):
        detector.model.score_thresh = 0.5
    view = ViewSettings(size)
    with tempfile.TemporaryDirectory() as scratch:
        wanted = Wanted(Path(scratch, "model.onnx"))
        graph = graph_of(detector)
        about = description(detector, graph, wanted, view)
        seconds = timed(lambda: write_file(graph, about, example(about), wanted.out))
        result: dict[str, Any] = {"parameters": sum(p.numel() for p in detector.parameters()), "export": seconds}
        forms: dict[str, Detector] = {"torch": detector, "onnx": FileDetector(wanted.out, threads=1)}
        fixed = Wanted(Path(scratch, "fixed.onnx"), dynamic=())
        still = description(detector, graph, fixed, view)
        write_file(graph, still, example(still), fixed.out)
        forms["fixed"] = FileDetector(fixed.out, threads=1)
        try:
            small = int8_path(wanted.out)
            result["int8_export"] = timed(lambda: quantise(wanted.out, small, calibration_batches(data, view, images)))
            forms["int8"] = FileDetector(small, threads=1)
        except ValueError as error:
            result["int8_refused"] = str(error)
        batch = first_batch(data, view, 1)
        whole = interleaved(forms, batch, rounds, clock=time.process_time)
        result["whole_ms"] = {form: round(timing.milliseconds, 2) for form, timing in whole.items()}
        result["network_ms"] = networks(graph, forms, batch, rounds)
    for part in ("whole", "network"):
        times = result[f"{part}_ms"]
        result[f"{part}_fixed_over_torch"] = round(times["torch"] / times["fixed"], 2)
        result[f"{part}_onnx_over_torch"] = round(times["torch"] / times["onnx"], 2)
        if "int8" in times:
            result[f"{part}_int8_over_onnx"] = round(times["onnx"] / times["int8"], 2)
    return result


def networks(graph: Any, forms: dict[str, Detector], batch: Batch, rounds: int) -> dict[str, float]:
    """Median milliseconds of the networks alone, in turns."""
    calls: dict[str, Callable[[], object]] = {"torch": lambda: graph(batch.images, batch.sizes)}
    for form, file in forms.items():
        if isinstance(file, FileDetector):
            calls[form] = lambda file=file: file.predict(file.features(batch), batch)  # type: ignore[misc]
    spent: dict[str, list[float]] = {form: [] for form in calls}
    with torch.no_grad():
        for number in range(-2, rounds):
            for form, call in calls.items():
                started = time.process_time()
                call()
                if number >= 0:
                    spent[form].append(1000 * (time.process_time() - started))
    return {form: round(float(torch.tensor(times).median()), 2) for form, times in spent.items()}


def timed(act: Callable[[], object]) -> dict[str, float]:
    """Seconds of processor and of the wall that a call takes."""
    wall, processor = time.perf_counter(), time.process_time()
    with contextlib.redirect_stdout(sys.stderr):
        act()
    return {"wall": round(time.perf_counter() - wall, 1), "processor": round(time.process_time() - processor, 1)}


def table(models: dict[str, Any]) -> list[list[object]]:
    """Rows of a Markdown table."""
    ratios = ("whole_onnx_over_torch", "whole_fixed_over_torch", "whole_int8_over_onnx")
    rows: list[list[object]] = [
        ["model", *(f"{form}, ms" for form in FORMS), *(one.removeprefix("whole_") for one in ratios), "export, s"]
    ]
    for name, one in models.items():
        times = (one["whole_ms"].get(form) for form in FORMS)
        rows.append([name, *times, *(one.get(ratio) for ratio in ratios), one["export"]["processor"]])
    return rows


if __name__ == "__main__":
    main()
