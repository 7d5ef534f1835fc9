"""`Source`: the interface of all sources of frames, and `FiniteSource`, the base of sources with an end."""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from fractions import Fraction
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from moondream_cv._deprecation import renamed_attribute, renamed_function, warn_renamed
from moondream_cv.errors import VideoError
from moondream_cv.images import ImageInput, to_rgb
from moondream_cv.video.sources.frame import Frame

if TYPE_CHECKING:
    from typing_extensions import Self

Colorspace = Literal["bt601", "bt709"]
"""Matrix between RGB and YUV: BT.601 for standard definition, BT.709 for HD."""

Image: TypeAlias = npt.NDArray[np.uint8]
"""[H, W, 3] uint8 BGR, C-contiguous."""


class TimedImage(NamedTuple):
    """An image with its times in the source.

    Attributes:
        image: [H, W, 3] uint8 BGR.
        seconds: Presentation time on the clock of the source; None without a clock.
        duration: Duration in seconds; None if unknown.
    """

    image: Image
    seconds: float | None = None
    duration: float | None = None


class Recording(NamedTuple):
    """One of the concatenated recordings of a file; most files have one.

    Attributes:
        time: Time of the recording's first frame, in seconds since the first frame of the file.
        seconds: Time of that frame on the clock of the file.
    """

    time: float
    seconds: float


MIN_ASPECT_RATIO, MAX_ASPECT_RATIO = 0.01, 100
"""Limits of plausible sample aspect ratios; a file with any other is damaged."""

ASSUMED_FPS = 30.0
"""Frames per second of folders of images and iterables, which have no clock."""

MAX_CLOCK_ERROR = 2.5
"""Frames by which the clock of a source may step back without starting another recording."""

CLOSING_SECONDS = 2.0
"""Seconds that `close` waits for a read in another thread. After that, the other thread cleans up."""

logger = logging.getLogger(__name__)


class Source(ABC):
    """Iterator of frames, which can be used once.

        with open_source("clip.mp4") as source:
            for frame in source:
                ...

    Attributes:
        name: Name in messages. Names of URLs contain no user, password or keys.
        live: Whether frames arrive in real time. A live source drops frames that are not fetched in time.
        fps: Average frames per second; None if unknown.
        frame_count: Estimated number of frames according to the container; None if unknown.
        resolution_wh: Width and height of the first frame, upright. Later frames may differ.
        sample_aspect_ratio: Width of a pixel divided by its height, upright; None if unknown, which means square.
        colorspace: Color matrix, "bt601" or "bt709"; None if unknown or not stored as YUV.
        start_time: Time of the first frame in seconds on the clock of the source, which audio shares; None without a
            clock.
        recordings: Recordings read so far. Another one starts when the clock steps back. Empty without a clock.
        problems: Number of frames that could not be decoded and were skipped.
        can_prefetch: Whether another thread may fetch frames ahead. False for iterables, which belong to the caller.
    """

    live = False
    can_prefetch = True

    def __init__(self, name: str) -> None:
        """Start with a name and no other properties."""
        self.name = name
        self.fps: float | None = None
        self.frame_count: int | None = None
        self.resolution_wh: tuple[int, int] | None = None
        self.sample_aspect_ratio: Fraction | None = None
        self.colorspace: Colorspace | None = None
        self.start_time: float | None = None
        self.recordings: list[Recording] = []
        self.problems = 0
        self._warned = False

    def __repr__(self) -> str:
        size = "x".join(map(str, self.resolution_wh)) if self.resolution_wh else "unknown size"
        return f"{type(self).__name__}({self.name}, {size}, fps={self.fps}, live={self.live})"

    def __iter__(self) -> Self:
        """Return itself. A second loop continues after the first one."""
        return self

    @abstractmethod
    def __next__(self) -> Frame:
        """Return the next frame.

        Raises:
            StopIteration: There are no more frames, or the source is closed.
            VideoError: The source failed.
        """

    @abstractmethod
    def close(self) -> None:
        """End the iteration, also in another thread, and release the file or camera. May be called repeatedly."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "ahead" in vars(cls):  # otherwise another thread would read a source that rules it out
            warn_renamed("Source.ahead", "Source.can_prefetch", stacklevel=3)  # ABCMeta is in between
            cls.can_prefetch = cls.ahead

    def record_problem(self, reason: object) -> None:
        """Count a frame that could not be decoded, and log a warning for the first one.

        Args:
            reason: Reason in the warning.
        """
        self.problems += 1
        if not self._warned:
            self._warned = True
            logger.warning("%s: a frame was skipped: %s; further skipped frames are only counted", self.name, reason)

    ahead = renamed_attribute("Source.ahead", "can_prefetch")
    note_problem = renamed_function("Source.note_problem", "Source.record_problem", record_problem)


class FiniteSource(Source):
    """Source with an end, which yields every frame in order.

    Times start at the first frame. They continue if the clock of the source steps back by more than `MAX_CLOCK_ERROR`
    frames, as in a file that consists of two recordings.
    """

    def __init__(self, read: Callable[[Source], Generator[TimedImage, None, None]], *, name: str) -> None:
        """Read the first frame.

        Args:
            read: Function that gets this source, sets its `fps` and `frame_count`, records problems, and returns a
                generator of the images. The generator is closed with the source.
            name: Name of the source in messages.

        Raises:
            VideoError: The source has no frames.
        """
        super().__init__(name)
        self._images = read(self)
        self._closed = False
        self._stepping = threading.Lock()  # a running generator cannot be closed from another thread
        self._count = 0  # frames returned so far
        self._start: float | None = None  # on the clock of the source
        self._time = 0.0
        self._first: TimedImage | None = next(self._images, None)
        if self._first is None:
            tried = f"; {self.problems} could not be decoded" if self.problems else ""
            raise VideoError(f"{name} has no frames{tried}")
        self.start_time = self._first.seconds
        if self.start_time is not None:
            self.recordings.append(Recording(0.0, self.start_time))
        height, width = self._first.image.shape[:2]
        self.resolution_wh = (width, height)

    def __next__(self) -> Frame:
        with self._stepping:
            if self._closed:
                raise StopIteration
            timed, self._first = self._first or next(self._images, None), None
            if timed is None or self._closed:
                self._closed = True
                self._images.close()
                raise StopIteration
            frame = Frame(timed.image, self._count, self._time_of(timed.seconds), timed.duration)
            self._count, self._time = self._count + 1, frame.time
            return frame

    def close(self) -> None:
        self._closed = True
        if self._stepping.acquire(timeout=CLOSING_SECONDS):
            try:
                self._first = None
                self._images.close()
            finally:
                self._stepping.release()

    def _time_of(self, seconds: float | None) -> float:
        """Return the seconds since the first frame for a time on the clock of the source."""
        step = 1 / (self.fps or ASSUMED_FPS)
        expected = self._time + step if self._count else 0.0
        if seconds is None:
            return expected
        if self._start is None or seconds - self._start < self._time - MAX_CLOCK_ERROR * step:
            self._start = seconds - expected
            if self._count:
                self.recordings.append(Recording(expected, seconds))
        return max(seconds - self._start, self._time)  # max: subtracting twice may lose the last bit


def to_bgr(image: ImageInput) -> Image:
    """Return an image of any type that `images.to_rgb` accepts as a BGR array that shares no memory with it.

    Raises:
        ImageError: The value is not an image.
    """
    if (
        isinstance(image, np.ndarray)
        and image.dtype == np.uint8
        and image.ndim == 3
        and image.shape[2] == 3
        and image.size
    ):
        return np.array(image, order="C")  # a copy: cameras and decoders reuse their arrays
    return np.ascontiguousarray(to_rgb(image)[..., ::-1])
