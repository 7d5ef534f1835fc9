"""API keys and passwords are redacted in reprs, logs and errors, including chained errors."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest

from moondream_cv.backends import Fal, MoondreamAPI, OpenAICompatible, RoboflowInference, connect
from moondream_cv.backends.credentials import find_api_key, redact, shorten
from moondream_cv.backends.server_url import ServerURL
from moondream_cv.errors import MoondreamError
from moondream_cv.requests import Detect, ErrorResult
from moondream_cv.urls import is_url, shown_url
from tests.helpers.remote_server import RemoteServer, Reply, event_stream

KEY = "kid-3f0a77:ksecret/5+e1"
MODELS = {
    "MOONDREAM_API_KEY": (MoondreamAPI, "/v1/detect"),
    "OPENAI_API_KEY": (OpenAICompatible, "/v1/chat/completions"),
    "FAL_KEY": (Fal, "/fal-ai/moondream2/object-detection"),
    "ROBOFLOW_API_KEY": (RoboflowInference, "/infer/lmm"),
}
LEAKS: dict[str, Callable[[str], Reply]] = {
    "json": lambda key: Reply({"error": {"message": f"the key {key} is unknown"}}, 401),
    "quoted": lambda key: Reply({"message": f"no ?api_key={quote(key, safe='')}&x"}, 403),
    "text": lambda key: Reply(f"denied: {key}".encode(), 400, kind="text/plain"),
    "cut": lambda key: Reply({"detail": "x" * 295 + key}, 400),
    "part": lambda key: Reply({"detail": f"wrong secret {key.split(':')[1]}"}, 400),
    "rubbish": lambda key: Reply({"headers": {"Authorization": key}}),
    "list": lambda key: Reply([key]),
    "no json": lambda key: Reply(f"<p>{key}".encode(), kind="text/html"),
    "a number": lambda key: Reply({"objects": [{"x_min": key}], "predictions": [{"x": key}]}),
    "a choice": lambda key: Reply({"choices": [{"message": {"content": f"you sent {key}"}}]}),
    "retried": lambda key: Reply({"message": f"busy with {key}"}, 500),
}


def texts_of(error: BaseException | None) -> list[str]:
    """Return all texts of an error and of its chained errors."""
    found = []
    while error is not None:
        found += [str(error), repr(error)]
        error = error.__cause__ or error.__context__
    return found


@pytest.mark.parametrize("leak", LEAKS)
@pytest.mark.parametrize("variable", MODELS)
def test_keys_are_redacted_everywhere(
    server: RemoteServer,
    frame: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    variable: str,
    leak: str,
) -> None:
    monkeypatch.setenv(variable, KEY)
    model_class, path = MODELS[variable]
    if model_class is RoboflowInference:
        pytest.importorskip("inference_sdk")
    server.on(path, LEAKS[leak](KEY))
    with caplog.at_level(logging.DEBUG), model_class(server.url, retries=1, backoff=0.001) as model:
        (result,) = model.run([Detect(frame, "dog")])
        shown = [repr(model), str(model), repr(model._http.server)]
    assert isinstance(result, ErrorResult)
    assert isinstance(result.error, MoondreamError)
    assert KEY in json.dumps([[dict(a.headers), a.body] for a in server.to(path)])  # the key was sent
    for text in [*texts_of(result.error), *shown, caplog.text]:
        assert KEY not in text
        assert "ksecret" not in text
        assert quote(KEY, safe="") not in text


def test_keys_are_redacted_in_stream_errors(server: RemoteServer, frame: np.ndarray) -> None:
    server.on("/v1/caption", event_stream({"chunk": "a"}, {"error": {"message": f"quota of {KEY}"}}))
    with MoondreamAPI(server.url, api_key=KEY) as model:
        pieces = model.caption(frame, stream=True)["caption"]
        assert next(pieces) == "a"
        with pytest.raises(MoondreamError, match=r"quota of \*\*\*") as caught:
            next(pieces)
    assert not [text for text in texts_of(caught.value) if KEY in text]


@pytest.mark.parametrize("secret", ["s3cret-word", "p%40ss:word"])
def test_passwords_in_urls_are_sent_and_redacted(
    server: RemoteServer, frame: np.ndarray, caplog: pytest.LogCaptureFixture, secret: str
) -> None:
    server.on("/v1/caption", Reply({"detail": "no"}, 403)).on("/v1/models", Reply({"models": []}))
    url = server.url.replace("://", f"://anna:{secret}@")
    with (
        caplog.at_level(logging.DEBUG),
        connect(url) as model,
        pytest.raises(MoondreamError, match="returned status 403") as caught,
    ):
        model.caption(frame)
    assert all(request.headers["authorization"].startswith("Basic ") for request in server.requests)
    for text in [*texts_of(caught.value), repr(model), caplog.text]:
        assert secret not in text


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("nothing", "nothing"),
        (f"a {KEY} b", "a *** b"),
        ("kid-3f0a77 alone", "*** alone"),
        (shorten(f"a {KEY}", 10), "a ***..."),
        (shorten(f"a {KEY}", 5), "a kid..."),
        (json.dumps({"key": KEY}), '{"key": "***"}'),
    ],
)
def test_redact_replaces_every_form_of_a_key(text: str, result: str) -> None:
    assert redact(text, (KEY, None, "")) == result


def test_escaped_keys_are_redacted() -> None:
    key = 'back\\slash"quote'
    assert redact(json.dumps(key) + repr(key), [key]) == "\"***\"'***'"


def test_api_key_precedence(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_api_key(None, "ROBOFLOW_API_KEY", "API_KEY") is None
    monkeypatch.setenv("API_KEY", "second")
    assert find_api_key(None, "ROBOFLOW_API_KEY", "API_KEY") == "second"
    monkeypatch.setenv("ROBOFLOW_API_KEY", "first\n")
    assert find_api_key(None, "ROBOFLOW_API_KEY", "API_KEY") == "first"
    assert find_api_key("given", "ROBOFLOW_API_KEY", "API_KEY") == "given"
    assert find_api_key("", "ROBOFLOW_API_KEY", "API_KEY") is None


@pytest.mark.parametrize(
    ("url", "clean"),
    [
        ("http://localhost:2020", "http://localhost:2020"),
        (" https://Host/v1/// ", "https://Host/v1"),
        ("http://anna:pw@host:1/x", "http://host:1/x"),
        ("http://[::1]:9001/", "http://[::1]:9001"),
    ],
)
def test_server_urls_are_normalized(url: str, clean: str) -> None:
    assert ServerURL.parse(url).url == clean
    assert "pw" not in repr(ServerURL.parse(url))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("localhost:2020", "'localhost:2020' is not a server URL; add the scheme"),
        ("", "is not a server URL"),
        ("ftp://host/x", "'ftp://host/x' must begin with http:// or https://"),
        ("http://", "has no valid host and port"),
        ("http://:80", "has no valid host and port"),
        ("http://host:port", "has no valid host and port"),
        ("http://host:99999", "has no valid host and port"),
        ("http://[::1", "has no valid host and port"),
        ("http://a b/", "has no valid host and port"),
        ("http://anna:secret@host:port", "'http://host:port' has no valid host"),
        ("http://host?api_key=secret", "'http://host' must not have a query or a fragment; .*pass a key as api_key="),
        ("http://host#secret", "'http://host' must not have a query"),
        (5, "the URL of a server must be a string such as"),
    ],
)
def test_invalid_server_urls_raise(url: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        ServerURL.parse(url)
    assert not [text for text in texts_of(caught.value) if "secret" in text]


@pytest.mark.parametrize(
    ("name", "url"),
    [
        ("http://x", True),
        (" HTTPS://x", True),
        ("moondream2", False),
        ("C://x", False),
        ("a/b@c", False),
        (None, False),
    ],
)
def test_is_url_requires_a_scheme(name: object, url: bool) -> None:
    assert is_url(name) is url


def test_shown_url_omits_secrets() -> None:
    assert shown_url("http://anna:pw@host/p?key=1#x") == "http://host/p"
    assert shown_url("anna:pw@host") == "host"
    assert len(shown_url("http://" + "x" * 1000)) == 200
