"""`open_source`: any source of frames → one kind of object that gives them one after another.

Reading is left to `container` (video files), `animations` (image files with several frames), `images_folder` (images,
iterables) and `live` (webcams, streams).
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from moondream_cv.errors import VideoError
from moondream_cv.images import IMAGE_SUFFIXES, readable_formats
from moondream_cv.video.sources.animations import MIN_FPS, frame_info, image_format, open_animation
from moondream_cv.video.sources.base import ASSUMED_FPS, Source
from moondream_cv.video.sources.container import open_file, open_finite
from moondream_cv.video.sources.image_folder import images_of, open_images, open_iterable
from moondream_cv.video.sources.live import LiveReader, check_times, open_stream, stream_frames, webcam_frames

__all__ = ["ASSUMED_FPS", "Source", "SourceInput", "open_source", "url_name"]

SourceInput: TypeAlias = str | os.PathLike[str] | int | Iterable[Any] | Source
"""A path, a glob, a URL, the index of a webcam, an iterable of images, or a source that is open already."""

MAX_FPS = 1000.0
"""Highest frame rate of images and iterables."""

logger = logging.getLogger(__name__)

_URL = re.compile(r"([a-z][a-z0-9+.-]+)://", re.IGNORECASE)  # two letters at least, since "C://" is a drive
_STREAMS = ("http", "https", "rtmp", "rtmps", "rtp", "rtsp", "rtsps", "srt", "tcp", "udp")
_CONTAINERS = {".avif", ".gif", ".heic", ".heif", ".hif"}  # FFmpeg reads those that Pillow cannot; some .gif are MP4
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
    """Open whatever has frames, and read the first one.

    Files, images and iterables give every frame. Webcams and streams are live: frames that nobody fetched in time are
    dropped, and a source that is lost is opened again for a while. A video of known length behind an HTTP(S) URL is
    read like a file.

    Args:
        source: One of
            the path of a video file;
            the path of an animated GIF, WebP, PNG or AVIF: its frames with their durations, on white if transparent;
            the path of a TIFF with several pages, which are separate images;
            a folder of images, or a glob like "frames/*.jpg", in natural order: img2 before img10;
            a pattern with the frame number like "frames/%04d.png", as in FFmpeg and OpenCV;
            the index of a webcam, also as digits or as "/dev/video0";
            the URL of a stream: RTSP, RTMP, HTTP(S), SRT, UDP, TCP or RTP;
            an iterable of images of any kind that `moondream_cv.images.to_rgb` takes (arrays are BGR), or of `Frame`s;
            an open `Source`, which is returned as it is.
        fps: Frames per second of images and iterables, which have no clock; None for `ASSUMED_FPS`. `Frame`s of
            an iterable keep their times.
        open_timeout: Seconds that opening a live source or a URL may take.
        read_timeout: Seconds that may pass without a frame before it counts as lost.
        reconnect_for: Seconds in which a lost live source is opened again and again; 0 for not at all.

    Returns:
        The source, to be closed by the caller; best with `with`.

    Raises:
        VideoError: There is no such thing, it cannot be opened, or has no frames.
        ValueError: `source` is of another kind, a number of seconds or `fps` is out of range, or `fps` is given for a
            source that has frame times.
    """
    check_fps(fps)
    check_times(open_timeout, read_timeout, reconnect_for)
    live = partial(LiveReader, open_timeout=open_timeout, read_timeout=read_timeout, reconnect_for=reconnect_for)
    if isinstance(source, Source):
        _reject_fps(fps, f"{source.name} is open already")
        return source
    if isinstance(source, (int, np.integer)) and not isinstance(source, bool):
        if source < 0:
            raise ValueError(f"a webcam's index is 0 or more, not {source}")
        _reject_fps(fps, f"webcam {source} is live")
        return live(webcam_frames(int(source)), name=f"webcam {source}")
    if isinstance(source, str) and (webcam := _WEBCAM.fullmatch(source.strip())):
        index = int(webcam[1])
        _reject_fps(fps, f"webcam {index} is live")
        return live(webcam_frames(index), name=f"webcam {index}")
    if isinstance(source, str) and (url := _URL.match(source)):
        if url[1].lower() not in _STREAMS:
            raise VideoError(
                f"{url_name(source)} cannot be read; of URLs, {', '.join(_STREAMS)} can. Pass files as paths"
            )
        _reject_fps(fps, f"{url_name(source)} has frame times")
        return _open_url(source, live, (open_timeout, read_timeout))
    if isinstance(source, (str, os.PathLike)):
        return _open_path(os.fspath(source), fps)
    if isinstance(source, np.ndarray) and source.ndim < 4:
        raise ValueError(f"the array of shape {source.shape} is not a sequence of frames; pass a list of images")
    if isinstance(source, (bytes, bytearray, memoryview, Mapping)) or not isinstance(source, Iterable):
        raise ValueError(
            f"frames come from a path, a URL, a webcam's index or an iterable of images, not {type(source).__name__}"
        )
    return open_iterable(source, fps)


def check_fps(fps: float | None) -> None:
    """Check a frame rate.

    Raises:
        ValueError: It is not a number from `MIN_FPS` to `MAX_FPS`.
    """
    if fps is None:
        return
    if isinstance(fps, bool) or not isinstance(fps, Real) or not MIN_FPS <= fps <= MAX_FPS:  # NaN is not
        raise ValueError(f"fps must be between {MIN_FPS:g} and {MAX_FPS:g}, got {fps!r}")


def url_name(url: str) -> str:
    """Return a URL as messages may show it: without user and password, and with the values of keys masked."""
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
        raise ValueError(f"fps={fps:g} is for images and iterables, which have no clock; {why}, so leave fps out")


def _open_path(text: str, fps: float | None) -> Source:
    if not text:
        raise VideoError("the path of the video is empty")
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
    if not path.is_file():  # opening a pipe or a device could block for ever
        raise VideoError(f"{text!r} is not a regular file; of a webcam, pass its index")
    if info := frame_info(path):
        if info.is_timed:
            _reject_fps(fps, f"{text!r} has frame times")
        return open_animation(path, info, repr(text), fps)
    kind = image_format(path)
    if kind in readable_formats() or path.suffix.lower() in IMAGE_SUFFIXES - _CONTAINERS:
        return open_images([path], repr(text), fps)
    if kind is not None:
        logger.warning("%r is read by FFmpeg, without an animation it may hold: this Pillow reads no %s", text, kind)
    _reject_fps(fps, f"{text!r} has frame times")
    return open_file(path, repr(text))
