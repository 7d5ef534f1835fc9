"""Protection against server-side request forgery (SSRF): checks of image URLs and of the addresses they lead to.

Clients choose the URLs that the server downloads, so a URL must not give them access to the server's network. Host
names and all notations of addresses are resolved first. The check applies to the address of the connection: a socket is
created only for an address that `is_public` accepts, once per connection. This covers names that resolve to private
addresses, names that resolve differently a second time, and redirects. All ports except 0 are allowed.

Some cases cannot be detected here: public addresses that a firewall treats as internal, including those of this
machine, and IPv4 addresses behind a NAT64 prefix that the operator has chosen.
"""

from __future__ import annotations

import ipaddress
import logging
import re
import socket
from typing import TYPE_CHECKING, Any

from moondream_cv.errors import ImageError

if TYPE_CHECKING:
    from yarl import URL

logger = logging.getLogger(__name__)

MAX_URL_LENGTH = 8192  # characters
BASE64_ADVICE = "or send the image itself, in base64"
_FORBIDDEN = re.compile(r"[\x00-\x20\x7f\\]")  # characters that URL parsers drop, or interpret differently
_NAME = re.compile(r"[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*\.?")
_NUMBER = re.compile(r"(0x[0-9a-f]*|[0-9]+)\.?")  # a last label with which systems interpret the host as an address

# The IANA registry of special-purpose addresses, multicast and reserved addresses, and 168.63.129.16, a service address
# of Azure. Python's `is_global` differs between versions.
_SPECIAL_V4 = tuple(
    ipaddress.IPv4Network(network)
    for network in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "168.63.129.16/32", "169.254.0.0/16"),
        *("172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15"),
        *("198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
    )
)
# Loopback, private, link-local, multicast, mapped and NAT64 addresses are outside this network.
_UNICAST_V6 = ipaddress.IPv6Network("2000::/3")
# Teredo and other protocols, documentation, 6to4, documentation.
_SPECIAL_V6 = tuple(
    ipaddress.IPv6Network(network) for network in ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")
)
_ISATAP = frozenset({0x0000_5EFE, 0x0200_5EFE})  # bits 32 to 63, before an IPv4 address


class PrivateAddressError(OSError):
    """A connection to a private address was refused. aiohttp passes on only subclasses of `OSError`."""


def is_public(address: str) -> bool:
    """Return whether an address belongs to a host on the public internet.

    Args:
        address: An IPv4 address as four decimal numbers, or an IPv6 address.

    Returns:
        False for loopback, private, shared, link-local, multicast, reserved, documentation and metadata addresses, for
        IPv6 addresses with an embedded IPv4 address or a zone, and for text that is not an address.
    """
    parsed = _parse_address(address)
    if isinstance(parsed, ipaddress.IPv4Address):
        return not any(parsed in network for network in _SPECIAL_V4)
    if parsed is None or parsed.scope_id is not None or (int(parsed) >> 32) & 0xFFFF_FFFF in _ISATAP:
        return False
    return parsed in _UNICAST_V6 and not any(parsed in network for network in _SPECIAL_V6)


def public_socket(addr_info: tuple[Any, Any, int, str, tuple[Any, ...]]) -> socket.socket:
    """Return a socket for a connection to a public address. This is a `socket_factory` of aiohttp.

    Args:
        addr_info: Result of `socket.getaddrinfo` for the address.

    Raises:
        PrivateAddressError: The address is not public.
    """
    family, kind, protocol, _, address = addr_info
    if not is_public(address[0]):
        raise PrivateAddressError("private address")
    return socket.socket(family, kind, protocol)


def check_url(text: str, base: URL | None = None) -> URL:
    """Parse and check a URL. The returned object is the one to request, so that both use the same interpretation.

    Args:
        text: URL from a client, or the location of a redirect.
        base: URL that redirected; None for the URL from the client.

    Raises:
        ImageError: The text is not an http or https URL with a plain host. The message omits path, query and
            credentials, which can be secret.
    """
    from yarl import URL

    which = "the image URL" if base is None else f"the redirect of {describe_url(base)}"
    expected = f"expected http://host/path or https://host/path; {BASE64_ADVICE[3:]}, if it has no such URL"

    # Check the text
    if len(text) > MAX_URL_LENGTH:
        raise rejection(base, f"{which} has {len(text)} characters, more than {MAX_URL_LENGTH}; use a shorter URL")
    if bad := _FORBIDDEN.search(text):
        code = f"%{ord(bad[0]):02X}"
        raise rejection(base, f"{which} contains {bad[0]!r}, which is not allowed in URLs; write it as {code}")

    # Check the parts of the URL
    try:
        url = URL(text) if base is None else base.join(URL(text))
        host, port = url.raw_host or "", url.port
    except ValueError as error:
        raise rejection(base, f"{which} has an invalid host or port; {expected}") from error
    if url.scheme not in ("http", "https"):
        scheme = url.scheme[:20]
        raise rejection(base, f"{which} begins with {scheme + ':' if scheme else 'no scheme'!r}; {expected}")
    if not _is_host(host):
        raise rejection(base, f"{which} has the host {host[:80]!r}, not a name or plain address; {expected}")
    if url.raw_user is not None or url.raw_password is not None:
        raise rejection(url, f"{which} contains a user name or password; use a URL without them, {BASE64_ADVICE}")
    if not port:
        raise rejection(url, f"{which} has port {port}; use another port, or none")
    return url


def describe_url(url: URL) -> str:
    """Return a description of an image URL for messages, without path, query and credentials."""
    return f"the image at {str(url.origin())!r}"


def rejection(url: URL | None, message: str) -> ImageError:
    """Return the error for a rejected URL, and log its host.

    Args:
        url: The rejected URL, if it could be parsed.
        message: Message for the client.
    """
    logger.info("rejected an image URL: host %s", "unknown" if url is None else url.raw_host)
    return ImageError(message)


def _is_host(host: str) -> bool:
    """Return whether a host is a name, or an address in standard notation, unlike 127.1 or 0x7f000001."""
    if _NUMBER.fullmatch(host.removesuffix(".").rpartition(".")[2]) or ":" in host:
        return _parse_address(host) is not None
    return len(host) <= 254 and _NAME.fullmatch(host) is not None


def _parse_address(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(address)
    except ValueError:
        return None
