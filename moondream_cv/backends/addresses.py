"""Where a server is and what opens it: URLs, API keys, and texts from which both are safe to show.

Speaking to the server is left to `http.py`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from urllib.parse import quote, unquote, urlsplit

from moondream_cv.urls import is_url, shown_url

_SHORTEST_PART = 6  # characters; shorter parts of a key are no secret, and hiding them would garble messages
_LONGEST_REST = 3  # characters of a cut key that may be seen
_CUT = "..."


@dataclass(frozen=True)
class Address:
    """A server's URL, less what must not be shown.

    Attributes:
        url: Scheme, host, port and path, without a slash at the end.
        auth: User and password, where the URL has them.
    """

    url: str
    auth: tuple[str, str] | None = field(default=None, repr=False)

    @classmethod
    def of(cls, url: str) -> Address:
        """Read a URL.

        Raises:
            ValueError: It is none, or has a query or a fragment.
        """
        if not isinstance(url, str):
            raise ValueError(f"a server's URL is a string such as 'http://localhost:2020', not {type(url).__name__}")
        text = url.strip()
        problem = _problem(text)
        if problem:
            raise ValueError(f"{shown_url(text)!r} {problem}")
        parts = urlsplit(text)
        netloc = parts.netloc.rpartition("@")[2]
        auth = None if parts.username is None else (unquote(parts.username), unquote(parts.password or ""))
        return cls(f"{parts.scheme}://{netloc}{parts.path.rstrip('/')}", auth)

    @property
    def host(self) -> str:
        """The host's name in lower case, without the port."""
        return urlsplit(self.url).hostname or ""

    @property
    def path(self) -> str:
        """The path, without a slash at the end; empty at the root."""
        return urlsplit(self.url).path

    def ending(self, path: str) -> Address:
        """This address with `path` at its end, where it does not end so already."""
        return self if f"{self.path}/".endswith(f"{path}/") else Address(f"{self.url}{path}", self.auth)

    @property
    def secrets(self) -> tuple[str, ...]:
        """What of the URL must not be shown."""
        return () if self.auth is None or not self.auth[1] else (self.auth[1],)


def find_key(api_key: str | None, *variables: str) -> str | None:
    """The key that was given, or else that of the first environment variable that has one.

    Args:
        api_key: None looks at the environment; an empty string means no key at all.

    Raises:
        ValueError: It cannot be sent.
    """
    if api_key is not None and not isinstance(api_key, str):
        raise ValueError(f"api_key must be a string, not {type(api_key).__name__}")
    found = api_key if api_key is not None else next(filter(None, map(os.environ.get, variables)), "")
    key = found.strip()
    if not (key.isascii() and key.isprintable()):
        raise ValueError("the API key has characters that no key has, such as line breaks or accents; copy it again")
    return key or None


def redacted(text: str, secrets: Iterable[str | None]) -> str:
    """A text without keys and passwords, also where it quotes them for a URL or only a part of an `id:secret`."""
    hidden: set[str] = set()
    for secret in filter(None, secrets):
        parts = [part for part in secret.split(":") if len(part) >= _SHORTEST_PART]
        for part in (secret, *parts):
            hidden.update((part, quote(part), quote(part, safe=""), repr(part)[1:-1], json.dumps(part)[1:-1]))
    for form in sorted(hidden, key=len, reverse=True):
        text = text.replace(form, "***")
        for length in range(len(form) - 1, _LONGEST_REST, -1):  # where `shortened` cut it
            text = text.replace(f"{form[:length]}{_CUT}", f"***{_CUT}")
    return text


def shortened(text: str, most: int = 300) -> str:
    """A text on one line, of so many characters at the most; `redacted` knows that it was cut."""
    head = text[: 10 * most]  # a text of many MiB is not copied
    joined = " ".join(head.split())
    return joined if len(joined) <= most and len(head) == len(text) else f"{joined[:most]}{_CUT}"


def _problem(url: str) -> str | None:
    """What is wrong with a URL, in words that quote nothing of it."""
    if not is_url(url):
        return "is not a server's URL; write it with its scheme, such as 'http://localhost:2020'"
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        return "has no valid host and port; write it such as 'http://localhost:2020'"
    if parts.scheme not in ("http", "https"):
        return "is neither http nor https"
    if not host or re.search(r"[\s\x00-\x1f\x7f\\]", url):
        return "has no valid host and port; write it such as 'http://localhost:2020'"
    if parts.query or parts.fragment:
        return "is followed by a query or a fragment; leave that away, and pass a key as api_key="
    return None
