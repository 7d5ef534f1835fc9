"""Count objects that cross a line in a video, with Roboflow's workflows engine and stream runner.

    python examples/workflow_video.py --output counted.mp4
    python examples/workflow_video.py --video street.mp4 --model moondream2 --classes person,car --line 9 360 999 360

Runs track_count_line.json, by default on a rendered clip. Requires `pip install "moondream-cv[workflows]"`.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import supervision as sv

from moondream_cv.scenes import render_clip

WORKFLOW = Path(__file__).parents[1] / "blocks" / "workflows" / "track_count_line.json"
NAMES = ["car", "bus", "truck", "boat", "car"]


def main() -> None:
    """Parse the arguments, run the workflow, and print the counts of the last frame."""
    parser = argparse.ArgumentParser(description="Count objects that cross a line, with a workflow.")
    parser.add_argument("--output", default="counted.mp4", help="annotated video (default: counted.mp4)")
    parser.add_argument("--video", help="video file; default: a rendered clip, which is written to clip.mp4")
    parser.add_argument("--model", default="tiny", help="model name, folder or server URL (default: tiny)")
    parser.add_argument("--classes", default="car,bus,truck,boat", help="default: car,bus,truck,boat")
    parser.add_argument("--line", nargs=4, type=int, default=[320, 20, 320, 340], help="x and y of both ends in pixels")
    args, last = parser.parse_args(), dict[str, Any](error_message="the video has no frames", error_status=True)
    os.environ.setdefault("WORKFLOWS_PLUGINS", "moondream_cv_blocks")  # before the import of the engine
    from streamvision.stream.pipeline import InferencePipeline

    if args.video is None:
        args.video = "clip.mp4"
        with sv.VideoSink(args.video, sv.VideoInfo(640, 360, 30)) as sink:
            for rgb, _ in render_clip(3, num_frames=150, names=NAMES, resolution_wh=(640, 360)):
                sink.write_frame(rgb[..., ::-1].copy())
    with sv.VideoSink(args.output, sv.VideoInfo.from_video_path(args.video)) as sink:

        def write(result: dict[str, Any], frame: Any) -> None:
            sink.write_frame(result["image"].numpy_image)
            last.update(result)

        options = {"model": args.model, "class_names": args.classes, "line": [args.line[:2], args.line[2:]]}
        pipeline = InferencePipeline.init_with_workflow(
            args.video, workflow_specification=json.loads(WORKFLOW.read_text()), workflow_init_parameters={},
            step_error_handler=None, workflows_parameters=options, on_prediction=write)  # fmt: skip
        pipeline.start()
        pipeline.join()
    if last["error_status"]:
        raise SystemExit(f"workflow_video.py: {last['error_message']}")
    print(f"{last['count_in']} in, {last['count_out']} out; saved {args.output}")


if __name__ == "__main__":
    main()
