"""Measure the throughput of tracked and annotated files, and the delay of live frames.

    python benchmarks/video.py

All results are ratios within one run. The throughput is compared with the frame rate of the clip (30 frames per
second). Without a model, it is compared with loops that only decode and encode, with the same codec and settings: one
loop converts each frame to a BGR array, as needed for drawing, and the other one does not.
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
    """Write a clip of 8 objects, and return their 3 class names."""
    clip = render_clip(7, num_frames=frames, resolution_wh=resolution_wh)
    with VideoWriter(path, fps=FPS) as writer:
        for index, (image, _) in enumerate(clip.frames()):
            frame = Frame(np.ascontiguousarray(image[..., ::-1]), index, index / FPS)
            writer.write(frame, sv.Detections.empty())
    return list(clip.class_names)


def no_detections(image: np.ndarray, classes: Sequence[str]) -> sv.Detections:
    return sv.Detections.empty()


def transcode(source: Path, target: Path, through_bgr: bool) -> None:
    """Decode and encode a video sequentially, with or without conversion to BGR arrays."""
    with av.open(str(source)) as reading, av.open(str(target), "w", options={"movflags": "+faststart"}) as writing:
        stream = reading.streams.video[0]
        stream.thread_type = "AUTO"
        out = writing.add_stream("libx264", FPS, options={"crf": "23", "preset": "veryfast"})
        out.width, out.height, out.pix_fmt = stream.width, stream.height, "yuv420p"
        for index, frame in enumerate(reading.decode(stream)):
            if through_bgr:
                frame = av.VideoFrame.from_ndarray(frame.to_ndarray(format="bgr24"), format="bgr24")
            frame.pict_type = PictureType.NONE  # let the encoder choose the frame type
            frame.pts, frame.time_base = index, Fraction(1, FPS)
            writing.mux(out.encode(frame))
        writing.mux(out.encode(None))


def median_seconds(call: Callable[[], object], repeat: int) -> float:
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure_files(folder: Path, repeat: int) -> None:
    small, large, out = folder / "small.mp4", folder / "large.mp4", folder / "out.mp4"
    frames = 300
    names = write_clip(small, frames, (640, 360))
    with load("tiny", device="cpu") as model:
        for every in (5, "auto"):
            seconds = median_seconds(lambda e=every: annotate_video(small, out, names, model=model, every=e), repeat)  # type: ignore[misc]
            target = "target 1.0" if every == 5 else ""
            print(
                f"640x360, tiny model, 3 classes, every {every:>4}: {frames / seconds:6.1f} frames/s "
                f"{frames / seconds / FPS:6.2f}× the frame rate of the clip  {target}",
                flush=True,
            )
    write_clip(large, frames, (1280, 720))
    ours = median_seconds(lambda: annotate_video(large, out, ["dog"], model=no_detections, every=5), repeat)
    for through_bgr, target in ((True, "target 0.80"), (False, "")):
        loop = median_seconds(lambda t=through_bgr: transcode(large, out, t), repeat)  # type: ignore[misc]
        kind = "with BGR arrays" if through_bgr else "without conversion"
        print(
            f"1280x720, without a model: {frames / ours:6.1f} frames/s {loop / ours:6.2f}× a loop {kind} "
            f"({frames / loop:.1f})  {target}",
            flush=True,
        )


def measure_live(seconds: float, slow: float) -> None:
    """Measure the delay of live frames at 30 frames per second.

    Args:
        seconds: Duration of the source.
        slow: Seconds per detector call.
    """

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
    except Exception as error:  # the camera ends
        print(f"live: {error}")
    first, last = delays[: len(delays) // 4], delays[-len(delays) // 4 :]
    print(
        f"live, {slow} s per detection: {len(delays)} of {len(arrived)} frames; median delay in the first quarter "
        f"{1000 * statistics.median(first):.1f} ms, in the last quarter {1000 * statistics.median(last):.1f} ms, "
        f"maximum {1000 * max(delays):.1f} ms: {statistics.median(last) / slow:.3f}× a detection"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3, help="Number of runs per measurement (default: 3).")
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, PyAV {av.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        measure_files(Path(folder), arguments.repeat)
    measure_live(10.0, 0.5)


if __name__ == "__main__":
    main()
