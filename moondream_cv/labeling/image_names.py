"""Find images by the names that labeling tools give them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath
from urllib.parse import unquote

from moondream_cv.labeling.exports.images import exported_name

_UPLOAD_PREFIX = re.compile(r"^[0-9a-f]{8}-")  # Label Studio adds it to uploaded files
_ROBOFLOW_SUFFIX = re.compile(r"_[A-Za-z0-9]+\.rf\.[0-9A-Za-z]+$")  # "street_jpg.rf.0a1b..." for "street.jpg"


class ImageIndex:
    """Finds the images of a dataset by name.

    Tools change names: they remove folders or keep them, add prefixes and hashes, and replace characters. The forms of
    a name are tried in order, and a form with several images finds none.
    """

    def __init__(self, images: Iterable[str]) -> None:
        """Index images.

        Args:
            images: Names of the images in `labels.jsonl`.
        """
        self._images: dict[str, set[str]] = {}
        for image in images:
            exported = exported_name(image)
            for form in {image, exported, _stem(exported), _loose(_stem(exported))}:
                self._images.setdefault(form, set()).add(image)

    def find(self, name: str) -> str | None:
        """Return the image with a name, path or URL path; None if there is no such image, or if it is ambiguous.

        Args:
            name: Name, path or URL path, with "/".
        """
        for form in _forms(name):
            found = self._images.get(form, ())
            if len(found) == 1:
                return next(iter(found))
        return None


def _forms(name: str) -> Iterator[str]:
    """Yield the names of images that a tool may have changed to this name, the most likely first."""
    paths = [name] if unquote(name) == name else [name, unquote(name)]
    for path in paths:
        parts = [part for part in PurePosixPath(path).parts if part != "/"]
        for start in range(len(parts)):  # the folders of the input are a part of the name, joined by "__"
            joined = "__".join(parts[start:])
            yield joined
            yield _stem(joined)
    stems = []
    for path in paths:
        stem = _stem(PurePosixPath(path).name)
        uploaded = _UPLOAD_PREFIX.sub("", stem)
        stems += [uploaded, _ROBOFLOW_SUFFIX.sub("", stem), _ROBOFLOW_SUFFIX.sub("", uploaded)]
    yield from stems
    yield from map(_loose, stems)


def _stem(name: str) -> str:
    return PurePosixPath(name).stem


def _loose(stem: str) -> str:
    """Return the letters and digits of a name. Tools replace or remove other characters."""
    return "loose:" + "".join(letter for letter in stem.casefold() if letter.isalnum())
