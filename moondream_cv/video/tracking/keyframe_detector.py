"""Detection beside everything else: one thread that looks at keyframes, those of several sources in one call."""

from __future__ import annotations

import atexit
import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import supervision as sv

from moondream_cv.detector import Detector
from moondream_cv.video.sources.frame import Frame

logger = logging.getLogger(__name__)

MAX_BATCH = 8  # keyframes in one call
CLOSING_SECONDS = 1.0
LAST_SECONDS = 10.0  # that a call may still take when the process ends
SMOOTHING = 0.3  # weight of the latest call in `seconds`

Image = npt.NDArray[np.uint8]
Found = Future["sv.Detections | None"]
DetectOne = Callable[[Image, Sequence[str]], sv.Detections]


_running: weakref.WeakSet[DetectionWorker] = weakref.WeakSet()


@atexit.register
def _let_them_finish() -> None:
    """PyTorch aborts a process that ends in the midst of a call. A second Ctrl-C may leave workers open."""
    for worker in list(_running):
        worker.close(LAST_SECONDS)


@dataclass(frozen=True, eq=False)
class _Waiting:
    frame: Frame
    source: str
    number: int
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
        self._then: Callable[[], None] | None = None
        self.seconds, self.looked, self.failed = 0.0, 0, 0
        self._thread = threading.Thread(target=self._work, name="moondream_cv detection", daemon=True)
        self._thread.start()
        _running.add(self)

    def submit(self, frame: Frame, source: str, number: int = 0) -> Found:
        """Have a frame looked at; the result is None where that failed, and cancelled once the worker is closed.

        Args:
            source: Its name, for messages.
            number: Tells it from others, which may have the same name.
        """
        found: Found = Future()
        with self._changed:
            if self._closed:
                found.cancel()
                return found
            self._waiting.append(_Waiting(frame, source, number, found))
            self._changed.notify()
        return found

    @property
    def backlog(self) -> int:
        """Frames that wait or are being looked at."""
        with self._changed:
            return len(self._waiting) + self._busy

    def close(self, wait: float | None = None, then: Callable[[], None] | None = None) -> bool:
        """Take no more frames, cancel those that wait, and see whether the thread has ended.

        Args:
            wait: Seconds to wait at the most for a call that is under way; None: `CLOSING_SECONDS`. A thread cannot be
                stopped from outside. At the end of the process it is waited for longer.
            then: Called by the thread when it has ended.
        """
        with self._changed:
            if not self._closed:
                self._then = then
            self._closed = True
            for waiting in self._waiting:
                waiting.found.cancel()
            self._waiting.clear()
            self._changed.notify()
        if self._thread is not threading.current_thread():
            self._thread.join(CLOSING_SECONDS if wait is None else wait)
        return not self._thread.is_alive()

    def _work(self) -> None:
        try:
            self._run()
        finally:
            if self._then is not None:
                self._then()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                batch = self._take()
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

    def _take(self) -> list[_Waiting]:
        """Take the first frame of each source: while they are drawn, the next ones are looked at.

        A detector that takes one frame at a time gets one, so that none waits for another's result.
        """
        several = isinstance(self._detector, Detector)
        batch: dict[int, _Waiting] = {}
        for waiting in self._waiting:
            if len(batch) < (MAX_BATCH if several else 1):
                batch.setdefault(waiting.number, waiting)
        for waiting in batch.values():
            self._waiting.remove(waiting)
        return list(batch.values())

    def _look(self, batch: Sequence[_Waiting]) -> list[sv.Detections | None]:
        if isinstance(self._detector, Detector) and len(batch) > 1:
            try:
                return list(self._detector([waiting.frame.image for waiting in batch], self._classes))
            except Exception:  # one by one shows whose it is
                logger.debug("a call with %d frames failed", len(batch), exc_info=True)
        return [self._look_at(waiting) for waiting in batch]

    def _look_at(self, waiting: _Waiting) -> sv.Detections | None:
        try:
            return _checked(self._detector(waiting.frame.image, self._classes), waiting.frame, len(self._classes))
        except BaseException as error:  # whatever a model, a server or a user's own detector can raise, sys.exit() too
            text = str(error) or type(error).__name__
            logger.warning("%s: the detector failed on frame %d: %s", waiting.source, waiting.frame.index, text)
            return None


def _checked(found: Any, frame: Frame, classes: int) -> sv.Detections:
    """Detections that can be tracked: those of a user's own detector may be anything.

    Raises:
        TypeError: They are no `sv.Detections`.
        ValueError: A box or a class is impossible. What lies outside the frame is just left out.
    """
    if not isinstance(found, sv.Detections):
        raise TypeError(f"it gave {type(found).__name__} instead of sv.Detections")
    if not len(found):
        return found
    if found.class_id is not None and not (found.class_id.min() >= 0 and found.class_id.max() < classes):
        raise ValueError(f"it gave class_id {found.class_id.tolist()}, and there are {classes} classes, from 0 on")
    x_min, y_min, x_max, y_max = np.asarray(found.xyxy, np.float64).T
    if not np.isfinite(found.xyxy).all() or (x_min > x_max).any() or (y_min > y_max).any():
        raise ValueError(f"it gave boxes {found.xyxy.tolist()}, which must be x_min, y_min, x_max, y_max in pixels")
    height, width = frame.image.shape[:2]
    within = (x_min < width) & (y_min < height) & (x_max > 0) & (y_max > 0)
    return found if within.all() else cast(sv.Detections, found[within])
