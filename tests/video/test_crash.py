"""Files of a process that is killed while it writes a video. Run with `pytest tests/video/test_crash.py`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import av
import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks the processes that are killed")
FPS = 25
MOMENTS = 20
B_FRAMES = 3

# Imports once, then forks one writer per moment. Each one reports every frame that `write` has accepted.
HARNESS = """
import json, os, random, signal, sys
import numpy as np
import supervision as sv
from moondream_cv.cli.signals import Terminated, stop_on_signals
from moondream_cv.video.sources.frame import Frame
from moondream_cv.video.writers.video_file import VideoWriter

folder, name, fps, moments = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
rng = np.random.default_rng(0)
noise = rng.integers(0, 256, (120, 160, 3), dtype=np.uint8)
still = np.full_like(noise, 90)

def write_endlessly(path, out, is_noise):
    with VideoWriter(path, fps=fps) as writer:
        index = 0
        while True:
            image = np.roll(noise, index, 1) if is_noise else still
            writer.write(Frame(image, index, index / fps), sv.Detections.empty())
            index += 1
            os.write(out, b".")

chosen = random.Random(7)
results = []
for moment in range(moments):
    path = os.path.join(folder, f"{moment}.mp4")
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        stop_on_signals()
        try:
            write_endlessly(path, writer, moment % 2)
        except Terminated as error:
            os._exit(error.status)
        finally:
            os._exit(1)
    os.close(writer)
    wanted, written = chosen.randrange(1, 200), 0
    while written < wanted:
        written += len(os.read(reader, wanted - written))
    os.kill(child, getattr(signal, name))
    while more := os.read(reader, 4096):
        written += len(more)
    os.close(reader)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    results.append({"path": path, "written": written, "status": status})
print(json.dumps(results))
"""


def killed(folder: Path, name: str) -> list[dict[str, int | str]]:
    command = [sys.executable, "-c", HARNESS, str(folder), name, str(FPS), str(MOMENTS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    results: list[dict[str, int | str]] = json.loads(done.stdout)
    return results


def frame_times(path: Path) -> list[float]:
    with av.open(str(path)) as opened:
        return [float(frame.time or 0) for frame in opened.decode(video=0)]


def test_sigkill_loses_at_most_one_second(tmp_path: Path) -> None:
    for result in killed(tmp_path, "SIGKILL"):
        assert result["status"] == -9
        path, written = Path(str(result["path"])), int(result["written"])
        assert not path.exists()
        part = path.with_suffix(".part.mp4")
        times = frame_times(part) if part.stat().st_size else []
        assert written - FPS <= len(times) <= written + 1, result
        # The last group may lack its B-frames.
        assert times[:-B_FRAMES] == pytest.approx([index / FPS for index in range(len(times[:-B_FRAMES]))], abs=1e-4)
        assert not times or round(times[-1] * FPS) <= len(times) - 1 + B_FRAMES


def test_sigterm_leaves_a_finished_file(tmp_path: Path) -> None:
    for result in killed(tmp_path, "SIGTERM"):
        assert result["status"] == 143
        path, written = Path(str(result["path"])), int(result["written"])
        times = frame_times(path)
        assert written <= len(times) <= written + 1, result
        assert times == pytest.approx([index / FPS for index in range(len(times))], abs=1e-4)
        assert b"moof" not in path.read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(f"{moment}.mp4" for moment in range(MOMENTS))
