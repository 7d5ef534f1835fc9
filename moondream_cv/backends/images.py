"""Image encoding for requests: JPEG, PNG or WebP files in base64.

`moondream_cv.images` defines the accepted image types and their orientation.
"""

from __future__ import annotations

import base64
import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image

from moondream_cv.errors import ImageError
from moondream_cv.images import is_encoded, open_image, to_rgb

ImageFormat = Literal["jpeg", "png"]

_MIME_TYPES = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}  # sent without re-encoding
_MAX_JPEG_SIDE = 65_500  # pixels
_JPEG_QUALITY = 95


@dataclass(frozen=True)
class EncodedImage:
    """An image file in base64.

    Attributes:
        base64: Content of the file.
        mime: MIME type, such as "image/jpeg".
        size: (width, height) in pixels.
    """

    base64: str
    mime: str
    size: tuple[int, int]

    @property
    def data_uri(self) -> str:
        """The image as a data URI."""
        return f"data:{self.mime};base64,{self.base64}"


def encode_image(image: Any, image_format: str = "jpeg") -> EncodedImage:
    """Encode an image of any type that `to_rgb` accepts.

    JPEG, PNG and WebP files, given as a path or as bytes, are sent without re-encoding, unless a server could decode
    them to other pixels than `to_rgb`: files that are rotated by EXIF, animated, transparent, or not 8-bit gray or RGB
    are re-encoded.

    Args:
        image: Image.
        image_format: "jpeg" (quality 95, full-resolution color) or "png" (lossless, larger).

    Raises:
        ImageError: The image cannot be read, or was encoded by a local model.
    """
    if is_encoded(image):
        raise ImageError(f"{image!r:.100} is encoded for a local model and cannot be sent to a server; pass the image")
    pixels = to_rgb(image)
    size = (pixels.shape[1], pixels.shape[0])
    file = _read_file(image)
    mime = None if file is None else _mime_if_sendable(file)
    if file is None or mime is None:
        file, mime = _encode_pixels(pixels, image_format)
    return EncodedImage(base64.b64encode(file).decode("ascii"), mime, size)


def _read_file(image: Any) -> bytes | None:
    """Return the content of an image file; None for other types of images."""
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    if isinstance(image, str | os.PathLike):
        try:
            return Path(os.fsdecode(image)).expanduser().read_bytes()
        except OSError as error:
            raise ImageError(f"{os.fsdecode(image)!r} cannot be read: {error.strerror}") from error
    return None


def _mime_if_sendable(file: bytes) -> str | None:
    """Return the MIME type of a file that every decoder decodes to the same pixels; None if it must be re-encoded."""
    with open_image(io.BytesIO(file)) as image:
        plain = image.mode in ("L", "RGB") and "transparency" not in image.info
        animated = getattr(image, "is_animated", False)
        try:
            rotated = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        except Exception:  # damaged EXIF data, which decoders interpret differently
            rotated = True
        return _MIME_TYPES.get(image.format or "") if plain and not rotated and not animated else None


def _encode_pixels(pixels: npt.NDArray[np.uint8], image_format: str) -> tuple[bytes, str]:
    """Return an image file of [H, W, 3] RGB pixels, and its MIME type."""
    image, file = Image.fromarray(pixels), io.BytesIO()
    if image_format == "png" or max(image.size) > _MAX_JPEG_SIDE:
        image.save(file, "PNG", compress_level=1)
        return file.getvalue(), "image/png"
    image.save(file, "JPEG", quality=_JPEG_QUALITY, subsampling="4:4:4")
    return file.getvalue(), "image/jpeg"
