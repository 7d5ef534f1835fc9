"""Tracking in live sources. Run with `pytest tests/video/test_live_stream.py`."""

from __future__ import annotations

import threading
from itertools import islice

import numpy as np
import pytest
import supervision as sv

from moondream_cv.video import Frame, Source, TrackedFrame, track_streams
from tests.helpers.clips import HTTPReply, MovingObject, ScriptedDetector, frame_number, http_server
from tests.helpers.streams import CLASSES, WALKERS, Camera, SteppedCamera, check_contract, track_ids_of
from tests.helpers.waiting import until


def test_live_frames_are_yielded_without_waiting_for_detection(
    images: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()
    detector = ScriptedDetector(MovingObject("dog", (100, 100)), sleep=lambda seconds: go.wait(240) and None)
    camera = SteppedCamera(images, monkeypatch)
    found: list[TrackedFrame] = []
    with track_streams([camera.open()], CLASSES, model=detector) as stream:
        for number in range(200):
            if number > 0:
                camera.step()
            found.append(next(stream))  # without later frames
            assert frame_number(found[-1].frame.image) == camera.shown == number
            assert stream.keyframe_detector.backlog <= 1
            if number < 40:
                assert detector.keyframes in ([], [0])  # frames are returned while the detector is busy
            elif number == 40:
                go.set()
                until(lambda: stream.keyframe_detector.detections_run > 0)
            elif len(found[-1].detections) > 0:
                break
    for tracked in found:
        check_contract(tracked.detections)
    shown = [len(tracked.detections) for tracked in found]
    assert shown[:40] == [0] * 40
    assert shown[-1] == 1  # known objects are returned from then on
    assert shown == sorted(shown)


def test_predicted_boxes_move_between_keyframes(images: list[np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    item = MovingObject("dog", (40, 60), (2.0, 0.4))
    camera = SteppedCamera(images, monkeypatch)
    due = threading.Semaphore(0)
    detector = ScriptedDetector(item, sleep=lambda seconds: due.acquire(timeout=240) and None)
    found: list[TrackedFrame] = []
    with track_streams([camera.open()], CLASSES, model=detector) as stream:
        for number in range(90):
            if number > 0:
                camera.step()
            found.append(next(stream))
            if number % 10 == 9:  # a call takes the time of about ten frames
                until(lambda: stream.keyframe_detector.backlog == 1)
                detections_run = stream.keyframe_detector.detections_run
                due.release()
                until(lambda detections_run=detections_run: stream.keyframe_detector.detections_run > detections_run)
        due.release()
    late = [t for t in found if frame_number(t.frame.image) > 50]
    assert len(late) > 15
    assert all(len(t.detections) == 1 for t in late)
    assert [set(track_ids_of(item, [t], 12)) for t in late].count({1}) > 0.8 * len(late)
    lefts = np.array([t.detections.xyxy[0, 0] for t in late])
    assert (np.diff(lefts) > 0).mean() > 0.8
    assert not any(t.is_keyframe for t in late)


@pytest.mark.parametrize("seconds", [0.0, 0.1])
def test_every_1_waits_for_the_detections_of_each_live_frame(
    seconds: float, images: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    camera, detector = SteppedCamera(images, monkeypatch), ScriptedDetector(*WALKERS, seconds=seconds)
    found: list[TrackedFrame] = []
    with track_streams([camera.open()], CLASSES, model=detector, every=1) as stream:
        for number in range(12):
            if number > 0:
                camera.step()
            found.append(next(stream))
            assert frame_number(found[-1].frame.image) == camera.shown == number
    assert all(t.is_keyframe for t in found)
    assert detector.keyframes[:12] == [frame_number(t.frame.image) for t in found]
    for walker in WALKERS:
        assert None not in track_ids_of(walker, found, 0.01)
        assert len({*track_ids_of(walker, found)}) == 1


def test_live_keyframes_follow_the_interval(images: list[np.ndarray]) -> None:
    detector = ScriptedDetector(*WALKERS)
    with track_streams([Camera(images).open()], CLASSES, model=detector, every=10) as stream:
        found = list(islice(stream, 45))
    numbers = [frame_number(t.frame.image) for t in found]
    assert detector.keyframes == [numbers[i] for i in (0, 10, 20, 30, 40)]


def test_keyframe_interval_counts_the_frames_that_a_source_dropped(images: list[np.ndarray]) -> None:
    class EveryFourthFrame(Source):
        """A live source that drops three of four frames."""

        live = True
        numbers = iter(range(0, len(images), 4))

        def __next__(self) -> Frame:
            number = next(self.numbers)
            return Frame(images[number], number, number / 30)

        def close(self) -> None:
            pass

    found: list[int] = []

    def detect(image: np.ndarray, classes: list[str]) -> sv.Detections:
        found.append(frame_number(image))
        return sv.Detections.empty()

    for tracked in track_streams([EveryFourthFrame("camera")], CLASSES, model=detect, every=8):
        if tracked.frame.index % 8 == 0:
            until(lambda index=tracked.frame.index: found[-1:] == [index])  # type: ignore[misc]
    assert found == list(range(0, len(images), 8))


def test_mjpeg_stream_is_tracked_live(images: list[np.ndarray]) -> None:
    def answer(reply: HTTPReply) -> None:
        reply.start_mjpeg()
        for image in images:
            reply.send_jpeg(image, 0.02)

    with (
        http_server(answer) as address,
        track_streams([f"{address}/?token=abc"], CLASSES, model=ScriptedDetector(*WALKERS)) as stream,
    ):
        found = list(islice(stream, 20))
    numbers = [frame_number(t.frame.image) for t in found]
    assert numbers == sorted(set(numbers))
    assert stream.sources[0].name.endswith("token=...")
