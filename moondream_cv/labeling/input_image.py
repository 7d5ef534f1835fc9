"""`InputImage`: an image to label, and the reading of its file or URL."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from moondream_cv.downloads import MAX_BYTES, download_image
from moondream_cv.errors import ImageError
from moondream_cv.labeling.records import LabeledObject
from moondream_cv.urls import is_url, shown_url


@dataclass(frozen=True, slots=True)
class InputImage:
    """An input image.

    Attributes:
        name: File name of the image in exports, with its suffix. Names are valid on all systems, and their stems are
            unique in the dataset, also if the case is ignored.
        source: Absolute path, path below the dataset folder with "/" (extracted frames), or URL. It does not depend on
            the working directory.
        split: "train", "valid" or "test" if the image is in this split of an input dataset.
        group: Name that the frames of a video share, since they must be in the same split.
        given: Objects of an input dataset. Their `xyxy` are fractions of the upright image, see `given_objects`. None:
            the image is not in an input dataset; an empty tuple: it contains no objects.
        dataset: Folder of the dataset that is written. Relative sources are below it.
    """

    name: str
    source: str
    split: str | None = None
    group: str | None = None
    given: tuple[LabeledObject, ...] | None = None
    dataset: Path = field(default=Path(), repr=False, compare=False)

    def open(self) -> Path | bytes:
        """Return the image in a type that `images.to_rgb` accepts; see `read_source`."""
        return read_source(self.source, self.dataset)

    def given_objects(self, width: int, height: int) -> tuple[LabeledObject, ...]:
        """Return the objects of the input dataset in pixels, rounded to 2 decimals.

        Args:
            width: Width of the upright image in pixels.
            height: Height of the upright image in pixels.
        """
        return tuple(
            replace(
                labeled,
                xyxy=(
                    round(labeled.xyxy[0] * width, 2),
                    round(labeled.xyxy[1] * height, 2),
                    round(labeled.xyxy[2] * width, 2),
                    round(labeled.xyxy[3] * height, 2),
                ),
            )
            for labeled in self.given or ()
        )


def read_source(source: str, dataset: Path) -> Path | bytes:
    """Return the path of an image file, or the content behind a URL.

    Args:
        source: Source of an `InputImage` or of an `ImageRecord`.
        dataset: Folder of the labeled dataset. Relative sources are below it.

    Returns:
        The path, which may not exist, or the bytes of the file. `images.to_rgb` accepts both.

    Raises:
        ImageError: The URL cannot be read.
    """
    if not is_url(source):
        return dataset / source
    if source.lower().startswith(("http://", "https://")):
        return download_image(source)
    try:
        from fsspec.core import url_to_fs

        files, path = url_to_fs(source)
        with files.open(path, "rb") as file:
            content: bytes = file.read(MAX_BYTES + 1)
    except Exception as error:  # file systems raise errors of their packages
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"{shown_url(source)!r} cannot be read: {reason[:200]}") from error
    if len(content) > MAX_BYTES:
        raise ImageError(f"{shown_url(source)!r} is larger than {MAX_BYTES:,} bytes; shrink the image")
    return content
