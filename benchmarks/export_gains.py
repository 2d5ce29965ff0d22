"""Does a distilled student keep its gain in the exported file and after int8?

    uv run python benchmarks/export_gains.py --runs FOLDER --name digits_fcos --work runs/exported

FOLDER holds finished runs ``baseline-seedN`` and ``distilled-seedN``, as ``detdistill distill --baseline true --seeds 0,1,2``
leaves them. Each is exported as ONNX and as int8, calibrated on 64 training images, and all forms are evaluated on all validation
images by the same code. The results are written after each run; runs that stand in the results are not exported again.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from _runs import GAIN_COLUMNS, gain_cells, markdown, write
from detdistill import api
from detdistill.compare import Pair, read_run, summarize
from detdistill.export.proof import Stage
from detdistill.training.machine import hardware, versions

RESULTS = Path(__file__).parent / "results"
FORMS = ("torch", "onnx", "onnx int8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, required=True, help="folder with the runs")
    parser.add_argument("--name", required=True, help="of the results: benchmarks/results/export_gains_NAME.json")
    parser.add_argument("--work", type=Path, required=True, help="folder for the exported files")
    parser.add_argument("--data", default=None, help="the data, if they are not where the runs found them")
    parser.add_argument("--calibration", type=int, default=64)
    given = parser.parse_args()
    torch.set_num_threads(1)
    out = RESULTS / f"export_gains_{given.name}.json"
    found: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"runs": {}}
    found |= {"hardware": hardware(), "versions": versions(), "calibration": given.calibration}
    for folder in sorted(path.parent for path in given.runs.glob("*-seed*/summary.json")):
        run = read_run(folder)
        if folder.name not in found["runs"]:
            data = given.data or run["config"]["data"]
            file = given.work / given.name / folder.name / "model.onnx"
            made = api.export(str(folder), file, data, int8=True, calibration=given.calibration, overwrite=True, batch=16)
            found["runs"][folder.name] = {
                "role": run["role"],
                "seed": run["seed"],
                "student": run["student"],
                "method": run["method"],
                "AP_of_the_run": run["metrics"]["AP"],
                "stages": {stage.name: plain(stage) for stage in made.stages},
            }
        found["gains"] = gains(list(found["runs"].values()))
        write(out, found)
        print(folder.name, {name: one["AP"] for name, one in found["runs"][folder.name]["stages"].items()}, flush=True)
    print("\n".join(markdown([("form", *GAIN_COLUMNS), *((form, *gain_cells(one)) for form, one in found["gains"].items())])))


def plain(stage: Stage) -> dict[str, Any]:
    """A stage as JSON, without the names of files."""
    return {key: value for key, value in stage.to_plain().items() if key not in ("file", "name", "checksum")}


def gains(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The gain in each form, and how much of torch's gain is kept, over the seeds of which both runs are there."""
    result: dict[str, Any] = {}
    seeds = sorted(
        {run["seed"] for run in runs if {one["role"] for one in runs if one["seed"] == run["seed"]} >= {"baseline", "distilled"}}
    )
    for form in FORMS if seeds else ():
        ap = {(run["role"], run["seed"]): run["stages"][form]["AP"] for run in runs}
        pairs = [Pair(seed, ap["baseline", seed], ap["distilled", seed]) for seed in seeds]
        method = next(run["method"] for run in runs if run["role"] == "distilled")
        result[form] = asdict(summarize(method, "", runs[0]["student"], "AP", pairs))
        result[form]["kept"] = result[form]["mean"] / result["torch"]["mean"] if result["torch"]["mean"] else None
    return result


if __name__ == "__main__":
    main()
