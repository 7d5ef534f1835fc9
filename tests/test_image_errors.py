"""Unreadable images raise an `ImageError` that names the image, never an error of Pillow or the operating system."""

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from moondream_cv.errors import ImageError, MoondreamError
from moondream_cv.images import DEFAULT_MAX_PIXELS, check_image_file, to_rgb

Pixels = npt.NDArray[Any]

HEIGHT, WIDTH = 24, 36
RGB = np.random.default_rng(7).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
BGR = RGB[..., ::-1].copy()


def encoded(pixels: Pixels, file_format: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, file_format)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """Return a PNG with a size in its header and without pixels, which a decoder reports as truncated."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT"


def closed_picture() -> Image.Image:
    opened = Image.open(io.BytesIO(encoded(RGB, "PNG")))
    opened.close()
    return opened


class Tensor:
    """Has the interface that tensors of torch, TensorFlow and JAX share."""

    def numpy(self) -> Pixels:
        return BGR


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "none": (lambda: None, r"None \(of type NoneType\) is not an image"),
    "number": (lambda: 7, r"7 \(of type int\)"),
    "list": (lambda: [BGR], "one image at a time"),
    "tensor": (Tensor, r"tensor\.numpy\(\).*BGR"),
    "no dimensions": (lambda: np.array(3, np.uint8), r"shape \(\) and dtype uint8"),
    "encoded array": (lambda: np.frombuffer(encoded(RGB, "PNG"), np.uint8), r"tobytes\(\)"),
    "float vector": (lambda: np.zeros(5), r"shape \(5,\) and dtype float64"),
    "two channels": (lambda: np.zeros((8, 9, 2), np.uint8), r"shape \(8, 9, 2\)"),
    "channels first": (lambda: np.zeros((3, 8, 9), np.uint8), r"\(3, 8, 9\).*transpose\(1, 2, 0\)"),
    "batch": (lambda: np.zeros((2, 8, 9, 3), np.uint8), r"\(2, 8, 9, 3\).*batch"),
    "zero high": (lambda: np.zeros((0, 9, 3), np.uint8), r"\(0, 9, 3\).*no pixels"),
    "zero wide": (lambda: np.zeros((9, 0), np.uint8), r"\(9, 0\).*no pixels"),
    "no channels": (lambda: np.zeros((9, 9, 0), np.uint8), r"\(9, 9, 0\)"),
    "objects": (lambda: np.full((4, 4, 3), None), "dtype object"),
    "complex": (lambda: np.zeros((4, 4, 3), complex), "dtype complex128"),
    "text": (lambda: np.full((4, 4), "a"), "dtype <U1"),
    "int64": (lambda: np.zeros((4, 4, 3), np.int64), "dtype int64.*convert it to uint8"),
    "nan": (lambda: np.full((4, 4, 3), np.nan), "must have finite values"),
    "infinite": (lambda: np.full((4, 4), np.inf, np.float32), "must have finite values"),
    "float to 255": (lambda: BGR.astype(np.float32), r"to 2\d\d; floats are read as 0 to 1"),
    "float below 0": (lambda: np.full((4, 4, 3), -0.5), "from -0.5"),
    "huge array": (lambda: np.broadcast_to(np.uint8(0), (10**6, 10**6)), "too large: 1000000x1000000"),
    "pil, zero wide": (lambda: Image.new("RGB", (0, 5)), "no pixels: it is 0 wide and 5 high"),
    "pil, closed": (closed_picture, "PngImageFile.*cannot be read"),
    "pil, truncated": (lambda: Image.open(io.BytesIO(encoded(RGB, "PNG")[:300])), "PngImageFile.*cannot be read"),
    "pil, F with nan": (lambda: Image.fromarray(np.full((4, 4), np.nan, np.float32)), "must have finite values"),
    "pil, I out of range": (lambda: Image.fromarray(np.full((4, 4), 70000, np.int32)), "from 70000 to 70000"),
    "no bytes": (lambda: b"", "0 bytes.*is empty"),
    "text bytes": (lambda: b"hello, this is no picture", "^the encoded image of 25 bytes is not an image"),
    "truncated png": (lambda: encoded(RGB, "PNG")[:300], "300 bytes.*truncated or damaged"),
    "truncated jpeg": (lambda: encoded(RGB, "JPEG")[:-80], "truncated or damaged"),
    "header only": (lambda: encoded(RGB, "PNG")[:20], "20 bytes"),
    "bomb": (lambda: png_header(50_000, 50_000), "too large"),
    "bomb of one row": (lambda: png_header(2**31 - 1, 1), "too large"),
    "postscript": (lambda: encoded(RGB, "EPS"), r"in a supported format \(JPEG, PNG.*convert it to PNG"),
    "read file": (lambda: io.BytesIO(b""), r"^the file object is empty or has been read already; call seek\(0\)"),
    "text file": (lambda: io.StringIO("hello"), "must return bytes, got str.*'rb'"),
    "write-only file": (lambda: open(os.devnull, "wb"), "cannot be read"),  # noqa: SIM115
    "url of a bucket": (
        lambda: "s3://bucket/dog.jpg?key=1",
        r"^'s3://bucket/dog\.jpg' is not an http or https URL.*path",
    ),
    "url of a file": (lambda: "file:///tmp/dog.jpg", r"^'file:///tmp/dog\.jpg' is not an http or https URL.*path"),
    "url without a host": (lambda: "https:///dog.jpg", "no valid host and port"),
    "url with a bad port": (lambda: "http://host:port/dog.jpg", "no valid host and port"),
    "data uri": (lambda: "data:image/png;base64,iVBORw0KGgo=", "not a path.*b64decode"),
    "base64": (lambda: "iVBORw0KGgo" * 1000, r"not a path.*b64decode"),
    "empty path": (lambda: "", "'': no such image file"),
    "missing path": (lambda: "no/such/dog.jpg", r"'no/such/dog\.jpg': no such image file"),
    "nul in path": (lambda: "dog\0.jpg", r"'dog\\x00\.jpg'"),
    "unknown user": (lambda: "~no-such-user-here/dog.jpg", "'~no-such-user-here/dog.jpg' cannot be opened"),
    "long name": (lambda: "x" * 3000, r"'xxx.*\(3000 characters\)"),
}


@pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD.keys())
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_invalid_images_raise(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ImageError, match=message) as caught:
        to_rgb(make())
    assert isinstance(caught.value, MoondreamError)
    assert isinstance(caught.value, ValueError)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"is empty \(0 bytes\)$"),
        (b"\x00\x01text", "not an image"),
        (encoded(RGB, "PNG")[:200], "truncated or damaged"),
        (png_header(20_000, 20_000), "too large"),
    ],
    ids=["empty", "no image", "truncated", "bomb"],
)
def test_invalid_files_raise(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=rf"picture\.png.*{message}"):
        to_rgb(path)


@pytest.mark.parametrize("content", [encoded(RGB, "PNG")[:300], b"hello", png_header(50_000, 50_000), b"\x00" * 40])
def test_messages_contain_neither_file_content_nor_addresses(content: bytes) -> None:
    for image in (content, bytearray(content), io.BytesIO(content)):
        with pytest.raises(ImageError) as caught:
            to_rgb(image)
        assert "\\x" not in str(caught.value)
        assert " at 0x" not in str(caught.value)


def test_backslashes_in_paths_are_not_doubled() -> None:
    with pytest.raises(ImageError) as caught:
        to_rgb(r"C:\photos\new\dog.jpg")
    assert str(caught.value) == r"'C:\photos\new\dog.jpg': no such image file"


def test_check_image_file_reads_the_header_only(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png_header(WIDTH, HEIGHT))
    check_image_file(path)  # the missing pixels are found when it is decoded
    check_image_file(path.read_bytes())
    check_image_file("https://example.com/dog.jpg")
    for bad in (b"", b"hello", png_header(50_000, 50_000)):
        path.write_bytes(bad)
        for image in (path, str(path), bad):
            with pytest.raises(ImageError):
                check_image_file(image)
    for missing in (tmp_path, tmp_path / "no.png", "s3://bucket/dog.jpg"):
        with pytest.raises(ImageError):
            check_image_file(missing)


def test_folders_and_pipes_raise(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="is a folder"):
        to_rgb(tmp_path)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")  # opening it would hang, because no process writes to it
        with pytest.raises(ImageError, match="not a regular file"):
            to_rgb(tmp_path / "pipe")


@pytest.mark.parametrize(
    "image",
    [BGR, Image.fromarray(RGB), encoded(RGB, "PNG"), png_header(WIDTH, HEIGHT)],
    ids=["array", "pil", "png", "undecoded png"],
)
def test_images_above_max_pixels_raise(image: Any) -> None:
    with pytest.raises(ImageError, match=r"too large: 36x24 pixels, the limit is 863"):
        to_rgb(image, max_pixels=WIDTH * HEIGHT - 1)


def test_max_pixels_is_inclusive() -> None:
    assert to_rgb(BGR, max_pixels=WIDTH * HEIGHT).shape == (HEIGHT, WIDTH, 3)
    assert 2 * (Image.MAX_IMAGE_PIXELS or 0) == DEFAULT_MAX_PIXELS  # Pillow raises above this


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
@settings(deadline=None, max_examples=150)
@given(
    original=st.sampled_from([encoded(RGB, f) for f in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO")]),
    changes=st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), max_size=4),
    length=st.integers(1, 2**16),
)
def test_damaged_files_return_pixels_or_raise_image_error(
    original: bytes, changes: list[tuple[int, int]], length: int
) -> None:
    damaged = bytearray(original)
    for position, value in changes:
        damaged[position % min(len(damaged), 200)] = (
            value  # damaged headers cause more kinds of errors than damaged pixels
        )
    try:
        result = to_rgb(bytes(damaged[: 1 + length % len(damaged)]), max_pixels=10**6)
    except ImageError:
        return
    assert result.ndim == 3
