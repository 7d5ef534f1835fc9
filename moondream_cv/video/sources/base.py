"""`Source`: what every source of frames offers, and the ones that end by themselves.

Where the frames come from is left to the modules beside this one; `sources.open_source` chooses among them.
"""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from fractions import Fraction
from types import TracebackType
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

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
    """An image with the times that its source gives.

    Attributes:
        image: [H, W, 3] uint8 BGR.
        seconds: When it is shown, on the source's own clock; None if there is none.
        duration: Seconds for which it is shown; None if the source does not say.
    """

    image: Image
    seconds: float | None = None
    duration: float | None = None


class Recording(NamedTuple):
    """One of the recordings that a file consists of; most files have one.

    Attributes:
        time: Seconds from the first frame of the file to the first frame of the recording.
        seconds: Time of that frame on the file's clock.
    """

    time: float
    seconds: float


MIN_ASPECT_RATIO, MAX_ASPECT_RATIO = 0.01, 100
"""Limits of plausible sample aspect ratios; a file with any other is damaged."""

ASSUMED_FPS = 30.0
"""Frames per second of what has no clock of its own: folders of images and iterables."""

LARGEST_CLOCK_ERROR = 2.5
"""Frames by which a source's clock may fall back before another recording is assumed to begin there."""

CLOSING_SECONDS = 2.0
"""How long `close` waits for a read that is under way in another thread; that thread then cleans up by itself."""

logger = logging.getLogger(__name__)


class Source(ABC):
    """Frames, one after another. A source is gone through once; it is its own iterator.

        with open_source("clip.mp4") as source:
            for frame in source:
                ...

    Attributes:
        name: What messages call it; of a URL without user, password and keys.
        live: Whether frames come when they come, and those that nobody fetched in time are dropped.
        fps: Average frames per second; None where that is unknown.
        frame_count: Estimate of the container, which may be wrong; None where there is none.
        resolution_wh: Width and height of the first frame, upright. Later frames may differ.
        sample_aspect_ratio: Width of a pixel divided by its height, upright; None if unknown, which means square.
        colorspace: Matrix of the source's colors, "bt601" or "bt709"; None if they are not stored as YUV or unknown.
        start_time: Seconds of the first frame on the source's own clock, which its sound shares; None without a clock.
        recordings: The recordings read so far, which begin where the source's clock falls back. Empty without a clock.
        problems: Frames that could not be decoded and were skipped.
        ahead: Whether frames may be fetched ahead in another thread: not those of an iterable, which is its owner's.
    """

    live = False
    ahead = True

    def __init__(self, name: str) -> None:
        """Start with nothing known but the name."""
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
        """Return itself: a second loop goes on where the first stopped."""
        return self

    @abstractmethod
    def __next__(self) -> Frame:
        """Return the next frame.

        Raises:
            StopIteration: There are no more, or the source was closed.
            VideoError: The source broke off.
        """

    @abstractmethod
    def close(self) -> None:
        """End the iteration, also one in another thread, and let go of file or camera. May be called repeatedly."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def note_problem(self, reason: object) -> None:
        """Count a frame that could not be decoded; of the first, warn."""
        self.problems += 1
        if not self._warned:
            self._warned = True
            logger.warning("%s: a frame was skipped, since %s; further ones are only counted", self.name, reason)


class FiniteSource(Source):
    """Frames in their order, none dropped, until there are no more.

    Times are counted from the first frame. If the source's own clock falls back by more than `LARGEST_CLOCK_ERROR`
    frames, as in a file made of two recordings, they go on from there.
    """

    def __init__(self, read: Callable[[Source], Generator[TimedImage, None, None]], *, name: str) -> None:
        """Read the first frame.

        Args:
            read: Given this source, which it may tell `fps`, `frame_count` and problems, gives the images. It is
                closed when the source is.
            name: What messages call the source.

        Raises:
            VideoError: There is no frame.
        """
        super().__init__(name)
        self._images = read(self)
        self._closed = False
        self._stepping = threading.Lock()  # a generator that runs cannot be closed from another thread
        self._given = 0
        self._start: float | None = None  # on the source's own clock
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
            frame = Frame(timed.image, self._given, self._time_of(timed.seconds), timed.duration)
            self._given, self._time = self._given + 1, frame.time
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
        """Return seconds since the first frame, given those on the source's own clock."""
        step = 1 / (self.fps or ASSUMED_FPS)
        expected = self._time + step if self._given else 0.0
        if seconds is None:
            return expected
        if self._start is None or seconds - self._start < self._time - LARGEST_CLOCK_ERROR * step:
            self._start = seconds - expected
            if self._given:
                self.recordings.append(Recording(expected, seconds))
        return max(seconds - self._start, self._time)  # max, since subtracting twice may lose the last bit


def to_bgr(image: ImageInput) -> Image:
    """Return an image of any kind that `images.to_rgb` takes as BGR pixels of its own.

    Raises:
        ImageError: It is not an image.
    """
    if (
        isinstance(image, np.ndarray)
        and image.dtype == np.uint8
        and image.ndim == 3
        and image.shape[2] == 3
        and image.size
    ):
        return np.array(image, order="C")  # a copy: cameras and decoders write into the same array again
    return np.ascontiguousarray(to_rgb(image)[..., ::-1])
