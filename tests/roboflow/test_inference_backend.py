"""Test `RoboflowInference` with Roboflow's inference server; `test_everywhere_roboflow.py` tests its detections."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moondream_cv import Detector
from moondream_cv.backends import RoboflowInference
from moondream_cv.engine.local_model import LocalModel
from moondream_cv.errors import BackendError, ImageError
from moondream_cv.requests import Detect, DetectResult, ErrorResult
from tests.helpers.detector_suite import Deployment
from tests.helpers.roboflow_app import MODEL_IDS, skip_without_server

skip_without_server()
pytestmark = pytest.mark.roboflow


@pytest.fixture
def connect(url: str) -> Iterator[Callable[..., RoboflowInference]]:
    """Return a function that creates backends, which are closed after the test."""
    opened: list[RoboflowInference] = []

    def open_backend(**options: Any) -> RoboflowInference:
        opened.append(RoboflowInference(url, **{"api_key": "", **options}))
        return opened[-1]

    yield open_backend
    for backend in opened:
        backend.close()


def test_backend_supports_detect_only(connect: Callable[..., RoboflowInference]) -> None:
    assert connect().skills == {"detect"}


@pytest.mark.parametrize("model_id", MODEL_IDS)
def test_all_model_ids_are_accepted(
    connect: Callable[..., RoboflowInference], tiny: LocalModel, bgr: np.ndarray, model_id: str
) -> None:
    deployment = Deployment(connect(model_id=model_id, image_format="png"), rounded=True, has_scores=False)
    found = Detector(deployment.model)(bgr, "dog")
    assert len(found) == 1
    deployment.check(found, Detector(tiny)(bgr, "dog"))


def test_bad_image_does_not_affect_the_others(
    connect: Callable[..., RoboflowInference], bgr: np.ndarray, tmp_path: Path
) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"not an image")
    broken, whole = connect().run([Detect(str(tmp_path / "broken.jpg"), "dog"), Detect(bgr, "dog")])
    assert isinstance(broken, ErrorResult)
    assert isinstance(broken.error, ImageError)
    assert isinstance(whole, DetectResult)
    assert len(whole.objects) == 1


@pytest.mark.parametrize(
    ("model_id", "message"), [("nonsense/1", "Could not connect to Roboflow API"), ("a/b/c", "Invalid Model ID")]
)
def test_server_error_message_is_reported_without_the_key(
    connect: Callable[..., RoboflowInference], url: str, bgr: np.ndarray, model_id: str, message: str
) -> None:
    detector = Detector(connect(model_id=model_id, api_key="a-secret-key", retries=0))
    with pytest.raises(BackendError, match=message) as caught:
        detector(bgr, "dog")
    assert url in str(caught.value)
    assert "a-secret-key" not in str(caught.value)
