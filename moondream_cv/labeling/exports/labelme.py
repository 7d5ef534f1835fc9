"""LabelMe and X-AnyLabeling: a JSON file per image, next to the images, with rectangles and points."""

from __future__ import annotations

import json
from typing import Any

from moondream_cv.labeling.exports.files import ExportFiles
from moondream_cv.labeling.exports.writer import DatasetWriter, with_suffix
from moondream_cv.labeling.records import ImageRecord, LabeledObject

_VERSION = "5.5.0"


class LabelMeWriter(DatasetWriter):
    """Writes `*.json`. Shapes have the `score` of X-AnyLabeling if the model returned one."""

    has_points = True

    def label_path(self, split: str, image: str) -> str:
        """Return the path of the label file of an image."""
        return f"{split}/{with_suffix(image, '.json')}"

    def write(self, files: ExportFiles, split: str, image: str, record: ImageRecord) -> None:
        """Write the label file of an image."""
        content: dict[str, Any] = {
            "version": _VERSION,
            "flags": {},
            "shapes": [self._shape(labeled) for labeled in record.objects],
            "imagePath": image,
            "imageData": None,
            "imageHeight": record.height,
            "imageWidth": record.width,
        }
        text = json.dumps(content, ensure_ascii=False, indent=2) + "\n"
        files.write_text(self.label_path(split, image), text)

    def _shape(self, labeled: LabeledObject) -> dict[str, Any]:
        from supervision.dataset.formats.labelme import detections_to_labelme_shapes

        (shape,) = detections_to_labelme_shapes(self.detections([labeled]), list(self.settings.class_names))
        if labeled.is_point:
            shape |= {"shape_type": "point", "points": shape["points"][:1]}
        return shape if labeled.confidence is None else {**shape, "score": labeled.confidence}
