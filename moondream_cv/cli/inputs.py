"""From the arguments of a command line to pictures: files, folders, globs and standard input.

What is missing or damaged is found when a picture is opened, so that one bad file does not stop the others.
"""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moondream_cv.errors import ImageError

if TYPE_CHECKING:
    from PIL import Image

STDIN = "-"


@dataclass(frozen=True)
class Picture:
    """An image that was asked for.

    Attributes:
        name: As the user wrote it, or the path that a folder or glob gave; "-" is standard input.
    """

    name: str

    @property
    def path(self) -> Path | None:
        """Where it lies; None for standard input."""
        return None if self.name == STDIN else Path(self.name).expanduser()

    def open(self) -> Image.Image:
        """Decode it, upright, in RGB.

        Raises:
            ImageError: It is missing, damaged, or not an image.
        """
        from PIL import Image

        from moondream_cv.images import to_rgb

        return Image.fromarray(to_rgb(_read_stdin() if self.name == STDIN else self.name))


def expand(arguments: Sequence[str]) -> list[Picture]:
    """Expand folders and globs, each in alphabetical order; other arguments stay what and where they are.

    Raises:
        ValueError: An argument is empty, a folder holds no images, or standard input is asked for and is a keyboard or
            named twice.
    """
    names = [name for argument in arguments for name in _expand_one(argument)]
    if STDIN in names:
        if names.count(STDIN) > 1:
            raise ValueError("- stands for standard input, which can be read only once")
        if sys.stdin is None or sys.stdin.isatty():
            raise ValueError("- reads an image from standard input, and nothing is piped in: try ... - < photo.jpg")
    return [Picture(name) for name in names]


def _expand_one(argument: str) -> list[str]:
    if not argument:
        raise ValueError("an image name is empty")
    path = Path(argument).expanduser()
    if argument == STDIN or "://" in argument or path.is_file():
        return [argument]
    if path.is_dir():
        found = sorted(os.path.join(argument, item.name) for item in path.iterdir() if _looks_like_image(item))
        if not found:
            from moondream_cv.images import IMAGE_SUFFIXES

            raise ValueError(f"the folder {argument} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
        return found
    if glob.has_magic(argument):  # a name that matches nothing is reported as missing, like any other
        return sorted(glob.glob(str(path), recursive=True)) or [argument]
    return [argument]


def _looks_like_image(path: Path) -> bool:
    from moondream_cv.images import IMAGE_SUFFIXES

    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()


def _read_stdin() -> bytes:
    content = sys.stdin.buffer.read()
    if not content:
        raise ImageError("standard input is empty; pipe an image into it")
    return content
