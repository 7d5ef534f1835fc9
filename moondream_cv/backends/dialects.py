"""Connection to a server: `connect` chooses the dialect by name, by host or by probing the server."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from moondream_cv.arguments import check_choice, check_positive
from moondream_cv.backends.base import RemoteModel
from moondream_cv.backends.credentials import find_api_key, redact
from moondream_cv.backends.fal import APP, FAL, Fal
from moondream_cv.backends.http import PROBE_TIMEOUT, HttpClient
from moondream_cv.backends.moondream import MoondreamAPI
from moondream_cv.backends.openai import OpenAICompatible
from moondream_cv.backends.roboflow import RoboflowInference
from moondream_cv.backends.server_url import ServerURL
from moondream_cv.errors import BackendError

DIALECTS: dict[str, Callable[..., RemoteModel]] = {
    "roboflow": RoboflowInference,
    "moondream": MoondreamAPI,
    "openai": OpenAICompatible,
    "fal": Fal,
}
_HOSTS = {  # domain → dialect
    "moondream.ai": "moondream",
    "roboflow.com": "roboflow",
    "openai.com": "openai",
    "fal.run": "fal",
    "fal.ai": "fal",
}


def connect(url: str, dialect: str = "auto", *, api_key: str | None = None, **options: Any) -> RemoteModel:
    """Connect to a model on a server.

    Args:
        url: URL of the server, such as "http://localhost:9001" or "https://api.moondream.ai/v1".
        dialect: API of the server: "roboflow", "moondream", "openai" or "fal". "auto" recognizes the hosts of these
            services, and probes any other server.
        api_key: API key. None reads the environment variable of the dialect, and an empty string sends no key.
        **options: Further arguments of `RoboflowInference`, `MoondreamAPI`, `OpenAICompatible` or `Fal`.

    Returns:
        A model for `Detector` and `Pointer`, which also has the methods of the published model.

    Raises:
        BackendError: With "auto", the server is unreachable or its dialect cannot be identified.
        ValueError: An argument is out of range.
    """
    check_choice("dialect", dialect, ("auto", *DIALECTS))
    server = ServerURL.parse(url)
    chosen = dialect
    if dialect == "auto":
        timeout = options.get("timeout", PROBE_TIMEOUT)
        chosen = known_dialect(server) or _probe_dialect(server, api_key, timeout)
    if chosen == "fal" and server.host in ("fal.ai", "www.fal.ai", "queue.fal.run"):
        url = f"{FAL}{APP}"  # the synchronous endpoint of the same app
    elif chosen == "openai" and dialect == "auto":
        url = url if server.host.endswith("openai.com") else _with_v1(url)
    try:
        return _create(chosen, url, api_key, options)
    except TypeError as error:
        if "unexpected keyword" not in str(error):
            raise
        raise ValueError(f"the dialect {chosen} does not have this option: {error}") from error


def _create(dialect: str, url: str, api_key: str | None, options: dict[str, Any]) -> RemoteModel:
    model = DIALECTS[dialect](url, api_key=api_key, **options)
    model.reconnect = functools.partial(_create, dialect, url, api_key, options)
    return model


def known_dialect(server: ServerURL) -> str | None:
    """Return the dialect of a well-known host; None for other hosts."""
    return next((name for host, name in _HOSTS.items() if f".{server.host}".endswith(f".{host}")), None)


def _probe_dialect(server: ServerURL, api_key: str | None, timeout: float) -> str:
    """Return the dialect of a server by its routes.

    Args:
        server: URL of the server.
        api_key: API key; the environment is not read, because the server may not be the key's.
        timeout: Time limit of each probe in seconds, at most `PROBE_TIMEOUT`.

    Raises:
        BackendError: The server is unreachable, or its dialect cannot be identified.
    """
    check_positive("timeout", timeout, "seconds")
    key = find_api_key(api_key)
    headers = {} if key is None else {"X-Moondream-Auth": key, "Authorization": f"Bearer {key}"}
    http = HttpClient(
        server, headers=headers, secrets=(key,), timeout=min(timeout, PROBE_TIMEOUT), retries=0, max_idle=1
    )

    # Probe the routes that distinguish the dialects
    try:
        probe = http.probe("/models" if server.path.endswith("/v1") else "/v1/models")
        if not probe.status:
            raise BackendError(f"{server.url} did not respond within {http.timeout:g} s; pass dialect= to skip probing")
        body = probe.body or {}
        if isinstance(body.get("models"), list):
            return "moondream"
        if isinstance(body.get("data"), list):
            return "openai"
        info = http.probe("/info").body or {}
        if info.get("name") == "moondream-cv":  # its list of models requires a key
            return "moondream"
        if {"name", "version", "uuid"} & info.keys():
            return "roboflow"
    finally:
        http.close()

    # Explain why the dialect is unknown
    key_advice = "; the server requires a key: pass api_key=" if probe.status in (401, 403) else ""
    raise BackendError(
        redact(
            f"{server.url} has an unknown API{key_advice}; pass dialect= with one of {', '.join(DIALECTS)}",
            [key],
        )
    )


def _with_v1(url: str) -> str:
    """Return the URL under which the list of models was found."""
    stem = url.strip().rstrip("/")
    return stem if stem.endswith("/v1") else f"{stem}/v1"
