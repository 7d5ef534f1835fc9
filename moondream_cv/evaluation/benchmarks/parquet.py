"""Parquet files with encoded images, as the Hugging Face hub stores datasets. Images are read row by row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moondream_cv.dataset_layouts import DatasetError

IMAGE = "image"
"""Column with the images: a struct with the file in `bytes`, or the file itself."""

_ROWS_IN_MEMORY = 16
_ROWS_WITHOUT_IMAGES = 1024


@dataclass(frozen=True)
class ParquetImage:
    """The image of a row.

    Attributes:
        path: Parquet file.
        row: Index of the row in the file.
    """

    path: Path
    row: int


def read_schema(path: Path) -> Any:
    """Return the Arrow schema of a file.

    Args:
        path: Parquet file.

    Raises:
        DatasetError: pyarrow is not installed, or the file cannot be read.
    """
    return _opened(path).schema_arrow


def read_rows(paths: Sequence[Path]) -> Iterator[tuple[ParquetImage, dict[str, Any]]]:
    """Yield the image of each row and its other columns, without reading the image.

    Args:
        paths: Parquet files of a split, in order.

    Raises:
        DatasetError: A file cannot be read.
    """
    for path in paths:
        file = _opened(path)
        columns = [name for name in file.schema_arrow.names if name != IMAGE]
        row = 0
        for batch in file.iter_batches(_ROWS_WITHOUT_IMAGES, columns=columns):
            for values in batch.to_pylist():
                yield ParquetImage(path, row), values
                row += 1


class ParquetImages:
    """Reads images of rows. It is fast if the rows are in order, and keeps only a few rows in memory."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._rows: Iterator[Any] = iter(())
        self._next_row = 0

    def read(self, image: ParquetImage) -> bytes | None:
        """Return the encoded image of a row; None if the row has none.

        Args:
            image: Row to read.

        Raises:
            DatasetError: The file cannot be read, or has another type of images.
        """
        if image.path != self._path or image.row < self._next_row:
            self._seek(image)
        for value in self._rows:
            self._next_row += 1
            if self._next_row > image.row:
                return _encoded(image.path, value)
        raise DatasetError(f"{image.path} has no row {image.row}; it was changed during the evaluation")

    def _seek(self, image: ParquetImage) -> None:
        """Start at the group of rows that contains a row."""
        file = _opened(image.path)
        first_row, group = 0, 0
        while group < file.num_row_groups - 1 and first_row + file.metadata.row_group(group).num_rows <= image.row:
            first_row += file.metadata.row_group(group).num_rows
            group += 1
        groups = list(range(group, file.num_row_groups))
        batches = file.iter_batches(_ROWS_IN_MEMORY, row_groups=groups, columns=[IMAGE])
        self._path, self._next_row = image.path, first_row
        self._rows = (value for batch in batches for value in batch.column(0).to_pylist())


def _encoded(path: Path, value: Any) -> bytes | None:
    content = value.get("bytes") if isinstance(value, dict) else value
    if content is None or isinstance(content, bytes):
        return content
    raise DatasetError(f"{path}: the column {IMAGE!r} must contain image files as bytes, got {type(content).__name__}")


def _opened(path: Path) -> Any:
    try:
        import pyarrow.parquet as pq
        from pyarrow import ArrowException
    except ImportError as error:
        raise DatasetError('Parquet files need pyarrow; pip install "moondream-cv[labeling]"') from error
    try:
        return pq.ParquetFile(path)
    except (ArrowException, OSError) as error:
        raise DatasetError(f"{path} cannot be read as a Parquet file: {error}") from error
