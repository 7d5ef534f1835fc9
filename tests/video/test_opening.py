"""`open_source`: arguments, errors, names and closing. Run with `pytest tests/video/test_opening.py`."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moondream_cv.errors import VideoError
from moondream_cv.video.sources.opening import open_source, url_name
from tests.helpers.clips import corrupt_frame, encode_jpeg, write_clip
from tests.helpers.sources import IMAGES, write_animation


def _no_frames(folder: Path) -> Path:
    return write_clip(folder / "none.mp4", [])


def _undecodable(folder: Path) -> Path:
    return corrupt_frame(write_clip(folder / "none.avi", IMAGES[:1], codec="mjpeg"), 0)


def _text(folder: Path) -> Path:
    (folder / "notes.txt").write_text("hello\n" * 100)
    return folder / "notes.txt"


def _disguised_text(folder: Path) -> Path:
    return _text(folder).rename(folder / "notes.mp4")


def _empty(folder: Path) -> Path:
    (folder / "empty.mp4").touch()
    return folder / "empty.mp4"


def _sound(folder: Path) -> Path:
    import av

    with av.open(str(folder / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    return folder / "sound.wav"


def _music_with_cover(folder: Path) -> Path:
    import av

    with av.open(str(folder / "bare.mp3"), "w") as container:
        stream = container.add_stream("libmp3lame", rate=44100)
        for start in range(0, 44100, 1152):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1152), np.int16), format="s16p", layout="mono")
            frame.sample_rate, frame.pts = 44100, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    body = b"\0image/jpeg\0\3\0" + encode_jpeg(IMAGES[0])
    picture = b"APIC" + len(body).to_bytes(4, "big") + b"\0\0" + body
    size = bytes(len(picture) >> shift & 127 for shift in (21, 14, 7, 0))
    (folder / "song.mp3").write_bytes(b"ID3\3\0\0" + size + picture + (folder / "bare.mp3").read_bytes())
    return folder / "song.mp3"


def _bad_image(folder: Path) -> Path:
    (folder / "bad.png").write_bytes(b"nothing of the kind")
    return folder / "bad.png"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "missing.mp4", r"missing\.mp4': no such file or folder"),
        (lambda folder: str(folder / "missing.mp4"), r"missing\.mp4': no such file or folder"),
        (lambda folder: folder, r"contains no images; a folder needs files that end in \.avif, .* or \.webp"),
        (lambda folder: folder / "*.jpg", r"\*\.jpg' matches no file"),
        (lambda folder: _text(folder).parent / "*", r"\*' matches 1 files, none of which ends in"),
        (lambda folder: folder / "%04d.png", r"%04d\.png' matches no file; the folder has no images"),
        (
            lambda folder: _bad_image(folder).parent / "%d.png",
            r"matches no file; the folder has 1 images, such as 'bad",
        ),
        (lambda folder: folder / "none" / "%04d.png", r"matches no file; there is no folder '.*none'"),
        (lambda folder: folder / "cam%d" / "%04d.png", r"has several numbers; use one %d, or a glob"),
        (lambda folder: folder / "100%done.mp4", r"100%done\.mp4': no such file or folder"),
        (lambda folder: folder / "%f.png", r"%f\.png': no such file or folder"),
        (_text, r"notes\.txt' is a text file, not a video"),
        (_disguised_text, r"notes\.mp4' cannot be opened as a video: .*check that it is a video"),
        (_empty, r"empty\.mp4' cannot be opened as a video: .*the file is empty"),
        (_no_frames, r"none\.mp4' has no frames"),
        (_undecodable, r"none\.avi' has no frames; 1 could not be decoded"),
        (_sound, r"sound\.wav' contains no video, only audio"),
        (_music_with_cover, r"song\.mp3' contains no video, only audio"),
        (_bad_image, r"bad\.png' has no frames that can be read: .*not an image"),
        (lambda folder: "", "the path of the video must not be empty"),
        (lambda folder: "a\0b.mp4", "is not a path|no such file"),
        (lambda folder: "/dev/null", "is not a regular file"),
        (
            lambda folder: "file:///a.mp4",
            r"file:///a\.mp4 has an unsupported scheme; use one of http, .*, or the path of a file",
        ),
        (lambda folder: "s3://me:word@bucket/a.mp4", r"^s3://bucket/a\.mp4 has an unsupported scheme"),
        (lambda folder: [], "the list of frames has no frames"),
        (lambda folder: ["a.png", None], r"no frames that can be read: 'a\.png'"),
    ],
)
def test_sources_without_frames_are_rejected(tmp_path: Path, make: Any, message: str) -> None:
    with pytest.raises(VideoError, match=message):
        open_source(make(tmp_path))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (-1, "a webcam index must be 0 or more, got -1"),
        (True, "got bool: True"),
        (None, "got NoneType: None"),
        (b"clip.mp4", "got bytes: "),
        ({"a": 1}, "got dict: "),
        (IMAGES[0], r"array of shape \(64, 128, 3\) is not a sequence of frames"),
    ],
)
def test_other_types_are_rejected(source: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_source(source)


@pytest.mark.parametrize(
    "settings", [{"open_timeout": 0}, {"read_timeout": -1.0}, {"reconnect_for": -1}, {"read_timeout": float("nan")}]
)
def test_timeouts_out_of_range_are_rejected(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        open_source(IMAGES, **settings)


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf"), 1e9, True, "30"])
def test_fps_out_of_range_is_rejected(fps: Any) -> None:
    with pytest.raises(ValueError, match=r"fps must be between 0\.001 and 1000, got "):
        open_source(IMAGES, fps=fps)


def _animated(folder: Path) -> Path:
    return write_animation(folder / "a.gif", [100, 100])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: write_clip(folder / "clip.mp4", IMAGES[:2]), r"clip\.mp4' has frame times, so omit fps"),
        (_animated, r"a\.gif' has frame times"),
        (lambda folder: 0, "webcam 0 is live"),
        (lambda folder: "1", "webcam 1 is live"),
        (lambda folder: "rtsp://me:secret@cam/live", "rtsp://cam/live has frame times"),
        (lambda folder: open_source(IMAGES), "list of frames is already open"),
    ],
)
def test_fps_is_rejected_for_sources_with_frame_times(tmp_path: Path, make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^fps=10 is for images and iterables without times; .*{message}"):
        open_source(make(tmp_path), fps=10)


def test_closing_ends_the_iteration(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4", IMAGES)
    for source in (open_source(clip), open_source(IMAGES)):
        with source:
            assert next(iter(source)).index == 0
            assert next(iter(source)).index == 1
        assert list(source) == []
        source.close()
    with open_source(clip):  # closed before the first frame
        pass


def test_closing_from_another_thread_ends_the_iteration(tmp_path: Path) -> None:
    go_on, taken = threading.Event(), threading.Event()

    def images() -> Iterator[np.ndarray]:
        yield IMAGES[0]
        taken.set()
        go_on.wait(240)
        yield IMAGES[1]

    source = open_source(images())
    next(source)
    closer = threading.Thread(target=lambda: (taken.wait(240), threading.Timer(0.1, go_on.set).start(), source.close()))
    closer.start()
    assert list(source) == []
    closer.join(240)
    assert not closer.is_alive()

    video = open_source(write_clip(tmp_path / "clip.mp4", IMAGES * 20))
    threading.Timer(0.02, video.close).start()
    assert len(list(video)) <= 620


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("rtsp://cam.local:554/live", "rtsp://cam.local:554/live"),
        ("rtsp://admin:pass@cam.local:554/live", "rtsp://cam.local:554/live"),
        ("rtsp://admin:p@ss@cam.local/live", "rtsp://cam.local/live"),
        ("rtsp://admin:pa/ss@cam.local/live", "rtsp://..."),
        ("rtsp://admin:pa?ss@cam.local/live", "rtsp://..."),
        ("http://host:8080/@me/a.mp4", "http://host:8080/@me/a.mp4"),
        ("http://[::1]:80/a@b", "http://[::1]:80/a@b"),
        ("udp://@:1234", "udp://:1234"),
        ("rtsp://h/c?channel=1&subtype=0", "rtsp://h/c?channel=1&subtype=0"),
        ("http://h/c?user=me&channel=1&pwd=x&access_token=y", "http://h/c?user=...&channel=1&pwd=...&access_token=..."),
    ],
)
def test_url_names_contain_no_secrets(url: str, name: str) -> None:
    assert url_name(url) == name


def test_import_loads_neither_opencv_nor_pyav() -> None:
    code = "import sys, moondream_cv.video.sources.opening; print(sorted({'av', 'cv2', 'torch'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=True)
    assert done.stdout.strip() == "[]"
