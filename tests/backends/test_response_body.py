"""Size limits for the responses of remote servers."""

from __future__ import annotations

import functools
import gzip
import socket
import threading
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from moondream_cv.backends import Fal, MoondreamAPI, OpenAICompatible, connect, response_body
from moondream_cv.backends.base import RemoteModel
from moondream_cv.backends.retries import AttemptError
from moondream_cv.errors import BackendError
from tests.helpers.remote_server import RemoteServer, Reply

MIB = 2**20
GZIPPED = "Content-Encoding: gzip\r\n"


@functools.cache
def bomb(mebibytes: int, open_with: bytes = b'{"caption": "') -> bytes:
    """Return a gzip body that decompresses to a number of MiB."""
    packer = zlib.compressobj(9, wbits=zlib.MAX_WBITS | 16)
    parts = [packer.compress(open_with), *(packer.compress(b"a" * MIB) for _ in range(mebibytes)), packer.flush()]
    return b"".join(parts)


class RawServer:
    """A server that sends one head and then chunks until the client closes the connection.

    Attributes:
        sent: Number of body bytes sent.
        requests: Number of requests received.
    """

    def __init__(self, head: str, pieces: Callable[[], Iterator[bytes]]) -> None:
        self.sent = self.requests = 0
        self._head, self._pieces = head, pieces
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._socket.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection:
            request = b""
            while b"\r\n\r\n" not in request:
                request += connection.recv(65536)
            head, _, body = request.partition(b"\r\n\r\n")
            lengths = [
                int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-le")
            ]
            while len(body) < sum(lengths):
                body += connection.recv(65536)
            self.requests += 1
            try:
                connection.sendall(f"HTTP/1.1 {self._head}Connection: close\r\n\r\n".encode())
                for piece in self._pieces():
                    connection.sendall(piece)
                    self.sent += len(piece)
            except OSError:
                pass


@contextmanager
def raw_server(head: str, pieces: Callable[[], Iterator[bytes]]) -> Iterator[RawServer]:
    server = RawServer(head, pieces)
    try:
        yield server
    finally:
        server.close()


def endless(piece: bytes) -> Callable[[], Iterator[bytes]]:
    def pieces() -> Iterator[bytes]:
        while True:
            yield piece

    return pieces


def peak_memory(call: Callable[[], Any]) -> int:
    """Return the peak memory in bytes that a call allocates."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def roboflow(url: str) -> RemoteModel:
    pytest.importorskip("inference_sdk")
    from moondream_cv.backends import RoboflowInference

    return RoboflowInference(url, has_scores=False, backoff=0.001)


CLIENTS: dict[str, tuple[Callable[[str], RemoteModel], str]] = {
    "moondream": (lambda url: MoondreamAPI(url, has_scores=False, backoff=0.001), "/v1/detect"),
    "openai": (lambda url: OpenAICompatible(url, model="m", backoff=0.001), "/v1/chat/completions"),
    "fal": (lambda url: Fal(url, backoff=0.001), "/fal-ai/moondream2/object-detection"),
    "roboflow": (roboflow, "/infer/lmm"),
}


def call(model: RemoteModel, frame: np.ndarray) -> Any:
    return model.caption(frame) if isinstance(model, OpenAICompatible) else model.detect(frame, "cat")


@pytest.mark.slow
@pytest.mark.parametrize("name", CLIENTS)
@pytest.mark.parametrize(("status", "limit"), [(200, "32 MiB"), (500, "1 MiB"), (503, "1 MiB")])
def test_gzip_bombs_are_not_decompressed_beyond_the_limit(
    server: RemoteServer, frame: np.ndarray, name: str, status: int, limit: str
) -> None:
    make, path = CLIENTS[name]
    server.on(path, Reply(bomb(512), status, {"Content-Encoding": "gzip"}))

    def refused() -> None:
        with make(server.url) as model, pytest.raises(BackendError, match=f"larger than the limit of {limit}"):
            call(model, frame)

    assert peak_memory(refused) < 80 * MIB
    assert len(server.to(path)) == 1  # not retried


@pytest.mark.parametrize("name", CLIENTS)
@pytest.mark.parametrize("head", ["200 OK\r\n", f"200 OK\r\n{GZIPPED}", "500 Oops\r\n"])
def test_endless_bodies_are_not_read_beyond_the_limit(frame: np.ndarray, name: str, head: str) -> None:
    # Empty gzip members decompress to nothing, so the limit must apply to the received bytes as well.
    piece = gzip.compress(b"") * 3000 if GZIPPED in head else b" " * 65536
    with raw_server(head, endless(piece)) as server:
        with CLIENTS[name][0](server.url) as model, pytest.raises(BackendError, match="larger than the limit"):
            call(model, frame)
        assert server.sent < 48 * MIB
        assert server.requests == 1


def test_content_length_above_the_limit_is_rejected_before_reading(frame: np.ndarray) -> None:
    with raw_server("200 OK\r\nContent-Length: 99999999999\r\n", endless(b" " * 65536)) as server:
        with MoondreamAPI(server.url) as model, pytest.raises(BackendError, match="limit of 32 MiB"):
            model.caption(frame)
        assert server.sent < 16 * MIB  # size of the socket buffers


EVENTS = "200 OK\r\nContent-Type: text/event-stream\r\n"


@pytest.mark.slow
@pytest.mark.parametrize("gzipped", [False, True])
def test_stream_lines_are_limited(frame: np.ndarray, gzipped: bool) -> None:
    pieces = (lambda: iter([bomb(512, b"data: ")])) if gzipped else endless(b"a" * 65536)
    with raw_server(EVENTS + GZIPPED * gzipped, pieces) as server:

        def refused() -> None:
            message = "line in its event stream larger than the limit of 1 MiB"
            with MoondreamAPI(server.url) as model, pytest.raises(BackendError, match=message):
                list(model.caption(frame, stream=True)["caption"])

        assert peak_memory(refused) < 16 * MIB
        assert server.sent < 16 * MIB


@pytest.mark.slow
@pytest.mark.parametrize("line", [b": nothing\n", b"\n", b'data: {"chunk": ""}\n\n'])
def test_stream_size_is_limited(frame: np.ndarray, line: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(response_body, "MAX_STREAM_BYTES", 4 * MIB)
    with raw_server(EVENTS, endless(line * 4096)) as server:

        def refused() -> None:
            message = "stream larger than the limit of 4 MiB"
            with MoondreamAPI(server.url) as model, pytest.raises(BackendError, match=message):
                list(model.caption(frame, stream=True)["caption"])

        assert peak_memory(refused) < 8 * MIB
        assert server.requests == 1


def test_probe_responses_are_limited() -> None:
    with raw_server("200 OK\r\n", endless(b" " * 65536)) as server:
        with pytest.raises(BackendError, match="has an unknown API"):
            connect(server.url)
        assert server.sent < 2 * 48 * MIB  # two routes


def test_json_with_too_many_values_is_rejected(server: RemoteServer, frame: np.ndarray) -> None:
    server.on("/v1/caption", Reply(b'{"a": [' + b"[]," * 5_000_000 + b"[]]}"))

    def refused() -> None:
        with MoondreamAPI(server.url) as model, pytest.raises(BackendError, match="limit of 2,000,000 values"):
            model.caption(frame)

    assert peak_memory(refused) < 64 * MIB


@pytest.mark.parametrize("name", CLIENTS)
def test_only_gzip_encoding_is_accepted(server: RemoteServer, frame: np.ndarray, name: str) -> None:
    make, path = CLIENTS[name]
    server.on(
        path,
        Reply(b"abc", headers={"Content-Encoding": "gzip, gzip"}),
        Reply(b"abc", headers={"Content-Encoding": "gzip"}),
    )
    with make(server.url) as model:
        with pytest.raises(BackendError, match="content encoding 'gzip, gzip', but only gzip was requested"):
            call(model, frame)
        with pytest.raises(BackendError, match="invalid gzip data"):
            call(model, frame)
    assert {request.headers["accept-encoding"] for request in server.to(path)} == {"gzip"}


def test_gzip_responses_and_streams_are_decompressed(server: RemoteServer, frame: np.ndarray) -> None:
    reply = b'{"caption": "a patch", "objects": [], "predictions": []}'
    stream = b'data: {"chunk": "a "}\n\ndata: {"chunk": "patch"}\n\ndata: {"completed": true}\n\n'
    headers = {"Content-Encoding": "gzip"}
    server.on("/v1/caption", Reply(gzip.compress(reply), headers=headers))
    server.on("/infer/lmm", Reply(gzip.compress(reply), headers=headers))
    with MoondreamAPI(server.url) as model:
        assert model.caption(frame)["caption"] == "a patch"
        server.on("/v1/caption", Reply(gzip.compress(stream), headers=headers, kind="text/event-stream"))
        assert list(model.caption(frame, stream=True)["caption"]) == ["a ", "patch"]
        server.on("/v1/caption", Reply({"message": "no"}, 400))
    with roboflow(server.url) as model:
        assert model.detect(frame, "cat")["objects"] == []


@pytest.mark.parametrize("size", [1, 7, 65536, 10**7])
@pytest.mark.parametrize("count", [0, 1, 65536, 65537, 3 * 65536])
def test_decompression_is_exact(size: int, count: int) -> None:
    data = bytes(i % 251 for i in range(count))
    packed = gzip.compress(data)
    pieces = (packed[start : start + size] for start in range(0, len(packed), size))
    assert response_body.read_body(pieces, "gzip", "", 10**6) == data


def test_body_of_exactly_the_limit_is_read() -> None:
    assert len(response_body.read_body([b"a" * 10], "", "10", 10)) == 10
    with pytest.raises(AttemptError, match="limit"):
        response_body.read_body([b"a" * 11], "", "", 10)


def test_lines_are_split_independently_of_chunks() -> None:
    text = b"data: a\n\ndata: \xe2\x80\xa8b\nend"
    for size in (1, 3, 100):
        pieces = [text[start : start + size] for start in range(0, len(text), size)]
        assert list(response_body.split_lines(pieces)) == text.split(b"\n")
