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
        path: A folder, without its subfolders; a glob like frames/*.jpg, in which `**` stands for any folders; or a
            pattern with the frame number like frames/%04d.png, as in FFmpeg and OpenCV: `%d` for a number without
            leading zeros, `%04d` for one with at least four digits, `%%` for a percent sign. The numbers may start
            anywhere; a warning is logged if some are missing in between.

    Returns:
        The images; None if the path is neither a folder nor a pattern.

    Raises:
        VideoError: There are none.
    """
    if path.is_dir():
        found = [file for file in path.iterdir() if _is_image(file) and not file.name.startswith(".")]
        if not found:
            raise VideoError(f"{str(path)!r} holds no images; a folder needs files that end in {_suffixes()}")
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
        what = f"{len(matches)} files, none of which ends in {_suffixes()}; videos are read one at a time"
        raise VideoError(f"the pattern {str(pattern)!r} matches {what}")
    folder = pattern.parent
    if has_magic(str(folder)) or "%" in str(folder):
        raise VideoError(f"the pattern {str(pattern)!r} matches no file")
    if not folder.is_dir():
        raise VideoError(f"the pattern {str(pattern)!r} matches no file; there is no folder {str(folder)!r}")
    others = sorted((file for file in folder.iterdir() if _is_image(file)), key=natural_order)
    there = f"{len(others)} images, such as {others[0].name!r}" if others else "no images"
    raise VideoError(f"the pattern {str(pattern)!r} matches no file; the folder has {there}")


def _numbered_files(pattern: Path) -> list[Path]:
    """Return the files that a pattern with a frame number matches, by number.

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
    """Return an expression for the names that a part of a pattern stands for; its group is the number."""
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
    step = gcd(*steps)  # of every tenth frame, none is missing
    missing = (numbers[-1] - numbers[0]) // step + 1 - len(numbers)
    if missing:
        first = numbers[next(i for i, length in enumerate(steps) if length > step)] + step
        logger.warning(
            "%r: gaps in the numbers from %d to %d, %d missing, the first is %d; the frames around a gap follow each "
            "other without a pause",
            str(pattern), numbers[0], numbers[-1], missing, first,
        )  # fmt: skip


def _without_percent_signs(text: str) -> str:
    return text.replace("%%", "")


def natural_order(path: Path) -> tuple[list[tuple[int, int, str]], str]:
    """Return what to sort a path by so that numbers in it count as numbers."""
    parts = re.split(r"([0-9]+)", path.as_posix().casefold())
    return [(0, int(part), "") if part.isdigit() and part.isascii() else (1, 0, part) for part in parts], str(path)


def open_images(files: list[Path], name: str, fps: float | None = None) -> FiniteSource:
    """Return a source of image files, one frame each. One that cannot be read counts as a problem and is skipped.

    Only the first frame of an animation or of a multi-page TIFF is read, with a warning.

    Args:
        files: The images, in order.
        name: Name of the source in messages.
        fps: Frames per second; None for `ASSUMED_FPS`.

    Raises:
        VideoError: None of them can be read.
    """
    source = FiniteSource(lambda source: _converted(files, source, fps), name=name)
    source.frame_count = len(files)
    return source


def open_iterable(frames: Iterable[Any], fps: float | None = None) -> FiniteSource:
    """Return a source of an iterable's images of any kind, or of its `Frame`s, whose times are kept.

    Items that are not images count as problems and are skipped; errors of the iterable itself are passed on.

    Args:
        frames: The images.
        fps: Frames per second of images without times; None for `ASSUMED_FPS`.

    Raises:
        VideoError: There is no image among them.
    """
    source = FiniteSource(lambda source: _converted(frames, source, fps), name=f"the {type(frames).__name__} of frames")
    source.ahead = False
    if isinstance(frames, (list, tuple)):
        source.frame_count = len(frames)
    return source


def _converted(items: Iterable[Any], source: Source, fps: float | None) -> Generator[TimedImage, None, None]:
    first_error = None
    given = warned = False
    source.fps = fps
    for item in items:
        timed = TimedImage(item.image, item.time, item.duration) if isinstance(item, Frame) else TimedImage(item)
        try:
            bgr = to_bgr(timed.image)
        except ImageError as error:
            first_error = first_error or error
            source.note_problem(error)
            continue
        if not warned and isinstance(item, (str, os.PathLike)) and (info := frame_info(Path(item).expanduser())):
            warned = True
            logger.warning(
                "%s: only the first of %d frames of %s is read; pass that file itself to read all of them",
                source.name, info.total, item,
            )  # fmt: skip
        given = True
        yield timed._replace(image=bgr)
    if first_error and not given:
        raise VideoError(f"{source.name} has no frames that can be read: {first_error}") from first_error


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()


def _suffixes() -> str:
    *others, last = sorted(IMAGE_SUFFIXES)
    return f"{', '.join(others)} or {last}"
