"""Denial-of-service requests: the server stays responsive, and its memory does not grow.

Run with `pytest tests/server/test_hostile_load.py`; `-m soak` also checks the latency of `/health`.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from PIL import Image

from tests.helpers.serve_process import ServeProcess, serving
from tests.server.test_connections import HEAD
from tests.test_image_formats import HOSTILE, icon

MIB = 2**20
JSON = {"Content-Type": "application/json"}
MEMORY = 100 * MIB
HEALTH_SECONDS = 1.0


def detection(file: bytes) -> bytes:
    return json.dumps({"object": "cat", "image_url": base64.b64encode(file).decode()}).encode()


def large_png() -> bytes:
    file = io.BytesIO()
    Image.new("L", (13_000, 13_000)).save(file, "PNG")
    return file.getvalue()


BODIES: dict[str, tuple[str, Callable[[], bytes]]] = {
    "newlines": ("/v1/batch", lambda: b"\n" * (32 * MIB)),
    "short lines": ("/v1/batch", lambda: b"1\n" * (16 * MIB)),
    "empty lists": ("/v1/query", lambda: b"[" + b"[]," * (10 * MIB) + b"[]]"),
    "empty lists in a line": ("/v1/batch", lambda: b"[" + b"[]," * (10 * MIB) + b"[]]"),
    "empty lists in settings": ("/v1/query", lambda: b'{"settings":{"a":[' + b"[]," * (10 * MIB) + b"[]]}}"),
    "empty messages": ("/v1/chat/completions", lambda: b'{"messages":[' + b"{}," * (10 * MIB) + b"{}]}"),
    "empty lists before the key": ("/infer/lmm", lambda: b"[" + b"[]," * (10 * MIB) + b"[]]"),
    "deep lists": ("/infer/lmm", lambda: b"[" * (32 * MIB)),
    "commas in a string": ("/v1/query", lambda: b'{"question":"' + b"," * (31 * MIB) + b'"}'),
    "quotes": ("/v1/query", lambda: b'{"question":"' + b'\\"' * (15 * MIB) + b'"}'),
    "strings that never end": ("/infer/lmm", lambda: b"[]" * 65 + b'"\\' * (15 * MIB)),
    "empty strings": ("/infer/lmm", lambda: b"[]" * 65 + b'""' * (15 * MIB)),
    "a long model name": ("/v1/query", lambda: b'{"question":"a","model":"' + b"/a" * (15 * MIB) + b'"}'),
    "base64 with spaces": ("/v1/caption", lambda: b'{"image_url":"' + b"AAAA " * (6 * MIB) + b'"}'),
    "EPS in IPTC": ("/v1/caption", lambda: detection((HOSTILE / "eps_in_iptc.iim").read_bytes())),
    "PNG in IPTC": ("/v1/caption", lambda: detection((HOSTILE / "169Mpx_in_iptc.iim").read_bytes())),
    "FITS": ("/v1/caption", lambda: detection((HOSTILE / "fits_49Mpx.fits").read_bytes())),
    "PNG in ICO": ("/v1/caption", lambda: detection(icon(large_png()))),
}


@pytest.fixture(scope="module")
def server() -> Iterator[ServeProcess]:
    with serving("--model", "tiny", "--log-level", "error") as running:
        yield running


def memory(server: ServeProcess) -> int:
    process = psutil.Process(server.process.pid)
    family = [process, *process.children(recursive=True)]
    return sum(member.memory_info().rss for member in family)


class HealthMonitor:
    """Requests `/health` repeatedly; records the maximum latency and the maximum memory."""

    def __init__(self, server: ServeProcess) -> None:
        self._server, self._ended = server, threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.slowest, self.memory, self.count = 0.0, 0, 0

    def __enter__(self) -> HealthMonitor:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(0.02):
            started = time.monotonic()
            assert httpx.get(f"{self._server.url}/health", timeout=240).status_code == 200
            self.slowest = max(self.slowest, time.monotonic() - started)
            self.memory = max(self.memory, memory(self._server))
            self.count += 1


def attack(server: ServeProcess, kind: str) -> HealthMonitor:
    path, make = BODIES[kind]
    body = make()
    with HealthMonitor(server) as watch:
        answer = httpx.post(server.url + path, content=body, headers=JSON, timeout=240)
        assert 400 <= answer.status_code < 500 or '"code":413' in answer.text, answer.text[
            :300
        ]  # one line of the batch
        while not watch.count:  # short requests
            time.sleep(0.01)
    return watch


@pytest.mark.parametrize("kind", BODIES)
def test_memory_does_not_grow_under_hostile_load(server: ServeProcess, kind: str) -> None:
    httpx.post(
        f"{server.url}/v1/caption", content=detection(b"GIF89a"), headers=JSON, timeout=240
    )  # start a decoder first
    before = memory(server)
    attack(server, kind)
    assert memory(server) - before < MEMORY


@pytest.mark.soak
@pytest.mark.parametrize("kind", BODIES)
def test_health_answers_under_hostile_load(server: ServeProcess, kind: str) -> None:
    watch = attack(server, kind)
    print(f"{kind}: /health within {watch.slowest:.2f} s, {watch.count} times")
    assert watch.slowest < HEALTH_SECONDS


@pytest.mark.soak
def test_health_answers_with_many_idle_connections(server: ServeProcess) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(1_300):
            connection = socket.create_connection(("127.0.0.1", server.port), timeout=240)
            stack.enter_context(connection)
        with HealthMonitor(server) as watch:
            while watch.count < 20:
                time.sleep(0.01)
    assert watch.slowest < HEALTH_SECONDS


@pytest.mark.soak
def test_health_answers_during_an_endless_header(server: ServeProcess) -> None:
    before = memory(server)
    with HealthMonitor(server) as watch, socket.create_connection(("127.0.0.1", server.port), timeout=240) as client:
        with contextlib.suppress(ConnectionError):
            client.sendall(HEAD + b"X-Long: ")
            for _ in range(300):
                client.sendall(b"a" * MIB)
        while not watch.count:
            time.sleep(0.01)
    assert watch.slowest < HEALTH_SECONDS
    assert memory(server) - before < MEMORY


def test_ghostscript_is_never_started(server: ServeProcess, tmp_path: Path) -> None:
    """A fake `gs` program on the path of the server records its calls."""
    trace = tmp_path / "trace"
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {trace}\n")
    program.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        with serving("--model", "tiny") as other:
            for content in (
                (HOSTILE / "eps_in_iptc.iim").read_bytes(),
                b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
            ):
                answer = httpx.post(f"{other.url}/v1/caption", content=detection(content), headers=JSON, timeout=240)
                assert answer.status_code == 400
    assert not trace.exists()
