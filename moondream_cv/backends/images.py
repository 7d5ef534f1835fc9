"""Images → what goes over the wire: a JPEG, PNG or WebP file in base64.

What counts as an image, and which way up it is, is left to `moondream_cv.images`.
"""

from __future__ import annotations

import base64
import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image

from moondream_cv.errors import ImageError
from moondream_cv.images import is_encoded, open_image, to_rgb

ImageFormat = Literal["jpeg", "png"]

_SENT_AS_THEY_ARE = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}
_LONGEST_JPEG_SIDE = 65_500
_JPEG_QUALITY = 95


@dataclass(frozen=True)
class EncodedPicture:
    """An image file in base64.

    Attributes:
        base64: The bytes of the file.
        mime: Its type, such as "image/jpeg".
        size: (width, height) in pixels.
    """

    base64: str
    mime: str
    size: tuple[int, int]

    @property
    def data_uri(self) -> str:
        return f"data:{self.mime};base64,{self.base64}"


def check_format(image_format: str) -> None:
    """Refuse a format that images are not encoded in.

    Raises:
        ValueError: Names it.
    """
    if image_format not in get_args(ImageFormat):
        raise ValueError(f"image_format must be one of {', '.join(get_args(ImageFormat))}, not {image_format!r}")


def encode(image: Any, image_format: str = "jpeg") -> EncodedPicture:
    """Encode an image of any kind that `to_rgb` takes.

    JPEG, PNG and WebP files, given as a path or as bytes, are sent as they are, unless that could show other pixels
    than `to_rgb` gives: what is turned by EXIF, animated, transparent, or not 8-bit grey or RGB is encoded anew.

    Args:
        image_format: "jpeg" (quality 95, colours at full resolution) or "png" (without loss, and larger).

    Raises:
        ImageError: It cannot be read, or is an image that a local model has encoded.
    """
    if is_encoded(image):
        raise ImageError(f"{image!r:.100} is encoded for a local model and cannot be sent to a server; pass the image")
    pixels = to_rgb(image)
    size = (pixels.shape[1], pixels.shape[0])
    file = _file(image)
    mime = None if file is None else _mime_as_it_is(file)
    if file is None or mime is None:
        file, mime = _encoded(pixels, image_format)
    return EncodedPicture(base64.b64encode(file).decode("ascii"), mime, size)


def _file(image: Any) -> bytes | None:
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    if isinstance(image, str | os.PathLike):
        try:
            return Path(os.fsdecode(image)).expanduser().read_bytes()
        except OSError as error:
            raise ImageError(f"{os.fsdecode(image)!r} cannot be read: {error.strerror}") from error
    return None


def _mime_as_it_is(file: bytes) -> str | None:
    """The type of a file that any reader shows alike; None where it has to be encoded anew."""
    with open_image(io.BytesIO(file)) as picture:
        plain = picture.mode in ("L", "RGB") and "transparency" not in picture.info
        animated = getattr(picture, "is_animated", False)
        try:
            turned = picture.getexif().get(ExifTags.Base.Orientation, 1) != 1
        except Exception:  # damaged EXIF data, which every reader takes in its own way
            turned = True
        return _SENT_AS_THEY_ARE.get(picture.format or "") if plain and not turned and not animated else None


def _encoded(pixels: npt.NDArray[np.uint8], image_format: str) -> tuple[bytes, str]:
    """The bytes of an image file of [H, W, 3] RGB pixels, and its type."""
    picture, file = Image.fromarray(pixels), io.BytesIO()
    if image_format == "png" or max(picture.size) > _LONGEST_JPEG_SIDE:
        picture.save(file, "PNG", compress_level=1)
        return file.getvalue(), "image/png"
    picture.save(file, "JPEG", quality=_JPEG_QUALITY, subsampling="4:4:4")
    return file.getvalue(), "image/jpeg"
