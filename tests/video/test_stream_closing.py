"""Closing of streams, sources, threads and models. Run with `pytest tests/video/test_stream_closing.py`."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moondream_cv import Detector, load, loading
from moondream_cv.errors import MoondreamError, VideoError
from moondream_cv.video import track, track_streams
from tests.helpers.clips import ScriptedDetector
from tests.helpers.color_model import ColorModel
from tests.helpers.streams import CLASSES, WALKERS, Camera, stream_threads
from tests.helpers.waiting import until


@pytest.mark.slow
@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize("seconds", [0.0, 1.5])
def test_closing_in_the_middle_stops_detection_and_threads(
    live: bool, seconds: float, clip: Path, images: list[np.ndarray]
) -> None:
    before = stream_threads()
    detector = ScriptedDetector(*WALKERS, seconds=seconds)
    stream = track_streams([Camera(images).open() if live else clip], CLASSES, model=detector, every=20)
    next(stream)
    stream.close()
    calls = len(detector.keyframes)
    assert list(stream) == []
    stream.close()
    until(lambda: stream_threads() <= before)
    assert len(detector.keyframes) <= calls + 1  # at most the keyframe in progress


def test_leaving_several_sources_in_the_middle_stops_detection_and_threads(
    clip: Path, images: list[np.ndarray]
) -> None:
    before = stream_threads()
    sources = [clip, Camera(images).open(), images, clip]
    detector = ScriptedDetector(*WALKERS)
    with track_streams(sources, CLASSES, model=detector, every=5) as stream:
        list(islice(stream, 10))
    calls = len(detector.keyframes)
    assert list(stream) == []
    until(lambda: stream_threads() <= before)
    assert len(detector.keyframes) <= calls + 1  # at most the keyframe in progress


def test_stream_that_is_never_iterated_closes_its_sources(clip: Path, images: list[np.ndarray]) -> None:
    before = stream_threads()
    camera = Camera(images).open()
    track_streams([clip, camera], CLASSES, model=ScriptedDetector())
    track(clip, CLASSES, model=ScriptedDetector())
    gc.collect()
    assert camera._closing.is_set()
    until(lambda: stream_threads() <= before)


@pytest.mark.slow
@pytest.mark.parametrize("live", [True, False])
def test_closing_from_another_thread_ends_the_iteration(live: bool, images: list[np.ndarray]) -> None:
    def slowly() -> Iterator[np.ndarray]:
        for image in images:
            yield image
            time.sleep(0.02)

    # At 0.5 s the first frame is in detection, two others wait, and the loop waits for the first one.
    detector = ScriptedDetector(seconds=0.0 if live else 1.0)
    stream = track_streams([Camera(images, rate=0.5).open() if live else slowly()], CLASSES, model=detector, every=3)
    errors = []

    def close() -> None:
        try:
            stream.close()
        except BaseException as error:
            errors.append(error)

    timer = threading.Timer(0.5, close)
    timer.start()
    try:
        found = list(stream)
    finally:
        timer.join()
    assert len(found) < len(images)  # the stream ends before the source
    assert errors == []


@pytest.mark.slow
def test_model_is_not_closed_during_a_detector_call(images: list[np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    model = ColorModel()
    run = model.run
    closed_in_use: list[bool] = []
    running = threading.Event()

    def slow_run(requests: Any) -> Any:
        running.set()
        time.sleep(0.2)
        running.clear()
        closed_in_use.append(model.closed)
        return run(requests)

    model.run = slow_run  # type: ignore[method-assign]
    monkeypatch.setattr(loading, "load", lambda name, device=None: model)
    stream = track_streams([images], ["red"], model="colors", every=1)
    for _ in stream:
        if running.is_set():
            break
    stream.close()
    until(lambda: not stream.keyframe_detector._thread.is_alive())
    assert model.closed
    assert not any(closed_in_use)


def test_all_sources_are_closed_if_one_cannot_be_opened(images: list[np.ndarray]) -> None:
    before = stream_threads()
    camera = Camera(images).open()
    with pytest.raises(VideoError, match=r"nowhere\.mp4"):
        track_streams([camera, "nowhere.mp4"], CLASSES, model=ScriptedDetector())
    assert camera._closing.is_set()
    with pytest.raises(MoondreamError):
        track_streams([Camera(images).open()], CLASSES, model="/no/such/folder")
    until(lambda: stream_threads() <= before)


@pytest.mark.parametrize("how", ["close", "forget"])
def test_abandoned_track_closes_its_source(how: str, images: list[np.ndarray]) -> None:
    before = stream_threads()
    camera = Camera(images).open()
    frames = track(camera, CLASSES, model=ScriptedDetector(*WALKERS))
    next(frames)
    if how == "close":
        frames.close()  # type: ignore[attr-defined]
    del frames
    assert camera._closing.is_set()
    until(lambda: stream_threads() <= before)


def test_only_models_loaded_by_name_are_closed(images: list[np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[ColorModel] = []

    def load_colors(name: str, device: str | None = None) -> ColorModel:
        assert (name, device) == ("colors", "cpu")
        loaded.append(ColorModel())
        return loaded[-1]

    monkeypatch.setattr(loading, "load", load_colors)
    expected = [d for _, d in track(images[:12], ["red"], model="colors", device="cpu", every=5)]
    assert [model.closed for model in loaded] == [True]
    assert len(expected) == 12
    model = ColorModel()
    for passed in (model, Detector(model)):
        assert [d for _, d in track(images[:12], ["red"], model=passed, every=5)] == expected
        frames = track(images[:12], ["red"], model=passed, every=5)
        next(frames)
        del frames
        assert not model.closed


def test_passed_model_stays_open(images: list[np.ndarray]) -> None:
    with load("tiny", device="cpu", dtype="float32") as model:
        assert len(list(track(images[:3], ["dog"], model=model, every=5))) == 3
        model.detect(images[0], "dog")
