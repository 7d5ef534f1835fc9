"""Tensors in files of the store, and the errors of the disk and of SQLite."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from moondream_cv.durable_files import is_disk_full
from moondream_cv.finetune.errors import FinetuneStoreError

_MIN_FREE = 256 * 2**10  # bytes


def encode_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """Return the content of a safetensors file.

    Args:
        tensors: Tensors on any device, by name.
        metadata: Strings for the header of the file.

    Raises:
        ValueError: A value is not a dense tensor, or a key or value of the metadata is not a string.
    """
    for name, value in tensors.items():
        if not isinstance(name, str) or not isinstance(value, Tensor) or value.layout != torch.strided:
            raise ValueError(f"tensors must map names to dense tensors, got {name!r:.100}: {type(value).__name__}")
    for key, text in (metadata or {}).items():
        if not isinstance(key, str) or not isinstance(text, str):
            raise ValueError(f"metadata must map strings to strings, got {key!r:.100}: {text!r:.100}")
    # Copied, because safetensors rejects tensors that share memory.
    copies = {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    content: bytes = save(copies, metadata=dict(metadata) if metadata else None)
    return content


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Args:
        path: Path of the file.

    Returns:
        Tensors on the CPU by name, in memory of the process.

    Raises:
        FinetuneStoreError: The file is missing or damaged.
    """
    try:
        tensors: dict[str, Tensor] = load(path.read_bytes())
    except FileNotFoundError:
        raise FinetuneStoreError(f"{path} is missing; restore it from a backup, or delete the finetune") from None
    except SafetensorError as error:
        raise FinetuneStoreError(
            f"{path} is damaged ({error}); restore it from a backup, or delete the finetune"
        ) from error
    except OSError as error:
        raise FinetuneStoreError(f"{path} cannot be read: {error.strerror}; check the disk") from error
    return tensors


@contextlib.contextmanager
def storage_errors(root: Path) -> Iterator[None]:
    """Translate errors of the disk and of SQLite.

    Args:
        root: Folder for the message.

    Raises:
        FinetuneStoreError: The body raised an `OSError` or an `sqlite3.Error`.
    """
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        if is_disk_full(error) or _has_no_space(root):
            raise FinetuneStoreError(
                f"the disk of {root} is full ({error}); nothing was changed. Free some space and try again"
            ) from error
        raise FinetuneStoreError(f"{root} cannot be read or written: {error}; check its disk and files") from error


def _has_no_space(root: Path) -> bool:
    """Return whether a disk is full. SQLite reports an I/O error if it cannot create its shared-memory file."""
    try:
        return shutil.disk_usage(root).free < _MIN_FREE
    except OSError:
        return False
