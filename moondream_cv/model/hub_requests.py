"""Requests to the Hugging Face hub before a download: the files of a revision, and the header of a file.

Every failure becomes a `HubError` that states its cause, with the status and the host: no connection, no access, no
such revision, too many requests, an outage, or a web page in place of the file. A machine without a connection is
recognized in less than 3 seconds. Downloads and the cache are in `hub.py`.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

import httpx
import huggingface_hub
from huggingface_hub.utils import build_hf_headers

from moondream_cv.errors import CheckpointError

CONNECT_SECONDS = 2.5  # to look up the host and to connect
READ_SECONDS = 10.0  # without a byte
MAX_REPLY_BYTES = 16 * 2**20
HEADER_BYTES = 100_000  # first request of a safetensors header; the headers of known checkpoints fit
MAX_HEADER_BYTES = 32 * 2**20
T = TypeVar("T")
_DEFAULT_ENDPOINT = "https://huggingface.co"


class HubError(CheckpointError):
    """The hub cannot be reached, or answers with an error.

    Attributes:
        reason: The cause, without the name of the repository.
        status: The HTTP status; None without an answer.
    """

    def __init__(self, reason: str, status: int | None = None) -> None:
        super().__init__(reason)
        self.reason, self.status = reason, status


@dataclass(frozen=True)
class RemoteFile:
    """A file of a revision.

    Attributes:
        size: Bytes; None if the hub does not list it.
        sha256: Hash of the content of a large file; None if the hub does not list it.
        blob_id: Git's hash of the content of a small file; None if the hub does not list it.
    """

    size: int | None = None
    sha256: str | None = None
    blob_id: str | None = None


@dataclass(frozen=True)
class RemoteRevision:
    """A revision of a repository on the hub.

    Attributes:
        repo: Name of the repository.
        revision: Branch, tag or commit.
        commit: Commit that the revision points to, 40 hexadecimal digits.
        files: Files by their paths in the repository.
    """

    repo: str
    revision: str
    commit: str
    files: Mapping[str, RemoteFile]


@dataclass(frozen=True)
class Reply:
    """The beginning of an HTTP reply, after redirects."""

    status: int
    url: str
    headers: Mapping[str, str]
    content: bytes


def endpoint() -> str:
    """Return the URL of the hub, without a slash at the end; `HF_ENDPOINT` overrides it at each call."""
    return (os.environ.get("HF_ENDPOINT") or _DEFAULT_ENDPOINT).rstrip("/")


def host_of(url: str) -> str:
    """Return the host of a URL, with its port but without user and password."""
    return urlsplit(url).netloc.rpartition("@")[2] or url


def get_revision(repo: str, revision: str, token: Any = None) -> RemoteRevision:
    """Ask the hub which commit and files a branch, tag or commit has.

    Args:
        token: As `huggingface_hub` takes it.

    Raises:
        HubError: The hub cannot be reached or denies access, or the repository or revision does not exist.
    """
    url = f"{endpoint()}/api/models/{repo}/revision/{quote(revision, safe='')}?blobs=true"
    reply = _get(url, token)
    try:
        values = json.loads(reply.content)
        files = {entry["rfilename"]: _file(entry) for entry in values["siblings"]}
        return RemoteRevision(repo, revision, str(values["sha"]), files)
    except (ValueError, KeyError, TypeError) as error:
        raise HubError(_strange(reply, "the list of files"), reply.status) from error


def read_file(remote: RemoteRevision, filename: str, token: Any = None) -> bytes:
    """Read a small file of a revision, up to `MAX_REPLY_BYTES`; errors as in `get_revision`."""
    return _checked(_get(file_url(remote, filename), token), filename).content


def read_safetensors_header(remote: RemoteRevision, filename: str, token: Any = None) -> dict[str, tuple[int, ...]]:
    """Read the shapes of the tensors of a safetensors file, without downloading the file.

    Returns:
        Shapes by the names of the tensors.

    Raises:
        HubError: As in `get_revision`, or the file is not a safetensors file.
    """
    url = file_url(remote, filename)
    reply = _checked(_get(url, token, HEADER_BYTES), filename)
    size = int.from_bytes(reply.content[:8], "little")
    if 8 + size > len(reply.content) and size <= MAX_HEADER_BYTES:
        reply = _checked(_get(url, token, 8 + size), filename)
    try:
        header = json.loads(reply.content[8 : 8 + size])
        return {
            name: tuple(int(n) for n in tensor["shape"]) for name, tensor in header.items() if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise HubError(_strange(reply, filename), reply.status) from error


def is_web_page(content: bytes) -> bool:
    """Return whether the beginning of a file is that of an HTML page."""
    head = content[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    return head.startswith((b"<!doctype html", b"<html", b"<head", b"<!--")) or (
        head.startswith(b"<?xml") and b"<html" in head
    )


def check_connection(url: str) -> None:
    """Connect to the host of a URL once, unless a proxy is used for it.

    Raises:
        HubError: There is no connection within `CONNECT_SECONDS`.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    if parts.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(host):
        return
    address = (host, parts.port or (443 if parts.scheme == "https" else 80))
    try:
        _within(lambda: socket.create_connection(address, CONNECT_SECONDS).close(), threading.Event())
    except (OSError, httpx.ConnectTimeout) as error:
        raise HubError(f"no connection to {host_of(url)} ({error})") from error


def explain_status(status: int, url: str, headers: Mapping[str, str]) -> str:
    """Return what an HTTP status of the hub or of its file servers means, with the status and the host."""
    host, code = host_of(url), headers.get("X-Error-Code", headers.get("x-error-code", ""))
    if code == "GatedRepo":
        return f"it is gated ({host} answered {status}): ask for access on its page, then `hf auth login`"
    if code == "RevisionNotFound":
        return f"there is no such revision ({host} answered {status}); the page of the repository lists them"
    if code == "EntryNotFound":
        return f"the file does not exist in this revision ({host} answered {status})"
    if code == "RepoNotFound" or status == 401:
        return (
            f"it is not on the hub, or private ({host} answered {status}): check its name, or `hf auth login` with an "
            "account that has access"
        )
    if status == 403:
        return f"{host} denies access (status 403): the token has no access to it, or a firewall or proxy blocks it"
    if status == 404:
        return f"{host} has no such file or repository (status 404): check the name, and HF_ENDPOINT if it is set"
    if status == 407:
        return f"the proxy on the way to {host} requires a password (status 407): check HTTPS_PROXY"
    if status == 429:
        wait = headers.get("Retry-After", headers.get("retry-after"))
        return (
            f"{host} limits the number of requests (status 429): try again "
            f"{f'in {wait} s' if wait and wait.isdigit() else 'later'}, or log in for a higher limit (`hf auth login`)"
        )
    if status == 511:
        return f"the network requires a login before it gives access to {host} (status 511): open a page in a browser"
    if status >= 500:
        return f"{host} is out of order (status {status}): try again later"
    return f"{host} answered with status {status}"


def web_page(status: int, url: str, what: str) -> str:
    """Return the description of a failure in which the server sent an HTML page instead of `what`."""
    return (
        f"{host_of(url)} answered with a web page (status {status}) in place of {what}: it may be the login page of "
        "this network or the page of a proxy; open it in a browser, or check HTTPS_PROXY and HF_ENDPOINT"
    )


def _strange(reply: Reply, what: str) -> str:
    if is_web_page(reply.content):
        return web_page(reply.status, reply.url, what)
    return (
        f"{host_of(reply.url)} answered with something else (status {reply.status}) in place of {what}: check "
        "HF_ENDPOINT and the proxy"
    )


def _checked(reply: Reply, what: str) -> Reply:
    if is_web_page(reply.content):
        raise HubError(web_page(reply.status, reply.url, what), reply.status)
    return reply


def _file(entry: Mapping[str, Any]) -> RemoteFile:
    lfs = entry.get("lfs")
    if isinstance(lfs, Mapping):
        return RemoteFile(lfs.get("size"), lfs.get("sha256"), None)
    return RemoteFile(entry.get("size"), None, entry.get("blobId"))


def file_url(remote: RemoteRevision, filename: str) -> str:
    """Return the URL of a file; the hub redirects it to a file server."""
    return f"{endpoint()}/{remote.repo}/resolve/{remote.commit}/{quote(filename)}"


def _get(url: str, token: Any, first: int | None = None) -> Reply:
    """Send a GET request and follow redirects.

    Args:
        first: Ask for this many bytes from the beginning, and read no more; None: the whole reply.

    Raises:
        HubError: There is no answer, or its status is an error.
    """
    headers = {**build_hf_headers(token=token), "Accept-Encoding": "identity"}
    if first is not None:
        headers["Range"] = f"bytes=0-{first - 1}"
    connected = threading.Event()

    def trace(event: str, info: Mapping[str, Any]) -> None:
        if event != "connection.connect_tcp.started":
            connected.set()

    def exchange() -> Reply:
        timeout = httpx.Timeout(READ_SECONDS, connect=CONNECT_SECONDS)
        client = _client()
        with client.stream(
            "GET", url, headers=headers, timeout=timeout, follow_redirects=True, extensions={"trace": trace}
        ) as response:
            content = b""
            for chunk in response.iter_bytes():
                content += chunk
                if len(content) >= (first or MAX_REPLY_BYTES):
                    break
            return Reply(response.status_code, str(response.url), response.headers, content[:first])

    try:
        reply = _within(exchange, connected)
    except httpx.HTTPError as error:
        raise HubError(_no_answer(error, url)) from error
    except OSError as error:  # raised by a hook in the client
        raise HubError(f"no connection to {host_of(url)} ({error})") from error
    except (ValueError, httpx.InvalidURL) as error:
        raise HubError(f"the URL {url!r} cannot be used ({error}); check HF_ENDPOINT") from error
    if reply.status >= 400:
        raise HubError(explain_status(reply.status, reply.url, reply.headers), reply.status)
    return reply


def _client() -> httpx.Client:
    """Return the client of `huggingface_hub`, with its proxies and certificates, or a new one before version 1.0."""
    client = huggingface_hub.utils.get_session()
    return client if isinstance(client, httpx.Client) else httpx.Client()


def _within(exchange: Callable[[], T], connected: threading.Event) -> T:
    """Run an exchange in a separate thread, and give up if there is no connection within `CONNECT_SECONDS`.

    Name resolution has no timeout: without a name server it takes up to half a minute.
    """
    replies: list[T] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            replies.append(exchange())
        except Exception as error:
            errors.append(error)
        finally:
            connected.set()

    thread = threading.Thread(target=run, name="moondream-cv hub request", daemon=True)
    thread.start()
    if not connected.wait(CONNECT_SECONDS):
        raise httpx.ConnectTimeout(f"no connection within {CONNECT_SECONDS:g} s")
    thread.join()
    if errors:
        raise errors[0]
    return replies[0]


def _no_answer(error: httpx.HTTPError, url: str) -> str:
    request = getattr(error, "_request", None)
    host, detail = host_of(url if request is None else str(request.url)), str(error).strip() or type(error).__name__
    if isinstance(error, httpx.TimeoutException) and not isinstance(error, httpx.ConnectTimeout):
        return f"{host} did not answer within {READ_SECONDS:g} s"
    if isinstance(error, httpx.ProxyError):
        return f"the proxy on the way to {host} refuses the connection ({detail}): check HTTPS_PROXY"
    if "CERTIFICATE_VERIFY_FAILED" in detail or "SSL" in detail:
        return (
            f"no secure connection to {host} ({detail}): the login page of this network or a proxy may intercept it; "
            "open a page in a browser, or set SSL_CERT_FILE to the certificates of the proxy"
        )
    return f"no connection to {host} ({detail})"
