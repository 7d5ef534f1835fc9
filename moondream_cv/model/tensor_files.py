"""Files of named tensors: find them in a folder, memory-map them and read one tensor at a time.

Supports safetensors and PyTorch's format, single and sharded. PyTorch files are read without executing code from the
file. `key_names.py` maps the names of the tensors.
"""

from __future__ import annotations

import json
import pickle
import re
import threading
import zipfile
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moondream_cv.errors import CheckpointError

_PREFERRED = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "model.pt",
    "model.pth",
)
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\.\w+)$")
_REOPEN_AFTER = 32 * 2**20  # bytes read; pages of a mapped file stay in memory until it is closed


class TensorFile(Protocol):
    """A memory-mapped file. It is reopened from time to time to release the pages that were read.

    Attributes:
        path: Path of the file.
        shapes: Shapes of the tensors by name.
    """

    path: Path
    shapes: dict[str, tuple[int, ...]]

    def read(self, key: str, rows: slice | None = None) -> Tensor:
        """Return a tensor on the CPU. It may be a view of the mapped file.

        Args:
            key: Name of the tensor.
            rows: Slice of the first dimension, to read a large tensor in parts; None: the whole tensor.
        """


class SafetensorsFile:
    """A safetensors file."""

    def __init__(self, path: Path) -> None:
        """Open a file and read its header.

        Args:
            path: Path of the file.

        Raises:
            CheckpointError: The file cannot be read.
        """
        self.path = path
        _check_beginning(path)
        self._file, self._read = self._open(), 0
        self.shapes = {key: tuple(self._file.get_slice(key).get_shape()) for key in self._file.keys()}  # noqa: SIM118

    def read(self, key: str, rows: slice | None = None) -> Tensor:
        """Return a tensor, or rows of it, on the CPU."""
        if self._read > _REOPEN_AFTER:
            self._file, self._read = self._open(), 0
        # Python runs signal handlers in the main thread. safetensors would turn a KeyboardInterrupt into a ValueError.
        if threading.current_thread() is threading.main_thread():
            tensor = _run_in_thread(lambda: self._read_tensor(key, rows))
        else:
            tensor = self._read_tensor(key, rows)
        self._read += tensor.nbytes
        return tensor

    def _read_tensor(self, key: str, rows: slice | None) -> Tensor:
        with torch.device("cpu"):  # slices are created on PyTorch's default device
            tensor: Tensor = self._file.get_tensor(key) if rows is None else self._file.get_slice(key)[rows]
        return tensor

    def _open(self) -> Any:
        try:
            opened: AbstractContextManager[Any] = safe_open(self.path, framework="pt", device="cpu")
            return opened.__enter__()
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{self.path} is truncated or not a safetensors file ({error}); fetch it again"
            ) from error


def _run_in_thread(read: Callable[[], Tensor]) -> Tensor:
    """Return the result of a function that runs in another thread. A KeyboardInterrupt is raised after it returned."""
    future: Future[Tensor] = Future()

    def run() -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(read())
        except BaseException as error:
            future.set_exception(error)

    try:
        threading.Thread(target=run, daemon=True).start()
        return future.result()
    finally:
        # `start` can be interrupted as well, before or after the thread runs.
        if not future.cancel():
            wait([future])


class TorchFile:
    """A `.pt`, `.pth` or `.bin` file with a mapping of names to tensors."""

    def __init__(self, path: Path) -> None:
        """Open a file and map its tensors.

        Args:
            path: Path of the file.

        Raises:
            CheckpointError: The file cannot be read.
        """
        self.path = path
        _check_beginning(path)
        self._tensors, self._read = _flat(read_torch_file(path), path), 0
        self.shapes = {key: tuple(tensor.shape) for key, tensor in self._tensors.items()}

    def read(self, key: str, rows: slice | None = None) -> Tensor:
        """Return a tensor, or rows of it, on the CPU. It may be a view of the mapped file."""
        if self._read > _REOPEN_AFTER and zipfile.is_zipfile(self.path):
            self._tensors, self._read = _flat(read_torch_file(self.path), self.path), 0
        tensor = self._tensors[key] if rows is None else self._tensors[key][rows]
        self._read += tensor.nbytes
        return tensor


def open_tensor_file(path: Path) -> TensorFile:
    """Open a file in the format of its suffix.

    Args:
        path: File that ends in `.safetensors`, `.pt`, `.pth` or `.bin`.

    Raises:
        CheckpointError: The file is missing, empty, truncated or in another format, or contains more than tensors.
    """
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    if path.suffix in (".pt", ".pth", ".bin"):
        return TorchFile(path)
    raise CheckpointError(f"{path} is not a checkpoint: its name must end in .safetensors, .pt, .pth or .bin")


def open_tensor_files(source: Path) -> list[TensorFile]:
    """Open all files with the weights of a checkpoint.

    Args:
        source: A file, or a folder.

    Raises:
        CheckpointError: Files are missing or damaged.
    """
    return [open_tensor_file(path) for path in find_tensor_files(source)]


def read_torch_file(path: Path) -> Any:
    """Read a file in PyTorch's format without executing code from it.

    Args:
        path: Path of the file.

    Raises:
        CheckpointError: The file is damaged or contains more than tensors.
    """
    try:
        # Files written before PyTorch 1.6 are not zip archives and cannot be mapped.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} is damaged or contains more than tensors: {_first_line(error)}") from error
    except Exception as error:  # a damaged file can raise anything
        raise CheckpointError(f"{path} is truncated or not a PyTorch file ({_first_line(error)})") from error


def find_tensor_files(source: Path) -> list[Path]:
    """Find the files with the weights.

    Args:
        source: The file itself, or a folder.

    Raises:
        CheckpointError: There are no weights, a shard is missing, or several files could be meant.
    """
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise CheckpointError(f"{source} does not exist")
    for name in _PREFERRED:
        if (source / name).is_file():
            return _indexed(source / name) if name.endswith(".json") else [source / name]
    for pattern in ("*.safetensors", "*.pt", "*.pth"):
        files = sorted(source.glob(pattern))
        if files:
            return files if len(files) == 1 else _shards(source, files)
    problem = "is empty" if not any(source.iterdir()) else "contains no weights"
    raise CheckpointError(
        f"the folder {source} {problem}; a checkpoint has a model.safetensors, or shards with an index"
    )


def weight_files(names: Iterable[str]) -> list[str]:
    """Select the files with the weights, including the index of shards, as `find_tensor_files` does.

    Args:
        names: Names of all files in a folder or repository.

    Returns:
        Names of the files; empty if there are no weights.
    """
    here = sorted(name for name in names if "/" not in name)
    for name in _PREFERRED:
        if name in here:
            stem, is_index = name.removesuffix(".index.json").rpartition(".")[0], name.endswith(".json")
            return [name, *(n for n in here if is_index and (m := _SHARD.match(n)) and m[1] == stem)]
    for suffixes in ((".safetensors",), (".pt",), (".pth",)):
        if found := [name for name in here if name.endswith(suffixes)]:
            return found
    return []


def _indexed(index: Path) -> list[Path]:
    try:
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        paths = [index.parent / name for name in files if Path(name).name == name]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not an index of shards ({error!r}); fetch it again") from error
    if not paths or len(paths) != len(files):
        raise CheckpointError(f"{index} names no shards, or shards outside its folder: {files}")
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise CheckpointError(
            f"{index.parent} lacks {len(missing)} of its {len(paths)} shards: {some(missing)}; fetch them again"
        )
    return paths


def _shards(folder: Path, files: list[Path]) -> list[Path]:
    matches = [_SHARD.match(f.name) for f in files]
    counts = {(m[1], int(m[3])) for m in matches if m is not None}
    if None in matches or len(counts) != 1:
        raise CheckpointError(
            f"{folder} contains several files with weights: {some([f.name for f in files])}; give one of them"
        )
    ((_, count),) = counts
    if len(files) != count:
        raise CheckpointError(f"{folder} contains {len(files)} of {count} shards: {some([f.name for f in files])}")
    return files


def _check_beginning(path: Path) -> None:
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not head:
        raise CheckpointError(f"{path} is empty; fetch it again")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise CheckpointError(f"{path} is a web page that was saved instead of the file; remove it and fetch it again")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull`")


def _flat(loaded: Any, path: Path) -> dict[str, Tensor]:
    """Return the tensors of a loaded file. Training code may have wrapped them in a mapping."""
    for wrapper in ("state_dict", "model_state_dict", "lora_state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
            loaded = loaded[wrapper]
    if not isinstance(loaded, Mapping) or not loaded:
        raise CheckpointError(f"{path} must contain a mapping of names to tensors, got {type(loaded).__name__}")
    strange = [str(key) for key, value in loaded.items() if not isinstance(value, Tensor)]
    if strange:
        raise CheckpointError(f"{path}: {len(strange)} entries are not tensors: {some(strange)}")
    return {str(key): value for key, value in loaded.items()}


def some(names: Iterable[str], limit: int = 4, show: Callable[[str], str] = str) -> str:
    """Return the first few names as text, and the number of further ones.

    Args:
        names: Names to list.
        limit: Maximum number of names to list.
        show: Formats a name.
    """
    listed = list(names)
    more = f", … and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(show(name) for name in listed[:limit]) + more


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]
