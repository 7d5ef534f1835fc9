"""A workflow over a video: what crosses a line is counted, with Roboflow's own engine and stream runner.

    WORKFLOWS_PLUGINS=moondream_cv_blocks python examples/workflow_video.py --output counted.mp4

Runs `blocks/workflows/track_count_line.json` over a rendered clip with the embedded tiny model, writes the annotated
video and a frame of it, and prints the count beside the true one. It takes `pip install "moondream-cv[workflows]"`.
With a video of your own: `--video street.mp4 --model moondream2 --classes person,car --line "[[9, 360], [999, 360]]"`.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import supervision as sv

from moondream_cv.errors import VideoError
from moondream_cv.scenes import Clip, render_clip
from moondream_cv.video import Frame, open_source
from moondream_cv.video.writers.video_file import VideoWriter

WORKFLOW = Path(__file__).parents[1] / "blocks" / "workflows" / "track_count_line.json"
FPS = 30
NAMES = ["car", "bus", "truck", "boat", "car"]
SEED, LINE = 3, 320  # of the rendered clip: which one, and where the line stands, in pixels from the left
PICTURE = 100  # the frame that is written as a picture, too


def write_clip(path: Path, clip: Clip) -> None:
    """Write a rendered clip into a file."""
    with VideoWriter(path, fps=FPS) as writer:
        for index, (rgb, _) in enumerate(clip.frames()):
            writer.write(Frame(np.ascontiguousarray(rgb[..., ::-1]), index, index / FPS), sv.Detections.empty())


def crossings(clip: Clip, x: int) -> int:
    """How often something has come wholly from one side of an upright line to the other."""
    sides: dict[int, bool] = {}
    count = 0
    for _, things in clip.frames():
        for thing in things:
            left, _, right, _ = thing.xyxy
            if right < x or left > x:
                count += sides.get(thing.track_id, left > x) != (left > x)
                sides[thing.track_id] = left > x
    return count


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    pass


def line(text: str) -> list[list[int]]:
    """Two points from JSON."""
    (x1, y1), (x2, y2) = json.loads(text)
    return [[int(x1), int(y1)], [int(x2), int(y2)]]


class Sink:
    """Takes what comes of each frame: writes the annotated picture, and keeps the counts.

    Attributes:
        counts: What has crossed the line so far, in and out.
        errors: What went wrong on frames, each once.
        frames: How many there were.
    """

    def __init__(self, output: Path, fps: float) -> None:
        self.counts, self.errors, self.frames = (0, 0), dict[str, None](), 0
        self._output, self._fps = output, fps
        self._writer = VideoWriter(output, fps=fps)

    def __call__(self, result: dict[str, Any], frame: Any) -> None:
        image = result["image"].numpy_image
        self._writer.write(Frame(image, self.frames, self.frames / self._fps), sv.Detections.empty())
        if self.frames == PICTURE:
            cv2.imwrite(str(self._output.with_suffix(".png")), image)
        self.frames += 1
        self.counts = result["count_in"], result["count_out"]
        if result["error_status"]:
            self.errors[result["error_message"]] = None

    def close(self) -> None:
        self._writer.close()


def run(video: Path, output: Path, parameters: dict[str, Any]) -> Sink:
    """Run the workflow over a video, and write what it draws."""
    from streamvision.stream.pipeline import InferencePipeline

    with open_source(str(video)) as source:
        sink = Sink(output, source.fps or FPS)
    try:
        pipeline = InferencePipeline.init_with_workflow(
            str(video),
            workflow_specification=json.loads(WORKFLOW.read_text()),
            workflow_init_parameters={},
            step_error_handler=None,
            workflows_parameters=parameters,
            on_prediction=sink,
        )
        pipeline.start()
        pipeline.join()
    finally:
        sink.close()
    return sink


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("--output", type=Path, default=Path("counted.mp4"), help="the annotated video")
    parser.add_argument("--video", type=Path, help="a file; without it a clip is rendered")
    parser.add_argument("--model", default="tiny", help="a name, a folder or a server's URL")
    parser.add_argument("--classes", default="car,bus,truck,boat", help="names, separated by commas")
    parser.add_argument("--confidence", type=float, default=0.5, help="drop detections below it")
    parser.add_argument("--line", type=line, help='"[[x, y], [x, y]]" in pixels')
    parser.add_argument("--every", type=int, default=5, help="look at every Nth frame")
    arguments = parser.parse_args()
    os.environ.setdefault("WORKFLOWS_PLUGINS", "moondream_cv_blocks")
    parameters = {
        "model": arguments.model,
        "class_names": arguments.classes,
        "confidence": arguments.confidence,
        "every": arguments.every,
    }
    if arguments.line is not None:
        parameters["line"] = arguments.line
    with tempfile.TemporaryDirectory() as folder:
        video = arguments.video or Path(folder) / "clip.mp4"
        if arguments.video is None:
            clip = render_clip(SEED, num_frames=150, names=NAMES, resolution_wh=(640, 360))
            write_clip(video, clip)
            parameters["line"] = [[LINE, 20], [LINE, 340]]
        try:
            sink = run(video, arguments.output, parameters)
        except VideoError as error:
            raise SystemExit(str(error)) from None
    if sink.errors:
        raise SystemExit("\n".join(sink.errors))
    true = "" if arguments.video else f" (in truth {crossings(clip, LINE)})"
    print(f"{sum(sink.counts)} have crossed the line{true}, {sink.counts[0]} in and {sink.counts[1]} out")
    print(f"{sink.frames} frames in {arguments.output}")


if __name__ == "__main__":
    main()
