"""Client for the Moondream API, with replies of Moondream's cloud, Moondream Station and `moondream-cv serve`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moondream_cv.backends import MoondreamAPI
from moondream_cv.errors import BackendError
from moondream_cv.requests import Caption, Query, Reasoning
from tests.helpers.remote_server import RemoteServer, Reply, event_stream

BOX = {"x_min": -0.01, "y_min": 0.2, "x_max": 0.5, "y_max": 1}
REASONING = {"text": "Two cats.", "grounding": [{"start_idx": 0, "end_idx": 8, "points": [[0.5, 0.25]]}]}
DONE = {"completed": True}


@pytest.fixture
def model(server: RemoteServer) -> Any:
    with MoondreamAPI(server.url, retries=0, has_scores=True) as connected:
        yield connected


@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/", "/v1//"])
def test_version_is_appended_to_the_url(server: RemoteServer, frame: np.ndarray, path: str) -> None:
    server.on("/v1/caption", Reply({"caption": "a patch"}))
    with MoondreamAPI(server.url + path) as model:
        assert model.caption(frame)["caption"] == "a patch"
        assert repr(model) == f"MoondreamAPI('{server.url}/v1')"


@pytest.mark.parametrize("key", ["secret", None])
def test_api_key_is_sent_as_a_header(
    server: RemoteServer, frame: np.ndarray, monkeypatch: pytest.MonkeyPatch, key: str | None
) -> None:
    monkeypatch.setenv("MOONDREAM_API_KEY", "from-environment")
    server.on("/v1/caption", Reply({"caption": "a patch"}))
    with MoondreamAPI(server.url, api_key=key) as model:
        model.caption(frame)
    with MoondreamAPI(server.url, api_key="") as model:
        model.caption(frame)
    headers = [request.headers for request in server.requests]
    assert headers[0]["x-moondream-auth"] == (key or "from-environment")
    assert "x-moondream-auth" not in headers[1]


@pytest.mark.parametrize(
    ("method", "arguments", "sent", "reply", "result"),
    [
        ("caption", {}, {"length": "normal"}, {"caption": "a"}, {"caption": "a", "truncated": False}),
        (
            "caption",
            {"length": "long", "settings": {"temperature": 0, "max_tokens": 5, "top_p": 0.3}},
            {"length": "long", "settings": {"temperature": 0, "max_tokens": 5}},
            {"caption": "a", "truncated": True, "logprob": -0.5, "request_id": "x", "_stats": {}},
            {"caption": "a", "truncated": True, "logprob": -0.5},
        ),
        ("caption", {}, {"length": "normal"}, {"caption": "", "finish_reason": "length"}, {"truncated": True}),
        ("query", {"question": "q"}, {"question": "q"}, {"answer": "a"}, {"answer": "a"}),
        (
            "query",
            {"question": "q", "reasoning": True, "spatial_refs": [(0.5, 0.5), (0, 0, 1, 1)]},
            {"question": "q", "reasoning": True, "spatial_refs": [[0.5, 0.5], [0, 0, 1, 1]]},
            {"answer": "a", "reasoning": REASONING},
            {
                "answer": "a",
                "reasoning": {**REASONING, "grounding": [{**REASONING["grounding"][0], "points": [(0.5, 0.25)]}]},
            },
        ),
        (
            "detect",
            {"object": "cat", "settings": {"max_objects": 2, "variant": "mine@3"}},
            {"object": "cat", "settings": {"max_objects": 2}, "model": "mine@3"},
            {"objects": [BOX, {**BOX, "confidence": 0.25}]},
            {"objects": [{**BOX, "confidence": 1.0}, {**BOX, "confidence": 0.25}], "truncated": True},
        ),
        ("detect", {"object": "cat"}, {"object": "cat"}, {"objects": []}, {"objects": [], "truncated": False}),
        (
            "detect",
            {"object": "cat", "settings": {"max_objects": 1}},
            {"object": "cat", "settings": {"max_objects": 1}},
            {"objects": [BOX, BOX, BOX], "truncated": False},
            {"objects": [{**BOX, "confidence": 1.0}], "truncated": True},
        ),
        (
            "point",
            {"object": "cat"},
            {"object": "cat"},
            {"points": [{"x": 0.5, "y": 0, "confidence": 0.75}], "count": 1, "truncated": False},
            {"points": [{"x": 0.5, "y": 0, "confidence": 0.75}], "truncated": False},
        ),
    ],
)
def test_request_and_response_format(
    server: RemoteServer,
    model: MoondreamAPI,
    frame: np.ndarray,
    method: str,
    arguments: dict[str, Any],
    sent: dict[str, Any],
    reply: dict[str, Any],
    result: dict[str, Any],
) -> None:  # fmt: skip
    server.on(f"/v1/{method}", Reply(reply))
    got = getattr(model, method)(frame, **arguments)
    assert {key: got[key] for key in result} == result
    (request,) = server.requests
    assert request.body.pop("image_url").startswith("data:image/jpeg;base64,/9j/")
    assert request.body == sent


def test_query_without_an_image(server: RemoteServer, model: MoondreamAPI) -> None:
    server.on("/v1/query", Reply({"answer": "4"}))
    assert model.query(question="2 + 2?")["answer"] == "4"
    assert server.requests[0].body == {"question": "2 + 2?"}


def test_model_argument_takes_precedence_over_variant(server: RemoteServer, frame: np.ndarray) -> None:
    server.on("/v1/caption", Reply({"caption": "a"}))
    with MoondreamAPI(server.url, model="moondream3-preview") as model:
        model.caption(frame, settings={"variant": "mine"})
    assert server.requests[0].body["model"] == "moondream3-preview"
    assert server.requests[0].body["settings"] == {"variant": "mine"}


def test_confidence_is_one_if_the_server_has_no_scores(server: RemoteServer, frame: np.ndarray) -> None:
    server.on("/v1/detect", Reply({"objects": [{**BOX, "confidence": 0.25}]}))
    with MoondreamAPI(server.url) as model:  # without a list of models
        assert model.detect(frame, "cat")["objects"] == [{**BOX, "confidence": 1.0}]
        assert model.has_scores is False


@pytest.mark.parametrize(
    ("method", "reply", "message"),
    [
        ("detect", {"points": []}, "no valid 'objects', expected a list"),
        ("detect", {"objects": {"x_min": 1}}, "no valid 'objects', expected a list"),
        ("detect", {"objects": [3]}, "invalid entry in 'objects', expected an object: 3"),
        ("detect", {"objects": [{**BOX, "x_max": None}]}, "invalid 'x_max', expected a number: None"),
        ("detect", {"objects": [{"x_min": 1}]}, "invalid 'y_min', expected a number: None"),
        ("detect", {"objects": [{**BOX, "x_max": "0.5"}]}, "invalid 'x_max', expected a number: '0.5'"),
        ("detect", {"objects": [{**BOX, "x_max": True}]}, "invalid 'x_max', expected a number: True"),
        ("detect", {"objects": [{**BOX, "x_max": float("nan")}]}, "invalid 'x_max', expected a finite number: nan"),
        ("detect", {"objects": [{**BOX, "x_max": float("inf")}]}, "invalid 'x_max', expected a finite number: inf"),
        ("detect", {"objects": [{**BOX, "x_max": 10**400}]}, "invalid 'x_max', expected a finite number: inf"),
        (
            "detect",
            {"objects": [{**BOX, "confidence": 1.5}]},
            "invalid 'confidence', expected a number between 0 and 1: 1.5",
        ),
        ("detect", {"objects": [{**BOX, "confidence": "high"}]}, "invalid 'confidence', expected a number: 'high'"),
        ("point", {"points": None}, "no valid 'points', expected a list"),
        ("point", {"points": [[0.5, 0.5]]}, r"invalid entry in 'points', expected an object: \[0.5, 0.5\]"),
        ("query", {"answer": ["a"]}, "no valid 'answer', expected a string"),
        ("query", {"answer": "a", "reasoning": 5}, "invalid reasoning: 5"),
        ("query", {"answer": "a", "reasoning": {"grounding": []}}, "no valid 'text', expected a string"),
        (
            "query",
            {"answer": "a", "reasoning": {"text": "t", "grounding": "x"}},
            "invalid grounding, expected a list: 'x'",
        ),
        ("query", {"answer": "a", "reasoning": {"text": "t", "grounding": [{}]}}, "invalid grounding: {}"),
        (
            "query",
            {"answer": "a", "reasoning": {"text": "t", "grounding": [{"points": [[1, 2, 3]]}]}},
            r"invalid grounding point, expected \[x, y\]: \[1, 2, 3\]",
        ),
        ("query", {"answer": "a", "logprob": float("nan")}, "invalid 'logprob', expected a finite number: nan"),
    ],
)
def test_invalid_responses_raise(
    server: RemoteServer, model: MoondreamAPI, frame: np.ndarray, method: str, reply: Any, message: str
) -> None:
    server.on(f"/v1/{method}", Reply(reply))
    with pytest.raises(BackendError, match=message) as caught:
        getattr(model, method)(frame, "cat")
    assert str(caught.value).startswith(f"{server.url}/v1/{method} returned")


@pytest.mark.parametrize(
    ("answer", "pieces"),
    [
        (event_stream({"chunk": "a "}, {"chunk": "cat"}, DONE), ["a ", "cat"]),
        (event_stream({"chunk": "a"}, {"stats": {}}, {"chunk": ""}, {"chunk": "b", "completed": True}), ["a", "b"]),
        (event_stream({"chunk": "a"}, done=True), ["a"]),
        (event_stream(b": hello", b"event: x", b'data:{"chunk": "a"}\r', DONE), ["a"]),
        (event_stream('{"chunk": "a\u2028b\x85"}'.join(["data: ", ""]).encode(), DONE), ["a\u2028b\x85"]),
        (event_stream(DONE), []),
        (Reply({"caption": "all at once"}), ["all at once"]),
    ],
)  # fmt: skip
def test_streamed_text(
    server: RemoteServer, model: MoondreamAPI, frame: np.ndarray, answer: Reply, pieces: list[str]
) -> None:
    server.on("/v1/caption", answer)
    assert list(model.caption(frame, stream=True)["caption"]) == pieces
    assert server.requests[0].body["stream"] is True


@pytest.mark.parametrize(
    ("answer", "before", "message"),
    [
        (
            event_stream({"chunk": "a"}),
            ["a"],
            "closed the connection early: the stream ended before the text was complete",
        ),
        (event_stream({"chunk": "a"}, {"error": {"message": "out of memory"}}), ["a"], "an error: out of memory"),
        (event_stream({"chunk": "a"}, b"data: {"), ["a"], "streamed invalid JSON: {"),
        (event_stream({"chunk": "a"}, [1]), ["a"], "streamed no JSON object"),
        (event_stream({"chunk": "a"}, {"chunk": 5}), ["a"], "streamed an invalid chunk, expected a string: 5"),
    ],
)
def test_stream_errors_are_raised(
    server: RemoteServer, model: MoondreamAPI, frame: np.ndarray, answer: Reply, before: list[str], message: str
) -> None:
    server.on("/v1/caption", answer)
    pieces = model.stream(Caption(frame))
    assert [next(pieces) for _ in before] == before
    with pytest.raises(BackendError, match=message):
        next(pieces)


def test_interrupted_stream_raises(server: RemoteServer, model: MoondreamAPI, frame: np.ndarray) -> None:
    half = event_stream({"chunk": "a"}).body
    server.on("/v1/caption", Reply(half, kind="text/event-stream", fault="cut"))
    with pytest.raises(BackendError, match="closed the connection early"):
        list(model.stream(Caption(frame)))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (Reply({"error": {"message": "no"}}, 400), "returned status 400: no"),
        (Reply({"error": "Model not loaded"}), "returned an error: Model not loaded"),
        (event_stream({"error": "no"}), "returned an error: no"),
        (Reply(fault="reset"), "closed the connection early"),
    ],
)
def test_errors_before_the_first_part_are_raised_by_the_call(
    server: RemoteServer, model: MoondreamAPI, frame: np.ndarray, answer: Reply, message: str
) -> None:
    server.on("/v1/caption", answer)
    with pytest.raises(BackendError, match=message):
        model.stream(Caption(frame))


def test_opening_a_stream_is_retried(server: RemoteServer, frame: np.ndarray) -> None:
    server.on("/v1/caption", Reply({}, 503), Reply(fault="reset"), event_stream({"chunk": "a"}, DONE))
    with MoondreamAPI(server.url, backoff=0.001) as model:
        assert list(model.stream(Caption(frame))) == ["a"]
    assert len(server.requests) == 3


def test_reasoning_is_the_first_part_of_a_stream(server: RemoteServer, model: MoondreamAPI, frame: np.ndarray) -> None:
    server.on(
        "/v1/query", event_stream({"reasoning": REASONING}, {"chunk": "2"}, DONE), event_stream({"chunk": "2"}, DONE)
    )
    reply = model.query(frame, "How many?", reasoning=True, stream=True)
    assert reply["reasoning"]["text"] == "Two cats."
    assert list(reply["answer"]) == ["2"]
    # A server that returns no reasoning.
    assert list(model.stream(Query(frame, "How many?", reasoning=True))) == [Reasoning(""), "2"]
