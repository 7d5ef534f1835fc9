"""Client for OpenAI-compatible servers, with and without support for boxes and points."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from moondream_cv.backends import OpenAICompatible
from moondream_cv.errors import BackendError, UnsupportedSkill
from moondream_cv.requests import Query, Reasoning
from tests.helpers.remote_server import RemoteServer, Reply, event_stream

CHAT = "/v1/chat/completions"
BOX = {"x_min": 0.1, "y_min": 0.2, "x_max": 0.5, "y_max": 1.0, "confidence": 0.25}


def completion(content: Any, finish_reason: str = "stop", **choice: Any) -> Reply:
    """Return a chat completion; content other than text is sent as JSON."""
    text = content if content is None or isinstance(content, str) else json.dumps(content)
    message = {"role": "assistant", "content": text, **choice.pop("message", {})}
    first = {"index": 0, "message": message, "finish_reason": finish_reason, **choice}
    return Reply({"id": "1", "object": "chat.completion", "model": "m", "error": None, "choices": [first]})


def chunk(text: str | None, finish_reason: str | None = None) -> dict[str, Any]:
    delta = {} if text is None else {"content": text}
    return {"object": "chat.completion.chunk", "choices": [{"delta": delta, "finish_reason": finish_reason}]}


@pytest.fixture
def model(server: RemoteServer) -> Any:
    with OpenAICompatible(server.url, retries=0, has_scores=True, model="m", api_key="secret") as connected:
        yield connected


@pytest.mark.parametrize(
    ("path", "route"),
    [("", CHAT), ("/", CHAT), ("/v1/", CHAT), ("/v1beta/openai", "/v1beta/openai/chat/completions")],
)
def test_version_is_appended_to_a_url_without_path(server: RemoteServer, path: str, route: str) -> None:
    server.on(route, completion("4"))
    with OpenAICompatible(server.url + path, model="m") as model:
        assert model.query(question="2 + 2?")["answer"] == "4"


@pytest.mark.parametrize(
    ("method", "arguments", "text", "extras"),
    [
        ("query", {"question": "How many?"}, "How many?", {}),
        ("query", {"question": "q", "settings": {"temperature": 0, "max_tokens": 9, "seed": 1}}, "q",
         {"temperature": 0, "max_tokens": 9, "seed": 1}),
        ("caption", {}, "Describe this image.", {}),
        ("caption", {"length": "short"}, "Describe this image in one short sentence.", {}),
        ("caption", {"length": "long"}, "Describe this image at length and in detail.", {}),
        ("caption", {"settings": {"variant": "mine", "max_crops": 2}}, "Describe this image.",
         {"variant": "mine", "max_crops": 2}),
    ],
)  # fmt: skip
def test_request_format_of_query_and_caption(
    server: RemoteServer,
    model: OpenAICompatible,
    frame: np.ndarray,
    method: str,
    arguments: dict[str, Any],
    text: str,
    extras: dict[str, Any],
) -> None:
    server.on(CHAT, completion("It is blue.", "length"))
    reply = getattr(model, method)(frame, **arguments)
    assert reply == {"answer" if method == "query" else "caption": "It is blue.", "truncated": True}
    (request,) = server.requests
    assert request.headers["authorization"] == "Bearer secret"
    (message,) = request.body.pop("messages")
    image, words = message["content"]
    assert message["role"] == "user"
    assert image["type"] == "image_url"
    assert image["image_url"]["url"].startswith("data:image/jpeg;base64,/9j/")
    assert words == {"type": "text", "text": text}
    assert request.body == {"model": "m", **extras}


def test_query_without_an_image(server: RemoteServer, model: OpenAICompatible) -> None:
    tokens = {"logprobs": {"content": [{"token": "4", "logprob": -0.5}, {"token": "!", "logprob": -1.5}]}}
    server.on(CHAT, completion("4!", **tokens))
    assert model.query(question="2 + 2?") == {"answer": "4!", "truncated": False, "logprob": -1.0}
    assert server.requests[0].body["messages"] == [{"role": "user", "content": "2 + 2?"}]


@pytest.mark.parametrize(
    ("models", "used"),
    [
        (Reply({"object": "list", "data": [{"id": "first"}, {"id": "second"}]}), "first"),
        (Reply({"data": [{"name": "no id"}, {"id": 5}, {"id": "third"}]}), "third"),
        (Reply({"data": []}), "moondream2"),
        (Reply({}, 404), "moondream2"),
        (Reply({}, fault="reset"), "moondream2"),
    ],
)
def test_model_defaults_to_the_first_listed_one(server: RemoteServer, models: Reply, used: str) -> None:
    server.on(CHAT, completion("4")).on("/v1/models", models)
    with OpenAICompatible(server.url) as model:
        model.run([Query(None, "?"), Query(None, "?", settings={"variant": "mine"})])  # type: ignore[arg-type]
    assert {request.body["model"] for request in server.to(CHAT)} == {used, "mine"}
    assert len(server.to("/v1/models")) == 1


@pytest.mark.parametrize(
    ("message", "reasoning"),
    [
        ({"reasoning": {"text": "Hm.", "grounding": []}}, {"text": "Hm.", "grounding": []}),
        ({"reasoning": "Hm."}, {"text": "Hm.", "grounding": []}),
    ],
)
def test_reasoning_is_parsed(
    server: RemoteServer, model: OpenAICompatible, frame: np.ndarray, message: dict[str, Any], reasoning: Any
) -> None:
    server.on(CHAT, completion("4", message=message))
    assert model.query(frame, "?", reasoning=True)["reasoning"] == reasoning
    assert server.requests[0].body["reasoning"] is True
    assert list(model.stream(Query(frame, "?", reasoning=True))) == [Reasoning("Hm."), "4"]


def test_unsupported_arguments_raise(server: RemoteServer, model: OpenAICompatible, frame: np.ndarray) -> None:
    server.on(CHAT, completion("4"))
    with pytest.raises(UnsupportedSkill, match="cannot return reasoning from this server.*use MoondreamAPI"):  # noqa: RUF043
        model.query(frame, "?", reasoning=True)
    with pytest.raises(UnsupportedSkill, match="cannot use spatial_refs; use MoondreamAPI"):
        model.query(frame, "?", spatial_refs=[(0.5, 0.5)])
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("method", "key", "names", "item"),
    [
        ("detect", "objects", ["x_min", "y_min", "x_max", "y_max", "confidence"], BOX),
        ("point", "points", ["x", "y", "confidence"], {"x": 0.5, "y": 0.25, "confidence": 0.75}),
    ],
)
@pytest.mark.parametrize("most", [50, 1])
def test_detect_and_point_use_json_schemas(
    server: RemoteServer,
    model: OpenAICompatible,
    frame: np.ndarray,
    method: str,
    key: str,
    names: list[str],
    item: dict[str, float],
    most: int,
) -> None:
    server.on(CHAT, completion({key: [item, item], "truncated": False}))
    reply = getattr(model, method)(frame, "red car", settings={"max_objects": most})
    assert reply == {key: [item] * min(most, 2), "truncated": most == 1}
    (request,) = server.requests
    assert request.body["messages"][0]["content"][1] == {"type": "text", "text": "red car"}
    form = request.body["response_format"]
    assert (form["type"], form["json_schema"]["name"]) == ("json_schema", f"moondream_{method}")
    schema = form["json_schema"]["schema"]
    items = schema["properties"][key]
    assert form["json_schema"]["strict"] is True
    assert schema["required"] == [key, "truncated"]
    assert items["items"]["required"] == list(items["items"]["properties"]) == names
    assert request.body.get("max_objects") == (1 if most == 1 else None)


@pytest.mark.parametrize("content", ["I see a car at the left.", "", None, "[1, 2]", "{}", '{"points"', "[" * 100_000])
def test_text_instead_of_json_raises(
    server: RemoteServer, model: OpenAICompatible, frame: np.ndarray, content: str | None
) -> None:
    server.on(CHAT, completion(content))
    with pytest.raises(
        UnsupportedSkill,
        match=r"returned text instead of JSON with objects: .*use MoondreamAPI or a model from moondream_cv.load",
    ):
        model.detect(frame, "car")


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (
            Reply({"error": {"message": "no such model", "type": "x", "code": None}}, 404),
            "returned status 404: no such model",
        ),
        (Reply({"error": {"message": "boom"}}), "returned an error: boom"),
        (Reply({"choices": []}), "returned no choices"),
        (Reply({"choices": None}), "returned no choices"),
        (Reply({"choices": ["a"]}), "returned no choices"),
        (Reply({"choices": [{"text": "a"}]}), "a choice without a message"),
        (completion(None), "no valid 'content', expected a string"),
    ],
)
def test_invalid_responses_raise(server: RemoteServer, model: OpenAICompatible, answer: Reply, error: str) -> None:
    server.on(CHAT, answer)
    with pytest.raises(BackendError, match=error):
        model.query(question="?")


def test_invalid_boxes_raise(server: RemoteServer, model: OpenAICompatible, frame: np.ndarray) -> None:
    server.on(CHAT, completion({"objects": [{**BOX, "x_min": float("nan")}]}))
    with pytest.raises(BackendError, match="invalid 'x_min', expected a finite number: nan"):
        model.detect(frame, "car")


@pytest.mark.parametrize(
    ("answer", "pieces"),
    [
        (event_stream(chunk(""), chunk("a "), chunk("cat"), chunk(None, "stop"), done=True), ["a ", "cat"]),
        (event_stream(chunk("a"), chunk(None, "stop")), ["a"]),
        (event_stream(chunk("a"), done=True), ["a"]),
        (event_stream(chunk("a"), chunk(None, "stop"), {"choices": [], "usage": {}}, done=True), ["a"]),
        (completion("all at once"), ["all at once"]),
    ],
)
def test_streamed_text(server: RemoteServer, model: OpenAICompatible, answer: Reply, pieces: list[str]) -> None:
    server.on(CHAT, answer)
    assert list(model.query(question="?", stream=True)["answer"]) == pieces
    assert server.requests[0].body["stream"] is True


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (event_stream(chunk("a")), "the stream ended before the text was complete"),
        (event_stream(chunk("a"), {"error": {"message": "boom"}}), "returned an error: boom"),
        (event_stream(chunk("a"), {"x": 1}), "returned no choices"),
        (
            event_stream(chunk("a"), {"choices": [{"delta": {"content": 5}}]}),
            "streamed an invalid chunk, expected a string: 5",
        ),
    ],
)
def test_stream_errors_are_raised(server: RemoteServer, model: OpenAICompatible, answer: Reply, error: str) -> None:
    server.on(CHAT, answer)
    pieces = model.stream(Query(None, "?"))
    assert next(pieces) == "a"
    with pytest.raises(BackendError, match=error):
        next(pieces)
