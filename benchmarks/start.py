"""Start of commands that need no model: processor time and peak memory of whole processes, medians.

    uv run python benchmarks/start.py --out benchmarks/results/start_cpu.json

``detectors`` is measured with the probed result kept, after one run that makes it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

COMMANDS = ("--help", "recipes", "cite pkd", "methods", "detectors")


def measured(command: str, environment: dict[str, str]) -> tuple[float, float]:
    """Processor seconds and peak megabytes of a command."""
    words = [sys.executable, "-m", "detdistill", *command.split()]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    _, status, used = os.wait4(process.pid, 0)
    assert status == 0, command
    return used.ru_utime + used.ru_stime, used.ru_maxrss / 1024


def main() -> None:
    """Measure, print and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    seconds: dict[str, list[float]] = {command: [] for command in COMMANDS}
    megabytes: dict[str, list[float]] = {command: [] for command in COMMANDS}
    with tempfile.TemporaryDirectory() as scratch:
        environment = os.environ | {"DETDISTILL_CACHE": scratch}
        first = measured("detectors", environment)[0]
        for _ in range(chosen.rounds):
            for command in COMMANDS:
                time, memory = measured(command, environment)
                seconds[command].append(time)
                megabytes[command].append(memory)
    from detdistill.training.machine import hardware, versions  # not before: a child begins with the memory of its parent

    content = {
        "what": __doc__.splitlines()[0],
        "seconds": {command: round(statistics.median(each), 2) for command, each in seconds.items()},
        "megabytes": {command: round(statistics.median(each)) for command, each in megabytes.items()},
        "detectors_probed": round(first, 1),
        "hardware": hardware(),
        "versions": versions(),
    }
    print(json.dumps(content, indent=2))
    if chosen.out:
        chosen.out.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
