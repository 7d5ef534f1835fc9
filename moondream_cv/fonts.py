"""Text drawing in any script, with the fonts of Pillow and matplotlib, then with system fonts.

Pillow's default font has ASCII letters only. matplotlib includes DejaVu Sans (Latin, Greek, Cyrillic and more). For
other scripts, such as Chinese and Japanese, system fonts are found through fontconfig, or by their usual names on macOS
and Windows. Letters without a font are replaced by "?", with a warning.
"""

from __future__ import annotations

import logging
import math
import shutil
import subprocess
import unicodedata
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import ImageFont

if TYPE_CHECKING:
    from PIL import ImageDraw

Face = ImageFont.FreeTypeFont | ImageFont.ImageFont

SCALE = 0.9  # size of other fonts, whose letters are larger than those of Pillow's default font
REPLACEMENT = "?"

_FONTCONFIG_SECONDS = 10
_SYSTEM_FONTS = (
    *("Arial Unicode.ttf", "PingFang.ttc", "Hiragino Sans GB.ttc", "AppleSDGothicNeo.ttc"),  # macOS
    *("msyh.ttc", "YuGothM.ttc", "malgun.ttf", "Nirmala.ttf", "seguisym.ttf"),  # Windows
)

logger = logging.getLogger(__name__)
_warned: set[str] = set()


@dataclass(frozen=True)
class FontFile:
    """A font in a font file or collection.

    Attributes:
        path: Path of the file.
        index: Index of the font in the file.
    """

    path: str
    index: int = 0

    @cached_property
    def letters(self) -> frozenset[int]:
        """Code points with outlines; empty if the file cannot be read."""
        from fontTools.ttLib import TTFont, TTLibError

        try:
            with TTFont(self.path, fontNumber=self.index, lazy=True) as font:
                has_outlines = "glyf" in font or "CFF " in font or "CFF2" in font  # colored emoji are bitmaps
                return frozenset(font.getBestCmap() or ()) if has_outlines else frozenset()
        except (OSError, TTLibError, KeyError, AssertionError):  # fontTools asserts the layout of damaged files
            return frozenset()


class Font:
    """Measures and draws text in one size.

    ASCII text uses Pillow's default font. Other text uses DejaVu Sans, and system fonts for letters that DejaVu Sans
    does not have. All fonts share a baseline and a line height.

    Attributes:
        size: Font size in pixels.
        height: Line height in pixels, from the top of the tallest letter to the bottom of the lowest one.
    """

    def __init__(self, size: float) -> None:
        """Create a font of a size in pixels; `load_font` caches fonts."""
        self.size = size
        self._own = ImageFont.load_default(size)
        self.height = math.ceil(self._own.getbbox("Ågjy")[3])
        # Without FreeType, Pillow has only a bitmap font, which has no baseline.
        self._ascent = self._own.getmetrics()[0] if isinstance(self._own, ImageFont.FreeTypeFont) else None

    def getlength(self, text: str, *, plain: bool | None = None) -> float:
        """Return the width of a text in pixels.

        Args:
            text: Text in one line.
            plain: Use Pillow's default font. None uses it if the text is ASCII.
        """
        return float(sum(face.getlength(part) for part, face in self._runs(text, plain)))

    def draw(
        self, draw: ImageDraw.ImageDraw, xy: tuple[float, float], text: str, fill: Any, *, plain: bool | None = None
    ) -> None:
        """Draw a text.

        Args:
            draw: Drawing context of the image.
            xy: Left and top of the line in pixels.
            text: Text in one line.
            fill: Pillow color.
            plain: Use Pillow's default font. None uses it if the text is ASCII.
        """
        x, y = xy
        for part, face in self._runs(text, plain):
            if self._ascent is None:
                draw.text((x, y), part, fill=fill, font=face)
            else:
                draw.text((x, y + self._ascent), part, fill=fill, font=face, anchor="ls")
            x += face.getlength(part)

    def _runs(self, text: str, plain: bool | None) -> list[tuple[str, Face]]:
        """Return the parts of a text, each with its font."""
        text = legible(text)
        if self._ascent is None or (text.isascii() if plain is None else plain):
            return [(text, self._own)]
        return [(part, _face(font.path, font.index, SCALE * self.size)) for part, font in _runs(text)]


@lru_cache(maxsize=64)
def load_font(size: float) -> Font:
    """Return the font of a size in pixels."""
    return Font(size)


@lru_cache(maxsize=1024)
def legible(text: str) -> str:
    """Return a text with only letters that can be drawn.

    Accents are composed with their letters. Letters without a font lose their accents or are replaced by "?"; a warning
    names each of them once.
    """
    if text.isascii():
        return text
    letters: list[str] = []
    missing: list[str] = []
    is_replaced = False  # refers to the previous letter
    for letter in unicodedata.normalize("NFC", text):
        if _is_invisible(letter):
            if not is_replaced and font_for(letter) is not None:
                letters.append(letter)
            continue
        is_replaced = not (letter.isspace() or ord(letter) < 128 or font_for(letter) is not None)
        if is_replaced:
            missing.append(letter)
            letter = unicodedata.normalize("NFKD", letter).encode("ascii", "ignore").decode() or REPLACEMENT
        letters.append(letter)
    unknown = "".join(dict.fromkeys(letter for letter in missing if letter not in _warned))
    if unknown:
        _warned.update(unknown)
        logger.warning(
            "no font has the letters %s, which are replaced; install one that has them, such as Noto (on Debian: "
            "apt-get install fonts-noto-cjk)",
            unknown,
        )
    return "".join(letters)


@lru_cache(maxsize=4096)
def font_for(letter: str) -> FontFile | None:
    """Return the first font with a letter; None if there is none."""
    for font in (*_bundled(), *_found):
        if ord(letter) in font.letters:
            return font
    for font in _system_fonts(letter):
        if ord(letter) in font.letters:
            _found.append(font)
            return font
    return None


_found: list[FontFile] = []  # system fonts that had a letter


def _runs(text: str) -> list[tuple[str, FontFile]]:
    """Split a text into as few parts of one font each as possible, because letters of a script may join."""
    first = _bundled()[0]
    runs: list[tuple[str, FontFile]] = []
    for letter in text:
        font = runs[-1][1] if runs else first
        if not _is_invisible(letter) and not letter.isspace():
            font = first if ord(letter) in first.letters else font_for(letter) or first
        if runs and runs[-1][1] == font:
            runs[-1] = (runs[-1][0] + letter, font)
        else:
            runs.append((letter, font))
    return runs


def _is_invisible(letter: str) -> bool:
    """Return whether a character is a combining mark or a formatting character."""
    return unicodedata.category(letter) in ("Mn", "Me", "Mc", "Cf")


@lru_cache(maxsize=1)
def _bundled() -> tuple[FontFile, ...]:
    """Return the DejaVu Sans font of matplotlib, without importing matplotlib."""
    package = find_spec("matplotlib")
    assert package is not None, "a requirement of this package"
    (folder, *_) = package.submodule_search_locations or [""]
    return (FontFile(str(Path(folder) / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf")),)


def _system_fonts(letter: str) -> list[FontFile]:
    """Return system fonts that may have a letter."""
    command = shutil.which("fc-match")
    if command is not None:
        try:
            found = subprocess.run(
                [command, "-f", "%{file}\n%{index}\n", f":charset={ord(letter):x}"],
                capture_output=True, text=True, timeout=_FONTCONFIG_SECONDS, check=True, stdin=subprocess.DEVNULL,
            ).stdout.splitlines()  # fmt: skip
            return [FontFile(found[0], int(found[1]) & 0xFFFF)]  # the upper bits select an instance of a variable font
        except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
            logger.debug("fontconfig found no font for %r: %s", letter, error)
    fonts = []
    for name in _SYSTEM_FONTS:
        try:
            fonts.append(FontFile(str(ImageFont.truetype(name, 12).path)))  # Pillow searches the system's font folders
        except OSError:
            continue
    return fonts


@lru_cache(maxsize=64)
def _face(path: str, index: int, size: float) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size, index=index)
