"""OpenAI's API: chat completions, plain and streamed, and the model card.

    POST /v1/chat/completions
    GET /v1/models/{name}

The list of models is in `operations.py`, and `body.py` converts a conversation to a request. With `"reasoning": true`,
as in Moondream's client, a message has `reasoning` in addition to `content`. If `tool_choice` forces the call of a
function, the message has `tool_calls` with the arguments instead of `content`.
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
from moondream_cv.server.apis.base import ApiSpec
from moondream_cv.server.apis.openai.body import ChatBody, ForcedCall, ParsedChat, parse_chat
from moondream_cv.server.apis.openai.schema import ChatCompletion, ModelCard, openai_error_responses
from moondream_cv.server.apis.request_settings import with_checkpoint
from moondream_cv.server.apis.sse import event, event_stream
from moondream_cv.server.checkpoints import Checkpoint
from moondream_cv.server.errors import KINDS, ServerError, to_server_error
from moondream_cv.server.request_context import RequestContext, Stream, open_request_context
from moondream_cv.server.runtime.engine_loop import Usage
from moondream_cv.server.service import Service, get_service

router = APIRouter(tags=["openai"])
Context = Annotated[RequestContext, Depends(open_request_context)]
CODES = {401: "invalid_api_key", 429: "rate_limit_exceeded"}  # codes that clients check
LISTS = {"detect": "objects", "point": "points"}


def error_body(error: ServerError) -> dict[str, Any]:
    """Return the JSON body of an error in this API."""
    kind = KINDS.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    code = CODES.get(error.status) if error.kind == kind else error.kind
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": code}}


API = ApiSpec("openai", ("/v1/chat", "/v1/models"), error_body, invalid_status=400)
_STREAMED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer; with `stream`, its chunks as they are generated, then `[DONE]`.",
        "model": ChatCompletion,
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    }
}
_CHAT_ERRORS = openai_error_responses(400, 401, 403, 404, 408, 413, 415, 429, 503, 504)


@router.post(
    "/v1/chat/completions", response_model=None, summary="Chat completion", responses={**_STREAMED, **_CHAT_ERRORS}
)
async def chat_completions(body: ChatBody, context: Context) -> Any:
    """Answer the last user message of a conversation.

    Earlier questions and answers, and the images of user messages, are part of the prompt. They must fit into the
    context of the model, of which each image takes 729 of 2048 positions.

    `response_format` of type `json_schema` constrains the answer to JSON that conforms to the schema, and `json_object`
    to any JSON object. A `tool_choice` that forces the call of one of the `tools` constrains the answer to the
    parameters of that function. The schema names `moondream_detect` and `moondream_point` give boxes or points of the
    object that the text names instead.
    """
    checkpoint = _select_checkpoint(body.model, context.service)
    chat = parse_chat(body)
    images = [await context.open_image(url) for url in chat.image_urls]
    request = with_checkpoint(chat.request(images), checkpoint)
    used = context.service.name if checkpoint is None else body.model
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": used}
    try:
        if body.stream:
            with_usage = body.stream_options is not None and body.stream_options.include_usage is True
            return event_stream(_events(chat, await context.stream(request), head, with_usage))
        result, usage = await context.result_with_usage(request)
    except SchemaError as error:
        raise _schema_error(chat, to_server_error(error)) from error
    choice = {"index": 0, "message": _message(chat, result), "logprobs": None}
    choice["finish_reason"] = _finish_reason(chat, result)
    return {**head, "object": "chat.completion", "choices": [choice], "usage": _usage(usage)}


@router.get(
    "/v1/models/{name:path}", summary="Model", response_model=ModelCard, responses=openai_error_responses(401, 404)
)
def model(name: str, http: HttpRequest) -> dict[str, Any]:
    """Return the model card, for any model name that chat completions accept."""
    service = get_service(http)
    checkpoint = _select_checkpoint(name, service)
    if checkpoint is not None:
        return operations.model_card(name, checkpoint.file(service.finetunes).stat().st_mtime)
    return operations.model_card(service.name)


def _select_checkpoint(name: str | None, service: Service) -> Checkpoint | None:
    """Return the checkpoint that a model name selects, None for the model of this server.

    Any name that contains "moondream" and no "@" means the model of this server.

    Raises:
        ServerError: 404; this server does not have the model or the checkpoint.
    """
    served = service.name
    if name is None or name == served or ("moondream" in name.lower() and "@" not in name):
        return None
    checkpoint = service.find_checkpoint(name)
    if checkpoint is not None:
        return checkpoint
    reason = "has no finetunes and " if "@" in name else ""
    raise ServerError(
        404,
        f"the model {name!r:.200} does not exist; this server {reason}serves {served!r}",
        kind="model_not_found",
        param="model",
    )


def _schema_error(chat: ParsedChat, error: ServerError) -> ServerError:
    """Return an error with the parameter that contained the JSON schema: `tools` for a forced call."""
    if chat.call is None or error.param != "response_format":
        return error
    message = error.message.removeprefix("response_format: ")
    return ServerError(error.status, f"tools: {message}", kind=error.kind, param="tools")


def _message(chat: ParsedChat, result: Any) -> dict[str, Any]:
    """Return the message of the assistant."""
    if isinstance(result, DetectResult | PointResult):
        return {"role": "assistant", "content": json.dumps(result.to_dict()), "refusal": None}
    reasoning = {} if result.reasoning is None else {"reasoning": result.reasoning.to_dict()}
    message = {"role": "assistant", "content": result.answer, "refusal": None, **reasoning}
    if chat.call is None:
        return message
    return {**message, "content": None, "tool_calls": [_tool_call(chat.call, result.answer)]}


def _tool_call(call: ForcedCall, arguments: str) -> dict[str, Any]:
    function = {"name": call.name, "arguments": arguments}
    return {"id": f"call_{uuid.uuid4().hex}", "type": "function", "function": function}


def _finish_reason(chat: ParsedChat, result: Any) -> str:
    """Return the finish reason. A truncated list of boxes or points is complete JSON, so it counts as finished."""
    if result.truncated and not isinstance(result, DetectResult | PointResult):
        return "length"
    return "stop" if chat.call is None else chat.call.finish_reason


def _usage(usage: Usage) -> dict[str, int] | None:
    """Return the token counts; None if a remote model does not report them."""
    if not usage.prompt_tokens:
        return None
    return {**usage._asdict(), "total_tokens": sum(usage)}


async def _events(chat: ParsedChat, stream: Stream, head: dict[str, Any], with_usage: bool) -> AsyncIterator[bytes]:
    """Yield the events of a streamed answer. An error becomes the last event."""
    head = {**head, "object": "chat.completion.chunk"}

    def chunk(delta: dict[str, Any], reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return event({**head, "choices": [choice], **({"usage": None} if with_usage else {})})

    try:
        yield chunk(_first_delta(chat))
        async for delta in _deltas(chat, stream):
            yield chunk(delta)
        yield chunk({}, _finish_reason(chat, stream.result))
        if with_usage:
            yield event({**head, "choices": [], "usage": _usage(stream.usage)})
    except ServerError as error:
        yield event(error_body(_schema_error(chat, error)))
        return
    yield event("[DONE]")


def _first_delta(chat: ParsedChat) -> dict[str, Any]:
    """Return the first delta of a message; for a tool call, it has everything except the arguments."""
    if chat.call is None:
        return {"role": "assistant", "content": ""}
    return {"role": "assistant", "content": None, "tool_calls": [{"index": 0, **_tool_call(chat.call, "")}]}


async def _deltas(chat: ParsedChat, stream: Stream) -> AsyncIterator[dict[str, Any]]:
    """Yield the further deltas of a message: reasoning, text, arguments, or the JSON of boxes and points."""
    name = LISTS.get(chat.kind.skill)
    if name is None:
        async for piece in stream:
            if isinstance(piece, Reasoning):
                yield {"reasoning": piece.to_dict()}
            elif chat.call is None:
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
