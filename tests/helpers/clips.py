"""Test clips: numbered frames, a scripted detector, video files, and an HTTP server."""

from __future__ import annotations

import io
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import numpy as np
import supervision as sv
from PIL import Image

BITS = 8
"""Number of gray stripes that encode a frame number: dark for 0, bright for 1."""


def numbered_image(number: int, size: tuple[int, int] = (128, 64)) -> np.ndarray:
    """Return an image that shows its frame number, [H, W, 3] BGR.

    Stripes in the upper half encode a number below 256, and survive lossy codecs. The left part of the lower half is
    red, so that rotations can be detected, and the rest is noise.

    Args:
        number: Frame number.
        size: Width and height.
    """
    width, height = size
    image = np.random.default_rng(number).integers(90, 160, (height, width, 3), dtype=np.uint8)
    for bit in range(BITS):
        stripe = slice(bit * width // BITS, (bit + 1) * width // BITS)
        image[: height // 2, stripe] = 235 if number >> bit & 1 else 20
    image[height // 2 :, : width // 4] = (0, 0, 255)
    return image


def frame_number(image: np.ndarray) -> int:
    """Return the number that `numbered_image` drew."""
    height, width = image.shape[:2]
    middles = [(2 * bit + 1) * width // (2 * BITS) for bit in range(BITS)]
    gray = [image[height // 8 : height // 3, middle - 1 : middle + 2].mean() for middle in middles]
    return sum(1 << bit for bit, value in enumerate(gray) if value > 128)


class MovingObject(NamedTuple):
    """A square object that moves in a straight line.

    Attributes:
        name: Class name.
        center: Center on frame 0, in pixels.
        velocity: Pixels per frame.
        frames: Frames on which a detector finds the object.
        confidence: Confidence of its detections.
        side: Side of its box in pixels.
    """

    name: str
    center: tuple[float, float]
    velocity: tuple[float, float] = (0.0, 0.0)
    frames: range = range(256)
    confidence: float = 0.5
    side: float = 30.0

    def box(self, number: int) -> np.ndarray:
        """Return the box on a frame, [4]."""
        center = np.array(self.center) + number * np.array(self.velocity)
        return np.concatenate((center - self.side / 2, center + self.side / 2))


class ScriptedDetector:
    """Detector that returns the boxes of moving objects on frames of `numbered_image`.

    Attributes:
        keyframes: Numbers of the frames that it was called with.
        busy: Whether a call is running.
        sleep: Function that is called with `seconds` during each call.
    """

    def __init__(
        self,
        *objects: MovingObject,
        seconds: float = 0.0,
        fails: Callable[[int], bool] = lambda number: False,
        read_number: Callable[[np.ndarray], int] = frame_number,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Create a detector.

        Args:
            *objects: Objects to detect.
            seconds: Duration of a call.
            fails: Whether the detector raises on a frame, by frame number.
            read_number: Function that reads the frame number from an image.
            sleep: Function that is called with `seconds` during each call.
        """
        self.objects, self.seconds, self.fails, self.sleep = objects, seconds, fails, sleep
        self._read_number = read_number
        self.keyframes: list[int] = []
        self.busy = False

    def __call__(self, image: np.ndarray, classes: Sequence[str]) -> sv.Detections:
        """Return the detections of a frame."""
        number = self._read_number(image)
        self.keyframes.append(number)
        self.busy = True
        self.sleep(self.seconds)
        self.busy = False
        if self.fails(number):
            raise RuntimeError(f"frame {number} is too much")
        visible = [item for item in self.objects if number in item.frames]
        return sv.Detections(
            xyxy=np.array([item.box(number) for item in visible], np.float32).reshape(-1, 4),
            confidence=np.array([item.confidence for item in visible], np.float32),
            class_id=np.array([classes.index(item.name) for item in visible], int),
            data={"class_name": np.array([item.name for item in visible], dtype=str)},
        )


def write_clip(
    path: Path,
    images: Iterable[np.ndarray],
    *,
    codec: str = "libx264",
    fps: int = 25,
    ticks: Iterable[int] | None = None,
    faststart: bool = False,
    codec_options: dict[str, str] | None = None,
    container_format: str | None = None,
) -> Path:
    """Write a video, and return its path.

    Args:
        path: Target file. Its suffix selects the container.
        images: BGR frames with even sides; may be empty.
        codec: FFmpeg's name of the encoder.
        fps: Frames per second.
        ticks: Presentation time of each frame in milliseconds; default: constant `fps`.
        faststart: Write the index of an MP4 first.
        codec_options: Other options of the encoder.
        container_format: FFmpeg's name of the container; default: by the suffix.
    """
    import av

    images = list(images)
    height, width = images[0].shape[:2] if images else (64, 128)
    options = {"movflags": "faststart"} if faststart else {}
    with av.open(str(path), "w", format=container_format, options=options) as container:
        stream = container.add_stream(codec, rate=fps, options=codec_options or {})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        if codec == "mjpeg":
            stream.pix_fmt = "yuvj420p"
        times = list(ticks) if ticks is not None else None
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="bgr24")
            frame.pts = times[number] if times is not None else number
            frame.time_base = Fraction(1, 1000) if times is not None else Fraction(1, fps)
            container.mux(stream.encode(frame))
        if images:
            container.mux(stream.encode(None))
        else:
            container.start_encoding()
    return path


def set_display_matrix(path: Path, matrix: tuple[int, int, int, int]) -> Path:
    """Write a display matrix into the track header of an MP4.

    Args:
        path: File to change.
        matrix: a, b, c and d of [[a, b], [c, d]], each 1, 0 or -1.
    """
    content = bytearray(path.read_bytes())
    header = content.index(b"tkhd") + 4  # version and flags, two times, id, reserved, duration, then 16 bytes more
    start = header + 4 + (8 + 4 + 4 + 4 if content[header] == 0 else 16 + 4 + 4 + 8) + 16
    a, b, c, d = (value << 16 for value in matrix)
    for offset, value in zip((0, 4, 12, 16), (a, b, c, d), strict=True):
        content[start + offset : start + offset + 4] = value.to_bytes(4, "big", signed=True)
    path.write_bytes(content)
    return path


def truncate(path: Path, share: float) -> Path:
    """Keep only the first part of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


def corrupt_frame(path: Path, number: int) -> Path:
    """Overwrite one encoded frame of a video so that it cannot be decoded.

    Args:
        path: File to change.
        number: Index of the packet, in storage order.
    """
    import av

    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        start, size = packets[number].pos, packets[number].size
    content = bytearray(path.read_bytes())
    content[start : start + size] = b"\xff" * size
    path.write_bytes(content)
    return path


def encode_jpeg(image: np.ndarray) -> bytes:
    """Return a BGR image as a JPEG file."""
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image[..., ::-1])).save(file, "JPEG", quality=90)
    return file.getvalue()


@contextmanager
def deadline(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in a block that takes longer than a number of seconds; no limit on Windows."""
    if not hasattr(signal, "SIGALRM"):
        yield
        return

    def ring(*_: object) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class HTTPReply:
    """Reply to one request of `http_server`.

    Attributes:
        handler: Handler of the request.
        stopping: Event that is set when the server stops.
    """

    def __init__(self, handler: BaseHTTPRequestHandler, stopping: threading.Event) -> None:
        self.handler, self.stopping = handler, stopping

    def start(self, content_type: str, status: int = 200, **headers: str) -> None:
        """Send the status and headers; underscores in header names become hyphens."""
        self.handler.send_response(status)
        self.handler.send_header("Content-Type", content_type)
        for name, value in headers.items():
            self.handler.send_header(name.replace("_", "-"), value)
        self.handler.end_headers()

    def start_mjpeg(self) -> None:
        """Send the headers of an MJPEG stream."""
        self.start("multipart/x-mixed-replace; boundary=frame")

    def send_jpeg(self, image: np.ndarray, pause: float = 0.0) -> None:
        """Send one image of an MJPEG stream, and wait for `pause` seconds."""
        content = encode_jpeg(image)
        head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(content)}\r\n\r\n"
        self.handler.wfile.write(head.encode() + content + b"\r\n")
        self.stopping.wait(pause)

    def send_file(self, content: bytes, content_type: str) -> None:
        """Send a file, or its requested range."""
        requested = self.handler.headers.get("Range")
        if requested is None:
            self.start(content_type, Content_Length=str(len(content)), Accept_Ranges="bytes")
            self.handler.wfile.write(content)
            return
        first, _, last = requested.removeprefix("bytes=").partition("-")
        start, end = int(first), min(int(last or len(content) - 1), len(content) - 1)
        part = content[start : end + 1]
        headers = {"Content-Range": f"bytes {start}-{end}/{len(content)}", "Content-Length": str(len(part))}
        self.start(content_type, 206, **headers)
        self.handler.wfile.write(part)


@contextmanager
def http_server(answer: Callable[[HTTPReply], None]) -> Iterator[str]:
    """Run a local HTTP server, and yield its URL, http://127.0.0.1:PORT.

    Args:
        answer: Function that is called in a thread for each GET request. The connection is closed when it returns.
    """
    stopping = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            with suppress(OSError):  # the client went away
                answer(HTTPReply(self, stopping))

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        stopping.set()
        server.shutdown()
        server.server_close()
        thread.join(240)
