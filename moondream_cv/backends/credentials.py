"""API keys: lookup in the environment, and redaction in messages."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from urllib.parse import quote

_MIN_SECRET_PART = 6  # characters; hiding shorter parts of a key would garble messages
_MAX_VISIBLE_REST = 3  # characters of a truncated key that may be shown
_ELLIPSIS = "..."


def find_api_key(api_key: str | None, *variables: str) -> str | None:
    """Return the given API key, or the first one set in the environment.

    Args:
        api_key: API key. None reads the environment variables, and an empty string means no key.
        *variables: Names of environment variables, in order of precedence.

    Raises:
        ValueError: The key is not a string of printable ASCII characters.
    """
    if api_key is not None and not isinstance(api_key, str):
        raise ValueError(f"api_key must be a string, got {type(api_key).__name__}")
    found = api_key if api_key is not None else next(filter(None, map(os.environ.get, variables)), "")
    key = found.strip()
    if not (key.isascii() and key.isprintable()):
        raise ValueError("the API key must have printable ASCII characters only, without line breaks; copy it again")
    return key or None


def redact(text: str, secrets: Iterable[str | None]) -> str:
    """Return a text with keys and passwords replaced by asterisks.

    Also finds secrets that are quoted for a URL, parts of an `id:secret` key, and secrets truncated by `shorten`.

    Args:
        text: Text of a message.
        secrets: Keys and passwords; None is skipped.
    """
    hidden: set[str] = set()
    for secret in filter(None, secrets):
        parts = [part for part in secret.split(":") if len(part) >= _MIN_SECRET_PART]
        for part in (secret, *parts):
            hidden.update((part, quote(part), quote(part, safe=""), repr(part)[1:-1], json.dumps(part)[1:-1]))
    for form in sorted(hidden, key=len, reverse=True):
        text = text.replace(form, "***")
        for length in range(len(form) - 1, _MAX_VISIBLE_REST, -1):  # truncated by `shorten`
            text = text.replace(f"{form[:length]}{_ELLIPSIS}", f"***{_ELLIPSIS}")
    return text


def shorten(text: str, max_length: int = 300) -> str:
    """Return a text on one line, truncated to `max_length` characters; `redact` recognizes the truncation."""
    head = text[: 10 * max_length]  # avoids copying a text of many MiB
    joined = " ".join(head.split())
    return joined if len(joined) <= max_length and len(head) == len(text) else f"{joined[:max_length]}{_ELLIPSIS}"
