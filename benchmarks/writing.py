"""Writing a cache against writing the same bytes: rates and memory, in turns, medians.

    uv run python benchmarks/writing.py --folder /path/on/the/disk --out benchmarks/results/writing_cpu.json

Both write 768 records of 205 kB in files of 256 and flush each file to the disk. ``ratio`` is the rate of the cache's
writer, with checksums and manifests, divided by that of plain files; wall time, because a disk is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import torch

from detdistill.cache.encoding import Encoded, encode
from detdistill.cache.shards import ShardWriter
from detdistill.cache.storage import storage
from detdistill.training.machine import hardware, versions

RECORDS, SHARD = 768, 256


def by_cache(folder: Path, records: list[Encoded]) -> None:
    """Write with the cache's writer."""
    writer = ShardWriter(storage(str(folder)), "benchmark", max_records=SHARD)
    for number, record in enumerate(records):
        writer.add(str(number), record)
    writer.flush()


def plainly(folder: Path, records: list[Encoded]) -> None:
    """Write the same bytes in files of as many records."""
    folder.mkdir()
    for first in range(0, len(records), SHARD):
        with (folder / str(first)).open("wb") as file:
            for record in records[first : first + SHARD]:
                file.write(record.data)
            file.flush()
            os.fsync(file.fileno())


def main() -> None:
    """Measure, print and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    records = [encode((torch.randn(4, 200, 64),), "float32") for _ in range(RECORDS)]
    size = sum(len(record.data) for record in records)
    ways: dict[str, Callable[[Path, list[Encoded]], None]] = {"cache": by_cache, "plain": plainly}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory(dir=chosen.folder) as scratch:
        for turn in range(chosen.rounds + 1):  # the first turn is a warm-up
            for name, write in ways.items():
                started = time.perf_counter()
                write(Path(scratch) / f"{name}{turn}", records)
                seconds[name].append(time.perf_counter() - started)
        tracemalloc.start()
        by_cache(Path(scratch) / "traced", records)
        peak = tracemalloc.get_traced_memory()[1]
    ratio = statistics.median(plain / cache for cache, plain in zip(seconds["cache"][1:], seconds["plain"][1:], strict=True))
    rates = {name: round(size / 1e6 / statistics.median(each[1:]), 1) for name, each in seconds.items()}
    content = {
        "what": __doc__.splitlines()[0],
        "megabytes": round(size / 1e6, 1),
        "ratio": round(ratio, 3),
        "megabytes_per_second": rates,
        "added_megabytes": round(peak / 1e6, 1),
        "hardware": hardware(),
        "versions": versions(),
    }
    print(content)
    if chosen.out:
        chosen.out.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
