"""Input images of a command: files, folders, globs, URLs and standard input.

`InputImage.check` finds missing and damaged files before a model is loaded.
"""

from __future__ import annotations

import glob
import mimetypes
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

_MAX_EARLY_DOWNLOADS = 8  # images downloaded and kept in memory before the model is loaded


@dataclass
class InputImage:
    """An input image.

    Attributes:
        name: Argument of the command line, or a path from a folder or glob; "-" is standard input.
    """

    name: str
    _content: bytes | None = field(default=None, repr=False)

    @property
    def path(self) -> Path | None:
        """Path of the file; None for standard input and URLs."""
        return None if self.name == STDIN or is_url(self.name) else Path(os.path.expanduser(self.name))

    @property
    def title(self) -> str:
        """Name for messages; a URL is shown without user, password and query."""
        return shown_url(self.name) if is_url(self.name) else self.name

    def check(self, download: bool = False) -> None:
        """Check the image by its header, without decoding it. Standard input is read and kept.

        Args:
            download: Download a URL and keep its content; if False, only the syntax of the URL is checked.

        Raises:
            ImageError: The image is missing, cannot be read, or is not an image.
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
        """Return the decoded upright image in RGB, and release the content that `check` kept.

        Raises:
            ImageError: The image is missing, damaged, or not an image.
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
        if (mimetypes.guess_type(self.name)[0] or "").startswith("video/") and os.path.isfile(self.name):
            return ImageError(f"{self.name!r} is a video; use moondream-cv video, which reads its frames")
        return error


def expand_inputs(arguments: Sequence[str], recursive: bool = False) -> list[InputImage]:
    """Return the input images of a command, with folders and globs expanded in alphabetical order.

    Globs match as in a shell: folders among the matches are expanded as well, unless the glob contains `**`.

    Args:
        arguments: Files, folders, globs, URLs, or "-" for standard input.
        recursive: Include images in subfolders, except hidden ones.

    Raises:
        ValueError: An argument is empty, a folder contains no images, or standard input is repeated or is a terminal.
        ImageError: A folder cannot be read.
    """
    names = [name for argument in arguments for name in _expand_one(argument, recursive)]
    if STDIN in names:
        if names.count(STDIN) > 1:
            raise ValueError("- (standard input) must be given only once")
        if sys.stdin is None or sys.stdin.isatty():
            raise ValueError(
                "- reads an image from standard input, got a terminal; pipe an image in: ... - < photo.jpg"
            )
    return [InputImage(name) for name in names]


def is_multiple(arguments: Sequence[str], images: Sequence[InputImage]) -> bool:
    """Return whether a command has several images: more than one image, or a folder with any number of images."""
    return len(images) > 1 or any(os.path.isdir(os.path.expanduser(argument)) for argument in arguments)


def check_all(images: Sequence[InputImage]) -> dict[int, ImageError]:
    """Check all images before the model is loaded.

    The first 8 URLs are downloaded, so that an invalid URL is found before the weights are downloaded.

    Args:
        images: Input images.

    Returns:
        Errors by index of the image.
    """
    errors = {}
    downloads = 0
    for index, image in enumerate(images):
        download = is_url(image.name) and downloads < _MAX_EARLY_DOWNLOADS
        downloads += download
        try:
            image.check(download)
        except ImageError as error:
            errors[index] = error
    return errors


def _expand_one(argument: str, recursive: bool) -> list[str]:
    if not argument:
        raise ValueError("an image argument must not be empty; name a file, a folder, a URL or -")
    path = os.path.expanduser(argument)
    if argument == STDIN or is_url(argument) or os.path.isfile(path):
        return [argument]
    if os.path.isdir(path):
        return _images_in(argument, path, recursive)
    if glob.has_magic(argument):  # a pattern that matches nothing is reported as missing, like a file
        matches = sorted(glob.glob(path, recursive=True))
        names = []
        for match in matches:
            if not os.path.isdir(match):
                names.append(match)
            elif "**" not in argument:
                names += _images_in(match, match, recursive)
        return list(dict.fromkeys(names)) or [argument]
    return [argument]


def _images_in(name: str, path: str, recursive: bool) -> list[str]:
    """Return the paths of the images in a folder; each begins with the folder as given on the command line."""
    try:
        found = sorted(os.path.join(name, relative) for relative in _image_files(path, recursive))
    except OSError as error:
        raise ImageError(f"the folder {name!r} cannot be read: {error.strerror or error}") from error
    if found:
        return found
    from moondream_cv.images import IMAGE_SUFFIXES

    if not recursive and next(iter(_image_files(path, recursive=True)), None) is not None:
        raise ValueError(f"the folder {name} contains no images, but its subfolders do; add --recursive")
    raise ValueError(f"the folder {name} contains no images ({', '.join(sorted(IMAGE_SUFFIXES))})")


def _image_files(folder: str, recursive: bool) -> Iterator[str]:
    """Yield the relative paths of the image files in a folder; hidden files and folders are ignored."""

    def fail(error: OSError) -> None:
        if error.filename == folder or not recursive:
            raise error  # unreadable subfolders are skipped, as by `find`

    for place, folders, files in os.walk(folder, onerror=fail):
        folders[:] = sorted(name for name in folders if not name.startswith(".")) if recursive else []
        for file in files:
            if _has_image_suffix(os.path.join(place, file)):
                yield os.path.relpath(os.path.join(place, file), folder)


def _has_image_suffix(path: str) -> bool:
    from moondream_cv.images import IMAGE_SUFFIXES

    suffix = os.path.splitext(path)[1].lower()
    return suffix in IMAGE_SUFFIXES and not os.path.basename(path).startswith(".") and os.path.isfile(path)


def _read_stdin() -> bytes:
    content = sys.stdin.buffer.read()
    if not content:
        raise ImageError("standard input is empty; pipe an image into it")
    return content
