"""Resizing and augmentation: from a decoded image and its record to a detector's input, with a ``View`` that maps back.

The order is fixed: resize (size policy and scale jitter in one step), crop, flip, colours. Boxes and masks are transformed
with the numbers of the ``View``, so ``View.to_original`` inverts them exactly.

Shape letters: G boxes of an image, h and w the valid size of the view, H and W a size with padding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
import torchvision.transforms.v2.functional as F
from torch import Tensor

from detdistill.data.records import Record
from detdistill.errors import DataError, RunError, nearest
from detdistill.structures import Target, View, map_tensors

Resize = Literal["letterbox", "stretch", "short_side"]

PADDING_MULTIPLE = 32
"""Batches are padded to a multiple of this (the largest usual stride), so that the cells of every level cover whole pixels."""
MIN_SIDE_PX = 1.0
"""Boxes with a smaller width or height after cropping are not used in training."""


@dataclass(frozen=True)
class ViewSettings:
    """Image size, resizing and augmentation.

    ``size``, ``resize``, ``max_size`` and ``masks`` apply to training and evaluation, the others only to training.
    """

    size: int = 640
    """Pixels: the long side (letterbox), both sides (stretch), or the short side (short_side)."""
    resize: Resize = "letterbox"
    """``letterbox`` keeps the aspect ratio and pads right and bottom to a square. ``stretch`` resizes to a square without
    keeping the ratio. ``short_side`` keeps the ratio and pads to the largest image of the batch."""
    max_size: int | None = None
    """With ``short_side``: largest long side in pixels; longer images are scaled down to it. None: no limit."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    colour: float = 0.0
    """Strength of colour jitter, 0..1: brightness, contrast and saturation change by factors of up to ``1 +- colour``, hue by up
    to ``0.1 * colour`` of the circle."""
    hue: Literal["yiq", "hsv"] = "yiq"
    """The circle: around the grey axis of YIQ (see ``turn_hue``), or torchvision's of HSV, which takes 40 times as long."""
    scale_jitter: tuple[float, float] | None = None
    """Smallest and largest zoom, drawn log-uniformly. A zoom above 1 crops at random, below 1 the image gets smaller."""
    scales: tuple[float, ...] = ()
    """Factors on the resized size; one is drawn for each image, and the whole image is kept. Unlike ``scale_jitter``, they
    give a finite number of views, which a cache can store. Empty: always 1."""
    mosaic: float = 0.0
    """Probability of a mosaic of four images instead of a single image."""
    masks: bool = False
    """Add masks to the targets, if the data have masks."""
    teacher_size: int | None = None
    """In training: ``size`` of a second, larger image of each view, which the teacher sees. None: it sees the same image."""

    def validate(self) -> None:
        """Check all values.

        Raises:
            RunError: a value is out of its range, or two settings exclude each other.
        """
        policies = get_args(Resize)
        if self.resize not in policies:
            raise RunError(f"resize={self.resize!r} is not known{nearest(str(self.resize), policies)}; use {', '.join(policies)}")
        if not _whole(self.size) or self.size < PADDING_MULTIPLE:
            raise RunError(f"size={self.size} must be a whole number of pixels, at least {PADDING_MULTIPLE}")
        if self.max_size is not None and (not _whole(self.max_size) or self.max_size < self.size):
            raise RunError(f"max_size={self.max_size} must be a whole number of pixels, at least size={self.size}, or null")
        if self.max_size is not None and self.resize != "short_side":
            raise RunError(f"max_size={self.max_size} has no effect with resize={self.resize!r}; leave it out or use short_side")
        for name in ("flip", "colour", "mosaic"):
            value = getattr(self, name)
            if not 0 <= value <= 1:  # False for NaN too
                raise RunError(f"{name}={value} must lie between 0 and 1")
        if self.hue not in ("yiq", "hsv"):
            raise RunError(f"hue={self.hue!r} is not known; use yiq or hsv")
        if self.scale_jitter is not None:
            if len(self.scale_jitter) != 2 or not all(0 < value < math.inf for value in self.scale_jitter):
                raise RunError(f"scale_jitter={self.scale_jitter} must be two positive numbers: smallest and largest zoom")
            if self.scale_jitter[0] > self.scale_jitter[1]:
                raise RunError(f"scale_jitter={self.scale_jitter} must name the smaller zoom first")
        if not all(0 < scale < math.inf for scale in self.scales) or len(set(self.scales)) < len(self.scales):
            raise RunError(f"scales={self.scales} must be different positive numbers")
        if self.scales and (self.scale_jitter is not None or self.mosaic > 0):
            raise RunError("scales cannot be combined with scale_jitter or mosaic; use one of them")
        if self.teacher_size is not None and (not _whole(self.teacher_size) or self.teacher_size <= self.size):
            raise RunError(f"teacher_size={self.teacher_size} must be a whole number of pixels, more than size={self.size}")
        if self.teacher_size is not None and self.mosaic > 0:
            raise RunError("teacher_size cannot be combined with mosaic; leave one of them out")

    @property
    def of_teacher(self) -> ViewSettings:
        """The settings of the images that the teacher sees."""
        if self.teacher_size is None:
            return self
        longest = None if self.max_size is None else round(self.max_size * self.teacher_size / self.size)
        return replace(self, size=self.teacher_size, max_size=longest, teacher_size=None, masks=False)

    def resized_hw(self, height: int, width: int, zoom: float = 1.0) -> tuple[int, int]:
        """Height and width in pixels of an image after resizing (by ``zoom`` times the policy's scale) and before cropping."""
        if self.resize == "stretch":
            return max(1, round(self.size * zoom)), max(1, round(self.size * zoom))
        if self.resize == "letterbox":
            scale = self.size / max(height, width)
        else:
            scale = self.size / min(height, width)
            if self.max_size is not None:
                scale = min(scale, self.max_size / max(height, width))
        return max(1, round(height * scale * zoom)), max(1, round(width * scale * zoom))

    def padded_hw(self, sizes_hw: Sequence[tuple[int, int]]) -> tuple[int, int]:
        """Height and width of a batch's tensor: multiples of 32 that hold all views; a fixed square with ``letterbox``."""
        height, width = (max(size[side] for size in sizes_hw) for side in (0, 1))
        if self.resize == "letterbox":
            height, width = max(height, self.size), max(width, self.size)
        return _round_up(height), _round_up(width)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _round_up(pixels: int) -> int:
    return -(-pixels // PADDING_MULTIPLE) * PADDING_MULTIPLE


def resize_image(image: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """Resize a [3, h, w] uint8 image (bilinear, antialiased); an image that already has the size is returned unchanged."""
    if image.shape[-2:] == size_hw:
        return image
    resized: Tensor = F.resize(image, list(size_hw), antialias=True)
    return resized


def make_view(
    image: Tensor, record: Record, settings: ViewSettings, generator: torch.Generator, train: bool
) -> tuple[Tensor, Target, View]:
    """Make one view of an image, without padding.

    Args:
        image: [3, H, W] uint8 RGB of the record's file, or the same already resized to ``settings.resized_hw``.
        record: the record, with boxes in pixels of the file.
        settings: size, resizing and augmentation; ``mosaic`` is ignored here, see ``make_mosaic``.
        generator: source of all random choices; unused if ``train`` is False.
        train: True: augment, and drop boxes below one pixel. False: no augmentation, all boxes.

    Returns:
        [3, h, w] float32 in 0..1, the boxes in pixels of the view and clipped to it, and the view.
    """
    draw = _Draw.of(settings, generator) if train else _Draw()
    pixels, target, view = _seen(image, record, settings, draw)
    return pixels, _drop_small(target) if train else target, view


def make_views(
    image: Tensor, record: Record, settings: ViewSettings, generator: torch.Generator
) -> list[tuple[Tensor, Target, View]]:
    """Make a view for training, and with ``teacher_size`` the same view for the teacher, with the same boxes.

    Args:
        image: [3, H, W] uint8 RGB of the record's file.
        record: as in ``make_view``.
        settings: as in ``make_view``.
        generator: as in ``make_view``.

    Returns:
        Pixels, boxes and view, as ``make_view`` returns them, of one or of two sizes.
    """
    draw = _Draw.of(settings, generator)
    pixels, target, view = _seen(image, record, settings, draw)
    views = [(pixels, _drop_small(target), view)]
    if settings.teacher_size is not None:
        larger, its_target, its_view = _seen(image, record, settings.of_teacher, draw)
        views.append((larger, _select(its_target, _large_enough(target)), its_view))
    return views


def _seen(image: Tensor, record: Record, settings: ViewSettings, draw: _Draw) -> tuple[Tensor, Target, View]:
    """Pixels, all boxes and view for given random choices."""
    view, (zoomed_h, zoomed_w) = _view(record, settings, draw)
    (height, width), left, top = view.size_hw, round(-view.offset_xy[0]), round(-view.offset_xy[1])
    pixels = resize_image(image, (zoomed_h, zoomed_w))[:, top : top + height, left : left + width]
    return _finish(pixels, view, settings), _target(record, view, settings.masks), view


def plain_view(record: Record, settings: ViewSettings) -> View:
    """The view that ``make_view`` makes of a record under deterministic settings (see ``variants``), without its pixels."""
    draw = _Draw(flip=settings.flip == 1, scale=settings.scales[0] if settings.scales else 1.0)
    return _view(record, settings, draw)[0]


def _view(record: Record, settings: ViewSettings, draw: _Draw) -> tuple[View, tuple[int, int]]:
    """The view, and the size (height, width) to which the image is resized before cropping."""
    original_hw = record.size_hw
    canvas_h, canvas_w = settings.resized_hw(*original_hw, zoom=draw.scale)
    # The view is the part of the zoomed image that fits on the canvas.
    zoomed_h, zoomed_w = settings.resized_hw(*original_hw, zoom=draw.scale * draw.zoom)
    height, width = min(canvas_h, zoomed_h), min(canvas_w, zoomed_w)
    top, left = math.floor(draw.place[0] * (zoomed_h - height + 1)), math.floor(draw.place[1] * (zoomed_w - width + 1))
    view = View(
        original_hw=original_hw,
        size_hw=(height, width),
        scale_xy=(zoomed_w / original_hw[1], zoomed_h / original_hw[0]),
        offset_xy=(float(-left), float(-top)),
        flip=draw.flip,
        photometric=draw.photometric,
    )
    return view, (zoomed_h, zoomed_w)


def make_mosaic(
    images: Sequence[Tensor], records: Sequence[Record], settings: ViewSettings, generator: torch.Generator
) -> tuple[Tensor, Target, View]:
    """Make a mosaic: four images placed around a random centre, as in YOLOv4 (for training only).

    Each image touches the centre with a corner and is cropped to its quadrant. All four have the same zoom, colour factors
    and flip. The canvas has the size of the first image's plain view.

    Args:
        images: four images, [3, H, W] uint8 each, as in ``make_view``.
        records: the records of the four images.
        settings: size, resizing and augmentation.
        generator: source of all random choices.

    Returns:
        [3, h, w] float32 in 0..1, the visible parts of the boxes of all four images, and a view that cannot be mapped back to
        an original (its offset is the centre, its scale the zoom).
    """
    draw = _Draw.of(settings, generator)
    height, width = settings.resized_hw(*records[0].size_hw)
    # The centre keeps a distance from the border, so that every quadrant has at least a quarter of each side.
    centre_y, centre_x = (round((0.25 + 0.5 * place) * side) for place, side in zip(draw.place, (height, width), strict=True))
    canvas = torch.zeros(3, height, width, dtype=torch.uint8)
    targets = []
    for index, (image, record) in enumerate(zip(images, records, strict=True)):
        low, left_side = index < 2, index % 2 == 0
        size_h, size_w = settings.resized_hw(*record.size_hw, zoom=draw.zoom)
        # Position of the whole image, and the part of it inside its quadrant.
        y, x = (centre_y - size_h if low else centre_y), (centre_x - size_w if left_side else centre_x)
        y1, y2 = (max(0, y), centre_y) if low else (centre_y, min(height, y + size_h))
        x1, x2 = (max(0, x), centre_x) if left_side else (centre_x, min(width, x + size_w))
        canvas[:, y1:y2, x1:x2] = resize_image(image, (size_h, size_w))[:, y1 - y : y2 - y, x1 - x : x2 - x]
        tile = View(
            original_hw=record.size_hw,
            size_hw=(y2 - y1, x2 - x1),
            scale_xy=(size_w / record.size_hw[1], size_h / record.size_hw[0]),
            offset_xy=(float(x - x1), float(y - y1)),
        )
        targets.append(_shift(_drop_small(_target(record, tile, settings.masks)), x1, y1, (height, width)))
    view = View(
        original_hw=records[0].size_hw,
        size_hw=(height, width),
        scale_xy=(draw.zoom, draw.zoom),
        offset_xy=(float(centre_x), float(centre_y)),
        flip=draw.flip,
        photometric=draw.photometric,
        mosaic=tuple(record.id for record in records),
    )
    target = _join(targets)
    if draw.flip:
        boxes = target.boxes_xyxy
        mirrored = torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], dim=-1)
        target = replace(target, boxes_xyxy=mirrored, masks=None if target.masks is None else target.masks.flip(-1))
    return _finish(canvas, view, settings), target, view


@dataclass(frozen=True)
class _Draw:
    """All random choices of a view; the defaults give the plain view."""

    zoom: float = 1.0
    place: tuple[float, float] = (0.0, 0.0)
    """Vertical and horizontal position of the crop, or of a mosaic's centre, in [0, 1)."""
    flip: bool = False
    photometric: tuple[float, ...] = ()
    scale: float = 1.0

    @staticmethod
    def of(settings: ViewSettings, generator: torch.Generator) -> _Draw:
        # Always the same number of draws, so that one setting does not change the random choices of another.
        zoom, vertical, horizontal, flip, *colours = torch.rand(8, generator=generator, dtype=torch.float64).tolist()
        factor = 1.0
        if settings.scale_jitter is not None:
            low, high = map(math.log, settings.scale_jitter)
            factor = math.exp(low + (high - low) * zoom)
        photometric: tuple[float, ...] = ()
        if settings.colour > 0:
            # Rounded, because the view's key has four digits and must identify the view completely.
            photometric = (
                *(round(1 + settings.colour * (2 * colour - 1), 3) for colour in colours[:3]),
                round(0.1 * settings.colour * (2 * colours[3] - 1), 4),
            )
        # The scale is chosen by the zoom's random number: it is unused, since scales exclude scale_jitter.
        scale = settings.scales[int(zoom * len(settings.scales))] if settings.scales else 1.0
        return _Draw(factor, (vertical, horizontal), flip < settings.flip, photometric, scale)


def _finish(pixels: Tensor, view: View, settings: ViewSettings) -> Tensor:
    """The last steps on pixels: flip, colours, conversion to float32 in 0..1."""
    if view.flip:
        pixels = pixels.flip(-1)
    if view.photometric:
        brightness, contrast, saturation, hue = view.photometric
        pixels = F.adjust_brightness(pixels, brightness)
        pixels = F.adjust_contrast(pixels, contrast)
        pixels = F.adjust_saturation(pixels, saturation)
        if settings.hue == "yiq":
            return turn_hue(pixels, hue).div_(255)
        pixels = F.adjust_hue(pixels, hue)
    return pixels.to(torch.float32).div_(255)


YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]], dtype=torch.float64)
"""Brightness and two colour axes from red, green and blue (NTSC 1953)."""


def turn_hue(pixels: Tensor, turn: float) -> Tensor:
    """Turn the colours around the grey axis of YIQ: brightness (Y) and saturation in that space stay, until values are cut.

    HSV's hue is another angle: it keeps the largest and the smallest channel instead of the brightness.

    Args:
        pixels: [3, H, W], 0..255.
        turn: share of a full turn; positive turns red towards yellow, as in HSV.

    Returns:
        [3, H, W] float32, cut to 0..255.
    """
    cosine, sine = math.cos(2 * math.pi * turn), math.sin(2 * math.pi * turn)
    turned = torch.tensor([[1.0, 0, 0], [0, cosine, sine], [0, -sine, cosine]], dtype=torch.float64)
    matrix = (torch.linalg.inv(YIQ) @ turned @ YIQ).to(torch.float32)
    return (matrix @ pixels.to(torch.float32).flatten(1)).clamp_(0, 255).view(pixels.shape)


def _target(record: Record, view: View, masks: bool) -> Target:
    """All boxes of the record in pixels of the view, clipped to it."""
    (height, width), (scale_x, scale_y), (offset_x, offset_y) = view.size_hw, view.scale_xy, view.offset_xy
    # In float64 until the end, so that the inverse is exact; in numpy, because small tensor operations are slower.
    boxes = record.boxes_xyxy * (scale_x, scale_y, scale_x, scale_y) + (offset_x, offset_y, offset_x, offset_y)
    if view.flip:
        boxes = np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], axis=-1)
    boxes = boxes.clip(0, (width, height, width, height))
    drawn = None
    if masks and record.segmentation is not None:
        shapes = [_mask(record, index, view) for index in range(len(record.labels))]
        drawn = torch.from_numpy(np.stack(shapes) if shapes else np.zeros((0, height, width), dtype=bool))
    return Target(
        torch.from_numpy(boxes.astype(np.float32)),
        torch.from_numpy(record.labels.astype(np.int64)),
        torch.from_numpy(record.crowd.astype(bool)),
        drawn,
        None if record.scores is None else torch.from_numpy(record.scores.astype(np.float32)),
    )


def _drop_small(target: Target) -> Target:
    """The target without boxes of less than one pixel in width or height."""
    large = _large_enough(target)
    return target if bool(large.all()) else _select(target, large)


def _large_enough(target: Target) -> Tensor:
    """[G] bool, True for boxes of a pixel or more in width and height."""
    large: Tensor = (target.boxes_xyxy[:, 2:] - target.boxes_xyxy[:, :2] >= MIN_SIDE_PX).all(dim=1)
    return large


def _select(target: Target, keep: Tensor) -> Target:
    return map_tensors(target, lambda tensor: tensor[keep])


def _shift(target: Target, left: int, top: int, size_hw: tuple[int, int]) -> Target:
    """Move the target of a tile to pixels of the canvas."""
    boxes = target.boxes_xyxy + torch.tensor([left, top, left, top], dtype=torch.float32)
    masks = target.masks
    if masks is not None:
        right, bottom = size_hw[1] - left - masks.shape[2], size_hw[0] - top - masks.shape[1]
        masks = torch.nn.functional.pad(masks, (left, right, top, bottom))
    return replace(target, boxes_xyxy=boxes, masks=masks)


def _join(targets: Sequence[Target]) -> Target:
    """Join targets of the same canvas. If one lacks masks, the result has none: an unknown mask must not count as empty."""
    shown = [target for target in targets if len(target)] or list(targets[:1])
    masks = [target.masks for target in shown if target.masks is not None]
    return Target(
        torch.cat([target.boxes_xyxy for target in shown]),
        torch.cat([target.labels for target in shown]),
        torch.cat([target.crowd for target in shown]),
        torch.cat(masks) if len(masks) == len(shown) else None,
        joined_scores(shown),
    )


def joined_scores(targets: Sequence[Target]) -> Tensor | None:
    """The scores of the boxes of all targets, 1 where a target has none; None if no target has any."""
    if all(target.scores is None for target in targets):
        return None
    return torch.cat([torch.ones(len(target)) if target.scores is None else target.scores for target in targets])


# --------------------------------------------------------------------------------------------------------------- masks


def _mask(record: Record, index: int, view: View) -> np.ndarray:
    """[h, w] bool mask of one object in the view; if the object has none (but others of the image do), its filled box."""
    assert record.segmentation is not None
    shape = record.segmentation[index]
    if isinstance(shape, Mapping):
        return _mask_of_runs(_decode_runs(shape, record), view)
    if not shape:
        x1, y1, x2, y2 = record.boxes_xyxy[index]
        shape = [[x1, y1, x2, y1, x2, y2, x1, y2]]
    return _mask_of_polygons(shape, view)


def _mask_of_polygons(polygons: Sequence[Sequence[float]], view: View) -> np.ndarray:
    """[h, w] bool union of polygons; they are given in pixels of the original and drawn in pixels of the view."""
    height, width = view.size_hw
    union = np.zeros((height, width), dtype=bool)
    for polygon in polygons:
        points = np.asarray(polygon, dtype=np.float64).reshape(-1, 2) * view.scale_xy + view.offset_xy
        if view.flip:
            points[:, 0] = width - points[:, 0]
        union |= _fill(points, height, width)
    return union


def _fill(points: np.ndarray, height: int, width: int) -> np.ndarray:
    """[h, w] bool, True where a pixel's centre lies inside the polygon (even-odd rule).

    PIL is not used, because its polygons include their outline and so are half a pixel larger on each side.
    """
    (x1, y1), (x2, y2) = points.T[:, :, None], np.roll(points, -1, axis=0).T[:, :, None]
    centres = np.arange(height) + 0.5
    edge, row = np.nonzero((y1 <= centres) != (y2 <= centres))
    x1, y1, x2, y2 = x1[edge, 0], y1[edge, 0], x2[edge, 0], y2[edge, 0]
    crossing = x1 + (centres[row] - y1) / (y2 - y1) * (x2 - x1)
    # From the first pixel centre right of a crossing on, inside and outside swap.
    changes = np.zeros((height, width + 1), dtype=np.int64)
    np.add.at(changes, (row, np.ceil(crossing - 0.5).clip(0, width).astype(int)), 1)
    return changes.cumsum(axis=1)[:, :width] % 2 == 1


def _mask_of_runs(mask: np.ndarray, view: View) -> np.ndarray:
    """[h, w] bool: a mask of the original image, sampled at the centre of every pixel of the view."""
    height, width = view.size_hw
    columns = np.arange(width) + 0.5
    if view.flip:
        columns = width - columns
    rows = ((np.arange(height) + 0.5 - view.offset_xy[1]) / view.scale_xy[1]).astype(int).clip(0, mask.shape[0] - 1)
    columns = ((columns - view.offset_xy[0]) / view.scale_xy[0]).astype(int).clip(0, mask.shape[1] - 1)
    looked_up: np.ndarray = mask[rows[:, None], columns[None]]
    return looked_up


def _decode_runs(runs: Mapping[str, Any], record: Record) -> np.ndarray:
    """Decode COCO's run-length encoding to [H, W] bool: a list of counts (column by column, zeros first) or compressed text."""
    height, width = runs["size"]
    counts = runs["counts"]
    if (height, width) != tuple(record.size_hw):
        raise DataError(
            f"{record.path}: a mask has {width}x{height} pixels, but the image has {record.size_hw[1]}x{record.size_hw[0]}; "
            "correct the annotation"
        )
    if isinstance(counts, str | bytes):
        from faster_coco_eval.core import mask as coco_masks  # imported here: only data with compressed masks need it

        decoded: np.ndarray = coco_masks.decode({"size": [height, width], "counts": counts})
        return decoded.astype(bool)
    values = np.arange(len(counts)) % 2 == 1
    flat = np.repeat(values, counts)
    if flat.size != height * width:
        raise DataError(
            f"{record.path}: a mask's run lengths sum to {flat.size}, not to {width}x{height} pixels; correct the annotation"
        )
    return flat.reshape(width, height).T
