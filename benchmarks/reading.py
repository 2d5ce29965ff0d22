"""Reading annotations, inspecting images and checking checksums: processor time of this checkout against another, in turns.

    OMP_NUM_THREADS=1 uv run python benchmarks/reading.py --other ../old --data ../coco128 \
        --checkpoint runs/x/checkpoints/last.ckpt --out benchmarks/results/reading_cpu.json

- ``coco`` and ``voc``: ``load_data`` of 20,500 made-up images with three boxes each, in a new process of each checkout.
- ``coco again`` and ``voc again``: the same when this checkout has kept what it read (in an own cache folder).
- ``deep``: ``detdistill data inspect --deep true`` of a real data set.
- ``predict NAME``: ``detdistill.predict`` of the images of the data set at 640 pixels, with each student folder of ``--models``.
- ``predict NAME, wall clock``: the same runs; all other times are processor time.
- ``checksum``: the check of a checkpoint, as a share of the time from the start of a process until the checkpoint is loaded.

``--cases predict`` stands for all cases of ``predict``. Both checkouts use the packages of this environment.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from detdistill.training.machine import hardware, versions

ROOT = Path(__file__).resolve().parents[1]
IMAGES = 20_500
LOAD = """
import sys, time
from detdistill.data.discover import load_data
before = time.process_time()
load_data(sys.argv[1])
print(time.process_time() - before)
"""
RESUME = """
import sys, time
from pathlib import Path
import torch
import detdistill.training.run
from detdistill.files import damage
before = time.process_time()
damage(Path(sys.argv[1]))
checked = time.process_time()
torch.load(sys.argv[1], map_location="cpu", weights_only=True)
print((checked - before) / time.process_time())
"""


PREDICT = """
import sys, tempfile, time
from pathlib import Path
import detdistill.evaluation.predict
from detdistill import api
model, images = sys.argv[1].split("|")
with tempfile.TemporaryDirectory() as out:
    before, started = time.process_time(), time.perf_counter()
    api.predict(model, Path(images), Path(out), size=640)
    print(time.process_time() - before, time.perf_counter() - started)
"""


def make(root: Path) -> None:
    """Write the same images and boxes in COCO and in VOC form."""
    for folder in ("coco/train2017", "coco/annotations", "voc/JPEGImages", "voc/Annotations", "voc/ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    buffer = io.BytesIO()
    Image.new("RGB", (64, 48), (9, 99, 200)).save(buffer, "JPEG")
    names = [f"{index:012d}" for index in range(IMAGES)]
    images: list[dict[str, object]] = []
    annotations: list[dict[str, object]] = []
    for index, name in enumerate(names):
        (root / "coco/train2017" / f"{name}.jpg").write_bytes(buffer.getvalue())
        os.link(root / "coco/train2017" / f"{name}.jpg", root / "voc/JPEGImages" / f"{name}.jpg")
        images.append({"id": index, "file_name": f"{name}.jpg", "width": 64, "height": 48})
        objects = ""
        for box in range(3):
            x, y, key = 2 + box * 9 + index % 5, 3 + box * 5, len(annotations) + 1
            kind = {"id": key, "image_id": index, "category_id": box % 2 + 1, "iscrowd": 0}
            annotations.append({**kind, "bbox": [x, y, 12, 14], "area": 168})
            corners = f"<xmin>{x + 1}</xmin><ymin>{y + 1}</ymin><xmax>{x + 12}</xmax><ymax>{y + 14}</ymax>"
            objects += f"<object><name>{'ab'[box % 2]}</name><difficult>0</difficult><bndbox>{corners}</bndbox></object>"
        size = "<size><width>64</width><height>48</height><depth>3</depth></size>"
        text = f"<annotation><filename>{name}.jpg</filename>{size}{objects}</annotation>"
        (root / "voc/Annotations" / f"{name}.xml").write_text(text)
    categories = [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "coco/annotations/instances_train2017.json").write_text(json.dumps(content))
    for split, part in (("train", names[:-500]), ("val", names[-500:])):
        (root / "voc/ImageSets/Main" / f"{split}.txt").write_text("".join(f"{name}\n" for name in part))


def printed(checkout: Path, code: str, path: Path | str) -> float:
    """The number that a program prints with the package of a checkout."""
    return numbers(checkout, code, path)[0]


def numbers(checkout: Path, code: str, path: Path | str) -> list[float]:
    """All numbers that a program prints with the package of a checkout."""
    command = [sys.executable, "-c", code, str(path)]
    environment = os.environ | {"PYTHONPATH": str(checkout / "src")}
    found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tempfile.gettempdir(), env=environment)
    return [float(number) for number in found.stdout.split()]


def inspected(checkout: Path, data: Path) -> float:
    """Processor time of ``data inspect --deep true``."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "detdistill", "data", "inspect", str(data), "--deep", "true"]
    environment = os.environ | {"PYTHONPATH": str(checkout / "src")}
    subprocess.run(command, capture_output=True, check=True, cwd=tempfile.gettempdir(), env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def predicting(other: Path, model: Path, data: Path, rounds: int) -> dict[str, dict[str, float]]:
    """Processor time and wall clock of ``predict``."""
    text = f"{model}|{data}"
    runs = [(numbers(ROOT, PREDICT, text), numbers(other, PREDICT, text)) for _ in range(rounds)]
    names = (f"predict {model.name}", f"predict {model.name}, wall clock")
    return {name: compared(name, [(mine[k], theirs[k]) for mine, theirs in runs]) for k, name in enumerate(names)}


def compared(name: str, pairs: list[tuple[float, float]]) -> dict[str, float]:
    """Medians of the times of this checkout and of the other one, and of their ratios."""
    mine, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(one / two for one, two in pairs)
    found = {"ratio": round(ratio, 3), "seconds": round(mine, 2), "other_seconds": round(theirs, 2)}
    print(name, found, flush=True)
    return found


def main() -> None:
    """Measure all cases, print them and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other", type=Path, required=True, help="another checkout of the project")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, help="none: checksums are not measured")
    parser.add_argument("--models", type=Path, nargs="*", default=[], help="student folders for predict")
    parser.add_argument("--cases", nargs="*", help="names of the cases to measure; the file keeps the others")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    other, data = chosen.other.resolve(), chosen.data.resolve()
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch)
        if chosen.cases != ["predict"]:
            make(made)
        cases: dict[str, Callable[[Path], float]] = {
            "coco": lambda checkout: printed(checkout, LOAD, made / "coco"),
            "voc": lambda checkout: printed(checkout, LOAD, made / "voc"),
            "coco again": lambda checkout: printed(checkout, LOAD, made / "coco"),
            "voc again": lambda checkout: printed(checkout, LOAD, made / "voc"),
            "deep": lambda checkout: inspected(checkout, data),
        }
        found: dict[str, dict[str, float]] = {}
        if chosen.out and chosen.out.exists():
            found = json.loads(chosen.out.read_text())["cases"]
        for name, case in cases.items():
            if name not in (chosen.cases or cases):
                continue
            os.environ["DETDISTILL_CACHE"] = str(made / "cache" if name.endswith("again") else made / "none" / name)
            if name.endswith("again"):
                time.sleep(3)  # files that have just been written are not trusted
                case(ROOT)
            else:
                (made / "none").touch()  # a file, so that nothing can be kept below it
            pairs = [(case(ROOT), case(other)) for _ in range(chosen.rounds)]
            found[name] = compared(name, pairs)
        if "predict" in (chosen.cases or ["predict"]):
            for model in chosen.models:
                found |= predicting(other, model.resolve(), data, chosen.rounds)
    if chosen.checkpoint:
        shares = [printed(ROOT, RESUME, chosen.checkpoint.resolve()) for _ in range(chosen.rounds)]
        found["checksum"] = {"share": round(statistics.median(shares), 5)}
        print("checksum", found["checksum"], flush=True)
    if chosen.out:
        threads = os.environ.get("OMP_NUM_THREADS", "")
        command = f"OMP_NUM_THREADS={threads} uv run python benchmarks/reading.py {' '.join(sys.argv[1:])}"
        machine = {"hardware": hardware(), "versions": versions()}
        content = {"what": __doc__.splitlines()[0], "command": command, "rounds": chosen.rounds, "cases": found, **machine}
        chosen.out.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
