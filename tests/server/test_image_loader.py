"""Images of clients: data URIs, base64 text and the cache. Run with `pytest tests/server/test_image_loader.py`."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moondream_cv.errors import ImageError
from moondream_cv.server.fetching import Fetcher
from moondream_cv.server.images import ImageLoader
from tests.helpers.served import data_uri

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def loader() -> Iterator[ImageLoader]:
    opened = ImageLoader(Fetcher(max_bytes=1_000_000), max_pixels=10_000)
    yield opened
    asyncio.run(opened.close())


def encoded(image: Image.Image | None = None, format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    (image or Image.fromarray(PIXELS)).save(file, format, **options)
    return file.getvalue()


PNG = base64.b64encode(encoded()).decode()


@pytest.mark.parametrize(
    "value",
    [
        f"data:image/png;base64,{PNG}",
        f"DATA:image/png;BASE64,{PNG}",
        f"data:;base64,{PNG}",
        f"data:image/jpeg;base64,{PNG}",  # the media type is ignored, like a file extension
        f"data:image/png;charset=utf-8;base64,{PNG}",
        PNG,
        PNG.rstrip("="),
        "\n".join(PNG[i : i + 76] for i in range(0, len(PNG), 76)) + "\n",
        base64.urlsafe_b64encode(encoded()).decode(),
    ],
)
def test_data_uri_and_base64_are_decoded(loader: ImageLoader, value: str) -> None:
    assert np.array_equal(np.asarray(asyncio.run(loader.open(value))), PIXELS)


def test_exif_orientation_is_applied(loader: ImageLoader) -> None:
    lying = Image.fromarray(PIXELS)
    exif = lying.getexif()
    exif[0x0112] = 6
    value = base64.b64encode(encoded(lying, "PNG", exif=exif)).decode()
    assert np.array_equal(np.asarray(asyncio.run(loader.open(value))), np.rot90(PIXELS, -1))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("", "empty"),
        ("  \n", "empty"),
        ("data:image/png;base64,", "empty"),
        ("data:image/png,rawbytes", "must be in base64"),
        ("data:image/png;base64,@@@", "neither a data URI"),
        ("/etc/passwd", "not an image"),
        ("../../etc/passwd", "neither a data URI"),
        ("~/picture.jpg", "neither a data URI"),
        ("C:\\picture.jpg", "neither a data URI"),
        ("a" * 5, "neither a data URI"),
        ("é" * 8, "neither a data URI"),
        ("aGVsbG8=", "not an image"),
        ("file:///etc/passwd", "URL"),
        ("ftp://example.com/a.png", "URL"),
        ("gopher://127.0.0.1:25/", "URL"),
        (PNG[:60], "truncated"),
        (data_uri(Image.new("RGB", (101, 100))), "too large: 101x100"),
        (data_uri(Image.new("RGB", (60_000, 60_000 // 200))), "too large"),
    ],
)
def test_other_input_is_rejected(loader: ImageLoader, value: str, message: str) -> None:
    with pytest.raises(ImageError, match=message) as caught:
        asyncio.run(loader.open(value))
    assert len(str(caught.value)) < 500


def test_file_paths_are_never_opened(loader: ImageLoader, tmp_path: Path) -> None:
    file = tmp_path / "abcd"
    file.write_bytes(encoded())
    for value in (str(file), file.as_uri(), f"file:{file}", f"file://localhost{file}"):
        with pytest.raises(ImageError) as caught:
            asyncio.run(loader.open(value))
        assert "no such image file" not in str(caught.value)


def test_repeated_file_is_decoded_once_while_cached() -> None:
    opened: list[int] = []

    def prepare(rgb: np.ndarray) -> Image.Image:
        opened.append(rgb.shape[1])
        return Image.fromarray(rgb)

    def uri_of(width: int) -> str:
        return data_uri(Image.new("RGB", (width, 10)))

    async def run() -> None:
        loader = ImageLoader(Fetcher(max_bytes=1), 10_000, prepare, keep=3 * 10 * 35)
        first = await loader.open(uri_of(10))
        assert await loader.open(uri_of(10)) is first
        await loader.open(uri_of(20))
        assert await loader.open(uri_of(10)) is first
        await loader.open(uri_of(15))  # evicts the least recently used image
        await loader.open(uri_of(20))
        await loader.open(uri_of(100))  # larger than the cache
        await loader.open(uri_of(100))
        await loader.close()

    asyncio.run(run())
    assert opened == [10, 20, 15, 20, 100, 100]
