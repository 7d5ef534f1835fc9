"""The pool of models that all blocks share, and what importing the plugin takes, without a workflows engine."""

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
from moondream_cv.engine.local import LocalModel
from moondream_cv.errors import BackendError, CheckpointError, MoondreamError
from moondream_cv.requests import Detect, ErrorResult
from moondream_cv_blocks import REGISTERED_INITIALIZERS, ModelPool, load_blocks, pool
from tests.helpers.remote_server import Answer, RemoteServer, remote_server

TINY = Path(moondream_cv.__file__).parent / "tiny"
OURS = Answer({"models": [{"id": "tiny", "has_scores": True}]})
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
    """The names that are really loaded, in their order."""
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


# One model, however often it is asked for


def test_a_model_is_loaded_once(models: ModelPool, loaded: list[str]) -> None:
    assert loaded == []
    assert models.get("tiny") is models.get("tiny")
    assert loaded == ["tiny"]


def test_many_threads_get_one_model(models: ModelPool, loaded: list[str]) -> None:
    together = threading.Barrier(THREADS)

    def get(_: int) -> object:
        together.wait()
        return models.get("tiny")

    with ThreadPoolExecutor(THREADS) as threads:
        got = list(threads.map(get, range(THREADS)))
    assert len(set(map(id, got))) == 1
    assert loaded == ["tiny"]


def test_every_pool_has_its_own(models: ModelPool) -> None:
    other = ModelPool(device="cpu")
    assert models.get("tiny") is not other.get("tiny")
    other.close()
    assert models.get("tiny").run([]) == []


@pytest.mark.parametrize("spelling", ["./my-model", "my-model", "other/../my-model", "link", "ABSOLUTE", "~/my-model"])
def test_all_paths_of_a_folder_are_one_model(
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
def test_all_spellings_of_a_name_are_one_model(name: str, same: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model that was added under one is there under the other; nothing is loaded for it."""
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
def test_names_of_different_models(name: str, other: str) -> None:
    models = ModelPool()
    first, second = (load("tiny", device="cpu") for _ in range(2))
    models.add(name, first)
    models.add(other, second)
    assert (models.get(name), models.get(other)) == (first, second)
    models.close()


def _must_not_open(name: str, **options: Any) -> Any:
    raise AssertionError(f"{name} is opened")


# Adding and closing


def test_a_model_that_is_added_is_not_loaded(models: ModelPool, loaded: list[str]) -> None:
    first, second = (load("tiny", device="cpu") for _ in range(2))
    models.add("tiny", first)
    assert models.get("tiny") is first
    models.add("tiny", second)
    assert models.get("tiny") is second
    assert loaded == []


@pytest.mark.parametrize("name", ["moondream3", "./nothing", "ftp://example.org", "http://", "", " ", 5, None])
def test_a_name_that_no_workflow_can_use_is_not_added(models: ModelPool, name: Any) -> None:
    with pytest.raises((CheckpointError, ValueError)):
        models.add(name, load("tiny", device="cpu"))
    assert models._opened == {}


def test_a_name_that_may_not_be_used_is_not_added(models: ModelPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(pool.ALLOWED, "moondream2")
    with pytest.raises(ValueError, match="'tiny' may not be used here"):
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
@pytest.mark.parametrize("under", range(3))
def test_what_is_added_takes_the_place_of_what_was_there(
    models: ModelPool, spellings: tuple[str, ...], under: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under all names that it has been asked for by, and those that it has not."""
    for name in ("my-model", "link"):
        (tmp_path / name).symlink_to(TINY)
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("load", "connect"):
        monkeypatch.setattr(pool, name, _must_not_open)
    first, second = (load("tiny", device="cpu") for _ in range(2))
    models.add(spellings[0], first)
    assert [models.get(name) for name in spellings[:2]] == [first] * 2
    models.add(spellings[under], second)
    assert [models.get(name) for name in spellings] == [second] * 3
    assert first.run([]) == []  # it stays open
    first.close()


def test_what_is_added_takes_the_place_of_a_failure(models: ModelPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "connect", _failing(BackendError("the server is away")))
    with pytest.raises(BackendError):
        models.get("http://localhost:2020/")
    tiny = load("tiny", device="cpu")
    models.add("http://localhost:2020", tiny)
    assert models.get("http://localhost:2020/") is tiny


def _failing(error: BaseException) -> Callable[..., Any]:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise error

    return fail


def test_a_closed_pool_opens_anew(models: ModelPool, loaded: list[str], server: RemoteServer) -> None:
    server.on("/v1/models", OURS)
    before, remote = models.get("tiny"), models.get(server.url)
    models.close()
    models.close()
    with pytest.raises(Exception, match="is closed"):
        remote.run([])
    assert models.get("tiny") is not before
    assert models.get(server.url) is not remote
    assert loaded == ["tiny", "tiny"]


# What cannot be opened


def test_a_failure_is_remembered_for_a_while(
    models: ModelPool, server: RemoteServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(pool, "time", SimpleNamespace(monotonic=lambda: now))
    server.on("/v1/models", Answer({}, 404))

    def fails() -> int:
        """How many requests there have been after another failure."""
        with pytest.raises(BackendError, match="does not say what it is"):
            models.get(server.url)
        return len(server.asked)

    once = fails()
    now += pool.RETRY_SECONDS - 0.1
    assert fails() == fails() == once > 0
    now += 0.2
    assert fails() == 2 * once
    server.on("/v1/models", OURS)
    assert fails() == 2 * once  # it is there, but it is too early to look
    now += pool.RETRY_SECONDS + 0.1
    assert models.get(server.url) is models.get(server.url)


def test_a_failure_that_is_remembered_does_not_grow(models: ModelPool, tmp_path: Path) -> None:
    """Its traceback would, with each frame that fails, if it were raised as it is."""
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
        (BackendError("the server is away"), BackendError, "the server is away"),
        (CheckpointError("no weights"), CheckpointError, "no weights"),
        (ValueError("no such device"), ValueError, "no such device"),
        (RuntimeError("out of memory"), MoondreamError, "out of memory"),
        (KeyError("a key"), MoondreamError, "'a key'"),
        (RuntimeError(), MoondreamError, "RuntimeError"),
        *(
            (error, ValueError, str(error))  # whose own kinds are made of more than a text
            for error in (
                json.JSONDecodeError("no JSON", "{", 1),
                UnicodeDecodeError("utf-8", b"\xff", 0, 1, "no text"),
            )
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_is_raised_until_a_model_is_tried_again(
    models: ModelPool, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[Exception], text: str
) -> None:
    """First the error itself, and then each time another one that says the same."""
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
def test_what_failed_to_open_is_let_go(
    models: ModelPool, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    """Weights that were half loaded would otherwise stay as long as the failure is remembered."""
    weights: list[weakref.ref[np.ndarray]] = []

    def half(name: str, **options: Any) -> Any:
        loaded = np.zeros(1000)
        weights.append(weakref.ref(loaded))
        raise kind(f"{name} has only {len(loaded)} weights")

    monkeypatch.setattr(pool, "load", half)
    for _ in range(3):
        try:
            models.get("tiny")
        except (kind, MoondreamError) as error:
            assert "only 1000 weights" in str(error)  # noqa: PT017 - pytest.raises would keep the traceback
    gc.collect()
    assert len(weights) == 1
    assert weights[0]() is None


def test_names_that_failed_are_forgotten(models: ModelPool, monkeypatch: pytest.MonkeyPatch) -> None:
    now, rounds, names = 1000.0, 5, 20
    monkeypatch.setattr(pool, "time", SimpleNamespace(monotonic=lambda: now))
    tiny = models.get("tiny")
    for number in range(rounds * names):
        with pytest.raises(CheckpointError):
            models.get(f"moondream3-{number}")
        if number % names == names - 1:
            now += pool.RETRY_SECONDS + 0.1
        assert len(models._opened) <= 1 + 2 * names
    assert models.get("tiny") is tiny


def test_a_model_of_a_deleted_folder_stays(models: ModelPool, tmp_path: Path) -> None:
    folder = shutil.copytree(TINY, tmp_path / "my-model")
    before = models.get(str(folder))
    shutil.rmtree(folder)
    assert models.get(str(folder)) is before
    assert before.run([]) == []


@pytest.mark.parametrize("name", ["moondream3", "./nothing", "ftp://example.org", "", "  "])
def test_names_of_no_model(models: ModelPool, name: str) -> None:
    for _ in range(2):
        with pytest.raises((CheckpointError, ValueError)):
            models.get(name)


@pytest.mark.parametrize("name", [None, 5, ["tiny"], {"tiny"}, Path("tiny")])
def test_what_is_no_name(models: ModelPool, name: Any) -> None:
    with pytest.raises(ValueError, match=f"model must be a name or the URL of a server, not {type(name).__name__}"):
        models.get(name)


def test_a_slow_opening_keeps_no_other_model_waiting(models: ModelPool, server: RemoteServer) -> None:
    asked, go_on = threading.Event(), threading.Event()

    def reply(_: object) -> Answer:
        asked.set()
        go_on.wait(240)
        return OURS

    server.on("/v1/models", reply)
    with ThreadPoolExecutor(1) as threads:
        slow = threads.submit(models.get, server.url)
        try:
            assert asked.wait(240)
            assert models.get("tiny").run([]) == []
            models.add("http://localhost:1", models.get("tiny"))
            assert not slow.done()
        finally:
            go_on.set()
        assert slow.result(240) is models.get(server.url)


# Environment variables


def test_models_that_may_be_used(models: ModelPool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "mine").symlink_to(TINY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(pool.ALLOWED, " tiny , ./mine, http://user:word@localhost:2020,")
    assert models.get("tiny").run([]) == []
    assert models.get(str(TINY)).run([]) == []
    for name in ("moondream2", "./other", "http://localhost:2020", "http://localhost:9001/?key=secret"):
        with pytest.raises(
            ValueError,
            match=rf"may not be used here, only tiny, \./mine, http://localhost:2020; {pool.ALLOWED} lists the models$",
        ) as caught:
            models.get(name)
        assert "word" not in str(caught.value)
        assert "secret" not in str(caught.value)


def test_an_open_model_may_be_forbidden_later(models: ModelPool, monkeypatch: pytest.MonkeyPatch) -> None:
    models.get("tiny")
    monkeypatch.setenv(pool.ALLOWED, "moondream2")
    with pytest.raises(ValueError, match="'tiny' may not be used here, only moondream2"):
        models.get("tiny")


@pytest.mark.parametrize("text", ["", " ", ",", " , "])
def test_an_empty_list_allows_everything(models: ModelPool, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(pool.ALLOWED, text)
    assert models.get("tiny").run([]) == []


def test_the_pool_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by threads that ask for it at once."""
    made, make = [], pool.pool_from_environment

    def slowly() -> ModelPool:
        time.sleep(0.05)
        made.append(make())
        return made[-1]

    monkeypatch.setattr(pool, "_shared", None)
    monkeypatch.setattr(pool, "pool_from_environment", slowly)
    with ThreadPoolExecutor(4) as threads:
        given = list(threads.map(lambda _: REGISTERED_INITIALIZERS["models"](), range(4)))
    assert len(made) == 1
    assert all(one is made[0] for one in given)


def test_nothing_is_set() -> None:
    made = pool.pool_from_environment()
    assert (made.device, made.timeout) == (None, 30.0)


def test_what_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(pool.DEVICE, " cpu ")
    monkeypatch.setenv(pool.TIMEOUT, " 2.5 ")
    made = pool.pool_from_environment()
    assert (made.device, made.timeout) == ("cpu", 2.5)
    assert str(made.get("tiny").device) == "cpu"
    made.close()


def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(pool.DEVICE, "cuda:99")
    with pytest.raises(ValueError, match="there is no device 'cuda:99'"):
        pool.pool_from_environment().get("tiny")


@pytest.mark.parametrize("seconds", ["soon", "1s", "-1", "0", "nan", "inf"])
def test_a_time_out_that_makes_no_sense(monkeypatch: pytest.MonkeyPatch, seconds: str) -> None:
    monkeypatch.setenv(pool.TIMEOUT, seconds)
    with pytest.raises(ValueError, match=f"{pool.TIMEOUT} must be a number of seconds above 0, got '{seconds}'"):
        pool.pool_from_environment()


def test_the_time_out_is_that_of_servers(server: RemoteServer) -> None:
    server.on("/v1/models", OURS).on("/v1/caption", Answer(fault="hang"))
    models = ModelPool(timeout=0.2)
    with pytest.raises(BackendError, match=r"did not answer within 0\.2 s"):
        models.get(server.url).caption(np.zeros((8, 8, 3), np.uint8))
    models.close()


# Keys of the environment


INFO = Answer({"name": "Roboflow Inference Server", "version": "1.8.3", "uuid": "u"})
OPENAI = Answer({"object": "list", "data": [{"id": "gpt", "object": "model"}]})
PLACES = {"this machine": "127.0.0.1", "its name": "localhost", "another host": "127.1"}
SERVICES = {
    "MOONDREAM_API_KEY": ("/v1/models", OURS),
    "ROBOFLOW_API_KEY": ("/info", INFO),
    "OPENAI_API_KEY": ("/v1/models", OPENAI),
}


@pytest.mark.parametrize("listed", [False, True], ids=["not listed", "listed"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("variable", SERVICES)
def test_who_gets_keys(
    variable: str,
    place: str,
    listed: bool,
    models: ModelPool,
    server: RemoteServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """127.1 is this machine too, by a name that the pool does not know: to it that is some other host."""
    if variable == "ROBOFLOW_API_KEY":
        pytest.importorskip("inference_sdk")
    server.on(*SERVICES[variable])
    url = server.url.replace("127.0.0.1", PLACES[place])
    monkeypatch.setenv(variable, "key-of-the-environment")
    if listed:
        monkeypatch.setenv(pool.ALLOWED, f"tiny, {url}/")
    model = models.get(url)
    looked = len(server.asked)
    assert isinstance(model.run([Detect(np.zeros((8, 8, 3), np.uint8), "dog")])[0], ErrorResult)  # nobody answers that
    sent = json.dumps([[asked.path, dict(asked.headers), asked.body] for asked in server.asked])
    assert len(server.asked) > looked > 0
    assert ("key-of-the-environment" in sent) == (listed or place != "another host")


# Importing


def test_importing_the_plugin_is_light() -> None:
    """The engine imports it whether or not a workflow uses it, and before it knows what is in it."""
    code = "import sys, moondream_cv_blocks; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=240)
    imported = {name.partition(".")[0] for name in done.stdout.split()}
    assert "moondream_cv_blocks" in imported
    assert not {"torch", "supervision", "roboflow_workflows", "inference", "cv2", "transformers"} & imported


@pytest.mark.skipif(
    any(find_spec(name) for name in ("roboflow_workflows", "inference")), reason="there is a workflows engine here"
)
def test_blocks_without_an_engine() -> None:
    with pytest.raises(ImportError, match=r'pip install "moondream-cv\[workflows\]"'):
        load_blocks()
