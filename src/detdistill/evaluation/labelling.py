"""Label images by a model: a COCO data set with scores, and a page to look through the labels."""

from __future__ import annotations

import base64
import io
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from detdistill.errors import DataError, RunError, counted
from detdistill.evaluation.drawing import class_colour
from detdistill.evaluation.image_files import as_pixels, find_images, relative_name
from detdistill.evaluation.predict import Found, NamedDetections
from detdistill.files import json_by_entry, write_atomically
from detdistill.progress import Bar
from detdistill.structures import Detections

THUMBNAIL_PX = 320
Detect = Callable[[Sequence[Path]], Iterable[Found]]


@dataclass(frozen=True, repr=False)
class Labelled:
    """Result of ``label``."""

    folder: Path
    """The data set: ``annotations/instances_train.json``, ``images/`` and ``review.html``."""
    images: int
    """Number of images, those without boxes included."""
    boxes: dict[str, int]
    """Number of boxes of each class."""
    unreadable: tuple[str, ...] = ()
    """A line for each image that could not be read: path and reason."""

    def __repr__(self) -> str:
        """Numbers of images and boxes, and the folder."""
        broken = f", {counted(len(self.unreadable), 'image')} unreadable" if self.unreadable else ""
        boxes = counted(sum(self.boxes.values()), "box")
        return f"Labelled({boxes} on {counted(self.images, 'image')}{broken}; {self.folder})"


def each_image(detect: Callable[[Image.Image], Detections], classes: Sequence[str], paths: Sequence[Path]) -> Iterator[Found]:
    """Run a function from image to detections on files; a file that cannot be decoded gets an error."""
    for index, path in enumerate(paths):
        try:
            pixels = as_pixels(path)
        except DataError as error:
            yield Found(index, None, None, error)
            continue
        found = detect(Image.fromarray(pixels.permute(1, 2, 0).numpy()))
        yield Found(index, pixels, NamedDetections(found.boxes_xyxy, found.scores, found.labels, None, tuple(classes)))


def label_folder(
    detect: Detect, teacher: str, classes: Sequence[str], images: Path, out: Path, *, score: float, review: int, bar: Bar
) -> Labelled:
    """Write a COCO data set with the boxes that a model finds.

    Args:
        detect: gives the detections of image files, with the names of ``classes``, in any order.
        teacher: name of the model, for the document.
        classes: the classes to keep, in the order of the categories.
        images: an image or a folder of images with its sub-folders.
        out: the folder to write; it must not exist or be empty. Images are linked into it, or copied if they cannot be.
        score: boxes with a lower score are left out.
        review: number of images on the page ``review.html``, those with the least certain boxes first.
        bar: progress bar.

    Raises:
        DataError: ``images`` holds no image, or none of them can be decoded.
        RunError: no box is found, or ``out`` is not empty or cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out} exists; give another --out")
    paths = find_images(images).paths
    bar.resize(len(paths))
    kept: dict[int, NamedDetections] = {}
    sizes: dict[int, tuple[int, int]] = {}
    pictures = _Pictures(review)
    broken: dict[int, DataError] = {}
    for found in detect(paths):
        if found.detections is None or found.image is None:
            broken[found.index] = found.error or DataError(f"{paths[found.index]}: cannot be read")
        else:
            chosen = _of_classes(found.detections.above(score), classes)
            kept[found.index], sizes[found.index] = chosen, (found.image.shape[-2], found.image.shape[-1])
            pictures.add(relative_name(paths[found.index], images).as_posix(), found.image, chosen)
        bar.update(len(kept) + len(broken), paths[found.index].name)
    if not kept:
        raise DataError(f"{images}: none of its {len(paths)} images can be read; the first: {next(iter(broken.values()))}")
    counts = Counter(name for one in kept.values() for name in one.names)
    if not counts:
        raise RunError(
            f"{teacher}: no box of {some(classes)} with a score of {score:g} or more; lower --score, or use other words"
        )
    names = {index: relative_name(paths[index], images).as_posix() for index in sorted(kept)}
    try:
        for index, name in names.items():
            _link(paths[index], out / "images" / name)
        text = json_by_entry(_document(teacher, classes, names, sizes, kept, score))
        (out / "annotations").mkdir()
        write_atomically(out / "annotations/instances_train.json", lambda path: path.write_text(text, encoding="utf-8"))
        page = pictures.page(teacher, classes, score, len(kept))
        write_atomically(out / "review.html", lambda path: path.write_text(page, encoding="utf-8"))
    except OSError as error:
        raise RunError(f"cannot write to {out}: {error.strerror or error}; make space or give another --out") from error
    lines = tuple(str(broken[index]) for index in sorted(broken))
    return Labelled(out, len(kept), {name: counts[name] for name in classes}, lines)


def some(names: Sequence[str]) -> str:
    """The first six names, and how many more there are."""
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _of_classes(found: NamedDetections, classes: Sequence[str]) -> NamedDetections:
    """The detections of some classes, with labels in their order."""
    place = {name: label for label, name in enumerate(classes)}
    rows = [index for index, name in enumerate(found.names) if name in place]
    labels = found.labels.new_tensor([place[found.names[index]] for index in rows])
    return NamedDetections(found.boxes_xyxy[rows], found.scores[rows], labels, None, tuple(classes))


def _link(source: Path, target: Path) -> None:
    """Link an image, or copy it where the file system cannot link it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def _document(
    teacher: str,
    classes: Sequence[str],
    names: dict[int, str],
    sizes: dict[int, tuple[int, int]],
    kept: dict[int, NamedDetections],
    score: float,
) -> dict[str, Any]:
    """The COCO document; each annotation has a ``score``."""
    annotations: list[dict[str, Any]] = []
    for index in names:
        found = kept[index]
        for label, value, (x1, y1, x2, y2) in zip(
            found.labels.tolist(), found.scores.tolist(), found.boxes_xyxy.tolist(), strict=True
        ):
            box = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1), "iscrowd": 0, "score": round(value, 6)}
            annotations.append({"id": len(annotations) + 1, "image_id": index + 1, "category_id": label + 1, **box})
    return {
        "info": {"description": f"boxes of {teacher} with a score of at least {score:g}"},
        "images": [
            {"id": index + 1, "file_name": name, "height": sizes[index][0], "width": sizes[index][1]}
            for index, name in names.items()
        ],
        "categories": [{"id": label + 1, "name": name} for label, name in enumerate(classes)],
        "annotations": annotations,
    }


class _Pictures:
    """The images of the page: those whose least certain box has the lowest score, and a few without boxes."""

    def __init__(self, count: int) -> None:
        self.count, self.empty = count, 0
        self.chosen: list[tuple[float, str, Image.Image, NamedDetections, float]] = []

    def add(self, name: str, image: Tensor, found: NamedDetections) -> None:
        """Take an image, if it belongs to those shown so far."""
        if len(found) == 0:
            self.empty += 1
            if self.empty > max(1, self.count // 10):
                return
        lowest = float(found.scores.min()) if len(found) else 1.0
        if self.count == 0 or (len(self.chosen) >= self.count and lowest >= self.chosen[-1][0]):
            return
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        scale = min(1.0, THUMBNAIL_PX / max(picture.size))
        small = picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))))
        self.chosen.append((lowest, name, small, found, small.width / picture.width))
        self.chosen.sort(key=lambda one: (one[0], one[1]))
        del self.chosen[self.count :]

    def page(self, teacher: str, classes: Sequence[str], score: float, images: int) -> str:
        """The page as HTML text."""
        import jinja2

        environment = jinja2.Environment(
            loader=jinja2.PackageLoader("detdistill.evaluation", "."),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        colours = [f"rgb{class_colour(label)[0]}" for label in range(len(classes))]
        return environment.get_template("review.html.jinja").render(
            teacher=teacher,
            classes=classes,
            colours=colours,
            score=score,
            images=images,
            pictures=[_tile(one) for one in self.chosen],
        )


def _tile(one: tuple[float, str, Image.Image, NamedDetections, float]) -> dict[str, Any]:
    """What the page shows of an image."""
    _, name, small, found, scale = one
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    rows = zip(found.labels.tolist(), found.scores.tolist(), (found.boxes_xyxy * scale).tolist(), strict=True)
    return {
        "name": name,
        "width": small.width,
        "height": small.height,
        "source": base64.b64encode(buffer.getvalue()).decode(),
        "boxes": [(label, value, box[0], box[1], box[2] - box[0], box[3] - box[1]) for label, value, box in rows],
    }
