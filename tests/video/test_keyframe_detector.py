"""`KeyframeDetector`: background detection. Run with `pytest tests/video/test_keyframe_detector.py`."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import supervision as sv

from moondream_cv import Detector, load
from moondream_cv.scenes.render import render_scene
from moondream_cv.video.sources.frame import Frame
from moondream_cv.video.tracking import keyframe_detector
from moondream_cv.video.tracking.keyframe_detector import MAX_BATCH, KeyframeDetector
from tests.helpers.color_model import ColorModel

CLASSES = ["red", "green"]
MAGENTA = np.full((40, 60, 3), (255, 0, 255), np.uint8)


def frame(index: int, left: int | None = 10, size: tuple[int, int] = (60, 40)) -> Frame:
    """Return a gray frame with a red square of 10 pixels."""
    image = np.full((size[1], size[0], 3), 90, np.uint8)
    if left is not None:
        image[10:20, left : left + 10] = (0, 0, 255)
    return Frame(image, index, index / 30)


def red(image: np.ndarray, classes: Sequence[str]) -> sv.Detections:
    """Detect with `ColorModel`, as a custom detector function."""
    return Detector(ColorModel())(image, list(classes))


def blocked_detector(detector: Callable[..., Any]) -> tuple[Callable[..., Any], threading.Event, threading.Event]:
    """Return a detector that sets the first event when it starts, and waits for the second event."""
    began, go = threading.Event(), threading.Event()

    def detect(image: np.ndarray, classes: Sequence[str]) -> sv.Detections:
        began.set()
        go.wait(240)
        return detector(image, classes)

    return detect, began, go


class BlockingDetector(Detector):
    """`Detector` that records the number of frames in each call, and blocks until `go` is set."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.sizes: list[int] = []
        self.began, self.go = threading.Event(), threading.Event()

    def __call__(self, frame: Any, classes: Any) -> Any:
        self.sizes.append(len(frame) if isinstance(frame, list) else 1)
        self.began.set()
        self.go.wait(240)
        return super().__call__(frame, classes)


@pytest.fixture
def make_detector() -> Iterator[Callable[..., KeyframeDetector]]:
    workers = []

    def make(detector: Any) -> KeyframeDetector:
        workers.append(KeyframeDetector(detector, CLASSES))
        return workers[-1]

    yield make
    for each in workers:
        each.close(240)
        assert not each._thread.is_alive()


def test_results_match_their_frames(make_detector: Callable[..., KeyframeDetector]) -> None:
    background = make_detector(red)
    lefts = [10, 25, None, 40]
    found = [background.submit(frame(i, left), "clip").result(240) for i, left in enumerate(lefts)]
    assert [f.xyxy[:, 0].tolist() for f in found if f is not None] == [[10], [25], [], [40]]
    assert (background.detections_run, background.failed, background.backlog) == (4, 0, 0)
    assert background.seconds > 0


@pytest.mark.compat
def test_waiting_keyframes_of_several_sources_are_batched(make_detector: Callable[..., KeyframeDetector]) -> None:
    detector = BlockingDetector(ColorModel())
    background = make_detector(detector)
    first = background.submit(frame(0), "clip", 0)
    assert detector.began.wait(240)
    count = MAX_BATCH + 4
    rest = [background.submit(frame(i, 10 + i, (60 + i, 40)), "clip", i) for i in range(1, count)]
    assert background.backlog == count
    detector.go.set()
    lefts = []
    for each in (first, *rest):
        found = each.result(240)
        assert found is not None
        lefts.append(found.xyxy[0, 0].round())
    assert lefts == [10 + i for i in range(count)]  # in order, with different frame sizes
    assert detector.sizes == [1, MAX_BATCH, 3]
    assert (background.detections_run, background.failed) == (count, 0)


def test_keyframes_of_one_source_are_not_batched(make_detector: Callable[..., KeyframeDetector]) -> None:
    detector = BlockingDetector(ColorModel())
    detector.go.set()
    background = make_detector(detector)
    waiting = [background.submit(frame(i), "clip") for i in range(6)]
    assert all(each.result(240) is not None for each in waiting)
    assert detector.sizes == [1] * 6


def test_failed_batch_is_retried_frame_by_frame(
    make_detector: Callable[..., KeyframeDetector], caplog: pytest.LogCaptureFixture
) -> None:
    detector = BlockingDetector(ColorModel())  # fails on magenta
    background = make_detector(detector)
    first = background.submit(frame(0), "door")
    assert detector.began.wait(240)
    rest = [background.submit(frame(1), "door", 0), background.submit(Frame(MAGENTA, 5, 0.2), "yard", 1)]
    rest.append(background.submit(frame(2), "door", 0))
    detector.go.set()
    assert [each.result(240) is None for each in (first, *rest)] == [False, False, True, False]
    assert detector.sizes == [1, 2, 1, 1, 1]  # the frames of the failed call are detected one by one
    assert (background.detections_run, background.failed) == (3, 1)
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(warnings) == 1
    assert warnings[0].startswith("yard: the detector failed on frame 5: ")


def test_tiny_model_returns_the_same_boxes_in_batches(make_detector: Callable[..., KeyframeDetector]) -> None:
    scenes = [render_scene(seed, resolution_wh=(240, 160)).image for seed in range(3)]
    with load("tiny", device="cpu", dtype="float32") as model:
        detector = Detector(model)
        background = make_detector(BlockingDetector(model))
        background._detector.go.set()  # type: ignore[union-attr]
        waiting = [background.submit(Frame(image, i, 0.0), "clip") for i, image in enumerate(scenes)]
        for image, each in zip(scenes, waiting, strict=True):
            found, alone = each.result(240), detector(image, CLASSES)
            assert found is not None
            np.testing.assert_allclose(found.xyxy, alone.xyxy, atol=0.5)
            assert list(found.data["class_name"]) == list(alone.data["class_name"])


def returning(**settings: Any) -> Callable[..., Any]:
    boxes = np.array([[1, 2, 3, 4], [5, 5, 9, 9]], np.float32)
    return lambda image, classes: sv.Detections(xyxy=boxes, **settings)


INVALID: dict[str, Callable[..., Any]] = {
    "None": lambda image, classes: None,
    "a list": lambda image, classes: [(1, 2, 3, 4)],
    "an exception": lambda image, classes: 1 / 0,
    "no argument": lambda: None,
    "a class too high": returning(class_id=np.array([0, 2])),
    "all classes below 0": returning(class_id=np.array([-1, -1])),
    "a class below 0": returning(class_id=np.array([-1, 1])),
    "a box of NaN": lambda image, classes: sv.Detections(np.array([[np.nan] * 4]), class_id=np.array([0])),
    "corners exchanged": lambda image, classes: sv.Detections(np.array([[9.0, 9, 5, 5]]), class_id=np.array([0])),
}


@pytest.mark.parametrize("detector", INVALID.values(), ids=list(INVALID))
def test_invalid_results_count_as_failed(
    detector: Callable[..., Any], make_detector: Callable[..., KeyframeDetector], caplog: pytest.LogCaptureFixture
) -> None:
    background = make_detector(detector)
    assert [background.submit(frame(i), "the yard").result(240) for i in range(2)] == [None, None]
    assert (background.detections_run, background.failed) == (0, 2)
    assert "the yard: the detector failed on frame 1: " in caplog.text


def test_empty_detections_are_valid(make_detector: Callable[..., KeyframeDetector]) -> None:
    for empty in (sv.Detections.empty(), sv.Detections(np.zeros((0, 4)), class_id=np.zeros(0, int))):
        background = make_detector(lambda image, classes, empty=empty: empty)
        assert background.submit(frame(0), "clip").result(240) is not None
        assert background.failed == 0


def test_single_frame_detector_returns_each_result_immediately(
    make_detector: Callable[..., KeyframeDetector], monkeypatch: pytest.MonkeyPatch
) -> None:
    now, began, may_return = [0.0], threading.Event(), threading.Semaphore(0)
    monkeypatch.setattr(keyframe_detector, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def slow(image: np.ndarray, classes: Sequence[str]) -> sv.Detections:
        began.set()
        assert may_return.acquire(timeout=240)
        now[0] += 0.1
        return red(image, classes)

    background = make_detector(slow)
    first = background.submit(frame(0), "clip")
    assert began.wait(240)
    second, *_, last = (background.submit(frame(i), "clip") for i in range(1, 6))
    may_return.release(2)
    first.result(240)
    second.result(240)
    assert not last.done()
    may_return.release(4)
    last.result(240)
    assert background.seconds == pytest.approx(0.1)  # the duration of a call


class Exit(BaseException):
    """Error that is no `Exception`, like `SystemExit`."""


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_detector_that_exits_does_not_block_its_caller(make_detector: Callable[..., KeyframeDetector]) -> None:
    def leave(image: np.ndarray, classes: Sequence[str]) -> sv.Detections:
        raise Exit

    waiting = make_detector(leave).submit(frame(0), "clip")
    end = time.monotonic() + 240
    while not waiting.done() and time.monotonic() < end:
        time.sleep(0.01)
    assert waiting.done()


def test_close_cancels_waiting_keyframes() -> None:
    detector, began, go = blocked_detector(red)
    background = KeyframeDetector(detector, CLASSES)
    first = background.submit(frame(0), "clip")
    assert began.wait(240)
    second = background.submit(frame(1), "clip")
    assert not background.close(0.1)  # returns although the detector is still running
    assert not first.done()
    assert second.cancelled()
    assert background.submit(frame(2), "clip").cancelled()
    go.set()
    assert first.result(240) is not None
    assert background.close(240)
    assert not background._thread.is_alive()
    assert background.detections_run == 1


EXIT = """
import atexit
import supervision as sv
background = None
atexit.register(lambda: print(background._thread.is_alive()))  # runs last
from moondream_cv.video.tracking.keyframe_detector import KeyframeDetector
background = KeyframeDetector(lambda image, classes: sv.Detections.empty(), ["dog"])
"""


def test_open_keyframe_detector_ends_with_the_process() -> None:
    done = subprocess.run([sys.executable, "-c", EXIT], capture_output=True, text=True, timeout=240, check=False)
    assert (done.stdout.strip(), done.returncode) == ("False", 0), done.stderr
