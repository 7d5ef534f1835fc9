"""Checks of bodies before parsing, and the budget for receiving them.

Run with `pytest tests/server/test_bodies.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json

import pytest

from moondream_cv.engine.local_model import LocalModel
from moondream_cv.server.bodies import MAX_DEPTH, MAX_VALUES, ReceiveBudget, check_json
from moondream_cv.server.errors import ServerError
from tests.helpers.served import served
from tests.server.test_connections import HEAD, connected


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", None),
        (b"[" * MAX_DEPTH, None),
        (b"[" * (MAX_DEPTH + 1), 400),
        (b'{"a":' * (MAX_DEPTH + 1), 400),
        (b"[" + b"[]," * 1_000 + b"[]]", None),
        (json.dumps({"a": "[" * 1_000 + '\\"{'}).encode(), None),
        (b"[" + b"1," * MAX_VALUES, 413),
        (b'"' + b"," * 2_000_000, 413),
        (b'"' + b"a" * 2_000_000, None),
        (b"[]" * 65 + b'"\\' * 500_000, None),  # takes hours if each quote is tried as the start of a string
        (b"[]" * 65 + b'""' * 500_000, 400),
    ],
)
def test_json_is_checked_before_parsing(body: bytes, status: int | None) -> None:
    if status is None:
        asyncio.run(check_json(body))
    else:
        with pytest.raises(ServerError) as caught:
            asyncio.run(check_json(body))
        assert caught.value.status == status


def test_bodies_wait_for_the_receive_budget() -> None:
    async def run() -> None:
        budget = ReceiveBudget(10)
        first, second, other = (budget.reserve(*each) for each in (("a", 6), ("a", 6), ("b", 10)))
        await first.__aenter__()
        waiting = asyncio.ensure_future(second.__aenter__())
        await other.__aenter__()  # another client does not wait
        await asyncio.sleep(0)
        assert not waiting.done()
        await first.__aexit__(None, None, None)
        await waiting
        given_up = asyncio.ensure_future(budget.reserve("a", 10).__aenter__())
        await asyncio.sleep(0)
        given_up.cancel()
        await asyncio.wait([given_up])
        await second.__aexit__(None, None, None)
        async with budget.reserve("a", 10):
            pass
        await other.__aexit__(None, None, None)
        assert not budget._reserved
        assert not budget._waiting

    asyncio.run(run())


def test_endless_bodies_delay_only_the_same_client(tiny: LocalModel) -> None:
    with served(tiny, max_body=100_000) as server, contextlib.ExitStack() as stack:
        for _ in range(5):
            client = stack.enter_context(connected(server))
            client.sendall(HEAD + b"Content-Length: 90000\r\n\r\n" + b" " * 80_000)
        other = stack.enter_context(connected(server, "127.0.0.2"))
        other.sendall(HEAD + b"Content-Length: 2\r\nConnection: close\r\n\r\n{}")
        assert b" 422 " in other.recv(1_000)
