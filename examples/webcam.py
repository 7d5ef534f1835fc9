"""Detect objects on a webcam, and show the annotated frames and their rate in a window. Esc or q closes it.

    python examples/webcam.py cup phone person
    python examples/webcam.py car --source street.mp4 --output annotated.mp4

`--output` writes a video instead, for machines without a screen; Ctrl-C ends it. A live source keeps only its newest
frame, so the window never lags behind the camera.
"""

import argparse
import contextlib
from dataclasses import replace

import supervision as sv

from moondream_cv import Detector, MoondreamError
from moondream_cv.video import Source, open_source
from moondream_cv.video.writers.video_file import VideoWriter
from moondream_cv.video.writers.window import Window


def annotate(source: Source, detector: Detector, classes: list[str], writer: Window | VideoWriter) -> None:
    """Detect, draw and write frames until the source ends or the window is closed."""
    box, label, rate = sv.BoxAnnotator(), sv.LabelAnnotator(smart_position=True), sv.FPSMonitor()
    for frame in source:
        detections = detector(frame.image, classes)
        rate.tick()
        image = label.annotate(box.annotate(frame.image.copy(), detections), detections)
        text, place = f"{rate.fps:.1f} fps", sv.Point(60, 20)
        image = sv.draw_text(image, text, place, sv.Color.WHITE, background_color=sv.Color.BLACK)
        writer.write(replace(frame, image=image), detections)
        if isinstance(writer, Window) and writer.closed:
            break


def main() -> None:
    """Parse the arguments, and run until the end."""
    parser = argparse.ArgumentParser(description="Detect objects on a webcam.")
    parser.add_argument("classes", nargs="+", metavar="CLASS", help="class name, such as cup")
    parser.add_argument("--source", default="0", help="webcam number, video file or stream URL (default: 0)")
    parser.add_argument("--model", default="moondream2", help="model name, folder or server URL (default: moondream2)")
    parser.add_argument("--confidence", type=float, default=0.3, help="minimum confidence, 0 to 1 (default: 0.3)")
    parser.add_argument("--output", metavar="FILE", help="video file (.mp4, .mov or .mkv) instead of a window")
    args = parser.parse_args()
    try:
        with contextlib.suppress(KeyboardInterrupt), contextlib.ExitStack() as opened:
            source = opened.enter_context(open_source(args.source))
            writer = Window("webcam.py") if args.output is None else VideoWriter(args.output, fps=source.fps)
            opened.enter_context(writer)
            detector = opened.enter_context(Detector(args.model, confidence=args.confidence))
            annotate(source, detector, args.classes, writer)
    except (MoondreamError, ValueError) as error:
        raise SystemExit(f"webcam.py: {error}") from None


if __name__ == "__main__":
    main()
