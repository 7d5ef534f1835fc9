"""`OnlineTracker`: tracking in live streams and custom loops, with boxes that are predicted between keyframes."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from numbers import Real

import numpy as np
import numpy.typing as npt
import supervision as sv

from moondream_cv.arguments import check_classes, check_integer
from moondream_cv.video.drawing.zones import class_names
from moondream_cv.video.sources.base import ASSUMED_FPS
from moondream_cv.video.sources.frame import Frame
from moondream_cv.video.stream_context import RedactionWarnings, StreamContext, TrackedFrame, resolution_of
from moondream_cv.video.tracking.interpolation import MAX_GAP, UNKNOWN_INTERVAL, predict_boxes, to_detections
from moondream_cv.video.tracking.keyframe_detector import DetectionFuture
from moondream_cv.video.tracking.scene_cuts import SegmentBoundaries
from moondream_cv.video.tracking.schedule import Schedule
from moondream_cv.video.tracking.settings import Tracking


class OnlineTracker:
    """Tracks objects through a stream, frame by frame: detection on keyframes, predicted boxes in between.

        import cv2, time
        from moondream_cv import Detector
        from moondream_cv.video import OnlineTracker

        detector, tracker, capture = Detector("moondream2"), OnlineTracker(every=5), cv2.VideoCapture(0)
        while True:
            is_read, image = capture.read()
            if not is_read:
                break
            now = time.monotonic()
            found = detector(image, ["dog", "cat"]) if tracker.needs_detections(image, now) else None
            detections = tracker.step(image, now, found)  # with tracker_id

    Use one tracker per stream, and call `step` on every frame. A change of the frame size, and with
    `Tracking(scene_change=True)` a scene cut, starts a new segment: all tracks end, and its first frame is a keyframe.

    Attributes:
        redaction: Boxes that cover the objects on the latest frame, with `Tracking(redact=True)`; None without it.
    """

    def __init__(
        self, tracking: Tracking | None = None, *, every: int = 5, classes: str | Sequence[str] | None = None
    ) -> None:
        """Create a tracker without tracks.

        Args:
            tracking: Tracking options. `pad_to_keyframes` has no effect.
            every: Frames from one keyframe to the next, for `needs_detections`.
            classes: Class names by class ID; default: `data["class_name"]` of the detections.

        Raises:
            TypeError: `tracking` is neither `Tracking` nor None.
            ValueError: `every` is not an integer of at least 1, a class name is invalid, or the tracker or one of its
                options is unknown.
        """
        if tracking is not None and not isinstance(tracking, Tracking):
            raise TypeError(f"tracking must be a Tracking or None, got {type(tracking).__name__}: {tracking!r:.100}")
        self._tracking = tracking or Tracking()
        self._schedule = Schedule(check_integer("every", every), ASSUMED_FPS)
        self._classes = None if classes is None else check_classes(classes)
        self._learned_names: dict[int, str] = {}
        self._boundaries = SegmentBoundaries(self._tracking.scene_change)
        self._tracker = self._tracking.create_tracker()
        self._redactor = self._tracking.create_redactor()
        self._index = -1  # index of the latest frame
        self._segment_start = 0  # index of the first frame of the segment
        self._time = -math.inf  # time of the latest frame
        self._delay = 0.0  # seconds by which the latest detections arrived late
        self._checked: tuple[float, bool] | None = None  # the next frame's time, and whether it is a keyframe
        self.redaction: sv.Detections | None = None

    @property
    def interval(self) -> float:
        """Seconds between the last two keyframes of the segment; 0 before the second one."""
        return self._tracker.interval

    def reset(self) -> None:
        """End all tracks. The next frame is a keyframe, new tracks get new IDs, and times may start again from 0."""
        self._boundaries = SegmentBoundaries(self._tracking.scene_change)
        self._checked, self._time = None, -math.inf
        self._start_segment(self._index + 1)
        self._redactor = self._tracking.create_redactor()

    def needs_detections(self, image: npt.NDArray[np.uint8], time: float) -> bool:
        """Return whether the next frame is a keyframe: the first of a segment, or `every` frames after the last one.

        Args:
            image: [H, W, 3] uint8 BGR; the image for the following `step`.
            time: Time of the frame in seconds.

        Raises:
            ValueError: `image` is not an image, or `time` is not a number.
        """
        _check_frame(image, time)
        return self.is_keyframe(Frame(image, self._index + 1, time))

    def is_keyframe(self, frame: Frame) -> bool:
        """Return whether the next frame is a keyframe, like `needs_detections`; for `step_frame`."""
        if self._checked is None or self._checked[0] != frame.time:
            self._check_boundary(frame.image, frame.index)
            self._checked = (frame.time, self._schedule.is_due(frame.index))
        return self._checked[1]

    def step(self, image: npt.NDArray[np.uint8], time: float, detections: sv.Detections | None = None) -> sv.Detections:
        """Process the next frame.

        Args:
            image: [H, W, 3] uint8 BGR.
            time: Time of the frame in seconds, no less than that of the previous frame.
            detections: Detections of the frame if it is a keyframe; None to predict the boxes.

        Returns:
            The objects on the frame, with `tracker_id` from 1. Boxes are clipped to the frame. On keyframes, untracked
            detections are included with ID -1.

        Raises:
            TypeError: `detections` is neither `sv.Detections` nor None.
            ValueError: `time` is not a number or is less than that of the previous frame, or `image` is not an image.
        """
        _check_frame(image, time)
        if detections is not None and not isinstance(detections, sv.Detections):
            raise TypeError(f"detections must be sv.Detections or None, got {type(detections).__name__}")
        if not time >= self._time:  # also true for NaN
            raise ValueError(
                f"time must not decrease, got {time!r} after {self._time!r}; call reset() for a new stream"
            )
        return self.step_frame(Frame(image, self._index + 1, time), detections)

    def step_frame(
        self,
        frame: Frame,
        detections: sv.Detections | None = None,
        *,
        keyframe: Frame | None = None,
        unknown_interval: float = UNKNOWN_INTERVAL,
        min_interval: float = 0.0,
    ) -> sv.Detections:
        """Process the next frame, like `step`, for streams with dropped frames and for detection in the background.

        Args:
            frame: The frame. Its index may count dropped frames.
            detections: Detections of the keyframe; None if there are none yet.
            keyframe: The frame on which the detector ran, if it is an earlier one; default: `frame`. Detections of an
                earlier segment are ignored.
            unknown_interval: Seconds between keyframes to assume before there are two.
            min_interval: Minimum seconds between keyframes to assume.

        Returns:
            The objects on the frame, as from `step`.
        """
        # Start a new segment at a boundary
        if self._checked is None or self._checked[0] != frame.time:
            self._check_boundary(frame.image, frame.index)
        self._checked = None
        self._index, self._time = frame.index, frame.time

        # Update the tracks on a keyframe
        keyframe = keyframe or frame
        tracked = None
        if detections is not None and keyframe.index >= self._segment_start:
            self._learned_names.update(_names_by_class_id(detections))
            tracked = self._tracker.update(detections, keyframe)
            self._delay = frame.time - keyframe.time
            if self._redactor is not None:
                self._redactor.add(tracked, keyframe.time, resolution_of(keyframe))

        # Predict the boxes
        resolution_wh = resolution_of(frame)
        interval = max(self.interval or unknown_interval, min_interval)
        names = self._learned_names if self._classes is None else self._classes
        boxes = predict_boxes(self._tracker.tracks.values(), frame.time, interval, resolution_wh)
        if self._redactor is not None:
            self.redaction = self._redactor.cover(
                frame.time, names, resolution_wh, interval=MAX_GAP * interval, delay=self._delay
            )
        return to_detections(boxes, names, resolution_wh, tracked if keyframe is frame else None)

    def _check_boundary(self, image: npt.NDArray[np.uint8], index: int) -> None:
        boundary = self._boundaries.check(image)
        if boundary:
            self._start_segment(index)
        if boundary == "cut":
            self._redactor = self._tracking.create_redactor()

    def _start_segment(self, index: int) -> None:
        self._tracker = self._tracker.successor()
        self._schedule.restart()
        self._segment_start = index


def track_online(context: StreamContext) -> Generator[TrackedFrame, None, None]:
    """Yield the newest frames of a live source at once, with predicted boxes.

    One keyframe at a time is in detection. With `every=1`, each frame waits for its own detections.
    """
    waits = context.every == 1
    every = 1 if context.every == "auto" else context.every
    tracker = OnlineTracker(context.tracking, every=every, classes=context.classes)
    warnings = RedactionWarnings(context)
    pending: tuple[Frame, DetectionFuture] | None = None
    for frame in context.source:
        # Start detection on a keyframe
        if pending is None and tracker.is_keyframe(frame):
            pending = (frame, context.detect(frame))

        # Collect detections that have arrived
        keyframe, detections = None, None
        if pending is not None and (waits or pending[1].done()):
            keyframe, detections = pending[0], pending[1].result()
            pending = None

        # Track
        unknown_interval = max(UNKNOWN_INTERVAL, 2 * context.keyframe_detector.seconds)
        tracked = tracker.step_frame(frame, detections, keyframe=keyframe, unknown_interval=unknown_interval)
        if detections is not None and context.tracking.redact:
            warnings.check_interval(tracker.interval)
        is_keyframe = detections is not None and keyframe is frame
        yield TrackedFrame(frame, tracked, is_keyframe, context.index, tracker.redaction)


def _check_frame(image: object, time: object) -> None:
    if not isinstance(image, np.ndarray) or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        found = f"shape {image.shape}" if isinstance(image, np.ndarray) else f"{type(image).__name__}: {image!r:.100}"
        raise ValueError(f"image must be a BGR array of shape (height, width, 3), got {found}")
    if not isinstance(time, Real) or isinstance(time, bool):
        raise ValueError(f"time must be a number of seconds, got {time!r:.100}")


def _names_by_class_id(detections: sv.Detections) -> Mapping[int, str]:
    class_ids = [0] * len(detections) if detections.class_id is None else detections.class_id.tolist()
    return dict(zip(class_ids, class_names(detections), strict=True))
