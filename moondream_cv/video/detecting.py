"""Detection beside everything else: one thread that looks at keyframes, those of several sources together."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import supervision as sv

from moondream_cv.detector import Detector
from moondream_cv.video.frame import Frame

logger = logging.getLogger(__name__)

MAX_BATCH = 8  # keyframes in one call
CLOSING_SECONDS = 10.0
SMOOTHING = 0.3  # weight of the latest call in `seconds`

Image = npt.NDArray[np.uint8]
Found = Future["sv.Detections | None"]
DetectOne = Callable[[Image, Sequence[str]], sv.Detections]


class _Waiting(NamedTuple):
    frame: Frame
    source: str
    found: Found


class DetectionWorker:
    """Looks at frames in a thread of its own, in the order in which they were submitted.

    What a detector raises on a frame is logged, with the source's name, and the frame counts as one that was not looked
    at: the frames after it may go well.

    Attributes:
        seconds: What a call has taken lately; 0 before the first one.
        looked: Frames that have been looked at.
        failed: Frames on which the detector raised.
    """

    def __init__(self, detector: Detector | DetectOne, classes: Sequence[str]) -> None:
        """Start the thread.

        Args:
            detector: A `Detector`, which gets all waiting frames at once, or anything that takes a BGR frame and the
                classes and gives their detections.
            classes: What to look for.
        """
        self._detector, self._classes = detector, list(classes)
        self._waiting: deque[_Waiting] = deque()
        self._busy = 0
        self._changed = threading.Condition()
        self._closed = False
        self.seconds, self.looked, self.failed = 0.0, 0, 0
        self._thread = threading.Thread(target=self._run, name="moondream_cv detection", daemon=True)
        self._thread.start()

    def submit(self, frame: Frame, source: str) -> Found:
        """Have a frame looked at; the result is None where that failed.

        Raises:
            RuntimeError: The worker is closed.
        """
        found: Found = Future()
        with self._changed:
            if self._closed:
                raise RuntimeError("the detection worker is closed")
            self._waiting.append(_Waiting(frame, source, found))
            self._changed.notify()
        return found

    @property
    def backlog(self) -> int:
        """Frames that wait or are being looked at."""
        with self._changed:
            return len(self._waiting) + self._busy

    def close(self, wait: float = CLOSING_SECONDS) -> bool:
        """Take no more frames, cancel those that wait, and see whether the thread has ended.

        Args:
            wait: Seconds to wait at the most for a call that is under way. A thread cannot be stopped from outside, and
                PyTorch aborts a process that ends in the midst of a call.
        """
        with self._changed:
            self._closed = True
            for waiting in self._waiting:
                waiting.found.cancel()
            self._waiting.clear()
            self._changed.notify()
        if self._thread is not threading.current_thread():
            self._thread.join(wait)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                batch = [self._waiting.popleft() for _ in range(min(MAX_BATCH, len(self._waiting)))]
                self._busy = len(batch)
            start = time.perf_counter()
            results = self._look(batch)
            taken = time.perf_counter() - start
            self.seconds = taken if self.seconds == 0 else self.seconds + SMOOTHING * (taken - self.seconds)
            with self._changed:
                self._busy = 0
            for waiting, result in zip(batch, results, strict=True):
                self.looked += result is not None
                self.failed += result is None
                waiting.found.set_result(result)

    def _look(self, batch: Sequence[_Waiting]) -> list[sv.Detections | None]:
        if isinstance(self._detector, Detector) and len(batch) > 1:
            try:
                return list(self._detector([waiting.frame.image for waiting in batch], self._classes))
            except Exception:  # one by one shows whose it is
                logger.debug("a call with %d frames failed", len(batch), exc_info=True)
        return [self._look_at(waiting) for waiting in batch]

    def _look_at(self, waiting: _Waiting) -> sv.Detections | None:
        try:
            found: Any = self._detector(waiting.frame.image, self._classes)
            if not isinstance(found, sv.Detections):
                raise TypeError(f"it gave a {type(found).__name__} and no sv.Detections")
            if found.class_id is not None and len(found) and not 0 <= found.class_id.max() < len(self._classes):
                raise ValueError(f"it gave the class_id {found.class_id.max()}, and there are {len(self._classes)}")
        except Exception as error:  # whatever a model, a server or a user's own detector can raise
            logger.warning("%s: the detector failed on frame %d: %s", waiting.source, waiting.frame.index, error)
            return None
        return found
