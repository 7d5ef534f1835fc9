"""`moondream_cv/track@v1`: objects with numbers that stay, on every frame of each video source.

The model looks at every Nth frame. Between those, boxes are predicted: a workflow gives each frame back before it gets
the next one, so what comes is not known, as with a live source of `moondream_cv.video`.
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
from moondream_cv.video import Frame, Tracking
from moondream_cv.video.sources.base import ASSUMED_FPS
from moondream_cv.video.tracking.interpolation import as_detections, predicted

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
CROP_OF = " | crop: "  # stands in an identifier behind that of the whole video
MAX_SOURCES = 64  # that are remembered; those seen longest ago are forgotten

DESCRIPTION = """
Detect objects by name with **Moondream 2** on every Nth frame of a video, and follow them in between. Things keep their
numbers when they cross, hide, or leave and come back.

#### How it works

- The model looks at a frame of a source when `every` frames have passed since the last one it looked at, by the frame
  numbers in the video's metadata. The frames of several sources that are due at the same time go to it in one call.
- Each source has its own tracker for each class. On the frames in between, boxes move on as they moved before.
- A source that starts again from the beginning, or changes its size, is tracked anew; numbers are not given twice.
- Without video metadata each run brings the next frame; the images of a batch are of one source each.
- A crop at a fixed place of the frame (a static crop, a slice) is a source of its own. In crops that move nothing can
  be tracked. Slices carry no video metadata, so they are for one camera.

#### Outputs

- `tracked_detections`: what is on the frame, each with its `tracker_id`.
- `new_instances`: those of them whose number is there for the first time.
- `already_seen_instances`: the others.

Line counters, zones, time in zone, trace visualisations and velocity take them.

#### When a frame fails

The detections are empty, `error_status` is true and `error_message` says why. The workflow goes on, and the model looks
again after `every` frames. Until a look succeeds the error stays, while boxes go on as they went for about two looks.

State lives in the process: use it in an `InferencePipeline` or with one `ExecutionEngine` for all frames, not in single
HTTP requests.
"""


class Manifest(BoxManifest):
    """Boxes with numbers that stay, on every frame of each video source."""

    model_config = block_metadata(
        "Moondream Track",
        "Detect objects by name on every Nth frame and follow them in between.",
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
        description="How the boxes of one look are matched with those of the look before. `sort` suits most videos; "
        "the others are there where it mixes things up.",
        examples=["sort", "bytetrack"],
    )

    @classmethod
    def get_restrictions(cls) -> list[Any]:
        """Engines from 1.17 on show them."""
        names = ("STATEFUL_VIDEO_HTTP_SOFT_RESTRICTION", "STILL_IMAGE_INPUT_SOFT_RESTRICTION")
        return [getattr(prototypes, name) for name in names if hasattr(prototypes, name)]

    @classmethod
    def describe_outputs(cls) -> list[OutputDefinition]:
        return [
            OutputDefinition(name=name, kind=[types.OBJECT_DETECTION_PREDICTION_KIND]) for name in DETECTIONS
        ] + error_output_definitions()


class TrackBlock(MoondreamBlock):
    """Frames × class names → boxes with numbers."""

    manifest = Manifest

    def __init__(self, models: ModelPool) -> None:
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
        try:
            every, names = parse_count(every, "every"), parse_class_names(class_names)
        except Exception as error:
            return block_outputs([error] * len(images), images, _tracked, _nothing, "track")
        with self._lock:
            places = [self._placed(image, every, names, tracker) for image in images]
        due = [index for index, place in enumerate(places) if isinstance(place, _Place) and place.due]
        options = {"confidence": confidence, "max_objects": max_objects, "nms": nms}
        found = run_detector(Detector, self._models, model, [images[index] for index in due], names, **options)
        looked = dict(zip(due, found, strict=True))
        with self._lock:
            return block_outputs(
                [(place, looked.get(index)) for index, place in enumerate(places)], images, _tracked, _nothing, "track"
            )

    def _placed(self, image: WorkflowImageData, every: int, names: Sequence[str], tracker: str) -> _Place | Exception:
        """Where a frame belongs, or why that cannot be told."""
        try:
            return self._place(image, every, names, tracker)
        except Exception as error:
            return error

    def _place(self, image: WorkflowImageData, every: int, names: Sequence[str], tracker: str) -> _Place:
        pixels, metadata = pixels_of(image), image.video_metadata
        source = _source_of(image, pixels, metadata)
        if source not in self._streams:
            self._streams[source] = _Stream(metadata, tracker)
            if len(self._streams) > MAX_SOURCES:
                self._streams.popitem(last=False)
        self._streams.move_to_end(source)
        return self._streams[source].place(metadata.frame_number, pixels, every, names)


def _source_of(image: WorkflowImageData, pixels: npt.NDArray[np.uint8], metadata: VideoMetadata) -> str:
    """Which source a frame is of. A crop is named anew in each frame, so the place that it was cut from tells it."""
    parent, root = image.parent_metadata, image.workflow_root_ancestor_metadata
    source: str = metadata.video_identifier
    if parent.parent_id == root.parent_id:
        return source
    whole = root.parent_id if source == parent.parent_id else source.partition(CROP_OF)[0]
    height, width = pixels.shape[:2]
    origin = root.origin_coordinates
    return f"{whole} {width}x{height} at {origin.left_top_x}, {origin.left_top_y}"


@dataclass(frozen=True)
class _Place:
    """A frame of a source.

    Attributes:
        due: Whether the model is to look at it.
        anew: Whether nothing is carried over into it.
        interval: Seconds from one look to the next.
    """

    stream: _Stream
    frame: Frame
    names: Sequence[str]
    due: bool
    anew: bool
    interval: float


class _Stream:
    """What is remembered of a source. Frames are placed, then looked at together, then tracked, each in their order.

    Attributes:
        trouble: The error outputs of the last look.
    """

    def __init__(self, metadata: VideoMetadata, tracker: str) -> None:
        told = (rate for rate in (metadata.fps, metadata.measured_fps) if rate and 0 < rate < math.inf)
        self._fps = next(told, ASSUMED_FPS)
        self._tracker = Tracking(tracker).start()
        self._number: int | None = None  # of the last frame, as the source counts
        self._index = -1  # of the last frame, as it is counted here: it never falls
        self._looked: int | None = None
        self._scene: tuple[Any, ...] = ()  # while it is the same, objects are
        self._highest = 0  # number of an object
        self.trouble = NO_ERROR

    def place(self, number: int, pixels: Any, every: int, names: Sequence[str]) -> _Place:
        """Count a frame, and say what is to be done with it.

        Args:
            number: As the source counts. The same again is another frame of a source that does not count.
        """
        step = 1 if self._number is None else number - self._number
        scene = (pixels.shape[:2], tuple(names))
        anew = step < 0 or scene != self._scene
        self._number, self._scene = number, scene
        self._index += max(step, 1)
        due = anew or self._looked is None or self._index - self._looked >= every
        if due:
            self._looked = self._index
        frame = Frame(pixels, self._index, self._index / self._fps)
        return _Place(self, frame, names, due, anew, every / self._fps)

    def enter(self, place: _Place, found: sv.Detections | Exception | None) -> None:
        """Come to a frame, whatever the model makes of it; None where it did not look."""
        if place.anew:
            self.forget()
        if found is not None:
            self.trouble = error_outputs(found) if isinstance(found, Exception) else NO_ERROR

    def forget(self) -> None:
        """Carry nothing over to what comes; numbers are not given twice."""
        self._tracker = self._tracker.anew()

    def detections(self, place: _Place, found: sv.Detections | None) -> sv.Detections:
        """What is on the frame that was come to, with numbers.

        Args:
            found: What the model has seen on it; None where it did not look.
        """
        frame = place.frame
        if found is not None:
            self._tracker.update(found, frame)
        resolution_wh = (frame.image.shape[1], frame.image.shape[0])
        interval = max(self._tracker.interval, place.interval)
        seen = predicted(self._tracker.tracks.values(), frame.time, interval, resolution_wh)
        return as_detections(seen, place.names, resolution_wh)

    def are_new(self, detections: sv.Detections) -> npt.NDArray[np.bool_]:
        """Which of them are there for the first time, [N]: numbers only rise."""
        numbers = np.asarray(detections.tracker_id, int)
        new: npt.NDArray[np.bool_] = numbers > self._highest
        self._highest = max(self._highest, *numbers.tolist(), 0)
        return new


def _tracked(result: tuple[_Place | Exception, Any], image: WorkflowImageData) -> dict[str, Any]:
    place, found = result
    if isinstance(place, Exception):
        raise place
    place.stream.enter(place, found)
    if isinstance(found, Exception):
        raise found
    try:
        tracked = as_prediction(place.stream.detections(place, found), image, KIND)
        new = place.stream.are_new(tracked)
        return {
            "tracked_detections": tracked,
            "new_instances": _part(tracked, new, image),
            "already_seen_instances": _part(tracked, ~new, image),
            **place.stream.trouble,
        }
    except Exception as error:
        place.stream.forget()
        place.stream.trouble = error_outputs(error)
        raise


def _part(tracked: sv.Detections, mask: npt.NDArray[np.bool_], image: WorkflowImageData) -> sv.Detections:
    part: sv.Detections = tracked[mask]  # type: ignore[assignment]
    return part if len(part) else as_prediction(part, image, KIND)


def _nothing(image: WorkflowImageData) -> dict[str, Any]:
    given = {name: empty_prediction(image, KIND) for name in DETECTIONS}
    for nothing in given.values():
        nothing.tracker_id = np.empty(0, int)  # line counters insist on numbers
    return given
