"""Files that survive a crash: complete or absent, whatever the point of the crash."""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

logger = logging.getLogger(__name__)

PART_SUFFIX = ".part"  # suffix of incomplete files
_FULL = tuple(getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EFBIG") if hasattr(errno, name))


def make_folder(folder: Path) -> None:
    """Create a folder and its parents unless they exist, and sync the new entries to the disk.

    Args:
        folder: Path of the folder.

    Raises:
        OSError: The folder cannot be created.
    """
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


def write_file(path: Path, content: bytes, mode: int = 0o666) -> None:
    """Create or replace a file. After a crash, it has the old or the new content.

    Args:
        path: Path of the file; its folder is created if necessary.
        content: New content.
        mode: Permissions of a new file, which the umask restricts.

    Raises:
        OSError: The file cannot be written; it is unchanged.
    """
    with _replacement(path) as part, open(part, "wb", opener=functools.partial(os.open, mode=mode)) as file:
        file.write(content)
        _sync_file(file)


@contextlib.contextmanager
def open_replacement(path: Path) -> Iterator[IO[str]]:
    """Open a new text file for the length of a `with`. It replaces a file if the `with` ends without an error.

    Args:
        path: Path of the file to create or replace; its folder is created if necessary.

    Raises:
        OSError: The file cannot be written; it is unchanged.
    """
    with _replacement(path) as part, open(part, "w", encoding="utf-8", newline="\n") as file:
        yield file
        _sync_file(file)


class CompleteLines(NamedTuple):
    """The part of a file of lines that consists of complete batches.

    Attributes:
        num_lines: Number of lines in the complete batches.
        num_bytes: Size of the complete batches.
        num_found: Number of lines in the whole file, without an incomplete last one.
    """

    num_lines: int
    num_bytes: int
    num_found: int


def find_complete_lines(file: IO[bytes], is_end: Callable[[int], bool]) -> CompleteLines:
    """Return the part of a file to which batches of lines are appended that a crash has left complete.

    Args:
        file: File that is open for reading; it is read from its beginning.
        is_end: Function that returns whether a batch ends after this number of lines.
    """
    num_lines = num_bytes = num_found = position = 0
    file.seek(0)
    for line in file:
        if not line.endswith(b"\n"):
            break
        num_found, position = num_found + 1, position + len(line)
        if is_end(num_found):
            num_lines, num_bytes = num_found, position
    return CompleteLines(num_lines, num_bytes, num_found)


def remove_file(path: Path) -> bool:
    """Remove a file, and log a warning if this fails.

    Args:
        path: Path of the file.

    Returns:
        Whether the file is gone.
    """
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("cannot remove %s: %s; the next start tries again", path, error)
        return False
    return True


def remove_folder(folder: Path) -> bool:
    """Remove a folder with its files, and log a warning if this fails.

    Args:
        folder: Path of the folder; it may not exist.

    Returns:
        Whether the folder is gone.
    """
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        return True
    except OSError as error:
        logger.warning("cannot remove %s: %s; the next start tries again", folder, error)
        return False
    return True


def sync_folder(folder: Path) -> None:
    """Wait until created and renamed entries of a folder are on the disk.

    Args:
        folder: Path of the folder.

    Raises:
        OSError: The folder cannot be synced.
    """
    if os.name == "nt":  # folders cannot be opened there
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_disk_full(error: BaseException) -> bool:
    """Return whether an error of the system or of SQLite means that there is no space for a file.

    Args:
        error: The error.
    """
    if isinstance(error, OSError):
        return error.errno in _FULL
    return isinstance(error, sqlite3.OperationalError) and "full" in str(error)


@contextlib.contextmanager
def _replacement(path: Path) -> Iterator[Path]:
    """Return a path for new content. It replaces a file if the `with` ends without an error."""
    make_folder(path.parent)
    part = path.with_name(path.name + PART_SUFFIX)
    try:
        yield part
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise
    sync_folder(path.parent)


def _sync_file(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())
