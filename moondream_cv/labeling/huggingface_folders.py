"""Folders of Hugging Face datasets as inputs. Images are extracted to files, and splits are kept; labels are not read.

Next to the files, a hidden file lists the images of a complete dataset, so that it is not read again.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from moondream_cv.durable_files import write_file
from moondream_cv.errors import ImageError
from moondream_cv.labeling.errors import LabelingError
from moondream_cv.labeling.file_listing import shown
from moondream_cv.labeling.input_image import InputImage

_SAVED = ("dataset_dict.json", "state.json")  # `save_to_disk` writes one of them: several splits, or one
_SPLITS = {"train": "train", "validation": "valid", "valid": "valid", "val": "valid", "test": "test"}


def is_saved_dataset(folder: str) -> bool:
    """Return whether `save_to_disk` of Hugging Face `datasets` has written a folder.

    Args:
        folder: Path of the folder.
    """
    return any(os.path.isfile(os.path.join(folder, name)) for name in _SAVED)


def has_parquet_files(folder: str) -> bool:
    """Return whether a folder, or its subfolder "data", contains Parquet files.

    Args:
        folder: Path of the folder.
    """
    escaped = glob.escape(folder)
    return any(glob.glob(os.path.join(escaped, *parts)) for parts in (["*.parquet"], ["data", "*.parquet"]))


def extract_images(folder: InputImage, frames: Path) -> list[InputImage]:
    """Return the images of a dataset in its order. Images that are not files are written; existing files are kept.

    Args:
        folder: Folder of the dataset as an input. The names of its images begin with this name.
        frames: Folder of extracted images. It is created if necessary.

    Raises:
        LabelingError: The package datasets is missing, the dataset cannot be read or has no column with images, or
            `frames` contains images of another dataset with the same name.
        OSError: An image cannot be written.
    """
    # Check for an earlier extraction
    state_path = frames / f".{folder.name}.json"
    identity = _identity(folder.source)
    state = _read_state(state_path)
    if state is not None and state["dataset"] != identity:
        raise LabelingError(
            f"{shown(frames)} contains images of another dataset with the name {shown(folder.name)} than "
            f"{shown(folder.source)}; rename the folder, or choose another folder for the dataset"
        )
    if state is not None and state["images"] is not None:
        images = [replace(folder, name=name, source=source, split=split) for name, source, split in state["images"]]
        if all((frames.parent / image.source).exists() for image in images):
            return images

    # Extract the images
    images = []
    parts = list(_open(folder.source))
    write_file(state_path, json.dumps({"dataset": identity, "images": None}).encode())
    for split, part in parts:
        images += _extract(folder, split, part, frames)
    if not images:
        raise LabelingError(f"the dataset {shown(folder.source)} contains no images")
    entries = [[image.name, image.source, image.split] for image in images]
    write_file(state_path, json.dumps({"dataset": identity, "images": entries}).encode())
    return images


def _extract(folder: InputImage, split: str | None, part: Any, frames: Path) -> Iterator[InputImage]:
    """Extract the images of a split."""
    from moondream_cv.labeling.huggingface import from_huggingface

    stem = folder.name if split is None else f"{folder.name}__{split}"
    try:
        paths = from_huggingface(part, frames / stem)
    except ImageError as error:
        raise LabelingError(f"the dataset {shown(folder.source)}: {error}") from error
    for number, path in enumerate(paths):
        is_extracted = path.is_relative_to(frames.absolute())
        source = path.relative_to(frames.parent.absolute()).as_posix() if is_extracted else os.path.abspath(path)
        name = f"{stem}__{number:08}{path.suffix}"
        yield replace(folder, name=name, source=source, split=_SPLITS.get(split or ""))


def _open(folder: str) -> Iterator[tuple[str | None, Any]]:
    """Yield the splits of a dataset. Parquet files are streamed, since loading them copies them."""
    try:
        import datasets
    except ImportError as error:
        raise LabelingError(
            f"{shown(folder)} is a Hugging Face dataset and needs the package datasets; pip install datasets"
        ) from error
    try:
        if is_saved_dataset(folder):
            loaded = datasets.load_from_disk(folder)
        else:
            loaded = datasets.load_dataset(folder, streaming=True)
    except Exception as error:  # `datasets` and its file formats raise many types
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise LabelingError(f"the dataset {shown(folder)} cannot be read: {reason}") from error
    for split, part in loaded.items() if isinstance(loaded, dict) else [(None, loaded)]:
        columns = [name for name, feature in part.features.items() if isinstance(feature, datasets.Image)]
        if len(columns) != 1:
            raise LabelingError(f"the dataset {shown(folder)} must have one column with images, got {columns}")
        yield split, part


def _identity(folder: str) -> str:
    """Return a hash of the paths and sizes of a dataset's files."""
    digest = hashlib.sha256()
    for place, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = os.path.join(place, name)
            digest.update(f"{os.path.relpath(path, folder)} {os.path.getsize(path)}\n".encode(errors="replace"))
    return digest.hexdigest()


def _read_state(path: Path) -> dict[str, Any] | None:
    """Return the content of the hidden file; None if it does not exist or is not valid."""
    try:
        state = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return state if isinstance(state, dict) and state.keys() == {"dataset", "images"} else None
