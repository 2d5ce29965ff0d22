"""The notebook of the docs runs from its first cell to its last, at a tiny size."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

NOTEBOOK = Path(__file__).resolve().parents[1] / "docs/notebooks/quickstart.ipynb"
SIZES = "TRAIN, VAL, SIZE, EPOCHS, SEEDS = 8, 4, 64, 1, (0,)"


def test_the_notebook_runs(tmp_path, forked_python):
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    small, changed = re.subn(r"^TRAIN, VAL, .*$", SIZES, code, flags=re.MULTILINE)
    assert changed == 1
    ends = "\nprint('file', exported.file, exported.file.stat().st_size > 10_000, [gain.method for gain in result.gains])"
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", small + ends], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"^file \S+student\.onnx True \['pkd'\]$", done.stdout, flags=re.MULTILINE), done.stdout[-2000:]
