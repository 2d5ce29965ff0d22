"""Distillation of YOLO26n under YOLO26s: this library beside ultralytics' own ``distill_model``, paired seeds.

    uv run python benchmarks/ultralytics_peer.py --work runs/peer --data digits:train=600,val=200,size=128,seed=0 --name digits
    uv run python benchmarks/ultralytics_peer.py --work runs/peer --data PATH/TO/coco128 --name coco128

Both sides train the same student from the same file of initial weights, on the same images without augmentation, for as many
steps of the same size, with AdamW at a constant learning rate and the package's own detection loss. The teacher is the same too;
ultralytics trained it before. Weights are those after the last step, without a moving average, and all are evaluated by this
library. ``step`` is the median time of an epoch but the first; runs alone and distilled take turns, one thread each.

Results are written after each seed; finished runs in ``--work`` are not repeated.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

import detdistill
from _runs import GAIN_COLUMNS, gain_cells, markdown, write
from detdistill.compare import Pair, read_run, summarize
from detdistill.data.discover import load_data
from detdistill.data.records import DetectionSet
from detdistill.training.machine import hardware, versions

RESULTS = Path(__file__).parent / "results"
START = """
import sys, torch
from ultralytics import YOLO
name, classes, seed, out = sys.argv[1:]
torch.manual_seed(int(seed))
from ultralytics.nn.tasks import DetectionModel
made = YOLO(name + ".yaml")
made.model = DetectionModel(name + ".yaml", nc=int(classes), verbose=False)
made.model.args, made.model.names = made.overrides | {"task": "detect"}, dict(enumerate(map(str, range(int(classes)))))
made.save(out)
"""
TRAIN = """
import json, sys, torch
from ultralytics import YOLO, settings
settings.update({"mlflow": False, "tensorboard": False})  # trackers that are installed would take part
torch.set_num_threads(1)
order = json.loads(sys.argv[1])
order_model = order.pop("model")
model = YOLO(order_model)


def keep(trainer):
    # The weights of the network itself, because the package saves those of a moving average.
    network = getattr(trainer.model, "student_model", trainer.model)
    made = YOLO(order_model)
    made.model = type(network)(network.yaml, nc=len(trainer.data["names"]), verbose=False)
    made.model.load_state_dict(network.state_dict())
    made.model.args, made.model.names = {"task": "detect"}, trainer.data["names"]
    made.save(trainer.save_dir / "after_last_step.pt")


model.add_callback("on_train_end", keep)
model.train(**order)
"""
"""What ultralytics runs in a process of its own, where this library is not imported."""
PLAIN = dict.fromkeys(("mosaic", "mixup", "hsv_h", "hsv_s", "hsv_v", "translate", "scale", "fliplr", "erasing"), 0.0)


def written(data: DetectionSet, folder: Path, split: str) -> None:
    """Write a split in the form of YOLO."""
    for kind in ("images", "labels"):
        (folder / kind / split).mkdir(parents=True, exist_ok=True)
    for record in data.records:
        image = Path(data.root) / record.path
        name = f"{record.id:06d}"
        shutil.copy(image, folder / "images" / split / f"{name}{image.suffix}")
        height, width = record.size_hw
        rows = []
        for (left, top, right, bottom), label in zip(record.boxes_xyxy.tolist(), record.labels.tolist(), strict=True):
            centre = ((left + right) / 2 / width, (top + bottom) / 2 / height)
            rows.append(f"{label} {centre[0]:.6f} {centre[1]:.6f} {(right - left) / width:.6f} {(bottom - top) / height:.6f}\n")
        (folder / "labels" / split / f"{name}.txt").write_text("".join(rows))


def yolo_folder(text: str, folder: Path) -> Path:
    """The data set as a YOLO folder; returns its description."""
    file = folder / "data.yaml"
    if not file.exists():
        splits = load_data(text)
        for data, split in ((splits.train, "train"), (splits.val, "val")):
            written(data, folder, split)
        names = dict(enumerate(splits.classes))
        content = {"path": str(folder.resolve()), "train": "images/train", "val": "images/val", "names": names}
        file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


def python(code: str, *words: object, log: Path) -> None:
    """Run code in a process of its own, with one thread and settings of ultralytics beside the log."""
    log.parent.mkdir(parents=True, exist_ok=True)
    own = {"OMP_NUM_THREADS": "1", "YOLO_CONFIG_DIR": str(log.parent), "YOLO_OFFLINE": "true"}
    with log.open("w") as file:
        words_of_command = [sys.executable, "-c", code, *map(str, words)]
        subprocess.run(words_of_command, env={**os.environ, **own}, stdout=file, stderr=file, check=True)


def theirs(chosen: argparse.Namespace, name: str, start: Path, data: Path, seed: int, **more: Any) -> Path:
    """The weights after a training by ultralytics."""
    folder: Path = chosen.work.resolve() / name
    weights = folder / "after_last_step.pt"
    if not weights.exists():
        shutil.rmtree(folder, ignore_errors=True)
        order = {
            "model": str(start), "data": str(data), "epochs": chosen.epochs, "imgsz": chosen.size, "batch": chosen.batch,
            "nbs": chosen.batch, "optimizer": "AdamW", "lr0": chosen.lr, "lrf": 1.0, "momentum": 0.9, "weight_decay": 0.01,
            "warmup_epochs": 0, "seed": seed, "workers": 0, "device": "cpu", "amp": False, "val": False, "plots": False,
            "project": str(folder.parent), "name": folder.name, "exist_ok": True, "auto_augment": None, "cache": "ram",
            **PLAIN, **more,
        }  # fmt: skip
        python(TRAIN, json.dumps(order), log=chosen.work / "logs" / f"{name}.txt")
    return weights


def step_of_theirs(folder: Path) -> float:
    """Median seconds of an epoch but the first."""
    times = [float(row["time"]) for row in csv.DictReader((folder / "results.csv").open())]
    return statistics.median(after - before for before, after in itertools.pairwise(times))


def ours(chosen: argparse.Namespace, name: str, start: Path, data: Path, seed: int, teacher: Path | None) -> Path:
    """The run folder of this library."""
    folder: Path = chosen.work / name
    if not (folder / "summary.json").exists():
        settings: dict[str, Any] = {
            "epochs": chosen.epochs, "size": chosen.size, "resize": "letterbox", "batch": chosen.batch, "lr": chosen.lr,
            "schedule": "constant", "weight_decay": 0.01, "clip": 10.0, "flip": 0.0, "seed": seed, "device": "cpu", "threads": 1,
            "in_memory": True, "evaluate_every": chosen.epochs, "report": False, "resume": folder.exists(), "monitor_every": 0,
            "log_every": 5,
        }  # fmt: skip
        student = f"ultralytics:{start}"
        if teacher is None:
            detdistill.train(student, str(data), role="baseline", out=folder, **settings)
        else:
            taught = {"method": chosen.method, "out": folder, "score_teacher": False}
            detdistill.distill(f"ultralytics:{teacher}", student, str(data), **taught, **settings)
    return folder


def step_of_ours(folder: Path) -> float:
    """Median seconds of a step, evaluations left out."""
    rows = [row for row in csv.DictReader((folder / "metrics.csv").open()) if row["seconds"] and row["loss"]]
    found = list({int(row["step"]): float(row["seconds"]) for row in rows}.items())  # the last step has two rows
    return statistics.median((b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(found[1:]))


def one_seed(chosen: argparse.Namespace, seed: int, data: Path, teacher: Path) -> dict[str, Any]:
    """AP and time of a step of both sides, alone and distilled."""
    classes = len(yaml.safe_load(data.read_text())["names"])
    start = (chosen.work / f"start_seed{seed}.pt").resolve()
    if not start.exists():
        python(START, chosen.student, classes, seed, start, log=chosen.work / "logs" / f"start{seed}.txt")
    found: dict[str, Any] = {"seed": seed}
    for kind, given in (("alone", None), ("distilled", teacher)):
        more = {} if given is None else {"distill_model": str(given)}
        weights = theirs(chosen, f"theirs_{kind}_seed{seed}", start, data, seed, **more)
        scores = detdistill.evaluate(f"ultralytics:{weights}", str(data), size=chosen.size, resize="letterbox", device="cpu")
        run = ours(chosen, f"ours_{kind}_seed{seed}", start, data, seed, given)
        found[f"theirs_{kind}"] = {"AP": scores.metrics["AP"], "epoch_s": round(step_of_theirs(weights.parent), 3)}
        found[f"ours_{kind}"] = {"AP": read_run(run)["metrics"]["AP"], "step_s": round(step_of_ours(run), 4)}
    return found


def summary(chosen: argparse.Namespace, seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """The gain of each side over the seeds, and the time of a distilled step by one alone."""
    result: dict[str, Any] = {}
    for side, unit, method in (("theirs", "epoch_s", "distill_model"), ("ours", "step_s", chosen.method)):
        pairs = [Pair(one["seed"], one[f"{side}_alone"]["AP"], one[f"{side}_distilled"]["AP"]) for one in seeds]
        steps = [one[f"{side}_distilled"][unit] / one[f"{side}_alone"][unit] for one in seeds]
        result[side] = asdict(summarize(method, chosen.teacher, chosen.student, "AP", pairs))
        result[side]["distilled_by_alone"] = round(statistics.median(steps), 3)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--name", required=True, help="of the results: benchmarks/results/ultralytics_peer_NAME.json")
    parser.add_argument("--teacher", default="yolo26s")
    parser.add_argument("--student", default="yolo26n")
    parser.add_argument("--method", default="pkd")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--teacher-epochs", type=int, default=20)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    chosen = parser.parse_args()
    chosen.work = chosen.work / chosen.name
    data = yolo_folder(chosen.data, chosen.work / "data")
    classes = len(yaml.safe_load(data.read_text())["names"])
    start = (chosen.work / "start_teacher.pt").resolve()
    if not start.exists():
        python(START, chosen.teacher, classes, 100, start, log=chosen.work / "logs" / "start_teacher.txt")
    teacher = theirs(chosen, "teacher", start, data, 100, epochs=chosen.teacher_epochs)
    scores = detdistill.evaluate(f"ultralytics:{teacher}", str(data), size=chosen.size, resize="letterbox", device="cpu")
    seeds: list[dict[str, Any]] = []
    content: dict[str, Any] = {
        "settings": {key: str(value) for key, value in vars(chosen).items() if key not in ("work", "data")}
    }
    content |= {"teacher_AP": scores.metrics["AP"], "seeds": seeds, "hardware": hardware(), "versions": versions()}
    for seed in chosen.seeds:
        seeds.append(one_seed(chosen, seed, data, teacher))
        content["gains"] = summary(chosen, seeds)
        write(RESULTS / f"ultralytics_peer_{chosen.name}.json", content)
        print(seeds[-1], flush=True)
    rows = [(side, *gain_cells(gain), gain["distilled_by_alone"]) for side, gain in content["gains"].items()]
    print("\n".join(markdown([("", *GAIN_COLUMNS, "step"), *rows])))


if __name__ == "__main__":
    main()
