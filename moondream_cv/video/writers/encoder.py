"""`H264Encoder`: encode images as H.264 in a fragmented MP4, which is playable at any time."""

from __future__ import annotations

from collections import deque
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from moondream_cv.video.sources.base import Colorspace
from moondream_cv.video.sources.colors import ACCURATE

if TYPE_CHECKING:
    import av

Preset = Literal[
    "ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow", "placebo"
]
"""Preset of libx264: slower presets make smaller files."""

TICKS = 90_000  # per second; usual frame durations are whole numbers of ticks

_FRAGMENT_MICROSECONDS = 250_000
_BUFFERED_SECONDS = 0.5  # maximum delay of the encoder
_USUAL_LOOKAHEAD = 10  # frames, as in the preset veryfast
_BT709, _BT601 = 1, 6  # H.273 code points
_LIMITED_RANGE = 1


class H264Encoder:
    """Writes yuv420p in limited range to a fragmented MP4.

    At most 0.5 s of video are in the encoder and 0.25 s in a fragment. The rest is on disk.
    """

    def __init__(
        self,
        path: Path,
        size: tuple[int, int],
        *,
        rate: Fraction,
        crf: int,
        preset: Preset,
        colorspace: Colorspace,
        sample_aspect_ratio: Fraction | None,
    ) -> None:
        """Open the file.

        Args:
            path: File to write.
            size: Width and height of the images. Odd sides are rounded up to even ones.
            rate: Nominal frames per second.
            crf: Quality from 1 (best) to 51.
            preset: Preset of libx264.
            colorspace: Color matrix from RGB to YUV, stored in the file.
            sample_aspect_ratio: Width of a pixel divided by its height; None for square pixels.

        Raises:
            FFmpegError, OSError, ValueError: The file cannot be opened.
        """
        import av
        from av.video.reformatter import VideoReformatter

        self._container = av.open(
            str(path),
            "w",
            format="mp4",
            container_options={
                "movflags": "frag_keyframe+delay_moov",
                "frag_duration": str(_FRAGMENT_MICROSECONDS),
                "flush_packets": "1",
            },
        )
        options = {"crf": str(crf), "preset": preset, **_delay_options(rate, preset)}
        self._stream = self._container.add_stream("libx264", rate=rate, options=options)
        self._stream.width, self._stream.height = (side + side % 2 for side in size)
        context = self._stream.codec_context
        context.pix_fmt = "yuv420p"
        context.time_base = Fraction(1, TICKS)
        context.color_primaries = context.color_trc = _BT709
        context.colorspace = _BT709 if colorspace == "bt709" else _BT601
        context.color_range = _LIMITED_RANGE
        context.sample_aspect_ratio = sample_aspect_ratio or Fraction(1)
        self._colorspace = colorspace
        self._reformatter = VideoReformatter()  # reuses its tables for all images
        self._is_encoding = False

    def write(self, image: npt.NDArray[np.uint8], ticks: int) -> None:
        """Encode one image.

        Args:
            image: [H, W, 3] uint8 BGR, contiguous, with even sides.
            ticks: Presentation time.
        """
        import av
        from av.video.reformatter import ColorRange
        from av.video.reformatter import Colorspace as Matrix

        frame = self._reformatter.reformat(
            av.VideoFrame.from_numpy_buffer(image, format="bgr24"),  # no copy: the buffer is only read
            format="yuv420p",
            interpolation=ACCURATE,
            dst_colorspace=Matrix.ITU709 if self._colorspace == "bt709" else Matrix.ITU601,
            src_color_range=ColorRange.JPEG,
            dst_color_range=ColorRange.MPEG,
        )
        frame.pts, frame.time_base = ticks, Fraction(1, TICKS)
        self._encode(frame)
        self._is_encoding = True

    def close(self) -> None:
        """Flush the encoder, and close the file in any case."""
        try:
            if self._is_encoding:  # PyAV 19 crashes if it flushes an encoder that failed to start
                self._encode(None)
        finally:
            self._container.close()

    def _encode(self, frame: av.VideoFrame | None) -> None:
        # One call into C: Ctrl-C between two statements would lose packets.
        deque(map(self._container.mux, map(self._stream.encode, (frame,))), maxlen=0)


def _delay_options(rate: Fraction, preset: Preset) -> dict[str, str]:
    """Return libx264 options that limit its delay to `_BUFFERED_SECONDS`, and make it store the nominal frame rate.

    Without force-cfr, it would store the tick rate as the frame rate.
    """
    frames = int(rate * Fraction(_BUFFERED_SECONDS))
    if frames < 2:
        return {"tune": "zerolatency", "x264-params": "force-cfr=1"}
    parameters = ["force-cfr=1", "sync-lookahead=0"]
    if preset not in ("ultrafast", "superfast"):  # these presets have no lookahead
        b_frames = min(3, frames // 3)
        lookahead = min(_USUAL_LOOKAHEAD, frames - b_frames)
        parameters += [f"bframes={b_frames}", f"rc-lookahead={lookahead}"]
    return {"x264-params": ":".join(parameters)}
