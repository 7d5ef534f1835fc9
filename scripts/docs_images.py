"""Code that the scripts for the pictures of the documentation share: files, arguments, and grids of images."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw

from moondream_cv.fonts import load_font
from moondream_cv.images import to_rgb

if TYPE_CHECKING:
    from matplotlib.figure import Figure

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
MAX_BYTES = 300_000
GAP = 8  # pixels between the images of a grid
BLUE, ORANGE, GREEN, GRAY = "#2457c5", "#d9730d", "#2b8a3e", "#868e96"
PLOT_STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "savefig.dpi": 110,
}


def read_picture(source: str | Path | bytes) -> Image.Image:
    """Return an image file, or its content, as an RGB image."""
    return Image.fromarray(to_rgb(source))


def save_picture(content: Figure | Image.Image, path: Path) -> None:
    """Save a picture as PNG or JPEG, by the suffix.

    Args:
        content: Figure, or RGB image.
        path: Path of the file.

    Raises:
        SystemExit: The file is too large for a page.
    """
    buffer = io.BytesIO()
    if not isinstance(content, Image.Image):
        content.savefig(buffer, format="png", bbox_inches="tight", metadata={"Software": ""})
    else:
        content.save(buffer, "JPEG" if path.suffix == ".jpg" else "PNG", quality=88, optimize=True)
    if buffer.tell() > MAX_BYTES:
        raise SystemExit(f"{path} has {buffer.tell()} bytes; the maximum is {MAX_BYTES}")
    path.write_bytes(buffer.getvalue())
    print(f"{path.name}: {buffer.tell() // 1000} kB")


def selected_pictures(pictures: Mapping[str, Callable[..., object]], skipped: str | None = None) -> list[str]:
    """Return the pictures that the command line names; without arguments, all.

    Args:
        pictures: Function of each picture.
        skipped: Picture that is drawn only if it is named.

    Raises:
        SystemExit: A name is unknown.
    """
    names = sys.argv[1:] or [name for name in pictures if name != skipped]
    unknown = [name for name in names if name not in pictures]
    if unknown:
        raise SystemExit(f"unknown pictures {unknown}; known: {', '.join(pictures)}")
    return names


def draw_selected(pictures: Mapping[str, Callable[[], Figure | Image.Image]]) -> None:
    """Draw the pictures that the command line names, or all, into the folder of the documentation.

    Args:
        pictures: Function of each picture, by file name.
    """
    from matplotlib import rc_context

    with rc_context(PLOT_STYLE):
        for name in selected_pictures(pictures):
            save_picture(pictures[name](), IMAGES / name)


def draw_grid(rows: Sequence[Sequence[Image.Image]], titles: Sequence[Sequence[str]], width: int) -> Image.Image:
    """Return rows of images.

    Args:
        rows: Images of the same size.
        titles: For each row, titles above its first images; without titles, the rows are drawn without a space for
            them.
        width: Width of each image in pixels.
    """
    height = round(width * rows[0][0].height / rows[0][0].width)
    title_height = 30 if titles else 0
    step = title_height + height + GAP
    canvas = Image.new("RGB", (len(rows[0]) * (width + GAP) - GAP, len(rows) * step - GAP), (255, 255, 255))
    draw, font = ImageDraw.Draw(canvas), load_font(18)
    for number, row in enumerate(rows):
        for column, title in enumerate(titles[number] if titles else ()):
            font.draw(draw, (column * (width + GAP), number * step + 4), title, (30, 34, 46))
        for column, image in enumerate(row):
            resized = image.resize((width, height), Image.Resampling.LANCZOS)
            canvas.paste(resized, (column * (width + GAP), number * step + title_height))
    return canvas
