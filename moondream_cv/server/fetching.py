"""Downloads the images that clients of the server name by URL, from the public internet alone.

A client chooses the URL, so the server must not become its way into the network that the server stands in. Names, and
every spelling of an address, are resolved first; what counts is the address of the connection itself: a socket is made
only for an address that `is_public` allows, once per connection, so that neither a name that points inside, nor one
that changes its answer, nor a redirect gets through. Any port but 0 is allowed.

What cannot be seen from here: public addresses that a firewall treats as inside, this machine's own among them, and
IPv4 addresses behind a NAT64 prefix of the operator's own. Whether the bytes are an image is left to
`moondream_cv.images`; reading `data:` URLs and caching, to the dialects.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import re
import socket
from typing import TYPE_CHECKING, Any

from moondream_cv import __version__
from moondream_cv.errors import ImageError, MoondreamError

if TYPE_CHECKING:
    from aiohttp import ClientResponse, ClientSession
    from aiohttp.abc import AbstractResolver
    from yarl import URL

logger = logging.getLogger(__name__)

LONGEST_URL = 8192  # characters
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_UNWRITABLE = re.compile(r"[\x00-\x20\x7f\\]")  # what URL parsers drop, or read in different ways
_NAME = re.compile(r"[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*\.?")
_NUMBER = re.compile(r"(0x[0-9a-f]*|[0-9]+)\.?")  # a last label by which systems take the host for an address
_INSTEAD = "or send the image itself, in base64"
_STOPPING = f"images are no longer downloaded, since the server is stopping; try later, {_INSTEAD}"

# IANA's registry of special-purpose addresses, multicast and reserved space, and 168.63.129.16, where Azure answers the
# machine that asks. Python's own `is_global` differs between its versions.
_SPECIAL_V4 = tuple(
    ipaddress.IPv4Network(network)
    for network in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "168.63.129.16/32", "169.254.0.0/16"),
        *("172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15"),
        *("198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
    )
)
# Loopback, private, link-local, multicast, mapped and NAT64 addresses all lie outside of this.
_UNICAST_V6 = ipaddress.IPv6Network("2000::/3")
# Teredo and other protocols, documentation, 6to4, documentation.
_SPECIAL_V6 = tuple(
    ipaddress.IPv6Network(network) for network in ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")
)
_ISATAP = frozenset({0x0000_5EFE, 0x0200_5EFE})  # bits 32 to 63, before an IPv4 address


class _PrivateAddress(OSError):
    """A connection that was refused before it was tried; an `OSError`, since aiohttp passes those on."""


def is_public(address: str) -> bool:
    """Whether an address belongs to a host on the public internet.

    Args:
        address: An IPv4 address as four decimal numbers, or an IPv6 address.

    Returns:
        False for loopback, private, shared, link-local, multicast, reserved, documentation and metadata addresses, for
        IPv6 addresses that carry an IPv4 address or a zone, and for text that is no address.
    """
    parsed = _parsed(address)
    if isinstance(parsed, ipaddress.IPv4Address):
        return not any(parsed in network for network in _SPECIAL_V4)
    if parsed is None or parsed.scope_id is not None or (int(parsed) >> 32) & 0xFFFF_FFFF in _ISATAP:
        return False
    return parsed in _UNICAST_V6 and not any(parsed in network for network in _SPECIAL_V6)


def _parsed(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(address)
    except ValueError:
        return None


class Fetcher:
    """Downloads what image URLs name; safe to use from one event loop.

    Nothing is kept between downloads: no cookies, no connections, no looked-up names. Proxies and credentials of the
    environment are not used.
    """

    def __init__(
        self,
        *,
        max_bytes: int,
        timeout: float = 10.0,
        max_redirects: int = 3,
        allow_private: bool = False,
        resolver: AbstractResolver | None = None,
    ) -> None:
        """Prepare to download; nothing is opened until the first `fetch`.

        Args:
            max_bytes: The largest image file that is accepted, in bytes.
            timeout: What one download may take in seconds, with looking up the name, connecting and redirects.
            max_redirects: How many redirects are followed.
            allow_private: Connect to any address, this machine's own included.
            resolver: Who looks up host names. None: aiohttp's default, which is aiodns where that is installed, else
                the operating system in a thread.

        Raises:
            ValueError: A limit is out of range.
        """
        if max_bytes < 1:
            raise ValueError(f"max_bytes={max_bytes} leaves room for no image; give at least 1")
        if not 0 < timeout < float("inf"):
            raise ValueError(f"timeout={timeout} is not a time limit; give a number of seconds above 0")
        if max_redirects < 0:
            raise ValueError(f"max_redirects={max_redirects} is below 0; 0 follows none")
        self._max_bytes = max_bytes
        self._timeout = timeout
        self._max_redirects = max_redirects
        self._allow_private = allow_private
        self._resolver = resolver
        self._open: tuple[ClientSession, asyncio.Future[None]] | None = None
        self._closed = False

    async def fetch(self, url: str) -> bytes:
        """Return the body that a URL gives.

        Args:
            url: An http or https URL without credentials, of at most `LONGEST_URL` characters.

        Returns:
            At least one byte and at most `max_bytes`; whether they are an image is not checked.

        Raises:
            ImageError: The URL is malformed or leads to a private address; or the download fails, takes too long, is
                empty or too large. The message names the host that was asked for, never an address that it has.
            MoondreamError: aiohttp is not installed.
        """
        session, closing = self._open_session()
        target = _checked_url(url)
        download = asyncio.ensure_future(self._follow(session, target))
        either: set[asyncio.Future[Any]] = {download, closing}
        try:
            await asyncio.wait(either, timeout=self._timeout, return_when=asyncio.FIRST_COMPLETED)
            if download.done():
                return download.result()
        finally:
            download.cancel()
        if self._closed:
            raise ImageError(_STOPPING)
        raise ImageError(f"{_name(target)} took longer than {self._timeout:g} s; try again, {_INSTEAD}")

    async def close(self) -> None:
        """End downloads that still run and refuse new ones; may be called more than once."""
        self._closed = True
        if self._open is not None:
            session, closing = self._open
            if not closing.done():
                closing.set_result(None)  # closing the session alone leaves downloads waiting for their next bytes
            await session.close()

    def _open_session(self) -> tuple[ClientSession, asyncio.Future[None]]:
        """The session, and what is done once it is being closed."""
        if self._closed:
            raise ImageError(_STOPPING)
        if self._open is None:
            try:
                import aiohttp
            except ImportError as error:
                raise MoondreamError('image URLs need aiohttp; pip install "moondream-cv[server]"') from error
            session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(
                    socket_factory=None if self._allow_private else _public_socket,
                    resolver=self._resolver,
                    use_dns_cache=False,
                    force_close=True,
                ),
                headers={"User-Agent": f"moondream-cv/{__version__}", "Accept-Encoding": "identity"},
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=None),  # `fetch` keeps the time, over all redirects
                auto_decompress=False,
            )
            self._open = session, asyncio.get_running_loop().create_future()
        return self._open

    async def _follow(self, session: ClientSession, url: URL) -> bytes:
        """Ask a URL and those that it redirects to; each is checked like the first."""
        name = _name(url)
        for _ in range(self._max_redirects + 1):
            answer = await self._ask(session, url, name)
            if isinstance(answer, bytes):
                return answer
            url = answer
        raise ImageError(f"{name} redirects more than {self._max_redirects} times; give the last URL, {_INSTEAD}")

    async def _ask(self, session: ClientSession, url: URL, name: str) -> bytes | URL:
        """The body of one answer, or where it redirects to."""
        import aiohttp

        try:
            async with session.get(url, allow_redirects=False) as response:
                if response.status not in _REDIRECTS:
                    return await self._read(response, name)
                location = response.headers.get("Location")
        except ImageError:
            raise
        except aiohttp.ClientConnectorDNSError as error:
            raise ImageError(f"{name}: the host was not found; check its spelling, {_INSTEAD}") from error
        except aiohttp.ClientConnectorCertificateError as error:
            raise ImageError(f"{name}: the host's certificate is not trusted; use another host, {_INSTEAD}") from error
        except aiohttp.ClientConnectorError as error:
            if isinstance(error.os_error, _PrivateAddress):
                raise _refusal(url, f"{name} leads to a private address; use a public host, {_INSTEAD}") from error
            raise ImageError(f"{name}: the host takes no connections; check the URL, {_INSTEAD}") from error
        except (aiohttp.ClientError, OSError, RuntimeError, ValueError) as error:
            raise ImageError(f"{name}: the download broke off; try again, {_INSTEAD}") from error
        if not location:
            raise ImageError(f"{name} redirects without saying where to; use another URL, {_INSTEAD}")
        return _checked_url(location, base=url)

    async def _read(self, response: ClientResponse, name: str) -> bytes:
        if not 200 <= response.status < 300:
            raise ImageError(f"{name}: the host answered with status {response.status}; check the URL, {_INSTEAD}")
        encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
        if encoding not in ("", "identity"):  # a few compressed bytes could stand for more than memory holds
            raise ImageError(f"{name} comes compressed, though that was not asked for; use another host, {_INSTEAD}")
        too_large = f"{name} is larger than the {self._max_bytes} bytes that are accepted; send a smaller one"
        if (response.content_length or 0) > self._max_bytes:
            raise ImageError(too_large)
        body = bytearray()
        async for chunk in response.content.iter_any():
            body += chunk
            if len(body) > self._max_bytes:
                raise ImageError(too_large)
        if not body:
            raise ImageError(f"{name} is empty: the host answered with no bytes; check the URL, {_INSTEAD}")
        return bytes(body)


def _public_socket(addr_info: tuple[Any, Any, int, str, tuple[Any, ...]]) -> socket.socket:
    """A socket for the address that is about to be connected to (aiohttp's `socket_factory`), if it is a public one."""
    family, kind, protocol, _, address = addr_info
    if not is_public(address[0]):
        raise _PrivateAddress("private address")
    return socket.socket(family, kind, protocol)


def _checked_url(text: str, base: URL | None = None) -> URL:
    """Read a URL, or the redirect that `base` gave; the same object is checked and asked for.

    Raises:
        ImageError: It is no http or https URL of a plain host. Path, query and credentials may be secret: left out.
    """
    from yarl import URL

    which = "the image URL" if base is None else f"the redirect of {_name(base)}"
    expected = f"expected http://host/path or https://host/path; {_INSTEAD[3:]}, if it has no such URL"
    if len(text) > LONGEST_URL:
        raise _refusal(base, f"{which} has {len(text)} characters, more than {LONGEST_URL}; use a shorter URL")
    if bad := _UNWRITABLE.search(text):
        code = f"%{ord(bad[0]):02X}"
        raise _refusal(base, f"{which} contains {bad[0]!r}, which is not allowed in URLs; write it as {code}")
    try:
        url = URL(text) if base is None else base.join(URL(text))
        host, port = url.raw_host or "", url.port
    except ValueError as error:
        raise _refusal(base, f"{which} has a host or port that cannot be read; {expected}") from error
    if url.scheme not in ("http", "https"):
        scheme = url.scheme[:20]
        raise _refusal(base, f"{which} begins with {scheme + ':' if scheme else 'no scheme'!r}; {expected}")
    if not _is_host(host):
        raise _refusal(base, f"{which} has the host {host[:80]!r}, not a name or plain address; {expected}")
    if url.raw_user is not None or url.raw_password is not None:
        raise _refusal(url, f"{which} contains a user name or password; use a URL without, {_INSTEAD}")
    if not port:
        raise _refusal(url, f"{which} has port {port}; use another, or none")
    return url


def _is_host(host: str) -> bool:
    """Whether a host is a name or an address in its usual form: not 127.1, 0x7f000001, nor with percent signs."""
    if _NUMBER.fullmatch(host.removesuffix(".").rpartition(".")[2]) or ":" in host:
        return _parsed(host) is not None
    return len(host) <= 254 and _NAME.fullmatch(host) is not None


def _name(url: URL) -> str:
    return f"the image at {str(url.origin())!r}"


def _refusal(url: URL | None, message: str) -> ImageError:
    """The error for a URL that is not followed; the log names its host alone, where it is known."""
    logger.info("refused to download an image: host %s", "unknown" if url is None else url.raw_host)
    return ImageError(message)
