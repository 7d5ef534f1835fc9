"""fal's API over plain HTTP, and with its Python client over TLS."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from PIL import Image

from moondream_cv.engine.local_model import LocalModel
from tests.helpers.certificates import Certificates, make_certificates
from tests.helpers.fal_clients import run_python
from tests.helpers.held_server import held_server
from tests.helpers.served import Served, served
from tests.helpers.waiting import until

pytest.importorskip("fal_client")

APP = "/fal-ai/moondream2"
QUEUE = f"/queue{APP}"
GREEDY = {"temperature": 0}
SIZE = {"width": 320, "height": 240}
LONG = {"prompt": "What?", "settings": {"temperature": 0, "max_tokens": 300}}


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def secure(tiny: LocalModel, certificates: Certificates) -> Iterator[Served]:
    with served(tiny, tls=(certificates.certificate, certificates.key)) as running:
        yield running


def inputs(uri: str) -> dict[str, dict[str, Any]]:
    """Return the arguments of the four apps, by the suffix of the path."""
    return {
        "": {"image_url": uri, "settings": GREEDY},
        "/visual-query": {"image_url": uri, "prompt": "How many objects are there?", "settings": GREEDY},
        "/object-detection": {"image_url": uri, "object": "blue square"},
        "/point-object-detection": {"image_url": uri, "object": "cat"},
    }


@pytest.fixture(scope="module")
def outputs(tiny: LocalModel, scene_image: Image.Image) -> dict[str, dict[str, Any]]:
    """Return the expected outputs of the four apps, computed with the model."""
    expected = tiny.caption(scene_image, settings=GREEDY)
    answer = tiny.query(scene_image, "How many objects are there?", settings=GREEDY)
    boxes, points = tiny.detect(scene_image, "blue square")["objects"], tiny.point(scene_image, "cat")["points"]
    assert boxes
    assert points
    return {
        "": {"output": expected.pop("caption"), **expected},
        "/visual-query": {"output": answer.pop("answer"), **answer},
        "/object-detection": {"objects": boxes, "truncated": False, "image": SIZE},
        "/point-object-detection": {"objects": points, "truncated": False, "image": SIZE},
    }


def events(text: str) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line]


# --- plain HTTP -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "/run"])
def test_synchronous_answers_equal_those_of_the_model(
    server: Served, uri: str, outputs: dict[str, Any], prefix: str
) -> None:
    for app, body in inputs(uri).items():
        answer = server.post(f"{prefix}{APP}{app}", body)
        assert (answer.status_code, answer.json()) == (200, outputs[app])
        assert answer.headers["x-fal-request-id"] == answer.headers["x-request-id"]


@pytest.mark.parametrize("length", ["short", "long"])
def test_caption_length_is_passed_to_the_model(
    server: Served, tiny: LocalModel, scene_image: Image.Image, uri: str, length: str
) -> None:
    answer = server.post(APP, {"image_url": uri, "length": length, "settings": GREEDY})
    assert answer.json()["output"] == tiny.caption(scene_image, length, settings=GREEDY)["caption"]


def test_stream_events_repeat_the_reply_so_far(server: Served, uri: str, outputs: dict[str, Any]) -> None:
    for app, body in inputs(uri).items():
        answer = server.post(f"{APP}{app}/stream", body)
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["x-fal-request-id"] == answer.headers["x-request-id"]
        *parts, last = events(answer.text)
        assert last == {**outputs[app], "partial": False}
        assert all(part["partial"] for part in parts)
        key = "output" if "output" in last else "objects"
        assert all(last[key][: len(part[key])] == part[key] for part in parts)
        assert len(parts) >= len(last["objects"] if "objects" in last else last["output"].split())


def test_truncated_answers_are_marked(server: Served, uri: str) -> None:
    body = {"image_url": uri, "settings": {"temperature": 0, "max_tokens": 2}}
    assert server.post(APP, body).json()["truncated"] is True
    assert events(server.post(f"{APP}/stream", body).text)[-1]["truncated"] is True


@pytest.mark.parametrize("start", [APP, f"/run{APP}", QUEUE])
@pytest.mark.parametrize(
    ("app", "body", "field"),
    [
        ("", {}, "image_url"),
        ("/visual-query", {"image_url": "x"}, "prompt"),
        ("/object-detection", {"image_url": "x"}, "object"),
        ("/point-object-detection", {"image_url": "x", "object": 3}, "object"),
        ("", [], None),
    ],
)
def test_bodies_that_do_not_match_the_schema_get_422(
    server: Served, start: str, app: str, body: Any, field: str | None
) -> None:
    answer = server.post(f"{start}{app}", body)
    (detail,) = answer.json()["detail"]
    assert answer.status_code == 422
    assert detail["loc"] == (["body"] if field is None else ["body", field])
    assert detail["msg"]
    assert detail["type"]
    assert answer.headers["x-fal-request-id"]


@pytest.mark.parametrize(
    ("path", "body", "message", "kind"),
    [
        (APP, {"image_url": "?"}, "neither a data URI", "invalid_image"),
        (f"{APP}/stream", {"image_url": "?"}, "neither a data URI", "invalid_image"),
        (f"{APP}/visual-query", {"prompt": " "}, "must not be empty", "invalid_request_error"),
        (f"{APP}/object-detection", {"object": ""}, "must not be empty", "invalid_request_error"),
        (APP, {"length": "endless"}, "'endless'", "invalid_request_error"),
        (APP, {"settings": {"temperature": -1}}, "temperature", "invalid_request_error"),
        (f"{QUEUE}?fal_webhook=http://example.com", {}, "webhooks are not supported", "unsupported_parameter"),
    ],
)
def test_invalid_requests_are_rejected(server: Served, uri: str, path: str, body: Any, message: str, kind: str) -> None:
    answer = server.post(path, {"image_url": uri, **body})
    assert answer.status_code == 400
    assert message in answer.json()["detail"]
    assert answer.json()["error_type"] == answer.headers["x-fal-error-type"] == kind


@pytest.mark.parametrize("path", ["/fal-ai/flux", "/run/fal-ai/moondream2/nothing", "/queue/fal-ai/other/requests/1"])
def test_unknown_apps_get_404(server: Served, path: str) -> None:
    answer = server.client.get(path)
    assert (answer.status_code, answer.json()["detail"]) == (404, f"no route at {path}")


def test_error_in_a_stream_is_its_last_event(uri: str) -> None:
    with held_server(steps=40, then_fails=True) as (_, failing):
        *parts, last = events(failing.post(f"{APP}/visual-query/stream", {"image_url": uri, **LONG}).text)
    assert parts[0]["output"]
    assert "restart the server" in last["detail"]
    assert last["partial"] is False


@pytest.mark.parametrize("header", ["0", "-1", "soon", "nan"])
def test_invalid_time_limits_get_422(server: Served, uri: str, header: str) -> None:
    for path in (APP, QUEUE):
        assert server.post(path, {"image_url": uri}, headers={"X-Fal-Request-Timeout": header}).status_code == 422


# --- the Python client ------------------------------------------------------------------------------------------------


def test_client_runs_and_streams(secure: Served, certificates: Certificates, uri: str, outputs: dict[str, Any]) -> None:
    code = (
        f"inputs = {inputs(uri)!r}\n"
        + """
found = {}
for app, arguments in inputs.items():
    found[app] = [fal_client.run(APP + app, arguments), list(fal_client.stream(APP + app, arguments))]
show(found)
"""
    )
    for app, (answer, stream) in run_python(code, secure, certificates).items():
        assert answer == outputs[app]
        assert stream[-1] == {**outputs[app], "partial": False}
        assert len(stream) > 1


def test_async_client_runs_and_streams(
    secure: Served, certificates: Certificates, uri: str, outputs: dict[str, Any]
) -> None:
    code = """
arguments = {"image_url": uri, "object": "cat"}
app = APP + "/point-object-detection"
async def main():
    return [
        await fal_client.run_async(app, arguments),
        await (await fal_client.submit_async(app, arguments)).get(),
        await fal_client.subscribe_async(app, arguments),
        [event async for event in fal_client.stream_async(app, arguments)][-1],
    ]
show(asyncio.run(main()))
"""
    expected = outputs["/point-object-detection"]
    assert run_python(code, secure, certificates, uri) == [expected] * 3 + [{**expected, "partial": False}]


def test_client_raises_errors_with_status_and_id(secure: Served, certificates: Certificates, uri: str) -> None:
    code = """
def fetch(handle):
    return handle.get()
failed = fal_client.submit(APP, {"image_url": "?"})
show({
    "schema": failure(lambda: fal_client.run(APP, {})),
    "submitted schema": failure(lambda: fal_client.submit(APP, {})),
    "image": failure(lambda: fal_client.run(APP, {"image_url": "?"})),
    "result": failure(failed.get),
    "status": list(failed.iter_events())[-1],
    "unknown": failure(lambda: fal_client.result(APP, "0" * 32)),
    "other app": failure(lambda: fal_client.run("fal-ai/flux", {})),
    "webhook": failure(lambda: fal_client.submit(APP, {"image_url": uri}, webhook_url="http://localhost:1/")),
    "id": failed.request_id,
})
"""
    found = run_python(code, secure, certificates, uri)
    statuses = {name: value["status"] for name, value in found.items() if "status" in value}
    assert statuses == {
        "schema": 422,
        "submitted schema": 422,
        "image": 400,
        "result": 400,
        "unknown": 404,
        "other app": 404,
        "webhook": 400,
    }
    assert found["schema"]["message"][0]["loc"] == ["body", "image_url"]
    assert (found["image"]["error_type"], found["result"]["error_type"]) == ("invalid_image", "invalid_image")
    assert found["status"]["error"] == found["result"]["message"]
    assert found["status"]["error_type"] == "invalid_image"
    assert found["result"]["id"] == found["id"]


def test_client_sends_api_keys(tiny: LocalModel, certificates: Certificates, uri: str) -> None:
    tls = certificates.certificate, certificates.key
    with served(tiny, tls=tls, api_keys=("id:secret",)) as locked:
        code = """
arguments = {"image_url": uri, "object": "cat"}
app = APP + "/object-detection"
wrong = fal_client.SyncClient(key="id:wrong")
at_once = fal_client.run(app, arguments)["objects"]
handle = fal_client.submit(app, arguments)
show([
    at_once,
    handle.get()["objects"],
    failure(lambda: wrong.run(app, arguments)),
    failure(lambda: wrong.submit(app, arguments)),
    failure(lambda: wrong.result(app, handle.request_id)),
])
"""
        first, second, *refused = run_python(code, locked, certificates, uri, key="id:secret")
    assert first == second != []
    assert [error["status"] for error in refused] == [401] * 3
    assert "wrong" not in refused[0]["message"].replace("or a wrong one", "")


def test_client_retries_when_the_queue_is_full(certificates: Certificates, uri: str) -> None:
    tls = certificates.certificate, certificates.key
    body = {"image_url": uri, "prompt": "What?", "settings": {"temperature": 0, "max_tokens": 3}}
    code = f"""
arguments = {{"image_url": uri, **{body!r}}}
show([fal_client.run(APP + "/visual-query", arguments), fal_client.submit(APP + "/visual-query", arguments).get()])
"""
    with held_server(tls=tls, queue=1) as (held, busy), ThreadPoolExecutor(1) as pool:
        busy.client.headers["Connection"] = "close"  # uvicorn waits for idle TLS connections
        first = busy.post(f"{QUEUE}/visual-query", body).json()
        refused = busy.post(f"{QUEUE}/visual-query", body)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        second = pool.submit(run_python, code, busy, certificates, uri)
        until(lambda: b"moondream_cv_refused_total 2.0" in busy.service.metrics.text())
        held.resume()
        found = second.result()
        assert found == [busy.client.get(first["response_url"]).json()] * 2


def test_time_limit_of_the_client_gets_504_without_retry(certificates: Certificates, uri: str) -> None:
    code = f"""
arguments = {{"image_url": uri, **{LONG!r}}}
app = APP + "/visual-query"
handle = fal_client.submit(app, arguments, start_timeout=1.1)  # the client takes no shorter ones
found = [failure(lambda: fal_client.run(app, arguments, start_timeout=1.1, timeout=240)), failure(handle.get)]
for limit in (1.1, 11, 60):  # use the first limit within which this machine takes the request
    try:
        fal_client.subscribe(app, arguments, client_timeout=limit)
    except FalClientTimeoutError as error:
        if error.request_id:
            found.append(fal_client.status(app, error.request_id))
            break
show(found)
"""
    with held_server(tls=(certificates.certificate, certificates.key)) as (_, running):
        at_once, queued, subscribed = run_python(code, running, certificates, uri)
        until(lambda: running.service.in_flight == 0)
    for error in (at_once, queued):
        assert (error["status"], error["timeout_type"]) == (504, "user")
        assert "1.1 seconds" in error["message"]
    assert subscribed["error_type"] in ("request_timeout", "cancelled")
