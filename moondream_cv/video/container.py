"""Video files and streams through PyAV: packets → upright BGR images.

PyAV is imported when a video is opened: on macOS it and OpenCV clash when both are loaded without need.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Generator, Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moondream_cv.errors import VideoError
from moondream_cv.video.base import ASSUMED_FPS, FiniteSource, Image, Source, TimedImage

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

_TEXT_ART = frozenset({"adf", "bin", "idf", "tty", "xbin"})  # FFmpeg draws any text file as a video of letters
_ERRORS_IN_A_ROW = 8  # of the container, after which reading on is pointless

logger = logging.getLogger(__name__)


def open_container(
    target: str,
    *,
    name: str,
    timeout: tuple[float, float] | None = None,
    options: dict[str, str] | None = None,
) -> InputContainer:
    """Open a file or a stream.

    Args:
        target: An absolute path, or a URL.
        name: What messages call it.
        timeout: Seconds to wait at the most for the opening, and for each packet.
        options: FFmpeg's options for container and protocol.

    Raises:
        VideoError: It cannot be opened or holds no video.
    """
    import av

    try:
        container = av.open(target, mode="r", timeout=timeout, options=options or {}, metadata_errors="replace")
    except (av.error.FFmpegError, ValueError) as error:
        # From None: the original names the URL with its password.
        raise VideoError(f"{name} cannot be opened as a video: {reason(error)}{_advice(target)}") from None
    try:
        if container.format.name in _TEXT_ART:
            raise VideoError(f"{name} is text, not a video")
        video_stream(container, name)
    except BaseException:
        container.close()
        raise
    return container


def video_stream(container: InputContainer, name: str) -> VideoStream:
    """Return the stream of moving pictures; a music file's cover is none.

    Raises:
        VideoError: There is none, or PyAV has no decoder for it.
    """
    stream = container.streams.best("video")
    disposition: Any = getattr(stream, "disposition", 0)
    attached_picture = 0x400
    if stream is None or getattr(disposition, "value", disposition) & attached_picture:
        kinds = ", ".join(sorted({str(other.type) for other in container.streams if other is not stream}))
        what = f"holds no video, only {kinds}" if kinds else "has no frames"
        raise VideoError(f"{name} {what}; pass a file with a video in it")
    if stream.codec_context is None:
        raise VideoError(f"{name} is coded in a way that this PyAV cannot decode; convert it to H.264 first")
    return stream  # type: ignore[return-value]  # the stubs know only that it is a stream


def open_file(path: Path, name: str) -> FiniteSource:
    """Return a source of a video file's frames.

    Raises:
        VideoError: The file is not a video, or none of its frames can be decoded.
    """
    target = os.path.abspath(path)  # a relative one might look like a protocol to FFmpeg: "12:30.mp4"

    def reopen() -> InputContainer:
        return open_container(target, name=name)

    return open_finite(reopen(), reopen, name=name, is_file=True)


def open_finite(
    container: InputContainer, reopen: Callable[[], InputContainer], *, name: str, is_file: bool
) -> FiniteSource:
    """Return a source of all frames of an open container, which it closes in the end.

    Args:
        container: Of which nothing has been read.
        reopen: Opens the same again, should the last frames need a second try.
        name: What messages call it.
        is_file: Whether an error of reading is for good, so that the end is taken for the end with a warning. Of a
            remote file, it is raised.

    Raises:
        VideoError: None of the frames can be decoded.
    """
    return FiniteSource(lambda source: _read(container, reopen, source, is_file), name=name)


def reason(error: Exception) -> str:
    """Return why FFmpeg failed, without the URL that its own message names."""
    import av

    if isinstance(error, av.error.ExitError):
        return "no answer in time"
    return str(getattr(error, "strerror", None) or error)


def average_rate(stream: VideoStream) -> float | None:
    """Return the average frames per second; None where the container does not tell."""
    return float(stream.average_rate) if stream.average_rate else None


def decode(stream: VideoStream, packet: Packet[Any] | None, source: Source) -> list[Image]:
    """Return what a packet gives, upright; note what it fails to give."""
    return [image for frame in _decoded(stream, packet, source) if (image := _upright(frame, source)) is not None]


def _read(
    container: InputContainer, reopen: Callable[[], InputContainer], source: Source, is_file: bool
) -> Generator[TimedImage, None, None]:
    """Give all images of a container, with the seconds at which they are shown."""
    try:
        stream = video_stream(container, source.name)
        stream.thread_type = "AUTO"
        source.fps = average_rate(stream)
        source.frame_count = _frame_count(container, stream)
        begin, end = None, None  # of the packets, in the stream's units
        newest_packet = newest_frame = None
        problems = 0  # those noted before the newest frame
        for packet in _packets(container, stream, source, is_file):
            if packet.pts is not None:
                begin = packet.pts if begin is None else min(begin, packet.pts)
                newest_packet = packet.pts if newest_packet is None else max(newest_packet, packet.pts)
                end = max(end or 0, packet.pts + (packet.duration or 0))
            for frame in _decoded(stream, packet, source):
                stamp = _stamp(frame)
                newest_frame, problems = stamp if stamp is not None else newest_frame, source.problems
                image = _upright(frame, source)
                if image is not None:
                    yield image, _seconds(stamp, stream)
        if newest_packet is not None and (newest_frame is None or newest_frame < newest_packet):
            source.problems = min(problems, source.problems)
            yield from _last_frames(reopen, newest_frame, source)
        _warn_if_short(container, stream, begin, end, source)
    finally:
        container.close()


def _last_frames(
    reopen: Callable[[], InputContainer], after: int | None, source: Source
) -> Generator[TimedImage, None, None]:
    """Give the images shown after a stamp.

    When the decoder is emptied at the end, several threads' frames come at once, and PyAV loses those beside a damaged
    one. Decoded anew without threads, they come one by one.
    """
    container = reopen()
    try:
        stream = video_stream(container, source.name)
        stream.thread_type = "NONE"
        if after is not None:
            container.seek(after, stream=stream)
        for packet in _packets(container, stream, source, True):
            late = after is None or packet.pts is None or packet.pts > after
            already = source.problems
            for frame in _decoded(stream, packet, source):
                stamp = _stamp(frame)
                image = _upright(frame, source) if after is None or (stamp is not None and stamp > after) else None
                if image is not None:
                    yield image, _seconds(stamp, stream)
            if not late:
                source.problems = already  # seen and counted the first time
    finally:
        container.close()


def _packets(container: InputContainer, stream: VideoStream, source: Source, is_file: bool) -> Iterator[Packet[Any]]:
    """Give the packets of a stream, at the end the empty one that empties the decoder."""
    import av

    errors = 0
    while True:
        try:
            for packet in container.demux(stream):
                errors = 0
                yield packet
                if packet.dts is None and not packet.size:
                    return
            return
        except av.error.FFmpegError as error:  # of demux, since consumers catch those of decoding
            if not is_file and not isinstance(error, av.error.InvalidDataError):
                raise VideoError(f"{source.name} broke off: {reason(error)}; try again, or download it first") from None
            errors += 1
            if errors >= _ERRORS_IN_A_ROW:
                logger.warning("%s is damaged (%s); what lies behind is lost", source.name, reason(error))
                yield av.Packet(0)
                return


def _decoded(stream: VideoStream, packet: Packet[Any] | None, source: Source) -> list[VideoFrame]:
    import av

    try:
        return stream.codec_context.decode(packet)
    except av.error.EOFError:  # emptied twice
        return []
    except av.error.FFmpegError as error:
        source.note_problem(f"it cannot be decoded: {reason(error)}")
        return []


def _upright(frame: VideoFrame, source: Source) -> Image | None:
    """Return a frame's pixels, turned and mirrored as its display matrix says."""
    import av

    try:
        image = frame.to_ndarray(format="bgr24")
        side_data: Any = frame.side_data.get("DISPLAYMATRIX")
    except (av.error.FFmpegError, ValueError) as error:
        source.note_problem(f"its pixels cannot be converted: {reason(error)}")
        return None
    if side_data is not None:
        # [[a, b, u], [c, d, v], [x, y, w]]: a pixel (p, q) is shown at (a p + c q, b p + d q), up to scale.
        matrix = np.frombuffer(side_data, np.int32, 9).reshape(3, 3).astype(np.int64)
        if abs(matrix[0, 1]) > abs(matrix[0, 0]):
            image = image.transpose(1, 0, 2)
            right, down = matrix[1, 0], matrix[0, 1]
        else:
            right, down = matrix[0, 0], matrix[1, 1]
        image = image[:: -1 if down < 0 else 1, :: -1 if right < 0 else 1]
    return np.ascontiguousarray(image, np.uint8)


def _stamp(frame: VideoFrame) -> int | None:
    return frame.pts if frame.pts is not None else frame.dts


def _seconds(stamp: int | None, stream: VideoStream) -> float | None:
    return None if stamp is None else float(stamp * _unit(stream))


def _unit(stream: VideoStream) -> Fraction:
    return stream.time_base or Fraction(1, 90_000)


def _duration(container: InputContainer, stream: VideoStream) -> float | None:
    """Return the seconds that the video claims to last."""
    if stream.duration:
        return float(stream.duration * _unit(stream))
    if container.duration and len(container.streams) == 1:  # otherwise the sound may be what lasts as long
        return container.duration / 1_000_000
    return None


def _frame_count(container: InputContainer, stream: VideoStream) -> int | None:
    if stream.frames:
        return stream.frames
    rate = average_rate(stream)
    seconds = _duration(container, stream) or (container.duration or 0) / 1_000_000
    return round(seconds * rate) or None if rate else None


def _warn_if_short(
    container: InputContainer, stream: VideoStream, begin: int | None, end: int | None, source: Source
) -> None:
    claimed = _duration(container, stream)
    if claimed is None or begin is None or end is None:
        return
    lasted = float((end - begin) * _unit(stream))
    if lasted + 3 / (source.fps or ASSUMED_FPS) < claimed:
        logger.warning("%s is cut off: it ends after %.2f s of %.2f", source.name, lasted, claimed)


def _advice(target: str) -> str:
    """Return what can be said about a file that FFmpeg does not open."""
    try:
        with open(target, "rb") as file:
            head = file.read(12)
    except OSError:  # a URL, or not ours to read
        return ""
    if not head:
        return "; the file is empty"
    if head[4:8] == b"ftyp":
        return "; its index is missing, so it was cut off while it was written or copied"
    return "; is it a video?"
