"""Text on images, and the panel of counts to the right of them. Colors are BGR."""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import supervision as sv
from PIL import Image, ImageDraw

from moondream_cv.fonts import legible, load_font
from moondream_cv.video.drawing.zones import Zones, class_names, track_ids

BGR = tuple[int, int, int]
BGRImage = npt.NDArray[np.uint8]
"""[H, W, 3] uint8 BGR."""

BLACK: BGR = (24, 20, 20)
WHITE: BGR = (255, 255, 255)
_GRAY: BGR = (170, 165, 160)
_SMALLEST_TEXT = 11  # pixels; smaller is not legible


@dataclass(frozen=True)
class Pen:
    """Text and line sizes for a resolution.

    Attributes:
        text: Font size in pixels.
        line: Line thickness in pixels.
        padding: Padding around text in pixels.
    """

    text: int
    line: int
    padding: int

    @classmethod
    def for_resolution(cls, resolution_wh: tuple[int, int]) -> Pen:
        """Return the cached sizes for images of a width and height."""
        return _pen(resolution_wh)

    @property
    def plate_height(self) -> int:
        """Height of a text plate in pixels."""
        return line_height(self.text) + self.padding

    def plate(self, text: str, color: BGR) -> BGRImage:
        """Return text on a background color, in black or white by contrast. The image is cached and read-only."""
        return _plate(text, self.text, self.padding, color)

    def shorten(self, text: str, width: float, rest: str = "") -> str:
        """Return `text` followed by `rest`, with `text` shortened to fit on a plate of a width in pixels."""
        return _shorten(text, rest, self.text, width - 2 * self.padding)


class Panel:
    """Table of classes, zones and lines with their counts, next to the image.

    The width depends on the resolution only.
    """

    def __init__(self, classes: Sequence[str], colors: Sequence[BGR] | None) -> None:
        """Create a panel without counts.

        Args:
            classes: Class names to list from the start. Others are added when they appear.
            colors: Colors by class ID, repeated; None for no color marks.
        """
        self._classes = tuple(classes)
        self._colors = colors
        self.reset()

    def reset(self) -> None:
        """Clear the counts."""
        self._ids: dict[str, set[int]] = {name: set() for name in self._classes}
        self._class_ids = {name: number for number, name in enumerate(self._classes)}
        self._now: Counter[str] = Counter()
        self._seen: set[str] = set()
        self._drawn: tuple[object, BGRImage] = (None, np.zeros((0, 0, 3), np.uint8))

    @staticmethod
    def width(resolution_wh: tuple[int, int]) -> int:
        """Return the width of the panel for images of a size. It is even, so that an even image width stays even."""
        return 2 * round(7.5 * Pen.for_resolution(resolution_wh).text)

    def update(self, detections: sv.Detections) -> None:
        """Add the objects of one frame."""
        names = class_names(detections, self._classes)
        self._now = Counter(names)
        self._seen.update(self._now)
        class_ids = [0] * len(names) if detections.class_id is None else detections.class_id.tolist()
        for name, class_id, tracker_id in zip(names, class_ids, track_ids(detections).tolist(), strict=True):
            self._class_ids.setdefault(name, class_id)
            seen = self._ids.setdefault(name, set())
            if tracker_id >= 0:
                seen.add(tracker_id)

    def draw(self, target: BGRImage, pen: Pen, zones: Zones | None) -> None:
        """Draw the table into a part of an image."""
        sections = self._sections(zones)
        key = (target.shape, pen, repr(sections))
        if self._drawn[0] != key:
            self._drawn = (key, _table(target.shape[1], target.shape[0], pen, sections))
        target[:] = self._drawn[1]

    def _sections(self, zones: Zones | None) -> list[_Section]:
        tracked = any(self._ids.values())
        entries = []
        for name, seen in self._ids.items():
            color = self._colors[self._class_ids.get(name, 0) % len(self._colors)] if self._colors else None
            total = str(len(seen)) if tracked else ""
            entries.append(_Entry(name, str(self._now[name]), total, color, name in self._seen))
        sections = [_Section(_Entry("Objects", "now", "total" if tracked else ""), entries)]
        if zones is not None:
            counts = zones.counts()
            entered = any(count["ids"] for count in counts["zones"].values())
            areas = [
                _Entry(name, str(count["now"]), str(count["ids"]) if entered else "")
                for name, count in counts["zones"].items()
            ]
            lines = [_Entry(name, str(count["in"]), str(count["out"])) for name, count in counts["lines"].items()]
            head = _Entry("Zones", "now", "total" if entered else "")
            sections += [_Section(head, areas), _Section(_Entry("Lines", "in", "out"), lines)]
        return [section for section in sections if section.entries]


@dataclass(frozen=True)
class _Entry:
    name: str
    first: str
    second: str
    color: BGR | None = None
    seen: bool = True


@dataclass(frozen=True)
class _Section:
    head: _Entry
    entries: list[_Entry]

    def shortened(self, room: int) -> _Section:
        """Return the section with at most `room` lines, including its header; entries without objects are cut first."""
        if len(self.entries) + 1 <= room:
            return self
        kept = max(0, room - 2)
        entries = sorted(self.entries, key=lambda entry: not entry.seen)[:kept]
        return _Section(self.head, [*entries, _Entry(f"+{len(self.entries) - kept} more", "", "")])


def _table(width: int, height: int, pen: Pen, sections: list[_Section]) -> BGRImage:
    """Return a table, [height, width, 3]. Rows that do not fit are replaced by their number."""
    canvas = np.full((height, width, 3), BLACK, np.uint8)
    if not sections:
        return canvas
    margin, step = max(4, pen.text // 2), round(1.45 * pen.text)
    gap = step // 2  # between sections
    room = (height - 2 * margin - gap * (len(sections) - 1)) // step

    # Shorten the class list, which is the longest one, to make room for the sections below it
    below = sum(len(section.entries) + 1 for section in sections[1:])
    sections = [sections[0].shortened(max(3, room - below)), *sections[1:]]
    column = round(2.9 * pen.text)
    y, free = margin, room

    # Draw the sections
    for section in sections:
        section = section.shortened(max(2, free))
        for number, entry in enumerate((section.head, *section.entries)):
            color = _GRAY if number == 0 else WHITE
            left = margin
            if entry.color is not None:
                mark = round(0.6 * pen.text)
                top = y + (line_height(pen.text) - mark) // 2
                canvas[max(0, top) : top + mark, left : left + mark] = entry.color
                left += mark + pen.text // 2
            columns = 2 if entry.second else 1 if entry.first else 0
            name = _shorten(entry.name, "", pen.text, width - margin - left - columns * column)
            _letter(canvas, name, left, y, pen, color)
            for place, text in enumerate((entry.second, entry.first) if entry.second else (entry.first,)):
                right = width - margin - place * column
                _letter(canvas, text, right - _length(text, pen.text), y, pen, color)
            y += step
        free -= len(section.entries) + 1
        y += gap
    return canvas


def _letter(canvas: BGRImage, text: str, x: int, y: int, pen: Pen, color: BGR) -> None:
    if text:
        paste(canvas, _ramp(BLACK, color)[_coverage(text, pen.text)], x, y)


def paste(canvas: BGRImage, patch: BGRImage, x: int, y: int) -> None:
    """Copy a patch into an image, clipped to the image.

    Args:
        canvas: Image to modify.
        patch: Image to copy.
        x: Left edge of the patch in pixels.
        y: Top edge of the patch in pixels.
    """
    height, width = canvas.shape[:2]
    left, top = max(0, x), max(0, y)
    right, bottom = min(width, x + patch.shape[1]), min(height, y + patch.shape[0])
    if left < right and top < bottom:
        canvas[top:bottom, left:right] = patch[top - y : bottom - y, left - x : right - x]


@lru_cache(maxsize=64)
def _pen(resolution_wh: tuple[int, int]) -> Pen:
    text = max(_SMALLEST_TEXT, round(26 * sv.calculate_optimal_text_scale(resolution_wh)))
    line = max(sv.calculate_optimal_line_thickness(resolution_wh), round(min(resolution_wh) / 300))
    return Pen(text, line, max(2, text // 5))


def line_height(size: int) -> int:
    """Return the height of a text line in pixels, from the top of its tallest letter to the lowest descender."""
    return load_font(size).height


def _layout(text: str, size: int) -> tuple[list[tuple[int, npt.NDArray[np.uint8]]], int]:
    """Return the start and the image of each word, and the total width in pixels."""
    # The space of small fonts nearly vanishes, so that "#1 0.55" would look like "#10.55".
    space = round(0.4 * size)
    words, x = [], 0
    plain = text.isascii()  # the words of a text share a font
    for word in [text] if _is_right_to_left(text) else text.split():
        image = _word(word, size, plain)
        words.append((x, image))
        x += image.shape[1] + space
    return words, max(0, x - space)


def _is_right_to_left(text: str) -> bool:
    """Return whether a text has right-to-left letters. Then the font orders its words."""
    return not text.isascii() and any(unicodedata.bidirectional(letter) in ("R", "AL") for letter in text)


@lru_cache(maxsize=512)  # by word, since names, IDs and scores recur in other combinations
def _word(word: str, size: int, plain: bool) -> npt.NDArray[np.uint8]:
    """Return the coverage of each pixel by a word, [h, w] uint8. All words have the same height."""
    font = load_font(size)
    image = Image.new("L", (max(1, math.ceil(font.getlength(word, plain=plain))), font.height))
    font.draw(ImageDraw.Draw(image), (0, 0), word, 255, plain=plain)
    return np.asarray(image)


def _length(text: str, size: int) -> int:
    return _layout(text, size)[1]


@lru_cache(maxsize=256)
def _shorten(text: str, rest: str, size: int, width: float) -> str:
    text = " ".join(legible(text).split())
    if _length(text + rest, size) <= width:
        return text + rest
    low, high = 0, len(text)  # numbers of letters that fit and do not fit
    while high - low > 1:
        middle = (low + high) // 2
        if _length(f"{text[:middle].rstrip()}...{rest}", size) <= width:
            low = middle
        else:
            high = middle
    return f"{text[:low].rstrip()}...{rest}" if low else rest.strip()


@lru_cache(maxsize=256)
def _coverage(text: str, size: int) -> npt.NDArray[np.uint8]:
    """Return the coverage of each pixel by text, [h, w] uint8. All texts have the same height."""
    words, width = _layout(text, size)
    covered = np.zeros((line_height(size), max(1, width)), np.uint8)
    for x, image in words:
        covered[:, x : x + image.shape[1]] = image
    return covered


@lru_cache(maxsize=64)
def _ramp(background: BGR, color: BGR) -> npt.NDArray[np.uint8]:
    """Return a gradient between two colors, [256, 3]."""
    colors: npt.NDArray[np.uint8] = np.rint(np.linspace(background, color, 256)).astype(np.uint8)
    return colors


@lru_cache(maxsize=128)  # 150 kB each in 4K
def _plate(text: str, size: int, padding: int, color: BGR) -> BGRImage:
    letters = _coverage(text, size)
    height, width = letters.shape
    covered = np.zeros((height + padding, width + 2 * padding), np.uint8)
    covered[padding // 2 : padding // 2 + height, padding : padding + width] = letters
    bright = 0.114 * color[0] + 0.587 * color[1] + 0.299 * color[2] > 140
    plate: BGRImage = _ramp(color, BLACK if bright else WHITE)[covered]
    plate.flags.writeable = False
    return plate
