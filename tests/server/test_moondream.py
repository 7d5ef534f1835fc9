"""Moondream's API with Moondream's Python client, and with plain HTTP for requests that the client cannot send.

Run with `pytest tests/server/test_moondream.py`.
"""

from __future__ import annotations

import json
import re
import urllib.error
from collections.abc import Callable
from typing import Any

import httpx
import moondream as md
import pytest
from fastapi import FastAPI, Response
from moondream.types import Base64EncodedImage
from PIL import Image

from moondream_cv import connect, scenes
from moondream_cv.engine.local_model import LocalModel
from moondream_cv.errors import BackendError
from moondream_cv.images import to_rgb
from moondream_cv.server.images import decode_base64
from tests.helpers.models import endless_model
from tests.helpers.served import Served, data_uri, served

GREEDY = {"temperature": 0.0}
HOW_MANY = "How many blue squares are there?"
KEY = "md-key-4711"


@pytest.fixture(scope="module")
def client(server: Served) -> Any:
    return md.vl(endpoint=f"{server.url}/v1")


@pytest.fixture(scope="module")
def lossless(uri: str) -> Base64EncodedImage:
    """Return an encoded image, which the client passes on; it would convert other images to JPEG."""
    return Base64EncodedImage(image_url=uri)


def events(answer: httpx.Response) -> list[dict[str, Any]]:
    """Return the events of a stream and check the format that the clients require."""
    assert answer.headers["content-type"].startswith("text/event-stream")
    blocks = answer.text.split("\n\n")
    assert blocks.pop() == ""
    assert all(block.startswith("data: {") and "\n" not in block for block in blocks)
    return [json.loads(block[len("data: ") :]) for block in blocks]


def refusal(call: Callable[[], Any]) -> tuple[int, dict[str, Any]]:
    """Return the status and the message of the error that the client raises."""
    with pytest.raises(urllib.error.HTTPError) as caught:
        call()
    with caught.value as answer:
        return answer.code, json.loads(answer.read())["error"]


@pytest.mark.parametrize("length", ["short", "normal", "long"])
def test_client_gets_captions(
    client: Any, tiny: LocalModel, scene_image: Image.Image, lossless: Any, length: str
) -> None:
    expected = tiny.caption(scene_image, length, settings=GREEDY)["caption"]
    assert client.caption(lossless, length, settings=GREEDY) == {"caption": expected}
    pieces = list(client.caption(lossless, length, stream=True, settings=GREEDY)["caption"])
    assert "".join(pieces) == expected
    assert len(pieces) > 1


def test_default_caption_length_is_normal(server: Served, tiny: LocalModel, scene_image: Any, uri: str) -> None:
    body = {"image_url": uri, "settings": GREEDY, "length": None, "stream": None, "model": None}
    expected = tiny.caption(scene_image, "normal", settings=GREEDY)["caption"]
    assert server.post("/v1/caption", body).json()["caption"] == expected


@pytest.mark.parametrize("with_image", [True, False])
def test_client_gets_answers(client: Any, tiny: LocalModel, scene_image: Any, lossless: Any, with_image: bool) -> None:
    image, sent = (scene_image, lossless) if with_image else (None, None)
    expected = tiny.query(image, HOW_MANY, settings=GREEDY)["answer"]
    assert client.query(sent, HOW_MANY, settings=GREEDY) == {"answer": expected}
    assert "".join(client.query(sent, HOW_MANY, stream=True, settings=GREEDY)["answer"]) == expected


def test_client_gets_reasoning(
    client: Any, server: Served, tiny: LocalModel, scene_image: Any, lossless: Any, uri: str
) -> None:
    expected = tiny.query(scene_image, HOW_MANY, reasoning=True, settings=GREEDY)
    thoughts = json.loads(json.dumps(expected["reasoning"]))
    assert thoughts["grounding"], "the tiny model grounds this"
    answer = client.query(lossless, HOW_MANY, reasoning=True, settings=GREEDY)
    assert answer == {"answer": expected["answer"], "reasoning": thoughts}
    streamed = client.query(lossless, HOW_MANY, reasoning=True, stream=True, settings=GREEDY)["answer"]
    assert "".join(streamed) == expected["answer"]
    body = {"image_url": uri, "question": HOW_MANY, "reasoning": True, "stream": True, "settings": GREEDY}
    assert events(server.post("/v1/query", body))[0] == {"reasoning": thoughts}


def test_client_sends_spatial_references(client: Any, tiny: LocalModel, scene_image: Any, lossless: Any) -> None:
    refs = [[0.5, 0.5], [0.1, 0.1, 0.4, 0.4]]
    expected = tiny.query(scene_image, "What is this?", spatial_refs=refs, settings=GREEDY)["answer"]
    assert client.query(lossless, "What is this?", spatial_refs=refs, settings=GREEDY) == {"answer": expected}


def test_settings_reach_the_model(client: Any, lossless: Any) -> None:
    short = client.caption(lossless, settings={**GREEDY, "max_tokens": 2})["caption"]
    long = client.caption(lossless, settings={**GREEDY, "max_tokens": 50, "of_another_model": 1})["caption"]
    assert len(short) < len(long)
    assert long.startswith(short)


@pytest.mark.parametrize("name", ["blue square", "cat", "red circle", "yellow star"])
@pytest.mark.parametrize("encoding", ["PNG", "JPEG"])
def test_client_gets_objects_and_points(
    client: Any, tiny: LocalModel, scene_image: Any, name: str, encoding: str
) -> None:
    sent = client.encode_image(scene_image) if encoding == "JPEG" else Base64EncodedImage(data_uri(scene_image))
    seen = opened(sent.image_url)
    for found, expected in [
        (client.detect(sent, name), tiny.detect(seen, name)),
        (client.point(sent, name), tiny.point(seen, name)),
    ]:
        expected.pop("truncated")
        assert found.keys() == expected.keys()
        for key in expected:
            assert found[key] == [pytest.approx(item, abs=1e-4) for item in expected[key]]


def opened(uri: str) -> Image.Image:
    """Return the image in a data URI."""
    return Image.fromarray(to_rgb(decode_base64(uri)))


@pytest.mark.parametrize("skill", ["detect", "point"])
def test_max_objects_marks_the_answer_as_truncated(server: Served, skill: str) -> None:
    several = scenes.render_scene(2, resolution_wh=(320, 240), names=("red circle",) * 3, style="plain").image
    body = {"image_url": data_uri(Image.fromarray(several)), "object": "red circle"}
    assert server.post(f"/v1/{skill}", {**body, "settings": {"max_objects": 1}}).json()["truncated"] is True
    assert server.post(f"/v1/{skill}", body).json()["truncated"] is False


def test_answers_have_a_request_id_and_points_have_a_count(server: Served, uri: str) -> None:
    answer = server.post("/v1/point", {"image_url": uri, "object": "cat"}, headers={"X-Request-Id": "mine-1"})
    assert answer.headers["X-Request-Id"] == answer.json()["request_id"] == "mine-1"
    assert answer.json()["count"] == len(answer.json()["points"]) == 1
    other = server.post("/v1/caption", {"image_url": uri})
    assert other.json()["request_id"] == other.headers["X-Request-Id"] != "mine-1"


@pytest.mark.parametrize("path", ["/v1/detect", "/v1//detect", "//v1/detect"])
@pytest.mark.parametrize("key", ["object", "obj"])
def test_fields_of_moondream_station_are_accepted(server: Served, uri: str, path: str, key: str) -> None:
    bare = uri.partition(",")[2]
    answer = server.client.post(server.url + path, json={"image_url": bare, key: "cat"})
    assert answer.status_code == 200
    assert len(answer.json()["objects"]) == 1


def test_trailing_slash_of_the_endpoint_is_accepted(server: Served, lossless: Any) -> None:
    assert len(md.vl(endpoint=f"{server.url}/v1/").detect(lossless, "cat")["objects"]) == 1


def test_image_with_transparency_is_accepted(client: Any, scene_image: Image.Image) -> None:
    encoded = client.encode_image(scene_image.convert("RGBA"))
    assert encoded.image_url.startswith("data:image/jpeg;base64,")
    assert len(client.point(encoded, "cat")["points"]) == 1


@pytest.mark.parametrize(
    ("path", "body", "pieces"),
    [
        ("/v1/caption", {"length": "short"}, "chunk"),
        ("/v1/query", {"question": HOW_MANY}, "chunk"),
        ("/v1/detect", {"object": "cat"}, "object"),
        ("/v1/point", {"object": "cat"}, "point"),
    ],
)
def test_stream_events_have_the_format_of_the_clients(
    server: Served, uri: str, path: str, body: dict[str, Any], pieces: str
) -> None:
    asked = {"image_url": uri, "settings": GREEDY, **body}
    whole, streamed = server.post(path, asked).json(), events(server.post(path, {**asked, "stream": True}))
    assert streamed.pop() == {"completed": True}
    assert {key for event in streamed for key in event} == {pieces}
    found = [event[pieces] for event in streamed]
    if pieces == "chunk":
        assert "".join(found) in (whole.get("caption"), whole.get("answer"))
    else:
        assert found == [pytest.approx(item, abs=1e-4) for item in whole[f"{pieces}s"]]


def test_empty_stream_ends_with_completed(server: Served, uri: str) -> None:
    asked = {"image_url": uri, "object": "yellow star", "stream": True}
    assert events(server.post("/v1/detect", asked)) == [{"completed": True}]


def test_error_in_a_stream_is_its_last_event(uri: str) -> None:
    settings = {**GREEDY, "max_tokens": 100_000}
    for limit in (1.5, 15, 90):  # use the first limit within which this machine starts to answer
        with served(endless_model(), timeout=limit) as running:
            answer = running.post("/v1/caption", {"image_url": uri, "stream": True, "settings": settings})
            if answer.status_code == 504:
                continue
            client = md.vl(endpoint=f"{running.url}/v1")
            pieces = list(client.caption(Base64EncodedImage(uri), stream=True, settings=settings)["caption"])
        if pieces:
            break
    streamed = events(answer)
    assert streamed[-1]["error"]["code"] == 504
    assert f"{limit} seconds" in streamed[-1]["error"]["message"]
    assert "chunk" in streamed[0]
    assert pieces, "the client passes over the error and ends"


@pytest.mark.parametrize(
    "name", [None, "", "tiny", "moondream2", "vikhyatk/Moondream2@2025-06-21", "moondream3-preview"]
)
def test_names_of_the_served_model_are_accepted(server: Served, lossless: Any, name: str | None) -> None:
    assert md.vl(endpoint=f"{server.url}/v1", model=name).detect(lossless, "cat")["objects"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpt-4o", "'gpt-4o'.*'tiny'"),
        ("moondream3-preview/01ABC@20", "no finetunes.*01ABC@20"),
        ("tiny/01ABC@20", "no finetunes"),
    ],
)
def test_other_models_get_404(server: Served, lossless: Any, name: str, message: str) -> None:
    client = md.vl(endpoint=f"{server.url}/v1", model=name)
    for call in (
        lambda: client.detect(lossless, "cat"),
        lambda: client.query(question="Why?"),
        lambda: list(client.caption(lossless, stream=True)["caption"]),
    ):
        code, error = refusal(call)
        assert (code, error["code"], error["param"], error["type"]) == (404, 404, "model", "not_found_error")
        assert re.search(message, error["message"])


def test_variants_are_rejected(server: Served, uri: str) -> None:
    asked = {"image_url": uri, "object": "cat"}
    assert server.post("/v1/detect", {**asked, "variant": None}).status_code == 200
    assert server.post("/v1/detect", {**asked, "variant": "01ABC@20"}).status_code == 404
    assert server.post("/v1/detect", {**asked, "settings": {"variant": "01ABC@20"}}).status_code == 400


@pytest.mark.parametrize("stream", [False, True])
def test_segmentation_gets_400(client: Any, lossless: Any, stream: bool) -> None:
    code, error = refusal(lambda: list(client.segment(lossless, "cat", stream=stream)))
    assert (code, error["type"]) == (400, "unsupported_skill")
    assert "/v1/detect" in error["message"]


def test_spatial_references_for_points_get_400(client: Any, lossless: Any) -> None:
    assert client.point(lossless, "cat", spatial_refs=[])["points"]
    code, error = refusal(lambda: client.point(lossless, "cat", spatial_refs=[[0.5, 0.5]]))
    assert (code, error["type"], error["param"]) == (400, "unsupported_skill", "spatial_refs")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c, i: c.caption(i, "huge"), "'huge'"),
        (lambda c, i: c.query(i, " "), "question"),
        (lambda c, i: c.query(i, "What?", spatial_refs=[[0.5, 1.5]]), "1.5"),
        (lambda c, i: c.query(i, "What?", spatial_refs=[[0.1, 0.2, 0.3]]), "2 or 4"),
        (lambda c, i: c.query(None, "What?", spatial_refs=[[0.5, 0.5]]), "spatial_refs"),
        (lambda c, i: c.detect(i, ""), "object"),
        (lambda c, i: c.detect(i, "cat", settings={"max_objects": 0}), "max_objects"),
        (lambda c, i: c.query(i, "What?", settings={"temperature": -1}), "temperature"),
        (lambda c, i: c.detect(Base64EncodedImage("?!"), "cat"), re.escape("'?!'")),
        (lambda c, i: c.detect(Base64EncodedImage(""), "cat"), "empty"),
        (lambda c, i: c.detect(Base64EncodedImage("aGFsbG8="), "cat"), "not an image"),
        (lambda c, i: c.detect(Base64EncodedImage("/etc/hostname"), "cat"), "'/etc/hostname'"),
        (lambda c, i: c.detect(Base64EncodedImage("http://127.0.0.1/a.png"), "cat"), "127.0.0.1"),
        (lambda c, i: list(c.caption(i, "huge", stream=True)["caption"]), "'huge'"),
    ],
)
def test_values_out_of_range_get_400(client: Any, lossless: Any, call: Callable[[Any, Any], Any], message: str) -> None:
    code, error = refusal(lambda: call(client, lossless))
    assert (code, error["code"]) == (400, 400)
    assert re.search(message, error["message"])


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/caption", {}, "image_url"),
        ("/v1/caption", {"image_url": 5}, "image_url"),
        ("/v1/caption", {"image_url": "x", "stream": "yes"}, "stream"),
        ("/v1/query", {"image_url": "x"}, "question"),
        ("/v1/query", {"question": ["What?"]}, "question"),
        ("/v1/query", {"question": "What?", "spatial_refs": [[0.5, 0.5]] * 65}, "spatial_refs"),
        ("/v1/query", {"question": "What?", "spatial_refs": [["0.5", "0.5"]]}, "spatial_refs"),
        ("/v1/detect", {"image_url": "x"}, "object"),
        ("/v1/point", {"image_url": "x", "object": "cat", "settings": "fast"}, "settings"),
        ("/v1/point", [], None),
    ],
)
def test_bodies_that_do_not_match_the_schema_get_422(server: Served, path: str, body: Any, param: str | None) -> None:
    answer = server.post(path, body)
    assert answer.status_code == 422
    assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
    assert answer.json()["error"]["param"] == param


@pytest.mark.parametrize("text", [b"", b"{", b"\0", b"\xff\xfe", b'{"image_url": ' + b"[" * 100_000])
def test_invalid_json_is_rejected(server: Served, text: bytes) -> None:
    answer = server.client.post("/v1/detect", content=text, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 413, 422)
    assert answer.json()["error"]["message"]


def test_client_sends_api_keys(tiny: LocalModel, lossless: Any, uri: str) -> None:
    with served(tiny, api_keys=(KEY,)) as running:
        endpoint = f"{running.url}/v1"
        assert md.vl(endpoint=endpoint, api_key=KEY).detect(lossless, "cat")["objects"]
        for key in (None, "another"):
            code, error = refusal(lambda key=key: md.vl(endpoint=endpoint, api_key=key).detect(lossless, "cat"))
            assert (code, error["type"]) == (401, "authentication_error")
            assert KEY not in error["message"]
        asked = {"image_url": uri, "object": "cat"}
        for headers in ({"Authorization": f"Bearer {KEY}"}, {"X-API-Key": KEY}):
            assert running.post("/v1/detect", asked, headers=headers).status_code == 200


def test_image_urls_are_downloaded(tiny: LocalModel, scene_image: Image.Image, uri: str) -> None:
    def with_image_route(app: FastAPI) -> FastAPI:
        app.add_api_route("/scene.png", lambda: Response(decode_base64(uri), media_type="image/png"))
        return app

    with served(tiny, wrap=with_image_route, private_urls=True) as running:
        found = md.vl(endpoint=f"{running.url}/v1").detect(Base64EncodedImage(f"{running.url}/scene.png"), "cat")
    assert found["objects"] == [pytest.approx(item, abs=1e-4) for item in tiny.detect(scene_image, "cat")["objects"]]


def test_unavailable_server_gets_429_and_503(tiny: LocalModel, lossless: Any) -> None:
    with served(tiny, queue=1) as running:
        client = md.vl(endpoint=f"{running.url}/v1")
        running.service.acquire_slot()
        code, error = refusal(lambda: client.detect(lossless, "cat"))
        assert (code, error["type"]) == (429, "rate_limit_error")
        running.service.release_slot()
        assert client.detect(lossless, "cat")["objects"]
        running.service.draining = True
        code, error = refusal(lambda: list(client.caption(lossless, stream=True)["caption"]))
        assert (code, error["type"]) == (503, "service_unavailable")


def test_slow_answer_gets_504(lossless: Any) -> None:
    with served(endless_model(), timeout=0.5) as running:
        client = md.vl(endpoint=f"{running.url}/v1")
        code, error = refusal(lambda: client.caption(lossless, settings={**GREEDY, "max_tokens": 100_000}))
        assert (code, error["type"]) == (504, "timeout_error")


def test_oversized_body_gets_413(tiny: LocalModel, lossless: Any) -> None:
    with served(tiny, max_body=1000) as running:
        code, error = refusal(lambda: md.vl(endpoint=f"{running.url}/v1").detect(lossless, "cat"))
        assert (code, error["type"]) == (413, "request_too_large")


def test_openapi_schema_documents_the_answers(server: Served) -> None:
    paths = server.client.get("/openapi.json").json()["paths"]
    for skill in ("caption", "query", "detect", "point", "gaze"):
        answers = paths[f"/v1/{skill}"]["post"]["responses"]
        assert {"200", "400", "401", "404", "413", "422", "429", "503", "504"} <= answers.keys()
        assert {"application/json", "text/event-stream"} == answers["200"]["content"].keys()
        assert "ErrorAnswer" in json.dumps(answers["422"])


def test_connect_reads_the_key_from_the_environment(
    tiny: LocalModel, scene_image: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOONDREAM_API_KEY", KEY)
    with served(tiny, api_keys=(KEY,)) as locked, connect(locked.url) as model:
        assert model.query(scene_image, HOW_MANY, settings=GREEDY)["answer"]
        monkeypatch.delenv("MOONDREAM_API_KEY")
        with connect(locked.url) as other, pytest.raises(BackendError, match=r"401.*MOONDREAM_API_KEY"):
            other.detect(scene_image, "dog")
