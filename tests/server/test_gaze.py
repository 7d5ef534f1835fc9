"""`/v1/gaze`, gaze in a batch, and the Moondream backend. Run with `pytest tests/server/test_gaze.py`."""

from __future__ import annotations

import json
from typing import Any

import pytest
from PIL import Image

from moondream_cv import connect
from moondream_cv.engine.local_model import LocalModel
from moondream_cv.requests import Gaze, GazeResult
from tests.helpers.color_model import ColorModel
from tests.helpers.remote_server import Reply, remote_server
from tests.helpers.served import Served, served

EYE = [0.4, 0.3]


@pytest.fixture(scope="module")
def expected(tiny: LocalModel, scene_image: Image.Image) -> dict[str, float]:
    """The point that the model returns with `force_detect`."""
    (result,) = tiny.run([Gaze(scene_image, (EYE[0], EYE[1]), force=True)])
    assert isinstance(result, GazeResult)
    assert result.gaze is not None
    return {"x": result.gaze.x, "y": result.gaze.y}


def test_gaze_returns_a_point(server: Served, uri: str, expected: dict[str, float]) -> None:
    answer = server.post("/v1/gaze", {"image_url": uri, "eye": EYE, "force_detect": True})
    assert answer.status_code == 200, answer.text
    assert answer.json() == {"request_id": answer.headers["x-request-id"], "gaze": pytest.approx(expected)}


def test_gaze_without_force_equals_the_model(
    server: Served, tiny: LocalModel, scene_image: Image.Image, uri: str
) -> None:
    gaze = tiny.detect_gaze(scene_image, EYE)["gaze"]
    answer = server.post("/v1/gaze", {"image_url": uri, "eye": EYE, "settings": {}, "model": "moondream2"})
    assert answer.json()["gaze"] == (None if gaze is None else pytest.approx(gaze))


def test_gaze_is_null_without_a_target(uri: str) -> None:
    with served(ColorModel()) as running:
        answer = running.post("/v1/gaze", {"image_url": uri, "eye": EYE})
        assert answer.json() == {"request_id": answer.headers["x-request-id"], "gaze": None}
        with connect(running.url) as model:
            assert model.detect_gaze(Image.new("RGB", (8, 8)), EYE) == {"gaze": None}


def test_gaze_can_be_streamed(server: Served, uri: str, expected: dict[str, float]) -> None:
    answer = server.post("/v1/gaze", {"image_url": uri, "eye": EYE, "force_detect": True, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    found, completed = (json.loads(block.removeprefix("data: ")) for block in answer.text.split("\n\n")[:-1])
    assert found == {"gaze": pytest.approx(expected)}
    assert completed == {"completed": True}


@pytest.mark.parametrize(
    ("changes", "status", "message"),
    [
        ({"eye": None}, 422, "eye"),
        ({"eye": [0.5]}, 422, "eye"),
        ({"eye": [0.5, 0.5, 0.5]}, 422, "eye"),
        ({"eye": [0.5, 1.5]}, 400, "fractions"),
        ({"eye": [0.5, "0.5"]}, 422, "eye"),
        ({"image_url": None}, 422, "image_url"),
        ({"image_url": "none"}, 400, ""),
        ({"force_detect": "yes"}, 422, "force_detect"),
        ({"model": "yolo"}, 404, "yolo"),
    ],
)
def test_invalid_requests_are_rejected(
    server: Served, uri: str, changes: dict[str, Any], status: int, message: str
) -> None:
    answer = server.post("/v1/gaze", {"image_url": uri, "eye": EYE, **changes})
    assert answer.status_code == status, answer.text
    assert message in answer.json()["error"]["message"] + str(answer.json()["error"]["param"])


def test_batch_lines_can_have_gaze(server: Served, uri: str, expected: dict[str, float]) -> None:
    line = {"skill": "gaze", "image_url": uri, "eye": EYE, "force_detect": True}
    text = "\n".join(map(json.dumps, (line, {**line, "eye": [2, 2]})))
    good, bad = map(
        json.loads,
        server.client.post(
            "/v1/batch", content=text, headers={"Content-Type": "application/x-ndjson"}
        ).text.splitlines(),
    )
    assert good == {"index": 0, "custom_id": None, "result": {"gaze": pytest.approx(expected, abs=1e-4)}}
    assert bad["error"]["code"] == 400


def test_every_listed_skill_has_a_route(server: Served) -> None:
    (model,) = server.client.get("/v1/models").json()["models"]
    assert "gaze" in model["skills"]
    routes = server.client.get("/openapi.json").json()["paths"]
    assert {f"/v1/{skill}" for skill in model["skills"]} <= routes.keys()


def test_moondream_backend_supports_gaze(
    server: Served, tiny: LocalModel, scene_image: Image.Image, expected: dict[str, float]
) -> None:
    forced = {"force_detect": True}
    with connect(server.url, image_format="png") as model:
        assert model.skills == tiny.skills
        assert model.detect_gaze(scene_image, EYE, unstable_settings=forced) == {"gaze": pytest.approx(expected)}


def test_gateway_to_a_server_without_gaze_rejects_it(uri: str) -> None:
    with remote_server() as remote:
        remote.on("/v1/models", Reply({"models": [{"id": "moondream2", "skills": ["caption"]}]}))
        with connect(remote.url, "moondream") as model, served(model) as gateway:
            answer = gateway.post("/v1/gaze", {"image_url": uri, "eye": EYE})
            assert (answer.status_code, answer.json()["error"]["type"]) == (400, "unsupported_skill")
            assert "gaze" not in gateway.client.get("/v1/models").json()["models"][0]["skills"]
