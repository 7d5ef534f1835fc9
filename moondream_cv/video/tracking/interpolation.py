"""Boxes on the frames between keyframes: interpolated in files, predicted in live streams.

An interpolated box moves in a straight line from one observation to the next, if the gap is at most `bridge_seconds` or
one missed keyframe. Before its first observation an object is shown only if it enters at the edge of the frame, and
after its last one only if it leaves there.

A predicted box moves at constant velocity until two consecutive keyframes have missed the object, or until it has left
the frame.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import supervision as sv

from moondream_cv.video.tracking.tracks import Box, Track, is_center_inside

MAX_GAP = 2.2  # keyframe intervals between two observations that are always bridged: one keyframe may miss the object
UNKNOWN_INTERVAL = 1.0  # seconds between keyframes to assume before there are two


class TrackedBox(NamedTuple):
    """Box of a track on one frame.

    Attributes:
        track: Track of the object.
        box: [4] box in pixels, not clipped.
        confidence: Interpolated confidence, or that of the latest observation.
    """

    track: Track
    box: Box
    confidence: float


def interpolate_boxes(
    tracks: Iterable[Track],
    time: float,
    interval: float,
    resolution_wh: tuple[int, int],
    pad_to_keyframes: bool = False,
    bridge_seconds: float = 0.0,
) -> list[TrackedBox]:
    """Return the boxes of all tracks at a time between keyframes.

    Call this after detection has run on the keyframes around `time` and on the one after them.

    Args:
        tracks: Tracks of the stream.
        time: Time of the frame in seconds.
        interval: Seconds between keyframes around that time.
        resolution_wh: Width and height of the frame.
        pad_to_keyframes: Extend each track to the keyframe before its first observation and the one after its last.
        bridge_seconds: Longest gap in seconds to interpolate over, if it is more than `MAX_GAP` keyframe intervals.
    """
    boxes = [
        _interpolate_box(track, time, interval, resolution_wh, pad_to_keyframes, bridge_seconds) for track in tracks
    ]
    return [box for box in boxes if box is not None]


def predict_boxes(
    tracks: Iterable[Track], time: float, interval: float, resolution_wh: tuple[int, int]
) -> list[TrackedBox]:
    """Return the boxes of all tracks at a time after the last keyframe.

    Args:
        tracks: Tracks of the stream.
        time: Time of the frame in seconds.
        interval: Seconds between keyframes.
        resolution_wh: Width and height of the frame.
    """
    boxes = []
    for track in tracks:
        if time - track.last.time <= MAX_GAP * interval or time == track.last.time:
            box = track.extrapolate(time)
            if is_center_inside(box, resolution_wh):
                boxes.append(TrackedBox(track, box, track.last.confidence))
    return boxes


def to_detections(
    boxes: Sequence[TrackedBox],
    class_names: Sequence[str] | Mapping[int, str],
    resolution_wh: tuple[int, int],
    keyframe_detections: sv.Detections | None = None,
) -> sv.Detections:
    """Return boxes as `sv.Detections` with `tracker_id`, clipped to the frame, in the format of a `Detector`.

    Args:
        boxes: Boxes of the tracks on the frame.
        class_names: Class names by class ID.
        resolution_wh: Width and height of the frame.
        keyframe_detections: Detections of this frame, if it is a keyframe. The untracked ones are added with track ID
            -1, except duplicates (`data["duplicate"]`).
    """
    limits = np.array(resolution_wh * 2, np.float64)
    items = [(b.box, b.confidence, b.track.class_id, b.track.tracker_id) for b in boxes]
    if keyframe_detections is not None and keyframe_detections.tracker_id is not None:
        found = keyframe_detections
        duplicate = np.asarray(found.data.get("duplicate", np.zeros(len(found), bool)), bool)
        for index in np.flatnonzero((keyframe_detections.tracker_id == -1) & ~duplicate):
            confidence = 1.0 if found.confidence is None else float(found.confidence[index])
            class_id = 0 if found.class_id is None else int(found.class_id[index])
            items.append((np.asarray(found.xyxy[index], np.float64), confidence, class_id, -1))
    return sv.Detections(
        xyxy=np.array([np.clip(item[0], 0, limits) for item in items], np.float32).reshape(-1, 4),
        confidence=np.array([item[1] for item in items], np.float32),
        class_id=np.array([item[2] for item in items], int),
        tracker_id=np.array([item[3] for item in items], int),
        data={"class_name": np.array([class_names[item[2]] for item in items], dtype=str)},
    )


def _interpolate_box(
    track: Track,
    time: float,
    interval: float,
    resolution_wh: tuple[int, int],
    pad_to_keyframes: bool,
    bridge_seconds: float,
) -> TrackedBox | None:
    before, after = track.around(time)

    # Interpolate between two observations
    if before is not None and after is not None:
        first, second = track.observations[before], track.observations[after]
        gap = second.time - first.time
        if gap == 0:
            return TrackedBox(track, first.box, first.confidence)
        if gap <= max(MAX_GAP * interval, bridge_seconds + 1e-6):
            share = (time - first.time) / gap
            confidence = first.confidence + share * (second.confidence - first.confidence)
            return TrackedBox(track, first.box + share * (second.box - first.box), confidence)

    # Extrapolate to the edge of the frame, or to the next keyframe
    for at, direction in ((before, 1), (after, -1)):
        if at is None:
            continue
        observation, box = track.observations[at], track.extrapolate(time, at)
        next_box = track.extrapolate(observation.time + direction * interval, at)
        is_extended = pad_to_keyframes or not is_center_inside(next_box, resolution_wh)
        is_recent = abs(time - observation.time) < interval * (1 - 1e-6)
        if is_recent and is_extended and is_center_inside(box, resolution_wh):
            return TrackedBox(track, box, observation.confidence)
    return None
