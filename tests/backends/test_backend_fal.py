"""Client for fal."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moondream_cv.backends import Fal
from moondream_cv.errors import BackendError, UnsupportedSkill
from tests.helpers.remote_server import RemoteServer, Reply

APP = "/fal-ai/moondream2"
BOX = {"x_min": 0.1, "y_min": 0.2, "x_max": 0.5, "y_max": 1.0}


@pytest.mark.parametrize("path", ["", "/", APP, f"{APP}/"])
def test_app_path_and_api_key_are_added(
    server: RemoteServer, frame: np.ndarray, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setenv("FAL_KEY", "id:secret")
    server.on(APP, Reply({"output": "a patch"}))
    with Fal(server.url + path) as model:
        assert model.caption(frame) == {"caption": "a patch", "truncated": False}
        assert list(model.caption(frame, stream=True)["caption"]) == ["a patch"]
        assert model.has_scores is False
    assert server.requests[0].headers["authorization"] == "Key id:secret"
    assert set(server.requests[0].body) == {"image_url"}


def test_app_path_is_appended_to_a_prefix(server: RemoteServer, frame: np.ndarray) -> None:
    server.on(f"/run{APP}", Reply({"output": "a patch"}))
    with Fal(f"{server.url}/run") as model:
        assert model.caption(frame)["caption"] == "a patch"


@pytest.mark.parametrize(
    ("method", "arguments", "path", "sent", "reply", "result"),
    [
        ("caption", {"length": "short"}, "", {"length": "short"}, {"output": "a", "finish_reason": "length"},
         {"caption": "a", "truncated": True}),
        ("query", {"question": "q", "settings": {"temperature": 0}}, "/visual-query",
         {"prompt": "q", "settings": {"temperature": 0}}, {"output": "a", "usage_info": {}},
         {"answer": "a", "truncated": False}),
        ("detect", {"object": "cat"}, "/object-detection", {"object": "cat"},
         {"objects": [BOX, BOX], "image": {"url": "x"}},
         {"objects": [{**BOX, "confidence": 1.0}] * 2, "truncated": False}),
        ("detect", {"object": "cat", "settings": {"max_objects": 2}}, "/object-detection",
         {"object": "cat", "settings": {"max_objects": 2}},
         {"objects": [{"x_min": 1, "y_min": 0.5, "x_max": 1.2, "y_max": 1}, {"x_min": 25, "y_min": 10, "x_max": 50,
                                                                         "y_max": 20, "confidence": 0.5}, {**BOX}]},
         {"objects": [{"x_min": 0.02, "y_min": 0.0125, "x_max": 0.024, "y_max": 0.025, "confidence": 1.0},
                      {"x_min": 0.5, "y_min": 0.25, "x_max": 1.0, "y_max": 0.5, "confidence": 1.0}],
          "truncated": True}),
        ("detect", {"object": "cat", "settings": {"max_objects": 2}}, "/object-detection",
         {"object": "cat", "settings": {"max_objects": 2}}, {"objects": [BOX, BOX]},
         {"objects": [{**BOX, "confidence": 1.0}] * 2, "truncated": False}),
        ("point", {"object": "cat"}, "/point-object-detection", {"object": "cat"},
         {"objects": [{"x": 0.5, "y": -0.01}]},
         {"points": [{"x": 0.5, "y": -0.01, "confidence": 1.0}], "truncated": False}),
        ("point", {"object": "cat"}, "/point-object-detection", {"object": "cat"},
         {"objects": [{"x": 25, "y": 10}, {"x": 1, "y": 1}]},
         {"points": [{"x": 0.5, "y": 0.25, "confidence": 1.0}, {"x": 0.02, "y": 0.025, "confidence": 1.0}],
          "truncated": False}),
    ],
)  # fmt: skip
def test_request_and_response_format(
    server: RemoteServer,
    frame: np.ndarray,
    method: str,
    arguments: dict[str, Any],
    path: str,
    sent: dict[str, Any],
    reply: dict[str, Any],
    result: dict[str, Any],
) -> None:
    server.on(APP + path, Reply(reply))
    with Fal(server.url) as model:
        assert getattr(model, method)(frame, **arguments) == result
    (request,) = server.requests
    assert "authorization" not in request.headers
    assert request.body.pop("image_url").startswith("data:image/jpeg;base64,")
    assert request.body == sent


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image": None}, "Fal cannot answer without an image; use MoondreamAPI"),
        ({"reasoning": True}, "Fal cannot return reasoning; use MoondreamAPI"),
        ({"spatial_refs": [(0.5, 0.5)]}, "Fal cannot use spatial_refs; use MoondreamAPI"),
    ],
)
def test_unsupported_arguments_raise(
    server: RemoteServer, frame: np.ndarray, arguments: dict[str, Any], message: str
) -> None:
    with Fal(server.url) as model, pytest.raises(UnsupportedSkill, match=message):
        model.query(**{"image": frame, "question": "q", **arguments})
    assert server.requests == []


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (Reply({"objects": [{"x": 1, "y": 2, "w": 3, "h": 4}]}), "invalid 'x_min', expected a number: None"),
        (Reply({"objects": [[1, 2, 3, 4]]}), "invalid entry in 'objects'"),
        (Reply({"output": "a cat"}), "no valid 'objects', expected a list"),
        (Reply({"request_id": "1", "status": "IN_QUEUE"}), "no valid 'objects'"),
        (Reply({"detail": "Cannot access application"}, 401), "Cannot access.*pass api_key= or set FAL_KEY"),
        (Reply({"detail": [{"loc": ["body"], "msg": "field required"}]}, 422), "422: field required"),
    ],
)
def test_invalid_responses_raise(server: RemoteServer, frame: np.ndarray, reply: Reply, message: str) -> None:
    server.on(f"{APP}/object-detection", reply)
    with Fal(server.url) as model, pytest.raises(BackendError, match=message):
        model.detect(frame, "cat")


def test_has_scores_uses_the_confidences(server: RemoteServer, frame: np.ndarray) -> None:
    server.on(f"{APP}/object-detection", Reply({"objects": [{**BOX, "confidence": 0.25}]}))
    with Fal(server.url, has_scores=True) as model:
        assert model.detect(frame, "cat")["objects"] == [{**BOX, "confidence": 0.25}]
