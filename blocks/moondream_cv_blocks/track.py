"""`moondream_cv/track@v1`: detection on every Nth frame of each video source, and tracked boxes on every frame.

A workflow returns each frame before it gets the next one, so boxes between keyframes are predicted by an
`OnlineTracker`, as for live sources.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import supervision as sv
from pydantic import Field

from moondream_cv.detector import Detector
from moondream_cv.video import Frame, OnlineTracker, Tracking
from moondream_cv.video.sources.base import ASSUMED_FPS
from moondream_cv.video.tracking.schedule import Schedule

from .detect import KIND
from .fields import ALWAYS_VISIBLE, BoxManifest, CountField, block_metadata, error_output_definitions
from .pool import ModelPool
from .results import NO_ERROR, as_prediction, block_outputs, empty_prediction, error_outputs, pixels_of
from .roboflow import (
    Batch,
    BlockResult,
    OutputDefinition,
    VideoMetadata,
    WorkflowImageData,
    prototypes,
    types,
)
from .running import MoondreamBlock, run_detector
from .values import parse_class_names, parse_count

DETECTIONS = ("tracked_detections", "new_instances", "already_seen_instances")
CROP_SEPARATOR = " | crop: "  # between the identifier of the whole video and that of a crop
MAX_SOURCES = 64  # beyond that, the least recently used source is forgotten

DESCRIPTION = """
Detect objects by name with **Moondream 2** on every Nth frame of a video, and track them on all frames. Objects keep
their track IDs when they cross, are occluded, or leave and return.

#### How it works

- The model runs on a frame of a source when `every` frames have passed since the last one, according to the frame
  numbers in the video metadata. Frames of several sources that are due at the same time are detected in one call.
- Each source has its own tracker per class. Between detections, boxes move at constant velocity.
- When a source restarts or changes its size, all tracks end, and new objects get new track IDs.
- Without video metadata, each run counts as the next frame, and each image of a batch is a source.
- A crop at a fixed position of the frame (a static crop or a slice) is a separate source. Objects in moving crops
  cannot be tracked. Slices have no video metadata, so they support a single camera.

#### Outputs

- `tracked_detections`: the objects on the frame, with `tracker_id`.
- `new_instances`: objects whose track ID is new.
- `already_seen_instances`: all other objects.

They work with line counters, zones, time in zone, trace visualizations and velocity.

#### When a frame fails

The detections are empty, `error_status` is true and `error_message` gives the reason. The workflow continues, and the
next detection runs after `every` frames. Until a detection succeeds, the error status stays, and boxes are predicted
for about two keyframe intervals.

Track state is kept in the process. Use the block in an `InferencePipeline`, or with one `ExecutionEngine` for all
frames, not in single HTTP requests.
"""


class Manifest(BoxManifest):
    """Tracked boxes on every frame of each video source."""

    model_config = block_metadata(
        "Moondream Track",
        "Detect objects by name on every Nth frame, and track them on all frames.",
        DESCRIPTION,
        keywords=["open vocabulary", "zero-shot", "track", "video", "count"],
        priority=5.44,
        section="video",
    )
    type: Literal["moondream_cv/track@v1"]
    every: CountField = Field(
        default=5,
        title="Every Nth Frame",
        description="Run the model on every Nth frame of each source; boxes in between are predicted. 1: on all.",
        examples=[5, 1, "$inputs.every"],
        json_schema_extra=ALWAYS_VISIBLE,
    )
    tracker: Literal["sort", "ocsort", "bytetrack", "botsort"] = Field(
        default="sort",
        title="Tracker",
        description="Algorithm that matches boxes between keyframes. `sort` suits most videos; try another one if "
        "track IDs switch between objects.",
        examples=["sort", "bytetrack"],
    )

    @classmethod
    def get_restrictions(cls) -> list[Any]:
        """Return the restrictions that workflow engines from 1.17 on show."""
        names = ("STATEFUL_VIDEO_HTTP_SOFT_RESTRICTION", "STILL_IMAGE_INPUT_SOFT_RESTRICTION")
        return [getattr(prototypes, name) for name in names if hasattr(prototypes, name)]

    @classmethod
    def describe_outputs(cls) -> list[OutputDefinition]:
        """Return the definitions of the outputs."""
        return [
            OutputDefinition(name=name, kind=[types.OBJECT_DETECTION_PREDICTION_KIND]) for name in DETECTIONS
        ] + error_output_definitions()


class TrackBlock(MoondreamBlock):
    """Detects objects on keyframes and tracks them, with separate state for each video source."""

    manifest = Manifest

    def __init__(self, models: ModelPool) -> None:
        """Start without sources."""
        super().__init__(models)
        self._streams: OrderedDict[str, _Stream] = OrderedDict()
        self._lock = threading.Lock()

    def run(
        self,
        images: Batch[WorkflowImageData],
        class_names: list[str] | str,
        model: str,
        confidence: float,
        max_objects: int,
        every: int,
        nms: float | None,
        tracker: str,
    ) -> BlockResult:
        """Process one frame of each source. Errors become error outputs."""
        # Check the fields
        try:
            every, names = parse_count(every, "every"), parse_class_names(class_names)
        except Exception as error:
            return block_outputs([error] * len(images), images, _frame_outputs, _empty_outputs, "track")

        # Schedule the frames of each source
        with self._lock:
            frames = [self._schedule(image, every, names, tracker) for image in images]

        # Detect on keyframes
        keyframes = [i for i, frame in enumerate(frames) if isinstance(frame, _ScheduledFrame) and frame.is_keyframe]
        options = {"confidence": confidence, "max_objects": max_objects, "nms": nms}
        results = run_detector(Detector, self._models, model, [images[i] for i in keyframes], names, **options)
        detections = dict(zip(keyframes, results, strict=True))

        # Track
        with self._lock:
            pairs = [(frame, detections.get(i)) for i, frame in enumerate(frames)]
            return block_outputs(pairs, images, _frame_outputs, _empty_outputs, "track")

    def _schedule(
        self, image: WorkflowImageData, every: int, names: Sequence[str], tracker: str
    ) -> _ScheduledFrame | Exception:
        """Add a frame to the stream of its source; return the error if that is impossible."""
        try:
            pixels, metadata = pixels_of(image), image.video_metadata
            source = _source_of(image, pixels, metadata)
            if source not in self._streams:
                self._streams[source] = _Stream(metadata, tracker)
                if len(self._streams) > MAX_SOURCES:
                    self._streams.popitem(last=False)
            self._streams.move_to_end(source)
            return self._streams[source].schedule(metadata.frame_number, pixels, every, names)
        except Exception as error:
            return error


def _source_of(image: WorkflowImageData, pixels: npt.NDArray[np.uint8], metadata: VideoMetadata) -> str:
    """Return the identifier of a frame's source. A crop has a new name in each frame, so its position identifies it."""
    parent, root = image.parent_metadata, image.workflow_root_ancestor_metadata
    source: str = metadata.video_identifier
    if parent.parent_id == root.parent_id:
        return source
    whole = root.parent_id if source == parent.parent_id else source.partition(CROP_SEPARATOR)[0]
    height, width = pixels.shape[:2]
    origin = root.origin_coordinates
    return f"{whole} {width}x{height} at {origin.left_top_x}, {origin.left_top_y}"


@dataclass(frozen=True)
class _ScheduledFrame:
    """A frame in the stream of its source.

    Attributes:
        stream: Stream of the source.
        frame: Pixels, index and time.
        is_keyframe: Whether the model runs on this frame.
        is_restart: Whether all tracks end before this frame.
        interval: Seconds between keyframes.
    """

    stream: _Stream
    frame: Frame
    is_keyframe: bool
    is_restart: bool
    interval: float


class _Stream:
    """State of one source. Frames are first scheduled, then detected in one call, then tracked, each in order.

    Attributes:
        error_outputs: Error outputs of the last keyframe.
    """

    def __init__(self, metadata: VideoMetadata, tracker: str) -> None:
        rates = (rate for rate in (metadata.fps, metadata.measured_fps) if rate and 0 < rate < math.inf)
        self._fps = next(rates, ASSUMED_FPS)
        self._tracker = OnlineTracker(Tracking(tracker))
        self._schedule = Schedule(1, self._fps)
        self._number: int | None = None  # frame number of the source
        self._index = -1  # frame number that never falls
        self._configuration: tuple[Any, ...] = ()  # frame size and class names; tracks end when it changes
        self._max_id = 0  # highest track ID so far
        self.error_outputs = NO_ERROR

    def schedule(self, number: int, pixels: Any, every: int, names: Sequence[str]) -> _ScheduledFrame:
        """Count a frame, and decide whether the model runs on it.

        Args:
            number: Frame number of the source. If it does not change, the source does not count its frames.
            pixels: [H, W, 3] uint8 BGR.
            every: Frames between keyframes.
            names: Class names.
        """
        step = 1 if self._number is None else number - self._number
        configuration = (pixels.shape[:2], tuple(names))
        is_restart = step < 0 or configuration != self._configuration
        self._number, self._configuration = number, configuration
        self._index += max(step, 1)
        if is_restart:
            self._schedule.restart()
        self._schedule.interval = every
        frame = Frame(pixels, self._index, self._index / self._fps)
        return _ScheduledFrame(self, frame, self._schedule.is_due(self._index), is_restart, every / self._fps)

    def start(self, scheduled: _ScheduledFrame, result: sv.Detections | Exception | None) -> None:
        """Apply a restart, and store whether detection failed, before the frame is tracked.

        Args:
            scheduled: The next frame of the source.
            result: Detections or error of a keyframe; None for other frames.
        """
        if scheduled.is_restart:
            self.reset()
        if result is not None:
            self.error_outputs = error_outputs(result) if isinstance(result, Exception) else NO_ERROR

    def reset(self) -> None:
        """End all tracks. Track IDs are not reused."""
        self._tracker.reset()

    def track(self, scheduled: _ScheduledFrame, detections: sv.Detections | None) -> sv.Detections:
        """Return the tracked objects on a frame.

        Args:
            scheduled: The frame.
            detections: Detections of a keyframe; None for other frames.
        """
        tracked = self._tracker.step_frame(
            scheduled.frame, detections, unknown_interval=scheduled.interval, min_interval=scheduled.interval
        )
        confirmed: sv.Detections = tracked[np.asarray(tracked.tracker_id) >= 0]  # type: ignore[assignment]
        return confirmed

    def are_new(self, detections: sv.Detections) -> npt.NDArray[np.bool_]:
        """Return whether the track ID of each object is new, [N]: track IDs only rise."""
        ids = np.asarray(detections.tracker_id, int)
        new: npt.NDArray[np.bool_] = ids > self._max_id
        self._max_id = max(self._max_id, *ids.tolist(), 0)
        return new


def _frame_outputs(result: tuple[_ScheduledFrame | Exception, Any], image: WorkflowImageData) -> dict[str, Any]:
    """Return the outputs for one frame.

    Raises:
        Exception: The frame could not be scheduled, detected or tracked.
    """
    scheduled, detections = result
    if isinstance(scheduled, Exception):
        raise scheduled
    stream = scheduled.stream
    stream.start(scheduled, detections)
    if isinstance(detections, Exception):
        raise detections
    try:
        tracked = as_prediction(stream.track(scheduled, detections), image, KIND)
        new = stream.are_new(tracked)
        return {
            "tracked_detections": tracked,
            "new_instances": _select(tracked, new, image),
            "already_seen_instances": _select(tracked, ~new, image),
            **stream.error_outputs,
        }
    except Exception as error:
        stream.reset()
        stream.error_outputs = error_outputs(error)
        raise


def _select(tracked: sv.Detections, mask: npt.NDArray[np.bool_], image: WorkflowImageData) -> sv.Detections:
    selected: sv.Detections = tracked[mask]  # type: ignore[assignment]
    return selected if len(selected) else as_prediction(selected, image, KIND)


def _empty_outputs(image: WorkflowImageData) -> dict[str, Any]:
    outputs = {name: empty_prediction(image, KIND) for name in DETECTIONS}
    for detections in outputs.values():
        detections.tracker_id = np.empty(0, int)  # line counters require track IDs
    return outputs
