"""Adapter to the `trackers` package. No other module uses the internals of that package.

A tracker of the package matches the boxes of one class from update to update. The adapter returns the tracker's object
for each box, including new ones, which have no ID yet, and maps these objects to `Track`s.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import supervision as sv

from moondream_cv.video.tracking.tracks import Track

if TYPE_CHECKING:
    from trackers import BaseTracker

TRACKERS = {
    "sort": "SORTTracker",
    "ocsort": "OCSORTTracker",
    "bytetrack": "ByteTrackTracker",
    "botsort": "BoTSORTTracker",
    "cbiou": "CBIoUTracker",
}
"""Class in the `trackers` package for each tracker name. Older versions of the package lack the last one."""

_MAX_OFFSET = 1.0  # pixels between a box and the state of the tracklet that was created from it

# Options for keyframes: a track starts with its first detection, and boxes hardly need to overlap.
_KEYFRAME_OPTIONS: dict[str, Any] = {
    "minimum_consecutive_frames": 1,
    "minimum_iou_threshold": 0.01,
    "minimum_iou_threshold_first_assoc": 0.01,
    "enable_cmc": False,  # camera motion compensation needs every frame
}


def tracker_factory(name: str, options: Mapping[str, Any]) -> Callable[[], BaseTracker]:
    """Return a function that creates trackers.

    Args:
        name: Key of `TRACKERS`.
        options: Arguments of the tracker, which override the options for keyframes.

    Raises:
        ValueError: The tracker or an option is unknown.
    """
    with warnings.catch_warnings():  # trackers 2.4 warns about another package when it is imported
        warnings.simplefilter("ignore", FutureWarning)
        import trackers  # takes a second

    available = {key: value for key, value in TRACKERS.items() if hasattr(trackers, value)}
    if name not in available:
        raise ValueError(f"tracker must be one of {', '.join(available)}, got {name!r}")
    tracker_class = getattr(trackers, available[name])
    known = list(inspect.signature(tracker_class).parameters)
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"unknown option of the tracker {name!r}: {', '.join(unknown)}; it has {', '.join(known)}")
    settings = {key: value for key, value in _KEYFRAME_OPTIONS.items() if key in known} | dict(options)
    return lambda: tracker_class(**settings)


class TrackersAdapter:
    """One tracker of the `trackers` package, for the objects of one class.

    A tracklet is the tracker's own object for a tracked object.

    Attributes:
        tracker: The wrapped tracker.
    """

    def __init__(self, tracker: BaseTracker) -> None:
        """Wrap a tracker that has not been updated yet."""
        self.tracker = tracker
        # By id(). The tracklet is stored as well, so that no new object gets the same id().
        self._tracks: dict[int, tuple[Any, Track]] = {}
        self._uses_frame = bool(getattr(tracker, "enable_cmc", False))
        self._uses_timestamp = "timestamp" in inspect.signature(tracker.update).parameters  # not in trackers 2.4

    def associate(
        self, boxes: npt.NDArray[np.float32], image: npt.NDArray[np.uint8], time: float, steps: int
    ) -> list[Any | None]:
        """Update the tracker with the boxes of a keyframe.

        Args:
            boxes: [N, 4] pixels.
            image: [H, W, 3] uint8 BGR keyframe.
            time: Seconds on the tracker's clock.
            steps: Frames since the previous keyframe, for trackers that count frames.

        Returns:
            The tracklet of each box, [N]; None if the tracker ignored the box.
        """
        before = list(self.tracker.tracks)  # keeps dropped tracklets alive, so that their id() is not reused
        ids = self._update(boxes, image, time, steps)
        by_id = {t.tracker_id: t for t in self.tracker.tracks if t.tracker_id >= 0}

        # A new object has no ID yet. Find its tracklet by its box.
        known = set(map(id, before))
        new = {id(t): t for t in self.tracker.tracks if id(t) not in known}
        tracklets: list[Any | None] = []
        for box, tracklet_id in zip(boxes, ids.tolist(), strict=True):
            tracklet = by_id.get(tracklet_id)
            if tracklet is None and new:
                nearest = min(new.values(), key=lambda t: float(np.abs(t.get_state_bbox() - box).sum()))
                if np.abs(nearest.get_state_bbox() - box).max() < _MAX_OFFSET:
                    tracklet = new.pop(id(nearest))
            tracklets.append(tracklet)
        return tracklets

    def track_of(self, tracklet: Any | None) -> Track | None:
        """Return the track that a tracklet was assigned to; None if there is none."""
        return self._tracks[id(tracklet)][1] if id(tracklet) in self._tracks else None

    def assign(
        self, tracklets: Sequence[Any | None], tracks: Sequence[Track | None], reassociated: Sequence[Track]
    ) -> None:
        """Map tracklets to tracks, and forget the tracklets that the tracker has dropped.

        Args:
            tracklets: Result of `associate`.
            tracks: Track of each tracklet; None if the tracker ignored the box.
            reassociated: Tracks that continue with another tracklet than before.
        """
        alive = set(map(id, self.tracker.tracks))
        moved = set(map(id, reassociated))
        self._tracks = {
            key: (tracklet, track)
            for key, (tracklet, track) in self._tracks.items()
            if key in alive and id(track) not in moved
        }
        for tracklet, track in zip(tracklets, tracks, strict=True):
            if tracklet is not None and track is not None:
                self._tracks[id(tracklet)] = (tracklet, track)

    def _update(
        self, boxes: npt.NDArray[np.float32], image: npt.NDArray[np.uint8], time: float, steps: int
    ) -> npt.NDArray[np.int64]:
        """Update the tracker; return the ID that it gave to each box, [N], or -1."""
        extra: dict[str, Any] = {"frame": image} if self._uses_frame else {}
        if self._uses_timestamp:
            extra["timestamp"] = time
        else:
            for _ in range(steps - 1):
                self.tracker.update(sv.Detections.empty())
        detections = sv.Detections(
            xyxy=boxes,
            confidence=np.ones(len(boxes), np.float32),
            data={"index": np.arange(len(boxes))},  # some trackers reorder or drop boxes
        )
        tracked = self.tracker.update(detections, **extra)
        ids = np.full(len(boxes), -1)
        if len(tracked) and tracked.tracker_id is not None:
            ids[tracked.data["index"]] = tracked.tracker_id
        return ids
