"""Clip of the demo: rendering, tracking, and comparison of the tracks with the ground truth."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .demo_scenes import Check

if TYPE_CHECKING:
    from PIL import Image

    from moondream_cv.detector import Detector
    from moondream_cv.scenes.clips import Clip

NAMES = ("red circle", "red circle", "dog", "car", "blue star", "purple ring")
SEED = 1
RESOLUTION_WH = (640, 360)
FPS = 30
FRAMES = 6 * FPS
EVERY = 5  # keyframe interval in frames
SHOWN = 6  # frames on the contact sheet


@dataclass
class ClipResult:
    """Result of tracking the clip.

    Attributes:
        source: File of the clip.
        target: File of the annotated clip.
        names: Class names.
        frames: Number of frames.
        detections_run: Number of frames on which the detector ran.
        checks: Number of objects of each class, with the correct number.
        objects: Ground-truth boxes over all frames.
        found: Ground-truth boxes that were found.
        wrong: Tracked boxes without an object of their class.
    """

    source: Path
    target: Path
    names: list[str]
    frames: int = 0
    detections_run: int = 0
    checks: list[Check] = field(default_factory=list)
    objects: int = 0
    found: int = 0
    wrong: int = 0

    @property
    def sheet(self) -> Path:
        """File of the contact sheet."""
        return self.target.with_suffix(".png")

    @property
    def sentence(self) -> str:
        """Summary of the result."""
        right = sum(check.right for check in self.checks)
        return (
            f"{right} of {len(self.checks)} counts correct; {self.found} of {self.objects} boxes found, "
            f"{self.wrong} wrong; detector ran on {self.detections_run} of {self.frames} frames"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the result for JSON."""
        return {
            "source": str(self.source),
            "tracked": str(self.target),
            "contact_sheet": str(self.sheet),
            "frames": self.frames,
            "detections_run": self.detections_run,
            "looked": self.detections_run,  # its name before 0.1, kept until the schema changes
            "checks": [asdict(check) for check in self.checks],
            "boxes": {"true": self.objects, "found": self.found, "wrong": self.wrong},
        }


def render() -> Clip:
    """Return the clip, whose frames are rendered on iteration."""
    from moondream_cv.scenes.clips import render_clip

    return render_clip(SEED, num_frames=FRAMES, names=NAMES, resolution_wh=RESOLUTION_WH)


def track_clip(detector: Detector, folder: Path) -> ClipResult:
    """Render the clip, track its objects, and compare the tracks with the ground truth.

    Args:
        detector: Detector for the keyframes.
        folder: Folder for `clip.mp4` and `tracked.mp4`.

    Raises:
        VideoError: A file cannot be written.
    """
    from moondream_cv.video import annotate_video

    clip = render()
    result = ClipResult(folder / "clip.mp4", folder / "tracked.mp4", list(dict.fromkeys(NAMES)))
    _write(clip, result.source)
    lines = io.StringIO()
    summary = annotate_video(
        result.source,
        result.target,
        result.names,
        annotate="box,label,trace",
        model=detector,
        every=EVERY,
        panel=True,
        json=lines,
    )
    result.frames, result.detections_run = summary.frames, summary.detections_run
    _compare(result, [json.loads(line)["detections"] for line in lines.getvalue().splitlines()], clip)
    return result


def sample_frames(path: Path, count: int = SHOWN) -> list[tuple[float, Image.Image]]:
    """Return evenly spaced frames of a video, each with its time in seconds.

    Args:
        path: Video file.
        count: Number of frames.
    """
    from PIL import Image

    from moondream_cv.video import open_source

    with open_source(path) as source:
        frames = [(frame.time, frame.image) for frame in source]
    chosen = [frames[(2 * number + 1) * len(frames) // (2 * count)] for number in range(count)] if frames else []
    return [(seconds, Image.fromarray(image[..., ::-1].copy())) for seconds, image in chosen]


def _write(clip: Clip, path: Path) -> None:
    import numpy as np
    import supervision as sv

    from moondream_cv.video import Frame
    from moondream_cv.video.writers.video_file import VideoWriter

    path.parent.mkdir(parents=True, exist_ok=True)
    with VideoWriter(path, fps=FPS) as writer:
        for index, (image, _) in enumerate(clip.frames()):
            bgr = np.ascontiguousarray(image[..., ::-1])
            writer.write(Frame(bgr, index, index / FPS), sv.Detections.empty())


def _compare(result: ClipResult, tracked: list[list[dict[str, Any]]], clip: Clip) -> None:
    """Count objects by track ID, and boxes by one-to-one matching at an IoU of 0.5 or more."""
    import numpy as np

    from moondream_cv.evaluation.matching import match_boxes
    from moondream_cv.evaluation.tracks import truth_of

    truth = truth_of(clip)  # visible objects only
    for name in result.names:
        track_ids, true_ids = set(), set()
        for found, objects in zip(tracked, truth, strict=True):
            boxes = [box for box in found if box["class_name"] == name]
            true = [item for item in objects if item.name == name]
            track_ids |= {box["tracker_id"] for box in boxes if box["tracker_id"] is not None}
            true_ids |= {item.track_id for item in true}
            counts, _ = match_boxes(
                np.array([box["xyxy"] for box in boxes], np.float32).reshape(-1, 4),
                np.array([item.xyxy for item in true], np.float32).reshape(-1, 4),
            )
            result.objects += len(true)
            result.found += counts.true_positives
            result.wrong += counts.false_positives
        count, true_count = str(len(track_ids)), str(len(true_ids))
        result.checks.append(Check(f"Track and count {name!r}", count, true_count, count == true_count))
