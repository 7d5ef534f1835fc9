"""Addresses that the server listens on. Run with `pytest tests/server/test_uvicorn_server.py`."""

from __future__ import annotations

import asyncio
import socket

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
