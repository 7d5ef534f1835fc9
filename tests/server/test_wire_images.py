"""Images as clients send them. Run with `pytest tests/server/test_wire_images.py`."""

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

COLOURS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def pictures() -> Iterator[ImageLoader]:
    opened = ImageLoader(Fetcher(max_bytes=1_000_000), max_pixels=10_000)
    yield opened
    asyncio.run(opened.close())


def encoded(image: Image.Image | None = None, format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    (image or Image.fromarray(COLOURS)).save(file, format, **options)
    return file.getvalue()


PNG = base64.b64encode(encoded()).decode()


@pytest.mark.parametrize(
    "value",
    [
        f"data:image/png;base64,{PNG}",
        f"DATA:image/png;BASE64,{PNG}",
        f"data:;base64,{PNG}",
        f"data:image/jpeg;base64,{PNG}",  # what it says does not count, as with a file's name
        f"data:image/png;charset=utf-8;base64,{PNG}",
        PNG,
        PNG.rstrip("="),
        "\n".join(PNG[i : i + 76] for i in range(0, len(PNG), 76)) + "\n",
        base64.urlsafe_b64encode(encoded()).decode(),
    ],
)
def test_a_data_uri_and_base64_give_the_pixels(pictures: ImageLoader, value: str) -> None:
    assert np.array_equal(np.asarray(asyncio.run(pictures.open(value))), COLOURS)


def test_a_photograph_is_turned_upright(pictures: ImageLoader) -> None:
    lying = Image.fromarray(COLOURS)
    exif = lying.getexif()
    exif[0x0112] = 6
    value = base64.b64encode(encoded(lying, "PNG", exif=exif)).decode()
    assert np.array_equal(np.asarray(asyncio.run(pictures.open(value))), np.rot90(COLOURS, -1))


@pytest.mark.parametrize(
    ("value", "said"),
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
def test_everything_else_is_refused(pictures: ImageLoader, value: str, said: str) -> None:
    with pytest.raises(ImageError, match=said) as caught:
        asyncio.run(pictures.open(value))
    assert len(str(caught.value)) < 500


def test_a_path_of_this_machine_is_never_opened(pictures: ImageLoader, tmp_path: Path) -> None:
    file = tmp_path / "abcd"
    file.write_bytes(encoded())
    for value in (str(file), file.as_uri(), f"file:{file}", f"file://localhost{file}"):
        with pytest.raises(ImageError) as caught:
            asyncio.run(pictures.open(value))
        assert "no such image file" not in str(caught.value)


def test_the_same_file_is_decoded_once_as_long_as_there_is_room() -> None:
    opened: list[int] = []

    def prepare(rgb: np.ndarray) -> Image.Image:
        opened.append(rgb.shape[1])
        return Image.fromarray(rgb)

    def uri_of(width: int) -> str:
        return data_uri(Image.new("RGB", (width, 10)))

    async def run() -> None:
        pictures = ImageLoader(Fetcher(max_bytes=1), 10_000, prepare, keep=3 * 10 * 35)
        first = await pictures.open(uri_of(10))
        assert await pictures.open(uri_of(10)) is first
        await pictures.open(uri_of(20))
        assert await pictures.open(uri_of(10)) is first
        await pictures.open(uri_of(15))  # pushes out the one that was not asked for for longest
        await pictures.open(uri_of(20))
        await pictures.open(uri_of(100))  # is larger than all that may be kept
        await pictures.open(uri_of(100))
        await pictures.close()

    asyncio.run(run())
    assert opened == [10, 20, 15, 20, 100, 100]
