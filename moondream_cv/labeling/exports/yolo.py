"""YOLO: a text file per image. Values are fractions of the image with 5 decimals, as supervision writes them."""

from __future__ import annotations

import yaml

from moondream_cv.labeling.exports.files import ExportFiles
from moondream_cv.labeling.exports.writer import DatasetWriter, with_suffix
from moondream_cv.labeling.records import ImageRecord

_KEYS = {"train": "train", "valid": "val", "test": "test"}
_NO_VALIDATION = (
    "# There are no images for validation. Trainers require the key, so metrics are those of these images.\n"
)


class YoloWriter(DatasetWriter):
    """Writes `data.yaml` and `labels/*.txt`."""

    def image_path(self, split: str, image: str) -> str:
        """Return the path of an image, relative to the folder of the dataset."""
        return f"{split}/images/{image}"

    def label_path(self, split: str, image: str) -> str:
        """Return the path of the label file of an image."""
        return f"{split}/labels/{with_suffix(image, '.txt')}"

    def shared_paths(self) -> list[str]:
        """Return the path of `data.yaml`."""
        return ["data.yaml"]

    def open(self, files: ExportFiles) -> None:
        """Write `data.yaml`. Its paths are relative to its folder."""
        names = list(self.settings.class_names)
        folders = {key: f"{split}/images" for split, key in _KEYS.items() if split in self.settings.num_images}
        text = yaml.safe_dump(folders, sort_keys=False)
        if "val" not in folders:
            text += _NO_VALIDATION + yaml.safe_dump({"val": next(iter(folders.values()))})
        text += yaml.safe_dump({"nc": len(names), "names": names}, sort_keys=False, allow_unicode=True)
        files.write_text("data.yaml", text)

    def write(self, files: ExportFiles, split: str, image: str, record: ImageRecord) -> None:
        """Write the label file of an image."""
        from supervision.dataset.formats.yolo import detections_to_yolo_annotations

        lines = detections_to_yolo_annotations(self.detections(record.objects), (record.height, record.width))
        files.write_text(self.label_path(split, image), "".join(f"{line}\n" for line in lines))
