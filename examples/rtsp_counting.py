"""Count objects that cross a line in an RTSP stream or a video file, and print the counts at each crossing.

    python examples/rtsp_counting.py rtsp://camera/stream car bus --line 0 0.6 1 0.6
    python examples/rtsp_counting.py street.mp4 car --output counted.mp4

Seen from the start of the line to its end, a crossing to the left counts as in. Objects are tracked between keyframes,
and a lost stream is reconnected. Ctrl-C ends a stream; the video stays playable.
"""

import argparse
import contextlib
import logging

from moondream_cv import MoondreamError
from moondream_cv.video import Summary, Zones, annotate_video, open_source


class CountPrinter:
    """Print the counts of the line whenever they change."""

    def __init__(self) -> None:
        self.text = ""

    def __call__(self, summary: Summary) -> None:
        line = summary.zones["lines"]["line"]
        by_class = (f"{name} {counts['in']} in, {counts['out']} out" for name, counts in line["classes"].items())
        text = "; ".join([f"{line['in']} in, {line['out']} out", *by_class])
        if text != self.text:
            print(f"{summary.seconds:.2f} s: {text}", flush=True)
        self.text = text


def main() -> None:
    """Parse the arguments, and count until the stream ends."""
    parser = argparse.ArgumentParser(description="Count objects that cross a line.")
    parser.add_argument("source", help="stream URL, video file or webcam number")
    parser.add_argument("classes", nargs="+", metavar="CLASS", help="class name, such as car")
    parser.add_argument("--line", nargs=4, type=float, default=[0.0, 0.5, 1.0, 0.5], metavar=("X1", "Y1", "X2", "Y2"),
                        help="start and end as fractions of the frame (default: 0 0.5 1 0.5)")  # fmt: skip
    parser.add_argument("--model", default="moondream2", help="model name, folder or server URL (default: moondream2)")
    parser.add_argument("--every", type=int, help="interval of keyframes in frames (default: automatic)")
    parser.add_argument("--output", metavar="FILE", help="annotated video file (.mp4, .mov or .mkv)")
    args = parser.parse_args()
    logging.basicConfig(format="%(message)s")  # prints lost connections
    line, printer = {"name": "line", "start": args.line[:2], "end": args.line[2:]}, CountPrinter()
    try:
        zones = Zones.from_dict({"normalized": True, "lines": [line]}, source="--line")
        with contextlib.suppress(KeyboardInterrupt), open_source(args.source, reconnect_for=300) as source:
            annotate_video(source, args.output, args.classes, model=args.model, confidence=0.3, zones=zones,
                           annotate="box,label,trace", every=args.every or "auto", on_frame=printer)  # fmt: skip
    except (MoondreamError, ValueError) as error:
        raise SystemExit(f"rtsp_counting.py: {error}") from None


if __name__ == "__main__":
    main()
