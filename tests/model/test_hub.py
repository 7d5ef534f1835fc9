"""The hub without a network: what is cached is found, what is not is named together with the way out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from moondream_cv.errors import CheckpointError
from moondream_cv.model import hub
from moondream_cv.model.sources import hub_source
from tests.small_checkpoint import byte_tokenizer, small_config, write_small

REPO, REVISION, COMMIT = "someone/small", "v1", "0123456789abcdef0123456789abcdef01234567"
Cached = Callable[..., Path]


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cached:
    """Gives the snapshot folder of a repository in an otherwise empty cache; the network is not to be used."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))

    def snapshot(repo: str = REPO, revision: str = REVISION) -> Path:
        root = tmp_path / "hub" / f"models--{repo.replace('/', '--')}"
        (root / "refs").mkdir(parents=True)
        (root / "refs" / revision).write_text(COMMIT)
        folder = root / "snapshots" / COMMIT
        folder.mkdir(parents=True)
        return folder

    return snapshot


def test_a_cached_repository_is_found(cached: Cached) -> None:
    folder = cached()
    write_small(folder)
    source = hub_source(REPO, REVISION)
    assert source.folder == folder
    assert source.config == small_config()
    assert source.release is None
    assert source.tokenizer().get_vocab_size() == 266
    assert hub.fetch_file(REPO, REVISION, "config.json") == folder / "config.json"
    assert hub.fetch_snapshot(REPO, COMMIT) == folder


def test_what_is_not_cached_names_the_way_out(cached: Cached) -> None:
    with pytest.raises(
        CheckpointError, match=r"someone/small@v1 is not in the cache.*moondream-cv download someone/small@v1"
    ):
        hub_source(REPO, REVISION)
    folder = cached()
    (folder / "config.json").write_text(json.dumps(small_config().to_dict()))
    with pytest.raises(
        CheckpointError, match=r"someone/small@v1 .*moondream-cv download"
    ):  # the download was cut short
        hub_source(REPO, REVISION)
    with pytest.raises(CheckpointError, match=r"no file 'tokenizer\.json'"):
        hub.fetch_file(REPO, REVISION, "tokenizer.json")


def test_an_unknown_release_is_refused_before_anything_is_fetched(cached: Cached) -> None:
    with pytest.raises(
        CheckpointError, match=r"moondream2@2024-08-26 is no release.*these work: .*moondream2@2025-06-21"
    ):
        hub_source("vikhyatk/moondream2", "2024-08-26")


def test_a_repository_that_says_no_sizes_is_refused(cached: Cached) -> None:
    folder = cached()
    write_small(folder)
    (folder / "config.json").write_text('{"model_type": "moondream1", "config": {}}')
    with pytest.raises(CheckpointError, match="these work: vikhyatk/moondream2@2025-06-21"):
        hub_source(REPO, REVISION)


def test_the_tokenizer_of_the_default_release_lives_elsewhere(cached: Cached) -> None:
    folder = cached("vikhyatk/moondream2", "2025-06-21")
    write_small(folder)
    (folder / "config.json").write_text('{"model_type": "moondream1", "config": {}}')
    byte_tokenizer([]).save(str(folder / "tokenizer.json"))  # the one left over from earlier releases
    source = hub_source("vikhyatk/moondream2", "2025-06-21")
    with pytest.raises(CheckpointError, match=r"moondream/starmie-v1@main is not in the cache"):
        source.tokenizer()
    starmie = cached("moondream/starmie-v1", "main")
    byte_tokenizer().save(str(starmie / "tokenizer.json"))
    assert source.tokenizer().id_to_token(0) == "<|control_0|>"


def test_the_tokenizer_of_an_earlier_release_is_its_own(cached: Cached) -> None:
    folder = cached("vikhyatk/moondream2", "2025-04-14")
    write_small(folder)
    (folder / "config.json").unlink()
    source = hub_source("vikhyatk/moondream2", "2025-04-14")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is of another model: its id 50256 is None"):
        source.tokenizer()


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert hub.hub_cache() == Path("~/.cache/huggingface/hub").expanduser()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert hub.hub_cache() == tmp_path / "x" / "huggingface" / "hub"
    monkeypatch.setenv("HF_HOME", str(tmp_path / "h"))
    assert hub.hub_cache() == tmp_path / "h" / "hub"
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "c"))
    assert hub.hub_cache() == tmp_path / "c"


@pytest.mark.parametrize(("value", "offline"), [("1", True), ("true", True), ("YES", True), ("0", False), ("", False)])
def test_offline(monkeypatch: pytest.MonkeyPatch, value: str, offline: bool) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    assert hub.is_offline() is offline


@pytest.mark.parametrize("repo", ["a/b/c", "a//b", "-", "a/b--c"])
def test_names_that_no_repository_can_have(cached: Cached, repo: str) -> None:
    with pytest.raises(CheckpointError, match="is no name of a repository"):
        hub.fetch_snapshot(repo, "main")


class _Reply:
    """As much of an HTTP reply as the hub's errors look at."""

    headers: dict[str, str] = {}  # noqa: RUF012
    status_code = 404
    request = None


def hub_error(kind: type[Exception]) -> Exception:
    try:
        return kind("the hub's long story", response=_Reply())
    except TypeError:
        return kind("the hub's long story")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (hub_error(errors.GatedRepoError), r"someone/small@v1 is gated"),
        (hub_error(errors.RepositoryNotFoundError), r"someone/small is not on the hub, or private"),
        (hub_error(errors.RevisionNotFoundError), r"someone/small has no revision 'v1'"),
        (hub_error(errors.HfHubHTTPError), r"cannot be fetched \(.*long story.*moondream-cv download"),
        (errors.LocalEntryNotFoundError("…"), r"no connection: run `moondream-cv download someone/small@v1`"),
        (ConnectionError(), r"someone/small@v1 cannot be fetched \(ConnectionError\)"),
        (OSError(28, "No space left on device"), r"cannot be fetched \(.*No space left"),
    ],
    ids=lambda v: type(v).__name__,
)
def test_errors_of_the_hub(monkeypatch: pytest.MonkeyPatch, error: Exception, says: str) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=says):
        hub.fetch_snapshot(REPO, REVISION)


def test_code_is_never_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def fake(repo: str, **kwargs: Any) -> str:
        asked.append(kwargs)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    with pytest.raises(CheckpointError, match="has no weights"):
        hub.fetch_snapshot(REPO, REVISION)
    assert len(asked) == 2  # safetensors are preferred
    assert not any(pattern.endswith((".py", "*")) for call in asked for pattern in call["allow_patterns"])
