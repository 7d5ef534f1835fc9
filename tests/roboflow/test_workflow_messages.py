"""Test that messages refer to workflow fields and environment variables, not to Python arguments or classes."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import requests

import moondream_cv_blocks
from moondream_cv_blocks import ModelPool, load_blocks, pool
from moondream_cv_blocks.messages import workflow_message
from tests.helpers.remote_server import RemoteServer, Reply, remote_server
from tests.helpers.roboflow_app import skip_without_server
from tests.helpers.workflows import (
    ALL_BLOCKS,
    BLOCKS,
    compile_error,
    compile_workflow,
    minimal_step,
    run_engine,
    workflow,
)

skip_without_server()
pytestmark = pytest.mark.roboflow

PYTHON = re.compile(r"\b[a-z_]+=(?!\S)|\b[a-z_]+='|load\(|connect\(|MoondreamAPI|OpenAICompatible|RoboflowInference")
LISTED = Reply({"models": [{"id": "any"}]})
OPENAI = Reply({"object": "list", "data": [{"id": "gpt", "object": "model"}]})
INFO = Reply({"name": "Roboflow Inference Server", "version": "1.8.3", "uuid": "u"})
ROUTES = ("/v1/detect", "/v1/point", "/v1/query", "/v1/caption", "/v1/chat/completions")
UNAUTHORIZED = Reply({"error": "unauthorized"}, 401)


@pytest.fixture
def server() -> Iterator[RemoteServer]:
    with remote_server() as running:
        yield running


def hanging(server: RemoteServer) -> None:
    server.on("/v1/models", LISTED)
    for route in ROUTES:
        server.on(route, Reply(fault="hang"))


def unauthorized(server: RemoteServer) -> None:
    server.on("/v1/models", LISTED)
    for route in ROUTES:
        server.on(route, UNAUTHORIZED)


def unauthorized_models(server: RemoteServer) -> None:
    server.on("/v1/models", UNAUTHORIZED)


def silent(server: RemoteServer) -> None:
    server.on("/v1/models", Reply(fault="hang"))


def no_model(server: RemoteServer) -> None:
    """Configure no routes, so that every request returns 404."""


def openai(server: RemoteServer) -> None:
    server.on("/v1/models", OPENAI)
    server.on("/v1/chat/completions", Reply({"choices": [{"message": {"content": "yes"}}]}))


def roboflow(server: RemoteServer) -> None:
    server.on("/info", INFO)


TIMEOUT = "increase the environment variable MOONDREAM_CV_BLOCKS_TIMEOUT"
LISTS = "MOONDREAM_CV_BLOCKS_MODELS must list a server on another machine before it gets the key"
FAILURES: list[tuple[Callable[[RemoteServer], None], tuple[str, ...], str]] = [
    (hanging, BLOCKS, TIMEOUT),
    (unauthorized, BLOCKS, f"set the environment variable MOONDREAM_API_KEY; {LISTS}"),
    (unauthorized_models, BLOCKS, f"the server requires an API key: set MOONDREAM_API_KEY or OPENAI_API_KEY; {LISTS}"),
    (silent, BLOCKS, "check the URL in the field model"),
    (no_model, BLOCKS, "the field model must be the URL of moondream-cv serve, Roboflow Inference, "),
    (
        openai,
        ("detect", "point", "track"),
        "use moondream2 or moondream-cv serve",
    ),
    (roboflow, ("point", "query", "caption"), "only detect; set the field model to moondream2 or to the URL"),
]


@pytest.mark.parametrize(
    ("fails", "block", "advice"),
    [(fails, block, advice) for fails, blocks, advice in FAILURES for block in blocks],
)
def test_server_messages_use_workflow_terms(
    fails: Callable[[RemoteServer], None], block: str, advice: str, server: RemoteServer, bgr: np.ndarray
) -> None:
    fails(server)
    definition = workflow(minimal_step(block, model=server.url))
    (outputs,) = run_engine(compile_workflow(definition, **{"moondream_cv_blocks.models": ModelPool(timeout=0.3)}), bgr)
    message = outputs["error_message"]
    assert outputs["error_status"] is True
    assert advice in message
    assert not PYTHON.search(message), message


def test_unsupported_reasoning_message_uses_workflow_terms(server: RemoteServer, bgr: np.ndarray) -> None:
    openai(server)
    definition = workflow(minimal_step("query", model=server.url, reasoning=True))
    (outputs,) = run_engine(compile_workflow(definition, **{"moondream_cv_blocks.models": ModelPool()}), bgr)
    assert "this server cannot return reasoning" in outputs["error_message"]
    assert "use moondream2 or moondream-cv serve" in outputs["error_message"]
    assert not PYTHON.search(outputs["error_message"])


@pytest.mark.parametrize(
    ("model", "advice"),
    [
        ("http://localhost:2020?key=1", "remove it, and set an environment variable such as MOONDREAM_API_KEY"),
        ("moondream3", "did you mean 'moondream2'?"),
        ("ftp://localhost", "must begin with http:// or https://"),
        ("localhost:2020", "for a server, give its URL, 'http://localhost:2020'"),
    ],
)
def test_invalid_model_messages_use_workflow_terms(model: str, advice: str) -> None:
    message = compile_error(workflow(minimal_step("detect", model=model)))
    assert advice in message
    assert not PYTHON.search(message), message


def test_engine_messages_use_workflow_terms() -> None:
    from moondream_cv.engine.sequences import overflow_error

    message = workflow_message(overflow_error())
    assert "MOONDREAM_CV_BLOCKS_DEVICE" in message
    assert not PYTHON.search(message)


# Environment variables


@pytest.fixture
def no_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reset the shared pool and the logged messages."""
    monkeypatch.setattr(pool, "_shared", None)
    monkeypatch.setattr(moondream_cv_blocks, "_logged", set())


INVALID = [
    (pool.TIMEOUT, "soon", "must be a number of seconds above 0, got 'soon'"),
    (pool.TIMEOUT, "0", "must be a number of seconds above 0, got '0'"),
    (pool.TIMEOUT, "30s", "must be a number of seconds above 0, got '30s'"),
    (pool.DEVICE, "cuda:99", "must name a device: there is no device 'cuda:99'"),
    (pool.DEVICE, "gpu", "must name a device: unknown device 'gpu'"),
]
invalid = pytest.mark.parametrize(("variable", "value", "message"), INVALID)


@invalid
@pytest.mark.usefixtures("no_pool")
def test_load_blocks_logs_invalid_environment_variables_once(
    variable: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(variable, value)
    for _ in range(2):
        assert len(load_blocks()) == len(ALL_BLOCKS)
    (record,) = [record for record in caplog.records if record.name == "moondream_cv_blocks"]
    assert record.levelno == logging.ERROR
    assert f"the environment variable {variable} {message}" in record.getMessage()


@pytest.mark.usefixtures("no_pool")
def test_load_blocks_logs_unknown_models_in_the_allowed_list(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(pool.ALLOWED, "tiny, moondream3, http://localhost:2020")
    load_blocks()
    (record,) = [record for record in caplog.records if record.name == "moondream_cv_blocks"]
    assert f"the environment variable {pool.ALLOWED} contains an invalid model" in record.getMessage()
    assert "'moondream3'" in record.getMessage()


@pytest.mark.usefixtures("no_pool")
def test_load_blocks_logs_nothing_if_the_environment_is_valid(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for variable, value in ((pool.TIMEOUT, "5"), (pool.DEVICE, "cpu"), (pool.ALLOWED, "tiny")):
        monkeypatch.setenv(variable, value)
    load_blocks()
    assert not [record for record in caplog.records if record.name == "moondream_cv_blocks"]


@invalid
@pytest.mark.usefixtures("no_pool")
def test_compiling_reports_invalid_environment_variables(
    variable: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from roboflow_workflows.errors import WorkflowEnvironmentConfigurationError

    monkeypatch.setenv(variable, value)
    with pytest.raises(WorkflowEnvironmentConfigurationError) as caught:
        compile_workflow(workflow(minimal_step("caption")))
    assert f"the environment variable {variable} {message}" in caught.value.public_message


@invalid
@pytest.mark.usefixtures("no_pool")
def test_server_reports_invalid_environment_variables(
    url: str, variable: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    definition = workflow(minimal_step("caption", name="never_compiled"))
    image = {"type": "numpy_object", "value": "unused"}
    body: dict[str, Any] = {"specification": definition, "inputs": {"image": image}}
    answer = requests.post(f"{url}/workflows/run", json=body, timeout=240)
    assert answer.status_code == 500
    assert f"the environment variable {variable} {message}" in answer.json()["message"]


@pytest.mark.usefixtures("no_pool")
def test_custom_pool_ignores_the_environment_variables(bgr: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(pool.TIMEOUT, "soon")
    models = {"moondream_cv_blocks.models": ModelPool(device="cpu")}
    (outputs,) = run_engine(compile_workflow(workflow(minimal_step("caption")), **models), bgr)
    assert outputs["error_message"] == ""
