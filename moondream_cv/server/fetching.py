"""Downloads images from URLs of clients. `ssrf_protection.py` checks the URLs and the addresses."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from moondream_cv import __version__
from moondream_cv.arguments import check_integer, check_positive
from moondream_cv.errors import ImageError, MoondreamError
from moondream_cv.server.ssrf_protection import (
    BASE64_ADVICE,
    PrivateAddressError,
    check_url,
    describe_url,
    public_socket,
    rejection,
)

if TYPE_CHECKING:
    from aiohttp import ClientResponse, ClientSession
    from aiohttp.abc import AbstractResolver
    from yarl import URL

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_STOPPING = f"the server is shutting down and no longer downloads images; try again later, {BASE64_ADVICE}"


class Fetcher:
    """Downloads images in one event loop.

    Downloads share no cookies, connections or resolved names. Proxies and credentials of the environment are ignored.
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
        """Create a fetcher; the first `fetch` opens the session.

        Args:
            max_bytes: Maximum size of an image file in bytes.
            timeout: Time limit per download in seconds, including name resolution, connecting and redirects.
            max_redirects: Maximum number of redirects.
            allow_private: Whether to connect to any address, including this machine.
            resolver: Resolves host names; None uses aiohttp's default.

        Raises:
            ValueError: A limit is out of range.
        """
        self._max_bytes = check_integer("max_bytes", max_bytes)
        self._timeout = check_positive("timeout", timeout, "seconds")
        self._max_redirects = check_integer("max_redirects", max_redirects, 0)
        self._allow_private = allow_private
        self._resolver = resolver
        self._session: tuple[ClientSession, asyncio.Future[None]] | None = None
        self._closed = False

    async def fetch(self, url: str) -> bytes:
        """Download a file.

        Args:
            url: An http or https URL without credentials, with at most `MAX_URL_LENGTH` characters.

        Returns:
            Content of the file, between 1 and `max_bytes` bytes. Its format is not checked.

        Raises:
            ImageError: The URL is malformed or leads to a private address; or the download fails, takes too long, is
                empty or too large. The message contains the requested host, never its address.
            MoondreamError: aiohttp is not installed.
        """
        session, closing = self._open_session()
        target = check_url(url)
        download = asyncio.ensure_future(self._follow(session, target))
        events: set[asyncio.Future[Any]] = {download, closing}
        try:
            await asyncio.wait(events, timeout=self._timeout, return_when=asyncio.FIRST_COMPLETED)
            if download.done():
                return download.result()
        finally:
            download.cancel()
        if self._closed:
            raise ImageError(_STOPPING)
        raise ImageError(f"{describe_url(target)} took longer than {self._timeout:g} s; try again, {BASE64_ADVICE}")

    async def close(self) -> None:
        """Abort running downloads and reject new ones. Later calls do nothing."""
        self._closed = True
        if self._session is not None:
            session, closing = self._session
            if not closing.done():
                closing.set_result(None)  # closing only the session would leave downloads waiting for data
            await session.close()

    def _open_session(self) -> tuple[ClientSession, asyncio.Future[None]]:
        """Return the session, and a future that is done when the fetcher is closed."""
        if self._closed:
            raise ImageError(_STOPPING)
        if self._session is None:
            try:
                import aiohttp
            except ImportError as error:
                raise MoondreamError('image URLs need aiohttp; pip install "moondream-cv[server]"') from error
            session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(
                    socket_factory=None if self._allow_private else public_socket,
                    resolver=self._resolver,
                    use_dns_cache=False,
                    force_close=True,
                ),
                headers={"User-Agent": f"moondream-cv/{__version__}", "Accept-Encoding": "identity"},
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=None),  # `fetch` has a time limit that includes redirects
                auto_decompress=False,
            )
            self._session = session, asyncio.get_running_loop().create_future()
        return self._session

    async def _follow(self, session: ClientSession, url: URL) -> bytes:
        """Download a file and follow redirects; each location is checked like the first URL."""
        name = describe_url(url)
        for _ in range(self._max_redirects + 1):
            answer = await self._request(session, url, name)
            if isinstance(answer, bytes):
                return answer
            url = answer
        raise ImageError(f"{name} redirects more than {self._max_redirects} times; use the last URL, {BASE64_ADVICE}")

    async def _request(self, session: ClientSession, url: URL, name: str) -> bytes | URL:
        """Send one request. Return the body, or the location of a redirect.

        Raises:
            ImageError: The request failed.
        """
        import aiohttp

        # Send the request, and convert errors to messages for the client
        try:
            async with session.get(url, allow_redirects=False) as response:
                if response.status not in _REDIRECTS:
                    return await self._read(response, name)
                location = response.headers.get("Location")
        except ImageError:
            raise
        except aiohttp.ClientConnectorDNSError as error:
            raise ImageError(f"{name}: host not found; check the spelling, {BASE64_ADVICE}") from error
        except aiohttp.ClientConnectorCertificateError as error:
            raise ImageError(
                f"{name}: the certificate of the host is not trusted; use another host, {BASE64_ADVICE}"
            ) from error
        except aiohttp.ClientConnectorError as error:
            if isinstance(error.os_error, PrivateAddressError):
                raise rejection(
                    url, f"{name} leads to a private address; use a public host, {BASE64_ADVICE}"
                ) from error
            raise ImageError(f"{name}: cannot connect to the host; check the URL, {BASE64_ADVICE}") from error
        except (aiohttp.ClientError, OSError, RuntimeError, ValueError) as error:
            raise ImageError(f"{name}: the download was interrupted; try again, {BASE64_ADVICE}") from error

        # Check the location of the redirect
        if not location:
            raise ImageError(f"{name} redirects without a Location header; use another URL, {BASE64_ADVICE}")
        return check_url(location, base=url)

    async def _read(self, response: ClientResponse, name: str) -> bytes:
        """Return the body of a response.

        Raises:
            ImageError: The status is not 2xx; or the body is compressed, empty or too large.
        """
        if not 200 <= response.status < 300:
            raise ImageError(f"{name}: the host returned status {response.status}; check the URL, {BASE64_ADVICE}")
        encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
        if encoding not in ("", "identity"):  # a few compressed bytes can expand beyond the available memory
            raise ImageError(
                f"{name} is compressed, although uncompressed data was requested; use another host, {BASE64_ADVICE}"
            )
        too_large = f"{name} is larger than the maximum of {self._max_bytes} bytes; send a smaller image"
        if (response.content_length or 0) > self._max_bytes:
            raise ImageError(too_large)
        body = bytearray()
        async for chunk in response.content.iter_any():
            body += chunk
            if len(body) > self._max_bytes:
                raise ImageError(too_large)
        if not body:
            raise ImageError(f"{name} is empty: the host returned no data; check the URL, {BASE64_ADVICE}")
        return bytes(body)
