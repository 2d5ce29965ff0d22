"""Methods on the embedded digits: one teacher, the same student, paired seeds.

    uv run python benchmarks/methods.py --work runs/methods --out benchmarks/results/methods_digits.json
    uv run python benchmarks/methods.py --pair faster_rcnn --work runs/two_stage --out benchmarks/results/methods_faster_rcnn.json

Pair ``fcos`` is the demo's, in the demo's settings; the others train for fewer steps. Finished runs are not repeated.
Loss weights are the published ones for such students, unless the method's text names others.
"""

import argparse
import json
import shlex
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import detdistill
from detdistill.api.training import distill_each
from detdistill.compare import Gain, compare_runs, read_run, show_gains
from detdistill.demo import STUDENT, TEACHER
from detdistill.demo import settings as demo_settings
from detdistill.errors import DetdistillError
from detdistill.progress import Progress
from detdistill.report.runs import Run, distillation_terms, read
from detdistill.report.words import kd_share

LARGE = "resnet10t,channels=32-64-128-256,neck=64,levels=3-5"
SMALL = "resnet10t,channels=16-32-64-128,stem=16,neck=64,levels=3-5"


@dataclass(frozen=True)
class Pair:
    """A teacher and its student, their training, and the methods that are compared on them."""

    teacher: str
    student: str
    methods: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings that differ from the demo's."""
    students: dict[str, Any] = field(default_factory=dict)
    """Settings of the students that differ from the teacher's."""
    teacher_length: dict[str, int] = field(default_factory=lambda: {"epochs": 5})
    length: dict[str, int] = field(default_factory=lambda: {"epochs": 3})


MAPS = (
    "pkd", "fitnet", "cwd", "mgd", "fkd,profile=one_stage", "fgd,profile=anchor_free", "skd", "glamd", "frs,profile=fcos",
    "fgfi,form=fpn,weight=3", "defeat", "drkd,profile=one_stage", "icd", "pgd", "tbd", "rm_pfi", "bckd", "mimic,two_stage=false",
    "dsig,profile=one_stage", "odkd,rcn_weight=0", "lgd",
    "ssd_det,width=128,negatives=50", "labelenc", "gid", "scalekd,teacher_scale=1", "lad",
    "crosskd,depth=2", "mimicdet,width=256,regions_per_image=48,max_mimic=48,max_proposals=100",
    "head,pair=dense_to_dense,warmup_iters=50,assistant_warmup_iters=50",
)  # fmt: skip
SHORT = {"teacher_length": {"steps": 1250}, "length": {"steps": 400}}
PAIRS = {
    "fcos": Pair(TEACHER, STUDENT, MAPS),
    "faster_rcnn": Pair(
        f"faster_rcnn:{LARGE},proposals=100,rois=48,mlp=256",
        f"faster_rcnn:{SMALL},proposals=100,rois=48,mlp=256",
        (
            "pkd",
            "mimic",
            "odkd",
            "dsig",
            "g_detkd",
            "tadf,feature_weight=0.01",
            "glamd,profile=two_stage",
            "frs,profile=faster_rcnn",
        ),
        {"lr": 1e-3},
        **SHORT,
    ),
    "gfl": Pair(
        f"gfl:{LARGE},convs=2", f"gfl:{SMALL},convs=2", ("pkd", "bckd", "ld", "crosskd,depth=2", "crosskd,depth=2+pkd"), **SHORT
    ),
    "paa": Pair(f"paa:{LARGE},convs=2", f"paa:{SMALL},convs=2", ("pkd", "lad"), **SHORT),
    "heterogeneous": Pair(
        f"faster_rcnn:{LARGE},proposals=100,rois=48,mlp=256",
        f"fcos:{SMALL},convs=2",
        ("pkd", "unikd", "head,warmup_iters=50,assistant_warmup_iters=50"),
        {"lr": 1e-3},
        {"lr": 3e-3},
        **SHORT,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pair", choices=PAIRS, default="fcos")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", help="instead of those of the pair")
    parser.add_argument("--steps", type=int, help="training steps of the students, instead of the pair's length")
    parser.add_argument("--size", type=int, default=128, help="pixels of the images, which are drawn in this size")
    parser.add_argument("--drawn", type=int, help="pixels in which the images are drawn, if not --size")
    parser.add_argument("--teacher-size", type=int, help="the teacher is trained and teaches at this size, instead of --size")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--on", default="local", help="local, ray or ray://HOST:PORT; there, the runs of all methods together")
    parser.add_argument("--channels_last", action="store_true", help="in every run; about 0.8 of the time on some CPUs")
    chosen = parser.parse_args()
    pair = PAIRS[chosen.pair]
    if chosen.steps:
        pair = replace(pair, length={"steps": chosen.steps})
    settings = {**demo_settings(), **pair.settings, "size": chosen.size, "channels_last": chosen.channels_last}
    drawn = chosen.drawn or chosen.size
    data = "digits" if drawn == 128 else f"digits:train=2000,val=400,size={drawn},seed=0"
    teacher = chosen.work / "teacher"
    if not (teacher / "summary.json").exists():
        resume = (teacher / "config.yaml").exists()
        long = {**settings, **pair.teacher_length, "evaluate_every": 5, "size": chosen.teacher_size or chosen.size}
        detdistill.train(pair.teacher, data, role="teacher", out=teacher, resume=resume, report=False, **long)
    common = {
        "seeds": tuple(chosen.seeds),
        "jobs": chosen.jobs,
        "on": chosen.on,
        "report": False,
        "score_teacher": False,
        "evaluate_every": 100,
        "stages": str(chosen.work / "stages"),
        **settings,
        **pair.students,
        **pair.length,
    }
    if chosen.teacher_size:
        common["teacher_size"] = chosen.teacher_size
    variants = {}
    for index, method in enumerate(chosen.methods or pair.methods):
        folder = chosen.work / method.replace(",", "_").replace("=", "-")
        own = {"method": method, "out": folder, "resume": folder.exists()}
        variants[method] = {**common, **own, "baseline": index == 0}  # one baseline per seed, for all methods
    runs: list[Path] = []
    gains: list[Gain] = []
    # On this machine one method after the other, so that an interrupted benchmark leaves its results.
    together = [variants] if chosen.on != "local" else [{name: given} for name, given in variants.items()]
    with Progress() as shown:
        for some in together:
            made = distill_each(str(teacher), pair.student, data, some, progress=shown, failed=failed)
            runs += [run for one in made.values() for run in one.runs]
            if made:
                gains = compare_runs(runs, allow_unequal=True)
                write(chosen, pair, runs, gains)
    if gains:
        show_gains(gains)


def failed(method: str, error: DetdistillError) -> None:
    """One method must not cost the results of the others."""
    print(f"{method}: {error}", flush=True)


def share(folder: Path, baselines: list[Run]) -> float | None:
    """Share of the distillation terms in the gradient, mean over the second half of the training; None: a baseline."""
    one = read(folder)
    return kd_share(one, distillation_terms(one, baselines))


def write(chosen: argparse.Namespace, pair: Pair, runs: list[Path], gains: list[Gain]) -> None:
    """Write the results so far."""
    summaries = [read_run(run) for run in runs]
    teacher = read_run(chosen.work / "teacher")
    baselines = [read(one["folder"]) for one in summaries if one["role"] == "baseline"]
    content = {
        "what": f"digits, 2000 training and 400 validation images drawn in {chosen.drawn or chosen.size} pixels; "
        f"student at {chosen.size}, from random weights",
        "command": "uv run python "
        + shlex.join(sys.argv)
        .replace(str(chosen.work), "runs/methods")
        .replace(str(chosen.out), "benchmarks/results/" + chosen.out.name),
        "seeds": chosen.seeds,
        "teacher": {"model": pair.teacher, "AP": teacher["metrics"]["AP"], **pair.teacher_length},
        "student": {"model": pair.student, **pair.length},
        "gains": [{**asdict(gain), "teacher": "teacher"} for gain in gains],
        "runs": [
            {key: run[key] for key in ("role", "method", "seed", "metrics", "seconds")}
            | {"share": share(run["folder"], baselines)}
            for run in summaries
        ],
        "hardware": summaries[0]["hardware"],
        "versions": summaries[0]["versions"],
    }
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
