"""`connect`, and URLs as model names."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from moondream_cv import Detector, Pointer, connect, load
from moondream_cv.backends import Fal, MoondreamAPI, OpenAICompatible, RoboflowInference
from moondream_cv.backends.base import RemoteModel
from moondream_cv.errors import BackendError, UnsupportedSkill
from tests.helpers.certificates import make_certificates
from tests.helpers.remote_server import RemoteServer, Reply
from tests.helpers.served import served

OURS = Reply({"object": "list", "data": [{"id": "tiny"}], "models": [{"id": "tiny", "has_scores": True}]})
STATION = Reply({"models": [{"id": "moondream-2", "name": "Moondream 2", "description": "", "version": "1"}]})
OPENAI = Reply({"object": "list", "data": [{"id": "gpt", "object": "model"}]})
INFO = Reply({"name": "Roboflow Inference Server", "version": "1.8.3", "uuid": "u"})
BOX = {"x_min": 0.1, "y_min": 0.25, "x_max": 0.5, "y_max": 0.75, "confidence": 0.5}


@pytest.mark.parametrize(
    ("url", "kind", "target"),
    [
        ("https://api.moondream.ai/v1", MoondreamAPI, "https://api.moondream.ai/v1"),
        ("https://api.moondream.ai", MoondreamAPI, "https://api.moondream.ai/v1"),
        ("https://serverless.roboflow.com", RoboflowInference, "https://serverless.roboflow.com"),
        ("https://DETECT.roboflow.com/", RoboflowInference, "https://DETECT.roboflow.com"),
        ("https://api.openai.com", OpenAICompatible, "https://api.openai.com/v1"),
        ("https://fal.run", Fal, "https://fal.run/fal-ai/moondream2"),
        ("https://fal.run/fal-ai/moondream2", Fal, "https://fal.run/fal-ai/moondream2"),
        ("https://fal.ai/models/fal-ai/moondream2", Fal, "https://fal.run/fal-ai/moondream2"),
        ("https://queue.fal.run/fal-ai/moondream2", Fal, "https://fal.run/fal-ai/moondream2"),
    ],
)
def test_known_hosts_are_not_probed(url: str, kind: type[RemoteModel], target: str) -> None:
    with connect(url) as model:  # without network access
        assert (type(model), model.url) == (kind, target)


@pytest.mark.parametrize(
    ("routes", "path", "kind", "target", "probes"),
    [
        ({"/v1/models": OURS, "/info": INFO}, "", MoondreamAPI, "/v1", 1),
        ({"/v1/models": OURS}, "/v1", MoondreamAPI, "/v1", 1),
        ({"/v1/models": STATION}, "/", MoondreamAPI, "/v1", 1),
        ({"/v1/models": OPENAI}, "", OpenAICompatible, "/v1", 1),
        ({"/v1/models": OPENAI}, "/v1/", OpenAICompatible, "/v1", 1),
        ({"/vlm/v1/models": OPENAI}, "/vlm", OpenAICompatible, "/vlm/v1", 1),
        ({"/vlm/v1/models": STATION}, "/vlm/", MoondreamAPI, "/vlm/v1", 1),
        ({"/info": INFO}, "", RoboflowInference, "", 2),
        (
            {"/v1/models": Reply({}, 401), "/info": Reply({"name": "moondream-cv", "uuid": "1"})},
            "",
            MoondreamAPI,
            "/v1",
            2,
        ),
        ({"/v1/models": Reply(b"<html>", kind="text/html"), "/info": INFO}, "", RoboflowInference, "", 2),
        ({"/v1/models": Reply({}, 500), "/info": INFO}, "", RoboflowInference, "", 2),
    ],
)
def test_dialect_is_probed(
    server: RemoteServer,
    routes: dict[str, Reply],
    path: str,
    kind: type[RemoteModel],
    target: str,
    probes: int,
) -> None:
    for route, answer in routes.items():
        server.on(route, answer)
    with connect(server.url + path) as model:
        assert (type(model), model.url) == (kind, server.url + target)
    assert len(server.requests) == probes


@pytest.mark.parametrize(
    ("dialect", "kind"),
    [("roboflow", RoboflowInference), ("moondream", MoondreamAPI), ("openai", OpenAICompatible), ("fal", Fal)],
)
def test_given_dialect_is_not_probed(server: RemoteServer, dialect: str, kind: type[RemoteModel]) -> None:
    with connect(server.url, dialect, max_in_flight=3, timeout=5) as model:
        assert type(model) is kind
        assert model.max_in_flight == 3
    assert server.requests == []


@pytest.mark.parametrize(
    "answer",
    [Reply({}), Reply([1]), Reply(b"<html>", kind="text/html"), Reply({}, 404)],
)
def test_unknown_api_raises(server: RemoteServer, answer: Reply) -> None:
    server.on("/v1/models", answer).on("/info", answer)
    message = r"has an unknown API; pass dialect= with one of roboflow, moondream, openai, fal$"
    with pytest.raises(BackendError, match=message) as caught:
        connect(server.url)
    assert str(caught.value).startswith(server.url)


def test_unresponsive_server_raises() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(
            BackendError, match=r"did not respond within 0.2 s; pass dialect= to skip probing$"
        ) as caught:
            connect(url, timeout=0.2)
    assert str(caught.value).startswith(url)
    with pytest.raises(ValueError, match="timeout must be a positive number of seconds, got -1"):
        connect(url, timeout=-1)


def test_probe_sends_the_api_key(server: RemoteServer) -> None:
    server.on("/v1/models", Reply({"error": "key?"}, 401), OURS)
    with pytest.raises(BackendError, match="the server requires a key: pass api_key="):
        connect(server.url)
    with connect(server.url, api_key="secret") as model:
        assert isinstance(model, MoondreamAPI)
    headers = server.to("/v1/models")[1].headers
    assert (headers["x-moondream-auth"], headers["authorization"]) == ("secret", "Bearer secret")


def test_probe_does_not_send_keys_from_the_environment(server: RemoteServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("API_KEY", "FAL_KEY", "MOONDREAM_API_KEY", "OPENAI_API_KEY", "ROBOFLOW_API_KEY"):
        monkeypatch.setenv(name, "from-environment")
    server.on("/v1/models", OURS)
    connect(server.url).close()
    assert "from-environment" not in json.dumps([dict(request.headers) for request in server.requests])


def test_unreachable_server_raises() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(BackendError, match=r"/v1/models is unreachable .* check that the server is running"):
            connect(url)


def test_untrusted_certificate_raises_until_it_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = make_certificates(tmp_path)
    with load("tiny", device="cpu") as model, served(model, tls=(files.certificate, files.key)) as running:
        with pytest.raises(BackendError, match=r"untrusted certificate .* set SSL_CERT_FILE"):
            connect(running.url)
        monkeypatch.setenv("SSL_CERT_FILE", files.authority)
        with connect(running.url) as remote:
            assert isinstance(remote, MoondreamAPI)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("http://x", "grpc"), "dialect must be one of auto, roboflow, moondream, openai, fal, got 'grpc'"),
        (("localhost:9001",), "'localhost:9001' is not a server URL"),
        (("moondream2",), "'moondream2' is not a server URL"),
    ],
)
def test_invalid_arguments_raise(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        connect(*arguments)


def test_unknown_option_raises() -> None:
    with pytest.raises(ValueError, match="the dialect fal does not have this option: .*model_id"):  # noqa: RUF043
        connect("https://fal.run", model_id="x")


def test_url_as_a_model_name(server: RemoteServer, frame: np.ndarray) -> None:
    server.on("/v1/models", OURS).on("/v1/detect", Reply({"objects": [BOX]})).on("/v1/point", Reply({"points": []}))
    with Detector(server.url, confidence=0.4) as detector, Pointer(server.url) as pointer:
        found = detector(frame, "patch")
        assert found.xyxy.tolist() == [[5, 10, 25, 30]]
        assert found.confidence is not None
        assert found.confidence.tolist() == [0.5]
        assert len(pointer(frame, "patch")) == 0
    with pytest.raises(Exception, match="is closed"):
        detector(frame, "patch")


def test_device_with_a_url_raises(server: RemoteServer) -> None:
    with pytest.raises(ValueError, match="device must be None for the URL of a server, got 'cpu'"):
        Detector(server.url, device="cpu")
    assert server.requests == []


def test_server_without_the_skill_raises(server: RemoteServer) -> None:
    server.on("/info", INFO)
    with pytest.raises(
        UnsupportedSkill,
        match="Pointer needs a model with the skill 'point'; the skills of RoboflowInference are: detect",
    ):
        Pointer(server.url)


def test_load_with_a_url_advises_connect() -> None:
    with pytest.raises(ValueError, match=r"got the URL 'http://host/v1'; use connect\(url\)"):
        load("http://anna:secret@host/v1?key=secret")


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=240, cwd=cwd, env=environment
    )


def test_remote_detector_does_not_import_torch(server: RemoteServer) -> None:
    server.on("/v1/models", OURS).on("/v1/detect", Reply({"objects": [BOX]}))
    ended = run(
        "-c",
        "import sys, numpy\n"
        "from moondream_cv import Detector, connect\n"
        f"found = Detector({server.url!r})(numpy.zeros((40, 50, 3), 'u1'), 'patch')\n"
        f"connect({server.url!r})\n"
        "assert len(found) == 1\n"
        "heavy = {'torch', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n",
    )
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize(
    ("command", "route", "reply", "shown"),
    [
        (("detect", "-c", "patch"), "/v1/detect", {"objects": [BOX]}, '"confidence": 0.5'),
        (("query", "-q", "What is it?"), "/v1/query", {"answer": "a patch"}, '"answer": "a patch"'),
        (("caption",), "/v1/caption", {"caption": "a patch"}, '"caption": "a patch"'),
    ],
)
def test_command_line_accepts_a_url(
    server: RemoteServer, tmp_path: Path, command: tuple[str, ...], route: str, reply: dict[str, Any], shown: str
) -> None:
    server.on("/v1/models", OURS).on(route, Reply(reply))
    file = io.BytesIO()
    Image.new("RGB", (50, 40)).save(file, "PNG")
    (tmp_path / "a.png").write_bytes(file.getvalue())
    arguments = ("-m", "moondream_cv", *command, "a.png", "--model", server.url)
    ended = run(*arguments, "--json", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert shown in ended.stdout
    refused = run(*arguments, "--device", "cpu", cwd=tmp_path)
    assert refused.returncode != 0
    assert "--device applies to a local model only" in " ".join(refused.stderr.split())
