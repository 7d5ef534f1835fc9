"""Redaction: boxes that cover objects on every frame, including those between detections.

A detection covers its object for `bridge_seconds` before and after it, with a box that grows by the distance that the
object may have moved. If the motion before and after a gap confirms that both detections are of one object, the box is
interpolated instead. Otherwise both detections count as ends of a track: the object may have turned or waited, or the
track may have switched to another object. So redaction covers too much rather than too little.

Track IDs are used for interpolation only. Objects stay covered through ID switches, and untracked detections are
covered as well.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import supervision as sv

from moondream_cv.video.tracking.tracks import VELOCITY_SECONDS

BRIDGE_SECONDS = 0.7
LOOKAHEAD = 2  # bridges after a frame whose detections are used: a gap of that length can be interpolated
HISTORY = 4  # bridges for which detections are kept

# Speeds in frame diagonals per second.
MIN_SPEED = 0.15  # assumed of every object, since a waiting object may start
UNKNOWN_SPEED = 0.2  # assumed of an object with one detection
MAX_SPEED = 0.5  # a faster track has probably switched to another object

MIN_SPAN = 0.1  # minimum seconds between two detections for their velocity, since boxes jitter
DRIFT = 0.3  # share of the shorter side: after a smaller move, less than half of the object is visible
MARGIN = 0.08  # share of a box's sides, added on each side, since boxes may cut off edges of objects
TOLERANCE = 0.5  # share of an object's size: maximum prediction error that confirms a track

_ROUNDING = 1e-6  # seconds

Array = npt.NDArray[np.float64]


class Redactor:
    """Collects the detections of a stream and returns the boxes that cover its objects.

    Attributes:
        bridge_seconds: Seconds before and after a detection for which its object is covered.
    """

    def __init__(self, bridge_seconds: float = BRIDGE_SECONDS) -> None:
        """Start without detections."""
        self.bridge_seconds = bridge_seconds
        self._tracks: dict[int, _Observations] = {}  # by tracker ID; untracked detections by negative numbers
        self._untracked = itertools.count(-1, -1)
        self._resolution_wh: tuple[int, int] | None = None

    def add(self, detections: sv.Detections, time: float, resolution_wh: tuple[int, int]) -> None:
        """Add the detections of a keyframe.

        Args:
            detections: Boxes in pixels with `tracker_id`, which is -1 for untracked detections. Duplicates
                (`data["duplicate"]`) extend the box that they overlap most.
            time: Time of the keyframe in seconds, no less than that of the previous one.
            resolution_wh: Width and height of the keyframe.
        """
        self._rescale(resolution_wh)
        detections = _merge_duplicates(detections)
        assert detections.tracker_id is not None, "a tracker sets it"
        for index, tracker_id in enumerate(detections.tracker_id.tolist()):
            key = tracker_id if tracker_id >= 0 else next(self._untracked)
            if key not in self._tracks:
                class_id = 0 if detections.class_id is None else int(detections.class_id[index])
                self._tracks[key] = _Observations(class_id)
            confidence = 1.0 if detections.confidence is None else float(detections.confidence[index])
            self._tracks[key].append(time, np.asarray(detections.xyxy[index], np.float64), confidence)

    def cover(
        self,
        time: float,
        classes: Sequence[str] | Mapping[int, str],
        resolution_wh: tuple[int, int],
        *,
        interval: float = 0.0,
        delay: float = 0.0,
    ) -> sv.Detections:
        """Return the boxes that cover the objects on a frame.

        Args:
            time: Time of the frame in seconds, no less than in the previous call.
            classes: Class names by class ID.
            resolution_wh: Width and height of the frame.
            interval: Seconds between keyframes. Each detection covers its object for at least this time.
            delay: Seconds by which the detections of a live source arrive late. They cover their objects longer by
                this time.

        Returns:
            Boxes in pixels, clipped to the frame: one per track, and one per untracked detection, with `tracker_id` -1.
            The confidence is that of the detection nearest in time.
        """
        # Compute the limits
        self._rescale(resolution_wh)
        growing = self.bridge_seconds + delay
        covered = max(growing, interval) + _ROUNDING
        diagonal = float(np.hypot(*resolution_wh))
        limits = np.array(resolution_wh * 2, np.float64)
        items: list[tuple[Array, float, int, int]] = []

        # Cover each track with the hull of its possible boxes
        for key, track in list(self._tracks.items()):
            if not track.forget(time - HISTORY * covered):
                del self._tracks[key]
                continue
            if track.times[-1] < time - covered or track.times[0] > time + covered:
                continue
            boxes = track.boxes(time, growing, covered, diagonal)
            if not len(boxes):
                continue
            hull = np.concatenate((boxes[:, :2].min(0), boxes[:, 2:].max(0)))
            margin = MARGIN * (hull[2:] - hull[:2])
            hull = np.concatenate((hull[:2] - margin, hull[2:] + margin))
            clipped = np.clip(hull, 0, limits)
            if (clipped[2:] > clipped[:2]).all() or (hull[2:] == hull[:2]).any():  # points have no area
                items.append((clipped, track.nearest_confidence(time), track.class_id, max(key, -1)))

        # Return the boxes as detections
        return sv.Detections(
            xyxy=np.array([item[0] for item in items], np.float32).reshape(-1, 4),
            confidence=np.array([item[1] for item in items], np.float32),
            class_id=np.array([item[2] for item in items], int),
            tracker_id=np.array([item[3] for item in items], int),
            data={"class_name": np.array([classes[item[2]] for item in items], dtype=str)},
        )

    def _rescale(self, resolution_wh: tuple[int, int]) -> None:
        """Convert all boxes to the pixels of frames of another size."""
        before, self._resolution_wh = self._resolution_wh, resolution_wh
        if before is not None and before != resolution_wh:
            scale = np.array(resolution_wh * 2, np.float64) / np.array(before * 2, np.float64)
            for track in self._tracks.values():
                track.rescale(scale)


@dataclass(eq=False)
class _Observations:
    """Detections of one track, in order of time."""

    class_id: int
    times: list[float] = field(default_factory=list)
    xyxy: list[Array] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)
    _motion: tuple[float, _Motion] | None = None  # with the `covered` for which it was computed

    def append(self, time: float, box: Array, confidence: float) -> None:
        self.times.append(time)
        self.xyxy.append(box)
        self.confidences.append(confidence)
        self._motion = None

    def forget(self, time: float) -> bool:
        """Drop the detections before a time; return whether any are left."""
        count = int(np.searchsorted(self.times, time))
        if count:
            del self.times[:count], self.xyxy[:count], self.confidences[:count]
            self._motion = None
        return bool(self.times)

    def rescale(self, scale: Array) -> None:
        self.xyxy = [box * scale for box in self.xyxy]
        self._motion = None

    def nearest_confidence(self, time: float) -> float:
        return self.confidences[int(np.abs(np.array(self.times) - time).argmin())]

    def boxes(self, time: float, growing: float, covered: float, diagonal: float) -> Array:
        """Return boxes that contain the possible positions of the object at a time, [K, 4] in pixels.

        The result is empty if no detection covers the object at that time.

        Args:
            growing: Seconds from a detection for which its box grows.
            covered: Seconds from a detection for which its object is covered.
            diagonal: Frame diagonal in pixels.
        """
        if self._motion is None or self._motion[0] != covered:
            self._motion = (covered, _Motion(np.array(self.times), np.array(self.xyxy), covered))
        motion = self._motion[1]
        elapsed = time - motion.times
        boxes = [motion.interpolate(time, 2 * covered)]
        for ends, velocity, seconds in (
            (motion.ends, motion.velocity_before, elapsed),
            (motion.starts, motion.velocity_after, -elapsed),
        ):
            chosen = ends & (seconds > 0) & (seconds <= covered)
            if chosen.any():
                growth = np.clip(elapsed[chosen], -growing, growing)
                boxes.append(_reached(motion.xyxy[chosen], velocity[chosen], growth, diagonal))
        return np.concatenate(boxes)


class _Motion:
    """Motion of a track.

    Attributes:
        times: [N] seconds.
        xyxy: [N, 4] pixels.
        velocity_before: [N, 2] pixels per second at each detection, from those before it; NaN if unknown.
        velocity_after: [N, 2] pixels per second at each detection, from those after it; NaN if unknown.
        starts: [N] whether no confirmed motion leads to the detection.
        ends: [N] whether no confirmed motion leads away from the detection.
    """

    def __init__(self, times: Array, xyxy: Array, covered: float) -> None:
        """Compute the velocities, and find the gaps that they confirm.

        Args:
            covered: Seconds from a detection for which its object is covered.
        """
        self.times, self.xyxy = times, xyxy
        centers = (xyxy[:, :2] + xyxy[:, 2:]) / 2
        number = np.arange(len(times))

        # Velocities
        first = np.minimum(np.searchsorted(times, times - VELOCITY_SECONDS - _ROUNDING), number - 1)
        last = np.maximum(np.searchsorted(times, times + VELOCITY_SECONDS + _ROUNDING, side="right") - 1, number + 1)
        self.velocity_before = _velocities(times, centers, first, 2 * covered)
        self.velocity_after = _velocities(times, centers, last, 2 * covered)

        # Gaps that the motion on both sides confirms. The motion must be known on at least one side.
        gaps, moves = np.diff(times), np.diff(centers, axis=0)
        size = np.sqrt(np.maximum((xyxy[:, 2:] - xyxy[:, :2]).prod(1), 1.0))[:-1]
        confirmed = gaps <= 2 * covered
        unknown = np.ones(len(gaps), bool)
        for velocity in (self.velocity_before[:-1], self.velocity_after[1:]):
            miss = np.hypot(*(velocity * gaps[:, None] - moves).T)
            confirmed &= ~(miss > TOLERANCE * size)
            unknown &= np.isnan(miss)
        confirmed &= ~unknown
        self.starts, self.ends = np.append(True, ~confirmed), np.append(~confirmed, True)

    def interpolate(self, time: float, longest: float) -> Array:
        """Return the box at a time, [1, 4]; [0, 4] outside the track and in gaps of more than `longest` seconds."""
        after = int(np.searchsorted(self.times, time))
        if after == len(self.times):
            return self.xyxy[:0]
        if self.times[after] == time:
            return self.xyxy[after : after + 1]
        if after == 0 or self.times[after] - self.times[after - 1] > longest:
            return self.xyxy[:0]
        share = (time - self.times[after - 1]) / (self.times[after] - self.times[after - 1])
        box: Array = self.xyxy[after - 1] + share * (self.xyxy[after] - self.xyxy[after - 1])
        return box[None]


def _merge_duplicates(detections: sv.Detections) -> sv.Detections:
    """Return the detections without duplicates. The other boxes are extended to cover them."""
    duplicate = np.asarray(detections.data.get("duplicate", np.zeros(len(detections), bool)), bool)
    if not duplicate.any() or duplicate.all():
        return detections
    xyxy = detections.xyxy.copy()
    rows = np.flatnonzero(~duplicate)
    nearest = rows[sv.box_iou_batch(detections.xyxy[duplicate], detections.xyxy[rows]).argmax(1)]
    for index, other in zip(np.flatnonzero(duplicate), nearest, strict=True):
        xyxy[other, :2] = np.minimum(xyxy[other, :2], detections.xyxy[index, :2])
        xyxy[other, 2:] = np.maximum(xyxy[other, 2:], detections.xyxy[index, 2:])
    merged = detections[~duplicate]
    assert isinstance(merged, sv.Detections), "indexed by rows"
    merged.xyxy = xyxy[~duplicate]
    return merged


def _velocities(times: Array, centers: Array, other: npt.NDArray[np.int64], longest: float) -> Array:
    """Return the velocity between each detection and another one, [N, 2]; NaN if there is none within `longest`."""
    there = (other >= 0) & (other < len(times))
    other = np.where(there, other, 0)
    elapsed = times - times[other]
    there &= (elapsed != 0) & (np.abs(elapsed) <= longest)
    seconds = np.where(elapsed < 0, np.minimum(elapsed, -MIN_SPAN), np.maximum(elapsed, MIN_SPAN))
    velocities = (centers - centers[other]) / seconds[:, None]
    return np.where(there[:, None], velocities, np.nan)


def _reached(xyxy: Array, velocity: Array, elapsed: Array, diagonal: float) -> Array:
    """Return boxes that contain the objects after continuing, turning or waiting.

    Args:
        xyxy: [N, 4] detections in pixels.
        velocity: [N, 2] pixels per second; NaN if unknown.
        elapsed: [N] seconds since the detections; negative for earlier times.
        diagonal: Frame diagonal in pixels.
    """
    speed = np.hypot(*velocity.T)
    shift = velocity * (np.minimum(1.0, MAX_SPEED * diagonal / np.maximum(speed, 1e-9)) * elapsed)[:, None]
    unknown = np.isnan(speed)
    shift[unknown] = 0.0
    speed = np.where(unknown, UNKNOWN_SPEED, np.clip(speed / diagonal, MIN_SPEED, MAX_SPEED)) * diagonal
    sides = (xyxy[:, 2:] - xyxy[:, :2]).min(1)
    margin = np.maximum(0.0, speed * np.abs(elapsed) - DRIFT * sides)[:, None]
    low = np.minimum(xyxy[:, :2] - margin, xyxy[:, :2] + shift)
    high = np.maximum(xyxy[:, 2:] + margin, xyxy[:, 2:] + shift)
    return np.concatenate((low, high), axis=1)
