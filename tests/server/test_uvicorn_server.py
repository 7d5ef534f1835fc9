"""Addresses that the server listens on. Run with `pytest tests/server/test_uvicorn_server.py`."""

from __future__ import annotations

import asyncio
import os
import platform
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from moondream_cv.errors import MoondreamError
from moondream_cv.server.uvicorn_server import listen


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_server_listens_on_all_addresses_and_answers_without_delay(host: str) -> None:
    async def go() -> list[int]:
        delays: list[int] = []

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connection = writer.get_extra_info("socket")
            delays.append(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        for listening in listen(host, 0):
            server = await asyncio.start_server(answer, sock=listening)
            address = listening.getsockname()
            reader, writer = await asyncio.open_connection(*address[:2])
            assert await reader.read() == b""
            writer.close()
            server.close()
        return delays

    delays = asyncio.run(go())
    assert delays
    assert all(delays)  # small responses are not delayed by Nagle's algorithm


def test_unavailable_addresses_raise_an_error() -> None:
    (holder,) = listen("127.0.0.1", 0)
    with holder:
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(MoondreamError, match=f"cannot listen on 127.0.0.1, port {port}: Address already in use"):
            listen("127.0.0.1", port)
    with pytest.raises(MoondreamError, match="cannot listen on 203"):
        listen("203.0.113.1", 0)
    with pytest.raises(MoondreamError, match="cannot listen on no"):
        listen("no.such.host.invalid", 0)


ALLOCATION_SCRIPT = """
import ctypes, os, signal, threading
from functools import partial
from moondream_cv import load
from moondream_cv.server.app import create_app
from moondream_cv.server.runtime.engine_process import ProcessEngine
from moondream_cv.server.uvicorn_server import run_server
from tests.helpers.waiting import until

def stop_when_ready():
    until(lambda: app.state.service.ready)
    os.kill(os.getpid(), signal.SIGTERM)

if __name__ == "__main__":
    app = create_app({source})
    threading.Thread(target=stop_when_ready, daemon=True).start()
    run_server(app, "127.0.0.1", 0)
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    for _ in range(2):  # by default, glibc keeps blocks of a size that was freed once
        block = libc.malloc(16 * 2**20)
        is_mapped = bool(ctypes.c_size_t.from_address(block - ctypes.sizeof(ctypes.c_size_t)).value & 2)
        libc.free(block)
    print(is_mapped)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="reads block headers of glibc")
@pytest.mark.parametrize(
    ("source", "is_mapped"),
    [
        pytest.param("partial(ProcessEngine, partial(load, 'tiny', device='cpu'))", True, id="model in a process"),
        pytest.param("partial(load, 'tiny', device='cpu')", False, id="model in a thread"),
    ],
)
def test_large_blocks_are_kept_only_for_models_in_the_process(source: str, is_mapped: bool, tmp_path: Path) -> None:
    script = tmp_path / "serve.py"
    script.write_text(ALLOCATION_SCRIPT.replace("{source}", source))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment)
    assert done.stdout.split() == [str(is_mapped)], done.stderr
