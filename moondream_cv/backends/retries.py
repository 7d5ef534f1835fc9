"""Retry policy: the error of a failed attempt, retryable status codes, and the delay before the next attempt."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime

MAX_RETRY_SECONDS = 30.0
"""Maximum delay before a retry in seconds; a longer `Retry-After` is cut to it."""
RETRIED_STATUSES = frozenset({408, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529})


class AttemptError(Exception):
    """Error of one attempt. It is raised to users as a `BackendError`, without a cause.

    Attributes:
        retryable: Whether another attempt may succeed.
        retry_after: Delay in seconds that the server requests; None if it requests none.
        timed_out: Whether the server did not respond in time.
    """

    def __init__(
        self, message: str, retryable: bool = False, retry_after: float | None = None, timed_out: bool = False
    ) -> None:
        """Create an error.

        Args:
            message: Message that follows the URL, such as "returned status 503".
            retryable: See the attribute.
            retry_after: See the attribute.
            timed_out: See the attribute.
        """
        super().__init__(message)
        self.retryable = retryable
        self.retry_after = retry_after
        self.timed_out = timed_out


def retry_delay(attempt: int, backoff: float, retry_after: float | None) -> float:
    """Return the delay before the next attempt in seconds, at most `MAX_RETRY_SECONDS`.

    Args:
        attempt: Number of attempts so far.
        backoff: Delay in seconds after the first attempt, doubled after each further one.
        retry_after: Delay in seconds that the server requests, which takes precedence; None if it requests none.
    """
    return min(MAX_RETRY_SECONDS, backoff * 2.0 ** min(attempt - 1, 30) if retry_after is None else retry_after)


def parse_retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the delay of a `Retry-After` header in seconds, given as seconds or as a date; None if there is none."""
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
