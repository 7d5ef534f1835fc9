"""`watch` and `track`: files without loss, live sources at once. Run with `pytest tests/video/test_stream.py`."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import supervision as sv

from moondream_cv import Detector, load, loading
from moondream_cv.errors import MoondreamError, VideoError
from moondream_cv.evaluation.tracks import PerfectDetector, numbered_frames, score_tracks, tracking_clip, truth_of
from moondream_cv.video import TrackedFrame, Tracking, offline, stream, track, track_streams
from moondream_cv.video.sources import live
from moondream_cv.video.sources.frame import Frame
from moondream_cv.video.sources.live import LiveReader
from moondream_cv.video.sources.opening import open_source
from moondream_cv.video.tracking import keyframe_detector
from tests.helpers.clips import Known, Reply, Thing, deadline, number_of, numbered, serving, write_clip
from tests.helpers.color_model import ColorModel
from tests.helpers.waiting import until

SIZE = (320, 192)
CLASSES = ["dog", "cat"]
FPS = 25
TIMES = {"open_timeout": 120.0, "read_timeout": 120.0, "reconnect_for": 0.0}


@pytest.fixture(autouse=True)
def _in_time() -> Iterator[None]:
    with deadline(240):
        yield


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    return [numbered(number, SIZE) for number in range(250)]


@pytest.fixture(scope="module")
def clip(images: list[np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 frames, of which the last one is no keyframe at 5 or 15."""
    return write_clip(tmp_path_factory.mktemp("clips") / "street.mp4", images[:48], fps=FPS)


WALKERS = (Thing("dog", (40, 40), (2.5, 0.5)), Thing("cat", (280, 100), (-3, 0)), Thing("dog", (60, 150), (1, -0.5)))


def check_contract(detections: sv.Detections, resolution_wh: tuple[int, int] = SIZE) -> None:
    count = len(detections)
    assert detections.xyxy.dtype == np.float32
    assert detections.xyxy.shape == (count, 4)
    assert (detections.xyxy >= 0).all()
    assert (detections.xyxy <= np.array(resolution_wh * 2)).all()
    assert (detections.xyxy[:, 2:] > detections.xyxy[:, :2]).all()
    assert detections.confidence is not None
    assert detections.class_id is not None
    assert detections.tracker_id is not None
    assert detections.confidence.dtype == np.float32
    assert ((detections.confidence >= 0) & (detections.confidence <= 1)).all()
    assert detections.class_id.dtype == detections.tracker_id.dtype == int
    assert list(detections.data) == ["class_name"]
    names = detections.data["class_name"]
    assert isinstance(names, np.ndarray)
    assert names.dtype.kind == "U"
    assert names.tolist() == [CLASSES[i] for i in detections.class_id]
    assert detections.metadata == {}
    assert detections.mask is None
    assert len(set(detections.tracker_id.tolist())) == count
    assert (detections.tracker_id >= 1).all()


def check_frames(
    found: Sequence[TrackedFrame], numbers: Sequence[int], tell: Callable[[np.ndarray], int] = number_of
) -> None:
    assert [tell(tracked.frame.image) for tracked in found] == list(numbers)
    assert [tracked.frame.index for tracked in found] == list(range(len(numbers)))
    times = [tracked.frame.time for tracked in found]
    np.testing.assert_allclose(np.diff(times), 1 / FPS, atol=2e-3)
    assert times[0] == 0
    for tracked in found:
        check_contract(tracked.detections, (tracked.frame.image.shape[1], tracked.frame.image.shape[0]))


def ids_of(
    thing: Thing,
    found: Sequence[TrackedFrame],
    pixels: float = 2.0,
    tell: Callable[[np.ndarray], int] = number_of,
) -> list[int | None]:
    """The number of a thing on each frame; None where no box of its class lies on it."""
    ids: list[int | None] = []
    for tracked in found:
        detections = tracked.detections
        assert detections.tracker_id is not None
        expected = thing.box(tell(tracked.frame.image))
        near = np.abs(detections.xyxy - expected).max(1) <= pixels
        rows = np.flatnonzero(near & (np.asarray(detections.data["class_name"]) == thing.name))
        assert len(rows) <= 1
        ids.append(int(detections.tracker_id[rows[0]]) if len(rows) else None)
    return ids


def our_threads() -> set[threading.Thread]:
    return {t for t in threading.enumerate() if t.name.startswith(("moondream_cv", "frames of"))}


class Clock:
    """A clock that only advances when the test or its detector sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock by which detection and output are timed, in place of the machine's."""
    clock = Clock()
    monkeypatch.setattr(offline, "time", clock)
    monkeypatch.setattr(keyframe_detector, "time", clock)
    return clock


# Files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 5, 15, 47, 1000])
@pytest.mark.compat
def test_things_that_move_in_straight_lines(clip: Path, every: int) -> None:
    detector = Known(*WALKERS)
    watched = track_streams([clip], CLASSES, model=detector, every=every)
    found = list(watched)
    check_frames(found, range(48))
    keyframes = sorted({*range(0, 48, every), 47})  # the last frame, so that the way to it is known
    assert detector.keyframes == keyframes
    assert [t.frame.index for t in found if t.is_keyframe] == keyframes
    assert (watched.keyframe_detector.detections_run, watched.keyframe_detector.failed) == (len(keyframes), 0)
    if every <= 15:
        ids = [set(ids_of(walker, found)) for walker in WALKERS]
        assert sorted(next(iter(one)) for one in ids if len(one) == 1) == [1, 2, 3]  # type: ignore[type-var]
    assert {len(t.detections) for t in found} == {3}  # also where tracks of three boxes could be six
    sv.Detections.merge([t.detections for t in found])


def test_auto_on_a_file(clip: Path) -> None:
    found = list(track_streams([clip], CLASSES, model=Known(*WALKERS), every="auto"))
    check_frames(found, range(48))
    assert [{*ids_of(walker, found)} for walker in WALKERS] == [{1}, {3}, {2}]


def test_auto_looks_less_with_a_slow_detector_and_more_again(images: list[np.ndarray], clock: Clock) -> None:
    detector = Known(*WALKERS, seconds=0.1, sleep=clock.sleep)
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


def test_auto_does_not_overshoot(images: list[np.ndarray], clock: Clock) -> None:
    detector = Known(*WALKERS, seconds=0.1, sleep=clock.sleep)
    for _ in track_streams([images[:120]], CLASSES, model=detector, every="auto"):
        pass
    assert max(np.diff(detector.keyframes)) <= 12  # 4 would do: 0.1 s are 3 frames of 1/30 s


def test_auto_goes_on_looking_where_the_detector_is_not_what_takes_the_time(
    images: list[np.ndarray], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Clock()  # another one, as time passes for the detector and for drawing at once
    monkeypatch.setattr(keyframe_detector, "time", calls)
    detector = Known(*WALKERS, seconds=0.01, sleep=calls.sleep)
    for _ in track_streams([images[:100]], CLASSES, model=detector, every="auto"):
        clock.sleep(0.04)  # of 1/30 s: drawing and encoding
    assert max(np.diff(detector.keyframes)) <= 10


def test_nothing_is_ever_found(clip: Path) -> None:
    found = list(track_streams([clip], "dog", model=Known(), every=5))
    check_frames(found, range(48))
    assert sum(len(t.detections) for t in found) == 0
    assert len(sv.Detections.merge([t.detections for t in found])) == 0


def test_a_thing_comes_late_and_leaves_early(clip: Path) -> None:
    thing = Thing("cat", (160, 100), (1, 0), range(18, 33))
    found = list(track_streams([clip], CLASSES, model=Known(thing), every=5))
    check_frames(found, range(48))
    where = [i for i, tracker_id in enumerate(ids_of(thing, found)) if tracker_id is not None]
    assert where == list(range(20, 31))  # between the first keyframe that saw it and the last one
    assert [len(t.detections) for t in found] == [int(i in where) for i in range(48)]
    merged = sv.Detections.merge([t.detections for t in found])
    assert merged.tracker_id is not None
    assert merged.tracker_id.tolist() == [1] * 11


def test_a_missed_keyframe_is_bridged(clip: Path) -> None:
    class Blinking(Known):
        def __call__(self, image: np.ndarray, classes: Sequence[str]) -> sv.Detections:
            found = super().__call__(image, classes)
            return found[[]] if number_of(image) == 20 else found  # type: ignore[return-value]

    found = list(track_streams([clip], CLASSES, model=Blinking(*WALKERS), every=5))
    check_frames(found, range(48))
    assert [set(ids_of(walker, found)) for walker in WALKERS] == [{1}, {3}, {2}]


def test_a_thing_at_the_edge_stays_within_the_frame(clip: Path) -> None:
    thing = Thing("dog", (20, 100), (-0.5, 0))
    found = list(track_streams([clip], CLASSES, model=Known(thing), every=5))
    check_frames(found, range(48))
    assert all(tracked.detections.xyxy[:, 0].max(initial=0) <= 5 for tracked in found)


def test_frames_on_which_the_detector_raises(clip: Path, caplog: pytest.LogCaptureFixture) -> None:
    detector = Known(*WALKERS, fails=lambda number: number in (0, 15, 20))
    watched = track_streams([clip], CLASSES, model=detector, every=5)
    found = list(watched)
    check_frames(found, range(48))
    assert (watched.keyframe_detector.detections_run, watched.keyframe_detector.failed) == (8, 3)
    warnings = [r.getMessage() for r in caplog.records if "the detector failed" in r.getMessage()]
    assert warnings == [
        f"{watched.sources[0].name}: the detector failed on frame {n}: frame {n} is too much" for n in (0, 15, 20)
    ]
    assert "street.mp4" in warnings[0]
    assert [t.frame.index for t in found if t.is_keyframe] == [5, 10, 25, 30, 35, 40, 45, 47]
    for walker in WALKERS:
        assert ids_of(walker, found)[:5] == [None] * 5
        assert len(set(ids_of(walker, found)[5:])) == 1


def test_a_detector_that_always_raises(clip: Path, caplog: pytest.LogCaptureFixture) -> None:
    watched = track_streams([clip], CLASSES, model=Known(fails=lambda number: True), every=5)
    found = list(watched)
    check_frames(found, range(48))
    assert not any(t.is_keyframe or len(t.detections) for t in found)
    assert (watched.keyframe_detector.detections_run, watched.keyframe_detector.failed) == (0, 11)


def test_a_last_frame_that_failed_is_not_asked_for_twice(
    images: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "MAX_HELD_BYTES", 1)  # so that each answer is waited for
    detector = Known(fails=lambda number: True)
    watched = track_streams([images[:6]], CLASSES, model=detector, every=5)
    assert len(list(watched)) == 6
    assert detector.keyframes == [0, 5]
    assert watched.keyframe_detector.failed == 2


@pytest.mark.parametrize("nonsense", [lambda image, classes: None, lambda image, classes: 1 / 0, lambda: 3])
def test_nonsense_of_a_detector(clip: Path, nonsense: Any, caplog: pytest.LogCaptureFixture) -> None:
    watched = track_streams([clip], CLASSES, model=nonsense, every=15)
    found = list(watched)
    check_frames(found, range(48))
    assert watched.keyframe_detector.failed == 5
    assert "street.mp4" in caplog.text


@pytest.mark.parametrize(
    ("class_ids", "box"),
    [
        ([0, 5], [1, 2, 30, 40]),
        ([0, -1], [1, 2, 30, 40]),
        ([0, 1], [np.nan, 2, 30, 40]),
        ([0, 1], [400, 2, 430, 40]),
        ([0, 1], [90, 90, 50, 50]),
    ],
    ids=["class too high", "class below 0", "NaN", "outside", "inverted"],
)
def test_wrong_detections(clip: Path, class_ids: list[int], box: list[float]) -> None:
    def detector(image: np.ndarray, classes: Sequence[str]) -> sv.Detections:
        return sv.Detections(np.array([[50, 50, 90, 90], box], np.float32), class_id=np.array(class_ids))

    found = list(track_streams([clip], CLASSES, model=detector, every=5))
    check_frames(found, range(48))
    names = {name for t in found for name in np.asarray(t.detections.data["class_name"]).tolist()}
    assert names <= {"dog"}  # at most what is right with them


def test_detections_without_scores_and_with_more(clip: Path) -> None:
    def detector(image: np.ndarray, classes: Sequence[str]) -> sv.Detections:
        return sv.Detections(
            xyxy=np.array([[50, 50, 90, 90]], float),
            class_id=np.array([1]),
            mask=np.zeros((1, *image.shape[:2]), bool),
            data={"class_name": np.array(["another name"]), "extra": np.array([3])},
            metadata={"more": 1},
        )

    found = list(track_streams([clip], CLASSES, model=detector, every=5))
    check_frames(found, range(48))
    assert all(t.detections.confidence is not None and t.detections.confidence.tolist() == [1.0] for t in found)
    sv.Detections.merge([t.detections for t in found])


def test_one_frame(tmp_path: Path, images: list[np.ndarray]) -> None:
    path = write_clip(tmp_path / "one.mp4", images[7:8])
    every: Any
    for every in (1, 5, "auto"):
        (found,) = track_streams([path], CLASSES, model=Known(*WALKERS), every=every)
        check_frames([found], [7])
        assert found.is_keyframe
        assert [ids_of(walker, [found]) for walker in WALKERS] == [[1], [3], [2]]


@pytest.mark.parametrize("every", [5, 15, "auto"])
def test_more_frames_than_may_be_held(every: Any, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = 3 * SIZE[0] * SIZE[1] * 3
    monkeypatch.setattr(stream, "MAX_HELD_BYTES", held)
    read = []

    def counted(source: Any) -> Iterator[np.ndarray]:
        for frame in source:
            read.append(frame.index)
            yield frame

    found: list[TrackedFrame] = []
    with open_source(clip) as source:
        for tracked in track_streams([counted(source)], CLASSES, model=Known(*WALKERS, seconds=0.02), every=every):
            found.append(tracked)
            assert len(read) - len(found) <= 4
    check_frames(found, range(48))
    if every == 5:
        assert all(len(t.detections) == 3 for t in found[10:])
        assert all(set(ids_of(walker, found[10:], 6)) == {i} for walker, i in zip(WALKERS, (1, 3, 2), strict=True))


@pytest.mark.parametrize(("bridge", "most"), [(0.0, 60), (0.7, 71), (2.0, 110)])
def test_frames_wait_for_two_keyframes_and_the_bridge(bridge: float, most: int, images: list[np.ndarray]) -> None:
    read: list[int] = []

    def counted() -> Iterator[np.ndarray]:
        for number, image in enumerate(images):
            read.append(number)
            yield image

    given = [0]
    tracking = Tracking(bridge_seconds=bridge)
    for tracked in track_streams([counted()], CLASSES, model=Known(*WALKERS), every=10, tracking=tracking):
        given.append(tracked.frame.index)
        assert len(read) - given[-1] <= most
    assert len(given) == len(images) + 1


def test_a_slow_detector_drops_nothing(clip: Path) -> None:
    read_meanwhile = []
    detector = Known(*WALKERS, seconds=0.06)

    def read() -> Iterator[Frame]:
        with open_source(clip) as source:
            for frame in source:
                read_meanwhile.append(detector.busy)
                yield frame

    check_frames(list(track_streams([read()], CLASSES, model=detector, every=4)), range(48))
    assert any(read_meanwhile)


@pytest.mark.parametrize("kind", ["callable", "Detector"])
def test_looking_goes_on_while_frames_are_drawn(kind: str, images: list[np.ndarray]) -> None:
    changed, drawn, drawn_meanwhile = threading.Condition(), 0, 0

    def until_drawn(seconds: float) -> None:
        """Return when a frame is drawn, or soon: the next one may need this call."""
        with changed:
            changed.notify_all()
            before = drawn
            changed.wait_for(lambda: drawn > before, 0.05)

    detector: Any = Known(sleep=until_drawn) if kind == "callable" else Counting(ColorModel(), sleep=until_drawn)
    for _ in track_streams([images[:96]], ["red"], model=detector, every=4):
        with changed:
            drawn_meanwhile += changed.wait_for(lambda: bool(detector.busy), 0.05)  # or soon: it may need this one
            drawn += 1
            changed.notify_all()
    assert drawn == 96
    assert drawn_meanwhile >= 3  # of some 20 keyframes


def test_a_file_is_decoded_ahead(clip: Path) -> None:
    tracking = Tracking(bridge_seconds=0.0)
    with track_streams([clip], CLASSES, model=Known(*WALKERS), every=1, tracking=tracking) as watched:
        next(watched)
        position = watched.sources[0]._given  # type: ignore[attr-defined]
        until(lambda: watched.sources[0]._given > position)  # type: ignore[attr-defined]
        time.sleep(0.3)
        assert watched.sources[0]._given < 20  # type: ignore[attr-defined]


def test_a_clip_with_truth() -> None:
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
def test_random_traffic(tracker: str, every: int, images: list[np.ndarray]) -> None:
    rng = np.random.default_rng(every)
    places, speeds = rng.uniform((0, 0), SIZE, (8, 2)), rng.normal(0, 3, (8, 2))
    sizes, kinds = rng.uniform(8, 60, (8, 2)), rng.integers(0, 2, 8)

    def detector(image: np.ndarray, classes: Sequence[str]) -> sv.Detections:
        middles = (places + speeds * number_of(image)) % (2 * np.array(SIZE))
        middles = np.minimum(middles, 2 * np.array(SIZE) - middles)  # they turn at the edge
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
        check_contract(tracked.detections)  # among others that no number is there twice
        ids, class_ids = tracked.detections.tracker_id, tracked.detections.class_id
        assert ids is not None
        assert class_ids is not None
        for tracker_id, class_id in zip(ids.tolist(), class_ids.tolist(), strict=True):
            classes_of.setdefault(tracker_id, set()).add(class_id)
    assert all(len(kinds) == 1 for kinds in classes_of.values())


def test_the_tiny_model_on_a_file(tmp_path: Path) -> None:
    scene = tracking_clip(1)
    pictures = [scene.frame(i)[0][::2, ::2, ::-1] for i in range(12)]
    path = write_clip(tmp_path / "scene.mp4", pictures)
    found = list(track_streams([path], scene.class_names, model="tiny", device="cpu", every=5))
    assert [t.frame.index for t in found] == list(range(12))
    assert sum(len(t.detections) for t in found) > 0
    sv.Detections.merge([t.detections for t in found])


# Cuts and sizes ----------------------------------------------------------------------------------------------------


def corner(image: np.ndarray) -> int:
    """The number that `two_scenes` writes into a corner."""
    return number_of(image[:24, :128])


def two_scenes() -> list[np.ndarray]:
    """23 frames of one scene, 25 of another one."""
    frames = []
    for number in range(48):
        coarse = np.random.default_rng(number >= 23).integers(0, 256, (4, 6, 3), dtype=np.uint8)
        frames.append(cv2.resize(coarse, SIZE, interpolation=cv2.INTER_CUBIC))
        frames[-1][:24, :128] = numbered(number, (128, 48))[:24]
    return frames


@pytest.mark.parametrize("scene_change", [True, False])
def test_a_cut(scene_change: bool, tmp_path: Path) -> None:
    thing = Thing("dog", (160, 100))
    path = write_clip(tmp_path / "cut.mp4", two_scenes())
    detector = Known(thing, tell=corner)
    found = list(track_streams([path], CLASSES, model=detector, every=10, tracking=Tracking(scene_change=scene_change)))
    check_frames(found, range(48), corner)
    ids = ids_of(thing, found, tell=corner)
    if scene_change:
        assert ids == [1] * 23 + [2] * 25
        assert detector.keyframes == [0, 10, 20, 22, 23, 33, 43, 47]
    else:
        assert ids == [1] * 48
        assert detector.keyframes == [0, 10, 20, 30, 40, 47]


def test_nothing_is_bridged_over_a_cut() -> None:
    before, after = Thing("dog", (100, 100), seen=range(23)), Thing("dog", (110, 100), seen=range(23, 48))
    detector = Known(before, after, tell=corner)
    found = list(track_streams([two_scenes()], CLASSES, model=detector, every=15, tracking=Tracking(scene_change=True)))
    assert ids_of(before, found, tell=corner) == [1] * 23 + [None] * 25
    assert ids_of(after, found, tell=corner) == [None] * 23 + [2] * 25


def test_frames_of_another_size(images: list[np.ndarray]) -> None:
    thing = Thing("dog", (100, 60))
    mixed = [*images[:12], *(numbered(n, (256, 128)) for n in range(12, 20)), *images[20:33]]
    detector = Known(thing)
    found = list(track_streams([mixed], CLASSES, model=detector, every=5))
    assert [number_of(t.frame.image) for t in found] == list(range(33))
    assert [t.frame.image.shape[1] for t in found] == [320] * 12 + [256] * 8 + [320] * 13
    for tracked in found:
        check_contract(tracked.detections, (tracked.frame.image.shape[1], tracked.frame.image.shape[0]))
    assert ids_of(thing, found) == [1] * 12 + [2] * 8 + [3] * 13
    assert detector.keyframes == [0, 5, 10, 11, 12, 17, 19, 20, 25, 30, 32]


def test_frames_that_share_their_time(images: list[np.ndarray]) -> None:
    frames = [Frame(image, 0, float(i // 10)) for i, image in enumerate(images[:40])]
    found = list(track_streams([frames], CLASSES, model=Known(*WALKERS), every=3))
    assert [number_of(t.frame.image) for t in found] == list(range(40))
    for tracked in found:
        check_contract(tracked.detections)


# Sources that break off ----------------------------------------------------------------------------------------------


def broken(images: Sequence[np.ndarray], error: BaseException) -> Iterator[np.ndarray]:
    yield from images
    raise error


@pytest.mark.parametrize(
    "every",
    [
        5,
        1000,
    ],
)
def test_frames_before_the_source_breaks_off_come_first(every: int, images: list[np.ndarray]) -> None:
    found: list[TrackedFrame] = []
    watched = track_streams([broken(images[:23], OSError("no more"))], CLASSES, model=Known(*WALKERS), every=every)
    with pytest.raises(OSError, match="no more"):
        found.extend(watched)
    assert [number_of(t.frame.image) for t in found] == list(range(23))


def test_a_source_that_breaks_off_raises_and_ends(images: list[np.ndarray]) -> None:
    before = our_threads()
    watched = track_streams([broken(images[:23], OSError("no more"))], CLASSES, model=Known(*WALKERS), every=5)
    with pytest.raises(OSError, match="no more"):
        list(watched)
    assert list(watched) == []
    until(lambda: our_threads() <= before)


def test_a_file_behind_http(clip: Path) -> None:
    with serving(lambda reply: reply.send_file(clip.read_bytes(), "video/mp4")) as address:
        watched = track_streams([f"{address}/street.mp4"], CLASSES, model=Known(*WALKERS), every=5)
        assert not watched.sources[0].live
        found = list(watched)
    check_frames(found, range(48))
    assert [set(ids_of(walker, found)) for walker in WALKERS] == [{1}, {3}, {2}]


def test_a_folder_of_images(tmp_path: Path, images: list[np.ndarray]) -> None:
    for number in range(12):
        cv2.imwrite(str(tmp_path / f"img{number}.png"), images[number])
    (tmp_path / "img3.png").write_bytes(b"no picture")
    found = list(track_streams([tmp_path], CLASSES, model=Known(*WALKERS), every=5))
    assert [number_of(t.frame.image) for t in found] == [0, 1, 2, *range(4, 12)]


# Live --------------------------------------------------------------------------------------------------------------


class Camera:
    """Shows frames at a rate, wherever anyone looks or not.

    Attributes:
        shown: The number of the newest frame.
    """

    def __init__(self, images: Sequence[np.ndarray], rate: float = 40.0, count: int = 10_000) -> None:
        self.images, self.rate, self.count = images, rate, count
        self.shown = -1

    def __call__(self, reader: LiveReader) -> Iterator[np.ndarray]:
        reader.fps = self.rate
        start = time.monotonic()
        for number in range(self.count):
            time.sleep(max(0.0, start + number / self.rate - time.monotonic()))
            self.shown = number
            yield self.images[number % len(self.images)]

    def open(self) -> LiveReader:
        return LiveReader(self, name="the camera at the door", **TIMES)


class Stepped(Camera):
    """Shows a frame whenever the test says so, at the times of a camera of that rate."""

    def __init__(self, images: Sequence[np.ndarray], monkeypatch: pytest.MonkeyPatch, rate: float = 40.0) -> None:
        super().__init__(images, rate)
        self._steps = threading.Semaphore(1)
        monkeypatch.setattr(live, "time", SimpleNamespace(monotonic=lambda: max(0, self.shown) / rate))

    def __call__(self, reader: LiveReader) -> Iterator[np.ndarray]:
        reader.fps = self.rate
        while not reader._closing.is_set():
            if self._steps.acquire(timeout=0.01):
                self.shown += 1
                yield self.images[self.shown % len(self.images)]

    def step(self) -> None:
        self._steps.release()


def test_a_live_source_comes_out_at_once(images: list[np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    detector = Known(Thing("dog", (100, 100)), sleep=lambda seconds: go.wait(240) and None)
    camera = Stepped(images, monkeypatch)
    found: list[TrackedFrame] = []
    with track_streams([camera.open()], CLASSES, model=detector) as watched:
        for number in range(200):
            if number > 0:
                camera.step()
            found.append(next(watched))  # no later frame is needed for it
            assert number_of(found[-1].frame.image) == camera.shown == number
            assert watched.keyframe_detector.backlog <= 1
            if number < 40:
                assert detector.keyframes in ([], [0])  # frames go on coming while the detector is at it
            elif number == 40:
                go.set()
                until(lambda: watched.keyframe_detector.detections_run > 0)
            elif len(found[-1].detections) > 0:
                break
    for tracked in found:
        check_contract(tracked.detections)
    shown = [len(tracked.detections) for tracked in found]
    assert shown[:40] == [0] * 40
    assert shown[-1] == 1  # what is known is shown from then on
    assert shown == sorted(shown)


def test_predicted_boxes_move(images: list[np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    thing = Thing("dog", (40, 60), (2.0, 0.4))
    camera = Stepped(images, monkeypatch)
    due = threading.Semaphore(0)
    detector = Known(thing, sleep=lambda seconds: due.acquire(timeout=240) and None)
    found: list[TrackedFrame] = []
    with track_streams([camera.open()], CLASSES, model=detector) as watched:
        for number in range(90):
            if number > 0:
                camera.step()
            found.append(next(watched))
            if number % 10 == 9:  # a call takes the time of about ten frames
                until(lambda: watched.keyframe_detector.backlog == 1)
                looked = watched.keyframe_detector.detections_run
                due.release()
                until(lambda looked=looked: watched.keyframe_detector.detections_run > looked)
        due.release()
    late = [t for t in found if number_of(t.frame.image) > 50]
    assert len(late) > 15
    assert all(len(t.detections) == 1 for t in late)
    assert [set(ids_of(thing, [t], 12)) for t in late].count({1}) > 0.8 * len(late)
    lefts = np.array([t.detections.xyxy[0, 0] for t in late])
    assert (np.diff(lefts) > 0).mean() > 0.8
    assert not any(t.is_keyframe for t in late)


@pytest.mark.parametrize("seconds", [0.0, 0.1])
def test_every_frame_of_a_live_source_waits_for_its_own(
    seconds: float, images: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    camera, detector = Stepped(images, monkeypatch), Known(*WALKERS, seconds=seconds)
    found: list[TrackedFrame] = []
    with track_streams([camera.open()], CLASSES, model=detector, every=1) as watched:
        for number in range(12):
            if number > 0:
                camera.step()
            found.append(next(watched))
            assert number_of(found[-1].frame.image) == camera.shown == number
    assert all(t.is_keyframe for t in found)
    assert detector.keyframes[:12] == [number_of(t.frame.image) for t in found]
    for walker in WALKERS:
        assert None not in ids_of(walker, found, 0.01)
        assert len({*ids_of(walker, found)}) == 1


def test_a_live_source_at_an_interval(images: list[np.ndarray]) -> None:
    detector = Known(*WALKERS)
    with track_streams([Camera(images).open()], CLASSES, model=detector, every=10) as watched:
        found = list(islice(watched, 45))
    numbers = [number_of(t.frame.image) for t in found]
    assert detector.keyframes == [numbers[i] for i in (0, 10, 20, 30, 40)]


def test_a_live_source_that_dies(images: list[np.ndarray]) -> None:
    before = our_threads()
    found: list[TrackedFrame] = []
    watched = track_streams([Camera(images, count=15).open()], CLASSES, model=Known(*WALKERS))
    with pytest.raises(VideoError, match="the camera at the door is gone"):
        found.extend(watched)
    assert number_of(found[-1].frame.image) == 14
    assert list(watched) == []
    until(lambda: our_threads() <= before)


def test_a_live_source_whose_detector_raises(images: list[np.ndarray], caplog: pytest.LogCaptureFixture) -> None:
    every: Any
    for every in (1, "auto"):
        caplog.clear()
        detector = Known(fails=lambda number: True)
        with track_streams([Camera(images).open()], CLASSES, model=detector, every=every) as watched:
            found = list(islice(watched, 10))
        assert not any(t.is_keyframe or len(t.detections) for t in found)
        assert "the camera at the door: the detector failed on frame 0" in caplog.text


def test_a_live_source_of_changing_size(images: list[np.ndarray]) -> None:
    small = [numbered(n, (256, 128)) for n in range(10, 20)]
    camera = Camera([*images[:10], *small], rate=60)
    with track_streams([camera.open()], CLASSES, model=Known(Thing("dog", (100, 60))), every=1) as watched:
        found = list(islice(watched, 30))
    for tracked in found:
        height, width = tracked.frame.image.shape[:2]
        check_contract(tracked.detections, (width, height))
        assert len(tracked.detections) == 1


def test_cuts_of_a_live_source_do_not_pile_up() -> None:
    scenes = two_scenes()
    camera, detector = Camera([scenes[10], scenes[40]]), Known(seconds=0.6, tell=corner)
    with track_streams([camera.open()], CLASSES, model=detector, tracking=Tracking(scene_change=True)) as watched:
        for _ in islice(watched, 20):
            pass
        assert watched.keyframe_detector.backlog <= 2


def test_an_mjpeg_stream(images: list[np.ndarray]) -> None:
    def answer(reply: Reply) -> None:
        reply.start_mjpeg()
        for image in images:
            reply.send_jpeg(image, 0.02)

    with (
        serving(answer) as address,
        track_streams([f"{address}/?token=abc"], CLASSES, model=Known(*WALKERS)) as watched,
    ):
        found = list(islice(watched, 20))
    numbers = [number_of(t.frame.image) for t in found]
    assert numbers == sorted(set(numbers))
    assert watched.sources[0].name.endswith("token=...")


# Ending in the middle ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize("seconds", [0.0, 1.5])
def test_closing_in_the_middle(live: bool, seconds: float, clip: Path, images: list[np.ndarray]) -> None:
    before = our_threads()
    detector = Known(*WALKERS, seconds=seconds)
    watched = track_streams([Camera(images).open() if live else clip], CLASSES, model=detector, every=20)
    next(watched)
    watched.close()
    looked = len(detector.keyframes)
    assert list(watched) == []
    watched.close()
    until(lambda: our_threads() <= before)
    assert len(detector.keyframes) <= looked + 1  # no keyframe but the one that was just taken


def test_leaving_several_in_the_middle(clip: Path, images: list[np.ndarray]) -> None:
    before = our_threads()
    sources = [clip, Camera(images).open(), images, clip]
    detector = Known(*WALKERS)
    with track_streams(sources, CLASSES, model=detector, every=5) as watched:
        list(islice(watched, 10))
    looked = len(detector.keyframes)
    assert list(watched) == []
    until(lambda: our_threads() <= before)
    assert len(detector.keyframes) <= looked + 1  # no keyframe but the one that was just taken


def test_a_watch_that_nobody_iterates(clip: Path, images: list[np.ndarray]) -> None:
    before = our_threads()
    camera = Camera(images).open()
    track_streams([clip, camera], CLASSES, model=Known())
    track(clip, CLASSES, model=Known())
    gc.collect()
    assert camera._closing.is_set()
    until(lambda: our_threads() <= before)


@pytest.mark.parametrize("live", [True, False])
def test_closing_from_another_thread(live: bool, images: list[np.ndarray]) -> None:
    def slowly() -> Iterator[np.ndarray]:
        for image in images:
            yield image
            time.sleep(0.02)

    # At 0.5 s the first frame is being looked at, two others wait for that, and the loop waits for the first one.
    detector = Known(seconds=0.0 if live else 1.0)
    watched = track_streams([Camera(images, rate=0.5).open() if live else slowly()], CLASSES, model=detector, every=3)
    errors = []

    def close() -> None:
        try:
            watched.close()
        except BaseException as error:
            errors.append(error)

    timer = threading.Timer(0.5, close)
    timer.start()
    try:
        found = list(watched)
    finally:
        timer.join()
    assert len(found) < len(images)  # they end before the source
    assert errors == []


def test_leaving_early_does_not_close_the_model_under_the_detector(
    images: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
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
    watched = track_streams([images], ["red"], model="colours", every=1)
    for _ in watched:
        if running.is_set():
            break
    watched.close()
    until(lambda: not watched.keyframe_detector._thread.is_alive())
    assert model.closed
    assert not any(closed_in_use)


# Several sources -----------------------------------------------------------------------------------------------------


class Counting(Detector):
    """A `Detector` that records with how many frames it is called.

    Attributes:
        sizes: Of the calls.
        busy: Whether it is at it.
    """

    def __init__(
        self, *args: Any, seconds: float = 0.0, sleep: Callable[[float], None] = time.sleep, **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self.sizes: list[int] = []
        self.busy = False
        self._seconds, self._sleep = seconds, sleep

    def __call__(self, frame: Any, classes: Any) -> Any:
        self.sizes.append(len(frame) if isinstance(frame, list) else 1)
        self.busy = True
        self._sleep(self._seconds)
        self.busy = False
        return super().__call__(frame, classes)


def red_squares(count: int, left: int, speed: int) -> list[np.ndarray]:
    frames = []
    for number in range(count):
        image = np.full((96, 160, 3), 90, np.uint8)
        image[40:60, left + speed * number : left + speed * number + 20] = (0, 0, 255)
        frames.append(image)
    return frames


def by_source(found: Sequence[TrackedFrame], count: int) -> list[list[TrackedFrame]]:
    return [[t for t in found if t.source == number] for number in range(count)]


@pytest.mark.parametrize("names", ["abcd", "aaaa"])
def test_several_sources_share_one_model(names: str) -> None:
    detector = Counting(ColorModel(), seconds=0.01)
    sources = [open_source(red_squares(40, 10 + 10 * i, 2)) for i in range(4)]
    for source, name in zip(sources, names, strict=True):
        source.name = name
    watched = track_streams(sources, ["red", "blue"], model=detector, every=3)
    found = by_source(list(watched), 4)
    assert sum(detector.sizes) == watched.keyframe_detector.detections_run == 4 * 14
    for number, each in enumerate(found):
        assert [t.frame.index for t in each] == list(range(40))
        for tracked in each:
            left = 10 + 10 * number + 2 * tracked.frame.index
            np.testing.assert_allclose(tracked.detections.xyxy, [[left, 40, left + 20, 60]], atol=1.0)
            assert tracked.detections.tracker_id is not None
            assert tracked.detections.tracker_id.tolist() == [1]  # of each source
    assert max(detector.sizes) > 1


def test_one_that_fails_does_not_stop_the_others(
    images: list[np.ndarray], clip: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sources = [clip, broken(images[:20], VideoError("the second one broke off")), images[:60]]
    found: list[TrackedFrame] = []
    watched = track_streams(sources, CLASSES, model=Known(*WALKERS), every=5)
    with pytest.raises(VideoError, match="the second one broke off"):
        found.extend(watched)
    assert [len(each) for each in by_source(found, 3)][::2] == [48, 60]
    assert "the second one broke off" in caplog.text
    assert list(watched) == []


def test_a_live_one_among_files(images: list[np.ndarray], clip: Path) -> None:
    found: list[TrackedFrame] = []
    sources = [Camera(images, count=20).open(), clip]
    with pytest.raises(VideoError, match="the camera at the door is gone"):
        found.extend(track_streams(sources, CLASSES, model=Known(*WALKERS), every=5))
    live, file = by_source(found, 2)
    check_frames(file, range(48))
    numbers = [number_of(t.frame.image) for t in live]
    assert numbers == sorted(set(numbers))
    assert numbers[-1] == 19


def test_a_detector_that_always_raises_on_several(clip: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = list(track_streams([clip, clip], CLASSES, model=Known(fails=lambda number: True), every=5))
    assert [len(each) for each in by_source(found, 2)] == [48, 48]


def test_all_sources_are_closed_where_one_cannot_be_opened(images: list[np.ndarray]) -> None:
    before = our_threads()
    camera = Camera(images).open()
    with pytest.raises(VideoError, match=r"nowhere\.mp4"):
        track_streams([camera, "nowhere.mp4"], CLASSES, model=Known())
    assert camera._closing.is_set()
    with pytest.raises(MoondreamError):
        track_streams([Camera(images).open()], CLASSES, model="/no/such/folder")
    until(lambda: our_threads() <= before)


# track -----------------------------------------------------------------------------------------------------------


@pytest.mark.compat
def test_track_gives_images_and_detections(clip: Path) -> None:
    pairs = list(track(str(clip), CLASSES, model=Known(*WALKERS), every=5))
    assert [number_of(image) for image, _ in pairs] == list(range(48))
    for image, detections in pairs:
        assert image.dtype == np.uint8
        assert image.shape == (SIZE[1], SIZE[0], 3)
        check_contract(detections)
    expected = list(track_streams([clip], CLASSES, model=Known(*WALKERS), every=5))
    assert all(d == t.detections for (_, d), t in zip(pairs, expected, strict=True))


@pytest.mark.parametrize("how", ["close", "forget"])
def test_abandoning_a_track(how: str, images: list[np.ndarray]) -> None:
    before = our_threads()
    camera = Camera(images).open()
    frames = track(camera, CLASSES, model=Known(*WALKERS))
    next(frames)
    if how == "close":
        frames.close()  # type: ignore[attr-defined]
    del frames
    assert camera._closing.is_set()
    until(lambda: our_threads() <= before)


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
        ({"source": 3.5}, "frames come from a path"),
        ({"source": -1}, "webcam's index"),
        ({"model": Known(), "confidence": 2.0}, "confidence"),
    ],
)
def test_wrong_arguments_are_told_at_the_call(wrong: dict[str, Any], message: str, clip: Path) -> None:
    arguments = {"source": clip, "classes": CLASSES, "model": Known(*WALKERS), **wrong}
    before = our_threads()
    with pytest.raises(ValueError, match=message):
        track(arguments.pop("source"), arguments.pop("classes"), **arguments)
    until(lambda: our_threads() <= before)


@pytest.mark.parametrize("seconds", [-1.0, float("nan")])
def test_negative_lost_track_seconds_are_rejected(seconds: float) -> None:
    with pytest.raises(ValueError, match=f"lost_track_seconds must be 0 or more seconds, got {seconds}"):
        Tracking(lost_track_seconds=seconds)


@pytest.mark.parametrize("sources", ["street.mp4", [], None, 0, b"street.mp4"])
def test_sources_are_a_list(sources: Any) -> None:
    with pytest.raises(ValueError, match="sources must be a list with at least one source, got "):
        track_streams(sources, CLASSES, model=Known())


def test_a_file_that_is_not_there_is_told_at_the_call() -> None:
    with pytest.raises(VideoError, match=r"nowhere\.mp4"):
        track("nowhere.mp4", CLASSES, model=Known())


@pytest.mark.parametrize("tracker", ["sort", "ocsort", "bytetrack", "botsort"])
@pytest.mark.compat
def test_all_trackers(tracker: str, clip: Path) -> None:
    found = list(track_streams([clip], CLASSES, model=Known(*WALKERS), every=5, tracking=Tracking(tracker)))
    check_frames(found, range(48))
    assert all(len(set(ids_of(walker, found))) == 1 for walker in WALKERS)


def test_a_tracker_of_ones_own(clip: Path) -> None:
    import trackers

    made = []

    def make() -> Any:
        made.append(trackers.SORTTracker(minimum_consecutive_frames=1, minimum_iou_threshold=0.01))
        return made[-1]

    found = list(track_streams([clip], CLASSES, model=Known(*WALKERS), every=5, tracking=Tracking(make)))
    check_frames(found, range(48))
    assert len(made) == 2  # one a class


def test_whose_model_is_closed(images: list[np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[ColorModel] = []

    def load_colours(name: str, device: str | None = None) -> ColorModel:
        assert (name, device) == ("colours", "cpu")
        loaded.append(ColorModel())
        return loaded[-1]

    monkeypatch.setattr(loading, "load", load_colours)
    expected = [d for _, d in track(images[:12], ["red"], model="colours", device="cpu", every=5)]
    assert [model.closed for model in loaded] == [True]
    assert len(expected) == 12
    model = ColorModel()
    for passed in (model, Detector(model)):
        assert [d for _, d in track(images[:12], ["red"], model=passed, every=5)] == expected
        frames = track(images[:12], ["red"], model=passed, every=5)
        next(frames)
        del frames
        assert not model.closed


def test_confidence_counts_for_a_model(images: list[np.ndarray]) -> None:
    everything = [len(d) for _, d in track(images[:6], ["red"], model=ColorModel(), every=5)]
    sure = [len(d) for _, d in track(images[:6], ["red"], model=ColorModel(), every=5, confidence=1.0)]
    assert all(few <= many for few, many in zip(sure, everything, strict=True))
    assert everything == [1] * 6


def test_a_passed_model_stays_open(images: list[np.ndarray]) -> None:
    with load("tiny", device="cpu", dtype="float32") as model:
        assert len(list(track(images[:3], ["dog"], model=model, every=5))) == 3
        model.detect(images[0], "dog")
