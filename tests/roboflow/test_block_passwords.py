"""Passwords in the URL of a model are in no error output and in no log, whatever fails."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moondream_cv_blocks import pool
from tests.helpers.remote_server import Answer, RemoteServer, remote_server
from tests.helpers.roboflow_app import skip_without_server
from tests.helpers.workflows import (
    BLOCKS,
    block_step,
    check_nothing,
    compiled,
    engine_of,
    refusal,
    results,
    run,
    workflow,
)

skip_without_server()
pytestmark = pytest.mark.roboflow

OUR_LOG = "moondream_cv_blocks.results"


SECRETS = {"plain": ("s3cret-word", "s3cret-word"), "quoted": ("p%40ss-w0rd", "p@ss-w0rd")}  # as written, as meant
INFO = Answer({"name": "Roboflow Inference Server", "version": "1.8.3", "uuid": "u"})
OURS = Answer({"models": [{"id": "tiny", "has_scores": True}]})
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


def check_secret(secret: tuple[str, str], *texts: str) -> None:
    for text in texts:
        assert not [form for form in secret if form in text], text


def texts_of(error: BaseException | None) -> list[str]:
    """All that an error and those it is chained to would show."""
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
def test_a_password_is_not_shown_where_a_workflow_is_refused(
    block: str, url: str, fields: dict[str, Any], secret: tuple[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    from roboflow_workflows.errors import WorkflowError

    caplog.set_level(logging.DEBUG)
    with pytest.raises(WorkflowError) as caught:
        compiled(workflow(block_step(block, model=with_password(url, secret), **fields)))
    check_secret(secret, caplog.text, *texts_of(caught.value))


@pytest.mark.parametrize("when", ["compiled", "run"])
def test_a_password_of_a_url_that_may_not_be_used_is_not_shown(
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
        told = refusal(workflow(block_step("caption", model=url)))
    else:
        (outputs,) = run(workflow(block_step("caption", model="$inputs.model"), parameters=["model"]), bgr, model=url)
        told = outputs["error_message"]
    assert "'http://localhost:2021' may not be used here, only tiny, http://localhost:2020" in told
    check_secret(secret, told, caplog.text)


TROUBLES: dict[str, Callable[[RemoteServer, tuple[str, str]], Any]] = {
    "lacks the skill": lambda server, secret: server.on("/info", INFO),
    "has an unknown API": lambda server, secret: None,
    "wants a key": lambda server, secret: server.on("/v1/models", Answer({"error": f"not {secret[1]}"}, 401)),
    "repeats it": lambda server, secret: [
        server.on("/v1/models", OURS),
        *(server.on(route, Answer({"error": f"wrong: {secret[0]}, {secret[1]}"}, 403)) for route in ROUTES),
    ],
    "answers with it": lambda server, secret: [
        server.on("/v1/models", OURS),
        *(server.on(route, Answer([secret[1]])) for route in ROUTES),
    ],
}


@pytest.mark.parametrize("by", ["literal", "input"])
@pytest.mark.parametrize("trouble", TROUBLES)
@pytest.mark.parametrize("block", BLOCKS)
def test_a_password_is_not_shown_where_a_server_fails(
    block: str,
    trouble: str,
    by: str,
    server: RemoteServer,
    bgr: np.ndarray,
    now: SimpleNamespace,
    caplog: pytest.LogCaptureFixture,
) -> None:
    secret = SECRETS["quoted" if by == "literal" else "plain"]
    TROUBLES[trouble](server, secret)
    caplog.set_level(logging.DEBUG)
    outputs = asked(block, with_password(server.url, secret), by, bgr)
    host = server.url.removeprefix("http://")
    check_nothing(block, outputs, "detect" if trouble == "lacks the skill" and block == "point" else host)
    check_secret(secret, outputs["error_message"], caplog.text)
    assert [record for record in caplog.records if record.name == OUR_LOG]
    assert all(one.headers["authorization"].startswith("Basic ") for one in server.asked)  # it was sent all the same


@pytest.mark.parametrize("by", ["literal", "input"])
@pytest.mark.parametrize("block", BLOCKS)
def test_a_password_is_not_shown_where_no_server_is(
    block: str,
    by: str,
    closed_url: str,
    secret: tuple[str, str],
    bgr: np.ndarray,
    now: SimpleNamespace,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    outputs = asked(block, with_password(closed_url, secret), by, bgr)
    check_nothing(block, outputs, f"{closed_url}/v1/models is unreachable")
    check_secret(secret, outputs["error_message"], caplog.text)


def asked(block: str, model: str, by: str, bgr: np.ndarray) -> dict[str, Any]:
    """The outputs of a block whose model is written down, or comes from an input."""
    if by == "literal":
        (outputs,) = results(engine_of(workflow(block_step(block, model=model))), bgr)
    else:
        definition = workflow(block_step(block, model="$inputs.model"), parameters=["model"])
        (outputs,) = results(engine_of(definition), bgr, model=model)
    return outputs


def test_a_password_is_not_shown_where_the_scheme_was_forgotten(secret: tuple[str, str]) -> None:
    told = refusal(workflow(block_step("caption", model=f"anna:{secret[0]}@localhost:2020")))
    check_secret(secret, told)
