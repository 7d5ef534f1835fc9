"""URLs: recognition, and removal of secrets for messages."""

from __future__ import annotations

import re

_SCHEME = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)  # at least two letters, since "C://" is a drive


def is_url(text: object) -> bool:
    """Return whether a value is a string that begins with a scheme such as `http://`."""
    return isinstance(text, str) and _SCHEME.match(text.strip()) is not None


def shown_url(url: str) -> str:
    """Return a URL for messages: without user, password, query and fragment, at most 200 characters.

    Args:
        url: Valid or invalid URL.
    """
    bare = re.split(r"[?#]", url.strip())[0]
    scheme, separator, rest = bare.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"[:200] if separator else bare.rpartition("@")[2][:200]
