"""Drawing of boxes, points, masks, labels and text on images, with Pillow.

Sizes depend on the image size. Colors come from supervision's palette by class id, so that a class has the same color
in all images of a command.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import supervision as sv
from PIL import Image, ImageDraw

from moondream_cv.fonts import Font, load_font

RGB = tuple[int, int, int]
Rectangle = tuple[float, float, float, float]

BLACK: RGB = (20, 20, 24)
WHITE: RGB = (255, 255, 255)
_MASK_OPACITY = 110  # of 255
_SMALLEST_TEXT = 11  # pixels; smaller is not legible


@dataclass(frozen=True)
class _Pen:
    """Font and line sizes in pixels for an image size."""

    font: Font
    line: int
    padding: int

    @classmethod
    def for_image(cls, image: Image.Image) -> _Pen:
        size = max(_SMALLEST_TEXT, round(26 * sv.calculate_optimal_text_scale(image.size)))
        line = max(sv.calculate_optimal_line_thickness(image.size), round(min(image.size) / 300))
        return cls(load_font(size), line, max(2, size // 5))


def annotate(image: Image.Image, detections: sv.Detections, *, has_scores: bool = True) -> Image.Image:
    """Return a copy of an image with detections drawn.

    Args:
        image: RGB image.
        detections: Boxes in pixels; boxes without area are drawn as dots. Labels are `data["class_name"]`. Masks are
            filled with the color of the class.
        has_scores: Write the confidence after the class name.

    Returns:
        RGB image of the same size.
    """
    canvas = image.convert("RGB")
    if canvas is image:
        canvas = image.copy()
    draw, pen = ImageDraw.Draw(canvas), _Pen.for_image(image)
    items = []
    for xyxy, _, confidence, class_id, _, data in detections:
        left, top, right, bottom = (float(value) for value in xyxy)
        color = class_color(int(class_id) if class_id is not None else 0)
        name = str(data.get("class_name", ""))
        label = f"{name} {float(confidence):.2f}" if has_scores and confidence is not None else name
        items.append(((left, top, right, bottom), color, label))
    if detections.mask is not None:
        for mask, (_, color, _) in zip(detections.mask, items, strict=True):
            opacity = Image.fromarray(np.where(mask, np.uint8(_MASK_OPACITY), np.uint8(0)))
            canvas.paste(color, mask=opacity)
    # Labels are drawn last, so that no box crosses them.
    marks = [_draw_mark(draw, pen, box, color) for box, color, _ in items]
    taken: list[Rectangle] = []
    for mark, (_, color, label) in zip(marks, items, strict=True):
        text = _shorten(label, pen.font, canvas.width - 2 * pen.padding)
        if text:
            size_wh = (pen.font.getlength(text) + 2 * pen.padding, float(pen.font.height + pen.padding))
            place = _place_label(mark, size_wh, marks, taken, canvas.size)
            _draw_label(draw, pen, place, color, text)
            taken.append(place)
    return canvas


def class_color(class_id: int) -> RGB:
    """Return the RGB color of a class."""
    return sv.ColorPalette.DEFAULT.by_idx(class_id).as_rgb()


def with_text(image: Image.Image, lines: Sequence[str]) -> Image.Image:
    """Return an image with text on a white strip below it; long lines are wrapped."""
    pen = _Pen.for_image(image)
    margin = 2 * pen.padding
    wrapped = [part for line in lines for part in wrap(line, pen.font, image.width - 2 * margin)]
    step = pen.font.height + pen.padding
    canvas = Image.new("RGB", (image.width, image.height + step * len(wrapped) + 2 * margin), WHITE)
    canvas.paste(image, (0, 0))
    draw = ImageDraw.Draw(canvas)
    for number, line in enumerate(wrapped):
        pen.font.draw(draw, (margin, image.height + margin + number * step), line, BLACK)
    return canvas


def wrap(text: str, font: Font, width: float) -> list[str]:
    """Return text as lines of at most `width` pixels; longer words are split."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        if lines[-1]:
            lines.append("")
        for character in word:
            if lines[-1] and font.getlength(lines[-1] + character) > width:
                lines.append("")
            lines[-1] += character
    return lines


def _draw_mark(draw: ImageDraw.ImageDraw, pen: _Pen, box: Rectangle, color: RGB) -> Rectangle:
    """Draw a box, or a dot if it has no area, and return the covered rectangle."""
    left, top, right, bottom = box
    if right > left and bottom > top:
        outer = (left, top, max(left, right - 1), max(top, bottom - 1))
        draw.rectangle(outer, outline=color, width=pen.line)
        return box
    radius = 2.0 * pen.line + 1
    dot = (left - radius, top - radius, left + radius, top + radius)
    draw.ellipse(dot, fill=color, outline=WHITE, width=max(1, pen.line // 2))
    return dot


def _draw_label(draw: ImageDraw.ImageDraw, pen: _Pen, place: Rectangle, color: RGB, text: str) -> None:
    draw.rectangle(place, fill=color)
    bright = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] > 140
    pen.font.draw(draw, (place[0] + pen.padding, place[1] + pen.padding / 2), text, BLACK if bright else WHITE)


def _place_label(
    mark: Rectangle,
    size_wh: tuple[float, float],
    marks: Sequence[Rectangle],
    taken: Sequence[Rectangle],
    resolution_wh: tuple[int, int],
) -> Rectangle:
    """Return the position around a mark where a label hides the least; other labels weigh more than marks."""
    left, top, right, bottom = mark
    width, height = size_wh
    places = []
    for y in (top - height, bottom, top, bottom - height):
        for x in (left, right - width):
            x = min(max(x, 0.0), max(resolution_wh[0] - width, 0.0))
            y = min(max(y, 0.0), max(resolution_wh[1] - height, 0.0))
            places.append((x, y, min(x + width, resolution_wh[0]) - 1, min(y + height, resolution_wh[1]) - 1))
    return min(places, key=lambda place: _hidden(place, marks) + 4 * _hidden(place, taken))


def _hidden(place: Rectangle, others: Sequence[Rectangle]) -> float:
    """Return the area in pixels that a rectangle shares with others."""
    return sum(
        max(0.0, min(place[2], other[2]) - max(place[0], other[0]))
        * max(0.0, min(place[3], other[3]) - max(place[1], other[1]))
        for other in others
    )


def _shorten(text: str, font: Font, width: float) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..." if text else ""
