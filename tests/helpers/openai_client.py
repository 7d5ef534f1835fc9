"""Short functions for chat completions with OpenAI's client."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.served import Served

openai = pytest.importorskip("openai")

QUESTION = "How many objects are there?"
GREEDY = {"temperature": 0}
SOME = {"temperature": 1.0, "top_p": 0.95, "max_tokens": 30, "seed": 3}
LONG = {"temperature": 0, "max_tokens": 300}


def client_of(server: Served, **options: Any) -> Any:
    """Return a client without retries."""
    return openai.OpenAI(base_url=f"{server.url}/v1", **{"api_key": "any", "max_retries": 0, **options})


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}


def image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def user(*content: dict[str, Any] | str) -> dict[str, Any]:
    return {"role": "user", "content": content[0] if len(content) == 1 and isinstance(content[0], str) else content}


def assistant(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def ask(client: Any, messages: list[Any], **options: Any) -> Any:
    """Return a chat completion at temperature 0."""
    return client.chat.completions.create(model="tiny", messages=messages, **{**GREEDY, **options})


def named(name: str) -> dict[str, Any]:
    """Return a response format with a schema name."""
    return {"type": "json_schema", "json_schema": {"name": name, "schema": {"type": "object"}}}
