"""Folders and globs of images, and iterables of frames, as sources."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterable
from glob import glob, has_magic
from pathlib import Path
from typing import Any

from moondream_cv.errors import ImageError, VideoError
from moondream_cv.images import IMAGE_SUFFIXES
from moondream_cv.video.base import FiniteSource, Source, TimedImage, to_bgr
from moondream_cv.video.frame import Frame


def images_of(path: Path) -> list[Path] | None:
    """Return the images that a folder or a glob names, in natural order: img2 before img10.

    Args:
        path: A folder, whose subfolders do not count, or a pattern like frames/*.jpg; `**` stands for any folders.

    Returns:
        The images; None if the path is neither folder nor pattern.

    Raises:
        VideoError: There are none.
    """
    if path.is_dir():
        found = [file for file in path.iterdir() if _is_image(file)]
        if not found:
            raise VideoError(f"{str(path)!r} holds no images; a folder needs files that end in {_suffixes()}")
    elif has_magic(str(path)) and not path.exists():
        matches = [Path(match) for match in glob(str(path), recursive=True)]
        found = [file for file in matches if _is_image(file)]
        if not found:
            what = f"{len(matches)} files, none of which ends in {_suffixes()}" if matches else "no file"
            raise VideoError(f"the pattern {str(path)!r} matches {what}; videos are read one at a time")
    else:
        return None
    return sorted(found, key=natural_order)


def natural_order(path: Path) -> tuple[list[tuple[int, int, str]], str]:
    """Return what to sort a path by so that numbers in it count as numbers."""
    parts = re.split(r"([0-9]+)", path.as_posix().casefold())
    return [(0, int(part), "") if part.isdigit() and part.isascii() else (1, 0, part) for part in parts], str(path)


def open_images(files: list[Path], name: str) -> FiniteSource:
    """Return a source of image files. One that cannot be read counts as a problem and is skipped.

    Raises:
        VideoError: None of them can be read.
    """
    source = FiniteSource(lambda source: _converted(files, source), name=name)
    source.frame_count = len(files)
    return source


def open_iterable(frames: Iterable[Any]) -> FiniteSource:
    """Return a source of what an iterable gives: images of any kind, or `Frame`s, whose times are kept.

    What is not an image counts as a problem and is skipped; errors of the iterable itself are passed on.

    Raises:
        VideoError: There is no image among them.
    """
    source = FiniteSource(lambda source: _converted(frames, source), name=f"the {type(frames).__name__} of frames")
    source.ahead = False
    if isinstance(frames, (list, tuple)):
        source.frame_count = len(frames)
    return source


def _converted(items: Iterable[Any], source: Source) -> Generator[TimedImage, None, None]:
    first_error = None
    given = False
    for item in items:
        timed = TimedImage(item.image, item.time, item.duration) if isinstance(item, Frame) else TimedImage(item)
        try:
            bgr = to_bgr(timed.image)
        except ImageError as error:
            first_error = first_error or error
            source.note_problem(error)
            continue
        given = True
        yield timed._replace(image=bgr)
    if first_error and not given:
        raise VideoError(f"{source.name} has no frames that can be read: {first_error}") from first_error


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()


def _suffixes() -> str:
    *others, last = sorted(IMAGE_SUFFIXES)
    return f"{', '.join(others)} or {last}"
