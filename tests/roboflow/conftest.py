"""Fixtures for the tests of the Roboflow integration: the tiny model, and Roboflow's inference server with it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moondream_cv import load
from moondream_cv.engine.local_model import LocalModel
from moondream_cv.scenes import Scene, render_clip, render_scene
from tests.helpers.roboflow_app import MODEL_ID, encoded, prepare, serve
from tests.helpers.workflows import CountingModel, bgr_frames


@pytest.fixture(scope="session", autouse=True)
def roboflow(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Prepare the process for the import of Roboflow's packages."""
    prepare(tmp_path_factory.mktemp("roboflow-cache"))


@pytest.fixture(scope="session")
def tiny() -> LocalModel:
    return load("tiny", device="cpu")


@pytest.fixture
def counting_model(tiny: LocalModel) -> CountingModel:
    return CountingModel(tiny)


@pytest.fixture
def moving() -> list[np.ndarray]:
    """Return BGR frames of a dog and a red circle, both visible in every frame."""
    return bgr_frames(render_clip(2, num_frames=18, names=["dog", "red circle"], resolution_wh=(320, 240)))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Replace the clock of the log limit, and forget earlier log records; set `seconds` to advance it."""
    fake = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr("moondream_cv_blocks.results.time", SimpleNamespace(monotonic=lambda: fake.seconds))
    monkeypatch.setattr("moondream_cv_blocks.results._logged_at", {})
    return fake


@pytest.fixture
def closed_url() -> Iterator[str]:
    """Return a URL that refuses connections."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


@pytest.fixture(scope="session")
def url(tiny: LocalModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Return the URL of Roboflow's inference server with the tiny model."""
    with serve(tiny, tmp_path_factory.mktemp("roboflow")) as url:
        yield url


@pytest.fixture(scope="session")
def scene() -> Scene:
    """Return a scene of four objects, all of which the tiny model detects."""
    return render_scene(5, resolution_wh=(320, 240), names=["dog", "red circle", "blue star", "bus"], style="plain")


@pytest.fixture(scope="session")
def bgr(scene: Scene) -> np.ndarray:
    """Return the scene as a BGR image, [240, 320, 3]."""
    return np.ascontiguousarray(scene.image[..., ::-1])


@pytest.fixture(scope="session")
def body(scene: Scene) -> dict[str, Any]:
    """Return the body of a valid request."""
    return {"model_id": MODEL_ID, "prompt": "dog", "image": {"type": "base64", "value": encoded(scene.image)}}
