"""`open_source`: open a video file, images, a webcam, a stream or an iterable as a `Source`.

The sources are implemented in `container` (video files), `animations` (image files with several frames),
`image_folder` (images and iterables) and `live` (webcams and streams).
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from moondream_cv.arguments import check_range
from moondream_cv.errors import VideoError
from moondream_cv.images import IMAGE_SUFFIXES, readable_formats
from moondream_cv.video.sources.animations import MIN_FPS, frame_info, image_format, open_animation
from moondream_cv.video.sources.base import ASSUMED_FPS, Source
from moondream_cv.video.sources.container import open_file, open_finite
from moondream_cv.video.sources.image_folder import images_of, open_images, open_iterable
from moondream_cv.video.sources.live import LiveReader, check_times, open_stream, stream_frames, webcam_frames

__all__ = ["ASSUMED_FPS", "Source", "SourceInput", "open_source", "url_name"]

SourceInput: TypeAlias = str | os.PathLike[str] | int | Iterable[Any] | Source
"""Path, glob, URL, webcam index, iterable of images, or open source."""

MAX_FPS = 1000.0
"""Highest frame rate of images and iterables."""

logger = logging.getLogger(__name__)

_URL = re.compile(r"([a-z][a-z0-9+.-]+)://", re.IGNORECASE)  # at least two letters: "C://" is a drive
_STREAMS = ("http", "https", "rtmp", "rtmps", "rtp", "rtsp", "rtsps", "srt", "tcp", "udp")
_CONTAINERS = {".avif", ".gif", ".heic", ".heif", ".hif"}  # FFmpeg reads them if Pillow cannot; some .gif files are MP4
_WEBCAM = re.compile(r"(?:/dev/video)?([0-9]+)", re.ASCII)
_SECRET = re.compile(r"((?:^|&)[^=&]*(?:auth|key|login|pass|pw|secret|sig|token|user)[^=&]*)=[^&]*", re.IGNORECASE)


def open_source(
    source: SourceInput,
    *,
    fps: float | None = None,
    open_timeout: float = 10.0,
    read_timeout: float = 10.0,
    reconnect_for: float = 30.0,
) -> Source:
    """Open a source of frames, and read the first frame.

    Files, images and iterables yield every frame. Webcams and streams are live: frames that are not fetched in time are
    dropped, and a lost connection is retried for `reconnect_for` seconds. A video of known length behind an HTTP(S) URL
    is read like a file.

    Args:
        source: One of
            the path of a video file;
            the path of an animated GIF, WebP, PNG or AVIF: its frames with their durations, on white if transparent;
            the path of a TIFF with several pages, which are separate images;
            a folder of images, or a glob like "frames/*.jpg", in natural order: img2 before img10;
            a pattern with the frame number like "frames/%04d.png", as in FFmpeg and OpenCV;
            the index of a webcam, also as digits or as "/dev/video0";
            the URL of a stream: RTSP, RTMP, HTTP(S), SRT, UDP, TCP or RTP;
            an iterable of images of any type that `moondream_cv.images.to_rgb` accepts (arrays are BGR), or of
            `Frame`s;
            an open `Source`, which is returned unchanged.
        fps: Frames per second of images and iterables, which have no times; default: `ASSUMED_FPS`. `Frame`s of an
            iterable keep their times.
        open_timeout: Maximum seconds for opening a live source or a URL.
        read_timeout: Maximum seconds without a frame before a live source counts as lost.
        reconnect_for: Seconds in which a lost live source is retried; 0 never retries.

    Returns:
        The open source. Close it with `close` or a `with` block.

    Raises:
        VideoError: The source does not exist, cannot be opened, or has no frames.
        ValueError: `source` has another type, a number of seconds or `fps` is out of range, or `fps` is set for a
            source that has frame times.
    """
    # Check the arguments
    check_fps(fps)
    check_times(open_timeout, read_timeout, reconnect_for)
    live = partial(LiveReader, open_timeout=open_timeout, read_timeout=read_timeout, reconnect_for=reconnect_for)

    # Open sources, webcams, URLs and paths
    if isinstance(source, Source):
        _reject_fps(fps, f"{source.name} is already open")
        return source
    if isinstance(source, (int, np.integer)) and not isinstance(source, bool):
        if source < 0:
            raise ValueError(f"a webcam index must be 0 or more, got {source}")
        _reject_fps(fps, f"webcam {source} is live")
        return live(webcam_frames(int(source)), name=f"webcam {source}")
    if isinstance(source, str) and (webcam := _WEBCAM.fullmatch(source.strip())):
        index = int(webcam[1])
        _reject_fps(fps, f"webcam {index} is live")
        return live(webcam_frames(index), name=f"webcam {index}")
    if isinstance(source, str) and (url := _URL.match(source)):
        if url[1].lower() not in _STREAMS:
            raise VideoError(
                f"{url_name(source)} has an unsupported scheme; use one of {', '.join(_STREAMS)}, or the path of a file"
            )
        _reject_fps(fps, f"{url_name(source)} has frame times")
        return _open_url(source, live, (open_timeout, read_timeout))
    if isinstance(source, (str, os.PathLike)):
        return _open_path(os.fspath(source), fps)

    # Open iterables
    if isinstance(source, np.ndarray) and source.ndim < 4:
        raise ValueError(f"an array of shape {source.shape} is not a sequence of frames; pass a list of images")
    if isinstance(source, (bytes, bytearray, memoryview, Mapping)) or not isinstance(source, Iterable):
        raise ValueError(
            "source must be a path, a URL, a webcam index or an iterable of images, "
            f"got {type(source).__name__}: {source!r:.100}"
        )
    return open_iterable(source, fps)


def check_fps(fps: float | None) -> None:
    """Check a frame rate; None is valid.

    Raises:
        ValueError: The frame rate is not a number from `MIN_FPS` to `MAX_FPS`.
    """
    if fps is not None:
        check_range("fps", fps, MIN_FPS, MAX_FPS)


def url_name(url: str) -> str:
    """Return a URL without its user and password, and with the values of secret parameters masked."""
    scheme, _, rest = url.partition("://")
    rest, _, query = rest.partition("?")
    host, slash, path = rest.partition("/")
    if "@" in host:
        host = host.rpartition("@")[2]
    elif "@" in path + query and not re.fullmatch(r"(\[.*\]|[^:]*)(:[0-9]*)?", host):
        return f"{scheme}://..."  # a password with a slash or a question mark in it
    masked = _SECRET.sub(r"\1=...", query)
    return f"{scheme}://{host}{slash}{path}{'?' if query else ''}{masked}"


def _open_url(url: str, live: partial[LiveReader], timeout: tuple[float, float]) -> Source:
    name = url_name(url)
    opened = None
    if url.lower().startswith(("http://", "https://")):
        reopen = partial(open_stream, url, name=name, timeout=timeout)
        opened = reopen()
        if opened.duration:
            return open_finite(opened, reopen, name=name, is_file=False)
    return live(stream_frames(url, name=name, timeout=timeout, opened=opened), name=name)


def _reject_fps(fps: float | None, why: str) -> None:
    if fps is not None:
        raise ValueError(f"fps={fps:g} is for images and iterables without times; {why}, so omit fps")


def _open_path(text: str, fps: float | None) -> Source:
    if not text:
        raise VideoError("the path of the video must not be empty")
    try:
        path = Path(text).expanduser()
        exists = path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # "~nobody", a NUL in the path, too long
        raise VideoError(f"{text!r} is not a path: {error}") from error
    files = images_of(path)
    if files is not None:
        return open_images(files, repr(text), fps)
    if not exists:
        raise VideoError(f"{text!r}: no such file or folder")
    if not path.is_file():  # opening a pipe or a device could block forever
        raise VideoError(f"{text!r} is not a regular file; for a webcam, pass its index")
    if info := frame_info(path):
        if info.is_timed:
            _reject_fps(fps, f"{text!r} has frame times")
        return open_animation(path, info, repr(text), fps)
    kind = image_format(path)
    if kind in readable_formats() or path.suffix.lower() in IMAGE_SUFFIXES - _CONTAINERS:
        return open_images([path], repr(text), fps)
    if kind is not None:
        logger.warning("%r is read by FFmpeg as a still image, because this Pillow cannot read %s", text, kind)
    _reject_fps(fps, f"{text!r} has frame times")
    return open_file(path, repr(text))
