"""Video: how fast a tracked and annotated file comes out, and how late a live frame does.

    python benchmarks/video.py

Ratios within one run: the output beside the clip's own 30 frames a second, and everything but the model beside loops
that only decode and encode, with the same codec and settings: one has each frame as a BGR array, as whatever draws
needs it, the other leaves the pictures as they are coded.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import supervision as sv
import torch
from av.video.frame import PictureType

from moondream_cv import load
from moondream_cv.scenes.clips import render_clip
from moondream_cv.video import Frame, annotate_video, track_streams
from moondream_cv.video.sources.live import LiveReader
from moondream_cv.video.writers.video_file import VideoWriter

FPS = 30


def write_clip(path: Path, frames: int, resolution_wh: tuple[int, int]) -> list[str]:
    """A clip of 8 objects; gives their 3 names."""
    clip = render_clip(7, num_frames=frames, resolution_wh=resolution_wh)
    with VideoWriter(path, fps=FPS) as writer:
        for index, (image, _) in enumerate(clip.frames()):
            frame = Frame(np.ascontiguousarray(image[..., ::-1]), index, index / FPS)
            writer.write(frame, sv.Detections.empty())
    return list(clip.class_names)


def nothing(image: np.ndarray, classes: Sequence[str]) -> sv.Detections:
    return sv.Detections.empty()


def bare(source: Path, target: Path, through_bgr: bool) -> None:
    """Decode and encode, one after the other; the pictures stay as they are coded, or are BGR arrays in between."""
    with av.open(str(source)) as reading, av.open(str(target), "w", options={"movflags": "+faststart"}) as writing:
        stream = reading.streams.video[0]
        stream.thread_type = "AUTO"
        out = writing.add_stream("libx264", FPS, options={"crf": "23", "preset": "veryfast"})
        out.width, out.height, out.pix_fmt = stream.width, stream.height, "yuv420p"
        for index, frame in enumerate(reading.decode(stream)):
            if through_bgr:
                frame = av.VideoFrame.from_ndarray(frame.to_ndarray(format="bgr24"), format="bgr24")
            frame.pict_type = PictureType.NONE  # else the encoder is told what the last one decided
            frame.pts, frame.time_base = index, Fraction(1, FPS)
            writing.mux(out.encode(frame))
        writing.mux(out.encode(None))


def taken(call: Callable[[], object], repeat: int) -> float:
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def files(folder: Path, repeat: int) -> None:
    small, large, out = folder / "small.mp4", folder / "large.mp4", folder / "out.mp4"
    frames = 300
    names = write_clip(small, frames, (640, 360))
    with load("tiny", device="cpu") as model:
        for every in (5, "auto"):
            seconds = taken(lambda e=every: annotate_video(small, out, names, model=model, every=e), repeat)  # type: ignore[misc]
            bound = "must 1.0" if every == 5 else ""
            print(
                f"640x360, tiny model, 3 classes, every {every:>4}: {frames / seconds:6.1f} frames/s "
                f"{frames / seconds / FPS:6.2f} × the clip's own  {bound}",
                flush=True,
            )
    write_clip(large, frames, (1280, 720))
    ours = taken(lambda: annotate_video(large, out, ["dog"], model=nothing, every=5), repeat)
    for through, bound in ((True, "must 0.80"), (False, "")):
        loop = taken(lambda t=through: bare(large, out, t), repeat)  # type: ignore[misc]
        what = "with BGR arrays in between" if through else "pictures left as coded"
        print(
            f"1280x720, without a model: {frames / ours:6.1f} frames/s {loop / ours:6.2f} × a bare loop, {what} "
            f"({frames / loop:.1f})  {bound}",
            flush=True,
        )


def live(seconds: float, slow: float) -> None:
    """A source of 30 frames a second, and a detector that takes `slow` seconds."""

    def frames(reader: LiveReader) -> Iterator[np.ndarray]:
        start = time.monotonic()
        for number in range(int(seconds * FPS)):
            time.sleep(max(0.0, start + number / FPS - time.monotonic()))
            image = np.zeros((360, 640, 3), np.uint8)
            image[0, 0, :2] = number % 256, number // 256
            arrived[number] = time.monotonic()
            yield image

    def detector(image: np.ndarray, classes: Sequence[str]) -> sv.Detections:
        time.sleep(slow)
        return sv.Detections.empty()

    arrived: dict[int, float] = {}
    delays = []
    source = LiveReader(frames, name="camera", open_timeout=5.0, read_timeout=2.0, reconnect_for=0.0)
    try:
        for tracked in track_streams([source], ["dog"], model=detector):
            pixel = tracked.frame.image[0, 0]
            delays.append(time.monotonic() - arrived[int(pixel[0]) + 256 * int(pixel[1])])
            assert source.waiting <= 1
    except Exception as error:  # the camera is gone at the end
        print(f"live: {error}")
    first, last = delays[: len(delays) // 4], delays[-len(delays) // 4 :]
    print(
        f"live, {slow} s a look: {len(delays)} of {len(arrived)} frames; delay in the first quarter "
        f"{1000 * statistics.median(first):.1f} ms, in the last {1000 * statistics.median(last):.1f} ms, "
        f"at the most {1000 * max(delays):.1f} ms: {statistics.median(last) / slow:.3f} × a look"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, PyAV {av.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        files(Path(folder), arguments.repeat)
    live(10.0, 0.5)


if __name__ == "__main__":
    main()
