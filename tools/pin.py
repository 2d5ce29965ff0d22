"""Pin the version of every dependency in ``pyproject.toml`` and the requirements files, without download addresses.

    uv run python tools/pin.py            newest versions that are compatible with pyproject.toml
    uv run python tools/pin.py --keep     keep the current versions (after a dependency was added or removed)

Writes, from one resolution over all supported Python versions and platforms:

    pyproject.toml         [tool.uv] constraint-dependencies and build-constraint-dependencies, between the marker comments
    requirements.txt       the runtime, with hashes
    requirements-dev.txt   runtime and development tools, with hashes

``uv.lock`` is not kept in the repository, because it contains the addresses of package indexes. With the constraints, every
machine creates the same lock. The script needs only uv and a package index.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import tempfile
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "# pins: begin (written by tools/pin.py)", "# pins: end"
HOST = re.compile(r"https?:|//|--(extra-)?index|--find-links|@ ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", action="store_true", help="keep the versions pinned now where they still agree")
    keep = parser.parse_args().keep
    pyproject = ROOT / "pyproject.toml"
    text = pyproject.read_text()
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch)
        (copy / "README.md").touch()
        (copy / "src/detdistill").mkdir(parents=True)
        (copy / "src/detdistill/__init__.py").touch()
        shutil.copy(ROOT / "LICENSE", copy)
        (copy / "pyproject.toml").write_text(text if keep else with_pins(text, [], []))
        uv(copy, "lock", *([] if keep else ["--upgrade"]))
        pins = locked_versions(tomllib.loads((copy / "uv.lock").read_text()))
        build = build_versions(copy, text, keep)
        # Lock again under the constraints: what is exported is what a fresh clone resolves.
        (copy / "pyproject.toml").write_text(with_pins(text, pins, build))
        uv(copy, "lock")
        again = locked_versions(tomllib.loads((copy / "uv.lock").read_text()))
        if again != pins:
            raise SystemExit(f"the constraints do not give the same lock: {sorted(set(again) ^ set(pins))}")
        exported = {
            "requirements.txt": export(copy, "--no-dev"),
            "requirements-dev.txt": export(copy, "--group", "dev"),
        }
    for name, content in exported.items():
        replace(ROOT / name, content)
    replace(pyproject, with_pins(text, pins, build))
    print(f"{len(pins)} pins in pyproject.toml, {len(build)} for the build; {' and '.join(exported)} written")


def locked_versions(lock: dict[str, Any]) -> list[str]:
    """``name==version`` of every package from an index; with a marker where Python versions or platforms differ."""
    pins = []
    for package in lock["package"]:
        if "registry" not in package["source"]:
            continue
        pin = f"{package['name']}=={package['version']}"
        markers = sorted(package.get("resolution-markers", []))  # uv lists them in one order or another
        if markers:
            pin += " ; " + (markers[0] if len(markers) == 1 else " or ".join(f"({marker})" for marker in markers))
        pins.append(pin)
    return sorted(pins)


def build_versions(folder: Path, text: str, keep: bool) -> list[str]:
    """Pins of the build backend and its dependencies."""
    project = tomllib.loads(text)
    (folder / "build.in").write_text("\n".join(project["build-system"]["requires"]))
    known = project["tool"]["uv"].get("build-constraint-dependencies", []) if keep else []
    (folder / "build.constraints").write_text("\n".join(known))
    python = project["project"]["requires-python"].removeprefix(">=")
    options = ["--universal", "--no-header", "--no-annotate", "--python-version", python, "-c", "build.constraints"]
    return uv(folder, "pip", "compile", "build.in", *options).split("\n")[:-1]


def export(folder: Path, *options: str) -> str:
    """Export the lock as text of a requirements file.

    Raises:
        SystemExit: the text contains an address.
    """
    content = uv(folder, "export", "--locked", "--no-emit-project", "--no-header", "--no-annotate", *options)
    hosts = [line for line in content.splitlines() if HOST.search(line)]
    if hosts:
        raise SystemExit(f"an address in the exported requirements: {hosts[0]}")
    return content


def with_pins(text: str, pins: list[str], build: list[str]) -> str:
    """The text of ``pyproject.toml`` with the pins between its marker comments replaced."""
    before, _, rest = text.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"pyproject.toml needs the comments {BEGIN!r} and {END!r} under [tool.uv]")
    lines = [BEGIN]
    for name, entries in (("constraint-dependencies", pins), ("build-constraint-dependencies", build)):
        # Markers hold single quotes, so TOML's double quotes need no escape.
        lines += [f"{name} = [", *(f'    "{entry}",' for entry in entries), "]"]
    return before + "\n".join([*lines, END]) + after


def replace(path: Path, content: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(content)
    os.replace(temporary, path)


def uv(folder: Path, *arguments: str) -> str:
    """Run a uv command and return its output."""
    result = subprocess.run(["uv", *arguments], cwd=folder, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"uv {' '.join(arguments)}: {result.stderr.strip()}")
    return result.stdout


if __name__ == "__main__":
    main()
