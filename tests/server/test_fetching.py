"""Downloads of image URLs: limits, redirects and SSRF protection. Run with `pytest tests/server/test_fetching.py`.

The tests use scripted servers on 127.0.0.1 and 127.0.0.2. If an address has to be public, `is_public` is replaced for
that address only. Rejected URLs must not lead to any connection.
"""

from __future__ import annotations

import asyncio
import gzip
import ipaddress
import logging
import os
import socket
import socketserver
import ssl
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trustme
from aiohttp.abc import AbstractResolver, ResolveResult
from hypothesis import given
from hypothesis import strategies as st

from moondream_cv.errors import ImageError, MoondreamError
from moondream_cv.server import ssrf_protection
from moondream_cv.server.fetching import Fetcher
from moondream_cv.server.ssrf_protection import MAX_URL_LENGTH, is_public

OTHER = "127.0.0.2"
CONTENT = bytes(range(256)) * 4
SECRET = "hunter2"
several_loopbacks = pytest.mark.skipif(sys.platform != "linux", reason="only Linux answers on all of 127.0.0.0/8")


def reply(body: bytes = b"", status: int = 200, **headers: str | int) -> bytes:
    """Return an HTTP response. Content-Length is the size of the body by default; an empty string omits it."""
    lines = {"Content-Length": len(body), **{name.replace("_", "-"): value for name, value in headers.items()}}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items() if value != "")
    return f"HTTP/1.1 {status} Status\r\n{head}\r\n".encode() + body


def chunked(size: int, chunks: int) -> Iterator[bytes]:
    yield reply(Content_Length="", Transfer_Encoding="chunked")
    for _ in range(chunks):
        yield f"{size:x}\r\n".encode() + bytes(size) + b"\r\n"
    yield b"0\r\n\r\n"


def redirect(location: str, status: int = 302) -> bytes:
    return reply(status=status, Location=location)


class Site(socketserver.ThreadingTCPServer):
    """A server that returns the bytes in `replies` for each path, and records connections and requests."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, host: str, port: int = 0) -> None:
        super().__init__((host, port), SiteHandler)
        self.replies: dict[str, bytes | Callable[[], Iterator[bytes]]] = {"/ok": reply(CONTENT)}
        self.accepted = 0
        self.requests: list[str] = []
        self.stopped = threading.Event()
        self.url = f"http://{host}:{self.server_address[1]}"

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    def get_request(self) -> Any:
        self.accepted += 1
        return super().get_request()

    def connections(self) -> int:
        """Return the number of connections before this call. It opens one itself, as they are accepted in order."""
        with socket.create_connection((str(self.server_address[0]), self.port), timeout=240) as own:
            own.sendall(b"GET /count HTTP/1.1\r\n\r\n")
            assert own.recv(1) == b""
        return self.accepted - 1


class SiteHandler(socketserver.BaseRequestHandler):
    server: Site

    def handle(self) -> None:
        data = b""
        while not data.endswith(b"\r\n\r\n"):
            if not (more := self.request.recv(65536)):
                return
            data += more
        path = data.split()[1].decode()
        self.server.requests.append(data.decode())
        answer = self.server.replies.get(path, b"")
        try:
            for part in [answer] if isinstance(answer, bytes) else answer():
                self.request.sendall(part)
        except OSError:
            pass  # the client has disconnected, as expected for oversized bodies

    def reset(self) -> None:
        self.request.recv(65536)
        self.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@contextmanager
def running_site(site: Site) -> Iterator[Site]:
    thread = threading.Thread(target=site.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield site
    finally:
        site.stopped.set()
        site.shutdown()
        thread.join()
        site.server_close()


@pytest.fixture
def site() -> Iterator[Site]:
    with running_site(Site("127.0.0.1")) as site:
        yield site


@pytest.fixture
def other(site: Site) -> Iterator[Site]:
    """A second site on another loopback address and the same port."""
    with running_site(Site(OTHER, site.port)) as other:
        yield other


@pytest.fixture
def other_is_public(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssrf_protection, "is_public", lambda address: address == OTHER or is_public(address))


class FakeResolver(AbstractResolver):
    """A resolver that returns the next list of addresses for each name, and repeats the last list."""

    def __init__(self, answers: dict[str, list[list[str]]]) -> None:
        self.answers = answers
        self.asked: list[str] = []

    async def resolve(self, host: str, port: int = 0, family: int = 0) -> list[ResolveResult]:
        self.asked.append(host)
        if host not in self.answers:
            raise OSError(None, "no such name")
        answers = self.answers[host]
        addresses = answers.pop(0) if len(answers) > 1 else answers[0]
        return [
            ResolveResult(hostname=host, host=address, port=port, family=socket.AF_UNSPEC, proto=0, flags=0)
            for address in addresses
        ]

    async def close(self) -> None:
        pass


def fetch(*urls: str, **options: Any) -> list[bytes]:
    """Download URLs with one fetcher, in order."""

    async def run() -> list[bytes]:
        fetcher = Fetcher(**{"max_bytes": 100_000, **options})
        try:
            return [await fetcher.fetch(url) for url in urls]
        finally:
            await fetcher.close()

    return asyncio.run(run())


def error_message(*urls: str, **options: Any) -> str:
    """Return the message of the error. It must be short and contain no internal details."""
    with pytest.raises(ImageError) as caught:
        fetch(*urls, **options)
    message = str(caught.value)
    assert len(message) < 500
    assert SECRET not in message
    assert not any(word in message for word in ("Traceback", "site-packages", "object at 0x", "Errno"))
    return message


# --- ordinary downloads -----------------------------------------------------------------------------------------------


def test_body_is_returned_unchanged(site: Site) -> None:
    assert fetch(f"{site.url}/ok", allow_private=True) == [CONTENT]


def test_body_of_max_bytes_is_accepted(site: Site) -> None:
    assert fetch(f"{site.url}/ok", allow_private=True, max_bytes=len(CONTENT)) == [CONTENT]


def test_chunked_body_is_joined(site: Site) -> None:
    site.replies["/chunks"] = lambda: chunked(1000, 9)
    assert fetch(f"{site.url}/chunks", allow_private=True) == [bytes(9000)]


def test_request_has_a_user_agent_and_no_cookies_or_proxy(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    site.replies["/from"] = reply(status=302, Location="/ok", Set_Cookie="a=b")
    url = f"http://images.example:{site.port}/from#part"
    fetch(url, url, allow_private=True, resolver=FakeResolver({"images.example": [["127.0.0.1"]]}))
    names = [{line.split(":")[0] for line in request.splitlines()[1:] if line} for request in site.requests]
    assert names == [{"Host", "User-Agent", "Accept", "Accept-Encoding", "Connection"}] * 4
    assert all("User-Agent: moondream-cv/" in request for request in site.requests)
    assert all("Accept-Encoding: identity" in request for request in site.requests)
    assert site.requests[0].startswith("GET /from HTTP/1.1")


def test_downloads_run_concurrently(site: Site) -> None:
    together = threading.Barrier(5, timeout=240)

    def meet() -> Iterator[bytes]:
        together.wait()
        yield reply(CONTENT)

    async def run() -> list[bytes]:
        fetcher = Fetcher(max_bytes=10_000, allow_private=True)
        try:
            return await asyncio.gather(*(fetcher.fetch(f"{site.url}/meet") for _ in range(5)))
        finally:
            await fetcher.close()

    site.replies["/meet"] = meet
    assert asyncio.run(run()) == [CONTENT] * 5


@pytest.mark.parametrize("trusted", [True, False])
def test_certificates_are_verified(trusted: bool, tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    site = Site("127.0.0.1")
    site.socket = context.wrap_socket(site.socket, server_side=True, do_handshake_on_connect=False)
    code = (
        "import asyncio\n"
        "from moondream_cv.server.fetching import Fetcher\n"
        "async def run():\n"
        "    fetcher = Fetcher(max_bytes=5000, allow_private=True)\n"
        "    try:\n"
        f"        print(len(await fetcher.fetch('https://127.0.0.1:{site.port}/ok')))\n"
        "    except ValueError as error:\n"
        "        print(error)\n"
        "    await fetcher.close()\n"
        "asyncio.run(run())\n"
    )
    environment = {**os.environ, "SSL_CERT_FILE": str(tmp_path / "ca.pem")} if trusted else {**os.environ}
    with running_site(site):
        result = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=240
        )
    assert result.stderr == ""
    expected = f"{len(CONTENT)}" if trusted else "certificate of the host is not trusted"
    assert expected in result.stdout


# --- failed downloads -------------------------------------------------------------------------------------------------

INVALID_RESPONSES: dict[str, tuple[bytes | Callable[[], Iterator[bytes]], str]] = {
    "missing": (reply(b"no", status=404), "returned status 404"),
    "forbidden": (reply(b"no", status=403), "status 403"),
    "broken": (reply(status=500), "status 500"),
    "not modified": (reply(status=304), "status 304"),
    "empty": (reply(), "is empty"),
    "no content": (reply(status=204, Content_Length=""), "is empty"),
    "declared too large": (reply(b"x", Content_Length=100_001), "larger than the maximum of 100000 bytes"),
    "declared beyond all": (reply(b"x", Content_Length=10**30), "was interrupted"),
    "undeclared too large": (lambda: chunked(50_000, 1000), "larger than the maximum of 100000 bytes"),
    "until closed too large": (lambda: iter([reply(Content_Length=""), bytes(100_001)]), "larger than"),
    "gzip bomb": (reply(gzip.compress(bytes(50_000_000)), Content_Encoding="gzip"), "is compressed"),
    "other compression": (reply(b"x", Content_Encoding="BR"), "is compressed"),
    "truncated": (reply(CONTENT, Content_Length=len(CONTENT) + 1), "was interrupted"),
    "truncated chunks": (lambda: iter(list(chunked(1000, 3))[:2]), "was interrupted"),
    "no reply": (b"", "was interrupted"),
    "not http": (b"SSH-2.0-OpenSSH_9.9\r\n\r\n", "was interrupted"),
    "negative length": (reply(b"x", Content_Length=-5), "was interrupted"),
    "worded length": (reply(b"x", Content_Length="many"), "was interrupted"),
    "huge header": (reply(b"x", Long="x" * 100_000), "was interrupted"),
    "redirect to nowhere": (reply(status=302), "without a Location header"),
    "endless redirect": (redirect("/endless redirect".replace(" ", "%20")), "more than 3 times"),
    "redirect to file": (redirect("file:///etc/passwd"), "redirect of.*begins with 'file:'"),
    "redirect to ftp": (redirect("ftp://127.0.0.1/x"), "begins with 'ftp:'"),
    "redirect to data": (redirect("data:image/png;base64,AAAA"), "begins with 'data:'"),
    "redirect with password": (redirect(f"http://me:{SECRET}@127.0.0.1/"), "user name or password"),
    "redirect with space": (redirect("/a b"), "contains ' '.*%20"),
    "redirect to no host": (redirect("http://[::1/"), "invalid host or port"),
    "redirect too long": (redirect("/" + "x" * 8200), "characters, more than 8192|was interrupted"),
}


@pytest.mark.parametrize(("answer", "message"), INVALID_RESPONSES.values(), ids=INVALID_RESPONSES.keys())
def test_invalid_responses_raise_image_error(
    site: Site, answer: Any, message: str, request: pytest.FixtureRequest
) -> None:
    path = "/" + request.node.callspec.id.replace(" ", "%20")
    site.replies[path] = answer
    with pytest.raises(ImageError, match=message):
        fetch(f"{site.url}{path}", allow_private=True)
    assert site.url in error_message(f"{site.url}{path}", allow_private=True)


def test_connection_reset_raises_image_error(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SiteHandler, "handle", SiteHandler.reset)
    assert "was interrupted" in error_message(f"{site.url}/ok", allow_private=True)


def test_refused_connection_raises_image_error(site: Site) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        message = error_message(f"http://localhost:{free.getsockname()[1]}/", allow_private=True)
    assert "cannot connect to the host" in message
    assert "127.0.0.1" not in message


def test_unknown_host_raises_image_error() -> None:
    assert "host not found" in error_message("http://nowhere.example/", resolver=FakeResolver({}))


@pytest.mark.parametrize("kind", ["no reply", "slow head", "slow body", "slow redirects"])
def test_time_limit_covers_the_whole_download(site: Site, kind: str) -> None:
    def drip() -> Iterator[bytes]:
        if kind == "slow redirects":
            site.stopped.wait(0.15)
            yield redirect("/drip")
            return
        yield b"" if kind == "no reply" else b"HTTP/1.1 200 OK\r\n" if kind == "slow head" else reply(Content_Length=99)
        while not site.stopped.wait(0.05):
            yield b"" if kind == "no reply" else b"X: y\r\n"

    site.replies["/drip"] = drip
    message = error_message(f"{site.url}/drip", allow_private=True, timeout=0.4, max_redirects=1000)
    assert "longer than 0.4 s" in message


def test_time_limit_covers_name_resolution() -> None:
    class Slow(FakeResolver):
        async def resolve(self, host: str, port: int = 0, family: int = 0) -> list[ResolveResult]:
            await asyncio.Event().wait()
            raise AssertionError

    assert "longer than 0.1 s" in error_message("http://slow.example/", resolver=Slow({}), timeout=0.1)


# --- redirects --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("location", ["/ok", "ok", "{url}/ok", "//127.0.0.1:{port}/ok"])
def test_redirects_are_followed(site: Site, status: int, location: str) -> None:
    site.replies["/from"] = redirect(location.format(url=site.url, port=site.port), status)
    assert fetch(f"{site.url}/from", allow_private=True) == [CONTENT]


@pytest.mark.parametrize(("limit", "reached"), [(0, False), (2, False), (3, True)])
def test_number_of_redirects_is_limited(site: Site, limit: int, reached: bool) -> None:
    site.replies.update({"/a": redirect("/b"), "/b": redirect("/c"), "/c": redirect("/ok")})
    if reached:
        assert fetch(f"{site.url}/a", allow_private=True, max_redirects=limit) == [CONTENT]
    else:
        message = error_message(f"{site.url}/a", allow_private=True, max_redirects=limit)
        assert f"redirects more than {limit} times" in message
        assert len(site.requests) == limit + 1


@several_loopbacks
@pytest.mark.usefixtures("other_is_public")
@pytest.mark.parametrize(
    "target", ["http://127.0.0.1:{port}/ok", "//localhost:{port}/ok", "http://inside.example:{port}"]
)
def test_redirect_to_a_private_address_is_rejected(site: Site, other: Site, target: str) -> None:
    other.replies["/from"] = redirect(target.format(port=site.port))
    names = FakeResolver({"localhost": [["127.0.0.1"]], "inside.example": [["127.0.0.1"]]})
    assert fetch(f"{other.url}/ok", resolver=names) == [CONTENT]
    message = error_message(f"{other.url}/from", resolver=names)
    assert "private address" in message
    assert site.connections() == 0
    assert [request.split()[1] for request in other.requests] == ["/ok", "/from"]


# --- private addresses ------------------------------------------------------------------------------------------------

NOTATIONS = {
    "plain": "http://127.0.0.1:{port}/ok",
    "other loopback": "http://127.8.9.10:{port}/ok",
    "unspecified": "http://0.0.0.0:{port}/ok",
    "decimal": "http://2130706433:{port}/ok",
    "hexadecimal": "http://0x7f.1:{port}/ok",
    "hexadecimal number": "http://0x7F000001:{port}/ok",
    "octal": "http://0177.0.0.1:{port}/ok",
    "octal last": "http://127.0.0.01:{port}/ok",
    "short": "http://127.1:{port}/ok",
    "zero": "http://0:{port}/ok",
    "five parts": "http://127.0.0.1.1:{port}/ok",
    "trailing dot": "http://127.0.0.1.:{port}/ok",
    "trailing dots": "http://127.0.0.1..:{port}/ok",
    "v6": "http://[::1]:{port}/ok",
    "v6 unspecified": "http://[::]:{port}/ok",
    "v6 with zone": "http://[::1%25lo]:{port}/ok",
    "v6 link-local": "http://[fe80::1%25lo]:{port}/ok",
    "mapped": "http://[::ffff:127.0.0.1]:{port}/ok",
    "mapped in hexadecimal": "http://[::ffff:7f00:1]:{port}/ok",
    "mapped in full": "http://[0000:0000:0000:0000:0000:FFFF:7F00:0001]:{port}/ok",
    "compatible": "http://[::127.0.0.1]:{port}/ok",
    "6to4": "http://[2002:7f00:1::]:{port}/ok",
    "nat64": "http://[64:ff9b::7f00:1]:{port}/ok",
    "local nat64": "http://[64:ff9b:1::7f00:1]:{port}/ok",
    "name": "http://localhost:{port}/ok",
    "name with dot": "http://LOCALHOST.:{port}/ok",
    "name below": "http://a.localhost:{port}/ok",
    "public name": "http://127.0.0.1.nip.io:{port}/ok",
    "circled digits": "http://①②⑦.⓪.⓪.①:{port}/ok",
    "wide digits": "http://１２７.０.０.１:{port}/ok",
    "ideographic dots": "http://127。0。0。1:{port}/ok",
    "percent": "http://%31%32%37.0.0.1:{port}/ok",
    "percent dot": "http://127%2e0.0.1:{port}/ok",
    "percent null": "http://127.0.0.1%00.example.com:{port}/ok",
    "user": "http://example.com@127.0.0.1:{port}/ok",
    "empty user": "http://@127.0.0.1:{port}/ok",
    "password": "http://example.com:80@127.0.0.1:{port}/ok",
    "empty password": "http://:@127.0.0.1:{port}/ok",
    "two ats": "http://a@example.com@127.0.0.1:{port}/ok",
    "backslashes": "http:\\\\127.0.0.1:{port}\\ok",
    "backslash and at": "http://127.0.0.1:{port}\\@example.com/",
    "at and backslash": "http://example.com\\@127.0.0.1:{port}/ok",
    "tab": "http://127.0.\t0.1:{port}/ok",
    "tab in scheme": "ht\ttp://127.0.0.1:{port}/ok",
    "newline": "http://127.0.0.1\n:{port}/ok",
    "newline in path": "http://127.0.0.1:{port}/ok\r\nHost:example.com",
    "null": "http://127.0.0.1\0.example.com:{port}/ok",
    "space before": " http://127.0.0.1:{port}/ok",
    "no host": "http:///127.0.0.1:{port}/ok",
    "no slashes": "http:127.0.0.1:{port}/ok",
    "no scheme": "//127.0.0.1:{port}/ok",
    "upper case": "HTTP://127.0.0.1:{port}/ok",
    "question mark": "http://127.0.0.1:{port}?@example.com/",
    "fragment": "http://127.0.0.1:{port}#@example.com/",
    "signed port": "http://127.0.0.1:+{port}/ok",
    "translated": "http://[::ffff:0:127.0.0.1]:{port}/ok",
}


class SystemResolver(FakeResolver):
    """The resolver of the operating system, except that public names lead to 127.0.0.1."""

    async def resolve(self, host: str, port: int = 0, family: int = 0) -> list[ResolveResult]:
        self.asked.append(host)
        if host.endswith((".nip.io", ".com")):
            self.answers.setdefault(host, [["127.0.0.1"]])
        else:
            infos = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
            self.answers.setdefault(host, [[str(info[4][0]) for info in infos]])
        return await super().resolve(host, port, family)


@pytest.mark.parametrize("url", NOTATIONS.values(), ids=NOTATIONS.keys())
def test_no_notation_of_a_loopback_address_is_connected(site: Site, url: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "moondream_cv")
    message = error_message(url.format(port=site.port), resolver=SystemResolver({}))
    assert site.connections() == 0
    assert "host not found" in message or ("rejected an image URL" in caplog.text and "ok" not in caplog.text)


@pytest.mark.parametrize("host", ["[::1]", "[::]", "localhost"])
def test_ipv6_loopback_is_rejected(host: str) -> None:
    try:
        server = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError:
        pytest.skip("this machine has no IPv6")
    with server:
        server.setblocking(False)
        assert "private address" in error_message(f"http://{host}:{server.getsockname()[1]}/")
        with pytest.raises(BlockingIOError):
            server.accept()


@pytest.mark.parametrize(
    "addresses",
    [
        ["127.0.0.1"],
        ["127.0.0.1", "127.0.0.1"],
        ["::1", "127.0.0.1"],
        ["::ffff:127.0.0.1", "10.0.0.1", "fd00:ec2::254"],
        ["127.1"],
        ["2130706433"],
        ["::1%1"],
        ["localhost"],
    ],
    ids=" ".join,
)
def test_name_with_a_private_address_is_rejected(site: Site, addresses: list[str]) -> None:
    message = error_message(
        f"http://images.example.com:{site.port}/ok?key={SECRET}",
        resolver=FakeResolver({"images.example.com": [addresses]}),
    )
    assert "private address" in message
    assert f"http://images.example.com:{site.port}" in message
    assert not any(address in message for address in addresses)
    assert site.connections() == 0


def test_private_address_of_the_system_resolver_is_rejected(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    from aiohttp import ThreadedResolver

    def inside(host: str, port: int, *_: Any, **__: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", inside)

    async def run() -> None:
        fetcher = Fetcher(max_bytes=5000, resolver=ThreadedResolver())
        try:
            await fetcher.fetch(f"http://images.example.com:{site.port}/ok")
        finally:
            await fetcher.close()

    with pytest.raises(ImageError, match="private address"):
        asyncio.run(run())
    monkeypatch.undo()
    assert site.connections() == 0


@several_loopbacks
@pytest.mark.usefixtures("other_is_public")
def test_dns_rebinding_is_rejected(site: Site, other: Site) -> None:
    names = FakeResolver({"rebinding.example": [[OTHER], ["127.0.0.1"]]})
    url = f"http://rebinding.example:{site.port}/ok"
    assert "private address" in error_message(url, url, resolver=names)
    assert names.asked == ["rebinding.example"] * 2
    assert (other.connections(), site.connections()) == (1, 0)


@several_loopbacks
@pytest.mark.usefixtures("other_is_public")
def test_dns_rebinding_in_a_redirect_is_rejected(site: Site, other: Site) -> None:
    other.replies["/from"] = redirect("/ok")
    names = FakeResolver({"rebinding.example": [[OTHER], ["127.0.0.1"]]})
    assert "private address" in error_message(f"http://rebinding.example:{site.port}/from", resolver=names)
    assert (other.connections(), site.connections()) == (1, 0)


@several_loopbacks
@pytest.mark.usefixtures("other_is_public")
@pytest.mark.parametrize("addresses", [["127.0.0.1", OTHER], ["::1", "127.0.0.1", OTHER], [OTHER, "127.0.0.1"]])
def test_only_public_addresses_of_a_name_are_connected(site: Site, other: Site, addresses: list[str]) -> None:
    names = FakeResolver({"mixed.example": [addresses]})
    assert fetch(f"http://mixed.example:{site.port}/ok", resolver=names) == [CONTENT]
    assert (other.connections(), site.connections()) == (1, 0)


# --- public addresses -------------------------------------------------------------------------------------------------

PUBLIC = ["8.8.8.8", "1.1.1.1", "100.63.255.255", "100.128.0.0", "172.15.255.255", "172.32.0.0", "169.253.255.255"]
PUBLIC += [
    "9.255.255.255",
    "11.0.0.0",
    "126.255.255.255",
    "128.0.0.0",
    "192.0.1.0",
    "223.255.255.255",
    "198.17.255.255",
]
PUBLIC += ["2606:4700:4700::1111", "2001:4860:4860::8888", "2a00:1450:4001::1", "2001:200::1", "3fff:1000::1"]

PRIVATE = ["0.0.0.0", "0.1.2.3", "10.0.0.0", "10.255.255.255", "100.64.0.0", "100.100.100.200", "100.127.255.255"]
PRIVATE += ["127.0.0.1", "127.255.255.255", "168.63.129.16", "169.254.169.254", "169.254.170.2", "172.16.0.0"]
PRIVATE += ["172.31.255.255", "192.0.0.192", "192.0.2.1", "192.88.99.1", "192.168.0.0", "192.168.255.255", "198.18.0.0"]
PRIVATE += ["198.19.255.255", "198.51.100.7", "203.0.113.7", "224.0.0.1", "239.255.255.255", "240.0.0.1"]
PRIVATE += ["255.255.255.255", "::", "::1", "::2", "64:ff9b::808:808", "64:ff9b:1::1", "100::1", "2001::1", "2001:2::1"]
PRIVATE += ["2001:db8::1", "2002:808:808::1", "3fff::1", "5f00::1", "fc00::1", "fd00:ec2::254", "fd20:ce::254"]
PRIVATE += ["fe80::1", "fec0::1", "ff02::1", "2606:4700::1%eth0", "2606:4700::5efe:10.0.0.1", "2606::200:5efe:a00:1"]
NO_ADDRESS = [
    "",
    "localhost",
    "127.1",
    "8.8.8",
    "0x08.8.8.8",
    "134744072",
    "8.8.8.8 ",
    "8.8.8.8.",
    "[2606::1]",
    "８.8.8.8",
]


@pytest.mark.parametrize(
    ("address", "expected"),
    [(a, True) for a in PUBLIC] + [(a, False) for a in PRIVATE + NO_ADDRESS],
)
def test_is_public_classifies_addresses(address: str, expected: bool) -> None:
    assert is_public(address) is expected


@given(st.ip_addresses())
def test_addresses_that_python_calls_special_are_not_public(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> None:
    special = not address.is_global or address.is_multicast or address.is_reserved or address.is_link_local
    assert not (is_public(str(address)) and special)


@given(
    st.ip_addresses(v=4), st.sampled_from(["::ffff:0:0", "::", "::ffff:0:0:0", "64:ff9b::", "64:ff9b:1::", "2001::"])
)
def test_ipv6_addresses_with_an_embedded_ipv4_address_are_not_public(
    address: ipaddress.IPv4Address, prefix: str
) -> None:
    assert not is_public(str(ipaddress.IPv6Address(int(ipaddress.IPv6Address(prefix)) + int(address))))
    assert not is_public(str(ipaddress.IPv6Address((0x2002 << 112) + (int(address) << 80))))


# --- URLs -------------------------------------------------------------------------------------------------------------

INVALID_URLS = {
    "": "begins with 'no scheme'",
    "dog.jpg": "begins with 'no scheme'",
    "/etc/passwd": "begins with 'no scheme'",
    "file:///etc/passwd": "begins with 'file:'",
    "ftp://example.com/dog.jpg": "begins with 'ftp:'",
    "gopher://127.0.0.1:70/x": "begins with 'gopher:'",
    "data:image/png;base64,AAAA": "begins with 'data:'",
    "javascript:alert(1)": "begins with 'javascript:'",
    "unix://socket/x": "begins with 'unix:'",
    "http+unix://socket/x": "begins with",
    "http://": "has the host ''",
    "http:///dog.jpg": "has the host ''",
    "http://?": "has the host ''",
    "http://:80/": "has an invalid host or port|has the host ''",
    "http://example.com:0/": "has port 0",
    "http://example.com:99999999999999999999/": "invalid host or port",
    "http://example.com:-1/": "invalid host or port",
    "http://example.com:x/": "invalid host or port",
    "http://[::1/": "invalid host or port",
    "http://a..b/": r"has the host 'a\.\.b'",
    "http://.a/": "has the host",
    "http://" + "a" * 64 + ".example/": "has the host",
    "http://" + "a." * 200 + "example/": "has the host",
    "http://a<b>/": "has the host",
    "http://exa mple.com/": "contains ' '",
    "http://example.com/a b": "contains ' '.*%20",
    "http://example.com/\x7f": "contains '.x7f'.*%7F",
    f"http://me:{SECRET}@example.com/": "user name or password",
    f"http://{SECRET}@example.com/": "user name or password",
    f"ftp://me:{SECRET}@example.com/": "begins with 'ftp:'",
    f"http://me:{SECRET}@[::1/": "invalid host or port",
    "http://example.com/" + "x" * MAX_URL_LENGTH: f"has {MAX_URL_LENGTH + 19} characters, more than {MAX_URL_LENGTH}",
}


@pytest.mark.parametrize(("url", "message"), INVALID_URLS.items(), ids=[url[:40] or "empty" for url in INVALID_URLS])
@pytest.mark.parametrize("allow_private", [False, True])
def test_invalid_urls_are_rejected_before_name_resolution(url: str, message: str, allow_private: bool) -> None:
    names = FakeResolver({})
    with pytest.raises(ImageError, match=message):
        fetch(url, allow_private=allow_private, resolver=names)
    error_message(url, allow_private=allow_private, resolver=names)
    assert names.asked == []


@pytest.mark.parametrize(
    "url", ["http://bücher.example/", "https://a_b.example:8443/x", "http://EXAMPLE.example./%20é?a=ü"]
)
def test_valid_urls_are_resolved(url: str) -> None:
    names = FakeResolver({})
    assert "host not found" in error_message(url, resolver=names)
    assert len(names.asked) == 1
    assert names.asked[0].isascii()


@given(
    st.text(max_size=30), st.sampled_from(["", "http://", "http://a", "https://127.0.0.1:", "http://[", "http://a@"])
)
def test_arbitrary_text_raises_only_image_error(text: str, start: str) -> None:
    with pytest.raises(ImageError):
        fetch(start + text, resolver=FakeResolver({}))


# --- the fetcher ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_bytes": 0}, "max_bytes must be an integer of at least 1, got 0"),
        ({"timeout": 0.0}, r"timeout must be a positive number of seconds, got 0\.0"),
        ({"timeout": float("nan")}, "timeout must be .* got nan"),
        ({"timeout": float("inf")}, "timeout must be .* got inf"),
        ({"max_redirects": -1}, "max_redirects must be an integer of at least 0, got -1"),
    ],
)
def test_limits_out_of_range_are_rejected(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Fetcher(**{"max_bytes": 1, **options})


@pytest.mark.parametrize("part", ["head", "body"])
def test_close_aborts_downloads_and_rejects_new_ones(site: Site, part: str) -> None:
    arrived = threading.Event()

    def hang() -> Iterator[bytes]:
        if part == "body":
            yield reply(b"x", Content_Length=99)
        arrived.set()
        site.stopped.wait()
        yield b""

    async def run() -> None:
        fetcher = Fetcher(max_bytes=5000, timeout=60, allow_private=True)
        running = asyncio.create_task(fetcher.fetch(f"{site.url}/hang"))
        await asyncio.to_thread(arrived.wait, 240)
        await asyncio.sleep(0.2)  # the download now waits for data, which closing the aiohttp session does not abort
        await fetcher.close()
        await fetcher.close()
        with pytest.raises(ImageError, match=r"server is shutting down|was interrupted"):
            await asyncio.wait_for(running, 240)
        with pytest.raises(ImageError, match="server is shutting down"):
            await fetcher.fetch(f"{site.url}/ok")

    site.replies["/hang"] = hang
    asyncio.run(run())


def test_no_task_remains_after_the_time_limit(site: Site) -> None:
    def hang() -> Iterator[bytes]:
        site.stopped.wait()
        yield b""

    async def run() -> None:
        fetcher = Fetcher(max_bytes=5000, timeout=0.1, allow_private=True)
        with pytest.raises(ImageError, match=r"longer than 0\.1 s"):
            await fetcher.fetch(f"{site.url}/hang")
        left = asyncio.all_tasks() - {asyncio.current_task()}
        if left:
            _, running = await asyncio.wait(left, timeout=240)
            assert not running
        await fetcher.close()

    site.replies["/hang"] = hang
    asyncio.run(run())


def test_cancelled_download_leaves_the_fetcher_usable(site: Site) -> None:
    arrived = threading.Event()

    def hang() -> Iterator[bytes]:
        arrived.set()
        site.stopped.wait()
        yield b""

    async def run() -> None:
        fetcher = Fetcher(max_bytes=5000, timeout=60, allow_private=True)
        running = asyncio.create_task(fetcher.fetch(f"{site.url}/hang"))
        await asyncio.to_thread(arrived.wait, 240)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert await fetcher.fetch(f"{site.url}/ok") == CONTENT
        await fetcher.close()

    site.replies["/hang"] = hang
    asyncio.run(run())


def test_close_without_downloads_rejects_new_ones() -> None:
    async def run() -> None:
        fetcher = Fetcher(max_bytes=1)
        await fetcher.close()
        with pytest.raises(ImageError, match="server is shutting down"):
            await fetcher.fetch("http://images.example/")

    asyncio.run(run())


def test_missing_aiohttp_names_the_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aiohttp", None)

    async def run() -> None:
        await Fetcher(max_bytes=1).fetch("http://example.com/")

    with pytest.raises(MoondreamError, match=r'pip install "moondream-cv\[server\]"'):
        asyncio.run(run())
