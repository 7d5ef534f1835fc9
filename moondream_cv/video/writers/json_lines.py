"""Detections as JSON lines, one line per frame, for programs that read them while they are written."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any, SupportsFloat

from moondream_cv.video.sources.frame import Frame
from moondream_cv.video.writers.base import TextWriter

if TYPE_CHECKING:
    import supervision as sv


class JsonLinesWriter(TextWriter):
    """Writes one line per frame, and flushes it.

    A line is `{"frame": 0, "time": 0.0, "detections": [...]}`, with the frame index from 0 and the time in seconds. A
    detection is `{"xyxy": [x1, y1, x2, y2], "class_name": "dog", "class_id": 0, "confidence": 0.9, "tracker_id": 1}`.
    Coordinates are pixels with 2 decimals, and the confidence has 4. Unknown values are null, including a track ID of
    -1.
    """

    def write(self, frame: Frame, detections: sv.Detections) -> None:
        """Write one line. The image is ignored.

        Raises:
            VideoError: The line cannot be written, or the writer is closed.
        """
        line = {
            "frame": frame.index,
            "time": _number(frame.time, 6),
            "detections": [_to_dict(detections, index) for index in range(len(detections))],
        }
        self._target.write(json.dumps(line, allow_nan=False) + "\n")


def _to_dict(detections: sv.Detections, index: int) -> dict[str, Any]:
    names, tracker = detections.data.get("class_name"), detections.tracker_id
    confidence = detections.confidence
    tracker_id = -1 if tracker is None else int(tracker[index])
    return {
        "xyxy": [_number(value, 2) for value in detections.xyxy[index]],
        "class_name": None if names is None else str(names[index]),
        "class_id": None if detections.class_id is None else int(detections.class_id[index]),
        "confidence": None if confidence is None else _number(confidence[index], 4),
        "tracker_id": tracker_id if tracker_id >= 0 else None,
    }


def _number(value: SupportsFloat, digits: int) -> float | None:
    """Return a rounded number; None if it is not finite, because JSON has neither NaN nor infinity."""
    number = float(value)
    return round(number, digits) + 0.0 if math.isfinite(number) else None  # + 0.0 turns -0.0 into 0.0
