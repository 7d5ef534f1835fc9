"""Checkpoints and tokenizers from the Hugging Face hub, and from its cache on this machine.

Only weights, `config.json`, `tokenizer.json` and `calibration.json` are fetched: code published with a checkpoint is
never downloaded.
Progress bars, resumption and access tokens are those of `huggingface_hub`, which reads its own environment variables;
`HF_HUB_OFFLINE` and the place of the cache are read here at each call.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import errors

from moondream_cv.errors import CheckpointError

PATTERNS = ("config.json", "tokenizer.json", "calibration.json", "*.safetensors", "*.safetensors.index.json")
_TORCH_PATTERNS = (
    "config.json",
    "tokenizer.json",
    "calibration.json",
    "*.pt",
    "*.pth",
    "pytorch_model*.bin",
    "pytorch_model*.json",
)
_WEIGHTS = (".safetensors", ".pt", ".pth", ".bin")


def is_offline() -> bool:
    """Whether `HF_HUB_OFFLINE` forbids the network."""
    value = os.environ.get("HF_HUB_OFFLINE", os.environ.get("TRANSFORMERS_OFFLINE", ""))
    return value.upper() in ("1", "ON", "YES", "TRUE")


def hub_cache() -> Path:
    """Where `huggingface_hub` keeps what it downloads."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(name):
            return Path(os.environ[name]).expanduser()
    home = os.environ.get("HF_HOME")
    if not home:
        home = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(home).expanduser() / "hub"


def fetch_snapshot(repo: str, revision: str, **options: Any) -> Path:
    """Fetch what is needed of a repository; what is in the cache already is not fetched again.

    Args:
        options: Of `huggingface_hub.snapshot_download`: `cache_dir`, `token`, `local_files_only`, `force_download`.

    Returns:
        The folder in the cache.

    Raises:
        CheckpointError: It does not exist, access is refused, the network is down, or offline and not cached.
    """
    folder = _snapshot(repo, revision, PATTERNS, **options)
    if not _has_weights(folder):
        folder = _snapshot(repo, revision, _TORCH_PATTERNS, **options)
    if not _has_weights(folder):
        raise CheckpointError(f"{repo}@{revision} has no weights in {folder}: {_way_out(repo, revision)}")
    return folder


def fetch_file(repo: str, revision: str | None, filename: str, **options: Any) -> Path:
    """Fetch one file of a repository, or find it in the cache; errors as in `fetch_snapshot`."""
    path = _snapshot(repo, revision or "main", (filename,), **options) / filename
    if not path.is_file():
        raise CheckpointError(f"{repo}@{revision or 'main'} has no file {filename!r}, or it is not cached")
    return path


def _has_weights(folder: Path) -> bool:
    return any(path.suffix in _WEIGHTS for path in folder.iterdir())


def _snapshot(repo: str, revision: str, patterns: tuple[str, ...], **options: Any) -> Path:
    what, offline = f"{repo}@{revision}", is_offline() or bool(options.get("local_files_only"))
    options = {"cache_dir": hub_cache(), **options, "local_files_only": offline}
    try:
        folder = huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=list(patterns), **options)
        return Path(folder)
    except errors.GatedRepoError as error:
        raise CheckpointError(f"{what} is gated: ask for access on its page, then `hf auth login`") from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{repo} has no revision {revision!r} on the hub; its page lists them") from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{repo} is not on the hub, or private: check its name, or `hf auth login` where you have access"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        reason = (
            "is not in the cache, and the network is not to be used" if offline else "cannot be fetched: no connection"
        )
        raise CheckpointError(f"{what} {reason}: {_way_out(repo, revision)}") from error
    except ValueError as error:
        raise CheckpointError(f"{what} is no name of a repository on the hub: {error}") from error
    # Which errors a broken connection gives depends on the HTTP library that this version of the hub's client uses.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0][:200] or type(error).__name__
        raise CheckpointError(f"{what} cannot be fetched ({reason}): {_way_out(repo, revision)}") from error


def _way_out(repo: str, revision: str) -> str:
    return (
        f"run `moondream-cv download {repo}@{revision}` once with a connection (the cache is {hub_cache()}), "
        "or give a local folder"
    )
