"""`ServerSettings`: the settings of a server."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from moondream_cv.arguments import check_integer, check_positive

MIB = 2**20
_HOST = re.compile(r"\*|[a-z0-9._-]+|[0-9a-f:.]+", re.IGNORECASE)
_ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^/\s]+", re.IGNORECASE)


@dataclass(frozen=True)
class ServerSettings:
    """Limits and access rules of a server.

    Attributes:
        api_keys: Valid API keys; if empty, no key is required.
        queue: Maximum number of concurrent requests, including those that decode; further ones get 429.
        timeout: Time limit per request in seconds, measured from the start of its processing; slower requests get 504.
        drain: Maximum time in seconds that a shutdown waits for running requests.
        max_body: Maximum size of a request body in bytes.
        max_pixels: Maximum number of pixels of an image, checked before decoding.
        max_download: Maximum size of an image file from a URL in bytes.
        keep: Size of the cache of decoded images in bytes.
        private_urls: Whether image URLs can lead to loopback, private and link-local addresses.
        cors_origins: Origins whose pages can call the server from a browser; "*" allows every page.
        connections_per_client: Maximum number of open connections per address. A further one closes the oldest
            connection without a complete request.
        allowed_hosts: Host names that are accepted in the Host header, in addition to loopback; "*" accepts all. Host
            names are not checked if there are API keys.
        decode_timeout: Time limit for decoding one image in seconds.
        page: Whether to serve the playground at `/`.
        finetunes: Folder of the finetunes for the tuning API; None: `MOONDREAM_CV_FINETUNES`, or a folder in the data
            folder of the user.
        replicas: Number of processes that share the requests. If there are several, requests that depend on earlier
            requests to the same process are rejected.
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
    finetunes: Path | None = None
    replicas: int = 1

    def __post_init__(self) -> None:
        for name in ("queue", "max_body", "max_pixels", "max_download", "keep", "connections_per_client", "replicas"):
            check_integer(name, getattr(self, name))
        for name in ("timeout", "drain", "decode_timeout"):
            check_positive(name, getattr(self, name), "seconds")
        for host in self.allowed_hosts:
            if not _HOST.fullmatch(host):
                raise ValueError(f"an allowed host must be a name without scheme and port, got {host!r}")
        for origin in self.cors_origins:
            if not _ORIGIN.fullmatch(origin):
                raise ValueError(f"a CORS origin must be like https://page.example, without a path, got {origin!r}")
        if any(not key.strip() or not key.isascii() for key in self.api_keys):
            raise ValueError("API keys must be ASCII and must not be blank")
