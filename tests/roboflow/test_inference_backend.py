"""`RoboflowInference` against Roboflow's real server: the same boxes as from the model that stands behind it."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import supervision as sv
from PIL import Image

from moondream_cv import Detector, Pointer
from moondream_cv.engine.local import LocalModel
from moondream_cv.errors import BackendError, ImageError, UnsupportedSkill
from moondream_cv.requests import Detect, DetectResult, ErrorResult
from moondream_cv.scenes import Scene
from tests.roboflow_app import MODEL_IDS, skip_without_server

skip_without_server()
pytest.importorskip("moondream_cv.backends")
pytestmark = pytest.mark.roboflow

NAMES = ["bus", "banana", "dog", "red circle", "blue star", "object"]  # the last one is found in grey, too
WHOLE_PIXELS = 0.501  # how far rounding moves a corner
JPEG = 3.0  # how far it moves where the picture has been compressed, too


@pytest.fixture
def connect(url: str) -> Iterator[Callable[..., Any]]:
    """Makes backends, and closes them afterwards."""
    from moondream_cv.backends import RoboflowInference

    opened: list[Any] = []

    def open_backend(**options: Any) -> Any:
        opened.append(RoboflowInference(url, **{"api_key": "", **options}))
        return opened[-1]

    yield open_backend
    for backend in opened:
        backend.close()


def assert_alike(found: sv.Detections, exact: sv.Detections, tolerance: float) -> None:
    assert found.class_id.tolist() == exact.class_id.tolist()
    assert found.data["class_name"].tolist() == exact.data["class_name"].tolist()
    assert np.abs(found.xyxy - exact.xyxy).max(initial=0) <= tolerance
    assert (found.confidence == 1).all()


FRAMES: dict[str, Callable[[np.ndarray, Path], Any]] = {
    "array": lambda rgb, _: np.ascontiguousarray(rgb[..., ::-1]),
    "grey array": lambda rgb, _: np.asarray(Image.fromarray(rgb).convert("L")),
    "PIL": lambda rgb, _: Image.fromarray(rgb),
    "RGBA": lambda rgb, _: Image.fromarray(rgb).convert("RGBA"),
    "path": lambda rgb, folder: folder / "scene.png",
    "bytes": lambda rgb, folder: (folder / "scene.png").read_bytes(),
}


@pytest.fixture
def folder(scene: Scene, tmp_path: Path) -> Path:
    Image.fromarray(scene.image).save(tmp_path / "scene.png")
    return tmp_path


@pytest.mark.parametrize("form", FRAMES)
@pytest.mark.parametrize(("image_format", "tolerance"), [("png", WHOLE_PIXELS), ("jpeg", JPEG)])
def test_same_boxes(
    connect: Callable[..., Any],
    tiny: LocalModel,
    scene: Scene,
    folder: Path,
    form: str,
    image_format: str,
    tolerance: float,
) -> None:
    frame = FRAMES[form](scene.image, folder)
    exact = Detector(tiny)(frame, NAMES)
    assert len(exact) >= (2 if form == "grey array" else 8)
    assert_alike(Detector(connect(image_format=image_format))(frame, NAMES), exact, tolerance)


@pytest.mark.parametrize("model_id", MODEL_IDS)
def test_every_model_id(connect: Callable[..., Any], tiny: LocalModel, bgr: np.ndarray, model_id: str) -> None:
    found = Detector(connect(model_id=model_id, image_format="png"))(bgr, "dog")
    assert len(found) == 1
    assert_alike(found, Detector(tiny)(bgr, "dog"), WHOLE_PIXELS)


def test_files_go_as_they_are(connect: Callable[..., Any], tiny: LocalModel, scene: Scene) -> None:
    file = io.BytesIO()
    Image.fromarray(scene.image).save(file, "JPEG", quality=30)
    found = Detector(connect())(file.getvalue(), NAMES)
    assert_alike(found, Detector(tiny)(file.getvalue(), NAMES), JPEG)


def test_several_frames(connect: Callable[..., Any], tiny: LocalModel, bgr: np.ndarray) -> None:
    frames = [bgr, np.full_like(bgr, 255), np.ascontiguousarray(bgr[:, ::-1])]
    found = Detector(connect(image_format="png"))(frames, NAMES)
    for mine, exact in zip(found, Detector(tiny)(frames, NAMES), strict=True):
        assert_alike(mine, exact, WHOLE_PIXELS)
    assert len(found[0]) == 8


def test_nothing_found(connect: Callable[..., Any], bgr: np.ndarray) -> None:
    found = Detector(connect())(bgr, ["banana", "green heart"])
    assert found.xyxy.shape == (0, 4)
    assert found.data["class_name"].shape == (0,)


def test_has_no_scores(connect: Callable[..., Any]) -> None:
    backend = connect()
    assert backend.has_scores is False
    assert backend.skills == {"detect"}


def test_a_bad_image_fails_alone(connect: Callable[..., Any], bgr: np.ndarray, tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"not an image")
    backend = connect()
    broken, whole = backend.run([Detect(str(tmp_path / "broken.jpg"), "dog"), Detect(bgr, "dog")])
    assert isinstance(broken, ErrorResult)
    assert isinstance(broken.error, ImageError)
    assert isinstance(whole, DetectResult)
    assert len(whole.objects) == 1


@pytest.mark.parametrize(
    ("model_id", "says"), [("nonsense/1", "Could not connect to Roboflow API"), ("a/b/c", "Invalid Model ID")]
)
def test_what_the_server_says_comes_through(
    connect: Callable[..., Any], url: str, bgr: np.ndarray, model_id: str, says: str
) -> None:
    detector = Detector(connect(model_id=model_id, api_key="a-secret-key", retries=0))
    with pytest.raises(BackendError, match=says) as caught:
        detector(bgr, "dog")
    assert url in str(caught.value)
    assert "a-secret-key" not in str(caught.value)


def test_finds_no_points(connect: Callable[..., Any]) -> None:
    with pytest.raises(UnsupportedSkill):
        Pointer(connect())
