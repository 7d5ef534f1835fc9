"""Retries of train steps: each step is applied once, whatever happens to its response.

Run with `pytest tests/server/test_train_steps.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from moondream_cv.engine.local_model import LocalModel
from moondream_cv.server.apis.train_steps import AcknowledgedResponse, PendingStep
from tests.helpers.served import Served, served
from tests.helpers.tuning import HeldTraining, fine_tune, held_training, step_body, step_of
from tests.helpers.waiting import until

PATH = "/v1/tuning/train_step"


@contextlib.contextmanager
def held_server(model: LocalModel, folder: Path) -> Iterator[tuple[HeldTraining, Served]]:
    """Serve a model whose train steps wait."""
    with held_training() as held, served(model, finetunes=folder) as server:
        try:
            yield held, server
        finally:
            held.resume()


def pending(server: Served) -> list[PendingStep]:
    """Return the train steps that run, or whose replies are being sent."""
    steps = getattr(server.app.state, "train_steps", None)
    return [] if steps is None else list(steps._pending.values())


def send_and_close(server: Served, body: bytes, started: Any) -> None:
    """Send a request, and close the connection when the step has started."""
    address = urlsplit(server.url)
    with socket.create_connection((str(address.hostname), int(address.port or 0)), timeout=240) as client:
        head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert started.wait(240)


def test_step_without_a_delivered_reply_is_applied_once(tiny: LocalModel, tmp_path: Path, uri: str) -> None:
    with held_server(tiny, tmp_path) as (held, server):
        ft = fine_tune(server.url)
        body = step_body(ft.finetune_id, uri)

        # The client disconnects during the step
        send_and_close(server, body, held.started)
        until(lambda: [step.num_requests for step in pending(server)] == [0])
        held.resume()
        until(lambda: not pending(server))
        assert step_of(server, ft.finetune_id) == 1

        # The retry gets the reply of the step, which is acknowledged by that
        retried = server.client.post(PATH, content=body).json()
        assert (retried["step"], retried["applied"]) == (1, True)
        assert step_of(server, ft.finetune_id) == 1
        assert server.client.post(PATH, content=body).json()["step"] == 2


def test_retry_during_the_step_waits_for_its_reply(tiny: LocalModel, tmp_path: Path, uri: str) -> None:
    with held_server(tiny, tmp_path) as (held, server), ThreadPoolExecutor() as pool:
        ft = fine_tune(server.url)
        body = step_body(ft.finetune_id, uri)
        send_and_close(server, body, held.started)
        until(lambda: [step.num_requests for step in pending(server)] == [0])
        retries = [pool.submit(server.client.post, PATH, content=body) for _ in range(3)]
        until(lambda: [step.num_requests for step in pending(server)] == [3])
        held.resume()
        replies = [retry.result().json() for retry in retries]
        assert [reply["step"] for reply in replies] == [1, 1, 1]
        assert replies[0] == replies[1] == replies[2]
        assert step_of(server, ft.finetune_id) == 1
        assert server.client.post(PATH, content=body).json()["step"] == 2


def test_retry_after_a_restart_gets_the_stored_reply(tiny: LocalModel, tmp_path: Path, uri: str) -> None:
    with held_server(tiny, tmp_path) as (held, server):
        ft = fine_tune(server.url)
        body = step_body(ft.finetune_id, uri)
        send_and_close(server, body, held.started)
        until(lambda: [step.num_requests for step in pending(server)] == [0])
    with served(tiny, finetunes=tmp_path) as restarted:
        assert step_of(restarted, ft.finetune_id) == 1
        assert restarted.client.post(PATH, content=body).json()["step"] == 1
        assert restarted.client.post(PATH, content=body).json()["step"] == 2


def test_other_steps_wait_for_the_running_one(tiny: LocalModel, tmp_path: Path, uri: str) -> None:
    with held_server(tiny, tmp_path) as (held, server), ThreadPoolExecutor() as pool:
        ft = fine_tune(server.url)
        bodies = [step_body(ft.finetune_id, uri, name) for name in ("cat", "dog", "red circle")]
        running = [pool.submit(server.client.post, PATH, content=body) for body in bodies]
        until(lambda: len(pending(server)) == 3)
        held.resume()
        assert sorted(answer.result().json()["step"] for answer in running) == [1, 2, 3]


def test_delivered_step_is_repeated_on_request(tiny: LocalModel, tmp_path: Path, uri: str) -> None:
    with served(tiny, finetunes=tmp_path) as server:
        ft = fine_tune(server.url)
        body = step_body(ft.finetune_id, uri)
        replies = [server.client.post(PATH, content=body).json() for _ in range(5)]
        assert [reply["step"] for reply in replies] == [1, 2, 3, 4, 5]
        assert replies[4]["sft_loss"] < replies[0]["sft_loss"]


def test_failed_step_can_be_repeated(tiny: LocalModel, tmp_path: Path, uri: str) -> None:
    with served(tiny, finetunes=tmp_path) as server:
        ft = fine_tune(server.url)
        body = step_body(ft.finetune_id, "none")
        assert [server.client.post(PATH, content=body).status_code for _ in range(2)] == [400, 400]
        assert server.client.post(PATH, content=step_body(ft.finetune_id, uri)).json()["step"] == 1
        assert not pending(server)


@pytest.mark.parametrize("is_connected", [True, False])
def test_response_reports_whether_it_was_sent_completely(is_connected: bool) -> None:
    sent: list[dict[str, Any]] = []
    calls: list[str] = []

    async def receive() -> dict[str, Any]:
        if is_connected:
            await asyncio.Event().wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    response = AcknowledgedResponse({"step": 1}, lambda: calls.append("sent"), lambda: calls.append("ended"))
    asyncio.run(response({"type": "http"}, receive, send))
    assert calls == (["sent", "ended"] if is_connected else ["ended"])
    body = b"".join(message.get("body", b"") for message in sent)
    assert body == (b'{"step":1}' if is_connected else b'{"step":1')
