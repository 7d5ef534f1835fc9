"""Guard that blocks and records network access of this process to other machines.

    with refusing_network() as attempts:
        ...
    assert attempts == []

Python reports connections and name lookups to audit hooks before they happen. Access by native code
without Python's sockets is not detected, nor is access by other processes.
"""

from __future__ import annotations

import ipaddress
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_LOCAL_FAMILIES = {getattr(socket, name) for name in ("AF_UNIX", "AF_NETLINK") if hasattr(socket, name)}
_INTERNET_FAMILIES = {socket.AF_INET, socket.AF_INET6}


class NetworkRefused(ConnectionError):
    """A connection to another machine, or a lookup of its address."""


@contextmanager
def refusing_network() -> Iterator[list[str]]:
    """Raise `NetworkRefused` for connections to other machines and lookups of their names, in every thread.

    Yields:
        Descriptions of the blocked attempts so far, including those whose error was caught.
    """
    global _installed
    if not _installed:  # a hook cannot be removed
        sys.addaudithook(_hook)
        _installed = True
    attempts: list[str] = []
    _guards.append(attempts)
    try:
        yield attempts
    finally:
        _guards[:] = [guard for guard in _guards if guard is not attempts]


def is_here(host: object) -> bool:
    """Return whether a host is this machine."""
    if isinstance(host, (bytes, bytearray)):
        host = host.decode("ascii", "replace")
    if host is None or host in ("", "localhost"):
        return True
    try:
        address = ipaddress.ip_address(str(host))
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None) or address
    return bool(mapped.is_loopback or mapped.is_unspecified)


def _to(place: Any, address: Any) -> bool:
    """Return whether a socket sends to this machine."""
    if place.family in _INTERNET_FAMILIES:
        return address is None or is_here(address[0])  # None: the connected address
    return place.family in _LOCAL_FAMILIES


_EVENTS: dict[str, Callable[..., bool]] = {
    "socket.connect": _to,
    "socket.sendto": _to,
    "socket.sendmsg": _to,
    "socket.getaddrinfo": lambda host, *_: is_here(host),
    "socket.gethostbyname": is_here,
    "socket.gethostbyaddr": is_here,
    "socket.getnameinfo": lambda address: is_here(address[0]),
}
_guards: list[list[str]] = []
_installed = False


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _guards or event not in _EVENTS or _EVENTS[event](*arguments):
        return
    attempt = f"{event} {arguments[1] if _EVENTS[event] is _to else arguments[0]}"
    for guard in _guards:
        guard.append(attempt)
    raise NetworkRefused(f"network access is blocked: {attempt}")
