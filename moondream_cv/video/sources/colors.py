"""Convert decoded video frames of any color space to 8-bit BGR images in BT.709 (SDR)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from moondream_cv.errors import VideoError
from moondream_cv.video.sources.base import Colorspace, Image

if TYPE_CHECKING:
    from av.filter import Graph
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

# Code points of ITU-T H.273, which FFmpeg uses as well.
_BT709, _UNSPECIFIED, _BT2020 = 1, 2, 9
_HDR_TRANSFERS = {16: "PQ", 18: "HLG"}
_LIMITED_RANGE, _FULL_RANGE = 1, 2

ACCURATE = 0x2 | 0x2000 | 0x4000 | 0x40000
"""swscale flags for bilinear chroma and exact rounding. Without them, each conversion darkens by up to 3 levels."""

# swscale's index for each matrix of H.273.
_SWSCALE_MATRICES = {1: 1, 4: 4, 5: 5, 6: 5, 7: 7, 9: 9, 10: 9}
_SWSCALE_BT601 = 5


class BGRConverter:
    """Converts the frames of one video, and reuses its conversion tables."""

    def __init__(self, stream: VideoStream, name: str) -> None:
        """Create a converter.

        Args:
            stream: Stream of the frames.
            name: Name of the source in error messages.
        """
        from av.video.reformatter import VideoReformatter

        self._context, self._name = stream.codec_context, name
        self._reformatter = VideoReformatter()
        self._tone_mapping: tuple[tuple[int, int, str, int], Graph] | None = None

    def __call__(self, frame: VideoFrame) -> Image:
        """Convert a frame.

        As in video players, untagged YUV is BT.709 from 1280 columns or 720 rows, and BT.601 below. FFmpeg's perceptual
        tone mapping converts HDR (PQ, HLG) and BT.2020 to BT.709.

        Args:
            frame: Decoded frame.

        Returns:
            [H, W, 3] uint8 BGR, full range, in the stored orientation.

        Raises:
            VideoError: The video is HDR, and FFmpeg in this PyAV cannot convert it to SDR.
            FFmpegError, ValueError: The pixels cannot be converted.
        """
        primaries = getattr(frame, "color_primaries", self._context.color_primaries)  # in PyAV 14 only on the context
        if self._hdr_transfer(frame) is not None or primaries == _BT2020:
            mapped = self._tone_mapped(frame)
            if mapped is not None:
                return mapped
        kind = frame.format.name
        if frame.format.is_rgb or kind.startswith(("gray", "pal", "mono")):
            converted = self._reformatter.reformat(frame, format="bgr24", interpolation=ACCURATE)
        else:
            is_full = frame.color_range == _FULL_RANGE or kind.startswith("yuvj")
            converted = self._reformatter.reformat(
                frame,
                format="bgr24",
                interpolation=ACCURATE,
                src_colorspace=_swscale_matrix(frame),
                src_color_range=_FULL_RANGE if is_full else _LIMITED_RANGE,
                dst_color_range=_FULL_RANGE,
            )
        return np.asarray(converted.to_ndarray(), np.uint8)

    @staticmethod
    def colorspace(frame: VideoFrame) -> Colorspace:
        """Return the color matrix of a frame."""
        return "bt709" if _swscale_matrix(frame) in (_BT709, _BT2020) else "bt601"

    def _tone_mapped(self, frame: VideoFrame) -> Image | None:
        """Return a frame mapped to BT.709; None if it is SDR and this FFmpeg has no tone mapping."""
        import av

        transfer = self._hdr_transfer(frame)
        if frame.colorspace == _UNSPECIFIED and not frame.format.is_rgb:
            frame.colorspace = _BT2020
        key = (frame.width, frame.height, frame.format.name, int(frame.colorspace))
        try:
            if self._tone_mapping is None or self._tone_mapping[0] != key:
                self._tone_mapping = (key, _tone_mapping_graph(frame))
            graph = self._tone_mapping[1]
            graph.push(frame)
            return np.asarray(_pulled(graph).to_ndarray(), np.uint8)
        except (av.error.OptionNotFoundError, av.error.FilterNotFoundError):  # FFmpeg before 8
            if transfer is None:
                return None
            raise VideoError(
                f"{self._name} is HDR video ({transfer}), and PyAV {av.__version__} cannot convert it to SDR; upgrade "
                "to PyAV 16 or later (pip install -U av), or convert the video to SDR first"
            ) from None

    def _hdr_transfer(self, frame: VideoFrame) -> str | None:
        return _HDR_TRANSFERS.get(int(getattr(frame, "color_trc", self._context.color_trc)))


def usual_colorspace(width: int, height: int) -> Colorspace:
    """Return the color matrix that players assume for an untagged video of this size."""
    return "bt709" if width >= 1280 or height >= 720 else "bt601"


def _pulled(graph: Graph) -> Any:
    return graph.pull()  # a video frame; the stubs also allow audio frames


def _swscale_matrix(frame: VideoFrame) -> int:
    matrix = int(frame.colorspace)
    if matrix in _SWSCALE_MATRICES:
        return _SWSCALE_MATRICES[matrix]
    return _BT709 if usual_colorspace(frame.width, frame.height) == "bt709" else _SWSCALE_BT601


def _tone_mapping_graph(frame: VideoFrame) -> Graph:
    """Return a filter graph that converts frames of this format to 8-bit BGR in BT.709.

    Raises:
        OptionNotFoundError: The scale filter has no transfer functions (FFmpeg before 8).
    """
    import av

    graph = av.filter.Graph()
    source = graph.add(
        "buffer", f"video_size={frame.width}x{frame.height}:pix_fmt={frame.format.name}:time_base=1/1000000"
    )
    scale = graph.add("scale", "out_transfer=bt709:out_primaries=bt709:intent=perceptual")
    pixels = graph.add("format", "bgr24")
    sink = graph.add("buffersink")
    for first, second in ((source, scale), (scale, pixels), (pixels, sink)):
        first.link_to(second)
    graph.configure()
    return graph
