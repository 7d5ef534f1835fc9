"""`track` and `watch`: frames in, frames with tracked detections out.

A file loses no frame, and its boxes between keyframes are interpolated: a frame comes out when the two keyframes after
it have been looked at. A live source comes out at once, with boxes that are predicted from the keyframes so far; frames
for which there was no time are left out. Looking happens in a thread of its own, whichever it is.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import supervision as sv

from moondream_cv.detector import Detector, check_classes
from moondream_cv.errors import VideoError
from moondream_cv.video.sources.base import ASSUMED_FPS
from moondream_cv.video.sources.frame import Frame
from moondream_cv.video.sources.opening import Source, open_source
from moondream_cv.video.threads import in_threads
from moondream_cv.video.tracking.interpolation import BRIDGE, as_detections, interpolated, predicted
from moondream_cv.video.tracking.keyframe_detector import DetectionWorker, DetectOne, Found
from moondream_cv.video.tracking.redaction import BRIDGE_SECONDS, LOOKAHEAD, Redactor
from moondream_cv.video.tracking.schedule import SLOWEST, Every, SceneChange, Schedule, check_every
from moondream_cv.video.tracking.tracker import Tracker
from moondream_cv.video.tracking.tracks import Track

if TYPE_CHECKING:
    from trackers import BaseTracker

logger = logging.getLogger(__name__)

AHEAD = 2  # keyframes after a frame that are looked at before it comes out
ASKED = 3  # keyframes that wait for the model at a time, so that it is never idle
PREFETCHED = 4  # frames of a file that are decoded ahead
HELD_BYTES = 2**30  # frames that wait for a keyframe; those beyond come out with what is known
HISTORY = 3  # bridges for which sightings are kept: frames wait for one, and speeds are of the time before
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
        redaction: Boxes that cover the objects, with `Tracking.redact`; None without it. They are larger than those of
            `detections`, and there are more of them.
    """

    frame: Frame
    detections: sv.Detections
    looked: bool
    source: int = 0
    redaction: sv.Detections | None = None


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
        bridge_seconds: Seconds for which a track is continued without a detection. In files, boxes are interpolated
            over gaps of that length, or of one keyframe if that is longer, and frames wait that long.
        redact: Compute `Tracked.redaction`: boxes that cover each object from `bridge_seconds` before its first
            detection to as long after its last one, and between them; of a live source, only after detections. Frames
            of files wait for two bridges.
    """

    tracker: str | Callable[[], BaseTracker] = "sort"
    options: Mapping[str, Any] = field(default_factory=dict)
    memory: float = 10.0
    scene_change: bool = False
    cautious: bool = False
    bridge_seconds: float = BRIDGE_SECONDS
    redact: bool = False

    def __post_init__(self) -> None:
        if not self.memory >= 0:  # also true of NaN
            raise ValueError(f"memory must be 0 or more seconds, not {self.memory!r}")
        if not 0 <= self.bridge_seconds < math.inf:
            raise ValueError(f"bridge_seconds must be 0 or more seconds, got {self.bridge_seconds!r}")

    def start(self) -> Tracker:
        return Tracker(self.tracker, self.options, self.memory, HISTORY * self.bridge_seconds)


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
        [H, W, 3] uint8 BGR frames, and their detections with `tracker_id`; with `Tracking.redact`, the boxes that
        cover the objects.

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
            yield tracked.frame.image, tracked.detections if tracked.redaction is None else tracked.redaction


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
        fps = self.source.fps or ASSUMED_FPS
        # A file can wait for the model, and objects must not show between keyframes.
        waits = self.tracking.redact and not self.source.live
        longest = max(1, int(self.tracking.bridge_seconds * fps)) if waits else SLOWEST
        return Schedule(every, fps, longest)

    def redactor(self) -> Redactor | None:
        return Redactor(self.tracking.bridge_seconds) if self.tracking.redact else None


def _filed(job: _Job) -> Generator[Tracked, None, None]:
    """Every frame of a source that waits, with interpolated boxes."""
    schedule = job.schedule(job.every)
    breaks = _Breaks(job.tracking.scene_change)
    warnings = _Warnings(job)
    part = _Part(job, job.tracking.start(), schedule, job.redactor(), warnings)
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
        if broken_by := breaks(frame.image):
            yield from part.finish()
            redactor = job.redactor() if broken_by == "cut" else part.redactor
            part = _Part(job, part.tracker.anew(), schedule, redactor, warnings)
            schedule.restart()
        part.add(frame, schedule.wants(frame.index))
        yield from part.ready()
    yield from part.finish()
    if broken is not None:
        raise broken


class _Part:
    """Frames of a file, from one cut to the next, that wait for the keyframes after them.

    A frame gets its boxes when the next `AHEAD` keyframes are known, and those of the next `bridge_seconds`. With
    redaction, it also waits for the keyframes of the next `LOOKAHEAD` bridges.
    """

    def __init__(
        self, job: _Job, tracker: Tracker, schedule: Schedule, redactor: Redactor | None, warnings: _Warnings
    ) -> None:
        self._job, self.tracker, self._schedule = job, tracker, schedule
        self.redactor, self._warnings = redactor, warnings
        self._frames: deque[Frame] = deque()  # that have not got their boxes
        self._unredacted: deque[tuple[Tracked, float]] = deque()  # that have, with the seconds between their keyframes
        self._held = 0  # bytes of both
        self._asked: deque[tuple[Frame, Found]] = deque()  # keyframes whose detections are awaited
        self._passed: deque[int] = deque(maxlen=AHEAD)  # the last keyframes that no longer are, failed ones among them
        self._looked: deque[tuple[Frame, sv.Detections]] = deque()  # keyframes from the first frame's on
        self._tracks: dict[int, Track] = {}  # of those frames, also if the tracker has forgotten them
        self._known = -math.inf  # time of the last keyframe that is no longer awaited
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
            if self._unredacted:
                self._warnings.check_lookahead(self._known - self._unredacted[0][0].frame.time)
                yield self._redact()
            else:
                yield from self._next()

    def finish(self) -> Iterator[Tracked]:
        """All frames that are left; the last of them is looked at, so that the way to it is known."""
        if self._frames:
            last = self._frames[-1]
            if last.index not in (*self._passed, *(frame.index for frame, _ in self._asked)):
                self._ask(last)
        while self._asked:
            yield from self._take_in()
        while self._frames:
            yield from self._next()
        while self._unredacted:
            yield self._redact()

    @property
    def _full(self) -> bool:
        return self._held > self._job.held_bytes and len(self._frames) + len(self._unredacted) > 1

    def _ask(self, frame: Frame) -> None:
        self._asked.append((frame, self._job.submit(frame)))

    def _take_in(self) -> Iterator[Tracked]:
        """Wait for the detections of a keyframe, and let the frames out for which that was enough."""
        frame, waiting = self._asked.popleft()
        found = waiting.result()
        self._passed.append(frame.index)
        self._known = frame.time
        if found is not None:
            before = self._looked[-1][0].index if self._looked else frame.index
            tracked = self.tracker.update(found, frame)
            self._looked.append((frame, tracked))
            self._remember()
            if self.redactor is not None:
                self.redactor.add(tracked, frame.time, _size(frame))
                self._warnings.check_interval(self.tracker.interval)
            now = time.perf_counter()
            if self.tracker.interval > 0:
                lag = (now - self._wall) / self.tracker.interval
                self._schedule.learn(self._job.worker.seconds, lag, frame.index - before)
            self._wall = now
        if len(self._passed) == AHEAD:
            known = self._known - self._job.tracking.bridge_seconds
            while self._frames and self._frames[0].index < self._passed[0] and self._frames[0].time <= known:
                yield from self._next()
        if self.redactor is not None:
            lookahead = LOOKAHEAD * self.redactor.bridge_seconds
            while self._unredacted and self._unredacted[0][0].frame.time + lookahead <= self._known:
                yield self._redact()

    def _remember(self) -> None:
        """Add the tracker's tracks to those of the waiting frames, and drop those that ended before."""
        self._tracks.update(self.tracker.tracks)
        start = (self._frames[0].time if self._frames else self._known) - self._job.tracking.bridge_seconds
        for tracker_id, track in list(self._tracks.items()):
            if tracker_id not in self.tracker.tracks and track.last.time < start - AHEAD * self.tracker.interval:
                del self._tracks[tracker_id]

    def _next(self) -> Iterator[Tracked]:
        """Give the first frame its boxes; without redaction, it comes out."""
        frame = self._frames.popleft()
        while len(self._looked) > 1 and self._looked[1][0].index <= frame.index:
            self._looked.popleft()
        resolution_wh = _size(frame)
        times = [looked.time for looked, _ in self._looked]
        tracks, tracking = self._tracks.values(), self._job.tracking
        interval = self.tracker.interval or UNKNOWN_INTERVAL
        if times and times[-1] >= frame.time:
            interval = float(max(np.diff(times[: 1 + AHEAD]), default=self.tracker.interval))
            bridge = tracking.bridge_seconds
            seen = interpolated(tracks, frame.time, interval, resolution_wh, tracking.cautious, bridge)
        else:
            seen = predicted(tracks, frame.time, interval, resolution_wh)
        looked = self._looked[0][1] if self._looked and self._looked[0][0] is frame else None
        detections = as_detections(seen, self._job.classes, resolution_wh, looked)
        tracked = Tracked(frame, detections, looked is not None, self._job.number)
        if self.redactor is None:
            self._held -= frame.image.nbytes
            yield tracked
        else:
            self._unredacted.append((tracked, interval))

    def _redact(self) -> Tracked:
        """Return the first frame that has its boxes with those that cover its objects."""
        assert self.redactor is not None
        tracked, interval = self._unredacted.popleft()
        frame = tracked.frame
        self._held -= frame.image.nbytes
        covered = self.redactor.cover(frame.time, self._job.classes, _size(frame), interval=interval)
        return replace(tracked, redaction=covered)


def _live(job: _Job) -> Generator[Tracked, None, None]:
    """The newest frames of a source that does not wait, with predicted boxes."""
    at_once = job.every == 1
    schedule = job.schedule(1 if job.every == "auto" else job.every)
    tracker = job.tracking.start()
    breaks = _Breaks(job.tracking.scene_change)
    warnings = _Warnings(job)
    redactor, delay = job.redactor(), 0.0
    asked: tuple[Frame, Found, Tracker] | None = None
    for frame in job.source:
        if broken_by := breaks(frame.image):
            tracker = tracker.anew()
            schedule.restart()
            redactor = job.redactor() if broken_by == "cut" else redactor
        if asked is None and schedule.wants(frame.index):
            asked = (frame, job.submit(frame), tracker)
        looked = None
        if asked is not None and (at_once or asked[1].done()):
            found = asked[1].result()
            if found is not None and asked[2] is tracker:  # else it is of a scene that is over
                looked = tracker.update(found, asked[0])
                delay = frame.time - asked[0].time
                if redactor is not None:
                    redactor.add(looked, asked[0].time, _size(asked[0]))
                    warnings.check_interval(tracker.interval)
            asked = None
        resolution_wh = _size(frame)
        interval = tracker.interval or max(UNKNOWN_INTERVAL, 2 * job.worker.seconds)
        seen = predicted(tracker.tracks.values(), frame.time, interval, resolution_wh)
        of_this = looked if at_once else None
        detections = as_detections(seen, job.classes, resolution_wh, of_this)
        covered = None
        if redactor is not None:
            covered = redactor.cover(frame.time, job.classes, resolution_wh, interval=BRIDGE * interval, delay=delay)
        yield Tracked(frame, detections, of_this is not None, job.number, covered)


class _Breaks:
    """Finds the frames at which tracks end: changes of the frame size and, on request, cuts."""

    def __init__(self, cuts: bool) -> None:
        self._is_cut = SceneChange() if cuts else None
        self._shape: tuple[int, ...] | None = None

    def __call__(self, image: npt.NDArray[np.uint8]) -> Literal["cut", "size"] | None:
        before, self._shape = self._shape, image.shape
        if self._is_cut is not None and self._is_cut(image):
            return "cut"
        return "size" if before is not None and image.shape != before else None


class _Warnings:
    """Warns once for each reason for which redaction may leave objects uncovered."""

    def __init__(self, job: _Job) -> None:
        self._job = job
        self._given: set[str] = set()

    def check_interval(self, seconds: float) -> None:
        """Warn if the time since the keyframe before exceeds the bridge."""
        bridge = self._job.tracking.bridge_seconds
        if seconds > bridge + 1e-6:
            self._warn(
                "interval",
                f"no detection ran for {seconds:.2f} s, and redaction bridges {bridge:g} s: objects may show; "
                f"decrease every (now {self._job.every!r}) or increase bridge_seconds",
            )

    def check_lookahead(self, seconds: float) -> None:
        """Warn if a frame comes out before the detections of one bridge after it are known."""
        bridge = self._job.tracking.bridge_seconds
        if seconds < bridge:
            self._warn(
                "lookahead",
                f"frames of {bridge:g} s exceed the limit of {self._job.held_bytes / 2**20:g} MiB for waiting frames: "
                "objects may show before they are detected; use smaller frames or decrease bridge_seconds",
            )

    def _warn(self, reason: str, message: str) -> None:
        if reason not in self._given:
            self._given.add(reason)
            logger.warning("%s: %s", self._job.source.name, message)


def _size(frame: Frame) -> tuple[int, int]:
    """Return the width and height of a frame."""
    return (frame.image.shape[1], frame.image.shape[0])


def _tell(name: str, error: BaseException) -> None:
    logger.error("%s", error if isinstance(error, VideoError) else f"{name}: {error!r}")
