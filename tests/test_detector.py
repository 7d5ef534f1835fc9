"""`Detector` and `Pointer`: results, filters, errors and use."""

from __future__ import annotations

import asyncio
import inspect
import io
import json
import logging
import re
import warnings
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import supervision as sv
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from moondream_cv import detector as detector_module
from moondream_cv.backends import DIALECTS
from moondream_cv.detector import Detector, Pointer
from moondream_cv.engine.local_model import LocalModel
from moondream_cv.errors import BackendError, ImageError, MoondreamError, UnsupportedSkill
from moondream_cv.requests import DetectedObject, DetectedPoint, PointResult, Request, Result
from tests.helpers.color_model import ColorModel, ListModel, color_frame

pytestmark = pytest.mark.compat

RED, GREEN = (10, 5, 30, 45), (50, 20, 70, 40)
FRAME = color_frame(("red", RED), ("green", GREEN))
BROKEN = color_frame(("magenta", (0, 0, 80, 60)))


@pytest.fixture
def color_model() -> ColorModel:
    return ColorModel()


def assert_filled(detections: sv.Detections, length: int) -> None:
    assert detections.xyxy.shape == (length, 4)
    assert detections.xyxy.dtype == np.float32
    assert detections.confidence is not None
    assert detections.confidence.shape == (length,)
    assert detections.confidence.dtype == np.float32
    assert detections.class_id is not None
    assert detections.class_id.shape == (length,)
    assert detections.class_id.dtype == int
    names = detections.data["class_name"]
    assert isinstance(names, np.ndarray)
    assert names.shape == (length,)
    assert names.dtype.kind == "U"
    assert detections.metadata == {}
    assert detections.mask is None
    assert detections.tracker_id is None


# --- results ----------------------------------------------------------------------------------------------------------


def test_one_frame_one_class(color_model: ColorModel) -> None:
    detections = Detector(color_model)(FRAME, "red")
    assert_filled(detections, 1)
    assert detections.xyxy.tolist() == [list(RED)]
    assert detections.confidence.tolist() == [1.0]
    assert detections.data["class_name"].tolist() == ["red"]


def test_class_id_follows_the_order_of_the_classes(color_model: ColorModel) -> None:
    detections = Detector(color_model)(FRAME, ["blue", "green", "red"])
    assert_filled(detections, 2)
    assert detections.class_id.tolist() == [1, 2]
    assert detections.data["class_name"].tolist() == ["green", "red"]
    assert detections.xyxy.tolist() == [list(GREEN), list(RED)]
    assert Detector(color_model)(FRAME, ("red", "green")).class_id.tolist() == [0, 1]


def test_empty_results_have_all_fields_and_merge(color_model: ColorModel) -> None:
    detector = Detector(color_model)
    empty, full = detector(FRAME, ["blue", "a class with a long name"]), detector(FRAME, ["red", "green"])
    assert_filled(empty, 0)
    merged = sv.Detections.merge([empty, full, empty, detector(FRAME, "green")])
    assert_filled(merged, 3)
    assert merged.data["class_name"].tolist() == ["red", "green", "green"]
    assert_filled(empty[empty.confidence > 0.5], 0)
    assert_filled(empty.with_nms(0.5), 0)


def test_list_of_frames_returns_a_list_of_the_same_length(color_model: ColorModel) -> None:
    detector = Detector(color_model)
    assert detector([], "red") == []
    (single,) = detector([FRAME], "red")
    assert_filled(single, 1)
    first, second = detector([FRAME, color_frame(("green", (0, 0, 5, 5)), size_wh=(20, 10))], ["red", "green"])
    assert_filled(first, 2)
    assert second.xyxy.tolist() == [[0, 0, 5, 5]]
    assert second.class_id.tolist() == [1]


def test_all_classes_of_a_frame_share_one_run_and_one_image(color_model: ColorModel, tmp_path: Path) -> None:
    path = tmp_path / "frame.png"
    cv2.imwrite(str(path), FRAME)
    Detector(color_model, max_objects=7, max_crops=3)([FRAME, path], ["red", "green", "blue"])
    (requests,) = color_model.runs
    assert [request.object for request in requests] == ["red", "green", "blue"] * 2
    assert len({id(request.image) for request in requests[:3]}) == 1
    assert len({id(request.image) for request in requests[3:]}) == 1
    assert requests[0].image is FRAME  # a frame as OpenCV reads it is not converted
    assert isinstance(requests[3].image, Image.Image)  # a file is decoded once, not once per class
    assert {(request.settings.max_objects, request.settings.max_crops) for request in requests} == {(7, 3)}


def test_adapter_may_be_a_path(color_model: ColorModel, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter.safetensors"
    assert Detector(color_model, adapter=adapter).settings.variant == str(adapter)


def test_encoded_image_reaches_the_model_unchanged(color_model: ColorModel) -> None:
    encoded = color_model.encode(FRAME)
    detections = Detector(color_model)(encoded, "red")
    assert detections.xyxy.tolist() == [list(RED)]
    assert color_model.runs[0][0].image is encoded


def stored(orientation: int, rgb: np.ndarray) -> bytes:
    turned = {
        1: rgb, 2: rgb[:, ::-1], 3: rgb[::-1, ::-1], 4: rgb[::-1], 5: rgb.swapaxes(0, 1), 6: np.rot90(rgb, 1),
        7: rgb[::-1, ::-1].swapaxes(0, 1), 8: np.rot90(rgb, -1),
    }  # fmt: skip
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(turned[orientation])).save(buffer, "PNG", exif=exif)
    return buffer.getvalue()


RGB = np.ascontiguousarray(FRAME[..., ::-1])
KINDS: dict[str, Callable[[Path], Any]] = {
    "bgr": lambda _: FRAME,
    "non-contiguous": lambda _: np.repeat(FRAME, 2, axis=1)[:, ::2],
    "bgra": lambda _: cv2.cvtColor(FRAME, cv2.COLOR_BGR2BGRA),
    "16 bit": lambda _: FRAME.astype(np.uint16) * 257,
    "float": lambda _: FRAME / 255,
    "pil": lambda _: Image.fromarray(RGB),
    "pil palette": lambda _: Image.fromarray(RGB).quantize(8, dither=Image.Dither.NONE),
    "pil rgba": lambda _: Image.fromarray(RGB).convert("RGBA"),
    "path": lambda folder: folder / "frame.png",
    "str": lambda folder: str(folder / "frame.png"),
    "bytes": lambda folder: (folder / "frame.png").read_bytes(),
    "file": lambda folder: (folder / "frame.png").open("rb"),
    **{f"exif {n}": lambda _, n=n: stored(n, RGB) for n in range(1, 9)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_image_type_gives_the_same_boxes(kind: str, color_model: ColorModel, tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "frame.png"), FRAME)
    detections = Detector(color_model)(KINDS[kind](tmp_path), ["red", "green"])
    assert detections.xyxy.tolist() == [list(RED), list(GREEN)]


# --- filters ---------------------------------------------------------------------------------------------------------


def test_boxes_are_clipped_and_boxes_without_area_removed() -> None:
    model = ListModel(
        [
            DetectedObject(-0.25, 0.5, 0.5, 1.5, 0.9),
            DetectedObject(1.1, 0.1, 1.3, 0.2, 0.8),  # outside
            DetectedObject(0.5, 0.5, 0.5, 0.8, 0.7),  # no width
            DetectedObject(0.8, 0.2, 0.6, 0.4, 0.6),  # x_max < x_min
        ]
    )
    detections = Detector(model)(FRAME, "thing")
    assert detections.xyxy.tolist() == [[0, 30, 40, 60]]
    assert_filled(detections, 1)


@settings(max_examples=50, deadline=None)
@given(
    boxes=st.lists(st.tuples(*[st.floats(-1, 2)] * 4), max_size=6),
    width=st.integers(1, 5000),
    height=st.integers(1, 5000),
)
def test_boxes_are_inside_the_frame_and_have_an_area(boxes: list[tuple[float, ...]], width: int, height: int) -> None:
    model = ListModel([DetectedObject(*box) for box in boxes])
    frame = np.broadcast_to(np.uint8(0), (height, width, 3))
    xyxy = Detector(model)(frame, "thing").xyxy
    assert (xyxy >= 0).all()
    assert (xyxy <= [width, height, width, height]).all()
    assert (xyxy[:, 2:] > xyxy[:, :2]).all()


def test_most_confident_duplicate_is_kept_in_model_order() -> None:
    box, other = (0.1, 0.1, 0.3, 0.3), (0.5, 0.5, 0.9, 0.9)
    model = ListModel(
        [DetectedObject(*other, 0.4), DetectedObject(*box, 0.5), DetectedObject(*box, 0.8), DetectedObject(*box, 0.6)]
    )
    detections = Detector(model)(FRAME, ["a", "b"])
    assert detections.class_id.tolist() == [0, 0, 1, 1]  # equal boxes of different classes are kept
    assert detections.confidence.tolist() == pytest.approx([0.4, 0.8] * 2)
    assert len(Detector(model, drop_duplicates=False)(FRAME, "a")) == 4


def test_nms_applies_within_each_class() -> None:
    model = ListModel([DetectedObject(0.1, 0.1, 0.5, 0.5, 0.6), DetectedObject(0.1, 0.1, 0.52, 0.5, 0.9)])
    assert len(Detector(model)(FRAME, ["a", "b"])) == 4
    detections = Detector(model, nms=0.5)(FRAME, ["a", "b"])
    assert_filled(detections, 2)
    assert detections.class_id.tolist() == [0, 1]
    assert detections.confidence.tolist() == pytest.approx([0.9, 0.9])


WHOLE = DetectedObject(-0.1, 0.0, 1.0, 1.2, 0.9)  # fills the frame when clipped
MOST = DetectedObject(0.0, 0.0, 1.0, 0.9, 0.8)
LARGE = DetectedObject(0.0, 0.0, 0.75, 0.5, 0.7)
THIN = DetectedObject(0.5, 0.5, 0.525, 1.0, 0.6)  # 2 by 30 of 80 by 60 pixels
DOT = DetectedObject(0.9875, 0.5, 1.5, 0.55, 0.5)  # clipped, 1 by 3 pixels


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, [WHOLE, MOST, LARGE, THIN, DOT]),
        ({"max_area": 1.0}, [WHOLE, MOST, LARGE, THIN, DOT]),
        ({"max_area": 0.95}, [MOST, LARGE, THIN, DOT]),
        ({"max_area": 0.9}, [MOST, LARGE, THIN, DOT]),  # the limit itself passes
        ({"max_area": 0.3}, [THIN, DOT]),
        ({"min_size": 0}, [WHOLE, MOST, LARGE, THIN, DOT]),
        ({"min_size": 1}, [WHOLE, MOST, LARGE, THIN, DOT]),
        ({"min_size": 2}, [WHOLE, MOST, LARGE, THIN]),
        ({"min_size": 2.5}, [WHOLE, MOST, LARGE]),
        ({"min_size": np.int64(31)}, [WHOLE, MOST]),
        ({"min_size": 10_000}, []),
        ({"max_area": 0.95, "min_size": 3, "confidence": 0.75, "nms": 0.5}, [MOST]),
    ],
)
def test_max_area_and_min_size_filter_boxes(options: dict[str, Any], kept: list[DetectedObject]) -> None:
    detections = Detector(ListModel([WHOLE, MOST, LARGE, THIN, DOT]), **options)(FRAME, "thing")
    assert_filled(detections, len(kept))
    assert detections.confidence.tolist() == pytest.approx([item.confidence for item in kept])


def test_max_area_is_applied_before_nms() -> None:
    model = ListModel([DetectedObject(0, 0, 1, 1, 0.9), DetectedObject(0, 0, 1, 0.8, 0.6)])
    assert Detector(model, nms=0.5)(FRAME, "thing").confidence.tolist() == pytest.approx([0.9])
    assert Detector(model, nms=0.5, max_area=0.95)(FRAME, "thing").confidence.tolist() == pytest.approx([0.6])


def test_filters_use_the_size_of_each_frame() -> None:
    model = ListModel([DetectedObject(0, 0, 0.1, 0.1)])
    small, large = Detector(model, min_size=10)([FRAME, np.zeros((100, 200, 3), np.uint8)], "thing")
    assert (len(small), len(large)) == (0, 1)


def test_confidence_removes_detections_below_the_threshold() -> None:
    model = ListModel([DetectedObject(0, 0, 0.5, 0.5, 0.3), DetectedObject(0.5, 0.5, 1, 1, 0.7)])
    assert len(Detector(model)(FRAME, "a")) == 2
    assert Detector(model, confidence=0.7)(FRAME, "a").confidence.tolist() == pytest.approx([0.7])
    assert_filled(Detector(model, confidence=0.71)(FRAME, "a"), 0)


def test_threshold_without_scores_warns_once() -> None:
    detector_module._warn_no_scores.cache_clear()
    model = ColorModel(has_scores=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Detector(model)(FRAME, "red")  # no threshold, no warning
    with pytest.warns(UserWarning, match="ColorModel returns no scores") as caught:
        assert len(Detector(model, confidence=0.9)(FRAME, "red")) == 1
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Detector(model, confidence=0.9)(FRAME, "red")
        Detector(ColorModel(), confidence=0.9)(FRAME, "red")


def test_truncation_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    frame = color_frame(*[("red", (x, 0, x + 5, 5)) for x in range(0, 80, 10)])
    with caplog.at_level(logging.INFO, "moondream_cv"):
        assert len(Detector(ColorModel(), max_objects=3)(frame, "red")) == 3
    assert "'red': there may be more than max_objects=3" in caplog.text


ROW = color_frame(*[("red", (x, 0, x + 5, 5)) for x in range(0, 80, 10)], ("green", GREEN))


def test_mark_truncated_marks_every_object_of_a_truncated_class() -> None:
    detector = Detector(ColorModel(), max_objects=3, mark_truncated=True)
    detections = detector(ROW, ["green", "red", "blue"])
    assert_filled(detections, 4)
    assert detections.data["truncated"].dtype == bool
    assert detections.data["truncated"].tolist() == [False, True, True, True]
    assert detections[detections.class_id == 1].data["truncated"].tolist() == [True] * 3
    assert detections[0].data["truncated"].tolist() == [False]
    assert detections.with_nms(0.5).data["truncated"].tolist() == [False, True, True, True]
    assert list(Detector(ColorModel(), max_objects=3)(ROW, "red").data) == ["class_name"]


def test_truncated_data_is_set_for_empty_results_and_merges(tmp_path: Path) -> None:
    detector = Detector(ColorModel(), max_objects=3, mark_truncated=True, on_error="empty")
    cut, empty, failed = detector([ROW, FRAME, BROKEN], "red")[0], detector(FRAME, "blue"), detector("no.png", "red")
    for nothing in (empty, failed):
        assert_filled(nothing, 0)
        assert nothing.data["truncated"].dtype == bool
        assert nothing.data["truncated"].shape == (0,)
    merged = sv.Detections.merge([empty, cut, detector(FRAME, "green"), sv.Detections.empty(), failed])
    assert_filled(merged, 4)
    assert merged.data["truncated"].tolist() == [True, True, True, False]
    with sv.JSONSink(str(tmp_path / "found.json")) as json_sink, sv.CSVSink(str(tmp_path / "found.csv")) as csv_sink:
        for sink in (json_sink, csv_sink):
            sink.append(merged)
            sink.append(empty)
    rows = json.loads((tmp_path / "found.json").read_text())
    assert [row["truncated"] for row in rows] == [True, True, True, False]
    assert "True" in (tmp_path / "found.csv").read_text()


def test_detections_merge_with_those_of_other_libraries(color_model: ColorModel) -> None:
    other = sv.Detections(
        xyxy=np.array([[1, 2, 3, 4]], dtype=np.float32),
        confidence=np.array([0.5], dtype=np.float32),
        class_id=np.array([7]),
        data={"class_name": np.array(["bus"])},
    )
    merged = sv.Detections.merge([other, Detector(color_model, max_objects=1)(ROW, "red")])
    assert merged.data["class_name"].tolist() == ["bus", "red"]


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ([], "at least one class"),
        ("", r"classes\[0\] must not be empty"),
        (["dog", "  "], r"classes\[1\] must not be empty"),
        (["dog", "cat", "dog"], "duplicates: 'dog'"),
        (["dog", 3], r"classes\[1\] must be a string, got int: 3"),
        (None, "sequence of strings, got NoneType"),
        ({"dog", "cat"}, "sequence of strings, got set"),
        (b"dog", "sequence of strings, got bytes"),
        (iter(["dog"]), "sequence of strings, got list_iterator"),
        ("x" * 200_000, "at most 100000 characters, got 200000"),
    ],
)
def test_invalid_classes_raise(classes: Any, message: str, color_model: ColorModel) -> None:
    with pytest.raises(ValueError, match=message):
        Detector(color_model)(FRAME, classes)
    assert color_model.runs == []


@pytest.mark.parametrize(
    "container", [(FRAME, FRAME), {"a": FRAME}, iter([FRAME]), deque([FRAME]), (f for f in [FRAME]), {1, 2}]
)
def test_containers_other_than_lists_raise(container: Any, color_model: ColorModel) -> None:
    with pytest.raises(ValueError, match=f"frames must be a list, got {type(container).__name__}"):
        Detector(color_model)(container, "red")


@pytest.mark.parametrize("frame", [None, 3, np.stack([FRAME, FRAME]), np.zeros((0, 5, 3), np.uint8), b"", "no.png"])
def test_unreadable_frames_raise_image_error(frame: Any, color_model: ColorModel) -> None:
    with pytest.raises(ImageError):
        Detector(color_model)(frame, "red")
    with pytest.raises(ImageError, match=r"^frames\[1\]: "):
        Detector(color_model)([FRAME, frame], "red")
    assert color_model.runs == []


def test_model_error_is_raised(color_model: ColorModel) -> None:
    with pytest.raises(BackendError, match="rejected the image"):
        Detector(color_model)(BROKEN, "red")
    with pytest.raises(BackendError, match="rejected the image"):
        Detector(color_model)([FRAME, BROKEN], "red")


def test_on_error_empty_returns_empty_detections(color_model: ColorModel, caplog: pytest.LogCaptureFixture) -> None:
    detector = Detector(color_model, on_error="empty")
    with caplog.at_level(logging.WARNING, "moondream_cv"):
        good, unread, failed, also_good = detector([FRAME, "missing.png", BROKEN, FRAME], ["red", "green"])
    assert_filled(good, 2)
    assert_filled(unread, 0)
    assert_filled(failed, 0)
    assert_filled(also_good, 2)
    assert len(color_model.runs) == 1
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert "missing.png" in caplog.text
    assert "rejected the image" in caplog.text
    assert_filled(detector("missing.png", "red"), 0)
    with pytest.raises(ValueError, match="at least one class"):  # an invalid argument always raises
        detector(FRAME, [])


@pytest.mark.parametrize("on_error", ["raise", "empty"])
def test_detect_each_returns_errors_in_order(color_model: ColorModel, on_error: Any) -> None:
    detector = Detector(color_model, on_error=on_error)
    good, unread, failed, also_good = detector.detect_each([FRAME, "missing.png", BROKEN, FRAME], ["red", "green"])
    assert isinstance(good, sv.Detections)
    assert isinstance(also_good, sv.Detections)
    assert_filled(good, 2)
    assert np.array_equal(good.xyxy, also_good.xyxy)
    assert isinstance(unread, ImageError)
    assert "frames[1]: " in str(unread)
    assert "missing.png" in str(unread)
    assert "rejected the image" in str(failed)
    assert len(color_model.runs) == 1
    assert detector.detect_each([], "red") == []
    with pytest.raises(ValueError, match="at least one class"):
        detector.detect_each([FRAME], [])
    with pytest.raises(ValueError, match="frames must be a list, got ndarray"):
        detector.detect_each(FRAME, "red")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [Detector, Pointer])
def test_deprecated_variant_sets_the_adapter(kind: Any, color_model: ColorModel) -> None:
    with pytest.warns(FutureWarning, match=r"the argument variant is deprecated .*; use adapter") as caught:
        detector = kind(color_model, variant="mine")
    assert caught[0].filename == __file__
    assert detector.settings == kind(color_model, adapter="mine").settings
    assert detector.settings.variant == "mine"


def test_deprecated_attempt_calls_detect_each(color_model: ColorModel) -> None:
    with pytest.warns(FutureWarning, match=r"Detector\.attempt is deprecated .* use Detector\.detect_each") as caught:
        (detections,) = Detector(color_model).attempt([FRAME], "red")
    assert caught[0].filename == __file__
    assert isinstance(detections, sv.Detections)
    assert_filled(detections, 1)


@pytest.mark.parametrize("kind", [Detector, Pointer, *DIALECTS.values()])
def test_constructor_signature_and_docstring_list_every_option(kind: Any) -> None:
    parameters = [*inspect.signature(kind).parameters.values()]
    documented = re.findall(
        r"^ *(\w+): ", inspect.cleandoc(kind.__init__.__doc__).partition("Raises:")[0], re.MULTILINE
    )
    assert {parameter.name for parameter in parameters} <= {*documented, "base_url", "api_url"}
    assert not [parameter for parameter in parameters if parameter.kind is parameter.VAR_KEYWORD]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"confidence": 1.5}, r"confidence must be between 0 and 1, got 1\.5"),
        ({"confidence": -0.1}, "confidence"),
        ({"confidence": float("nan")}, "confidence"),
        ({"confidence": True}, "confidence"),
        ({"confidence": None}, "confidence"),
        ({"nms": 2}, r"nms must be between 0 and 1, got 2"),
        ({"nms": "0.5"}, "nms"),
        ({"max_area": 0}, r"max_area must be above 0 and at most 1, got 0"),
        ({"max_area": 4800}, "max_area must be above 0 and at most 1, got 4800"),
        ({"max_area": float("nan")}, "max_area"),
        ({"max_area": True}, "max_area"),
        ({"min_size": -1}, "min_size must be 0 or more pixels, got -1"),
        ({"min_size": float("inf")}, "min_size"),
        ({"min_size": float("nan")}, "min_size"),
        ({"min_size": None}, "min_size"),
        ({"max_objects": 0}, "max_objects"),
        ({"max_crops": 0}, "max_crops"),
        ({"on_error": "ignore"}, "on_error must be one of raise, empty, got 'ignore'"),
        ({"device": "cuda"}, "device applies to a model given by name only, got 'cuda'"),
    ],
)
def test_arguments_out_of_range_raise(arguments: dict[str, Any], message: str, color_model: ColorModel) -> None:
    with pytest.raises(ValueError, match=message):
        Detector(color_model, **arguments)


@pytest.mark.parametrize("model", [None, 3, object(), ColorModel])
def test_objects_that_are_not_models_raise(model: Any) -> None:
    with pytest.raises(ValueError, match="model must be a name"):
        Detector(model)


def test_model_without_the_skill_raises(color_model: ColorModel) -> None:
    color_model.skills = frozenset({"query"})
    with pytest.raises(
        UnsupportedSkill, match=r"needs a model with the skill 'detect'; the skills of ColorModel are: query; use"
    ):
        Detector(color_model)
    with pytest.raises(UnsupportedSkill, match="needs a model with the skill 'point'"):
        Pointer(color_model)


def test_missing_results_raise(color_model: ColorModel) -> None:
    color_model.run = lambda requests: []  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="must return one result per request, got 0 for 1 requests"):
        Detector(color_model)(FRAME, "red")


# --- use -------------------------------------------------------------------------------------------------------------


def test_model_passed_as_an_object_stays_open(color_model: ColorModel) -> None:
    with Detector(color_model) as detector:
        assert detector.model is color_model
    assert not color_model.closed


def test_model_loaded_by_name_is_closed(color_model: ColorModel, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def open_model(*arguments: Any) -> ColorModel:
        asked.append(arguments)
        return color_model

    monkeypatch.setattr(detector_module, "_open_model", open_model)
    with Detector(Path("folder"), device="cpu") as detector:
        assert_filled(detector(FRAME, "red"), 1)
    assert color_model.closed
    assert asked == [(Path("folder"), "cpu")]


def test_acall_returns_the_results_of_a_call(color_model: ColorModel) -> None:
    async def both() -> tuple[sv.Detections, list[sv.Detections]]:
        detector = Detector(color_model)
        one, many = await asyncio.gather(detector.acall(FRAME, "red"), detector.acall([FRAME], ["red", "green"]))
        with pytest.raises(ValueError, match="at least one class"):
            await detector.acall(FRAME, [])
        return one, many

    one, many = asyncio.run(both())
    assert one.xyxy.tolist() == [list(RED)]
    assert_filled(many[0], 2)


def test_concurrent_calls_return_their_own_results(color_model: ColorModel) -> None:
    detector = Detector(color_model, nms=0.5)
    frames = [color_frame(("red", (x, 5, x + 10, 20))) for x in range(60)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda frame: detector(frame, ["green", "red"]), frames))
    assert [d.xyxy[0, 0] for d in found] == list(range(60))


def test_detector_works_as_an_inference_slicer_callback(color_model: ColorModel) -> None:
    frame = color_frame(("red", (150, 20, 160, 30)), ("green", (20, 150, 40, 170)), size_wh=(200, 200))
    slicer = sv.InferenceSlicer(partial(Detector(color_model), classes=["red", "green"]), slice_wh=120, overlap_wh=40)
    detections = slicer(frame)
    assert sorted(detections.xyxy.tolist()) == [[20, 150, 40, 170], [150, 20, 160, 30]]
    batched = sv.InferenceSlicer(
        partial(Detector(color_model), classes=["red", "green"]), slice_wh=120, overlap_wh=40, batch_size=3
    )
    assert sorted(batched(frame).xyxy.tolist()) == sorted(detections.xyxy.tolist())


def test_detections_work_with_supervision_annotators(color_model: ColorModel) -> None:
    for detections in (Detector(color_model)(FRAME, ["red", "green"]), Detector(color_model)(FRAME, "blue")):
        scene = sv.BoxAnnotator().annotate(FRAME.copy(), detections)
        assert sv.LabelAnnotator().annotate(scene, detections).shape == FRAME.shape
        assert isinstance(detections.with_nms(0.5), sv.Detections)


def test_local_model_returns_valid_detections(model: LocalModel, frame: np.ndarray) -> None:
    classes = ["dog", "red circle", "cat"]
    detector = Detector(model, max_objects=3)
    single = detector(frame, classes)
    encoded = detector(model.encode_image(frame), classes)
    (listed, small) = detector([frame, np.ascontiguousarray(frame[:64, :48])], classes)
    for other in (encoded, listed):
        np.testing.assert_array_equal(other.xyxy, single.xyxy)
        np.testing.assert_allclose(other.confidence, single.confidence, rtol=1e-5)  # batches round differently
        np.testing.assert_array_equal(other.class_id, single.class_id)
    for found, width, height in ((single, 320, 240), (small, 48, 64)):
        assert_filled(found, len(found))
        assert len(found) <= 9
        assert (found.xyxy <= [width, height, width, height]).all()
        assert ((found.confidence >= 0) & (found.confidence <= 1)).all()
    assert_filled(Pointer(model, max_objects=3)(frame, classes[0]), len(Pointer(model, max_objects=3)(frame, "dog")))
    with pytest.raises(ValueError, match="max_crops"):
        Detector(model, max_crops=1)(model.encode_image(frame, {"max_crops": 2}), "dog")


# --- pointing --------------------------------------------------------------------------------------------------------


def test_pointer_returns_boxes_without_area(color_model: ColorModel) -> None:
    points = Pointer(color_model)(FRAME, ["red", "green", "blue"])
    assert_filled(points, 2)
    assert points.xyxy.tolist() == [[20, 25, 20, 25], [60, 30, 60, 30]]
    assert points.class_id.tolist() == [0, 1]
    assert_filled(Pointer(color_model)(FRAME, "blue"), 0)
    assert [len(found) for found in Pointer(color_model)([FRAME, FRAME], "red")] == [1, 1]


def test_key_points_have_one_point_per_object(color_model: ColorModel) -> None:
    pointer = Pointer(color_model)
    points = pointer.key_points(FRAME, ["red", "green"])
    assert isinstance(points, sv.KeyPoints)
    assert points.xy.tolist() == [[[20, 25]], [[60, 30]]]
    assert points.xy.dtype == np.float32
    assert points.keypoint_confidence.tolist() == [[1.0], [1.0]]
    assert points.class_id.tolist() == [0, 1]
    assert points.data["class_name"].tolist() == ["red", "green"]
    assert points.as_detections().confidence.tolist() == [1.0, 1.0]
    assert not np.array_equal(sv.VertexAnnotator().annotate(FRAME.copy(), points), FRAME)
    (empty,) = pointer.key_points([FRAME], "blue")
    assert empty.xy.shape == (0, 1, 2)


def test_points_outside_the_frame_and_duplicates_are_removed() -> None:
    model = ListModel(
        [DetectedPoint(0, 1, 0.5), DetectedPoint(1.2, 0.5), DetectedPoint(0, 1, 0.9), DetectedPoint(0.5, 0.5, 0.2)]
    )
    points = Pointer(model)(FRAME, "a")
    assert points.xyxy.tolist() == [[0, 60, 0, 60], [40, 30, 40, 30]]
    assert points.confidence.tolist() == pytest.approx([0.9, 0.2])
    assert len(Pointer(model, confidence=0.5)(FRAME, "a")) == 1
    assert len(Pointer(model, drop_duplicates=False)(FRAME, "a")) == 3


class TruncatedModel(ListModel):
    """Reports every list of points as truncated."""

    def _run_one(self, request: Request) -> Result:
        result = super()._run_one(request)
        assert isinstance(result, PointResult)
        return replace(result, truncated=True)


def test_mark_truncated_marks_points() -> None:
    model = TruncatedModel([DetectedPoint(0.5, 0.5)])
    pointer = Pointer(model, mark_truncated=True)
    assert pointer(FRAME, ["a", "b"]).data["truncated"].tolist() == [True, True]
    assert pointer.key_points(FRAME, "a").data["truncated"].tolist() == [True]
    assert list(Pointer(model)(FRAME, "a").data) == ["class_name"]


def test_image_error_is_a_moondream_error_and_a_value_error() -> None:
    assert issubclass(ImageError, (MoondreamError, ValueError))
