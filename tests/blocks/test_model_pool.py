"""Test the pool of models and the import of the plugin, without a workflows engine."""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import moondream_cv
from moondream_cv import load
from moondream_cv.engine.local_model import LocalModel
from moondream_cv.errors import BackendError, CheckpointError, MoondreamError
from moondream_cv.requests import Detect, ErrorResult
from moondream_cv_blocks import REGISTERED_INITIALIZERS, ModelPool, load_blocks, pool
from tests.helpers.remote_server import RemoteServer, Reply, remote_server

TINY = Path(moondream_cv.__file__).parent / "tiny"
MODELS_ANSWER = Reply({"models": [{"id": "tiny", "has_scores": True}]})
THREADS = 8
KEYS = ("API_KEY", "FAL_KEY", "MOONDREAM_API_KEY", "OPENAI_API_KEY", "ROBOFLOW_API_KEY")
VARIABLES = (pool.ALLOWED, pool.DEVICE, pool.TIMEOUT, *KEYS)


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def models() -> Iterator[ModelPool]:
    opened = ModelPool(device="cpu", timeout=240)
    yield opened
    opened.close()


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names that are loaded, in order."""
    names: list[str] = []

    def counting(name: str, **options: Any) -> LocalModel:
        names.append(name)
        return load(name, **options)

    monkeypatch.setattr(pool, "load", counting)
    return names


@pytest.fixture
def server() -> Iterator[RemoteServer]:
    with remote_server() as running:
        yield running


# Getting models


def test_model_is_loaded_once(models: ModelPool, loaded: list[str]) -> None:
    assert loaded == []
    assert models.get("tiny") is models.get("tiny")
    assert loaded == ["tiny"]


def test_concurrent_calls_load_one_model(models: ModelPool, loaded: list[str]) -> None:
    together = threading.Barrier(THREADS)

    def get(_: int) -> object:
        together.wait()
        return models.get("tiny")

    with ThreadPoolExecutor(THREADS) as threads:
        opened = list(threads.map(get, range(THREADS)))
    assert len(set(map(id, opened))) == 1
    assert loaded == ["tiny"]


def test_pools_do_not_share_models(models: ModelPool) -> None:
    other = ModelPool(device="cpu")
    assert models.get("tiny") is not other.get("tiny")
    other.close()
    assert models.get("tiny").run([]) == []


@pytest.mark.parametrize("spelling", ["./my-model", "my-model", "other/../my-model", "link", "ABSOLUTE", "~/my-model"])
def test_all_paths_of_a_folder_share_one_model(
    spelling: str, models: ModelPool, loaded: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my-model").symlink_to(TINY)
    (tmp_path / "link").symlink_to(tmp_path / "my-model")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    path = str(tmp_path / "my-model") if spelling == "ABSOLUTE" else spelling
    assert models.get(str(TINY)) is models.get(path)
    assert loaded == [str(TINY)]


@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("moondream2", "vikhyatk/moondream2@2025-06-21"),
        ("vikhyatk/moondream2@2025-04-14", "moondream2@2025-04-14"),
        ("http://localhost:2020", "http://localhost:2020/"),
        ("http://localhost:2020", " http://localhost:2020 "),
        ("http://user:word@localhost:2020", "http://user:word@localhost:2020/"),
        ("moondream2", "vikhyatk/moondream2"),
        ("http://localhost:2020", "http://LOCALHOST:2020"),
    ],
)
def test_all_spellings_of_a_name_share_one_model(name: str, same: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that was added under one spelling is found under the other, without loading."""
    monkeypatch.setattr(pool, "load", _must_not_open)
    monkeypatch.setattr(pool, "connect", _must_not_open)
    models = ModelPool()
    tiny = load("tiny", device="cpu")
    models.add(name, tiny)
    assert models.get(same) is tiny
    models.close()


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("moondream2", "moondream2@2025-04-14"),
        ("http://localhost:2020", "http://localhost:2021"),
        ("http://localhost:2020", "http://user:word@localhost:2020"),
        ("http://localhost:2020", "https://localhost:2020"),
    ],
)
def test_different_names_have_different_models(name: str, other: str) -> None:
    models = ModelPool()
    first, second = (load("tiny", device="cpu") for _ in range(2))
    models.add(name, first)
    models.add(other, second)
    assert (models.get(name), models.get(other)) == (first, second)
    models.close()


def _must_not_open(name: str, **options: Any) -> Any:
    raise AssertionError(f"{name} is opened")


# Adding and closing


def test_added_model_is_used_without_loading(models: ModelPool, loaded: list[str]) -> None:
    first, second = (load("tiny", device="cpu") for _ in range(2))
    models.add("tiny", first)
    assert models.get("tiny") is first
    models.add("tiny", second)
    assert models.get("tiny") is second
    assert loaded == []


@pytest.mark.parametrize("name", ["moondream3", "./nothing", "ftp://example.org", "http://", "", " ", 5, None])
def test_add_rejects_invalid_names(models: ModelPool, name: Any) -> None:
    with pytest.raises((CheckpointError, ValueError)):
        models.add(name, load("tiny", device="cpu"))
    assert models._entries == {}


def test_add_rejects_names_that_are_not_allowed(models: ModelPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(pool.ALLOWED, "moondream2")
    with pytest.raises(ValueError, match="'tiny' is not allowed"):
        models.add("tiny", load("tiny", device="cpu"))


@pytest.mark.parametrize(
    "spellings",
    [
        ("http://localhost:2020", "http://LOCALHOST:2020/", " http://localhost:2020 "),
        ("moondream2", "vikhyatk/moondream2", "vikhyatk/moondream2@2025-06-21"),
        ("./my-model", "link", "other/../my-model"),
    ],
    ids=["URL", "repository", "folder"],
)
@pytest.mark.parametrize("index", range(3))
def test_added_model_replaces_the_previous_one_under_all_spellings(
    models: ModelPool, spellings: tuple[str, ...], index: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This includes spellings that were used before and spellings that were not."""
    for name in ("my-model", "link"):
        (tmp_path / name).symlink_to(TINY)
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("load", "connect"):
        monkeypatch.setattr(pool, name, _must_not_open)
    first, second = (load("tiny", device="cpu") for _ in range(2))
    models.add(spellings[0], first)
    assert [models.get(name) for name in spellings[:2]] == [first] * 2
    models.add(spellings[index], second)
    assert [models.get(name) for name in spellings] == [second] * 3
    assert first.run([]) == []  # the replaced model stays open
    first.close()


def test_added_model_replaces_a_failure(models: ModelPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "connect", _failing(BackendError("the server is down")))
    with pytest.raises(BackendError):
        models.get("http://localhost:2020/")
    tiny = load("tiny", device="cpu")
    models.add("http://localhost:2020", tiny)
    assert models.get("http://localhost:2020/") is tiny


def _failing(error: BaseException) -> Callable[..., Any]:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise error

    return fail


def test_closed_pool_opens_models_again(models: ModelPool, loaded: list[str], server: RemoteServer) -> None:
    server.on("/v1/models", MODELS_ANSWER)
    before, remote = models.get("tiny"), models.get(server.url)
    models.close()
    models.close()
    with pytest.raises(Exception, match="is closed"):
        remote.run([])
    assert models.get("tiny") is not before
    assert models.get(server.url) is not remote
    assert loaded == ["tiny", "tiny"]


# Failures


def test_failed_model_is_retried_after_retry_seconds(
    models: ModelPool, server: RemoteServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(pool, "time", SimpleNamespace(monotonic=lambda: now))
    server.on("/v1/models", Reply({}, 404))

    def fails() -> int:
        """Assert that the model fails, and return the number of requests so far."""
        with pytest.raises(BackendError, match="has an unknown API"):
            models.get(server.url)
        return len(server.requests)

    once = fails()
    now += pool.RETRY_SECONDS - 0.1
    assert fails() == fails() == once > 0
    now += 0.2
    assert fails() == 2 * once
    server.on("/v1/models", MODELS_ANSWER)
    assert fails() == 2 * once  # the server is up, but the retry is not due
    now += pool.RETRY_SECONDS + 0.1
    assert models.get(server.url) is models.get(server.url)


def test_traceback_of_a_repeated_failure_does_not_grow(models: ModelPool, tmp_path: Path) -> None:
    """Raising the same exception again would extend its traceback for every frame."""
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    (tmp_path / "config.json").write_text((TINY / "config.json").read_text())
    lengths = []
    for _ in range(5):
        with pytest.raises(CheckpointError) as caught:
            models.get(str(tmp_path))
        lengths.append(len(caught.traceback))
    assert lengths[1:] == [lengths[1]] * 4


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (BackendError("the server is down"), BackendError, "the server is down"),
        (CheckpointError("no weights"), CheckpointError, "no weights"),
        (ValueError("no such device"), ValueError, "no such device"),
        (RuntimeError("out of memory"), MoondreamError, "out of memory"),
        (KeyError("a key"), MoondreamError, "'a key'"),
        (RuntimeError(), MoondreamError, "RuntimeError"),
        *(
            (error, ValueError, str(error))  # their types cannot be created from a message alone
            for error in (
                json.JSONDecodeError("no JSON", "{", 1),
                UnicodeDecodeError("utf-8", b"\xff", 0, 1, "no text"),
            )
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_repeated_failure_raises_a_new_error_with_the_same_message(
    models: ModelPool, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[Exception], text: str
) -> None:
    """The first call raises the original error."""
    monkeypatch.setattr(pool, "load", _failing(error))
    with pytest.raises(type(error)) as first:
        models.get("tiny")
    assert first.value is error
    monkeypatch.setattr(pool, "load", _must_not_open)
    later = []
    for _ in range(2):
        with pytest.raises(kind) as caught:
            models.get("tiny")
        later.append(caught.value)
    assert [(isinstance(one, kind), str(one)) for one in later] == [(True, text)] * 2
    assert len({id(one) for one in (error, *later)}) == 3
    assert all(one.__cause__ is one.__context__ is None for one in later)


@pytest.mark.parametrize("kind", [CheckpointError, RuntimeError])
def test_failed_load_releases_its_memory(
    models: ModelPool, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    """Otherwise, partially loaded weights would stay in memory until the next attempt."""
    weights: list[weakref.ref[np.ndarray]] = []

    def load_partially(name: str, **options: Any) -> Any:
        loaded = np.zeros(1000)
        weights.append(weakref.ref(loaded))
        raise kind(f"{name} has only {len(loaded)} weights")

    monkeypatch.setattr(pool, "load", load_partially)
    for _ in range(3):
        try:
            models.get("tiny")
        except (kind, MoondreamError) as error:
            assert "only 1000 weights" in str(error)  # noqa: PT017 - pytest.raises would keep the traceback
    gc.collect()
    assert len(weights) == 1
    assert weights[0]() is None


def test_number_of_failed_entries_is_limited(models: ModelPool, monkeypatch: pytest.MonkeyPatch) -> None:
    now, rounds, names = 1000.0, 5, 20
    monkeypatch.setattr(pool, "time", SimpleNamespace(monotonic=lambda: now))
    tiny = models.get("tiny")
    for number in range(rounds * names):
        with pytest.raises(CheckpointError):
            models.get(f"moondream3-{number}")
        if number % names == names - 1:
            now += pool.RETRY_SECONDS + 0.1
        assert len(models._entries) <= 1 + 2 * names
    assert models.get("tiny") is tiny


def test_open_model_of_a_deleted_folder_stays_available(models: ModelPool, tmp_path: Path) -> None:
    folder = shutil.copytree(TINY, tmp_path / "my-model")
    before = models.get(str(folder))
    shutil.rmtree(folder)
    assert models.get(str(folder)) is before
    assert before.run([]) == []


@pytest.mark.parametrize("name", ["moondream3", "./nothing", "ftp://example.org", "", "  "])
def test_get_rejects_invalid_names(models: ModelPool, name: str) -> None:
    for _ in range(2):
        with pytest.raises((CheckpointError, ValueError)):
            models.get(name)


@pytest.mark.parametrize("name", [None, 5, ["tiny"], {"tiny"}, Path("tiny")])
def test_get_rejects_names_that_are_not_strings(models: ModelPool, name: Any) -> None:
    with pytest.raises(ValueError, match=f"model must be a name or the URL of a server, got {type(name).__name__}"):
        models.get(name)


def test_slow_model_does_not_block_other_models(models: ModelPool, server: RemoteServer) -> None:
    asked, resume = threading.Event(), threading.Event()

    def reply(_: object) -> Reply:
        asked.set()
        resume.wait(240)
        return MODELS_ANSWER

    server.on("/v1/models", reply)
    with ThreadPoolExecutor(1) as threads:
        slow = threads.submit(models.get, server.url)
        try:
            assert asked.wait(240)
            assert models.get("tiny").run([]) == []
            models.add("http://localhost:1", models.get("tiny"))
            assert not slow.done()
        finally:
            resume.set()
        assert slow.result(240) is models.get(server.url)


# Environment variables


def test_only_allowed_models_can_be_used(models: ModelPool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "mine").symlink_to(TINY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(pool.ALLOWED, " tiny , ./mine, http://user:word@localhost:2020,")
    assert models.get("tiny").run([]) == []
    assert models.get(str(TINY)).run([]) == []
    for name in ("moondream2", "./other", "http://localhost:2020", "http://localhost:9001/?key=secret"):
        with pytest.raises(
            ValueError,
            match=rf"is not allowed, only tiny, \./mine, http://localhost:2020; add it to .* {pool.ALLOWED} to use it$",
        ) as caught:
            models.get(name)
        assert "word" not in str(caught.value)
        assert "secret" not in str(caught.value)


def test_allowed_list_applies_to_open_models(models: ModelPool, monkeypatch: pytest.MonkeyPatch) -> None:
    models.get("tiny")
    monkeypatch.setenv(pool.ALLOWED, "moondream2")
    with pytest.raises(ValueError, match="'tiny' is not allowed, only moondream2"):
        models.get("tiny")


@pytest.mark.parametrize("text", ["", " ", ",", " , "])
def test_empty_allowed_list_allows_all_models(models: ModelPool, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(pool.ALLOWED, text)
    assert models.get("tiny").run([]) == []


def test_shared_pool_is_created_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """This includes concurrent calls."""
    created, create = [], pool.pool_from_environment

    def create_slowly() -> ModelPool:
        time.sleep(0.05)
        created.append(create())
        return created[-1]

    monkeypatch.setattr(pool, "_shared", None)
    monkeypatch.setattr(pool, "pool_from_environment", create_slowly)
    with ThreadPoolExecutor(4) as threads:
        pools = list(threads.map(lambda _: REGISTERED_INITIALIZERS["models"](), range(4)))
    assert len(created) == 1
    assert all(one is created[0] for one in pools)


def test_pool_without_environment_variables_has_the_defaults() -> None:
    created = pool.pool_from_environment()
    assert (created.device, created.timeout) == (None, 30.0)


def test_environment_variables_set_device_and_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(pool.DEVICE, " cpu ")
    monkeypatch.setenv(pool.TIMEOUT, " 2.5 ")
    created = pool.pool_from_environment()
    assert (created.device, created.timeout) == ("cpu", 2.5)
    assert str(created.get("tiny").device) == "cpu"
    created.close()


def test_unknown_device_in_the_environment_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(pool.DEVICE, "cuda:99")
    with pytest.raises(ValueError, match="there is no device 'cuda:99'"):
        pool.pool_from_environment().get("tiny")


@pytest.mark.parametrize("seconds", ["soon", "1s", "-1", "0", "nan", "inf"])
def test_invalid_timeout_in_the_environment_raises(monkeypatch: pytest.MonkeyPatch, seconds: str) -> None:
    monkeypatch.setenv(pool.TIMEOUT, seconds)
    with pytest.raises(ValueError, match=f"{pool.TIMEOUT} must be a number of seconds above 0, got '{seconds}'"):
        pool.pool_from_environment()


def test_timeout_applies_to_servers(server: RemoteServer) -> None:
    server.on("/v1/models", MODELS_ANSWER).on("/v1/caption", Reply(fault="hang"))
    models = ModelPool(timeout=0.2)
    with pytest.raises(BackendError, match=r"did not respond within 0\.2 s"):
        models.get(server.url).caption(np.zeros((8, 8, 3), np.uint8))
    models.close()


# API keys of the environment


INFO = Reply({"name": "Roboflow Inference Server", "version": "1.8.3", "uuid": "u"})
OPENAI = Reply({"object": "list", "data": [{"id": "gpt", "object": "model"}]})
HOSTS = {"this machine": "127.0.0.1", "localhost": "localhost", "another host": "127.1"}
SERVICES = {
    "MOONDREAM_API_KEY": ("/v1/models", MODELS_ANSWER),
    "ROBOFLOW_API_KEY": ("/info", INFO),
    "OPENAI_API_KEY": ("/v1/models", OPENAI),
}


@pytest.mark.parametrize("listed", [False, True], ids=["not listed", "listed"])
@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("variable", SERVICES)
def test_keys_are_sent_to_trusted_servers_only(
    variable: str,
    host: str,
    listed: bool,
    models: ModelPool,
    server: RemoteServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """127.1 is a spelling of this machine that the pool does not recognize, so it counts as another host."""
    if variable == "ROBOFLOW_API_KEY":
        pytest.importorskip("inference_sdk")
    server.on(*SERVICES[variable])
    url = server.url.replace("127.0.0.1", HOSTS[host])
    monkeypatch.setenv(variable, "key-of-the-environment")
    if listed:
        monkeypatch.setenv(pool.ALLOWED, f"tiny, {url}/")
    model = models.get(url)
    probes = len(server.requests)
    assert isinstance(
        model.run([Detect(np.zeros((8, 8, 3), np.uint8), "dog")])[0], ErrorResult
    )  # the server has no such route
    sent = json.dumps([[asked.path, dict(asked.headers), asked.body] for asked in server.requests])
    assert len(server.requests) > probes > 0
    assert ("key-of-the-environment" in sent) == (listed or host != "another host")


# Importing


def test_import_loads_no_heavy_dependencies() -> None:
    """The engine imports every plugin, even if no workflow uses its blocks."""
    code = "import sys, moondream_cv_blocks; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=240)
    imported = {name.partition(".")[0] for name in done.stdout.split()}
    assert "moondream_cv_blocks" in imported
    assert not {"torch", "supervision", "roboflow_workflows", "inference", "cv2", "transformers"} & imported


@pytest.mark.skipif(
    any(find_spec(name) for name in ("roboflow_workflows", "inference")), reason="a workflows engine is installed"
)
def test_load_blocks_without_the_engine_raises() -> None:
    with pytest.raises(ImportError, match=r'pip install "moondream-cv\[workflows\]"'):
        load_blocks()
