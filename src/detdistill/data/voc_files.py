"""Find and decode the files of Pascal VOC data: annotations, lists of splits, class files and images."""

from __future__ import annotations

import codecs
import contextlib
import os
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from detdistill.data.paths import folders_below, plain_name
from detdistill.data.records import IMAGE_SUFFIXES, SPLIT_WORDS, Defect, SplitName, listed, relative, split_of
from detdistill.errors import DataError, subject

LIST_FOLDERS = ("ImageSets/Main", "ImageSets")
ANNOTATIONS = ("annotations", "annotation")
SUPERSETS = {"gb2312": "gb18030", "gbk": "gb18030", "shift_jis": "cp932", "euc_kr": "cp949", "iso8859-1": "cp1252"}
"""Codecs that programs name, and the larger ones in which they write."""
DEPTH = 3
"""Folders are searched this many levels below the data's folder."""


# --------------------------------------------------------------------------------------------------------------- texts


def parse_xml(file: Path) -> ElementTree.Element | str:
    """Parse an XML file in the encoding that it declares; if it cannot be parsed, return the reason."""
    try:
        data = file.read_bytes()
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    try:
        return ElementTree.fromstring(data)
    except ElementTree.ParseError as error:
        if (codec := declared_codec(data)) is None or "unknown encoding" not in str(error):
            return _place(error)
    except (ValueError, LookupError):  # encodings that the parser does not know, such as GB2312
        codec = declared_codec(data) or "utf-8"
    try:
        text = data.decode(_codec(codec))
        return ElementTree.fromstring(re.sub(r"^\s*<\?xml.*?\?>", "", text, count=1, flags=re.DOTALL))
    except LookupError:
        return f"it declares the encoding {codec!r:.60}, which does not exist; save it as UTF-8"
    except UnicodeDecodeError as error:
        return f"it declares the encoding {codec!r:.60}, but byte {error.start} does not belong to it; save it as UTF-8"
    except ElementTree.ParseError as error:
        return _place(error)
    except ValueError as error:
        return f"not valid XML: {error}"


def _place(error: ElementTree.ParseError) -> str:
    line, column = error.position
    return f"not valid XML at line {line}, column {column + 1}: {str(error).split(':')[0]}"


def declared_codec(data: bytes) -> str | None:
    """The encoding that an XML file declares in its first line, or None."""
    found = re.match(rb"(?:\xef\xbb\xbf)?\s*<\?xml[^>]*?encoding\s*=\s*[\"']([^\"']*)[\"']", data[:300])
    return found[1].decode("ascii", "replace") if found else None


def _codec(name: str) -> str:
    known = codecs.lookup(name).name
    return SUPERSETS.get(known, known)


def read_lines(file: Path, annotations: Sequence[Path], fits: Callable[[str], object]) -> list[str]:
    """Lines of a text file without blanks around them.

    Args:
        file: a list of images or classes, in UTF-8, in the encoding of its byte order mark, or in that of the annotations.
        annotations: annotation files, which may declare an encoding.
        fits: tells if a line is known in the data set; it decides between encodings in which the text can be read.

    Raises:
        DataError: the file cannot be read or decoded.
    """
    try:
        data = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror or error}") from error
    marks = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
    marked = next((codec for mark, codec in marks if data.startswith(mark)), None)
    declared = () if marked or data.isascii() else dict.fromkeys(filter(None, map(_declared_in, annotations[:20])))
    texts = []
    for codec in (marked or "utf-8", *declared):
        with contextlib.suppress(UnicodeDecodeError, LookupError):
            texts.append([line.strip() for line in data.decode(_codec(codec)).splitlines()])
    if not texts:
        raise DataError(f"{file}: not {(marked or 'utf-8').upper()} text at byte {_first_bad_byte(data)}; save the file as UTF-8")
    lines = texts[0] if len(texts) == 1 else max(texts, key=lambda each: sum(bool(fits(line)) for line in each))
    if any("\0" in line for line in lines):
        raise DataError(f"{file}: not a text file (it has zero bytes); save it as UTF-8")
    return lines


def _first_bad_byte(data: bytes) -> int:
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return error.start
    return len(data)


def _declared_in(file: Path) -> str | None:
    try:
        with file.open("rb") as stream:
            return declared_codec(stream.read(300))
    except OSError:
        return None


# --------------------------------------------------------------------------------------------------------- annotations


def is_annotation(file: Path) -> bool:
    """Tell by its beginning if a file is a VOC annotation; CVAT's ``<annotations>`` is none."""
    try:
        with file.open("rb") as stream:
            head = stream.read(2000)
    except OSError:
        return False
    return re.search(rb"<annotation[\s>/]", head.replace(b"\0", b"")) is not None


def annotation_folder(root: Path) -> Path | None:
    """The folder of the annotations: ``Annotations``, ``root`` (files in it or in folders named after splits), or another one.

    Raises:
        DataError: several other folders have annotations.
    """
    if not root.is_dir():
        return None
    if (root / "Annotations").is_dir() and _has_annotations(root / "Annotations"):
        return root / "Annotations"
    children = sorted(place for place in root.iterdir() if place.is_dir() and not place.name.startswith((".", "__")))
    if any(map(is_annotation, _some_xml(root))):
        return root
    full = [place for place in children if _has_annotations(place)]
    if any(split_of(place.name) for place in full):
        return root
    called = [place for place in full if place.name.lower() in ANNOTATIONS]
    full = called if len(called) == 1 else full
    if len(full) > 1:
        raise DataError(
            f"{root}: {len(full)} folders have VOC annotations: {listed(place.name for place in full)}; "
            "call the right one Annotations, or pass the folder of one set"
        )
    return full[0] if full else None


def _some_xml(place: Path) -> list[Path]:
    return sorted(place.glob("*.xml"))[:10]


def _has_annotations(place: Path) -> bool:
    """True if a folder is one of annotations: itself, its folders of splits, or, by its name, whatever folders it has."""
    named = place.name.lower() in ANNOTATIONS or split_of(place.name)
    folders = folders_below(place, 2) if named else [below for below in folders_below(place, 1) if split_of(below.name)]
    return any(is_annotation(file) for folder in (place, *folders) for file in _some_xml(folder))


def _xml_below(place: Path) -> list[Path]:
    folders = (place, *folders_below(place, DEPTH))
    return sorted((file for folder in folders for file in folder.glob("*.xml")), key=str)


@dataclass
class Files:
    """The annotation files of a data set."""

    folder: Path
    """The folder of the annotations, see ``annotation_folder``."""
    by_split: dict[SplitName, list[Path]] = field(default_factory=dict)
    """Annotation files, sorted by name; those that are listed but missing too."""
    defects: dict[SplitName, list[Defect]] = field(default_factory=dict)
    """Lines of the lists without an annotation of their own."""
    lists: bool = False
    """True if lists say which annotations belong to a split."""

    @property
    def every(self) -> list[Path]:
        """The files of all splits."""
        return [file for files in self.by_split.values() for file in files]


def find_files(root: Path, folder: Path, notes: list[str]) -> Files:
    """The annotation files of each split: by the lists, else by folders named after splits, else all as train."""
    if folder == root:
        places = sorted(place for place in root.iterdir() if place.is_dir() and split_of(place.name))
        every = {place: _xml_below(place) for place in places}
        loose = sorted(root.glob("*.xml"))
    else:
        loose, every = [], {}
        split_folders: dict[Path, Path | None] = {}
        for file in _xml_below(folder):
            if file.parent not in split_folders:
                split_folders[file.parent] = _split_folder(file.parent, folder)
            place = split_folders[file.parent]
            if place is None:
                loose.append(file)
            else:
                every.setdefault(place, []).append(file)
    both = sorted([*loose, *(file for files in every.values() for file in files)], key=str)
    for name in LIST_FOLDERS:
        if both and (root / name).is_dir():
            found = _listed(root, root / name, folder, both, notes)
            if found.by_split:
                return found
    by_split: dict[SplitName, list[Path]] = {}
    for place, files in every.items():
        if files and (split := split_of(place.name)) is not None:
            by_split.setdefault(split, []).extend(files)
    if not by_split:
        if folder != root:
            notes.append("there are no lists in ImageSets/Main: all images are one split")
        return Files(folder, {"train": loose})
    if loose:
        lost = subject(len(loose), "annotation", "lie")
        notes.append(f"{lost} outside the folders of the splits: not used, e.g. {loose[0].name}")
    return Files(folder, by_split)


def _split_folder(place: Path, folder: Path) -> Path | None:
    """The folder directly below ``folder`` that holds ``place``, if it is named after a split."""
    if place == folder:
        return None
    top = folder / place.relative_to(folder).parts[0]
    return top if split_of(top.name) else None


def _listed(root: Path, lists: Path, folder: Path, files: list[Path], notes: list[str]) -> Files:
    found = Files(folder, lists=True)
    by_word: dict[SplitName, list[Path]] = {"train": [], "val": [], "test": []}
    unused = []
    texts = sorted(file for file in lists.glob("*.txt") if file.is_file())
    for file in texts:
        word = file.stem.lower().rstrip("0123456789_- ")
        if word in SPLIT_WORDS and word != "trainval":
            by_word[SPLIT_WORDS[word]].append(file)
        elif word == "trainval" or not _of_one_class(file, texts):
            unused.append(file)
    for split, several in by_word.items():
        several.sort(key=lambda file: (file.stem != split, file.name))
        unused += several[1:]
        if not several and split == "train":
            several = [file for file in unused if file.stem.lower().startswith("trainval")][:1]
            unused = [file for file in unused if file not in several]
            notes += [
                f"{lists.name if lists.name != 'Main' else 'ImageSets'} has no train.txt: {file.name} is used as train"
                for file in several
            ]
        if several:
            found.by_split[split], found.defects[split] = _match_lines(root, several[0], folder, files)
    both = bool(by_word["train"] and by_word["val"])
    unused = [file for file in unused if file.name != "classes.txt" and not (both and file.stem.lower() == "trainval")]
    if unused:
        notes.append(f"lists of {relative(lists, root)} that are not used: {listed(file.name for file in unused)}")
    return found


def _of_one_class(file: Path, lists: Iterable[Path]) -> bool:
    """True for VOC's lists of single classes, e.g. ``dog_train.txt`` beside ``train.txt``."""
    return any(file.stem.endswith(f"_{other.stem}") for other in lists)


def _match_lines(root: Path, file: Path, folder: Path, files: list[Path]) -> tuple[list[Path], list[Defect]]:
    """Annotations of a list's lines, and the defects of lines that are repeated or without an annotation."""
    index = {relative(one, folder)[: -len(one.suffix)]: one for one in files}
    stems = Counter(name.rsplit("/", 1)[-1] for name in index)
    index = {stem: one for name, one in index.items() if stems[stem := name.rsplit("/", 1)[-1]] == 1} | index

    def find(line: str) -> Path | None:
        return index.get(line) or next((index[name] for name in _readings(line) if name in index), None)

    lines = [(number, line) for number, line in enumerate(read_lines(file, files, find), start=1) if line]
    if not lines:
        raise DataError(f"{file}: the list is empty; delete it or fill it with image names")
    found: dict[Path, int] = {}
    defects = []
    for number, line in lines:
        match = find(line)
        place = f"line {number} of {relative(file, root)}"
        if match is None:
            *_, name = _readings(line)
            match = folder / f"{name}.xml"
            message = f"listed in {place}, but the file does not exist"
            defects.append(Defect("missing file", relative(match, root), name, message, "image"))
        elif match in found:
            message = f"listed in line {found[match]} and again; used once"
            defects.append(Defect("duplicate image", relative(file, root), f"line {number}", message, "image"))
        found.setdefault(match, number)
    return sorted(found), defects


def _readings(line: str) -> Iterator[str]:
    """What a line may name, most literal first: the whole line; without a flag (1, 0, -1); without folders and suffix."""
    texts = [line]
    # In the lists of single classes, each line ends in a flag; other tools write the image and its annotation.
    if flagged := re.fullmatch(r"(.*\S)\s+(?:[+-]?1|0)", line):
        texts.append(flagged[1])
    if pair := re.fullmatch(r"(\S+)\s+\S+\.xml", line):
        texts.append(pair[1])
    for text in texts:
        parts = [part for part in text.replace("\\", "/").split("/") if part not in ("", ".")] or [text]
        for first in range(len(parts)):
            rest = "/".join(parts[first:])
            yield rest
            bare, suffix = os.path.splitext(rest)
            if suffix.lower() in IMAGE_SUFFIXES or suffix.lower() == ".xml":
                yield bare


# -------------------------------------------------------------------------------------------------------------- images


class ImageFinder:
    """Finds the image of an annotation: the image with the same name as the XML file, else the one named in ``filename``.

    The file's name goes first, because renaming the files leaves the old name in ``filename``. Images are looked for in
    ``JPEGImages``, in ``images`` and beside the annotation; then in all other folders, where only one may have the name.
    """

    def __init__(self, root: Path, files: Files) -> None:
        self.root, self.files = root, files
        self.bases = [root / "JPEGImages", root / "images"]
        self.stems = Counter(file.stem for file in files.every)
        self.used: set[Path] = set()
        self._images: dict[Path, dict[str, Path | None]] = {}
        self._others: list[Path] | None = None
        self._own: dict[Path, tuple[Path, list[Path]]] = {}

    def __call__(self, file: Path, tree: ElementTree.Element) -> Path:
        """The image of an annotation; if it is missing, the path where it was first looked for."""
        name = (tree.findtext("filename") or "").strip().replace("\\", "/").rsplit("/", 1)[-1]
        below, own = self._places(file.parent)
        stem = file.stem
        alone = self.stems[stem] == 1  # else the files of the subfolders share names
        path = self._first([*own[:-1], *(self.bases if alone else ()), own[-1]], stem, name)
        if path is None:
            path = self._only(below, stem, name, same_folder=not alone)
        if path is not None:
            self.used.add(path)
            return path
        first = next((place for place in own if place.is_dir()), own[0])
        missing = first / (name if name and self.stems[os.path.splitext(name)[0]] == 0 else stem + os.path.splitext(name)[1])
        return first / f"{stem} (not the only one)" if os.path.exists(missing) else missing

    def _places(self, parent: Path) -> tuple[Path, list[Path]]:
        """The annotation's folder below that of all annotations, and the folders that belong to it, itself the last."""
        if parent not in self._own:
            below = parent.relative_to(self.files.folder) if parent.is_relative_to(self.files.folder) else Path()
            self._own[parent] = below, [*(base / below for base in self.bases), parent]
        return self._own[parent]

    def unused(self) -> list[Path]:
        """Images in the folders of the images that were found, of which no annotation was."""
        places = {path.parent for path in self.used}
        return sorted(path for place in places for path in _image_files(place) if path not in self.used)

    def _first(self, places: Iterable[Path], stem: str, name: str) -> Path | None:
        return next((path for place in places if (path := self._in(place, stem, name)) is not None), None)

    def _only(self, below: Path, stem: str, name: str, same_folder: bool = False) -> Path | None:
        """The one image in all other folders, or the one in a folder that is called like that of the annotation."""
        if self._others is None:
            self._others = [self.root, *folders_below(self.root, DEPTH)]
        same = {path for place in self._others if below.parts and place.parts[-len(below.parts) :] == below.parts
                if (path := self._in(place, stem, name)) is not None}  # fmt: skip
        if len(same) == 1:
            return same.pop()
        found = set() if same_folder else {path for place in self._others if (path := self._in(place, stem, name)) is not None}
        return found.pop() if len(found) == 1 else None

    def _in(self, place: Path, stem: str, name: str) -> Path | None:
        if place not in self._images:
            paths = _image_files(place)
            stems = Counter(plain_name(path.stem) for path in paths)
            images: dict[str, Path | None] = {plain_name(path.stem): path for path in paths if stems[plain_name(path.stem)] == 1}
            self._images[place] = images | {plain_name(path.name): path for path in paths}
        images = self._images[place]
        stem, name = plain_name(stem), plain_name(name)
        named = images.get(name)
        if named is not None and os.path.splitext(name)[0] == stem:  # a.jpg and a.png may lie side by side
            return named
        # A file that another annotation is called after belongs to that one.
        return images.get(stem) or (named if self.stems[os.path.splitext(name)[0]] == 0 else None)


def _image_files(place: Path) -> list[Path]:
    try:
        with os.scandir(place) as entries:
            names = [entry.name for entry in entries if os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES]
    except OSError:
        return []
    return [place / name for name in sorted(names)]
