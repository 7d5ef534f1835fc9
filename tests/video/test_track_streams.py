"""Arguments of `track` and `track_streams`, and several sources at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moondream_cv.errors import VideoError
from moondream_cv.video import TrackedFrame, Tracking, track, track_streams
from moondream_cv.video.sources.opening import open_source
from tests.helpers.clips import ScriptedDetector, frame_number
from tests.helpers.color_model import ColorModel
from tests.helpers.streams import (
    CLASSES,
    SIZE,
    WALKERS,
    Camera,
    CountingDetector,
    by_source,
    check_contract,
    check_frames,
    stream_threads,
    track_ids_of,
)
from tests.helpers.waiting import until


def red_squares(count: int, left: int, speed: int) -> list[np.ndarray]:
    frames = []
    for number in range(count):
        image = np.full((96, 160, 3), 90, np.uint8)
        image[40:60, left + speed * number : left + speed * number + 20] = (0, 0, 255)
        frames.append(image)
    return frames


@pytest.mark.parametrize("names", ["abcd", "aaaa"])
def test_several_sources_share_one_detector_call(names: str) -> None:
    detector = CountingDetector(ColorModel(), seconds=0.01)
    sources = [open_source(red_squares(40, 10 + 10 * i, 2)) for i in range(4)]
    for source, name in zip(sources, names, strict=True):
        source.name = name
    stream = track_streams(sources, ["red", "blue"], model=detector, every=3)
    found = by_source(list(stream), 4)
    assert sum(detector.sizes) == stream.keyframe_detector.detections_run == 4 * 14
    for number, each in enumerate(found):
        assert [t.frame.index for t in each] == list(range(40))
        for tracked in each:
            left = 10 + 10 * number + 2 * tracked.frame.index
            np.testing.assert_allclose(tracked.detections.xyxy, [[left, 40, left + 20, 60]], atol=1.0)
            assert tracked.detections.tracker_id is not None
            assert tracked.detections.tracker_id.tolist() == [1]  # each source has its own IDs
    assert max(detector.sizes) > 1


def test_live_source_among_files(images: list[np.ndarray], clip: Path) -> None:
    found: list[TrackedFrame] = []
    sources = [Camera(images, count=20).open(), clip]
    with pytest.raises(VideoError, match="the camera at the door is lost"):
        found.extend(track_streams(sources, CLASSES, model=ScriptedDetector(*WALKERS), every=5))
    live, file = by_source(found, 2)
    check_frames(file, range(48))
    numbers = [frame_number(t.frame.image) for t in live]
    assert numbers == sorted(set(numbers))
    assert numbers[-1] == 19


@pytest.mark.compat
def test_track_yields_images_and_detections(clip: Path) -> None:
    pairs = list(track(str(clip), CLASSES, model=ScriptedDetector(*WALKERS), every=5))
    assert [frame_number(image) for image, _ in pairs] == list(range(48))
    for image, detections in pairs:
        assert image.dtype == np.uint8
        assert image.shape == (SIZE[1], SIZE[0], 3)
        check_contract(detections)
    expected = list(track_streams([clip], CLASSES, model=ScriptedDetector(*WALKERS), every=5))
    assert all(d == t.detections for (_, d), t in zip(pairs, expected, strict=True))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"every": 0}, "every must be"),
        ({"every": "often"}, "every must be"),
        ({"classes": []}, "classes must have at least one"),
        ({"classes": ["dog", "dog"]}, "classes must be unique; duplicates: 'dog'"),
        ({"classes": [" "]}, "must not be empty"),
        ({"tracking": Tracking("deepsort")}, "tracker must be one of sort, .*, got 'deepsort'"),
        ({"tracking": Tracking("sort", {"speed": 3})}, "unknown option of the tracker 'sort': speed; it has "),
        ({"model": 5}, "model must be a name"),
        ({"model": ColorModel}, "model must be a name"),
        ({"model": ColorModel(), "confidence": 2.0}, "confidence must be"),
        ({"source": 3.5}, "source must be a path"),
        ({"source": -1}, "webcam index"),
        ({"model": ScriptedDetector(), "confidence": 2.0}, "confidence"),
    ],
)
def test_track_rejects_invalid_arguments_before_iteration(wrong: dict[str, Any], message: str, clip: Path) -> None:
    arguments = {"source": clip, "classes": CLASSES, "model": ScriptedDetector(*WALKERS), **wrong}
    before = stream_threads()
    with pytest.raises(ValueError, match=message):
        track(arguments.pop("source"), arguments.pop("classes"), **arguments)
    until(lambda: stream_threads() <= before)


@pytest.mark.parametrize("seconds", [-1.0, float("nan")])
def test_negative_lost_track_seconds_are_rejected(seconds: float) -> None:
    with pytest.raises(ValueError, match=f"lost_track_seconds must be 0 or more seconds, got {seconds}"):
        Tracking(lost_track_seconds=seconds)


@pytest.mark.parametrize("sources", ["street.mp4", [], None, 0, b"street.mp4"])
def test_sources_must_be_a_list(sources: Any) -> None:
    with pytest.raises(ValueError, match="sources must be a list with at least one source, got "):
        track_streams(sources, CLASSES, model=ScriptedDetector())


def test_missing_file_raises_before_iteration() -> None:
    with pytest.raises(VideoError, match=r"nowhere\.mp4"):
        track("nowhere.mp4", CLASSES, model=ScriptedDetector())


@pytest.mark.parametrize("tracker", ["sort", "ocsort", "bytetrack", "botsort"])
@pytest.mark.compat
def test_every_tracker_name_works(tracker: str, clip: Path) -> None:
    found = list(track_streams([clip], CLASSES, model=ScriptedDetector(*WALKERS), every=5, tracking=Tracking(tracker)))
    check_frames(found, range(48))
    assert all(len(set(track_ids_of(walker, found))) == 1 for walker in WALKERS)


def test_custom_tracker_factory_is_called_once_per_class(clip: Path) -> None:
    import trackers

    made = []

    def make() -> Any:
        made.append(trackers.SORTTracker(minimum_consecutive_frames=1, minimum_iou_threshold=0.01))
        return made[-1]

    found = list(track_streams([clip], CLASSES, model=ScriptedDetector(*WALKERS), every=5, tracking=Tracking(make)))
    check_frames(found, range(48))
    assert len(made) == 2  # one per class


def test_confidence_applies_to_models(images: list[np.ndarray]) -> None:
    everything = [len(d) for _, d in track(images[:6], ["red"], model=ColorModel(), every=5)]
    sure = [len(d) for _, d in track(images[:6], ["red"], model=ColorModel(), every=5, confidence=1.0)]
    assert all(few <= many for few, many in zip(sure, everything, strict=True))
    assert everything == [1] * 6
