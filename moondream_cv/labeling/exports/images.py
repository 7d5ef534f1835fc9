"""Images of an export: upright, and in formats that training tools read.

OpenCV rotates images by their EXIF orientation and Pillow does not, so a training tool may or may not rotate them.
Boxes refer to the upright image. Therefore rotated images are encoded again; all others are copied byte for byte.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any

from PIL import ExifTags, Image

from moondream_cv.errors import ImageError
from moondream_cv.images import opened_image, to_rgb
from moondream_cv.labeling.errors import LabelingError
from moondream_cv.labeling.exports.files import ExportFiles
from moondream_cv.labeling.records import ImageRecord

_LOSSY = frozenset({".avif", ".heic", ".heif", ".hif", ".j2k", ".jfif", ".jp2"})
_ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {  # suffix that training tools read → format and options of Pillow
    ".jpg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".jpeg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".png": ("PNG", {}),
    ".bmp": ("BMP", {}),
    ".webp": ("WEBP", {"lossless": True}),
    ".tif": ("TIFF", {"compression": "tiff_deflate"}),
    ".tiff": ("TIFF", {"compression": "tiff_deflate"}),
}
_COPIED = frozenset({"JPEG", "MPO", "PNG", "BMP", "WEBP", "TIFF"})  # MPO: JPEG with further images


def exported_name(image: str) -> str:
    """Return the name of an image in exports. It only differs if training tools do not read the format.

    Args:
        image: Name of the image in `labels.jsonl`.
    """
    path = PurePosixPath(image)
    suffix = path.suffix.lower()
    if suffix in _ENCODERS:
        return image
    return f"{path.stem}{'.jpg' if suffix in _LOSSY else '.png'}"


def write_image(files: ExportFiles, path: str, source: Path | bytes, record: ImageRecord, link: bool) -> None:
    """Write an image to an export.

    Args:
        files: Files of the export.
        path: Path of the new file.
        source: Path or bytes of the image.
        record: Record of the image.
        link: Create a hard link if the file needs no conversion.

    Raises:
        ImageError: The image cannot be read.
        LabelingError: The image does not have the size in the record.
        OSError: The file cannot be written.
    """
    with _opened(source) as file, opened_image(file, f"the image {record.source!r}") as image:
        width, height = image.size
        is_upright = _orientation(image) == 1
        is_copied = is_upright and image.format in _COPIED and not _is_animation(image)
    if is_copied and (width, height) == (record.width, record.height):
        if isinstance(source, bytes):
            files.write_bytes(path, source)
        else:
            files.copy(path, source, link)
        return
    pixels = to_rgb(source)
    if pixels.shape[:2] != (record.height, record.width):
        raise LabelingError(
            f"the image {record.source!r} has {pixels.shape[1]}x{pixels.shape[0]} pixels, and its labels are for "
            f"{record.width}x{record.height}; it has changed: restore it, or label it in another folder"
        )
    encoder, options = _ENCODERS[PurePosixPath(path).suffix.lower()]
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, encoder, **options)
    files.write_bytes(path, encoded.getvalue())


@contextlib.contextmanager
def _opened(source: Path | bytes) -> Iterator[IO[bytes]]:
    if isinstance(source, bytes):
        yield io.BytesIO(source)
        return
    try:
        file = open(source, "rb")  # noqa: SIM115 - closed below
    except OSError as error:
        raise ImageError(f"{source} cannot be opened: {error.strerror}") from error
    with file:
        yield file


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation; 1 is upright."""
    try:
        orientation = int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF data, which is ignored by all readers
        return 1
    return orientation if 1 <= orientation <= 8 else 1


def _is_animation(image: Image.Image) -> bool:
    """Return whether the file has frames of which some readers do not return the first."""
    return image.format in ("PNG", "WEBP") and getattr(image, "n_frames", 1) > 1
