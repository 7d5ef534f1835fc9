"""Near-duplicates among input images, by perceptual hashes.

The hash of an image without much contrast depends on noise, so images with similar hashes must also have similar
thumbnails: uniform images of different colors, or blank pages with different marks, are not duplicates.
"""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image
from typing_extensions import Self

from moondream_cv.arguments import check_integer
from moondream_cv.errors import ImageError
from moondream_cv.images import opened_image, to_rgb, upright_image
from moondream_cv.labeling.errors import LabelingError
from moondream_cv.labeling.input_image import InputImage

MAX_DISTANCE = 32
"""Largest Hamming distance of hashes that can be asked for: half of their 64 bits, the mean of unrelated images."""

MAX_DIFFERENCE = 0.25
"""Maximum mean difference of the gray thumbnails of near-duplicates, relative to their contrast. Unrelated images have
about 1."""

MAX_COLOR_DIFFERENCE = 16
"""Maximum difference of the mean colors of near-duplicates in each channel, of 255."""

_THREADS = 4
_BATCH = 64  # images whose hashes are written at once
_DECODED_SIDE = 256  # pixels; JPEG files are decoded at the smallest size that is not below
_HASHED_SIDE = 64
_THUMBNAIL_SIDE = 16
_NOISE = 0.1  # mean difference, of 255, up to which thumbnails are equal, for uniform images


def find_duplicates(
    images: Sequence[InputImage],
    distance: int,
    hashes: Path,
    progress: Callable[[int, int], None] | None = None,
) -> dict[int, int]:
    """Return the images that nearly equal an earlier one, such as resized and re-encoded copies or frames of a burst.

    Images of input datasets and images that cannot be read are never near-duplicates.

    Args:
        images: Images.
        distance: Maximum Hamming distance of the perceptual hashes, 0 to `MAX_DISTANCE`.
        hashes: File of the hashes. After an interruption, the images in it are not read again.
        progress: Function that receives the number of hashed images, and their total.

    Returns:
        The index of the earlier image by the index of the near-duplicate. The earlier image is not a near-duplicate
        itself.

    Raises:
        LabelingError: The package imagehash is missing.
        OSError: The file cannot be written or read.
        ValueError: The distance is not an integer from 0 to `MAX_DISTANCE`.
    """
    check_integer("distance", distance, 0, MAX_DISTANCE)
    check_imagehash()
    _write_hashes(images, hashes, progress)
    with open(hashes, "rb") as file:
        return _find(images, (entry.hash for entry in _read_hashes(images, file)), distance)


def check_imagehash() -> None:
    """Check that the package imagehash is installed.

    Raises:
        LabelingError: It is missing.
    """
    try:
        import imagehash  # noqa: F401
    except ImportError as error:
        raise LabelingError(
            'near-duplicates need the package imagehash; pip install "moondream-cv[labeling]"'
        ) from error


class _Hash(NamedTuple):
    """Perceptual hash of an image.

    Attributes:
        bits: 64 bits.
        thumbnail: Gray pixels, `_THUMBNAIL_SIDE` ** 2 bytes.
        color: Mean color, 3 bytes in RGB.
    """

    bits: int
    thumbnail: bytes
    color: bytes

    @classmethod
    def of(cls, image: InputImage) -> Self | None:
        """Return the hash of an image; None if it cannot be read."""
        import imagehash

        try:
            source = image.open()
            if not isinstance(source, bytes) and not source.is_file():  # opening a pipe would wait for its writer
                return None
            with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
                small = _small(file, image.source)
        except (ImageError, OSError):
            return None
        bits = int(str(imagehash.phash(small)), 16)
        thumbnail = small.convert("L").resize((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE), Image.Resampling.BOX)
        return cls(bits, thumbnail.tobytes(), small.resize((1, 1), Image.Resampling.BOX).tobytes())

    def to_json(self) -> list[str]:
        return [f"{self.bits:016x}", base64.b64encode(self.thumbnail).decode(), self.color.hex()]

    @classmethod
    def from_json(cls, entry: list[str]) -> Self:
        """Return the hash of an entry that `to_json` wrote.

        Raises:
            ValueError: The entry is invalid.
        """
        bits, thumbnail, color = entry
        decoded = cls(int(bits, 16), base64.b64decode(thumbnail, validate=True), bytes.fromhex(color))
        if decoded.bits >= 2**64 or len(decoded.thumbnail) != _THUMBNAIL_SIDE**2 or len(decoded.color) != 3:
            raise ValueError("the hash has another size")
        return decoded


def _small(file: IO[bytes], name: str) -> Image.Image:
    """Return an upright image scaled to `_HASHED_SIDE` squared, in RGB."""
    with opened_image(file, name) as opened:
        opened.draft("RGB", (_DECODED_SIDE, _DECODED_SIDE))
        image = Image.fromarray(to_rgb(upright_image(opened, name)))
    return image.resize((_HASHED_SIDE, _HASHED_SIDE), Image.Resampling.BOX)


class _Entry(NamedTuple):
    """Line of the file of hashes.

    Attributes:
        hash: Hash of the image; None if it cannot be read.
        size: Number of bytes of the line.
    """

    hash: _Hash | None
    size: int


def _write_hashes(images: Sequence[InputImage], path: Path, progress: Callable[[int, int], None] | None) -> None:
    """Complete the file of hashes. It has a line per image, with its name and its hash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file, ThreadPoolExecutor(_THREADS) as executor:
        # Cut the file to the lines that are valid
        done = size = 0
        for entry in _read_hashes(images, file):
            done, size = done + 1, size + entry.size
        file.truncate(size)
        file.seek(0, os.SEEK_END)

        # Hash the other images
        for start in range(done, len(images), _BATCH):
            batch = images[start : start + _BATCH]
            found = executor.map(_Hash.of, batch)
            entries = [[image.name, *(one.to_json() if one else [])] for image, one in zip(batch, found, strict=True)]
            file.write("".join(json.dumps(entry) + "\n" for entry in entries).encode())
            file.flush()
            if progress is not None:
                progress(start + len(batch), len(images))


def _read_hashes(images: Sequence[InputImage], file: IO[bytes]) -> Iterator[_Entry]:
    """Yield the lines of a file, up to the first one that is invalid or of another image."""
    file.seek(0)
    for image, line in zip(images, file, strict=False):
        try:
            name, *entry = json.loads(line)
            if name != image.name or not line.endswith(b"\n"):
                return
            found = _Hash.from_json(entry) if entry else None
        except (ValueError, TypeError, AttributeError):
            return
        yield _Entry(found, len(line))


def _find(images: Sequence[InputImage], hashes: Iterable[_Hash | None], distance: int) -> dict[int, int]:
    """Compare each image with all earlier ones that are not near-duplicates."""
    kept: list[int] = []
    bits = np.zeros(len(images), np.uint64)
    thumbnails = np.zeros((len(images), _THUMBNAIL_SIDE**2), np.uint8)
    colors = np.zeros((len(images), 3), np.uint8)
    dropped = {}
    for index, (image, one) in enumerate(zip(images, hashes, strict=True)):
        if one is None:
            continue
        number = len(kept)
        bits[number] = one.bits
        thumbnails[number] = np.frombuffer(one.thumbnail, np.uint8)
        colors[number] = np.frombuffer(one.color, np.uint8)
        if image.given is None:
            near = np.flatnonzero(np.bitwise_count(bits[:number] ^ bits[number]) <= distance)
            is_similar = _similar_thumbnails(thumbnails[near], thumbnails[number])
            is_similar &= (np.abs(colors[near].astype(int) - colors[number]) <= MAX_COLOR_DIFFERENCE).all(axis=1)
            if is_similar.any():
                dropped[index] = kept[near[is_similar][0]]
                continue
        kept.append(index)
    return dropped


def _similar_thumbnails(thumbnails: npt.NDArray[np.uint8], other: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """Return which thumbnails, [N, P], nearly equal another one, [P], except for their brightness."""
    a, b = (values - values.mean(axis=-1, keepdims=True) for values in (thumbnails, other))
    difference = np.abs(a - b).mean(axis=1)
    contrast = np.abs(a).mean(axis=1) + np.abs(b).mean()
    similar: npt.NDArray[np.bool_] = difference <= np.maximum(MAX_DIFFERENCE * contrast, _NOISE)
    return similar
