"""Copying the packets of a video, and the sound of another file, into one file: nothing is encoded anew."""

from __future__ import annotations

import contextlib
import heapq
import io
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from moondream_cv.errors import VideoError
from moondream_cv.video.writers import reason

if TYPE_CHECKING:
    from av import Packet
    from av.container import InputContainer
    from av.stream import Stream

logger = logging.getLogger(__name__)

_PREROLL = 0.1  # seconds of sound kept before the first picture, unheard: decoders need some to set in


def av_errors() -> tuple[type[Exception], ...]:
    """What PyAV raises when a file cannot be read or written."""
    import av

    return (av.error.FFmpegError, OSError, ValueError)


def check_sound(source: Path, target: Path, file_format: str) -> bool:
    """Tell whether a file has sound that a target can hold; log a warning where only the target stands against it.

    Args:
        source: A media file.
        target: Named in the warning.
        file_format: FFmpeg's name of the target's format.

    Raises:
        VideoError: The source cannot be read.
    """
    import av

    try:
        with av.open(str(source)) as opened:
            if not opened.streams.audio:
                return False
            track = opened.streams.audio[0]
            try:
                av.open(io.BytesIO(), "w", format=file_format).add_stream_from_template(track, opaque=True)
            except av_errors() as error:
                codec = track.codec_context.name if track.codec_context else "unknown"
                logger.warning(
                    "%s is written without the sound of %s, whose codec is %s: %s", target, source, codec, reason(error)
                )
                return False
            return True
    except av_errors() as error:
        raise VideoError(
            f"the sound of {source} cannot be read: {reason(error)}; leave audio_from out for a silent video"
        ) from error


def count_pictures(path: Path) -> int:
    """Count the pictures of a file that are whole, up to where it can be read.

    This is how a full disk is noticed at the end of a file: FFmpeg does not always report it.
    """
    import av

    pictures = 0
    with contextlib.suppress(*av_errors()), av.open(str(path)) as opened:
        for packet in opened.demux(opened.streams.video):
            pictures += packet.size > 0 and not packet.is_corrupt
    return pictures


def remux(
    video: Path, target: Path, file_format: str, audio_from: Path | None, start: float, end: float, step: float
) -> None:
    """Copy a video's packets into a file with its index in front, and beside them the sound of another file.

    Args:
        video: Has one stream; may end in the middle.
        target: Written anew.
        file_format: FFmpeg's name of the target's format.
        audio_from: A file whose first sound track is copied from `start` on. Its time 0 is its first picture.
        start: Seconds in `audio_from` of the video's first picture.
        end: Seconds in the video after which no sound begins.
        step: Seconds that a picture lasts where the video does not say it.

    Raises:
        One of `av_errors`: The target cannot be written, the video not be opened, or the sound not be copied.
    """
    import av

    with contextlib.ExitStack() as files:
        pictures = files.enter_context(av.open(str(video)))
        options = {} if file_format == "matroska" else {"movflags": "faststart"}
        output = files.enter_context(av.open(str(target), "w", format=file_format, container_options=options))
        source = pictures.streams.video[0]
        preroll = 0.0 if file_format == "matroska" else _PREROLL  # Matroska has no times below 0; it would move all
        tracks = [
            _moved(
                _lasting(_packets(pictures, source), step), output.add_stream_from_template(source, opaque=True), 0.0
            )
        ]
        if audio_from is not None:
            other = files.enter_context(av.open(str(audio_from)))
            sound = other.streams.audio[0]
            zero = start + _first_picture(other)
            heard = _between(_packets(other, sound), zero - preroll, zero + end)
            tracks.append(_moved(heard, output.add_stream_from_template(sound, opaque=True), -zero))
        for packet in heapq.merge(*tracks, key=_decoding_time):
            output.mux(packet)


def _packets(opened: InputContainer, stream: Stream) -> Iterator[Packet[Stream]]:
    """Give the packets of a stream that are whole and have a time, as far as it can be read."""
    import av

    try:
        for packet in opened.demux(stream):
            if packet.dts is not None and packet.pts is not None and not packet.is_corrupt:
                yield packet
    except av.error.FFmpegError as error:
        logger.warning("%s cannot be read to its end: %s", opened.name, reason(error))


def _first_picture(opened: InputContainer) -> float:
    """When a file's first picture is shown, in seconds of its own clock; 0 where it has none."""
    for stream in opened.streams.video:
        if stream.start_time is not None and stream.time_base is not None:
            return float(stream.start_time * stream.time_base)
    return 0.0


def _between(packets: Iterator[Packet[Stream]], start: float, end: float) -> Iterator[Packet[Stream]]:
    """Give the packets that begin from one time on and before another, in seconds."""
    for packet in packets:
        seconds = float((packet.pts or 0) * packet.time_base)
        if seconds >= end:
            return
        if seconds >= start:
            yield packet


def _lasting(packets: Iterator[Packet[Stream]], seconds: float) -> Iterator[Packet[Stream]]:
    """Give packets that have a duration, without which the last one would not be shown."""
    for packet in packets:
        if not packet.duration:
            packet.duration = max(1, round(seconds / packet.time_base))
        yield packet


def _moved(packets: Iterator[Packet[Stream]], stream: Stream, seconds: float) -> Iterator[Packet[Stream]]:
    """Give packets to another stream, later by some seconds."""
    for packet in packets:
        ticks = round(seconds / packet.time_base)
        packet.pts, packet.dts = (packet.pts or 0) + ticks, (packet.dts or 0) + ticks
        packet.stream = stream
        yield packet


def _decoding_time(packet: Packet[Stream]) -> float:
    return float((packet.dts or 0) * packet.time_base)
