"""What an operator can choose about a server."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

MIB = 2**20
_HOST = re.compile(r"\*|[a-z0-9._-]+|[0-9a-f:.]+", re.IGNORECASE)
_ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^/\s]+", re.IGNORECASE)


@dataclass(frozen=True)
class ServerOptions:
    """How a server behaves towards its clients.

    Attributes:
        api_keys: What opens the server; none: everyone may use it.
        queue: Requests that are taken at a time, those that decode included; one more is answered with 429.
        timeout: Seconds that a request may take, from when it is taken; then it is answered with 504.
        drain: Seconds that a shutdown waits for what is running.
        max_body: Bytes of a request's body at the most.
        max_pixels: Pixels of an image at the most, judged before it is decoded.
        max_download: Bytes that an image URL may give at the most.
        keep: Bytes of decoded images that are kept for when the same file comes again.
        private_urls: Whether image URLs may lead to loopback, private and link-local addresses.
        cors_origins: Origins whose pages may call the server from a browser; "*" is every page.
        connections_per_client: Maximum open connections from one address; a further one closes the oldest silent one.
        allowed_hosts: Host names that requests may be addressed to, besides loopback and the address that the server
            listens on; "*" allows all. They are not checked if there are API keys.
        decode_timeout: Time limit for decoding one image, in seconds.
        page: Whether the playground is served at `/`.
    """

    api_keys: tuple[str, ...] = field(default=(), repr=False)
    queue: int = 256
    timeout: float = 120.0
    drain: float = 30.0
    max_body: int = 32 * MIB
    max_pixels: int = 50_000_000
    max_download: int = 20 * MIB
    keep: int = 256 * MIB
    private_urls: bool = False
    cors_origins: tuple[str, ...] = ()
    connections_per_client: int = 512
    allowed_hosts: tuple[str, ...] = ()
    decode_timeout: float = 10.0
    page: bool = True

    def __post_init__(self) -> None:
        for name in ("queue", "max_body", "max_pixels", "max_download", "keep", "connections_per_client"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, not {value!r}")
        for name in ("timeout", "drain", "decode_timeout"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"{name} must be a number of seconds above 0, not {value!r}")
        for host in self.allowed_hosts:
            if not _HOST.fullmatch(host):
                raise ValueError(f"an allowed host must be a name without scheme and port, got {host!r}")
        for origin in self.cors_origins:
            if not _ORIGIN.fullmatch(origin):
                raise ValueError(f"a CORS origin must be like https://page.example, without a path, got {origin!r}")
        if any(not key.strip() or not key.isascii() for key in self.api_keys):
            raise ValueError("an API key must be ASCII text and not be blank")
