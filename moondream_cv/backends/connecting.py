"""`connect(url)`: which dialect a server speaks, by its name or by what it answers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from moondream_cv.backends.addresses import Address, find_key, redacted
from moondream_cv.backends.base import RemoteModel
from moondream_cv.backends.fal import APP, FAL, Fal
from moondream_cv.backends.http import PROBE_TIMEOUT, Http, check_seconds
from moondream_cv.backends.moondream import MoondreamAPI
from moondream_cv.backends.openai import OpenAICompatible
from moondream_cv.backends.roboflow import RoboflowInference
from moondream_cv.errors import BackendError

DIALECTS: dict[str, Callable[..., RemoteModel]] = {
    "roboflow": RoboflowInference,
    "moondream": MoondreamAPI,
    "openai": OpenAICompatible,
    "fal": Fal,
}
_HOSTS = {  # the host, or what follows its first part
    "moondream.ai": "moondream",
    "roboflow.com": "roboflow",
    "openai.com": "openai",
    "fal.run": "fal",
    "fal.ai": "fal",
}


def connect(url: str, dialect: str = "auto", *, api_key: str | None = None, **options: Any) -> RemoteModel:
    """Use a model that runs on a server.

    Args:
        url: The server, such as "http://localhost:9001" or "https://api.moondream.ai/v1".
        dialect: "roboflow", "moondream", "openai" or "fal"; "auto" knows the hosts of these four by name, and asks any
            other server what it is.
        api_key: The key; None takes the dialect's environment variable, and "" sends none.
        options: Further arguments of `RoboflowInference`, `MoondreamAPI`, `OpenAICompatible` or `Fal`.

    Returns:
        A model for `Detector` and `Pointer`, and with the published model's methods.

    Raises:
        BackendError: With "auto": there is no server, or it does not say what it is.
        ValueError: An argument is out of range.
    """
    if dialect != "auto" and dialect not in DIALECTS:
        raise ValueError(f"dialect must be one of auto, {', '.join(DIALECTS)}, not {dialect!r}")
    address = Address.of(url)
    chosen = dialect
    if dialect == "auto":
        chosen = known_dialect(address) or _asked(address, api_key, options.get("timeout", PROBE_TIMEOUT))
    if chosen == "fal" and address.host in ("fal.ai", "www.fal.ai", "queue.fal.run"):
        url = f"{FAL}{APP}"  # the same app, where it answers at once
    elif chosen == "openai" and dialect == "auto":
        url = url if address.host.endswith("openai.com") else _with_v1(url)
    try:
        return _open(chosen, url, api_key, options)
    except TypeError as error:
        if "unexpected keyword" not in str(error):
            raise
        raise ValueError(f"the dialect {chosen} has no such option: {error}") from error


def _open(dialect: str, url: str, api_key: str | None, options: dict[str, Any]) -> RemoteModel:
    model = DIALECTS[dialect](url, api_key=api_key, **options)
    model.reconnect = functools.partial(_open, dialect, url, api_key, options)
    return model


def known_dialect(address: Address) -> str | None:
    """The dialect of a host that is known by its name; None of any other."""
    return next((name for host, name in _HOSTS.items() if f".{address.host}".endswith(f".{host}")), None)


def _asked(address: Address, api_key: str | None, timeout: float) -> str:
    """The dialect of a server, by its routes.

    Args:
        timeout: Seconds that each look may take, if it is less than usual.

    Raises:
        BackendError: There is no server, or nothing tells.
    """
    check_seconds("timeout", timeout)
    key = find_key(api_key)
    headers = {} if key is None else {"X-Moondream-Auth": key, "Authorization": f"Bearer {key}"}
    http = Http(address, headers=headers, secrets=(key,), timeout=min(timeout, PROBE_TIMEOUT), retries=0, max_idle=1)
    try:
        looked = http.probe("/models" if address.path.endswith("/v1") else "/v1/models")
        if not looked.status:
            raise BackendError(f"{address.url} did not answer within {http.timeout:g} s; name its dialect to go on")
        reply = looked.reply or {}
        if isinstance(reply.get("models"), list):
            return "moondream"
        if isinstance(reply.get("data"), list):
            return "openai"
        info = http.probe("/info").reply or {}
        if {"name", "version", "uuid"} & info.keys():
            return "roboflow"
    finally:
        http.close()
    refused = "; it wants a key: pass api_key=" if looked.status in (401, 403) else ""
    raise BackendError(
        redacted(f"{address.url} does not say what it is{refused}; name its dialect: {', '.join(DIALECTS)}", [key])
    )


def _with_v1(url: str) -> str:
    """The URL under which the list of models was found."""
    stem = url.strip().rstrip("/")
    return stem if stem.endswith("/v1") else f"{stem}/v1"
