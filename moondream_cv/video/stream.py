"""`track` and `track_streams`: tracked detections for the frames of files and live sources.

Files lose no frames, and boxes are interpolated between keyframes (`offline`). Live sources are processed at once, with
predicted boxes, and frames that arrive during processing are dropped (`online`). The detector runs on keyframes only,
in a background thread.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError
from typing import Any

import numpy as np
import numpy.typing as npt
import supervision as sv

from moondream_cv._deprecation import renamed_attribute
from moondream_cv.arguments import check_classes
from moondream_cv.detector import Detector
from moondream_cv.errors import VideoError
from moondream_cv.video.offline import track_offline
from moondream_cv.video.online import track_online
from moondream_cv.video.sources.opening import Source, open_source
from moondream_cv.video.stream_context import StreamContext, TrackedFrame
from moondream_cv.video.threads import iterate_in_threads
from moondream_cv.video.tracking.keyframe_detector import DetectorFunction, KeyframeDetector
from moondream_cv.video.tracking.schedule import Every, check_every
from moondream_cv.video.tracking.settings import Tracking

logger = logging.getLogger(__name__)

MAX_HELD_BYTES = 2**30
"""Memory limit in bytes for frames that wait for keyframes. Beyond it, frames are returned earlier."""


def track(
    source: Any,
    classes: str | Sequence[str],
    *,
    model: Any = "moondream2",
    every: Every = "auto",
    confidence: float = 0.0,
    tracking: Tracking | None = None,
    device: str | None = None,
    fps: float | None = None,
) -> Iterator[tuple[npt.NDArray[np.uint8], sv.Detections]]:
    """Detect and track objects in a video.

        for frame, detections in track("in.mp4", ["dog", "person"], model="moondream2", every=5):
            ...

    Args:
        source: Video file, folder or pattern of images, index of a webcam, URL of a stream, iterable of frames, or open
            `Source`.
        classes: Class names, as for a `Detector`.
        model: Name for `load`, model, `Detector`, `Pointer`, or function from a BGR frame and the classes to
            `sv.Detections`.
        every: Frames from one keyframe to the next; the detector runs on keyframes only. "auto" runs it as often as
            possible while the output keeps up with the source. With 1, each frame of a live source waits for its
            detections.
        confidence: Minimum confidence, if `model` is a name or a model. A `Detector` has its own.
        tracking: Tracking options; default: `Tracking()`.
        device: Torch device, if `model` is a name.
        fps: Frames per second of images and iterables, which have no times; default: 30.

    Yields:
        [H, W, 3] uint8 BGR frames with their detections, which have `tracker_id`. With `Tracking(redact=True)`, the
        boxes that cover the objects instead.

    Raises:
        VideoError: The source cannot be opened, or a live source is lost and cannot be reopened.
        ValueError: An argument is out of range.
    """
    stream = track_streams(
        [source], classes, model=model, every=every, confidence=confidence, tracking=tracking, device=device, fps=fps
    )
    return _image_detection_pairs(stream)


def _image_detection_pairs(stream: FrameStream) -> Iterator[tuple[npt.NDArray[np.uint8], sv.Detections]]:
    with stream:
        for tracked in stream:
            yield tracked.frame.image, tracked.detections if tracked.redaction is None else tracked.redaction


def track_streams(
    sources: Sequence[Any],
    classes: str | Sequence[str],
    *,
    model: Any = "moondream2",
    every: Every = "auto",
    confidence: float = 0.0,
    tracking: Tracking | None = None,
    device: str | None = None,
    fps: float | None = None,
) -> FrameStream:
    """Detect and track objects in several videos at once, with one model for all of them.

        with track_streams(["door.mp4", "yard.mp4"], ["person"], every=5) as stream:
            for tracked in stream:
                print(tracked.source, tracked.frame.index, tracked.detections.tracker_id)

    Keyframes of different sources are detected in one call.

    Args:
        sources: List of sources as for `track`, which describes the other arguments too.

    Returns:
        An iterator of `TrackedFrame`, in the order in which the frames are ready. If one of several sources fails, the
        others continue, and its error is raised at the end.

    Raises:
        VideoError: A source cannot be opened.
        ValueError: An argument is out of range.
    """
    # Check the arguments
    if isinstance(sources, str | bytes) or not isinstance(sources, Sequence) or not len(sources):
        raise ValueError(f"sources must be a list with at least one source, got {sources!r}")
    names, every = check_classes(classes), check_every(every)
    tracking = tracking or Tracking()
    tracking.create_tracker()  # raises for an unknown tracker

    # Open the sources and the model
    opened: list[Source] = []
    try:
        for source in sources:
            opened.append(open_source(source, fps=fps))
        is_detector = isinstance(model, Detector) or (callable(model) and not hasattr(model, "run"))
        if is_detector and confidence:
            raise ValueError(f"confidence={confidence!r} is for models; set the threshold of the detector instead")
        detector = model if is_detector else Detector(model, confidence=confidence, device=device)
    except BaseException:
        for source in opened:
            source.close()
        raise
    return FrameStream(opened, detector, names, every, tracking, close_detector=not is_detector)


class FrameStream:
    """Iterator of the tracked frames of several sources, which closes itself at the end.

    Attributes:
        sources: The open sources.
        classes: Class names by class ID.
        keyframe_detector: Background detection, with `detections_run`, `failed` and `seconds`.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        detector: Detector | DetectorFunction,
        classes: Sequence[str],
        every: Every,
        tracking: Tracking,
        close_detector: bool,
    ) -> None:
        """Start tracking.

        Args:
            sources: Open sources, which the stream closes.
            detector: A `Detector`, or a function from a BGR frame and the classes to `sv.Detections`.
            classes: Class names by class ID.
            every: Frames between keyframes, or "auto".
            tracking: Tracking options.
            close_detector: Close the detector at the end.
        """
        self.sources, self.classes = list(sources), list(classes)
        self._owned_detector = detector if close_detector and isinstance(detector, Detector) else None
        self._closed = False
        self.keyframe_detector = KeyframeDetector(detector, classes)
        max_held_bytes = MAX_HELD_BYTES // len(self.sources)
        streams = []
        for index, source in enumerate(self.sources):
            context = StreamContext(source, index, classes, self.keyframe_detector, every, tracking, max_held_bytes)
            streams.append(track_online(context) if source.live else track_offline(context))
        names = [source.name for source in self.sources]
        self._frames = (
            streams[0] if len(streams) == 1 else iterate_in_threads(streams, names, 2 * len(streams), _log_error)
        )

    worker = renamed_attribute("FrameStream.worker", "keyframe_detector")

    def __iter__(self) -> FrameStream:
        return self

    def __next__(self) -> TrackedFrame:
        if self._closed:
            raise StopIteration
        try:
            return next(self._frames)
        except CancelledError:  # closed in another thread
            raise StopIteration from None
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> FrameStream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_frames"):
            self.close()

    def close(self) -> None:
        """Stop tracking. Close the sources, and the model if `track_streams` loaded it."""
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(ValueError):  # the generator runs in another thread, and ends with its source
            self._frames.close()
        for source in self.sources:
            source.close()
        self.keyframe_detector.close(on_exit=None if self._owned_detector is None else self._owned_detector.close)


def _log_error(name: str, error: BaseException) -> None:
    logger.error("%s", error if isinstance(error, VideoError) else f"{name}: {error!r}")
