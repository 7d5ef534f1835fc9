"""`RoboflowInference` and what is special about Roboflow's server. Boxes are left to `test_everywhere_roboflow.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moondream_cv import Detector
from moondream_cv.backends import RoboflowInference
from moondream_cv.engine.local import LocalModel
from moondream_cv.errors import BackendError, ImageError
from moondream_cv.requests import Detect, DetectResult, ErrorResult
from tests.helpers.detector_suite import Place
from tests.helpers.roboflow_app import MODEL_IDS, skip_without_server

skip_without_server()
pytestmark = pytest.mark.roboflow


@pytest.fixture
def connect(url: str) -> Iterator[Callable[..., RoboflowInference]]:
    """Makes backends, and closes them afterwards."""
    opened: list[RoboflowInference] = []

    def open_backend(**options: Any) -> RoboflowInference:
        opened.append(RoboflowInference(url, **{"api_key": "", **options}))
        return opened[-1]

    yield open_backend
    for backend in opened:
        backend.close()


def test_skills(connect: Callable[..., RoboflowInference]) -> None:
    assert connect().skills == {"detect"}


@pytest.mark.parametrize("model_id", MODEL_IDS)
def test_every_model_id(
    connect: Callable[..., RoboflowInference], tiny: LocalModel, bgr: np.ndarray, model_id: str
) -> None:
    place = Place(connect(model_id=model_id, image_format="png"), rounded=True, has_scores=False)
    found = Detector(place.model)(bgr, "dog")
    assert len(found) == 1
    place.check(found, Detector(tiny)(bgr, "dog"))


def test_a_bad_image_fails_alone(connect: Callable[..., RoboflowInference], bgr: np.ndarray, tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"not an image")
    broken, whole = connect().run([Detect(str(tmp_path / "broken.jpg"), "dog"), Detect(bgr, "dog")])
    assert isinstance(broken, ErrorResult)
    assert isinstance(broken.error, ImageError)
    assert isinstance(whole, DetectResult)
    assert len(whole.objects) == 1


@pytest.mark.parametrize(
    ("model_id", "says"), [("nonsense/1", "Could not connect to Roboflow API"), ("a/b/c", "Invalid Model ID")]
)
def test_what_the_server_says_comes_through(
    connect: Callable[..., RoboflowInference], url: str, bgr: np.ndarray, model_id: str, says: str
) -> None:
    detector = Detector(connect(model_id=model_id, api_key="a-secret-key", retries=0))
    with pytest.raises(BackendError, match=says) as caught:
        detector(bgr, "dog")
    assert url in str(caught.value)
    assert "a-secret-key" not in str(caught.value)
