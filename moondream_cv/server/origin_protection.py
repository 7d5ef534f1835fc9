"""Protects servers without API keys from web pages: DNS rebinding and cross-site requests.

A page on any site can make the browser of its visitor send requests to this machine. A server with API keys does not
need this protection, because the page does not have a key.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import Scope

from moondream_cv.server.errors import ServerError
from moondream_cv.server.settings import ServerSettings

_HOST = re.compile(r"(\[(?P<address>[0-9a-f:.]+)\]|(?P<name>[a-z0-9._-]+))(:[0-9]{0,5})?")
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
WILDCARDS = frozenset({"0.0.0.0", "::", ""})


def allowed_hosts_for(listening: str) -> tuple[str, ...]:
    """Return the host names that requests may use, given the address that the server listens on.

    Args:
        listening: Host name or IP address; "0.0.0.0" and "::" mean every address of this machine.

    Returns:
        Names for `ServerSettings.allowed_hosts`, without loopback. "ip" allows every IP address, which is safe because
        a domain name of an attacker is never an IP address.
    """
    if listening in WILDCARDS:
        return ("ip", socket.gethostname().lower())
    return () if listening in LOOPBACK else (listening.lower(),)


def check_origin(scope: Scope, headers: Headers, settings: ServerSettings) -> None:
    """Reject requests to another host and requests from pages of other sites.

    Args:
        scope: ASGI scope of the request.
        headers: Headers of the request.
        settings: Settings with `allowed_hosts` and `cors_origins`.

    Raises:
        ServerError: 403.
    """
    # Check the Host header, against DNS rebinding
    hosts, origins = headers.getlist("host"), headers.getlist("origin")
    host = hosts[0] if len(hosts) == 1 else ""
    name = host_name(host)
    if "*" not in settings.allowed_hosts and not _is_allowed(name, settings.allowed_hosts):
        advice = f"start the server with --allowed-host {name[:100]} or with an API key"
        raise ServerError(
            403,
            f"the host {name[:100]!r} is not allowed; {advice}" if name else "the Host header is missing or invalid",
            kind="host_not_allowed",
        )

    # Check the Origin header, against cross-site requests
    allowed = set(settings.cors_origins)
    for origin in () if scope["method"] in ("GET", "HEAD", "OPTIONS") or "*" in allowed else origins:
        if origin in allowed or urlsplit(origin).netloc.lower() == host.lower():
            continue
        raise ServerError(
            403,
            f"the origin {origin[:100]!r} is not allowed; start the server with --cors {origin[:100]}, or configure"
            " the reverse proxy to forward the Host header",
            kind="origin_not_allowed",
        )


def host_name(host: str) -> str:
    """Return the name or address in a Host header, in lower case, without port, brackets and final dot.

    It is empty if the header is invalid.
    """
    found = _HOST.fullmatch(host.strip().lower())
    return (found["address"] or found["name"]).removesuffix(".") if found else ""


def _is_allowed(name: str, allowed: tuple[str, ...]) -> bool:
    if name in LOOPBACK or name in (host.lower() for host in allowed):
        return True
    return "ip" in allowed and _is_address(name)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
