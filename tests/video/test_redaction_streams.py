"""Redaction in `track_streams` and `annotate_video`. Run with `pytest tests/video/test_redaction_streams.py`."""

from __future__ import annotations

import io
import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from moondream_cv.video import Annotator, Tracking, Zones, annotate_video, offline, track, track_streams
from tests.helpers.clips import MovingObject, ScriptedDetector, frame_number, numbered_image
from tests.helpers.redaction import FPS, SIZE, box_at, contains, detections, redactions, textured_frames

DOG = MovingObject("dog", (100, 100), frames=range(20, 41))


def test_redaction_is_none_without_redact() -> None:
    images = [numbered_image(n, SIZE) for n in range(12)]
    assert {t.redaction for t in track_streams([images], ["dog"], model=ScriptedDetector(DOG), every=5)} == {None}


def test_redact_does_not_change_detections() -> None:
    images = [numbered_image(n, SIZE) for n in range(100)]
    objects = (DOG, MovingObject("dog", (40, 60), (2, 0.5)), MovingObject("cat", (300, 120), (-3, 0), range(10, 90)))
    model = ScriptedDetector(*objects, fails=lambda n: n % 3 == 1)
    plain, redacted = (
        list(track_streams([images], ["dog", "cat"], model=model, every=4, tracking=setting))
        for setting in (Tracking(), Tracking(redact=True))
    )
    assert [frame_number(t.frame.image) for t in redacted] == list(range(100))
    for before, after in zip(plain, redacted, strict=True):
        assert before.detections == after.detections
        assert before.is_keyframe == after.is_keyframe


def test_failed_keyframes_are_bridged() -> None:
    images = [numbered_image(n, SIZE) for n in range(60)]
    detector = ScriptedDetector(MovingObject("dog", (60, 100), (2, 0)), fails=lambda n: 15 <= n < 35)
    found = list(track_streams([images], ["dog"], model=detector, every=5, tracking=Tracking(redact=True)))
    for number, covered in enumerate(redactions(found)):
        assert contains(covered.xyxy[0], detector.objects[0].box(number).tolist()), number


def test_coverage_ends_at_a_scene_cut() -> None:
    dark = [numbered_image(n, SIZE) for n in range(24)]
    images = [*dark, *(np.ascontiguousarray(numbered_image(n, SIZE)[::-1]) for n in range(24, 48))]
    detector = ScriptedDetector(MovingObject("dog", (100, 100), frames=range(23)), read_number=number_of_flipped)
    tracking = Tracking(scene_change=True, redact=True)
    found = list(track_streams([images], ["dog"], model=detector, every=5, tracking=tracking))
    assert [len(covered) for covered in redactions(found)] == [1] * 24 + [0] * 24


def number_of_flipped(image: np.ndarray) -> int:
    """Return the number of a frame that may be upside down."""
    upright = (image[-1, 0] == (0, 0, 255)).all()
    return frame_number(image if upright else image[::-1])


def test_coverage_continues_when_the_frame_size_changes() -> None:
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


def test_blur_writes_covering_boxes_to_json_and_counts_detections(tmp_path: Path) -> None:
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


def test_annotator_blurs_the_redaction_boxes_only() -> None:
    image = next(textured_frames())
    covering = detections(box_at(200, half=30), ids=[1])
    blurred = Annotator("blur")(image, detections(box_at(50), ids=[1]), redaction=covering)
    changed = (blurred != image).any(2)
    assert changed[60:120, 170:230].mean() > 0.95
    changed[60:120, 170:230] = False
    assert not changed.any()


@pytest.mark.parametrize(("every", "warns"), [(60, True), (22, True), (21, False), (5, False)])
def test_gaps_longer_than_bridge_seconds_log_a_warning(
    every: int, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
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


def test_frames_beyond_the_memory_limit_log_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    images = [numbered_image(n, SIZE) for n in range(90)]
    monkeypatch.setattr("moondream_cv.video.stream.MAX_HELD_BYTES", 10 * images[0].nbytes)
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


def test_auto_interval_does_not_exceed_bridge_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_invalid_bridge_seconds_are_rejected(bridge: float) -> None:
    with pytest.raises(ValueError, match=f"bridge_seconds must be 0 or more seconds, got {bridge}"):
        Tracking(bridge_seconds=bridge)


def test_zero_bridge_seconds_cover_detections_only() -> None:
    images = [numbered_image(n, SIZE) for n in range(60)]
    tracking = Tracking(bridge_seconds=0.0, redact=True)
    found = list(track_streams([images], ["dog"], model=ScriptedDetector(DOG), every=1, tracking=tracking))
    assert [n for n, covered in enumerate(redactions(found)) if len(covered)] == list(range(19, 42))
