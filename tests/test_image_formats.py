"""Accepted image formats, and size checks before decoding."""

from __future__ import annotations

import io
import re
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moondream_cv.errors import ImageError
from moondream_cv.images import FORMATS, open_image, readable_formats, to_rgb

ROOT = Path(__file__).parents[1]
HOSTILE = ROOT / "tests" / "data" / "hostile"
LIMIT = 1_000_000


def saved(file_format: str, size: tuple[int, int] = (64, 48), **options: object) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (200, 30, 30)).save(file, file_format, **options)
    return file.getvalue()


def icon(image: bytes) -> bytes:
    """Return an icon whose directory has the size 20x20, independent of its image."""
    return struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 20, 20, 0, 0, 1, 32, len(image), 22) + image


def late_header() -> bytes:
    """Return a PNG whose first chunk is not its header."""
    image = saved("PNG", (3000, 2000))
    return image[:8] + struct.pack(">I4sIII", 8, b"tEXt", 16, 16, 0) + image[8:]


def bitmap(width: int, height: int) -> bytes:
    """Return the header of a bitmap in an icon; its height includes the mask."""
    return struct.pack("<IiiHHIIiiII", 40, width, 2 * height, 1, 24, 0, 0, 0, 0, 0, 0)


def jp2_of(stated: tuple[int, int], size: tuple[int, int]) -> bytes:
    """Return a JPEG 2000 file whose box has another size than its codestream."""
    content = bytearray(saved("JPEG2000", size))
    place = content.find(b"ihdr") + 4
    content[place : place + 8] = struct.pack(">II", *stated[::-1])
    return bytes(content)


def tiff_with_tile(width: int, height: int) -> bytes:
    """Return a TIFF of 16x16 pixels with one tile of another size."""
    entries = [(256, 16), (257, 16), (258, 8), (259, 5), (262, 1), (277, 1), (322, width), (323, height), (324, 200)]
    entries += [(325, 8)]
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    return (b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + directory + bytes(4)).ljust(208, b"\0")


@pytest.mark.parametrize("file_format", FORMATS)
def test_supported_formats_are_decoded(file_format: str) -> None:
    assert file_format in readable_formats()
    pixels = to_rgb(saved(file_format))
    assert pixels.shape == (48, 64, 3) or file_format == "ICO"
    assert np.abs(pixels.reshape(-1, 3).mean(axis=0) - (200, 30, 30)).max() < 6


WITHOUT_DECODER = """
import io, sys
from PIL import Image, features
def saved(kind):
    file = io.BytesIO()
    Image.new("RGB", (64, 48)).save(file, kind)
    return file.getvalue()
from pillow_heif import register_heif_opener
register_heif_opener()
files = {kind: saved(kind) for kind in ("HEIF", "AVIF", "JPEG2000")}
for kind in files:
    del Image.OPEN[kind]
    Image.ID.remove(kind)
sys.modules["pillow_heif"] = None  # makes the import raise ImportError
from moondream_cv.images import to_rgb
for content in files.values():
    try:
        to_rgb(content)
    except ValueError as error:
        print(error)
"""


def test_missing_decoder_names_the_package() -> None:
    result = subprocess.run([sys.executable, "-c", WITHOUT_DECODER], capture_output=True, text=True, cwd=ROOT)
    heif, avif, jpeg2000 = result.stdout.splitlines()
    assert "needs the package pillow-heif; pip install pillow-heif, or convert it to PNG" in heif
    assert 'pip install "pillow>=11.3"' in avif
    assert "JPEG 2000 image, which this Pillow cannot decode" in jpeg2000


UNSUPPORTED = ["BLP", "DDS", "DIB", "EPS", "ICNS", "IM", "MSP", "PCX", "PDF", "SGI", "SPIDER", "XBM"]


@pytest.mark.parametrize("file_format", UNSUPPORTED)
def test_other_formats_are_rejected(file_format: str) -> None:
    mode = {"MSP": "1", "XBM": "1", "SPIDER": "F", "BLP": "P"}.get(file_format, "RGB")
    file = io.BytesIO()
    Image.new(mode, (64, 64)).save(file, file_format)
    with pytest.raises(ImageError, match=r"is not an image in a supported format \(JPEG, PNG, .*\); convert it to PNG"):
        to_rgb(file.getvalue())


@pytest.mark.parametrize("name", ["eps_in_iptc.iim", "169Mpx_in_iptc.iim", "fits_49Mpx.fits"])
def test_containers_and_slow_formats_are_rejected_before_decoding(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*arguments: object, **options: object) -> None:
        raise AssertionError(f"a program was started: {arguments}")

    monkeypatch.setattr(subprocess, "Popen", run)
    with pytest.raises(ImageError, match="supported format"):
        to_rgb(HOSTILE / name)


@pytest.mark.parametrize(
    ("content", "size"),
    [
        (icon(saved("PNG", (3000, 2000))), "3000x2000"),
        (icon(bitmap(3000, 2000)), "3000x2000"),
        (icon(bitmap(3000, -2000)), "3000x2000"),
        (jp2_of((20, 20), (1200, 900)), "1200x900"),
        (tiff_with_tile(16_384, 16_384), "16384x16384"),
    ],
    ids=["PNG in ICO", "bitmap in ICO", "bitmap upside down in ICO", "JPEG 2000", "TIFF tile"],
)
def test_hidden_sizes_are_checked_before_decoding(content: bytes, size: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ImageError, match=f"too large: {size} pixels, the limit is 1,000,000"):
            to_rgb(content, max_pixels=LIMIT)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 3 * LIMIT  # less than one copy of the allowed pixels


@pytest.mark.parametrize(
    "content", [icon(b""), icon(b"\x89PNG"), icon(late_header()), saved("ICO")[:10], saved("JPEG2000")[:60]]
)
def test_truncated_containers_raise(content: bytes) -> None:
    with pytest.raises(ImageError):
        to_rgb(content)


def test_images_are_never_opened_with_every_decoder() -> None:
    """`Image.open` without `formats` tries all decoders of Pillow."""
    files = [f"{folder}/**.py" for folder in ("moondream_cv", "blocks", "benchmarks", "examples", "scripts")]
    found = subprocess.run(
        ["git", "grep", "--untracked", "-nE", r"Image\.open\(", "--", *files],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    if found.returncode > 1:
        pytest.skip(f"needs a git checkout: {found.stderr.strip()}")
    lines = [line for line in found.stdout.splitlines() if not re.search(r"Image\.open\(.*formats=", line)]
    assert not lines
    assert "moondream_cv/images.py" in found.stdout
    with pytest.raises(OSError, match="cannot identify"):
        open_image(io.BytesIO(saved("PCX")))
