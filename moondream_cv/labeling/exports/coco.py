"""COCO: a JSON file per split, next to the images. Boxes have the 2 decimals of `labels.jsonl`."""

from __future__ import annotations

from typing import IO, Any

from moondream_cv.labeling.exports.files import ExportFiles
from moondream_cv.labeling.exports.writer import DatasetWriter, JsonItems, to_json
from moondream_cv.labeling.records import ImageRecord

_FILE = "_annotations.coco.json"
_PIECE = 2**20  # characters


class CocoWriter(DatasetWriter):
    """Writes `_annotations.coco.json`. Annotations also have a `score` if the model returned one."""

    def shared_paths(self) -> list[str]:
        """Return the paths of the JSON files."""
        return [f"{split}/{_FILE}" for split in self.settings.num_images]

    def open(self, files: ExportFiles) -> None:
        """Open the JSON file of each split, and write its start."""
        from supervision.dataset.formats.coco import classes_to_coco_categories

        categories = classes_to_coco_categories(list(self.settings.class_names))
        self._splits: dict[str, _SplitFile] = {}
        for split in self.settings.num_images:
            output = self.enter_context(files.stream(f"{split}/{_FILE}"))
            self._splits[split] = _SplitFile(output, self.enter_context(files.spool()), categories)
            self.callback(self._splits[split].finish)

    def write(self, files: ExportFiles, split: str, image: str, record: ImageRecord) -> None:
        """Append an image and its objects to the file of its split."""
        from supervision.dataset.formats.coco import detections_to_coco_annotations

        opened = self._splits[split]
        image_id = opened.images.count + 1
        entry = {"id": image_id, "file_name": image, "width": record.width, "height": record.height}
        annotations, _ = detections_to_coco_annotations(
            self.detections(record.objects), image_id=image_id, annotation_id=opened.annotations.count + 1
        )
        opened.images.append(entry)
        for annotation, labeled in zip(annotations, record.objects, strict=True):
            annotation["bbox"] = [round(float(value), 2) for value in annotation["bbox"]]
            annotation["area"] = round(annotation["area"], 4)
            if labeled.confidence is not None:
                annotation["score"] = labeled.confidence
            opened.annotations.append(annotation)


class _SplitFile:
    """COCO file of a split. Its annotations wait in a second file until all images are written."""

    def __init__(self, output: IO[str], spool: IO[str], categories: list[dict[str, Any]]) -> None:
        output.write(f'{{"info": {{}},\n"licenses": [],\n"categories": {to_json(categories)},\n"images": [')
        self._output, self._spool = output, spool
        self.images, self.annotations = JsonItems(output), JsonItems(spool)

    def finish(self) -> None:
        self._output.write('],\n"annotations": [')
        self._spool.seek(0)
        while piece := self._spool.read(_PIECE):
            self._output.write(piece)
        self._output.write("]}\n")
