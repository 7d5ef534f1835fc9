"""Hugging Face `datasets`: labeled datasets as a `DatasetDict`, and images of a dataset as files to label.

Example:
    >>> from moondream_cv.labeling.huggingface import to_huggingface
    >>> to_huggingface("dataset").push_to_hub("me/vans")  # doctest: +SKIP
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from moondream_cv.durable_files import PART_SUFFIX, make_folder
from moondream_cv.errors import ImageError
from moondream_cv.images import IMAGE_SUFFIXES, opened_image
from moondream_cv.labeling.errors import LabelingError
from moondream_cv.labeling.exports import read_manifest
from moondream_cv.labeling.exports.huggingface import features_of, row_of
from moondream_cv.labeling.input_image import read_source
from moondream_cv.labeling.layout import LABELS
from moondream_cv.labeling.records import read_records

if TYPE_CHECKING:
    import datasets

_SPLITS = {"train": "train", "valid": "validation", "test": "test"}
_SUFFIXES = {"JPEG": ".jpg", "MPO": ".jpg", "PNG": ".png", "WEBP": ".webp", "BMP": ".bmp", "TIFF": ".tif"}


def to_huggingface(folder: str | os.PathLike[str]) -> datasets.DatasetDict:
    """Return a labeled dataset that has been exported in any format.

    The columns are `image`, `image_id`, `width`, `height`, and `objects` with the lists `bbox` (x, y, width and height
    in pixels), `area`, `category` (class labels) and `score` (None for objects without one). Images remain files:
    `push_to_hub` uploads them.

    Args:
        folder: Folder of the dataset.

    Raises:
        ImportError: `datasets` is not installed.
        LabelingError: The labels cannot be read, the dataset has not been exported completely, or objects are points.
    """
    datasets = _import_datasets()
    root = Path(folder).absolute()
    manifest = read_manifest(root)
    if not manifest.header.get("complete"):
        raise LabelingError(f"the dataset in {root} has not been exported completely; export it first")
    records = read_records(root / LABELS)
    if any(labeled.is_point for record in records for labeled in record.objects):
        raise LabelingError("objects are points, and datasets of boxes cannot contain them; export to labelme")
    class_names = tuple(manifest.header["classes"])  # a list would be divided among shards
    features = datasets.Features.from_dict({"image": {"_type": "Image"}, **features_of(class_names)})
    files: dict[str, dict[str, str]] = {}
    for entry in manifest.entries:
        if entry.image is not None and entry.split is not None:
            files.setdefault(entry.split, {})[entry.image] = entry.files[0]
    state = _digest(root / LABELS)  # without it, `from_generator` returns the result of earlier labels
    return datasets.DatasetDict(
        {
            name: datasets.Dataset.from_generator(
                _rows,
                features=features,
                gen_kwargs={"root": root, "files": files[split], "class_names": class_names, "state": state},
                split=datasets.NamedSplit(name),
            )
            for split, name in _SPLITS.items()
            if split in files
        }
    )


def from_huggingface(
    dataset: datasets.Dataset | datasets.DatasetDict, folder: str | os.PathLike[str], column: str | None = None
) -> list[Path]:
    """Return the images of a dataset as files, in its order, for example as inputs of labeling.

    Images that are files already are returned as they are. Others are written into the folder, byte for byte and named
    by their row. Files that exist are not written again.

    Args:
        dataset: Dataset, or datasets by split.
        folder: Folder of the files, which is created if necessary.
        column: Column with images; None: the only one.

    Raises:
        ImageError: An image cannot be read.
        ImportError: `datasets` is not installed.
        LabelingError: There is no such column, or it does not contain images.
        OSError: A file cannot be written.
    """
    datasets = _import_datasets()
    root = Path(folder).absolute()
    if isinstance(dataset, Mapping):
        return [path for split, part in dataset.items() for path in from_huggingface(part, root / split, column)]
    images = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    if column is None and len(images) != 1:
        raise LabelingError(f"the dataset must have one column with images, got {images}; pass column")
    if column is not None and column not in images:
        raise LabelingError(f"column must be one of {', '.join(images) or 'no column with images'}, got {column!r}")
    name = column or images[0]
    encoded = dataset.select_columns([name]).cast_column(name, datasets.Image(decode=False))
    make_folder(root)
    return [_image_file(row[name], root, number) for number, row in enumerate(encoded)]


def _rows(root: Path, files: Mapping[str, str], class_names: Sequence[str], state: str) -> Iterator[dict[str, Any]]:
    records = (record for record in read_records(root / LABELS) if record.image in files)
    for number, record in enumerate(records):
        yield {"image": str(root / files[record.image]), **row_of(number, record, class_names)}


def _image_file(value: dict[str, Any] | None, folder: Path, number: int) -> Path:
    """Return the file of an image, and write it if the dataset contains its bytes."""
    if value is None:
        raise ImageError(f"row {number} has no image; filter such rows")
    content, path = value["bytes"], value["path"]
    if content is None:
        found = read_source(str(path), folder)
        if isinstance(found, Path):
            return found
        content = found
    suffix = PurePosixPath(path or "").suffix.lower()
    if suffix not in IMAGE_SUFFIXES:
        with opened_image(io.BytesIO(content), f"the image of row {number}") as image:
            suffix = _SUFFIXES.get(str(image.format), ".png")
    target = folder / f"{number:08}{suffix}"
    if not target.exists():
        part = target.with_name(target.name + PART_SUFFIX)
        part.write_bytes(content)
        os.replace(part, target)
    return target


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def _import_datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"{error}; run: pip install datasets") from error
    return datasets
