"""Hugging Face `imagefolder`: a `metadata.parquet` per split, next to the images.

Parquet files have types, which `metadata.jsonl` files do not have: `datasets` cannot load a dataset of them if all
images of a split are without objects.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moondream_cv.labeling.exports.files import ExportFiles
from moondream_cv.labeling.exports.writer import DatasetWriter
from moondream_cv.labeling.records import ImageRecord

if TYPE_CHECKING:
    import pyarrow

_FILE = "metadata.parquet"
_ROWS = 1000  # per row group; they are kept in memory


class HuggingFaceWriter(DatasetWriter):
    """Writes `metadata.parquet`.

    The columns are those of CPPE-5, for which transformers has examples, and a score: `image_id` (number of the row),
    `width`, `height`, and `objects` with the lists `bbox` (x, y, width and height in pixels), `area`, `category` (class
    IDs, with the names in the features of the dataset) and `score` (None for objects without one).
    """

    def shared_paths(self) -> list[str]:
        """Return the paths of the metadata files."""
        return [f"{split}/{_FILE}" for split in self.settings.num_images]

    def open(self, files: ExportFiles) -> None:
        """Open the metadata file of each split."""
        from pyarrow import parquet

        self._schema = _schema(self.settings.class_names)
        self._counts = dict.fromkeys(self.settings.num_images, 0)
        self._rows: dict[str, list[dict[str, Any]]] = {split: [] for split in self.settings.num_images}
        self._splits: dict[str, parquet.ParquetWriter] = {}
        for split in self.settings.num_images:
            file = self.enter_context(files.stream_bytes(f"{split}/{_FILE}"))
            self._splits[split] = self.enter_context(parquet.ParquetWriter(file, self._schema))
            self.callback(self._write_rows, split)

    def write(self, files: ExportFiles, split: str, image: str, record: ImageRecord) -> None:
        """Append a row to the file of the split."""
        row = row_of(self._counts[split], record, self.settings.class_names)
        self._rows[split].append({"file_name": image, **row})
        self._counts[split] += 1
        if len(self._rows[split]) == _ROWS:
            self._write_rows(split)

    def _write_rows(self, split: str) -> None:
        import pyarrow

        rows, self._rows[split] = self._rows[split], []
        if rows:
            self._splits[split].write_table(pyarrow.Table.from_pylist(rows, self._schema))


def row_of(number: int, record: ImageRecord, class_names: Sequence[str]) -> dict[str, Any]:
    """Return the row of an image, without its file.

    Args:
        number: Number of the row in its split, from 0.
        record: Record of the image.
        class_names: Class names, in the order of their IDs.
    """
    boxes = [_xywh(labeled.xyxy) for labeled in record.objects]
    objects = {
        "bbox": boxes,
        "area": [round(width * height, 4) for _, _, width, height in boxes],
        "category": [class_names.index(labeled.class_name) for labeled in record.objects],
        "score": [labeled.confidence for labeled in record.objects],
    }
    return {"image_id": number, "width": record.width, "height": record.height, "objects": objects}


def features_of(class_names: Sequence[str]) -> dict[str, Any]:
    """Return the features of `row_of`, as `datasets` stores them in JSON.

    Args:
        class_names: Class names, in the order of their IDs.
    """
    integer, number = ({"dtype": dtype, "_type": "Value"} for dtype in ("int64", "float64"))
    category = {"names": list(class_names), "_type": "ClassLabel"}
    numbers = _list(number)
    objects = {"bbox": _list(numbers), "area": numbers, "category": _list(category), "score": numbers}
    return {"image_id": integer, "width": integer, "height": integer, "objects": objects}


def _list(feature: dict[str, Any]) -> dict[str, Any]:
    return {"feature": feature, "_type": "Sequence"}


def _schema(class_names: Sequence[str]) -> pyarrow.Schema:
    import pyarrow

    numbers = pyarrow.list_(pyarrow.float64())
    ids = pyarrow.list_(pyarrow.int64())
    objects = pyarrow.struct({"bbox": pyarrow.list_(numbers), "area": numbers, "category": ids, "score": numbers})
    fields = {
        "file_name": pyarrow.string(),
        "image_id": pyarrow.int64(),
        "width": pyarrow.int64(),
        "height": pyarrow.int64(),
        "objects": objects,
    }
    text = {"dtype": "string", "_type": "Value"}
    features = {"file_name": text, **features_of(class_names)}
    return pyarrow.schema(fields, {"huggingface": json.dumps({"info": {"features": features}})})


def _xywh(xyxy: tuple[float, float, float, float]) -> list[float]:
    x_min, y_min, x_max, y_max = xyxy
    return [x_min, y_min, round(x_max - x_min, 2), round(y_max - y_min, 2)]
