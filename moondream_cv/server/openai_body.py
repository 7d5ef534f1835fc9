"""What the body of a chat completion asks of Moondream 2: one question, or one object's name, about one image.

Moondream 2 answers single questions, and was not trained on dialogues. So of a conversation

- the text of the last user message is the question;
- system and developer messages stand above it, each on its own lines, because that is where applications put what the
  answer should be like; those that say nothing about the answer are better left out;
- the one image may be in any message, since clients send it once and go on asking;
- earlier questions and answers are not passed on: the model would take them for part of the question.

`response_format` with the schema name `moondream_detect` or `moondream_point` asks for boxes or points instead. The
text is then the object's name, and system messages do not matter. Any other JSON schema constrains the answer; the
prompt stays as it is.

It knows nothing of how answers look: that is `openai`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from moondream_cv.requests import Detect, Point, Query, Settings

from .errors import ServerError
from .service import wire_settings

STRUCTURED: dict[str, type[Detect] | type[Point]] = {"moondream_detect": Detect, "moondream_point": Point}
NEUTRAL: dict[str, tuple[Any, ...]] = {  # parameters that are rejected → values that change nothing; so does null
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


class ImageUrl(BaseModel):
    url: str
    detail: str | None = Field(None, description="Accepted and ignored: every image is looked at closely.")


class Part(BaseModel):
    type: str
    text: str | None = None
    image_url: ImageUrl | str | None = None


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[Part] | None = None


class StreamOptions(BaseModel):
    include_usage: bool | None = None


class ChatBody(BaseModel):
    """As OpenAI's clients send it.

    Parameters of OpenAI and vLLM that would change the answer are rejected unless they have a neutral value. Other
    keys, such as `user`, `metadata` and `service_tier`, are ignored.
    """

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    messages: list[Message] = Field(min_length=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    max_objects: int | None = Field(None, description="Of boxes or points, at the most.")
    max_crops: int | None = Field(None, description="Local crops of the image, at the most; fewer are faster.")
    seed: int | None = None
    reasoning: bool | dict[str, Any] | None = Field(None, description="true: think first; other values are ignored.")
    response_format: dict[str, Any] | None = Field(
        None,
        description="`json_schema`: JSON that conforms to a schema, or boxes or points with the schema name"
        " `moondream_detect` or `moondream_point`. `json_object`: any JSON object.",
    )
    stop: str | list[str] | None = Field(None, description="Up to 4 strings; the answer ends before the first of them.")
    presence_penalty: float | None = Field(None, description="Only 0 is supported.")
    frequency_penalty: float | None = Field(None, description="Only 0 is supported.")
    logit_bias: dict[str, Any] | None = Field(None, description="Only an empty object is supported.")
    n: int | None = None
    tools: list[Any] | None = None
    tool_choice: Any = Field(None, description='Only "none" and "auto" are supported.')
    functions: list[Any] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    modalities: list[str] | None = None
    audio: Any = None


@dataclass(frozen=True)
class Asked:
    """What a body asks.

    Attributes:
        kind: `Query`, `Detect` or `Point`.
        text: The question, or the object's name.
        image_url: None: the question is asked without an image.
        reasoning: Whether to think first.
        stop: Strings that end an answer.
        json_schema: JSON schema that an answer conforms to.
    """

    kind: type[Query] | type[Detect] | type[Point]
    text: str
    image_url: str | None
    reasoning: bool
    settings: Settings
    stop: tuple[str, ...] = ()
    json_schema: str | None = None

    def request(self, image: Any) -> Query | Detect | Point:
        """The request to the model.

        Raises:
            ValueError: The text says nothing, or an image is needed and is None.
        """
        if self.kind is Query:
            return Query(image, self.text, self.reasoning, (), self.settings, self.stop, self.json_schema)
        return self.kind(image, self.text, settings=self.settings)


def read_body(body: ChatBody) -> Asked:
    """What a body asks.

    Raises:
        ServerError: It asks for something that Moondream 2 cannot do, or says nothing.
    """
    _refuse_unsupported(body)
    skill, json_schema = _structured(body.response_format)
    users = [message for message in body.messages if message.role == "user"]
    if not users:
        raise ServerError(400, 'messages: none has the role "user", so nothing is asked', param="messages")
    question = _text_of(users[-1])
    if not question.strip():
        raise ServerError(400, "messages: the last user message has no text, so nothing is asked", param="messages")
    system = [_text_of(message) for message in body.messages if message.role in ("system", "developer")]
    text = question if skill else "\n".join([said for said in system if said.strip()] + [question])
    settings, stop = _settings(body), _stop_of(body, skill)
    return Asked(skill or Query, text, _image_url(body.messages), body.reasoning is True, settings, stop, json_schema)


def _refuse_unsupported(body: ChatBody) -> None:
    """Reject parameters that change the answer and are not supported, instead of ignoring them.

    Raises:
        ServerError: One of them has a value that is not neutral.
    """
    given = {**(body.model_extra or {}), **{name: getattr(body, name) for name in ChatBody.model_fields}}
    for name, neutral in NEUTRAL.items():
        value = given.get(name)
        if value is not None and value not in neutral:
            raise ServerError(
                400,
                f"{name} is not supported here and was {value!r:.100}: Moondream 2 gives one answer in text;"
                f" leave {name} out",
                kind="unsupported_parameter",
                param=name,
            )


def _structured(response_format: dict[str, Any] | None) -> tuple[type[Detect] | type[Point] | None, str | None]:
    """Return the skill that a response format asks for, None for an answer; and the JSON schema of the answer, if any.

    Raises:
        ServerError: The type is unknown, or the schema is missing or not usable.
    """
    kind = None if response_format is None else response_format.get("type")
    if response_format is None or kind == "text":
        return None, None
    if kind == "json_object":
        return None, '{"type": "object"}'
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
    if given.get("schema") is None:
        raise ServerError(
            400, "response_format: json_schema.schema is missing; send a JSON schema", param="response_format"
        )
    try:
        return None, Query(None, "?", json_schema=given["schema"]).json_schema  # type: ignore[return-value]
    except ValueError as error:
        raise ServerError(400, f"response_format: {error}", param="response_format") from error


def _text_of(message: Message) -> str:
    if isinstance(message.content, str):
        return message.content
    return "\n".join(part.text for part in message.content or () if part.type == "text" and part.text)


def _image_url(messages: list[Message]) -> str | None:
    """The image that a conversation is about; one that is sent again with every message counts once."""
    urls = list(dict.fromkeys(url for message in messages for url in _image_urls(message)))
    if len(urls) > 1:
        raise ServerError(
            400,
            f"the messages hold {len(urls)} images, and Moondream 2 looks at one at a time; send one, and leave the"
            " images of earlier messages out",
            kind="multiple_images_not_supported",
            param="messages",
        )
    return urls[0] if urls else None


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
    """The stop strings of a body.

    Raises:
        ServerError: They are invalid, or the answer is a list of boxes or points.
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
    return wire_settings(given)
