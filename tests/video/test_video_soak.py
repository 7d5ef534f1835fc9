"""Long videos do not leak memory. A fiftieth of the run by default, all of it with `make soak`."""

from __future__ import annotations

import sys
import threading
import tracemalloc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import av
import numpy as np
import pytest
import supervision as sv

from moondream_cv.video import Frame, Summary, Tracking, annotate_video, track_streams
from moondream_cv.video.tracking.tracker import Tracker
from moondream_cv.video.writers.video_file import VideoWriter
from tests.helpers.clips import deadline

FRAMES = 20_000
EVERY = 5
FPS = 30
SIZE = (160, 96)
LANES, LIFE = 6, 50  # simultaneous objects, and lifetime of each in frames
ALLOWED_GROWTH = 16 << 20  # bytes of process memory between the first fifth and the end
ZONES = {
    "lines": [{"name": "middle", "start": [80, 96], "end": [80, 0]}],
    "zones": [{"name": "left", "polygon": [[0, 0], [80, 0], [80, 96], [0, 96]]}],
}


@pytest.fixture(autouse=True)
def _time_limit() -> Iterator[None]:
    with deadline(900):
        yield


def written(path: Path, count: int) -> Path:
    """Write a clip of moving noise."""
    noise = np.random.default_rng(0).integers(60, 200, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
    noise = np.repeat(np.repeat(noise[::8, ::8], 8, 0), 8, 1)
    with VideoWriter(path, fps=FPS, preset="ultrafast") as writer:
        for index in range(count):
            writer.write(Frame(np.roll(noise, index, 1), index, index / FPS), sv.Detections.empty())
    return path


class Traffic:
    """Detector of objects that appear and disappear: in each lane one after another, each at a new position."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, image: np.ndarray, classes: Sequence[str]) -> sv.Detections:
        number, self.calls = self.calls * EVERY, self.calls + 1
        boxes, class_ids = [], []
        for lane in range(LANES):
            life, age = divmod(number + lane * 8, LIFE)
            left = 12 + (37 * life + 59 * lane) % 100 + 0.4 * age
            boxes.append([left, 10 + 13 * lane, left + 11, 21 + 13 * lane])
            class_ids.append((life + lane) % len(classes))
        return sv.Detections(
            np.array(boxes, np.float32), confidence=np.full(LANES, 0.5, np.float32), class_id=np.array(class_ids)
        )


@dataclass(frozen=True)
class RecordingTracking(Tracking):
    """`Tracking` that stores the trackers that it creates."""

    trackers: list[Tracker] = field(default_factory=list)

    def create_tracker(self) -> Tracker:
        self.trackers.append(super().create_tracker())
        return self.trackers[-1]


def resident_bytes() -> int:
    """Return the resident memory of this process in bytes, on Linux."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096


@dataclass
class Run:
    """Result of a run.

    Attributes:
        resident: Resident bytes after each hundredth of the frames; empty except on Linux.
        tracks: Maximum number of tracks.
        tracklets: Maximum number of objects in the wrapped trackers.
    """

    resident: list[int] = field(default_factory=list)
    tracks: int = 0
    tracklets: int = 0


def annotated(folder: Path, count: int) -> Run:
    source, run, tracking = written(folder / "in.mp4", count), Run(), RecordingTracking()

    def note(summary: Summary) -> None:
        tracker = tracking.trackers[-1]
        run.tracks = max(run.tracks, len(tracker.tracks))
        adapters = list(tracker._adapters.values())
        own = sum(len(adapter.tracker.tracks) for adapter in adapters)
        run.tracklets = max(run.tracklets, own, sum(len(adapter._tracks) for adapter in adapters))
        if summary.frames % max(1, count // 100) == 0 and sys.platform == "linux":
            run.resident.append(resident_bytes())

    summary = annotate_video(
        source,
        folder / "out.mp4",
        ["dog", "cat"],
        model=Traffic(),
        every=EVERY,
        annotate=("box", "label", "trace"),
        tracking=tracking,
        zones=ZONES,
        panel=True,
        json=folder / "out.jsonl",
        mot=folder / "out.txt",
        on_frame=note,
    )
    assert summary.frames == count
    assert sum(seen.objects for seen in summary.classes.values()) >= count * LANES / LIFE / 4
    with av.open(str(folder / "out.mp4")) as opened:
        assert opened.streams.video[0].frames == count
    return run


def check_bounds(run: Run) -> None:
    remembered = LANES * (10.0 * FPS / LIFE + 2)  # objects lost in the last ten seconds, and current ones
    assert run.tracks <= 1.5 * remembered
    assert run.tracklets <= 1.5 * remembered


@pytest.mark.slow
def test_ended_tracks_are_dropped(tmp_path: Path) -> None:
    before = threading.active_count()
    check_bounds(annotated(tmp_path, FRAMES // 50))
    assert threading.active_count() <= before


@pytest.mark.soak
def test_memory_is_constant_over_20000_frames(tmp_path: Path) -> None:
    run = annotated(tmp_path, FRAMES)
    check_bounds(run)
    if not run.resident:
        pytest.skip("the memory of this process is only available on Linux, in /proc")
    fifth = len(run.resident) // 5
    settled = max(run.resident[:fifth])
    grown = max(run.resident[-10:]) - settled
    print(
        f"{FRAMES} frames: {settled / 1e6:.0f} MB after a fifth, {grown / 1e6:+.1f} MB at the end, "
        f"{run.tracks} tracks and {run.tracklets} tracklets at most"
    )
    assert grown <= ALLOWED_GROWTH


@pytest.mark.soak
def test_frames_of_three_sources_are_freed(tmp_path: Path) -> None:
    """Measures Python and NumPy objects: the allocators of many threads take tens of MiB to settle."""
    paths = [written(tmp_path / f"in{number}.mp4", FRAMES // 4) for number in range(3)]
    traced, count = [], 0
    tracemalloc.start()
    try:
        with track_streams(paths, ["dog", "cat"], model=Traffic(), every=EVERY) as stream:
            for _ in stream:
                count += 1
                if count % 100 == 0:
                    traced.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert count == 3 * (FRAMES // 4)
    settled = max(traced[: len(traced) // 5])
    grown = max(traced[-10:]) - settled
    print(f"{count} frames of three sources: {settled / 1e6:.1f} MB after a fifth, {grown / 1e6:+.1f} MB at the end")
    assert grown <= 2 << 20
