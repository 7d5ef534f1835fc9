"""Label Studio: tasks to import, with the objects as predictions, and the labeling configuration of the project."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from typing import IO, Any
from urllib.parse import quote

from moondream_cv.labeling.exports.files import ExportFiles
from moondream_cv.labeling.exports.writer import DatasetWriter, JsonItems
from moondream_cv.labeling.records import ImageRecord, LabeledObject

MODEL_VERSION = "moondream_cv"
"""Name of the predictions in Label Studio."""

TASKS = "tasks.json"
CONFIG = "label_config.xml"

_IMAGE = "image"
_POINT_WIDTH = 0.5  # percentage of the image width; the size of the drawn dot
_DECIMALS = 6  # decimals of percentages


class LabelStudioWriter(DatasetWriter):
    """Writes `tasks.json` and `label_config.xml`. Label Studio has no splits, so all images are in one folder."""

    has_points = True

    def image_path(self, split: str, image: str) -> str:
        """Return the path of an image, relative to the folder of the dataset."""
        return f"images/{image}"

    def shared_paths(self) -> list[str]:
        """Return the paths of the tasks and of the labeling configuration."""
        return [TASKS, CONFIG]

    def open(self, files: ExportFiles) -> None:
        """Write the labeling configuration, and open the file of the tasks."""
        files.write_text(CONFIG, label_config(self.settings.class_names, self.settings.has_points))
        file: IO[str] = self.enter_context(files.stream(TASKS))
        file.write("[")
        self.callback(file.write, "]\n")
        self._tasks = JsonItems(file)

    def write(self, files: ExportFiles, split: str, image: str, record: ImageRecord) -> None:
        """Append the task of an image."""
        self._tasks.append(to_task(record, self.settings.image_url + quote(self.image_path(split, image))))


def label_config(class_names: Sequence[str], has_points: bool = False) -> str:
    """Return the labeling configuration of a project, in XML.

    Args:
        class_names: Class names.
        has_points: Whether annotators also draw points.
    """
    from moondream_cv.drawing import class_color

    view = ElementTree.Element("View")
    ElementTree.SubElement(view, "Image", name=_IMAGE, value=f"${_IMAGE}")
    for control, name in (("RectangleLabels", "label"), *([("KeyPointLabels", "point")] if has_points else [])):
        labels = ElementTree.SubElement(view, control, name=name, toName=_IMAGE)
        for class_id, class_name in enumerate(class_names):
            color = "#{:02x}{:02x}{:02x}".format(*class_color(class_id))
            ElementTree.SubElement(labels, "Label", value=class_name, background=color)
    ElementTree.indent(view)
    return ElementTree.tostring(view, encoding="unicode") + "\n"


def to_task(record: ImageRecord, image_url: str) -> dict[str, Any]:
    """Return the task of an image. Its objects are predictions or, if a person has reviewed them, an annotation.

    Args:
        record: Record of the image.
        image_url: URL of the image, as Label Studio's front end requests it.
    """
    regions = [_region(f"object-{number}", labeled, record) for number, labeled in enumerate(record.objects, 1)]
    task: dict[str, Any] = {"data": {_IMAGE: image_url}}
    if record.reviewed:
        return {**task, "annotations": [{"result": regions}]}
    scores = [labeled.confidence for labeled in record.objects if labeled.confidence is not None]
    score = {"score": min(scores)} if scores else {}  # tasks can be sorted by it
    return {**task, "predictions": [{"model_version": MODEL_VERSION, **score, "result": regions}]}


def _region(identifier: str, labeled: LabeledObject, record: ImageRecord) -> dict[str, Any]:
    x_min, y_min, x_max, y_max = labeled.xyxy
    x, y = _percent(x_min, record.width), _percent(y_min, record.height)
    if labeled.is_point:
        type_, name = "keypointlabels", "point"
        value: dict[str, Any] = {"x": x, "y": y, "width": _POINT_WIDTH}
    else:
        type_, name = "rectanglelabels", "label"
        width, height = _percent(x_max - x_min, record.width), _percent(y_max - y_min, record.height)
        value = {"x": x, "y": y, "width": width, "height": height, "rotation": 0}
    region = {
        "id": identifier,
        "from_name": name,
        "to_name": _IMAGE,
        "type": type_,
        "original_width": record.width,
        "original_height": record.height,
        "image_rotation": 0,
        "value": {**value, type_: [labeled.class_name]},
    }
    return region if labeled.confidence is None else {**region, "score": labeled.confidence}


def _percent(pixels: float, size: int) -> float:
    return round(100 * pixels / size, _DECIMALS)
