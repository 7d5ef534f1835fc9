"""`TrackedFrame`, and the context of one source that the offline and the online path share."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import supervision as sv

from moondream_cv._deprecation import renamed_arguments, renamed_attribute
from moondream_cv.video.sources.base import ASSUMED_FPS
from moondream_cv.video.sources.frame import Frame
from moondream_cv.video.sources.opening import Source
from moondream_cv.video.tracking.keyframe_detector import DetectionFuture, KeyframeDetector
from moondream_cv.video.tracking.schedule import MAX_INTERVAL, Every, Schedule
from moondream_cv.video.tracking.settings import Tracking

logger = logging.getLogger(__name__)


@renamed_arguments(looked="is_keyframe")
@dataclass(frozen=True, eq=False)
class TrackedFrame:
    """A frame of a source with tracked detections.

    Attributes:
        frame: The frame of the source.
        detections: Detections in the format of a `Detector`, with `tracker_id`: track IDs from 1, unique over all
            classes of a source, and -1 for untracked detections.
        is_keyframe: Whether the detector ran on this frame.
        source: Index of the source, from 0.
        redaction: Boxes that cover the objects, with `Tracking(redact=True)`; None without it. They are larger than
            those of `detections`, and start earlier and end later.
    """

    frame: Frame
    detections: sv.Detections
    is_keyframe: bool
    source: int = 0
    redaction: sv.Detections | None = None

    looked = renamed_attribute("TrackedFrame.looked", "is_keyframe")


@dataclass(frozen=True)
class StreamContext:
    """One source with its settings and the keyframe detector.

    Attributes:
        source: The source.
        index: Index of the source, from 0.
        classes: Class names by class ID.
        keyframe_detector: Detector shared by all sources.
        every: Frames between keyframes, or "auto".
        tracking: Tracking options.
        max_held_bytes: Memory limit in bytes for frames that wait for keyframes.
    """

    source: Source
    index: int
    classes: Sequence[str]
    keyframe_detector: KeyframeDetector
    every: Every
    tracking: Tracking
    max_held_bytes: int

    def detect(self, frame: Frame) -> DetectionFuture:
        """Queue a keyframe for detection, and return a future of its detections."""
        return self.keyframe_detector.submit(frame, self.source.name, self.index)

    def create_schedule(self) -> Schedule:
        """Return a keyframe schedule for a file. With redaction, "auto" never exceeds `bridge_seconds`."""
        fps = self.source.fps or ASSUMED_FPS
        longest = max(1, int(self.tracking.bridge_seconds * fps)) if self.tracking.redact else MAX_INTERVAL
        return Schedule(self.every, fps, longest)


class RedactionWarnings:
    """Logs why redaction may leave objects uncovered, once per reason."""

    def __init__(self, context: StreamContext) -> None:
        """Start without warnings."""
        self._context = context
        self._logged: set[str] = set()

    def check_interval(self, seconds: float) -> None:
        """Warn if the time since the previous keyframe exceeds the bridge.

        Args:
            seconds: Time between the last two keyframes.
        """
        bridge = self._context.tracking.bridge_seconds
        if seconds > bridge + 1e-6:
            self._warn(
                "interval",
                f"no detection ran for {seconds:.2f} s, and redaction bridges {bridge:g} s: objects may show; "
                f"decrease every (now {self._context.every!r}) or increase bridge_seconds",
            )

    def check_lookahead(self, seconds: float) -> None:
        """Warn if a frame is returned before detection has run on the frames of the next bridge.

        Args:
            seconds: Time from the frame to the latest keyframe with detections.
        """
        bridge = self._context.tracking.bridge_seconds
        if seconds < bridge:
            limit = self._context.max_held_bytes / 2**20
            self._warn(
                "lookahead",
                f"frames of {bridge:g} s exceed the limit of {limit:g} MiB for waiting frames: "
                "objects may show before they are detected; use smaller frames or decrease bridge_seconds",
            )

    def _warn(self, reason: str, message: str) -> None:
        if reason not in self._logged:
            self._logged.add(reason)
            logger.warning("%s: %s", self._context.source.name, message)


def resolution_of(frame: Frame) -> tuple[int, int]:
    """Return the width and height of a frame."""
    return (frame.image.shape[1], frame.image.shape[0])
