"""The interface of export formats."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO, TYPE_CHECKING, Any, ClassVar

import numpy as np

from moondream_cv.labeling.exports.files import ExportFiles
from moondream_cv.labeling.records import ImageRecord, LabeledObject

if TYPE_CHECKING:
    import supervision as sv


@dataclass(frozen=True)
class ExportSettings:
    """Settings of a dataset that formats use.

    Attributes:
        class_names: Class names, in the order of their IDs.
        num_images: Number of images by split, without empty splits, in the order of the splits.
        has_points: Whether an object is a point.
        image_url: Prefix of image URLs in formats that refer to images by URL. The quoted path is appended.
    """

    class_names: Sequence[str]
    num_images: Mapping[str, int]
    has_points: bool
    image_url: str


class DatasetWriter(contextlib.ExitStack):
    """Writes the labels of a dataset. Use it in a `with` statement.

    Attributes:
        has_points: Whether the format has points.
        settings: Settings of the dataset.
    """

    has_points: ClassVar[bool] = False

    def __init__(self, settings: ExportSettings) -> None:
        super().__init__()
        self.settings = settings
        self.class_ids = {name: index for index, name in enumerate(settings.class_names)}

    def image_path(self, split: str, image: str) -> str:
        """Return the path of an image, relative to the folder of the dataset."""
        return f"{split}/{image}"

    def label_path(self, split: str, image: str) -> str | None:
        """Return the path of the label file of an image; None if the format has files for many images only."""
        return None

    def shared_paths(self) -> list[str]:
        """Return the paths of the files for many images."""
        return []

    def open(self, files: ExportFiles) -> None:
        """Write the files for the whole dataset, and open those to which `write` appends.

        Args:
            files: Files of the export.
        """

    def write(self, files: ExportFiles, split: str, image: str, record: ImageRecord) -> None:
        """Write the labels of an image.

        Args:
            files: Files of the export.
            split: Split of the image.
            image: Name of the image in the export.
            record: Record of the image.
        """
        raise NotImplementedError

    def detections(self, objects: Sequence[LabeledObject]) -> sv.Detections:
        """Return boxes as supervision's converters accept them."""
        import supervision as sv

        if not objects:
            return sv.Detections.empty()
        ids = [self.class_ids[labeled.class_name] for labeled in objects]
        return sv.Detections(np.array([labeled.xyxy for labeled in objects], np.float64), class_id=np.array(ids))


class JsonItems:
    """Writes the items of a JSON array one by one, without the brackets.

    Attributes:
        count: Number of items.
    """

    def __init__(self, file: IO[str]) -> None:
        self.count = 0
        self._file = file

    def append(self, item: Any) -> None:
        """Write an item in a new line."""
        self._file.write(f"{',' if self.count else ''}\n{to_json(item)}")
        self.count += 1


def to_json(value: Any) -> str:
    """Return a value as JSON in one line."""
    return json.dumps(value, ensure_ascii=False)


def with_suffix(image: str, suffix: str) -> str:
    """Return the name of an image with another suffix."""
    return PurePosixPath(image).stem + suffix
