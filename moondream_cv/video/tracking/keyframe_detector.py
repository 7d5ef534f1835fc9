"""Detection on keyframes in a background thread, with one detector for all sources."""

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

MAX_BATCH = 8  # keyframes in one detector call
CLOSING_SECONDS = 0.6  # Ctrl-C ends a video within a second
EXIT_SECONDS = 10.0  # time limit for a running call when the process exits
SMOOTHING = 0.3  # weight of the latest call in `seconds`

Image = npt.NDArray[np.uint8]
DetectionFuture = Future["sv.Detections | None"]
DetectorFunction = Callable[[Image, Sequence[str]], sv.Detections]


_open: weakref.WeakSet[KeyframeDetector] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Let running calls finish: PyTorch aborts a process that exits during a call."""
    for detector in list(_open):
        detector.close(EXIT_SECONDS)


@dataclass(frozen=True, eq=False)
class _Pending:
    frame: Frame
    source_name: str
    source: int
    future: DetectionFuture


class KeyframeDetector:
    """Runs a detector on submitted keyframes, in the order of submission, in a background thread.

    If the detector raises on a keyframe, the error is logged with the name of the source and the result is None. Later
    keyframes are processed as usual.

    Attributes:
        seconds: Moving average of the duration of detector calls; 0 before the first one.
        detections_run: Number of keyframes on which detection succeeded.
        failed: Number of keyframes on which the detector raised.
    """

    def __init__(self, detector: Detector | DetectorFunction, classes: Sequence[str]) -> None:
        """Start the thread.

        Args:
            detector: A `Detector`, which gets the waiting keyframes of all sources in one call, or a function from a
                BGR frame and the classes to `sv.Detections`.
            classes: Class names.
        """
        self._detector, self._classes = detector, list(classes)
        self._waiting: deque[_Pending] = deque()
        self._running = 0
        self._changed = threading.Condition()
        self._closed = False
        self._on_exit: Callable[[], None] | None = None
        self.seconds, self.detections_run, self.failed = 0.0, 0, 0
        self._thread = threading.Thread(target=self._work, name="moondream_cv detection", daemon=True)
        self._thread.start()
        _open.add(self)

    def submit(self, frame: Frame, source_name: str, source: int = 0) -> DetectionFuture:
        """Queue a keyframe for detection.

        Args:
            frame: The keyframe.
            source_name: Name of the source in messages.
            source: Index of the source. Keyframes of one source are never in the same call.

        Returns:
            A future of the detections, or of None if detection failed; cancelled if the detector is closed first.
        """
        future: DetectionFuture = Future()
        with self._changed:
            if self._closed:
                future.cancel()
                return future
            self._waiting.append(_Pending(frame, source_name, source, future))
            self._changed.notify()
        return future

    @property
    def backlog(self) -> int:
        """Number of keyframes that are queued or in the running call."""
        with self._changed:
            return len(self._waiting) + self._running

    def close(self, wait: float | None = None, on_exit: Callable[[], None] | None = None) -> bool:
        """Cancel the queued keyframes and stop the thread after the running call.

        Args:
            wait: Maximum seconds to wait for the running call; default: `CLOSING_SECONDS`. When the process exits, it
                waits up to `EXIT_SECONDS`.
            on_exit: Function that the thread calls when it ends.

        Returns:
            Whether the thread has ended.
        """
        with self._changed:
            if not self._closed:
                self._on_exit = on_exit
            self._closed = True
            for pending in self._waiting:
                pending.future.cancel()
            self._waiting.clear()
            self._changed.notify()
        if self._thread is not threading.current_thread():
            self._thread.join(CLOSING_SECONDS if wait is None else wait)
        return not self._thread.is_alive()

    def _work(self) -> None:
        try:
            self._run()
        finally:
            if self._on_exit is not None:
                self._on_exit()

    def _run(self) -> None:
        while True:
            # Wait for keyframes
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                batch = self._next_batch()
                self._running = len(batch)

            # Run the detector
            start = time.perf_counter()
            results = self._detect_batch(batch)
            elapsed = time.perf_counter() - start
            self.seconds = elapsed if self.seconds == 0 else self.seconds + SMOOTHING * (elapsed - self.seconds)

            # Deliver the results
            with self._changed:
                self._running = 0
            for pending, result in zip(batch, results, strict=True):
                self.detections_run += result is not None
                self.failed += result is None
                pending.future.set_result(result)

    def _next_batch(self) -> list[_Pending]:
        """Remove the first keyframe of each source from the queue: a source continues while its next keyframe waits.

        A detector for single frames gets one keyframe, so that no source waits for the result of another one.
        """
        max_batch = MAX_BATCH if isinstance(self._detector, Detector) else 1
        batch: dict[int, _Pending] = {}
        for pending in self._waiting:
            if len(batch) < max_batch:
                batch.setdefault(pending.source, pending)
        for pending in batch.values():
            self._waiting.remove(pending)
        return list(batch.values())

    def _detect_batch(self, batch: Sequence[_Pending]) -> list[sv.Detections | None]:
        if isinstance(self._detector, Detector) and len(batch) > 1:
            try:
                return list(self._detector([pending.frame.image for pending in batch], self._classes))
            except Exception:  # retry one by one to find the frame that fails
                logger.debug("a call with %d frames failed", len(batch), exc_info=True)
        return [self._detect(pending) for pending in batch]

    def _detect(self, pending: _Pending) -> sv.Detections | None:
        try:
            detections = self._detector(pending.frame.image, self._classes)
            return _check_detections(detections, pending.frame, len(self._classes))
        except BaseException as error:  # custom detectors may raise anything, including SystemExit
            text = str(error) or type(error).__name__
            logger.warning("%s: the detector failed on frame %d: %s", pending.source_name, pending.frame.index, text)
            return None


def _check_detections(detections: Any, frame: Frame, num_classes: int) -> sv.Detections:
    """Validate the result of a detector, which may be custom code, and drop the boxes outside the frame.

    Raises:
        TypeError: The result is not `sv.Detections`.
        ValueError: A box or a class ID is invalid.
    """
    if not isinstance(detections, sv.Detections):
        raise TypeError(f"the detector must return sv.Detections, got {type(detections).__name__}")
    if not len(detections):
        return detections
    class_id = detections.class_id
    if class_id is not None and not (class_id.min() >= 0 and class_id.max() < num_classes):
        raise ValueError(f"class_id must be between 0 and {num_classes - 1}, got {class_id.tolist()}")
    x_min, y_min, x_max, y_max = np.asarray(detections.xyxy, np.float64).T
    if not np.isfinite(detections.xyxy).all() or (x_min > x_max).any() or (y_min > y_max).any():
        raise ValueError(f"boxes must be x_min, y_min, x_max, y_max in pixels, got {detections.xyxy.tolist()}")
    height, width = frame.image.shape[:2]
    inside = (x_min < width) & (y_min < height) & (x_max > 0) & (y_max > 0)
    return detections if inside.all() else cast(sv.Detections, detections[inside])
