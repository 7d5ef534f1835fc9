"""Folders and patterns of images, and iterables of frames, as sources."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Generator, Iterable, Sequence
from glob import glob, has_magic
from itertools import pairwise
from math import gcd
from pathlib import Path
from typing import Any

from moondream_cv.errors import ImageError, VideoError
from moondream_cv.images import IMAGE_SUFFIXES
from moondream_cv.video.sources.animations import frame_info
from moondream_cv.video.sources.base import FiniteSource, Source, TimedImage, to_bgr
from moondream_cv.video.sources.frame import Frame

_NUMBER = re.compile(r"%[0-9]*d")
_CONVERSION = re.compile(r"(%%|%[0-9]*d)")

logger = logging.getLogger(__name__)


def images_of(path: Path) -> list[Path] | None:
    """Return the images of a folder or a pattern, in natural order: img2 before img10.

    Args:
        path: Folder, without its subfolders; glob like frames/*.jpg, in which `**` matches any folders; or pattern with
            the frame number like frames/%04d.png, as in FFmpeg and OpenCV. `%d` is a number without leading zeros,
            `%04d` a number with at least four digits, and `%%` a percent sign. The first number is arbitrary. A warning
            is logged if numbers are missing in between.

    Returns:
        The paths of the images; None if the path is neither a folder nor a pattern.

    Raises:
        VideoError: There are no images.
    """
    if path.is_dir():
        found = [file for file in path.iterdir() if _is_image(file) and not file.name.startswith(".")]
        if not found:
            raise VideoError(f"{str(path)!r} contains no images; a folder needs files that end in {_suffixes()}")
        return sorted(found, key=natural_order)
    if path.exists():
        return None
    numbered = _NUMBER.search(_without_percent_signs(str(path)))
    if has_magic(str(path)):
        matches = [Path(match) for match in glob(str(path), recursive=True)]
        if matches or not numbered:
            return sorted(_images_only(path, matches), key=natural_order)
    if not numbered:
        return None
    files = _numbered_files(path)
    if not files and path.suffix.lower() not in IMAGE_SUFFIXES:
        return None  # the name of a missing video, such as "100%done.mp4"
    return _images_only(path, files)


def _images_only(pattern: Path, matches: Sequence[Path]) -> list[Path]:
    found = [file for file in matches if _is_image(file)]
    if found:
        return found
    if matches:
        content = f"{len(matches)} files, none of which ends in {_suffixes()}; pass one video at a time"
        raise VideoError(f"the pattern {str(pattern)!r} matches {content}")
    folder = pattern.parent
    if has_magic(str(folder)) or "%" in str(folder):
        raise VideoError(f"the pattern {str(pattern)!r} matches no file")
    if not folder.is_dir():
        raise VideoError(f"the pattern {str(pattern)!r} matches no file; there is no folder {str(folder)!r}")
    others = sorted((file for file in folder.iterdir() if _is_image(file)), key=natural_order)
    there = f"{len(others)} images, such as {others[0].name!r}" if others else "no images"
    raise VideoError(f"the pattern {str(pattern)!r} matches no file; the folder has {there}")


def _numbered_files(pattern: Path) -> list[Path]:
    """Return the files that match a pattern with a frame number, sorted by number.

    Raises:
        VideoError: The pattern has several numbers.
    """
    if len(_NUMBER.findall(_without_percent_signs(str(pattern)))) > 1:
        raise VideoError(
            f"the pattern {str(pattern)!r} has several numbers; use one %d, or a glob such as frames/*.png"
        )
    parts = pattern.parts
    level = next(i for i, part in enumerate(parts) if _NUMBER.search(_without_percent_signs(part)))
    literal = [part.replace("%%", "%") for part in parts]
    folder, rest = Path(*literal[:level]), literal[level + 1 :]
    name = _regex(parts[level])
    if not folder.is_dir():
        return []
    found: dict[int, Path] = {}
    for entry in folder.iterdir():
        match = name.fullmatch(entry.name)
        if match and (file := entry.joinpath(*rest)).is_file():
            found[int(match[1])] = file
    numbers = sorted(found)
    _warn_of_gaps(pattern, numbers)
    return [found[number] for number in numbers]


def _regex(part: str) -> re.Pattern[str]:
    """Return a regular expression for a component of a pattern, whose group is the number."""
    pieces = []
    for piece in _CONVERSION.split(part):
        conversion = _CONVERSION.fullmatch(piece)
        if conversion is None or piece == "%%":
            pieces.append(re.escape("%" if conversion else piece))
        else:
            width = int(piece[1:-1] or 0)
            pieces.append(f"([0-9]{{{width}}}|[1-9][0-9]{{{width},}})" if width else "(0|[1-9][0-9]*)")
    return re.compile("".join(pieces))


def _warn_of_gaps(pattern: Path, numbers: list[int]) -> None:
    if len(numbers) < 2:
        return
    steps = [after - before for before, after in pairwise(numbers)]
    step = gcd(*steps)  # a step of ten has no gaps
    missing = (numbers[-1] - numbers[0]) // step + 1 - len(numbers)
    if missing:
        first = numbers[next(i for i, length in enumerate(steps) if length > step)] + step
        logger.warning(
            "%r: gaps in the numbers from %d to %d, %d missing, the first is %d; the frames around a gap are "
            "consecutive",
            str(pattern), numbers[0], numbers[-1], missing, first,
        )  # fmt: skip


def _without_percent_signs(text: str) -> str:
    return text.replace("%%", "")


def natural_order(path: Path) -> tuple[list[tuple[int, int, str]], str]:
    """Return a sort key for a path that compares its numbers by value."""
    parts = re.split(r"([0-9]+)", path.as_posix().casefold())
    return [(0, int(part), "") if part.isdigit() and part.isascii() else (1, 0, part) for part in parts], str(path)


def open_images(files: list[Path], name: str, fps: float | None = None) -> FiniteSource:
    """Return a source of image files, one frame each. Files that cannot be read are skipped and counted as problems.

    Only the first frame of an animation or a TIFF with several pages is read, and a warning is logged.

    Args:
        files: Paths of the images, in order.
        name: Name of the source in messages.
        fps: Frames per second; default: `ASSUMED_FPS`.

    Raises:
        VideoError: No image can be read.
    """
    source = FiniteSource(lambda source: _converted(files, source, fps), name=name)
    source.frame_count = len(files)
    return source


def open_iterable(frames: Iterable[Any], fps: float | None = None) -> FiniteSource:
    """Return a source of the images or `Frame`s of an iterable. `Frame`s keep their times.

    Items that are not images are skipped and counted as problems. Errors of the iterable itself propagate.

    Args:
        frames: Images or `Frame`s.
        fps: Frames per second of images without times; default: `ASSUMED_FPS`.

    Raises:
        VideoError: The iterable has no images.
    """
    source = FiniteSource(lambda source: _converted(frames, source, fps), name=f"the {type(frames).__name__} of frames")
    source.can_prefetch = False
    if isinstance(frames, (list, tuple)):
        source.frame_count = len(frames)
    return source


def _converted(items: Iterable[Any], source: Source, fps: float | None) -> Generator[TimedImage, None, None]:
    first_error = None
    has_image = warned = False
    source.fps = fps
    for item in items:
        timed = TimedImage(item.image, item.time, item.duration) if isinstance(item, Frame) else TimedImage(item)
        try:
            bgr = to_bgr(timed.image)
        except ImageError as error:
            first_error = first_error or error
            source.record_problem(error)
            continue
        if not warned and isinstance(item, (str, os.PathLike)) and (info := frame_info(Path(item).expanduser())):
            warned = True
            logger.warning(
                "%s: only the first of %d frames of %s is read; pass the file itself to read all of them",
                source.name, info.total, item,
            )  # fmt: skip
        has_image = True
        yield timed._replace(image=bgr)
    if first_error and not has_image:
        raise VideoError(f"{source.name} has no frames that can be read: {first_error}") from first_error


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()


def _suffixes() -> str:
    *others, last = sorted(IMAGE_SUFFIXES)
    return f"{', '.join(others)} or {last}"
