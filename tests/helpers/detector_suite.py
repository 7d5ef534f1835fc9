"""What a `Detector` does, whatever place its model runs at: tests that every such place runs, as a class to inherit.

    class TestHere(DetectorBehaviour):
        pass

A module that does so provides three fixtures: `tiny`, the embedded model in this process, which says what is right;
`place`, a `Place` to test; and `named`, one that has an address. `tiny` is what runs at every place.

What is particular to a dialect, a server or the model is left to their own tests.
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
from moondream_cv.engine.local import LocalModel
from moondream_cv.errors import ImageError, MoondreamError, UnsupportedSkill
from moondream_cv.scenes import render_scene

Pixels = npt.NDArray[np.uint8]

NAMES = ["bus", "banana", "dog", "red circle", "blue star", "object"]  # there is no banana, and four objects
IN_BATCHES = 1e-3  # pixels by which boxes differ when the model computes them beside other ones
COMPRESSED = 1.0  # pixels by which a JPEG moves them on these frames: the model's steps are 0.3 pixels there
ROUNDED = 0.501  # pixels by which corners on whole pixels differ
SCORE, COMPRESSED_SCORE = 1e-4, 0.02  # how far confidences differ

_LACKS: dict[str, dict[str, Any]] = {
    "fal": {"has_scores": False},
    "roboflow": {"points": False},
}  # by dialect, on a server of ours


@dataclass(frozen=True)
class Place:
    """Where the model runs, and what is to be expected there.

    Attributes:
        model: An open `VisionModel`; not that of `Detector(address)`.
        address: What `Detector` opens the same model from; None where there is no such thing.
        compressed: Whether arrays reach the model as JPEG files.
        rounded: Whether corners come on whole pixels.
        has_scores: Whether confidences are the model's.
        points: Whether it can point.
    """

    model: Any
    address: str | None = None
    compressed: bool = False
    rounded: bool = False
    has_scores: bool = True
    points: bool = True

    @property
    def tolerance(self) -> float:
        """Pixels by which a corner may differ from what the local model gives."""
        return IN_BATCHES + self.compressed * COMPRESSED + self.rounded * ROUNDED

    def check(self, found: sv.Detections, exact: sv.Detections, what: str = "") -> None:
        """Compare with what the local model gives for the same; `what` it is goes into the error."""
        np.testing.assert_array_equal(found.data["class_name"], exact.data["class_name"], what)
        np.testing.assert_array_equal(found.class_id, exact.class_id, what)
        np.testing.assert_allclose(found.xyxy, exact.xyxy, rtol=0, atol=self.tolerance, err_msg=what)
        assert_filled(found, len(exact))
        if self.has_scores:
            score = COMPRESSED_SCORE if self.compressed else SCORE
            np.testing.assert_allclose(postprocessing.scores(found), postprocessing.scores(exact), rtol=0, atol=score)
        else:
            np.testing.assert_array_equal(found.confidence, np.ones(len(exact)))


def place_on(url: str, dialect: str, image_format: str) -> Place:
    """A backend of this dialect, and a server of ours; close its model afterwards."""
    model = DIALECTS[dialect](url, api_key="", image_format=image_format)
    return Place(model, compressed=image_format == "jpeg", **_LACKS.get(dialect, {}))


def assert_filled(found: sv.Detections, length: int) -> None:
    """Check shapes and kinds of numbers, which are the same for nothing as for much."""
    columns: list[Any] = [found.xyxy, found.confidence, found.class_id, found.data["class_name"]]
    assert [np.shape(column) for column in columns] == [(length, 4), (length,), (length,), (length,)]
    assert [column.dtype.kind for column in columns] == ["f", "f", "i", "U"]
    assert [column.dtype for column in columns[:3]] == [np.float32, np.float32, int]
    assert all(isinstance(column, np.ndarray) for column in columns)
    assert found.metadata == {}


@cache
def scene(seed: int, width: int, height: int, *names: str) -> Pixels:
    """[height, width, 3] BGR: objects that the tiny model is sure of, in these scenes."""
    wanted = names or ("dog", "red circle", "blue star", "bus")
    rgb = render_scene(seed, resolution_wh=(width, height), names=wanted, style="plain").image
    return np.ascontiguousarray(rgb[..., ::-1])


def wide() -> Pixels:
    """One object of each name that is there."""
    return scene(5, 320, 240)


def upright() -> Pixels:
    """The same objects elsewhere."""
    return scene(3, 240, 320)


def crowded() -> Pixels:
    """Six objects, two of which get boxes that overlap by more than half."""
    return scene(12, 320, 240, "red circle", "red circle", "red square", "red square", "dog", "dog")


def eight() -> list[Pixels]:
    """Eight different frames with one object of each name."""
    return [scene(seed, 320, 240) for seed in (2, 3, 4, 5, 8)] + [scene(seed, 240, 320) for seed in (3, 4, 5)]


def file_of(bgr: Pixels, form: str = "PNG") -> bytes:
    """A picture as an image file."""
    file = io.BytesIO()
    Image.fromarray(bgr[..., ::-1]).save(file, form)
    return file.getvalue()


def faded(bgr: Pixels) -> Pixels:
    """[H, W, 4]: the same, half transparent."""
    return np.dstack([bgr, np.full(bgr.shape[:2], 128, np.uint8)])


KINDS: dict[str, Callable[[Path], Any]] = {  # made from the folder with scene.png
    "BGR array": lambda _: wide(),
    "mirrored view of an array": lambda _: wide()[:, ::-1],
    "grey array": lambda _: np.asarray(Image.fromarray(wide()).convert("L")),
    "BGRA array": lambda _: faded(wide()),
    "PIL": lambda _: Image.fromarray(wide()[..., ::-1]),
    "grey PIL": lambda _: Image.fromarray(wide()[..., ::-1]).convert("L"),
    "RGBA PIL": lambda _: Image.fromarray(np.ascontiguousarray(faded(wide())[..., [2, 1, 0, 3]])),
    "path": lambda folder: folder / "scene.png",
    "string": lambda folder: str(folder / "scene.png"),
    "PNG bytes": lambda _: file_of(wide()),
    "JPEG bytes": lambda _: file_of(wide(), "JPEG"),
    "BMP bytes": lambda _: file_of(wide(), "BMP"),
    "open file": lambda _: io.BytesIO(file_of(wide())),
}


class DetectorBehaviour:
    """The tests."""

    # --- what comes back ---

    @pytest.mark.parametrize(("picture", "found"), [(wide, 8), (upright, 8), (crowded, 6)])
    def test_the_same_boxes(self, place: Place, tiny: LocalModel, picture: Callable[[], Pixels], found: int) -> None:
        names = "object" if picture is crowded else NAMES
        exact = Detector(tiny)(picture(), names)
        assert len(exact) == found
        place.check(Detector(place.model)(picture(), names), exact)

    def test_class_ids_follow_the_order_of_the_names(self, place: Place) -> None:
        found = Detector(place.model)(wide(), ("blue star", "banana", "bus", "dog"))
        assert_filled(found, 3)
        np.testing.assert_array_equal(found.class_id, [0, 2, 3])
        np.testing.assert_array_equal(found.data["class_name"], ["blue star", "bus", "dog"])

    def test_a_list_gives_a_list(self, place: Place, tiny: LocalModel) -> None:
        frames = [wide(), np.full((50, 70, 3), 255, np.uint8), upright()]
        detector = Detector(place.model)
        found = detector(frames, NAMES[:-1])
        assert isinstance(found, list)
        for mine, exact in zip(found, Detector(tiny)(frames, NAMES[:-1]), strict=True):
            place.check(mine, exact)
        assert [len(each) for each in found] == [4, 0, 4]
        assert [len(each) for each in detector([wide()], "dog")] == [1]
        assert detector([], NAMES) == []

    def test_nothing_found(self, place: Place) -> None:
        detector = Detector(place.model)
        nothing = detector(wide(), ["banana", "green heart"])
        assert_filled(nothing, 0)
        assert_filled(sv.Detections.merge([nothing, detector(wide(), "dog"), nothing]), 1)

    # --- what goes in ---

    def test_kinds_of_images(self, place: Place, tiny: LocalModel, tmp_path: Path) -> None:
        (tmp_path / "scene.png").write_bytes(file_of(wide()))
        found, exact = (
            Detector(model)([make(tmp_path) for make in KINDS.values()], ["dog", "object"])
            for model in (place.model, tiny)
        )
        for kind, mine, theirs in zip(KINDS, found, exact, strict=True):
            assert len(theirs) >= (2 if "grey" in kind else 5), kind  # grey things are found as objects alone
            place.check(mine, theirs, kind)

    def test_an_image_of_one_pixel(self, place: Place, tiny: LocalModel) -> None:
        pixel = np.zeros((1, 1, 3), np.uint8)
        found, exact = (Detector(model)(pixel, ["object", "dog"]) for model in (place.model, tiny))
        assert len(exact) == 1
        if place.rounded:
            assert_filled(found, 0)  # its corners are rounded to one point, and boxes without an area are left out
        else:
            place.check(found, exact)

    def test_an_image_that_cannot_be_read_is_an_error(self, place: Place, tmp_path: Path) -> None:
        detector = Detector(place.model)
        (tmp_path / "broken.jpg").write_bytes(b"no image")
        for broken in (tmp_path / "broken.jpg", tmp_path / "missing.png", b"no image", np.zeros((0, 4, 3), np.uint8)):
            with pytest.raises(ImageError):
                detector(broken, "dog")
            with pytest.raises(ImageError, match=r"^frames\[1\]: "):
                detector([wide(), broken], "dog")

    def test_an_image_that_cannot_be_read_may_give_nothing(
        self, place: Place, tiny: LocalModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        detector = Detector(place.model, on_error="empty", mark_truncated=True)
        with caplog.at_level(logging.WARNING, "moondream_cv"):
            first, missing, broken, last = detector([wide(), tmp_path / "missing.png", b"no image", upright()], NAMES)
        place.check(first, Detector(tiny)(wide(), NAMES))
        place.check(last, Detector(tiny)(upright(), NAMES))
        for nothing in (missing, broken):
            assert_filled(nothing, 0)
            assert np.asarray(nothing.data["truncated"]).dtype == bool
        assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
        assert "missing.png" in caplog.text

    # --- what is left out ---

    def test_max_objects(self, place: Place, tiny: LocalModel) -> None:
        found, exact = (
            Detector(model, max_objects=2, mark_truncated=True)(wide(), ["object", "dog"])
            for model in (place.model, tiny)
        )
        place.check(found, exact)
        for each in (found, exact):
            truncated = np.asarray(each.data["truncated"])
            assert truncated.dtype == bool
            assert truncated.tolist() == [True, True, False]
        for enough in (4, 50):  # there are four
            everything = Detector(place.model, max_objects=enough, mark_truncated=True)(wide(), ["object", "dog"])
            assert np.asarray(everything.data["truncated"]).tolist() == [False] * 5
        assert list(Detector(place.model, max_objects=2)(wide(), "object").data) == ["class_name"]

    def test_nms(self, place: Place, tiny: LocalModel) -> None:
        found = Detector(place.model, nms=0.5)(crowded(), ["object", "banana"])
        assert_filled(found, 5)
        everything = Detector(place.model)(crowded(), ["object", "banana"])
        np.testing.assert_array_equal(found.xyxy, everything.with_nms(0.5).xyxy)
        if place.has_scores and not place.rounded:  # otherwise the most confident one is any of them
            place.check(found, Detector(tiny, nms=0.5)(crowded(), ["object", "banana"]))

    def test_a_threshold(self, place: Place, tiny: LocalModel) -> None:
        black = np.zeros((64, 64, 3), np.uint8)  # on which the model finds an object, and hardly believes it
        exact = Detector(tiny)(black, "object")
        assert postprocessing.scores(exact) == pytest.approx([0.11], abs=0.05)
        place.check(Detector(place.model)(black, "object"), exact)
        detector_module._warn_no_scores.cache_clear()
        detector = Detector(place.model, confidence=0.5)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            kept = [len(detector(black, "object")) for _ in range(2)]
        said = [str(each.message) for each in caught if "returns no scores" in str(each.message)]
        if place.has_scores:
            assert (kept, said) == ([0, 0], [])
        else:
            assert kept == [1, 1]
            assert [text.partition(" ")[0] for text in said] == [type(place.model).__name__]
        assert place.model.has_scores is place.has_scores

    # --- use ---

    def test_acall(self, place: Place, tiny: LocalModel) -> None:
        detector = Detector(place.model)

        async def both() -> tuple[sv.Detections, list[sv.Detections]]:
            with pytest.raises(ImageError):
                await detector.acall(b"no image", "dog")
            return await asyncio.gather(detector.acall(wide(), NAMES), detector.acall([upright()], NAMES))

        one, (listed,) = asyncio.run(both())
        place.check(one, Detector(tiny)(wide(), NAMES))
        place.check(listed, Detector(tiny)(upright(), NAMES))

    def test_eight_threads_at_once(self, place: Place, tiny: LocalModel) -> None:
        names = ["bus", "dog"]
        detector, exact = Detector(place.model), Detector(tiny)(eight(), names)
        assert [len(each) for each in exact] == [2] * 8
        together = threading.Barrier(8)

        def detect(frame: Pixels) -> sv.Detections:
            together.wait(240)
            return detector(frame, names)

        with ThreadPoolExecutor(8) as pool:
            for mine, theirs in zip(pool.map(detect, eight()), exact, strict=True):
                place.check(mine, theirs)

    def test_points(self, place: Place, tiny: LocalModel) -> None:
        if not place.points:
            name = type(place.model).__name__
            advice = rf"needs a model with the skill 'point'; the skills of {name} are: detect; use a model from "
            with pytest.raises(UnsupportedSkill, match=advice):
                Pointer(place.model)
            with pytest.raises(UnsupportedSkill, match="MoondreamAPI can"):
                place.model.point(wide(), "dog")
            return
        exact = Pointer(tiny)([wide(), upright()], NAMES)
        assert [len(each) for each in exact] == [8, 8]
        for mine, theirs in zip(Pointer(place.model)([wide(), upright()], NAMES), exact, strict=True):
            place.check(mine, theirs)
        key_points = Pointer(place.model).key_points(wide(), "dog")
        np.testing.assert_allclose(key_points.xy[0, 0], exact[0].xyxy[1, :2], rtol=0, atol=place.tolerance)

    def test_an_address_is_opened_and_closed(self, named: Place, tiny: LocalModel) -> None:
        assert named.address is not None
        with Detector(named.address) as detector:
            assert type(detector.model) is type(named.model)
            assert detector.model is not named.model
            named.check(detector(wide(), NAMES), Detector(tiny)(wide(), NAMES))
        with pytest.raises(MoondreamError, match="is closed"):
            detector(wide(), NAMES)
        with Detector(named.model):
            pass
        assert len(Detector(named.model)(wide(), "dog")) == 1  # a model that was passed in stays open
