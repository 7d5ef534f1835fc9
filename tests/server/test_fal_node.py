"""fal's API with its JavaScript client, in Node."""

from __future__ import annotations

from typing import Any

import pytest
from PIL import Image

from moondream_cv.engine.local_model import LocalModel
from tests.helpers.fal_clients import run_node
from tests.helpers.held_server import held_server
from tests.helpers.served import Served, served

SIZE = {"width": 320, "height": 240}


@pytest.fixture
def expected(tiny: LocalModel, scene_image: Image.Image) -> dict[str, Any]:
    return {**tiny.detect(scene_image, "blue square"), "image": SIZE}


def test_client_runs_and_streams(server: Served, uri: str, expected: dict[str, Any]) -> None:
    code = """
const input = { image_url: uri, object: "blue square" };
const { data, requestId } = await fal.run(APP + "/object-detection", { input });
const stream = await fal.stream(APP + "/object-detection", { input });
const events = [];
for await (const event of stream) events.push(event);
show({ data, requestId, events, done: await stream.done(), streamId: stream.requestId });
"""
    found = run_node(code, server, uri)
    last = {**expected, "partial": False}
    assert (found["data"], found["events"][-1], found["done"]) == (expected, last, last)
    assert found["requestId"]
    assert found["streamId"]


@pytest.mark.parametrize("mode", ["polling", "streaming"])
def test_client_subscribes_to_the_queue(server: Served, uri: str, expected: dict[str, Any], mode: str) -> None:
    code = f"""
const updates = [];
let id;
const {{ data, requestId }} = await fal.subscribe(APP + "/object-detection", {{
  input: {{ image_url: uri, object: "blue square" }}, mode: "{mode}", pollInterval: 20, logs: true,
  onEnqueue: (given) => {{ id = given; }}, onQueueUpdate: (status) => updates.push(status),
}});
show({{ data, requestId, id, updates }});
"""
    found = run_node(code, server, uri)
    assert (found["data"], found["requestId"]) == (expected, found["id"])
    last = found["updates"][-1]
    assert (last["status"], last["request_id"]) == ("COMPLETED", found["id"])
    assert [line["message"].split()[0] for line in last["logs"]] == ["queued:", "started:", "finished"]


def test_client_uses_the_queue_routes(server: Served, uri: str, expected: dict[str, Any]) -> None:
    code = """
const app = APP + "/object-detection";
const submitted = await fal.queue.submit(app, { input: { image_url: uri, object: "blue square" }, priority: "low" });
const requestId = submitted.request_id;
const done = await fal.queue.subscribeToStatus(app, { requestId, pollInterval: 20 });
const { data } = await fal.queue.result(app, { requestId });
show({ submitted, done, data, late: await failure(() => fal.queue.cancel(app, { requestId })) });
"""
    found = run_node(code, server, uri)
    assert (found["data"], found["done"]["status"], found["late"]["status"]) == (expected, "COMPLETED", 400)
    assert found["done"]["response_url"] == found["submitted"]["response_url"]


def test_client_raises_errors_with_status_and_id(server: Served, uri: str) -> None:
    code = """
const app = APP + "/object-detection";
const bad = { image_url: "?", object: "cat" };
const fields = await fal.run(app, { input: { object: "cat" } }).catch((error) => error);
show({
  fields: fields instanceof ValidationError && fields.getFieldErrors("image_url"),
  schema: await failure(() => fal.subscribe(app, { input: {} })),
  run: await failure(() => fal.run(app, { input: bad })),
  subscribe: await failure(() => fal.subscribe(app, { input: bad, pollInterval: 20 })),
  stream: await failure(async () => (await fal.stream(app, { input: bad })).done()),
  webhook: await failure(() => fal.queue.submit(app, { input: bad, webhookUrl: "http://localhost:1/" })),
  unknown: await failure(() => fal.queue.result(app, { requestId: "0" })),
});
"""
    found = run_node(code, server, uri)
    (field,) = found.pop("fields")
    assert field["loc"] == ["body", "image_url"]
    assert {name: (error["name"], error["status"]) for name, error in found.items()} == {
        "schema": ("ValidationError", 422),
        "run": ("ApiError", 400),
        "subscribe": ("ApiError", 400),
        "stream": ("ApiError", 400),
        "webhook": ("ApiError", 400),
        "unknown": ("ApiError", 404),
    }
    assert found["run"]["body"]["error_type"] == found["subscribe"]["body"]["error_type"] == "invalid_image"
    assert all(error["id"] for error in found.values())


def test_client_sends_api_keys(tiny: LocalModel, uri: str) -> None:
    code = """
const input = { image_url: uri, object: "cat" };
show(await failure(() => fal.subscribe(APP + "/object-detection", { input, pollInterval: 20 })));
"""
    with served(tiny, api_keys=("id:secret",)) as locked:
        assert run_node(code, locked, uri, key="id:secret")["returned"]["data"]["objects"]
        assert run_node(code, locked, uri, key="id:wrong")["status"] == 401


def test_client_cancels_requests_and_sends_time_limits(uri: str) -> None:
    code = """
const app = APP + "/visual-query";
const input = { image_url: uri, prompt: "What?", settings: { temperature: 0, max_tokens: 300 } };
const { request_id: requestId } = await fal.queue.submit(app, { input });
await fal.queue.cancel(app, { requestId });
const cancelled = await failure(() => fal.queue.result(app, { requestId }));
const late = await failure(() => fal.run(app, { input, startTimeout: 1.1 }));
show({ cancelled, late });
"""
    with held_server(queue=1) as (_, running):
        found = run_node(code, running, uri)
        assert running.service.in_flight == 0
    assert found["cancelled"]["body"]["error_type"] == "cancelled"
    assert (found["late"]["status"], found["late"]["body"]["error_type"]) == (504, "request_timeout")
