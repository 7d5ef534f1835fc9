"""Error messages from the bodies of HTTP responses, in the formats of several servers."""

from __future__ import annotations

import json
from typing import Any

import httpx

from moondream_cv.backends.credentials import shorten
from moondream_cv.backends.retries import AttemptError


def error_message(response: httpx.Response) -> str:
    """Return the message in the body of an error response, shortened."""
    try:
        body = response.json()
    except (ValueError, RecursionError):
        if "html" in response.headers.get("content-type", ""):
            return "a web page"
        return shorten(response.text)
    return message_in_json(body) or shorten(json.dumps(body))


def message_in_json(body: Any) -> str:
    """Return the message in the JSON of an error, under any of the usual keys; an empty string if there is none."""
    if isinstance(body, str):
        return shorten(body)
    if isinstance(body, list):  # one entry per invalid field
        return shorten("; ".join(filter(None, map(message_in_json, body))))
    if not isinstance(body, dict):
        return ""
    return next(filter(None, (message_in_json(body.get(key)) for key in ("error", "message", "detail", "msg"))), "")


def raise_for_error(body: dict[str, Any]) -> None:
    """Raise for a JSON object with an `error` key; Moondream Station returns errors with status 200.

    Raises:
        AttemptError: The object has an error.
    """
    if body.get("error"):
        message = message_in_json(body) or shorten(repr(body["error"]))
        raise AttemptError(f"returned an error: {message}", retryable=body.get("status") == "rejected")  # queue full
