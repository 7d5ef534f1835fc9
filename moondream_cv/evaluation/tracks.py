"""How well objects keep their numbers, on rendered clips with ground truth.

HOTA and the rest are computed by the `trackers` package, as TrackEval does: Luiten et al., "HOTA: A Higher Order Metric
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
PANS = (3, 6)  # the clips with a moving camera
MIN_VISIBLE = 0.25  # of an object, below which it is not asked for


@dataclass(frozen=True)
class TrackScores:
    """How well the tracks of a clip, or of several, agree with what is true.

    Attributes:
        hota: 0..1, of boxes and numbers together.
        detection: 0..1, its part for boxes.
        association: 0..1, its part for numbers.
        coverage: Share of the true boxes that one of the boxes lies on, at an IoU of 0.5.
        switches: How often an object's number changed, per clip.
    """

    hota: float
    detection: float
    association: float
    coverage: float
    switches: float

    @classmethod
    def mean(cls, scores: Sequence[TrackScores]) -> TrackScores:
        """Of several clips."""
        return cls(*(float(np.mean([getattr(s, name) for s in scores])) for name in cls.__dataclass_fields__))


def tracking_clip(number: int) -> Clip:
    """One of `CLIPS` clips of `FRAMES` frames of 640×360: 6 to 10 objects of 3 classes.

    They move, cross, hide each other, leave and come back; in two of them the camera moves.
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
    """What can be seen on each frame."""
    return [[o for o in objects if o.visible >= MIN_VISIBLE] for _, objects in clip.frames()]


class PerfectDetector:
    """Finds what is true, but for a share of it, on frames that `numbered_frames` gives.

    Attributes:
        calls: Number of calls.
    """

    def __init__(self, truth: Sequence[Sequence[TrackedObject]], missed: float = 0.1, seed: int = 0) -> None:
        self._truth, self._missed = truth, missed
        self._rng = np.random.default_rng(seed)
        self.calls = 0

    def __call__(self, image: npt.NDArray[np.uint8], classes: Sequence[str]) -> sv.Detections:
        """What is on a frame, which says its number itself."""
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
    """Black frames that carry their number in their first pixel, for `PerfectDetector`."""
    for number in range(count):
        image = np.zeros((resolution_wh[1], resolution_wh[0], 3), np.uint8)
        image[0, 0, :2] = number % 256, number // 256
        yield image


def score_tracks(truth: Sequence[Sequence[TrackedObject]], found: Iterable[sv.Detections]) -> TrackScores:
    """Compare the tracks of a clip with what is true.

    Args:
        found: What was tracked on each frame, with `tracker_id`; rows of which that is -1 count for nothing.
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
    """A line of MOT challenge text, of something that counts."""
    left, top, right, bottom = box
    return f"{frame},{track_id},{left:.2f},{top:.2f},{right - left:.2f},{bottom - top:.2f},1,1,1\n"
