"""Queue slots, time limits, disconnects, loading and shutdown.

Run with `pytest tests/server/test_service.py`.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from moondream_cv.engine.local_model import LocalModel
from moondream_cv.errors import CheckpointError, MoondreamError
from moondream_cv.requests import CaptionResult, Query, Request, Result, Settings
from moondream_cv.server.request_context import RequestContext, run_in_background
from moondream_cv.server.runtime.engines import Call, ThreadEngine
from moondream_cv.server.runtime.metrics import Metrics
from moondream_cv.server.service import Service
from moondream_cv.server.settings import ServerSettings
from moondream_cv.vision_model import PublishedMethods
from tests.helpers.held_server import held_server
from tests.helpers.models import endless_model, random_model
from tests.helpers.served import Served, served
from tests.helpers.waiting import until

LONG = 1_000  # tokens; many more decoding steps than a detection
ENDLESS = 100_000  # tokens; fills the context


@pytest.fixture(scope="module")
def endless() -> LocalModel:
    return endless_model()


@pytest.fixture(scope="module")
def endless_server(endless: LocalModel) -> Iterator[Served]:
    with served(endless) as running:
        yield running


def num_in_engine(running: Served) -> int:
    """Return the number of unfinished requests in the engine."""
    engine: Any = running.service.engine
    return len(engine._loop.request_ids)


def caption(uri: str, max_tokens: int = ENDLESS) -> dict[str, Any]:
    return {"image_url": uri, "settings": {"temperature": 0, "max_tokens": max_tokens}}


def test_full_queue_gets_429_with_retry_after(endless: LocalModel, uri: str) -> None:
    with served(endless, queue=2) as running, ThreadPoolExecutor() as pool:
        busy = [pool.submit(running.post, "/v1/caption", caption(uri, LONG)) for _ in range(2)]
        until(lambda: running.service.in_flight == 2)
        refused = running.post("/v1/detect", {"image_url": uri, "object": "dog"})
        assert refused.status_code == 429
        assert int(refused.headers["Retry-After"]) >= 1
        assert "queue is full" in refused.json()["error"]["message"]
        assert [answer.result().status_code for answer in busy] == [200, 200]
        assert running.post("/v1/detect", {"image_url": uri, "object": "dog"}).status_code == 200
        assert "moondream_cv_refused_total 1.0" in running.client.get("/metrics").text


def test_concurrent_requests_get_200_or_429(tiny: LocalModel, uri: str) -> None:
    with served(tiny, queue=8) as running, ThreadPoolExecutor(60) as pool:
        body = {"image_url": uri, "object": "cat"}
        answers = list(pool.map(lambda _: running.post("/v1/detect", body), range(60)))
        codes = {answer.status_code for answer in answers}
        assert codes == {200, 429}
        assert len({answer.text for answer in answers if answer.status_code == 200}) >= 1
        assert running.service.in_flight == 0


def test_slow_request_gets_504_and_is_cancelled_in_the_engine(endless: LocalModel, uri: str) -> None:
    with served(endless, timeout=0.3) as running:
        late = running.post("/v1/caption", caption(uri))
        assert late.status_code == 504
        assert "0.3 seconds" in late.json()["error"]["message"]
        until(lambda: num_in_engine(running) == 0)
        assert running.service.in_flight == 0


def test_slow_stream_ends_with_a_timeout_error(endless: LocalModel, uri: str) -> None:
    for limit in (0.5, 5, 50):  # use the first limit within which this machine starts to answer
        with served(endless, timeout=limit) as running:
            with running.client.stream("POST", "/v1/caption", json=caption(uri) | {"stream": True}) as answer:
                events = [json.loads(line.removeprefix("data: ")) for line in answer.iter_lines() if line]
            until(lambda: num_in_engine(running) == 0)
        if "chunk" in events[0]:
            break
    assert answer.status_code == 200
    assert "chunk" in events[0]
    assert f"{limit} seconds" in json.dumps(events[-1]["error"])


def test_first_piece_is_sent_before_the_reply_is_complete(uri: str) -> None:
    with held_server(steps=12) as (_, running):
        body = caption(uri) | {"stream": True}
        with running.client.stream("POST", "/v1/caption", json=body) as answer:
            assert "chunk" in next(answer.iter_lines())  # while the model is paused
            assert num_in_engine(running) == 1


@pytest.mark.parametrize("streamed", [False, True])
def test_disconnect_cancels_the_request_and_releases_the_slot(endless_server: Served, uri: str, streamed: bool) -> None:
    before = endless_server.service.in_flight
    body = json.dumps(caption(uri) | {"stream": streamed}).encode()
    host, port = endless_server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as client:
        head = "POST /v1/caption HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(body)}"
        client.sendall(head.encode() + b"\r\n\r\n" + body)
        until(lambda: num_in_engine(endless_server) == 1)
        assert endless_server.service.in_flight == before + 1
    until(lambda: num_in_engine(endless_server) == 0 and endless_server.service.in_flight == before)


def test_disconnect_while_sending_holds_no_slot(endless_server: Served) -> None:
    host, port = endless_server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as client:
        client.sendall(b"POST /v1/caption HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{")
    assert endless_server.client.get("/health").status_code == 200
    until(lambda: endless_server.service.in_flight == 0)


def test_concurrent_requests_decode_in_one_batch(endless_server: Served, uri: str) -> None:
    with ThreadPoolExecutor() as pool:
        slow = [pool.submit(endless_server.post, "/v1/caption", caption(uri)) for _ in range(3)]
        until(lambda: num_in_engine(endless_server) == 3)
        quick = endless_server.post("/v1/detect", {"image_url": uri, "object": "dog", "settings": {"max_objects": 1}})
        assert quick.status_code == 200
        assert not any(answer.done() for answer in slow)  # the detection did not wait for the captions
        assert len({answer.result().json()["caption"] for answer in slow}) == 1
    steps = _histogram(endless_server, "moondream_cv_batch_rows")
    assert steps[-1] > steps[_edges(endless_server).index(2.0)]  # some steps had more than two requests


def _edges(running: Served) -> list[float]:
    lines = running.client.get("/metrics").text.splitlines()
    found = [line.split('le="')[1].split('"')[0] for line in lines if line.startswith("moondream_cv_batch_rows_bucket")]
    return [float(edge) for edge in found]


def _histogram(running: Served, name: str) -> list[float]:
    lines = running.client.get("/metrics").text.splitlines()
    return [float(line.split()[-1]) for line in lines if line.startswith(f"{name}_bucket")]


def test_requests_get_503_until_the_model_is_loaded(tiny: LocalModel, uri: str) -> None:
    released = threading.Event()

    def load() -> LocalModel:
        assert released.wait(240)
        return random_model()

    with served(load) as running:
        assert running.client.get("/health").status_code == 200
        assert running.client.get("/ready").status_code == 503
        early = running.post("/v1/detect", {"image_url": uri, "object": "dog"})
        assert (early.status_code, early.headers["Retry-After"]) == (503, "5")
        assert "loading" in early.json()["error"]["message"]
        released.set()
        until(lambda: running.client.get("/ready").status_code == 200)
        assert running.post("/v1/detect", {"image_url": uri, "object": "dog"}).status_code == 200
        engine: Any = running.service.engine
    with pytest.raises(MoondreamError, match="closed"):  # the server loaded the model, so it closes it
        engine._model.check_open()


def test_load_error_is_the_failure_of_the_service() -> None:
    def load() -> LocalModel:
        raise CheckpointError("there is no such model")

    with served(load) as running:
        until(lambda: running.service.failure is not None)
        assert running.client.get("/ready").status_code == 503


def test_shutdown_finishes_running_requests(endless: LocalModel, uri: str) -> None:
    with ThreadPoolExecutor() as pool:
        with served(endless) as running:
            answer = pool.submit(httpx.post, f"{running.url}/v1/caption", json=caption(uri, LONG), timeout=300)
            until(lambda: num_in_engine(running) == 1)
        assert answer.result().status_code == 200
    assert answer.result().json()["truncated"]
    assert not running.service.ready


def test_shutdown_does_not_close_a_model_that_was_passed_in(endless: LocalModel) -> None:
    with served(endless):
        pass
    assert endless.run([Query(None, "Why?", settings=Settings(max_tokens=1))])


def test_failed_engine_fails_all_requests_and_readiness(
    uri: str,
) -> None:
    model = endless_model()
    with served(model) as running, ThreadPoolExecutor() as pool:
        waiting = pool.submit(running.post, "/v1/caption", caption(uri))
        until(lambda: num_in_engine(running) == 1)
        model._closed = True  # the next step of the engine fails
        assert waiting.result().status_code == 503
        until(lambda: running.client.get("/ready").status_code == 503)
        after = running.post("/v1/detect", {"image_url": uri, "object": "dog"})
        assert after.status_code == 503
        assert "restart the server" in after.json()["error"]["message"]


class FakeRemoteModel(PublishedMethods):
    """A model without a scheduler, which streams in two pieces."""

    skills = frozenset({"caption"})
    has_scores = False

    def run(self, requests: list[Request]) -> list[Result]:  # type: ignore[override]
        return [CaptionResult("two words") for _ in requests]

    def stream(self, request: Request) -> Iterator[Any]:
        yield from ("two ", "words")

    def close(self) -> None:
        pass


def test_remote_model_can_be_served(uri: str) -> None:
    with served(FakeRemoteModel()) as running:
        assert running.post("/v1/caption", {"image_url": uri}).json()["caption"] == "two words"
        with running.client.stream("POST", "/v1/caption", json={"image_url": uri, "stream": True}) as answer:
            events = [json.loads(line[6:]) for line in answer.iter_lines() if line]
        assert [event.get("chunk") for event in events[:2]] == ["two ", "words"]


def test_unexpected_error_gets_500_without_details(uri: str, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(FakeRemoteModel):
        def run(self, requests: list[Request]) -> list[Result]:  # type: ignore[override]
            raise KeyError("/secret/path")

    with served(Broken()) as running, caplog.at_level(logging.ERROR):
        answer = running.post("/v1/caption", {"image_url": uri})
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert "Traceback" not in answer.text
    assert "secret" in caplog.text  # the log has the details


def test_stopped_engine_rejects_calls(endless: LocalModel) -> None:
    async def go() -> Result:
        engine = ThreadEngine(endless)
        engine.start(Metrics())
        await asyncio.to_thread(engine.stop)
        call = Call(Query(None, "Why?"))
        engine.submit(call)
        return await asyncio.wait_for(call.done, 240)

    result: Any = asyncio.run(go())
    assert "stopping" in str(result.error)


def test_cancelling_background_work_before_it_starts_releases_the_slot(tiny: LocalModel) -> None:
    async def run() -> int:
        service = Service(tiny, "tiny", ServerSettings())
        await service.start()
        try:
            task = run_in_background(service, lambda context: asyncio.sleep(0))
            task.cancel()
            await asyncio.wait([task])
            taken = service.in_flight
            while service.in_flight:
                service.release_slot()
            return taken
        finally:
            await service.stop()

    assert asyncio.run(run()) == 0


def test_stream_can_be_closed_after_its_context(tiny: LocalModel) -> None:
    async def run() -> int:
        service = Service(tiny, "tiny", ServerSettings())
        await service.start()
        try:
            context = RequestContext(service, None)
            pieces = (await context.stream(Query(None, "What is in the image?"))).__aiter__()
            await pieces.__anext__()
            context.close()
            await pieces.aclose()  # type: ignore[attr-defined]
            return service.in_flight
        finally:
            await service.stop()

    assert asyncio.run(run()) == 0


def test_abandoned_image_errors_are_not_logged(tiny: LocalModel, caplog: pytest.LogCaptureFixture) -> None:
    with served(tiny) as server:
        for _ in range(10):
            answer = server.client.post(
                "/fal-ai/moondream2/object-detection",
                json={"image_url": "`", "object": "cat"},
                headers={"X-Fal-Request-Timeout": "1e-9"},
            )
            assert answer.status_code == 504
        until(lambda: server.service.in_flight == 0)
    gc.collect()
    assert not [record for record in caplog.records if record.name == "asyncio"]
