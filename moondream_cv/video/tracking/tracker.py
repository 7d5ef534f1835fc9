"""Numbers that stay with objects: the `trackers` package on keyframes, one tracker for each class.

    tracker = Tracker(len(classes))
    detections = tracker.update(detections, frame)  # on a keyframe: with tracker_id, from 1

A tracker matches boxes by their overlap from one keyframe to the next. After some frames a small object has moved by
more than its size, so the boxes that the tracker sees are grown about their centres, the more the longer it has not
been shown anything. Made for every frame, it counts its time in frames; what it is told is a clock of its own, on which
no keyframe is more than `MAX_STEPS` frames after the one before.

Scores never reach a tracker: their thresholds stand for detectors of another kind, and all but drop constant ones. They
decide between boxes of the same object, in `conflicts.py`.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import supervision as sv

from moondream_cv.video.sources.frame import Frame
from moondream_cv.video.tracking.conflicts import ClassConflicts
from moondream_cv.video.tracking.reassociation import match_returning
from moondream_cv.video.tracking.tracks import Box, Sighting, Track

if TYPE_CHECKING:
    from trackers import BaseTracker

TRACKERS = {
    "sort": "SORTTracker",
    "ocsort": "OCSORTTracker",
    "bytetrack": "ByteTrackTracker",
    "botsort": "BoTSORTTracker",
    "cbiou": "CBIoUTracker",
}
MAX_STEPS = 10
GROWTH = 0.2  # of a box's size for each step of the clock; benchmarks/tracking.py compares
LEAST_SIDE = 0.03  # of a frame's diagonal: points have no area, and tiny boxes hardly any
RATE = 30.0  # steps of the clock in a second of it
MEMORY = 10.0  # seconds for which an object that is gone may come back

# What suits keyframes: an object is one from its first sighting on, and boxes need hardly overlap.
_SETTINGS: dict[str, Any] = {
    "minimum_consecutive_frames": 1,
    "minimum_iou_threshold": 0.01,
    "minimum_iou_threshold_first_assoc": 0.01,
    "enable_cmc": False,  # it needs every frame
}


class Tracker:
    """Gives the detections of keyframes the numbers of their objects.

    Attributes:
        tracks: The objects that are remembered, those that are gone among them, by their numbers.
        interval: Seconds between the last two keyframes.
    """

    def __init__(
        self,
        tracker: str | Callable[[], BaseTracker] = "sort",
        options: Mapping[str, Any] | None = None,
        memory: float = MEMORY,
        history: float = 0.0,
    ) -> None:
        """Make a tracker that has seen nothing yet.

        Args:
            tracker: One of `TRACKERS`, or what makes a tracker of a class.
            options: Arguments of that tracker, in place of those that suit keyframes.
            memory: Seconds for which an object that is gone keeps its number, should it come back.
            history: Seconds for which all sightings of a track are kept.

        Raises:
            ValueError: There is no such tracker, or it takes no such option.
        """
        self._make = _maker(tracker, dict(options or {})) if isinstance(tracker, str) else tracker
        self._memory, self._history = memory, history
        self._conflicts = ClassConflicts()
        self._trackers: dict[int, BaseTracker] = {}
        self._tracklets: dict[int, tuple[Any, Track]] = {}  # by id(): a tracker's own objects, and ours
        self._clock = 0
        self._before: tuple[int, float] | None = None  # index and time of the last keyframe
        self._next_id = 1
        self.tracks: dict[int, Track] = {}
        self.interval = 0.0

    @property
    def time(self) -> float | None:
        """Of the last keyframe; None before the first."""
        return None if self._before is None else self._before[1]

    def anew(self) -> Tracker:
        """One that has seen nothing yet, and gives numbers that this one has not given."""
        tracker = Tracker(self._make, memory=self._memory, history=self._history)
        tracker._next_id, tracker._conflicts = self._next_id, self._conflicts
        return tracker

    def update(self, detections: sv.Detections, frame: Frame) -> sv.Detections:
        """Take in what was found on a keyframe.

        Args:
            detections: With class_id.
            frame: On which it was found; later than the one before.

        Returns:
            The same detections with `tracker_id`: -1 for those that the tracker did not take. `data["duplicate"]` is
            true for those that repeat or contradict a detection with a higher score, which is tracked instead.
        """
        steps = 1
        if self._before is not None:
            index, time = self._before
            self.interval = frame.time - time
            steps = min(max(1, frame.index - index), MAX_STEPS)
        self._before, self._clock = (frame.index, frame.time), self._clock + steps
        memory = max(self._memory, 4 * self.interval)
        self.tracks = {key: t for key, t in self.tracks.items() if frame.time - t.last.time <= memory}
        class_ids = np.zeros(len(detections), int) if detections.class_id is None else detections.class_id.astype(int)
        confidences = np.ones(len(detections)) if detections.confidence is None else detections.confidence
        kept, class_ids = self._conflicts.resolve(
            detections.xyxy.astype(np.float64),
            confidences.astype(np.float64),
            class_ids,
            self.tracks.values(),
            frame.time,
        )
        tracker_ids = np.full(len(detections), -1)
        for class_id in sorted({*self._trackers, *class_ids.tolist()}):
            rows = np.flatnonzero(kept & (class_ids == class_id))
            boxes = [np.asarray(box, np.float64) for box in detections.xyxy[rows]]
            tracklets = self._associate(class_id, boxes, frame, steps)
            tracks = self._continue(class_id, boxes, tracklets, frame)
            for row, box, track in zip(rows, boxes, tracks, strict=True):
                if track is not None:
                    track.add(Sighting(frame.time, box, float(confidences[row])), self._history)
                    tracker_ids[row] = track.tracker_id
        found: sv.Detections = detections[np.arange(len(detections))]  # type: ignore[assignment]
        found.tracker_id = tracker_ids
        found.data["duplicate"] = ~kept
        return found

    def _associate(self, class_id: int, boxes: list[Box], frame: Frame, steps: int) -> list[Any | None]:
        """The tracker's own object for each box; None where it has none."""
        if class_id not in self._trackers:
            self._trackers[class_id] = self._make()
        tracker = self._trackers[class_id]
        least = LEAST_SIDE * math.hypot(*frame.image.shape[:2])
        grown = np.array([_grown(box, 1 + GROWTH * steps, least) for box in boxes], np.float32).reshape(-1, 4)
        before = list(tracker.tracks)  # held, so that nothing new gets the id() of what is dropped meanwhile
        extra: dict[str, Any] = {"frame": frame.image} if getattr(tracker, "enable_cmc", False) else {}
        if "timestamp" in inspect.signature(tracker.update).parameters:  # not in trackers 2.4
            extra["timestamp"] = self._clock / RATE
        else:
            for _ in range(steps - 1):
                tracker.update(sv.Detections.empty())
        rows = np.arange(len(boxes))  # some trackers give them back in another order, or not all of them
        found = tracker.update(
            sv.Detections(xyxy=grown, confidence=np.ones(len(boxes), np.float32), data={"row": rows}), **extra
        )
        ids = np.full(len(boxes), -1)
        if len(found) and found.tracker_id is not None:
            ids[found.data["row"]] = found.tracker_id
        by_id = {t.tracker_id: t for t in tracker.tracks if t.tracker_id >= 0}
        # An object that is new has no number yet. Its box says which it is.
        known = set(map(id, before))
        new = {id(t): t for t in tracker.tracks if id(t) not in known}
        tracklets: list[Any | None] = []
        for box, tracklet_id in zip(grown, ids.tolist(), strict=True):
            tracklet = by_id.get(tracklet_id)
            if tracklet is None and new:
                nearest = min(new.values(), key=lambda t: float(np.abs(t.get_state_bbox() - box).sum()))
                if np.abs(nearest.get_state_bbox() - box).max() < 1.0:
                    tracklet = new.pop(id(nearest))
            tracklets.append(tracklet)
        return tracklets

    def _continue(
        self, class_id: int, boxes: list[Box], tracklets: list[Any | None], frame: Frame
    ) -> list[Track | None]:
        """The track of each box: of an object known before, of one that has come back, or a new one."""
        tracks = [self._tracklets[id(t)][1] if id(t) in self._tracklets else None for t in tracklets]
        tracks = [None if track is None else self.tracks.get(track.tracker_id) for track in tracks]
        fresh = [i for i, t in enumerate(tracklets) if t is not None and tracks[i] is None]
        seen = {track.tracker_id for track in tracks if track is not None}
        lost = [t for t in self.tracks.values() if t.class_id == class_id and t.tracker_id not in seen]
        resolution_wh = (frame.image.shape[1], frame.image.shape[0])
        returned = match_returning(lost, [boxes[i] for i in fresh], frame.time, self.interval, resolution_wh)
        for number, i in enumerate(fresh):
            track = returned.get(number)
            if track is None:
                track = self.tracks[self._next_id] = Track(self._next_id, class_id)
                self._next_id += 1
            tracks[i] = track
        alive = {id(t) for tracker in self._trackers.values() for t in tracker.tracks}
        again = {id(track) for track in returned.values()}
        self._tracklets = {
            key: (tracklet, track)
            for key, (tracklet, track) in self._tracklets.items()
            if key in alive and id(track) not in again
        }
        for tracklet, track in zip(tracklets, tracks, strict=True):
            if tracklet is not None and track is not None:
                self._tracklets[id(tracklet)] = (tracklet, track)
        return tracks


def _grown(box: Box, factor: float, least: float) -> Box:
    """A box about the same centre, of `factor` times the size; sides below `least` count as that long."""
    size = box[2:] - box[:2]
    margin = (np.maximum(size, least) * factor - size) / 2
    return np.concatenate((box[:2] - margin, box[2:] + margin))


def _maker(name: str, options: dict[str, Any]) -> Callable[[], BaseTracker]:
    with warnings.catch_warnings():  # that of trackers 2.4 about another package is nothing to its users
        warnings.simplefilter("ignore", FutureWarning)
        import trackers  # takes a second to import

    there = {key: value for key, value in TRACKERS.items() if hasattr(trackers, value)}
    if name not in there:
        raise ValueError(f"tracker must be one of {', '.join(there)}, not {name!r}")
    kind = getattr(trackers, there[name])
    known = list(inspect.signature(kind).parameters)
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"the tracker {name!r} takes no {', '.join(unknown)}, only {', '.join(known)}")
    settings = {key: value for key, value in _SETTINGS.items() if key in known} | options
    return lambda: kind(**settings)
