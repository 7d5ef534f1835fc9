"""Sources of checkpoints: find the weights, the config and the tokenizer.

A source is a local folder or file, or a revision of a repository on the hub. Its files determine the release, in the
same way for both; on the hub before the weights are downloaded. `loading.py` resolves names to sources, and `export.py`
writes a source to a folder.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from torch import Tensor

from moondream_cv.errors import CheckpointError
from moondream_cv.model.checkpoints import check_shapes, stored_shapes
from moondream_cv.model.config import MoondreamConfig
from moondream_cv.model.hub import (
    SMALL_FILES,
    cached_snapshot,
    check_repo,
    failed,
    fetch,
    fetch_file,
    is_commit,
    is_offline,
    look_up,
    not_cached,
)
from moondream_cv.model.hub_requests import (
    HubError,
    RemoteRevision,
    get_revision,
    read_file,
    read_safetensors_header,
)
from moondream_cv.model.releases import (
    DEFAULT_REPO,
    DEFAULT_REVISION,
    RELEASES,
    STARMIE_TOKENIZER,
    Release,
    explicit_config,
    find_release,
    has_sizes_of,
    known_releases,
    read_config_file,
    release_by_date,
    release_by_size,
)
from moondream_cv.model.tensor_files import find_tensor_files, weight_files
from moondream_cv.model.tokenizer import read_tokenizer

logger = logging.getLogger(__name__)

_STARMIE_SIZE = 32768  # minimum vocabulary of a checkpoint that was trained with that tokenizer


@dataclass(frozen=True)
class Source:
    """A checkpoint on this machine.

    Attributes:
        weights: Folder or file with the weights.
        config: Sizes, token IDs and templates.
        release: Known or assumed release; None if a `config.json` contains the whole configuration.
        is_guess: Whether only the sizes of the weights determined the release.
        origin: Permanent name on the hub, "repo@release" or "repo@commit"; None for local files.
        options: Options of the hub that the files were fetched with.
    """

    weights: Path
    config: MoondreamConfig
    release: Release | None = None
    is_guess: bool = False
    origin: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def folder(self) -> Path:
        """Folder with the weights."""
        return self.weights if self.weights.is_dir() else self.weights.parent

    def tokenizer(self) -> Tokenizer:
        """Read the tokenizer from the folder, the repository of the release, or `moondream/starmie-v1`, in this order.

        If a release has its tokenizer in another repository, an older tokenizer in the folder fails the check and is
        ignored.

        Raises:
            CheckpointError: There is no tokenizer, or it is not the one that the checkpoint was trained with.
        """
        return self.find_tokenizer()[1]

    def find_tokenizer(self, refresh: bool = False) -> tuple[Path, Tokenizer]:
        """Return the file of the tokenizer, and the tokenizer.

        Args:
            refresh: Check the hub for a newer file even if one is cached.

        Raises:
            CheckpointError: There is no tokenizer, or it is not the one that the checkpoint was trained with.
        """
        path, release = self.folder / "tokenizer.json", self.release
        elsewhere = STARMIE_TOKENIZER if release is None else release.tokenizer_repo
        if path.is_file():
            try:
                return path, read_tokenizer(path, self.config)
            except CheckpointError:
                if release is None or elsewhere is None:
                    raise
                logger.debug("%s is not the tokenizer of %s", path, release.name)
        repo, revision = elsewhere, "main"
        if repo is None and release is not None:
            repo, revision = release.repo, release.revision
        fits = self.config.tokenizer.bos_id == 0 and self.config.text.vocab_size >= _STARMIE_SIZE
        if not repo or (release is None and not fits):
            raise CheckpointError(
                f"{self.folder} has no tokenizer.json; put the tokenizer.json of the model next to the weights"
            )
        path = fetch_file(repo, revision, "tokenizer.json", refresh, **self.options)
        return path, read_tokenizer(path, self.config)


def local_source(
    path: Path, release: Release | None = None, origin: str | None = None, options: Mapping[str, Any] | None = None
) -> Source:
    """Identify the checkpoint in a folder or file.

    A given release takes precedence over the `config.json` if both have the same sizes; otherwise the `config.json`
    does. Without either, the sizes of the weights determine the release.

    Args:
        path: Folder or file.
        release: Known release of the checkpoint, if any.
        origin: Permanent name on the hub; None for local files.
        options: Options of the hub that the files were fetched with.

    Raises:
        CheckpointError: There are no weights, the config is invalid, or there is no config and the sizes are unknown.
    """
    find_tensor_files(path)
    hub: dict[str, Any] = {"origin": origin, "options": options or {}}
    folder = path if path.is_dir() else path.parent
    file = folder / "config.json"
    config = explicit_config(read_config_file(file), str(file)) if file.is_file() else None
    if config is not None and (release is None or not _same_sizes(config, release.config)):
        return Source(path, config, **hub)
    if release is not None:
        return Source(path, release.config, release, **hub)
    release = release_by_size(stored_shapes(path), str(path))
    _warn_guess(origin or str(path), release)
    return Source(path, release.config, release, is_guess=True, **hub)


def hub_source(
    repo: str, revision: str | None = None, *, refresh: bool = False, folder: Path | None = None, **options: Any
) -> Source:
    """Fetch a checkpoint from the hub, or find it in the cache.

    Weights are downloaded only if their header shows that they are supported. A cached release or commit is used
    without a request. A cached branch is used if the hub cannot be reached.

    Args:
        repo: Repository on the hub.
        revision: Branch, tag or commit; None: the default release, or `main` of another repository.
        refresh: Check the hub even if a release or commit is cached.
        folder: Download weights into this folder unless they are cached.
        options: `cache_dir`, `token`, `local_files_only` and `force_download`, as in `huggingface_hub`.

    Raises:
        CheckpointError: The checkpoint cannot be fetched, or has no config and unknown sizes.
    """
    check_repo(repo)
    revision, release = release_of(repo, revision)
    force = bool(options.get("force_download"))
    cached = _complete_snapshot(repo, revision, options)
    if is_offline() or options.get("local_files_only"):
        if cached is None:
            raise not_cached(repo, revision)
        return _cached_source(repo, release, cached, options)
    if cached is not None and not refresh and not force and _is_settled(repo, revision, release, cached, options):
        return _cached_source(repo, release, cached, options)
    try:
        remote = look_up(repo, revision, **options)
    except HubError as error:
        if cached is None or force or error.status == 404:
            raise
        logger.warning("%s. The files in the cache are used instead", error)
        return _cached_source(repo, release, cached, options)
    return _fetched_source(remote, release, folder, options)


def release_of(repo: str, revision: str | None) -> tuple[str, Release | None]:
    """Return the revision and the release of a name on the hub.

    Args:
        repo: Repository on the hub.
        revision: Branch, tag or commit; None: the default.

    Returns:
        The revision, and its release; None if only the files can show the release.

    Raises:
        CheckpointError: The revision is a dated release that is not supported.
    """
    if revision is None:
        revision = DEFAULT_REVISION if repo == DEFAULT_REPO else "main"
    release = find_release(repo, revision)
    if release is None and repo == DEFAULT_REPO and _is_date(revision) and revision < DEFAULT_REVISION:
        raise CheckpointError(f"the release {repo}@{revision} is not supported; supported releases: {known_releases()}")
    return revision, release


def is_tokenizer_only(remote: RemoteRevision) -> bool:
    """Return whether a repository contains a tokenizer and no weights."""
    return "tokenizer.json" in remote.files and not weight_files(remote.files)


@dataclass
class _Header:
    """Header of a file on the hub, with the interface of `TensorFile`."""

    path: Path
    shapes: dict[str, tuple[int, ...]]

    def read(self, key: str, rows: slice | None = None) -> Tensor:
        raise CheckpointError(f"{self.path} is not downloaded")


def _fetched_source(
    remote: RemoteRevision, release: Release | None, folder: Path | None, options: Mapping[str, Any]
) -> Source:
    """Identify and check a revision, then download it."""
    name = f"{remote.repo}@{remote.revision}"
    weights = weight_files(remote.files)
    if not weights:
        content = "a tokenizer and no weights" if is_tokenizer_only(remote) else "no weights"
        raise failed(remote.repo, remote.revision, HubError(f"it contains {content}", 404))
    # Identify the release
    try:
        config = _remote_config(remote, options)
        headers = _headers(remote, weights, options)
        if release is None and config is None:
            release = _identify(remote, headers, options)
    except HubError as error:
        raise failed(remote.repo, remote.revision, error) from error
    # Reject unsupported checkpoints before the download
    if not headers and config is None and release is None:
        raise CheckpointError(
            f"{name} has no config.json with the sections text, vision and region, and its weights are PyTorch files, "
            f"whose sizes cannot be read without downloading them: {', '.join(weights)}. Download it and give the "
            f"folder, or use one of {known_releases()}"
        )
    if headers:
        if config is None or (release is not None and _same_sizes(config, release.config)):
            config = (release or release_by_size(stored_shapes(headers), name)).config
        check_shapes(name, headers, config)
    # Download
    names = [*weights, *(small for small in SMALL_FILES if small in remote.files)]
    cached = _complete_snapshot(remote.repo, remote.commit, options)
    path = fetch(remote, names, None if cached is not None else folder, **options)
    exact = find_release(remote.repo, remote.revision)
    return local_source(path, release, f"{remote.repo}@{remote.commit}" if exact is None else exact.name, options)


def _remote_config(remote: RemoteRevision, options: Mapping[str, Any]) -> MoondreamConfig | None:
    if "config.json" not in remote.files:
        return None
    where = f"{remote.repo}@{remote.revision}: config.json"
    try:
        values = json.loads(read_file(remote, "config.json", options.get("token")))
    except ValueError as error:
        raise CheckpointError(f"{where} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{where} must contain a JSON object, got {type(values).__name__}")
    return explicit_config(values, where)


def _headers(remote: RemoteRevision, weights: list[str], options: Mapping[str, Any]) -> list[_Header]:
    """Read the headers of safetensors files. PyTorch files have no header that can be read without the file."""
    files = [name for name in weights if name.endswith(".safetensors")]
    return [_Header(Path(name), read_safetensors_header(remote, name, options.get("token"))) for name in files]


def _identify(remote: RemoteRevision, headers: list[_Header], options: Mapping[str, Any]) -> Release | None:
    """Find the release of a revision by the date in its name, by its commit, or by the hashes of its weights."""
    dated = release_by_date(remote.repo)
    if dated is not None and has_sizes_of(stored_shapes(headers), dated.config):
        return dated
    if remote.repo != DEFAULT_REPO:
        return None
    hashes = _hashes(remote)
    for release in RELEASES:
        try:
            known = get_revision(release.repo, release.revision, options.get("token"))
        except HubError:
            continue
        if known.commit == remote.commit or hashes & _hashes(known):
            return release
    return None


def _hashes(remote: RemoteRevision) -> set[str]:
    return {sha for name in weight_files(remote.files) if (sha := remote.files[name].sha256) is not None}


def _cached_source(repo: str, release: Release | None, folder: Path, options: Mapping[str, Any]) -> Source:
    if release is not None:
        return local_source(folder, release, release.name, options)
    return local_source(folder, _release_in_cache(repo, folder, options), f"{repo}@{folder.name}", options)


def _complete_snapshot(repo: str, revision: str, options: Mapping[str, Any]) -> Path | None:
    """Return the folder of a revision in the cache; None if its weights are not cached."""
    folder = cached_snapshot(repo, revision, options.get("cache_dir"))
    if folder is None:
        return None
    try:
        find_tensor_files(folder)
    except CheckpointError:
        return None
    return folder


def _is_settled(repo: str, revision: str, release: Release | None, folder: Path, options: Mapping[str, Any]) -> bool:
    """Return whether a cached revision never changes and its release is known without the hub."""
    if release is not None:
        return True
    known = repo != DEFAULT_REPO or _release_in_cache(repo, folder, options) is not None
    return is_commit(revision) and known


def _release_in_cache(repo: str, folder: Path, options: Mapping[str, Any]) -> Release | None:
    """Find the release of a revision by its date or by files that it shares with a release in the cache."""
    dated = release_by_date(repo)
    if dated is not None and has_sizes_of(stored_shapes(folder), dated.config):
        return dated
    files = {path.resolve() for path in find_tensor_files(folder)}
    for release in RELEASES:
        other = _complete_snapshot(repo, release.revision, options) if release.repo == repo else None
        if other is not None and files & {path.resolve() for path in find_tensor_files(other)}:
            return release
    return None


def _same_sizes(config: MoondreamConfig, other: MoondreamConfig) -> bool:
    return (config.text, config.vision, config.region) == (other.text, other.vision, other.region)


def _warn_guess(name: str, release: Release) -> None:
    logger.warning(
        "%s does not contain the name of its release. By its sizes, it is taken for %s. If it is another one, add the "
        "release to the name of its folder: FOLDER@2025-04-14",
        name,
        release.name,
    )


def _is_date(revision: str) -> bool:
    parts = revision.split("-")
    return [len(p) for p in parts] == [4, 2, 2] and all(p.isdigit() for p in parts)
