"""Clients cannot forge log lines, keys, or terminal output. Run with `pytest tests/server/test_logs.py`."""

from __future__ import annotations

import io
import json
import logging
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from moondream_cv.server import logs
from tests.helpers.serve_process import serving
from tests.helpers.served import Served

PATHS = ["/infer/%0aFAKE%1b%5b31m", "/%E2%80%A8%C2%9B31m%E2%80%AE", "/v1/%0d%0a%7f%07", "/%ff%ed%a0%80"]
HEADS = [
    b"GET /x HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: a\x9b31m\xe2\x80\xa8\r\nConnection: close\r\n\r\n",
    b"GET /x HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: \x1b[31m\r\nConnection: close\r\n\r\n",
    b"GET /\x1b[31m HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    b"\x1b[31m\nFAKE\r\n\r\n",
    b'GET /x HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: a","level":"FAKE\r\nConnection: close\r\n\r\n',
]


@contextmanager
def set_up(as_json: bool, stream: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Return `set_up_logging` for a stream; the logging configuration is restored afterwards."""
    loggers = [logging.getLogger(name) for name in ("moondream_cv", "uvicorn")]
    before = [(logger, list(logger.handlers), logger.propagate, logger.level) for logger in loggers]
    last = logging.lastResort.formatter if logging.lastResort else None
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        try:
            logs.set_up_logging("info", as_json)
            yield
        finally:
            for logger, handlers, propagate, level in before:
                logger.handlers, logger.propagate = handlers, propagate
                logger.setLevel(level)
            if logging.lastResort:
                logging.lastResort.setFormatter(last)


def raw(port: int, head: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=240) as connection:
        connection.sendall(head)
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
        return answer


@pytest.mark.parametrize("style", ["text", "json"])
def test_requests_cannot_forge_log_lines(style: str) -> None:
    with serving("--model", "tiny", "--log-format", style) as server:
        for path in PATHS:
            raw(server.port, f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        for head in HEADS:
            answer = raw(server.port, head)
            assert b"\x1b" not in answer
            assert b"\x9b" not in answer
        _, text = server.end()
    lines = text.splitlines()  # U+2028 and C1 characters also end lines
    assert lines == text.rstrip("\n").split("\n")
    assert all(line.isprintable() for line in lines)
    assert not [line for line in lines if line.startswith("FAKE")]
    assert sum("FAKE" in line for line in lines) == 1
    if style == "text":
        assert any("GET /infer/\\nFAKE\\x1b[31m 404" in line for line in lines)
    else:
        entries = [json.loads(line) for line in lines if line.startswith("{")]
        assert {entry["level"] for entry in entries} <= {"INFO", "WARNING"}
        assert any("\nFAKE\x1b[31m" in entry["message"] for entry in entries)


def test_invalid_request_id_is_replaced(server: Served) -> None:
    for given in ("a b", "a\x9b", "x" * 65, 'a"', "ä"):
        answer = server.client.get("/health", headers={"X-Request-Id": given.encode("latin-1")})
        assert len(answer.headers["x-request-id"]) == 32
        assert answer.headers["x-request-id"].isalnum()
    assert server.client.get("/health", headers={"X-Request-Id": "a.b-c_1"}).headers["x-request-id"] == "a.b-c_1"


ODD = "a\n\x1b\x7f\x9b\u2028\u202e\ud800ü猫"


@pytest.mark.parametrize("encoding", ["ascii", "utf-8", "latin-1"])
@pytest.mark.parametrize("as_json", [False, True])
def test_unusual_characters_lose_no_log_line(as_json: bool, encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    # Python's standard error replaces characters that it cannot encode.
    stream = io.TextIOWrapper(written, encoding=encoding, errors="backslashreplace")
    with set_up(as_json, stream, monkeypatch):
        logger = logging.getLogger("moondream_cv.test")
        logger.warning("%s", ODD)
        logger.warning("%(a)s", {"a": ODD, "level": "FAKE", "message": "FAKE", "more": "FAKE"})
        try:
            raise ValueError(ODD)
        except ValueError:
            logger.exception("failed")
    stream.flush()
    text = written.getvalue().decode(encoding)
    assert not any(not c.isprintable() for c in text.replace("\n", ""))
    if not as_json:
        *lines, last = text.rstrip("\n").split("\n")
        assert sum(" WARNING " in line for line in lines) == 2
        assert last.startswith("    ")
        return
    first, second, third = map(json.loads, text.splitlines())
    assert first["message"] == second["message"] == ODD
    assert set(first) == set(second) == {"time", "level", "logger", "message"}
    assert {first["level"], second["level"]} == {"WARNING"}
    assert ODD in third["exc_info"]


def test_loggers_without_handlers_are_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    with set_up(False, stream, monkeypatch):
        assert logging.lastResort is not None
        record = logging.LogRecord("asyncio", logging.ERROR, "file", 1, "never retrieved: %s", ("\nFAKE\x1b",), None)
        logging.lastResort.handle(record)
    assert stream.getvalue().endswith("never retrieved: \\nFAKE\\x1b\n")
