"""Boxes on the frames between keyframes: interpolated where what comes is known, predicted where it is not.

A box that is interpolated moves in a straight line from one sighting to the next, if no more than one keyframe or
`bridge_seconds` are in between. Before its first sighting an object is shown if it comes in over the frame's edge,
after its last one if it goes out.
A box that is predicted goes on as it went, until a second keyframe has missed it or it has left the frame.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import supervision as sv

from moondream_cv.video.tracking.tracks import Box, Track, within

BRIDGE = 2.2  # intervals between two sightings that are bridged at least: one keyframe may have missed the object


class Seen(NamedTuple):
    """Where a track is on a frame."""

    track: Track
    box: Box
    confidence: float


def interpolated(
    tracks: Iterable[Track],
    time: float,
    interval: float,
    resolution_wh: tuple[int, int],
    cautious: bool = False,
    bridge_seconds: float = 0.0,
) -> list[Seen]:
    """Where tracks are at a time for which the keyframes around it, and the next one, have been looked at.

    Args:
        interval: Seconds between keyframes there.
        resolution_wh: Of the frame.
        cautious: Show an object as far as the keyframes on which it was not seen, wherever it comes from or goes.
        bridge_seconds: Seconds between two sightings that are bridged, if they are more than `BRIDGE` intervals.
    """
    seen = []
    for track in tracks:
        box = _interpolated(track, time, interval, resolution_wh, cautious, bridge_seconds)
        if box is not None:
            seen.append(box)
    return seen


def predicted(tracks: Iterable[Track], time: float, interval: float, resolution_wh: tuple[int, int]) -> list[Seen]:
    """Where tracks are at a time after the last keyframe.

    Args:
        interval: Seconds between keyframes.
        resolution_wh: Of the frame.
    """
    seen = []
    for track in tracks:
        if time - track.last.time <= BRIDGE * interval or time == track.last.time:
            box = track.moved(time)
            if within(box, resolution_wh):
                seen.append(Seen(track, box, track.last.confidence))
    return seen


def as_detections(
    seen: Sequence[Seen],
    classes: Sequence[str],
    resolution_wh: tuple[int, int],
    looked: sv.Detections | None = None,
) -> sv.Detections:
    """Boxes as a `Detector` gives them, clipped to the frame, with `tracker_id`.

    Args:
        classes: Names by class id.
        looked: Detections of this very frame. Untracked ones are added with the number -1, unless `data["duplicate"]`
            is true for them.
    """
    limits = np.array(resolution_wh * 2, np.float64)
    rows = [(s.box, s.confidence, s.track.class_id, s.track.tracker_id) for s in seen]
    if looked is not None and looked.tracker_id is not None:
        duplicate = np.asarray(looked.data.get("duplicate", np.zeros(len(looked), bool)), bool)
        for row in np.flatnonzero((looked.tracker_id == -1) & ~duplicate):
            confidence = 1.0 if looked.confidence is None else float(looked.confidence[row])
            class_id = 0 if looked.class_id is None else int(looked.class_id[row])
            rows.append((np.asarray(looked.xyxy[row], np.float64), confidence, class_id, -1))
    return sv.Detections(
        xyxy=np.array([np.clip(row[0], 0, limits) for row in rows], np.float32).reshape(-1, 4),
        confidence=np.array([row[1] for row in rows], np.float32),
        class_id=np.array([row[2] for row in rows], int),
        tracker_id=np.array([row[3] for row in rows], int),
        data={"class_name": np.array([classes[row[2]] for row in rows], dtype=str)},
    )


def _interpolated(
    track: Track,
    time: float,
    interval: float,
    resolution_wh: tuple[int, int],
    cautious: bool,
    bridge_seconds: float,
) -> Seen | None:
    before, after = track.around(time)
    if before is not None and after is not None:
        first, second = track.sightings[before], track.sightings[after]
        gap = second.time - first.time
        if gap == 0:
            return Seen(track, first.box, first.confidence)
        if gap <= max(BRIDGE * interval, bridge_seconds + 1e-6):
            share = (time - first.time) / gap
            confidence = first.confidence + share * (second.confidence - first.confidence)
            return Seen(track, first.box + share * (second.box - first.box), confidence)
    for at, direction in ((before, 1), (after, -1)):
        if at is None:
            continue
        sighting, box = track.sightings[at], track.moved(time, at)
        passes = cautious or not within(track.moved(sighting.time + direction * interval, at), resolution_wh)
        if abs(time - sighting.time) < interval * (1 - 1e-6) and passes and within(box, resolution_wh):
            return Seen(track, box, sighting.confidence)
    return None
