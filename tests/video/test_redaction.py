"""Redaction covers objects between their detections. Run with `pytest tests/video/test_redaction.py`."""

from __future__ import annotations

import io
import json
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import pytest
import supervision as sv

from moondream_cv import Detector, load
from moondream_cv.cli import demo_clip
from moondream_cv.evaluation.tracks import truth_of
from moondream_cv.scenes.clips import render_clip
from moondream_cv.video import (
    Annotator,
    TrackedFrame,
    Tracking,
    Zones,
    annotate_video,
    offline,
    stream,
    track,
    track_streams,
)
from moondream_cv.video.sources.base import Source
from moondream_cv.video.sources.frame import Frame
from moondream_cv.video.tracking.redaction import BRIDGE_SECONDS, LOOKAHEAD, MARGIN, Redactor
from tests.helpers.clips import MovingObject, ScriptedDetector, frame_number, numbered_image

SIZE = (320, 180)
FPS = 30.0
FRAMES = 180
CLASSES = ("a", "b")

Box = tuple[float, float, float, float]


class Object(NamedTuple):
    """One object on one frame."""

    track_id: int
    name: str
    xyxy: Box


Truth = list[list[Object]]


# Clips --------------------------------------------------------------------------------------------------------------


def rendered_clip(seed: int, num_objects: int) -> Truth:
    """Objects that bounce, turn in circles, leave and come back, as far as a quarter of them shows."""
    clip = render_clip(seed, num_frames=FRAMES, num_objects=num_objects, num_classes=2, resolution_wh=SIZE)
    names = dict(zip(clip.class_names, CLASSES, strict=True))
    return [[Object(o.track_id, names[o.name], o.xyxy) for o in objects] for objects in truth_of(clip)]


def scripted_clip(seed: int) -> Truth:
    """Objects that enter, turn by 90 and 180 degrees, wait and leave."""
    rng = np.random.default_rng(seed)
    truth: Truth = [[] for _ in range(FRAMES)]
    frame_wh = np.array(SIZE)
    for number, kind in enumerate(("enters", "turns", "reverses", "waits", "leaves")):
        half = rng.uniform(8, 20, 2)
        speed, heading = rng.uniform(0.5, 2.0), rng.uniform(0, 2 * math.pi)
        velocity = speed * np.array([math.cos(heading), math.sin(heading)])
        place, start, event = rng.uniform((40, 40), (280, 140)), 0, rng.integers(0, 45)
        if kind == "enters":
            from_left, start = rng.random() < 0.5, int(rng.integers(0, 90))
            place = np.array([-20.0 if from_left else 340.0, rng.uniform(30, 150)])
            velocity = np.array([speed if from_left else -speed, 0.0])
        for index in range(FRAMES):
            box = np.concatenate((place - half, place + half))
            seen = np.clip(box, 0, SIZE * 2)
            if (seen[2:] > seen[:2]).all() and (seen[2:] - seen[:2]).prod() >= half.prod():  # a quarter of its area
                left, top, right, bottom = seen.tolist()
                truth[index].append(Object(number, CLASSES[number % 2], (left, top, right, bottom)))
            if kind in ("turns", "reverses") and index % 45 == event:
                velocity = -velocity if kind == "reverses" else velocity[::-1] * rng.choice([(1, -1), (-1, 1)])
            if kind not in ("enters", "leaves"):
                inward = np.sign(frame_wh / 2 - place) * abs(velocity)
                velocity = np.where((place < half) | (place > frame_wh - half), inward, velocity)
            if index >= start and not (kind == "waits" and index // 40 % 2):
                place = place + velocity
    return truth


CLIPS = (rendered_clip(501, 3), rendered_clip(502, 6), scripted_clip(0), scripted_clip(1))


def textured_frames(count: int = FRAMES) -> Iterator[np.ndarray]:
    """Yield checkerboards that contain their number in the first pixel. Blur turns them gray."""
    rows, columns = np.indices((SIZE[1], SIZE[0])) // 2
    board = np.repeat(np.where((rows + columns) % 2, 215, 40).astype(np.uint8)[..., None], 3, axis=2)
    for number in range(count):
        board[0, 0] = number
        yield board.copy()


class MissingDetector:
    """Returns the objects of a clip, but misses a share of them at random.

    Attributes:
        times: The times in seconds at which each object was detected.
    """

    def __init__(self, truth: Truth, missed: float, seed: int) -> None:
        self._truth, self._missed = truth, missed
        self._rng = np.random.default_rng(seed)
        self.times: dict[int, list[float]] = {}

    def detect(self, number: int) -> sv.Detections:
        kept = [o for o in self._truth[number] if self._rng.random() >= self._missed]
        for item in kept:
            self.times.setdefault(item.track_id, []).append(number / FPS)
        return sv.Detections(
            xyxy=np.array([o.xyxy for o in kept], np.float32).reshape(-1, 4),
            confidence=np.full(len(kept), 0.9, np.float32),
            class_id=np.array([CLASSES.index(o.name) for o in kept], int),
        )

    def __call__(self, image: np.ndarray, classes: Sequence[str]) -> sv.Detections:
        return self.detect(int(image[0, 0, 0]))

    def must_be_covered(self, item: Object, time: float, *, live: bool = False) -> bool:
        """Return whether the object was detected within the bridge; for a live source, before the frame."""
        since = [time - found for found in self.times.get(item.track_id, [])]
        return any((0 if live else -BRIDGE_SECONDS) - 1e-6 <= s <= BRIDGE_SECONDS + 1e-6 for s in since)


def exposed_share(
    truth: Truth, detector: MissingDetector, covered: Sequence[np.ndarray], *, live: bool = False
) -> tuple[int, int]:
    """Count the objects that must be covered, and those of them of which more than half shows.

    Args:
        truth: The objects on each frame.
        detector: The detector that was used.
        covered: For each frame [H, W] bool, or boxes [N, 4].
    """
    total = exposed = 0
    for number, (objects, cover) in enumerate(zip(truth, covered, strict=True)):
        mask = cover
        if cover.dtype != bool:
            mask = np.zeros((SIZE[1], SIZE[0]), bool)
            for left, top, right, bottom in cover.round().astype(int).tolist():
                mask[top:bottom, left:right] = True
        for item in objects:
            if detector.must_be_covered(item, number / FPS, live=live):
                left, top, right, bottom = (round(value) for value in item.xyxy)
                total += 1
                exposed += mask[top:bottom, left:right].mean() < 0.5
    return total, exposed


def decoded(path: Path) -> Iterator[np.ndarray]:
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            yield frame.to_ndarray(format="gray")


# Properties ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("missed", "limit"), [(0.1, 0.005), (0.3, 0.005), (0.5, 0.01)])
@pytest.mark.parametrize("every", [1, 5, 15])
def test_objects_are_blurred_within_the_bridge_of_a_detection(
    every: int, missed: float, limit: float, tmp_path: Path
) -> None:
    total = exposed = 0
    for number, truth in enumerate(CLIPS):
        detector = MissingDetector(truth, missed, seed=number)
        target = tmp_path / f"{number}.mp4"
        annotate_video(textured_frames(), target, CLASSES, annotate="blur", model=detector, every=every)
        gray = [np.abs(image.astype(int) - 128) < 50 for image in decoded(target)]
        counts = exposed_share(truth, detector, gray)
        total, exposed = total + counts[0], exposed + counts[1]
    assert total > 1500
    assert exposed / total <= limit, f"{exposed} of {total} objects show"


@pytest.fixture(scope="module")
def demo() -> tuple[list[np.ndarray], list[list[np.ndarray]], dict[bytes, sv.Detections]]:
    """The frames of the demo's clip, its whole circles by track, and what the tiny model finds on each frame."""
    clip = demo_clip.render()
    frames, circles = [], []
    for image, objects in clip.frames():
        frames.append(np.ascontiguousarray(image[..., ::-1]))
        whole = {o.track_id: np.array(o.xyxy) for o in objects if o.name == "red circle" and o.visible >= 0.99}
        circles.append([whole.get(track_id, np.empty(0)) for track_id in (1, 2)])
    with load("tiny", device="cpu") as model:
        detector = Detector(model)
        found = {image.tobytes(): detector(image, "red circle") for image in frames}
    return frames, circles, found


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 5, 15])
def test_circles_of_the_demo_are_covered_between_their_detections(
    every: int, demo: tuple[list[np.ndarray], list[list[np.ndarray]], dict[bytes, sv.Detections]]
) -> None:
    frames, circles, found = demo
    detected: list[list[float]] = [[], []]  # times at which each circle was found on a keyframe

    def detector(image: np.ndarray, classes: Sequence[str]) -> sv.Detections:
        number = next(i for i, frame in enumerate(frames) if frame is image or np.array_equal(frame, image))
        for circle, box in enumerate(circles[number]):
            boxes = found[image.tobytes()].xyxy
            if box.size and len(boxes) and sv.box_iou_batch(box[None], boxes).max() >= 0.5:
                detected[circle].append(number / FPS)
        return found[image.tobytes()]

    lines = io.StringIO()
    annotate_video(frames, None, "red circle", annotate="blur", model=detector, every=every, json=lines)
    covered = [[row["xyxy"] for row in json.loads(line)["detections"]] for line in lines.getvalue().splitlines()]
    whole = opened = 0
    for number, tracks in enumerate(circles):
        mask = np.zeros(frames[0].shape[:2], bool)
        for left, top, right, bottom in np.rint(covered[number]).astype(int).reshape(-1, 4).tolist():
            mask[top:bottom, left:right] = True
        for circle, box in enumerate(tracks):
            steps = np.array(detected[circle]) - number / FPS
            if not box.size or not ((steps <= 0) & (steps >= -0.7)).any() or not ((steps >= 0) & (steps <= 0.7)).any():
                continue
            left, top, right, bottom = np.rint(box).astype(int).tolist()
            whole += 1
            opened += mask[top:bottom, left:right].mean() < 0.5
    print(f"every {every}: {opened} of {whole} whole circles show by more than half")
    assert whole > 200
    assert opened <= 3, f"{opened} of {whole} circles show"


def test_unredacted_frames_keep_their_texture(tmp_path: Path) -> None:
    """The property above would hold for a video that is gray all over."""
    annotate_video(
        textured_frames(30), tmp_path / "out.mp4", CLASSES, annotate="none", model=ScriptedDetector(), every=5
    )
    for image in decoded(tmp_path / "out.mp4"):
        assert (np.abs(image.astype(int) - 128) < 50).mean() < 0.05
    truth = CLIPS[0]
    detector = MissingDetector(truth, 0.0, seed=0)
    tracking = Tracking(redact=True)
    found = list(track_streams([textured_frames()], CLASSES, model=detector, every=5, tracking=tracking))
    covered = [boxes.area.sum() / (SIZE[0] * SIZE[1]) for boxes in redactions(found)]
    assert np.mean(covered) < 0.2  # of the frame


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 5])
def test_track_ids_do_not_matter(every: int) -> None:
    total = exposed = 0
    for seed, truth in enumerate(CLIPS):
        detector, redactor = MissingDetector(truth, 0.3, seed), Redactor()
        rng = np.random.default_rng(seed)
        waiting = iter(range(0, FRAMES, every))
        following = next(waiting, None)
        covered = []
        for number in range(FRAMES):
            while following is not None and following <= number + LOOKAHEAD * BRIDGE_SECONDS * FPS:
                found = detector.detect(following)
                found.tracker_id = rng.permutation(np.arange(-1, 12))[: len(found)]
                redactor.add(found, following / FPS, SIZE)
                following = next(waiting, None)
            covered.append(redactor.cover(number / FPS, CLASSES, SIZE, interval=every / FPS).xyxy)
        counts = exposed_share(truth, detector, covered)
        total, exposed = total + counts[0], exposed + counts[1]
    assert total > 1500
    assert exposed / total <= 0.005, f"{exposed} of {total} objects show"


class LiveFrames(Source):
    """Frames that count as live: each comes out before the next one is read."""

    live = True

    def __init__(self, images: Iterator[np.ndarray]) -> None:
        super().__init__("the camera")
        self.fps = FPS
        self._numbered = enumerate(images)

    def __next__(self) -> Frame:
        number, image = next(self._numbered)
        return Frame(image, number, number / FPS)

    def close(self) -> None:
        self._numbered = enumerate(())


@pytest.mark.parametrize("missed", [0.1, 0.3, 0.5])
def test_live_objects_are_covered_after_a_detection(missed: float) -> None:
    total = exposed = 0
    for seed, truth in enumerate(CLIPS):
        detector = MissingDetector(truth, missed, seed)
        source, tracking = LiveFrames(textured_frames()), Tracking(redact=True)
        found = list(track_streams([source], CLASSES, model=detector, every=1, tracking=tracking))
        covered = [boxes.xyxy for boxes in redactions(found)]
        counts = exposed_share(truth, detector, covered, live=True)
        total, exposed = total + counts[0], exposed + counts[1]
    assert total > 1500
    assert exposed / total <= 0.01, f"{exposed} of {total} objects show"


# Single cases -------------------------------------------------------------------------------------------------------


def detections(*boxes: Sequence[float], ids: Sequence[int]) -> sv.Detections:
    return sv.Detections(
        xyxy=np.array(boxes, np.float32).reshape(-1, 4),
        confidence=np.full(len(boxes), 0.5, np.float32),
        class_id=np.zeros(len(boxes), int),
        tracker_id=np.array(ids, int),
    )


def box_at(x: float, y: float = 90.0, half: float = 10.0) -> Box:
    return (x - half, y - half, x + half, y + half)


def with_margin(box: Sequence[float]) -> list[float]:
    left, top, right, bottom = box
    width, height = MARGIN * (right - left), MARGIN * (bottom - top)
    return [left - width, top - height, right + width, bottom + height]


def contains(outer: np.ndarray, inner: Sequence[float]) -> bool:
    return bool((outer[:2] <= np.array(inner[:2]) + 0.01).all() and (outer[2:] >= np.array(inner[2:]) - 0.01).all())


def test_a_single_detection_is_covered_before_and_after_with_a_growing_box() -> None:
    redactor = Redactor(0.7)
    redactor.add(detections(box_at(160), ids=[4]), 2.0, SIZE)
    sizes = {}
    for time in (1.29, 1.31, 1.7, 1.99, 2.0, 2.01, 2.3, 2.69, 2.71):
        found = redactor.cover(time, CLASSES, SIZE)
        assert all(contains(box, box_at(160)) for box in found.xyxy)
        sizes[time] = float(found.area.sum())
        assert found.tracker_id.tolist() == [4] * len(found)  # type: ignore[union-attr]
    assert sizes[1.29] == sizes[2.71] == 0
    one = 400 * (1 + 2 * MARGIN) ** 2
    assert sizes[2.0] == sizes[1.99] == sizes[2.01] == pytest.approx(one, abs=0.1)
    assert sizes[1.31] == pytest.approx(sizes[2.69])
    assert one + 1 < sizes[2.3] < sizes[2.69]


def test_a_gap_that_the_motion_confirms_is_interpolated() -> None:
    redactor = Redactor(0.7)
    for time in (0.0, 0.2, 0.4, 1.6, 1.8):
        redactor.add(detections(box_at(20 + 100 * time), ids=[1]), time, SIZE)
    for time in np.arange(0.4, 1.6, 0.1):
        expected = [with_margin(box_at(20 + 100 * time))]
        np.testing.assert_allclose(redactor.cover(time, CLASSES, SIZE).xyxy, expected, atol=1e-3)


def test_an_object_that_turned_within_a_gap_is_covered_on_its_way() -> None:
    redactor = Redactor(0.7)
    path = [(0.1 * i, 100 + min(8 * i, 160 - 8 * i)) for i in range(21)]  # turns back after 1 s
    for time, x in path:
        if not 0.5 < time < 1.5:
            redactor.add(detections(box_at(x), ids=[1]), time, SIZE)
    for time, x in path:
        (box,) = redactor.cover(time, CLASSES, SIZE).xyxy
        assert contains(box, box_at(x)), time


def test_both_objects_of_a_track_that_jumped_are_covered() -> None:
    redactor = Redactor(0.7)
    for i in range(10):
        redactor.add(detections(box_at(50 if i < 5 else 250), ids=[1]), 0.1 * i, SIZE)
    for i in range(10):
        (box,) = redactor.cover(0.1 * i, CLASSES, SIZE).xyxy
        assert contains(box, box_at(50)), i
        assert contains(box, box_at(250)), i


def test_two_tracks_and_untracked_detections_at_once() -> None:
    redactor = Redactor(0.7)
    boxes = [box_at(50), box_at(150), box_at(220), box_at(280)]
    redactor.add(detections(*boxes, ids=[3, -1, 7, -1]), 0.0, SIZE)
    found = redactor.cover(0.0, CLASSES, SIZE)
    np.testing.assert_allclose(found.xyxy, [with_margin(box) for box in boxes], atol=1e-3)
    assert found.tracker_id is not None
    assert found.tracker_id.tolist() == [3, -1, 7, -1]
    assert found.data["class_name"].tolist() == ["a"] * 4
    assert len(redactor.cover(0.6, CLASSES, SIZE)) == 4


def test_duplicates_extend_the_box_of_their_object() -> None:
    redactor = Redactor(0.7)
    found = detections(box_at(60), box_at(160), box_at(165), ids=[1, 2, -1])
    found.data["duplicate"] = np.array([False, False, True])
    redactor.add(found, 0.0, SIZE)
    covered = redactor.cover(0.0, CLASSES, SIZE)
    assert covered.tracker_id is not None
    assert covered.tracker_id.tolist() == [1, 2]
    assert contains(covered.xyxy[1], (150, 80, 175, 100))
    assert not contains(covered.xyxy[0], (150, 80, 175, 100))


def test_boxes_end_at_the_edge_of_the_frame() -> None:
    redactor = Redactor(0.7)
    for i in range(4):
        redactor.add(detections((290.0 + 8 * i, 80, 320, 100), ids=[1]), 0.1 * i, SIZE)
    for i in range(4, 10):
        (box,) = redactor.cover(0.1 * i, CLASSES, SIZE).xyxy
        assert contains(box, (314, 80, 320, 100))
        assert box[2] == 320


def test_boxes_follow_a_change_of_the_frame_size() -> None:
    redactor = Redactor(0.7)
    redactor.add(detections((100, 50, 140, 90), ids=[1]), 0.0, SIZE)
    np.testing.assert_allclose(redactor.cover(0.01, CLASSES, (640, 360)).xyxy, [with_margin((200, 100, 280, 180))])
    redactor.add(detections((200, 100, 280, 180), ids=[2]), 0.02, (640, 360))
    assert len(redactor.cover(0.7, CLASSES, (640, 360))) == 2


def test_detections_that_arrive_late_cover_longer() -> None:
    redactor = Redactor(0.7)
    redactor.add(detections(box_at(160), ids=[1]), 0.0, SIZE)
    assert len(redactor.cover(0.9, CLASSES, SIZE)) == 0
    assert len(redactor.cover(0.9, CLASSES, SIZE, delay=0.3)) == 1
    assert len(redactor.cover(1.5, CLASSES, SIZE, interval=2.0)) == 1


def test_detections_are_forgotten() -> None:
    redactor = Redactor(0.7)
    for i in range(600):
        redactor.add(detections(box_at(160), box_at(60), ids=[1 + i // 100, -1]), i / FPS, SIZE)
        redactor.cover(i / FPS, CLASSES, SIZE)
    assert sum(len(track.times) for track in redactor._tracks.values()) < 300


# In `watch` and `annotate_video` ------------------------------------------------------------------------------------


def redactions(found: Sequence[TrackedFrame]) -> list[sv.Detections]:
    covered = [tracked.redaction for tracked in found]
    assert None not in covered
    return [boxes for boxes in covered if boxes is not None]


DOG = MovingObject("dog", (100, 100), frames=range(20, 41))


def test_nothing_is_computed_without_redact() -> None:
    images = [numbered_image(n, SIZE) for n in range(12)]
    assert {t.redaction for t in track_streams([images], ["dog"], model=ScriptedDetector(DOG), every=5)} == {None}


def test_redaction_leaves_detections_as_they_are() -> None:
    images = [numbered_image(n, SIZE) for n in range(100)]
    things = (DOG, MovingObject("dog", (40, 60), (2, 0.5)), MovingObject("cat", (300, 120), (-3, 0), range(10, 90)))
    model = ScriptedDetector(*things, fails=lambda n: n % 3 == 1)
    plain, redacted = (
        list(track_streams([images], ["dog", "cat"], model=model, every=4, tracking=setting))
        for setting in (Tracking(), Tracking(redact=True))
    )
    assert [frame_number(t.frame.image) for t in redacted] == list(range(100))
    for before, after in zip(plain, redacted, strict=True):
        assert before.detections == after.detections
        assert before.is_keyframe == after.is_keyframe


def test_failed_detections_are_bridged() -> None:
    images = [numbered_image(n, SIZE) for n in range(60)]
    detector = ScriptedDetector(MovingObject("dog", (60, 100), (2, 0)), fails=lambda n: 15 <= n < 35)
    found = list(track_streams([images], ["dog"], model=detector, every=5, tracking=Tracking(redact=True)))
    for number, covered in enumerate(redactions(found)):
        assert contains(covered.xyxy[0], detector.objects[0].box(number).tolist()), number


def test_nothing_is_covered_beyond_a_cut() -> None:
    dark = [numbered_image(n, SIZE) for n in range(24)]
    images = [*dark, *(np.ascontiguousarray(numbered_image(n, SIZE)[::-1]) for n in range(24, 48))]
    detector = ScriptedDetector(MovingObject("dog", (100, 100), frames=range(23)), read_number=tell)
    tracking = Tracking(scene_change=True, redact=True)
    found = list(track_streams([images], ["dog"], model=detector, every=5, tracking=tracking))
    assert [len(covered) for covered in redactions(found)] == [1] * 24 + [0] * 24


def tell(image: np.ndarray) -> int:
    """Read the number of a frame that may be upside down."""
    upright = (image[-1, 0] == (0, 0, 255)).all()
    return frame_number(image if upright else image[::-1])


def test_a_change_of_the_frame_size_does_not_uncover() -> None:
    images = [numbered_image(n, SIZE if n < 30 else (160, 90)) for n in range(60)]
    detector, tracking = ScriptedDetector(DOG._replace(frames=range(26))), Tracking(redact=True)
    covered = redactions(list(track_streams([images], ["dog"], model=detector, every=5, tracking=tracking)))
    assert [len(boxes) for boxes in covered] == [1] * 47 + [0] * 13  # detected on frames 20 and 25
    assert contains(covered[29].xyxy[0], box_at(100, 100, 15))
    assert contains(covered[30].xyxy[0], box_at(50, 50, 7.5))


def test_track_yields_the_covering_boxes() -> None:
    images = [numbered_image(n, SIZE) for n in range(80)]
    pairs = list(
        track(images, ["dog"], model=ScriptedDetector(DOG), every=5, tracking=Tracking(bridge_seconds=0.5, redact=True))
    )
    assert [frame_number(image) for image, found in pairs if len(found)] == list(range(5, 56))


def test_blur_covers_what_json_says_and_counts_what_box_counts(tmp_path: Path) -> None:
    images = [numbered_image(n, SIZE) for n in range(80)]
    zones = {"lines": [{"name": "door", "start": [160, 0], "end": [160, 180]}]}
    walker = MovingObject("dog", (60, 100), (2.5, 0), frames=range(20, 71))
    counts, lines, summaries = {}, {}, {}
    for what in ("box", "blur"):
        counted, text = Zones.from_dict(zones), io.StringIO()
        summaries[what] = annotate_video(
            images, None, ["dog"], annotate=what, model=ScriptedDetector(walker), every=5, zones=counted, json=text
        )
        counts[what] = counted.counts()
        lines[what] = [json.loads(line)["detections"] for line in text.getvalue().splitlines()]
    assert counts["box"] == counts["blur"]
    assert summaries["box"].classes == summaries["blur"].classes
    assert [n for n in range(80) if lines["box"][n]] == list(range(20, 71))
    assert [n for n in range(80) if lines["blur"][n]] == list(range(80))


def test_an_annotator_blurs_the_redaction_and_draws_the_detections() -> None:
    image = next(textured_frames())
    covering = detections(box_at(200, half=30), ids=[1])
    blurred = Annotator("blur")(image, detections(box_at(50), ids=[1]), redaction=covering)
    changed = (blurred != image).any(2)
    assert changed[60:120, 170:230].mean() > 0.95
    changed[60:120, 170:230] = False
    assert not changed.any()


# Warnings and limits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("every", "warns"), [(60, True), (22, True), (21, False), (5, False)])
def test_gaps_longer_than_the_bridge_are_warned_of(every: int, warns: bool, caplog: pytest.LogCaptureFixture) -> None:
    images = [numbered_image(n, SIZE) for n in range(130)]
    annotate_video(images, None, ["dog"], annotate="blur", model=ScriptedDetector(DOG), every=every)
    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(messages) == warns
    if warns:
        assert f"no detection ran for {every / FPS:.2f} s, and redaction bridges 0.7 s" in messages[0]
        assert f"decrease every (now {every}) or increase bridge_seconds" in messages[0]
    caplog.clear()
    annotate_video(images, None, ["dog"], annotate="box", model=ScriptedDetector(DOG), every=every)
    longer = Tracking(bridge_seconds=2.5)
    annotate_video(images, None, ["dog"], annotate="blur", model=ScriptedDetector(DOG), every=every, tracking=longer)
    assert caplog.records == []


def test_frames_that_exceed_the_memory_limit_come_out_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    images = [numbered_image(n, SIZE) for n in range(90)]
    monkeypatch.setattr(stream, "MAX_HELD_BYTES", 10 * images[0].nbytes)
    read = out = most = 0

    def counted() -> Iterator[np.ndarray]:
        nonlocal read
        for image in images:
            read += 1
            yield image

    for tracked in track_streams(
        [counted()], ["dog"], model=ScriptedDetector(DOG), every=3, tracking=Tracking(redact=True)
    ):
        assert frame_number(tracked.frame.image) == out
        out += 1
        most = max(most, read - out)
    assert out == 90
    assert most <= 12
    (record,) = caplog.records
    assert "frames of 0.7 s exceed the limit of 1.6" in record.getMessage()


def test_auto_detects_within_the_bridge(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    class Clock:
        perf_counter = staticmethod(lambda: now[0])

    monkeypatch.setattr(offline, "time", Clock)
    monkeypatch.setattr("moondream_cv.video.tracking.keyframe_detector.time", Clock)
    images = [numbered_image(n, SIZE) for n in range(200)]
    steps = {}
    for redact in (False, True):
        detector = ScriptedDetector(DOG, seconds=2.0, sleep=sleep)
        for _ in track_streams([images], ["dog"], model=detector, tracking=Tracking(bridge_seconds=0.5, redact=redact)):
            pass
        steps[redact] = np.diff(detector.keyframes).max()
    assert steps[False] > 15
    assert steps[True] == 15


@pytest.mark.parametrize("bridge", [-0.1, math.nan, math.inf])
def test_an_impossible_bridge_is_rejected(bridge: float) -> None:
    with pytest.raises(ValueError, match=f"bridge_seconds must be 0 or more seconds, got {bridge}"):
        Tracking(bridge_seconds=bridge)


def test_a_bridge_of_zero_covers_detections_alone() -> None:
    images = [numbered_image(n, SIZE) for n in range(60)]
    tracking = Tracking(bridge_seconds=0.0, redact=True)
    found = list(track_streams([images], ["dog"], model=ScriptedDetector(DOG), every=1, tracking=tracking))
    assert [n for n, covered in enumerate(redactions(found)) if len(covered)] == list(range(19, 42))
