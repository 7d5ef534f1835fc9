"""Where a checkpoint's parts come from: its weights, its config, its tokenizer.

A source is a local folder or file, or a repository on the hub at a revision. `loading.py` turns names into sources.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from moondream_cv.errors import CheckpointError
from moondream_cv.model.checkpoints import stored_shapes
from moondream_cv.model.config import MoondreamConfig
from moondream_cv.model.hub import fetch_file, fetch_snapshot
from moondream_cv.model.releases import (
    DEFAULT_REPO,
    DEFAULT_REVISION,
    STARMIE_TOKENIZER,
    Release,
    explicit_config,
    find_release,
    known_releases,
    read_config_file,
    release_by_size,
)
from moondream_cv.model.tensor_files import find_tensor_files
from moondream_cv.model.tokenizer import read_tokenizer

logger = logging.getLogger(__name__)

_STARMIE_SIZE = 32768  # ids that a checkpoint must know at least to have been trained with that tokenizer


@dataclass(frozen=True)
class Source:
    """A checkpoint on this machine.

    Attributes:
        weights: The folder or file with the weights.
        config: Sizes, token ids and templates.
        release: The release that it is, or is taken for; None where a `config.json` says everything.
    """

    weights: Path
    config: MoondreamConfig
    release: Release | None = None

    @property
    def folder(self) -> Path:
        return self.weights if self.weights.is_dir() else self.weights.parent

    def tokenizer(self) -> Tokenizer:
        """Read the tokenizer: from the folder, else from the release's repository, else `moondream/starmie-v1`.

        A folder of a release whose tokenizer lives elsewhere may hold another one, left over from before; that one does
        not pass the check and is left aside.

        Raises:
            CheckpointError: There is none, or it is not the one that the checkpoint was trained with.
        """
        path, release = self.folder / "tokenizer.json", self.release
        elsewhere = STARMIE_TOKENIZER if release is None else release.tokenizer_repo
        if path.is_file():
            try:
                return read_tokenizer(path, self.config)
            except CheckpointError:
                if release is None or elsewhere is None:
                    raise
                logger.debug("%s is not the tokenizer of %s", path, release.name)
        elif release is not None and elsewhere is None and release.repo:
            return read_tokenizer(fetch_file(release.repo, release.revision, "tokenizer.json"), self.config)
        if elsewhere is None or self.config.tokenizer.bos_id != 0 or self.config.text.vocab_size < _STARMIE_SIZE:
            raise CheckpointError(
                f"{self.folder} has no tokenizer.json; put the one it was trained with beside the weights"
            )
        return read_tokenizer(fetch_file(elsewhere, None, "tokenizer.json"), self.config)


def local_source(path: Path, release: Release | None = None) -> Source:
    """A folder or a file; its `config.json` counts before the release, and that before what its sizes suggest.

    Raises:
        CheckpointError: It holds no weights, its config is wrong, or it says nothing of itself and has no known sizes.
    """
    find_tensor_files(path)
    folder = path if path.is_dir() else path.parent
    file = folder / "config.json"
    config = explicit_config(read_config_file(file), str(file)) if file.is_file() else None
    if config is not None:
        return Source(path, config)
    if release is None:
        release = release_by_size(stored_shapes(path), str(path))
        logger.warning(
            "%s does not say of which release it is; it is taken for %s. Another one is named like this: %s@2025-04-14",
            path,
            release.name,
            path,
        )
    return Source(path, release.config, release)


def hub_source(repo: str, revision: str | None = None, **options: Any) -> Source:
    """A repository on the hub; weights are fetched only once it is clear that they can be used.

    Args:
        revision: None: the newest known release, or `main` of another repository.
        options: As `fetch_snapshot` takes them.

    Raises:
        CheckpointError: It cannot be fetched, or is of no known release and has no config of its own.
    """
    revision, release = release_of(repo, revision)
    if release is None:
        file = fetch_file(repo, revision, "config.json", **options)
        if explicit_config(read_config_file(file), f"{repo}@{revision}: config.json") is None:
            raise _unknown(repo, revision)
    return local_source(fetch_snapshot(repo, revision, **options), release)


def release_of(repo: str, revision: str | None) -> tuple[str, Release | None]:
    """The revision that is meant, and the release that it is; None where only its config can tell.

    Raises:
        CheckpointError: It is of no known release, and has no config that tells.
    """
    if revision is None:
        revision = DEFAULT_REVISION if repo == DEFAULT_REPO else "main"
    release = find_release(repo, revision)
    if release is None and repo == DEFAULT_REPO and _is_date(revision):  # its dated releases never say their sizes
        raise _unknown(repo, revision)
    return revision, release


def _unknown(repo: str, revision: str) -> CheckpointError:
    return CheckpointError(
        f"{repo}@{revision} is no release whose sizes are known here, and has no config.json with the sections text, "
        f"vision and region; these work: {known_releases()}"
    )


def _is_date(revision: str) -> bool:
    parts = revision.split("-")
    return [len(p) for p in parts] == [4, 2, 2] and all(p.isdigit() for p in parts)
