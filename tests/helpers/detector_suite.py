"""Tests of `Detector` and `Pointer` for every deployment of a model, as a class to inherit.

    class TestLocal(DetectorSuite):
        pass

A module that inherits it provides three fixtures: `tiny`, the embedded model in this process, which gives the expected
results; `deployment`, the `Deployment` of the same model under test; and `addressable`, one with an address.

Tests of a dialect, a server or the model itself are elsewhere.
"""

from __future__ import annotations

import asyncio
import io
import logging
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import supervision as sv
from PIL import Image

from moondream_cv import Detector, Pointer, postprocessing
from moondream_cv import detector as detector_module
from moondream_cv.backends import DIALECTS
from moondream_cv.engine.local_model import LocalModel
from moondream_cv.errors import ImageError, MoondreamError, UnsupportedSkill
from moondream_cv.scenes import render_scene

Pixels = npt.NDArray[np.uint8]

NAMES = ["bus", "banana", "dog", "red circle", "blue star", "object"]  # all but the banana are in the scenes
IN_BATCHES = 1e-3  # difference of boxes in pixels between batches
COMPRESSED = 1.0  # difference of boxes in pixels after JPEG compression; one coordinate bin is 0.3 pixels
ROUNDED = 0.501  # difference of boxes in pixels after rounding to whole pixels
SCORE, COMPRESSED_SCORE = 1e-4, 0.02  # difference of confidences

_LACKS: dict[str, dict[str, Any]] = {
    "fal": {"has_scores": False},
    "roboflow": {"points": False},
}  # by dialect, on `moondream-cv serve`


@dataclass(frozen=True)
class Deployment:
    """A model under test, and the expected precision of its results.

    Attributes:
        model: Open `VisionModel`; another object than the model of `Detector(address)`.
        address: Name or URL from which `Detector` opens the same model; None if there is none.
        compressed: Whether arrays reach the model as JPEG files.
        rounded: Whether corners are rounded to whole pixels.
        has_scores: Whether confidences are the model's.
        points: Whether it has the skill "point".
    """

    model: Any
    address: str | None = None
    compressed: bool = False
    rounded: bool = False
    has_scores: bool = True
    points: bool = True

    @property
    def tolerance(self) -> float:
        """Maximum difference in pixels from the corners of the local model."""
        return IN_BATCHES + self.compressed * COMPRESSED + self.rounded * ROUNDED

    def check(self, found: sv.Detections, exact: sv.Detections, what: str = "") -> None:
        """Compare detections with those of the local model; `what` is the text of the assertion error."""
        np.testing.assert_array_equal(found.data["class_name"], exact.data["class_name"], what)
        np.testing.assert_array_equal(found.class_id, exact.class_id, what)
        np.testing.assert_allclose(found.xyxy, exact.xyxy, rtol=0, atol=self.tolerance, err_msg=what)
        assert_filled(found, len(exact))
        if self.has_scores:
            score = COMPRESSED_SCORE if self.compressed else SCORE
            np.testing.assert_allclose(postprocessing.scores(found), postprocessing.scores(exact), rtol=0, atol=score)
        else:
            np.testing.assert_array_equal(found.confidence, np.ones(len(exact)))


def deployment_on(url: str, dialect: str, image_format: str) -> Deployment:
    """Return a client of this dialect for `moondream-cv serve`; close its model afterwards."""
    model = DIALECTS[dialect](url, api_key="", image_format=image_format)
    return Deployment(model, compressed=image_format == "jpeg", **_LACKS.get(dialect, {}))


def assert_filled(found: sv.Detections, length: int) -> None:
    """Check shapes and dtypes, which do not depend on the number of detections."""
    columns: list[Any] = [found.xyxy, found.confidence, found.class_id, found.data["class_name"]]
    assert [np.shape(column) for column in columns] == [(length, 4), (length,), (length,), (length,)]
    assert [column.dtype.kind for column in columns] == ["f", "f", "i", "U"]
    assert [column.dtype for column in columns[:3]] == [np.float32, np.float32, int]
    assert all(isinstance(column, np.ndarray) for column in columns)
    assert found.metadata == {}


@cache
def scene(seed: int, width: int, height: int, *names: str) -> Pixels:
    """Return [height, width, 3] BGR: a scene with objects that the tiny model detects reliably."""
    wanted = names or ("dog", "red circle", "blue star", "bus")
    rgb = render_scene(seed, resolution_wh=(width, height), names=wanted, style="plain").image
    return np.ascontiguousarray(rgb[..., ::-1])


def wide() -> Pixels:
    """Return a landscape frame with one object of each class."""
    return scene(5, 320, 240)


def upright() -> Pixels:
    """Return a portrait frame with the same objects."""
    return scene(3, 240, 320)


def crowded() -> Pixels:
    """Return a frame with six objects, two of which have boxes with an IoU above 0.5."""
    return scene(12, 320, 240, "red circle", "red circle", "red square", "red square", "dog", "dog")


def eight() -> list[Pixels]:
    """Return eight different frames with one object of each class."""
    return [scene(seed, 320, 240) for seed in (2, 3, 4, 5, 8)] + [scene(seed, 240, 320) for seed in (3, 4, 5)]


def file_of(bgr: Pixels, form: str = "PNG") -> bytes:
    """Return a frame as an image file."""
    file = io.BytesIO()
    Image.fromarray(bgr[..., ::-1]).save(file, form)
    return file.getvalue()


def translucent(bgr: Pixels) -> Pixels:
    """Return the frame as [H, W, 4] BGRA, half transparent."""
    return np.dstack([bgr, np.full(bgr.shape[:2], 128, np.uint8)])


KINDS: dict[str, Callable[[Path], Any]] = {  # image type → function of the folder that contains scene.png
    "BGR array": lambda _: wide(),
    "mirrored view of an array": lambda _: wide()[:, ::-1],
    "gray array": lambda _: np.asarray(Image.fromarray(wide()).convert("L")),
    "BGRA array": lambda _: translucent(wide()),
    "PIL": lambda _: Image.fromarray(wide()[..., ::-1]),
    "gray PIL": lambda _: Image.fromarray(wide()[..., ::-1]).convert("L"),
    "RGBA PIL": lambda _: Image.fromarray(np.ascontiguousarray(translucent(wide())[..., [2, 1, 0, 3]])),
    "path": lambda folder: folder / "scene.png",
    "string": lambda folder: str(folder / "scene.png"),
    "PNG bytes": lambda _: file_of(wide()),
    "JPEG bytes": lambda _: file_of(wide(), "JPEG"),
    "BMP bytes": lambda _: file_of(wide(), "BMP"),
    "open file": lambda _: io.BytesIO(file_of(wide())),
}


class DetectorSuite:
    """Tests that every deployment must pass."""

    # --- results ---

    @pytest.mark.parametrize(("picture", "found"), [(wide, 8), (upright, 8), (crowded, 6)])
    def test_boxes_equal_those_of_the_local_model(
        self, deployment: Deployment, tiny: LocalModel, picture: Callable[[], Pixels], found: int
    ) -> None:
        names = "object" if picture is crowded else NAMES
        exact = Detector(tiny)(picture(), names)
        assert len(exact) == found
        deployment.check(Detector(deployment.model)(picture(), names), exact)

    def test_class_ids_follow_the_order_of_the_classes(self, deployment: Deployment) -> None:
        found = Detector(deployment.model)(wide(), ("blue star", "banana", "bus", "dog"))
        assert_filled(found, 3)
        np.testing.assert_array_equal(found.class_id, [0, 2, 3])
        np.testing.assert_array_equal(found.data["class_name"], ["blue star", "bus", "dog"])

    def test_list_of_frames_returns_a_list(self, deployment: Deployment, tiny: LocalModel) -> None:
        frames = [wide(), np.full((50, 70, 3), 255, np.uint8), upright()]
        detector = Detector(deployment.model)
        found = detector(frames, NAMES[:-1])
        assert isinstance(found, list)
        for mine, exact in zip(found, Detector(tiny)(frames, NAMES[:-1]), strict=True):
            deployment.check(mine, exact)
        assert [len(each) for each in found] == [4, 0, 4]
        assert [len(each) for each in detector([wide()], "dog")] == [1]
        assert detector([], NAMES) == []

    def test_empty_results_have_all_fields_and_merge(self, deployment: Deployment) -> None:
        detector = Detector(deployment.model)
        nothing = detector(wide(), ["banana", "green heart"])
        assert_filled(nothing, 0)
        assert_filled(sv.Detections.merge([nothing, detector(wide(), "dog"), nothing]), 1)

    # --- images ---

    def test_every_image_type(self, deployment: Deployment, tiny: LocalModel, tmp_path: Path) -> None:
        (tmp_path / "scene.png").write_bytes(file_of(wide()))
        found, exact = (
            Detector(model)([make(tmp_path) for make in KINDS.values()], ["dog", "object"])
            for model in (deployment.model, tiny)
        )
        for kind, mine, theirs in zip(KINDS, found, exact, strict=True):
            assert len(theirs) >= (2 if "gray" in kind else 5), kind  # gray objects are detected as "object" only
            deployment.check(mine, theirs, kind)

    def test_image_of_one_pixel(self, deployment: Deployment, tiny: LocalModel) -> None:
        pixel = np.zeros((1, 1, 3), np.uint8)
        found, exact = (Detector(model)(pixel, ["object", "dog"]) for model in (deployment.model, tiny))
        assert len(exact) == 1
        if deployment.rounded:
            assert_filled(found, 0)  # its corners are rounded to one point, and boxes without area are removed
        else:
            deployment.check(found, exact)

    def test_unreadable_image_raises(self, deployment: Deployment, tmp_path: Path) -> None:
        detector = Detector(deployment.model)
        (tmp_path / "broken.jpg").write_bytes(b"no image")
        for broken in (tmp_path / "broken.jpg", tmp_path / "missing.png", b"no image", np.zeros((0, 4, 3), np.uint8)):
            with pytest.raises(ImageError):
                detector(broken, "dog")
            with pytest.raises(ImageError, match=r"^frames\[1\]: "):
                detector([wide(), broken], "dog")

    def test_on_error_empty_returns_empty_detections(
        self, deployment: Deployment, tiny: LocalModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        detector = Detector(deployment.model, on_error="empty", mark_truncated=True)
        with caplog.at_level(logging.WARNING, "moondream_cv"):
            first, missing, broken, last = detector([wide(), tmp_path / "missing.png", b"no image", upright()], NAMES)
        deployment.check(first, Detector(tiny)(wide(), NAMES))
        deployment.check(last, Detector(tiny)(upright(), NAMES))
        for nothing in (missing, broken):
            assert_filled(nothing, 0)
            assert np.asarray(nothing.data["truncated"]).dtype == bool
        assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
        assert "missing.png" in caplog.text

    # --- filters ---

    def test_max_objects(self, deployment: Deployment, tiny: LocalModel) -> None:
        found, exact = (
            Detector(model, max_objects=2, mark_truncated=True)(wide(), ["object", "dog"])
            for model in (deployment.model, tiny)
        )
        deployment.check(found, exact)
        for each in (found, exact):
            truncated = np.asarray(each.data["truncated"])
            assert truncated.dtype == bool
            assert truncated.tolist() == [True, True, False]
        for enough in (4, 50):  # the frame has four
            unfiltered = Detector(deployment.model, max_objects=enough, mark_truncated=True)(wide(), ["object", "dog"])
            assert np.asarray(unfiltered.data["truncated"]).tolist() == [False] * 5
        assert list(Detector(deployment.model, max_objects=2)(wide(), "object").data) == ["class_name"]

    def test_nms(self, deployment: Deployment, tiny: LocalModel) -> None:
        found = Detector(deployment.model, nms=0.5)(crowded(), ["object", "banana"])
        assert_filled(found, 5)
        unfiltered = Detector(deployment.model)(crowded(), ["object", "banana"])
        np.testing.assert_array_equal(found.xyxy, unfiltered.with_nms(0.5).xyxy)
        if deployment.has_scores and not deployment.rounded:  # otherwise any box of a group may be kept
            deployment.check(found, Detector(tiny, nms=0.5)(crowded(), ["object", "banana"]))

    def test_confidence_threshold(self, deployment: Deployment, tiny: LocalModel) -> None:
        black = np.zeros((64, 64, 3), np.uint8)  # the model detects one object with low confidence
        exact = Detector(tiny)(black, "object")
        assert postprocessing.scores(exact) == pytest.approx([0.11], abs=0.05)
        deployment.check(Detector(deployment.model)(black, "object"), exact)
        detector_module._warn_no_scores.cache_clear()
        detector = Detector(deployment.model, confidence=0.5)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            kept = [len(detector(black, "object")) for _ in range(2)]
        warned = [str(each.message) for each in caught if "returns no scores" in str(each.message)]
        if deployment.has_scores:
            assert (kept, warned) == ([0, 0], [])
        else:
            assert kept == [1, 1]
            assert [text.partition(" ")[0] for text in warned] == [type(deployment.model).__name__]
        assert deployment.model.has_scores is deployment.has_scores

    # --- use ---

    def test_acall(self, deployment: Deployment, tiny: LocalModel) -> None:
        detector = Detector(deployment.model)

        async def both() -> tuple[sv.Detections, list[sv.Detections]]:
            with pytest.raises(ImageError):
                await detector.acall(b"no image", "dog")
            return await asyncio.gather(detector.acall(wide(), NAMES), detector.acall([upright()], NAMES))

        one, (listed,) = asyncio.run(both())
        deployment.check(one, Detector(tiny)(wide(), NAMES))
        deployment.check(listed, Detector(tiny)(upright(), NAMES))

    def test_concurrent_calls(self, deployment: Deployment, tiny: LocalModel) -> None:
        names = ["bus", "dog"]
        detector, exact = Detector(deployment.model), Detector(tiny)(eight(), names)
        assert [len(each) for each in exact] == [2] * 8
        together = threading.Barrier(8)

        def detect(frame: Pixels) -> sv.Detections:
            together.wait(240)
            return detector(frame, names)

        with ThreadPoolExecutor(8) as pool:
            for mine, theirs in zip(pool.map(detect, eight()), exact, strict=True):
                deployment.check(mine, theirs)

    def test_points_equal_those_of_the_local_model(self, deployment: Deployment, tiny: LocalModel) -> None:
        if not deployment.points:
            name = type(deployment.model).__name__
            advice = rf"needs a model with the skill 'point'; the skills of {name} are: detect; use a model from "
            with pytest.raises(UnsupportedSkill, match=advice):
                Pointer(deployment.model)
            with pytest.raises(UnsupportedSkill, match="use MoondreamAPI"):
                deployment.model.point(wide(), "dog")
            return
        exact = Pointer(tiny)([wide(), upright()], NAMES)
        assert [len(each) for each in exact] == [8, 8]
        for mine, theirs in zip(Pointer(deployment.model)([wide(), upright()], NAMES), exact, strict=True):
            deployment.check(mine, theirs)
        key_points = Pointer(deployment.model).key_points(wide(), "dog")
        np.testing.assert_allclose(key_points.xy[0, 0], exact[0].xyxy[1, :2], rtol=0, atol=deployment.tolerance)

    def test_address_is_opened_and_closed(self, addressable: Deployment, tiny: LocalModel) -> None:
        assert addressable.address is not None
        with Detector(addressable.address) as detector:
            assert type(detector.model) is type(addressable.model)
            assert detector.model is not addressable.model
            addressable.check(detector(wide(), NAMES), Detector(tiny)(wide(), NAMES))
        with pytest.raises(MoondreamError, match="is closed"):
            detector(wide(), NAMES)
        with Detector(addressable.model):
            pass
        assert len(Detector(addressable.model)(wide(), "dog")) == 1  # a model that was passed in stays open
