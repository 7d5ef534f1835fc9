"""Detections as JSON lines: one line a frame, for programs that read along."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any, SupportsFloat

from moondream_cv.video.sources.frame import Frame
from moondream_cv.video.writers.base import TextWriter

if TYPE_CHECKING:
    import supervision as sv


class JsonLinesWriter(TextWriter):
    """Writes one line a frame, which is flushed at once.

    A line is `{"frame": 0, "time": 0.0, "detections": [...]}`: the frame's number from 0 and its time in seconds. A
    detection is `{"xyxy": [x1, y1, x2, y2], "class_name": "dog", "class_id": 0, "confidence": 0.9, "tracker_id": 1}`,
    in pixels with 2 decimals, the confidence with 4. What is not known is null: the tracker's id too where it is −1.
    """

    def write(self, frame: Frame, detections: sv.Detections) -> None:
        """Write one line; the image is not looked at.

        Raises:
            VideoError: The line cannot be written, or the writer is closed.
        """
        line = {
            "frame": frame.index,
            "time": _number(frame.time, 6),
            "detections": [_described(detections, row) for row in range(len(detections))],
        }
        self._target.write(json.dumps(line, allow_nan=False) + "\n")


def _described(detections: sv.Detections, row: int) -> dict[str, Any]:
    names, tracker = detections.data.get("class_name"), detections.tracker_id
    confidence = detections.confidence
    tracker_id = -1 if tracker is None else int(tracker[row])
    return {
        "xyxy": [_number(value, 2) for value in detections.xyxy[row]],
        "class_name": None if names is None else str(names[row]),
        "class_id": None if detections.class_id is None else int(detections.class_id[row]),
        "confidence": None if confidence is None else _number(confidence[row], 4),
        "tracker_id": tracker_id if tracker_id >= 0 else None,
    }


def _number(value: SupportsFloat, digits: int) -> float | None:
    """Round a number; None where it is not finite, because JSON knows neither NaN nor infinity."""
    number = float(value)
    return round(number, digits) + 0.0 if math.isfinite(number) else None  # + 0.0 makes 0.0 of -0.0
