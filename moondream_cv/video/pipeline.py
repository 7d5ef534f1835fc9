"""`annotate_video`: track objects in a video, and write the annotated video."""

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

from moondream_cv._deprecation import renamed_arguments, renamed_attribute
from moondream_cv.arguments import check_classes
from moondream_cv.video.drawing.annotation import Annotator
from moondream_cv.video.drawing.zones import Zones
from moondream_cv.video.sources.animations import image_format
from moondream_cv.video.sources.base import Source
from moondream_cv.video.sources.opening import open_source
from moondream_cv.video.stream import FrameStream, track_streams
from moondream_cv.video.stream_context import TrackedFrame, resolution_of
from moondream_cv.video.tracking.schedule import Every
from moondream_cv.video.tracking.settings import Tracking
from moondream_cv.video.writers.base import Writer
from moondream_cv.video.writers.json_lines import JsonLinesWriter
from moondream_cv.video.writers.mot import MotWriter
from moondream_cv.video.writers.video_file import MAX_FPS, MIN_FPS, VideoWriter
from moondream_cv.video.writers.window import Window


@dataclass
class ClassSummary:
    """Objects of one class in a video.

    Attributes:
        objects: Number of track IDs.
        frames: Number of frames with at least one object.
        most: Maximum number of objects on one frame.
        confidence: Mean confidence of all boxes; NaN without boxes.
    """

    objects: int = 0
    frames: int = 0
    most: int = 0
    confidence: float = float("nan")


@renamed_arguments(looked="detections_run")
@dataclass
class Summary:
    """Progress and results of `annotate_video`.

    Attributes:
        frames: Number of frames so far.
        frame_count: Total number of frames according to the source, which may be wrong; None if unknown.
        seconds: Time of the latest frame in the source.
        elapsed: Processing time in seconds.
        detections_run: Number of keyframes on which detection succeeded.
        failed: Number of keyframes on which the detector raised.
        problems: Number of frames that could not be decoded.
        classes: Summary of each class.
        zones: `Zones.counts` so far; None without zones.
        saved_frames: Number of frames in the finished video file, which is less than `frames` if the disk was full;
            None before the end, and without a video file.
    """

    frames: int = 0
    frame_count: int | None = None
    seconds: float = 0.0
    elapsed: float = 0.0
    detections_run: int = 0
    failed: int = 0
    problems: int = 0
    classes: dict[str, ClassSummary] = field(default_factory=dict)
    zones: dict[str, Any] | None = None
    saved_frames: int | None = None

    looked = renamed_attribute("Summary.looked", "detections_run")
    looked_fps = renamed_attribute("Summary.looked_fps", "detector_fps")

    @property
    def fps(self) -> float:
        """Output frames per second of processing time."""
        return self.frames / self.elapsed if self.elapsed > 0 else 0.0

    @property
    def detector_fps(self) -> float:
        """Keyframes with detections per second of processing time."""
        return self.detections_run / self.elapsed if self.elapsed > 0 else 0.0


@renamed_arguments(colour_by="color_by")
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
    color_by: Literal["class", "id"] = "class",
    json: str | Path | TextIO | None = None,
    mot: str | Path | TextIO | None = None,
    show: bool = False,
    audio: bool = True,
    device: str | None = None,
    fps: float | None = None,
    on_frame: Callable[[Summary], None] | None = None,
) -> Summary:
    """Detect and track objects in a video, and write the annotated video.

        annotate_video("in.mp4", "out.mp4", ["face", "license plate"], annotate="blur")

    The output stays playable after exceptions and Ctrl-C.

    Args:
        source: Source as for `track`.
        target: Path of an .mp4, .mov or .mkv file (H.264); None writes no video.
        classes: Class names, as for a `Detector`.
        annotate: Any of "box", "label", "trace", "dot", "blur" and "pixelate", as a list or separated by commas; or
            "none". "blur" and "pixelate" cover each object from `Tracking.bridge_seconds` (default: 0.7) before its
            first detection to `bridge_seconds` after its last one, with boxes that grow between detections. Objects
            that are not detected within that time stay uncovered. A warning is logged if no detection runs for longer.
        model: Model as for `track`, which also describes `every`, `confidence`, `tracking`, `device` and `fps`.
        zones: Lines and zones for counting: `Zones`, a dict in the format of a zone file, or the path of a zone file.
        panel: Add a table of counts to the right of the image.
        color_by: Color boxes by "class" or by track "id".
        json: Path, text stream, or "-" for standard output: JSON lines, one per frame. With blur and pixelate they
            contain the boxes that are covered.
        mot: Path, text stream, or "-" for standard output: tracks in the MOT Challenge format.
        show: Show the frames in a window; closing it ends the video.
        audio: Copy the audio tracks and subtitles of a video file.
        on_frame: Function that is called after each frame with the summary so far, which is the same object each time.

    Returns:
        Summary of the video.

    Raises:
        VideoError: The source cannot be read, or a target cannot be written.
        ValueError: An argument is out of range, or `json` or `mot` would overwrite the source.
    """
    # Check the arguments
    _check_overwrite(source, json=json, mot=mot)
    names, counted = check_classes(classes), _load_zones(zones)
    annotator = Annotator(annotate, names, color_by=color_by, zones=counted, panel=panel)
    tracking = replace(tracking or Tracking(), redact=bool(annotator.what & {"blur", "pixelate"}))
    with ExitStack() as opened:
        # Open the source and the writers
        video = opened.enter_context(open_source(source, fps=fps))
        if counted is not None and video.resolution_wh is not None:
            counted.shapes(video.resolution_wh)  # raises if a line or zone is outside the frame
        writers = opened.enter_context(ExitStack())
        image_writers: list[Writer] = []
        text_writers: list[Writer] = []
        output: VideoWriter | None = None
        if target is not None:
            output = writers.enter_context(_open_video_writer(target, video, _media_file(source) if audio else None))
            image_writers.append(output)
        if json is not None:
            text_writers.append(writers.enter_context(JsonLinesWriter(json)))
        if mot is not None:
            text_writers.append(writers.enter_context(MotWriter(mot)))
        window = writers.enter_context(Window(f"moondream_cv: {video.name}")) if show else None
        if window is not None:
            image_writers.append(window)

        # Track, annotate and write
        stream = opened.enter_context(
            track_streams(
                [video], names, model=model, every=every, confidence=confidence, tracking=tracking, device=device
            )
        )
        summary = Summary(frame_count=video.frame_count)
        tally = _Tally(names, summary)
        try:
            with writers:  # close them before the model, which may take a while
                for tracked in stream:
                    _write(tracked, annotator, counted, image_writers, text_writers)
                    tally.add(tracked, stream, counted)
                    if on_frame is not None:
                        on_frame(summary)
                    if window is not None and window.closed:
                        break
        finally:
            summary.saved_frames = None if output is None else output.saved_frames
    return summary


def _open_video_writer(target: str | os.PathLike[str], video: Source, audio_from: Path | None) -> VideoWriter:
    return VideoWriter(
        Path(target),
        fps=None if video.fps is None else min(max(video.fps, MIN_FPS), MAX_FPS),
        audio_from=audio_from,
        start_time=video.recordings or None,
        sample_aspect_ratio=video.sample_aspect_ratio,
        colorspace=video.colorspace,
    )


def _write(
    tracked: TrackedFrame,
    annotator: Annotator,
    zones: Zones | None,
    image_writers: Sequence[Writer],
    text_writers: Sequence[Writer],
) -> None:
    frame, detections, redaction = tracked.frame, tracked.detections, tracked.redaction
    if zones is not None:
        zones.update(detections, resolution_of(frame))
    for writer in text_writers:
        boxes = redaction if isinstance(writer, JsonLinesWriter) else None
        writer.write(frame, detections if boxes is None else boxes)
    if image_writers:
        annotated = replace(frame, image=annotator(frame.image, detections, frame.time, redaction))
        for writer in image_writers:
            writer.write(annotated, detections)


class _Tally:
    """Updates a summary with each frame."""

    def __init__(self, classes: Sequence[str], summary: Summary) -> None:
        self._summary = summary
        self._started = time.perf_counter()
        self._ids: dict[str, set[int]] = {name: set() for name in classes}
        self._confidences = dict.fromkeys(classes, (0.0, 0))  # sum and number
        summary.classes = {name: ClassSummary() for name in classes}

    def add(self, tracked: TrackedFrame, stream: FrameStream, zones: Zones | None) -> None:
        summary, detector = self._summary, stream.keyframe_detector
        summary.frames += 1
        summary.seconds, summary.elapsed = tracked.frame.time, time.perf_counter() - self._started
        summary.detections_run, summary.failed = detector.detections_run, detector.failed
        summary.problems = stream.sources[0].problems
        for name, class_summary in summary.classes.items():
            self._add_class(name, class_summary, tracked.detections)
        if zones is not None:
            summary.zones = zones.counts()

    def _add_class(self, name: str, summary: ClassSummary, detections: sv.Detections) -> None:
        rows: list[int] = np.flatnonzero(np.asarray(detections.data["class_name"]) == name).tolist()
        if not len(rows) or detections.tracker_id is None or detections.confidence is None:
            return
        self._ids[name].update(i for i in detections.tracker_id[rows].tolist() if i >= 0)
        total, number = self._confidences[name]
        total, number = total + float(detections.confidence[rows].sum()), number + len(rows)
        self._confidences[name] = total, number
        summary.objects, summary.frames = len(self._ids[name]), summary.frames + 1
        summary.most = max(summary.most, len(rows))
        summary.confidence = total / number


def _check_overwrite(source: Any, **outputs: str | Path | TextIO | None) -> None:
    """Raise ValueError if a text file would overwrite the source. A video may: it replaces its target at the end."""
    if not isinstance(source, str | os.PathLike):
        return
    for argument, output in outputs.items():
        if isinstance(output, str | Path) and os.path.realpath(os.path.expanduser(output)) == os.path.realpath(
            os.path.expanduser(source)
        ):
            raise ValueError(f"{argument} would overwrite the source, {os.fspath(source)!r}; choose another file")


def _media_file(source: Any) -> Path | None:
    """Return the path of a source that may have audio; None for images, which FFmpeg may not be able to read."""
    if not isinstance(source, str | os.PathLike):
        return None
    path = Path(source).expanduser()
    return path if path.is_file() and image_format(path) is None else None


def _load_zones(zones: Zones | Mapping[str, Any] | str | os.PathLike[str] | None) -> Zones | None:
    if zones is None or isinstance(zones, Zones):
        return zones
    return Zones.from_dict(zones) if isinstance(zones, Mapping) else Zones.read(zones)
