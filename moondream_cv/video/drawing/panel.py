"""Text on images, and the panel of counts beside them. Colors are BGR."""

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
Picture = npt.NDArray[np.uint8]
"""[H, W, 3] uint8 BGR."""

BLACK: BGR = (24, 20, 20)
WHITE: BGR = (255, 255, 255)
_GRAY: BGR = (170, 165, 160)
_SMALLEST_TEXT = 11  # pixels; smaller is not legible


@dataclass(frozen=True)
class Pen:
    """Sizes in pixels that suit a resolution.

    Attributes:
        text: Of the letters.
        line: Thickness of lines.
        padding: Around text.
    """

    text: int
    line: int
    padding: int

    @classmethod
    def for_resolution(cls, resolution_wh: tuple[int, int]) -> Pen:
        """Choose sizes for pictures of a width and height; computed once for each."""
        return _pen(resolution_wh)

    @property
    def plate_height(self) -> int:
        """Height of a plate."""
        return line_height(self.text) + self.padding

    def plate(self, text: str, color: BGR) -> Picture:
        """Return text on a ground of a color, in black or white, whichever is legible; not to be written to."""
        return _plate(text, self.text, self.padding, color)

    def shorten(self, text: str, width: float, rest: str = "") -> str:
        """Return text and rest as they fit on a plate of a width; of the text, the end is left out."""
        return _shorten(text, rest, self.text, width - 2 * self.padding)


class Panel:
    """A table beside the picture: classes, zones and lines, with their counts.

    It is as wide at every frame of a resolution, whatever it shows.
    """

    def __init__(self, classes: Sequence[str], colors: Sequence[BGR] | None) -> None:
        """Make a panel that has seen nothing.

        Args:
            classes: Names that are listed from the start; others are added as they appear.
            colors: Of the classes by class id, repeated; None leaves the color marks out.
        """
        self._classes = tuple(classes)
        self._colors = colors
        self.reset()

    def reset(self) -> None:
        """Forget what was seen."""
        self._ids: dict[str, set[int]] = {name: set() for name in self._classes}
        self._class_ids = {name: number for number, name in enumerate(self._classes)}
        self._now: Counter[str] = Counter()
        self._seen: set[str] = set()
        self._drawn: tuple[object, Picture] = (None, np.zeros((0, 0, 3), np.uint8))

    @staticmethod
    def width(resolution_wh: tuple[int, int]) -> int:
        """Width of the panel for pictures of a size; always even, so that an even width stays one."""
        return 2 * round(7.5 * Pen.for_resolution(resolution_wh).text)

    def update(self, detections: sv.Detections) -> None:
        """Count one frame."""
        names = class_names(detections, self._classes)
        self._now = Counter(names)
        self._seen.update(self._now)
        class_ids = [0] * len(names) if detections.class_id is None else detections.class_id.tolist()
        for name, class_id, tracker_id in zip(names, class_ids, track_ids(detections).tolist(), strict=True):
            self._class_ids.setdefault(name, class_id)
            seen = self._ids.setdefault(name, set())
            if tracker_id >= 0:
                seen.add(tracker_id)

    def draw(self, target: Picture, pen: Pen, zones: Zones | None) -> None:
        """Fill a part of a picture with the table."""
        sections = self._sections(zones)
        key = (target.shape, pen, repr(sections))
        if self._drawn[0] != key:
            self._drawn = (key, _table(target.shape[1], target.shape[0], pen, sections))
        target[:] = self._drawn[1]

    def _sections(self, zones: Zones | None) -> list[_Section]:
        tracked = any(self._ids.values())
        rows = []
        for name, seen in self._ids.items():
            color = self._colors[self._class_ids.get(name, 0) % len(self._colors)] if self._colors else None
            total = str(len(seen)) if tracked else ""
            rows.append(_Row(name, str(self._now[name]), total, color, name in self._seen))
        sections = [_Section(_Row("Objects", "now", "total" if tracked else ""), rows)]
        if zones is not None:
            counts = zones.counts()
            entered = any(count["ids"] for count in counts["zones"].values())
            areas = [
                _Row(name, str(count["now"]), str(count["ids"]) if entered else "")
                for name, count in counts["zones"].items()
            ]
            lines = [_Row(name, str(count["in"]), str(count["out"])) for name, count in counts["lines"].items()]
            head = _Row("Zones", "now", "total" if entered else "")
            sections += [_Section(head, areas), _Section(_Row("Lines", "in", "out"), lines)]
        return [section for section in sections if section.rows]


@dataclass(frozen=True)
class _Row:
    name: str
    first: str
    second: str
    color: BGR | None = None
    seen: bool = True


@dataclass(frozen=True)
class _Section:
    head: _Row
    rows: list[_Row]

    def shortened(self, room: int) -> _Section:
        """Return a section of at most as many lines, its head included; what was never seen goes first."""
        if len(self.rows) + 1 <= room:
            return self
        kept = max(0, room - 2)
        rows = sorted(self.rows, key=lambda row: not row.seen)[:kept]
        return _Section(self.head, [*rows, _Row(f"+{len(self.rows) - kept} more", "", "")])


def _table(width: int, height: int, pen: Pen, sections: list[_Section]) -> Picture:
    """Draw a table, [height, width, 3]; of what does not fit, the number is given."""
    canvas = np.full((height, width, 3), BLACK, np.uint8)
    if not sections:
        return canvas
    margin, step = max(4, pen.text // 2), round(1.45 * pen.text)
    gap = step // 2  # between sections
    room = (height - 2 * margin - gap * (len(sections) - 1)) // step
    # The classes come first and are the longest list, so that they make room for what stands below.
    below = sum(len(section.rows) + 1 for section in sections[1:])
    sections = [sections[0].shortened(max(3, room - below)), *sections[1:]]
    column = round(2.9 * pen.text)
    y, free = margin, room
    for section in sections:
        section = section.shortened(max(2, free))
        for number, row in enumerate((section.head, *section.rows)):
            color = _GRAY if number == 0 else WHITE
            left = margin
            if row.color is not None:
                mark = round(0.6 * pen.text)
                top = y + (line_height(pen.text) - mark) // 2
                canvas[max(0, top) : top + mark, left : left + mark] = row.color
                left += mark + pen.text // 2
            columns = 2 if row.second else 1 if row.first else 0
            name = _shorten(row.name, "", pen.text, width - margin - left - columns * column)
            _letter(canvas, name, left, y, pen, color)
            for place, text in enumerate((row.second, row.first) if row.second else (row.first,)):
                right = width - margin - place * column
                _letter(canvas, text, right - _length(text, pen.text), y, pen, color)
            y += step
        free -= len(section.rows) + 1
        y += gap
    return canvas


def _letter(canvas: Picture, text: str, x: int, y: int, pen: Pen, color: BGR) -> None:
    if text:
        paste(canvas, _ramp(BLACK, color)[_coverage(text, pen.text)], x, y)


def paste(canvas: Picture, patch: Picture, x: int, y: int) -> None:
    """Write a patch into a picture, as much of it as lies inside."""
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
    """Height of a line in pixels, from the top of its tallest letter to the bottom of its lowest."""
    return load_font(size).height


def _layout(text: str, size: int) -> tuple[list[tuple[int, npt.NDArray[np.uint8]]], int]:
    """Return where each word begins, with its image, and the width of all, in pixels."""
    # In small sizes the font's own space nearly vanishes, and "#1 0.55" would read "#10.55".
    space = round(0.4 * size)
    words, x = [], 0
    plain = text.isascii()  # the words of a text share a font
    for word in [text] if _is_from_the_right(text) else text.split():
        image = _word(word, size, plain)
        words.append((x, image))
        x += image.shape[1] + space
    return words, max(0, x - space)


def _is_from_the_right(text: str) -> bool:
    """Return whether a text has letters that are written from right to left: the font then orders its words."""
    return not text.isascii() and any(unicodedata.bidirectional(letter) in ("R", "AL") for letter in text)


@lru_cache(maxsize=512)  # by words, since names, ids and scores come back in other combinations
def _word(word: str, size: int, plain: bool) -> npt.NDArray[np.uint8]:
    """Return how much of each pixel a word covers, [h, w] uint8; as high for every word."""
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
    low, high = 0, len(text)  # letters of the text that fit, and those that do not
    while high - low > 1:
        middle = (low + high) // 2
        if _length(f"{text[:middle].rstrip()}...{rest}", size) <= width:
            low = middle
        else:
            high = middle
    return f"{text[:low].rstrip()}...{rest}" if low else rest.strip()


@lru_cache(maxsize=256)
def _coverage(text: str, size: int) -> npt.NDArray[np.uint8]:
    """Return how much of each pixel text covers, [h, w] uint8; as high for every text."""
    words, width = _layout(text, size)
    covered = np.zeros((line_height(size), max(1, width)), np.uint8)
    for x, picture in words:
        covered[:, x : x + picture.shape[1]] = picture
    return covered


@lru_cache(maxsize=64)
def _ramp(ground: BGR, color: BGR) -> npt.NDArray[np.uint8]:
    """Return the colors between two, [256, 3]."""
    colors: npt.NDArray[np.uint8] = np.rint(np.linspace(ground, color, 256)).astype(np.uint8)
    return colors


@lru_cache(maxsize=128)  # of 150 kB each in 4K
def _plate(text: str, size: int, padding: int, color: BGR) -> Picture:
    letters = _coverage(text, size)
    height, width = letters.shape
    covered = np.zeros((height + padding, width + 2 * padding), np.uint8)
    covered[padding // 2 : padding // 2 + height, padding : padding + width] = letters
    bright = 0.114 * color[0] + 0.587 * color[1] + 0.299 * color[2] > 140
    plate: Picture = _ramp(color, BLACK if bright else WHITE)[covered]
    plate.flags.writeable = False
    return plate
