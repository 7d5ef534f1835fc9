"""The demo's clip: what moves in it, how it is tracked, and how far the tracks are true.

The clip is rendered and written as a file, which then goes the way of every other video. Printing is left to
`moondream_cv.cli.demo`.
"""

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
EVERY = 5  # frames, one of which the model looks at
SHOWN = 6  # frames on the picture of the clip


@dataclass
class Followed:
    """A clip with what was tracked in it.

    Attributes:
        source: The clip as a file.
        target: The same with what was tracked drawn in.
        names: What was looked for.
        frames: How many there are.
        detections_run: How many of them the detector ran on.
        checks: The number of objects of each name.
        objects: Boxes that are true, over all frames.
        found: How many of those were found.
        wrong: Boxes that were drawn where none of their name is.
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
        """Where the picture with some of its frames goes."""
        return self.target.with_suffix(".png")

    @property
    def sentence(self) -> str:
        """How well it went."""
        right = sum(check.right for check in self.checks)
        return (
            f"{right} of {len(self.checks)} counts right; {self.found} of {self.objects} boxes found, "
            f"{self.wrong} wrong; detector ran on {self.detections_run} of {self.frames} frames"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {
            "source": str(self.source),
            "tracked": str(self.target),
            "contact_sheet": str(self.sheet),
            "frames": self.frames,
            "detections_run": self.detections_run,
            "checks": [asdict(check) for check in self.checks],
            "boxes": {"true": self.objects, "found": self.found, "wrong": self.wrong},
        }


def render() -> Clip:
    """Plan the clip."""
    from moondream_cv.scenes.clips import render_clip

    return render_clip(SEED, num_frames=FRAMES, names=NAMES, resolution_wh=RESOLUTION_WH)


def follow(detector: Detector, folder: Path) -> Followed:
    """Render the clip, track through it what it shows, and compare with the truth.

    Args:
        detector: What looks.
        folder: Gets `clip.mp4` and `tracked.mp4`.

    Raises:
        VideoError: A file cannot be written.
    """
    from moondream_cv.video import annotate_video

    clip = render()
    result = Followed(folder / "clip.mp4", folder / "tracked.mp4", list(dict.fromkeys(NAMES)))
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


def shown_frames(path: Path, count: int = SHOWN) -> list[tuple[float, Image.Image]]:
    """Read frames of a video, evenly spaced, each with its time in seconds."""
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


def _compare(result: Followed, tracked: list[list[dict[str, Any]]], clip: Clip) -> None:
    """Count objects by their numbers, and boxes by their overlap: half is enough, each counts once."""
    import numpy as np

    from moondream_cv.evaluation.matching import match_boxes
    from moondream_cv.evaluation.tracks import truth_of

    truth = truth_of(clip)  # what can be seen
    for name in result.names:
        numbers, true_numbers = set(), set()
        for found, objects in zip(tracked, truth, strict=True):
            rows = [row for row in found if row["class_name"] == name]
            true = [item for item in objects if item.name == name]
            numbers |= {row["tracker_id"] for row in rows if row["tracker_id"] is not None}
            true_numbers |= {item.track_id for item in true}
            counts, _ = match_boxes(
                np.array([row["xyxy"] for row in rows], np.float32).reshape(-1, 4),
                np.array([item.xyxy for item in true], np.float32).reshape(-1, 4),
            )
            result.objects += len(true)
            result.found += counts.true_positives
            result.wrong += counts.false_positives
        said, true_count = str(len(numbers)), str(len(true_numbers))
        result.checks.append(Check(f"Track and count {name!r}", said, true_count, said == true_count))
