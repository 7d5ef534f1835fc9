"""`Tracking`: the tracking options of `track`, `track_streams`, `annotate_video` and `OnlineTracker`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moondream_cv._deprecation import renamed_arguments, renamed_attribute
from moondream_cv.arguments import check_not_negative
from moondream_cv.video.tracking.redaction import BRIDGE_SECONDS, Redactor
from moondream_cv.video.tracking.tracker import LOST_TRACK_SECONDS, Tracker

if TYPE_CHECKING:
    from trackers import BaseTracker

_HISTORY = 3  # bridges for which observations are kept: frames wait for one, and velocities need earlier ones


@renamed_arguments(memory="lost_track_seconds", cautious="pad_to_keyframes")
@dataclass(frozen=True)
class Tracking:
    """Tracking options.

    Attributes:
        tracker: "sort", "ocsort", "bytetrack" or "botsort", with newer versions of `trackers` also "cbiou"; or a
            function that creates a tracker of the `trackers` package for one class.
        options: Arguments of that tracker.
        lost_track_seconds: Seconds for which a lost object keeps its track ID. May be infinite.
        scene_change: Detect scene cuts. The first frame of a scene is a keyframe, and all tracks end before it.
        pad_to_keyframes: In files, extend each track to the keyframe before its first detection and to the one after
            its last detection.
        bridge_seconds: Maximum seconds between two detections of a track that are bridged. In files, boxes are
            interpolated over gaps of this length, or over one missed keyframe if that takes longer, and the output is
            delayed by this time.
        redact: Compute `TrackedFrame.redaction`: boxes that cover each object from `bridge_seconds` before its first
            detection to `bridge_seconds` after its last one, and in between. In live streams objects are covered only
            after their first detection. In files, the output is delayed by two bridges.
    """

    tracker: str | Callable[[], BaseTracker] = "sort"
    options: Mapping[str, Any] = field(default_factory=dict)
    lost_track_seconds: float = LOST_TRACK_SECONDS
    scene_change: bool = False
    pad_to_keyframes: bool = False
    bridge_seconds: float = BRIDGE_SECONDS
    redact: bool = False

    def __post_init__(self) -> None:
        if self.lost_track_seconds != math.inf:
            check_not_negative("lost_track_seconds", self.lost_track_seconds, "seconds")
        check_not_negative("bridge_seconds", self.bridge_seconds, "seconds")

    def create_tracker(self) -> Tracker:
        """Return a tracker with these options.

        Raises:
            ValueError: The tracker or one of its options is unknown.
        """
        return Tracker(self.tracker, self.options, self.lost_track_seconds, _HISTORY * self.bridge_seconds)

    def create_redactor(self) -> Redactor | None:
        """Return a redactor without detections; None without redaction."""
        return Redactor(self.bridge_seconds) if self.redact else None

    memory = renamed_attribute("Tracking.memory", "lost_track_seconds")
    cautious = renamed_attribute("Tracking.cautious", "pad_to_keyframes")
