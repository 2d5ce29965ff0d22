#!/usr/bin/env bash
# ultralytics 8.4.190: `import ultralytics.nn.tasks` replaces PIL.Image.open, torch.save and the print options of NumPy and torch.
#
# Expected: an import that only makes names available. Seen: for the whole process, PIL.Image.open belongs to ultralytics, and a file
# that is no image then ends in a missing package (after an attempt to install it, turned off here) instead of Pillow's
# UnidentifiedImageError, so that code which passes over broken images stops.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 ultralytics==8.4.190
export YOLO_CONFIG_DIR="$folder" YOLO_VERBOSE=False YOLO_AUTOINSTALL=False
echo "plain text" > "$folder/text.png"
"$folder/venv/bin/python" - "$folder/text.png" <<'PYTHON'
import sys

import numpy
import torch
from PIL import Image


def error_of_opening() -> str:
    try:
        Image.open(sys.argv[1])
    except Exception as error:
        return type(error).__name__
    return "none"


before = {"open": Image.open.__module__, "save": torch.save.__module__, "error": error_of_opening()}
width = numpy.get_printoptions()["linewidth"]
import ultralytics
import ultralytics.nn.tasks

after = {"open": Image.open.__module__, "save": torch.save.__module__, "error": error_of_opening()}
print(f"ultralytics {ultralytics.__version__}: before {before}, after {after}")
print(f"NumPy's line width {width}, then {numpy.get_printoptions()['linewidth']}")
assert before == {"open": "PIL.Image", "save": "torch.serialization", "error": "UnidentifiedImageError"}, "changed"
assert after == {"open": "ultralytics.utils.patches", "save": "ultralytics.utils.patches", "error": "ModuleNotFoundError"}, "changed"
assert width != numpy.get_printoptions()["linewidth"], "changed"
print("as found")
PYTHON
