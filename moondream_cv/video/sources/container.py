"""Video files and streams, decoded by PyAV into upright BGR images.

PyAV is imported when a video is opened, because it conflicts with OpenCV on macOS.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Generator, Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moondream_cv.errors import VideoError
from moondream_cv.video.sources.base import (
    ASSUMED_FPS,
    MAX_ASPECT_RATIO,
    MIN_ASPECT_RATIO,
    FiniteSource,
    Image,
    Source,
    TimedImage,
)
from moondream_cv.video.sources.colors import BGRConverter
from moondream_cv.video.sources.timestamps import FrameTimestamps

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

_TEXT_ART = frozenset({"adf", "bin", "idf", "tty", "xbin"})  # FFmpeg renders text files as videos
MAX_PLAUSIBLE_FPS = 1000
_MEASURED_PACKETS = 64
_MAX_CONSECUTIVE_ERRORS = 8  # demuxing errors after which reading stops

logger = logging.getLogger(__name__)


def open_with_pyav(target: str, **options: Any) -> InputContainer:
    """Open a file or a stream with PyAV. Bytes of its metadata that are not UTF-8 raise no error.

    Args:
        target: Absolute path or URL.
        options: Further arguments of `av.open`.

    Raises:
        av.error.FFmpegError: The target cannot be opened.
        ValueError: An option is invalid.
    """
    import av

    if int(av.__version__.partition(".")[0]) < 19:
        options["metadata_errors"] = "replace"  # newer versions escape them
    container: InputContainer = av.open(target, mode="r", **options)
    return container


def open_container(
    target: str,
    *,
    name: str,
    timeout: tuple[float, float] | None = None,
    options: dict[str, str] | None = None,
) -> InputContainer:
    """Open a file or a stream.

    Args:
        target: Absolute path or URL.
        name: Name in messages.
        timeout: Maximum seconds for opening, and for reading a packet; None for no limit.
        options: FFmpeg options for the container and the protocol.

    Raises:
        VideoError: The target cannot be opened, or has no video stream.
    """
    import av

    try:
        container = open_with_pyav(target, timeout=timeout, options=options or {})
    except (av.error.FFmpegError, ValueError) as error:
        # From None: the original message contains the URL with its password.
        raise VideoError(f"{name} cannot be opened as a video: {reason(error)}{_advice(target)}") from None
    try:
        if container.format.name in _TEXT_ART:
            raise VideoError(f"{name} is a text file, not a video")
        video_stream(container, name)
    except BaseException:
        container.close()
        raise
    return container


def video_stream(container: InputContainer, name: str) -> VideoStream:
    """Return the video stream of a container. The cover image of an audio file is not a video stream.

    Raises:
        VideoError: There is no video stream, or PyAV has no decoder for it.
    """
    stream = container.streams.best("video")
    disposition: Any = getattr(stream, "disposition", 0)
    attached_picture = 0x400
    if stream is None or getattr(disposition, "value", disposition) & attached_picture:
        kinds = ", ".join(sorted({str(other.type) for other in container.streams if other is not stream}))
        content = f"contains no video, only {kinds}" if kinds else "has no frames"
        raise VideoError(f"{name} {content}; pass a file with a video stream")
    if stream.codec_context is None:
        raise VideoError(f"{name} has a codec that this PyAV cannot decode; convert the video to H.264 first")
    return stream  # type: ignore[return-value]  # the stubs return the base class


def demux(container: InputContainer, *streams: Any) -> Iterator[Packet[Any]]:
    """Yield the packets of some streams in storage order, and at the end of the file one empty packet.

    The empty packet flushes the decoder. Stop there: PyAV adds one per stream, and raises IndexError if streams were
    added to the container while it was read.
    """
    for packet in container.demux(*streams):
        yield packet
        if packet.dts is None and not packet.size:
            return


def open_file(path: Path, name: str) -> FiniteSource:
    """Return a source of a video file's frames.

    Raises:
        VideoError: The file is not a video, or none of its frames can be decoded.
    """
    target = os.path.abspath(path)  # FFmpeg would take "12:30.mp4" for a URL

    def reopen() -> InputContainer:
        return open_container(target, name=name)

    return open_finite(reopen(), reopen, name=name, is_file=True)


def open_finite(
    container: InputContainer, reopen: Callable[[], InputContainer], *, name: str, is_file: bool
) -> FiniteSource:
    """Return a source of all frames of an open container.

    Args:
        container: Container from which nothing has been read. The source closes it.
        reopen: Function that opens the same video again, to decode the last frames a second time.
        name: Name of the source in messages.
        is_file: Whether the video is a local file. Read errors of a file end it with a warning; those of a remote video
            are raised.

    Raises:
        VideoError: None of the frames can be decoded.
    """
    return FiniteSource(lambda source: _read(container, reopen, source, is_file), name=name)


def reason(error: Exception) -> str:
    """Return the reason of an FFmpeg error, without the URL in its message."""
    import av

    if isinstance(error, av.error.ExitError):
        return "no answer in time"
    return str(getattr(error, "strerror", None) or error)


def average_rate(stream: VideoStream) -> float | None:
    """Return the average frames per second; None if the container gives no plausible rate."""
    rate = stream.average_rate
    if rate and rate > MAX_PLAUSIBLE_FPS:  # some containers report the unit of their clock instead
        rate = stream.frames / (stream.duration * _unit(stream)) if stream.frames and stream.duration else None
    return float(rate) if rate else None


class FrameDecoder:
    """Decodes the packets of one stream into upright BGR images with their times.

    Attributes:
        newest: Latest timestamp of a frame in ticks of the stream; None before the first frame.
        newest_packet: Latest timestamp of a packet.
        timestamps: Timestamps of the stream.
    """

    def __init__(self, container: InputContainer, source: Source) -> None:
        """Prepare to decode a container's video stream.

        Args:
            container: An open container.
            source: Source whose problems, sample aspect ratio and colorspace are set.
        """
        self.stream = video_stream(container, source.name)
        self._source = source
        self.timestamps = FrameTimestamps(container.format.name)
        self._to_bgr = BGRConverter(self.stream, source.name)
        self._problems = source.problems
        self.newest: int | None = None
        self.newest_packet: int | None = None

    def frames(self, packet: Packet[Any] | None) -> Iterator[tuple[VideoFrame, int | None]]:
        """Yield the frames of a packet with their timestamps. Record a problem if decoding fails."""
        if packet is not None:
            stamp = self.timestamps.add_packet(packet)
            if stamp is not None:
                self.newest_packet = stamp if self.newest_packet is None else max(self.newest_packet, stamp)
        for frame in self._decoded(packet):
            if self._source.problems > self._problems:
                self.timestamps.skip_damaged(frame.dts)
                self._problems = self._source.problems
            stamp = self.timestamps.of(frame)
            if stamp is not None:
                self.newest = stamp if self.newest is None else max(self.newest, stamp)
            yield frame, stamp

    def image(self, frame: VideoFrame, stamp: int | None) -> TimedImage | None:
        """Return a frame as an upright image; record a problem and return None if its pixels cannot be converted."""
        import av

        try:
            pixels = self._to_bgr(frame)
            side_data: Any = frame.side_data.get("DISPLAYMATRIX")
        except (av.error.FFmpegError, ValueError) as error:
            self._source.record_problem(f"its pixels cannot be converted: {reason(error)}")
            return None
        pixels, is_turned = _upright(pixels, side_data)
        ratio = self.stream.sample_aspect_ratio
        if self._source.sample_aspect_ratio is None and ratio and MIN_ASPECT_RATIO <= ratio <= MAX_ASPECT_RATIO:
            self._source.sample_aspect_ratio = 1 / ratio if is_turned else ratio
        if self._source.colorspace is None and not frame.format.is_rgb:
            self._source.colorspace = self._to_bgr.colorspace(frame)
        seconds = None if stamp is None else float(stamp * _unit(self.stream))
        return TimedImage(np.ascontiguousarray(pixels), seconds)

    def images(self, packet: Packet[Any] | None) -> Iterator[TimedImage]:
        """Yield the images of a packet."""
        for frame, stamp in self.frames(packet):
            image = self.image(frame, stamp)
            if image is not None:
                yield image

    def _decoded(self, packet: Packet[Any] | None) -> list[VideoFrame]:
        import av

        if packet is not None and not packet.size and packet.dts is not None:  # extends the duration of the last frame
            return []
        try:
            return self.stream.codec_context.decode(packet)
        except av.error.EOFError:  # flushed twice
            return []
        except av.error.FFmpegError as error:
            self._source.record_problem(f"it cannot be decoded: {reason(error)}")
            return []


def _read(
    container: InputContainer, reopen: Callable[[], InputContainer], source: Source, is_file: bool
) -> Generator[TimedImage, None, None]:
    """Yield all images of a container with their times and durations."""
    try:
        decoder = FrameDecoder(container, source)
        stream = decoder.stream
        stream.thread_type = "AUTO"
        source.fps = average_rate(stream) or (_measured_rate(reopen, source.name) if is_file else None)
        source.frame_count = _frame_count(container, stream, source.fps)
        held: TimedImage | None = None
        try:
            for image in _images(container, reopen, decoder, source, is_file):
                if held is not None:
                    yield held._replace(duration=_difference(image.seconds, held.seconds))
                held = image
        except VideoError:  # yield the last image before the failure first
            if held is not None:
                yield held
            raise
        end = decoder.timestamps.end
        if held is not None:
            yield held._replace(duration=_difference(None if end is None else float(end * _unit(stream)), held.seconds))
    finally:
        container.close()


def _difference(later: float | None, earlier: float | None) -> float | None:
    """Return the seconds between two times; None if a time is unknown or the second one is not later."""
    if later is None or earlier is None or later <= earlier:
        return None
    return later - earlier


def _images(
    container: InputContainer,
    reopen: Callable[[], InputContainer],
    decoder: FrameDecoder,
    source: Source,
    is_file: bool,
) -> Iterator[TimedImage]:
    """Yield all images of a container with their times."""
    problems = 0  # recorded before the newest frame
    for packet in _packets(container, decoder.stream, source, is_file):
        for frame, stamp in decoder.frames(packet):
            problems = source.problems
            image = decoder.image(frame, stamp)
            if image is not None:
                yield image
    if decoder.newest_packet is not None and (decoder.newest is None or decoder.newest < decoder.newest_packet):
        source.problems = min(problems, source.problems)
        yield from _last_frames(reopen, decoder.newest, source)
    _warn_if_short(container, decoder, source)


def _last_frames(
    reopen: Callable[[], InputContainer], after: int | None, source: Source
) -> Generator[TimedImage, None, None]:
    """Yield the images after a timestamp, decoded again without threads.

    Flushing a decoder with threads returns the frames of all threads at once, and PyAV loses all of them if one is
    damaged. A decoder without threads returns them one by one.
    """
    container = reopen()
    try:
        decoder = FrameDecoder(container, source)
        decoder.stream.thread_type = "NONE"
        if after is not None:
            container.seek(after, stream=decoder.stream)
        for packet in _packets(container, decoder.stream, source, True):
            is_late = after is None or packet.pts is None or packet.pts > after
            problems = source.problems
            for frame, stamp in decoder.frames(packet):
                is_new = after is None or (stamp is not None and stamp > after)
                image = decoder.image(frame, stamp) if is_new else None
                if image is not None:
                    yield image
            if not is_late:
                source.problems = problems  # counted the first time
    finally:
        container.close()


def _measured_rate(reopen: Callable[[], InputContainer], name: str) -> float | None:
    """Return the frames per second between the first packets of a file; None if they have no times."""
    import av

    container = reopen()
    try:
        stream = video_stream(container, name)
        unit = _unit(stream)
        packets = itertools.islice(demux(container, stream), _MEASURED_PACKETS)
        stamps = sorted({packet.pts for packet in packets if packet.pts is not None})
    except av.error.FFmpegError:
        return None
    finally:
        container.close()
    return float(1 / (np.median(np.diff(stamps)) * unit)) if len(stamps) > 2 else None


def _packets(container: InputContainer, stream: VideoStream, source: Source, is_file: bool) -> Iterator[Packet[Any]]:
    """Yield the packets of a stream, and at the end an empty one that flushes the decoder."""
    import av

    errors = 0
    while True:
        try:
            for packet in demux(container, stream):
                errors = 0
                yield packet
            return
        except av.error.FFmpegError as error:  # from demuxing; consumers catch decoding errors
            if not is_file and not isinstance(error, av.error.InvalidDataError):
                raise VideoError(
                    f"{source.name} failed: {reason(error)}; try again, or download the file first"
                ) from None
            errors += 1
            if errors >= _MAX_CONSECUTIVE_ERRORS:
                logger.warning("%s is damaged (%s); the rest of the file is skipped", source.name, reason(error))
                yield av.Packet(0)
                return


def _upright(image: Image, display_matrix: Any) -> tuple[Image, bool]:
    """Return pixels rotated and mirrored by a display matrix, and whether rows became columns."""
    if display_matrix is None:
        return image, False
    # [[a, b, u], [c, d, v], [x, y, w]]: a pixel (p, q) is shown at (a p + c q, b p + d q), up to scale.
    matrix = np.frombuffer(display_matrix, np.int32, 9).reshape(3, 3).astype(np.int64)
    is_turned = bool(abs(matrix[0, 1]) > abs(matrix[0, 0]))
    if is_turned:
        image = image.transpose(1, 0, 2)
        right, down = matrix[1, 0], matrix[0, 1]
    else:
        right, down = matrix[0, 0], matrix[1, 1]
    return image[:: -1 if down < 0 else 1, :: -1 if right < 0 else 1], is_turned


def _unit(stream: VideoStream) -> Fraction:
    return stream.time_base or Fraction(1, 90_000)


def _duration(container: InputContainer, stream: VideoStream) -> float | None:
    """Return the duration in seconds according to the container; None if unknown."""
    if stream.duration:
        return float(stream.duration * _unit(stream))
    if container.duration and len(container.streams) == 1:  # otherwise the audio may determine the duration
        return container.duration / 1_000_000
    return None


def _frame_count(container: InputContainer, stream: VideoStream, rate: float | None) -> int | None:
    if stream.frames:
        return stream.frames
    seconds = _duration(container, stream) or (container.duration or 0) / 1_000_000
    return round(seconds * rate) or None if rate else None


def _warn_if_short(container: InputContainer, decoder: FrameDecoder, source: Source) -> None:
    claimed = _duration(container, decoder.stream)
    start, end = decoder.timestamps.start, decoder.timestamps.end
    if claimed is None or start is None or end is None:
        return
    lasted = float((end - start) * _unit(decoder.stream))
    if lasted + 3 / (source.fps or ASSUMED_FPS) < claimed:
        logger.warning("%s is truncated: it ends after %.2f s of %.2f s", source.name, lasted, claimed)


def _advice(target: str) -> str:
    """Return an explanation for a file that FFmpeg cannot open."""
    try:
        with open(target, "rb") as file:
            head = file.read(12)
    except OSError:  # a URL, or not readable
        return ""
    if not head:
        return "; the file is empty"
    if head[4:8] == b"ftyp":
        return "; its index is missing: the file was truncated while it was written or copied"
    return "; check that it is a video"
