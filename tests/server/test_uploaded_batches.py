"""Moondream's batch API: uploads in parts, results, limits, expiry and fairness.

Run with `pytest tests/server/test_uploaded_batches.py`.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import tracemalloc
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from moondream_cv.engine.local_model import LocalModel
from moondream_cv.server.apis.uploaded_batches import batches, store, uploads
from moondream_cv.server.apis.uploaded_batches.store import BatchStore
from moondream_cv.server.apis.uploaded_batches.uploads import Upload, split_lines
from moondream_cv.server.errors import ServerError
from moondream_cv.server.service import Service
from moondream_cv.server.settings import ServerSettings
from tests.helpers.models import endless_model
from tests.helpers.served import Served, served
from tests.helpers.waiting import until

GREEDY = {"temperature": 0.0}
ENDLESS = {"skill": "query", "question": "What?", "settings": {**GREEDY, "max_tokens": 100_000}}
SHORT = {"skill": "query", "question": "What?", "settings": {**GREEDY, "max_tokens": 2}}


@pytest.fixture(scope="module")
def talker() -> LocalModel:
    return endless_model()


def written(lines: list[Any]) -> bytes:
    return b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)


def create(running: Served) -> dict[str, str]:
    answer = running.client.post("/v1/batch", params={"action": "mpu-create"})
    assert answer.status_code == 200, answer.text
    created: dict[str, str] = answer.json()
    return created


def put(running: Served, created: dict[str, str], number: int, content: Any, **changed: Any) -> httpx.Response:
    """Upload a part; `changed` replaces parameters of the query, or headers."""
    headers = changed.pop("headers", {})
    query = {"action": "mpu-uploadpart", "uploadId": created["uploadId"], "partNumber": number, **changed}
    return running.client.put(f"/v1/batch/{created['fileId']}", params=query, content=content, headers=headers)


def complete(running: Served, created: dict[str, str], parts: list[Any]) -> httpx.Response:
    query = {"action": "mpu-complete", "uploadId": created["uploadId"]}
    return running.client.post(f"/v1/batch/{created['fileId']}", params=query, json={"parts": parts})


def start(running: Served, lines: list[Any]) -> str:
    """Upload lines in one part and start them. Return the ID of the batch."""
    created = create(running)
    part = put(running, created, 1, written(lines)).json()
    answer = complete(running, created, [part])
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def status(running: Served, batch_id: str) -> dict[str, Any]:
    answer = running.client.get(f"/v1/batch/{batch_id}")
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def ended(running: Served, batch_id: str) -> dict[str, Any]:
    until(lambda: status(running, batch_id)["status"] not in ("chunking", "processing"))
    return status(running, batch_id)


def results(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the results of a completed batch, which need no API key."""
    assert found["status"] == "completed", found
    return [json.loads(line) for output in found["outputs"] for line in httpx.get(output["url"]).text.splitlines()]


def test_results_equal_those_of_single_requests(server: Served, uri: str) -> None:
    image = uri.partition(",")[2]
    lines: list[Any] = [
        {"id": "detect", "skill": "detect", "image": image, "object": "red circle"},
        {"id": 7, "skill": "point", "image": image, "object": "cat"},
        b"",
        {"skill": "caption", "image": image, "length": "short", "settings": GREEDY},
        {"id": "lost", "skill": "detect", "object": "cat"},
        {"id": "query", "skill": "query", "image": image, "question": "What is this?", "settings": GREEDY},
        b"no JSON",
    ]
    content = b"\xef\xbb\xbf" + written(lines).strip()
    cuts = sorted(random.Random(0).sample(range(1, len(content)), 3))
    created, parts = create(server), []
    for number in (3, 1, 4, 2):  # lines cross the borders of parts
        start, end = [0, *cuts][number - 1], [*cuts, len(content)][number - 1]
        parts.append(put(server, created, number, content[start:end]).json())
    assert server.client.get(f"/v1/batch/{created['fileId']}").status_code == 404
    assert complete(server, created, parts).json()["size"] == len(content)
    found = ended(server, created["fileId"])
    assert complete(server, created, parts).json()["status"] == "completed"  # a repeated request changes nothing
    received = results(found)

    assert [result["line_index"] for result in received] == list(range(6))
    assert [result["id"] for result in received] == ["detect", 7, None, "lost", "query", None]
    assert [result["status"] for result in received] == ["ok", "ok", "ok", "error", "ok", "error"]
    assert received[3]["error"]["code"] == "invalid_request_error"
    assert "image_url" in received[3]["error"]["message"]
    assert found["progress"] == {"total": 6, "completed": 4, "failed": 2}
    for key, count in found["usage"].items():
        assert count == sum(result["usage"][key] for result in received if result["status"] == "ok") > 0

    requests = [json.loads(line) for line in written(lines).splitlines() if line.startswith(b"{")]
    for result, request in zip([received[i] for i in (0, 1, 2, 4)], [requests[i] for i in (0, 1, 2, 4)], strict=True):
        skill = request.pop("skill")
        expected = server.post(f"/v1/{skill}", {**request, "image_url": uri}).json()
        del expected["request_id"]
        assert leaves(result["result"]) == pytest.approx(leaves(expected), abs=1e-4)
    until(lambda: server.service.in_flight == 0)


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Return the values in a JSON document by path."""
    if isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: leaf for name, item in items for key, leaf in leaves(item, f"{path}/{name}").items()}
    return {path: value}


def test_invalid_uploads_are_rejected(server: Served) -> None:
    created = create(server)
    part = put(server, created, 1, b"{}").json()
    assert put(server, {**created, "fileId": "none"}, 1, b"{}").status_code == 404
    assert put(server, {**created, "uploadId": "none"}, 1, b"{}").status_code == 404
    assert put(server, created, 0, b"{}").status_code == 422
    assert put(server, created, 1, b"{}", action="other").status_code == 422
    assert put(server, created, 1, iter([b"{}"])).status_code == 411
    assert complete(server, created, []).status_code == 400
    assert complete(server, created, [part, part]).status_code == 400
    assert (
        "part 2 was not uploaded" in complete(server, created, [{**part, "partNumber": 2}]).json()["error"]["message"]
    )
    assert "ETag" in complete(server, created, [{**part, "etag": "0"}]).json()["error"]["message"]
    assert server.client.post("/v1/batch", params={"action": "other"}).status_code == 422
    assert complete(server, created, [{**part, "etag": f'"{part["etag"]}"'}]).status_code == 200
    assert put(server, created, 2, b"{}").status_code == 400
    assert server.client.delete("/v1/batch/none").status_code == 404
    assert server.client.delete(f"/v1/batch/{created['fileId']}").json() == {"id": created["fileId"], "deleted": True}
    assert "restart of the server" in server.client.get(f"/v1/batch/{created['fileId']}").json()["error"]["message"]


def test_keys_are_required_except_for_signed_outputs(tiny: LocalModel) -> None:
    with served(tiny, api_keys=("batch-key",)) as running:
        paths = {
            "POST": "/v1/batch?action=mpu-create",
            "PUT": "/v1/batch/a",
            "GET": "/v1/batch/a",
            "DELETE": "/v1/batch/a",
        }
        for method, path in paths.items():
            assert running.client.request(method, path).status_code == 401
        running.client.headers["X-Moondream-Auth"] = "batch-key"
        found = ended(running, start(running, [SHORT]))
        assert len(results(found)) == 1
        url = found["outputs"][0]["url"]
        assert httpx.get(url.replace("/0?", "/1?")).status_code == 403
        assert httpx.get(url.partition("?")[0]).status_code == 422


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\n \r\n", "must not be empty"), (b"{}\n" * 5, "at most 4 lines, got 5"), (b"\n" * 9, "at most 8 line breaks")],
)
def test_files_outside_the_limits_fail(
    server: Served, monkeypatch: pytest.MonkeyPatch, content: bytes, message: str
) -> None:
    monkeypatch.setattr(batches, "MAX_LINES", 4)
    monkeypatch.setattr(batches, "MAX_NEWLINES", 8)
    found = ended(server, start(server, [content]))
    assert found["status"] == "failed"
    assert message in found["error"]["message"]
    assert not found["outputs"]


def test_long_lines_fail_alone(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "MAX_LINE_BYTES", 1000)
    received = results(ended(server, start(server, [SHORT, b"[" * 1001, SHORT])))
    assert [result["status"] for result in received] == ["ok", "error", "ok"]
    assert received[1]["error"]["code"] == "request_too_large"


@pytest.mark.parametrize("seed", range(5))
def test_lines_do_not_depend_on_the_blocks(seed: int) -> None:
    choose = random.Random(seed)
    content = bytes(choose.choice(b"aab \r\n") for _ in range(500))
    cuts = sorted(choose.sample(range(501), 40))
    blocks = [content[start:end] for start, end in zip([0, *cuts], [*cuts, 500], strict=True)]
    expected = [
        None if len(line) > 9 else line.strip() for line in content.split(b"\n") if len(line) > 9 or line.strip()
    ]
    assert list(split_lines(blocks, 9)) == expected
    assert None in expected


def test_large_parts_are_not_kept_in_memory(tiny: LocalModel) -> None:
    block = b"x" * 2**16
    with served(tiny, max_body=2**20) as running:
        created = create(running)
        tracemalloc.start()
        size = 512 * len(block)
        answer = put(running, created, 1, (block for _ in range(512)), headers={"Content-Length": str(size)})
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert answer.status_code == 200, answer.text
        assert peak < size / 4


def test_retried_parts_use_the_space_of_failed_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "MAX_BYTES", 30)

    async def pieces(content: bytes) -> AsyncIterator[bytes]:
        for byte in content:
            yield bytes([byte])

    async def run() -> bytes:
        upload = Upload()
        for _ in range(3):
            with pytest.raises(ServerError, match="must have 10 bytes, got 4"):
                await upload.add_part(2, 10, pieces(b"half"))
        second = await upload.add_part(2, 10, pieces(b"0123456789"))
        first = await upload.add_part(1, 10, pieces(b"abcdefghij"))
        with pytest.raises(ServerError, match="at most 30 bytes"):
            await upload.add_part(3, 11, pieces(b"z" * 11))
        upload.complete({2: second.etag, 1: first.etag})
        await upload.add_part(1, 10, pieces(b"much later"))
        content = b"".join(upload.blocks())
        upload.close()
        return content

    assert asyncio.run(run()) == b"abcdefghij0123456789"


@pytest.mark.skipif(os.name != "posix", reason="limits the size of files with setrlimit")
def test_full_disk_gets_507(server: Served) -> None:
    import resource

    created = create(server)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    try:
        answer = put(server, created, 1, b"x" * 2**21)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert answer.status_code == 507
    assert put(server, created, 1, b"{}").status_code == 200
    server.client.delete(f"/v1/batch/{created['fileId']}")


def test_batch_leaves_half_of_the_queue_slots_free(talker: LocalModel) -> None:
    with served(talker, queue=8) as running:
        batch_id = start(running, [ENDLESS] * 20)
        until(lambda: running.service.in_flight == 4)
        assert running.post("/v1/query", {"question": "What?", "settings": {"max_tokens": 2}}).status_code == 200
        assert status(running, batch_id)["progress"] == {"total": 20, "completed": 0, "failed": 0}
        running.client.delete(f"/v1/batch/{batch_id}")
        engine: Any = running.service.engine
        until(lambda: running.service.in_flight == len(engine._loop.request_ids) == 0)


def test_small_batch_does_not_wait_for_a_large_one(talker: LocalModel) -> None:
    with served(talker) as running:
        large = start(running, [ENDLESS] * 100)
        until(lambda: running.service.in_flight == 15)
        assert results(ended(running, start(running, [SHORT] * 3)))[2]["status"] == "ok"
        assert status(running, large)["status"] == "processing"
        running.client.delete(f"/v1/batch/{large}")


def test_server_stops_while_a_batch_runs(talker: LocalModel) -> None:
    with served(talker, drain=0.1) as running:
        start(running, [ENDLESS] * 3)
        until(lambda: running.service.in_flight > 0)
        batch = next(iter(running.app.state.batches._batches.values()))
    assert batch.task.cancelled()
    assert batch.upload._file._file.closed


def test_batches_expire_and_are_limited(tiny: LocalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "MAX_OPEN", 2)
    monkeypatch.setattr(store, "MAX_ENDED", 1)

    async def gone(kept: BatchStore, batch_id: str) -> None:
        with pytest.raises(ServerError, match="there is no batch"):  # noqa: PT012 - waits for the error
            while kept.find(batch_id):
                await asyncio.sleep(0.005)

    async def pieces() -> AsyncIterator[bytes]:
        yield b"{}"

    async def run() -> None:
        service = Service(tiny, "tiny", ServerSettings())
        kept = BatchStore(service, upload_seconds=3600.0, result_seconds=3600.0)
        with pytest.raises(ServerError) as caught:
            kept.create()
        assert caught.value.status == 503
        await service.start()

        # Unfinished batches are limited
        first, second = kept.create(), kept.create()
        with pytest.raises(ServerError, match="2 batches are uploaded or run") as caught:
            kept.create()
        assert caught.value.status == 429

        # The oldest results are dropped
        for batch in (first, second):
            part = await batch.upload.add_part(1, 2, pieces())
            kept.start(batch, {1: part.etag})
            assert batch.task is not None
            await batch.task
        await gone(kept, first.id)
        assert kept.find(second.id).status == "completed"

        # Uploads and results expire
        hasty = BatchStore(service, upload_seconds=0.01, result_seconds=0.01)
        await gone(hasty, hasty.create().id)
        batch = hasty.create()
        batch.keep()
        part = await batch.upload.add_part(1, 2, pieces())
        hasty.start(batch, {1: part.etag})
        await gone(hasty, batch.id)
        assert batch.num_failed == 1
        kept.close()
        await service.stop()

    asyncio.run(run())
