"""Labels of input folders that are datasets: COCO, YOLO and VOC folders, and the output of an earlier labeling."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from moondream_cv.dataset_layouts import DatasetError, UnknownLayoutError, read_labels
from moondream_cv.labeling.errors import LabelingError
from moondream_cv.labeling.export_names import export_name
from moondream_cv.labeling.input_image import InputImage
from moondream_cv.labeling.layout import LABELS, SETTINGS
from moondream_cv.labeling.records import ImageRecord, LabeledObject, read_records
from moondream_cv.urls import is_url


class GivenLabels(NamedTuple):
    """Labels of an image in a dataset.

    Attributes:
        split: "train", "valid" or "test".
        objects: Objects. Their boxes are fractions of the image.
    """

    split: str
    objects: tuple[LabeledObject, ...]


def read_given_labels(folder: str) -> dict[str, GivenLabels] | None:
    """Return the labels of a COCO, YOLO or VOC folder by the absolute path of the image; None for another folder.

    An image that is in several splits is only returned for the first of train, valid and test.

    Args:
        folder: Path of the folder.

    Raises:
        LabelingError: A file with labels cannot be read.
    """
    try:
        labels = read_labels(Path(folder), for_training=False)
    except UnknownLayoutError:
        return None
    except DatasetError as error:
        raise LabelingError(str(error)) from error
    found: dict[str, GivenLabels] = {}
    for split in ("train", "valid", "test"):
        for image in labels.splits.get(split, ()):
            objects = [LabeledObject(name, box, None, "given") for name, boxes in image.boxes.items() for box in boxes]
            found.setdefault(os.path.abspath(image.path), GivenLabels(split, tuple(objects)))
    return found


def is_labeled_dataset(folder: str) -> bool:
    """Return whether a folder was written by labeling.

    Args:
        folder: Path of the folder.
    """
    return all(os.path.isfile(os.path.join(folder, name)) for name in (LABELS, SETTINGS))


def read_labeled_dataset(folder: str, dataset: Path) -> list[InputImage]:
    """Return the images of a dataset that labeling has written, with their names and objects.

    Near-duplicates and images that failed are left out. If the source of an image does not exist anymore, the exported
    image is used.

    Args:
        folder: Path of the folder.
        dataset: Folder of the dataset that is written.

    Raises:
        LabelingError: The labels cannot be read.
    """
    exported: dict[str, str] | None = None
    images = []
    for record in read_records(Path(folder) / LABELS):
        if not record.is_exported:
            continue
        source = record.source if is_url(record.source) else os.path.abspath(os.path.join(folder, record.source))
        if not is_url(source) and not os.path.exists(source):
            exported = _exported_images(folder) if exported is None else exported
            source = exported.get(record.image, source)
        given = tuple(_fractions(one, record) for one in record.objects)
        name = export_name(record.image, source)
        images.append(InputImage(name, source, record.split, record.group, given, dataset))
    return images


def _fractions(labeled: LabeledObject, record: ImageRecord) -> LabeledObject:
    """Return an object with its box as fractions of the image."""
    x_min, y_min, x_max, y_max = labeled.xyxy
    box = (x_min / record.width, y_min / record.height, x_max / record.width, y_max / record.height)
    return replace(labeled, xyxy=box)


def _exported_images(folder: str) -> dict[str, str]:
    """Return the absolute paths of all files of a dataset by file name."""
    paths = (os.path.join(place, name) for place, _, names in os.walk(folder) for name in names)
    return {os.path.basename(path): os.path.abspath(path) for path in paths}
