"""Remuxing: copy the packets of a video, and audio and subtitles of another file, into one file without re-encoding."""

from __future__ import annotations

import contextlib
import heapq
import io
import logging
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moondream_cv.errors import VideoError
from moondream_cv.video.sources.base import Recording
from moondream_cv.video.sources.container import demux, open_with_pyav
from moondream_cv.video.writers.base import reason

if TYPE_CHECKING:
    from av import Packet
    from av.container import InputContainer, OutputContainer
    from av.stream import Stream

logger = logging.getLogger(__name__)

MATROSKA = "matroska"
_COPIED_TYPES = {"audio": "audio", "subtitle": "subtitles"}  # names of stream types in FFmpeg and in messages
_COPIED_TAGS = ("language", "title", "handler_name")
_MOV_LANGUAGES = {  # ISO 639-2 codes that FFmpeg writes to MP4 only, and synonyms that it writes to MOV
    "deu": "ger", "ell": "gre", "fre": "fra", "hye": "arm", "isl": "ice", "kat": "geo", "mkd": "mac", "nld": "dut",
    "rum": "ron", "sqi": "alb", "zho": "chi", "cze": "ces", "slo": "slk", "swe": "sve", "fas": "per", "eus": "baq",
    "msa": "may", "mya": "bur", "bod": "tib", "cym": "wel",
}  # fmt: skip
_PREROLL = 0.1  # seconds of audio before the first image, not played, for decoders to start
_CLOCK_STEP_BACK = 0.1  # minimum seconds by which the clock steps back at the start of another recording


@dataclass(frozen=True)
class SideStreams:
    """Audio and subtitle streams of a file, to copy into a video.

    Attributes:
        path: Path of the file.
        indices: Indices of the streams that the target format supports, in file order.
        recordings: Recordings of the file, with their times in the video.
        has_sound: Whether one of the streams is audio.
    """

    path: Path
    indices: tuple[int, ...]
    recordings: Sequence[Recording]
    has_sound: bool


def av_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions that PyAV raises if a file cannot be read or written."""
    import av

    return (av.error.FFmpegError, OSError, ValueError)


def copyable_streams(source: Path, target: Path, file_format: str) -> tuple[tuple[int, ...], bool]:
    """Return the audio and subtitle streams that a target format supports; log a warning for the others.

    Args:
        source: Media file.
        target: Target file, for the warning.
        file_format: FFmpeg's name of the target format.

    Returns:
        Indices of the streams in the source, and whether one of them is audio.

    Raises:
        VideoError: The source cannot be read.
    """
    copied: list[int] = []
    left_out: list[str] = []
    has_sound, matroska_holds_all = False, True

    # Sort the streams
    try:
        # An absolute path, since FFmpeg takes "12:30.mp4" for a URL
        with open_with_pyav(os.path.abspath(source)) as opened:
            for stream in opened.streams:
                kind = str(stream.type)
                if kind not in _COPIED_TYPES:
                    continue
                if stream.codec_context is not None and _can_hold(file_format, stream):
                    copied.append(stream.index)
                    has_sound = has_sound or kind == "audio"
                else:
                    left_out.append(_stream_name(stream))
                    is_held = stream.codec_context is not None and _can_hold(MATROSKA, stream)
                    matroska_holds_all = matroska_holds_all and is_held
    except av_errors() as error:
        raise VideoError(
            f"the audio of {source} cannot be read: {reason(error)}; omit audio_from for a video without audio"
        ) from error

    # Log the streams that are left out
    if left_out:
        names = ", ".join(left_out)
        advice = "; write a .mkv file to keep them" if matroska_holds_all and file_format != MATROSKA else ""
        logger.warning(
            "%s is written without the %s of %s, which its format does not support%s", target, names, source, advice
        )
    return tuple(copied), has_sound


def image_times(path: Path) -> npt.NDArray[np.int64]:
    """Return the timestamps of the complete images of a file in storage order, [N] ticks.

    Reading ends at the first error. The number of images reveals a full disk at the end of a file, which FFmpeg does
    not always report.
    """
    import av

    times: list[int] = []
    with contextlib.suppress(*av_errors()), av.open(str(path)) as opened:
        for packet in demux(opened, *opened.streams.video) if opened.streams.video else ():
            if packet.size and not packet.is_corrupt:
                times.append(packet.pts if packet.pts is not None else 0)
    return np.array(times, np.int64)


def remux(
    video: Path, target: Path, file_format: str, times: npt.NDArray[np.int64], last: float, side: SideStreams | None
) -> None:
    """Copy the packets of a video and of other streams into a file with its index at the front.

    Args:
        video: File with one H.264 stream, which may be truncated.
        target: File to write.
        file_format: FFmpeg's name of the target format.
        times: `image_times` of the video.
        last: Duration of the last image in seconds.
        side: Audio and subtitles to copy, without the parts before the first image and after the last one.

    Raises:
        One of `av_errors`: The video cannot be opened, or the target or a stream cannot be written.
    """
    import av

    with contextlib.ExitStack() as files:
        # Open the files
        images = files.enter_context(av.open(str(video)))
        options = {} if file_format == MATROSKA else {"movflags": "faststart"}
        output = files.enter_context(av.open(str(target), "w", format=file_format, container_options=options))

        # Plan the video stream
        source = images.streams.video[0]
        unit = Fraction(source.time_base or 1)
        timeline = _Timeline(times, max(1, round(last / unit)))
        total = float(timeline.total * unit)
        stream = output.add_stream_from_template(source, opaque=True)
        # Matroska stores this rate, and OpenCV reads it.
        stream.codec_context.framerate = Fraction(len(times) / total).limit_denominator(1001)
        merged = [timeline.timed(_packets(images, [source]), stream)]

        # Plan audio and subtitles
        if side is not None and side.indices:
            other = files.enter_context(open_with_pyav(os.path.abspath(side.path)))
            copies = {index: _copied_stream(output, other.streams[index]) for index in side.indices}
            preroll = (
                0.0 if file_format == MATROSKA else _PREROLL
            )  # Matroska has no negative times, and would shift all streams
            merged.append(_shifted(other, copies, side.recordings or [Recording(0.0, 0.0)], total, preroll))

        # Copy the packets in decoding order
        output.start_encoding()  # from here on, streams have the time bases of the target
        damaged = 0
        for packet in heapq.merge(*merged, key=_decoding_time):
            try:
                output.mux(packet)
            except (av.error.InvalidDataError, av.error.PatchWelcomeError):  # raised by bitstream filters
                if packet.stream is stream:
                    raise
                damaged += 1
        if damaged and side is not None:
            logger.warning("%s: %d damaged packets of audio or subtitles were skipped", side.path, damaged)


def _can_hold(file_format: str, stream: Stream) -> bool:
    import av

    try:
        with av.open(io.BytesIO(), "w", format=file_format) as trial:
            trial.add_stream_from_template(stream, opaque=True)
            trial.start_encoding()
    except av_errors():
        return False
    return True


def _stream_name(stream: Stream) -> str:
    codec = stream.codec_context.name if stream.codec_context else "unknown codec"
    language = stream.metadata.get("language", "")
    details = ", ".join([codec, *([language] if language and language != "und" else [])])
    return f"{_COPIED_TYPES[str(stream.type)]} ({details})"


def _copied_stream(output: OutputContainer, stream: Stream) -> Stream:
    """Add a copy of a stream, with its language and title."""
    copy = output.add_stream_from_template(stream, opaque=True)
    copy.metadata.update({key: stream.metadata[key] for key in _COPIED_TAGS if key in stream.metadata})
    if output.format.name == "mov" and "language" in copy.metadata:
        language = copy.metadata["language"]
        copy.metadata["language"] = _MOV_LANGUAGES.get(language, language)
    disposition: Any = getattr(stream, "disposition", None)
    if disposition is not None:
        copy.disposition = getattr(disposition, "value", disposition)  # PyAV 14 accepts only the number
    return copy


def _packets(opened: InputContainer, streams: list[Any]) -> Iterator[Packet[Any]]:
    """Yield the complete packets of some streams that have times, up to the first read error."""
    import av

    try:
        for packet in demux(opened, *streams):
            if packet.dts is not None and packet.pts is not None and packet.size and not packet.is_corrupt:
                yield packet
    except av.error.FFmpegError as error:
        logger.warning("%s cannot be read to its end: %s", opened.name, reason(error))


class _Timeline:
    """Decoding times and durations of a video's packets, computed from the presentation times.

    The decoding times are the sorted presentation times, shifted back by the delay that the packet order needs. MP4
    stores only their differences. These are the durations of all images in another order, so the total duration is
    right, including gaps.

    Attributes:
        total: Ticks from the first image to the end of the last one.
    """

    def __init__(self, shown: npt.NDArray[np.int64], last: int) -> None:
        """Compute the decoding times.

        Args:
            shown: [N] presentation times in ticks, in packet order.
            last: Duration of the last image in ticks.
        """
        rising = np.sort(shown)
        self._rising, self._last = rising, last
        self._durations = np.append(np.diff(rising), last)
        self._decoded = rising - (rising - shown).max(initial=0)
        self.total = int(rising[-1] - rising[0]) + last if len(rising) else 0

    def timed(self, packets: Iterator[Packet[Any]], stream: Stream) -> Iterator[Packet[Any]]:
        """Assign packets to another stream, with their decoding times and durations, and yield them."""
        for number, packet in enumerate(packets):
            if number == len(self._decoded):
                return
            packet.dts = int(self._decoded[number])
            is_last = (
                number == len(self._decoded) - 1
            )  # its duration ends the file, although it may not be the last image
            packet.duration = (
                self._last if is_last else int(self._durations[np.searchsorted(self._rising, packet.pts or 0)])
            )
            packet.stream = stream
            yield packet


@dataclass
class _Track:
    """State of a copied stream.

    Attributes:
        copy: Stream of the target.
        recording: Index of the recording of the last packet.
        newest: Decoding time of the last packet in seconds on the clock of the file.
        written: Decoding time of the last copied packet in ticks of the file.
    """

    copy: Stream
    recording: int = 0
    newest: float = -math.inf
    written: int | None = None

    def min_dts(self, unit: Fraction) -> int:
        """Return the minimum decoding time of the next packet in ticks of the file.

        Args:
            unit: Seconds per tick of the file.
        """
        if self.written is None:
            return -(2**62)
        if self.copy.type == "subtitle":
            return self.written
        return self.written + math.ceil(
            (self.copy.time_base or unit) / unit
        )  # audio times must rise in ticks of the target


def _shifted(
    opened: InputContainer, copies: dict[int, Stream], recordings: Sequence[Recording], end: float, preroll: float
) -> Iterator[Packet[Any]]:
    """Assign the packets of several streams to their copies, shifted to the time of the video, and yield them.

    The next recording starts when the clock of a stream steps back. Decoding times that do not rise are increased.

    Args:
        opened: File of the streams.
        copies: Copied stream for each index of a stream in the file.
        recordings: Recordings of the file, with their times in the video.
        end: Duration of the video in seconds. Packets that start later are omitted.
        preroll: Seconds of audio to keep before the first image.
    """
    tracks = {index: _Track(copy) for index, copy in copies.items()}
    last = len(recordings) - 1
    running = set(copies)
    for packet in _packets(opened, [opened.streams[index] for index in copies]):
        index, unit = packet.stream.index, Fraction(packet.time_base)
        track, is_subtitle = tracks[index], packet.stream.type == "subtitle"
        packet_pts, packet_dts = packet.pts or 0, packet.dts or 0

        # Find the recording
        seconds = float(packet_dts * unit)
        if seconds < track.newest - _CLOCK_STEP_BACK and track.recording < last:
            track.recording += 1
        track.newest = seconds
        if is_subtitle:  # too few subtitles to find the start of a recording
            track.recording = max(other.recording for other in tracks.values())
        recording = recordings[track.recording]

        # Shift the packet, or omit it
        start = recording.seconds - recording.time
        begin = float(packet_pts * unit) - start
        if begin >= end:
            if track.recording == last:
                running.discard(index)
            if not running:
                return
            continue
        if track.recording < last and begin >= recordings[track.recording + 1].time:
            continue
        ticks = round(start / unit)
        pts, dts = packet_pts - ticks, packet_dts - ticks
        if is_subtitle:
            if begin < 0:  # starts before the first image: keep the rest
                packet.duration, pts, dts = max(0, (packet.duration or 0) + pts), 0, 0
            if not packet.duration:
                continue
        elif begin < max(-preroll, recording.time if track.recording else -preroll):
            continue
        dts = max(dts, track.min_dts(unit))
        track.written = dts
        packet.pts, packet.dts, packet.stream = max(pts, dts), dts, track.copy
        yield packet


def _decoding_time(packet: Packet[Any]) -> float:
    return float((packet.dts or 0) * packet.time_base)
