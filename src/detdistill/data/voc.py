"""Reader of Pascal VOC: ``Annotations/*.xml`` with ``JPEGImages`` and ``ImageSets/Main``, or XML beside the images (Roboflow).

VOC counts pixels from 1, and both corner pixels belong to the box. So 1 is subtracted from xmin and ymin, while xmax and
ymax stay: a box from 1 to 10 covers ten pixels, 0.0 to 10.0. ``difficult`` objects are treated like all others.
"""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from detdistill.data.records import (
    IMAGE_SUFFIXES,
    Defect,
    DetectionSet,
    RawBox,
    RawImage,
    SplitName,
    assemble,
    image_ids,
    listed,
    relative,
    split_of,
)
from detdistill.errors import DataError

SPLITS: tuple[SplitName, ...] = ("train", "val", "test")
CLASS_FILES = ("classes.txt", "labels.txt", "ImageSets/Main/classes.txt")


def find_voc(path: Path) -> Path | None:
    """Return the folder if it holds VOC annotations (in ``Annotations``, in itself or in folders named after splits)."""
    if not path.is_dir():
        return None
    places = [path / "Annotations", path, *_split_folders(path).values()]
    for place in places:
        some = sorted(place.glob("*.xml"))[:10] if place.is_dir() else []
        if any(b"<annotation" in file.read_bytes()[:2000] for file in some):
            return path
    return None


def _split_folders(root: Path) -> dict[SplitName, Path]:
    found = {split_of(place.name): place for place in sorted(root.iterdir()) if place.is_dir()}
    return {name: place for name, place in found.items() if name is not None}


def read_voc(root: Path) -> tuple[dict[SplitName, DetectionSet], list[str]]:
    """Read the splits of a VOC folder.

    The classes are those listed in ``classes.txt`` or ``labels.txt``, else all object names in the annotations, sorted.

    Returns:
        The sets by split, and notes for the user. Without ``ImageSets`` and split folders, all images are ``train``.

    Raises:
        DataError: broken XML, an empty or repetitive list, or no named object in any annotation.
    """
    notes: list[str] = []
    files = _files_by_split(root, notes)
    trees = {name: [_parse(file) for file in each if file.is_file()] for name, each in files.items()}
    classes = _class_file(root) or _class_names(root, [tree for each in trees.values() for tree in each])
    ids = image_ids(files.values())
    labels = {text: label for label, text in enumerate(classes)}
    find_image = _ImageFinder(root)
    sets: dict[SplitName, DetectionSet] = {}
    for name, each in files.items():
        there = [file for file in each if file.is_file()]
        if not there and name == "test":
            notes.append(f"none of the {len(each)} test images has an annotation: there is no test split")
            continue
        defects = [
            Defect("missing file", relative(file, root), file.stem, "listed in ImageSets, but the file does not exist", "image")
            for file in each
            if not file.is_file()
        ]
        paths = [find_image(file, tree) for file, tree in zip(there, trees[name], strict=True)]
        images = [
            _raw_image(ids[file], path, relative(file, root), tree, labels, defects)
            for path, file, tree in zip(paths, there, trees[name], strict=True)
        ]
        sets[name] = assemble(name, "voc", root, classes, images, defects)
    return sets, notes


def _files_by_split(root: Path, notes: list[str]) -> dict[SplitName, list[Path]]:
    """Annotation files of each split, sorted by name."""
    annotations, lists = root / "Annotations", root / "ImageSets" / "Main"
    if annotations.is_dir() and lists.is_dir():
        by_split: dict[SplitName, list[Path]] = {}
        for name in SPLITS:
            if (lists / f"{name}.txt").is_file():
                by_split[name] = _listed_files(lists / f"{name}.txt", annotations)
        if "train" not in by_split and (lists / "trainval.txt").is_file():
            by_split["train"] = _listed_files(lists / "trainval.txt", annotations)
            notes.append("ImageSets has no train.txt: trainval.txt is used as train")
        if by_split:
            return by_split
    if annotations.is_dir():
        notes.append("there are no lists in ImageSets/Main: all images are one split")
        return {"train": sorted(annotations.glob("*.xml"))}
    folders = {name: sorted(place.glob("*.xml")) for name, place in _split_folders(root).items()}
    if any(folders.values()):
        return {name: files for name, files in folders.items() if files}
    return {"train": sorted(root.glob("*.xml"))}


def _listed_files(file: Path, annotations: Path) -> list[Path]:
    # In the lists of single classes, each line ends in 1, 0 or -1.
    names = [line.split()[0] for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    if not names:
        raise DataError(f"{file}: the list is empty; delete it or fill it with image names")
    return [annotations / f"{name}.xml" for name in sorted(dict.fromkeys(names))]


def _class_file(root: Path) -> tuple[str, ...] | None:
    for name in CLASS_FILES:
        if (root / name).is_file():
            lines = [line.strip() for line in (root / name).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
            if len(set(lines)) < len(lines) or not lines:
                raise DataError(f"{root / name}: needs one class name on each line, each once; it has {listed(lines) or 'none'}")
            return tuple(lines)
    return None


def _class_names(root: Path, trees: list[ElementTree.Element]) -> tuple[str, ...]:
    names = {name for tree in trees for item in tree.findall("object") if (name := _text(item, "name"))}
    if not names:
        raise DataError(f"{root}: no object with a name in {len(trees)} annotation files; there is nothing to learn")
    return tuple(sorted(names))


def _parse(file: Path) -> ElementTree.Element:
    try:
        return ElementTree.fromstring(file.read_bytes())
    except ElementTree.ParseError as error:
        line, column = error.position
        problem = str(error).split(":")[0]
        raise DataError(
            f"{file}: not valid XML at line {line}, column {column + 1}: {problem}; fix the file or remove it and its image"
        ) from error


def _text(element: ElementTree.Element, path: str) -> str:
    return (element.findtext(path) or "").strip()


class _ImageFinder:
    """Finds the image of an annotation: the image with the same name as the XML file, else the one named in ``filename``.

    The file's name goes first, because renaming the files leaves the old name in ``filename``.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folders: dict[Path, dict[str, Path]] = {}

    def __call__(self, file: Path, tree: ElementTree.Element) -> Path:
        name = _text(tree, "filename").replace("\\", "/").rsplit("/", 1)[-1]
        places = [self.root / "JPEGImages", self.root / "images", file.parent]
        for place in places:
            images = self._images(place)
            own = images.get(name) if Path(name).stem == file.stem else None  # a.jpg and a.png may lie side by side
            path = own or images.get(file.stem) or images.get(name)
            if path is not None:
                return path
        first = next((place for place in places if place.is_dir()), file.parent)
        return first / (name or f"{file.stem}.jpg")

    def _images(self, place: Path) -> dict[str, Path]:
        """Images of a folder by name and by name without suffix; each folder is listed only once."""
        if place not in self.folders:
            paths = [path for path in sorted(place.iterdir()) if path.suffix.lower() in IMAGE_SUFFIXES] if place.is_dir() else []
            self.folders[place] = {path.stem: path for path in paths} | {path.name: path for path in paths}
        return self.folders[place]


def _raw_image(
    number: int, path: Path, where: str, tree: ElementTree.Element, labels: dict[str, int], defects: list[Defect]
) -> RawImage:
    size_hw = None
    if tree.find("size") is not None:
        height, width = (_number(tree, f"size/{side}") for side in ("height", "width"))
        size_hw = (int(height), int(width)) if math.isfinite(height) and math.isfinite(width) else (0, 0)
    boxes = []
    for position, item in enumerate(tree.findall("object"), start=1):
        name, record = _text(item, "name"), f"object {position}"
        if not name:
            defects.append(Defect("missing category", where, record, "the object has no name", "box"))
            continue
        if name not in labels:
            message = f"{name!r} is not among the classes {listed(labels)}"
            defects.append(Defect("unknown class", where, record, message, "box"))
            continue
        corners = [item.find(f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax")]
        if any(corner is None for corner in corners):
            message = "bndbox needs xmin, ymin, xmax and ymax"
            defects.append(Defect("malformed record", where, record, message, "box"))
            continue
        x1, y1, x2, y2 = (_number(item, f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax"))
        if x2 > x1 and y2 > y1:
            # By VOC's definition xmin == xmax is one pixel wide, but in real files it is an accidental click: left empty.
            x1, y1 = x1 - 1, y1 - 1
        boxes.append(RawBox((x1, y1, x2, y2), labels[name], record))
    return RawImage(number, path, boxes, where, size_hw)


def _number(element: ElementTree.Element, path: str) -> float:
    try:
        return float(_text(element, path))
    except ValueError:
        return math.nan
