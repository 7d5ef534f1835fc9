"""OpenAI's dialect: chat completions, plain and streamed, and the one model, for OpenAI's clients and those like them.

    POST /v1/chat/completions
    GET /v1/models/{name}

The list of models is in `operations`; what a conversation asks of Moondream 2 is in `openai_body`. With
`"reasoning": true`, as Moondream's own client sends it, a message has `reasoning` beside `content`.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from fastapi import Request as HttpRequest

from moondream_cv.requests import DetectResult, PointResult, Reasoning

from . import operations
from .dialect import Dialect
from .driving import Usage
from .errors import KINDS, ServerError
from .openai_body import Asked, ChatBody, read_body
from .openai_schema import ChatCompletion, ModelCard, refusals
from .service import Exchange, Stream, open_exchange, service_of
from .sse import event, event_stream

router = APIRouter(tags=["openai"])
Open = Annotated[Exchange, Depends(open_exchange)]
CODES = {401: "invalid_api_key", 429: "rate_limit_exceeded"}  # those that programs look for
LISTS = {"detect": "objects", "point": "points"}


def error_body(error: ServerError) -> dict[str, Any]:
    """OpenAI's: `type` is the class of an error, `code` what it is exactly, where there is a word for that."""
    kind = KINDS.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    code = CODES.get(error.status) if error.kind == kind else error.kind
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": code}}


DIALECT = Dialect("openai", ("/v1/chat", "/v1/models"), error_body, invalid_status=400)
_STREAMED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer; with `stream`, chunks of it as they come, and `[DONE]` at the end.",
        "model": ChatCompletion,
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    }
}
_CHAT_REFUSALS = refusals(400, 401, 403, 404, 408, 413, 415, 429, 503, 504)


@router.post(
    "/v1/chat/completions", response_model=None, summary="Chat completion", responses={**_STREAMED, **_CHAT_REFUSALS}
)
async def chat_completions(body: ChatBody, exchange: Open) -> Any:
    """Answer the last user message about the one image of the conversation.

    `response_format` of type `json_schema` constrains the answer to JSON that conforms to the schema, and `json_object`
    to any JSON object. The schema names `moondream_detect` and `moondream_point` give boxes or points of the object
    that the text names instead.
    """
    served = exchange.service.name
    _check_model(body.model, served)
    asked = read_body(body)
    image = None if asked.image_url is None else await exchange.picture(asked.image_url)
    request = asked.request(image)
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": served}
    if body.stream:
        with_usage = body.stream_options is not None and body.stream_options.include_usage is True
        return event_stream(_events(asked, await exchange.stream(request), head, with_usage))
    result, usage = await exchange.answer(request)
    choice = {"index": 0, "message": _message(result), "logprobs": None, "finish_reason": _finish_reason(result)}
    return {**head, "object": "chat.completion", "choices": [choice], "usage": _usage(usage)}


@router.get("/v1/models/{name:path}", summary="Model", response_model=ModelCard, responses=refusals(401, 404))
def model(name: str, http: HttpRequest) -> dict[str, Any]:
    """Describe the model, under any of the names that chat completions take."""
    _check_model(name, service_of(http).name)
    found: dict[str, Any] = operations.models(http)["data"][0]
    return found


def _check_model(name: str | None, served: str) -> None:
    """Refuse what this server does not have. Names of Moondream stand for the one it has: clients fill them in.

    Raises:
        ServerError: 404.
    """
    if name is None or name == served or ("moondream" in name.lower() and "@" not in name):
        return
    why = "this server has no finetunes; " if "@" in name else ""
    raise ServerError(
        404,
        f"the model {name!r:.200} does not exist here: {why}it serves {served!r}",
        kind="model_not_found",
        param="model",
    )


def _message(result: Any) -> dict[str, Any]:
    """What the assistant says."""
    if isinstance(result, DetectResult | PointResult):
        return {"role": "assistant", "content": json.dumps(result.to_dict()), "refusal": None}
    thoughts = {} if result.reasoning is None else {"reasoning": result.reasoning.to_dict()}
    return {"role": "assistant", "content": result.answer, "refusal": None, **thoughts}


def _finish_reason(result: Any) -> str:
    """Why an answer ends. A list that was cut is still complete JSON, and says so itself, in `truncated`."""
    is_cut = result.truncated and not isinstance(result, DetectResult | PointResult)
    return "length" if is_cut else "stop"


def _usage(usage: Usage) -> dict[str, int] | None:
    """Counts of tokens; None where a remote model does not tell them."""
    if not usage.prompt_tokens:
        return None
    return {**usage._asdict(), "total_tokens": sum(usage)}


async def _events(asked: Asked, stream: Stream, head: dict[str, Any], with_usage: bool) -> AsyncIterator[bytes]:
    """A streamed answer. A failure on the way is its last event."""
    head = {**head, "object": "chat.completion.chunk"}

    def chunk(delta: dict[str, Any], reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return event({**head, "choices": [choice], **({"usage": None} if with_usage else {})})

    try:
        yield chunk({"role": "assistant", "content": ""})
        async for delta in _deltas(asked, stream):
            yield chunk(delta)
        yield chunk({}, _finish_reason(stream.result))
        if with_usage:
            yield event({**head, "choices": [], "usage": _usage(stream.usage)})
    except ServerError as error:
        yield event(error_body(error))
        return
    yield event("[DONE]")


async def _deltas(asked: Asked, stream: Stream) -> AsyncIterator[dict[str, Any]]:
    """What is added to a message bit by bit: text, thoughts in one piece, or the JSON of boxes and points."""
    name = LISTS.get(asked.kind.skill)
    if name is None:
        async for piece in stream:
            yield {"reasoning": piece.to_dict()} if isinstance(piece, Reasoning) else {"content": piece}
        return
    before = f'{{"{name}": ['
    async for item in stream:
        yield {"content": before + json.dumps(item.to_dict())}
        before = ", "
    start = before if before != ", " else ""
    yield {"content": f'{start}], "truncated": {json.dumps(stream.result.truncated)}}}'}
