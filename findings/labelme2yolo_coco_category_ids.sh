#!/usr/bin/env bash
# labelme2yolo 0.4.0: the COCO files of its command `labelme2coco` give every object the id of another class.
#
# Expected: an object that is labelled `cat` has the category_id that the list `categories` gives to `cat`. Seen: the list counts from 1,
# the objects count from 0. A `dog` (second class) is read as the first class, and objects of the first class have an id that is not
# listed, which pycocotools leaves out of every evaluation without a word.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet labelme2yolo==0.4.0 pillow==12.0.0
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import json
import subprocess
import sys
from pathlib import Path

from PIL import Image

folder = Path(sys.argv[1])
data = folder / "data"
data.mkdir()
for name in ("a", "b"):
    Image.new("RGB", (100, 80)).save(data / f"{name}.png")
    shapes = [
        {"label": label, "points": [[x, 20], [x + 20, 50]], "group_id": None, "shape_type": "rectangle", "flags": {}}
        for label, x in (("cat", 10), ("dog", 40), ("bird", 70))
    ]
    about = {"version": "5.5.0", "flags": {}, "imagePath": f"{name}.png", "imageData": None, "imageHeight": 80, "imageWidth": 100}
    (data / f"{name}.json").write_text(json.dumps({**about, "shapes": shapes}))
command = [folder / "venv/bin/labelme2coco", "--json_dir", data, "--output_dir", folder / "coco", "--val_size", "0.5"]
subprocess.run(command, check=True, capture_output=True)
# Which image goes to which split is drawn at random, so both files are read.
contents = [json.loads(file.read_text()) for file in sorted((folder / "coco/annotations").glob("*.json"))]
names = {category["id"]: category["name"] for content in contents for category in content["categories"]}
drawn = {10: "cat", 40: "dog", 70: "bird"}
objects = [item for content in contents for item in content["annotations"]]
read = {drawn[round(item["bbox"][0])]: names.get(item["category_id"], "not listed") for item in objects}
print(f"labelme2yolo 0.4.0, command labelme2coco: categories {names}; drawn as, and read as: {read}")
listed = [names[number] for number in sorted(names)]
shifted = dict(zip(listed, ["not listed", *listed[:-1]], strict=True))
assert sorted(names) == [1, 2, 3] and read == shifted, "changed"
print("as found")
PYTHON
