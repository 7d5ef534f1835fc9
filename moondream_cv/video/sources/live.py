"""Live sources: webcams and network streams, read in a background thread that keeps the newest frame."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from moondream_cv.arguments import check_not_negative, check_positive
from moondream_cv.errors import VideoError
from moondream_cv.video.sources.base import CLOSING_SECONDS, Image, Source, TimedImage, to_bgr
from moondream_cv.video.sources.container import FrameDecoder, average_rate, demux, open_container, reason
from moondream_cv.video.sources.frame import Frame

if TYPE_CHECKING:
    from av.container import InputContainer

FIRST_PAUSE = 0.5
"""Seconds before the first reconnection attempt. The pause doubles up to `MAX_PAUSE`."""

MAX_PAUSE = 8.0

MAX_CLOCK_DRIFT = 10.0
"""Seconds by which the clock of a stream may differ from arrival times before it is ignored."""

_UNTIMED = frozenset({"mjpeg", "mpjpeg"})  # images without times, for which FFmpeg reports 25 frames per second

logger = logging.getLogger(__name__)


class LiveReader(Source):
    """Live source that returns the newest frame.

    A daemon thread reads frames. At most one frame waits, and a newer one replaces it. If the source ends or fails, the
    thread reconnects, with pauses that double from 0.5 s to 8 s. Frame times are those of the stream; without a clock,
    and after a reconnection, they are arrival times.

    Attributes:
        dropped: Number of frames that were replaced before they were fetched.
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
            open_frames: Function that opens the source and returns an iterator of [H, W, 3] uint8 BGR images, with or
                without times. The thread calls it at the start and for each reconnection. It gets this reader, and may
                set its `fps`, `sample_aspect_ratio` and problems. It should respect the timeouts, and raise VideoError
                with the reason of a failure. If the iterator has `close`, that is called at the end.
            name: Name of the source in messages.
            open_timeout: Maximum seconds for opening the source.
            read_timeout: Maximum seconds without a frame before the connection counts as lost.
            reconnect_for: Seconds after a loss in which to reconnect; 0 never reconnects.

        Raises:
            VideoError: The source cannot be opened, or returns no frame within `open_timeout` plus `read_timeout`. The
                first connection is not retried.
            ValueError: A timeout is not positive, or `reconnect_for` is negative.
        """
        check_times(open_timeout, read_timeout, reconnect_for)
        super().__init__(name)
        self.dropped = 0
        self._open_frames = open_frames
        self._reconnect_for = reconnect_for
        self._max_silence = read_timeout + reconnect_for + 1.0  # limits the wait for a thread that hangs
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._newest: tuple[Image, float] | None = None  # image and time
        self._clock = _LiveClock()
        self._error: VideoError | None = None
        self._arrived = 0.0  # arrival time of the latest frame
        self._received = self._count = 0  # frames that arrived, and frames returned
        self._start = 0.0
        self._thread = threading.Thread(target=self._run, name=f"frames of {name}", daemon=True)
        self._thread.start()
        with self._changed:
            self._changed.wait_for(lambda: self._newest or self._error, open_timeout + read_timeout)
            newest, error = self._newest, self._error
        if newest is None:
            self.close()
            raise error or VideoError(f"{name} sent no frame within {open_timeout + read_timeout:g} s")
        height, width = newest[0].shape[:2]
        self.resolution_wh = (width, height)

    @property
    def waiting(self) -> int:
        """Number of frames that have arrived and are not fetched yet, 0 or 1."""
        return int(self._newest is not None)

    def __next__(self) -> Frame:
        with self._changed:
            self._changed.wait_for(
                lambda: self._closing.is_set() or self._newest or self._error,
                max(0.0, self._arrived + self._max_silence - time.monotonic()),
            )
            if self._closing.is_set():
                raise StopIteration
            if self._newest is not None:
                (image, seconds), self._newest = self._newest, None
                self._start = self._start if self._count else seconds
                frame = Frame(image, self._count, seconds - self._start)
                self._count += 1
                return frame
            self._closing.set()
            if self._error is not None:
                raise self._error
        raise VideoError(f"{self.name} is lost: no frame for {self._max_silence:g} s")

    def close(self) -> None:
        self._closing.set()
        with self._changed:
            self._newest = None
            self._changed.notify_all()
        if self._thread is not threading.current_thread():
            self._thread.join(CLOSING_SECONDS)  # a read cannot be interrupted, and ends with its timeout

    def _run(self) -> None:
        try:
            self._read_frames()
        except VideoError as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _read_frames(self) -> None:
        """Read frames, and reconnect after each loss, until the source is closed or cannot be reopened."""
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
                    logger.warning("%s was lost (%s); reconnecting", self.name, failure)
            left = lost_at + self._reconnect_for - now
            if left <= 0:
                retried = f" after reconnecting for {self._reconnect_for:g} s" if self._reconnect_for else ""
                raise VideoError(f"{self.name} is lost{retried}: {failure}") from failure
            self._closing.wait(min(pause, left))
            pause = min(2 * pause, MAX_PAUSE)

    def _read_once(self) -> VideoError:
        """Open the source, read its frames, and return the reason for its end."""
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
        except Exception as error:  # drivers may raise anything, and the reader must report it
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
    """Computes frame times in seconds from the clock of a stream and from arrival times."""

    def __init__(self) -> None:
        self._time = 0.0  # time of the last frame
        self._seconds: float | None = None  # the same on the clock of the stream
        self._arrived: float | None = None  # its arrival time
        self._lead = 0.0  # seconds by which times are ahead of arrival times, relative to the first frame

    def restart(self) -> None:
        """Forget the clock of the stream, which may restart anywhere after a reconnection."""
        self._seconds = None

    def time(self, seconds: float | None, arrived: float) -> float:
        """Return the time of the next frame. Times never decrease.

        Args:
            seconds: Time of the frame on the clock of the stream; None without a clock.
            arrived: Arrival time of the frame in seconds of a monotonic clock.
        """
        waited = arrived - self._arrived if self._arrived is not None else 0.0
        step = waited
        if seconds is not None and self._seconds is not None and seconds > self._seconds:
            stream_step = seconds - self._seconds
            if abs(self._lead + stream_step - waited) <= MAX_CLOCK_DRIFT:
                step = stream_step
        self._lead += step - waited
        self._time += step
        self._seconds, self._arrived = seconds, arrived
        return self._time


def check_times(open_timeout: float, read_timeout: float, reconnect_for: float) -> None:
    """Check the timeouts of a live source.

    Raises:
        ValueError: A timeout is not positive, or `reconnect_for` is negative.
    """
    check_positive("open_timeout", open_timeout, "seconds")
    check_positive("read_timeout", read_timeout, "seconds")
    check_not_negative("reconnect_for", reconnect_for, "seconds")


def webcam_frames(index: int) -> Callable[[LiveReader], Iterator[Image | TimedImage]]:
    """Return a function that opens a webcam with OpenCV, for a `LiveReader`."""

    def frames(reader: LiveReader) -> Iterator[Image | TimedImage]:
        import cv2

        capture = cv2.VideoCapture(index)
        try:
            if not capture.isOpened():
                raise VideoError(
                    f"webcam {index} cannot be opened; check that it is connected, not in use, and that this program "
                    "may use it. The first webcam is 0"
                )
            rate = capture.get(cv2.CAP_PROP_FPS)
            reader.fps = rate if 0 < rate < 1000 else None
            while True:
                is_read, image = capture.read()
                if not is_read or image is None:
                    raise VideoError(f"webcam {index} returns no frames; check that it is connected and not in use")
                yield to_bgr(image)
        finally:
            capture.release()

    return frames


def stream_frames(
    url: str, *, name: str, timeout: tuple[float, float], opened: InputContainer | None = None
) -> Callable[[LiveReader], Iterator[Image | TimedImage]]:
    """Return a function that opens a network stream with PyAV, for a `LiveReader`.

    Args:
        url: URL of the stream.
        name: Name in messages.
        timeout: Maximum seconds for opening, and for reading a packet.
        opened: Open container to use for the first connection. It is closed like the others.
    """
    ready = [opened] if opened is not None else []

    def frames(reader: LiveReader) -> Iterator[Image | TimedImage]:
        import av

        container = ready.pop() if ready else open_stream(url, name=name, timeout=timeout)
        try:
            decoder = FrameDecoder(container, reader)
            decoder.stream.thread_type = "SLICE"  # frame threads would delay each frame
            is_untimed = container.format.name in _UNTIMED
            reader.fps = None if is_untimed else average_rate(decoder.stream)
            for packet in demux(container, decoder.stream):
                for timed in decoder.images(packet):
                    yield timed.image if is_untimed else timed
        except av.error.FFmpegError as error:
            raise VideoError(f"{name} failed: {reason(error)}") from None
        finally:
            container.close()

    return frames


def open_stream(url: str, *, name: str, timeout: tuple[float, float]) -> InputContainer:
    """Open a URL.

    Args:
        url: URL of a stream or a video.
        name: Name in messages.
        timeout: Maximum seconds for opening, and for reading a packet.

    Raises:
        VideoError: The URL cannot be opened, or has no video stream.
    """
    scheme = url.partition(":")[0].lower()
    options = {}
    if scheme in ("rtsp", "rtsps"):
        options = {"rtsp_flags": "prefer_tcp"}  # UDP loses packets, but some cameras support nothing else
    elif scheme in ("http", "https"):
        options = {"reconnect": "1", "reconnect_delay_max": "4"}  # within a file, if the server supports ranges
    return open_container(url, name=name, timeout=timeout, options=options)
