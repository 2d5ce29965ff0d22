"""Labels from a model, for images that have none."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from detdistill.api.models import check_looking, ready
from detdistill.api.shared import device_of, local_only
from detdistill.errors import RunError, nearest

if TYPE_CHECKING:
    from detdistill.api.shared import Model
    from detdistill.evaluation.labelling import Detect, Labelled
    from detdistill.progress import Progress


def label(
    teacher: Model,
    images: str | Path,
    out: str | Path,
    *,
    classes: Sequence[str] = (),
    score: float = 0.3,
    size: int | None = None,
    nms: float = 0.7,
    review: int = 200,
    device: str = "auto",
    progress: Progress | None = None,
) -> Labelled:
    """Label images by a model, and write a COCO data set whose boxes have scores.

    Training on such a data set weighs each box by its score. ``review.html`` shows the least certain labels.

    Args:
        teacher: a detector as for ``evaluate``; or ``hf:`` with a folder or hub name of a detector that is told by text what to
            find (Grounding DINO, MM-Grounding-DINO, OWL-ViT, OWLv2).
        images: an image, or a folder of images with its sub-folders.
        out: the folder to write; it must not exist or be empty.
        classes: what to find, in words; empty: all classes of the detector. A detector with classes of its own must know them.
        score: boxes with a lower score are left out; 0..1.
        size: as in ``predict``, for a detector with classes of its own.
        nms: largest IoU of two boxes of a class, for detectors that are told by text what to find; 0..1.
        review: number of images on the page ``review.html``.
        device: auto, cpu or cuda.
        progress: display of the progress; None: a new one on stderr.

    Returns:
        The folder, the number of boxes of each class, and a line for each image that could not be read.

    Raises:
        DetdistillError: no image can be read, no box is found, or another error of the input; one line that says what is wrong
            and what to do.
    """
    from detdistill.evaluation.labelling import label_folder, some
    from detdistill.progress import Progress

    check_looking(score, None)
    if not 0 <= nms <= 1:
        raise RunError(f"nms: {nms:g} must be a number from 0 to 1")
    if review < 0:
        raise RunError(f"review: {review} must be 0 or more")
    local_only(out)
    if len(set(classes)) < len(classes):
        raise RunError(f"classes: {', '.join(classes)}: a class is named twice")
    with progress or Progress() as shown:
        detect, known, name = _labeller(teacher, classes, size, nms, device, shown)
        bar = shown.bar("label", 1)
        found = label_folder(detect, name, known, Path(images), Path(out), score=score, review=review, bar=bar)
        for line in found.unreadable:
            shown.say(line, "red")
        missing = [one for one, count in found.boxes.items() if count == 0]
        if missing:
            shown.say(f"no box of {some(missing)} with a score of {score:g} or more; other words may find it", "yellow")
        return found


def _labeller(
    teacher: Model, classes: Sequence[str], size: int | None, nms: float, device: str, shown: Progress
) -> tuple[Detect, tuple[str, ...], str]:
    """What gives the detections of image files, the classes, and the name of the model."""
    from detdistill.evaluation.labelling import some
    from detdistill.given import name_or_detector

    given = name_or_detector(teacher, "teacher")
    if isinstance(given, str) and given.startswith("hf:"):
        from detdistill.detectors.open_vocabulary import is_open_vocabulary, load_open_vocabulary
        from detdistill.evaluation.labelling import each_image

        source = given.removeprefix("hf:")
        if is_open_vocabulary(source):
            if not classes:
                raise RunError(f"classes: {given} is told by text what to find; give --classes, e.g. helmet,person")
            model, names = load_open_vocabulary(source).to(device_of(device)), tuple(classes)
            return partial(each_image, lambda image: model.detect(image, names, nms=nms), names), names, given
    from detdistill.evaluation.predict import default_batch, predict_images

    detector, settings = ready(teacher, size, device, shown)
    for one in classes:
        if one not in detector.spec.classes:
            raise RunError(
                f"classes: {detector.spec.name} does not know {one!r}{nearest(one, detector.spec.classes)}; "
                f"its classes: {some(detector.spec.classes)}"
            )
    pool = ThreadPoolExecutor(2)
    detect = partial(predict_images, detector.eval(), settings=settings, batch=default_batch(detector), pool=pool)
    return detect, tuple(classes) or detector.spec.classes, detector.spec.name
