"""Webcams and streams: newest frames and reconnection. Run with `pytest tests/video/test_live.py`."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from itertools import count, islice
from types import SimpleNamespace

import numpy as np
import pytest

from moondream_cv.errors import VideoError
from moondream_cv.video.sources import live
from moondream_cv.video.sources.live import LiveReader
from moondream_cv.video.sources.opening import open_source
from tests.helpers.clips import HTTPReply, deadline, frame_number, http_server, numbered_image
from tests.helpers.waiting import until

TIMES = {"open_timeout": 120.0, "read_timeout": 120.0}


@pytest.fixture(autouse=True)
def _in_time(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(live, "FIRST_PAUSE", 0.05)
    with deadline(240):
        yield


class Camera:
    """Camera whose images the test pushes. Setting `gone` ends the connection and makes reopening fail."""

    def __init__(self) -> None:
        self.ready = threading.Condition()
        self.images: list[np.ndarray | None] = []
        self.opened = self.released = 0
        self.gone = False

    def push(self, *images: np.ndarray | None) -> None:
        """Push images; None ends the connection."""
        with self.ready:
            self.images += images
            self.ready.notify_all()

    def __call__(self, reader: LiveReader) -> Iterator[np.ndarray]:
        if self.gone:
            raise VideoError("the camera is gone")
        self.opened += 1
        reader.fps = 12.5
        try:
            while True:
                with self.ready:
                    self.ready.wait_for(lambda: self.images, 240)
                    image = self.images.pop(0)
                if image is None:
                    return
                yield image
        finally:
            self.released += 1


def increase(numbers: list[int]) -> bool:
    """Return whether the numbers rise; they restart after 255."""
    steps = np.diff(numbers) % 256
    return bool(((steps > 0) & (steps < 128)).all())


def numbers(images: int) -> list[np.ndarray]:
    return [numbered_image(number) for number in range(images)]


# `LiveReader` ------------------------------------------------------------------------------------------------------


def test_slow_consumer_gets_the_newest_frame() -> None:
    camera = Camera()
    camera.push(numbered_image(0))
    with LiveReader(camera, name="camera", **TIMES) as reader:
        assert (reader.live, reader.fps, reader.frame_count, reader.resolution_wh) == (True, 12.5, None, (128, 64))
        first = next(reader)
        assert (frame_number(first.image), first.index, first.time, reader.waiting) == (0, 0, 0.0, 0)
        camera.push(*numbers(10)[1:])
        until(lambda: reader.dropped == 8)
        assert reader.waiting == 1
        second = next(reader)
        assert (frame_number(second.image), second.index, reader.waiting, reader.dropped) == (9, 1, 0, 8)
        assert second.time > 0
        camera.push(None, numbered_image(77))  # otherwise the thread waits for an image
    assert not reader._thread.is_alive()


def test_fast_consumer_gets_every_frame() -> None:
    camera = Camera()
    camera.push(numbered_image(0))
    with LiveReader(camera, name="camera", **TIMES) as reader:
        times = []
        for number in range(5):
            frame = next(reader)
            assert (frame_number(frame.image), frame.index) == (number, number)
            times.append(frame.time)
            threading.Timer(0.02, camera.push, [numbered_image(number + 1)]).start()
        assert times == sorted(times)
        assert reader.dropped == 0
        assert times[-1] >= 0.06


def test_lost_source_is_reconnected(caplog: pytest.LogCaptureFixture) -> None:
    camera = Camera()
    camera.push(numbered_image(0), None)
    with LiveReader(camera, name="the camera at the door", **TIMES) as reader:
        assert frame_number(next(reader).image) == 0
        until(lambda: camera.opened == 2)
        camera.push(numbered_image(1), None)
        frame = next(reader)
        assert (frame_number(frame.image), frame.index) == (1, 1)
        camera.push(numbered_image(2))
        assert frame_number(next(reader).image) == 2
        camera.push(None)
        warnings = [record.message for record in caplog.records if "was lost" in record.message]
        assert len(warnings) >= 2
        assert "the camera at the door" in warnings[0]


def test_reconnection_pauses_double(monkeypatch: pytest.MonkeyPatch) -> None:
    now, attempts = [0.0], []

    class Closing(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            now[0] += timeout or 0.0
            return self.is_set()

    monkeypatch.setattr(live, "FIRST_PAUSE", 0.0625)
    monkeypatch.setattr(live, "MAX_PAUSE", 0.25)
    monkeypatch.setattr(live, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(live, "threading", SimpleNamespace(**{**vars(threading), "Event": Closing}))
    camera = Camera()
    camera.push(numbered_image(0), None)

    def open_frames(reader: LiveReader) -> Iterator[np.ndarray]:
        camera.gone = len(attempts) > 0
        attempts.append(now[0])
        return camera(reader)

    reader = LiveReader(open_frames, name="camera", reconnect_for=1.0, **TIMES)
    assert frame_number(next(reader).image) == 0
    with pytest.raises(VideoError, match=r"camera is lost after reconnecting for 1 s: the camera is gone"):
        next(reader)
    assert list(reader) == []
    assert np.diff(attempts).tolist() == [0.0625, 0.125, 0.25, 0.25, 0.25, 0.0625]
    assert (camera.opened, camera.released) == (1, 1)


def test_waiting_frame_is_returned_before_the_error() -> None:
    reader = LiveReader(lambda _: iter(numbers(3)), name="short", reconnect_for=0, **TIMES)
    until(lambda: not reader._thread.is_alive())
    assert frame_number(next(reader).image) == 2
    with pytest.raises(VideoError, match="short is lost: short ended"):
        next(reader)
    reader.close()


def test_first_connection_is_not_retried() -> None:
    attempts: list[int] = []

    def gone(reader: LiveReader) -> Iterator[np.ndarray]:
        attempts.append(1)
        raise VideoError("the camera is gone")

    def ended(reader: LiveReader) -> Iterator[np.ndarray]:
        attempts.append(2)
        return iter([])

    with pytest.raises(VideoError, match=r"^the camera is gone$"):
        LiveReader(gone, name="camera", **TIMES)
    with pytest.raises(VideoError, match=r"^camera ended$"):
        LiveReader(ended, name="camera", **TIMES)
    assert attempts == [1, 2]


def test_driver_errors_are_wrapped_in_video_errors() -> None:
    def open_frames(reader: LiveReader) -> Iterator[np.ndarray]:
        raise OSError("no such device")

    with pytest.raises(VideoError, match="camera failed: OSError: no such device") as raised:
        LiveReader(open_frames, name="camera", **TIMES)
    assert isinstance(raised.value.__cause__, OSError)


def test_hanging_driver_raises_after_the_maximum_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "CLOSING_SECONDS", 0.1)
    hang = threading.Event()

    def open_frames(reader: LiveReader) -> Iterator[np.ndarray]:
        yield numbered_image(0)
        hang.wait(240)

    reader = LiveReader(open_frames, name="camera", reconnect_for=0.1, open_timeout=120, read_timeout=0.2)
    assert frame_number(next(reader).image) == 0
    with pytest.raises(VideoError, match=r"camera is lost: no frame for 1\.3 s"):
        next(reader)
    reader.close()

    def never(reader: LiveReader) -> Iterator[np.ndarray]:
        hang.wait(240)
        return iter(())

    with pytest.raises(VideoError, match=r"camera sent no frame within 0\.3 s"):
        LiveReader(never, name="camera", open_timeout=0.2, read_timeout=0.1)
    hang.set()


def test_closing_from_another_thread_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "CLOSING_SECONDS", 240.0)
    camera = Camera()
    camera.push(numbered_image(0))
    reader = LiveReader(camera, name="camera", **TIMES)
    next(reader)
    ended = []
    consumer = threading.Thread(target=lambda: ended.append(list(reader)))
    consumer.start()
    until(lambda: len(reader._changed._waiters) == 1)  # type: ignore[attr-defined]
    closer = threading.Thread(target=reader.close)
    closer.start()
    consumer.join(240)
    assert ended == [[]]  # while the camera still waits for an image
    assert reader._thread.is_alive()
    camera.push(None)
    closer.join(240)
    assert not reader._thread.is_alive()
    assert camera.released == 1
    reader.close()
    assert list(reader) == []


def test_closing_ends_a_reconnection_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "FIRST_PAUSE", 1000.0)
    monkeypatch.setattr(live, "MAX_PAUSE", 1000.0)
    monkeypatch.setattr(live, "CLOSING_SECONDS", 120.0)
    reader = LiveReader(lambda _: iter(numbers(1)), name="camera", reconnect_for=10_000, **TIMES)
    until(lambda: reader._received == 1)
    reader.close()
    assert not reader._thread.is_alive()


# Webcams -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [97, "97", np.int64(97), "/dev/video97"])
def test_missing_webcam_is_reported(source: object) -> None:
    with pytest.raises(VideoError, match=r"webcam 97 cannot be opened; check that it is connected"):
        open_source(source)  # type: ignore[arg-type]


# Streams over HTTP -------------------------------------------------------------------------------------------------


def endless(reply: HTTPReply, first: int = 0, pause: float = 0.02) -> None:
    number = first
    while not reply.stopping.is_set():
        reply.send_jpeg(numbered_image(number % 256), pause)
        number += 1


def mjpeg(reply: HTTPReply) -> None:
    reply.start_mjpeg()
    endless(reply)


def test_mjpeg_stream_is_read() -> None:
    with http_server(mjpeg) as address, open_source(f"{address}/cam?token=abc", **TIMES) as source:
        assert source.live
        assert source.name == f"{address}/cam?token=..."
        assert (source.fps, source.frame_count, source.resolution_wh) == (None, None, (128, 64))
        frames = list(islice(source, 5))
        found = [frame_number(frame.image) for frame in frames]
        assert increase(found)
        assert [frame.index for frame in frames] == list(range(5))
        assert isinstance(source, LiveReader)
        dropped = source.dropped
        until(lambda: source.dropped >= dropped + 5)
        late = frame_number(next(source).image)
        assert (late - found[-1]) % 256 > 4  # frames that arrived in between are skipped
        assert source.problems == 0


@pytest.mark.parametrize("failure", ["stalls", "dies", "refuses"])
def test_failed_stream_is_reconnected(failure: str, caplog: pytest.LogCaptureFixture) -> None:
    requests: list[int] = []

    def answer(reply: HTTPReply) -> None:
        requests.append(1)
        if len(requests) == 2 and failure == "refuses":
            reply.start("text/plain", 503)
            return
        reply.start_mjpeg()
        if len(requests) > 1:
            endless(reply, first=100)
        for number in range(5):
            reply.send_jpeg(numbered_image(number), 0.02)
        if failure == "stalls":
            reply.stopping.wait(240)

    times = {**TIMES, "read_timeout": 1.0} if failure == "stalls" else TIMES
    with http_server(answer) as address, open_source(address, reconnect_for=120, **times) as source:
        before = next(source)
        frame = next(frame for frame in source if frame_number(frame.image) >= 100)
        assert frame.time > before.time
        if failure == "stalls":
            assert len(requests) >= 2  # on a slow machine, the second stream may time out as well
        else:
            assert len(requests) == (3 if failure == "refuses" else 2)
        assert f"{address} was lost" in caplog.text


def test_stream_that_ends_for_good_raises() -> None:
    requests: list[int] = []

    def answer(reply: HTTPReply) -> None:
        requests.append(1)
        if len(requests) > 1:
            reply.start("text/plain", 410)
            return
        reply.start_mjpeg()
        for number in range(5):
            reply.send_jpeg(numbered_image(number), 0.05)

    with http_server(answer) as address, open_source(address, reconnect_for=0.5, **TIMES) as source:
        found: list[int] = []
        with pytest.raises(VideoError, match=rf"^{address} is lost after reconnecting for 0\.5 s: "):
            found.extend(frame_number(frame.image) for frame in source)
        assert found[-1] == 4
        assert len(requests) >= 2


def test_closing_a_stalled_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "CLOSING_SECONDS", 0.1)

    def answer(reply: HTTPReply) -> None:
        reply.start_mjpeg()
        for number in range(5):
            reply.send_jpeg(numbered_image(number), 0.02)
        reply.stopping.wait(240)

    with http_server(answer) as address:
        source = open_source(address, **TIMES)
        next(source)
        threading.Timer(0.3, source.close).start()
        rest = list(source)  # ends long before the read timeout
        assert len(rest) <= 4
        source.close()
        assert isinstance(source, LiveReader)
    until(lambda: not source._thread.is_alive())


def test_damaged_image_of_a_stream_is_skipped(caplog: pytest.LogCaptureFixture) -> None:
    def answer(reply: HTTPReply) -> None:
        reply.start_mjpeg()
        for number in range(5):
            reply.send_jpeg(numbered_image(number), 0.02)
        reply.handler.wfile.write(b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: 9\r\n\r\nno image.\r\n")
        endless(reply, first=100)

    with http_server(answer) as address, open_source(address, **TIMES) as source:
        next(frame for frame in source if frame_number(frame.image) >= 102)
        assert source.problems == 1
        assert "a frame was skipped" in caplog.text
        assert "was lost" not in caplog.text


@pytest.mark.parametrize("scheme", ["rtsp", "rtmp", "http"])
def test_refused_connection_is_reported(scheme: str) -> None:
    with pytest.raises(VideoError, match=rf"^{scheme}://127\.0\.0\.1:9/live cannot be opened as a video: ") as raised:
        open_source(f"{scheme}://me:secret@127.0.0.1:9/live", **TIMES)
    assert "secret" not in str(raised.value)


def test_silent_server_raises_after_the_timeout() -> None:
    with (
        http_server(lambda reply: reply.stopping.wait(240) and None) as address,
        pytest.raises(VideoError, match="cannot be opened as a video: no answer in time"),
    ):
        open_source(address, open_timeout=0.4, read_timeout=0.4)


def test_h264_stream_over_udp_is_read() -> None:
    import av

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    stop = threading.Event()

    def send() -> None:
        with av.open(f"udp://127.0.0.1:{port}?pkt_size=1316", "w", format="mpegts") as container:
            stream = container.add_stream("libx264", rate=50, options={"tune": "zerolatency", "g": "5"})
            stream.width, stream.height, stream.pix_fmt = 128, 64, "yuv420p"
            for number in count():
                frame = av.VideoFrame.from_ndarray(numbered_image(number % 256), format="bgr24")
                frame.pts = number
                container.mux(stream.encode(frame))
                if stop.wait(0.02):
                    return

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    try:
        with open_source(f"udp://127.0.0.1:{port}", open_timeout=120, read_timeout=10) as source:
            found = [frame_number(frame.image) for frame in islice(source, 20)]
            assert increase(found)
            assert source.live
            assert source.resolution_wh == (128, 64)
    finally:
        stop.set()
        sender.join(240)


def test_udp_stream_without_sender_raises() -> None:
    with pytest.raises(VideoError, match=r"udp://127\.0\.0\.1:\d+ (cannot be opened|sent no frame)"):
        open_source("udp://127.0.0.1:19731", open_timeout=0.3, read_timeout=0.3)
