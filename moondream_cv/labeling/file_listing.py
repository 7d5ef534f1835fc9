"""Files of folders, on disk and behind URLs that fsspec can list. No file is opened."""

from __future__ import annotations

import difflib
import glob
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from moondream_cv.escaping import escaped
from moondream_cv.labeling.errors import LabelingError
from moondream_cv.labeling.layout import SETTINGS
from moondream_cv.urls import shown_url


def shown(path: str | os.PathLike[str]) -> str:
    """Return a path or a URL in quotes for messages, without control characters, and without secrets of a URL.

    Args:
        path: Path or URL.
    """
    text = os.fspath(path)
    return f'"{escaped(shown_url(text) if "://" in text else text)}"'


def walk_folder(folder: str, recursive: bool, excluded: Path) -> list[str]:
    """Return the paths of the files in a folder, relative to it, with "/", sorted by character.

    Hidden files and folders and labeled datasets in subfolders are skipped. Symbolic links are followed, but each
    folder is read once, so links may form a loop.

    Args:
        folder: Path of the folder.
        recursive: Include subfolders.
        excluded: Folder to skip; it may not exist.

    Raises:
        LabelingError: A folder cannot be read.
    """
    found: list[str] = []
    visited = {os.path.realpath(excluded)}
    pending = [""]
    while pending:
        prefix = pending.pop()
        place = os.path.join(folder, prefix)
        real = os.path.realpath(place)
        if real in visited or (prefix and os.path.exists(os.path.join(place, SETTINGS))):
            continue
        visited.add(real)
        subfolders = []
        try:
            with os.scandir(place) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    is_link = entry.is_symlink()
                    if os.path.isdir(entry.path) if is_link else entry.is_dir():
                        subfolders.append(f"{prefix}{entry.name}/")
                    elif is_link or entry.is_file():  # a broken link is reported as an unreadable image
                        found.append(prefix + entry.name)
        except OSError as error:
            raise LabelingError(
                f"the folder {shown(place)} cannot be read: {error.strerror}; check its permissions"
            ) from error
        if recursive:
            pending += sorted(subfolders, reverse=True)  # a stack
    return sorted(found)


def missing_path(path: str, kind: str = "file or folder") -> LabelingError:
    """Return the error for a path that does not exist, with the most similar existing path.

    Args:
        path: The path.
        kind: Kind of the missing entry, for the message.
    """
    parent, name = os.path.split(path.rstrip("/\\"))
    hint = "check the path"
    try:
        close = difflib.get_close_matches(name, os.listdir(parent or "."), 1)
    except OSError:
        close = []
        if parent:
            hint = f"the folder {shown(parent)} does not exist either"
    if close:
        hint = f"did you mean {shown(os.path.join(parent, close[0]))}?"
    return LabelingError(f"{shown(path)}: no such {kind}; {hint}")


def list_url(url: str, recursive: bool) -> list[tuple[str, str]]:
    """Return the files behind a URL that fsspec can list, such as `s3://bucket/folder`, sorted by path.

    Args:
        url: URL of a file or a folder, or a glob. Chained URLs such as `zip://::s3://bucket/images.zip` are valid.
        recursive: Include subfolders.

    Returns:
        Pairs of the URL of a file, and its path relative to the folder of `url`.

    Raises:
        LabelingError: The package of the file system is missing, the URL cannot be listed or does not exist, or it
            contains a password.
    """
    if urlsplit(url.partition("::")[0]).password is not None:
        raise LabelingError(
            f"{shown(url)} contains a password, which would be written to the dataset; configure it in "
            "~/.config/fsspec/conf.json or the environment"
        )
    files, root = _file_system(url)
    try:
        paths, base = _paths(files, root, recursive)
    except Exception as error:  # file systems raise errors of their packages
        raise LabelingError(f"{shown(url)} cannot be listed: {_reason(error)}; check the URL and the access") from error
    if not paths:
        raise LabelingError(f"{shown(url)}: no such file or folder; check the URL")
    head, separator, rest = url.partition("::")
    start = _folder_url(head, root, base)
    found = []
    for path in sorted(paths):
        relative = path[len(base) :].lstrip("/")
        if not any(part.startswith(".") for part in relative.split("/")):
            found.append((f"{start}{relative}{separator}{rest}", relative))
    return found


def _file_system(url: str) -> tuple[Any, str]:
    """Return the file system of a URL, and the path in it."""
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise LabelingError(f'{shown(url)} needs the package fsspec; pip install "moondream-cv[labeling]"') from error
    try:
        files, root = url_to_fs(url)
    except ImportError as error:
        raise LabelingError(f"{shown(url)} needs another package: {_reason(error)}") from error
    except Exception as error:
        raise LabelingError(f"{shown(url)} cannot be opened: {_reason(error)}; check the URL and the access") from error
    return files, str(root)


def _paths(files: Any, root: str, recursive: bool) -> tuple[list[str], str]:
    """Return the paths of all files, and the folder to which names are relative."""
    if glob.has_magic(root) and not files.exists(root):
        matches = files.glob(root, detail=True)
        return [path for path, entry in matches.items() if entry["type"] == "file"], _literal_folder(root)
    if files.isdir(root):
        return list(files.find(root, maxdepth=None if recursive else 1)), root
    return [root] if files.isfile(root) else [], root.rpartition("/")[0]


def _folder_url(head: str, root: str, base: str) -> str:
    """Return the URL of the folder `base` with a slash, from the URL of `root`, which is `base` or below it."""
    below = root.rstrip("/")[len(base.rstrip("/")) :].strip("/")
    start = head.rstrip("/").removesuffix(below) if below else head
    return start if start.endswith("/") else f"{start}/"


def _literal_folder(pattern: str) -> str:
    """Return the folder in front of the first component of a glob that contains a special character."""
    parts = pattern.split("/")
    return "/".join(parts[: next(i for i, part in enumerate(parts) if glob.has_magic(part))])


def expand_glob(pattern: str) -> Iterator[tuple[str, str]]:
    """Yield the matches of a glob on disk in sorted order, with their paths relative to its literal folder.

    Args:
        pattern: Glob, in which `**` matches any folders.
    """
    base = _literal_folder(pattern.replace(os.sep, "/"))
    for match in sorted(glob.glob(pattern, recursive=True)):
        yield match, os.path.relpath(match, base or None).replace(os.sep, "/")


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
