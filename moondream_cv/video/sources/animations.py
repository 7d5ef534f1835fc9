"""Image files with several frames: animations with durations, and the pages of TIFF and HEIF files.

Pillow decodes them one frame at a time, with the size limits of `images`. FFmpeg cannot read animated WebP, and reads
only the first frame of an animated AVIF. `image_folder` reads still images.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import struct
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import IO, NamedTuple

from PIL import Image

from moondream_cv.errors import ImageError, VideoError
from moondream_cv.images import decoding_errors, opened_image, readable_formats, upright_image
from moondream_cv.video.sources.base import FiniteSource, Source, TimedImage, to_bgr

_ANIMATED = ("GIF", "PNG", "WEBP", "AVIF")

_SHORTEST_DURATION = 0.01  # seconds; browsers replace durations up to this by _REPLACEMENT_DURATION
_REPLACEMENT_DURATION = 0.1
_REDUCED_OR_MASK = 0b101  # bits of a TIFF page's NewSubfileType: a thumbnail, or a transparency mask
_NEW_SUBFILE_TYPE = 254

MIN_FPS = 0.001
"""Lowest frame rate that a video can be written with."""

logger = logging.getLogger(__name__)


class FrameInfo(NamedTuple):
    """Frames of an image file according to its headers.

    Attributes:
        format: Pillow's name of the format.
        frames: Indices of the first two frames. The first one is not always 0: an APNG may have a default image that is
            not part of the animation.
        total: Number of frames, including thumbnails among the pages of a TIFF.
    """

    format: str
    frames: tuple[int, ...]
    total: int

    @property
    def is_timed(self) -> bool:
        """Whether the frames have durations."""
        return self.format in _ANIMATED


def image_format(path: Path) -> str | None:
    """Return Pillow's name of the format of a file that may have several frames; None for other files.

    The format is recognized by the first bytes of the file. A TIFF must also have its suffix, since raw camera files
    start with the same bytes. The result is None for a file that cannot be read.
    """
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError:  # reported when the file is opened as a video
        return None
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if head[:6] in (b"GIF87a", b"GIF89a"):
        return "GIF"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+") and path.suffix.lower() in (".tif", ".tiff"):
        return "TIFF"
    if head[4:8] == b"ftyp":
        brands = [head[8:12], *(head[start : start + 4] for start in range(16, min(64, _size(head)), 4))]
        if brands[0] in (b"avif", b"avis") or (brands[0] in (b"mif1", b"msf1") and {b"avif", b"avis"} & {*brands}):
            return "AVIF"
        if brands[0] in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"):
            return "HEIF"
    return None


def frame_info(path: Path) -> FrameInfo | None:
    """Return the frames of an image file; None if it has one frame or is not a readable image."""
    try:
        kind = image_format(path)
        if kind not in readable_formats():
            return None
        with path.open("rb") as file, opened_image(file, repr(str(path))) as image_file:
            if kind == "GIF":
                total = len(_durations(path, kind))  # Pillow cannot count the frames of a truncated file
            else:
                total = _page_count(image_file) if kind == "TIFF" else int(getattr(image_file, "n_frames", 1))
            frames = tuple(itertools.islice(_numbers(image_file, total), 2)) if total > 1 else (0,)
    except (ImageError, OSError):
        return None  # reported when the first frame is read
    return FrameInfo(str(kind), frames, total) if len(frames) > 1 else None


def open_animation(path: Path, info: FrameInfo, name: str, fps: float | None = None) -> FiniteSource:
    """Return a source of all frames of an image file, decoded one at a time.

    The times of an animation follow from its durations; durations up to 10 ms become 100 ms, as in browsers.
    Transparent frames get a white background. Pages have no times, like separate images.

    Args:
        path: Path of the file.
        info: Result of `frame_info`.
        name: Name of the source in messages.
        fps: Frames per second of pages; ignored for animations.

    Raises:
        VideoError: No frame can be read.
    """
    read = _animation if info.is_timed else _pages

    def frames(source: Source) -> Generator[TimedImage, None, None]:
        source.fps = _average_fps(path, info.format) if info.is_timed else fps
        source.frame_count = info.total - info.frames[0]
        try:
            yield from read(path, info.total, source)
        except (ImageError, OSError) as error:
            raise VideoError(f"{name} cannot be read: {error}") from error

    return FiniteSource(frames, name=name)


def _animation(path: Path, total: int, source: Source) -> Generator[TimedImage, None, None]:
    seconds, count = 0.0, 0
    try:
        with path.open("rb") as file, opened_image(file, source.name) as image_file:
            for number in _numbers(image_file, total):
                image_file.seek(number)
                image = _on_white(upright_image(image_file, source.name))
                duration = _shown_for(image_file.info.get("duration"), image_file.format)
                yield TimedImage(to_bgr(image), seconds, duration)
                seconds, count = seconds + duration, count + 1
    except (ImageError, OSError) as error:
        if not count:
            raise VideoError(f"{source.name} has no frames that can be read: {error}") from error
        source.problems += 1  # later frames build on earlier ones, so reading ends here
        logger.warning("%s ends after %d of %s frames: %s", source.name, count, source.frame_count, error)


def _pages(path: Path, total: int, source: Source) -> Generator[TimedImage, None, None]:
    first_error: Exception | None = None
    has_page = False
    with path.open("rb") as file, opened_image(file, source.name) as image_file:
        for number in _numbers(image_file, total):
            try:
                with decoding_errors(f"page {number + 1} of {source.name}"):
                    image_file.seek(number)
                    image = to_bgr(upright_image(image_file, f"page {number + 1} of {source.name}"))
            except ImageError as error:
                first_error = first_error or error
                source.record_problem(error)
                continue
            has_page = True
            yield TimedImage(image)
    if not has_page:
        raise VideoError(f"{source.name} has no frames that can be read: {first_error}") from first_error


def _numbers(image_file: Image.Image, total: int) -> Iterator[int]:
    """Yield the indices of the frames that belong to the sequence."""
    for number in range(1 if getattr(image_file, "default_image", False) else 0, total):
        if image_file.format != "TIFF" or not _is_reduced_or_mask(image_file, number):
            yield number


def _is_reduced_or_mask(image_file: Image.Image, number: int) -> bool:
    try:
        image_file.seek(number)
    except Exception:  # a damaged page, reported when it is read
        return False
    kind = getattr(image_file, "tag_v2", {}).get(_NEW_SUBFILE_TYPE, 0)
    return isinstance(kind, int) and bool(kind & _REDUCED_OR_MASK)


def _page_count(image_file: Image.Image) -> int:
    """Return the number of pages of a TIFF, up to and including the first damaged one."""
    for count in itertools.count(1):
        try:
            image_file.seek(count)
        except EOFError:
            return count
        except Image.DecompressionBombError:  # too large, reported when it is read; the directory is intact
            continue
        except Exception:  # a damaged directory makes Pillow raise various errors
            return count + 1
    raise AssertionError("unreachable")


def _on_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image
    rgba = image.convert("RGBA")
    if rgba.getchannel("A").getextrema() == (255, 255):
        return rgba.convert("RGB")
    canvas = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    return Image.alpha_composite(canvas, rgba).convert("RGB")


def _shown_for(milliseconds: float | None, kind: str | None) -> float:
    """Return the duration in seconds that browsers use. In AVIF, they keep all durations above 0."""
    seconds = float(milliseconds or 0) / 1000
    return seconds if seconds > (0 if kind == "AVIF" else _SHORTEST_DURATION) else _REPLACEMENT_DURATION


# The average frame rate is needed before decoding, and Pillow reads durations while decoding. So parse the file.


def _average_fps(path: Path, kind: str) -> float | None:
    """Return the frames per second of an animation; None if it is below `MIN_FPS`, and for AVIF."""
    durations = [_shown_for(duration, kind) for duration in _durations(path, kind)]
    average = len(durations) / sum(durations) if durations else 0.0
    return average if average >= MIN_FPS else None


def _durations(path: Path, kind: str) -> list[float]:
    """Return the duration of each frame in milliseconds, up to the first damage; empty for AVIF."""
    scan = {"GIF": _gif_durations, "PNG": _png_durations, "WEBP": _webp_durations}.get(kind)
    durations: list[float] = []
    if scan is not None:
        with path.open("rb") as file, contextlib.suppress(struct.error, IndexError):
            for duration in scan(file):
                durations.append(duration)
    return durations


def _webp_durations(file: IO[bytes]) -> Iterator[float]:
    file.seek(12)
    while len(header := file.read(8)) == 8:
        kind, size = struct.unpack("<4sI", header)
        content = file.read(min(size, 16))
        if kind == b"ANMF":
            yield int.from_bytes(content[12:15], "little")
        file.seek(size + size % 2 - len(content), 1)


def _png_durations(file: IO[bytes]) -> Iterator[float]:
    file.seek(8)
    while len(header := file.read(8)) == 8:
        size, kind = struct.unpack(">I4s", header)
        content = file.read(min(size, 26))
        if kind == b"fcTL":
            numerator, denominator = struct.unpack(">HH", content[20:24])
            yield 1000 * numerator / (denominator or 100)
        file.seek(size + 4 - len(content), 1)


def _gif_durations(file: IO[bytes]) -> Iterator[float]:
    file.seek(10)
    flags = file.read(3)[0]
    file.seek(_color_table(flags), 1)
    delay = 0
    while (kind := file.read(1)) in (b"!", b","):  # an extension, an image
        if kind == b"!":
            label = file.read(1)
            first = _skip_blocks(file)
            if label == b"\xf9":
                (delay,) = struct.unpack("<xHx", first)
        else:
            yield 10 * delay
            delay = 0
            file.seek(_color_table(file.read(9)[8]) + 1, 1)
            _skip_blocks(file)


def _skip_blocks(file: IO[bytes]) -> bytes:
    """Skip the blocks of an extension or an image of a GIF, and return the first block."""
    first = file.read(file.read(1)[0])
    if first:
        while size := file.read(1)[0]:
            file.seek(size, 1)
    return first


def _color_table(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _size(head: bytes) -> int:
    return int.from_bytes(head[:4], "big")
