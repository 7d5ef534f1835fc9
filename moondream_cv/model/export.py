"""Export of a checkpoint, its config and its tokenizer to one folder, for machines without a network."""

from __future__ import annotations

import filecmp
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moondream_cv.errors import CheckpointError
from moondream_cv.model.checkpoints import check_shapes, config_json
from moondream_cv.model.hub import cached_snapshot, fetch, fetch_file, is_offline, look_up, other_weights
from moondream_cv.model.releases import read_config_file
from moondream_cv.model.sources import Source, hub_source, is_tokenizer_only, release_of
from moondream_cv.model.tensor_files import find_tensor_files, open_tensor_files, weight_files

_INDEX = ".index.json"


def download_from_hub(repo: str, revision: str | None, to: Path | None = None, **options: Any) -> Path:
    """Download a checkpoint with its tokenizer, or a repository that contains only a tokenizer.

    Args:
        repo: Repository on the hub.
        revision: Branch, tag or commit; None: the default release, or `main` of another repository.
        to: Folder to write; None: the cache of the hub.
        options: Options of the hub, as in `hub_source`.

    Returns:
        The folder with the files.

    Raises:
        CheckpointError: The checkpoint cannot be fetched or is not supported, or the folder cannot be written.
    """
    if to is not None:
        _check_folder(to)
    named, _ = release_of(repo, revision)
    tokenizer = _tokenizer_only(repo, named, options)
    if tokenizer is not None:
        if to is None:
            return tokenizer.parent
        _writing(to, lambda: _copy(tokenizer, to / "tokenizer.json"))
        return to
    source = hub_source(repo, revision, refresh=True, folder=to, **options)
    if to is not None:
        return export(source, to, refresh=True)
    source.find_tokenizer(refresh=True)
    return source.folder


def export(source: Source, to: Path, refresh: bool = False) -> Path:
    """Write weights, config, tokenizer and calibration of a source to a folder.

    The config gets the sections that `load` needs, unless the release is only a guess. In this case, load the folder as
    "folder@release" to specify the release.

    Args:
        source: Checkpoint to export.
        to: Folder to write; it must not contain weights of another checkpoint.
        refresh: Check the hub for a newer tokenizer even if one is cached.

    Returns:
        The folder.

    Raises:
        CheckpointError: The tokenizer is missing, the folder contains other weights or cannot be written, or the files
            do not fit together.
    """
    tokenizer, _ = source.find_tokenizer(refresh)
    weights = find_tensor_files(source.weights)
    index = [path for path in source.folder.glob(f"*{_INDEX}") if len(weights) > 1 and source.weights.is_dir()]
    calibration = [path for path in (source.folder / "calibration.json",) if path.is_file()]
    _check_folder(to)
    for path in weights:
        if (to / path.name).exists() and not _same(path, to / path.name):
            raise other_weights(to, path.name)

    def write() -> None:
        _copy(tokenizer, to / "tokenizer.json")
        for path in (*calibration, *index, *weights):
            _copy(path, to / path.name)
        text = json.dumps(_config(source), indent=1) + "\n"
        part = to / "config.json.part"
        part.write_text(text, encoding="utf-8")
        os.replace(part, to / "config.json")

    _writing(to, write)
    check_shapes(to, open_tensor_files(to), source.config)
    return to


def _config(source: Source) -> dict[str, Any]:
    file = source.folder / "config.json"
    original: Mapping[str, Any] = read_config_file(file) if file.is_file() else {}
    if source.is_guess:
        return dict(original)
    kept = {key: value for key, value in original.items() if key not in ("auto_map", "config")}
    return {**config_json(source.config), **kept, **source.config.to_dict()}


def _tokenizer_only(repo: str, revision: str, options: Mapping[str, Any]) -> Path | None:
    """Return the tokenizer of a repository without weights; None if it has weights."""
    if is_offline() or options.get("local_files_only"):
        cached = cached_snapshot(repo, revision, options.get("cache_dir"))
        if cached is None or weight_files(path.name for path in cached.iterdir()):
            return None
        return (
            fetch_file(repo, revision, "tokenizer.json", **options) if (cached / "tokenizer.json").is_file() else None
        )
    remote = look_up(repo, revision, **options)
    return fetch(remote, ["tokenizer.json"], **options) / "tokenizer.json" if is_tokenizer_only(remote) else None


def _check_folder(to: Path) -> None:
    if to.exists() and not to.is_dir():
        raise CheckpointError(f"{to} is a file; give a folder for the download")


def _writing(to: Path, write: Any) -> None:
    try:
        to.mkdir(parents=True, exist_ok=True)
        write()
    except OSError as error:
        raise CheckpointError(f"{to} cannot be written: {error}") from error


def _copy(path: Path, target: Path) -> None:
    """Copy a file unless the target has the same content. An interrupted copy leaves no target."""
    if target.exists() and _same(path, target):
        return
    part = target.with_name(f"{target.name}.part")
    shutil.copyfile(path, part)
    shutil.copystat(path, part)
    os.replace(part, target)


def _same(path: Path, target: Path) -> bool:
    """Return whether two paths have the same content. Files of the same size and time are not compared."""
    return target.samefile(path) or filecmp.cmp(path, target)
