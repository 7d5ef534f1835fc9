"""Retries, timeouts, connections and errors of the HTTP client, through the Moondream API."""

from __future__ import annotations

import socket
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from typing import Any

import numpy as np
import pytest

from moondream_cv.backends import MoondreamAPI
from moondream_cv.backends.error_body import message_in_json
from moondream_cv.backends.retries import MAX_RETRY_SECONDS, parse_retry_after, retry_delay
from moondream_cv.errors import BackendError
from tests.helpers.remote_server import RemoteServer, Reply

GOOD = Reply({"caption": "a patch"})
BUSY = Reply({"detail": "busy"}, 503)
PATH = "/v1/caption"


def remote(server: RemoteServer, **options: Any) -> MoondreamAPI:
    return MoondreamAPI(server.url, **{"backoff": 0.001, "api_key": "key-of-tests", **options})


@pytest.mark.parametrize(
    "failure",
    [
        Reply({"error": {"message": "slow down"}}, 429, {"Retry-After": "0"}),
        Reply({"error": {"message": "slow down"}}, 429, {"Retry-After": "Thu, 01 Jan 1970 00:00:00 GMT"}),
        Reply({}, 408),
        Reply({}, 500),
        Reply(b"<html>bad gateway</html>", 502, kind="text/html"),
        BUSY,
        Reply({}, 504),
        Reply({}, 529),
        Reply({}, fault="reset"),
        Reply({}, fault="cut"),
        Reply({"error": "Queue is full", "status": "rejected"}),
    ],
)
def test_transient_errors_are_retried(server: RemoteServer, frame: np.ndarray, failure: Reply) -> None:
    server.on(PATH, failure, failure, GOOD)
    with remote(server) as model:
        assert model.caption(frame)["caption"] == "a patch"
    assert len(server.requests) == 3
    assert server.requests[0].body == server.requests[2].body


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (
            Reply({"error": {"message": "image_url is no image"}}, 400),
            "returned status 400: image_url is no image",
        ),
        (
            Reply({"error": {"message": "who?"}}, 401),
            "returned status 401: who.*pass api_key= or set MOONDREAM_API_KEY",
        ),
        (Reply({"message": "no"}, 403), "returned status 403: no; pass api_key="),
        (Reply({"detail": "Not Found"}, 404), "returned status 404: Not Found; check the URL of the server"),
        (Reply({"detail": [{"msg": "field required"}, {"msg": "too long"}]}, 422), "field required; too long"),
        (
            Reply(b"<html><body>nothing</body></html>", 501, kind="text/html"),
            "returned status 501: a web page$",
        ),
        (
            Reply({}, 302, {"Location": "http://127.0.0.1:1/"}),
            "returned status 302, and redirects are not followed",
        ),
        (Reply({}, 307, {"Location": "/v1/elsewhere"}), "returned status 307, and redirects"),
        (Reply({"error": "Model not loaded", "status": "error"}), "returned an error: Model not loaded"),
        (Reply({"error": {"code": 7}}), "returned an error: {'code': 7}"),
        (Reply(b"<html>hello</html>", kind="text/html"), "returned text/html instead of JSON: <html>hello"),
        (Reply(b""), "instead of JSON: empty"),
        (Reply(b'{"caption": "a'), "instead of JSON"),
        (Reply(b"[" * 100_000), "instead of JSON"),
        (Reply(b"\xff\xfe{}\x00"), "instead of JSON"),
        (Reply([1]), r"returned no JSON object: \[1\]"),
        (Reply({"captions": 1}), "returned no valid 'caption', expected a string: {'captions': 1}"),
        (Reply({"caption": None}), "no valid 'caption', expected a string"),
    ],
)
def test_permanent_errors_are_raised_without_retry(
    server: RemoteServer, frame: np.ndarray, failure: Reply, message: str
) -> None:
    server.on(PATH, failure).on("/v1/elsewhere", GOOD)
    with remote(server) as model, pytest.raises(BackendError, match=message) as caught:
        model.caption(frame)
    assert str(caught.value).startswith(f"{server.url}{PATH} ")
    assert len(server.requests) == 1


@pytest.mark.parametrize("retries", [0, 2])
def test_retries_limit_the_number_of_attempts(server: RemoteServer, frame: np.ndarray, retries: int) -> None:
    server.on(PATH, BUSY)
    with remote(server, retries=retries) as model, pytest.raises(BackendError, match="returned status 503: busy"):
        model.caption(frame)
    assert len(server.requests) == retries + 1


def test_timeout_is_raised_without_retry(server: RemoteServer, frame: np.ndarray) -> None:
    server.on(PATH, Reply(fault="hang"))
    message = r"did not respond within 0.2 s; increase timeout="
    with remote(server, timeout=0.2) as model, pytest.raises(BackendError, match=message):
        model.caption(frame)
    assert len(server.requests) == 1


def test_unreachable_server_raises(frame: np.ndarray) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        with MoondreamAPI(url, retries=1, backoff=0) as model, pytest.raises(BackendError) as caught:
            model.caption(frame)
    assert f"{url}/v1/caption is unreachable" in str(caught.value)
    assert "check that the server is running" in str(caught.value)


def test_unresolvable_host_raises(frame: np.ndarray) -> None:
    with (
        MoondreamAPI("http://nowhere.invalid", retries=0) as model,
        pytest.raises(BackendError, match="is unreachable"),
    ):
        model.caption(frame)


def test_connections_are_reused(server: RemoteServer, frame: np.ndarray) -> None:
    server.on(PATH, GOOD, Reply({}, 500), GOOD)
    with remote(server) as model:
        for _ in range(4):
            model.caption(frame)
    assert len(server.requests) == 5
    assert len({request.connection for request in server.requests}) == 1


def test_closed_connection_is_reopened(server: RemoteServer, frame: np.ndarray) -> None:
    server.on(PATH, Reply({"caption": "a patch"}, headers={"Connection": "close"}), GOOD)
    with remote(server, retries=1) as model:
        assert [model.caption(frame)["caption"] for _ in range(2)] == ["a patch"] * 2
    assert len({request.connection for request in server.requests}) == 2


@pytest.mark.parametrize(
    ("attempt", "after", "seconds"),
    [
        (1, None, 0.5),
        (2, None, 1.0),
        (4, None, 4.0),
        (20, None, MAX_RETRY_SECONDS),
        (500, None, MAX_RETRY_SECONDS),
        (1, 0.0, 0.0),
        (3, 7.5, 7.5),
        (1, 86400.0, MAX_RETRY_SECONDS),
    ],
)
def test_retry_delay_doubles_up_to_the_maximum(attempt: int, after: float | None, seconds: float) -> None:
    assert retry_delay(attempt, 0.5, after) == seconds


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("3", 3.0),
        ("0.5", 0.5),
        ("-4", 0.0),
        ("", None),
        ("soon", None),
        ("nan", None),
        ("inf", None),
        ("1e999", None),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0),
        ("Thu, 99 Jan 1970", None),
    ],
)
def test_retry_after_header_is_parsed(header: str, seconds: float | None) -> None:
    assert parse_retry_after({"retry-after": header}) == seconds


def test_retry_after_date_is_parsed() -> None:
    date = format_datetime(datetime.now(timezone.utc) + timedelta(hours=1), usegmt=True)
    assert parse_retry_after({"retry-after": date}) == pytest.approx(3600, abs=60)
    assert parse_retry_after({}) is None


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"error": {"message": "a", "type": "b"}}, "a"),
        ({"error": "a"}, "a"),
        ({"message": "a", "detail": "b"}, "a"),
        ({"detail": {"message": "a"}}, "a"),
        ({"detail": [{"loc": ["x"], "msg": "a"}]}, "a"),
        ({"error": {"code": 1}}, ""),
        ({"other": "a"}, ""),
        ("a\n b", "a b"),
        (None, ""),
        ("x" * 1000, "x" * 300 + "..."),
    ],
)
def test_error_message_is_found_under_the_usual_keys(body: Any, text: str) -> None:
    assert message_in_json(body) == text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timeout": 0}, "timeout must be a positive number of seconds, got 0"),
        ({"timeout": float("nan")}, "timeout must be"),
        ({"timeout": float("inf")}, "timeout must be"),
        ({"timeout": "60"}, "timeout must be"),
        ({"retries": -1}, "retries must be an integer of at least 0, got -1"),
        ({"retries": 1.5}, "retries must be"),
        ({"backoff": -0.5}, "backoff must be 0 or more seconds"),
        ({"max_in_flight": 0}, "max_in_flight must be an integer of at least 1, got 0"),
        ({"image_format": "gif"}, "image_format must be one of jpeg, png, got 'gif'"),
        ({"has_scores": "yes"}, "has_scores must be True or False, got 'yes'"),
        ({"api_key": 5}, "api_key must be a string, got int"),
        ({"api_key": "ключ"}, "the API key must have printable ASCII characters only"),
        ({"api_key": "a\nb"}, "the API key must have printable ASCII characters only"),
    ],
)
def test_arguments_out_of_range_raise(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoondreamAPI("http://127.0.0.1:1", **options)
