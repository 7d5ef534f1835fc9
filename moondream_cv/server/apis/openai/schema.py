"""Schemas of responses in OpenAI's API.

These models only document responses; `routes.py` and `operations.py` build the responses.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from moondream_cv.server.apis.error_responses import error_responses
from moondream_cv.server.apis.moondream import ReasoningOutput


class ToolCallFunction(BaseModel):
    """The function to call; `arguments` is JSON, which is incomplete if a limit truncated it."""

    name: str
    arguments: str


class ToolCall(BaseModel):
    """A function call."""

    id: str
    type: Literal["function"]
    function: ToolCallFunction


class ChatAnswer(BaseModel):
    """The message of the assistant: `content`, or `tool_calls` if `tool_choice` forces the call of a function.

    `reasoning` is returned only on request.
    """

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning: ReasoningOutput | None = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(BaseModel):
    """The answer.

    `finish_reason` is "length" if a limit truncated the answer, and "tool_calls" for `tool_choice` "required".
    """

    index: int
    message: ChatAnswer
    logprobs: None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatUsage(BaseModel):
    """Token counts; `prompt_tokens` includes the positions of the image."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatCompletion(BaseModel):
    """A complete answer. `usage` is null if a remote model does not report it; `created` is in seconds of Unix time."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: ChatUsage | None


class ModelCard(BaseModel):
    """The model, for OpenAI clients; `created` is the start of this process in seconds of Unix time."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelDescription(BaseModel):
    """The model, for Moondream clients. If `has_scores` is false, all confidences are 1.0."""

    id: str
    name: str
    description: str
    version: str
    skills: list[str]
    has_scores: bool


class ModelList(BaseModel):
    """The list of models."""

    object: Literal["list"]
    data: list[ModelCard]
    models: list[ModelDescription]


class OpenAIErrorDetail(BaseModel):
    """An error: `type` is its class, and `code` identifies it within the class, if possible."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIError(BaseModel):
    """An error response."""

    error: OpenAIErrorDetail


def openai_error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the error responses of a route of OpenAI's API, for the `responses` argument of FastAPI.

    Args:
        *statuses: Statuses of the route.
    """
    return error_responses(OpenAIError, *statuses, "4XX")
