"""Resolve duplicates and contradicting classes among the detections of a keyframe, before tracking.

A detector may return an object twice, or with two classes. Only the box with the higher confidence is tracked. Two
classes that often coincide, such as "car" and "vehicle", do not contradict each other. If an object is detected once
with another class, its track continues.

If all confidences are equal, every detection is tracked with its own class.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import supervision as sv

from moondream_cv.video.tracking.tracks import Track

SAME_OBJECT_IOU = 0.6  # minimum IoU of two detections of the same object
MIN_COINCIDENCE = 0.5  # share of a class's detections that coincide with a compatible class
CONTINUE_IOU = 0.4  # minimum IoU of a detection and a track of another class that it may continue
SAME_CLASS_IOU = 0.3  # the same for a track in the same class, which is more likely
MIN_TRACK_OBSERVATIONS = 2  # for a track that another class may continue
MAX_TRACK_AGE = 0.7  # seconds since the last observation of such a track


class ClassConflicts:
    """Selects the detections to track and their classes, and counts how often classes coincide in a stream."""

    def __init__(self) -> None:
        """Start without counts."""
        self._detections: Counter[int] = Counter()
        self._coincidences: Counter[tuple[int, int]] = Counter()
        self._scored = False

    def resolve(
        self,
        xyxy: npt.NDArray[np.float64],
        confidence: npt.NDArray[np.float64],
        class_ids: npt.NDArray[np.int64],
        tracks: Iterable[Track],
        time: float,
    ) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
        """Choose which detections of a keyframe to track, and as which class.

        Args:
            xyxy: [N, 4] boxes in pixels.
            confidence: [N] confidences.
            class_ids: [N] class IDs.
            tracks: Tracks before this keyframe.
            time: Time of the keyframe in seconds.

        Returns:
            [N] whether to track the detection, and [N] the class ID to track it as.
        """
        self._scored |= len(set(confidence.tolist())) > 1
        if not self._scored or not len(xyxy):
            return np.ones(len(xyxy), bool), class_ids
        recent = [
            track
            for track in tracks
            if time - track.last.time <= MAX_TRACK_AGE and len(track.observations) >= MIN_TRACK_OBSERVATIONS
        ]
        predicted = np.array([track.extrapolate(time) for track in recent]).reshape(-1, 4)
        ious = np.asarray(sv.box_iou_batch(xyxy, predicted), np.float64) if recent else np.zeros((len(xyxy), 0))
        track_classes = np.array([track.class_id for track in recent], np.int64)
        kept = self._without_duplicates(xyxy, confidence, class_ids, ious, track_classes)
        chosen = class_ids.copy()
        chosen[kept] = self._continued(confidence[kept], class_ids[kept], ious[kept], track_classes)
        return kept, chosen

    def _without_duplicates(
        self,
        xyxy: npt.NDArray[np.float64],
        confidence: npt.NDArray[np.float64],
        class_ids: npt.NDArray[np.int64],
        ious: npt.NDArray[np.float64],
        track_classes: npt.NDArray[np.int64],
    ) -> npt.NDArray[np.bool_]:
        """Return a mask of the detections that no duplicate with a higher confidence replaces, [N].

        Two boxes of a class are not duplicates if two tracks of that class meet there.
        """
        self._detections.update(class_ids.tolist())
        overlaps = np.argwhere(np.triu(sv.box_iou_batch(xyxy, xyxy) >= SAME_OBJECT_IOU, 1)).tolist()
        for i, j in overlaps:
            if class_ids[i] != class_ids[j]:
                self._coincidences[_pair(class_ids[i], class_ids[j])] += 1
        kept = np.ones(len(xyxy), bool)
        for i, j in sorted(overlaps, key=lambda pair: -max(confidence[pair[0]], confidence[pair[1]])):
            if not (kept[i] and kept[j]) or confidence[i] == confidence[j]:
                continue
            if class_ids[i] == class_ids[j]:
                near = (track_classes == class_ids[i]) & (ious[[i, j]].max(0, initial=0) >= SAME_CLASS_IOU)
                duplicate = near.sum() < 2
            else:
                duplicate = self._exclude(class_ids[i], class_ids[j])
            if duplicate:
                kept[i if confidence[i] < confidence[j] else j] = False
        return kept

    def _continued(
        self,
        confidence: npt.NDArray[np.float64],
        class_ids: npt.NDArray[np.int64],
        ious: npt.NDArray[np.float64],
        track_classes: npt.NDArray[np.int64],
    ) -> npt.NDArray[np.int64]:
        """Return the class of the track that each detection continues, or its own class, [N]."""
        chosen = class_ids.copy()
        own = (class_ids[:, None] == track_classes) & (ious >= SAME_CLASS_IOU)
        free = ~own.any(0)
        # A detection of the track's class that only touches it is preferred if its confidence is higher.
        touching = (class_ids[:, None] == track_classes) & (ious > 0)
        rival = np.where(touching, confidence[:, None], 0.0).max(0, initial=0.0)
        for index in np.argsort(-confidence).tolist():
            if own[index].any():
                continue
            allowed = free & (ious[index] >= CONTINUE_IOU) & (rival < confidence[index])
            allowed &= np.array([self._exclude(class_id, class_ids[index]) for class_id in track_classes], bool)
            if allowed.any():
                best = int(np.where(allowed, ious[index], -1).argmax())
                chosen[index], free[best] = track_classes[best], False
        return chosen

    def _exclude(self, first: int, second: int) -> bool:
        """Return whether two classes exclude each other, according to the detections so far."""
        pair = _pair(first, second)
        rarer = min(self._detections[pair[0]], self._detections[pair[1]])
        return first != second and self._coincidences[pair] < MIN_COINCIDENCE * rarer


def _pair(first: int, second: int) -> tuple[int, int]:
    return (int(min(first, second)), int(max(first, second)))
