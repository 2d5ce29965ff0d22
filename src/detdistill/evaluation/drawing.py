"""Draw boxes on pictures: a colour for each class, and labels on a background of that colour."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont

Place = tuple[float, float, float, float]


def draw_boxes(
    image: Image, boxes_xyxy: np.ndarray, labels: Sequence[int], texts: Sequence[str], *, font_px: int = 12, line_px: int = 2
) -> None:
    """Draw boxes and their labels into a picture. The first box is drawn on top, and labels do not overlap each other.

    A box without area inside the picture is left out. A label that finds no free place near its box is left out.

    Args:
        image: RGB picture; changed.
        boxes_xyxy: [N, 4] in pixels of the picture, best first.
        labels: N class labels, which give the colours.
        texts: N labels to write.
        font_px: height of the text in pixels.
        line_px: width of the lines in pixels.
    """
    from PIL import ImageDraw

    pen, font = ImageDraw.Draw(image), _font(font_px)
    corners = np.clip(np.asarray(boxes_xyxy, dtype=np.float64).reshape(-1, 4), 0, [image.width - 1, image.height - 1] * 2)
    visible = [index for index, (x1, y1, x2, y2) in enumerate(corners) if x2 > x1 and y2 > y1]
    for index in reversed(visible):
        pen.rectangle(tuple(corners[index].tolist()), outline=class_colour(labels[index])[0], width=line_px)
    taken: list[Place] = []
    for index in visible:
        left, top, right, bottom = pen.textbbox((0, 0), texts[index], font=font)
        place = _free_place(corners[index], (right - left + 5, bottom - top + 4), image.size, taken)
        if place is None:
            continue
        taken.append(place)
        colour, ink = class_colour(labels[index])
        pen.rectangle(place, fill=colour)
        pen.text((place[0] + 2 - left, place[1] + 2 - top), texts[index], fill=ink, font=font)


def class_colour(label: int) -> tuple[tuple[int, int, int], str]:
    """Colour of a class, the same in all pictures, and black or white for readable text on it."""
    red, green, blue = colorsys.hls_to_rgb((0.58 + label * 0.618034) % 1, (0.52, 0.68, 0.4)[label % 3], 0.85)
    bright = 0.299 * red + 0.587 * green + 0.114 * blue > 0.5
    return (round(255 * red), round(255 * green), round(255 * blue)), "black" if bright else "white"


def _free_place(box_xyxy: np.ndarray, size: tuple[float, float], canvas: tuple[int, int], taken: Sequence[Place]) -> Place | None:
    """Free position for a label: above its box, below it, or further up or down; None if all are occupied."""
    width, height = size
    x = min(max(0.0, float(box_xyxy[0])), max(0.0, canvas[0] - width))
    above, below = float(box_xyxy[1]) - height, float(box_xyxy[3])
    for y in (above, below, above - height - 1, below + height + 1, above - 2 * height - 2, below + 2 * height + 2):
        place = (x, y, x + width, y + height)
        clear = all(place[0] > p[2] or place[2] < p[0] or place[1] > p[3] or place[3] < p[1] for p in taken)
        if y >= 0 and y + height <= canvas[1] and clear:
            return place
    return (x, max(0.0, float(box_xyxy[1])), x + width, max(0.0, float(box_xyxy[1])) + height) if not taken else None


@cache
def _font(size: int) -> FreeTypeFont:
    """The font DejaVu Sans, which comes with matplotlib and covers most languages."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)
