"""Failures of requests to the hub: each message contains the cause, the status and the host."""

from __future__ import annotations

import os
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any

import huggingface_hub
import pytest

from moondream_cv import load
from moondream_cv.errors import CheckpointError
from moondream_cv.loading import download
from moondream_cv.model import hub_requests
from moondream_cv.model.hub import fetch_file
from moondream_cv.model.hub_requests import HubError, get_revision
from tests.helpers.certificates import make_certificates
from tests.helpers.hub import LOGIN_PAGE
from tests.helpers.published_hub import PUBLISHED_CONFIG, RELEASE, REPO, TOKENIZER_REPO, Published

PLACES = {  # path → the host in the message: the hub or its file server
    "/api/models/vikhyatk/moondream2/revision": "url",
    "/resolve/.*/config.json": "url",
    "/cdn/.*/model.safetensors": "cdn",
    "/api/models/moondream/starmie-v1/revision": "url",
}
STATUSES = {
    401: "not on the hub, or private",
    403: "denies access",
    404: "has no such file or repository",
    407: "requires a password",
    418: "answered with status 418",
    429: "limits the number of requests",
    500: "is out of order",
    502: "is out of order",
    503: "is out of order",
    504: "is out of order",
    511: "requires a login",
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("status", STATUSES)
def test_each_status_has_its_own_message(published: Published, place: str, status: int) -> None:
    hub = published.hub
    hub.fail(place, status=status)
    with pytest.raises(CheckpointError, match=STATUSES[status]) as caught:
        load("moondream2", device="cpu")
    message = str(caught.value)
    assert str(status) in message
    assert (hub.host if PLACES[place] == "url" else hub.cdn_host) in message
    assert "no connection to" not in message
    assert len(message) < 1000


@pytest.mark.parametrize(
    ("code", "status", "message"),
    [
        ("GatedRepo", 403, "is gated .*ask for access on its page"),
        ("GatedRepo", 401, "is gated .*ask for access on its page"),
        ("RevisionNotFound", 404, "no such revision"),
        ("RepoNotFound", 404, "not on the hub, or private"),
        ("EntryNotFound", 404, "the file does not exist in this revision"),
    ],
)
def test_error_codes_of_the_hub_are_explained(published: Published, code: str, status: int, message: str) -> None:
    published.hub.fail("/api/", status=status, headers={"X-Error-Code": code})
    with pytest.raises(CheckpointError, match=message) as caught:
        load("moondream2", device="cpu")
    assert f"{published.hub.host} answered {status}" in str(caught.value)


def test_gated_weights_are_explained(published: Published) -> None:
    published.hub.gated.add(REPO)
    with pytest.raises(CheckpointError, match=r"moondream2@2025-06-21 cannot be fetched: it is gated .* answered 403"):
        load("moondream2", device="cpu")


@pytest.mark.parametrize("name", ["someone/nothing", f"{REPO}@no-such-branch", f"{REPO}@{'0' * 40}"])
def test_unknown_repository_or_revision_raises(published: Published, name: str) -> None:
    with pytest.raises(CheckpointError, match=r"not on the hub, or private|no such revision"):
        load(name, device="cpu")


def test_rate_limit_error_includes_the_waiting_time(published: Published) -> None:
    published.hub.fail("/api/", status=429, headers={"Retry-After": "120"})
    with pytest.raises(CheckpointError, match=r"\(status 429\): try again in 120 s, or log in"):
        load("moondream2", device="cpu")


# --- Web pages instead of files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES)
def test_a_web_page_in_place_of_a_file_is_recognized(published: Published, place: str) -> None:
    hub = published.hub
    hub.fail(place, body=LOGIN_PAGE, headers={"Content-Type": "text/html"})
    with pytest.raises(CheckpointError, match=r"answered with a web page \(status 200\) in place of") as caught:
        load("moondream2", device="cpu")
    assert (hub.host if PLACES[place] == "url" else hub.cdn_host) in str(caught.value)


def test_a_captive_portal_is_recognized(published: Published) -> None:
    hub = published.hub
    hub.fail("^/portal", body=LOGIN_PAGE)
    hub.fail("", location=f"{hub.cdn}/portal")
    with pytest.raises(CheckpointError, match=rf"{hub.cdn_host} answered with a web page \(status 200\)") as caught:
        load("moondream2", device="cpu")
    assert "login page of this network" in str(caught.value)


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("same_size", [False, True])
def test_a_web_page_in_a_download_is_removed(
    published: Published, tmp_path: Path, large: bool, same_size: bool
) -> None:
    """The content is compared by its hash, even if the size is correct."""
    hub = published.hub
    name = "model.safetensors" if large else "tokenizer.json"
    real = hub.repos[REPO][published.release][name]
    page = LOGIN_PAGE.ljust(len(real)) if same_size else LOGIN_PAGE
    wrong = hub.fail(rf"{'/cdn/.*' if large else '/resolve/.*'}{name}", body=page, method="GET", range="^$")
    with pytest.raises(CheckpointError, match=r"web page \(status 200\) in place of|tokenizer|onsistency") as caught:
        load("moondream2", device="cpu")
    assert "no connection" not in str(caught.value)
    for path in (tmp_path / "cache").rglob("*"):
        assert not path.is_file() or LOGIN_PAGE[:15] not in path.read_bytes()
    wrong.times = 0
    assert load("moondream2", device="cpu").name == "moondream2"


@pytest.mark.parametrize("lists_hashes", [True, False])
def test_damaged_downloads_are_removed(published: Published, tmp_path: Path, lists_hashes: bool) -> None:
    hub = published.hub
    real = hub.repos[REPO][published.release]["model.safetensors"]
    hub.lists_hashes = lists_hashes
    wrong = hub.fail("/cdn/", body=real[:-1] + b"?", method="GET", range="^$")
    if lists_hashes:
        with pytest.raises(CheckpointError, match=r"sent a damaged model\.safetensors .status 200.: its SHA-256"):
            load("moondream2", device="cpu")
        assert not list((tmp_path / "cache").rglob("*.safetensors"))
    wrong.times = 0
    assert load("moondream2", device="cpu").name == "moondream2"


def test_saved_web_page_is_rejected_as_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(LOGIN_PAGE)
    with pytest.raises(CheckpointError, match="is a web page that was saved instead of the file"):
        load(tmp_path)


# --- No connection ----------------------------------------------------------------------------------------------------


def unused_address() -> str:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{unused.getsockname()[1]}"


def refuse_to_wait(seconds: float) -> None:
    raise AssertionError(f"waited {seconds} s for another attempt")


def test_the_time_limit_of_a_connection_is_less_than_3_seconds() -> None:
    assert hub_requests.CONNECT_SECONDS <= 2.5


@pytest.mark.parametrize("kind", ["refused", "unknown host"])
def test_no_connection_is_decided_by_the_first_attempt(
    kind: str, published: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = unused_address() if kind == "refused" else "no-such-host.invalid"
    monkeypatch.setenv("HF_ENDPOINT", f"http://{host}")
    monkeypatch.setattr(time, "sleep", refuse_to_wait)
    with pytest.raises(CheckpointError, match=rf"cannot be fetched: no connection to {host} ") as caught:
        load("moondream2", device="cpu")
    assert "`--model tiny`" in str(caught.value)
    assert f"moondream-cv download {REPO}@{RELEASE}" in str(caught.value)


@pytest.fixture
def full_backlog() -> Iterator[str]:
    """Start a server with a full backlog: further connections get no answer, as behind a firewall."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        address = server.getsockname()
        waiting = [socket.socket() for _ in range(16)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(address)
        yield f"http://127.0.0.1:{address[1]}"
        for one in waiting:
            one.close()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse connections instead of dropping them")
def test_dropped_packets_time_out(full_backlog: str, published: Published, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", full_backlog)
    monkeypatch.setattr(time, "sleep", refuse_to_wait)
    with pytest.raises(CheckpointError, match=r"no connection to 127\.0\.0\.1:\d+ \(.*(timed out|within 2\.5 s)"):
        load("moondream2", device="cpu")


def test_unresponsive_name_server_times_out(published: Published, monkeypatch: pytest.MonkeyPatch) -> None:
    """Name resolution has no timeout."""
    released, look_up = Event(), socket.getaddrinfo

    def hanging(host: Any, *args: Any, **kwargs: Any) -> Any:
        if host == "hub.test":
            released.wait()
        return look_up("127.0.0.1" if host == "hub.test" else host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", hanging)
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.test:9")
    try:
        with pytest.raises(CheckpointError, match=r"no connection to hub\.test:9 \(no connection within 2\.5 s\)"):
            load("moondream2", device="cpu")
    finally:
        released.set()


def test_command_line_prints_the_cause_and_a_solution(tmp_path: Path) -> None:
    host = unused_address()
    environment = {**os.environ, "HF_ENDPOINT": f"http://{host}", "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "moondream_cv", "download", "moondream2"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout) == (1, "")
    assert f"no connection to {host}" in result.stderr
    assert "--model tiny" in result.stderr
    assert "Traceback" not in result.stderr


def test_unresponsive_hub_is_distinguished_from_no_connection(
    published: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_requests, "READ_SECONDS", 0.2)
    published.hub.fail("/api/", status=0)
    with pytest.raises(CheckpointError, match=rf"{published.hub.host} did not answer within 0\.2 s"):
        load("moondream2", device="cpu")


def test_an_untrusted_certificate_is_explained(
    published: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = make_certificates(tmp_path)
    server = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.certificate, files.key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.handle_error = lambda *args: None  # type: ignore[method-assign]
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"https://localhost:{server.server_port}")
    with pytest.raises(CheckpointError, match=rf"no secure connection to localhost:{server.server_port} .*CERTIFICATE"):
        load("moondream2", device="cpu")
    server.shutdown()
    server.server_close()


def test_a_proxy_that_refuses_is_explained(published: Published, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = published.hub
    hub.fail("http://hub.test", status=407)
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.test")
    monkeypatch.setenv("HTTP_PROXY", hub.url)
    monkeypatch.setenv("http_proxy", hub.url)
    huggingface_hub.utils.close_session()
    try:
        with pytest.raises(CheckpointError, match=r"the proxy on the way to hub\.test requires a password"):
            load("moondream2", device="cpu")
    finally:
        huggingface_hub.utils.close_session()


@pytest.mark.parametrize("endpoint", ["nonsense", "ftp://127.0.0.1", "http://[", "http://127.0.0.1:99999"])
def test_invalid_endpoint_raises(endpoint: str, published: Published, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with pytest.raises(CheckpointError, match=r"HF_ENDPOINT|no connection to"):
        load("moondream2", device="cpu")


def test_passwords_in_the_endpoint_are_not_shown(published: Published, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", published.hub.url.replace("http://", "http://user:s3cret@"))
    published.hub.fail("/api/", status=503)
    with pytest.raises(CheckpointError) as caught:
        load("moondream2", device="cpu")
    assert "s3cret" not in str(caught.value)


# --- Failures with a cache, and during the download -------------------------------------------------------------------


@pytest.mark.parametrize("status", [403, 429, 503, 511])
def test_a_cached_branch_loads_whatever_the_hub_answers(
    published: Published, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    expected = load(f"{REPO}@main", device="cpu").fingerprint()
    published.hub.fail(status=status)
    assert load(f"{REPO}@main", device="cpu").fingerprint() == expected
    assert f"{status}" in caplog.text


def test_full_disk_is_reported(published: Published, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file in place of the folder")
    with pytest.raises(CheckpointError, match=r"cannot be fetched: (Not a directory|File exists)") as caught:
        download("moondream2")
    assert str(tmp_path / "cache") in str(caught.value)


def test_file_missing_from_the_revision_raises(published: Published) -> None:
    with pytest.raises(HubError, match=r"starmie-v1@main cannot be fetched: it has no file 'merges\.txt'"):
        fetch_file(TOKENIZER_REPO, "main", "merges.txt")


def test_outage_after_the_check_is_reported(published: Published) -> None:
    published.hub.fail("/resolve/", status=404, method="HEAD")
    with pytest.raises(CheckpointError, match=r"status 404") as caught:
        load("moondream2", device="cpu")
    assert published.hub.host in str(caught.value)


@pytest.mark.parametrize("body", [b"{}", b"[]", b'{"sha": 1, "siblings": [{}]}', b"null", b"\xff", b""])
def test_answers_of_another_server_are_rejected(published: Published, body: bytes) -> None:
    published.hub.fail("/api/", body=body)
    with pytest.raises(HubError, match=r"something else \(status 200\) in place of the list of files"):
        get_revision(REPO, RELEASE)


def test_config_that_is_a_web_page_raises(published: Published) -> None:
    published.hub.add("someone/page", {"config.json": LOGIN_PAGE, "model.safetensors": published.weights})
    with pytest.raises(CheckpointError, match=r"web page \(status 200\) in place of config\.json"):
        load("someone/page", device="cpu")
    assert PUBLISHED_CONFIG not in LOGIN_PAGE
