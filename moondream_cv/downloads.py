"""Download of images by URL.

The URL comes from the user of this process, so all hosts are allowed, including private addresses and the proxies of
the environment. `moondream_cv.server.fetching` downloads the URLs of server clients, from public addresses only.
"""

from __future__ import annotations

import time
from urllib.parse import urlsplit

from moondream_cv import __version__
from moondream_cv.errors import ImageError
from moondream_cv.urls import shown_url

MAX_BYTES = 256 * 2**20
"""Maximum size of a downloaded image file, in bytes."""

_IDLE_SECONDS = 20.0  # for connecting, and between two chunks of the file
_MAX_SECONDS = 300.0  # for the whole download
_MAX_REDIRECTS = 5


def check_image_url(url: str) -> None:
    """Check the syntax of an image URL, without network access.

    Raises:
        ImageError: The URL is not http or https, or has no valid host and port.
    """
    name = repr(shown_url(url))
    try:
        parts = urlsplit(url.strip())
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise ImageError(f"{name} has no valid host and port; write it as https://host/image.jpg") from error
    if parts.scheme.lower() not in ("http", "https"):
        raise ImageError(f"{name} is not an http or https URL; download the image first, and pass its path or bytes")
    if not host or any(character.isspace() for character in url.strip()):
        raise ImageError(f"{name} has no valid host and port; write it as https://host/image.jpg")


def download_image(url: str, *, max_bytes: int = MAX_BYTES, max_seconds: float = _MAX_SECONDS) -> bytes:
    """Return the content of an image URL, without decoding it.

    Args:
        url: An http or https URL. Up to 5 redirects are followed; a user and password in the URL are sent.
        max_bytes: Maximum size of the file in bytes.
        max_seconds: Time limit for the whole download in seconds.

    Raises:
        ImageError: The URL is malformed, or the download fails, takes too long, or is empty or too large. Messages
            contain neither the password nor the query of the URL.
    """
    import httpx

    check_image_url(url)
    name = repr(shown_url(url))
    deadline = time.monotonic() + max_seconds
    headers = {"User-Agent": f"moondream-cv/{__version__}", "Accept-Encoding": "identity"}
    try:
        with (
            httpx.Client(
                follow_redirects=True, max_redirects=_MAX_REDIRECTS, timeout=min(_IDLE_SECONDS, max_seconds)
            ) as client,
            client.stream("GET", url.strip(), headers=headers) as response,
        ):
            if not response.is_success:
                raise ImageError(f"{name}: the server returned status {response.status_code}; check the URL")
            # Read the body up to the limits
            content = bytearray()
            for chunk in response.iter_bytes():
                content += chunk
                if len(content) > max_bytes:
                    raise ImageError(f"{name} is larger than {max_bytes:,} bytes; download and shrink it first")
                if time.monotonic() > deadline:
                    raise ImageError(f"{name} took longer than {max_seconds:g} s; download it first, and pass its path")
    except httpx.TimeoutException as error:
        raise ImageError(f"{name}: the server did not respond in time; try again later") from error
    except httpx.TooManyRedirects as error:
        raise ImageError(f"{name} redirects more than {_MAX_REDIRECTS} times; pass the final URL") from error
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
        if isinstance(error, ImageError):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"{name} cannot be downloaded: {reason[:200]}; check the URL and the network") from error
    if not content:
        raise ImageError(f"{name} is empty: the server sent no data; check the URL")
    return bytes(content)
