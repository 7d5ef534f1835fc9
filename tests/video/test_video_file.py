"""`VideoWriter`: H.264 files, read back with PyAV. Run with `pytest tests/video/test_video_file.py`."""

from __future__ import annotations

import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import supervision as sv

from moondream_cv.errors import VideoError
from moondream_cv.video.sources.frame import Frame
from moondream_cv.video.writers.video_file import VideoWriter, _Clock

NOTHING = sv.Detections.empty()
RED = (0, 0, 255)  # BGR
RED_YUV = (82, 90, 240)  # BT.601, limited range


def frame_of(index: int, at: float, size: tuple[int, int] = (64, 48), color: tuple[int, int, int] = RED) -> Frame:
    return Frame(np.full((size[1], size[0], 3), color, np.uint8), index, at)


def write(path: Path, times: list[float], size: tuple[int, int] = (64, 48), **options: object) -> None:
    with VideoWriter(path, **options) as writer:  # type: ignore[arg-type]
        for index, at in enumerate(times):
            writer.write(frame_of(index, at, size), NOTHING)


def pictures(path: Path) -> list[av.VideoFrame]:
    with av.open(str(path)) as opened:
        return list(opened.decode(video=0))


def times_of(path: Path) -> list[float]:
    return [float(picture.time) for picture in pictures(path)]


def yuv(picture: av.VideoFrame, x: int, y: int) -> tuple[int, ...]:
    """Return the color at a point of a yuv420p frame."""
    planes = [np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size) for plane in picture.planes]
    return int(planes[0][y, x]), int(planes[1][y // 2, x // 2]), int(planes[2][y // 2, x // 2])


def sound(path: Path) -> list[tuple[float, bytes]]:
    """Return the start time in seconds and the bytes of each packet of the first audio track."""
    with av.open(str(path)) as opened:
        packets = opened.demux(audio=0)
        return [(float(packet.pts * packet.time_base), bytes(packet)) for packet in packets if packet.size]


def with_sound(path: Path, codec: str = "aac", seconds: float = 2.0, start: float = 0.0, video: bool = True) -> Path:
    """Write a gray clip of 10 frames per second with a tone that starts after the first image."""
    rate = 48000
    with av.open(str(path), "w") as output:
        track = output.add_stream(codec, rate=rate)
        track.layout = "mono"
        if video:
            stream = output.add_stream("libx264", rate=10)
            stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
            for index in range(round(seconds * 10)):
                picture = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 90, np.uint8), format="rgb24")
                picture.pts = index
                output.mux(stream.encode(picture))
            output.mux(stream.encode(None))
        rng, size, done = np.random.default_rng(0), 1024, 0
        while done < seconds * rate:
            noise = rng.uniform(-0.5, 0.5, (1, size))
            if codec == "aac":
                samples = av.AudioFrame.from_ndarray(noise.astype(np.float32), format="fltp", layout="mono")
            else:
                samples = av.AudioFrame.from_ndarray((noise * 9999).astype(np.int16), format="s16", layout="mono")
            samples.sample_rate, samples.time_base = rate, Fraction(1, rate)
            samples.pts = done + round(start * rate)
            done += size
            output.mux(track.encode(samples))
        output.mux(track.encode(None))
    return path


def test_output_plays_in_browsers(tmp_path: Path) -> None:
    path = tmp_path / "red.mp4"
    write(path, [index / 25 for index in range(30)], fps=25)
    assert os.listdir(tmp_path) == ["red.mp4"]
    content = path.read_bytes()
    assert 0 < content.find(b"moov") < content.find(b"mdat")
    assert b"moof" not in content
    with av.open(str(path)) as opened:
        stream = opened.streams.video[0]
        context = stream.codec_context
        assert (context.name, context.pix_fmt, context.width, context.height) == ("h264", "yuv420p", 64, 48)
        assert (context.colorspace, context.color_primaries, context.color_trc, context.color_range) == (6, 1, 1, 1)
        assert stream.average_rate == 25
        assert stream.frames == 30
        if hasattr(av.VideoFrame, "duration"):
            assert stream.duration * stream.time_base == pytest.approx(30 / 25)
    shown = pictures(path)
    assert times_of(path) == pytest.approx([index / 25 for index in range(30)], abs=1e-9)
    assert all(np.abs(np.subtract(yuv(picture, 30, 20), RED_YUV)).max() <= 3 for picture in shown)


@pytest.mark.parametrize("suffix", [".mov", ".mkv", ".MP4"])
def test_mov_and_mkv_suffixes(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"clip{suffix}"
    write(path, [index / 10 for index in range(12)], fps=10, audio_from=with_sound(tmp_path / "source.mp4"))
    assert times_of(path) == pytest.approx([index / 10 for index in range(12)], abs=1e-3)
    assert len(sound(path)) > 40
    assert sorted(os.listdir(tmp_path)) == sorted([path.name, "source.mp4"])


@pytest.mark.parametrize("size", [(63, 48), (64, 47), (63, 47), (1, 1), (2, 2)])
def test_odd_sizes_repeat_the_edge(tmp_path: Path, size: tuple[int, int]) -> None:
    path = tmp_path / "odd.mp4"
    write(path, [0.0, 0.1], size)
    (first, _) = pictures(path)
    assert (first.width, first.height) == (size[0] + size[0] % 2, size[1] + size[1] % 2)
    corner = yuv(first, first.width - 1, first.height - 1)
    assert np.abs(np.subtract(corner, RED_YUV)).max() <= 6


def test_non_contiguous_images_are_written(tmp_path: Path) -> None:
    path = tmp_path / "view.mp4"
    wide = np.zeros((48, 128, 3), np.uint8)
    wide[:, ::2] = RED
    with VideoWriter(path) as writer:
        writer.write(Frame(wide[::-1, ::2], 0, 0.0), NOTHING)
    assert np.abs(np.subtract(yuv(pictures(path)[0], 30, 20), RED_YUV)).max() <= 3


def test_variable_times_are_kept(tmp_path: Path) -> None:
    times = [5.0, 5.02, 5.1, 5.5, 5.501, 7.25]
    write(tmp_path / "a.mp4", times, fps=30)
    assert times_of(tmp_path / "a.mp4") == pytest.approx([at - 5 for at in times], abs=1e-5)


@pytest.mark.parametrize(
    ("times", "fps", "expected"),
    [
        ([0, 0, 0, 0], 10, [0, 0.1, 0.2, 0.3]),
        ([0, 0.5, 0.5, 1.0], 10, [0, 0.5, 0.6, 1.0]),
        ([0, 0.5, 0.2, 1.0], 10, [0, 0.5, 0.6, 1.0]),
        ([0, 0.1, 0.1, 0.1, 0.2, 0.3, 0.4, 0.5], 10, [0, 0.1, 0.2, 0.3, 0.301, 0.302, 0.4, 0.5]),
        ([0, 0.0, 0.1, 0.1, 0.2, 0.2], 20, [0, 0.05, 0.1, 0.15, 0.2, 0.25]),
        ([0, math.nan, math.inf, 1.0], 10, [0, 0.1, 0.2, 1.0]),
        ([math.nan, 0.5], 10, [0, 0.5]),
        ([0, 0.25, 0.25], None, [0, 0.25, 0.5]),
        ([0, 0], None, [0, 1 / 30]),
        ([0, 1e9, 1e9 + 0.5], 10, [0, 0.1, 0.6]),
        ([0, 1e-9], 10, [0, 0.1]),
    ],
)
def test_times_always_rise(times: list[float], fps: float | None, expected: list[float]) -> None:
    clock = _Clock(fps)
    assert [clock.at(at) / 90_000 for at in times] == pytest.approx(expected, abs=2e-5)
    assert clock.last_duration > 0


def test_images_of_another_size_are_letterboxed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.mp4"
    with VideoWriter(path, crf=10) as writer:
        for index, size in enumerate([(64, 48), (32, 48), (128, 32), (64, 48)]):
            writer.write(frame_of(index, index / 10, size), NOTHING)
    shown = pictures(path)
    assert {(picture.width, picture.height) for picture in shown} == {(64, 48)}
    assert len(shown) == 4
    for picture, black, red in ((shown[1], (4, 24), (32, 24)), (shown[2], (32, 4), (32, 24))):
        assert yuv(picture, *black)[0] <= 20
        assert np.abs(np.subtract(yuv(picture, *red), RED_YUV)).max() <= 5
    assert yuv(shown[3], 4, 4)[0] > 50
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: a frame of 32x48 pixels after 64x48; frames are scaled to the first size"
    ]


@pytest.mark.parametrize("start", [0.0, 0.37])
def test_audio_is_copied_without_reencoding(tmp_path: Path, start: float) -> None:
    source = with_sound(tmp_path / "source.mp4", seconds=1.5, start=start)
    path = tmp_path / "a.mp4"
    write(path, [index / 10 for index in range(30)], fps=10, audio_from=source)
    copied, original = sound(path), sound(source)
    assert len(original) > 60
    assert [content for _, content in copied] == [content for _, content in original]
    assert [at for at, _ in copied] == pytest.approx([at for at, _ in original], abs=1e-3)


def test_audio_ends_with_the_video(tmp_path: Path) -> None:
    source = with_sound(tmp_path / "source.mp4", seconds=3)
    path = tmp_path / "a.mp4"
    write(path, [index / 10 for index in range(10)], fps=10, audio_from=source)
    copied, original = sound(path), sound(source)
    assert [content for _, content in copied] == [content for _, content in original[: len(copied)]]
    assert 0.95 < copied[-1][0] < 1.0


def test_audio_follows_frames_from_the_middle(tmp_path: Path) -> None:
    source = with_sound(tmp_path / "source.mp4", seconds=3)
    path = tmp_path / "a.mp4"
    write(path, [1 + index / 10 for index in range(10)], fps=10, audio_from=source)
    copied, original = sound(path), {content: at for at, content in sound(source)}
    assert all(original[content] == pytest.approx(at + 1, abs=1e-3) for at, content in copied)
    assert copied[0][0] == pytest.approx(-0.1, abs=0.03)  # not played, for the decoder to start
    assert 0.95 < copied[-1][0] < 1.0
    assert times_of(path)[0] == 0


def test_audio_of_a_file_without_images(tmp_path: Path) -> None:
    source = with_sound(tmp_path / "source.m4a", video=False)
    write(tmp_path / "a.mp4", [0.0, 0.5], fps=2, audio_from=source)
    assert len(sound(tmp_path / "a.mp4")) > 40


def test_source_without_audio(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "source.mp4", [0.0, 0.1])
    write(tmp_path / "a.mp4", [0.0, 0.1], audio_from=tmp_path / "source.mp4")
    with av.open(str(tmp_path / "a.mp4")) as opened:
        assert not opened.streams.audio
    assert not caplog.records


def test_unsupported_audio_codec_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = with_sound(tmp_path / "source.avi", "adpcm_ms")
    write(tmp_path / "a.mp4", [0.0, 0.1], audio_from=source)
    with av.open(str(tmp_path / "a.mp4")) as opened:
        assert not opened.streams.audio
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == (
        f"{tmp_path / 'a.mp4'} is written without the audio (adpcm_ms) of {source}, which its format does not support"
    )


def test_audio_source_may_be_the_target(tmp_path: Path) -> None:
    source = with_sound(tmp_path / "a.mp4")
    before = sound(source)
    write(source, [index / 10 for index in range(30)], fps=10, audio_from=source)
    assert sound(source) == before
    assert len(pictures(source)) == 30


def test_deleted_audio_source_loses_only_the_audio(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = with_sound(tmp_path / "source.mp4")
    with VideoWriter(tmp_path / "a.mp4", audio_from=source) as writer:
        writer.write(frame_of(0, 0.0), NOTHING)
        source.unlink()
    assert len(pictures(tmp_path / "a.mp4")) == 1
    assert f"without the audio of {source}" in caplog.text


def test_missing_audio_source_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    for name in ("none.mp4", "text.mp4"):
        with pytest.raises(VideoError, match=rf"{name} cannot be read: .*audio_from"):
            VideoWriter(tmp_path / "a.mp4", audio_from=tmp_path / name)
    assert os.listdir(tmp_path) == ["text.mp4"]


def test_video_is_playable_after_an_exception(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"

    def fail_after_seven() -> None:
        with VideoWriter(path, fps=10) as writer:
            for index in range(7):
                writer.write(frame_of(index, index / 10), NOTHING)
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail_after_seven()
    assert len(pictures(path)) == 7


ENDLESS = """
import sys, numpy as np, supervision as sv
from moondream_cv.video.sources.frame import Frame
from moondream_cv.video.writers.video_file import VideoWriter
rng = np.random.default_rng(0)
image = rng.integers(0, 256, (120, 160, 3), dtype=np.uint8)
index = 0
with VideoWriter(sys.argv[1], fps=25) as writer:
    while True:
        writer.write(Frame(np.roll(image, index, 1), index, index / 25), sv.Detections.empty())
        index += 1
        if index % 10 == 0:
            print(index, flush=True)
"""


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT to another process")
def test_video_is_playable_after_ctrl_c(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    process = subprocess.Popen(
        [sys.executable, "-c", ENDLESS, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    while int(process.stdout.readline()) < 100:
        pass
    time.sleep(0.003)
    process.send_signal(signal.SIGINT)
    said, error = process.communicate(timeout=240)
    assert error.rstrip().endswith("KeyboardInterrupt")
    written = max([100, *map(int, said.split())])
    shown = times_of(path)
    assert written <= len(shown) <= written + 10
    assert shown == pytest.approx([index / 25 for index in range(len(shown))])
    assert os.listdir(tmp_path) == ["a.mp4"]


FULL = """
import resource, sys, numpy as np, supervision as sv
from moondream_cv.errors import VideoError
from moondream_cv.video.sources.frame import Frame
from moondream_cv.video.writers.video_file import VideoWriter
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
rng, nothing = np.random.default_rng(0), sv.Detections.empty()
writer = VideoWriter(sys.argv[1], fps=25)
try:
    for index in range(int(sys.argv[3])):
        writer.write(Frame(rng.integers(0, 256, (120, 160, 3), dtype=np.uint8), index, index / 25), nothing)
except VideoError as error:
    print("write:", error)
    try:
        writer.write(Frame(np.zeros((120, 160, 3), np.uint8), index, index / 25), nothing)
    except VideoError as error:
        print("again:", error)
try:
    writer.close()
except VideoError as error:
    print("close:", error)
writer.close()
"""


@pytest.mark.skipif(os.name == "nt", reason="limits the size of files by setrlimit")
@pytest.mark.parametrize(("limit", "frames"), [(1_000_000, 400), (60_000, 10), (300, 400)])
def test_full_disk_keeps_the_frames_written_before(tmp_path: Path, limit: int, frames: int) -> None:
    path = tmp_path / "a.mp4"
    command = [sys.executable, "-c", FULL, str(path), str(limit), str(frames)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    said = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert set(said) == ({"close"} if frames == 10 else {"write", "again"})
    assert all(message.startswith(str(path)) for message in said.values())
    if limit == 300:
        assert os.listdir(tmp_path) == []
    else:
        assert os.listdir(tmp_path) == ["a.mp4"]
        assert len(pictures(path)) >= (40 if frames == 400 else 1)


def test_no_file_is_written_without_frames(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "a.mp4") as writer:
        pass
    writer.close()
    assert os.listdir(tmp_path) == []


def test_target_is_not_touched_before_close(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_text("before")
    (tmp_path / "a.part.mp4").write_text("of a killed run")
    VideoWriter(path).close()
    assert path.read_text() == "before"
    writer = VideoWriter(path)
    writer.write(frame_of(0, 0.0), NOTHING)
    assert path.read_text() == "before"
    writer.close()
    writer.close()
    assert len(pictures(path)) == 1
    assert (tmp_path / "a.part.mp4").read_text() == "of a killed run"
    with pytest.raises(VideoError, match=r"a\.mp4 is closed"):
        writer.write(frame_of(1, 0.1), NOTHING)


def test_symbolic_link_is_kept(tmp_path: Path) -> None:
    (tmp_path / "link.mp4").symlink_to(tmp_path / "real.mp4")
    write(tmp_path / "link.mp4", [0.0])
    assert (tmp_path / "link.mp4").is_symlink()
    assert len(pictures(tmp_path / "real.mp4")) == 1


def test_unwritable_targets_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "device.mp4").symlink_to("/dev/full")
    for name, message in (
        ("none/a.mp4", "there is no folder .*none; create it first"),
        ("file/a.mp4", "file is not a folder; choose another path"),
        ("folder.mp4", "is a folder; pass a file in it"),
        ("a.avi", r"must end in \.mp4, \.mov, \.mkv; use .*a\.mp4"),
        ("a", r"must end in .*use .*a\.mp4"),
        ("nul\0.mp4", "cannot be written: embedded null"),
        ("x" * 300 + ".mp4", "cannot be written: File name too long"),
        ("device.mp4", "it is not a regular file"),
    ):
        if name == "device.mp4" and not Path("/dev/full").exists():
            continue
        with pytest.raises(VideoError, match=message) as caught:
            VideoWriter(tmp_path / name)
        assert str(caught.value).startswith(str(tmp_path / name))
    assert sorted(os.listdir(tmp_path)) == ["device.mp4", "file", "folder.mp4"]


def as_nobody(check: Callable[[], None], folder: Path) -> None:
    """Run a check, in a child process without root permissions if necessary."""
    if os.geteuid() != 0:
        check()
        return
    os.chown(folder, 65534, 65534)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            check()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="permissions are those of POSIX")
def test_missing_permissions_are_reported() -> None:
    folder = Path(tempfile.mkdtemp())  # other users cannot enter pytest's folders

    def check() -> None:
        (folder / "a.mp4").write_text("kept")
        (folder / "a.mp4").chmod(0o444)
        with pytest.raises(VideoError, match=r"a\.mp4 cannot be written: it is write-protected"):
            VideoWriter(folder / "a.mp4")
        folder.chmod(0o555)
        with pytest.raises(VideoError, match=r"b\.mp4 cannot be written: Permission denied"):
            VideoWriter(folder / "b.mp4")

    try:
        as_nobody(check, folder)
    finally:
        folder.chmod(0o755)
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fps": 0}, r"fps must be between 0\.001 and 90000, got 0"),
        ({"fps": math.nan}, "got nan"),
        ({"crf": 0}, r"crf must be between 1 and 51, got 0"),
        ({"crf": 52}, "crf must be between 1 and 51, got 52"),
        ({"preset": "quick"}, "preset must be one of ultrafast, .*got 'quick'"),
    ],
)
def test_arguments_out_of_range_are_rejected(tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VideoWriter(tmp_path / "a.mp4", **options)  # type: ignore[arg-type]
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "image", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8), np.zeros((4, 4, 4), "u1")]
)
def test_invalid_images_are_rejected(tmp_path: Path, image: np.ndarray) -> None:
    with VideoWriter(tmp_path / "a.mp4") as writer:
        with pytest.raises(ValueError, match=r"image must be \[H, W, 3\] uint8 BGR, got"):
            writer.write(Frame(image, 0, 0.0), NOTHING)
        writer.write(frame_of(0, 0.0), NOTHING)
    assert len(pictures(tmp_path / "a.mp4")) == 1


def test_unsupported_frame_size_is_reported(tmp_path: Path) -> None:
    with (
        VideoWriter(tmp_path / "a.mp4") as writer,
        pytest.raises(VideoError, match=r"H\.264 does not support frames of 20000x2 pixels"),
    ):
        writer.write(frame_of(0, 0.0, (20000, 2)), NOTHING)
    assert os.listdir(tmp_path) == []
