"""Conversion of a chat completion to one request to Moondream 2.

Moondream 2 answers single questions and was not trained on dialogues. A single question becomes a `Query`, and a longer
conversation a `Chat`, in the layout of the inference engine of the model's authors; `conversations.py` has the rules.

`response_format` with the schema name `moondream_detect` or `moondream_point` asks for boxes or points. The text of the
last user message is then the class name, and all other text is ignored. Any other JSON schema constrains the answer and
does not change the prompt. The same applies to the parameters of a function that `tool_choice` forces the model to
call.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from moondream_cv import conversations
from moondream_cv.requests import Chat, Detect, Point, Query, Settings, Turn
from moondream_cv.server.apis.request_settings import parse_settings
from moondream_cv.server.errors import ServerError

STRUCTURED: dict[str, type[Detect] | type[Point]] = {"moondream_detect": Detect, "moondream_point": Point}
NEUTRAL: dict[str, tuple[Any, ...]] = {  # rejected parameters → values without effect, in addition to null
    "n": (1,),
    "best_of": (1,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "prompt_logprobs": (0,),
    "modalities": ([], ["text"]),
    "audio": (),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "verbosity": ("medium",),
    "reasoning_effort": ("none",),
    "web_search_options": (),
    # Parameters of vLLM and similar servers
    "top_k": (0, -1),
    "min_p": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "use_beam_search": (False,),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "stop_token_ids": ([],),
    "include_stop_str_in_output": (False,),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "skip_special_tokens": (True,),
    "echo": (False,),
    "continue_final_message": (False,),
    "chat_template": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
}

# Keywords of JSON schemas
COMBINING = ("allOf", "anyOf", "oneOf")
OBJECT_KEYWORDS = {"properties", "patternProperties", "additionalProperties", "required"}
OPENING_KEYWORDS = {"additionalProperties", "patternProperties", "minProperties"}
EXCLUDING_KEYWORDS = {
    "oneOf",
    "not",
    "if",
    "dependencies",
    "dependentSchemas",
    "dependentRequired",
    "unevaluatedProperties",
    "$dynamicRef",
}


MAX_IMAGES = 16  # per conversation; fewer fit into the context of the model
MAX_ITEMS = 1_000  # per list; validation errors for many thousands of items would take seconds


class ImageUrl(BaseModel):
    """An image: a data URI, base64 text, or an http(s) URL."""

    url: str
    detail: str | None = Field(None, description="Accepted and ignored; every image is processed at full detail.")


class Part(BaseModel):
    """A part of a message: text or an image."""

    type: str
    text: str | None = None
    image_url: ImageUrl | str | None = None


class Message(BaseModel):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[Part], Field(max_length=MAX_ITEMS)] | None = None


class StreamOptions(BaseModel):
    """Options of a stream."""

    include_usage: bool | None = None


class ChatBody(BaseModel):
    """A chat completion request.

    Parameters of OpenAI and vLLM that would change the answer are rejected unless they have a neutral value. Other
    keys, such as `user`, `metadata` and `service_tier`, are ignored.
    """

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    messages: list[Message] = Field(min_length=1, max_length=MAX_ITEMS)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    max_objects: int | None = Field(None, description="Maximum number of boxes or points.")
    max_crops: int | None = Field(None, description="Maximum number of local crops of the image; fewer are faster.")
    seed: int | None = None
    reasoning: bool | dict[str, Any] | None = Field(
        None, description="true generates reasoning first; other values are ignored."
    )
    response_format: dict[str, Any] | None = Field(
        None,
        description="`json_schema`: JSON that conforms to a schema, or boxes or points with the schema name"
        " `moondream_detect` or `moondream_point`. `json_object`: any JSON object.",
    )
    stop: str | Annotated[list[str], Field(max_length=MAX_ITEMS)] | None = Field(
        None, description="Up to 4 strings; the answer ends before the first one that occurs."
    )
    presence_penalty: float | None = Field(None, description="Only 0 is supported.")
    frequency_penalty: float | None = Field(None, description="Only 0 is supported.")
    logit_bias: dict[str, Any] | None = Field(None, description="Only an empty object is supported.")
    n: int | None = None
    tools: list[Any] | None = Field(
        None, description="Functions, one of which `tool_choice` must force; the answer conforms to its parameters."
    )
    tool_choice: Any = Field(
        None,
        description='`{"type": "function", "function": {"name": ...}}`, or "required" with a single tool. Without tools'
        ' also "none" and "auto".',
    )
    functions: list[Any] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    modalities: Annotated[list[str], Field(max_length=MAX_ITEMS)] | None = None
    audio: Any = None


@dataclass(frozen=True)
class ForcedCall:
    """The function that the model is forced to call.

    Attributes:
        name: Name of the function.
        json_schema: JSON schema of the arguments, as text.
        finish_reason: Finish reason of a complete call.
    """

    name: str
    json_schema: str
    finish_reason: Literal["stop", "tool_calls"]


@dataclass(frozen=True)
class ParsedChat:
    """A chat completion, converted to one request.

    Attributes:
        kind: `Query`, `Detect` or `Point`.
        turns: Turns of the conversation, with the URLs of the images. A single one, whose question is the class name,
            for boxes and points.
        reasoning: Whether to generate reasoning first.
        settings: Sampling settings.
        stop: Strings that end an answer.
        json_schema: JSON schema of the answer.
        call: Function call whose arguments are the answer; None for an answer in `content`.
    """

    kind: type[Query] | type[Detect] | type[Point]
    turns: tuple[Turn, ...]
    reasoning: bool
    settings: Settings
    stop: tuple[str, ...] = ()
    json_schema: str | None = None
    call: ForcedCall | None = None

    @property
    def image_urls(self) -> tuple[str, ...]:
        """URLs of the images of all turns, in order."""
        return tuple(url for turn in self.turns for url in turn.images)

    def request(self, images: Sequence[Any]) -> Query | Chat | Detect | Point:
        """Return the request to the model.

        Args:
            images: The images at `image_urls`.

        Raises:
            ValueError: The text is too long, or there is no image and the skill needs one.
        """
        text, image = self.turns[-1].question or "", images[0] if images else None
        if self.kind is not Query:
            return self.kind(image, text, settings=self.settings)
        if len(self.turns) == 1 and len(images) <= 1:
            return Query(image, text, self.reasoning, (), self.settings, self.stop, self.json_schema)
        chat = Chat(self.turns, self.reasoning, self.settings, self.stop, self.json_schema)
        return chat.with_images(images)


def parse_chat(body: ChatBody) -> ParsedChat:
    """Convert a chat completion to one request.

    Raises:
        ServerError: Moondream 2 does not support the request, or it has no question.
    """
    # Find out which skill and which constraints are requested
    call = _forced_call(body)
    _reject_unsupported(body, () if call is None else ("tools", "tool_choice"))
    skill, json_schema = _structured(body.response_format) if call is None else (None, call.json_schema)

    # Convert the messages
    messages = [conversations.Message(m.role, _text_of(m), tuple(_image_urls(m))) for m in body.messages]
    try:
        turns = conversations.make_turns(messages)
    except ValueError as error:
        raise ServerError(400, f"messages: {error}", param="messages") from error
    if skill is not None:
        name = next(message.text for message in reversed(messages) if message.role == "user")
        turns = (Turn(name, images=_single_image(turns, skill)),)
    _check_image_count(turns)

    # Convert the other parameters
    settings, stop = _settings(body), _stop_of(body, skill)
    return ParsedChat(skill or Query, turns, body.reasoning is True, settings, stop, json_schema, call)


def _reject_unsupported(body: ChatBody, supported: Collection[str]) -> None:
    """Reject parameters that change the answer and are not supported, instead of ignoring them.

    Args:
        body: Request body.
        supported: Names of parameters that this body uses in a supported way.

    Raises:
        ServerError: One of them has a value that is not neutral.
    """
    given = {**(body.model_extra or {}), **{name: getattr(body, name) for name in ChatBody.model_fields}}
    for name, neutral in NEUTRAL.items():
        value = given.get(name)
        if value is not None and value not in neutral and name not in supported:
            or_force = ", or force the call of one function with tool_choice" if name == "tools" else ""
            raise ServerError(
                400,
                f"{name} is not supported, got {value!r:.100}: Moondream 2 returns one answer as text;"
                f" leave {name} out{or_force}",
                kind="unsupported_parameter",
                param=name,
            )


def _forced_call(body: ChatBody) -> ForcedCall | None:
    """Return the function that `tool_choice` forces the model to call; None if it forces none.

    Raises:
        ServerError: The combination of parameters is not supported, or a tool is not valid.
    """
    # Find the name in tool_choice
    choice, tools = body.tool_choice, body.tools
    chosen = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    is_named = isinstance(chosen, dict) and "name" in chosen
    if not tools or not (is_named or choice == "required"):
        return None

    # Reject combinations that are not supported
    if body.response_format is not None and body.response_format.get("type") != "text":
        raise _unsupported_tools("not supported together with response_format; leave one of them out")
    if not is_named and len(tools) > 1:
        raise _unsupported_tools(
            f'tool_choice "required" supports a single tool, got {len(tools)}; name one function in tool_choice'
        )

    # Select the function
    functions = [_function_of(tool) for tool in tools]
    names = [function["name"] for function in functions]
    name = chosen["name"] if isinstance(chosen, dict) and is_named else names[0]
    if names.count(name) != 1:
        found = "several tools" if name in names else "none of the tools"
        raise ServerError(400, f"tool_choice: {found} have the name {name!r:.100}", param="tool_choice")
    if name in STRUCTURED:
        raise _unsupported_tools(f"the name {name} is reserved; ask for boxes or points with response_format")
    schema = _arguments_schema(functions[names.index(name)].get("parameters"))
    return ForcedCall(name, schema, "stop" if is_named else "tool_calls")


def _unsupported_tools(message: str) -> ServerError:
    return ServerError(400, f"tools: {message}", kind="unsupported_parameter", param="tools")


def _function_of(tool: Any) -> dict[str, Any]:
    """Return the function of a tool.

    Raises:
        ServerError: The tool is not a function with a name.
    """
    function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(name, str) or not name or not name.isprintable():
        raise ServerError(
            400,
            'tools: each must have the type "function" and an object function with a printable name,'
            f" got {tool!r:.100}",
            param="tools",
        )
    return function


def _arguments_schema(parameters: Any) -> str:
    """Return the JSON schema of a function's arguments, which are always an object.

    Raises:
        ServerError: The parameters are not a JSON schema of an object, or the schema is too large.
    """
    schema = {} if parameters is None else parameters
    if not isinstance(schema, dict) or schema.get("type", "object") != "object":
        raise ServerError(
            400,
            f'tools: function.parameters must be a JSON schema of the type "object", got {schema!r:.100}',
            param="tools",
        )
    try:
        return str(Query(None, "?", json_schema=_closed({**schema, "type": "object"})).json_schema)
    except ValueError as error:
        message = str(error).replace("json_schema", "function.parameters", 1)
        raise ServerError(400, f"tools: {message}", param="tools") from error


def _structured(response_format: dict[str, Any] | None) -> tuple[type[Detect] | type[Point] | None, str | None]:
    """Return the skill that a response format asks for, None for an answer; and the JSON schema of the answer, if any.

    Raises:
        ServerError: The type is unknown, or the schema is missing or not usable.
    """
    # Types without a schema
    kind = None if response_format is None else response_format.get("type")
    if response_format is None or kind == "text":
        return None, None
    if kind == "json_object":
        return None, '{"type": "object"}'

    # Schema names of skills
    given = response_format.get("json_schema")
    if kind != "json_schema" or not isinstance(given, dict):
        raise ServerError(
            400,
            f"response_format must have the type text, json_object or json_schema, the last with an object json_schema,"
            f" got {response_format!r:.100}",
            kind="unsupported_response_format",
            param="response_format",
        )
    name = given.get("name")
    if isinstance(name, str) and name in STRUCTURED:
        return STRUCTURED[name], None

    # Schemas of answers
    if given.get("schema") is None:
        raise ServerError(
            400, "response_format: json_schema.schema is missing; send a JSON schema", param="response_format"
        )
    try:
        return None, Query(None, "?", json_schema=_closed(given["schema"])).json_schema  # type: ignore[return-value]
    except ValueError as error:
        raise ServerError(400, f"response_format: {error}", param="response_format") from error


def _closed(schema: Any) -> Any:
    """Return a JSON schema whose objects have no properties but those in `properties`, unless it allows others.

    JSON that conforms to it conforms to the original schema, too. Without this, a model that does not see the schema
    can add properties until it reaches the token limit. OpenAI requires closed objects for `strict` schemas. A schema
    that combines subschemas of the same object is returned as it is, because closing each of them would contradict the
    others.
    """
    if not isinstance(schema, dict):
        return schema
    copied = copy.deepcopy(schema)
    subschemas = list(_subschemas(copied))
    if any(_combines_objects(subschema) for subschema in subschemas):
        return schema
    for subschema in subschemas:
        properties, required = subschema.get("properties"), subschema.get("required", [])
        if not isinstance(properties, dict) or subschema.keys() & OPENING_KEYWORDS:
            continue
        if isinstance(required, list) and all(isinstance(name, str) and name in properties for name in required):
            subschema["additionalProperties"] = False
    return copied


def _combines_objects(schema: dict[str, Any]) -> bool:
    """Return whether several subschemas, or an alternative that excludes others, apply to the same value."""
    all_of = schema.get("allOf")
    combined = [schema.keys() & OBJECT_KEYWORDS, "$ref" in schema, "allOf" in schema, "anyOf" in schema]
    has_several = sum(map(bool, combined)) > 1 or (isinstance(all_of, list) and len(all_of) > 1)
    return has_several or bool(schema.keys() & EXCLUDING_KEYWORDS)


def _subschemas(schema: Any) -> Iterator[dict[str, Any]]:
    """Yield a JSON schema and everything in it that is a JSON schema."""
    if not isinstance(schema, dict):
        return
    yield schema
    for keyword, value in schema.items():
        children: Iterable[Any] = ()
        if keyword in ("properties", "patternProperties", "$defs", "definitions"):
            children = value.values() if isinstance(value, dict) else ()
        elif keyword in ("items", "prefixItems", "additionalItems", "additionalProperties", "contains", *COMBINING):
            children = value if isinstance(value, list) else (value,)
        for child in children:
            yield from _subschemas(child)


def _text_of(message: Message) -> str:
    if isinstance(message.content, str):
        return message.content
    return "\n".join(part.text for part in message.content or () if part.type == "text" and part.text)


def _single_image(turns: Iterable[Turn], skill: type[Detect] | type[Point]) -> tuple[str, ...]:
    """Return the image of a conversation, if any. An image that is repeated in several messages counts once.

    Raises:
        ServerError: There are several images.
    """
    urls = tuple(dict.fromkeys(url for turn in turns for url in turn.images))
    if len(urls) > 1:
        raise ServerError(
            400,
            f"messages: {skill.skill} supports one image per request, got {len(urls)}; leave out the images of earlier"
            " messages",
            kind="multiple_images_not_supported",
            param="messages",
        )
    return urls


def _check_image_count(turns: Iterable[Turn]) -> None:
    count = sum(len(turn.images) for turn in turns)
    if count > MAX_IMAGES:
        raise ServerError(
            400,
            f"messages: a conversation must have at most {MAX_IMAGES} images, got {count}; leave out earlier images",
            kind="too_many_images",
            param="messages",
        )


def _image_urls(message: Message) -> Iterator[str]:
    if message.content is None or isinstance(message.content, str):
        return
    for part in message.content:
        if part.type == "image_url":
            if part.image_url is None:
                raise ServerError(400, "messages: a part of type image_url has no image_url", param="messages")
            yield part.image_url if isinstance(part.image_url, str) else part.image_url.url
        elif part.type != "text" and message.role not in ("assistant", "tool", "function"):
            raise ServerError(
                400,
                f"messages: a part of type {part.type!r:.60} is not supported; send text and image_url",
                kind="unsupported_content",
                param="messages",
            )


def _stop_of(body: ChatBody, skill: type[Detect] | type[Point] | None) -> tuple[str, ...]:
    """Return the stop strings of a body.

    Raises:
        ServerError: The stop strings are invalid, or the answer is a list of boxes or points.
    """
    if body.stop is None or body.stop == []:
        return ()
    if skill is not None:
        raise ServerError(
            400, f"stop is not supported for {skill.skill}; leave stop out", kind="unsupported_parameter", param="stop"
        )
    try:
        return Query(None, "?", stop=body.stop).stop  # type: ignore[arg-type]
    except ValueError as error:
        raise ServerError(400, str(error), param="stop") from error


def _settings(body: ChatBody) -> Settings:
    given = {
        "temperature": body.temperature,
        "top_p": body.top_p,
        "max_tokens": body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens,
        "max_objects": body.max_objects,
        "max_crops": body.max_crops,
        "seed": body.seed,
    }
    for name, value in given.items():
        try:
            Settings.of({} if value is None else {name: value})
        except ValueError as error:
            raise ServerError(400, str(error), param=name) from error
    return parse_settings(given)
