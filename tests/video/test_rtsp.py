"""RTSP over TCP and UDP against GStreamer's server. Run with `pytest tests/video/test_rtsp.py`."""

from __future__ import annotations

import functools
import logging
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest

from moondream_cv.errors import VideoError
from moondream_cv.video import Summary, annotate_video, open_source
from tests.helpers.clips import deadline, frame_number, numbered_image, write_clip
from tests.helpers.signals import default_signals
from tests.video.test_formats import no_objects, video_frames

SYSTEM_PYTHON = "/usr/bin/python3"  # has python3-gi from the system packages
FPS = 25
SERVER = """
import sys
import gi
gi.require_version("Gst", "1.0")
gi.require_version("GstRtsp", "1.0")
gi.require_version("GstRtspServer", "1.0")
from gi.repository import GLib, Gst, GstRtsp, GstRtspServer

clip, port, transport = sys.argv[1:]
Gst.init(None)
server = GstRtspServer.RTSPServer()
server.set_address("127.0.0.1")
server.set_service(port)
factory = GstRtspServer.RTSPMediaFactory()
factory.set_launch(f'( filesrc location="{clip}" ! qtdemux ! rtph264pay name=pay0 pt=96 config-interval=-1 )')
factory.set_protocols(getattr(GstRtsp.RTSPLowerTrans, transport))
server.get_mount_points().add_factory("/clip", factory)
if not server.attach(None):
    sys.exit("the port is taken")
print(server.get_bound_port(), flush=True)
GLib.MainLoop().run()
"""


@functools.cache
def missing() -> str:
    """Return the reason why the server cannot run here; empty if it can."""
    if not shutil.which(SYSTEM_PYTHON):
        return f"there is no {SYSTEM_PYTHON}"
    check = "import gi; gi.require_version('GstRtspServer', '1.0'); gi.require_version('GstRtsp', '1.0')\n"
    check += "from gi.repository import Gst; Gst.init(None)\n"
    check += "assert Gst.ElementFactory.find('rtph264pay') and Gst.ElementFactory.find('qtdemux')"
    done = subprocess.run([SYSTEM_PYTHON, "-c", check], capture_output=True, check=False, timeout=120)
    packages = "gir1.2-gst-rtsp-server-1.0 gstreamer1.0-plugins-good python3-gi"
    return f"GStreamer's RTSP server is not installed (apt-get install {packages})" if done.returncode else ""


@pytest.fixture(autouse=True)
def _in_time() -> Iterator[None]:
    if missing():
        pytest.skip(missing())
    with deadline(240):
        yield


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rtsp") / "clip.mp4"
    images = [numbered_image(number, (256, 128)) for number in range(250)]
    # With threads, frames consist of slices, and the server sends each slice as a frame.
    return write_clip(path, images, fps=FPS, codec_options={"bf": "0", "g": "10", "threads": "1"})


class Server:
    """RTSP server that sends a clip from its start to every client."""

    def __init__(self, clip: Path, transport: str) -> None:
        self._arguments = (str(clip), transport)
        self.port = 0
        self.start()

    def start(self) -> None:
        clip, transport = self._arguments
        command = [SYSTEM_PYTHON, "-c", SERVER, clip, str(self.port), transport]
        with default_signals():
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()

    @property
    def url(self) -> str:
        return f"rtsp://127.0.0.1:{self.port}/clip"


@pytest.fixture
def server(clip: Path, request: pytest.FixtureRequest) -> Iterator[Server]:
    started = Server(clip, request.param)
    yield started
    started.kill()


class Seen(logging.Handler):
    """Log handler that sets an event when a text is logged."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.event = text, threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        if self.text in record.getMessage():
            self.event.set()


@pytest.mark.parametrize("server", ["TCP", "UDP"], indirect=True)
def test_frame_times_follow_the_stream_clock(server: Server) -> None:
    with open_source(server.url, reconnect_for=0) as source:
        frames = [next(source) for _ in range(60)]
        assert (source.live, source.fps, source.resolution_wh) == (True, FPS, (256, 128))
    numbers = np.array([frame_number(frame.image) for frame in frames])
    assert (np.diff(numbers) > 0).all()
    times = np.array([frame.time for frame in frames])
    # FFmpeg shifts the timestamps once, at the first sender report.
    wrong = np.abs(np.diff(times) - np.diff(numbers) / FPS) > 0.005
    assert wrong.sum() <= 1
    assert times[-1] == pytest.approx((numbers[-1] - numbers[0]) / FPS, abs=0.5)


@pytest.mark.parametrize("server", ["TCP", "UDP"], indirect=True)
def test_interruption_becomes_a_gap_of_the_same_length(server: Server, tmp_path: Path) -> None:
    target, before, after = tmp_path / "out.mp4", 30, 30
    lost = Seen("was lost")
    logging.getLogger("moondream_cv.video.sources.live").addHandler(lost)
    times: list[float] = []
    arrived: list[float] = []

    def restart() -> None:
        lost.event.wait(240)
        server.start()

    restarting = threading.Thread(target=restart)

    def on_frame(summary: Summary) -> None:
        times.append(summary.seconds)
        arrived.append(time.monotonic())
        if summary.frames == before:
            server.kill()
            restarting.start()
        if summary.frames == before + after:
            source.close()

    try:
        with open_source(server.url, read_timeout=2, reconnect_for=120) as source:
            annotate_video(source, target, "dog", model=no_objects, annotate="none", every=10, on_frame=on_frame)
    finally:
        logging.getLogger("moondream_cv.video.sources.live").removeHandler(lost)
        restarting.join()
    assert len(times) == before + after
    steps = np.diff(times)
    gap = int(steps.argmax())
    assert gap >= before - 1
    assert steps[gap] > 0.5
    assert steps[gap] == pytest.approx(arrived[gap + 1] - arrived[gap], abs=1.0)
    shown, _ = video_frames(target)
    assert shown == pytest.approx(np.subtract(times, times[0]).tolist(), abs=1e-3)
    with av.open(str(target)) as opened:
        assert opened.duration / 1e6 == pytest.approx(times[-1] - times[0] + 1 / FPS, abs=1 / FPS)


def test_missing_rtsp_stream_is_reported(clip: Path) -> None:
    server = Server(clip, "TCP")
    try:
        with pytest.raises(VideoError, match=r"rtsp://127\.0\.0\.1:\d+/none cannot be opened as a video: .*404"):
            open_source(server.url.replace("clip", "none"))
    finally:
        server.kill()
