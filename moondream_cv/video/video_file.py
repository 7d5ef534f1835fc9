"""Frames as an H.264 file that browsers play, with the times of the frames and the sound of another file.

While frames come, `NAME.part.mp4` beside the target is complete but for the last seconds: an MP4 in fragments, which
plays after a crash and on a full disk. `close` copies its packets, unchanged, and those of the sound into the final
form, with the index in front, and moves that to the target.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
from collections import deque
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import numpy.typing as npt

from moondream_cv.errors import VideoError
from moondream_cv.video.frame import Frame
from moondream_cv.video.remux import av_errors, check_sound, count_pictures, remux
from moondream_cv.video.writers import Writer, cannot_be_written, reason

if TYPE_CHECKING:
    import av
    import supervision as sv

logger = logging.getLogger(__name__)

Preset = Literal[
    "ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow", "placebo"
]
"""Of libx264: how much time it takes for a smaller file."""

_FORMATS = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska"}
TICKS = 90_000  # a second; the usual frame rates are whole numbers of ticks
_LONGEST_STEP = 6 * 3600 * TICKS  # a picture's duration has 32 bits in MP4, 13 hours of ticks
_DEFAULT_FPS = 30.0
_FRAGMENT_MICROSECONDS = 2_000_000
_BT709 = 1  # FFmpeg's number of it: as matrix, as primaries and as transfer curve
_LIMITED_RANGE = 1


class VideoWriter(Writer):
    """Writes an H.264 file that plays in browsers: yuv420p in BT.709 colours, its index in front.

    Frames keep the times that they have, so a variable frame rate stays one. What was written plays after `close`, also
    when an exception or Ctrl-C came between; until then the target is not touched. Closing copies the file, so for a
    moment it takes its size twice. Without a frame there is no file.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        fps: float | None = None,
        audio_from: str | Path | None = None,
        crf: int = 23,
        preset: Preset = "veryfast",
    ) -> None:
        """Open the file, and look at the source of the sound.

        Args:
            path: The target, which ends in .mp4, .mov or .mkv; `~` is expanded, an existing file is replaced.
            fps: Frames a second, nominally: what the last frame lasts, and the step where times do not rise. None for
                as long as the step before, 1/30 s at the start.
            audio_from: A file whose first sound track is copied, as it is. Time 0 of the frames is its first picture
                (its beginning, where it has none); sound before the first frame written and after the last is left
                out. A track that the target cannot hold is left out with a logged warning; a file without one too,
                silently.
            crf: Quality of libx264, from 1 (best, large) to 51.
            preset: Speed of libx264.

        Raises:
            ValueError: A number or the preset is out of range.
            VideoError: The target cannot be written, or the source of the sound not be read.
        """
        if fps is not None and not (math.isfinite(fps) and 0.001 <= fps <= 1000):
            raise ValueError(f"fps must be from 0.001 to 1000, not {fps}")
        if not 1 <= crf <= 51:
            raise ValueError(f"crf must be from 1 (best) to 51, not {crf}")
        if preset not in get_args(Preset):
            raise ValueError(f"preset must be one of {', '.join(get_args(Preset))}, not {preset!r}")
        self.path = Path(path)
        self._options = {"crf": str(crf), "preset": preset}
        self._target = _checked_target(self.path)
        self._format = _FORMATS[self._target.suffix.lower()]
        self._audio_from = None if audio_from is None else Path(audio_from).expanduser()
        if self._audio_from is not None and not check_sound(self._audio_from, self.path, self._format):
            self._audio_from = None
        self._clock = _Clock(fps)
        self._encoder: _Encoder | None = None
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
                self._encoder = _Encoder(self._part, self._size, self._clock.rate, self._options)
            self._encoder.write(self._fitted(image), *self._clock.at(frame.time))
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
        if self._encoder is None:
            self._part.unlink(missing_ok=True)
            return
        failure: Exception | None = None
        try:
            self._encoder.close()
        except av_errors() as error:
            failure = error
        finally:
            kept = self._publish()
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

    def _publish(self) -> int:
        """Move what was written to the target, in its final form or else as it is; return its number of pictures."""
        pictures = count_pictures(self._part)
        if not pictures:
            self._part.unlink(missing_ok=True)
            return 0
        best, final = self._part, self._part.with_suffix(f".final{self._target.suffix}")
        try:
            if self._finish(final, self._audio_from, pictures) or (
                self._audio_from is not None and self._finish(final, None, pictures)
            ):
                best = final
        finally:  # a second Ctrl-C leaves the file in fragments, which plays too
            try:
                os.replace(best, self._target)
            except OSError as error:
                raise VideoError(f"{self.path} cannot be replaced: {reason(error)}; the video is {best}") from error
            for left in (self._part, final):
                with contextlib.suppress(OSError):
                    left.unlink(missing_ok=True)
        return pictures

    def _finish(self, final: Path, audio_from: Path | None, pictures: int) -> bool:
        """Copy the packets of the part, and those of the sound, into the final file; log why where that fails."""
        try:
            clock = self._clock
            remux(self._part, final, self._format, audio_from, clock.origin, clock.end, clock.step)
            if count_pictures(final) < pictures:
                raise OSError("there is no room for a second copy")
        except av_errors() as error:
            lost = f"the sound of {audio_from}" if audio_from else "its index in front, so it may start later"
            logger.warning("%s is without %s: %s", self.path, lost, reason(error))
            return False
        return True

    def _write_error(self, error: Exception) -> VideoError:
        if not self._frames and not isinstance(error, OSError):
            size = "x".join(map(str, self._size))
            return VideoError(f"{self.path}: H.264 refuses frames of {size} pixels ({reason(error)}); scale them first")
        return VideoError(
            f"{self.path} cannot be written on: {reason(error)}; look for a full disk or a quota at "
            f"{self._target.parent}. What was written so far is kept"
        )


class _Encoder:
    """Pictures → H.264 packets in a file that can be read at any time."""

    def __init__(self, path: Path, size: tuple[int, int], rate: Fraction, options: dict[str, str]):
        import av
        from av.video.reformatter import VideoReformatter

        fragments = {"movflags": "frag_keyframe+delay_moov", "frag_duration": str(_FRAGMENT_MICROSECONDS)}
        self._container = av.open(str(path), "w", format="mp4", container_options=fragments)
        self._stream = self._container.add_stream("libx264", rate=rate, options=options)
        self._stream.width, self._stream.height = (side + side % 2 for side in size)
        context = self._stream.codec_context
        context.pix_fmt = "yuv420p"
        context.time_base = Fraction(1, TICKS)
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = _LIMITED_RANGE
        self._reformatter = VideoReformatter()  # one for all pictures: it keeps its tables

    def write(self, image: npt.NDArray[np.uint8], ticks: int, duration: int) -> None:
        """Encode one picture, [H, W, 3] uint8 BGR, contiguous, its sides even."""
        import av
        from av.video.reformatter import ColorRange, Colorspace

        picture = self._reformatter.reformat(
            av.VideoFrame.from_numpy_buffer(image, format="bgr24"),  # no copy: it is only read
            format="yuv420p",
            dst_colorspace=Colorspace.ITU709,
            src_color_range=ColorRange.JPEG,
            dst_color_range=ColorRange.MPEG,
        )
        picture.pts, picture.time_base = ticks, Fraction(1, TICKS)
        if hasattr(picture, "duration"):  # not in PyAV 14
            picture.duration = duration
        self._feed(picture)

    def close(self) -> None:
        """Write what the encoder holds back, and close the file in any case."""
        try:
            self._feed(None)
        finally:
            self._container.close()

    def _feed(self, picture: av.VideoFrame | None) -> None:
        # One call into C: between two statements a Ctrl-C would lose the packets, and with them pictures.
        deque(map(self._container.mux, map(self._stream.encode, (picture,))), maxlen=0)


class _Clock:
    """The times of frames in ticks: from 0, strictly rising."""

    def __init__(self, fps: float | None) -> None:
        self.rate = Fraction(fps or _DEFAULT_FPS).limit_denominator(1001)
        self.origin = 0.0  # the time of the first frame, in seconds
        self._nominal = fps and max(1, round(TICKS / fps))
        self._step = round(TICKS / _DEFAULT_FPS)  # the last one, or what is to be expected
        self._last: int | None = None
        self._skipped = 0  # ticks

    def at(self, time: float) -> tuple[int, int]:
        """Return when a frame of this time is shown and how long it probably lasts, both in ticks."""
        usual = int(self._nominal or self._step)
        if self._last is None:
            self.origin = time if math.isfinite(time) else 0.0
            self._last, self._step = 0, usual
            return 0, usual
        step = round((time - self.origin) * TICKS) - self._skipped - self._last if math.isfinite(time) else 0
        if step > _LONGEST_STEP:
            self._skipped += step - usual
        self._step = step if 0 < step <= _LONGEST_STEP else usual
        self._last += self._step
        return self._last, int(self._nominal or self._step)

    @property
    def step(self) -> float:
        """What a frame probably lasts, in seconds."""
        return int(self._nominal or self._step) / TICKS

    @property
    def end(self) -> float:
        """When the last frame ends, in seconds after the first one began."""
        return 0.0 if self._last is None else self._last / TICKS + self.step


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
