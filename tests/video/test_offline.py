"""Tracking in files: keyframes, interpolation and the memory limit. Run with `pytest tests/video/test_offline.py`."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import supervision as sv

from moondream_cv.evaluation.tracks import PerfectDetector, numbered_frames, score_tracks, tracking_clip, truth_of
from moondream_cv.video import TrackedFrame, Tracking, offline, track, track_streams
from moondream_cv.video.sources.frame import Frame
from moondream_cv.video.sources.opening import open_source
from moondream_cv.video.tracking import keyframe_detector
from tests.helpers.clips import MovingObject, ScriptedDetector, frame_number, http_server, write_clip
from tests.helpers.color_model import ColorModel
from tests.helpers.streams import CLASSES, SIZE, WALKERS, CountingDetector, check_contract, check_frames, track_ids_of
from tests.helpers.waiting import until


class Clock:
    """Clock that only advances when the test or its detector sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Replace the clock that times detection and output."""
    clock = Clock()
    monkeypatch.setattr(offline, "time", clock)
    monkeypatch.setattr(keyframe_detector, "time", clock)
    return clock


@pytest.mark.parametrize("every", [1, 5, 15, 47, 1000])
@pytest.mark.compat
def test_linear_motion_is_interpolated_with_constant_track_ids(clip: Path, every: int) -> None:
    detector = ScriptedDetector(*WALKERS)
    stream = track_streams([clip], CLASSES, model=detector, every=every)
    found = list(stream)
    check_frames(found, range(48))
    keyframes = sorted({*range(0, 48, every), 47})  # including the last frame
    assert detector.keyframes == keyframes
    assert [t.frame.index for t in found if t.is_keyframe] == keyframes
    assert (stream.keyframe_detector.detections_run, stream.keyframe_detector.failed) == (len(keyframes), 0)
    if every <= 15:
        ids = [set(track_ids_of(walker, found)) for walker in WALKERS]
        assert sorted(next(iter(one)) for one in ids if len(one) == 1) == [1, 2, 3]  # type: ignore[type-var]
    assert {len(t.detections) for t in found} == {3}  # no object has two tracks
    sv.Detections.merge([t.detections for t in found])


def test_auto_tracks_all_objects_in_a_file(clip: Path) -> None:
    found = list(track_streams([clip], CLASSES, model=ScriptedDetector(*WALKERS), every="auto"))
    check_frames(found, range(48))
    assert [{*track_ids_of(walker, found)} for walker in WALKERS] == [{1}, {3}, {2}]


def test_auto_interval_grows_with_a_slow_detector_and_shrinks_again(images: list[np.ndarray], clock: Clock) -> None:
    detector = ScriptedDetector(*WALKERS, seconds=0.1, sleep=clock.sleep)
    found = []
    for tracked in track_streams([images], CLASSES, model=detector, every="auto"):
        found.append(tracked)
        if len(found) == 50:
            detector.seconds = 0.0
    assert len(found) == 250
    steps = np.diff(detector.keyframes)
    assert steps[0] == 1
    assert steps.max() >= 3  # 0.1 s are 3 frames of 1/30 s
    assert steps[-2] < steps.max()


def test_auto_interval_does_not_overshoot(images: list[np.ndarray], clock: Clock) -> None:
    detector = ScriptedDetector(*WALKERS, seconds=0.1, sleep=clock.sleep)
    for _ in track_streams([images[:120]], CLASSES, model=detector, every="auto"):
        pass
    assert max(np.diff(detector.keyframes)) <= 12  # 4 would suffice: 0.1 s are 3 frames of 1/30 s


def test_auto_interval_stays_short_if_drawing_is_the_bottleneck(
    images: list[np.ndarray], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Clock()  # a second clock, because detection and drawing run in parallel
    monkeypatch.setattr(keyframe_detector, "time", calls)
    detector = ScriptedDetector(*WALKERS, seconds=0.01, sleep=calls.sleep)
    for _ in track_streams([images[:100]], CLASSES, model=detector, every="auto"):
        clock.sleep(0.04)  # drawing and encoding, slower than 1/30 s
    assert max(np.diff(detector.keyframes)) <= 10


def test_frames_without_objects_have_empty_detections(clip: Path) -> None:
    found = list(track_streams([clip], "dog", model=ScriptedDetector(), every=5))
    check_frames(found, range(48))
    assert sum(len(t.detections) for t in found) == 0
    assert len(sv.Detections.merge([t.detections for t in found])) == 0


def test_tracks_last_from_their_first_to_their_last_detection(clip: Path) -> None:
    item = MovingObject("cat", (160, 100), (1, 0), range(18, 33))
    found = list(track_streams([clip], CLASSES, model=ScriptedDetector(item), every=5))
    check_frames(found, range(48))
    where = [i for i, tracker_id in enumerate(track_ids_of(item, found)) if tracker_id is not None]
    assert where == list(range(20, 31))  # from the first keyframe with the object to the last one
    assert [len(t.detections) for t in found] == [int(i in where) for i in range(48)]
    merged = sv.Detections.merge([t.detections for t in found])
    assert merged.tracker_id is not None
    assert merged.tracker_id.tolist() == [1] * 11


def test_one_missed_keyframe_is_bridged(clip: Path) -> None:
    class Blinking(ScriptedDetector):
        def __call__(self, image: np.ndarray, classes: Sequence[str]) -> sv.Detections:
            found = super().__call__(image, classes)
            return found[[]] if frame_number(image) == 20 else found  # type: ignore[return-value]

    found = list(track_streams([clip], CLASSES, model=Blinking(*WALKERS), every=5))
    check_frames(found, range(48))
    assert [set(track_ids_of(walker, found)) for walker in WALKERS] == [{1}, {3}, {2}]


def test_boxes_at_the_edge_are_clipped_to_the_frame(clip: Path) -> None:
    item = MovingObject("dog", (20, 100), (-0.5, 0))
    found = list(track_streams([clip], CLASSES, model=ScriptedDetector(item), every=5))
    check_frames(found, range(48))
    assert all(tracked.detections.xyxy[:, 0].max(initial=0) <= 5 for tracked in found)


def test_video_of_one_frame(tmp_path: Path, images: list[np.ndarray]) -> None:
    path = write_clip(tmp_path / "one.mp4", images[7:8])
    every: Any
    for every in (1, 5, "auto"):
        (found,) = track_streams([path], CLASSES, model=ScriptedDetector(*WALKERS), every=every)
        check_frames([found], [7])
        assert found.is_keyframe
        assert [track_ids_of(walker, [found]) for walker in WALKERS] == [[1], [3], [2]]


@pytest.mark.parametrize("every", [5, 15, "auto"])
def test_memory_limit_for_waiting_frames_is_respected(every: Any, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = 3 * SIZE[0] * SIZE[1] * 3
    monkeypatch.setattr("moondream_cv.video.stream.MAX_HELD_BYTES", held)
    read = []

    def counted(source: Any) -> Iterator[np.ndarray]:
        for frame in source:
            read.append(frame.index)
            yield frame

    found: list[TrackedFrame] = []
    with open_source(clip) as source:
        for tracked in track_streams(
            [counted(source)], CLASSES, model=ScriptedDetector(*WALKERS, seconds=0.02), every=every
        ):
            found.append(tracked)
            assert len(read) - len(found) <= 4
    check_frames(found, range(48))
    if every == 5:
        assert all(len(t.detections) == 3 for t in found[10:])
        assert all(
            set(track_ids_of(walker, found[10:], 6)) == {i} for walker, i in zip(WALKERS, (1, 3, 2), strict=True)
        )


@pytest.mark.parametrize(("bridge", "most"), [(0.0, 60), (0.7, 71), (2.0, 110)])
def test_frames_wait_for_two_keyframes_and_bridge_seconds(bridge: float, most: int, images: list[np.ndarray]) -> None:
    read: list[int] = []

    def counted() -> Iterator[np.ndarray]:
        for number, image in enumerate(images):
            read.append(number)
            yield image

    given = [0]
    tracking = Tracking(bridge_seconds=bridge)
    for tracked in track_streams([counted()], CLASSES, model=ScriptedDetector(*WALKERS), every=10, tracking=tracking):
        given.append(tracked.frame.index)
        assert len(read) - given[-1] <= most
    assert len(given) == len(images) + 1


def test_slow_detector_drops_no_frames_of_a_file(clip: Path) -> None:
    read_meanwhile = []
    detector = ScriptedDetector(*WALKERS, seconds=0.06)

    def read() -> Iterator[Frame]:
        with open_source(clip) as source:
            for frame in source:
                read_meanwhile.append(detector.busy)
                yield frame

    check_frames(list(track_streams([read()], CLASSES, model=detector, every=4)), range(48))
    assert any(read_meanwhile)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["callable", "Detector"])
def test_detection_runs_while_frames_are_drawn(kind: str, images: list[np.ndarray]) -> None:
    changed, drawn, drawn_meanwhile = threading.Condition(), 0, 0

    def until_drawn(seconds: float) -> None:
        """Wait until a frame is drawn, but not for long: the next frame may need this call."""
        with changed:
            changed.notify_all()
            before = drawn
            changed.wait_for(lambda: drawn > before, 0.05)

    detector: Any = (
        ScriptedDetector(sleep=until_drawn) if kind == "callable" else CountingDetector(ColorModel(), sleep=until_drawn)
    )
    for _ in track_streams([images[:96]], ["red"], model=detector, every=4):
        with changed:
            drawn_meanwhile += changed.wait_for(
                lambda: bool(detector.busy), 0.05
            )  # not for long: detection may need this frame
            drawn += 1
            changed.notify_all()
    assert drawn == 96
    assert drawn_meanwhile >= 3  # out of about 20 keyframes


def test_files_are_decoded_ahead(clip: Path) -> None:
    tracking = Tracking(bridge_seconds=0.0)
    with track_streams([clip], CLASSES, model=ScriptedDetector(*WALKERS), every=1, tracking=tracking) as stream:
        next(stream)
        position = stream.sources[0]._count  # type: ignore[attr-defined]
        until(lambda: stream.sources[0]._count > position)  # type: ignore[attr-defined]
        time.sleep(0.3)
        assert stream.sources[0]._count < 20  # type: ignore[attr-defined]


def test_rendered_clip_reaches_minimum_hota() -> None:
    scene = tracking_clip(0)
    truth = truth_of(scene)[:150]
    detector = PerfectDetector(truth)
    frames = list(numbered_frames(150, scene.resolution_wh))
    found = [d for _, d in track(frames, scene.class_names, model=detector, every=5)]
    scores = score_tracks(truth, found)
    assert detector.calls == 31
    assert scores.hota > 0.6
    assert scores.coverage > 0.75


@pytest.mark.parametrize("every", [1, 5, 15])
@pytest.mark.parametrize("tracker", ["sort", "ocsort", "bytetrack", "botsort"])
def test_track_ids_are_unique_per_frame_and_keep_their_class(
    tracker: str, every: int, images: list[np.ndarray]
) -> None:
    rng = np.random.default_rng(every)
    places, speeds = rng.uniform((0, 0), SIZE, (8, 2)), rng.normal(0, 3, (8, 2))
    sizes, kinds = rng.uniform(8, 60, (8, 2)), rng.integers(0, 2, 8)

    def detector(image: np.ndarray, classes: Sequence[str]) -> sv.Detections:
        middles = (places + speeds * frame_number(image)) % (2 * np.array(SIZE))
        middles = np.minimum(middles, 2 * np.array(SIZE) - middles)  # objects turn around at the edge
        boxes = np.concatenate((middles - sizes / 2, middles + sizes / 2), 1) + rng.normal(0, 1, (8, 4))
        false = rng.uniform((0, 0, 10, 10), (250, 120, 60, 60), (rng.integers(0, 3), 4))
        false[:, 2:] += false[:, :2]
        seen = rng.random(8) > 0.2
        return sv.Detections(
            np.clip(np.concatenate((boxes[seen], false)), 0, SIZE * 2).astype(np.float32),
            class_id=np.concatenate((kinds[seen], rng.integers(0, 2, len(false)))),
        )

    classes_of: dict[int, set[int]] = {}
    for tracked in track_streams([images[:60]], CLASSES, model=detector, every=every, tracking=Tracking(tracker)):
        check_contract(tracked.detections)  # including unique track IDs
        ids, class_ids = tracked.detections.tracker_id, tracked.detections.class_id
        assert ids is not None
        assert class_ids is not None
        for tracker_id, class_id in zip(ids.tolist(), class_ids.tolist(), strict=True):
            classes_of.setdefault(tracker_id, set()).add(class_id)
    assert all(len(kinds) == 1 for kinds in classes_of.values())


def test_tiny_model_tracks_objects_in_a_file(tmp_path: Path) -> None:
    scene = tracking_clip(1)
    pictures = [scene.frame(i)[0][::2, ::2, ::-1] for i in range(12)]
    path = write_clip(tmp_path / "scene.mp4", pictures)
    found = list(track_streams([path], scene.class_names, model="tiny", device="cpu", every=5))
    assert [t.frame.index for t in found] == list(range(12))
    assert sum(len(t.detections) for t in found) > 0
    sv.Detections.merge([t.detections for t in found])


def test_finite_http_video_is_tracked_offline(clip: Path) -> None:
    with http_server(lambda reply: reply.send_file(clip.read_bytes(), "video/mp4")) as address:
        stream = track_streams([f"{address}/street.mp4"], CLASSES, model=ScriptedDetector(*WALKERS), every=5)
        assert not stream.sources[0].live
        found = list(stream)
    check_frames(found, range(48))
    assert [set(track_ids_of(walker, found)) for walker in WALKERS] == [{1}, {3}, {2}]


def test_folder_of_images_is_tracked_offline(tmp_path: Path, images: list[np.ndarray]) -> None:
    for number in range(12):
        cv2.imwrite(str(tmp_path / f"img{number}.png"), images[number])
    (tmp_path / "img3.png").write_bytes(b"not an image")
    found = list(track_streams([tmp_path], CLASSES, model=ScriptedDetector(*WALKERS), every=5))
    assert [frame_number(t.frame.image) for t in found] == [0, 1, 2, *range(4, 12)]
