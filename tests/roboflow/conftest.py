"""The tiny model, and Roboflow's real server with it: one of each for all tests of this folder."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moondream_cv import load
from moondream_cv.engine.local import LocalModel
from moondream_cv.scenes import Scene, render_clip, render_scene
from tests.helpers.roboflow_app import MODEL_ID, encoded, prepare, serve
from tests.helpers.workflows import Looks, bgr_frames


@pytest.fixture(scope="session", autouse=True)
def roboflow(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Roboflow's packages can be imported, the server's as well as the workflows engine's."""
    prepare(tmp_path_factory.mktemp("roboflow-cache"))


@pytest.fixture(scope="session")
def tiny() -> LocalModel:
    return load("tiny", device="cpu")


@pytest.fixture
def looks(tiny: LocalModel) -> Looks:
    return Looks(tiny)


@pytest.fixture
def moving() -> list[np.ndarray]:
    """Frames of a dog and a red circle, both in sight all the while."""
    return bgr_frames(render_clip(2, num_frames=18, names=["dog", "red circle"], resolution_wh=(320, 240)))


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock of our own, `seconds`, and nothing logged so far."""
    clock = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr("moondream_cv_blocks.results.time", SimpleNamespace(monotonic=lambda: clock.seconds))
    monkeypatch.setattr("moondream_cv_blocks.results._logged_at", {})
    return clock


@pytest.fixture
def closed_url() -> Iterator[str]:
    """Where nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


@pytest.fixture(scope="session")
def url(tiny: LocalModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of the server."""
    with serve(tiny, tmp_path_factory.mktemp("roboflow")) as url:
        yield url


@pytest.fixture(scope="session")
def scene() -> Scene:
    """One object of each name, all of which the tiny model finds."""
    return render_scene(5, resolution_wh=(320, 240), names=["dog", "red circle", "blue star", "bus"], style="plain")


@pytest.fixture(scope="session")
def bgr(scene: Scene) -> np.ndarray:
    """[240, 320, 3]: the scene as OpenCV would read it."""
    return np.ascontiguousarray(scene.image[..., ::-1])


@pytest.fixture(scope="session")
def body(scene: Scene) -> dict[str, Any]:
    """A request that is answered."""
    return {"model_id": MODEL_ID, "prompt": "dog", "image": {"type": "base64", "value": encoded(scene.image)}}
