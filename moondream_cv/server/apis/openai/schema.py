"""What answers look like in OpenAI's dialect, for the published schema.

These models describe; they are not what makes the answers, which is left to `openai` and `operations`.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from moondream_cv.server.apis.error_responses import refusals as documented
from moondream_cv.server.apis.moondream import Thoughts


class ToolCallFunction(BaseModel):
    """The function to call; `arguments` is JSON, which is incomplete if a limit truncated it."""

    name: str
    arguments: str


class ToolCall(BaseModel):
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
    reasoning: Thoughts | None = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(BaseModel):
    """The one answer.

    `finish_reason` is "length" if a limit truncated the answer, and "tool_calls" for `tool_choice` "required".
    """

    index: int
    message: ChatAnswer
    logprobs: None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatUsage(BaseModel):
    """Positions of the model's context; those of the prompt include the image's."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatCompletion(BaseModel):
    """A whole answer. `usage` is null where a remote model does not tell it; `created` is in seconds of Unix time."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: ChatUsage | None


class ModelCard(BaseModel):
    """The model, for OpenAI's clients; `created` is when this process started, in seconds of Unix time."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelDescription(BaseModel):
    """The model, for Moondream's clients; `has_scores`: whether confidences are real, otherwise they are 1.0."""

    id: str
    name: str
    description: str
    version: str
    skills: list[str]
    has_scores: bool


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelCard]
    models: list[ModelDescription]


class OpenAIErrorDetail(BaseModel):
    """`type` is the class of an error, `code` what it is exactly, where there is a word for that."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIError(BaseModel):
    error: OpenAIErrorDetail


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What a route answers beside its success, as FastAPI's `responses`.

    Args:
        *statuses: Those that it can answer.
    """
    return documented(OpenAIError, *statuses, "4XX")
