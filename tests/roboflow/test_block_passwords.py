"""Test that no error output and no log record contains the password of a model's URL."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moondream_cv_blocks import pool
from tests.helpers.remote_server import RemoteServer, Reply, remote_server
from tests.helpers.roboflow_app import skip_without_server
from tests.helpers.workflows import (
    BLOCKS,
    assert_failed,
    compile_error,
    compile_workflow,
    make_engine,
    minimal_step,
    run_engine,
    run_workflow,
    workflow,
)

skip_without_server()
pytestmark = pytest.mark.roboflow

LOGGER = "moondream_cv_blocks.results"


SECRETS = {  # as written in the URL, decoded
    "plain": ("s3cret-word", "s3cret-word"),
    "quoted": ("p%40ss-w0rd", "p@ss-w0rd"),
}
INFO = Reply({"name": "Roboflow Inference Server", "version": "1.8.3", "uuid": "u"})
MODELS_ANSWER = Reply({"models": [{"id": "tiny", "has_scores": True}]})
ROUTES = ("/v1/detect", "/v1/point", "/v1/query", "/v1/caption")


@pytest.fixture(params=SECRETS)
def secret(request: pytest.FixtureRequest) -> tuple[str, str]:
    return SECRETS[request.param]


@pytest.fixture
def server() -> Iterator[RemoteServer]:
    with remote_server() as running:
        yield running


def with_password(url: str, secret: tuple[str, str]) -> str:
    return url.replace("://", f"://anna:{secret[0]}@")


def assert_hidden(secret: tuple[str, str], *texts: str) -> None:
    for text in texts:
        assert not [form for form in secret if form in text], text


def texts_of(error: BaseException | None) -> list[str]:
    """Return all texts of an error and of the errors in its chain."""
    found: list[str] = []
    while error is not None:
        found += [str(error), repr(error), str(getattr(error, "blocks_errors", ""))]
        error = error.__cause__ or error.__context__
    return found


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(
    ("url", "fields"),
    [
        ("http://localhost:99999", {}),
        ("http://localhost:port", {}),
        ("http://local host", {}),
        ("http://localhost/?key=1", {}),
        ("ftp://localhost", {}),
        (" http://localhost:99999 ", {}),
        ("http://localhost:2020", {"images": "$inputs.nothing"}),
        ("http://localhost:2020", {"max_objects": 0, "max_tokens": 0}),
    ],
)
def test_rejected_workflow_does_not_reveal_the_password(
    block: str, url: str, fields: dict[str, Any], secret: tuple[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    from roboflow_workflows.errors import WorkflowError

    caplog.set_level(logging.DEBUG)
    with pytest.raises(WorkflowError) as caught:
        compile_workflow(workflow(minimal_step(block, model=with_password(url, secret), **fields)))
    assert_hidden(secret, caplog.text, *texts_of(caught.value))


@pytest.mark.parametrize("when", ["compiled", "run"])
def test_error_for_a_forbidden_url_does_not_reveal_the_password(
    when: str,
    secret: tuple[str, str],
    bgr: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv(pool.ALLOWED, f"tiny,http://anna:{secret[0]}@localhost:2020")
    url = f"http://anna:{secret[0]}@localhost:2021"
    if when == "compiled":
        message = compile_error(workflow(minimal_step("caption", model=url)))
    else:
        (outputs,) = run_workflow(
            workflow(minimal_step("caption", model="$inputs.model"), parameters=["model"]), bgr, model=url
        )
        message = outputs["error_message"]
    assert "'http://localhost:2021' is not allowed, only tiny, http://localhost:2020" in message
    assert_hidden(secret, message, caplog.text)


FAILURES: dict[str, Callable[[RemoteServer, tuple[str, str]], Any]] = {
    "lacks the skill": lambda server, secret: server.on("/info", INFO),
    "has an unknown API": lambda server, secret: None,
    "requires a key": lambda server, secret: server.on("/v1/models", Reply({"error": f"not {secret[1]}"}, 401)),
    "error message contains the password": lambda server, secret: [
        server.on("/v1/models", MODELS_ANSWER),
        *(server.on(route, Reply({"error": f"wrong: {secret[0]}, {secret[1]}"}, 403)) for route in ROUTES),
    ],
    "response contains the password": lambda server, secret: [
        server.on("/v1/models", MODELS_ANSWER),
        *(server.on(route, Reply([secret[1]])) for route in ROUTES),
    ],
}


@pytest.mark.parametrize("by", ["literal", "input"])
@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("block", BLOCKS)
def test_server_failure_does_not_reveal_the_password(
    block: str,
    failure: str,
    by: str,
    server: RemoteServer,
    bgr: np.ndarray,
    clock: SimpleNamespace,
    caplog: pytest.LogCaptureFixture,
) -> None:
    secret = SECRETS["quoted" if by == "literal" else "plain"]
    FAILURES[failure](server, secret)
    caplog.set_level(logging.DEBUG)
    outputs = outputs_with_model(block, with_password(server.url, secret), by, bgr)
    host = server.url.removeprefix("http://")
    assert_failed(block, outputs, "detect" if failure == "lacks the skill" and block == "point" else host)
    assert_hidden(secret, outputs["error_message"], caplog.text)
    assert [record for record in caplog.records if record.name == LOGGER]
    assert all(one.headers["authorization"].startswith("Basic ") for one in server.requests)  # the password was sent


@pytest.mark.parametrize("by", ["literal", "input"])
@pytest.mark.parametrize("block", BLOCKS)
def test_refused_connection_does_not_reveal_the_password(
    block: str,
    by: str,
    closed_url: str,
    secret: tuple[str, str],
    bgr: np.ndarray,
    clock: SimpleNamespace,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    outputs = outputs_with_model(block, with_password(closed_url, secret), by, bgr)
    assert_failed(block, outputs, f"{closed_url}/v1/models is unreachable")
    assert_hidden(secret, outputs["error_message"], caplog.text)


def outputs_with_model(block: str, model: str, by: str, bgr: np.ndarray) -> dict[str, Any]:
    """Return the outputs of a block whose model is a literal or an input."""
    if by == "literal":
        (outputs,) = run_engine(make_engine(workflow(minimal_step(block, model=model))), bgr)
    else:
        definition = workflow(minimal_step(block, model="$inputs.model"), parameters=["model"])
        (outputs,) = run_engine(make_engine(definition), bgr, model=model)
    return outputs


def test_url_without_a_scheme_does_not_reveal_the_password(secret: tuple[str, str]) -> None:
    message = compile_error(workflow(minimal_step("caption", model=f"anna:{secret[0]}@localhost:2020")))
    assert_hidden(secret, message)
