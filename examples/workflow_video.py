"""Count objects that cross a line in a video, with Roboflow's workflows engine and stream runner.

    WORKFLOWS_PLUGINS=moondream_cv_blocks python examples/workflow_video.py --output counted.mp4

Runs `blocks/workflows/track_count_line.json` on a rendered clip with the embedded tiny model, writes the annotated
video and one of its frames, and prints the count and the true count. Requires `pip install "moondream-cv[workflows]"`.
For your own video: `--video street.mp4 --model moondream2 --classes person,car --line "[[9, 360], [999, 360]]"`.
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
SEED, LINE = 3, 320  # seed of the rendered clip, and x of the vertical line in pixels
SAVED_FRAME = 100  # index of the frame that is also saved as an image


def write_clip(path: Path, clip: Clip) -> None:
    """Write a rendered clip to a video file."""
    with VideoWriter(path, fps=FPS) as writer:
        for index, (rgb, _) in enumerate(clip.frames()):
            writer.write(Frame(np.ascontiguousarray(rgb[..., ::-1]), index, index / FPS), sv.Detections.empty())


def crossings(clip: Clip, x: int) -> int:
    """Return how often a box moves completely from one side of a vertical line at `x` to the other."""
    sides: dict[int, bool] = {}
    count = 0
    for _, objects in clip.frames():
        for item in objects:
            left, _, right, _ = item.xyxy
            if right < x or left > x:
                count += sides.get(item.track_id, left > x) != (left > x)
                sides[item.track_id] = left > x
    return count


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keep the line breaks of the description, and show defaults."""


def parse_line(text: str) -> list[list[int]]:
    """Parse two points from JSON."""
    (x1, y1), (x2, y2) = json.loads(text)
    return [[int(x1), int(y1)], [int(x2), int(y2)]]


class Sink:
    """Write the annotated frames, and collect counts and errors.

    Attributes:
        counts: Number of line crossings so far, in and out.
        errors: Distinct error messages.
        frames: Number of frames so far.
    """

    def __init__(self, output: Path, fps: float) -> None:
        self.counts, self.errors, self.frames = (0, 0), dict[str, None](), 0
        self._output, self._fps = output, fps
        self._writer = VideoWriter(output, fps=fps)

    def __call__(self, result: dict[str, Any], frame: Any) -> None:
        image = result["image"].numpy_image
        self._writer.write(Frame(image, self.frames, self.frames / self._fps), sv.Detections.empty())
        if self.frames == SAVED_FRAME:
            cv2.imwrite(str(self._output.with_suffix(".png")), image)
        self.frames += 1
        self.counts = result["count_in"], result["count_out"]
        if result["error_status"]:
            self.errors[result["error_message"]] = None

    def close(self) -> None:
        """Finish the video file."""
        self._writer.close()


def run(video: Path, output: Path, parameters: dict[str, Any]) -> Sink:
    """Run the workflow on a video, and write the annotated video.

    Args:
        video: Video file.
        output: Annotated video file.
        parameters: Input parameters of the workflow.
    """
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
    """Parse the arguments, run the workflow and print the count."""
    # Collect the parameters of the workflow
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("counted.mp4"), help="annotated video file")
    parser.add_argument("--video", type=Path, help="video file; renders a clip if not set")
    parser.add_argument("--model", default="tiny", help="model name, checkpoint folder or server URL")
    parser.add_argument("--classes", default="car,bus,truck,boat", help="class names, separated by commas")
    parser.add_argument("--confidence", type=float, default=0.5, help="minimum confidence, 0 to 1")
    parser.add_argument("--line", type=parse_line, help='line as "[[x, y], [x, y]]" in pixels')
    parser.add_argument("--every", type=int, default=5, help="interval of keyframes in frames")
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

    # Run the workflow
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

    # Print the result
    if sink.errors:
        raise SystemExit("\n".join(sink.errors))
    true = "" if arguments.video else f" (ground truth: {crossings(clip, LINE)})"
    print(f"{sum(sink.counts)} objects crossed the line{true}, {sink.counts[0]} in and {sink.counts[1]} out")
    print(f"Saved {sink.frames} frames to {arguments.output}")


if __name__ == "__main__":
    main()
