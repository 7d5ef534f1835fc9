"""The folder of a labeled dataset: its settings, its list of images, and its lock."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from moondream_cv.durable_files import PART_SUFFIX, is_disk_full, make_folder, write_file
from moondream_cv.labeling.errors import LabelingError
from moondream_cv.labeling.inputs import InputImage
from moondream_cv.labeling.layout import FRAMES, LABELS, SETTINGS, WORK
from moondream_cv.labeling.records import LabeledObject

VERSION = 1
"""Version of `labeling.json`."""

_IMAGES = "images.jsonl"
_LOCK = "lock"
_PROBE = f".moondream-cv{PART_SUFFIX}"
_MIN_FREE = 16 * 2**20  # bytes
_MAX_NAMES = 5  # in a message


@dataclass
class DatasetState:
    """Content of `labeling.json`.

    Attributes:
        labeling: Classes, prompts, model and options that determine the objects. They cannot change.
        export: Options of the last export.
        class_names: Class names, in the order of their IDs in exports.
    """

    labeling: dict[str, Any]
    export: dict[str, Any]
    class_names: list[str]


@dataclass
class ImageList:
    """Images of a dataset, in the order of their labels.

    Attributes:
        images: Images.
        ends: Number of images at the end of each run that added images. A batch never spans two of them.
    """

    images: list[InputImage]
    ends: list[int]

    def add(self, images: Sequence[InputImage]) -> None:
        """Append the images of a run."""
        self.images += images
        self.ends.append(len(self.images))

    def batches(self, size: int) -> list[range]:
        """Return the indices of the images of each batch.

        Args:
            size: Maximum number of images per batch.
        """
        starts = [0, *self.ends[:-1]]
        return [
            range(first, min(first + size, end))
            for start, end in zip(starts, self.ends, strict=True)
            for first in range(start, end, size)
        ]


def check_target(folder: Path) -> DatasetState | None:
    """Check that a folder can hold the dataset, without changing anything.

    Args:
        folder: Folder that is new, empty, or contains a labeled dataset.

    Returns:
        The state of the dataset in the folder; None for a new one.

    Raises:
        LabelingError: The folder contains something else, or it cannot be written.
    """
    for path in (folder, *folder.absolute().parents):
        if path.exists() and not path.is_dir():
            raise LabelingError(f"the output must be a folder, and {path} is a file; choose another folder")
    if (folder / SETTINGS).exists():
        _check_writable(folder)
        return read_state(folder)
    others = sorted(path.name for path in folder.iterdir() if not _is_leftover(path.name)) if folder.is_dir() else []
    if others:
        raise LabelingError(f"{folder} contains other files, for example {others[0]!r}; choose a new or empty folder")
    _check_writable(next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir()))
    return None


def check_same(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Check that a run has the settings of the dataset that it continues.

    Args:
        folder: Folder of the dataset, for the message.
        before: `DatasetState.labeling` of the dataset.
        now: The same of the run.

    Raises:
        LabelingError: Settings differ. The message names them.
    """
    different = [_difference(key, before.get(key), now[key]) for key in now if before.get(key) != now[key]]
    if different:
        raise LabelingError(
            f"{folder} contains a dataset with other settings ({'; '.join(different)}); use the same settings to "
            f"continue, or choose another folder; to change the classes and keep its labels, use {folder} as the input "
            "of another dataset"
        )


def has_labels(folder: Path) -> bool:
    """Return whether a run has written labels, to the log or to batches that wait."""
    log, waiting = folder / LABELS, folder / WORK / "batches"
    return (log.is_file() and log.stat().st_size > 0) or (waiting.is_dir() and any(waiting.iterdir()))


def read_state(folder: Path) -> DatasetState:
    """Read `labeling.json`.

    Raises:
        LabelingError: The file cannot be read.
    """
    path = folder / SETTINGS
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] != VERSION:
            raise ValueError(f"version {content['version']!r} is not supported")
        return DatasetState(dict(content["labeling"]), dict(content["export"]), list(content["class_names"]))
    except FileNotFoundError:
        raise LabelingError(f"{folder} is not a labeled dataset: it has no {SETTINGS}") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise LabelingError(f"{path} cannot be read: {error}; choose another folder") from error


def write_state(folder: Path, state: DatasetState) -> None:
    """Write `labeling.json` unless it has the same content.

    Raises:
        OSError: The file cannot be written.
    """
    content = json.dumps({"version": VERSION, **asdict(state)}, indent=1, ensure_ascii=False) + "\n"
    path = folder / SETTINGS
    if not path.is_file() or path.read_bytes() != content.encode():
        write_file(path, content.encode())


def read_images(folder: Path) -> ImageList:
    """Read the list of images of the dataset; it is empty before the first run.

    Raises:
        LabelingError: The list cannot be read.
    """
    path = folder / WORK / _IMAGES
    images = []
    try:
        with open(path, encoding="utf-8") as file:
            ends = [int(end) for end in json.loads(file.readline())["ends"]]
            for line in file:
                entry = json.loads(line)
                given = entry.pop("given", None)
                objects = None if given is None else tuple(map(LabeledObject.from_dict, given))
                images.append(InputImage(**entry, given=objects, dataset=folder.absolute()))
    except FileNotFoundError:
        return ImageList([], [])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise LabelingError(f"{path} cannot be read: {error}; choose another folder") from error
    return ImageList(images, ends)


def remove_images(folder: Path) -> None:
    """Remove the list of images of a run that has written no labels.

    Raises:
        OSError: The list cannot be removed.
    """
    (folder / WORK / _IMAGES).unlink(missing_ok=True)


def write_images(folder: Path, listed: ImageList) -> None:
    """Replace the list of images of the dataset.

    Raises:
        OSError: The list cannot be written.
    """
    lines = [json.dumps({"ends": listed.ends}) + "\n"]
    for image in listed.images:
        entry: dict[str, Any] = {"name": image.name, "source": image.source}
        entry |= {key: value for key in ("split", "group") if (value := getattr(image, key)) is not None}
        if image.given is not None:
            entry["given"] = [labeled.to_dict() for labeled in image.given]
        lines.append(json.dumps(entry, ensure_ascii=False) + "\n")
    write_file(folder / WORK / _IMAGES, "".join(lines).encode())


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Create the folder and lock it for the length of a `with`. A new folder without images is removed again.

    Args:
        folder: Folder of the dataset.

    Raises:
        LabelingError: Another process has locked it, the disk is full, or a file cannot be written.
    """
    existed, is_locked_by_other = folder.exists(), False
    try:
        make_folder(folder / WORK)
        with FileLock(folder / WORK / _LOCK, timeout=0):
            yield
    except Timeout:
        is_locked_by_other = True  # its files must stay
        raise LabelingError(f"another process is labeling {folder}; wait for it, or stop it") from None
    except OSError as error:
        if is_disk_full(error):
            raise LabelingError(
                f"the disk of {folder} is full; free some space and run the same command again: it continues"
            ) from error
        raise LabelingError(f"{folder} cannot be written: {error}; check its disk and permissions") from error
    finally:
        is_unused = not (folder / WORK / _IMAGES).exists() and not (folder / FRAMES).exists()
        if is_unused and not is_locked_by_other:
            (folder / SETTINGS).unlink(missing_ok=True)
            shutil.rmtree(folder / WORK, ignore_errors=True)
            if not existed:
                with contextlib.suppress(OSError):
                    folder.rmdir()


def check_space(folder: Path, images: Sequence[InputImage]) -> None:
    """Check that the disk has space for copies of the images.

    Args:
        folder: Folder of the dataset; it exists.
        images: Images to copy. Images behind URLs are not counted.

    Raises:
        LabelingError: The disk has too little space.
    """
    needed = 0
    for image in images:
        with contextlib.suppress(OSError, ValueError):
            needed += (folder / image.source).stat().st_size
    free = shutil.disk_usage(folder).free
    if free < needed + _MIN_FREE:
        raise LabelingError(
            f"the copies of the images take {needed / 1e9:.1f} GB, and the disk of {folder} has {free / 1e9:.1f} GB; "
            "free some space, choose another disk, or link the images"
        )


def _check_writable(folder: Path) -> None:
    probe = folder / _PROBE  # one name, so that the next run removes it after a kill
    try:
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise LabelingError(f"{folder} cannot be written: {error.strerror}; choose another output folder") from error


def _is_leftover(name: str) -> bool:
    """Return whether a process that was killed before it wrote the settings may have left a file or folder."""
    return name in (WORK, _PROBE, f"{SETTINGS}{PART_SUFFIX}")


def _difference(key: str, before: Any, now: Any) -> str:
    """Describe a setting that differs. Classes that are equal are left out."""
    if key != "classes" or not now:
        return f"{key}: now none" if key == "classes" else f"{key}: {_short(before)}, now {_short(now)}"
    old, new = ({one["name"]: one for one in classes or ()} for classes in (before, now))
    parts = []
    for word, names in (("without", old.keys() - new.keys()), ("with", new.keys() - old.keys())):
        if names:
            parts.append(f"{word} {_names(sorted(names))}")
    for name in (name for name in new if name in old and new[name] != old[name]):
        changes = [
            _difference(option, old[name].get(option), value)
            for option, value in new[name].items()
            if old[name].get(option) != value
        ]
        parts.append(f"{_short(name)} has {', '.join(changes)}")
    return f"classes: now {'; '.join(parts)}" if parts else "classes: now in another order"


def _names(names: Sequence[str]) -> str:
    shown = ", ".join(map(_short, names[:_MAX_NAMES]))
    return f"{shown} and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else shown


def _short(value: Any) -> str:
    text = "none" if value in (None, []) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
