"""Blur faces and license plates in all videos of a folder, and write the results to another folder.

    python examples/redact_videos.py videos redacted --classes face "license plate" screen --every 1

Finished videos are skipped, so an interrupted run continues. A video appears in the output folder only if detection
succeeded on all of its keyframes. Sound is kept. docs/video.md has the limits of redaction: review the results.
"""

import argparse
import tempfile
from pathlib import Path

from moondream_cv import Detector, MoondreamError, VideoError
from moondream_cv.video import annotate_video

SUFFIXES = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpg", ".ts", ".webm"}
ENDING = ".redacted.mp4"


def redact(video: Path, target: Path, detector: Detector, args: argparse.Namespace) -> None:
    """Write a redacted video, and move it to the target when it is complete."""
    if target.exists():
        print(f"{target} exists, skipped")
        return
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=target.parent) as folder:
        part = Path(folder) / "part.mp4"
        summary = annotate_video(video, part, args.classes, model=detector, annotate="blur", every=args.every)
        if summary.failed:
            raise VideoError(f"{video}: detection failed on {summary.failed} keyframes; run it again")
        part.replace(target)
    print(f"{target}: {summary.frames} frames, {summary.detections_run} keyframes", flush=True)


def main() -> None:
    """Parse the arguments, redact each video, and report failures at the end."""
    parser = argparse.ArgumentParser(description="Blur faces and license plates in all videos of a folder.")
    parser.add_argument("folder", type=Path, help="folder of videos")
    parser.add_argument("output", type=Path, help="folder for the redacted videos")
    parser.add_argument("--classes", nargs="+", default=["face", "license plate"], help="default: face, license plate")
    parser.add_argument("--model", default="moondream2", help="model name, folder or server URL (default: moondream2)")
    parser.add_argument("--every", type=int, default=5, help="interval of keyframes in frames (default: 5)")
    args, failures = parser.parse_args(), []
    try:
        videos = sorted(path for path in args.folder.iterdir() if path.suffix.lower() in SUFFIXES)
        args.output.mkdir(parents=True, exist_ok=True)
        with Detector(args.model, confidence=0.1) as detector:  # a false detection is better than a visible face
            for video in [path for path in videos if not path.name.endswith(ENDING)]:
                try:
                    redact(video, args.output / f"{video.name}{ENDING}", detector, args)
                except VideoError as error:
                    failures.append(str(error))
    except (MoondreamError, ValueError, OSError) as error:
        raise SystemExit(f"redact_videos.py: {error}") from None
    if failures or not videos:
        raise SystemExit("\n".join([f"{args.folder}: {len(videos)} videos, {len(failures)} failed", *failures]))


if __name__ == "__main__":
    main()
