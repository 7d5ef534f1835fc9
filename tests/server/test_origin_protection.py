"""Allowed hosts and origins of a server without API keys, and content types of POST requests.

Run with `pytest tests/server/test_origin_protection.py`.
"""

from __future__ import annotations

import httpx
import pytest

from moondream_cv.engine.local_model import LocalModel
from moondream_cv.server.origin_protection import allowed_hosts_for, host_name
from tests.helpers.served import Served, served

DETECTION = {"image_url": "https://example.com/a.png", "object": ""}  # the route rejects it with status 400


def status_of(server: Served, path: str = "/v1/detect", **headers: str) -> int:
    return server.client.post(path, json=DETECTION, headers=headers).status_code


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1234", "127.0.0.1", "127.0.0.1:80", "[::1]:2020", "[::1]"])
def test_loopback_hosts_are_accepted(server: Served, host: str) -> None:
    assert status_of(server, Host=host) != 403


@pytest.mark.parametrize(
    "host",
    [
        "attacker.example",
        "localhost.attacker.example",
        "192.0.2.1",
        "",
        "localhost:1:2",
        "[::1]a.example",
        "localhost:x@a.example",
    ],
)
def test_other_hosts_are_rejected(server: Served, host: str) -> None:
    for path in ("/v1/detect", "/infer/lmm", "/v1/batch", "/v1/chat/completions", "/fal-ai/moondream2"):
        assert status_of(server, path, Host=host) == 403
    for path in ("/", "/v1/models", "/metrics"):
        assert server.client.get(path, headers={"Host": host}).status_code == 403
    rejected = server.client.get("/v1/models", headers={"Host": host})
    expected = f"--allowed-host {host_name(host)}" if host_name(host) else "the Host header is missing or invalid"
    assert expected in rejected.json()["error"]["message"]
    assert server.client.get("/health", headers={"Host": host}).status_code == 200  # probes use any name


def test_allowed_hosts_are_accepted(tiny: LocalModel) -> None:
    with served(tiny, allowed_hosts=("gpu.example", "ip")) as server:
        assert status_of(server, Host="GPU.example:2020") != 403
        assert status_of(server, Host="192.0.2.1:2020") != 403
        assert status_of(server, Host="other.example") == 403
    with served(tiny, allowed_hosts=("*",)) as server:
        assert status_of(server, Host="other.example") != 403


def test_servers_with_keys_accept_any_host_and_origin(tiny: LocalModel) -> None:
    with served(tiny, api_keys=("key",)) as server:
        headers = {"X-Moondream-Auth": "key", "Host": "a.example", "Origin": "https://b.example"}
        assert server.client.post("/v1/detect", json=DETECTION, headers=headers).status_code == 400


@pytest.mark.parametrize(
    ("listening", "names"), [("127.0.0.1", ()), ("localhost", ()), ("gpu.example", ("gpu.example",))]
)
def test_allowed_hosts_for_returns_the_names_of_an_address(listening: str, names: tuple[str, ...]) -> None:
    assert allowed_hosts_for(listening) == names
    assert "ip" in allowed_hosts_for("0.0.0.0")
    assert "ip" in allowed_hosts_for("::")


def test_cross_site_requests_are_rejected(server: Served, tiny: LocalModel) -> None:
    assert status_of(server, Origin="https://attacker.example") == 403
    assert status_of(server, Origin="null") == 403
    assert status_of(server, Origin="http://localhost:1") == 403  # another port is another origin
    assert status_of(server, Origin=server.url) != 403
    assert server.client.get("/v1/models", headers={"Origin": "https://attacker.example"}).status_code == 200
    with served(tiny, cors_origins=("https://page.example",)) as allowing:
        assert status_of(allowing, Origin="https://page.example") != 403
        assert status_of(allowing, Origin="https://attacker.example") == 403


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "text/plain; a=application/json"])
@pytest.mark.parametrize(
    "path", ["/v1/detect", "/v1/batch", "/infer/lmm", "/v1/chat/completions", "/fal-ai/moondream2"]
)
def test_posts_need_a_json_or_multipart_content_type(server: Served, path: str, kind: str) -> None:
    rejected = server.client.post(path, content=b"{}", headers={"Content-Type": kind})
    assert rejected.status_code == 415
    assert "Content-Type must be application/" in rejected.text
    assert httpx.post(server.url + path, content=b"{}", timeout=240).status_code == 415  # without any
    multipart = () if path == "/v1/batch" else ("multipart/form-data; boundary=x",)
    for accepted in ("application/json", "application/problem+json; charset=utf-8", *multipart):
        assert server.client.post(path, content=b"", headers={"Content-Type": accepted}).status_code != 415
