"""The examples about videos, with the tiny model on rendered clips."""

from __future__ import annotations

import argparse
import os
import re
import runpy
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
import supervision as sv

from moondream_cv.errors import VideoError
from moondream_cv.scenes import Clip, render_clip, render_scene
from moondream_cv.scenes.objects import paint, stamp
from tests.examples.conftest import EXAMPLES, RunExample
from tests.helpers.clips import write_clip
from tests.helpers.line_crossings import true_crossings
from tests.helpers.waiting import until
from tests.video.test_rtsp import Server, missing
from tests.video.test_writers import FakeScreen

TINY = ("--model", "tiny")


@pytest.fixture(scope="module")
def clip() -> Clip:
    return render_clip(5, num_frames=24, names=["dog", "red circle"], resolution_wh=(320, 240))


@pytest.fixture(scope="module")
def video(clip: Clip, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clips") / "street.mp4", (rgb[..., ::-1] for rgb, _ in clip))


def frames_of(path: Path) -> list[np.ndarray]:
    """Return the frames of a video, [H, W, 3] RGB."""
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def detail(image: np.ndarray, xyxy: Sequence[float]) -> float:
    """Return the contrast between neighboring pixels in a box."""
    left, top, right, bottom = map(int, xyxy)
    return float(cv2.Laplacian(cv2.cvtColor(image[top:bottom, left:right], cv2.COLOR_RGB2GRAY), cv2.CV_64F).std())


@pytest.mark.compat
class TestWebcam:
    def test_boxes_labels_and_rate_are_written(
        self, run_example: RunExample, clip: Clip, video: Path, tmp_path: Path
    ) -> None:
        output = tmp_path / "annotated.mp4"
        run_example("webcam.py", "dog", "--source", video, "--output", output, *TINY)
        written, plain = frames_of(output), frames_of(video)
        assert len(written) == len(plain) == len(clip)
        for index in (0, 12, 23):
            changed = np.abs(written[index].astype(int) - plain[index]).max(2) > 60
            for item in clip.frame(index)[1]:
                left, top, _, bottom = map(int, item.xyxy)
                middle = (top + bottom) // 2
                is_boxed = changed[middle - 5 : middle + 5, left - 3 : left + 4].any(1).all()
                assert is_boxed == (item.name == "dog")
            assert changed[:30, 20:110].any()  # the rate

    def test_esc_closes_the_window(self, run_example: RunExample, video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        class Screen(FakeScreen):
            def waitKey(self, milliseconds: int) -> int:
                return 27 if self.calls.count("show") == 3 else -1

        screen = Screen()
        monkeypatch.setitem(sys.modules, "cv2", screen)
        monkeypatch.setattr("moondream_cv.video.writers.window._check_screen", lambda title: None)
        run_example("webcam.py", "dog", "--source", video, *TINY)
        assert screen.calls == ["open", "320x240", "show", "show", "show", "close"]

    def test_missing_source_is_reported(self, run_example: RunExample, tmp_path: Path) -> None:
        with pytest.raises(SystemExit, match=r"webcam\.py: .*none\.mp4"):
            run_example("webcam.py", "dog", "--source", tmp_path / "none.mp4", "--output", tmp_path / "out.mp4", *TINY)


class TestRedactVideos:
    def test_objects_are_blurred_and_failures_are_reported_at_the_end(
        self, run_example: RunExample, clip: Clip, video: Path, tmp_path: Path
    ) -> None:
        # Run on a video, a finished video, a damaged video and another file
        folder, output = tmp_path / "videos", tmp_path / "redacted"
        folder.mkdir()
        output.mkdir()
        for name in ("a.mp4", "finished.mp4"):
            (folder / name).write_bytes(video.read_bytes())
        (folder / "damaged.mp4").write_bytes(b"no video")
        (folder / "notes.txt").write_text("no video")
        (output / "finished.mp4.redacted.mp4").write_text("result of an earlier run")
        arguments = ("redact_videos.py", folder, output, "--classes", "dog", *TINY)
        with pytest.raises(SystemExit, match=r"videos: 3 videos, 1 failed\n.*damaged\.mp4"):
            run_example(*arguments)

        # Check the results
        assert sorted(os.listdir(output)) == ["a.mp4.redacted.mp4", "finished.mp4.redacted.mp4"]
        assert (output / "finished.mp4.redacted.mp4").read_text() == "result of an earlier run"
        redacted, plain = frames_of(output / "a.mp4.redacted.mp4"), frames_of(video)
        assert len(redacted) == len(plain)
        for index, (_, objects) in enumerate(clip.frames()):
            dog, circle = objects
            assert (dog.name, circle.name) == ("dog", "red circle")
            assert detail(redacted[index], dog.xyxy) < 0.35 * detail(plain[index], dog.xyxy)
            left, top, right, bottom = map(int, circle.xyxy)
            change = np.abs(redacted[index].astype(int) - plain[index])[top:bottom, left:right]
            assert change.mean() < 10  # by compression only

        # Run again
        (folder / "damaged.mp4").unlink()
        assert run_example(*arguments).count("exists, skipped") == 2

    def test_video_with_failed_keyframes_is_not_published(self, video: Path, tmp_path: Path) -> None:
        calls = iter(range(100))

        def detector(image: np.ndarray, classes: Sequence[str]) -> sv.Detections:
            if next(calls) == 2:
                raise RuntimeError("out of memory")
            return sv.Detections.empty()

        redact = runpy.run_path(str(EXAMPLES / "redact_videos.py"))["redact"]
        arguments = argparse.Namespace(classes=["dog"], every=5)
        with pytest.raises(VideoError, match=r"street\.mp4: detection failed on 1 keyframes"):
            redact(video, tmp_path / "out.mp4", detector, arguments)
        assert os.listdir(tmp_path) == []


class TestRtspCounting:
    def test_crossings_of_a_file_are_counted(self, run_example: RunExample, tmp_path: Path) -> None:
        clip = render_clip(3, num_frames=150, names=["car", "bus", "truck", "boat", "car"], resolution_wh=(640, 360))
        video = write_clip(tmp_path / "street.mp4", (rgb[..., ::-1] for rgb, _ in clip), fps=30)
        line, output = ("--line", 0.4, 0.05, 0.4, 0.95), tmp_path / "counted.mp4"
        options = (*line, "--every", 5, "--output", output, *TINY)
        lines = run_example("rtsp_counting.py", video, "car", "bus", "truck", "boat", *options).splitlines()
        assert lines[0] == "0.00 s: 0 in, 0 out"
        times, counted_in, counted_out = zip(*(re.findall(r"[\d.]+", text)[:3] for text in lines), strict=True)
        assert (int(counted_in[-1]), int(counted_out[-1])) == true_crossings(clip, 256)
        assert int(counted_in[-1]) + int(counted_out[-1]) == len(lines) - 1
        assert all(0 < float(time) < 5 for time in times[1:])
        assert len(frames_of(output)) == 150

    def test_line_outside_the_frame_is_reported(self, run_example: RunExample, video: Path) -> None:
        with pytest.raises(SystemExit, match=r"--line: .* must have fractions from 0 to 1, .* got \[0, 2\]"):
            run_example("rtsp_counting.py", video, "dog", "--line", 0, 2, 1, 2, *TINY)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """Serve a clip of 48 s, in which a dog crosses the center every 1.2 s."""
    if missing():
        pytest.skip(missing())
    background = render_scene(0, resolution_wh=(320, 192), num_objects=0, style="plain").image
    patch = paint("dog", 48.0, np.random.default_rng(0), varied=False)
    images = []
    for number in range(60):
        image = background.copy()
        stamp(image, patch, round(136 + 110 * np.cos(2 * np.pi * number / 60)), 72)
        images.append(image[..., ::-1])
    options = {"bf": "0", "g": "25", "threads": "1", "preset": "ultrafast"}
    started = Server(write_clip(tmp_path / "clip.mp4", images * 20, codec_options=options), "TCP")
    yield started
    started.kill()


def test_counting_continues_after_a_lost_connection(server: Server, tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "rtsp_counting.py"), server.url, "dog", "--line", "0.5", "0", "0.5", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    counted, log = tmp_path / "counted.txt", tmp_path / "log.txt"

    def num_crossings() -> int:
        lines = re.findall(r" s: (\d+) in, (\d+) out", counted.read_text())
        return sum(map(int, lines[-1])) if lines else 0

    with counted.open("w") as stdout, log.open("w") as stderr:
        process = subprocess.Popen([*command, *TINY], stdout=stdout, stderr=stderr, env=environment)
    try:
        until(lambda: num_crossings() > 0 or process.poll() is not None)
        server.kill()
        until(lambda: "was lost" in log.read_text() or process.poll() is not None)
        before = num_crossings()
        server.start()
        until(lambda: num_crossings() > before or process.poll() is not None)
        process.send_signal(signal.SIGINT)
        assert process.wait(240) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()
    assert num_crossings() > before > 0
