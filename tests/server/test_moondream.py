"""Moondream's dialect with Moondream's own Python client, unmodified, and what that client cannot send, as plain HTTP.

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

from moondream_cv import scenes
from moondream_cv.engine.local import LocalModel
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
    """The client makes a JPEG of a picture, and passes on what is encoded already."""
    return Base64EncodedImage(image_url=uri)


def events(answer: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream, every one of which must be framed as the clients insist on."""
    assert answer.headers["content-type"].startswith("text/event-stream")
    blocks = answer.text.split("\n\n")
    assert blocks.pop() == ""
    assert all(block.startswith("data: {") and "\n" not in block for block in blocks)
    return [json.loads(block[len("data: ") :]) for block in blocks]


def refusal(call: Callable[[], Any]) -> tuple[int, dict[str, Any]]:
    """What Moondream's client raises, and what its user can read from it."""
    with pytest.raises(urllib.error.HTTPError) as caught:
        call()
    with caught.value as answer:
        return answer.code, json.loads(answer.read())["error"]


@pytest.mark.parametrize("length", ["short", "normal", "long"])
def test_captions(client: Any, tiny: LocalModel, picture: Image.Image, lossless: Any, length: str) -> None:
    expected = tiny.caption(picture, length, settings=GREEDY)["caption"]
    assert client.caption(lossless, length, settings=GREEDY) == {"caption": expected}
    pieces = list(client.caption(lossless, length, stream=True, settings=GREEDY)["caption"])
    assert "".join(pieces) == expected
    assert len(pieces) > 1


def test_captions_have_the_normal_length_by_themselves(
    server: Served, tiny: LocalModel, picture: Any, uri: str
) -> None:
    body = {"image_url": uri, "settings": GREEDY, "length": None, "stream": None, "model": None}
    expected = tiny.caption(picture, "normal", settings=GREEDY)["caption"]
    assert server.post("/v1/caption", body).json()["caption"] == expected


@pytest.mark.parametrize("with_image", [True, False])
def test_questions(client: Any, tiny: LocalModel, picture: Any, lossless: Any, with_image: bool) -> None:
    image, sent = (picture, lossless) if with_image else (None, None)
    expected = tiny.query(image, HOW_MANY, settings=GREEDY)["answer"]
    assert client.query(sent, HOW_MANY, settings=GREEDY) == {"answer": expected}
    assert "".join(client.query(sent, HOW_MANY, stream=True, settings=GREEDY)["answer"]) == expected


def test_reasoning(client: Any, server: Served, tiny: LocalModel, picture: Any, lossless: Any, uri: str) -> None:
    expected = tiny.query(picture, HOW_MANY, reasoning=True, settings=GREEDY)
    thoughts = json.loads(json.dumps(expected["reasoning"]))
    assert thoughts["grounding"], "the tiny model grounds this"
    answer = client.query(lossless, HOW_MANY, reasoning=True, settings=GREEDY)
    assert answer == {"answer": expected["answer"], "reasoning": thoughts}
    streamed = client.query(lossless, HOW_MANY, reasoning=True, stream=True, settings=GREEDY)["answer"]
    assert "".join(streamed) == expected["answer"]
    body = {"image_url": uri, "question": HOW_MANY, "reasoning": True, "stream": True, "settings": GREEDY}
    assert events(server.post("/v1/query", body))[0] == {"reasoning": thoughts}


def test_spatial_references(client: Any, tiny: LocalModel, picture: Any, lossless: Any) -> None:
    refs = [[0.5, 0.5], [0.1, 0.1, 0.4, 0.4]]
    expected = tiny.query(picture, "What is this?", spatial_refs=refs, settings=GREEDY)["answer"]
    assert client.query(lossless, "What is this?", spatial_refs=refs, settings=GREEDY) == {"answer": expected}


def test_settings_reach_the_model(client: Any, lossless: Any) -> None:
    short = client.caption(lossless, settings={**GREEDY, "max_tokens": 2})["caption"]
    long = client.caption(lossless, settings={**GREEDY, "max_tokens": 50, "of_another_model": 1})["caption"]
    assert len(short) < len(long)
    assert long.startswith(short)


@pytest.mark.parametrize("name", ["blue square", "cat", "red circle", "yellow star"])
@pytest.mark.parametrize("encoding", ["PNG", "JPEG"])
def test_objects_and_points(client: Any, tiny: LocalModel, picture: Any, name: str, encoding: str) -> None:
    sent = client.encode_image(picture) if encoding == "JPEG" else Base64EncodedImage(data_uri(picture))
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
    """What the server sees of a data URI."""
    return Image.fromarray(to_rgb(decode_base64(uri)))


@pytest.mark.parametrize("skill", ["detect", "point"])
def test_a_limit_of_objects_is_said_to_be_one(server: Served, skill: str) -> None:
    several = scenes.render_scene(2, resolution_wh=(320, 240), names=("red circle",) * 3, style="plain").image
    body = {"image_url": data_uri(Image.fromarray(several)), "object": "red circle"}
    assert server.post(f"/v1/{skill}", {**body, "settings": {"max_objects": 1}}).json()["truncated"] is True
    assert server.post(f"/v1/{skill}", body).json()["truncated"] is False


def test_answers_have_an_id_and_points_a_count(server: Served, uri: str) -> None:
    answer = server.post("/v1/point", {"image_url": uri, "object": "cat"}, headers={"X-Request-Id": "mine-1"})
    assert answer.headers["X-Request-Id"] == answer.json()["request_id"] == "mine-1"
    assert answer.json()["count"] == len(answer.json()["points"]) == 1
    other = server.post("/v1/caption", {"image_url": uri})
    assert other.json()["request_id"] == other.headers["X-Request-Id"] != "mine-1"


@pytest.mark.parametrize("path", ["/v1/detect", "/v1//detect", "//v1/detect"])
@pytest.mark.parametrize("key", ["object", "obj"])
def test_what_moondream_station_accepts(server: Served, uri: str, path: str, key: str) -> None:
    bare = uri.partition(",")[2]
    answer = server.client.post(server.url + path, json={"image_url": bare, key: "cat"})
    assert answer.status_code == 200
    assert len(answer.json()["objects"]) == 1


def test_a_slash_at_the_end_of_the_endpoint(server: Served, lossless: Any) -> None:
    assert len(md.vl(endpoint=f"{server.url}/v1/").detect(lossless, "cat")["objects"]) == 1


def test_a_picture_with_transparency(client: Any, picture: Image.Image) -> None:
    encoded = client.encode_image(picture.convert("RGBA"))
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
def test_streams_are_framed_for_these_clients(
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


def test_a_stream_without_pieces_ends(server: Served, uri: str) -> None:
    asked = {"image_url": uri, "object": "yellow star", "stream": True}
    assert events(server.post("/v1/detect", asked)) == [{"completed": True}]


def test_a_failure_on_the_way_ends_a_stream(uri: str) -> None:
    settings = {**GREEDY, "max_tokens": 100_000}
    for limit in (1.5, 15, 90):  # the first one within which this machine begins to answer
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
def test_models_that_are_served(server: Served, lossless: Any, name: str | None) -> None:
    assert md.vl(endpoint=f"{server.url}/v1", model=name).detect(lossless, "cat")["objects"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gpt-4o", "'gpt-4o'.*'tiny'"),
        ("moondream3-preview/01ABC@20", "no finetunes.*01ABC@20"),
        ("tiny/01ABC@20", "no finetunes"),
    ],
)
def test_models_that_are_not(server: Served, lossless: Any, name: str, said: str) -> None:
    client = md.vl(endpoint=f"{server.url}/v1", model=name)
    for call in (
        lambda: client.detect(lossless, "cat"),
        lambda: client.query(question="Why?"),
        lambda: list(client.caption(lossless, stream=True)["caption"]),
    ):
        code, error = refusal(call)
        assert (code, error["code"], error["param"], error["type"]) == (404, 404, "model", "not_found_error")
        assert re.search(said, error["message"])


def test_variants(server: Served, uri: str) -> None:
    asked = {"image_url": uri, "object": "cat"}
    assert server.post("/v1/detect", {**asked, "variant": None}).status_code == 200
    assert server.post("/v1/detect", {**asked, "variant": "01ABC@20"}).status_code == 404
    assert server.post("/v1/detect", {**asked, "settings": {"variant": "01ABC@20"}}).status_code == 400


@pytest.mark.parametrize("stream", [False, True])
def test_segmentation_is_not_in_moondream_2(client: Any, lossless: Any, stream: bool) -> None:
    code, error = refusal(lambda: list(client.segment(lossless, "cat", stream=stream)))
    assert (code, error["type"]) == (400, "unsupported_skill")
    assert "/v1/detect" in error["message"]


def test_points_take_no_spatial_references(client: Any, lossless: Any) -> None:
    assert client.point(lossless, "cat", spatial_refs=[])["points"]
    code, error = refusal(lambda: client.point(lossless, "cat", spatial_refs=[[0.5, 0.5]]))
    assert (code, error["type"], error["param"]) == (400, "unsupported_skill", "spatial_refs")


@pytest.mark.parametrize(
    ("call", "said"),
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
def test_values_that_are_refused(client: Any, lossless: Any, call: Callable[[Any, Any], Any], said: str) -> None:
    code, error = refusal(lambda: call(client, lossless))
    assert (code, error["code"]) == (400, 400)
    assert re.search(said, error["message"])


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
def test_bodies_that_do_not_fit(server: Served, path: str, body: Any, param: str | None) -> None:
    answer = server.post(path, body)
    assert answer.status_code == 422
    assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
    assert answer.json()["error"]["param"] == param


@pytest.mark.parametrize("text", [b"", b"{", b"\0", b"\xff\xfe", b'{"image_url": ' + b"[" * 100_000])
def test_what_is_no_json_is_refused(server: Served, text: bytes) -> None:
    answer = server.client.post("/v1/detect", content=text, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 413, 422)
    assert answer.json()["error"]["message"]


def test_keys(tiny: LocalModel, lossless: Any, uri: str) -> None:
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


def test_an_image_by_its_url(tiny: LocalModel, picture: Image.Image, uri: str) -> None:
    def with_picture(app: FastAPI) -> FastAPI:
        app.add_api_route("/scene.png", lambda: Response(decode_base64(uri), media_type="image/png"))
        return app

    with served(tiny, wrap=with_picture, private_urls=True) as running:
        found = md.vl(endpoint=f"{running.url}/v1").detect(Base64EncodedImage(f"{running.url}/scene.png"), "cat")
    assert found["objects"] == [pytest.approx(item, abs=1e-4) for item in tiny.detect(picture, "cat")["objects"]]


def test_a_server_that_cannot_answer_now(tiny: LocalModel, lossless: Any) -> None:
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


def test_an_answer_that_takes_too_long(lossless: Any) -> None:
    with served(endless_model(), timeout=0.5) as running:
        client = md.vl(endpoint=f"{running.url}/v1")
        code, error = refusal(lambda: client.caption(lossless, settings={**GREEDY, "max_tokens": 100_000}))
        assert (code, error["type"]) == (504, "timeout_error")


def test_a_body_that_is_too_large(tiny: LocalModel, lossless: Any) -> None:
    with served(tiny, max_body=1000) as running:
        code, error = refusal(lambda: md.vl(endpoint=f"{running.url}/v1").detect(lossless, "cat"))
        assert (code, error["type"]) == (413, "request_too_large")


def test_the_schema_says_what_is_answered(server: Served) -> None:
    paths = server.client.get("/openapi.json").json()["paths"]
    for skill in ("caption", "query", "detect", "point", "gaze"):
        answers = paths[f"/v1/{skill}"]["post"]["responses"]
        assert {"200", "400", "401", "404", "413", "422", "429", "503", "504"} <= answers.keys()
        assert {"application/json", "text/event-stream"} == answers["200"]["content"].keys()
        assert "ErrorAnswer" in json.dumps(answers["422"])
