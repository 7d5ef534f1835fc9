"""Answers of OpenAI's API, with OpenAI's client and the chat of Moondream's client."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any, Literal

import pytest
from PIL import Image
from pydantic import BaseModel, Field

from moondream_cv.engine.local_model import LocalModel
from moondream_cv.requests import Chat, Settings, Turn
from tests.helpers.held_server import held_server
from tests.helpers.openai_client import (
    GREEDY,
    LONG,
    QUESTION,
    SOME,
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


@pytest.fixture(scope="module")
def client(server: Served) -> Iterator[Any]:
    with client_of(server) as opened:
        yield opened


@pytest.fixture(scope="module")
def random_client(model: LocalModel) -> Iterator[Any]:
    """A client of a model with random weights, whose answers are long and differ between prompts."""
    with served(model) as running, client_of(running) as opened:
        yield opened


# --- answers ----------------------------------------------------------------------------------------------------------


def test_completion_equals_the_answer_of_the_model(
    client: Any, tiny: LocalModel, scene_image: Image.Image, uri: str
) -> None:
    reply = ask(client, [user(text(QUESTION), image(uri))])
    assert reply.choices[0].message.content == tiny.query(scene_image, QUESTION, settings=GREEDY)["answer"]
    assert (reply.object, reply.model, reply.choices[0].finish_reason) == ("chat.completion", "tiny", "stop")
    assert reply.choices[0].message.role == "assistant"
    assert reply.id.startswith("chatcmpl-")
    assert abs(reply.created - time.time()) < 600
    assert reply.usage.prompt_tokens > reply.usage.completion_tokens > 0
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens


# Messages about an image and another one, by the URLs, and the turns that they are converted to
CONVERSATIONS: dict[str, tuple[Any, Any]] = {
    "string without an image": (lambda a, b: [user(QUESTION)], lambda a, b: [Turn(QUESTION)]),
    "image first": (lambda a, b: [user(image(a), text(QUESTION))], lambda a, b: [Turn(QUESTION, images=[a])]),
    "several texts": (
        lambda a, b: [user(text("How many"), text("cats?"), image(a))],
        lambda a, b: [Turn("How many\ncats?", images=[a])],
    ),
    "detail": (
        lambda a, b: [user(text(QUESTION), {"type": "image_url", "image_url": {"url": a, "detail": "low"}})],
        lambda a, b: [Turn(QUESTION, images=[a])],
    ),
    "image as a bare string": (
        lambda a, b: [user(text(QUESTION), {"type": "image_url", "image_url": a})],
        lambda a, b: [Turn(QUESTION, images=[a])],
    ),
    "two turns": (
        lambda a, b: [user(text("What is this?"), image(a)), assistant("A scene."), user(QUESTION)],
        lambda a, b: [Turn("What is this?", "A scene.", [a]), Turn(QUESTION)],
    ),
    "two images in a message": (
        lambda a, b: [user(image(a), image(b), text(QUESTION))],
        lambda a, b: [Turn(QUESTION, images=[a, b])],
    ),
    "an image in each message": (
        lambda a, b: [user(image(a), text("A cat?")), assistant([text("Yes.")]), user(image(b), text(QUESTION))],
        lambda a, b: [Turn("A cat?", "Yes.", [a]), Turn(QUESTION, images=[b])],
    ),
    "system": (
        lambda a, b: [{"role": "system", "content": "Be brief."}, user(text(QUESTION), image(a))],
        lambda a, b: [Turn(f"Be brief.\n\n{QUESTION}", images=[a])],
    ),
    "developer and an empty system message": (
        lambda a, b: [
            {"role": "system", "content": ""},
            {"role": "developer", "content": [text("Be brief.")]},
            user(text("A cat?"), image(a)),
            assistant("Yes."),
            user(QUESTION),
        ],
        lambda a, b: [Turn("Be brief.\n\nA cat?", "Yes.", [a]), Turn(QUESTION)],
    ),
    "greeting, and an assistant without content": (
        lambda a, b: [assistant("Hello."), user(image(a)), assistant(None), user(QUESTION)],
        lambda a, b: [Turn(None, "Hello."), Turn("", images=[a]), Turn(QUESTION)],
    ),
}


@pytest.fixture(scope="module")
def conversations(
    random_client: Any, model: LocalModel, scene_image: Image.Image, uri: str
) -> dict[str, tuple[str, str]]:
    """Return the answer of the server and that of the model, by conversation."""
    other = scene_image.rotate(180)
    answers = {}
    for name, (messages, turns) in CONVERSATIONS.items():
        reply = ask(random_client, messages(uri, data_uri(other)), **SOME)
        (expected,) = model.run([Chat(tuple(turns(scene_image, other)), settings=Settings.of(SOME))])
        answers[name] = (reply.choices[0].message.content, expected.answer)  # type: ignore[union-attr]
    return answers


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversation_is_converted_to_turns(conversations: dict[str, tuple[str, str]], name: str) -> None:
    answer, expected = conversations[name]
    assert answer == expected


def test_different_conversations_get_different_answers(conversations: dict[str, tuple[str, str]]) -> None:
    assert len({answer for answer, _ in conversations.values()}) == len(CONVERSATIONS) - 2  # the same image, 3 times


@pytest.mark.parametrize("options", [{"stream": True}, {"reasoning": True}, {"json": True}])
def test_options_apply_to_the_last_question(
    random_client: Any, model: LocalModel, scene_image: Image.Image, uri: str, options: dict[str, bool]
) -> None:
    messages = [user(text("A cat?"), image(uri)), assistant("Yes."), user(text(QUESTION), image(uri))]
    turns = (Turn("A cat?", "Yes.", (scene_image,)), Turn(QUESTION, images=(scene_image,)))
    schema = {**Animal.model_json_schema(), "additionalProperties": False} if "json" in options else None
    chat = Chat(turns, "reasoning" in options, Settings.of(SOME), stop=("q",), json_schema=schema)
    (expected,) = model.run([chat])
    more: dict[str, Any] = {"extra_body": {"reasoning": "reasoning" in options}, "stop": "q"}
    if schema is not None:
        more["response_format"] = {"type": "json_schema", "json_schema": {"name": "animal", "schema": schema}}
    reply = ask(random_client, messages, stream="stream" in options, **SOME, **more)
    if "stream" in options:
        content = "".join(chunk.choices[0].delta.content or "" for chunk in reply)
    else:
        content, usage = reply.choices[0].message.content, reply.usage
        assert usage.prompt_tokens > 2 * model.config.vision.num_patches
    assert content == expected.answer  # type: ignore[union-attr]


def test_sampling_parameters_reach_the_model(
    random_client: Any, model: LocalModel, scene_image: Image.Image, uri: str
) -> None:
    hot = {**SOME, "temperature": 2.0}
    sampled = [{**hot, "seed": 1}, {**hot, "seed": 2}, {**hot, "temperature": 3.0}, {**hot, "top_p": 0.1}]
    replies = [ask(random_client, [user(text(QUESTION), image(uri))], **settings).choices[0] for settings in sampled]
    expected = [model.query(scene_image, QUESTION, settings=settings) for settings in sampled]
    assert [reply.message.content for reply in replies] == [found["answer"] for found in expected]
    assert [reply.finish_reason == "length" for reply in replies] == [found["truncated"] for found in expected]
    assert len({found["answer"] for found in expected}) == 4


def test_max_crops_reaches_the_model(random_client: Any, model: LocalModel, scene_image: Image.Image) -> None:
    large = scene_image.resize((1600, 1200))
    answers = [model.query(large, QUESTION, settings={**SOME, "max_crops": most})["answer"] for most in (1, 12)]
    asked = [user(text(QUESTION), image(data_uri(large)))]
    crops = [ask(random_client, asked, **SOME, extra_body={"max_crops": most}) for most in (1, 99)]
    assert [reply.choices[0].message.content for reply in crops] == answers
    assert answers[0] != answers[1]


@pytest.mark.parametrize("key", ["max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize("stream", [False, True])
def test_truncated_answer_ends_with_length(random_client: Any, uri: str, key: str, stream: bool) -> None:
    reply = ask(random_client, [user(text(QUESTION), image(uri))], stream=stream, **{key: 2})
    last = list(reply)[-1] if stream else reply
    assert last.choices[0].finish_reason == "length"


def test_max_completion_tokens_overrides_max_tokens(random_client: Any, uri: str) -> None:
    reply = ask(random_client, [user(text(QUESTION), image(uri))], max_tokens=100, max_completion_tokens=2)
    assert reply.usage.completion_tokens == 2


def test_reasoning_is_returned_on_request(client: Any, tiny: LocalModel, scene_image: Image.Image, uri: str) -> None:
    expected = json.loads(json.dumps(tiny.query(scene_image, QUESTION, reasoning=True, settings=GREEDY)))
    messages = [user(text(QUESTION), image(uri))]
    message = ask(client, messages, extra_body={"reasoning": True}).choices[0].message
    assert (message.content, message.reasoning) == (expected["answer"], expected["reasoning"])
    chunks = list(ask(client, messages, stream=True, extra_body={"reasoning": True}))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert [delta.reasoning for delta in deltas if hasattr(delta, "reasoning")] == [expected["reasoning"]]
    assert "".join(delta.content or "" for delta in deltas) == expected["answer"]


def test_unknown_and_irrelevant_parameters_are_ignored(client: Any, uri: str) -> None:
    messages = [user(text(QUESTION), image(uri))]
    ignored = {"user": "me", "stop": None, "n": 1, "tools": [], "logprobs": False, "response_format": {"type": "text"}}
    more = {"modalities": ["text"], "reasoning": {"effort": "low"}, "unheard_of": [1]}
    plain, full = ask(client, messages), ask(client, messages, **ignored, extra_body=more)
    assert full.choices[0].message == plain.choices[0].message


# --- streams ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_usage", [False, True])
def test_streamed_chunks_add_up_to_the_answer(random_client: Any, uri: str, with_usage: bool) -> None:
    messages = [user(text(QUESTION), image(uri))]
    whole = ask(random_client, messages, **SOME)
    options = {"stream_options": {"include_usage": True}} if with_usage else {}
    chunks = list(ask(random_client, messages, stream=True, **SOME, **options))
    if with_usage:
        last = chunks.pop()
        assert (last.choices, last.usage) == ([], whole.usage)
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks)
    choices = [chunk.choices[0] for chunk in chunks]
    assert choices[0].delta.role == "assistant"
    assert "".join(choice.delta.content or "" for choice in choices) == whole.choices[0].message.content
    assert [choice.finish_reason for choice in choices] == [None] * (len(choices) - 1) + [
        whole.choices[0].finish_reason
    ]
    assert len(choices) > 3


def test_stream_ends_with_done(server: Served, uri: str) -> None:
    body = {"messages": [user(text(QUESTION), image(uri))], "stream": True, **GREEDY}
    answer = server.post("/v1/chat/completions", body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.text.endswith("data: [DONE]\n\n")


def test_async_client_gets_completions_and_streams(random_client: Any, uri: str) -> None:
    messages = [user(text(QUESTION), image(uri))]

    async def run() -> list[str]:
        async with openai.AsyncOpenAI(base_url=random_client.base_url, api_key="any", max_retries=0) as opened:
            plain = ask(opened, messages, **SOME)
            streamed = await ask(opened, messages, stream=True, **SOME)
            pieces = [chunk.choices[0].delta.content or "" async for chunk in streamed]
            return [(await plain).choices[0].message.content, "".join(pieces)]

    assert asyncio.run(run()) == [ask(random_client, messages, **SOME).choices[0].message.content] * 2


def test_error_in_a_stream_is_its_last_event(uri: str) -> None:
    with held_server(steps=40, then_fails=True) as (_, failing), client_of(failing) as client:
        received: list[Any] = []
        with pytest.raises(openai.APIError, match="restart the server") as caught:
            received.extend(ask(client, [user(text(QUESTION), image(uri))], stream=True, **LONG))
        assert len(received) > 1
        assert caught.value.type == "service_unavailable"


def test_slow_stream_ends_with_an_error(uri: str) -> None:
    with (
        held_server(steps=40, timeout=2.0) as (_, slow),
        client_of(slow) as client,
        pytest.raises(openai.APIError, match="longer than 2 seconds"),
    ):
        list(ask(client, [user(text(QUESTION), image(uri))], stream=True, **LONG))


# --- stop strings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("as_list", [False, True])
def test_answer_ends_before_a_stop_string(random_client: Any, uri: str, stream: bool, as_list: bool) -> None:
    messages = [user(text(QUESTION), image(uri))]
    whole = ask(random_client, messages, **SOME)
    content = whole.choices[0].message.content
    stop = content[len(content) // 2 :][:3]
    reply = ask(random_client, messages, stream=stream, stop=["never in it", stop] if as_list else stop, **SOME)
    if stream:
        choices = [chunk.choices[0] for chunk in reply]
        answer, reason = "".join(choice.delta.content or "" for choice in choices), choices[-1].finish_reason
    else:
        answer, reason = reply.choices[0].message.content, reply.choices[0].finish_reason
        assert reply.usage.completion_tokens < whole.usage.completion_tokens
    assert (answer, reason) == (content[: content.index(stop)], "stop")


# --- boxes and points -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("skill", "name", "options"),
    [
        ("detect", "blue square", {}),
        ("point", "cat", {}),
        ("detect", "green star", {}),  # a missing choice
        ("detect", "red circle", {"max_objects": 1}),
        ("point", "red circle", {"max_objects": 1}),
    ],
)
def test_schema_names_return_boxes_and_points(
    client: Any, tiny: LocalModel, scene_image: Image.Image, uri: str, skill: str, name: str, options: Any, stream: bool
) -> None:
    messages = [{"role": "system", "content": "You find things."}, user(text(name), image(uri))]
    reply = ask(client, messages, response_format=named(f"moondream_{skill}"), stream=stream, extra_body=options)
    if stream:
        chunks = list(reply)
        content = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    else:
        chunks, content = [reply], reply.choices[0].message.content
    assert json.loads(content) == getattr(tiny, skill)(scene_image, name, settings=options)
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_truncated_list_is_marked(random_client: Any, uri: str) -> None:
    options: dict[str, Any] = {"response_format": named("moondream_detect"), "extra_body": {"max_objects": 2}}
    reply = ask(random_client, [user(text("a"), image(uri))], **options)
    chunks = list(ask(random_client, [user(text("a"), image(uri))], stream=True, **options))
    found = json.loads(reply.choices[0].message.content)
    assert (len(found["objects"]), found["truncated"], reply.choices[0].finish_reason) == (2, True, "stop")
    assert json.loads("".join(chunk.choices[0].delta.content or "" for chunk in chunks)) == found


class Box(BaseModel):
    x_min: float
    y_min: float
    x_max: float
    y_max: float
    confidence: float


class moondream_detect(BaseModel):  # the client sends the class name
    objects: list[Box]
    truncated: bool


def test_client_parses_boxes_and_points(client: Any, tiny: LocalModel, scene_image: Image.Image, uri: str) -> None:
    messages = [user(text("blue square"), image(uri))]
    reply = client.chat.completions.parse(model="tiny", messages=messages, response_format=moondream_detect)
    assert reply.choices[0].message.parsed.model_dump() == tiny.detect(scene_image, "blue square")


# --- structured output ------------------------------------------------------------------------------------------------


class Animal(BaseModel):
    kind: Literal["cat", "dog"]
    count: int = Field(ge=0, le=9)


class Report(BaseModel):
    indoors: bool
    animals: list[Animal] = Field(min_length=1, max_length=2)
    color: Literal["red", "blue"] | None


def test_the_client_parses_a_pydantic_model(random_client: Any, uri: str) -> None:
    messages = [user(text(QUESTION), image(uri))]
    options = {"model": "tiny", "messages": messages, "response_format": Report, "temperature": 3.0, "top_p": 1}
    replies = [random_client.chat.completions.parse(**options, seed=seed) for seed in range(4)]
    assert all(isinstance(reply.choices[0].message.parsed, Report) for reply in replies)
    assert {reply.choices[0].finish_reason for reply in replies} == {"stop"}
    assert len({reply.choices[0].message.content for reply in replies}) > 1
    with random_client.chat.completions.stream(**options, seed=0) as stream:
        streamed = stream.get_final_completion()
    assert streamed.choices[0].message.parsed == replies[0].choices[0].message.parsed


def test_trained_model_answers_in_json(client: Any, uri: str) -> None:
    reply = client.chat.completions.parse(
        model="tiny", messages=[user(text(QUESTION), image(uri))], response_format=Report, temperature=0
    )
    assert isinstance(reply.choices[0].message.parsed, Report)


def test_json_object_returns_any_object(random_client: Any, uri: str) -> None:
    messages = [user(text(QUESTION), image(uri))]
    settings = {"temperature": 1.0, "top_p": 0.95, "max_tokens": 600}
    replies = [
        ask(random_client, messages, response_format={"type": "json_object"}, seed=s, **settings) for s in range(5)
    ]
    complete = [r.choices[0].message.content for r in replies if r.choices[0].finish_reason == "stop"]
    assert all(isinstance(json.loads(content), dict) for content in complete)
    assert all(reply.choices[0].message.content.startswith("{") for reply in replies)


@pytest.mark.parametrize("stream", [False, True])
def test_truncated_json_ends_with_length(random_client: Any, uri: str, stream: bool) -> None:
    schema = {"name": "report", "schema": Report.model_json_schema(), "strict": True}
    options: dict[str, Any] = {"response_format": {"type": "json_schema", "json_schema": schema}, "max_tokens": 5}
    reply = ask(random_client, [user(text(QUESTION), image(uri))], stream=stream, **options)
    assert (list(reply)[-1] if stream else reply).choices[0].finish_reason == "length"


def test_schema_constrains_the_answer_and_not_the_reasoning(random_client: Any, uri: str) -> None:
    schema = {"name": "kind", "schema": {"enum": ["cat", "dog"]}}
    options: dict[str, Any] = {"response_format": {"type": "json_schema", "json_schema": schema}, "max_tokens": 40}
    reply = ask(random_client, [user(text(QUESTION), image(uri))], extra_body={"reasoning": True}, **options)
    assert json.loads(reply.choices[0].message.content) in ("cat", "dog")
    assert reply.choices[0].message.reasoning["text"]


NULL = {"type": "null"}
CLOSED: dict[str, dict[str, Any]] = {
    "one object": {"properties": {"a": NULL}, "required": ["a"]},
    "a reference": {
        "properties": {"a": {"$ref": "#/$defs/b"}},
        "required": ["a"],
        "$defs": {"b": {"type": "object", "properties": {}}},
    },
    "nested": {
        "properties": {
            "a": {"anyOf": [{"type": "array", "items": {"type": "object", "properties": {}}, "maxItems": 2}]}
        },
        "required": ["a"],
    },
    "a property named properties": {"properties": {"a": NULL, "properties": NULL}, "required": ["a"]},
}
OPEN: dict[str, dict[str, Any]] = {
    "additionalProperties": {"properties": {"a": NULL}, "required": ["a"], "additionalProperties": True},
    "several in allOf": {"allOf": [{"properties": {name: NULL}, "required": [name]} for name in ("a", "b")]},
    "a required property without a schema": {"properties": {"b": NULL}, "required": ["a"]},
    "minProperties": {"properties": {"a": NULL}, "required": ["a"], "minProperties": 2},
    "anyOf": {"properties": {"b": NULL}, "anyOf": [{"required": ["a"]}]},
}


def with_schema(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": {"type": "object", **schema}}}


@pytest.mark.parametrize("name", CLOSED)
def test_object_has_only_the_properties_in_its_schema(random_client: Any, uri: str, name: str) -> None:
    for seed in range(3):
        settings = {**SOME, "max_tokens": 60, "seed": seed, "response_format": with_schema(CLOSED[name])}
        choice = ask(random_client, [user(text(QUESTION), image(uri))], **settings).choices[0]
        assert choice.finish_reason == "stop"
        assert json.loads(choice.message.content).keys() - {"properties"} == {"a"}


@pytest.mark.parametrize("name", OPEN)
def test_schemas_that_need_other_properties_are_not_closed(random_client: Any, uri: str, name: str) -> None:
    # a schema without a conforming object would get 400
    reply = ask(random_client, [user(text(QUESTION), image(uri))], **SOME, response_format=with_schema(OPEN[name]))
    assert reply.choices[0].message.content.startswith("{")


# --- tools ------------------------------------------------------------------------------------------------------------


def tool_of(model: type[BaseModel]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": model.__name__, "parameters": model.model_json_schema()}}


def choice_of(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


@pytest.mark.parametrize(
    ("choice", "tools", "reason"),
    [
        (choice_of("Report"), [Report], "stop"),
        (choice_of("Report"), [Animal, Report], "stop"),
        ("required", [Report], "tool_calls"),
    ],
    ids=["named", "one of two", "required"],
)
def test_forced_call_has_conforming_arguments(
    random_client: Any, uri: str, choice: Any, tools: list[type[BaseModel]], reason: str
) -> None:
    messages = [user(text(QUESTION), image(uri))]
    options = {"tools": [tool_of(tool) for tool in tools], "tool_choice": choice, "temperature": 3.0, "top_p": 1}
    replies = [ask(random_client, messages, **options, seed=seed).choices[0] for seed in range(3)]
    for reply in replies:
        (call,) = reply.message.tool_calls
        Report.model_validate_json(call.function.arguments)
        assert (call.function.name, call.type, reply.message.content) == ("Report", "function", None)
        assert (reply.finish_reason, call.id[:5]) == (reason, "call_")
    calls = [reply.message.tool_calls[0] for reply in replies]
    assert len({call.id for call in calls}) == 3
    assert len({call.function.arguments for call in calls}) > 1


def test_forced_call_returns_the_same_json_as_response_format(client: Any, uri: str) -> None:
    messages = [user(text(QUESTION), image(uri))]
    schema = {"name": "report", "schema": Report.model_json_schema()}
    plain = ask(client, messages, response_format={"type": "json_schema", "json_schema": schema})
    forced = ask(client, messages, tools=[tool_of(Report)], tool_choice="required", response_format={"type": "text"})
    assert forced.choices[0].message.tool_calls[0].function.arguments == plain.choices[0].message.content
    assert forced.usage == plain.usage


@pytest.mark.parametrize("function", [{}, {"parameters": None}, {"parameters": {}}], ids=["missing", "null", "empty"])
def test_tool_without_parameters_accepts_any_object(random_client: Any, uri: str, function: dict[str, Any]) -> None:
    tool = {"type": "function", "function": {"name": "note", **function}}
    reply = ask(
        random_client,
        [user(text(QUESTION), image(uri))],
        tools=[tool],
        tool_choice="required",
        **{**SOME, "max_tokens": 600},
    )
    (call,) = reply.choices[0].message.tool_calls
    assert call.function.arguments.startswith("{")
    if reply.choices[0].finish_reason == "tool_calls":
        assert isinstance(json.loads(call.function.arguments), dict)


class Node(BaseModel):
    name: Literal["a", "b"]
    child: Node | None  # the schema is a reference without a type


def test_parameters_can_be_a_reference(random_client: Any, uri: str) -> None:
    reply = ask(
        random_client, [user(text(QUESTION), image(uri))], tools=[tool_of(Node)], tool_choice="required", max_tokens=600
    )
    (call,) = reply.choices[0].message.tool_calls
    assert call.function.arguments.startswith('{"name": ')
    if reply.choices[0].finish_reason == "tool_calls":
        Node.model_validate_json(call.function.arguments)


@pytest.mark.parametrize(("choice", "reason"), [(choice_of("Report"), "stop"), ("required", "tool_calls")])
def test_streamed_deltas_add_up_to_the_call(random_client: Any, uri: str, choice: Any, reason: str) -> None:
    messages = [user(text(QUESTION), image(uri))]
    options = {"tools": [tool_of(Report)], "tool_choice": choice, "temperature": 3.0, "seed": 1}
    whole = ask(random_client, messages, **options).choices[0].message.tool_calls[0]
    streamed = ask(random_client, messages, stream=True, stream_options={"include_usage": True}, **options)
    choices = [chunk.choices[0] for chunk in streamed if chunk.choices]
    first, last = choices[0], choices.pop()
    (start,) = first.delta.tool_calls
    assert (first.delta.role, first.delta.content, start.index, start.type) == ("assistant", None, 0, "function")
    assert (start.function.name, start.function.arguments, start.id[:5]) == ("Report", "", "call_")
    deltas = [call for choice in choices[1:] for call in choice.delta.tool_calls]
    assert {(call.index, call.id, call.type, call.function.name) for call in deltas} == {(0, None, None, None)}
    assert "".join(call.function.arguments for call in deltas) == whole.function.arguments
    assert len(deltas) > 3
    assert (last.finish_reason, last.delta.tool_calls) == (reason, None)
    assert {choice.finish_reason for choice in choices} == {None}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", [choice_of("Report"), "required"])
def test_truncated_call_ends_with_length(random_client: Any, uri: str, choice: Any, stream: bool) -> None:
    options: dict[str, Any] = {"tools": [tool_of(Report)], "tool_choice": choice, "max_tokens": 5}
    reply = ask(random_client, [user(text(QUESTION), image(uri))], stream=stream, **options)
    assert (list(reply)[-1] if stream else reply).choices[0].finish_reason == "length"


@pytest.mark.parametrize("choice", [choice_of("Report"), "required"])
def test_the_client_parses_and_streams_the_arguments_of_a_call(random_client: Any, uri: str, choice: Any) -> None:
    options: dict[str, Any] = {
        "model": "tiny",
        "messages": [user(text(QUESTION), image(uri))],
        "tools": [openai.pydantic_function_tool(Report)],
        "tool_choice": choice,
        "temperature": 3.0,
        "seed": 1,
    }
    (call,) = random_client.chat.completions.parse(**options).choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Report)
    with random_client.chat.completions.stream(**options) as stream:
        kinds = [event.type for event in stream]
        (streamed,) = stream.get_final_completion().choices[0].message.tool_calls
    assert streamed.function == call.function
    assert kinds.count("tool_calls.function.arguments.done") == 1
    assert kinds.count("tool_calls.function.arguments.delta") > 3


def test_forced_call_can_follow_reasoning(random_client: Any, uri: str) -> None:
    options: dict[str, Any] = {"tools": [tool_of(Animal)], "tool_choice": "required", "max_tokens": 60}
    messages, options["extra_body"] = [user(text(QUESTION), image(uri))], {"reasoning": True}
    message = ask(random_client, messages, **options).choices[0].message
    Animal.model_validate_json(message.tool_calls[0].function.arguments)
    deltas = [chunk.choices[0].delta for chunk in ask(random_client, messages, stream=True, **options)]
    assert [delta.reasoning for delta in deltas if hasattr(delta, "reasoning")] == [message.reasoning]
    pieces = [call.function.arguments for delta in deltas for call in delta.tool_calls or ()]
    assert "".join(pieces) == message.tool_calls[0].function.arguments


# --- Moondream's client -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reasoning", [None, False, True])
def test_moondream_client_uses_chat_completions(
    tiny: LocalModel, scene_image: Image.Image, uri: str, reasoning: bool | None
) -> None:
    md = pytest.importorskip("moondream")
    expected = json.loads(json.dumps(tiny.query(scene_image, QUESTION, reasoning=bool(reasoning), settings=GREEDY)))
    messages = [user(text(QUESTION), image(uri))]
    settings = {"temperature": 0, "max_tokens": 50, "max_objects": 3}
    with served(tiny, api_keys=("the-key",)) as locked:
        client = md.vl(endpoint=f"{locked.url}/v1", api_key="the-key")
        reply = client.chat(messages=messages, settings=settings, reasoning=reasoning)
        pieces = client.chat(messages=messages, settings=settings, reasoning=reasoning, stream=True)["message"]
        assert "".join(pieces) == expected["answer"]
    assert (reply["message"]["content"], reply["finish_reason"]) == (expected["answer"], "stop")
    assert reply["message"].get("reasoning") == expected.get("reasoning")


@pytest.mark.parametrize("reasoning", [None, True])
def test_moondream_client_continues_a_conversation(
    model: LocalModel, scene_image: Image.Image, uri: str, reasoning: bool | None
) -> None:
    md = pytest.importorskip("moondream")
    other = data_uri(scene_image.rotate(180))
    messages = [
        {"role": "system", "content": "Be brief."},
        user(text("A cat?"), image(uri)),
        assistant("Yes."),
        user(text(QUESTION), image(other)),
    ]
    options: dict[str, Any] = {"settings": {"temperature": 0, "max_tokens": 30}, "reasoning": reasoning}
    expected = model.chat(messages, **options)
    assert expected["message"]["content"] != model.chat(messages[-1:], **options)["message"]["content"]
    with served(model) as running:
        client = md.vl(endpoint=f"{running.url}/v1", api_key="any")
        reply = client.chat(messages=messages, **options)
        pieces = list(client.chat(messages=messages, stream=True, **options)["message"])
    assert "".join(pieces) == expected["message"]["content"]
    assert "".join(model.chat(messages, stream=True, **options)["message"]) == expected["message"]["content"]
    assert reply["finish_reason"] == expected["finish_reason"]
    assert {"role", "content"} <= reply["message"].keys()
    for key, value in expected["message"].items():
        assert reply["message"][key] == json.loads(json.dumps(value)), key
