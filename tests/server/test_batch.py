"""Batches of JSON lines: mixed skills, invalid lines, limits and disconnects.

Run with `pytest tests/server/test_batch.py`.
"""

from __future__ import annotations

import asyncio
import json
import re
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from PIL import Image

from moondream_cv import scenes
from moondream_cv.engine.local_model import LocalModel
from moondream_cv.requests import Caption, Detect, Point, Query
from moondream_cv.server.apis.batch import MAX_IN_FLIGHT, MAX_LINES, Batch
from moondream_cv.server.apis.moondream import result_body
from moondream_cv.server.service import Service
from moondream_cv.server.settings import ServerSettings
from tests.helpers.models import endless_model
from tests.helpers.served import Served, data_uri, served
from tests.helpers.waiting import until

GREEDY = {"temperature": 0.0}
ENDLESS = 100_000  # tokens; fills the context, which takes many seconds


@pytest.fixture(scope="module")
def talker() -> LocalModel:
    return endless_model()


@pytest.fixture(scope="module")
def scene_images() -> list[Image.Image]:
    """Images with different content and size."""
    sizes = [(320, 240), (240, 320), (200, 200)]
    return [
        Image.fromarray(scenes.render_scene(seed, resolution_wh=size, names=("red circle", "cat"), style="plain").image)
        for seed, size in enumerate(sizes)
    ]


def written(lines: list[Any]) -> bytes:
    return b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)


def post(running: Served, lines: list[Any], **options: Any) -> list[dict[str, Any]]:
    """Return the answers to lines, one per line."""
    answer = running.client.post("/v1/batch", content=written(lines), **options)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("application/x-ndjson")
    assert answer.text.endswith("\n")
    answers = [json.loads(line) for line in answer.text.splitlines()]
    assert [line["index"] for line in answers] == list(range(len(lines)))
    return answers


def caption(uri: str, max_tokens: int) -> dict[str, Any]:
    return {"skill": "caption", "image_url": uri, "settings": {**GREEDY, "max_tokens": max_tokens}}


def test_batch_answers_equal_the_answers_of_the_model(
    server: Served, tiny: LocalModel, scene_images: list[Image.Image]
) -> None:
    lines: list[dict[str, Any]] = []
    asked: list[Any] = []
    for scene_image in scene_images:
        sent = {"image_url": data_uri(scene_image), "settings": GREEDY}
        refs = [[0.5, 0.5], [0.1, 0.1, 0.6, 0.6]]
        lines += [
            {**sent, "skill": "detect", "object": "red circle"},
            {**sent, "skill": "point", "object": "cat"},
            {**sent, "skill": "caption", "length": "short"},
            {**sent, "skill": "query", "question": "How many cats are there?", "reasoning": True},
            {**sent, "skill": "query", "question": "What is this?", "spatial_refs": refs},
            {"skill": "query", "question": "What is this?", "settings": GREEDY},
        ]
        asked += [
            Detect(scene_image, "red circle"),
            Point(scene_image, "cat"),
            Caption(scene_image, "short", GREEDY),
            Query(scene_image, "How many cats are there?", True, (), GREEDY),
            Query(scene_image, "What is this?", False, refs, GREEDY),
            Query(None, "What is this?", settings=GREEDY),
        ]
    for answer, expected in zip(post(server, lines), tiny.run(asked), strict=True):
        assert answer.keys() == {"index", "custom_id", "result"}
        assert_alike(answer["result"], json.loads(json.dumps(result_body(expected))))


def assert_alike(found: Any, expected: Any) -> None:
    """Check that answers are equal up to rounding, which depends on the batch."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_alike(found[key], expected[key])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_alike(one, other)
    else:
        assert found == (pytest.approx(expected, abs=1e-4) if isinstance(expected, float) else expected)


def test_answers_keep_the_order_of_many_lines(server: Served, scene_images: list[Image.Image]) -> None:
    uris = [data_uri(scene_image) for scene_image in scene_images]
    lines = [
        {"custom_id": f"line {i}", **caption(uris[i % 3], 1 + i % 5)} if i % 2 else
        {"custom_id": f"line {i}", "skill": "point", "object": "cat", "image_url": uris[i % 3]}
        for i in range(3 * MAX_IN_FLIGHT)
    ]  # fmt: skip
    answers = post(server, lines)
    assert [answer["custom_id"] for answer in answers] == [line["custom_id"] for line in lines]
    assert ["caption" in answer["result"] for answer in answers] == [bool(i % 2) for i in range(len(lines))]
    until(lambda: server.service.in_flight == 0)


WRONG: list[tuple[Any, int, str]] = [
    (b"hello", 400, "not JSON"),
    (b'{"skill": "detect"', 400, "not JSON"),
    (b'{"skill": "query", "question": "' + b"\xff" + b'"}', 400, "not JSON"),
    (b'{"skill": "query", "question": "What?", "settings": {"temperature": NaN}}', 400, "not JSON"),
    (b"[" * 10_000, 400, "at most 64 levels"),
    (b'{"a":' * 100_000, 413, "at most 20,000 values"),
    (b'[{"skill": "caption"}]', 400, "JSON object, got list"),
    (b"null", 400, "JSON object, got NoneType"),
    ({}, 400, "skill must be one of caption, query, detect, point, gaze, got None"),
    ({"skill": "segment", "object": "cat"}, 400, "'segment'"),
    ({"skill": ["detect"]}, 400, "skill"),
    ({"skill": "detect", "object": "cat"}, 422, "image_url"),
    ({"skill": "query"}, 422, "question"),
    ({"skill": "query", "question": "What?", "stream": "yes"}, 422, "stream"),
    ({"skill": "query", "question": "What?", "spatial_refs": [[0.5, 0.5]] * 65}, 422, "spatial_refs"),
    ({"skill": "query", "question": "What?", "settings": {"max_tokens": 0}}, 400, "max_tokens"),
    ({"skill": "query", "question": ""}, 400, "question"),
    ({"skill": "query", "question": "What?", "model": "gpt-4o"}, 404, "gpt-4o"),
    ({"skill": "caption", "image_url": "aGFsbG8="}, 400, "not an image"),
    ({"skill": "caption", "image_url": "/etc/hostname"}, 400, "hostname"),
    ({"skill": "caption", "image_url": "http://127.0.0.1/a.png"}, 400, "127.0.0.1"),
    ({"skill": "query", "question": "What?", "custom_id": {"a": 1}}, 400, "custom_id"),
    ({"skill": "query", "question": "What?", "custom_id": 2**60}, 400, "custom_id"),
    ({"skill": "query", "question": "What?", "custom_id": True}, 400, "custom_id"),
]  # fmt: skip


def test_invalid_line_does_not_affect_other_lines(server: Served, uri: str) -> None:
    right = {"skill": "detect", "object": "cat", "image_url": uri}
    lines = [line for wrong, _, _ in WRONG for line in (wrong, right)]
    answers = post(server, lines)
    for (_, code, message), wrong, answer in zip(WRONG, answers[::2], answers[1::2], strict=True):
        assert wrong.keys() == {"index", "custom_id", "error"}
        assert wrong["error"]["code"] == code
        assert re.search(message, wrong["error"]["message"])
        assert len(wrong["error"]["message"]) < 500
        assert len(answer["result"]["objects"]) == 1


@pytest.mark.parametrize("own", ["a", "ä€🐈\u2028", "", 0, -7, 2**53, None])
def test_custom_id_is_returned(server: Served, own: Any) -> None:
    asked = {"skill": "query", "question": "What is this?"}
    answers = post(server, [{**asked, "custom_id": own}, {"skill": "wrong", "custom_id": own}, asked])
    assert [answer["custom_id"] for answer in answers] == [own, own, None]


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: b"\n\n" + b"\n  \n".join(lines) + b"\n\n",
        lambda lines: b"\r\n".join(lines) + b"\r\n",
        lambda lines: b"\n".join(lines),
        lambda lines: b"\xef\xbb\xbf" + b"\n".join(lines),
    ],
    ids=["blank lines", "line ends of Windows", "no line end at the end", "byte order mark"],
)
@pytest.mark.parametrize("kind", ["application/x-ndjson", "application/jsonl", "application/json; charset=utf-8"])
def test_blank_lines_and_byte_order_marks_are_skipped(
    server: Served, change: Callable[[list[bytes]], bytes], kind: str
) -> None:
    lines = [json.dumps({"skill": "query", "question": "What?", "custom_id": i}).encode() for i in range(3)]
    answer = server.client.post("/v1/batch", content=change(lines), headers={"Content-Type": kind})
    assert answer.status_code == 200
    answers = [json.loads(line) for line in answer.text.splitlines()]
    assert [(line["index"], line["custom_id"]) for line in answers] == [(0, 0), (1, 1), (2, 2)]
    assert all("answer" in line["result"] for line in answers)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"", 400, "empty"),
        (b"\n \r\n", 400, "empty"),
        (b"{}\n" * (MAX_LINES + 1), 413, "at most 10,000 lines, got 10,001"),
    ],
)
def test_invalid_batches_are_rejected(server: Served, body: bytes, status: int, message: str) -> None:
    answer = server.client.post("/v1/batch", content=body)
    assert answer.status_code == status
    assert re.search(message, answer.json()["error"]["message"])
    until(lambda: server.service.in_flight == 0)


def test_maximum_number_of_lines_is_accepted(server: Served) -> None:
    assert len(server.client.post("/v1/batch", content=b"{}\n" * MAX_LINES).text.splitlines()) == MAX_LINES


def test_batch_requires_a_key_and_respects_the_body_limit(tiny: LocalModel) -> None:
    with served(tiny, api_keys=("batch-key",), max_body=100) as running:
        line = written([{"skill": "query", "question": "What?"}])
        assert running.client.post("/v1/batch", content=line).status_code == 401
        with_key = {"X-Moondream-Auth": "batch-key"}
        assert running.client.post("/v1/batch", content=line, headers=with_key).status_code == 200
        assert running.client.post("/v1/batch", content=line * 10, headers=with_key).status_code == 413


def test_image_in_several_lines_is_decoded_and_encoded_once(
    tiny: LocalModel, scene_images: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    uris = [data_uri(scene_image) for scene_image in scene_images]
    with served(tiny) as running:
        opened = counting(running.service, monkeypatch)
        assert tiny.image_cache is not None
        tiny.image_cache.clear()
        misses = tiny.image_cache.misses
        lines = [{"skill": "detect", "object": "cat", "image_url": uris[i % 3]} for i in range(4 * MAX_IN_FLIGHT)]
        assert all("result" in answer for answer in post(running, lines))
        assert opened == dict.fromkeys(uris, 1)
        assert tiny.image_cache.misses - misses == 3


def counting(service: Service, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count how often each image is opened from now on."""
    opened: Counter[str] = Counter()
    really = service.images.open

    async def open_and_count(value: str) -> Image.Image:
        opened[value] += 1
        return await really(value)

    monkeypatch.setattr(service.images, "open", open_and_count)
    return opened


def test_batch_runs_with_a_single_queue_slot(tiny: LocalModel, uri: str) -> None:
    with served(tiny, queue=1) as running:
        lines = [caption(uri, 3) if i % 3 else b"wrong" for i in range(2 * MAX_IN_FLIGHT)]
        answers = post(running, lines)
        assert ["result" in answer for answer in answers] == [bool(i % 3) for i in range(len(lines))]
        until(lambda: running.service.in_flight == 0)


def test_batch_leaves_half_of_the_queue_slots_free(talker: LocalModel, uri: str) -> None:
    with served(talker, queue=8) as running:
        body = written([caption(uri, ENDLESS)] * 16)
        with running.client.stream("POST", "/v1/batch", content=body) as answer:
            assert answer.status_code == 200
            until(lambda: running.service.in_flight == 4)
            detected = running.post("/v1/detect", {"image_url": uri, "object": "cat", "settings": {"max_objects": 1}})
            assert detected.status_code == 200
            until(lambda: running.service.in_flight == 4)
        until(lambda: running.service.in_flight == 0)


def test_full_queue_rejects_a_batch(talker: LocalModel, uri: str) -> None:
    with served(talker, queue=1) as running, running.client.stream(
        "POST", "/v1/batch", content=written([caption(uri, ENDLESS)])
    ) as first:  # fmt: skip
        assert first.status_code == 200
        assert running.client.post("/v1/batch", content=b"{}").status_code == 429


def test_answers_are_streamed_and_disconnect_cancels_the_batch(talker: LocalModel, uri: str) -> None:
    lines = [caption(uri, 2), b"wrong", *[caption(uri, ENDLESS)] * 100]
    with served(talker) as running:
        engine: Any = running.service.engine
        with running.client.stream("POST", "/v1/batch", content=written(lines)) as answer:
            received = answer.iter_lines()
            assert "caption" in json.loads(next(received))["result"]
            assert json.loads(next(received))["error"]["code"] == 400
            until(lambda: running.service.in_flight == len(engine._loop.request_ids) == MAX_IN_FLIGHT)
        until(lambda: running.service.in_flight == len(engine._loop.request_ids) == 0)
        assert 'skill="caption",outcome="cancelled"' in running.client.get("/metrics").text.replace(
            'outcome="cancelled",skill="caption"', 'skill="caption",outcome="cancelled"'
        )


def test_disconnect_while_sending_releases_the_slot(tiny: LocalModel) -> None:
    with served(tiny) as running:

        def half() -> Iterator[bytes]:
            yield b'{"skill": "query"'
            raise httpx.WriteError("the client is gone")

        with pytest.raises(httpx.WriteError):
            running.client.post("/v1/batch", content=half())
        assert post(running, [{"skill": "query", "question": "What?"}])[0]["result"]
        until(lambda: running.service.in_flight == 0)


def test_time_limit_applies_to_each_line(talker: LocalModel, uri: str) -> None:
    lines = [caption(uri, 2), caption(uri, ENDLESS), caption(uri, ENDLESS), caption(uri, 2)]
    for limit in (2, 10, 50):  # use the first limit within which this machine answers a short line
        # The lines run one after another; together they take longer than the limit.
        with served(talker, queue=1, timeout=limit) as running:
            answers = post(running, lines)
            assert not running.service.engine._loop.request_ids
        if "result" in answers[0] and "result" in answers[-1]:
            break
    assert ["result" in answer for answer in answers] == [True, False, False, True]
    assert [answer["error"]["code"] for answer in answers[1:3]] == [504, 504]
    assert f"{limit} seconds" in answers[1]["error"]["message"]


def test_slow_reader_limits_the_lines_in_flight(tiny: LocalModel, uri: str) -> None:
    async def run() -> float:
        service = await started(tiny)
        batch = Batch(iter([json.dumps(caption(uri, 1)).encode()] * 10 * MAX_IN_FLIGHT), service)
        answers = batch.answers()
        await anext(answers)
        while not all(task.done() for task in batch._in_flight):
            await asyncio.sleep(0.005)
        done: float = service.metrics.skills.labels("caption", "ok")._value.get()
        batch.close()
        await ended(service)
        return done

    assert asyncio.run(run()) == MAX_IN_FLIGHT


def test_images_of_earlier_lines_are_freed(tiny: LocalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 8 * MAX_IN_FLIGHT
    uris = [data_uri(Image.new("RGB", (40 + i, 40), (i, 2 * i % 256, 0))) for i in range(count)]
    seen: list[weakref.ref[Image.Image]] = []
    most = 0

    async def run() -> None:
        nonlocal most
        service = await started(tiny)
        really = service.images.open

        async def open_and_watch(value: str) -> Image.Image:
            scene_image = await really(value)
            seen.append(weakref.ref(scene_image))
            return scene_image

        monkeypatch.setattr(service.images, "open", open_and_watch)
        batch = Batch((json.dumps(caption(uri, 1)).encode() for uri in uris), service)
        async for answer in batch.answers():
            assert b'"result"' in answer
            most = max(most, sum(scene_image() is not None for scene_image in seen))
        batch.close()
        await ended(service)

    asyncio.run(run())
    assert len(seen) == count
    assert 0 < most <= 3 * MAX_IN_FLIGHT


async def started(model: LocalModel) -> Service:
    """Return a service in this event loop, without an image cache and with one queue slot in use."""
    service = Service(model, "tiny", ServerSettings(keep=1))
    await service.start()
    service.acquire_slot()
    return service


async def ended(service: Service) -> None:
    service.release_slot()
    await service.stop()


def test_openapi_schema_documents_batches(server: Served) -> None:
    post = server.client.get("/openapi.json").json()["paths"]["/v1/batch"]["post"]
    assert {"application/x-ndjson", "application/jsonl"} == post["requestBody"]["content"].keys()
    assert {"200", "400", "401", "413", "429", "503"} <= post["responses"].keys()
    assert post["responses"]["200"]["content"].keys() == {"application/x-ndjson", "application/json"}
