"""Server URLs: parsing, validation, and the separation of user and password."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from moondream_cv.urls import is_url, shown_url


@dataclass(frozen=True)
class ServerURL:
    """URL of a server, without user and password.

    Attributes:
        url: Scheme, host, port and path, without a trailing slash.
        auth: User and password from the URL; None if it has none.
    """

    url: str
    auth: tuple[str, str] | None = field(default=None, repr=False)

    @classmethod
    def parse(cls, url: str) -> ServerURL:
        """Parse and check a URL.

        Raises:
            ValueError: The URL is invalid, is not http or https, or has a query or a fragment.
        """
        if not isinstance(url, str):
            raise ValueError(
                f"the URL of a server must be a string such as 'http://localhost:2020', got {type(url).__name__}"
            )
        text = url.strip()
        problem = _find_problem(text)
        if problem:
            raise ValueError(f"{shown_url(text)!r} {problem}")
        parts = urlsplit(text)
        netloc = parts.netloc.rpartition("@")[2]
        auth = None if parts.username is None else (unquote(parts.username), unquote(parts.password or ""))
        return cls(f"{parts.scheme}://{netloc}{parts.path.rstrip('/')}", auth)

    @property
    def host(self) -> str:
        """Host name in lower case, without the port."""
        return urlsplit(self.url).hostname or ""

    @property
    def path(self) -> str:
        """Path without a trailing slash; empty at the root."""
        return urlsplit(self.url).path

    def with_suffix(self, path: str) -> ServerURL:
        """Return the URL with `path` appended, unless it already ends with it."""
        return self if f"{self.path}/".endswith(f"{path}/") else ServerURL(f"{self.url}{path}", self.auth)

    @property
    def secrets(self) -> tuple[str, ...]:
        """Parts of the URL that must not appear in messages."""
        return () if self.auth is None or not self.auth[1] else (self.auth[1],)


def _find_problem(url: str) -> str | None:
    """Return what makes a URL invalid, without quoting any part of the URL; None if it is valid."""
    if not is_url(url):
        return "is not a server URL; add the scheme, for example 'http://localhost:2020'"
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        return "has no valid host and port; write it as 'http://localhost:2020'"
    if parts.scheme not in ("http", "https"):
        return "must begin with http:// or https://"
    if not host or re.search(r"[\s\x00-\x1f\x7f\\]", url):
        return "has no valid host and port; write it as 'http://localhost:2020'"
    if parts.query or parts.fragment:
        return "must not have a query or a fragment; remove it, and pass a key as api_key="
    return None
