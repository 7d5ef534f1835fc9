"""Create ML: a JSON file per split, next to the images. Boxes are centers and sizes in pixels with 3 decimals."""

from __future__ import annotations

from typing import IO

from moondream_cv.labeling.exports.files import ExportFiles
from moondream_cv.labeling.exports.writer import DatasetWriter, JsonItems
from moondream_cv.labeling.records import ImageRecord

_FILE = "_annotations.createml.json"


class CreatemlWriter(DatasetWriter):
    """Writes `_annotations.createml.json`."""

    def shared_paths(self) -> list[str]:
        """Return the paths of the JSON files."""
        return [f"{split}/{_FILE}" for split in self.settings.num_images]

    def open(self, files: ExportFiles) -> None:
        """Open the JSON file of each split."""
        self._splits: dict[str, JsonItems] = {}
        for split in self.settings.num_images:
            file: IO[str] = self.enter_context(files.stream(f"{split}/{_FILE}"))
            file.write("[")
            self.callback(file.write, "]\n")
            self._splits[split] = JsonItems(file)

    def write(self, files: ExportFiles, split: str, image: str, record: ImageRecord) -> None:
        """Append an image to the file of its split."""
        from supervision.dataset.formats.createml import detections_to_createml_annotations

        annotations = []
        if record.objects:
            boxes = self.detections(record.objects)
            annotations = detections_to_createml_annotations(boxes, list(self.settings.class_names))
        for annotation in annotations:
            place = annotation["coordinates"]
            annotation["coordinates"] = {key: round(value, 3) for key, value in place.items()}
        self._splits[split].append({"image": image, "annotations": annotations})
