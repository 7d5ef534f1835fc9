"""From the arguments of a command line to images: files, folders, globs, URLs and standard input.

Missing and damaged files are found by `Picture.check` before a model is loaded, and do not stop the other images.
"""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from moondream_cv.errors import ImageError
from moondream_cv.urls import is_url, shown_url

if TYPE_CHECKING:
    from PIL import Image

STDIN = "-"

_MAX_EARLY_DOWNLOADS = 8  # images that are downloaded and kept in memory before a model is loaded


@dataclass
class Picture:
    """An input image.

    Attributes:
        name: As the user wrote it, or the path that a folder or glob gave; "-" is standard input.
    """

    name: str
    _content: bytes | None = field(default=None, repr=False)

    @property
    def path(self) -> Path | None:
        """Path of the file; None for standard input and URLs."""
        return None if self.name == STDIN or is_url(self.name) else Path(os.path.expanduser(self.name))

    @property
    def title(self) -> str:
        """Name for messages: a URL without its user, password and query."""
        return shown_url(self.name) if is_url(self.name) else self.name

    def check(self, download: bool = False) -> None:
        """Check the image by its header, without decoding it. Standard input is read and kept.

        Args:
            download: Download a URL and keep its content; otherwise only the form of the URL is checked.

        Raises:
            ImageError: It is missing, cannot be read, or is not an image.
        """
        from moondream_cv.downloads import download_image
        from moondream_cv.images import check_image_file

        if self.name == STDIN:
            self._content = _read_stdin()
        elif is_url(self.name) and download:
            self._content = download_image(self.name)
        elif glob.has_magic(self.name) and not os.path.exists(os.path.expanduser(self.name)) and not is_url(self.name):
            raise ImageError(f"no file matches the pattern {self.name!r}")
        try:
            check_image_file(self.name if self._content is None else self._content)
        except ImageError as error:
            raise self._error(error) from error

    def open(self) -> Image.Image:
        """Decode the image, upright, in RGB. Content that `check` kept is released.

        Raises:
            ImageError: It is missing, damaged, or not an image.
        """
        from PIL import Image

        from moondream_cv.images import to_rgb

        content, self._content = self._content, None
        if content is None and self.name == STDIN:
            content = _read_stdin()
        try:
            return Image.fromarray(to_rgb(self.name if content is None else content))
        except ImageError as error:
            raise self._error(error) from error

    def _error(self, error: ImageError) -> ImageError:
        if self.name == STDIN:
            return ImageError(str(error).replace("the encoded image", "standard input", 1))
        if is_url(self.name):
            return ImageError(str(error).replace("the encoded image", f"the image at {self.title!r}", 1))
        return error


def expand(arguments: Sequence[str], recursive: bool = False) -> list[Picture]:
    """Expand folders and globs, each in alphabetical order; other arguments keep their place.

    A glob gives what a shell would give: the folders among its matches are expanded as well, unless it contains `**`.

    Args:
        arguments: Files, folders, globs, URLs, or "-" for standard input.
        recursive: Search the subfolders of folders too, except hidden ones.

    Raises:
        ValueError: An argument is empty, a folder contains no images, or standard input is named twice or is a
            terminal.
        ImageError: A folder cannot be read.
    """
    names = [name for argument in arguments for name in _expand_one(argument, recursive)]
    if STDIN in names:
        if names.count(STDIN) > 1:
            raise ValueError("- stands for standard input, which can be read only once")
        if sys.stdin is None or sys.stdin.isatty():
            raise ValueError("- reads an image from standard input, and nothing is piped in: try ... - < photo.jpg")
    return [Picture(name) for name in names]


def is_several(arguments: Sequence[str], pictures: Sequence[Picture]) -> bool:
    """Return whether a command is about several images: there is more than one, or a folder, whatever it contains."""
    return len(pictures) > 1 or any(os.path.isdir(os.path.expanduser(argument)) for argument in arguments)


def check_all(pictures: Sequence[Picture]) -> dict[int, ImageError]:
    """Check all images before a model is loaded.

    The first 8 URLs are downloaded, so that a wrong URL is found before the weights are downloaded; others later.

    Returns:
        The errors of those that fail, by index.
    """
    errors = {}
    downloads = 0
    for index, picture in enumerate(pictures):
        download = is_url(picture.name) and downloads < _MAX_EARLY_DOWNLOADS
        downloads += download
        try:
            picture.check(download)
        except ImageError as error:
            errors[index] = error
    return errors


def _expand_one(argument: str, recursive: bool) -> list[str]:
    if not argument:
        raise ValueError("an image argument is empty; name a file, a folder, a URL or -")
    path = os.path.expanduser(argument)
    if argument == STDIN or is_url(argument) or os.path.isfile(path):
        return [argument]
    if os.path.isdir(path):
        return _images_of(argument, path, recursive)
    if glob.has_magic(argument):  # a pattern that matches nothing is reported as missing, like a file
        matches = sorted(glob.glob(path, recursive=True))
        names = []
        for match in matches:
            if not os.path.isdir(match):
                names.append(match)
            elif "**" not in argument:
                names += _images_of(match, match, recursive)
        return list(dict.fromkeys(names)) or [argument]
    return [argument]


def _images_of(name: str, path: str, recursive: bool) -> list[str]:
    """Return the paths of a folder's images, each beginning with the folder's name as the user wrote it."""
    try:
        found = sorted(os.path.join(name, relative) for relative in _files_of(path, recursive))
    except OSError as error:
        raise ImageError(f"the folder {name!r} cannot be read: {error.strerror or error}") from error
    if found:
        return found
    from moondream_cv.images import IMAGE_SUFFIXES

    if not recursive and next(iter(_files_of(path, recursive=True)), None) is not None:
        raise ValueError(f"the folder {name} contains no images, but its subfolders do; add --recursive")
    raise ValueError(f"the folder {name} contains no images ({', '.join(sorted(IMAGE_SUFFIXES))})")


def _files_of(folder: str, recursive: bool) -> Iterator[str]:
    """Yield the relative paths of the image files in a folder; hidden files and folders are ignored."""

    def fail(error: OSError) -> None:
        if error.filename == folder or not recursive:
            raise error  # a subfolder that cannot be read is skipped, as `find` does

    for place, folders, files in os.walk(folder, onerror=fail):
        folders[:] = sorted(name for name in folders if not name.startswith(".")) if recursive else []
        for file in files:
            if _looks_like_image(os.path.join(place, file)):
                yield os.path.relpath(os.path.join(place, file), folder)


def _looks_like_image(path: str) -> bool:
    from moondream_cv.images import IMAGE_SUFFIXES

    suffix = os.path.splitext(path)[1].lower()
    return suffix in IMAGE_SUFFIXES and not os.path.basename(path).startswith(".") and os.path.isfile(path)


def _read_stdin() -> bytes:
    content = sys.stdin.buffer.read()
    if not content:
        raise ImageError("standard input is empty; pipe an image into it")
    return content
