"""Pascal VOC: an XML file per image, next to the images. Boxes are rounded to whole pixels.

Coordinates are those of the VOC development kit: the first and the last pixel of a box, counted from 1. supervision
writes and reads them since version 0.31; older versions move the last pixel by 1, even beyond the image.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

from moondream_cv.labeling.exports.files import ExportFiles
from moondream_cv.labeling.exports.writer import DatasetWriter, with_suffix
from moondream_cv.labeling.records import ImageRecord, LabeledObject


class VocWriter(DatasetWriter):
    """Writes `*.xml`."""

    def label_path(self, split: str, image: str) -> str:
        """Return the path of the label file of an image."""
        return f"{split}/{with_suffix(image, '.xml')}"

    def write(self, files: ExportFiles, split: str, image: str, record: ImageRecord) -> None:
        """Write the label file of an image."""
        annotation = ElementTree.Element("annotation")
        _add(annotation, filename=image)
        _add(ElementTree.SubElement(annotation, "size"), width=record.width, height=record.height, depth=3)
        _add(annotation, segmented=0)
        for labeled in record.objects:
            element = ElementTree.SubElement(annotation, "object")
            _add(element, name=labeled.class_name, pose="Unspecified", truncated=0, difficult=0)
            _add(ElementTree.SubElement(element, "bndbox"), **_pixels(labeled, record))
        ElementTree.indent(annotation)
        files.write_text(self.label_path(split, image), ElementTree.tostring(annotation, encoding="unicode") + "\n")


def _pixels(labeled: LabeledObject, record: ImageRecord) -> dict[str, int]:
    """Return the first and the last pixels of a box, counted from 1. It has at least one pixel."""
    x_min, y_min, x_max, y_max = map(round, labeled.xyxy)
    x_min, y_min = min(x_min, record.width - 1), min(y_min, record.height - 1)
    return {"xmin": x_min + 1, "ymin": y_min + 1, "xmax": max(x_max, x_min + 1), "ymax": max(y_max, y_min + 1)}


def _add(parent: ElementTree.Element, **values: str | int) -> None:
    """Add elements with text."""
    for name, value in values.items():
        ElementTree.SubElement(parent, name).text = str(value)
