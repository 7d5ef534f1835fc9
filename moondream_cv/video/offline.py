"""Tracking in files: every frame is returned, with boxes that are interpolated between keyframes."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import replace

import numpy as np
import supervision as sv

from moondream_cv.video.sources.frame import Frame
from moondream_cv.video.stream_context import RedactionWarnings, StreamContext, TrackedFrame, resolution_of
from moondream_cv.video.threads import iterate_in_threads
from moondream_cv.video.tracking.interpolation import (
    UNKNOWN_INTERVAL,
    interpolate_boxes,
    predict_boxes,
    to_detections,
)
from moondream_cv.video.tracking.keyframe_detector import DetectionFuture
from moondream_cv.video.tracking.redaction import LOOKAHEAD, Redactor
from moondream_cv.video.tracking.scene_cuts import SegmentBoundaries
from moondream_cv.video.tracking.schedule import Schedule
from moondream_cv.video.tracking.tracker import Tracker
from moondream_cv.video.tracking.tracks import Track

KEYFRAMES_AHEAD = 2  # keyframes after a frame whose detections it waits for
MAX_PENDING = 3  # keyframes that wait for the detector, so that it is never idle
PREFETCHED = 4  # decoded frames of a file that wait


def track_offline(context: StreamContext) -> Generator[TrackedFrame, None, None]:
    """Yield every frame of a source that can wait, in order, with interpolated boxes.

    If the source fails, the frames before the failure are yielded first.
    """
    # Start the first segment
    schedule = context.create_schedule()
    boundaries = SegmentBoundaries(context.tracking.scene_change)
    warnings = RedactionWarnings(context)
    segment = Segment(
        context, context.tracking.create_tracker(), schedule, context.tracking.create_redactor(), warnings
    )
    source = context.source
    frames = iter(iterate_in_threads([source], [source.name], PREFETCHED) if source.can_prefetch else source)

    # Add frames, and yield those that are complete
    source_error: Exception | None = None
    while True:
        try:
            frame = next(frames, None)
        except Exception as error:
            source_error = error
            break
        if frame is None:
            break
        if boundary := boundaries.check(frame.image):
            yield from segment.finish()
            redactor = context.tracking.create_redactor() if boundary == "cut" else segment.redactor
            segment = Segment(context, segment.tracker.successor(), schedule, redactor, warnings)
            schedule.restart()
        segment.add(frame, schedule.is_due(frame.index))
        yield from segment.ready_frames()

    # Yield the rest
    yield from segment.finish()
    if source_error is not None:
        raise source_error


class Segment:
    """The frames between two segment boundaries, which wait for the keyframes after them.

    A frame gets its boxes when detection has run on the next `KEYFRAMES_AHEAD` keyframes and on those of the next
    `bridge_seconds`. With redaction, it also waits for the keyframes of the next `LOOKAHEAD` bridges.

    Attributes:
        tracker: Tracker of the segment.
        redactor: Redactor; None without redaction.
    """

    def __init__(
        self,
        context: StreamContext,
        tracker: Tracker,
        schedule: Schedule,
        redactor: Redactor | None,
        warnings: RedactionWarnings,
    ) -> None:
        """Start without frames."""
        self._context, self.tracker, self._schedule = context, tracker, schedule
        self.redactor, self._warnings = redactor, warnings
        self._frames: deque[Frame] = deque()  # without boxes
        self._unredacted: deque[tuple[TrackedFrame, float]] = deque()  # with boxes, and the keyframe interval there
        self._held_bytes = 0  # memory of all waiting frames
        self._pending: deque[tuple[Frame, DetectionFuture]] = deque()  # keyframes in detection
        self._completed: deque[int] = deque(
            maxlen=KEYFRAMES_AHEAD
        )  # latest keyframes after detection, including failed ones
        self._keyframes: deque[tuple[Frame, sv.Detections]] = deque()  # with detections, from the first frame on
        self._tracks: dict[
            int, Track
        ] = {}  # tracks on the waiting frames, including tracks that the tracker has dropped
        self._known_until = -math.inf  # time of the latest keyframe in `_completed`
        self._wall_time = time.perf_counter()

    def add(self, frame: Frame, is_keyframe: bool) -> None:
        """Add the next frame."""
        self._frames.append(frame)
        self._held_bytes += frame.image.nbytes
        if is_keyframe:
            self._detect(frame)

    def ready_frames(self) -> Iterator[TrackedFrame]:
        """Yield the frames that are complete. Wait for the detector if too many frames are held."""
        while self._pending and (self._pending[0][1].done() or len(self._pending) > MAX_PENDING or self._is_full):
            yield from self._complete_keyframe()
        while self._is_full:
            if self._unredacted:
                self._warnings.check_lookahead(self._known_until - self._unredacted[0][0].frame.time)
                yield self._redact_next()
            else:
                yield from self._track_next()

    def finish(self) -> Iterator[TrackedFrame]:
        """Yield all remaining frames. The last frame becomes a keyframe, so that boxes are known up to it."""
        if self._frames:
            last = self._frames[-1]
            if last.index not in (*self._completed, *(frame.index for frame, _ in self._pending)):
                self._detect(last)
        while self._pending:
            yield from self._complete_keyframe()
        while self._frames:
            yield from self._track_next()
        while self._unredacted:
            yield self._redact_next()

    @property
    def _is_full(self) -> bool:
        return self._held_bytes > self._context.max_held_bytes and len(self._frames) + len(self._unredacted) > 1

    def _detect(self, frame: Frame) -> None:
        self._pending.append((frame, self._context.detect(frame)))

    def _complete_keyframe(self) -> Iterator[TrackedFrame]:
        """Wait for the detections of the next keyframe, and yield the frames that they complete."""
        # Wait for the detections
        frame, future = self._pending.popleft()
        detections = future.result()
        self._completed.append(frame.index)
        self._known_until = frame.time

        # Update tracks, redaction and schedule
        if detections is not None:
            previous = self._keyframes[-1][0].index if self._keyframes else frame.index
            tracked = self.tracker.update(detections, frame)
            self._keyframes.append((frame, tracked))
            self._update_tracks()
            if self.redactor is not None:
                self.redactor.add(tracked, frame.time, resolution_of(frame))
                self._warnings.check_interval(self.tracker.interval)
            now = time.perf_counter()
            if self.tracker.interval > 0:
                slowdown = (now - self._wall_time) / self.tracker.interval
                self._schedule.adapt(self._context.keyframe_detector.seconds, slowdown, frame.index - previous)
            self._wall_time = now

        # Yield complete frames
        if len(self._completed) == KEYFRAMES_AHEAD:
            known = self._known_until - self._context.tracking.bridge_seconds
            while self._frames and self._frames[0].index < self._completed[0] and self._frames[0].time <= known:
                yield from self._track_next()
        if self.redactor is not None:
            lookahead = LOOKAHEAD * self.redactor.bridge_seconds
            while self._unredacted and self._unredacted[0][0].frame.time + lookahead <= self._known_until:
                yield self._redact_next()

    def _update_tracks(self) -> None:
        """Copy the tracks of the tracker, and drop those that ended before the waiting frames."""
        self._tracks.update(self.tracker.tracks)
        start = self._frames[0].time if self._frames else self._known_until
        start -= self._context.tracking.bridge_seconds
        for tracker_id, track in list(self._tracks.items()):
            is_dropped = tracker_id not in self.tracker.tracks
            if is_dropped and track.last.time < start - KEYFRAMES_AHEAD * self.tracker.interval:
                del self._tracks[tracker_id]

    def _track_next(self) -> Iterator[TrackedFrame]:
        """Compute the boxes of the next frame, and yield it unless it waits for redaction."""
        # Find the keyframes around the frame
        frame = self._frames.popleft()
        while len(self._keyframes) > 1 and self._keyframes[1][0].index <= frame.index:
            self._keyframes.popleft()
        resolution_wh = resolution_of(frame)
        times = [keyframe.time for keyframe, _ in self._keyframes]
        tracks, tracking = self._tracks.values(), self._context.tracking

        # Interpolate, or predict after the last keyframe
        interval = self.tracker.interval or UNKNOWN_INTERVAL
        if times and times[-1] >= frame.time:
            interval = float(max(np.diff(times[: 1 + KEYFRAMES_AHEAD]), default=self.tracker.interval))
            boxes = interpolate_boxes(
                tracks, frame.time, interval, resolution_wh, tracking.pad_to_keyframes, tracking.bridge_seconds
            )
        else:
            boxes = predict_boxes(tracks, frame.time, interval, resolution_wh)

        # Return the frame, or keep it for redaction
        is_keyframe = bool(self._keyframes) and self._keyframes[0][0] is frame
        found = self._keyframes[0][1] if is_keyframe else None
        detections = to_detections(boxes, self._context.classes, resolution_wh, found)
        tracked = TrackedFrame(frame, detections, is_keyframe, self._context.index)
        if self.redactor is None:
            self._held_bytes -= frame.image.nbytes
            yield tracked
        else:
            self._unredacted.append((tracked, interval))

    def _redact_next(self) -> TrackedFrame:
        """Return the next frame that has boxes, with the boxes that cover its objects."""
        assert self.redactor is not None, "only called with redaction"
        tracked, interval = self._unredacted.popleft()
        frame = tracked.frame
        self._held_bytes -= frame.image.nbytes
        covered = self.redactor.cover(frame.time, self._context.classes, resolution_of(frame), interval=interval)
        return replace(tracked, redaction=covered)
