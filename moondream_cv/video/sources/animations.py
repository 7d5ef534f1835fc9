"""Image files with several frames: animations with their durations, and the pages of a TIFF or HEIF file.

Pillow decodes them one frame at a time, under the limits of `images`. FFmpeg reads no animated WebP, and only the first
frame of an animated AVIF. Still images are left to `images_folder`.
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
_PAGED = ("TIFF", "HEIF")

_SHORTEST_DURATION = 0.01  # seconds; browsers show frames of at most this for _REPLACEMENT_DURATION
_REPLACEMENT_DURATION = 0.1
_REDUCED_OR_MASK = 0b101  # bits of a TIFF page's NewSubfileType: a thumbnail, or a transparency mask
_NEW_SUBFILE_TYPE = 254

MIN_FPS = 0.001
"""Lowest frame rate that a video can be written with."""

logger = logging.getLogger(__name__)


class FrameInfo(NamedTuple):
    """The frames of an image file, as its headers describe them.

    Attributes:
        format: Pillow's name of the format.
        frames: Numbers of the first two frames of the sequence. The first is not always 0: browsers do not show the
            default image of an APNG that is not a part of the animation.
        total: Number of frames, thumbnails among the pages of a TIFF included.
    """

    format: str
    frames: tuple[int, ...]
    total: int

    @property
    def is_timed(self) -> bool:
        """Whether the frames have durations."""
        return self.format in _ANIMATED


def image_format(path: Path) -> str | None:
    """Return Pillow's name of a file's format if it is one that may hold several frames; None for others.

    It is recognized by the file's first bytes, whatever its name is; a TIFF also by its suffix, since the raw files of
    cameras begin with the same bytes. A file that cannot be read has no format.
    """
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError:  # opening it as a video reports it
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
    """Return the description of an image file's frames; None if it has only one or is not readable as an image."""
    try:
        kind = image_format(path)
        if kind not in readable_formats():
            return None
        with path.open("rb") as file, opened_image(file, repr(str(path))) as picture:
            if kind == "GIF":
                total = len(_durations(path, kind))  # Pillow's own count fails if the file is cut off
            else:
                total = _page_count(picture) if kind == "TIFF" else int(getattr(picture, "n_frames", 1))
            frames = tuple(itertools.islice(_numbers(picture, total), 2)) if total > 1 else (0,)
    except (ImageError, OSError):
        return None  # reading the first frame reports it
    return FrameInfo(str(kind), frames, total) if len(frames) > 1 else None


def open_animation(path: Path, info: FrameInfo, name: str, fps: float | None = None) -> FiniteSource:
    """Return a source of all frames of an image file, decoded one at a time.

    Animations have the times of their durations; 10 ms or less count as 100 ms, as in browsers. Transparent ones are
    shown on white. Pages have no times, and are shown like separate images.

    Args:
        path: The file.
        info: From `frame_info`.
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
    seconds, given = 0.0, 0
    try:
        with path.open("rb") as file, opened_image(file, source.name) as picture:
            for number in _numbers(picture, total):
                picture.seek(number)
                image = _on_white(upright_image(picture, source.name))
                duration = _shown_for(picture.info.get("duration"), picture.format)
                yield TimedImage(to_bgr(image), seconds, duration)
                seconds, given = seconds + duration, given + 1
    except (ImageError, OSError) as error:
        if not given:
            raise VideoError(f"{source.name} has no frames that can be read: {error}") from error
        source.problems += 1  # later frames are drawn on the earlier ones, so there is no going on
        logger.warning("%s ends after %d of %s frames: %s", source.name, given, source.frame_count, error)


def _pages(path: Path, total: int, source: Source) -> Generator[TimedImage, None, None]:
    first_error: Exception | None = None
    given = False
    with path.open("rb") as file, opened_image(file, source.name) as picture:
        for number in _numbers(picture, total):
            try:
                with decoding_errors(f"page {number + 1} of {source.name}"):
                    picture.seek(number)
                    image = to_bgr(upright_image(picture, f"page {number + 1} of {source.name}"))
            except ImageError as error:
                first_error = first_error or error
                source.note_problem(error)
                continue
            given = True
            yield TimedImage(image)
    if not given:
        raise VideoError(f"{source.name} has no frames that can be read: {first_error}") from first_error


def _numbers(picture: Image.Image, total: int) -> Iterator[int]:
    """Yield the numbers of the frames that belong to the sequence, among all in the file."""
    for number in range(1 if getattr(picture, "default_image", False) else 0, total):
        if picture.format != "TIFF" or not _is_reduced_or_mask(picture, number):
            yield number


def _is_reduced_or_mask(picture: Image.Image, number: int) -> bool:
    try:
        picture.seek(number)
    except Exception:  # of a damaged page, whose reading reports it
        return False
    kind = getattr(picture, "tag_v2", {}).get(_NEW_SUBFILE_TYPE, 0)
    return isinstance(kind, int) and bool(kind & _REDUCED_OR_MASK)


def _page_count(picture: Image.Image) -> int:
    """Return the number of pages of a TIFF up to the first damaged one, which is included."""
    for count in itertools.count(1):
        try:
            picture.seek(count)
        except EOFError:
            return count
        except Image.DecompressionBombError:  # too large, and reported when it is read; the directory is intact
            continue
        except Exception:  # whatever a damaged directory makes Pillow raise
            return count + 1
    raise AssertionError("counting has no end")


def _on_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image
    rgba = image.convert("RGBA")
    if rgba.getchannel("A").getextrema() == (255, 255):
        return rgba.convert("RGB")
    canvas = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    return Image.alpha_composite(canvas, rgba).convert("RGB")


def _shown_for(milliseconds: float | None, kind: str | None) -> float:
    """Return the seconds for which browsers show a frame of this duration. In AVIF, any duration above 0 is kept."""
    seconds = float(milliseconds or 0) / 1000
    return seconds if seconds > (0 if kind == "AVIF" else _SHORTEST_DURATION) else _REPLACEMENT_DURATION


# Durations before decoding, for the average frame rate: Pillow reads a frame's duration when it decodes the frame.


def _average_fps(path: Path, kind: str) -> float | None:
    """Return the frames per second of an animation; None if it is below `MIN_FPS`, and for AVIF."""
    durations = [_shown_for(duration, kind) for duration in _durations(path, kind)]
    average = len(durations) / sum(durations) if durations else 0.0
    return average if average >= MIN_FPS else None


def _durations(path: Path, kind: str) -> list[float]:
    """Return the milliseconds of each frame as its container has them, as far as it is intact; empty for AVIF."""
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
    """Skip the blocks of a GIF's extension or image, and return the first one."""
    first = file.read(file.read(1)[0])
    if first:
        while size := file.read(1)[0]:
            file.seek(size, 1)
    return first


def _color_table(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _size(head: bytes) -> int:
    return int.from_bytes(head[:4], "big")
