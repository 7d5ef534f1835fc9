"""Track IDs on keyframes: one tracker of the `trackers` package per class.

    tracker = Tracker()
    detections = tracker.update(detections, frame)  # sets tracker_id, from 1

Trackers match boxes by their overlap. Between two keyframes a small object may move by more than its size, so boxes are
enlarged around their centers in proportion to the number of frames since the previous keyframe. Trackers are designed
for every frame and measure time in frames. They get a clock on which keyframes are at most `MAX_STEPS` frames apart.

Trackers get the confidence 1 for every box, because their thresholds assume another kind of detector. `ClassConflicts`
uses the confidences of the detector to choose between boxes of the same object.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import supervision as sv

from moondream_cv.video.sources.frame import Frame
from moondream_cv.video.tracking.class_conflicts import ClassConflicts
from moondream_cv.video.tracking.reassociation import match_lost_tracks
from moondream_cv.video.tracking.trackers_adapter import TrackersAdapter, tracker_factory
from moondream_cv.video.tracking.tracks import Box, Observation, Track

if TYPE_CHECKING:
    from trackers import BaseTracker

MAX_STEPS = 10
GROWTH = 0.2  # share of the box size per step of the clock; compared in benchmarks/tracking.py
MIN_SIDE = 0.03  # frame diagonals: points have no area, and tiny boxes have hardly any
CLOCK_RATE = 30.0  # steps per second of the trackers' clock
LOST_TRACK_SECONDS = 10.0


class Tracker:
    """Assigns track IDs to the detections of keyframes.

    Attributes:
        tracks: Tracks by track ID, including lost ones that may continue.
        interval: Seconds between the last two keyframes; 0 before the second one.
    """

    def __init__(
        self,
        tracker: str | Callable[[], BaseTracker] = "sort",
        options: Mapping[str, Any] | None = None,
        lost_track_seconds: float = LOST_TRACK_SECONDS,
        history: float = 0.0,
    ) -> None:
        """Create a tracker without tracks.

        Args:
            tracker: Key of `TRACKERS`, or a function that creates a tracker for one class.
            options: Arguments of that tracker, which override the defaults for keyframes.
            lost_track_seconds: Seconds for which a lost track is kept for re-association.
            history: Seconds for which all observations of a track are kept.

        Raises:
            ValueError: The tracker or an option is unknown.
        """
        self._make_tracker = tracker_factory(tracker, options or {}) if isinstance(tracker, str) else tracker
        self._lost_track_seconds, self._history = lost_track_seconds, history
        self._conflicts = ClassConflicts()
        self._adapters: dict[int, TrackersAdapter] = {}  # by class ID
        self._clock = 0  # steps
        self._last_keyframe: tuple[int, float] | None = None  # index and time
        self._next_id = 1
        self.tracks: dict[int, Track] = {}
        self.interval = 0.0

    def successor(self) -> Tracker:
        """Return a tracker without tracks that continues the track IDs of this one."""
        tracker = Tracker(self._make_tracker, lost_track_seconds=self._lost_track_seconds, history=self._history)
        tracker._next_id, tracker._conflicts = self._next_id, self._conflicts
        return tracker

    def update(self, detections: sv.Detections, frame: Frame) -> sv.Detections:
        """Add the detections of a keyframe.

        Args:
            detections: Detections with class_id.
            frame: The keyframe, later than the previous one.

        Returns:
            A copy of the detections with `tracker_id`, which is -1 for untracked ones. `data["duplicate"]` is true for
            detections that repeat or contradict a detection with a higher confidence, which is tracked instead.
        """
        # Advance the clock, and drop lost tracks
        steps = 1
        if self._last_keyframe is not None:
            index, time = self._last_keyframe
            self.interval = frame.time - time
            steps = min(max(1, frame.index - index), MAX_STEPS)
        self._last_keyframe, self._clock = (frame.index, frame.time), self._clock + steps
        max_age = max(self._lost_track_seconds, 4 * self.interval)
        self.tracks = {key: t for key, t in self.tracks.items() if frame.time - t.last.time <= max_age}

        # Resolve duplicates and contradicting classes
        class_ids = np.zeros(len(detections), int) if detections.class_id is None else detections.class_id.astype(int)
        confidences = np.ones(len(detections)) if detections.confidence is None else detections.confidence
        kept, class_ids = self._conflicts.resolve(
            detections.xyxy.astype(np.float64),
            confidences.astype(np.float64),
            class_ids,
            self.tracks.values(),
            frame.time,
        )

        # Associate the boxes of each class with tracks
        tracker_ids = np.full(len(detections), -1)
        for class_id in sorted({*self._adapters, *class_ids.tolist()}):
            indices = np.flatnonzero(kept & (class_ids == class_id))
            boxes = [np.asarray(box, np.float64) for box in detections.xyxy[indices]]
            tracks = self._associate(class_id, boxes, frame, steps)
            for index, box, track in zip(indices, boxes, tracks, strict=True):
                if track is not None:
                    track.add(Observation(frame.time, box, float(confidences[index])), self._history)
                    tracker_ids[index] = track.tracker_id
        tracked: sv.Detections = detections[np.arange(len(detections))]  # type: ignore[assignment]
        tracked.tracker_id = tracker_ids
        tracked.data["duplicate"] = ~kept
        return tracked

    def _associate(self, class_id: int, boxes: Sequence[Box], frame: Frame, steps: int) -> list[Track | None]:
        """Return the track of each box of a class: a continued, re-associated or new one; None if it is not tracked."""
        # Match the boxes with the previous keyframe
        if class_id not in self._adapters:
            self._adapters[class_id] = TrackersAdapter(self._make_tracker())
        adapter = self._adapters[class_id]
        min_side = MIN_SIDE * math.hypot(*frame.image.shape[:2])
        enlarged = np.array([_enlarge(box, 1 + GROWTH * steps, min_side) for box in boxes], np.float32).reshape(-1, 4)
        tracklets = adapter.associate(enlarged, frame.image, self._clock / CLOCK_RATE, steps)
        tracks = [adapter.track_of(tracklet) for tracklet in tracklets]
        tracks = [None if track is None else self.tracks.get(track.tracker_id) for track in tracks]

        # Re-associate lost tracks with new tracklets
        new = [i for i, tracklet in enumerate(tracklets) if tracklet is not None and tracks[i] is None]
        continued = {track.tracker_id for track in tracks if track is not None}
        lost = [t for t in self.tracks.values() if t.class_id == class_id and t.tracker_id not in continued]
        resolution_wh = (frame.image.shape[1], frame.image.shape[0])
        matched = match_lost_tracks(lost, [boxes[i] for i in new], frame.time, self.interval, resolution_wh)

        # Start new tracks
        for number, i in enumerate(new):
            track = matched.get(number)
            if track is None:
                track = self.tracks[self._next_id] = Track(self._next_id, class_id)
                self._next_id += 1
            tracks[i] = track
        adapter.assign(tracklets, tracks, list(matched.values()))
        return tracks


def _enlarge(box: Box, factor: float, min_side: float) -> Box:
    """Enlarge a box around its center; sides shorter than `min_side` count as that long."""
    size = box[2:] - box[:2]
    margin = (np.maximum(size, min_side) * factor - size) / 2
    return np.concatenate((box[:2] - margin, box[2:] + margin))
