"""OpenAI's dialect: chat completions, plain and streamed, and the one model, for OpenAI's clients and those like them.

    POST /v1/chat/completions
    GET /v1/models/{name}

The list of models is in `operations`; what a conversation asks of Moondream 2 is in `body`. With
`"reasoning": true`, as Moondream's own client sends it, a message has `reasoning` beside `content`. If `tool_choice`
forces the call of a function, the answer is the arguments of that call, in `tool_calls` instead of `content`.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from fastapi import Request as HttpRequest

from moondream_cv.errors import SchemaError
from moondream_cv.requests import DetectResult, PointResult, Reasoning
from moondream_cv.server.apis import operations
from moondream_cv.server.apis.base import Dialect
from moondream_cv.server.apis.openai.body import Asked, ChatBody, ForcedCall, read_body
from moondream_cv.server.apis.openai.schema import ChatCompletion, ModelCard, refusals
from moondream_cv.server.apis.sse import event, event_stream
from moondream_cv.server.errors import KINDS, ServerError, explain
from moondream_cv.server.runtime.engine_loop import Usage
from moondream_cv.server.service import Exchange, Stream, open_exchange, service_of

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
    to any JSON object. A `tool_choice` that forces the call of one of the `tools` constrains the answer to the
    parameters of that function. The schema names `moondream_detect` and `moondream_point` give boxes or points of the
    object that the text names instead.
    """
    served = exchange.service.name
    _check_model(body.model, served)
    asked = read_body(body)
    image = None if asked.image_url is None else await exchange.picture(asked.image_url)
    request = asked.request(image)
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": served}
    try:
        if body.stream:
            with_usage = body.stream_options is not None and body.stream_options.include_usage is True
            return event_stream(_events(asked, await exchange.stream(request), head, with_usage))
        result, usage = await exchange.answer(request)
    except SchemaError as error:
        raise _schema_error(asked, explain(error)) from error
    choice = {"index": 0, "message": _message(asked, result), "logprobs": None}
    choice["finish_reason"] = _finish_reason(asked, result)
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


def _schema_error(asked: Asked, error: ServerError) -> ServerError:
    """Return an error that names the parameter the JSON schema came from: `tools` for a forced call."""
    if asked.call is None or error.param != "response_format":
        return error
    message = error.message.removeprefix("response_format: ")
    return ServerError(error.status, f"tools: {message}", kind=error.kind, param="tools")


def _message(asked: Asked, result: Any) -> dict[str, Any]:
    """Return the message of the assistant."""
    if isinstance(result, DetectResult | PointResult):
        return {"role": "assistant", "content": json.dumps(result.to_dict()), "refusal": None}
    thoughts = {} if result.reasoning is None else {"reasoning": result.reasoning.to_dict()}
    message = {"role": "assistant", "content": result.answer, "refusal": None, **thoughts}
    if asked.call is None:
        return message
    return {**message, "content": None, "tool_calls": [_tool_call(asked.call, result.answer)]}


def _tool_call(call: ForcedCall, arguments: str) -> dict[str, Any]:
    function = {"name": call.name, "arguments": arguments}
    return {"id": f"call_{uuid.uuid4().hex}", "type": "function", "function": function}


def _finish_reason(asked: Asked, result: Any) -> str:
    """Why an answer ends. A list that was cut is still complete JSON, and says so itself, in `truncated`."""
    if result.truncated and not isinstance(result, DetectResult | PointResult):
        return "length"
    return "stop" if asked.call is None else asked.call.finish_reason


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
        yield chunk(_first_delta(asked))
        async for delta in _deltas(asked, stream):
            yield chunk(delta)
        yield chunk({}, _finish_reason(asked, stream.result))
        if with_usage:
            yield event({**head, "choices": [], "usage": _usage(stream.usage)})
    except ServerError as error:
        yield event(error_body(_schema_error(asked, error)))
        return
    yield event("[DONE]")


def _first_delta(asked: Asked) -> dict[str, Any]:
    """Return the start of a streamed message; of a tool call, everything but the arguments."""
    if asked.call is None:
        return {"role": "assistant", "content": ""}
    return {"role": "assistant", "content": None, "tool_calls": [{"index": 0, **_tool_call(asked.call, "")}]}


async def _deltas(asked: Asked, stream: Stream) -> AsyncIterator[dict[str, Any]]:
    """Yield what extends a message: reasoning in one piece, text, arguments, or the JSON of boxes and points."""
    name = LISTS.get(asked.kind.skill)
    if name is None:
        async for piece in stream:
            if isinstance(piece, Reasoning):
                yield {"reasoning": piece.to_dict()}
            elif asked.call is None:
                yield {"content": piece}
            else:
                yield {"tool_calls": [{"index": 0, "function": {"arguments": piece}}]}
        return
    before = f'{{"{name}": ['
    async for item in stream:
        yield {"content": before + json.dumps(item.to_dict())}
        before = ", "
    start = before if before != ", " else ""
    yield {"content": f'{start}], "truncated": {json.dumps(stream.result.truncated)}}}'}
