"""One try that failed: what the server says, whether another try may succeed, and when.

Nothing here sends anything.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from moondream_cv.backends.addresses import shortened

LONGEST_WAIT = 30.0
"""Seconds before a retry at the most, whatever `Retry-After` says."""
RETRIED = frozenset({408, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529})


class Failure(Exception):
    """One try that failed; what users see is a `BackendError` without a cause, whose message can be shown.

    Attributes:
        again: Whether another try may succeed.
        after: Seconds that the server asks to wait; None where it does not say.
        timed_out: Whether the server did not answer in time.
    """

    def __init__(self, message: str, again: bool = False, after: float | None = None, timed_out: bool = False) -> None:
        super().__init__(message)
        self.again = again
        self.after = after
        self.timed_out = timed_out


def wait_seconds(attempt: int, backoff: float, after: float | None) -> float:
    """Seconds before the next try: what the server asks for, or else doubling with each try, at most `LONGEST_WAIT`.

    Args:
        attempt: Tries so far.
        backoff: The wait after the first.
        after: What the server asks for.
    """
    return min(LONGEST_WAIT, backoff * 2.0 ** min(attempt - 1, 30) if after is None else after)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a `Retry-After` header asks to wait, given as seconds or as a date; None where it says nothing."""
    value = headers.get("retry-after", "").strip()
    try:
        seconds = float(value)
    except ValueError:
        try:
            date = parsedate_to_datetime(value)
        except (TypeError, ValueError):
            return None
        aware = date if date.tzinfo else date.replace(tzinfo=timezone.utc)
        seconds = (aware - datetime.now(timezone.utc)).total_seconds()
    return max(0.0, seconds) if math.isfinite(seconds) else None


def said_by(response: httpx.Response) -> str:
    """What the body of an error says, shortened."""
    try:
        body = response.json()
    except (ValueError, RecursionError):
        if "html" in response.headers.get("content-type", ""):
            return "a web page"
        return shortened(response.text)
    return error_text(body) or shortened(json.dumps(body))


def error_text(body: Any) -> str:
    """The message in an error's JSON, in any of the usual places; empty where there is none."""
    if isinstance(body, str):
        return shortened(body)
    if isinstance(body, list):  # what is wrong with each field
        return shortened("; ".join(filter(None, map(error_text, body))))
    if not isinstance(body, dict):
        return ""
    return next(filter(None, (error_text(body.get(key)) for key in ("error", "message", "detail", "msg"))), "")


def refuse_errors(reply: dict[str, Any]) -> None:
    """Moondream Station answers errors with status 200."""
    if reply.get("error"):
        said = error_text(reply) or shortened(repr(reply["error"]))
        raise Failure(f"answered an error: {said}", again=reply.get("status") == "rejected")  # its queue is full
