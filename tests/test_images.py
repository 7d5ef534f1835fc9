"""Every type of image returns the same pixels for the same image."""

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from PIL import ExifTags, Image

from moondream_cv.images import to_rgb

Pixels = npt.NDArray[Any]

HEIGHT, WIDTH = 24, 36
_RANDOM = np.random.default_rng(7)
COLORS = _RANDOM.integers(0, 256, (16, 3), dtype=np.uint8)
RGB = COLORS[_RANDOM.integers(0, 16, (HEIGHT, WIDTH))]  # few enough colors for a palette
BGR = RGB[..., ::-1].copy()
DEEP_BGR = BGR.astype(np.uint16) * 257
GRAY = _RANDOM.integers(0, 256, (HEIGHT, WIDTH), dtype=np.uint8)
DEEP_GRAY = GRAY.astype(np.uint16) * 257
ALPHA = _RANDOM.integers(0, 256, (HEIGHT, WIDTH), dtype=np.uint8)
SMOOTH = np.stack(np.broadcast_arrays(*np.ogrid[0:240:24j, 0:180:36j], 90), axis=-1).round().astype(np.uint8)


def encoded(pixels: Pixels, file_format: str, **options: Any) -> bytes:
    return saved(Image.fromarray(pixels), file_format, **options)


def saved(image: Image.Image, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def cv2_encoded(extension: str, pixels: Pixels) -> bytes:
    return bytes(cv2.imencode(extension, pixels)[1])


def palette(transparency: int | bytes | None = None) -> Image.Image:
    opened = Image.fromarray(RGB).quantize(16, dither=Image.Dither.NONE)
    if transparency is not None:
        opened.info["transparency"] = transparency
    return opened


def exif(orientation: int) -> Image.Exif:
    data = Image.Exif()
    data[ExifTags.Base.Orientation] = orientation
    return data


def transposed(pixels: Pixels) -> Pixels:
    return np.ascontiguousarray(np.swapaxes(pixels, 0, 1))


# Stored pixels for each EXIF orientation, which viewers rotate to the upright image.
STORED: dict[int, Callable[[Pixels], Pixels]] = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: transposed,
    6: lambda upright: np.rot90(upright, 1),
    7: lambda upright: transposed(upright[::-1, ::-1]),
    8: lambda upright: np.rot90(upright, -1),
}

COLOUR_KINDS: dict[str, Callable[[], Any]] = {
    "bgr array": lambda: BGR,
    "bgra array, opaque": lambda: np.dstack([BGR, np.full_like(ALPHA, 255)]),
    "bgra array, transparent": lambda: np.dstack([BGR, ALPHA]),
    "bgr array, 16 bit": lambda: DEEP_BGR,
    "bgr array, 16 bit, low byte empty": lambda: BGR.astype(np.uint16) << 8,
    "bgr array, 16 bit, big-endian": lambda: DEEP_BGR.astype(">u2"),
    "bgr array, float32": lambda: BGR.astype(np.float32) / 255,
    "bgr array, float64": lambda: BGR / 255,
    "view with negative strides": lambda: RGB[..., ::-1],
    "view with steps": lambda: np.repeat(np.repeat(BGR, 2, axis=0), 3, axis=1)[::2, ::3],
    "fortran order": lambda: np.asfortranarray(BGR),
    "read-only array": lambda: np.frombuffer(BGR.tobytes(), np.uint8).reshape(BGR.shape),
    "pil rgb": lambda: Image.fromarray(RGB),
    "pil rgba, transparent": lambda: Image.fromarray(np.dstack([RGB, ALPHA])),
    "pil palette": palette,
    "pil palette, one transparent color": lambda: palette(3),
    "pil palette, alpha per colour": lambda: palette(bytes(range(0, 160, 10))),
    "pil cmyk": lambda: Image.fromarray(RGB).convert("CMYK"),
    "png bytes": lambda: encoded(RGB, "PNG"),
    "png bytearray": lambda: bytearray(encoded(RGB, "PNG")),
    "png memoryview": lambda: memoryview(encoded(RGB, "PNG")),
    "png file object": lambda: io.BytesIO(encoded(RGB, "PNG")),
    "png with alpha": lambda: encoded(np.dstack([RGB, ALPHA]), "PNG"),
    "png with palette": lambda: saved(palette(), "PNG"),
    "png with transparent palette": lambda: saved(palette(bytes(range(0, 160, 10))), "PNG"),
    "png, 16 bit": lambda: cv2_encoded(".png", DEEP_BGR),
    "png, 16 bit with alpha": lambda: cv2_encoded(".png", np.dstack([BGR, ALPHA]).astype(np.uint16) * 257),
    "gif": lambda: saved(palette(), "GIF"),
    "gif, animated": lambda: saved(palette(), "GIF", save_all=True, append_images=[Image.new("RGB", (WIDTH, HEIGHT))]),
    "webp": lambda: encoded(RGB, "WEBP", lossless=True),
    "tiff": lambda: encoded(RGB, "TIFF"),
    "tiff, 16 bit": lambda: cv2_encoded(".tiff", DEEP_BGR),
    "tiff, cmyk": lambda: saved(Image.fromarray(RGB).convert("CMYK"), "TIFF"),
    "bmp": lambda: encoded(RGB, "BMP"),
}

GREY_KINDS: dict[str, Callable[[], Any]] = {
    "array [H, W]": lambda: GRAY,
    "array [H, W, 1]": lambda: GRAY[..., None],
    "array [H, W], 16 bit": lambda: DEEP_GRAY,
    "array [H, W], float": lambda: GRAY / 255,
    "view [H, W]": lambda: np.repeat(GRAY, 2, axis=1)[:, ::2],
    "pil L": lambda: Image.fromarray(GRAY),
    "pil LA": lambda: Image.merge("LA", [Image.fromarray(GRAY), Image.fromarray(ALPHA)]),
    "pil La": lambda: Image.merge("LA", [Image.fromarray(GRAY), Image.new("L", (WIDTH, HEIGHT), 255)]).convert("La"),
    "pil I;16": lambda: Image.fromarray(DEEP_GRAY),
    "pil I;16B": lambda: Image.frombytes("I;16B", (WIDTH, HEIGHT), DEEP_GRAY.astype(">u2").tobytes()),
    "pil I, 8 bit": lambda: Image.fromarray(GRAY).convert("I"),
    "pil I, 16 bit": lambda: Image.fromarray(GRAY.astype(np.int32) * 257),
    "pil F, 0 to 255": lambda: Image.fromarray(GRAY).convert("F"),
    "pil F, 0 to 1": lambda: Image.fromarray(GRAY.astype(np.float32) / 255),
    "png": lambda: encoded(GRAY, "PNG"),
    "png, 16 bit": lambda: encoded(DEEP_GRAY, "PNG"),
    "pgm, 16 bit": lambda: b"P5 %d %d 65535\n" % (WIDTH, HEIGHT) + DEEP_GRAY.astype(">u2").tobytes(),
    "tiff, float": lambda: encoded(GRAY.astype(np.float32) / 255, "TIFF"),
}


@pytest.mark.parametrize("make", COLOUR_KINDS.values(), ids=COLOUR_KINDS.keys())
def test_color_image_types_return_the_same_pixels(make: Callable[[], Any]) -> None:
    np.testing.assert_array_equal(to_rgb(make()), RGB)


@pytest.mark.parametrize("make", GREY_KINDS.values(), ids=GREY_KINDS.keys())
def test_gray_image_types_return_the_same_pixels(make: Callable[[], Any]) -> None:
    np.testing.assert_array_equal(to_rgb(make()), np.dstack([GRAY] * 3))


@pytest.mark.parametrize("kind", [lambda mask: mask, Image.fromarray], ids=["bool array", "pil 1"])
def test_black_and_white_images_are_scaled(kind: Callable[[Pixels], Any]) -> None:
    mask = GRAY > 127
    np.testing.assert_array_equal(to_rgb(kind(mask)), np.dstack([mask] * 3) * 255)


@pytest.mark.parametrize("mode", ["YCbCr", "LAB", "HSV", "RGBX", "RGBa", "PA"])
def test_rare_modes_keep_the_colors(mode: str) -> None:
    flat = Image.new("RGBA", (4, 3), (200, 60, 30, 255))
    source = flat if mode in ("RGBa", "PA") else flat.convert("RGB")
    np.testing.assert_allclose(to_rgb(source.convert(mode))[0, 0], [200, 60, 30], atol=6)


@pytest.mark.parametrize(
    "image",
    [BGR, RGB[..., ::-1], GRAY, BGR.astype(np.uint16), BGR[:1, :1], Image.fromarray(RGB), encoded(RGB, "PNG")],
    ids=["bgr", "view of rgb", "gray", "16 bit", "one pixel", "pil", "png"],
)
def test_result_does_not_share_memory(image: Any) -> None:
    result = to_rgb(image)
    assert result.dtype == np.uint8
    assert result.flags.c_contiguous
    assert result.flags.writeable
    assert not isinstance(image, np.ndarray) or not np.shares_memory(result, image)


@pytest.mark.parametrize("as_path", [str, Path], ids=["str", "Path"])
def test_paths_of_every_type_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_path: Callable[[str], Any]
) -> None:
    (tmp_path / "ein Bild ü.png").write_bytes(encoded(RGB, "PNG"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    np.testing.assert_array_equal(to_rgb(as_path(str(tmp_path / "ein Bild ü.png"))), RGB)
    np.testing.assert_array_equal(to_rgb(as_path("~/ein Bild ü.png")), RGB)


def test_directory_entries_and_open_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(RGB, "PNG"))
    with os.scandir(os.fsencode(tmp_path)) as entries:  # entries of a bytes folder have bytes paths
        np.testing.assert_array_equal(to_rgb(next(entries)), RGB)  # type: ignore[arg-type]
    with (tmp_path / "a.png").open("rb") as file:
        np.testing.assert_array_equal(to_rgb(file), RGB)
        assert not file.closed


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied_to_files(orientation: int, file_format: str) -> None:
    options = {"lossless": True} if file_format == "WEBP" else {}
    stored = np.ascontiguousarray(STORED[orientation](RGB))
    np.testing.assert_array_equal(to_rgb(encoded(stored, file_format, exif=exif(orientation), **options)), RGB)


@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation_of_jpeg_matches_opencv(tmp_path: Path, orientation: int) -> None:
    stored = np.ascontiguousarray(STORED[orientation](SMOOTH))
    path = tmp_path / "photo.jpg"
    path.write_bytes(encoded(stored, "JPEG", quality=95, exif=exif(orientation)))
    np.testing.assert_allclose(to_rgb(path), SMOOTH, atol=8)
    np.testing.assert_allclose(to_rgb(path), to_rgb(np.asarray(cv2.imread(str(path)))), atol=2)


@pytest.mark.parametrize(
    "data",
    [exif(0), exif(9), b"Exif\x00\x00MM\x00*garbage", b"Exif\x00\x00"],
    ids=["orientation 0", "orientation 9", "garbage", "no data"],
)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_invalid_exif_does_not_rotate_the_image(data: Any) -> None:
    np.testing.assert_allclose(to_rgb(encoded(SMOOTH, "JPEG", quality=95, exif=data)), SMOOTH, atol=8)


def test_pil_images_are_not_rotated() -> None:
    opened = Image.open(io.BytesIO(encoded(RGB, "PNG", exif=exif(6))))
    np.testing.assert_array_equal(to_rgb(opened), RGB)


def test_open_animation_returns_its_current_frame() -> None:
    black = Image.new("RGB", (WIDTH, HEIGHT))
    opened = Image.open(io.BytesIO(saved(black, "PNG", save_all=True, append_images=[Image.fromarray(RGB)])))
    np.testing.assert_array_equal(to_rgb(opened), 0)
    opened.seek(1)
    np.testing.assert_array_equal(to_rgb(opened), RGB)


def test_cmyk_jpeg_is_converted() -> None:
    jpeg = saved(Image.fromarray(SMOOTH).convert("CMYK"), "JPEG", quality=95)
    np.testing.assert_allclose(to_rgb(jpeg), SMOOTH, atol=8)


def test_import_loads_neither_opencv_nor_torch() -> None:
    code = "import sys, moondream_cv.images; sys.exit(bool({'cv2', 'torch'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)
