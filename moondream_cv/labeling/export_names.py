"""Names of images in exports: valid on all systems, and unique without their suffix."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from moondream_cv.escaping import escaped
from moondream_cv.labeling.errors import LabelingError
from moondream_cv.labeling.file_listing import shown
from moondream_cv.labeling.input_image import InputImage
from moondream_cv.urls import is_url

MAX_NAME_BYTES = 240
"""Maximum length of a name in UTF-8. File systems allow 255, and files with labels have longer suffixes."""

_RESERVED = re.compile(r"(?:con|prn|aux|nul|com[0-9]|lpt[0-9])(?:\.|$)", re.IGNORECASE)
_INVALID = re.compile(r'[<>:"|?*\\]')


def export_name(relative: str, source: str) -> str:
    """Return the name of an image in exports: its relative path with "__" for "/".

    Characters that Windows does not allow become "_".

    Args:
        relative: Path of the image below its input folder, with "/".
        source: Path or URL of the image, for messages.

    Raises:
        LabelingError: The name contains control characters, or is too long; or the path is not text in UTF-8.
    """
    if source.encode(errors="replace").decode() != source:
        raise LabelingError(f"the path {shown(source)} is not text in UTF-8; rename its folders and the file")
    if escaped(relative) != relative:
        raise LabelingError(f"the name of {shown(source)} contains control characters; rename the file")
    name = _INVALID.sub("_", relative.replace("/", "__"))
    if name.startswith(".") or _RESERVED.match(name):
        name = f"_{name}"
    num_bytes = len(name.encode())
    if num_bytes > MAX_NAME_BYTES:
        raise LabelingError(
            f"the name of {shown(source)} in the dataset would have {num_bytes} bytes, more than {MAX_NAME_BYTES}; "
            "rename the file, or give its folder as the input"
        )
    return name


def name_key(name: str) -> str:
    """Return the part of a name that must be unique: the stem, without case, in one Unicode form.

    Args:
        name: File name.
    """
    return unicodedata.normalize("NFC", os.path.splitext(name)[0]).casefold()


def check_unique_names(images: Iterable[InputImage]) -> None:
    """Check that no two images have the same stem, since files with labels have the stem of their image.

    Args:
        images: Images.

    Raises:
        LabelingError: Two stems are equal except for case. The message names both files.
    """
    known: dict[str, InputImage] = {}
    for image in images:
        other = known.setdefault(name_key(image.name), image)
        if other is not image:
            raise LabelingError(
                f"{shown(other.source)} and {shown(image.source)} would have the same name in the dataset, "
                f"{shown(os.path.splitext(image.name)[0])}; {_remedy(other.source, image.source)}"
            )


def _remedy(first: str, second: str) -> str:
    if not is_url(first) and not is_url(second):
        folders = [os.path.dirname(first), os.path.dirname(second)]
        if folders[0] != folders[1] and (common := _common(folders)):
            return f"rename one of them, or give the folder {shown(common)} as the input"
    return "rename one of them"


def _common(folders: Sequence[str]) -> str:
    """Return the folder that contains several absolute folders; empty if it is a root or does not exist."""
    try:
        common = Path(os.path.commonpath(folders))
    except ValueError:  # different drives
        return ""
    return "" if common == Path(common.anchor) else str(common)
