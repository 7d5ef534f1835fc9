"""`VideoWriter`: H.264 files for browsers, with variable frame times, and audio and subtitles of another file.

While frames are written, `NAME.part.mp4` next to the target contains everything except the last second. It is a
fragmented MP4, which stays playable after a crash and on a full disk. `close` remuxes it together with audio and
subtitles, with the index at the front, and moves the result to the target.
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

from moondream_cv.arguments import check_choice, check_range
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
_MAX_STEP = 6 * 3600 * TICKS  # durations have 32 bits in MP4, 13 hours of ticks
_MIN_STEP = TICKS // 1000  # resolution of Matroska
_DEFAULT_FPS = 30.0
MIN_FPS, MAX_FPS = 0.001, TICKS


class VideoWriter(Writer):
    """Writes an H.264 file that plays in browsers (yuv420p, index at the front).

    Frames keep their times, so a variable frame rate is preserved. The target is replaced by `close`, and stays
    playable after exceptions and Ctrl-C. Closing copies the file, which needs twice its size on disk for a moment.
    Without frames, no file is written.

    Attributes:
        path: Path of the target.
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
        """Open the file, and find the audio and subtitle streams to copy.

        Args:
            path: Path of the target, which ends in .mp4, .mov or .mkv. `~` is expanded, and an existing file is
                replaced.
            fps: Nominal frames per second: the duration of the last frame if it has none, and the step between frames
                whose times do not rise. Default: the previous step, which is 1/30 s at the start.
            audio_from: File whose audio and subtitle tracks are copied without re-encoding. Time 0 of the frames is its
                first image, or its start if it has no images. Parts before the first frame and after the last one are
                omitted. Tracks that the target format does not support are omitted with a warning.
            start_time: Time on the clock of `audio_from` for time 0 of the frames, in seconds; or the
                `Source.recordings` of that file, which are read by `close`. Default: the time of its first image.
            sample_aspect_ratio: Width of a pixel divided by its height; None for square pixels.
            colorspace: Color matrix of the file, "bt601" or "bt709". Default: BT.709 from 1280 columns or 720 rows, and
                BT.601 below, as assumed by programs that ignore the tag, such as OpenCV.
            crf: Quality of libx264, from 1 (best, large) to 51.
            preset: Preset of libx264, which trades speed for size.

        Raises:
            ValueError: A number, the preset or the colorspace is out of range.
            VideoError: The target cannot be written, or `audio_from` cannot be read.
        """
        # Check the arguments
        if fps is not None:
            check_range("fps", fps, MIN_FPS, MAX_FPS)
        check_range("crf", crf, 1, 51)
        check_choice("preset", preset, get_args(Preset))
        if colorspace is not None:
            check_choice("colorspace", colorspace, get_args(Colorspace))
        if sample_aspect_ratio is not None:
            check_range("sample_aspect_ratio", sample_aspect_ratio, MIN_ASPECT_RATIO, MAX_ASPECT_RATIO)

        # Set the options
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
        """Encode one frame.

        Args:
            frame: Frame to write. If a side is odd, the last row or column is repeated. Images of another size than the
                first one are scaled to fit, with black bars. Times that do not rise advance by `1 / fps`.
            detections: Ignored.

        Raises:
            ValueError: The image is not [H, W, 3] uint8.
            VideoError: The target cannot be written to, or is closed.
        """
        # Check state and image
        if self._closed:
            raise VideoError(f"{self.path} is closed; create a new writer")
        if self._failed:
            raise VideoError(
                f"{self.path} could not be written to before; close it, free disk space and create a new writer"
            )
        image = frame.image
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
            raise ValueError(f"image must be [H, W, 3] uint8 BGR, got {list(image.shape)} {image.dtype}")

        # Encode the image
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
            VideoError: The end cannot be written, and no `write` has failed before. The rest is playable.
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
        """Return an image scaled to the size of the first one, with even sides."""
        width, height = self._size
        if image.shape[:2] != (height, width):
            if not self._size_changed:
                logger.warning(
                    "%s: a frame of %dx%d pixels after %dx%d; frames are scaled to the first size",
                    self.path, image.shape[1], image.shape[0], width, height,
                )  # fmt: skip
            self._size_changed = True
            image = _letterboxed(image, width, height)
        if width % 2 or height % 2:
            image = np.pad(image, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        return np.ascontiguousarray(image)

    def _publish(self) -> None:
        """Remux the part to the target, or move it unchanged if that fails, and count its images."""
        times = image_times(self._part)
        if not len(times):
            self._part.unlink(missing_ok=True)
            return
        best, final = self._part, self._part.with_suffix(f".final{self._target.suffix}")
        try:
            if (self._side is not None and self._finish(final, times, self._side)) or self._finish(final, times, None):
                best = final
        except BaseException:  # a second Ctrl-C leaves the fragmented file, which is playable
            lost = ["an index at the front", *([] if self._side is None else [f"the audio of {self._side.path}"])]
            logger.warning(
                "%s was interrupted while closing; it is playable, without %s", self.path, " and ".join(lost)
            )
            raise
        finally:
            try:
                os.replace(best, self._target)
                self.saved_frames = len(times)
            except OSError as error:
                raise VideoError(f"{self.path} cannot be replaced: {reason(error)}; the video is in {best}") from error
            for left in (self._part, final):
                with contextlib.suppress(OSError):
                    left.unlink(missing_ok=True)

    def _finish(self, final: Path, times: npt.NDArray[np.int64], side: SideStreams | None) -> bool:
        """Remux the part with audio and subtitles into the final file; log a warning and return False on failure."""
        try:
            moved = None if side is None else replace(side, recordings=self._written_recordings(side))
            remux(self._part, final, self._format, times, self._clock.last_duration, moved)
            if len(image_times(final)) < len(times):
                raise OSError("no disk space for a second copy")
        except av_errors() as error:
            lost = f"the audio of {side.path}" if side else "an index at the front, so playback may start later"
            logger.warning("%s is without %s: %s", self.path, lost, reason(error))
            return False
        return True

    def _written_recordings(self, side: SideStreams) -> list[Recording]:
        """Return the recordings of the other file with their times in this one."""
        return [recording._replace(time=recording.time - self._clock.origin) for recording in side.recordings]

    def _write_error(self, error: Exception) -> VideoError:
        if not self._frames and not isinstance(error, OSError):
            size = "x".join(map(str, self._size))
            return VideoError(
                f"{self.path}: H.264 does not support frames of {size} pixels ({reason(error)}); scale them first"
            )
        return VideoError(
            f"{self.path} cannot be written to: {reason(error)}; check {self._target.parent} for a full disk or a "
            "quota. The frames written so far are kept"
        )


class _Clock:
    """Frame times in ticks, from 0 and strictly rising.

    Frames whose times do not rise are placed at the nominal rate. Later frames catch up in short steps.
    """

    def __init__(self, fps: float | None) -> None:
        self.rate = Fraction(fps or _DEFAULT_FPS).limit_denominator(1001)
        self.origin = 0.0  # the time of the first frame, in seconds
        self._nominal = fps and max(1, round(TICKS / fps))
        self._step = round(TICKS / _DEFAULT_FPS)  # the last step, or the expected one
        self._last: int | None = None
        self._newest = 0  # latest time of a frame in the source, in ticks
        self._last_duration: float | None = None  # seconds, from the source
        self._skipped = 0  # ticks

    def at(self, time: float, duration: float | None = None) -> int:
        """Return the presentation time of the next frame in ticks.

        Args:
            time: Time of the frame in seconds.
            duration: Duration of the frame in seconds; None if unknown.
        """
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
            self._last += min(usual, _MIN_STEP)
            return self._last
        if step > _MAX_STEP:
            self._skipped += step - usual
        self._step = step if 0 < step <= _MAX_STEP else usual
        self._last += self._step
        return self._last

    @property
    def last_duration(self) -> float:
        """Duration of the last frame in seconds."""
        if self._last_duration is not None and 1 <= self._last_duration * TICKS <= _MAX_STEP:
            return self._last_duration
        return int(self._nominal or self._step) / TICKS


def _side_streams(
    source: Path, target: Path, file_format: str, start_time: float | Sequence[Recording] | None
) -> SideStreams | None:
    """Return the audio and subtitles to copy from a file; None if the target supports none."""
    indices, has_sound = copyable_streams(source, target, file_format)
    if not indices:
        return None
    if start_time is None:
        start_time = _first_image(source)
    recordings = start_time if isinstance(start_time, Sequence) else [Recording(0.0, start_time)]
    return SideStreams(source, indices, recordings, has_sound)


def _first_image(path: Path) -> float:
    """Return the time of the first decodable image on the clock of a file in seconds; 0 if it has no images."""
    try:
        with open_file(path, str(path)) as source:
            return source.start_time or 0.0
    except VideoError:  # an audio file
        return 0.0


def _checked_target(path: Path) -> Path:
    """Return the resolved path of a target, after checking that an H.264 file can be written there."""
    if path.suffix.lower() not in _FORMATS:
        better = path.with_suffix(".mp4") if path.name else "out.mp4"
        raise VideoError(f"{path} must end in {', '.join(_FORMATS)}; use {better}")
    try:
        target = path.expanduser().resolve()  # keeps symbolic links
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
    """Create an empty file next to the target. Parts of earlier, killed runs are kept."""
    for number in itertools.count(1):
        part = target.with_name(f"{target.stem}.part{number if number > 1 else ''}.mp4")
        with contextlib.suppress(FileExistsError):
            part.open("xb").close()
            return part
    raise AssertionError("unreachable")


def _letterboxed(image: npt.NDArray[np.uint8], width: int, height: int) -> npt.NDArray[np.uint8]:
    """Return an image scaled to fit a size, with black bars."""
    from PIL import Image

    scale = min(width / image.shape[1], height / image.shape[0])
    inner = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    scaled = np.asarray(Image.fromarray(image).resize(inner, Image.Resampling.BILINEAR))  # the channel order is kept
    canvas = np.zeros((height, width, 3), np.uint8)
    left, top = (width - inner[0]) // 2, (height - inner[1]) // 2
    canvas[top : top + inner[1], left : left + inner[0]] = scaled
    return canvas
