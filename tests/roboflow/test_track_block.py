"""Test `moondream_cv/track@v1` frame by frame: keyframes and track IDs."""

from __future__ import annotations

import gc
import itertools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import cv2
import numpy as np
import pytest
import supervision as sv

from moondream_cv.engine.local_model import LocalModel
from moondream_cv.requests import ErrorResult, Request, Result
from moondream_cv.scenes import render_clip
from moondream_cv.scenes.clips import Clip, TrackedObject
from moondream_cv.video.tracking.tracker import Tracker
from moondream_cv_blocks import ModelPool
from tests.helpers.roboflow_app import skip_without_server
from tests.helpers.workflows import compile_workflow, run_engine, step, video_frame, workflow

skip_without_server()
pytestmark = pytest.mark.roboflow

NAMES = ["dog", "red circle"]
EVERY = 5
APART, CROSSING, RETURNING = 1, 0, 3  # seeds of clips; all objects of the first are visible for `ALL_VISIBLE` frames
ALL_VISIBLE = 31
BETWEEN = range(EVERY + 1, 2 * EVERY)  # frames after the second keyframe, from which on the speed is known


class FailingModel:
    """A model that counts its requests, and fails in some calls.

    Attributes:
        call_sizes: Number of requests of each call.
        fails: Function that returns whether a call, by its index, fails.
        raises: Raise in a failing call, instead of returning an error for each request.
    """

    def __init__(self, model: LocalModel) -> None:
        self.model, self.skills, self.has_scores = model, model.skills, model.has_scores
        self.call_sizes: list[int] = []
        self.fails: Callable[[int], bool] = lambda call: False
        self.raises = False

    def run(self, requests: Sequence[Request]) -> list[Result]:
        call = len(self.call_sizes)
        self.call_sizes.append(len(requests))
        if not self.fails(call):
            return self.model.run(requests)
        if self.raises:
            raise RuntimeError("internal failure")
        return [ErrorResult(RuntimeError("internal failure")) for _ in requests]

    def close(self) -> None:
        """Do nothing; the model is shared."""


class Player:
    """A workflow of one track step, called with frames and parameters.

    Attributes:
        model: Model of the step.
    """

    def __init__(self, model: LocalModel, parameters: Sequence[str] = (), **fields: Any) -> None:
        self.model = FailingModel(model)
        pool = ModelPool()
        pool.add("tiny", self.model)
        definition = workflow(step("track", **{"class_names": NAMES, "every": EVERY, **fields}), parameters=parameters)
        self._engine = compile_workflow(definition, **{"moondream_cv_blocks.models": pool})

    def __call__(self, *frames: Any, **parameters: Any) -> list[dict[str, Any]]:
        return run_engine(self._engine, list(frames), **parameters)

    def runs_model(self, *frames: Any, **parameters: Any) -> bool:
        """Run frames, and return whether the model ran on any of them."""
        before = len(self.model.call_sizes)
        self(*frames, **parameters)
        return len(self.model.call_sizes) > before


Play = Callable[..., Player]


def video(clip: Clip, source: str = "camera", first: int = 1) -> Iterator[dict[str, Any]]:
    """Yield the frames of a clip as video frames with numbers from `first`."""
    for number, (rgb, _) in enumerate(clip, first):
        yield video_frame(np.ascontiguousarray(rgb[..., ::-1]), number, source)


def tracked(outputs: dict[str, Any]) -> sv.Detections:
    """Return the tracks of a frame that did not fail."""
    assert (outputs["error_status"], outputs["error_message"]) == (False, "")
    detections: sv.Detections = outputs["tracked_detections"]
    return detections


def track_ids(outputs: dict[str, Any], name: str = "tracked_detections") -> list[int]:
    return outputs[name].tracker_id.tolist()  # type: ignore[no-any-return]


def named(detections: sv.Detections, name: str) -> np.ndarray:
    """Return the boxes of a class, [N, 4]."""
    return detections.xyxy[detections.data["class_name"] == name]


def true_ids(detections: sv.Detections, truth: Sequence[TrackedObject]) -> dict[int, int]:
    """Return the true ID of the object of the same class with the highest IoU, for each track ID."""
    ids = {}
    for index, track_id in enumerate(detections.tracker_id.tolist()):
        candidates = [item for item in truth if item.name == detections.data["class_name"][index]]
        overlaps = sv.box_iou_batch(detections.xyxy[[index]], np.array([item.xyxy for item in candidates]))[0]
        assert overlaps.max() > 0, (track_id, detections.xyxy[index], candidates)
        ids[track_id] = candidates[int(overlaps.argmax())].track_id
    return ids


@pytest.fixture
def play(tiny: LocalModel) -> Play:
    """Return a function that compiles a workflow with the given fields of its step."""
    return lambda **options: Player(tiny, **options)


@pytest.fixture(scope="module", params=[APART, CROSSING, RETURNING], ids=["apart", "crossing", "returning"])
def clip(request: pytest.FixtureRequest) -> Clip:
    return rendered(request.param)


@pytest.fixture(scope="module")
def apart() -> Clip:
    return rendered(APART)


def rendered(seed: int) -> Clip:
    return render_clip(seed, num_frames=40, names=["dog", "red circle", "dog"], resolution_wh=(320, 240))


@pytest.fixture(scope="module")
def frames(apart: Clip) -> list[np.ndarray]:
    """Return BGR frames, [240, 320, 3]."""
    return [np.ascontiguousarray(rgb[..., ::-1]) for rgb, _ in apart]


# --- Keyframes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 3, EVERY, 100])
def test_model_runs_on_every_nth_frame(play: Play, apart: Clip, every: int) -> None:
    player = play(every=every)
    keyframes = [player.runs_model(frame) for frame in video(apart)]
    assert keyframes == [index % every == 0 for index in range(len(apart))]
    assert set(player.model.call_sizes) == {len(NAMES)}


def test_keyframes_follow_frame_numbers_if_frames_are_dropped(
    play: Play, apart: Clip, frames: list[np.ndarray]
) -> None:
    player = play()
    keyframes = {1: True, 2: False, 4: False, 9: True, 10: False, 13: False, 14: True, 30: True}
    owners: set[tuple[int, int]] = set()
    for number, due in keyframes.items():
        before = len(player.model.call_sizes)
        (outputs,) = player(video_frame(frames[number - 1], number))
        assert (len(player.model.call_sizes) > before) == due, number
        owners |= true_ids(tracked(outputs), apart.frame(number - 1)[1]).items()
    assert len(owners) == len(apart.names)


UNNUMBERED: dict[str, Callable[[np.ndarray], Any]] = {
    "array": lambda image: image,
    "number of the first frame on all": lambda image: video_frame(image, 1),
}


@pytest.mark.parametrize("form", UNNUMBERED)
def test_runs_are_consecutive_frames_without_frame_numbers(play: Play, frames: list[np.ndarray], form: str) -> None:
    player, other = play(), play()
    for index, image in enumerate(frames):
        before = len(player.model.call_sizes)
        (outputs,), (expected,) = player(UNNUMBERED[form](image)), other(video_frame(image, index))
        assert (len(player.model.call_sizes) > before) == (index % EVERY == 0)
        assert track_ids(outputs) == track_ids(expected)
        assert np.allclose(tracked(outputs).xyxy, tracked(expected).xyxy, atol=0.01)


def test_arrays_of_a_batch_are_separate_sources(play: Play, frames: list[np.ndarray]) -> None:
    player = play()
    for index, (image, other) in enumerate(zip(frames, reversed(frames), strict=True)):
        assert player.runs_model(image, other) == (index % EVERY == 0)
    assert set(player.model.call_sizes) == {2 * len(NAMES)}


def test_restarted_source_gets_new_track_ids(play: Play, frames: list[np.ndarray]) -> None:
    player, given = play(), []
    for _ in range(3):
        first = [player(video_frame(image, number))[0] for number, image in enumerate(frames[:8], 1)]
        assert track_ids(first[0]) == track_ids(first[0], "new_instances") == track_ids(first[-1])
        assert len(first[0]["already_seen_instances"]) == 0
        given.append(track_ids(first[0]))
    assert given == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    assert len(player.model.call_sizes) == 3 * 2


def test_changed_resolution_restarts_tracking(play: Play, frames: list[np.ndarray]) -> None:
    player = play()
    player(video_frame(frames[0], 1))
    small = cv2.resize(frames[1], (160, 120))
    (outputs,) = player(video_frame(small, 2))
    assert len(player.model.call_sizes) == 2
    assert min(track_ids(outputs, "new_instances")) > len(NAMES) + 1
    assert len(tracked(outputs)) == len(track_ids(outputs, "new_instances"))
    assert tracked(outputs).xyxy.max() <= 160
    assert not player.runs_model(video_frame(small, 3))


# --- Track IDs ------------------------------------------------------------------------------------------------------


def test_track_ids_stay_with_objects(play: Play, clip: Clip) -> None:
    player = play()
    owners: set[tuple[int, int]] = set()
    for frame, (_, truth) in zip(video(clip), clip, strict=True):
        owners |= true_ids(tracked(player(frame)[0]), truth).items()
    assert sorted(owner for _, owner in owners) == [1, 2, 3]  # each object keeps one track ID
    assert sorted(number for number, _ in owners) == [1, 2, 3]


def test_new_and_already_seen_instances_partition_the_tracks(play: Play, clip: Clip) -> None:
    player, before = play(), set()
    for frame in video(clip):
        (outputs,) = player(frame)
        new, seen = (outputs[name] for name in ("new_instances", "already_seen_instances"))
        here = tracked(outputs)
        assert sorted(track_ids(outputs)) == sorted([*new.tracker_id, *seen.tracker_id])
        assert before.isdisjoint(new.tracker_id)
        assert before.issuperset(seen.tracker_id)
        for part in (new, seen):
            rows = [here.tracker_id.tolist().index(number) for number in part.tracker_id]
            assert np.array_equal(part.xyxy, here.xyxy[rows])
            assert part.data["detection_id"].tolist() == here.data["detection_id"][rows].tolist()
        before |= set(new.tracker_id.tolist())
    assert before == {1, 2, 3}


def test_boxes_are_predicted_between_keyframes(play: Play, apart: Clip) -> None:
    player = play()
    seen = [tracked(player(frame)[0]) for frame in itertools.islice(video(apart), ALL_VISIBLE)]
    assert [len(detections) for detections in seen] == [3] * ALL_VISIBLE
    for index in range(1, EVERY):  # the speed is unknown after one keyframe
        assert np.array_equal(seen[index].xyxy, seen[0].xyxy)
    keyframe, *boxes = (named(seen[index], "red circle")[0] for index in (EVERY, *BETWEEN))
    truth = [next(np.array(o.xyxy) for o in apart.frame(i)[1] if o.name == "red circle") for i in BETWEEN]
    steps = np.diff([keyframe, *boxes], axis=0)
    assert np.allclose(steps, steps[0, [0, 1, 0, 1]], atol=1e-3)  # constant speed and size
    assert steps[0, 0] > 0
    assert truth[-1][0] > truth[0][0]
    assert np.abs(np.subtract(boxes, truth)).mean() < np.abs(keyframe - truth).mean()  # better than not moving


def test_class_ids_follow_the_order_of_class_names(play: Play, apart: Clip) -> None:
    classes = ["bus", "red circle", "dog"]
    player = play(class_names=classes)
    for frame in itertools.islice(video(apart), ALL_VISIBLE):
        here = tracked(player(frame)[0])
        assert sorted(here.data["class_name"]) == ["dog", "dog", "red circle"]
        assert [classes[class_id] for class_id in here.class_id] == here.data["class_name"].tolist()
        assert ((here.confidence > 0) & (here.confidence <= 1)).all()


@pytest.mark.parametrize("tracker", ["sort", "ocsort", "bytetrack", "botsort"])
def test_every_tracker_keeps_track_ids(play: Play, apart: Clip, tracker: str) -> None:
    player = play(tracker=tracker)
    for frame in itertools.islice(video(apart), ALL_VISIBLE):
        assert track_ids(player(frame)[0]) == [1, 2, 3]


@pytest.mark.parametrize("fps", [None, 0.0, 1.0, 240.0, math.inf, -1.0, math.nan])
def test_invalid_frame_rates_are_ignored(play: Play, frames: list[np.ndarray], fps: float | None) -> None:
    player = play()
    for number, image in enumerate(frames[:12]):
        assert track_ids(player(video_frame(image, number, fps=fps))[0]) == [1, 2, 3]


# --- Parameters -----------------------------------------------------------------------------------------------------


def test_every_can_change_between_frames(play: Play, frames: list[np.ndarray]) -> None:
    player = play(every="$inputs.every", parameters=["every"])
    intervals = zip(frames, [3] * 7 + [1] * 3 + [20] * 5, strict=False)
    keyframes = [
        player.runs_model(video_frame(image, number), every=every) for number, (image, every) in enumerate(intervals)
    ]
    assert [number for number, was in enumerate(keyframes) if was] == [0, 3, 6, 7, 8, 9]


@pytest.mark.parametrize("every", ["5", 5.0])
def test_every_accepts_integers_as_text_and_float(play: Play, frames: list[np.ndarray], every: Any) -> None:
    player = play(every="$inputs.every", parameters=["every"])
    keyframes = [player.runs_model(video_frame(image, number), every=every) for number, image in enumerate(frames)]
    assert keyframes == [number % 5 == 0 for number in range(len(frames))]


def test_changed_class_names_restart_tracking(play: Play, frames: list[np.ndarray]) -> None:
    player = play(class_names="$inputs.names", parameters=["names"])
    given = [NAMES, NAMES, ["red circle"], ["red circle"], "red circle, dog", NAMES]
    seen = [
        player(video_frame(image, n), names=names)[0]
        for n, (image, names) in enumerate(zip(frames, given, strict=False))
    ]
    assert len(player.model.call_sizes) == 4
    assert [track_ids(outputs) for outputs in seen] == [[1, 2, 3], [1, 2, 3], [4], [4], [5, 6, 7], [8, 9, 10]]
    assert [tracked(outputs).class_id.tolist() for outputs in seen[2:]] == [[0], [0], [0, 1, 1], [0, 0, 1]]
    assert [tracked(outputs).data["class_name"][0] for outputs in seen[2:]] == ["red circle"] * 3 + ["dog"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("class_names", names) for names in ([], ["dog", "dog"], "dog,,bus", ["dog", ""])),
        *(("every", every) for every in (0, 2.5, True, "0", "often", None)),
    ],
    ids=str,
)
def test_invalid_parameters_fail_the_frame_only(play: Play, frames: list[np.ndarray], field: str, value: Any) -> None:
    """Tracking continues on the next frame."""
    right = {"class_names": NAMES, "every": EVERY}
    player = play(class_names="$inputs.class_names", every="$inputs.every", parameters=list(right))
    player(video_frame(frames[0], 1), **right)
    (failed,) = player(video_frame(frames[1], 2), **{**right, field: value})
    assert failed["error_status"] is True
    assert field in failed["error_message"]
    assert len(failed["tracked_detections"]) == 0
    (outputs,) = player(video_frame(frames[2], 3), **right)
    assert track_ids(outputs, "already_seen_instances") == [1, 2, 3]
    assert len(player.model.call_sizes) == 1


# --- Failures -------------------------------------------------------------------------------------------------------


def assert_failed(outputs: dict[str, Any], message: str) -> None:
    assert outputs["error_status"] is True
    assert message in outputs["error_message"]
    for name in ("tracked_detections", "new_instances", "already_seen_instances"):
        assert len(outputs[name]) == len(track_ids(outputs, name)) == 0


@pytest.mark.parametrize("raises", [True, False], ids=["raises", "returns errors"])
@pytest.mark.parametrize("call", [0, 1, 4])
def test_track_continues_after_a_failed_keyframe(play: Play, apart: Clip, raises: bool, call: int) -> None:
    player = play()
    player.model.fails, player.model.raises = lambda number: number == call, raises
    owners: set[tuple[int, int]] = set()
    for index, (frame, (_, truth)) in enumerate(zip(video(apart), apart, strict=True)):
        before = len(player.model.call_sizes)
        (outputs,) = player(frame)
        assert (len(player.model.call_sizes) > before) == (index % EVERY == 0)
        failed = index // EVERY == call  # until the next keyframe
        assert outputs["error_status"] == failed
        assert outputs["error_message"] == ("internal failure" if failed else "")
        if index == call * EVERY:
            assert_failed(outputs, "internal failure")
        else:
            detections = outputs["tracked_detections"]
            owners |= true_ids(detections, truth).items()
            assert len(detections) == (0 if index < EVERY and call == 0 else 3) or index >= ALL_VISIBLE
    assert sorted(owner for _, owner in owners) == [1, 2, 3]


def test_bad_source_does_not_affect_the_others(play: Play, frames: list[np.ndarray]) -> None:
    player = play()
    for number, image in enumerate(frames[: 2 * EVERY]):
        broken = np.zeros((240, 320, 7), np.uint8)
        good, bad = player(video_frame(image, number, "good"), video_frame(broken, number, "bad"))
        assert track_ids(good) == [1, 2, 3]
        if number % EVERY == 0:
            assert_failed(bad, "(240, 320, 7)")
    assert player.model.call_sizes == [len(NAMES)] * 2


def test_tracks_end_if_all_keyframes_fail(play: Play, apart: Clip) -> None:
    player = play()
    player.model.fails = lambda call: call > 1
    outputs = [player(frame)[0] for frame in video(apart)]
    assert [found["error_status"] for found in outputs] == [n >= 2 * EVERY for n in range(len(apart))]
    assert len(outputs[2 * EVERY - 1]["tracked_detections"]) == 3
    assert len(outputs[-1]["tracked_detections"]) == 0  # lost tracks are not predicted for long


def test_restarted_source_keeps_no_tracks_if_its_first_keyframe_fails(play: Play, frames: list[np.ndarray]) -> None:
    player = play()
    player.model.fails = lambda call: call == 1
    assert track_ids(player(video_frame(frames[0], 50))[0]) == [1, 2, 3]
    assert_failed(player(video_frame(frames[1], 1))[0], "internal failure")
    assert track_ids(player(video_frame(frames[2], 2))[0]) == []


def test_removed_classes_have_no_tracks_after_a_failed_keyframe(play: Play, frames: list[np.ndarray]) -> None:
    player = play(class_names="$inputs.names", parameters=["names"])
    player.model.fails = lambda call: call == 1
    assert track_ids(player(video_frame(frames[0], 1), names=NAMES)[0]) == [1, 2, 3]
    assert_failed(player(video_frame(frames[1], 2), names=["dog"])[0], "internal failure")
    assert track_ids(player(video_frame(frames[2], 3), names=["dog"])[0]) == []


UNREADABLE = {
    "empty": np.zeros((0, 0, 3), np.uint8),
    "flat": np.zeros(7, np.uint8),
    "seven channels": np.zeros((240, 320, 7), np.uint8),
}


@pytest.mark.parametrize("form", UNREADABLE)
def test_consecutive_unreadable_frames_fail(play: Play, frames: list[np.ndarray], form: str) -> None:
    player = play()
    player(video_frame(frames[0], 0))
    for number in range(1, 2 * EVERY):
        assert_failed(player(video_frame(UNREADABLE[form], number))[0], "shape")


@pytest.mark.parametrize("form", UNREADABLE)
@pytest.mark.parametrize("at", [EVERY - 2, EVERY])
def test_unreadable_frame_does_not_affect_track_ids(play: Play, frames: list[np.ndarray], form: str, at: int) -> None:
    player = play()
    for number, image in enumerate(frames[:ALL_VISIBLE]):
        (outputs,) = player(video_frame(UNREADABLE[form] if number == at else image, number))
        if number != at:
            assert track_ids(outputs) == [1, 2, 3]


# --- Several sources ------------------------------------------------------------------------------------------------


def alone(player: Player, clip: Clip) -> list[sv.Detections]:
    return [tracked(player(frame)[0]) for frame in video(clip)]


def assert_same_tracks(found: Sequence[sv.Detections], expected: Sequence[sv.Detections]) -> None:
    """Assert equal track IDs, and boxes that differ by the rounding of another batch size only."""
    for here, there in zip(found, expected, strict=True):
        assert here.tracker_id.tolist() == there.tracker_id.tolist()
        assert np.allclose(here.xyxy, there.xyxy, atol=1)


def test_sources_of_a_batch_are_tracked_separately(play: Play) -> None:
    clips = [rendered(APART), rendered(RETURNING)]
    player = play()
    both = [player(*pair) for pair in zip(video(clips[0], "left"), video(clips[1], "right"), strict=True)]
    assert player.model.call_sizes == [2 * len(NAMES)] * (len(clips[0]) // EVERY)
    for index, clip in enumerate(clips):
        assert_same_tracks([tracked(pair[index]) for pair in both], alone(play(), clip))


def test_source_can_join_later(play: Play, apart: Clip) -> None:
    player, late = play(), 3
    left, right = list(video(apart, "left")), list(video(apart, "right"))
    for frame in left[:late]:
        player(frame)
    joined = [player(*pair)[1] for pair in zip(left[late:], right, strict=False)]
    assert_same_tracks([tracked(outputs) for outputs in joined], alone(play(), apart)[: len(joined)])
    assert set(player.model.call_sizes) == {len(NAMES)}  # their keyframes never coincide


def test_batch_can_have_several_frames_of_a_source(play: Play, apart: Clip) -> None:
    player, all_of_them = play(), list(video(apart))
    batches = [all_of_them[at : at + 8] for at in range(0, len(apart), 8)]
    found = [tracked(outputs) for batch in batches for outputs in player(*batch)]
    assert_same_tracks(found, alone(play(), apart))
    due = [sum(index % EVERY == 0 for index in range(at, at + 8)) for at in range(0, len(apart), 8)]
    assert player.model.call_sizes == [count * len(NAMES) for count in due]


def test_least_recently_used_source_is_forgotten(play: Play, frames: list[np.ndarray]) -> None:
    from moondream_cv_blocks.track import MAX_SOURCES

    player, before = play(), trackers_alive()
    small = cv2.resize(frames[0], (64, 48))
    player(video_frame(frames[0], 1, "first"))
    for name in range(MAX_SOURCES - 1):
        player(video_frame(small, 1, f"{name}"))
    player(video_frame(frames[1], 2, "first"))
    player(video_frame(small, 1, "one more"))  # replaces the least recently used source, which is not "first"
    assert not player.runs_model(video_frame(frames[2], 3, "first"))
    for name in range(3 * MAX_SOURCES):
        player(video_frame(small, 1, f"other {name}"))
    assert trackers_alive() - before == MAX_SOURCES
    (outputs,) = player(video_frame(frames[3], 4, "first"))
    assert track_ids(outputs, "new_instances") == [1, 2, 3]


def trackers_alive() -> int:
    gc.collect()
    return sum(type(item) is Tracker for item in gc.get_objects())


def test_sources_can_be_tracked_in_several_threads(play: Play) -> None:
    clips = {"left": rendered(APART), "right": rendered(RETURNING)}
    expected = {name: alone(play(), clip) for name, clip in clips.items()}
    player, start = play(), threading.Barrier(len(clips))
    found: dict[str, list[sv.Detections]] = {}

    def run_source(source: str) -> None:
        start.wait(240)
        found[source] = [tracked(player(frame)[0]) for frame in video(clips[source], source)]

    threads = [threading.Thread(target=run_source, args=(source,)) for source in clips]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(240)
    for source in clips:
        assert_same_tracks(found[source], expected[source])
