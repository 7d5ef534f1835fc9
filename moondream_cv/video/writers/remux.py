"""Copying the packets of an encoded video, and the sound and subtitles of another file, into one file."""

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
from moondream_cv.video.sources.container import demux
from moondream_cv.video.writers.base import reason

if TYPE_CHECKING:
    from av import Packet
    from av.container import InputContainer, OutputContainer
    from av.stream import Stream

logger = logging.getLogger(__name__)

MATROSKA = "matroska"
_COPIED_TYPES = {"audio": "audio", "subtitle": "subtitles"}  # FFmpeg's names of stream types → those in messages
_COPIED_TAGS = ("language", "title", "handler_name")
_MOV_LANGUAGES = {  # codes of ISO 639-2 that FFmpeg writes to MP4 only → their synonyms that it writes to MOV
    "deu": "ger", "ell": "gre", "fre": "fra", "hye": "arm", "isl": "ice", "kat": "geo", "mkd": "mac", "nld": "dut",
    "rum": "ron", "sqi": "alb", "zho": "chi", "cze": "ces", "slo": "slk", "swe": "sve", "fas": "per", "eus": "baq",
    "msa": "may", "mya": "bur", "bod": "tib", "cym": "wel",
}  # fmt: skip
_PREROLL = 0.1  # seconds of sound kept before the first image, not played: decoders need some to set in
_CLOCK_FALL = 0.1  # seconds by which a clock falls back where another recording begins


@dataclass(frozen=True)
class SideStreams:
    """Sound and subtitles of a file, to be copied beside a video.

    Attributes:
        path: The file.
        indices: Numbers of its streams that the target can hold, in the file's order.
        recordings: Recordings of the file, with their times in the video.
        has_sound: Whether one of the streams is sound.
    """

    path: Path
    indices: tuple[int, ...]
    recordings: Sequence[Recording]
    has_sound: bool


def av_errors() -> tuple[type[Exception], ...]:
    """Return what PyAV raises when a file cannot be read or written."""
    import av

    return (av.error.FFmpegError, OSError, ValueError)


def copyable_streams(source: Path, target: Path, file_format: str) -> tuple[tuple[int, ...], bool]:
    """Return which streams of sound and subtitles a target can hold; log a warning that names the others.

    Args:
        source: A media file.
        target: Named in the warning.
        file_format: FFmpeg's name of the target's format.

    Returns:
        The streams' numbers in the source, and whether one of them is sound.

    Raises:
        VideoError: The source cannot be read.
    """
    import av

    copied: list[int] = []
    left_out: list[str] = []
    has_sound, matroska_holds_all = False, True
    try:
        # An absolute path, since FFmpeg takes "12:30.mp4" for a URL
        with av.open(os.path.abspath(source), metadata_errors="replace") as opened:
            for stream in opened.streams:
                kind = str(stream.type)
                if kind not in _COPIED_TYPES:
                    continue
                if stream.codec_context is not None and _can_hold(file_format, stream):
                    copied.append(stream.index)
                    has_sound = has_sound or kind == "audio"
                else:
                    left_out.append(_described(stream))
                    is_held = stream.codec_context is not None and _can_hold(MATROSKA, stream)
                    matroska_holds_all = matroska_holds_all and is_held
    except av_errors() as error:
        raise VideoError(
            f"the sound of {source} cannot be read: {reason(error)}; leave audio_from out for a silent video"
        ) from error
    if left_out:
        names = ", ".join(left_out)
        advice = "; write a .mkv file to keep them" if matroska_holds_all and file_format != MATROSKA else ""
        logger.warning(
            "%s is written without the %s of %s: its format cannot hold that%s", target, names, source, advice
        )
    return tuple(copied), has_sound


def image_times(path: Path) -> npt.NDArray[np.int64]:
    """Return the timestamps of a file's images that are whole, up to where it can be read: [N] ticks, as stored.

    Their number is how a full disk is noticed at the end of a file: FFmpeg does not always report it.
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
    """Copy a video's packets into a file with its index in front, and the packets of other streams with them.

    Args:
        video: A file with one stream of H.264; may end in the middle.
        target: File to write.
        file_format: FFmpeg's name of the target's format.
        times: `image_times` of the video.
        last: Seconds for which its last image is shown.
        side: Sound and subtitles to copy; those before the first image and after the last are left out.

    Raises:
        One of `av_errors`: The target cannot be written, the video not be opened, or the streams not be copied.
    """
    import av

    with contextlib.ExitStack() as files:
        images = files.enter_context(av.open(str(video)))
        options = {} if file_format == MATROSKA else {"movflags": "faststart"}
        output = files.enter_context(av.open(str(target), "w", format=file_format, container_options=options))
        source = images.streams.video[0]
        unit = Fraction(source.time_base or 1)
        timeline = _Timeline(times, max(1, round(last / unit)))
        total = float(timeline.total * unit)
        stream = output.add_stream_from_template(source, opaque=True)
        # Matroska stores this rate, from which OpenCV derives its own.
        stream.codec_context.framerate = Fraction(len(times) / total).limit_denominator(1001)
        merged = [timeline.timed(_packets(images, [source]), stream)]
        if side is not None and side.indices:
            other = files.enter_context(av.open(os.path.abspath(side.path), metadata_errors="replace"))
            copies = {index: _copied_stream(output, other.streams[index]) for index in side.indices}
            preroll = 0.0 if file_format == MATROSKA else _PREROLL  # Matroska has no times below 0; it would move all
            merged.append(_shifted(other, copies, side.recordings or [Recording(0.0, 0.0)], total, preroll))
        output.start_encoding()  # from here on, the streams have the time bases of the target
        damaged = 0
        for packet in heapq.merge(*merged, key=_decoding_time):
            try:
                output.mux(packet)
            except (av.error.InvalidDataError, av.error.PatchWelcomeError):  # of a filter that reads the packet
                if packet.stream is stream:
                    raise
                damaged += 1
        if damaged and side is not None:
            logger.warning("%s: %d damaged packets of sound or subtitles were left out", side.path, damaged)


def _can_hold(file_format: str, stream: Stream) -> bool:
    import av

    try:
        with av.open(io.BytesIO(), "w", format=file_format) as trial:
            trial.add_stream_from_template(stream, opaque=True)
            trial.start_encoding()
    except av_errors():
        return False
    return True


def _described(stream: Stream) -> str:
    codec = stream.codec_context.name if stream.codec_context else "unknown codec"
    language = stream.metadata.get("language", "")
    details = ", ".join([codec, *([language] if language and language != "und" else [])])
    return f"{_COPIED_TYPES[str(stream.type)]} ({details})"


def _copied_stream(output: OutputContainer, stream: Stream) -> Stream:
    """Add a stream like another one, with its language and title."""
    copy = output.add_stream_from_template(stream, opaque=True)
    copy.metadata.update({key: stream.metadata[key] for key in _COPIED_TAGS if key in stream.metadata})
    if output.format.name == "mov" and "language" in copy.metadata:
        language = copy.metadata["language"]
        copy.metadata["language"] = _MOV_LANGUAGES.get(language, language)
    disposition: Any = getattr(stream, "disposition", None)
    if disposition is not None:
        copy.disposition = getattr(disposition, "value", disposition)  # PyAV 14 takes the number only
    return copy


def _packets(opened: InputContainer, streams: list[Any]) -> Iterator[Packet[Any]]:
    """Give the packets of some streams that are whole and have a time, as far as they can be read."""
    import av

    try:
        for packet in demux(opened, *streams):
            if packet.dts is not None and packet.pts is not None and packet.size and not packet.is_corrupt:
                yield packet
    except av.error.FFmpegError as error:
        logger.warning("%s cannot be read to its end: %s", opened.name, reason(error))


class _Timeline:
    """Decoding times and durations of a video's packets, from the times at which their images are shown.

    The decoding times are the presentation times in rising order, all moved back by what the order of the packets
    needs. MP4 stores only their differences, which are then the durations of all images but in another order, so that
    the total is right, gaps included.

    Attributes:
        total: Ticks from the first image to the end of the last one.
    """

    def __init__(self, shown: npt.NDArray[np.int64], last: int) -> None:
        """Plan the packets.

        Args:
            shown: [N] ticks at which the images are shown, in the order of the packets.
            last: Ticks for which the last image is shown.
        """
        rising = np.sort(shown)
        self._rising, self._last = rising, last
        self._durations = np.append(np.diff(rising), last)
        self._decoded = rising - (rising - shown).max(initial=0)
        self.total = int(rising[-1] - rising[0]) + last if len(rising) else 0

    def timed(self, packets: Iterator[Packet[Any]], stream: Stream) -> Iterator[Packet[Any]]:
        """Give the packets to another stream, with their decoding times and durations."""
        for number, packet in enumerate(packets):
            if number == len(self._decoded):
                return
            packet.dts = int(self._decoded[number])
            is_last = number == len(self._decoded) - 1  # its duration ends the file, although another image may be last
            packet.duration = (
                self._last if is_last else int(self._durations[np.searchsorted(self._rising, packet.pts or 0)])
            )
            packet.stream = stream
            yield packet


@dataclass
class _Track:
    """A stream that is copied.

    Attributes:
        copy: Stream of the target.
        recording: Index of the recording that its last packet belongs to.
        newest: Decoding time of its last packet, in seconds on the file's clock.
        written: Decoding time of the last packet that was copied, in ticks of the file.
    """

    copy: Stream
    recording: int = 0
    newest: float = -math.inf
    written: int | None = None

    def least_dts(self, unit: Fraction) -> int:
        """Return the decoding time, in ticks of the file, that the next packet must have at least."""
        if self.written is None:
            return -(2**62)
        if self.copy.type == "subtitle":
            return self.written
        return self.written + math.ceil((self.copy.time_base or unit) / unit)  # sound must rise in ticks of the target


def _shifted(
    opened: InputContainer, copies: dict[int, Stream], recordings: Sequence[Recording], end: float, preroll: float
) -> Iterator[Packet[Any]]:
    """Give the packets of several streams to their copies, moved to the video's time.

    Where the clock of a stream falls back, the next recording begins. Decoding times that do not rise are raised.

    Args:
        opened: File that they come from.
        copies: Number of a stream in that file → its copy.
        recordings: Recordings of the file, with their times in the video.
        end: Seconds from the first image after which nothing begins.
        preroll: Seconds before the first image from which sound is kept.
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
        if seconds < track.newest - _CLOCK_FALL and track.recording < last:
            track.recording += 1
        track.newest = seconds
        if is_subtitle:  # too few to see by themselves where a recording begins
            track.recording = max(other.recording for other in tracks.values())
        recording = recordings[track.recording]

        # Move the packet, or leave it out
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
            if begin < 0:  # shown since before the first image: keep the rest
                packet.duration, pts, dts = max(0, (packet.duration or 0) + pts), 0, 0
            if not packet.duration:
                continue
        elif begin < max(-preroll, recording.time if track.recording else -preroll):
            continue
        dts = max(dts, track.least_dts(unit))
        track.written = dts
        packet.pts, packet.dts, packet.stream = max(pts, dts), dts, track.copy
        yield packet


def _decoding_time(packet: Packet[Any]) -> float:
    return float((packet.dts or 0) * packet.time_base)
