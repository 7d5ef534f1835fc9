"""Files of an export: each is complete or absent, and a manifest lists them.

The manifest is written before the first file of an export and after the last one. So the files of earlier exports that
no longer belong to the dataset can be removed, even after a crash, and files of other origin are never touched. It
contains hashes of the labels, so that labels that a person has edited are not overwritten either.

Label and image files are not synced to the disk one by one, which would take minutes for large datasets.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import IO, Any, BinaryIO

from moondream_cv.durable_files import PART_SUFFIX, make_folder, sync_folder, write_file
from moondream_cv.labeling.errors import LabelingError
from moondream_cv.labeling.layout import WORK

_MANIFEST = f"{WORK}/export.jsonl"
_PART = "export-"
_DIGEST_SIZE = 8  # bytes


@dataclass(frozen=True)
class ManifestEntry:
    """Files of an image, or files of the whole dataset.

    Attributes:
        files: Paths relative to the folder of the dataset, with "/". That of the image is the first.
        image: Name of the image in `labels.jsonl`; None for files of the whole dataset.
        split: Split of the image.
        digest: Hash of the last file, if it contains labels and the export is complete.
    """

    files: tuple[str, ...]
    image: str | None = None
    split: str | None = None
    digest: str | None = None

    def to_line(self) -> str:
        """Return the entry as a line of JSON, with the line break."""
        entry: dict[str, Any] = {"files": list(self.files)}
        if self.image is not None:
            entry |= {"image": self.image, "split": self.split}
        if self.digest is not None:
            entry["digest"] = self.digest
        return json.dumps(entry, ensure_ascii=False) + "\n"


@dataclass(frozen=True)
class Manifest:
    """Files of an export.

    Attributes:
        header: Format and options of the export.
        entries: Files by image.
    """

    header: Mapping[str, Any] = field(default_factory=dict)
    entries: Sequence[ManifestEntry] = ()

    @property
    def files(self) -> Iterator[str]:
        """Paths of all files, relative to the folder of the dataset."""
        return itertools.chain.from_iterable(entry.files for entry in self.entries)


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of the last export. It is empty before the first one.

    Args:
        folder: Folder of the dataset.

    Raises:
        LabelingError: The manifest cannot be read.
    """
    path = folder / _MANIFEST
    try:
        with open(path, encoding="utf-8", newline="\n") as file:
            header = dict(json.loads(next(file)))
            lines = map(json.loads, file)
            entries = [
                ManifestEntry(tuple(one["files"]), one.get("image"), one.get("split"), one.get("digest"))
                for one in lines
            ]
    except FileNotFoundError:
        return Manifest()
    except (OSError, ValueError, TypeError, KeyError, StopIteration) as error:
        raise LabelingError(f"{path} cannot be read: {error}; move the exported files away and remove it") from error
    return Manifest(header, entries)


def check_unchanged(folder: Path) -> None:
    """Check that no labels of the last export were edited.

    Args:
        folder: Folder of the dataset.

    Raises:
        LabelingError: Labels were edited, or the manifest cannot be read.
    """
    for entry in read_manifest(folder).entries:
        if entry.digest is not None:
            path = folder / entry.files[-1]
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                if _digest(path) != entry.digest:
                    raise LabelingError(
                        f"{path} was edited after the export; merge the review with --merge, or remove the file"
                    )


def accept_edited(folder: Path, reviewed: Path) -> None:
    """Allow the next export to replace labels that were edited and merged.

    Args:
        folder: Folder of the dataset.
        reviewed: Merged file or folder.

    Raises:
        LabelingError: The manifest cannot be read.
        OSError: The manifest cannot be written.
    """
    manifest = read_manifest(folder)
    merged = reviewed.resolve()
    entries = [
        replace(entry, digest=None) if (folder / entry.files[-1]).resolve().is_relative_to(merged) else entry
        for entry in manifest.entries
    ]
    if entries != list(manifest.entries):
        _write_manifest(folder, Manifest(manifest.header, entries))


class ExportFiles:
    """Writes the files of an export. Paths are relative to the folder of the dataset, with "/"."""

    def __init__(self, folder: Path, planned: Manifest) -> None:
        """Check the target, create the folders, move images of earlier exports, and remove their other files.

        Images are moved because their sources may not exist any more.

        Args:
            folder: Folder of the dataset.
            planned: Manifest of the complete export.

        Raises:
            LabelingError: A file exists that no export has written, or labels were edited. Nothing was changed.
            OSError: A file cannot be written or removed.
        """
        self._folder, self._planned = folder, planned
        self._parts = itertools.count()
        self._digests: dict[str, str] = {}
        check_unchanged(folder)
        before = read_manifest(folder)
        wanted = set(planned.files)
        self._folders = {str(PurePosixPath(path).parent) for path in wanted}
        self._existing = _existing(folder, self._folders)
        foreign = (self._existing & wanted).difference(before.files)
        if foreign:
            raise LabelingError(
                f"{folder / min(foreign)} exists and no export has written it; move it away, or choose another folder"
            )
        for part in (folder / WORK).glob(f"{_PART}*{PART_SUFFIX}"):  # a killed process leaves them
            part.unlink()
        stale = [
            replace(entry, files=files, digest=None)
            for entry in before.entries
            if (files := tuple(path for path in entry.files if path not in wanted))
        ]
        _write_manifest(folder, Manifest({**planned.header, "complete": False}, [*planned.entries, *stale]))
        for name in sorted(self._folders):
            make_folder(folder / name)
        self._move_images(stale)
        self.num_removed = _remove(folder, [path for entry in stale for path in entry.files], self._folders)

    def exists(self, path: str) -> bool:
        """Return whether an earlier export, or an interrupted run of this one, has written a file."""
        return path in self._existing

    def write_text(self, path: str, text: str) -> None:
        """Write a file with labels unless it has this content."""
        content = text.encode()
        self._digests[path] = _digest_of(content)
        if self.exists(path) and (self._folder / path).read_bytes() == content:
            return
        self.write_bytes(path, content)

    def write_bytes(self, path: str, content: bytes) -> None:
        """Create or replace a file."""
        with self._part(path) as part:
            part.write_bytes(content)

    def copy(self, path: str, source: Path, link: bool) -> None:
        """Create or replace a file with a copy of another.

        Args:
            path: Path of the new file.
            source: File to copy.
            link: Create a hard link if the file system supports it.
        """
        with self._part(path) as part:
            if link:
                with contextlib.suppress(OSError):  # another file system, or one without links
                    os.link(source, part)
                    return
            shutil.copyfile(source, part)

    @contextlib.contextmanager
    def stream(self, path: str) -> Iterator[IO[str]]:
        """Open a text file with labels for the length of a `with`.

        It is created or replaced if the `with` ends without an error.
        """
        with self.stream_bytes(path) as file:
            text = io.TextIOWrapper(file, encoding="utf-8", newline="\n")
            yield text
            text.detach()  # after a flush; `stream_bytes` closes the file

    @contextlib.contextmanager
    def stream_bytes(self, path: str) -> Iterator[BinaryIO]:
        """Open a binary file for the length of a `with`, as `stream` does."""
        with self._part(path) as part:
            with open(part, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            self._digests[path] = _digest(part)

    @contextlib.contextmanager
    def spool(self) -> Iterator[IO[str]]:
        """Open a temporary text file for writing and reading, for the length of a `with`."""
        part = self._next_part()
        try:
            with open(part, "w+", encoding="utf-8", newline="\n") as file:
                yield file
        finally:
            part.unlink(missing_ok=True)

    def complete(self) -> None:
        """Sync the folders, and write the manifest of the complete export."""
        for name in sorted(self._folders):
            sync_folder(self._folder / name)
        entries = [replace(entry, digest=self._digests.get(entry.files[-1])) for entry in self._planned.entries]
        _write_manifest(self._folder, Manifest({**self._planned.header, "complete": True}, entries))

    def _move_images(self, stale: Iterable[ManifestEntry]) -> None:
        """Move images that are in other folders now."""
        targets = {entry.image: entry.files[0] for entry in self._planned.entries if entry.image is not None}
        for entry in stale:
            target = targets.get(entry.image) if entry.image is not None else None
            if target is None or target in self._existing:
                continue
            for path in entry.files:
                if PurePosixPath(path).name == PurePosixPath(target).name and (self._folder / path).is_file():
                    os.replace(self._folder / path, self._folder / target)
                    self._existing.add(target)

    @contextlib.contextmanager
    def _part(self, path: str) -> Iterator[Path]:
        part = self._next_part()
        try:
            yield part
            os.replace(part, self._folder / path)
        finally:
            part.unlink(missing_ok=True)

    def _next_part(self) -> Path:
        return self._folder / WORK / f"{_PART}{next(self._parts)}{PART_SUFFIX}"


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    lines = [json.dumps(manifest.header, ensure_ascii=False) + "\n", *(one.to_line() for one in manifest.entries)]
    write_file(folder / _MANIFEST, "".join(lines).encode())


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=_DIGEST_SIZE)
    with open(path, "rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def _digest_of(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=_DIGEST_SIZE).hexdigest()


def _existing(folder: Path, subfolders: Iterable[str]) -> set[str]:
    """Return the paths in several subfolders, relative to the folder."""
    found: set[str] = set()
    for name in subfolders:
        prefix = "" if name == "." else f"{name}/"
        try:
            found.update(f"{prefix}{path}" for path in os.listdir(folder / name))
        except FileNotFoundError:
            continue
        except NotADirectoryError as error:
            raise LabelingError(
                f"the dataset needs the folder {folder / name}, which is a file; move it away"
            ) from error
    return found


def _remove(folder: Path, paths: Sequence[str], kept: Iterable[str]) -> int:
    """Remove files and the folders that become empty, except some; return the number of files that existed."""
    num_removed = 0
    for path in paths:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            (folder / path).unlink()
            num_removed += 1
    parents = {parent for path in paths for parent in PurePosixPath(path).parents}
    for parent in sorted(parents.difference(map(PurePosixPath, (".", *kept))), key=lambda path: -len(path.parts)):
        with contextlib.suppress(OSError):  # not empty, or removed
            (folder / parent).rmdir()
    return num_removed
