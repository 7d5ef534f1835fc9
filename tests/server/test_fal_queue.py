"""fal's queue: states over plain HTTP, and the Python client over TLS."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Iterator
from datetime import datetime
from typing import Any
from uuid import UUID

import pytest
from PIL import Image

from moondream_cv.engine.local_model import LocalModel
from moondream_cv.server.apis.fal.queue import QueuedRequest, RequestQueue
from moondream_cv.server.errors import ServerError
from moondream_cv.server.request_context import RequestContext
from moondream_cv.server.service import Service
from moondream_cv.server.settings import ServerSettings
from tests.helpers.certificates import Certificates, make_certificates
from tests.helpers.fal_clients import run_python
from tests.helpers.held_server import HeldModel, held_server
from tests.helpers.served import Served, served

QUEUE = "/queue/fal-ai/moondream2"
LONG = {"prompt": "What?", "settings": {"temperature": 0, "max_tokens": 300}}


@pytest.fixture
def holding() -> Iterator[tuple[HeldModel, Served]]:
    """A server with one queue slot and a paused model."""
    with held_server(queue=1) as both:
        yield both


def submit(server: Served, uri: str) -> dict[str, Any]:
    answer = server.post(f"{QUEUE}/visual-query", {"image_url": uri, **LONG})
    assert answer.status_code == 200
    return answer.json()


def states_of(server: Served, submitted: dict[str, Any], query: str = "") -> Iterator[dict[str, Any]]:
    """Yield the events of the status stream of a request."""
    with server.client.stream("GET", f"{submitted['status_url']}/stream{query}") as answer:
        assert answer.headers["x-fal-request-id"] == submitted["request_id"]
        for line in answer.iter_lines():
            if line:
                yield json.loads(line.removeprefix("data: "))


# --- plain HTTP -------------------------------------------------------------------------------------------------------


def test_queued_request_goes_through_all_states(
    holding: tuple[HeldModel, Served], model: LocalModel, scene_image: Image.Image, uri: str
) -> None:
    held, server = holding
    submitted = submit(server, uri)
    here = f"{server.url}{QUEUE}/requests/{submitted['request_id']}"
    assert UUID(submitted["request_id"]).version == 4
    assert [submitted[f"{name}_url"] for name in ("response", "status", "cancel")] == [
        here,
        f"{here}/status",
        f"{here}/cancel",
    ]
    assert (submitted["status"], submitted["queue_position"]) == ("IN_QUEUE", 0)

    states = states_of(server, submitted, "?logs=1")
    seen = [next(states)]
    while seen[-1]["status"] == "IN_QUEUE":
        seen.append(next(states))
    early = server.client.get(here)
    assert early.status_code == 400
    assert "still in progress" in early.json()["detail"]
    working = server.client.get(submitted["status_url"])
    assert (working.status_code, working.json()["status"], working.json()["logs"]) == (202, "IN_PROGRESS", None)
    assert server.post(f"{QUEUE}/visual-query", {"image_url": uri, **LONG}).status_code == 429

    held.resume()
    seen += states
    assert [state["status"] for state in seen] == ["IN_QUEUE", "IN_PROGRESS", "COMPLETED"][-len(seen) :]
    done = server.client.get(submitted["status_url"], params={"logs": "true"})
    assert (done.status_code, done.json()["status"]) == (200, "COMPLETED")
    assert done.json()["metrics"]["inference_time"] > 0
    assert "error" not in done.json()
    logs = done.json()["logs"]
    assert [line for state in seen for line in state["logs"]] == logs  # each event has only the new lines
    assert [line["message"].split()[0] for line in logs] == ["queued:", "started:", "finished"]
    times = [datetime.fromisoformat(line["timestamp"]) for line in logs]
    assert times == sorted(times)
    result = server.client.get(here)
    expected = model.query(scene_image, LONG["prompt"], settings=LONG["settings"])
    assert (result.status_code, result.json()["output"]) == (200, expected["answer"])
    for answer in (early, working, done, result):
        assert answer.headers["x-fal-request-id"] == submitted["request_id"]


def test_cancel_releases_the_queue_slot(holding: tuple[HeldModel, Served], uri: str) -> None:
    held, server = holding
    submitted = submit(server, uri)
    cancelled = server.client.put(submitted["cancel_url"])
    assert (cancelled.status_code, cancelled.json()["status"]) == (202, "CANCELLATION_REQUESTED")
    assert server.service.in_flight == 0
    status = server.client.get(submitted["status_url"]).json()
    assert (status["status"], status["error_type"]) == ("COMPLETED", "cancelled")
    result = server.client.get(submitted["response_url"])
    assert (result.status_code, result.json()["error_type"]) == (400, "cancelled")
    again = server.client.put(submitted["cancel_url"])
    assert (again.status_code, again.json()["status"]) == (400, "ALREADY_COMPLETED")

    second = submit(server, uri)
    held.resume()
    assert list(states_of(server, second))[-1]["status"] == "COMPLETED"
    assert server.client.get(second["response_url"]).status_code == 200


def test_cancel_removes_the_request_from_the_engine(uri: str) -> None:
    with held_server(steps=40) as (_, running):
        submitted = submit(running, uri)
        states = states_of(running, submitted)
        while next(states)["status"] == "IN_QUEUE":
            pass
        running.client.put(submitted["cancel_url"])
        assert [state["status"] for state in states] == ["COMPLETED"]
        cancelled = 'moondream_cv_skill_requests_total{outcome="cancelled",skill="query"} 1.0'
        assert cancelled in running.client.get("/metrics").text


@pytest.mark.parametrize("place", ["", "/status", "/status/stream"])
def test_unknown_ids_get_404(server: Served, place: str) -> None:
    answer = server.client.get(f"{QUEUE}/requests/{UUID(int=1)}{place}")
    assert answer.status_code == 404
    assert str(UUID(int=1)) in answer.json()["detail"]


def test_cancel_of_an_unknown_id_gets_404(server: Served) -> None:
    assert server.client.put(f"{QUEUE}/requests/{UUID(int=1)}/cancel").status_code == 404


def test_urls_use_the_address_of_the_client(tiny: LocalModel, uri: str) -> None:
    with served(tiny, allowed_hosts=("vision.example",)) as server:
        answer = server.post(QUEUE, {"image_url": uri}, headers={"Host": "vision.example:8443"})
    assert answer.json()["status_url"].startswith(f"http://vision.example:8443{QUEUE}/requests/")


def test_slow_request_completes_with_504(uri: str) -> None:
    with held_server(timeout=0.3) as (_, running):
        submitted = submit(running, uri)
        assert list(states_of(running, submitted))[-1]["error_type"] == "timeout_error"
        result = running.client.get(submitted["response_url"])
        assert (result.status_code, "x-fal-request-timeout-type" in result.headers) == (504, False)
        assert "longer than 0.3 seconds" in result.json()["detail"]


def test_results_require_an_api_key(tiny: LocalModel, uri: str) -> None:
    with served(tiny, api_keys=("id:secret",)) as locked:
        headers = {"Authorization": "Key id:secret"}
        submitted = locked.post(QUEUE, {"image_url": uri}, headers=headers).json()
        for url in (submitted["status_url"], submitted["response_url"], f"{submitted['status_url']}/stream"):
            answer = locked.client.get(url)
            assert answer.status_code == 401
            assert set(answer.json()) == {"detail", "error_type"}
            assert locked.client.get(f"{submitted['status_url']}/stream", headers=headers).status_code == 200
        assert locked.client.put(submitted["cancel_url"]).status_code == 401
        assert locked.client.get(submitted["response_url"], headers=headers).json()["output"]


# --- the Python client ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


def test_python_client_uses_the_queue(
    tiny: LocalModel, certificates: Certificates, scene_image: Image.Image, uri: str
) -> None:
    pytest.importorskip("fal_client")
    code = """
arguments = {"image_url": uri, "object": "blue square"}
app = APP + "/object-detection"
handle = fal_client.submit(app, arguments, priority="low", hint="here")
updates, ids = [], []
def note(status):
    updates.append([type(status).__name__, status])
show({
    "got": handle.get(),
    "status": handle.status(with_logs=True),
    "by id": [fal_client.result(app, handle.request_id), fal_client.status(app, handle.request_id)],
    "subscribed": fal_client.subscribe(app, arguments, with_logs=True, on_enqueue=ids.append, on_queue_update=note),
    "cancel": failure(handle.cancel),
    "updates": updates,
    "ids": ids,
})
"""
    with served(tiny, tls=(certificates.certificate, certificates.key)) as secure:
        found = run_python(code, secure, certificates, uri)
    expected = {**tiny.detect(scene_image, "blue square"), "image": {"width": 320, "height": 240}}
    assert found["got"] == found["by id"][0] == found["subscribed"] == expected
    assert found["by id"][1]["logs"] is None
    assert found["status"]["logs"][0]["message"] == "queued: object detection"
    assert found["status"]["metrics"]["inference_time"] > 0
    assert found["status"]["error"] is None
    assert found["cancel"]["status"] == 400
    assert UUID(found["ids"][0])
    name, last = found["updates"][-1]
    assert (name, len(last["logs"])) == ("Completed", 3)


def test_python_client_cancels_requests(certificates: Certificates, uri: str) -> None:
    pytest.importorskip("fal_client")
    code = f"""
handle = fal_client.submit(APP + "/visual-query", {{"image_url": uri, **{LONG!r}}})
while isinstance(handle.status(), fal_client.Queued):
    time.sleep(0.01)
state = type(handle.status()).__name__
handle.cancel()
show([state, failure(handle.get)])
"""
    with held_server(tls=(certificates.certificate, certificates.key), queue=1) as (_, secure):
        state, error = run_python(code, secure, certificates, uri)
        assert secure.service.in_flight == 0
    assert state == "InProgress"
    assert (error["status"], error["error_type"], error["message"]) == (400, "cancelled", "the request was cancelled")


# --- finished requests ------------------------------------------------------------------------------------------------


def in_a_queue(model: LocalModel, test: Callable[[RequestQueue], Coroutine[Any, Any, None]], **options: Any) -> None:
    """Run a test with the request queue of a service."""

    async def run() -> None:
        service = Service(model, "tiny", ServerSettings())
        await service.start()
        try:
            await test(RequestQueue(service, **options))
        finally:
            await service.stop()

    asyncio.run(run())


async def finished(queue: RequestQueue, count: int) -> list[QueuedRequest]:
    """Submit requests one after another and return them when they have ended."""

    async def work(context: RequestContext, started: Callable[[], None]) -> dict[str, Any]:
        started()
        return {"output": ""}

    requests = []
    for _ in range(count):
        requests.append(queue.submit(work, "nothing"))
        async for _ in requests[-1].changes():
            pass
    return requests


def test_oldest_finished_requests_are_dropped(tiny: LocalModel) -> None:
    async def test(queue: RequestQueue) -> None:
        first, *others = await finished(queue, 4)
        with pytest.raises(ServerError, match="no request") as caught:
            queue.find(first.id)
        assert caught.value.status == 404
        assert [queue.find(request.id) for request in others] == others

    in_a_queue(tiny, test, keep=3)


def test_expired_requests_are_dropped(tiny: LocalModel) -> None:
    async def test(queue: RequestQueue) -> None:
        (request,) = await finished(queue, 1)
        await asyncio.sleep(0.06)
        with pytest.raises(ServerError, match="no request"):
            queue.find(request.id)

    in_a_queue(tiny, test, seconds=0.05)


def test_running_requests_are_kept(tiny: LocalModel) -> None:
    async def test(queue: RequestQueue) -> None:
        release = asyncio.Event()

        async def work(context: RequestContext, started: Callable[[], None]) -> dict[str, Any]:
            await release.wait()
            started()
            return {}

        running = [queue.submit(work, "waiting") for _ in range(3)]
        await finished(queue, 3)
        assert [queue.position(queue.find(request.id)) for request in running] == [0, 1, 2]
        release.set()
        async for _ in running[2].changes():
            pass
        assert queue.position(running[2]) == 0

    in_a_queue(tiny, test, keep=1, seconds=0.001)
