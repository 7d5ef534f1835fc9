"""Tracks in the MOT Challenge format, which evaluation tools for trackers read."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from moondream_cv.video.sources.frame import Frame
from moondream_cv.video.writers.base import TextWriter

if TYPE_CHECKING:
    import supervision as sv

logger = logging.getLogger(__name__)


class MotWriter(TextWriter):
    """Writes one line per tracked object: `frame,id,left,top,width,height,confidence,-1,-1,-1`.

    Frames count from 1. Boxes are in pixels with 2 decimals. The confidence has 4 decimals and defaults to 1. Objects
    without a track ID of 0 or more are omitted.
    """

    def __init__(self, target: str | Path | TextIO) -> None:
        super().__init__(target)
        self._rows = self._rows_without_id = 0

    def write(self, frame: Frame, detections: sv.Detections) -> None:
        """Write the objects of one frame. The image is ignored.

        Raises:
            VideoError: The lines cannot be written, or the writer is closed.
        """
        lines = []
        for index in range(len(detections)):
            tracker_id = -1 if detections.tracker_id is None else int(detections.tracker_id[index])
            left, top, right, bottom = (float(value) for value in detections.xyxy[index])
            if tracker_id < 0 or not all(map(math.isfinite, (left, top, right, bottom))):
                continue
            confidence = 1.0 if detections.confidence is None else float(detections.confidence[index])
            box = ",".join(f"{round(value, 2) + 0.0:.2f}" for value in (left, top, right - left, bottom - top))
            lines.append(f"{frame.index + 1},{tracker_id},{box},{confidence:.4f},-1,-1,-1\n")
        self._target.write("".join(lines))
        self._rows += len(lines)
        self._rows_without_id += len(detections) - len(lines)

    def close(self) -> None:
        """Close the file. Log a warning if no detection had a track ID.

        Raises:
            VideoError: The file cannot be completed, and no `write` has failed before.
        """
        if self._rows_without_id and not self._rows:
            logger.warning("%s is empty: no detection had a track ID; track before writing", self._target.name)
            self._rows_without_id = 0
        super().close()
