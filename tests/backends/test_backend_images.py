"""Image encoding for requests."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

from moondream_cv.backends.images import EncodedImage, encode_image
from moondream_cv.errors import ImageError
from moondream_cv.images import to_rgb


def written(frame: np.ndarray, kind: str, mode: str = "RGB", **options: Any) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(np.ascontiguousarray(frame[..., ::-1])).convert(mode)
    if mode == "RGBA":
        image.putalpha(128)
    image.save(file, kind, **options)
    return file.getvalue()


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


def file_of(encoded: EncodedImage) -> bytes:
    return base64.b64decode(encoded.base64, validate=True)


@pytest.mark.parametrize(
    ("kind", "mode", "options", "mime"),
    [
        ("JPEG", "RGB", {}, "image/jpeg"),
        ("JPEG", "L", {}, "image/jpeg"),
        ("JPEG", "RGB", {"exif": turned(1)}, "image/jpeg"),
        ("PNG", "RGB", {}, "image/png"),
        ("PNG", "L", {}, "image/png"),
        ("WEBP", "RGB", {"lossless": True}, "image/webp"),
    ],
)
@pytest.mark.parametrize("form", ["bytes", "bytearray", "memoryview", "path", "text"])
def test_plain_files_are_sent_without_reencoding(
    frame: np.ndarray, tmp_path: Path, kind: str, mode: str, options: dict[str, Any], mime: str, form: str
) -> None:
    file = written(frame, kind, mode, **options)
    path = tmp_path / "frame"
    path.write_bytes(file)
    forms = {"bytes": file, "bytearray": bytearray(file), "memoryview": memoryview(file), "path": path}
    encoded = encode_image(forms.get(form, str(path)), "png")
    assert file_of(encoded) == file
    assert (encoded.mime, encoded.size) == (mime, (50, 40))
    assert encoded.data_uri == f"data:{mime};base64,{base64.b64encode(file).decode()}"


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        ("JPEG", "RGB", {"exif": turned(6)}),
        ("JPEG", "CMYK", {}),
        ("PNG", "RGB", {"exif": turned(3)}),
        ("PNG", "RGBA", {}),
        ("PNG", "P", {}),
        ("PNG", "RGB", {"transparency": (20, 60, 200)}),
        ("PNG", "I;16", {}),
        ("PNG", "RGB", {"save_all": True, "append_images": [Image.new("RGB", (50, 40))]}),
        ("WEBP", "RGB", {"save_all": True, "append_images": [Image.new("RGB", (50, 40))], "lossless": True}),
        ("WEBP", "RGBA", {"lossless": True}),
        ("GIF", "P", {}),
        ("BMP", "RGB", {}),
        ("TIFF", "RGB", {}),
    ],
)
def test_other_files_are_reencoded(frame: np.ndarray, kind: str, mode: str, options: dict[str, Any]) -> None:
    file = written(frame, kind, "L" if mode == "I;16" else mode, **options)
    if mode == "I;16":
        deep = io.BytesIO()
        Image.fromarray(np.arange(2000, dtype=np.uint16).reshape(40, 50) * 30).save(deep, "PNG")
        file = deep.getvalue()
    encoded = encode_image(file, "png")
    assert encoded.mime == "image/png"
    assert np.array_equal(np.array(Image.open(io.BytesIO(file_of(encoded)))), to_rgb(file))
    assert encoded.size == to_rgb(file).shape[1::-1]


@pytest.mark.parametrize("image_format", ["jpeg", "png"])
@pytest.mark.parametrize("form", ["array", "gray", "floats", "pil", "rgba", "file object"])
def test_other_image_types_are_encoded(frame: np.ndarray, image_format: str, form: str) -> None:
    forms: dict[str, Any] = {
        "array": frame,
        "gray": frame[..., 0],
        "floats": frame / 255,
        "pil": Image.fromarray(frame),
        "rgba": Image.fromarray(frame).convert("RGBA"),
        "file object": io.BytesIO(written(frame, "PNG")),
    }
    expected = to_rgb(forms[form])
    if form == "file object":
        forms[form].seek(0)
    encoded = encode_image(forms[form], image_format)
    with Image.open(io.BytesIO(file_of(encoded))) as opened:
        assert (encoded.mime, opened.format) == (f"image/{image_format}", image_format.upper())
        seen = np.array(opened.convert("RGB")).astype(int)
        assert image_format == "png" or opened.layer[1][1:3] == (1, 1)  # color at full resolution
    assert np.abs(seen - expected).max() <= (0 if image_format == "png" else 20)  # JPEG artifacts at edges
    assert encoded.size == (50, 40)


def test_image_too_wide_for_jpeg_is_sent_as_png() -> None:
    encoded = encode_image(np.zeros((1, 66_000, 3), np.uint8))
    assert (encoded.mime, encoded.size) == ("image/png", (66_000, 1))


def test_file_with_damaged_exif_is_reencoded(frame: np.ndarray) -> None:
    file = written(frame, "PNG", exif=b"Exif\0\0junk")
    encoded = encode_image(file)
    assert (encoded.mime, encoded.size) == ("image/jpeg", (50, 40))


@pytest.mark.parametrize("image", [b"", b"junk", "missing.jpg", 5, [1], b"\xff\xd8\xff\xe0 cut off"])
def test_unreadable_images_raise(image: Any) -> None:
    with pytest.raises(ImageError):
        encode_image(image)


def test_truncated_file_raises_before_sending(frame: np.ndarray) -> None:
    with pytest.raises(ImageError, match="truncated"):
        encode_image(written(frame, "PNG")[:-30])
