"""Montage of images: a title, and panels in two columns with text below each image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from moondream_cv.drawing import RGB, WHITE
from moondream_cv.fonts import Font, load_font

GRAY: RGB = (110, 114, 122)
RED: RGB = (200, 40, 40)
_BACKGROUND: RGB = (244, 245, 247)
_TITLE: RGB = (30, 34, 46)
_MARGIN = 24
_TEXT_SIZE = 20
_SPACE = 6


@dataclass(frozen=True)
class Panel:
    """An image and the text lines below it.

    Attributes:
        image: Annotated image.
        lines: Lines, each as a sequence of texts with their colors.
    """

    image: Image.Image
    lines: Sequence[Sequence[tuple[str, RGB]]]


def make_montage(title: str, subtitle: str, panels: Sequence[Panel], *, panel_width: int = 640) -> Image.Image:
    """Return an image with panels in two columns below a title.

    Args:
        title: Title text.
        subtitle: Text below the title.
        panels: One or more panels.
        panel_width: Width of each panel image in pixels.
    """
    cards = [_make_card(panel, panel_width) for panel in panels]
    rows = [cards[start : start + 2] for start in range(0, len(cards), 2)]
    strip = 112
    width = _MARGIN + (panel_width + _MARGIN) * min(2, len(cards))
    height = strip + _MARGIN + sum(max(card.height for card in row) + _MARGIN for row in rows)
    canvas = Image.new("RGB", (width, height), _BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    draw.rectangle((0, 0, width, strip), fill=_TITLE)
    load_font(38).draw(draw, (_MARGIN, 20), title, WHITE)
    load_font(20).draw(draw, (_MARGIN, 72), subtitle, (178, 186, 204))
    y = strip + _MARGIN
    for row in rows:
        tallest = max(card.height for card in row)
        for column, card in enumerate(row):
            x = _MARGIN + column * (panel_width + _MARGIN)
            draw.rectangle((x, y, x + panel_width - 1, y + tallest - 1), fill=WHITE)
            canvas.paste(card, (x, y))
        y += tallest + _MARGIN
    return canvas


def _make_card(panel: Panel, width: int) -> Image.Image:
    image = panel.image.resize((width, round(panel.image.height * width / panel.image.width)), Image.Resampling.LANCZOS)
    font, padding = load_font(_TEXT_SIZE), 16
    lines = [line for pieces in panel.lines for line in _flow(pieces, font, width - 2 * padding)]
    step = font.height + 6
    card = Image.new("RGB", (width, image.height + 2 * padding + step * len(lines)), WHITE)
    card.paste(image, (0, 0))
    draw = ImageDraw.Draw(card)
    for number, line in enumerate(lines):
        for x, word, color in line:
            font.draw(draw, (padding + x, image.height + padding + number * step), word, color)
    return card


def _flow(pieces: Sequence[tuple[str, RGB]], font: Font, width: float) -> list[list[tuple[float, str, RGB]]]:
    """Return the lines of a text flow; each line has the x in pixels, the text and the color of its words."""
    lines: list[list[tuple[float, str, RGB]]] = [[]]
    x = 0.0
    for text, color in pieces:
        for word in text.split():
            length = font.getlength(word)
            if lines[-1] and x + length > width:
                lines.append([])
                x = 0.0
            lines[-1].append((x, word, color))
            x += length + _SPACE
    return lines
