"""The steps of an export: choose the splits, plan the files, and write images and labels."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import unicodedata
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from moondream_cv.arguments import check_choice
from moondream_cv.errors import ImageError
from moondream_cv.escaping import escaped
from moondream_cv.labeling.errors import LabelingError
from moondream_cv.labeling.exports.files import ExportFiles, Manifest, ManifestEntry
from moondream_cv.labeling.exports.images import exported_name, write_image
from moondream_cv.labeling.exports.writer import DatasetWriter, ExportSettings
from moondream_cv.labeling.layout import LABELS
from moondream_cv.labeling.records import ImageRecord, read_records
from moondream_cv.labeling.splits import SPLITS, check_split, choose_splits

_WRITERS = {
    "yolo": "YoloWriter",
    "coco": "CocoWriter",
    "voc": "VocWriter",
    "labelme": "LabelMeWriter",
    "createml": "CreatemlWriter",
    "label-studio": "LabelStudioWriter",
    "huggingface": "HuggingFaceWriter",
}

FORMATS = tuple(_WRITERS)
"""Names of the formats."""

IMAGE_URL = "/data/local-files/?d="
"""URLs of images that Label Studio serves from the folder of the dataset."""

_VERSION = 1
_NOT_IN_XML = frozenset("\ufffe\uffff")


@dataclass(frozen=True)
class ExportSummary:
    """Result of an export.

    Attributes:
        num_images: Number of images by split, without empty splits.
        num_objects: Number of objects by class, in the order of the class IDs.
        num_duplicates: Number of near-duplicates, which are not exported.
        num_failed: Number of images that failed, which are not exported.
        num_removed: Number of files of earlier exports that were removed.
    """

    num_images: Mapping[str, int]
    num_objects: Mapping[str, int]
    num_duplicates: int
    num_failed: int
    num_removed: int


def check_format(format: str, class_names: Sequence[str], has_points: bool) -> None:
    """Check that a format can represent a dataset.

    Args:
        format: Name of the format, one of `FORMATS`.
        class_names: Class names, in the order of their IDs.
        has_points: Whether an object may be a point.

    Raises:
        LabelingError: The format does not exist or has no points, or a class name is invalid.
    """
    try:
        check_choice("format", format, FORMATS)
    except ValueError as error:
        raise LabelingError(str(error)) from None
    if has_points and not _writer_class(format).has_points:
        names = ", ".join(name for name in FORMATS if _writer_class(name).has_points)
        raise LabelingError(f"the format {format} has no points; choose one of {names}, or use the skill detect")
    if format == "huggingface" and importlib.util.find_spec("pyarrow") is None:
        raise LabelingError('the format huggingface needs pyarrow; pip install "moondream-cv[labeling]"')
    if not class_names:
        raise LabelingError("a dataset must have at least one class")
    for name in class_names:
        if not name or name != name.strip():
            raise LabelingError(f"a class name must not be empty, or start or end with a blank, got {name!r}")
        if any(unicodedata.category(letter) in ("Cc", "Cs") or letter in _NOT_IN_XML for letter in name):
            raise LabelingError(f"class names must not have control characters, got '{escaped(name)}'")
    repeated = sorted(name for name, count in Counter(class_names).items() if count > 1)
    if repeated:
        raise LabelingError(f"class names must be unique; duplicates: {', '.join(map(repr, repeated))}")


def export_dataset(
    folder: Path,
    format: str,
    class_names: Sequence[str],
    open_image: Callable[[ImageRecord], Path | bytes],
    *,
    split: Sequence[float] = (0.8, 0.1, 0.1),
    seed: int = 0,
    link: bool = False,
    image_url: str = IMAGE_URL,
    progress: Callable[[int, int], None] | None = None,
) -> ExportSummary:
    """Write the images in `labels.jsonl` as a dataset into the same folder.

    An interrupted export continues when it is started again, and the result is the same. Files of earlier exports that
    do not belong to the dataset any more are removed, and files of other origin are never changed.

    Args:
        folder: Folder with `labels.jsonl`.
        format: Name of the format, one of `FORMATS`.
        class_names: Class names, in the order of their IDs.
        open_image: Function that returns the path or the bytes of an image. It is called in several threads.
        split: Shares of train, valid and test, with the sum 1. Images with a split in `labels.jsonl` keep it.
        seed: Seed of the splits.
        link: Create hard links to images instead of copies, if the file system supports them.
        image_url: Prefix of image URLs in the format label-studio. The path of the image is appended.
        progress: Function that receives the number of completed images and of all images.

    Raises:
        LabelingError: The format cannot represent the dataset, a file exists that no export has written, labels were
            edited after the last export, or an image cannot be read or has changed.
        OSError: A file cannot be written.
        ValueError: The shares are invalid.
    """
    # Plan the files
    records = folder / LABELS
    check_split(split)
    check_format(format, class_names, has_points=False)
    scan = _scan(records, class_names, split, seed, image_url)
    settings, chosen = scan.settings, scan.splits
    check_format(format, class_names, settings.has_points)
    writer = _writer_class(format)(settings)
    planned = Manifest({"version": _VERSION, "format": format, "classes": list(class_names)}, _plan(writer, chosen))

    # Write them
    files = ExportFiles(folder, planned)
    labeled = ((chosen[record.image], record) for record in read_records(records) if record.is_exported)
    with contextlib.ExitStack() as stack:
        stack.enter_context(writer).open(files)
        images = stack.enter_context(contextlib.closing(_written_images(files, writer, labeled, open_image, link)))
        for done, (name, record) in enumerate(images, 1):
            writer.write(files, name, exported_name(record.image), record)
            if progress is not None:
                progress(done, len(chosen))
    files.complete()
    return ExportSummary(settings.num_images, scan.num_objects, scan.num_duplicates, scan.num_failed, files.num_removed)


def _writer_class(format: str) -> type[DatasetWriter]:
    module = importlib.import_module(f"{__package__}.{format.replace('-', '_')}")
    found: type[DatasetWriter] = getattr(module, _WRITERS[format])
    return found


class _Scan(NamedTuple):
    """Content of `labels.jsonl`.

    Attributes:
        settings: Settings of the dataset.
        splits: Split of each exported image, in the order of the records.
        num_objects: Number of objects by class, in the order of the class IDs.
        num_duplicates: Number of near-duplicates.
        num_failed: Number of images that failed.
    """

    settings: ExportSettings
    splits: dict[str, str]
    num_objects: dict[str, int]
    num_duplicates: int
    num_failed: int


def _scan(records: Path, class_names: Sequence[str], split: Sequence[float], seed: int, image_url: str) -> _Scan:
    """Read the records, and choose the split of each image."""
    keys = []
    num_duplicates = num_failed = 0
    num_objects: Counter[str] = Counter()
    has_points = False
    for record in read_records(records):
        num_duplicates += record.duplicate_of is not None
        num_failed += record.error is not None
        if not record.is_exported:
            continue
        keys.append((record.image, record.group, record.split))
        num_objects.update(labeled.class_name for labeled in record.objects)
        has_points |= any(labeled.is_point for labeled in record.objects)
    unknown = sorted(num_objects.keys() - set(class_names))
    if unknown:
        raise LabelingError(f"objects have classes that the dataset does not have: {', '.join(map(repr, unknown[:5]))}")
    if not keys:
        raise LabelingError(f"{records} has no labeled images; see its errors, or label other images")
    splits = choose_splits(keys, split, seed)
    counts = Counter(splits.values())
    num_images = {name: counts[name] for name in SPLITS if counts[name]}
    settings = ExportSettings(class_names, num_images, has_points, image_url)
    in_order = {name: splits[name] for name, _, _ in keys}
    counted = {name: num_objects[name] for name in class_names}
    return _Scan(settings, in_order, counted, num_duplicates, num_failed)


def _plan(writer: DatasetWriter, chosen: Mapping[str, str]) -> list[ManifestEntry]:
    """Return the files of each image, and those of the dataset."""
    entries = []
    image_of_stem: dict[str, str] = {}
    for image, split in chosen.items():
        name = exported_name(image)
        other = image_of_stem.setdefault(PurePosixPath(name).stem, image)
        if other != image:
            raise LabelingError(f"two images need the same label file: {other} and {image}; rename one of them")
        label = writer.label_path(split, name)
        paths = (writer.image_path(split, name), *([] if label is None else [label]))
        entries.append(ManifestEntry(paths, image, split))
    return [*entries, *(ManifestEntry((path,)) for path in writer.shared_paths())]


def _written_images(
    files: ExportFiles,
    writer: DatasetWriter,
    labeled: Iterator[tuple[str, ImageRecord]],
    open_image: Callable[[ImageRecord], Path | bytes],
    link: bool,
) -> Generator[tuple[str, ImageRecord], None, None]:
    """Write images in several threads, and yield their splits and records in order."""

    def write(split: str, record: ImageRecord) -> None:
        path = writer.image_path(split, exported_name(record.image))
        if files.exists(path):
            return
        try:
            write_image(files, path, open_image(record), record, link)
        except ImageError as error:
            raise LabelingError(
                f"the image {record.source!r} cannot be exported: {error}; restore it, or use this dataset as the "
                "input of another one, which leaves the image out"
            ) from error

    num_threads = min(8, os.cpu_count() or 1)
    waiting: deque[tuple[Future[None], str, ImageRecord]] = deque()
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(num_threads))
        stack.callback(pool.shutdown, cancel_futures=True)  # if an image failed
        for split, record in labeled:
            waiting.append((pool.submit(write, split, record), split, record))
            if len(waiting) > 2 * num_threads:
                future, first_split, first_record = waiting.popleft()
                future.result()
                yield first_split, first_record
        for future, split, record in waiting:
            future.result()
            yield split, record
