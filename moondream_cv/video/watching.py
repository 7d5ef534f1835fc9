"""`track` and `watch`: frames in, frames with tracked detections out.

A file loses no frame, and its boxes between keyframes are interpolated: a frame comes out when the two keyframes after
it have been looked at. A live source comes out at once, with boxes that are predicted from the keyframes so far; frames
for which there was no time are left out. Looking happens in a thread of its own, whichever it is.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import supervision as sv

from moondream_cv.detector import Detector, check_classes
from moondream_cv.errors import VideoError
from moondream_cv.video.base import ASSUMED_FPS
from moondream_cv.video.between import as_detections, interpolated, predicted
from moondream_cv.video.detecting import DetectionWorker, DetectOne, Found
from moondream_cv.video.frame import Frame
from moondream_cv.video.schedule import Every, SceneChange, Schedule, check_every
from moondream_cv.video.sources import Source, open_source
from moondream_cv.video.threads import in_threads
from moondream_cv.video.tracking import Tracker

if TYPE_CHECKING:
    from trackers import BaseTracker

logger = logging.getLogger(__name__)

AHEAD = 2  # keyframes after a frame that are looked at before it comes out
ASKED = 3  # keyframes that wait for the model at a time, so that it is never idle
PREFETCHED = 4  # frames of a file that are decoded ahead
HELD_BYTES = 2**30  # frames that wait for a keyframe; those beyond come out with what is known
UNKNOWN_INTERVAL = 1.0  # seconds between keyframes as long as there has been one only, at the least


@dataclass(frozen=True, eq=False)
class Tracked:
    """A frame and what is on it.

    Attributes:
        frame: As the source gave it.
        detections: As a `Detector` gives them, with `tracker_id`: from 1, different for all objects of all classes of
            a source; -1 for what is not tracked.
        looked: Whether the detector has looked at this very frame.
        source: Number of the source, from 0.
    """

    frame: Frame
    detections: sv.Detections
    looked: bool
    source: int = 0


@dataclass(frozen=True)
class Tracking:
    """How objects get and keep their numbers.

    Attributes:
        tracker: "sort", "ocsort", "bytetrack", "botsort", with newer versions of `trackers` "cbiou"; or what makes a
            tracker of a class.
        options: Arguments of that tracker.
        memory: Seconds for which an object that is gone keeps its number.
        scene_change: Look for cuts: another scene is looked at at once, and nothing is carried over into it.
        cautious: In files, show an object from the keyframe before the first one that found it, and up to the one after
            the last: for what must be covered, rather too much than too little.
    """

    tracker: str | Callable[[], BaseTracker] = "sort"
    options: Mapping[str, Any] = field(default_factory=dict)
    memory: float = 10.0
    scene_change: bool = False
    cautious: bool = False

    def __post_init__(self) -> None:
        if not self.memory >= 0:  # also true of NaN
            raise ValueError(f"memory must be 0 or more seconds, not {self.memory!r}")

    def start(self) -> Tracker:
        return Tracker(self.tracker, self.options, self.memory)


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
    """Track what the names mean through a video.

        for frame, detections in track("in.mp4", ["dog", "person"], model="moondream2", every=5):
            ...

    Args:
        source: A file, a folder or pattern of images, a webcam's number, the URL of a stream, an iterable of frames, or
            an open `Source`.
        classes: Names, as for a `Detector`.
        model: A name for `load`, a model, a `Detector` or `Pointer`, or anything that takes a BGR frame and the classes
            and gives `sv.Detections`.
        every: Look at every so many frames; "auto": as often as the model can while the output keeps up with the
            source. With 1, every frame of a live source waits for the model.
        confidence: What a detection must reach, for a model that is given by name or as such; a `Detector` has its own.
        tracking: How objects get their numbers.
        device: For a model that is given by name.
        fps: Frames per second of images and iterables, which have no clock; None for 30.

    Yields:
        [H, W, 3] uint8 BGR frames, and their detections with `tracker_id`.

    Raises:
        VideoError: The source cannot be opened, or a live one is gone for good; names it.
        ValueError: An argument is out of range.
    """
    watched = watch(
        [source], classes, model=model, every=every, confidence=confidence, tracking=tracking, device=device, fps=fps
    )
    return _pairs(watched)


def _pairs(watched: Watch) -> Iterator[tuple[npt.NDArray[np.uint8], sv.Detections]]:
    with watched:
        for tracked in watched:
            yield tracked.frame.image, tracked.detections


def watch(
    sources: Sequence[Any],
    classes: str | Sequence[str],
    *,
    model: Any = "moondream2",
    every: Every = "auto",
    confidence: float = 0.0,
    tracking: Tracking | None = None,
    device: str | None = None,
    fps: float | None = None,
) -> Watch:
    """Track what the names mean through several videos at a time, with one model that looks at their frames together.

    Args:
        sources: Each as for `track`, which says what the other arguments are, too.

    Returns:
        An iterator of `Tracked`, in the order in which the frames are ready. Where one of several sources fails the
        others go on; its error is raised at the end.

    Raises:
        VideoError: A source cannot be opened; names it.
        ValueError: An argument is out of range.
    """
    if isinstance(sources, str | bytes) or not isinstance(sources, Sequence) or not len(sources):
        raise ValueError(f"sources must be a list of one or more, not {sources!r}")
    names, every = check_classes(classes), check_every(every)
    tracking = tracking or Tracking()
    tracking.start()  # an unknown tracker is told now
    opened: list[Source] = []
    try:
        for source in sources:
            opened.append(open_source(source, fps=fps))
        own = isinstance(model, Detector) or (callable(model) and not hasattr(model, "run"))
        if own and confidence:
            raise ValueError(f"confidence={confidence!r} is for a model; a detector has its own threshold")
        detector = model if own else Detector(model, confidence=confidence, device=device)
    except BaseException:
        for source in opened:
            source.close()
        raise
    return Watch(opened, detector, names, every, tracking, owns=not own)


class Watch:
    """Sources that are being watched: an iterator of `Tracked`, which closes itself at the end.

    Attributes:
        sources: That are watched.
        classes: What is looked for.
        worker: Looks at keyframes; knows how many, how fast, and how often that failed.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        detector: Detector | DetectOne,
        classes: Sequence[str],
        every: Every,
        tracking: Tracking,
        owns: bool,
    ) -> None:
        """Start watching.

        Args:
            owns: Whether the detector is to be closed at the end.
        """
        self.sources, self.classes = list(sources), list(classes)
        self._detector = detector if owns and isinstance(detector, Detector) else None
        self._closed = False
        self.worker = DetectionWorker(detector, classes)
        streams = []
        for number, source in enumerate(self.sources):
            job = _Job(source, number, classes, self.worker, every, tracking, HELD_BYTES // len(self.sources))
            streams.append(_live(job) if source.live else _filed(job))
        names = [source.name for source in self.sources]
        self._frames = streams[0] if len(streams) == 1 else in_threads(streams, names, 2 * len(streams), _tell)

    def __iter__(self) -> Watch:
        return self

    def __next__(self) -> Tracked:
        if self._closed:
            raise StopIteration
        try:
            return next(self._frames)
        except CancelledError:  # closed in another thread
            raise StopIteration from None
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_frames"):
            self.close()

    def close(self) -> None:
        """Stop watching: the sources are closed, and so is a model that was loaded for it."""
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(ValueError):  # it is running in another thread, and ends with its source
            self._frames.close()
        for source in self.sources:
            source.close()
        self.worker.close(then=None if self._detector is None else self._detector.close)


@dataclass(frozen=True)
class _Job:
    """What watching one source takes."""

    source: Source
    number: int
    classes: Sequence[str]
    worker: DetectionWorker
    every: Every
    tracking: Tracking
    held_bytes: int

    def submit(self, frame: Frame) -> Found:
        return self.worker.submit(frame, self.source.name, self.number)

    def schedule(self, every: Every) -> Schedule:
        return Schedule(every, self.source.fps or ASSUMED_FPS)


def _filed(job: _Job) -> Generator[Tracked, None, None]:
    """Every frame of a source that waits, with interpolated boxes."""
    schedule = job.schedule(job.every)
    breaks = _Breaks(job.tracking.scene_change)
    part = _Part(job, job.tracking.start(), schedule)
    source = job.source
    frames = iter(in_threads([source], [source.name], PREFETCHED) if source.ahead else source)
    broken: Exception | None = None
    while True:
        try:
            frame = next(frames, None)
        except Exception as error:  # what came before it comes out first
            broken = error
            break
        if frame is None:
            break
        if breaks(frame.image):
            yield from part.finish()
            part = _Part(job, part.tracker.anew(), schedule)
            schedule.restart()
        part.add(frame, schedule.wants(frame.index))
        yield from part.ready()
    yield from part.finish()
    if broken is not None:
        raise broken


class _Part:
    """Frames of a file, from one cut to the next, that wait for the keyframes after them."""

    def __init__(self, job: _Job, tracker: Tracker, schedule: Schedule) -> None:
        self._job, self.tracker, self._schedule = job, tracker, schedule
        self._frames: deque[Frame] = deque()  # that have not come out
        self._held = 0  # bytes of those
        self._asked: deque[tuple[Frame, Found]] = deque()  # keyframes whose detections are awaited
        self._passed: deque[int] = deque(maxlen=AHEAD)  # the last keyframes that no longer are, failed ones among them
        self._looked: deque[tuple[Frame, sv.Detections]] = deque()  # keyframes from the first frame's on
        self._wall = time.perf_counter()

    def add(self, frame: Frame, keyframe: bool) -> None:
        self._frames.append(frame)
        self._held += frame.image.nbytes
        if keyframe:
            self._ask(frame)

    def ready(self) -> Iterator[Tracked]:
        """The frames that can come out by now, after waiting for the model where too many are held."""
        while self._asked and (self._asked[0][1].done() or len(self._asked) > ASKED or self._full):
            yield from self._take_in()
        while self._full:
            yield self._next()

    def finish(self) -> Iterator[Tracked]:
        """All frames that are left; the last of them is looked at, so that the way to it is known."""
        if self._frames:
            last = self._frames[-1]
            if last.index not in (*self._passed, *(frame.index for frame, _ in self._asked)):
                self._ask(last)
        while self._asked:
            yield from self._take_in()
        while self._frames:
            yield self._next()

    @property
    def _full(self) -> bool:
        return self._held > self._job.held_bytes and len(self._frames) > 1

    def _ask(self, frame: Frame) -> None:
        self._asked.append((frame, self._job.submit(frame)))

    def _take_in(self) -> Iterator[Tracked]:
        """Wait for the detections of a keyframe, and let the frames out for which that was enough."""
        frame, waiting = self._asked.popleft()
        found = waiting.result()
        self._passed.append(frame.index)
        if found is not None:
            before = self._looked[-1][0].index if self._looked else frame.index
            self._looked.append((frame, self.tracker.update(found, frame)))
            now = time.perf_counter()
            if self.tracker.interval > 0:
                lag = (now - self._wall) / self.tracker.interval
                self._schedule.learn(self._job.worker.seconds, lag, frame.index - before)
            self._wall = now
        if len(self._passed) == AHEAD:
            while self._frames and self._frames[0].index < self._passed[0]:
                yield self._next()

    def _next(self) -> Tracked:
        frame = self._frames.popleft()
        self._held -= frame.image.nbytes
        while len(self._looked) > 1 and self._looked[1][0].index <= frame.index:
            self._looked.popleft()
        resolution_wh = (frame.image.shape[1], frame.image.shape[0])
        times = [looked.time for looked, _ in self._looked]
        tracks = self.tracker.tracks.values()
        if times and times[-1] >= frame.time:
            interval = max(np.diff(times[: 1 + AHEAD]), default=self.tracker.interval)
            seen = interpolated(tracks, frame.time, float(interval), resolution_wh, self._job.tracking.cautious)
        else:
            seen = predicted(tracks, frame.time, self.tracker.interval or UNKNOWN_INTERVAL, resolution_wh)
        looked = self._looked[0][1] if self._looked and self._looked[0][0] is frame else None
        detections = as_detections(seen, self._job.classes, resolution_wh, looked)
        return Tracked(frame, detections, looked is not None, self._job.number)


def _live(job: _Job) -> Generator[Tracked, None, None]:
    """The newest frames of a source that does not wait, with predicted boxes."""
    at_once = job.every == 1
    schedule = job.schedule(1 if job.every == "auto" else job.every)
    tracker = job.tracking.start()
    breaks = _Breaks(job.tracking.scene_change)
    asked: tuple[Frame, Found, Tracker] | None = None
    for frame in job.source:
        if breaks(frame.image):
            tracker = tracker.anew()
            schedule.restart()
        if asked is None and schedule.wants(frame.index):
            asked = (frame, job.submit(frame), tracker)
        looked = None
        if asked is not None and (at_once or asked[1].done()):
            found = asked[1].result()
            if found is not None and asked[2] is tracker:  # else it is of a scene that is over
                looked = tracker.update(found, asked[0])
            asked = None
        resolution_wh = (frame.image.shape[1], frame.image.shape[0])
        interval = tracker.interval or max(UNKNOWN_INTERVAL, 2 * job.worker.seconds)
        seen = predicted(tracker.tracks.values(), frame.time, interval, resolution_wh)
        of_this = looked if at_once else None
        yield Tracked(frame, as_detections(seen, job.classes, resolution_wh, of_this), of_this is not None, job.number)


class _Breaks:
    """Tells where nothing may be carried over: where the size changes, and at cuts if those are looked for."""

    def __init__(self, cuts: bool) -> None:
        self._is_cut = SceneChange() if cuts else None
        self._shape: tuple[int, ...] | None = None

    def __call__(self, image: npt.NDArray[np.uint8]) -> bool:
        before, self._shape = self._shape, image.shape
        cut = self._is_cut is not None and self._is_cut(image)
        return cut or (before is not None and image.shape != before)


def _tell(name: str, error: BaseException) -> None:
    logger.error("%s", error if isinstance(error, VideoError) else f"{name}: {error!r}")
