"""Frames as an H.264 file that browsers play, with the times of the frames, and sound and subtitles of another file.

While frames come, `NAME.part.mp4` next to the target holds everything but the last second: an MP4 in fragments, which
plays after a crash and on a full disk. `close` copies its packets, unchanged, and those of the sound and the subtitles
into the final form, with the index in front, and moves that to the target.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import numpy as np
import numpy.typing as npt

from moondream_cv.errors import VideoError
from moondream_cv.video.sources.base import MAX_ASPECT_RATIO, MIN_ASPECT_RATIO, Colorspace, Recording
from moondream_cv.video.sources.colors import usual_colorspace
from moondream_cv.video.sources.container import open_file
from moondream_cv.video.sources.frame import Frame
from moondream_cv.video.writers.base import Writer, cannot_be_written, reason
from moondream_cv.video.writers.encoder import TICKS, H264Encoder, Preset
from moondream_cv.video.writers.remux import SideStreams, av_errors, copyable_streams, image_times, remux

if TYPE_CHECKING:
    import supervision as sv

logger = logging.getLogger(__name__)

_FORMATS = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska"}
_LONGEST_STEP = 6 * 3600 * TICKS  # an image's duration has 32 bits in MP4, 13 hours of ticks
_SHORTEST_STEP = TICKS // 1000  # what Matroska can store
_DEFAULT_FPS = 30.0
MIN_FPS, MAX_FPS = 0.001, TICKS


class VideoWriter(Writer):
    """Writes an H.264 file that plays in browsers: yuv420p, its index in front.

    Frames keep the times that they have, so a variable frame rate stays one. What was written plays after `close`, also
    when an exception or Ctrl-C came between; until then the target is not touched. Closing copies the file, so for a
    moment it takes its size twice. Without a frame there is no file.

    Attributes:
        path: The target.
        saved_frames: Number of frames in the file; None before `close`.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        fps: float | None = None,
        audio_from: str | Path | None = None,
        start_time: float | Sequence[Recording] | None = None,
        sample_aspect_ratio: Fraction | float | None = None,
        colorspace: Colorspace | None = None,
        crf: int = 23,
        preset: Preset = "veryfast",
    ) -> None:
        """Open the file, and look at the source of the sound.

        Args:
            path: The target, which ends in .mp4, .mov or .mkv; `~` is expanded, an existing file is replaced.
            fps: Frames per second, nominally: the duration of the last frame, unless that has one, and the step if
                times do not rise. None for the step before, 1/30 s at the start.
            audio_from: A file whose sound tracks and subtitles are copied, as they are. Time 0 of the frames is its
                first image (its beginning, if it has none); what begins before the first frame written and after the
                last is left out. Tracks that the target cannot hold are left out with a logged warning; a file without
                sound too, silently.
            start_time: Seconds on the clock of `audio_from` that belong to time 0 of the frames, or the
                `Source.recordings` of the file, which are read when the writer is closed. None to decode the first
                image of the file and take the time of that.
            sample_aspect_ratio: Width of a pixel divided by its height; None for square pixels.
            colorspace: Matrix with which colors are stored, "bt601" or "bt709"; None for BT.709 from 1280 columns or
                720 lines up and BT.601 below, which programs assume that ignore the tag, OpenCV among them.
            crf: Quality of libx264, from 1 (best, large) to 51.
            preset: Speed of libx264.

        Raises:
            ValueError: A number, the preset or the colorspace is out of range.
            VideoError: The target cannot be written, or the source of the sound not be read.
        """
        if fps is not None and not MIN_FPS <= fps <= MAX_FPS:  # also false of NaN
            raise ValueError(f"fps must be between {MIN_FPS} and {MAX_FPS}, got {fps}")
        if not 1 <= crf <= 51:
            raise ValueError(f"crf must be from 1 (best) to 51, not {crf}")
        if preset not in get_args(Preset):
            raise ValueError(f"preset must be one of {', '.join(get_args(Preset))}, not {preset!r}")
        if colorspace is not None and colorspace not in get_args(Colorspace):
            raise ValueError(f"colorspace must be one of {', '.join(get_args(Colorspace))}, got {colorspace!r}")
        if sample_aspect_ratio is not None and not MIN_ASPECT_RATIO <= sample_aspect_ratio <= MAX_ASPECT_RATIO:
            raise ValueError(f"sample_aspect_ratio must be between 0.01 and 100, got {sample_aspect_ratio}")
        self.path = Path(path)
        self.saved_frames: int | None = None
        self._crf, self._preset, self._colorspace = crf, preset, colorspace
        ratio = Fraction(sample_aspect_ratio or 1).limit_denominator(1000)
        self._sample_aspect_ratio = None if sample_aspect_ratio is None else ratio
        self._target = _checked_target(self.path)
        self._format = _FORMATS[self._target.suffix.lower()]
        self._side = None
        if audio_from is not None:
            self._side = _side_streams(Path(audio_from).expanduser(), self.path, self._format, start_time)
        self._clock = _Clock(fps)
        self._encoder: H264Encoder | None = None
        self._size = (0, 0)  # width, height
        self._frames = 0
        self._size_changed = self._failed = self._closed = False
        try:
            self._part = _new_part(self._target)
        except OSError as error:
            raise VideoError(f"{self.path} {cannot_be_written(self._target, error)}") from error

    def __repr__(self) -> str:
        return f"VideoWriter({str(self.path)!r})"

    def write(self, frame: Frame, detections: sv.Detections) -> None:
        """Encode one frame; the detections are not looked at.

        Args:
            frame: Its image may have odd sides: the last row or column is then repeated. An image of another size than
                the first one is fitted into that size, with black bars. Times that do not rise go on by `1 / fps`.
            detections: Anything.

        Raises:
            ValueError: The image is not [H, W, 3] uint8.
            VideoError: The target cannot be written on, or is closed.
        """
        if self._closed:
            raise VideoError(f"{self.path} is closed; make a new writer")
        if self._failed:
            raise VideoError(f"{self.path} could not be written on before; close it, make room and make a new writer")
        image = frame.image
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
            raise ValueError(f"an image must be [H, W, 3] uint8 BGR, not {list(image.shape)} {image.dtype}")
        try:
            if self._encoder is None:
                self._size = (image.shape[1], image.shape[0])
                self._encoder = H264Encoder(
                    self._part,
                    self._size,
                    rate=self._clock.rate,
                    crf=self._crf,
                    preset=self._preset,
                    colorspace=self._colorspace or usual_colorspace(*self._size),
                    sample_aspect_ratio=self._sample_aspect_ratio,
                )
            self._encoder.write(self._fitted(image), self._clock.at(frame.time, frame.duration))
            self._frames += 1
        except av_errors() as error:
            self._failed = True
            raise self._write_error(error) from error

    def close(self) -> None:
        """Complete the file and move it to the target. A second call does nothing.

        Raises:
            VideoError: The end cannot be written, and no `write` failed before. What came before it plays.
        """
        if self._closed:
            return
        self._closed = True
        self.saved_frames = 0
        if self._encoder is None:
            self._part.unlink(missing_ok=True)
            return
        failure: Exception | None = None
        try:
            self._encoder.close()
        except av_errors() as error:
            failure = error
        finally:
            self._publish()
        kept = self.saved_frames
        if not self._failed and (failure is not None or kept < self._frames):
            raise self._write_error(failure or OSError(f"{kept} of {self._frames} frames fit")) from failure

    def _fitted(self, image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Return the image in the size of the first one, its sides made even."""
        width, height = self._size
        if image.shape[:2] != (height, width):
            if not self._size_changed:
                logger.warning(
                    "%s: a frame of %dx%d pixels after %dx%d; it is fitted into the first size",
                    self.path, image.shape[1], image.shape[0], width, height,
                )  # fmt: skip
            self._size_changed = True
            image = _letterboxed(image, width, height)
        if width % 2 or height % 2:
            image = np.pad(image, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        return np.ascontiguousarray(image)

    def _publish(self) -> None:
        """Move what was written to the target, in its final form or else as it is, and count its images."""
        times = image_times(self._part)
        if not len(times):
            self._part.unlink(missing_ok=True)
            return
        best, final = self._part, self._part.with_suffix(f".final{self._target.suffix}")
        try:
            if (self._side is not None and self._finish(final, times, self._side)) or self._finish(final, times, None):
                best = final
        except BaseException:  # a second Ctrl-C leaves the file in fragments, which plays too
            lost = ["its index in front", *([] if self._side is None else [f"the sound of {self._side.path}"])]
            logger.warning(
                "%s was interrupted while it was closed; it plays, without %s", self.path, " and ".join(lost)
            )
            raise
        finally:
            try:
                os.replace(best, self._target)
                self.saved_frames = len(times)
            except OSError as error:
                raise VideoError(f"{self.path} cannot be replaced: {reason(error)}; the video is {best}") from error
            for left in (self._part, final):
                with contextlib.suppress(OSError):
                    left.unlink(missing_ok=True)

    def _finish(self, final: Path, times: npt.NDArray[np.int64], side: SideStreams | None) -> bool:
        """Copy the packets of the part and of sound and subtitles into the final file; log why if that fails."""
        try:
            moved = None if side is None else replace(side, recordings=self._written_recordings(side))
            remux(self._part, final, self._format, times, self._clock.last_duration, moved)
            if len(image_times(final)) < len(times):
                raise OSError("there is no room for a second copy")
        except av_errors() as error:
            lost = f"the sound of {side.path}" if side else "its index in front, so it may start later"
            logger.warning("%s is without %s: %s", self.path, lost, reason(error))
            return False
        return True

    def _written_recordings(self, side: SideStreams) -> list[Recording]:
        """Return the recordings of the other file with their times in this one."""
        return [recording._replace(time=recording.time - self._clock.origin) for recording in side.recordings]

    def _write_error(self, error: Exception) -> VideoError:
        if not self._frames and not isinstance(error, OSError):
            size = "x".join(map(str, self._size))
            return VideoError(f"{self.path}: H.264 refuses frames of {size} pixels ({reason(error)}); scale them first")
        return VideoError(
            f"{self.path} cannot be written on: {reason(error)}; look for a full disk or a quota at "
            f"{self._target.parent}. What was written so far is kept"
        )


class _Clock:
    """The times of frames in ticks: from 0, strictly rising.

    Frames whose times do not rise follow each other at the nominal rate. The frames after them catch up in short steps.
    """

    def __init__(self, fps: float | None) -> None:
        self.rate = Fraction(fps or _DEFAULT_FPS).limit_denominator(1001)
        self.origin = 0.0  # the time of the first frame, in seconds
        self._nominal = fps and max(1, round(TICKS / fps))
        self._step = round(TICKS / _DEFAULT_FPS)  # the last one, or what is to be expected
        self._last: int | None = None
        self._newest = 0  # latest time of a frame in the source, in ticks
        self._last_duration: float | None = None  # seconds, as the source has it
        self._skipped = 0  # ticks

    def at(self, time: float, duration: float | None = None) -> int:
        """Return when a frame of this time, in seconds, is shown, in ticks."""
        usual = int(self._nominal or self._step)
        self._last_duration = duration
        if self._last is None:
            self.origin = time if math.isfinite(time) else 0.0
            self._last, self._step = 0, usual
            return 0
        ticks = round((time - self.origin) * TICKS) if math.isfinite(time) else self._newest
        is_later, self._newest = ticks > self._newest, max(ticks, self._newest)
        step = ticks - self._skipped - self._last
        if step <= 0 and is_later:
            self._last += min(usual, _SHORTEST_STEP)
            return self._last
        if step > _LONGEST_STEP:
            self._skipped += step - usual
        self._step = step if 0 < step <= _LONGEST_STEP else usual
        self._last += self._step
        return self._last

    @property
    def last_duration(self) -> float:
        """Seconds for which the last frame is shown."""
        if self._last_duration is not None and 1 <= self._last_duration * TICKS <= _LONGEST_STEP:
            return self._last_duration
        return int(self._nominal or self._step) / TICKS


def _side_streams(
    source: Path, target: Path, file_format: str, start_time: float | Sequence[Recording] | None
) -> SideStreams | None:
    """Return the sound and subtitles to copy from a file; None if it has none that fit."""
    indices, has_sound = copyable_streams(source, target, file_format)
    if not indices:
        return None
    if start_time is None:
        start_time = _first_image(source)
    recordings = start_time if isinstance(start_time, Sequence) else [Recording(0.0, start_time)]
    return SideStreams(source, indices, recordings, has_sound)


def _first_image(path: Path) -> float:
    """Return when a file's first image that can be decoded is shown, in seconds on its own clock; 0 if it has none."""
    try:
        with open_file(path, str(path)) as source:
            return source.start_time or 0.0
    except VideoError:  # a file of sound
        return 0.0


def _checked_target(path: Path) -> Path:
    """Return the file that a path leads to, if an H.264 file can stand there."""
    if path.suffix.lower() not in _FORMATS:
        better = path.with_suffix(".mp4") if path.name else "out.mp4"
        raise VideoError(f"{path} must end in {', '.join(_FORMATS)}; name it {better}")
    try:
        target = path.expanduser().resolve()  # so that a link stays one
        if target.is_dir() or (target.exists() and not (target.is_file() and os.access(target, os.W_OK))):
            why = PermissionError(0, "it is write-protected") if target.is_file() else None
            raise VideoError(f"{path} {cannot_be_written(target, why)}")
    except (OSError, RuntimeError, ValueError) as error:  # a file as a folder, "~nobody", a NUL in the path
        raise VideoError(f"{path} {cannot_be_written(path, error)}") from error
    try:
        import av

        av.Codec("libx264", "w")
    except (ImportError, ValueError) as error:
        raise VideoError(f"{path} needs PyAV with libx264 ({error}); pip install --force-reinstall av") from error
    return target


def _new_part(target: Path) -> Path:
    """Make an empty file beside the target; one that an earlier, killed run left is not touched."""
    for number in itertools.count(1):
        part = target.with_name(f"{target.stem}.part{number if number > 1 else ''}.mp4")
        with contextlib.suppress(FileExistsError):
            part.open("xb").close()
            return part
    raise AssertionError("counting has no end")


def _letterboxed(image: npt.NDArray[np.uint8], width: int, height: int) -> npt.NDArray[np.uint8]:
    """Fit an image into a size with black bars, its proportions kept."""
    from PIL import Image

    scale = min(width / image.shape[1], height / image.shape[0])
    inner = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    scaled = np.asarray(Image.fromarray(image).resize(inner, Image.Resampling.BILINEAR))  # channels keep their order
    canvas = np.zeros((height, width, 3), np.uint8)
    left, top = (width - inner[0]) // 2, (height - inner[1]) // 2
    canvas[top : top + inner[1], left : left + inner[0]] = scaled
    return canvas
