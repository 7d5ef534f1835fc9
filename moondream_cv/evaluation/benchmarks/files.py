"""Files of benchmarks: splits in their names, JSON with labels, and images next to it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from moondream_cv.dataset_layouts import DatasetError

Found = TypeVar("Found")

SPLITS = ("train", "valid", "test")
_SPLIT_WORD = re.compile(r"(?:^|[^a-z])(train|val|test)")


def split_of(path: Path, root: Path) -> str:
    """Return the split that the name of a file or of a folder below `root` contains; empty if there is none.

    Args:
        path: File in `root`.
        root: Folder of the benchmark.
    """
    for name in (path.stem, *reversed(path.relative_to(root).parts[:-1])):
        word = _SPLIT_WORD.search(name.lower())
        if word is not None:
            return {"train": "train", "val": "valid", "test": "test"}[word[1]]
    return ""


def check_split(split: str) -> str:
    """Return the name of a split: "train", "valid" or "test".

    Args:
        split: Name, also "val", "validation" or "training".

    Raises:
        ValueError: There is no such split.
    """
    names = {"training": "train", "val": "valid", "validation": "valid"} | {name: name for name in SPLITS}
    if split.lower() not in names:
        raise ValueError(f"split must be train, valid or test, got {split!r:.100}")
    return names[split.lower()]


def by_split(paths: Iterable[Path], root: Path) -> dict[str, list[Path]]:
    """Return files by the split in their name.

    Args:
        paths: Files in `root`.
        root: Folder of the benchmark.
    """
    found: dict[str, list[Path]] = {}
    for path in paths:
        found.setdefault(split_of(path, root), []).append(path)
    return found


def choose_split(found: Mapping[str, Found], wanted: str | None, default: str, root: Path) -> tuple[str, Found]:
    """Return the name and the content of a split.

    Args:
        found: Content of each split; the name is empty for files without a split.
        wanted: Split that the user chose; None chooses the default, or the only split.
        default: Default split of the task.
        root: Folder of the benchmark, for messages.

    Raises:
        DatasetError: There is no such split, or several splits and no default.
    """
    names = ", ".join(name or "files without a split" for name in sorted(found))
    if wanted is not None:
        if wanted not in found:
            raise DatasetError(f"{root} has no split {wanted}; found: {names}")
        return wanted, found[wanted]
    chosen = default if default in found else next(iter(found)) if len(found) == 1 else None
    if chosen is None:
        raise DatasetError(f"{root} has several splits ({names}); choose one with --split")
    return chosen, found[chosen]


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Args:
        path: File.

    Raises:
        DatasetError: The file cannot be read.
    """
    with reading_labels(path):
        return json.loads(path.read_text(encoding="utf-8"))


@contextmanager
def reading_labels(path: Path) -> Iterator[None]:
    """Convert errors of reading a file with labels in the `with` to a `DatasetError` with its name.

    Args:
        path: File.
    """
    try:
        yield
    except (OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        reason = f"the key {error} is missing" if isinstance(error, KeyError) else str(error)
        raise DatasetError(f"the labels in {path} cannot be read: {reason}") from error


def find_image(folders: Sequence[Path], name: str) -> Path:
    """Return the file of an image in the first folder that contains it; in the first folder if none does.

    Args:
        folders: Folders to search.
        name: Path of the image in the folder, as in the labels.

    Raises:
        ValueError: The path leads out of the folder.
    """
    parts = PurePosixPath(str(name).replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts or Path(name).is_absolute():
        raise ValueError(f"the file name of an image must be a path inside the dataset, got {name!r:.200}")
    paths = [folder / parts for folder in folders]
    return next((path for path in paths if path.is_file()), paths[0])
