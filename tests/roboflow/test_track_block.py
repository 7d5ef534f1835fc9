"""`moondream_cv/track@v1` frame by frame through the engine: when the model looks, and whose number is whose."""

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

from moondream_cv.engine.local import LocalModel
from moondream_cv.requests import ErrorResult, Request, Result
from moondream_cv.scenes import render_clip
from moondream_cv.scenes.clips import Clip, TrackedObject
from moondream_cv.video.tracking.tracker import Tracker
from moondream_cv_blocks import ModelPool
from tests.helpers.roboflow_app import skip_without_server
from tests.helpers.workflows import compiled, in_video, results, step, workflow

skip_without_server()
pytestmark = pytest.mark.roboflow

NAMES = ["dog", "red circle"]
EVERY = 5
APART, CROSSING, RETURNING = 1, 0, 3  # seeds of clips; on the first, all objects are in sight on `IN_SIGHT` frames
IN_SIGHT = 31
BETWEEN = range(EVERY + 1, 2 * EVERY)  # frames before the third look: a speed is known by then


class Counted:
    """A model that tells how often it was asked, and fails where it is told to.

    Attributes:
        asked: How many requests came in each call.
        fails: Given the number of a call, whether it fails.
        raises: Whether it then raises, in place of giving an error for each request.
    """

    def __init__(self, model: LocalModel) -> None:
        self.model, self.skills, self.has_scores = model, model.skills, model.has_scores
        self.asked: list[int] = []
        self.fails: Callable[[int], bool] = lambda call: False
        self.raises = False

    def run(self, requests: Sequence[Request]) -> list[Result]:
        call = len(self.asked)
        self.asked.append(len(requests))
        if not self.fails(call):
            return self.model.run(requests)
        if self.raises:
            raise RuntimeError("the model is out of order")
        return [ErrorResult(RuntimeError("the model is out of order")) for _ in requests]

    def close(self) -> None:
        """It belongs to somebody else."""


class Player:
    """A workflow of one track step: give it frames and parameters, and it gives their outputs.

    Attributes:
        model: What the step asks.
    """

    def __init__(self, model: LocalModel, parameters: Sequence[str] = (), **fields: Any) -> None:
        self.model = Counted(model)
        pool = ModelPool()
        pool.add("tiny", self.model)
        definition = workflow(step("track", **{"class_names": NAMES, "every": EVERY, **fields}), parameters=parameters)
        self._engine = compiled(definition, **{"moondream_cv_blocks.models": pool})

    def __call__(self, *frames: Any, **parameters: Any) -> list[dict[str, Any]]:
        return results(self._engine, list(frames), **parameters)

    def looked(self, *frames: Any, **parameters: Any) -> bool:
        """Whether the model is asked about any of them."""
        before = len(self.model.asked)
        self(*frames, **parameters)
        return len(self.model.asked) > before


Play = Callable[..., Player]


def video(clip: Clip, source: str = "camera", first: int = 1) -> Iterator[dict[str, Any]]:
    """A clip's frames as those of a source, which counts from `first`."""
    for number, (rgb, _) in enumerate(clip, first):
        yield in_video(np.ascontiguousarray(rgb[..., ::-1]), number, source)


def tracked(outputs: dict[str, Any]) -> sv.Detections:
    """What is on a frame that has not failed."""
    assert (outputs["error_status"], outputs["error_message"]) == (False, "")
    detections: sv.Detections = outputs["tracked_detections"]
    return detections


def numbers(outputs: dict[str, Any], name: str = "tracked_detections") -> list[int]:
    return outputs[name].tracker_id.tolist()  # type: ignore[no-any-return]


def named(detections: sv.Detections, name: str) -> np.ndarray:
    """Boxes of a class, [N, 4]."""
    return detections.xyxy[detections.data["class_name"] == name]


def whose(detections: sv.Detections, truth: Sequence[TrackedObject]) -> dict[int, int]:
    """The track id of the object of the same name that each number's box lies on, or on most."""
    owners = {}
    for row, number in enumerate(detections.tracker_id.tolist()):
        there = [found for found in truth if found.name == detections.data["class_name"][row]]
        overlaps = sv.box_iou_batch(detections.xyxy[[row]], np.array([found.xyxy for found in there]))[0]
        assert overlaps.max() > 0, (number, detections.xyxy[row], there)
        owners[number] = there[int(overlaps.argmax())].track_id
    return owners


@pytest.fixture
def play(tiny: LocalModel) -> Play:
    """Compiles a workflow, by the fields of its step."""
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
    """[240, 320, 3] BGR each."""
    return [np.ascontiguousarray(rgb[..., ::-1]) for rgb, _ in apart]


# --- When the model looks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 3, EVERY, 100])
def test_the_model_looks_at_one_frame_in_so_many(play: Play, apart: Clip, every: int) -> None:
    player = play(every=every)
    looked = [player.looked(frame) for frame in video(apart)]
    assert looked == [index % every == 0 for index in range(len(apart))]
    assert set(player.model.asked) == {len(NAMES)}


def test_dropped_frames_count(play: Play, apart: Clip, frames: list[np.ndarray]) -> None:
    player = play()
    came = {1: True, 2: False, 4: False, 9: True, 10: False, 13: False, 14: True, 30: True}
    owners: set[tuple[int, int]] = set()
    for number, due in came.items():
        before = len(player.model.asked)
        (outputs,) = player(in_video(frames[number - 1], number))
        assert (len(player.model.asked) > before) == due, number
        owners |= whose(tracked(outputs), apart.frame(number - 1)[1]).items()
    assert len(owners) == len(apart.names)


NO_COUNT: dict[str, Callable[[np.ndarray], Any]] = {
    "array": lambda image: image,
    "number of the first frame on all": lambda image: in_video(image, 1),
}


@pytest.mark.parametrize("form", NO_COUNT)
def test_each_run_is_the_next_frame_of_what_does_not_count(play: Play, frames: list[np.ndarray], form: str) -> None:
    player, other = play(), play()
    for index, image in enumerate(frames):
        before = len(player.model.asked)
        (outputs,), (expected,) = player(NO_COUNT[form](image)), other(in_video(image, index))
        assert (len(player.model.asked) > before) == (index % EVERY == 0)
        assert numbers(outputs) == numbers(expected)
        assert np.allclose(tracked(outputs).xyxy, tracked(expected).xyxy, atol=0.01)


def test_plain_arrays_of_a_batch_are_sources_by_their_place(play: Play, frames: list[np.ndarray]) -> None:
    player = play()
    for index, (image, other) in enumerate(zip(frames, reversed(frames), strict=True)):
        assert player.looked(image, other) == (index % EVERY == 0)
    assert set(player.model.asked) == {2 * len(NAMES)}


def test_a_source_that_starts_again(play: Play, frames: list[np.ndarray]) -> None:
    player, given = play(), []
    for _ in range(3):
        first = [player(in_video(image, number))[0] for number, image in enumerate(frames[:8], 1)]
        assert numbers(first[0]) == numbers(first[0], "new_instances") == numbers(first[-1])
        assert len(first[0]["already_seen_instances"]) == 0
        given.append(numbers(first[0]))
    assert given == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    assert len(player.model.asked) == 3 * 2


def test_a_change_of_size(play: Play, frames: list[np.ndarray]) -> None:
    player = play()
    player(in_video(frames[0], 1))
    small = cv2.resize(frames[1], (160, 120))
    (outputs,) = player(in_video(small, 2))
    assert len(player.model.asked) == 2
    assert min(numbers(outputs, "new_instances")) > len(NAMES) + 1
    assert len(tracked(outputs)) == len(numbers(outputs, "new_instances"))
    assert tracked(outputs).xyxy.max() <= 160
    assert not player.looked(in_video(small, 3))


# --- Numbers --------------------------------------------------------------------------------------------------------


def test_numbers_stay_with_objects(play: Play, clip: Clip) -> None:
    player = play()
    owners: set[tuple[int, int]] = set()
    for frame, (_, truth) in zip(video(clip), clip, strict=True):
        owners |= whose(tracked(player(frame)[0]), truth).items()
    assert sorted(owner for _, owner in owners) == [1, 2, 3]  # each object has one number all the while
    assert sorted(number for number, _ in owners) == [1, 2, 3]


def test_new_and_seen_ones(play: Play, clip: Clip) -> None:
    player, before = play(), set()
    for frame in video(clip):
        (outputs,) = player(frame)
        new, seen = (outputs[name] for name in ("new_instances", "already_seen_instances"))
        here = tracked(outputs)
        assert sorted(numbers(outputs)) == sorted([*new.tracker_id, *seen.tracker_id])
        assert before.isdisjoint(new.tracker_id)
        assert before.issuperset(seen.tracker_id)
        for part in (new, seen):
            rows = [here.tracker_id.tolist().index(number) for number in part.tracker_id]
            assert np.array_equal(part.xyxy, here.xyxy[rows])
            assert part.data["detection_id"].tolist() == here.data["detection_id"][rows].tolist()
        before |= set(new.tracker_id.tolist())
    assert before == {1, 2, 3}


def test_boxes_move_between_looks(play: Play, apart: Clip) -> None:
    player = play()
    seen = [tracked(player(frame)[0]) for frame in itertools.islice(video(apart), IN_SIGHT)]
    assert [len(detections) for detections in seen] == [3] * IN_SIGHT
    for index in range(1, EVERY):  # no speed is known after one look
        assert np.array_equal(seen[index].xyxy, seen[0].xyxy)
    look, *boxes = (named(seen[index], "red circle")[0] for index in (EVERY, *BETWEEN))
    truth = [next(np.array(o.xyxy) for o in apart.frame(i)[1] if o.name == "red circle") for i in BETWEEN]
    steps = np.diff([look, *boxes], axis=0)
    assert np.allclose(steps, steps[0, [0, 1, 0, 1]], atol=1e-3)  # evenly, and without growing
    assert steps[0, 0] > 0
    assert truth[-1][0] > truth[0][0]
    assert np.abs(np.subtract(boxes, truth)).mean() < np.abs(look - truth).mean()  # better than to stay where it was


def test_classes_have_their_own_ids_and_names(play: Play, apart: Clip) -> None:
    classes = ["bus", "red circle", "dog"]
    player = play(class_names=classes)
    for frame in itertools.islice(video(apart), IN_SIGHT):
        here = tracked(player(frame)[0])
        assert sorted(here.data["class_name"]) == ["dog", "dog", "red circle"]
        assert [classes[class_id] for class_id in here.class_id] == here.data["class_name"].tolist()
        assert ((here.confidence > 0) & (here.confidence <= 1)).all()


@pytest.mark.parametrize("tracker", ["sort", "ocsort", "bytetrack", "botsort"])
def test_every_tracker(play: Play, apart: Clip, tracker: str) -> None:
    player = play(tracker=tracker)
    for frame in itertools.islice(video(apart), IN_SIGHT):
        assert numbers(player(frame)[0]) == [1, 2, 3]


@pytest.mark.parametrize("fps", [None, 0.0, 1.0, 240.0, math.inf, -1.0, math.nan])
def test_frame_rates_that_say_nothing(play: Play, frames: list[np.ndarray], fps: float | None) -> None:
    player = play()
    for number, image in enumerate(frames[:12]):
        assert numbers(player(in_video(image, number, fps=fps))[0]) == [1, 2, 3]


# --- Parameters -----------------------------------------------------------------------------------------------------


def test_every_by_parameter(play: Play, frames: list[np.ndarray]) -> None:
    player = play(every="$inputs.every", parameters=["every"])
    asked = zip(frames, [3] * 7 + [1] * 3 + [20] * 5, strict=False)
    looked = [player.looked(in_video(image, number), every=every) for number, (image, every) in enumerate(asked)]
    assert [number for number, was in enumerate(looked) if was] == [0, 3, 6, 7, 8, 9]


@pytest.mark.parametrize("every", ["5", 5.0])
def test_every_as_it_may_be_written(play: Play, frames: list[np.ndarray], every: Any) -> None:
    player = play(every="$inputs.every", parameters=["every"])
    looked = [player.looked(in_video(image, number), every=every) for number, image in enumerate(frames)]
    assert looked == [number % 5 == 0 for number in range(len(frames))]


def test_class_names_that_change(play: Play, frames: list[np.ndarray]) -> None:
    player = play(class_names="$inputs.names", parameters=["names"])
    given = [NAMES, NAMES, ["red circle"], ["red circle"], "red circle, dog", NAMES]
    seen = [
        player(in_video(image, n), names=names)[0] for n, (image, names) in enumerate(zip(frames, given, strict=False))
    ]
    assert len(player.model.asked) == 4
    assert [numbers(outputs) for outputs in seen] == [[1, 2, 3], [1, 2, 3], [4], [4], [5, 6, 7], [8, 9, 10]]
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
def test_parameters_that_make_no_sense(play: Play, frames: list[np.ndarray], field: str, value: Any) -> None:
    """The frame fails, and the next one goes on where the one before has stopped."""
    right = {"class_names": NAMES, "every": EVERY}
    player = play(class_names="$inputs.class_names", every="$inputs.every", parameters=list(right))
    player(in_video(frames[0], 1), **right)
    (failed,) = player(in_video(frames[1], 2), **{**right, field: value})
    assert failed["error_status"] is True
    assert field in failed["error_message"]
    assert len(failed["tracked_detections"]) == 0
    (outputs,) = player(in_video(frames[2], 3), **right)
    assert numbers(outputs, "already_seen_instances") == [1, 2, 3]
    assert len(player.model.asked) == 1


# --- Looks that fail ------------------------------------------------------------------------------------------------


def check_failed(outputs: dict[str, Any], says: str) -> None:
    assert outputs["error_status"] is True
    assert says in outputs["error_message"]
    for name in ("tracked_detections", "new_instances", "already_seen_instances"):
        assert len(outputs[name]) == len(numbers(outputs, name)) == 0


@pytest.mark.parametrize("raises", [True, False], ids=["raises", "gives an error"])
@pytest.mark.parametrize("call", [0, 1, 4])
def test_a_look_that_fails(play: Play, apart: Clip, raises: bool, call: int) -> None:
    player = play()
    player.model.fails, player.model.raises = lambda number: number == call, raises
    owners: set[tuple[int, int]] = set()
    for index, (frame, (_, truth)) in enumerate(zip(video(apart), apart, strict=True)):
        before = len(player.model.asked)
        (outputs,) = player(frame)
        assert (len(player.model.asked) > before) == (index % EVERY == 0)
        in_trouble = index // EVERY == call  # until the next look
        assert outputs["error_status"] == in_trouble
        assert outputs["error_message"] == ("the model is out of order" if in_trouble else "")
        if index == call * EVERY:
            check_failed(outputs, "the model is out of order")
        else:
            detections = outputs["tracked_detections"]
            owners |= whose(detections, truth).items()
            assert len(detections) == (0 if index < EVERY and call == 0 else 3) or index >= IN_SIGHT
    assert sorted(owner for _, owner in owners) == [1, 2, 3]


def test_a_source_that_fails_alone(play: Play, frames: list[np.ndarray]) -> None:
    player = play()
    for number, image in enumerate(frames[: 2 * EVERY]):
        broken = np.zeros((240, 320, 7), np.uint8)
        good, bad = player(in_video(image, number, "good"), in_video(broken, number, "bad"))
        assert numbers(good) == [1, 2, 3]
        if number % EVERY == 0:
            check_failed(bad, "(240, 320, 7)")
    assert player.model.asked == [len(NAMES)] * 2


def test_when_all_looks_fail(play: Play, apart: Clip) -> None:
    player = play()
    player.model.fails = lambda call: call > 1
    outputs = [player(frame)[0] for frame in video(apart)]
    assert [found["error_status"] for found in outputs] == [n >= 2 * EVERY for n in range(len(apart))]
    assert len(outputs[2 * EVERY - 1]["tracked_detections"]) == 3
    assert len(outputs[-1]["tracked_detections"]) == 0  # what has not been seen for long is not made up


def test_a_source_that_starts_again_with_a_look_that_fails(play: Play, frames: list[np.ndarray]) -> None:
    player = play()
    player.model.fails = lambda call: call == 1
    assert numbers(player(in_video(frames[0], 50))[0]) == [1, 2, 3]
    check_failed(player(in_video(frames[1], 1))[0], "the model is out of order")
    assert numbers(player(in_video(frames[2], 2))[0]) == []


def test_fewer_classes_with_a_look_that_fails(play: Play, frames: list[np.ndarray]) -> None:
    player = play(class_names="$inputs.names", parameters=["names"])
    player.model.fails = lambda call: call == 1
    assert numbers(player(in_video(frames[0], 1), names=NAMES)[0]) == [1, 2, 3]
    check_failed(player(in_video(frames[1], 2), names=["dog"])[0], "the model is out of order")
    assert numbers(player(in_video(frames[2], 3), names=["dog"])[0]) == []


UNREADABLE = {
    "empty": np.zeros((0, 0, 3), np.uint8),
    "flat": np.zeros(7, np.uint8),
    "seven channels": np.zeros((240, 320, 7), np.uint8),
}


@pytest.mark.parametrize("form", UNREADABLE)
def test_frames_that_cannot_be_read_in_a_row(play: Play, frames: list[np.ndarray], form: str) -> None:
    player = play()
    player(in_video(frames[0], 0))
    for number in range(1, 2 * EVERY):
        check_failed(player(in_video(UNREADABLE[form], number))[0], "shape")


@pytest.mark.parametrize("form", UNREADABLE)
@pytest.mark.parametrize("at", [EVERY - 2, EVERY])
def test_one_frame_that_cannot_be_read(play: Play, frames: list[np.ndarray], form: str, at: int) -> None:
    player = play()
    for number, image in enumerate(frames[:IN_SIGHT]):
        (outputs,) = player(in_video(UNREADABLE[form] if number == at else image, number))
        if number != at:
            assert numbers(outputs) == [1, 2, 3]


# --- Several sources ------------------------------------------------------------------------------------------------


def alone(player: Player, clip: Clip) -> list[sv.Detections]:
    return [tracked(player(frame)[0]) for frame in video(clip)]


def check_same(found: Sequence[sv.Detections], expected: Sequence[sv.Detections]) -> None:
    """Numbers agree, and boxes but for what computing images together with others makes of them."""
    for here, there in zip(found, expected, strict=True):
        assert here.tracker_id.tolist() == there.tracker_id.tolist()
        assert np.allclose(here.xyxy, there.xyxy, atol=1)


def test_two_sources_of_a_batch(play: Play) -> None:
    clips = [rendered(APART), rendered(RETURNING)]
    player = play()
    both = [player(*pair) for pair in zip(video(clips[0], "left"), video(clips[1], "right"), strict=True)]
    assert player.model.asked == [2 * len(NAMES)] * (len(clips[0]) // EVERY)
    for index, clip in enumerate(clips):
        check_same([tracked(pair[index]) for pair in both], alone(play(), clip))


def test_a_source_that_joins_later(play: Play, apart: Clip) -> None:
    player, late = play(), 3
    left, right = list(video(apart, "left")), list(video(apart, "right"))
    for frame in left[:late]:
        player(frame)
    joined = [player(*pair)[1] for pair in zip(left[late:], right, strict=False)]
    check_same([tracked(outputs) for outputs in joined], alone(play(), apart)[: len(joined)])
    assert set(player.model.asked) == {len(NAMES)}  # they are never due together


def test_frames_of_one_source_in_a_batch(play: Play, apart: Clip) -> None:
    player, all_of_them = play(), list(video(apart))
    batches = [all_of_them[at : at + 8] for at in range(0, len(apart), 8)]
    found = [tracked(outputs) for batch in batches for outputs in player(*batch)]
    check_same(found, alone(play(), apart))
    due = [sum(index % EVERY == 0 for index in range(at, at + 8)) for at in range(0, len(apart), 8)]
    assert player.model.asked == [count * len(NAMES) for count in due]


def test_sources_are_forgotten(play: Play, frames: list[np.ndarray]) -> None:
    from moondream_cv_blocks.track import MAX_SOURCES

    player, before = play(), trackers_alive()
    small = cv2.resize(frames[0], (64, 48))
    player(in_video(frames[0], 1, "first"))
    for name in range(MAX_SOURCES - 1):
        player(in_video(small, 1, f"{name}"))
    player(in_video(frames[1], 2, "first"))
    player(in_video(small, 1, "one more"))  # the source seen longest ago makes room, which is not the first any more
    assert not player.looked(in_video(frames[2], 3, "first"))
    for name in range(3 * MAX_SOURCES):
        player(in_video(small, 1, f"other {name}"))
    assert trackers_alive() - before == MAX_SOURCES
    (outputs,) = player(in_video(frames[3], 4, "first"))
    assert numbers(outputs, "new_instances") == [1, 2, 3]


def trackers_alive() -> int:
    gc.collect()
    return sum(type(thing) is Tracker for thing in gc.get_objects())


def test_two_threads(play: Play) -> None:
    clips = {"left": rendered(APART), "right": rendered(RETURNING)}
    expected = {name: alone(play(), clip) for name, clip in clips.items()}
    player, start = play(), threading.Barrier(len(clips))
    found: dict[str, list[sv.Detections]] = {}

    def watch(source: str) -> None:
        start.wait(240)
        found[source] = [tracked(player(frame)[0]) for frame in video(clips[source], source)]

    threads = [threading.Thread(target=watch, args=(source,)) for source in clips]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(240)
    for source in clips:
        check_same(found[source], expected[source])
