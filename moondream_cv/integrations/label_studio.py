"""Label Studio: labels as predictions for a review, and reviewed annotations.

`moondream-cv label --format label-studio` writes the same files next to copies of the images, and `--merge` reads
annotations. These functions are for images that Label Studio loads from another place.

Example:
    >>> from moondream_cv.integrations.label_studio import write_tasks
    >>> write_tasks("dataset", "tasks.json", lambda record: record.source)  # doctest: +SKIP
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

from moondream_cv.durable_files import open_replacement
from moondream_cv.labeling.errors import LabelingError
from moondream_cv.labeling.exports import read_manifest
from moondream_cv.labeling.exports.export import IMAGE_URL
from moondream_cv.labeling.exports.label_studio import label_config, to_task
from moondream_cv.labeling.exports.writer import JsonItems
from moondream_cv.labeling.layout import LABELS
from moondream_cv.labeling.records import ImageRecord, read_records
from moondream_cv.labeling.reviewed import ReviewedImage, ReviewedObject, read_label_studio

__all__ = [
    "ReviewedImage",
    "ReviewedObject",
    "label_config",
    "read_annotations",
    "to_task",
    "write_tasks",
]


def write_tasks(
    folder: str | os.PathLike[str],
    path: str | os.PathLike[str],
    image_url: str | Callable[[ImageRecord], str] = IMAGE_URL,
) -> int:
    """Write the images of a labeled dataset as tasks to import into Label Studio.

    Args:
        folder: Folder with `labels.jsonl`.
        path: JSON file to create or replace.
        image_url: Function that returns the URL of an image; or prefix of the URLs, to which the path of the image in
            the exported dataset is appended. The default is local file serving with `folder` as its document root.

    Returns:
        Number of tasks.

    Raises:
        LabelingError: The labels cannot be read; or `image_url` is a prefix, and the dataset has not been exported.
        OSError: The file cannot be written.
    """
    root = Path(folder)
    if callable(image_url):
        url_of = image_url
    else:
        paths = {entry.image: entry.files[0] for entry in read_manifest(root).entries if entry.image is not None}
        prefix = image_url

        def url_of(record: ImageRecord) -> str:
            if record.image not in paths:
                raise LabelingError(f"{record.image} has no exported file; export the dataset, or pass a function")
            return prefix + quote(paths[record.image])

    with open_replacement(Path(path)) as file:
        file.write("[")
        tasks = JsonItems(file)
        for record in read_records(root / LABELS):
            if record.is_exported:
                tasks.append(to_task(record, url_of(record)))
        file.write("]\n")
    return tasks.count


def read_annotations(path: str | os.PathLike[str]) -> list[ReviewedImage]:
    """Read the annotations of a project that was exported as JSON.

    The latest annotation of a task counts. Tasks that nobody has annotated and cancelled annotations are left out.

    Args:
        path: JSON file.

    Raises:
        LabelingError: The file cannot be read, or is not such an export.
    """
    return read_label_studio(Path(path))
