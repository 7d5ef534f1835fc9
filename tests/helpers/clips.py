"""Small videos written for a test: frames that tell their number, a detector that knows them, files, an HTTP server."""

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
"""A frame tells its number by as many grey stripes, dark for 0 and bright for 1."""


def numbered(number: int, size: tuple[int, int] = (128, 64)) -> np.ndarray:
    """[H, W, 3] BGR: stripes that tell a number below 256 and survive a codec, over red, and over noise as of a camera.

    The stripes fill the upper half, red the left of the lower one, so that a turned frame is told from an upright one.
    """
    width, height = size
    image = np.random.default_rng(number).integers(90, 160, (height, width, 3), dtype=np.uint8)
    for bit in range(BITS):
        stripe = slice(bit * width // BITS, (bit + 1) * width // BITS)
        image[: height // 2, stripe] = 235 if number >> bit & 1 else 20
    image[height // 2 :, : width // 4] = (0, 0, 255)
    return image


def number_of(image: np.ndarray) -> int:
    """The number that `numbered` drew."""
    height, width = image.shape[:2]
    middles = [(2 * bit + 1) * width // (2 * BITS) for bit in range(BITS)]
    grey = [image[height // 8 : height // 3, middle - 1 : middle + 2].mean() for middle in middles]
    return sum(1 << bit for bit, value in enumerate(grey) if value > 128)


class Thing(NamedTuple):
    """Moves in a straight line.

    Attributes:
        centre: On frame 0.
        speed: Pixels a frame.
        seen: On which frames a detector sees it.
        confidence: Of the detector.
    """

    name: str
    centre: tuple[float, float]
    speed: tuple[float, float] = (0.0, 0.0)
    seen: range = range(256)
    confidence: float = 0.5
    side: float = 30.0

    def box(self, number: int) -> np.ndarray:
        middle = np.array(self.centre) + number * np.array(self.speed)
        return np.concatenate((middle - self.side / 2, middle + self.side / 2))


class Known:
    """A detector that knows what is on each frame of `numbered`.

    Attributes:
        keyframes: The numbers of the frames that it was shown.
        busy: Whether it is at it.
        sleep: Called with `seconds` during each call.
    """

    def __init__(
        self,
        *things: Thing,
        seconds: float = 0.0,
        fails: Callable[[int], bool] = lambda number: False,
        tell: Callable[[np.ndarray], int] = number_of,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.things, self.seconds, self.fails, self.tell, self.sleep = things, seconds, fails, tell, sleep
        self.keyframes: list[int] = []
        self.busy = False

    def __call__(self, image: np.ndarray, classes: Sequence[str]) -> sv.Detections:
        number = self.tell(image)
        self.keyframes.append(number)
        self.busy = True
        self.sleep(self.seconds)
        self.busy = False
        if self.fails(number):
            raise RuntimeError(f"frame {number} is too much")
        seen = [thing for thing in self.things if number in thing.seen]
        return sv.Detections(
            xyxy=np.array([thing.box(number) for thing in seen], np.float32).reshape(-1, 4),
            confidence=np.array([thing.confidence for thing in seen], np.float32),
            class_id=np.array([classes.index(thing.name) for thing in seen], int),
            data={"class_name": np.array([thing.name for thing in seen], dtype=str)},
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
    """Write a video of BGR frames of even size, and return its path.

    Args:
        path: Its suffix chooses the container.
        images: The frames; there may be none.
        codec: Of FFmpeg.
        fps: Frames per second.
        ticks: When each frame is shown, in thousandths of a second; by default evenly, by `fps`.
        faststart: Whether an MP4's index comes first.
        codec_options: Further ones of the encoder.
        container_format: In place of what the suffix says.
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


def turn(path: Path, matrix: tuple[int, int, int, int]) -> Path:
    """Write a display matrix into an MP4's track header: [[a, b], [c, d]], of 1, 0 and -1."""
    content = bytearray(path.read_bytes())
    header = content.index(b"tkhd") + 4  # version and flags, two times, id, reserved, duration, then 16 bytes more
    start = header + 4 + (8 + 4 + 4 + 4 if content[header] == 0 else 16 + 4 + 4 + 8) + 16
    a, b, c, d = (value << 16 for value in matrix)
    for offset, value in zip((0, 4, 12, 16), (a, b, c, d), strict=True):
        content[start + offset : start + offset + 4] = value.to_bytes(4, "big", signed=True)
    path.write_bytes(content)
    return path


def cut(path: Path, share: float) -> Path:
    """Leave only the first part of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


def damage(path: Path, number: int) -> Path:
    """Overwrite one coded frame of a video so that no decoder can make anything of it; counted as they are stored."""
    import av

    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        start, size = packets[number].pos, packets[number].size
    content = bytearray(path.read_bytes())
    content[start : start + size] = b"\xff" * size
    path.write_bytes(content)
    return path


def jpeg(image: np.ndarray) -> bytes:
    """A BGR image as a JPEG file."""
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image[..., ::-1])).save(file, "JPEG", quality=90)
    return file.getvalue()


@contextmanager
def deadline(seconds: int) -> Iterator[None]:
    """Fail what hangs: raise TimeoutError after so many seconds, where the system has alarms (Windows has none)."""
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


class Reply:
    """One request to `serving`: where the handler writes, and an event that ends a wait when the server stops."""

    def __init__(self, handler: BaseHTTPRequestHandler, stopping: threading.Event) -> None:
        self.handler, self.stopping = handler, stopping

    def start(self, content_type: str, status: int = 200, **headers: str) -> None:
        """Send status and headers; underscores stand for hyphens."""
        self.handler.send_response(status)
        self.handler.send_header("Content-Type", content_type)
        for name, value in headers.items():
            self.handler.send_header(name.replace("_", "-"), value)
        self.handler.end_headers()

    def start_mjpeg(self) -> None:
        """Announce JPEGs one after another."""
        self.start("multipart/x-mixed-replace; boundary=frame")

    def send_jpeg(self, image: np.ndarray, pause: float = 0.0) -> None:
        """Send one picture of an MJPEG stream, and wait."""
        content = jpeg(image)
        head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(content)}\r\n\r\n"
        self.handler.wfile.write(head.encode() + content + b"\r\n")
        self.stopping.wait(pause)

    def send_file(self, content: bytes, content_type: str) -> None:
        """Send a file, or the part of it that was asked for."""
        asked = self.handler.headers.get("Range")
        if asked is None:
            self.start(content_type, Content_Length=str(len(content)), Accept_Ranges="bytes")
            self.handler.wfile.write(content)
            return
        first, _, last = asked.removeprefix("bytes=").partition("-")
        start, end = int(first), min(int(last or len(content) - 1), len(content) - 1)
        part = content[start : end + 1]
        headers = {"Content-Range": f"bytes {start}-{end}/{len(content)}", "Content-Length": str(len(part))}
        self.start(content_type, 206, **headers)
        self.handler.wfile.write(part)


@contextmanager
def serving(answer: Callable[[Reply], None]) -> Iterator[str]:
    """Run an HTTP server of one's own on this machine and give its address, http://127.0.0.1:PORT.

    Args:
        answer: Called in a thread for each GET request; the connection is closed when it returns.
    """
    stopping = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            with suppress(OSError):  # the client went away
                answer(Reply(self, stopping))

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
