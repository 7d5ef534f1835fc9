"""fal's dialect."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moondream_cv.backends import Fal
from moondream_cv.errors import BackendError, UnsupportedSkill
from tests.helpers.remote_server import Answer, RemoteServer

APP = "/fal-ai/moondream2"
BOX = {"x_min": 0.1, "y_min": 0.2, "x_max": 0.5, "y_max": 1.0}


@pytest.mark.parametrize("path", ["", "/", APP, f"{APP}/"])
def test_app_path_and_api_key_are_added(
    server: RemoteServer, picture: np.ndarray, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setenv("FAL_KEY", "id:secret")
    server.on(APP, Answer({"output": "a patch"}))
    with Fal(server.url + path) as model:
        assert model.caption(picture) == {"caption": "a patch", "truncated": False}
        assert list(model.caption(picture, stream=True)["caption"]) == ["a patch"]
        assert model.has_scores is False
    assert server.asked[0].headers["authorization"] == "Key id:secret"
    assert set(server.asked[0].body) == {"image_url"}


def test_app_path_is_appended_to_a_prefix(server: RemoteServer, picture: np.ndarray) -> None:
    server.on(f"/run{APP}", Answer({"output": "a patch"}))
    with Fal(f"{server.url}/run") as model:
        assert model.caption(picture)["caption"] == "a patch"


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
    picture: np.ndarray,
    method: str,
    arguments: dict[str, Any],
    path: str,
    sent: dict[str, Any],
    reply: dict[str, Any],
    result: dict[str, Any],
) -> None:
    server.on(APP + path, Answer(reply))
    with Fal(server.url) as model:
        assert getattr(model, method)(picture, **arguments) == result
    (asked,) = server.asked
    assert "authorization" not in asked.headers
    assert asked.body.pop("image_url").startswith("data:image/jpeg;base64,")
    assert asked.body == sent


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"image": None}, "Fal cannot answer without an image; use MoondreamAPI"),
        ({"reasoning": True}, "Fal cannot return reasoning; use MoondreamAPI"),
        ({"spatial_refs": [(0.5, 0.5)]}, "Fal cannot use spatial_refs; use MoondreamAPI"),
    ],
)
def test_unsupported_arguments_raise(
    server: RemoteServer, picture: np.ndarray, arguments: dict[str, Any], says: str
) -> None:
    with Fal(server.url) as model, pytest.raises(UnsupportedSkill, match=says):
        model.query(**{"image": picture, "question": "q", **arguments})
    assert server.asked == []


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (Answer({"objects": [{"x": 1, "y": 2, "w": 3, "h": 4}]}), "invalid 'x_min', expected a number: None"),
        (Answer({"objects": [[1, 2, 3, 4]]}), "invalid entry in 'objects'"),
        (Answer({"output": "a cat"}), "no valid 'objects', expected a list"),
        (Answer({"request_id": "1", "status": "IN_QUEUE"}), "no valid 'objects'"),
        (Answer({"detail": "Cannot access application"}, 401), "Cannot access.*pass api_key= or set FAL_KEY"),
        (Answer({"detail": [{"loc": ["body"], "msg": "field required"}]}, 422), "422: field required"),
    ],
)
def test_invalid_responses_raise(server: RemoteServer, picture: np.ndarray, reply: Answer, says: str) -> None:
    server.on(f"{APP}/object-detection", reply)
    with Fal(server.url) as model, pytest.raises(BackendError, match=says):
        model.detect(picture, "cat")


def test_has_scores_uses_the_confidences(server: RemoteServer, picture: np.ndarray) -> None:
    server.on(f"{APP}/object-detection", Answer({"objects": [{**BOX, "confidence": 0.25}]}))
    with Fal(server.url, has_scores=True) as model:
        assert model.detect(picture, "cat")["objects"] == [{**BOX, "confidence": 0.25}]
