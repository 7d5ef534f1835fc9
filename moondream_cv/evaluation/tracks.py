"""Tracking metrics on rendered clips with ground truth.

The `trackers` package computes HOTA and the other metrics like TrackEval: Luiten et al., "HOTA: A Higher Order Metric
for Evaluating Multi-Object Tracking", 2020 (https://arxiv.org/abs/2009.07736).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import supervision as sv

from moondream_cv.scenes.clips import Clip, TrackedObject, render_clip

CLIPS = 8
FRAMES = 300
SEED = 9_000
PANS = (3, 6)  # clips with a moving camera
MIN_VISIBLE = 0.25  # visible share from which an object belongs to the ground truth


@dataclass(frozen=True)
class TrackScores:
    """Tracking metrics of one clip, or the mean of several clips.

    Attributes:
        hota: HOTA, between 0 and 1.
        detection: Detection accuracy (DetA), between 0 and 1.
        association: Association accuracy (AssA), between 0 and 1.
        coverage: Recall of the true boxes at an IoU of 0.5.
        switches: Number of ID switches per clip.
    """

    hota: float
    detection: float
    association: float
    coverage: float
    switches: float

    @classmethod
    def mean(cls, scores: Sequence[TrackScores]) -> TrackScores:
        """Return the mean scores of several clips."""
        return cls(*(float(np.mean([getattr(s, name) for s in scores])) for name in cls.__dataclass_fields__))


def tracking_clip(number: int) -> Clip:
    """Return a clip of `FRAMES` frames of 640×360 with 6 to 10 objects of 3 classes.

    Objects move, cross, occlude each other, leave and return. In two clips the camera moves.

    Args:
        number: Number of the clip, below `CLIPS`.
    """
    return render_clip(
        SEED + number,
        num_frames=FRAMES,
        num_objects=6 + number % 5,
        num_classes=3,
        resolution_wh=(640, 360),
        pan=number in PANS,
    )


def truth_of(clip: Clip) -> list[list[TrackedObject]]:
    """Return the visible objects on each frame of a clip."""
    return [[o for o in objects if o.visible >= MIN_VISIBLE] for _, objects in clip.frames()]


class PerfectDetector:
    """Detector that returns the ground truth on frames of `numbered_frames`, except for a random share.

    Attributes:
        calls: Number of calls.
    """

    def __init__(self, truth: Sequence[Sequence[TrackedObject]], missed: float = 0.1, seed: int = 0) -> None:
        """Create a detector.

        Args:
            truth: Objects on each frame.
            missed: Share of the objects to miss.
            seed: Seed of the random choice.
        """
        self._truth, self._missed = truth, missed
        self._rng = np.random.default_rng(seed)
        self.calls = 0

    def __call__(self, image: npt.NDArray[np.uint8], classes: Sequence[str]) -> sv.Detections:
        """Return the detections of a frame, which contains its number."""
        self.calls += 1
        objects = self._truth[int(image[0, 0, 0]) + 256 * int(image[0, 0, 1])]
        kept = [o for o in objects if self._rng.random() >= self._missed]
        return sv.Detections(
            xyxy=np.array([o.xyxy for o in kept], np.float32).reshape(-1, 4),
            confidence=np.full(len(kept), 0.9, np.float32),
            class_id=np.array([classes.index(o.name) for o in kept], int),
            data={"class_name": np.array([o.name for o in kept], dtype=str)},
        )


def numbered_frames(count: int, resolution_wh: tuple[int, int]) -> Iterator[npt.NDArray[np.uint8]]:
    """Yield black frames with their number in the first pixel, for `PerfectDetector`.

    Args:
        count: Number of frames, below 65,536.
        resolution_wh: Width and height.
    """
    for number in range(count):
        image = np.zeros((resolution_wh[1], resolution_wh[0], 3), np.uint8)
        image[0, 0, :2] = number % 256, number // 256
        yield image


def score_tracks(truth: Sequence[Sequence[TrackedObject]], found: Iterable[sv.Detections]) -> TrackScores:
    """Return the tracking metrics of a clip.

    Args:
        truth: Objects on each frame.
        found: Detections on each frame with `tracker_id`. Detections with ID -1 are ignored.
    """
    from trackers.eval import evaluate_mot_sequence

    with tempfile.TemporaryDirectory() as folder:
        true_file, found_file = Path(folder, "gt.txt"), Path(folder, "tracks.txt")
        true_file.write_text(
            "".join(_line(n, o.track_id, o.xyxy) for n, objects in enumerate(truth, 1) for o in objects)
        )
        lines = []
        for number, detections in enumerate(found, 1):
            ids = detections.tracker_id if detections.tracker_id is not None else np.full(len(detections), -1)
            rows = zip(ids.tolist(), detections.xyxy.tolist(), strict=True)
            lines += [_line(number, track_id, box) for track_id, box in rows if track_id >= 0]
        if not lines:
            return TrackScores(0.0, 0.0, 0.0, 0.0, 0.0)
        found_file.write_text("".join(lines))
        result = evaluate_mot_sequence(true_file, found_file, metrics=["CLEAR", "HOTA"])
    hota, clear = result.HOTA, result.CLEAR
    assert hota is not None
    assert clear is not None
    return TrackScores(hota.HOTA, hota.DetA, hota.AssA, clear.CLR_Re, float(clear.IDSW))


def _line(frame: int, track_id: int, box: Sequence[float]) -> str:
    """Return a line in the MOT Challenge format."""
    left, top, right, bottom = box
    return f"{frame},{track_id},{left:.2f},{top:.2f},{right - left:.2f},{bottom - top:.2f},1,1,1\n"
