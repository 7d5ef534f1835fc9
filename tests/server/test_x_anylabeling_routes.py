"""X-AnyLabeling's protocol over HTTP, against its documented format.

Run with `pytest tests/server/test_x_anylabeling_routes.py`.
"""

from __future__ import annotations

from typing import Any

import pytest

from moondream_cv.engine.local_model import LocalModel
from tests.helpers.served import Served, served
from tests.helpers.waiting import until

PREDICT = "/x-anylabeling/v1/predict"


def body(uri: str, **params: Any) -> dict[str, Any]:
    return {"model": "tiny", "image": uri, "params": {"conf_threshold": 0.0, "epsilon_factor": 0.001, **params}}


def test_boxes_equal_those_of_the_moondream_api(server: Served, uri: str) -> None:
    answer = server.post(PREDICT, body(uri, current_task="detect", text_prompt="red circle, cat", iou_threshold=0.0))
    assert answer.status_code == 200, answer.text
    assert answer.json()["success"] is True
    shapes = answer.json()["data"]["shapes"]
    for label in ("red circle", "cat"):
        (expected,) = server.post("/v1/detect", {"image_url": uri, "object": label}).json()["objects"]
        (shape,) = (shape for shape in shapes if shape["label"] == label)
        x_min, y_min, x_max, y_max = (
            expected[key] * size for key, size in (("x_min", 320), ("y_min", 240), ("x_max", 320), ("y_max", 240))
        )
        corners = [[x_min, y_min], [x_max, y_min], [x_max, y_max], [x_min, y_max]]
        assert shape["points"] == [pytest.approx(corner, abs=0.01) for corner in corners]
        assert shape["score"] == pytest.approx(expected["confidence"], abs=1e-3)
    assert len(shapes) == 2
    until(lambda: server.service.in_flight == 0)


@pytest.mark.parametrize(
    ("changed", "status", "code"),
    [
        ({"model": "yolo"}, 404, "MODEL_NOT_FOUND"),
        ({"image": "none"}, 400, "INVALID_IMAGE"),
        ({"params": {"text_prompt": " , "}}, 400, "INVALID_REQUEST_ERROR"),
        ({"params": {"current_task": "segment", "text_prompt": "cat"}}, 400, "INVALID_REQUEST_ERROR"),
        ({"params": {"conf_threshold": 2}}, 422, "INVALID_REQUEST_ERROR"),
        ({"image": 1}, 422, "INVALID_REQUEST_ERROR"),
    ],
)
def test_errors_have_the_format_of_the_protocol(
    server: Served, uri: str, changed: dict[str, Any], status: int, code: str
) -> None:
    answer = server.post(PREDICT, {**body(uri, text_prompt="cat"), **changed})
    assert answer.status_code == status
    assert answer.json()["success"] is False
    assert answer.json()["error"]["code"] == code
    assert answer.json()["error"]["message"]


def test_token_is_the_api_key(tiny: LocalModel, uri: str) -> None:
    with served(tiny, api_keys=("key",)) as running:
        for token, status in (("", 401), ("other", 401), ("key", 200)):
            headers = {"Token": token}
            assert running.client.get("/x-anylabeling/v1/models", headers=headers).status_code == status
            answer = running.post(PREDICT, body(uri, text_prompt="cat"), headers=headers)
            assert answer.status_code == status
        assert [shape["label"] for shape in answer.json()["data"]["shapes"]] == ["cat"]
