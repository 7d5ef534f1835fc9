"""Deprecated names of the video API still work, with a `FutureWarning` that gives the new name."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import supervision as sv

import moondream_cv.video
from moondream_cv.video import Annotator, Frame, Source, Summary, TrackedFrame, Tracking, annotate_video, track_streams
from tests.helpers.clips import ScriptedDetector
from tests.helpers.streams import CLASSES, WALKERS


def test_current_names_do_not_warn(clip: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        tracking = replace(Tracking(lost_track_seconds=3.0, pad_to_keyframes=True), redact=True)
        (first, *_) = track_streams([clip], CLASSES, model=ScriptedDetector(*WALKERS), every=5, tracking=tracking)
        summary = annotate_video(clip, None, CLASSES, model=ScriptedDetector(), every=5, color_by="id")
    assert first.is_keyframe
    assert summary.detections_run == 11


def test_watch_is_track_streams(clip: Path) -> None:
    with pytest.warns(FutureWarning, match=r"video\.watch is deprecated .*; use moondream_cv\.video\.track_streams"):
        watch: Any = moondream_cv.video.watch  # type: ignore[attr-defined]
    assert watch is track_streams
    assert len(list(watch([clip], CLASSES, model=ScriptedDetector(*WALKERS), every=5))) == 48


def test_tracked_is_tracked_frame() -> None:
    with pytest.warns(FutureWarning, match=r"video\.Tracked is deprecated .*; use moondream_cv\.video\.TrackedFrame"):
        assert moondream_cv.video.Tracked is TrackedFrame  # type: ignore[attr-defined]


def test_tracked_looked_is_is_keyframe(clip: Path) -> None:
    found = list(track_streams([clip], CLASSES, model=ScriptedDetector(*WALKERS), every=5))
    with pytest.warns(FutureWarning, match=r"TrackedFrame\.looked is deprecated .*; use TrackedFrame\.is_keyframe"):
        looked = [tracked.looked for tracked in found]
    assert looked == [tracked.is_keyframe for tracked in found]


@pytest.mark.parametrize(
    ("old", "new", "value"), [("memory", "lost_track_seconds", 3.0), ("cautious", "pad_to_keyframes", True)]
)
def test_old_tracking_options_set_the_new_ones(old: str, new: str, value: Any) -> None:
    with pytest.warns(FutureWarning, match=f"{old} is deprecated .*; use {new}"):
        tracking = Tracking(**{old: value})
    assert tracking == Tracking(**{new: value})
    with pytest.warns(FutureWarning, match=rf"Tracking\.{old} is deprecated .*; use Tracking\.{new}"):
        assert getattr(tracking, old) == value


def test_colour_by_is_color_by(clip: Path, tmp_path: Path) -> None:
    image = np.zeros((90, 120, 3), np.uint8)
    with pytest.warns(FutureWarning, match="colour_by is deprecated .*; use color_by"):
        annotator = Annotator("box", colour_by="id")  # type: ignore[call-arg]
    found = next(iter(track_streams([clip], CLASSES, model=ScriptedDetector(*WALKERS), every=5))).detections
    assert (annotator(image, found) == Annotator("box", color_by="id")(image, found)).all()
    with pytest.warns(FutureWarning, match="colour_by is deprecated .*; use color_by"):
        annotate_video(clip, tmp_path / "out.mp4", CLASSES, model=ScriptedDetector(), every=5, colour_by="id")  # type: ignore[call-arg]


def test_summary_looked_is_detections_run() -> None:
    summary = Summary(detections_run=10, elapsed=2.0)
    with pytest.warns(FutureWarning, match=r"Summary\.looked is deprecated .*; use Summary\.detections_run"):
        assert summary.looked == 10
    with pytest.warns(FutureWarning, match=r"Summary\.looked_fps is deprecated .*; use Summary\.detector_fps"):
        assert summary.looked_fps == summary.detector_fps == 5.0


def test_old_field_names_set_the_new_ones() -> None:
    frame = Frame(np.zeros((4, 4, 3), np.uint8), 0, 0.0)
    with pytest.warns(FutureWarning, match="TrackedFrame: the argument looked is deprecated .*; use is_keyframe"):
        assert TrackedFrame(frame, sv.Detections.empty(), looked=True).is_keyframe  # type: ignore[call-arg]
    with pytest.warns(FutureWarning, match="Summary: the argument looked is deprecated .*; use detections_run"):
        assert Summary(looked=3).detections_run == 3  # type: ignore[call-arg]


def test_worker_is_keyframe_detector(clip: Path) -> None:
    stream = track_streams([clip], CLASSES, model=ScriptedDetector(*WALKERS), every=5)
    with stream, pytest.warns(FutureWarning, match=r"worker is deprecated .*; use FrameStream\.keyframe_detector"):
        assert stream.worker is stream.keyframe_detector


def test_sources_with_the_old_names_are_read_as_before() -> None:
    with pytest.warns(FutureWarning, match=r"Source\.ahead is deprecated .*; use Source\.can_prefetch") as caught:

        class OldSource(Source):
            ahead = False

            def __next__(self) -> Frame:
                self.note_problem("broken")
                raise StopIteration

            def close(self) -> None:
                pass

    assert caught[0].filename == __file__
    source = OldSource("old")
    assert source.can_prefetch is False
    with pytest.warns(FutureWarning, match=r"Source\.note_problem is deprecated .*; use Source\.record_problem"):
        assert list(source) == []
    assert source.problems == 1
