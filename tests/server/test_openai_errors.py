"""OpenAI's API with OpenAI's client: models, rejected requests, statuses and image URLs."""

from __future__ import annotations

import http.server
import io
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from PIL import Image

from moondream_cv.engine.local_model import LocalModel
from moondream_cv.errors import BackendError, UnsupportedSkill
from moondream_cv.requests import ErrorResult, QueryResult, Request, Result
from tests.helpers.held_server import held_server
from tests.helpers.openai_client import (
    GREEDY,
    LONG,
    QUESTION,
    ask,
    assistant,
    client_of,
    image,
    named,
    openai,
    text,
    user,
)
from tests.helpers.served import Served, data_uri, served
from tests.helpers.waiting import until


@pytest.fixture(scope="module")
def client(server: Served) -> Iterator[Any]:
    with client_of(server) as opened:
        yield opened


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny", "moondream2", "vikhyatk/moondream2", "moondream3-preview", "Moondream-2B"])
def test_names_of_the_served_model_are_accepted(client: Any, name: str) -> None:
    reply = client.chat.completions.create(model=name, messages=[user(QUESTION)], max_tokens=2)
    assert reply.model == "tiny"
    assert client.models.retrieve(name).id == "tiny"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpt-4o", "'gpt-4o' does not exist; this server serves 'tiny'"),
        ("moondream3-preview/abc@100", "no finetunes and serves 'tiny'"),
        ("Tiny", "'Tiny' does not exist"),
    ],
)
def test_unknown_models_get_404(client: Any, name: str, message: str) -> None:
    for call in (
        lambda: client.chat.completions.create(model=name, messages=[user(QUESTION)]),
        lambda: client.models.retrieve(name),
    ):
        with pytest.raises(openai.NotFoundError, match=message) as caught:
            call()
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_served_name_can_have_a_revision(tiny: LocalModel) -> None:
    name = "vikhyatk/moondream2@2025-06-21"
    with served(tiny, name=name) as running, client_of(running) as client:
        assert client.models.retrieve(name).id == name


def test_models_can_be_listed_and_retrieved(client: Any) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("tiny", "model", "moondream-cv")
    assert model == client.models.retrieve("tiny")


# --- rejected requests ------------------------------------------------------------------------------------------------


def schema(value: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": value}}


def tool(**function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "report", **function}}


def forced(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def with_parameters(parameters: Any) -> dict[str, Any]:
    return {"tools": [tool(parameters=parameters)], "tool_choice": forced("report")}


UNSUPPORTED: dict[str, Any] = {
    "n": ({"n": 2}, "n", "unsupported_parameter"),
    "tools": ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "unsupported_parameter"),
    "tools with auto": ({"tools": [tool()], "tool_choice": "auto"}, "tools", "unsupported_parameter"),
    "tools with none": ({"tools": [tool()], "tool_choice": "none"}, "tools", "unsupported_parameter"),
    "allowed tools": (
        {
            "tools": [tool()],
            "tool_choice": {
                "type": "allowed_tools",
                "allowed_tools": {"mode": "required", "tools": [forced("report")]},
            },
        },
        "tools",
        "unsupported_parameter",
    ),
    "several tools with required": (
        {"tools": [tool(), tool(name="other")], "tool_choice": "required"},
        "tools",
        "unsupported_parameter",
    ),
    "tools with a schema": (
        {"tools": [tool()], "tool_choice": "required", "response_format": schema({"type": "object"})},
        "tools",
        "unsupported_parameter",
    ),
    "tools with boxes": (
        {"tools": [tool()], "tool_choice": forced("report"), "response_format": named("moondream_detect")},
        "tools",
        "unsupported_parameter",
    ),
    "boxes as a tool": (
        {"tools": [tool(name="moondream_detect")], "tool_choice": "required"},
        "tools",
        "unsupported_parameter",
    ),
    "tool_choice without tools": ({"tool_choice": forced("report")}, "tool_choice", "unsupported_parameter"),
    "tool_choice with another name": ({"tools": [tool()], "tool_choice": forced("other")}, "tool_choice", None),
    "tool_choice with a name that is not unique": (
        {"tools": [tool(), tool()], "tool_choice": forced("report")},
        "tool_choice",
        None,
    ),
    "custom tool": ({"tools": [{"type": "custom", "custom": {"name": "f"}}], "tool_choice": "required"}, "tools", None),
    "tool without a name": ({"tools": [{"type": "function"}], "tool_choice": "required"}, "tools", None),
    "tool with an unprintable name": ({"tools": [tool(name="\u2028")], "tool_choice": "required"}, "tools", None),
    "parameters that are a list": (with_parameters([]), "tools", None),
    "parameters of another type": (with_parameters({"type": "array"}), "tools", None),
    "parameters without an object": (with_parameters({"enum": [1, 2]}), "tools", None),
    "parameters with an unknown type": (with_parameters({"properties": {"a": {"type": "person"}}}), "tools", None),
    "parameters with an unsupported keyword": (with_parameters({"not": {"required": ["a"]}}), "tools", None),
    "large parameters": (with_parameters({"properties": {"a": {"enum": ["x" * 65536]}}}), "tools", None),
    "functions": ({"functions": [{"name": "f"}]}, "functions", "unsupported_parameter"),
    "logprobs": ({"logprobs": True}, "logprobs", "unsupported_parameter"),
    "top_logprobs": ({"top_logprobs": 3}, "top_logprobs", "unsupported_parameter"),
    "modalities": ({"modalities": ["text", "audio"]}, "modalities", "unsupported_parameter"),
    "presence_penalty": ({"presence_penalty": 0.5}, "presence_penalty", "unsupported_parameter"),
    "frequency_penalty": ({"frequency_penalty": -1}, "frequency_penalty", "unsupported_parameter"),
    "logit_bias": ({"logit_bias": {"5": 10}}, "logit_bias", "unsupported_parameter"),
    "verbosity": ({"verbosity": "low"}, "verbosity", "unsupported_parameter"),
    "reasoning_effort": ({"reasoning_effort": "high"}, "reasoning_effort", "unsupported_parameter"),
    "web_search_options": ({"web_search_options": {}}, "web_search_options", "unsupported_parameter"),
    "tool_choice": ({"tool_choice": "required"}, "tool_choice", "unsupported_parameter"),
    "best_of": ({"extra_body": {"best_of": 2}}, "best_of", "unsupported_parameter"),
    "top_k": ({"extra_body": {"top_k": 5}}, "top_k", "unsupported_parameter"),
    "min_p": ({"extra_body": {"min_p": 0.1}}, "min_p", "unsupported_parameter"),
    "repetition_penalty": ({"extra_body": {"repetition_penalty": 1.1}}, "repetition_penalty", "unsupported_parameter"),
    "guided_json": ({"extra_body": {"guided_json": {"type": "object"}}}, "guided_json", "unsupported_parameter"),
    "five stop strings": ({"stop": ["a", "b", "c", "d", "e"]}, "stop", None),
    "empty stop string": ({"stop": ""}, "stop", None),
    "long stop string": ({"stop": "a" * 257}, "stop", None),
    "stop of numbers": ({"stop": [1]}, "stop", None),
    "stop with boxes": (
        {"stop": "a", "response_format": named("moondream_detect")},
        "stop",
        "unsupported_parameter",
    ),
    "audio": ({"audio": {"voice": "alloy", "format": "mp3"}}, "audio", "unsupported_parameter"),
    "other format": ({"response_format": {"type": "grammar"}}, "response_format", "unsupported_response_format"),
    "no schema in json_schema": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
        "response_format",
        None,
    ),
    "unknown type in the schema": ({"response_format": schema({"type": "person"})}, "response_format", None),
    "unsupported keyword": ({"response_format": schema({"not": {"type": "string"}})}, "response_format", None),
    "unsatisfiable schema": (
        {"response_format": schema({"type": "integer", "minimum": 2, "maximum": 1})},
        "response_format",
        None,
    ),
    "schema that is a list": ({"response_format": schema([])}, "response_format", None),
    "large schema": ({"response_format": schema({"enum": ["x" * 65536]})}, "response_format", None),
    "no schema": ({"response_format": {"type": "json_schema"}}, "response_format", "unsupported_response_format"),
    "temperature": ({"temperature": -1}, "temperature", None),
    "top_p": ({"top_p": 1.5}, "top_p", None),
    "max_tokens": ({"max_tokens": 0}, "max_tokens", None),
    "seed": ({"seed": -1}, "seed", None),
    "max_crops": ({"extra_body": {"max_crops": 0}}, "max_crops", None),
    "max_objects": ({"extra_body": {"max_objects": 0}}, "max_objects", None),
    "wrong type": ({"extra_body": {"max_tokens": "many"}}, "max_tokens", None),
    "no messages": ({"messages": []}, "messages", None),
    "no user": ({"messages": [assistant("Hello.")]}, "messages", None),
    "no text": ({"messages": [user(" ")]}, "messages", None),
    "no image_url": ({"messages": [user(text("?"), {"type": "image_url"})]}, "messages", None),
    "role": ({"messages": [{"role": "robot", "content": "?"}]}, "messages", None),
    "input_audio": (
        {"messages": [user(text("?"), {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}})]},
        "messages",
        "unsupported_content",
    ),
    "no image": ({"response_format": named("moondream_detect")}, None, None),
    "bad image": ({"messages": [user(text("?"), image("data:image/png;base64,AAAA"))]}, None, "invalid_image"),
    "private image": ({"messages": [user(text("?"), image("http://127.0.0.1:9/a.png"))]}, None, "invalid_image"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_requests_are_rejected(client: Any, name: str) -> None:
    options, param, code = UNSUPPORTED[name]
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, **{"messages": [user(QUESTION)], **options})
    assert (caught.value.param, caught.value.code, caught.value.type) == (param, code, "invalid_request_error")
    assert caught.value.body["message"]


def test_invalid_parameters_of_a_tool_are_rejected_before_a_stream_starts(client: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="tools: the JSON schema is invalid") as caught:
        ask(client, [user(QUESTION)], stream=True, **with_parameters({"properties": {"a": {"type": "person"}}}))
    assert caught.value.param == "tools"


NEUTRAL: dict[str, Any] = {
    "n": 1,
    "stop": [],
    "presence_penalty": 0,
    "frequency_penalty": 0.0,
    "logit_bias": {},
    "verbosity": "medium",
    "reasoning_effort": "none",
    "tool_choice": "none",
    "parallel_tool_calls": False,
    "user": "me",
    "store": False,
    "metadata": {"run": "1"},
    "service_tier": "auto",
    "prediction": {"type": "content", "content": "2"},
    "extra_body": {"top_k": -1, "min_p": 0, "repetition_penalty": 1.0, "best_of": 1, "guided_json": None},
}


def test_neutral_parameters_do_not_change_the_answer(client: Any) -> None:
    plain, full = ask(client, [user(QUESTION)]), ask(client, [user(QUESTION)], **NEUTRAL)
    assert full.choices[0].message == plain.choices[0].message


@pytest.mark.parametrize("apart", [False, True], ids=["in one message", "in two messages"])
def test_several_images_are_rejected_for_boxes(client: Any, scene_image: Image.Image, uri: str, apart: bool) -> None:
    other = image(data_uri(scene_image.rotate(180)))
    messages = (
        [user(image(uri), text("?")), user(other, text("cat"))] if apart else [user(image(uri), other, text("cat"))]
    )
    with pytest.raises(openai.BadRequestError, match="detect supports one image per request, got 2") as caught:
        ask(client, messages, response_format=named("moondream_detect"))
    assert caught.value.code == "multiple_images_not_supported"


INVALID_CONVERSATIONS = {
    "too many images": (lambda uri: [user(*[image(uri)] * 17, text("?"))], "at most 16 images, got 17"),
    "too long": (
        lambda uri: [user(*[image(uri)] * 9, text(QUESTION))],
        r"at most 512 tokens, got \d+, of which images take 576 \(64 each\); leave out earlier turns or images",
    ),
    "image of the assistant": (
        lambda uri: [user("?"), assistant([image(uri)]), user("?")],
        "images are supported in user messages only, got one in a message of the role 'assistant'",
    ),
    "answer at the end": (lambda uri: [user("?"), assistant("Yes.")], "the last message must be a question"),
}


@pytest.mark.parametrize("name", INVALID_CONVERSATIONS)
def test_invalid_conversations_are_rejected(client: Any, uri: str, name: str) -> None:
    messages, match = INVALID_CONVERSATIONS[name]
    with pytest.raises(openai.BadRequestError, match=match):
        ask(client, messages(uri))


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'{"messages": 3}', b'{"messages": [{"role": "user", "content": 3}]}']
)
def test_invalid_bodies_get_400(server: Served, body: bytes) -> None:
    answer = server.client.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


# --- statuses ---------------------------------------------------------------------------------------------------------


def test_client_sends_api_keys(tiny: LocalModel) -> None:
    with served(tiny, api_keys=("right-key",)) as locked:
        with client_of(locked, api_key="wrong-key") as client, pytest.raises(openai.AuthenticationError) as caught:
            ask(client, [user(QUESTION)])
        assert (caught.value.status_code, caught.value.code) == (401, "invalid_api_key")
        assert "key" in caught.value.body["message"]
        assert "wrong-key" not in str(caught.value)
        with client_of(locked, api_key="right-key") as client:
            assert ask(client, [user(QUESTION)], max_tokens=2).usage.completion_tokens > 0


def test_oversized_body_gets_413(tiny: LocalModel) -> None:
    with served(tiny, max_body=10_000) as small, client_of(small) as client:
        with pytest.raises(openai.APIStatusError, match="exceeds 10,000 bytes") as caught:
            ask(client, [user("x" * 20_000)])
        assert caught.value.status_code == 413


def test_slow_request_gets_504(uri: str) -> None:
    with held_server(timeout=0.5) as (_, slow), client_of(slow) as client:
        with pytest.raises(openai.InternalServerError, match=r"longer than 0\.5 seconds") as caught:
            ask(client, [user(text(QUESTION), image(uri))], **LONG)
        assert (caught.value.status_code, caught.value.type) == (504, "timeout_error")


def test_loading_server_gets_503(tiny: LocalModel) -> None:
    loaded = threading.Event()

    def load() -> LocalModel:
        loaded.wait(240)
        raise RuntimeError("never mind")

    with served(load) as loading, client_of(loading) as client:
        with pytest.raises(openai.InternalServerError, match="still loading") as caught:
            ask(client, [user(QUESTION)])
        assert (caught.value.status_code, caught.value.response.headers["retry-after"]) == (503, "5")
        loaded.set()


def test_client_retries_when_the_queue_is_full() -> None:
    with held_server(queue=1) as (held, busy), ThreadPoolExecutor(2) as pool, client_of(busy) as impatient:
        first = pool.submit(ask, impatient, [user(QUESTION)], max_tokens=2)
        until(lambda: busy.service.in_flight)
        with pytest.raises(openai.RateLimitError, match="queue is full") as caught:
            ask(impatient, [user(QUESTION)])
        assert (caught.value.status_code, caught.value.code) == (429, "rate_limit_exceeded")
        assert caught.value.response.headers["retry-after"] == "1"
        with client_of(busy, max_retries=3) as patient:
            second = pool.submit(ask, patient, [user(QUESTION)], max_tokens=2)
            until(lambda: b"moondream_cv_refused_total 2.0" in busy.service.metrics.text())
            held.resume()
            assert second.result(240).choices[0].message.content == first.result(240).choices[0].message.content


@pytest.mark.parametrize("stream", [False, True])
def test_disconnect_releases_the_queue_slot(uri: str, stream: bool) -> None:
    cancelled = 'moondream_cv_skill_requests_total{outcome="cancelled",skill="query"} 1.0'
    with held_server(steps=40, queue=1) as (_, running):
        if stream:
            with client_of(running) as client:
                pieces = ask(client, [user(text(QUESTION), image(uri))], stream=True, **LONG)
                next(iter(pieces))
                pieces.close()
        for seconds in () if stream else (0.5, 5, 50):  # wait until the model has the request
            with client_of(running, timeout=seconds) as client, pytest.raises(openai.APITimeoutError):
                ask(client, [user(text(QUESTION), image(uri))], **LONG)
            until(lambda: running.service.in_flight == 0)
            if cancelled in running.client.get("/metrics").text:
                break
        until(lambda: running.service.in_flight == 0)
        assert cancelled in running.client.get("/metrics").text


# --- image URLs -------------------------------------------------------------------------------------------------------


@pytest.fixture
def site(scene_image: Image.Image) -> Iterator[str]:
    """URL of the scene on this machine."""
    file = io.BytesIO()
    scene_image.save(file, "PNG")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "image/png")
            self.end_headers()
            self.wfile.write(file.getvalue())

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}/picture.png"
        running.shutdown()


def test_image_urls_are_downloaded(tiny: LocalModel, scene_image: Image.Image, site: str) -> None:
    with served(tiny, private_urls=True) as running, client_of(running) as client:
        reply = ask(client, [user(text(QUESTION), image(site))])
    assert reply.choices[0].message.content == tiny.query(scene_image, QUESTION, settings=GREEDY)["answer"]


# --- remote models ----------------------------------------------------------------------------------------------------


class FakeRemoteModel:
    """A remote model that reports no token counts and always returns the same result."""

    skills = frozenset({"query"})
    has_scores = False

    def __init__(self, answer: Result) -> None:
        self._answer = answer

    def run(self, requests: Sequence[Request]) -> list[Result]:
        return [self._answer for _ in requests]

    def close(self) -> None:
        pass


def test_usage_is_null_without_token_counts() -> None:
    with served(FakeRemoteModel(QueryResult("a cat"))) as running, client_of(running) as client:
        reply = ask(client, [user(QUESTION)])
    assert (reply.choices[0].message.content, reply.usage) == ("a cat", None)


@pytest.mark.parametrize(
    ("error", "status", "kind", "code"),
    [
        (UnsupportedSkill("use another"), 400, "invalid_request_error", "unsupported_skill"),
        (BackendError("http://10.0.0.1 is down"), 503, "service_unavailable", None),
        (KeyError("a bug"), 500, "server_error", None),
    ],
)
def test_errors_of_a_remote_model_are_converted(error: Exception, status: int, kind: str, code: str | None) -> None:
    with (
        served(FakeRemoteModel(ErrorResult(error))) as running,
        client_of(running) as client,
        pytest.raises(openai.APIStatusError) as caught,
    ):
        ask(client, [user(QUESTION)])
    assert (caught.value.status_code, caught.value.type, caught.value.code) == (status, kind, code)
    assert "10.0.0.1" not in str(caught.value)
