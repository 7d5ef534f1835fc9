"""Sources that do not wait: webcams and streams, read in a thread of their own, of which the newest frame counts."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from moondream_cv.errors import VideoError
from moondream_cv.video.sources.base import CLOSING_SECONDS, Image, Source, TimedImage, to_bgr
from moondream_cv.video.sources.container import FrameDecoder, average_rate, demux, open_container, reason
from moondream_cv.video.sources.frame import Frame

if TYPE_CHECKING:
    from av.container import InputContainer

FIRST_PAUSE = 0.5
"""Seconds before the first attempt to connect again; they double up to LONGEST_PAUSE."""

LONGEST_PAUSE = 8.0

MAX_CLOCK_DRIFT = 10.0
"""Seconds by which a stream's own clock may differ from the clock of arrival before it is no longer trusted."""

_UNTIMED = frozenset({"mjpeg", "mpjpeg"})  # pictures without a clock, of which FFmpeg says 25 per second

logger = logging.getLogger(__name__)


class LiveReader(Source):
    """The newest frame of a source that does not wait.

    A daemon thread reads; at most one frame waits, and a newer one replaces it. When the source ends or fails, it is
    opened again and again, with pauses of 0.5 s that double up to 8 s. The times of frames are those of the stream's
    own clock; if it has none, and after a loss, those at which they arrived.

    Attributes:
        dropped: Frames that were replaced before anyone fetched them.
    """

    live = True

    def __init__(
        self,
        open_frames: Callable[[LiveReader], Iterator[Image | TimedImage]],
        *,
        name: str,
        open_timeout: float = 10.0,
        read_timeout: float = 10.0,
        reconnect_for: float = 30.0,
    ) -> None:
        """Open the source and wait for its first frame.

        Args:
            open_frames: Opens the source and returns an iterator of its images, [H, W, 3] uint8 BGR, with or without
                their times; called in the thread, and again after each loss. It gets this reader, whose `fps`,
                `sample_aspect_ratio` and problems it may set. It observes the time-outs itself as far as it can, and
                raises VideoError to say why it failed. If the iterator has `close`, that is called in the end.
            name: What messages call the source.
            open_timeout: Seconds that opening may take.
            read_timeout: Seconds that may pass without a frame before the source counts as lost.
            reconnect_for: Seconds, counted from a loss, in which to try to connect again; 0 for not at all.

        Raises:
            VideoError: There is no frame within open_timeout and read_timeout together, or the source cannot be opened;
                the first attempt is not repeated.
            ValueError: A time-out is not above 0, or `reconnect_for` is below.
        """
        check_times(open_timeout, read_timeout, reconnect_for)
        super().__init__(name)
        self.dropped = 0
        self._open_frames = open_frames
        self._reconnect_for = reconnect_for
        self._longest_silence = read_timeout + reconnect_for + 1.0  # ends the wait for a thread that hangs
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._newest: tuple[Image, float] | None = None  # an image and its time
        self._clock = _LiveClock()
        self._error: VideoError | None = None
        self._arrived = 0.0  # when the newest came, fetched or not
        self._received = self._given = 0
        self._start = 0.0
        self._thread = threading.Thread(target=self._run, name=f"frames of {name}", daemon=True)
        self._thread.start()
        with self._changed:
            self._changed.wait_for(lambda: self._newest or self._error, open_timeout + read_timeout)
            newest, error = self._newest, self._error
        if newest is None:
            self.close()
            raise error or VideoError(f"{name} gave no frame within {open_timeout + read_timeout:g} s")
        height, width = newest[0].shape[:2]
        self.resolution_wh = (width, height)

    @property
    def waiting(self) -> int:
        """Frames that have arrived and are not fetched yet: 0 or 1."""
        return int(self._newest is not None)

    def __next__(self) -> Frame:
        with self._changed:
            self._changed.wait_for(
                lambda: self._closing.is_set() or self._newest or self._error,
                max(0.0, self._arrived + self._longest_silence - time.monotonic()),
            )
            if self._closing.is_set():
                raise StopIteration
            if self._newest is not None:
                (image, seconds), self._newest = self._newest, None
                self._start = self._start if self._given else seconds
                frame = Frame(image, self._given, seconds - self._start)
                self._given += 1
                return frame
            self._closing.set()
            if self._error is not None:
                raise self._error
        raise VideoError(f"{self.name} is gone: no frame for {self._longest_silence:g} s")

    def close(self) -> None:
        self._closing.set()
        with self._changed:
            self._newest = None
            self._changed.notify_all()
        if self._thread is not threading.current_thread():
            self._thread.join(CLOSING_SECONDS)  # a read cannot be interrupted, only outlast its time-out

    def _run(self) -> None:
        try:
            self._read_on()
        except VideoError as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _read_on(self) -> None:
        """Read, and connect again after each loss, until the source is closed or gone for good."""
        lost_at, pause = None, FIRST_PAUSE
        while not self._closing.is_set():
            received = self._received
            failure = self._read_once()
            if self._closing.is_set():
                return
            if self._received == 0:
                raise failure
            now = time.monotonic()
            if lost_at is None or self._received > received:
                lost_at, pause = now, FIRST_PAUSE
                if self._reconnect_for:
                    logger.warning("%s was lost (%s); trying to connect again", self.name, failure)
            left = lost_at + self._reconnect_for - now
            if left <= 0:
                tried = f", although it was tried again for {self._reconnect_for:g} s" if self._reconnect_for else ""
                raise VideoError(f"{self.name} is gone{tried}: {failure}") from failure
            self._closing.wait(min(pause, left))
            pause = min(2 * pause, LONGEST_PAUSE)

    def _read_once(self) -> VideoError:
        """Open the source, take what it gives, and return why it ended."""
        frames = None
        try:
            frames = self._open_frames(self)
            self._clock.restart()
            for image in frames:
                if self._closing.is_set():
                    break
                self._put(image)
            return VideoError(f"{self.name} ended")
        except VideoError as error:
            return error
        except Exception as error:  # cameras' drivers raise what they like, and a thread must not die in silence
            failure = VideoError(f"{self.name} failed: {type(error).__name__}: {error}")
            failure.__cause__ = error
            return failure
        finally:
            if frames is not None and hasattr(frames, "close"):
                frames.close()

    def _put(self, item: Image | TimedImage) -> None:
        timed = item if isinstance(item, TimedImage) else TimedImage(item)
        with self._changed:
            self.dropped += self._newest is not None
            self._arrived = time.monotonic()
            self._newest = (timed.image, self._clock.time(timed.seconds, self._arrived))
            self._received += 1
            self._changed.notify_all()


class _LiveClock:
    """Times of frames, in seconds, from a stream's own clock and from that of arrival."""

    def __init__(self) -> None:
        self._time = 0.0  # of the last frame
        self._seconds: float | None = None  # the same on the stream's own clock
        self._arrived: float | None = None  # the same on the clock of arrival
        self._lead = 0.0  # seconds by which frames are ahead of their arrival, since the first one

    def restart(self) -> None:
        """Forget the stream's own clock: after a loss it may start again from anywhere."""
        self._seconds = None

    def time(self, seconds: float | None, arrived: float) -> float:
        """Return the time of the next frame, which never falls.

        Args:
            seconds: Of the frame on the stream's own clock; None if it has none.
            arrived: When the frame arrived, in seconds of a clock that never falls.
        """
        waited = arrived - self._arrived if self._arrived is not None else 0.0
        step = waited
        if seconds is not None and self._seconds is not None and seconds > self._seconds:
            own_step = seconds - self._seconds
            if abs(self._lead + own_step - waited) <= MAX_CLOCK_DRIFT:
                step = own_step
        self._lead += step - waited
        self._time += step
        self._seconds, self._arrived = seconds, arrived
        return self._time


def check_times(open_timeout: float, read_timeout: float, reconnect_for: float) -> None:
    """Raise ValueError unless the time-outs are above 0, and `reconnect_for` is not below."""
    for name, value in (("open_timeout", open_timeout), ("read_timeout", read_timeout)):
        if not 0 < value < float("inf"):
            raise ValueError(f"{name} must be a number of seconds above 0, not {value}")
    if not 0 <= reconnect_for < float("inf"):
        raise ValueError(f"reconnect_for must be a number of seconds, 0 or more, not {reconnect_for}")


def webcam_frames(index: int) -> Callable[[LiveReader], Iterator[Image | TimedImage]]:
    """Return what opens a webcam through OpenCV for a `LiveReader`."""

    def frames(reader: LiveReader) -> Iterator[Image | TimedImage]:
        import cv2

        capture = cv2.VideoCapture(index)
        try:
            if not capture.isOpened():
                raise VideoError(
                    f"webcam {index} cannot be opened; is it plugged in, free, and is this program allowed to use it? "
                    "The first webcam is 0"
                )
            rate = capture.get(cv2.CAP_PROP_FPS)
            reader.fps = rate if 0 < rate < 1000 else None
            while True:
                is_read, image = capture.read()
                if not is_read or image is None:
                    raise VideoError(f"webcam {index} gives no frames; is it still plugged in and free?")
                yield to_bgr(image)
        finally:
            capture.release()

    return frames


def stream_frames(
    url: str, *, name: str, timeout: tuple[float, float], opened: InputContainer | None = None
) -> Callable[[LiveReader], Iterator[Image | TimedImage]]:
    """Return what opens a stream through PyAV for a `LiveReader`.

    Args:
        url: Of the stream.
        name: What messages call it.
        timeout: Seconds to wait at the most for the opening, and for each packet.
        opened: The stream, already open, for the first time; it is closed like one opened here.
    """
    ready = [opened] if opened is not None else []

    def frames(reader: LiveReader) -> Iterator[Image | TimedImage]:
        import av

        container = ready.pop() if ready else open_stream(url, name=name, timeout=timeout)
        try:
            decoder = FrameDecoder(container, reader)
            decoder.stream.thread_type = "SLICE"  # threads that each hold a frame would delay all of them
            is_untimed = container.format.name in _UNTIMED
            reader.fps = None if is_untimed else average_rate(decoder.stream)
            for packet in demux(container, decoder.stream):
                for timed in decoder.images(packet):
                    yield timed.image if is_untimed else timed
        except av.error.FFmpegError as error:
            raise VideoError(f"{name} broke off: {reason(error)}") from None
        finally:
            container.close()

    return frames


def open_stream(url: str, *, name: str, timeout: tuple[float, float]) -> InputContainer:
    """Open a URL.

    Raises:
        VideoError: It cannot be opened or holds no video.
    """
    scheme = url.partition(":")[0].lower()
    options = {}
    if scheme in ("rtsp", "rtsps"):
        options = {"rtsp_flags": "prefer_tcp"}  # UDP loses packets, but some cameras have nothing else
    elif scheme in ("http", "https"):
        options = {"reconnect": "1", "reconnect_delay_max": "4"}  # in the middle of a file, where the server allows
    return open_container(url, name=name, timeout=timeout, options=options)
