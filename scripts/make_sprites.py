"""Rasterize the icons of the rendered scenes into ``moondream_cv/scenes/sprites.png``.

Run once, on a machine with Debian's ``fonts-noto-color-emoji`` (Noto Color Emoji, SIL Open Font License 1.1):

    python scripts/make_sprites.py [/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf]

The sheet has eight cells per row, in the order of ``world.ICONS``. Each icon is cropped to its visible pixels and
scaled to the size of its cell. The package reads only the sheet, so no font is needed at run time.
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from moondream_cv.scenes.sprites import CELL, COLUMNS
from moondream_cv.scenes.world import GLYPHS

FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
TARGET = Path(__file__).resolve().parent.parent / "moondream_cv" / "scenes" / "sprites.png"
BITMAP_SIZE = 109  # the only size of the font's embedded bitmaps


def rasterize(glyph: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """Draw one emoji, cropped to its visible pixels and scaled so that its longer side is `CELL` pixels (RGBA)."""
    canvas = Image.new("RGBA", (200, 200), (0, 0, 0, 0))
    ImageDraw.Draw(canvas).text((20, 20), glyph, font=font, embedded_color=True)
    visible = canvas.getchannel("A").point(lambda alpha: 255 if alpha > 127 else 0).getbbox()
    if visible is None:
        raise SystemExit(f"the font draws nothing for {glyph!r}")
    icon = canvas.crop(visible)
    scale = CELL / max(icon.size)
    return icon.resize(
        (max(1, round(icon.width * scale)), max(1, round(icon.height * scale))), Image.Resampling.LANCZOS
    )


def main() -> None:
    """Write the sprite sheet."""
    font = ImageFont.truetype(sys.argv[1] if len(sys.argv) > 1 else FONT, BITMAP_SIZE)
    rows = -(-len(GLYPHS) // COLUMNS)
    sheet = Image.new("RGBA", (COLUMNS * CELL, rows * CELL), (0, 0, 0, 0))
    for index, glyph in enumerate(GLYPHS.values()):
        icon = rasterize(glyph, font)
        left = index % COLUMNS * CELL + (CELL - icon.width) // 2
        top = index // COLUMNS * CELL + (CELL - icon.height) // 2
        sheet.paste(icon, (left, top))
    sheet.save(TARGET, optimize=True)


if __name__ == "__main__":
    main()
