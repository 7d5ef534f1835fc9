"""Measure tracking with detection on keyframes, and compare it with other methods.

    python benchmarks/tracking.py              # perfect detector that misses 10 %, and the tiny model: minutes
    python benchmarks/tracking.py --perfect    # perfect detector only: half a minute

There are eight rendered clips of 300 frames with 6 to 10 objects of 3 classes, which move, cross, leave and return. In
two clips the camera moves. The metrics are HOTA from the `trackers` package, ID switches per clip, and coverage of the
true boxes at an IoU of 0.5.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import supervision as sv
import trackers

from moondream_cv import Detector, load
from moondream_cv.evaluation.tracks import (
    CLIPS,
    PerfectDetector,
    TrackScores,
    numbered_frames,
    score_tracks,
    tracking_clip,
    truth_of,
)
from moondream_cv.scenes.clips import Clip, TrackedObject
from moondream_cv.video import OnlineTracker, Tracking, track_streams
from moondream_cv.video.sources.frame import Frame

EVERY = (1, 3, 5, 10, 15)
FPS = 30.0

Truth = list[list[TrackedObject]]
Run = Callable[[Clip, Truth, Any, int], Iterator[sv.Detections]]


def frames_of(clip: Clip, detector: Any) -> Iterator[np.ndarray]:
    """Yield the frames that the detector needs: numbered ones for `PerfectDetector`, images for a model."""
    if isinstance(detector, PerfectDetector):
        return numbered_frames(len(clip), clip.resolution_wh)
    return (np.ascontiguousarray(image[..., ::-1]) for image, _ in clip.frames())


def ours(clip: Clip, truth: Truth, detector: Any, every: int, **options: Any) -> Iterator[sv.Detections]:
    source = frames_of(clip, detector)
    for tracked in track_streams([source], clip.class_names, model=detector, every=every, tracking=Tracking(**options)):
        yield tracked.detections


def ours_live(clip: Clip, truth: Truth, detector: Any, every: int) -> Iterator[sv.Detections]:
    """Track as in a live source, with a model that takes no time."""
    tracker = OnlineTracker(classes=clip.class_names)
    for index, image in enumerate(frames_of(clip, detector)):
        detections = detector(image, clip.class_names) if index % every == 0 else None
        frame = Frame(image, index, index / FPS)
        yield tracker.step_frame(frame, detections, unknown_interval=every / FPS, min_interval=every / FPS)


def trackers_alone(make: Callable[[], Any], timed: bool = False) -> Run:
    """Return a run with one tracker per class, empty updates between keyframes, and the boxes that it predicts.

    Args:
        make: Function that creates a tracker.
        timed: Update on keyframes only, with timestamps.
    """

    def run(clip: Clip, truth: Truth, detector: Any, every: int) -> Iterator[sv.Detections]:
        each = [make() for _ in clip.class_names]
        for index, image in enumerate(frames_of(clip, detector)):
            is_keyframe = index % every == 0
            found = detector(image, clip.class_names) if is_keyframe else sv.Detections.empty()
            found.confidence = np.ones(len(found), np.float32)  # constant scores below 0.7 give no tracks at all
            boxes, ids = [], []
            for class_id, tracker in enumerate(each):
                part = found[found.class_id == class_id] if len(found) else found
                if is_keyframe or not timed:
                    tracker.update(part, **({"timestamp": index / FPS} if timed else {}))
                tracked = tracker.tracked_objects
                boxes += tracked.xyxy.tolist()
                ids += [1000 * class_id + i for i in tracked.tracker_id.tolist()]
            yield sv.Detections(xyxy=np.array(boxes, np.float32).reshape(-1, 4), tracker_id=np.array(ids, int))

    return run


def untracked(clip: Clip, truth: Truth, detector: Any, every: int) -> Iterator[sv.Detections]:
    """Run without tracking: boxes stay until the next keyframe, and each one gets a new ID there."""
    found, given = sv.Detections.empty(), 0
    for index, image in enumerate(frames_of(clip, detector)):
        if index % every == 0:
            found = detector(image, clip.class_names)
            found.tracker_id = np.arange(given, given + len(found))
            given += len(found)
        yield found


def methods() -> dict[str, Run]:
    sort = trackers.SORTTracker
    table: dict[str, Run] = {
        "file (interpolated)": ours,
        "live (predicted)": ours_live,
        "file, OC-SORT": lambda *a: ours(*a, tracker="ocsort"),
        "ByteTrack, empty updates": trackers_alone(trackers.ByteTrackTracker),
        "SORT, its defaults": trackers_alone(sort),
        "no tracking": untracked,
    }
    if "iou" in inspect.signature(sort).parameters:
        from trackers.utils.iou import GIoU

        best = {"minimum_consecutive_frames": 1, "minimum_iou_threshold": -0.5}
        table["SORT with GIoU"] = trackers_alone(lambda: sort(iou=GIoU(), **best))
    return table


def measure(detector_of: Callable[[Truth, int], Any], names: Sequence[str] | None = None) -> None:
    clips = [tracking_clip(number) for number in range(CLIPS)]
    truths = [truth_of(clip) for clip in clips]
    print(f"{'':28} {'every':>5} {'HOTA':>7} {'DetA':>7} {'AssA':>7} {'coverage':>8} {'switches':>8}  per clip")
    for name, run in methods().items():
        if names is not None and name not in names:
            continue
        for every in EVERY:
            scores = []
            for number, (clip, truth) in enumerate(zip(clips, truths, strict=True)):
                scores.append(score_tracks(truth, run(clip, truth, detector_of(truth, number), every)))
            mean, switches = TrackScores.mean(scores), [int(s.switches) for s in scores]
            print(
                f"{name:28} {every:5} {mean.hota:7.3f} {mean.detection:7.3f} {mean.association:7.3f} "
                f"{mean.coverage:8.3f} {mean.switches:8.2f}  {switches}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--perfect", action="store_true", help="Run the perfect detector only.")
    parser.add_argument(
        "--confidence", type=float, default=0.3, help="Minimum confidence of the tiny model (default: 0.3)."
    )
    arguments = parser.parse_args()
    print(f"trackers {version('trackers')}\n\nPerfect detector that misses 10 %")
    measure(lambda truth, number: PerfectDetector(truth, 0.1, number))
    if arguments.perfect:
        return
    print(f"\nTiny model, minimum confidence {arguments.confidence}")
    with load("tiny", device="cpu") as model:
        detector = Detector(model, confidence=arguments.confidence)
        measure(lambda truth, number: detector, ("file (interpolated)", "live (predicted)", "no tracking"))


if __name__ == "__main__":
    main()
