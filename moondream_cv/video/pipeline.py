"""`annotate_video`: a video in, the names of things in, an annotated and tracked video out."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TextIO

import numpy as np
import supervision as sv

from moondream_cv.detector import check_classes
from moondream_cv.video.drawing.annotation import Annotator
from moondream_cv.video.drawing.zones import Zones
from moondream_cv.video.sources.animations import image_format
from moondream_cv.video.sources.opening import open_source
from moondream_cv.video.stream import Tracked, Tracking, Watch, watch
from moondream_cv.video.tracking.schedule import Every
from moondream_cv.video.writers.base import Writer
from moondream_cv.video.writers.json_lines import JsonLinesWriter
from moondream_cv.video.writers.mot import MotWriter
from moondream_cv.video.writers.video_file import MAX_FPS, MIN_FPS, VideoWriter
from moondream_cv.video.writers.window import Window


@dataclass
class ClassSummary:
    """What was seen of a class.

    Attributes:
        objects: How many different ones.
        frames: On how many frames there was one.
        most: How many there were at a time.
        confidence: Mean over all their boxes.
    """

    objects: int = 0
    frames: int = 0
    most: int = 0
    confidence: float = float("nan")


@dataclass
class Summary:
    """How far a video has come, and what was on it.

    Attributes:
        frames: That came out.
        frame_count: How many there will be, as far as the source says; it may be wrong.
        seconds: Of the source.
        elapsed: Seconds that it took.
        looked: Frames that the detector has looked at.
        failed: Frames on which the detector raised.
        problems: Frames that could not be decoded.
        classes: What was seen of each.
        zones: `Zones.counts` at the end; None without zones.
        saved_frames: Frames in the video file once it is closed, fewer than `frames` if the disk was full; None before,
            and without a video file.
    """

    frames: int = 0
    frame_count: int | None = None
    seconds: float = 0.0
    elapsed: float = 0.0
    looked: int = 0
    failed: int = 0
    problems: int = 0
    classes: dict[str, ClassSummary] = field(default_factory=dict)
    zones: dict[str, Any] | None = None
    saved_frames: int | None = None

    @property
    def fps(self) -> float:
        """Frames a second that came out."""
        return self.frames / self.elapsed if self.elapsed > 0 else 0.0

    @property
    def looked_fps(self) -> float:
        """Frames a second that were looked at."""
        return self.looked / self.elapsed if self.elapsed > 0 else 0.0


def annotate_video(
    source: Any,
    target: str | os.PathLike[str] | None,
    classes: str | Sequence[str],
    *,
    annotate: str | Sequence[str] = ("box", "label"),
    model: Any = "moondream2",
    every: Every = "auto",
    confidence: float = 0.0,
    tracking: Tracking | None = None,
    zones: Zones | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    panel: bool = False,
    colour_by: Literal["class", "id"] = "class",
    json: str | Path | TextIO | None = None,
    mot: str | Path | TextIO | None = None,
    show: bool = False,
    audio: bool = True,
    device: str | None = None,
    fps: float | None = None,
    on_frame: Callable[[Summary], None] | None = None,
) -> Summary:
    """Track what the names mean through a video, and write it with the boxes drawn.

        annotate_video("in.mp4", "out.mp4", ["face", "license plate"], annotate="blur")

    Whatever ends it, Ctrl-C and exceptions among them, what was written so far plays.

    Args:
        source: As for `track`.
        target: An .mp4, .mov or .mkv file (H.264); None writes no video.
        classes: Names, as for a `Detector`.
        annotate: Out of box, label, trace, dot, blur and pixelate, or "none". The last two cover each object from
            `Tracking.bridge_seconds` (by default 0.7) before its first detection to as long after its last one, with
            boxes that grow between detections. Objects that are not detected within that time stay uncovered. A
            warning is logged if no detection runs for longer.
        model: As for `track`, as are `every`, `confidence`, `tracking`, `device` and `fps`.
        zones: Lines and zones to count at: `Zones`, a dict like its file, or the path of one.
        panel: Put a table of counts beside the picture.
        colour_by: Whether things of a class or with an id share a colour.
        json: Where to write JSON lines, one a frame. With blur and pixelate they contain the boxes that are covered.
        mot: Where to write a MOT challenge text.
        show: Show the frames in a window as well; closing it ends the video.
        audio: Copy the sound tracks and the subtitles of a video file.
        on_frame: Called after each frame with what there is so far; always the same object.

    Returns:
        What came out.

    Raises:
        VideoError: The source cannot be read, or a target not be written; names it.
        ValueError: An argument is out of range, or `json` or `mot` is the source.
    """
    _keep_source(source, json=json, mot=mot)
    names, counted = check_classes(classes), _zones(zones)
    annotator = Annotator(annotate, names, colour_by=colour_by, zones=counted, panel=panel)
    tracking = replace(tracking or Tracking(), redact=bool(annotator.what & {"blur", "pixelate"}))
    with ExitStack() as opened:
        video = opened.enter_context(open_source(source, fps=fps))
        if counted is not None and video.resolution_wh is not None:
            counted.shapes(video.resolution_wh)  # what lies outside is told now
        writers = opened.enter_context(ExitStack())
        pictures: list[Writer] = []
        texts: list[Writer] = []
        output: VideoWriter | None = None
        if target is not None:
            output = VideoWriter(
                Path(target),
                fps=None if video.fps is None else min(max(video.fps, MIN_FPS), MAX_FPS),
                audio_from=_file(source) if audio else None,
                start_time=video.recordings or None,
                sample_aspect_ratio=video.sample_aspect_ratio,
                colorspace=video.colorspace,
            )
            pictures.append(writers.enter_context(output))
        if json is not None:
            texts.append(writers.enter_context(JsonLinesWriter(json)))
        if mot is not None:
            texts.append(writers.enter_context(MotWriter(mot)))
        window = writers.enter_context(Window(f"moondream_cv: {video.name}")) if show else None
        if window is not None:
            pictures.append(window)
        watched = opened.enter_context(
            watch([video], names, model=model, every=every, confidence=confidence, tracking=tracking, device=device)
        )
        summary = Summary(frame_count=video.frame_count)
        tally = _Tally(names, summary)
        try:
            with writers:  # they close first: a model may take its time
                for tracked in watched:
                    _write(tracked, annotator, counted, pictures, texts)
                    tally.add(tracked, watched, counted)
                    if on_frame is not None:
                        on_frame(summary)
                    if window is not None and window.closed:
                        break
        finally:
            summary.saved_frames = None if output is None else output.saved_frames
    return summary


def _write(
    tracked: Tracked, annotator: Annotator, zones: Zones | None, pictures: Sequence[Writer], texts: Sequence[Writer]
) -> None:
    frame, detections, redaction = tracked.frame, tracked.detections, tracked.redaction
    if zones is not None:
        zones.update(detections, (frame.image.shape[1], frame.image.shape[0]))
    for text in texts:
        boxes = redaction if isinstance(text, JsonLinesWriter) else None
        text.write(frame, detections if boxes is None else boxes)
    if pictures:
        drawn = replace(frame, image=annotator(frame.image, detections, frame.time, redaction))
        for picture in pictures:
            picture.write(drawn, detections)


class _Tally:
    """Counts into a summary."""

    def __init__(self, classes: Sequence[str], summary: Summary) -> None:
        self._summary = summary
        self._started = time.perf_counter()
        self._ids: dict[str, set[int]] = {name: set() for name in classes}
        self._scores = dict.fromkeys(classes, (0.0, 0))  # sum and number
        summary.classes = {name: ClassSummary() for name in classes}

    def add(self, tracked: Tracked, watched: Watch, zones: Zones | None) -> None:
        summary = self._summary
        summary.frames += 1
        summary.seconds, summary.elapsed = tracked.frame.time, time.perf_counter() - self._started
        summary.looked, summary.failed = watched.worker.looked, watched.worker.failed
        summary.problems = watched.sources[0].problems
        for name, seen in summary.classes.items():
            self._add_class(name, seen, tracked.detections)
        if zones is not None:
            summary.zones = zones.counts()

    def _add_class(self, name: str, seen: ClassSummary, detections: sv.Detections) -> None:
        rows: list[int] = np.flatnonzero(np.asarray(detections.data["class_name"]) == name).tolist()
        if not len(rows) or detections.tracker_id is None or detections.confidence is None:
            return
        self._ids[name].update(i for i in detections.tracker_id[rows].tolist() if i >= 0)
        total, number = self._scores[name]
        self._scores[name] = total + float(detections.confidence[rows].sum()), number + len(rows)
        seen.objects, seen.frames = len(self._ids[name]), seen.frames + 1
        seen.most = max(seen.most, len(rows))
        seen.confidence = self._scores[name][0] / self._scores[name][1]


def _keep_source(source: Any, **texts: str | Path | TextIO | None) -> None:
    """Raise ValueError if a text file would overwrite the source. A video may: it replaces its target at the end."""
    if not isinstance(source, str | os.PathLike):
        return
    for argument, text in texts.items():
        if isinstance(text, str | Path) and os.path.realpath(os.path.expanduser(text)) == os.path.realpath(
            os.path.expanduser(source)
        ):
            raise ValueError(f"{argument} would overwrite the source, {os.fspath(source)!r}; choose another file")


def _file(source: Any) -> Path | None:
    """The path of a source that is a file; None for images, which have no sound and which FFmpeg may not read."""
    if not isinstance(source, str | os.PathLike):
        return None
    path = Path(source).expanduser()
    return path if path.is_file() and image_format(path) is None else None


def _zones(zones: Zones | Mapping[str, Any] | str | os.PathLike[str] | None) -> Zones | None:
    if zones is None or isinstance(zones, Zones):
        return zones
    return Zones.from_dict(zones) if isinstance(zones, Mapping) else Zones.read(zones)
