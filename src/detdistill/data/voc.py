"""Reader of Pascal VOC: a folder of ``<annotation>`` files beside a folder of images, or XML beside the images (Roboflow).

VOC counts pixels from 1, and both corner pixels belong to the box. So 1 is subtracted from xmin and ymin, while xmax and
ymax stay: a box from 1 to 10 covers ten pixels, 0.0 to 10.0, and a box from 7 to 7 covers one. Most converters count from 0
and write ends that do not belong to the box; a 0 in xmin or ymin shows it, or decimal points in most boxes, and then nothing is
subtracted. The file ``voc.yaml`` with ``counts_from: 0`` (or 1) decides it for a data set. ``difficult`` objects are treated like
all others.
"""

from __future__ import annotations

import math
import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import yaml

from detdistill.data.records import (
    BROKEN_FILE,
    NO_OBJECT,
    Defect,
    DetectionSet,
    RawBox,
    RawImage,
    SplitName,
    assemble,
    image_ids,
    listed,
    relative,
)
from detdistill.data.voc_files import ImageFinder, annotation_folder, find_files, parse_xml, read_lines
from detdistill.errors import DataError, subject

CLASS_FILES = ("classes.txt", "labels.txt", "class_names.txt", "ImageSets/Main/classes.txt", "labelmap.txt")
CORNERS = ("xmin", "ymin", "xmax", "ymax")
SETTINGS = "voc.yaml"
MOSTLY = 0.5
"""Share of the boxes above which decimal points show that the corners count from 0; a few boxes of VOC 2012 have them, too."""


def find_voc(path: Path) -> Path | None:
    """Return the folder if it holds VOC annotations (in a subfolder, in itself or in folders named after splits)."""
    return None if annotation_folder(path) is None else path


@dataclass(frozen=True)
class _Object:
    """An object as written in the annotation."""

    record: str
    name: str
    corners: tuple[float, ...] | None
    """xmin, ymin, xmax, ymax; nan for a text that is no number. None: ``problem`` says why there are none."""
    problem: str = ""
    decimal: bool = False
    """True if a corner is written with a decimal point, as in 12.0."""


@dataclass(frozen=True)
class _Annotation:
    file: Path
    tree: ElementTree.Element
    objects: tuple[_Object, ...]


def read_voc(root: Path) -> tuple[dict[SplitName, DetectionSet], list[str]]:
    """Read the splits of a VOC folder.

    The classes are those listed in ``classes.txt``, ``labels.txt`` or ``labelmap.txt``, else all object names in the
    annotations, sorted. An annotation that cannot be parsed is a defect.

    Returns:
        The sets by split, and notes for the user. Without ``ImageSets`` and split folders, all images are ``train``.

    Raises:
        DataError: an empty or repetitive list, a file of text in an unknown encoding, or no object in any annotation.
    """
    notes: list[str] = []
    folder = annotation_folder(root)
    assert folder is not None  # the caller has found it
    files = find_files(root, folder, notes)
    defects = {name: list(files.defects.get(name, ())) for name in files.by_split}
    parsed = {name: _parse(root, each, defects[name]) for name, each in files.by_split.items()}
    every = [annotation for each in parsed.values() for annotation in each]
    names = {item.name for annotation in every for item in annotation.objects if item.name}
    classes = _class_file(root, names, files.every) or tuple(sorted(names))
    if not any(annotation.objects for annotation in every) and not any(defects.values()):
        raise DataError(f"{root}: no object with a name in {len(every)} annotation files; there is nothing to learn")
    origin = _counts_from(root, every, notes)
    ids = image_ids(files.by_split.values())
    labels = {text: label for label, text in enumerate(classes)}
    find_image = ImageFinder(root, files)
    sets: dict[SplitName, DetectionSet] = {}
    for name, each in parsed.items():
        if name == "test" and not any(os.path.isfile(file) for file in files.by_split[name]):
            notes.append(f"none of the {len(files.by_split[name])} test images has an annotation: there is no test split")
            continue
        paths = [find_image(annotation.file, annotation.tree) for annotation in each]
        images = [
            _raw_image(ids[annotation.file], path, relative(annotation.file, root), annotation, labels, origin, defects[name])
            for path, annotation in zip(paths, each, strict=True)
        ]
        sets[name] = assemble(name, "voc", root, classes, images, defects[name])
    if not files.lists and (unused := find_image.unused()):
        notes.append(f"{subject(len(unused), 'image', 'have')} no annotation: not used, e.g. {relative(unused[0], root)}")
    return sets, notes


def _parse(root: Path, files: list[Path], defects: list[Defect]) -> list[_Annotation]:
    """The annotations that exist and can be parsed; the others are added to the defects."""
    found = []
    for file in files:
        tree = parse_xml(file) if os.path.isfile(file) else None  # unlike Path.is_file, it is False for names that are too long
        if isinstance(tree, str):
            defects.append(Defect(BROKEN_FILE, relative(file, root), file.stem, tree, "image"))
        elif tree is not None and tree.tag != "annotation":
            cvat = " (CVAT writes this: export as Pascal VOC or COCO)" if tree.tag == "annotations" else ""
            message = f"its outermost element is <{tree.tag}>, not <annotation>{cvat}"
            defects.append(Defect("not VOC", relative(file, root), file.stem, message, "image"))
        elif tree is not None:
            objects = tuple(_object(item, f"object {place}") for place, item in enumerate(tree.findall("object"), start=1))
            found.append(_Annotation(file, tree, objects))
    return found


def _object(item: ElementTree.Element, record: str) -> _Object:
    boxes, names = item.findall("bndbox"), item.findall("name")
    name = (names[0].text or "").strip() if names else ""
    if len(boxes) > 1 or len(names) > 1:
        return _Object(record, name, None, f"{len(names)} name and {len(boxes)} bndbox in one object; it can have one of each")
    texts = {child.tag: child.text or "" for child in boxes[0]} if boxes else {}
    if not all(side in texts for side in CORNERS):
        return _Object(record, name, None, "bndbox needs xmin, ymin, xmax and ymax")
    if len(texts) < len(boxes[0]):
        return _Object(record, name, None, "a corner of its bndbox is given twice")
    corners = tuple(_number(texts[side]) for side in CORNERS)
    return _Object(record, name, corners, decimal=any("." in texts[side] for side in CORNERS))


def _class_file(root: Path, used: set[str], annotations: list[Path]) -> tuple[str, ...] | None:
    for name in CLASS_FILES:
        if (root / name).is_file():
            lines = [line for line in read_lines(root / name, annotations, lambda line: line in used) if line]
            if name == "labelmap.txt":  # name:color:parts:actions
                lines = [line.split(":")[0].strip() for line in lines if not line.startswith("#")]
            lines = [line for line in lines if line not in NO_OBJECT or line in used]
            if len(set(lines)) < len(lines) or not lines:
                raise DataError(f"{root / name}: needs one class name on each line, each once; it has {listed(lines) or 'none'}")
            return tuple(lines)
    return None


def _counts_from(root: Path, annotations: Iterable[_Annotation], notes: list[str]) -> int:
    """The number of the first pixel: 0 or 1."""
    if (root / SETTINGS).is_file():
        try:
            settings = yaml.safe_load((root / SETTINGS).read_bytes())
        except (yaml.YAMLError, ValueError, OSError) as error:
            raise DataError(f"{root / SETTINGS}: not valid YAML: {' '.join(str(error).split())}") from error
        origin = settings.get("counts_from") if isinstance(settings, dict) else None
        if type(origin) is not int or origin not in (0, 1) or len(settings) != 1:
            raise DataError(f"{root / SETTINGS}: is {settings!r:.80}; it needs one line, counts_from: 0 or counts_from: 1")
        return int(origin)
    objects = [item for annotation in annotations for item in annotation.objects if item.corners]
    corners = [item.corners for item in objects if item.corners]
    zeros = sum(0 <= corner[0] < 1 or 0 <= corner[1] < 1 for corner in corners)
    if zeros:
        notes.append(
            f"the corners count from 0: {zeros} of {len(corners)} boxes have a 0 in xmin or ymin, which VOC does not know, so 1 "
            f"is not subtracted; a file {SETTINGS} with the line counts_from: 1 (or 0) overrules this"
        )
        return 0
    decimal = sum(item.decimal for item in objects)
    if decimal > MOSTLY * len(objects):
        notes.append(
            f"the corners count from 0: those of {decimal} of {len(objects)} boxes have a decimal point, so they are no numbers "
            f"of pixels, and 1 is not subtracted; a file {SETTINGS} with the line counts_from: 1 (or 0) overrules this"
        )
        return 0
    thin = sum((corner[0] == corner[2]) != (corner[1] == corner[3]) for corner in corners)
    if thin:
        notes.append(f"{subject(thin, 'box', 'have')} xmin equal to xmax, or ymin to ymax: one pixel wide or high")
    return 1


def _raw_image(
    number: int,
    path: Path,
    where: str,
    annotation: _Annotation,
    labels: dict[str, int],
    origin: int,
    defects: list[Defect],
) -> RawImage:
    size_hw = None
    if annotation.tree.find("size") is not None:
        height, width = (_number(annotation.tree.findtext(f"size/{side}") or "") for side in ("height", "width"))
        size_hw = (int(height), int(width)) if math.isfinite(height) and math.isfinite(width) else (0, 0)
    boxes = []
    for item in annotation.objects:
        if not item.name:
            defects.append(Defect("missing category", where, item.record, "the object has no name", "box"))
        elif item.name not in labels:
            message = f"{item.name!r:.60} is not among the classes {listed(labels)}"
            defects.append(Defect("unknown class", where, item.record, message, "box"))
        elif item.corners is None:
            defects.append(Defect("malformed record", where, item.record, item.problem, "box"))
        else:
            x1, y1, x2, y2 = item.corners
            # A single pixel is an accidental click in real files: left empty.
            if x2 >= x1 and y2 >= y1 and (x2, y2) != (x1, y1):
                x1, y1 = x1 - origin, y1 - origin
            boxes.append(RawBox((x1, y1, x2, y2), labels[item.name], item.record))
    return RawImage(number, path, boxes, where, size_hw)


def _number(text: str) -> float:
    """The number that a text spells; nan for any other text. Python's underscores within numbers do not count."""
    try:
        return math.nan if "_" in text else float(text)
    except ValueError:
        return math.nan
