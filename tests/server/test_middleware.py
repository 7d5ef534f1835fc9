"""Middleware: API keys, sizes, request IDs, logs, metrics, paths and errors.

Run with `pytest tests/server/test_middleware.py`.
"""

from __future__ import annotations

import json
import logging
import socket
from typing import Any

import httpx
import pytest

from moondream_cv.engine.local_model import LocalModel
from moondream_cv.server import bodies, logs
from moondream_cv.server.settings import ServerSettings
from tests.helpers.served import Served, served

KEY = "correct horse"
NAMES = {"api_keys": "API key", "allowed_hosts": "allowed host", "cors_origins": "CORS origin"}  # in messages


@pytest.fixture(scope="module")
def locked(tiny: LocalModel):
    with served(tiny, api_keys=(KEY, "battery"), max_body=200_000) as running:
        yield running


def detection(uri: str) -> dict[str, str]:
    return {"image_url": uri, "object": "cat"}


@pytest.mark.parametrize(
    "headers",
    [
        {"X-Moondream-Auth": KEY},
        {"X-Moondream-Auth": "battery"},
        {"Authorization": f"Bearer {KEY}"},
        {"Authorization": f"bearer  {KEY}"},
        {"Authorization": f"Key {KEY}"},
        {"X-API-Key": KEY},
        {"X-Moondream-Auth": "wrong", "Authorization": f"Bearer {KEY}"},
    ],
)
def test_valid_key_is_accepted(locked: Served, uri: str, headers: dict[str, str]) -> None:
    assert locked.post("/v1/detect", detection(uri), headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"X-Moondream-Auth": ""},
        {"X-Moondream-Auth": "correct"},
        {"X-Moondream-Auth": f"{KEY} "[:-2]},
        {"Authorization": KEY},
        {"Authorization": f"Basic {KEY}"},
        {"Authorization": "Bearer"},
        {"X-Moondream-Auth": "ключ".encode()},
    ],
)
@pytest.mark.parametrize("path", ["/v1/detect", "/v1//detect", "/v1/batch", "/v1/models", "/metrics", "/nothing"])
def test_missing_or_invalid_key_gets_401(locked: Served, uri: str, headers: dict[str, Any], path: str) -> None:
    answer = locked.client.request("GET" if path in ("/v1/models", "/metrics") else "POST", path, headers=headers)
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert "API key" in answer.text


def test_key_in_the_query_is_accepted(locked: Served) -> None:
    assert locked.client.get("/v1/models", params={"api_key": KEY}).status_code == 200
    assert locked.client.get("/v1/models", params={"api_key": "wrong"}).status_code == 401


@pytest.mark.parametrize("path", ["/health", "/ready", "/openapi.json"])
def test_probes_need_no_key(locked: Served, path: str) -> None:
    assert locked.client.get(path).status_code == 200


def test_keys_are_not_logged(locked: Served, uri: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        locked.post("/v1/detect", detection(uri), headers={"X-Moondream-Auth": KEY})
        locked.client.get("/v1/models", params={"api_key": KEY})
        wrong = locked.client.get("/v1/models", params={"api_key": "guess-of-mine"})
    ours = "\n".join(r.getMessage() + str(vars(r)) for r in caplog.records if r.name.startswith("moondream_cv"))
    assert "/v1/models" in ours
    for secret in (KEY, "battery", "guess-of-mine"):
        assert secret not in ours
        assert secret not in wrong.text
        assert secret not in repr(locked.service.settings)


def test_oversized_body_is_rejected_before_it_is_received(locked: Served) -> None:
    headers = {"X-Moondream-Auth": KEY, "Content-Type": "application/json"}
    declared = locked.client.post("/v1/detect", content=b"x" * 300_000, headers=headers)
    chunked = locked.client.post("/v1/detect", content=(b"x" * 50_000 for _ in range(10)), headers=headers)
    for answer in (declared, chunked):
        assert answer.status_code == 413
        assert "200,000 bytes" in answer.json()["error"]["message"]
    host, port = locked.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=240) as client:  # only the Content-Length is large
        head = "POST /v1/detect HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        head += f"X-Moondream-Auth: {KEY}\r\nContent-Length: 9999999999\r\n\r\n"
        client.sendall(head.encode())
        assert b" 413 " in client.recv(1000)


def test_body_that_does_not_arrive_gets_408(locked: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "BODY_SECONDS", 0.2)
    host, port = locked.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=240) as client:
        head = "POST /v1/detect HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        head += f"X-Moondream-Auth: {KEY}\r\nContent-Length: 100\r\n\r\n{{"
        client.sendall(head.encode())
        assert b" 408 " in client.recv(1000)


def test_server_without_keys_needs_no_key(server: Served, uri: str) -> None:
    assert server.post("/v1/detect", detection(uri)).status_code == 200


@pytest.mark.parametrize("path", ["/v1//detect", "//v1/detect", "/v1///detect"])
def test_repeated_slashes_are_accepted(server: Served, uri: str, path: str) -> None:
    assert httpx.post(server.url + path, json=detection(uri), timeout=240).json()["objects"]


def test_responses_have_a_request_id_and_keep_that_of_the_client(server: Served) -> None:
    own = server.client.get("/health", headers={"X-Request-Id": "mine-1.2"})
    assert own.headers["X-Request-Id"] == "mine-1.2"
    for bad in ("a b", "x" * 65, "a;b"):
        made = server.client.get("/health", headers={"X-Request-Id": bad}).headers["X-Request-Id"]
        assert len(made) == 32
    assert server.client.get("/nothing").headers["X-Request-Id"] != server.client.get("/no").headers["X-Request-Id"]


def test_logs_are_json_with_the_request_id(server: Served, capsys: pytest.CaptureFixture[str]) -> None:
    loggers = [logging.getLogger(name) for name in ("moondream_cv", "uvicorn")]
    before = [(logger, list(logger.handlers), logger.propagate, logger.level) for logger in loggers]
    try:
        logs.set_up_logging("info")
        server.client.get("/v1/models?api_key=secret", headers={"X-Request-Id": "seen"})
        lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    finally:
        for logger, handlers, propagate, level in before:
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)
    (line,) = (line for line in lines if line.get("request_id") == "seen")
    assert line["message"] == "GET /v1/models 200"
    assert (line["level"], line["logger"], line["dialect"], line["status"]) == (
        "INFO",
        "moondream_cv.server.middleware",
        "openai",
        200,
    )
    assert line["milliseconds"] >= 0


def test_metrics_count_requests_tokens_batches_and_cache_hits(tiny: LocalModel, uri: str) -> None:
    with served(tiny) as running:
        for _ in range(2):
            running.post("/v1/detect", detection(uri))
        running.post("/v1/detect", {})
        running.client.get("/a/path/of/their/own")
        text = running.client.get("/metrics").text
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    counted = 'moondream_cv_requests_total{dialect="moondream",route="/v1/detect",status="%d"}'
    assert (lines[counted % 200], lines[counted % 422]) == ("2.0", "1.0")
    assert lines['moondream_cv_request_seconds_count{dialect="moondream",route="/v1/detect"}'] == "3.0"
    assert lines['moondream_cv_skill_requests_total{outcome="ok",skill="detect"}'] == "2.0"
    assert float(lines['moondream_cv_tokens_total{kind="prompt"}']) > 100
    assert float(lines['moondream_cv_tokens_total{kind="completion"}']) >= 6  # a box has three
    assert float(lines["moondream_cv_batch_rows_count"]) > 0
    assert float(lines['moondream_cv_image_cache_total{outcome="hit"}']) >= 1
    assert lines["moondream_cv_requests_taken"] == "0.0"
    assert lines["moondream_cv_queue_depth"] == "0.0"
    assert "/a/path" not in text  # arbitrary paths as labels would fill the memory


def test_cors_allows_only_configured_origins(server: Served, tiny: LocalModel) -> None:
    asked = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in server.client.options("/v1/detect", headers=asked).headers
    with served(tiny, cors_origins=("https://page.example",), api_keys=(KEY,)) as running:
        allowed = running.client.options("/v1/detect", headers=asked)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "https://page.example"
        other = running.client.options("/v1/detect", headers={**asked, "Origin": "https://other.example"})
        assert "access-control-allow-origin" not in other.headers
        refused = running.client.post("/v1/detect", json={}, headers={"Origin": "https://page.example"})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://page.example"  # readable by the page


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("GET", "/nothing", 404, "no route at /nothing"),
        ("GET", "/v1/detect", 405, "GET is not allowed for /v1/detect"),
        ("DELETE", "/v1/caption", 405, "DELETE"),
        ("GET", "/docs", 404, "/docs"),  # FastAPI's pages load scripts from other sites
        ("GET", "/redoc", 404, "/redoc"),
        ("GET", "/../../etc/passwd", 404, "no route at"),
    ],
)
def test_unknown_routes_and_methods_get_json_errors(
    server: Served, method: str, path: str, status: int, message: str
) -> None:
    answer = server.client.request(method, path)
    assert answer.status_code == status
    assert message in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "Field required"),
        (b"{", "JSON decode error"),
        (b"[]", ""),
        (b"null", ""),
        (b'{"image_url": "\xff"}', ""),
        (b'{"image_url": 1, "object": []}', "image_url"),
        (b"[" * 100_000, ""),
        (b'{"a":' * 50_000, ""),
        (b'{"image_url": ' + b"9" * 10_000 + b"}", ""),
        (b"\0", ""),
    ],
)
def test_invalid_bodies_get_4xx(server: Served, body: bytes, message: str) -> None:
    answer = server.client.post("/v1/detect", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 413, 422)
    error = answer.json()["error"]
    assert message in error["message"]
    assert error["param"] is None or not error["param"].isdigit()  # not an offset into invalid JSON
    assert len(answer.text) < 1000


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_objects": 0}, "max_objects must be an integer of at least 1"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"seed": -1}, "seed"),
        ({"variant": "../../adapter.pt"}, "no adapters"),
    ],
)
def test_settings_out_of_range_are_rejected(
    server: Served, uri: str, settings: dict[str, object], message: str
) -> None:
    answer = server.post("/v1/detect", {**detection(uri), "settings": settings})
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "settings",
    [
        None,
        {},
        {"unknown": 1, "variant": None, "temperature": None},
        {"max_crops": 10**9, "max_objects": 10**30, "max_tokens": 10**30, "seed": 10**30},
    ],
)
def test_unknown_null_and_huge_settings_are_accepted(server: Served, uri: str, settings: object) -> None:
    assert server.post("/v1/detect", {**detection(uri), "settings": settings}).json()["objects"]


@pytest.mark.parametrize(
    "given",
    [{"allowed_hosts": ("http://a",)}, {"allowed_hosts": ("a b",)}, {"allowed_hosts": ("",)}, {"cors_origins": ("https://a/",)},
     {"queue": 0}, {"queue": 1.5}, {"timeout": 0}, {"timeout": float("inf")}, {"max_body": -1}, {"api_keys": (" ",)},
     {"api_keys": ("ключ",)}],
)  # fmt: skip
def test_server_settings_out_of_range_are_rejected(given: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=NAMES.get(next(iter(given)), next(iter(given)))):
        ServerSettings(**given)  # type: ignore[arg-type]
