"""Redaction covers moving objects between their detections. Run with `pytest tests/video/test_redaction.py`."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import supervision as sv

from moondream_cv import Detector, load
from moondream_cv.cli import demo_clip
from moondream_cv.evaluation.tracks import truth_of
from moondream_cv.scenes.clips import render_clip
from moondream_cv.video import Tracking, annotate_video, track_streams
from moondream_cv.video.sources.base import Source
from moondream_cv.video.sources.frame import Frame
from moondream_cv.video.tracking.redaction import BRIDGE_SECONDS, LOOKAHEAD, Redactor
from tests.helpers.clips import ScriptedDetector
from tests.helpers.redaction import CLASSES, FPS, FRAMES, SIZE, Box, decoded, redactions, textured_frames


class Object(NamedTuple):
    """An object on one frame."""

    track_id: int
    name: str
    xyxy: Box


Truth = list[list[Object]]


def rendered_clip(seed: int, num_objects: int) -> Truth:
    """Return objects that bounce, move in circles, leave and return, on frames that show at least a quarter of them."""
    clip = render_clip(seed, num_frames=FRAMES, num_objects=num_objects, num_classes=2, resolution_wh=SIZE)
    names = dict(zip(clip.class_names, CLASSES, strict=True))
    return [[Object(o.track_id, names[o.name], o.xyxy) for o in objects] for objects in truth_of(clip)]


def scripted_clip(seed: int) -> Truth:
    """Return objects that enter, turn by 90 and 180 degrees, wait and leave."""
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
            if (seen[2:] > seen[:2]).all() and (
                seen[2:] - seen[:2]
            ).prod() >= half.prod():  # at least a quarter of its area
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


class MissingDetector:
    """Detector that returns the objects of a clip, except for a random share.

    Attributes:
        times: Times in seconds at which each object was detected, by track ID.
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

    def should_be_covered(self, item: Object, time: float, *, live: bool = False) -> bool:
        """Return whether the object was detected within `BRIDGE_SECONDS`; for a live source, before the frame."""
        since = [time - found for found in self.times.get(item.track_id, [])]
        return any((0 if live else -BRIDGE_SECONDS) - 1e-6 <= s <= BRIDGE_SECONDS + 1e-6 for s in since)


def exposed_share(
    truth: Truth, detector: MissingDetector, covered: Sequence[np.ndarray], *, live: bool = False
) -> tuple[int, int]:
    """Count the objects that should be covered, and those of which more than half is visible.

    Args:
        truth: The objects on each frame.
        detector: Detector that was used.
        covered: [H, W] bool mask or [N, 4] boxes for each frame.
        live: Require coverage only after a detection.
    """
    total = exposed = 0
    for number, (objects, cover) in enumerate(zip(truth, covered, strict=True)):
        mask = cover
        if cover.dtype != bool:
            mask = np.zeros((SIZE[1], SIZE[0]), bool)
            for left, top, right, bottom in cover.round().astype(int).tolist():
                mask[top:bottom, left:right] = True
        for item in objects:
            if detector.should_be_covered(item, number / FPS, live=live):
                left, top, right, bottom = (round(value) for value in item.xyxy)
                total += 1
                exposed += mask[top:bottom, left:right].mean() < 0.5
    return total, exposed


@pytest.mark.slow
@pytest.mark.parametrize(("missed", "limit"), [(0.1, 0.005), (0.3, 0.005), (0.5, 0.01)])
@pytest.mark.parametrize("every", [1, 5, 15])
def test_objects_are_blurred_within_bridge_seconds_of_a_detection(
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
    """Return the frames of the demo clip, its fully visible circles by track, and the detections of the tiny model."""
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
def test_demo_circles_are_covered_between_their_detections(
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


def test_redaction_leaves_most_of_the_frame_uncovered(tmp_path: Path) -> None:
    """The tests above would pass for a video that is gray everywhere."""
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
    assert np.mean(covered) < 0.2  # share of the frame


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 5])
def test_coverage_does_not_depend_on_track_ids(every: int) -> None:
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
    """Live source whose frames are each returned before the next one is read."""

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


@pytest.mark.slow
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
