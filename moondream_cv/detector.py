"""`Detector` and `Pointer`: find objects by class name in frames, and return `sv.Detections`.

Both send one request per frame and class to a `VisionModel` and convert the results to pixels. For tracking and drawing
see `moondream_cv.video`; for slicing see `sv.InferenceSlicer`.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Sequence, Set
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypedDict, TypeVar, cast, get_args, overload

import numpy as np
import numpy.typing as npt
import supervision as sv
from PIL import Image

from moondream_cv import postprocessing
from moondream_cv._deprecation import renamed_arguments, renamed_function
from moondream_cv._inherited_options import inherit_options
from moondream_cv.arguments import (
    check_choice,
    check_classes,
    check_not_negative,
    check_probability,
    check_share,
)
from moondream_cv.errors import ImageError, UnsupportedSkill
from moondream_cv.geometry import clip_xyxy, denormalize_xyxy
from moondream_cv.images import ImageInput, is_encoded, to_rgb
from moondream_cv.masks import MaskFunction, MaskRunner
from moondream_cv.requests import Detect, DetectResult, ErrorResult, Point, PointResult, Result, Settings
from moondream_cv.vision_model import VisionModel

if TYPE_CHECKING:
    from typing_extensions import Unpack

logger = logging.getLogger(__name__)

Self = TypeVar("Self", bound="_FrameDetector")
Failed = TypeVar("Failed")
OnError = Literal["raise", "empty"]
Box = tuple[float, float, float, float]


class EncodedLike(Protocol):
    """An image that a model has already encoded; `size` is its (width, height) in pixels."""

    @property
    def size(self) -> tuple[int, int]: ...


Frame = ImageInput | EncodedLike


class DetectorOptions(TypedDict, total=False):
    """Types of the keyword arguments that `Detector` and `Pointer` share."""

    confidence: float
    max_objects: int
    drop_duplicates: bool
    mark_truncated: bool
    on_error: OnError
    device: str | None
    max_crops: int | None
    adapter: str | os.PathLike[str] | None


class _FrameDetector:
    """Base class of `Detector` and `Pointer`.

    Attributes:
        model: Model that runs the requests.
        confidence: Minimum confidence.
        settings: Settings of every request.
    """

    _request: ClassVar[type[Detect] | type[Point]]

    def __init__(
        self,
        model: str | os.PathLike[str] | VisionModel = "moondream2",
        *,
        confidence: float = 0.0,
        max_objects: int = 50,
        drop_duplicates: bool = True,
        mark_truncated: bool = False,
        on_error: OnError = "raise",
        device: str | None = None,
        max_crops: int | None = None,
        adapter: str | os.PathLike[str] | None = None,
    ) -> None:
        """Load a model, or use a loaded one.

        Args:
            model: Model name or folder for `moondream_cv.load`, server URL, or a loaded `VisionModel`. A name may
                start a download.
            confidence: Minimum confidence, between 0 and 1. Models without scores return 1.0 for every object.
            max_objects: Maximum number of objects per frame and class.
            drop_duplicates: Keep the most confident one of detections with the same class and exactly the same box.
            mark_truncated: Fill `data["truncated"]`, bool [N]: whether `max_objects` truncated the results of the
                object's class, so that the frame may contain more. If False, truncation is only logged: supervision
                merges detections only if their `data` has the same keys, and those of other libraries have
                `class_name` only.
            on_error: Handling of a frame that cannot be read or on which the model fails: "raise" raises the error,
                "empty" returns empty detections for the frame and logs a warning.
            device: Device for a model given by name, such as "cuda:1". None selects the best available.
            max_crops: Maximum number of local crops per image; fewer are faster and less accurate. None uses the
                value that the model was trained with.
            adapter: LoRA adapter to use, as a file, a folder, "ID@STEP" of a finetune or a published ID. None uses the
                adapter that the model was loaded with.

        Raises:
            ValueError: An argument is out of range, or `model` is neither a name nor a model.
            UnsupportedSkill: The model does not have the required skill.
            MoondreamError: The model cannot be loaded.
        """
        self.confidence = check_probability("confidence", confidence)
        self.on_error: OnError = check_choice("on_error", on_error, get_args(OnError))
        self.drop_duplicates = drop_duplicates
        self.mark_truncated = mark_truncated
        variant = os.fspath(adapter) if isinstance(adapter, os.PathLike) else adapter
        self.settings = Settings(max_objects=max_objects, max_crops=max_crops, variant=variant)
        self._owns_model = isinstance(model, (str, os.PathLike))
        self.model = _open_model(model, device)
        if self._request.skill not in self.model.skills:
            skills = ", ".join(sorted(self.model.skills)) or "none"
            raise UnsupportedSkill(
                f"{type(self).__name__} needs a model with the skill {self._request.skill!r}; the skills of "
                f"{type(self.model).__name__} are: {skills}; use a model from moondream_cv.load()"
            )

    @overload
    def __call__(self, frame: list[Any], classes: str | Sequence[str]) -> list[sv.Detections]: ...
    @overload
    def __call__(self, frame: Frame, classes: str | Sequence[str]) -> sv.Detections: ...
    def __call__(self, frame: Frame | list[Any], classes: str | Sequence[str]) -> sv.Detections | list[sv.Detections]:
        """Find all objects of the given classes in one frame or in a list of frames.

        Args:
            frame: BGR array, PIL image, path, URL, bytes of an image file, binary file object, or an image encoded by
                the model; or a list of these. Other containers are rejected.
            classes: Class name such as "dog" or "red car", or a sequence of different names. `class_id` is the index
                into this sequence.

        Returns:
            Detections of the frame; for a list of frames, a list of the same length. These are always set, also if
            nothing is found: `xyxy` float32 [N, 4] in pixels, clipped to the frame; `confidence` float32 [N] between
            0 and 1; `class_id` int [N]; `data["class_name"]` str [N]. `metadata` is empty. Detections are ordered by
            class, and within a class in the order of the model. With `mark_truncated` there is also
            `data["truncated"]`, bool [N].

        Raises:
            ValueError: A class name is empty, blank, repeated or not a string, or the frames are in a container that
                is not a list.
            ImageError: An image cannot be read (unless `on_error` is "empty").
            MoondreamError: The model failed on a frame (unless `on_error` is "empty").
        """
        names = check_classes(classes)
        handle_error = functools.partial(self._handle_error, names)
        if isinstance(frame, list):
            return self._detect(frame, names, handle_error)
        _reject_containers(frame)
        return self._detect([frame], names, handle_error, one=True)[0]

    def detect_each(self, frames: list[Any], classes: str | Sequence[str]) -> list[sv.Detections | Exception]:
        """Find objects in a list of frames, and return the error of each frame that fails in its place.

        Args:
            frames: Frames, as for a call.
            classes: Class names, as for a call.

        Returns:
            Detections or an exception for each frame, in order, independent of `on_error`.

        Raises:
            ValueError: A class name is invalid, or `frames` is not a list.
        """
        names = check_classes(classes)
        if not isinstance(frames, list):
            raise ValueError(f"frames must be a list, got {type(frames).__name__}; pass list(...) of it")
        return self._detect(frames, names, lambda error, index: error)

    attempt = renamed_function("Detector.attempt", "Detector.detect_each", detect_each)

    @overload
    async def acall(self, frame: list[Any], classes: str | Sequence[str]) -> list[sv.Detections]: ...
    @overload
    async def acall(self, frame: Frame, classes: str | Sequence[str]) -> sv.Detections: ...
    async def acall(
        self, frame: Frame | list[Any], classes: str | Sequence[str]
    ) -> sv.Detections | list[sv.Detections]:
        """Run a call in a thread without blocking the event loop. Arguments and errors are those of a call."""
        return await asyncio.to_thread(self.__call__, cast(Any, frame), classes)

    def close(self) -> None:
        """Close the model if it was loaded by name. A model that was passed in stays open."""
        if self._owns_model:
            self.model.close()

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _detect(
        self, frames: list[Any], names: list[str], handle_error: Callable[[Exception, int], Failed], one: bool = False
    ) -> list[sv.Detections | Failed]:
        """Run every frame with every class in one batch.

        Args:
            frames: Frames of any accepted kind.
            names: Class names.
            handle_error: Function of the error and the index of a frame, which raises or returns the frame's result.
            one: Omit the frame's index from error messages.

        Returns:
            Detections of each frame, or the result of `handle_error`, in order.
        """
        if self.confidence > 0 and not self.model.has_scores:
            _warn_no_scores(type(self.model).__name__)

        # Open the frames
        found: dict[int, sv.Detections | Failed] = {}
        opened: dict[int, tuple[Any, tuple[int, int]]] = {}
        for index, frame in enumerate(frames):
            try:
                opened[index] = self._open(frame, "" if one else f"frames[{index}]: ")
            except ImageError as error:
                found[index] = handle_error(error, index)

        # Run the model
        requests = [self._request(image, name, self.settings) for image, _ in opened.values() for name in names]
        results = self.model.run(requests) if requests else []
        if len(results) != len(requests):
            raise RuntimeError(
                f"{type(self.model).__name__}.run must return one result per request, got {len(results)} for "
                f"{len(requests)} requests"
            )

        # Convert the results of each frame
        remaining = iter(results)
        for index, (image, resolution_wh) in opened.items():
            frame_results = [next(remaining) for _ in names]
            errors = [result.error for result in frame_results if isinstance(result, ErrorResult)]
            if errors:
                found[index] = handle_error(errors[0], index)
                continue
            detections = self._convert(frame_results, names, resolution_wh)
            try:
                self._add_masks(detections, image, resolution_wh)
            except Exception as error:  # a mask function can raise any error
                found[index] = handle_error(error, index)
            else:
                found[index] = detections
        return [found[index] for index in range(len(frames))]

    def _handle_error(self, names: list[str], error: Exception, index: int) -> sv.Detections:
        """Raise the error of a frame, or log it and return empty detections, according to `on_error`."""
        if self.on_error == "raise":
            raise error
        logger.warning("frame %d: detection failed, returning empty detections: %s", index, error)
        empty = self._convert([], names, (1, 1))
        self._add_masks(empty, None, (1, 1))
        return empty

    def _open(self, frame: Any, prefix: str) -> tuple[Any, tuple[int, int]]:
        """Return a frame as `_open_frame` does. Subclasses can reject frames."""
        return _open_frame(frame, prefix)

    def _add_masks(self, detections: sv.Detections, image: Any, resolution_wh: tuple[int, int]) -> None:
        """Set the masks of the objects in an opened frame, if the subclass computes masks."""

    def _convert(self, results: Sequence[Result], names: list[str], resolution_wh: tuple[int, int]) -> sv.Detections:
        """Convert the results of one frame, one per class, to filtered detections in pixels."""
        # Collect boxes, scores and classes
        coordinates: list[Box] = []
        scores: list[float] = []
        class_ids: list[int] = []
        truncated = np.zeros(len(names), dtype=np.bool_)  # by class
        for index, result in enumerate(results):
            if isinstance(result, DetectResult):
                coordinates += [(o.x_min, o.y_min, o.x_max, o.y_max) for o in result.objects]
                scores += [o.confidence for o in result.objects]
            elif isinstance(result, PointResult):
                coordinates += [(p.x, p.y, p.x, p.y) for p in result.points]
                scores += [p.confidence for p in result.points]
            class_ids += [index] * (len(coordinates) - len(class_ids))
            if getattr(result, "truncated", False):
                truncated[index] = True
                logger.info("%r: there may be more than max_objects=%d", names[index], self.settings.max_objects)

        # Build detections in pixels
        boxes = np.array(coordinates, dtype=np.float64).reshape(-1, 4)
        class_id = np.array(class_ids, dtype=int)
        data: dict[str, npt.NDArray[Any] | list[Any]] = {"class_name": np.array(names, dtype=np.str_)[class_id]}
        if self.mark_truncated:
            data["truncated"] = truncated[class_id]
        detections = sv.Detections(
            xyxy=clip_xyxy(denormalize_xyxy(boxes, resolution_wh), resolution_wh).astype(np.float32),
            confidence=np.array(scores, dtype=np.float32),
            class_id=class_id,
            data=data,
        )

        # Filter
        visible = self._filter(detections, boxes, resolution_wh)
        return self._suppress(postprocessing.filter_by_confidence(visible, self.confidence))

    def _filter(
        self, detections: sv.Detections, fractions: npt.NDArray[np.float64], resolution_wh: tuple[int, int]
    ) -> sv.Detections:
        """Return the detections inside the frame that pass the filters of the subclass.

        Args:
            detections: Detections in pixels, clipped to the frame.
            fractions: The same boxes [N, 4] before clipping, as fractions of the frame.
            resolution_wh: Width and height of the frame in pixels.
        """
        raise NotImplementedError

    def _suppress(self, detections: sv.Detections) -> sv.Detections:
        """Return the detections without duplicates, if `drop_duplicates` is set."""
        return postprocessing.remove_duplicates(detections) if self.drop_duplicates else detections


@renamed_arguments(variant="adapter")
@inherit_options
class Detector(_FrameDetector):
    """Open-vocabulary object detector.

    Thread-safe. Works in an OpenCV loop, and with `functools.partial(detector, classes=["dog"])` as the callback of an
    `sv.InferenceSlicer` of any `batch_size`, for small objects in large images.

    With a mask function, detections also have `mask` [N, H, W], bool.

    Examples:
        >>> detector = Detector("moondream2")  # doctest: +SKIP
        >>> detections = detector(cv2.imread("street.jpg"), ["person", "red car"])  # doctest: +SKIP

    Attributes:
        model: Model that runs the requests.
    """

    _request = Detect

    def __init__(
        self,
        model: str | os.PathLike[str] | VisionModel = "moondream2",
        *,
        nms: float | None = None,
        max_area: float | None = None,
        min_size: float = 0.0,
        masks: MaskFunction | None = None,
        **options: Unpack[DetectorOptions],
    ) -> None:
        """Load a model, or use a loaded one.

        Boxes without area inside the frame are removed. All other boxes are returned unless an option filters them.

        Args:
            model: Model name or folder for `moondream_cv.load`, server URL, or a loaded `VisionModel`. A name may
                start a download.
            nms: IoU threshold of non-maximum suppression within each class, between 0 and 1. None keeps overlapping
                boxes.
            max_area: Maximum box area as a fraction of the frame area, above 0 and at most 1. 0.95 removes the
                frame-filling boxes that the model returns for some absent classes, and also objects that fill the
                frame. None keeps boxes of any area.
            min_size: Minimum length of the shorter box side in pixels, after clipping to the frame.
            masks: Function `(image, xyxy) -> masks` that segments the objects in the boxes of a frame, such as
                `moondream_cv.sam.SamMasks`. `image` is RGB [H, W, 3], uint8, also if the frame is a BGR array; `xyxy`
                are boxes [n, 4] in pixels, float32; the masks [n, H, W] are bool or 0 and 1. It is called once for
                each frame with objects, after all filters, and never by two threads at the same time. An error of
                the function is handled like an error of the model. None computes no masks.

        Raises:
            ValueError: An argument is out of range, or `model` is neither a name nor a model.
            UnsupportedSkill: The model cannot detect.
            MoondreamError: The model cannot be loaded.
        """
        self.nms = None if nms is None else check_probability("nms", nms)
        self.max_area = None if max_area is None else check_share("max_area", max_area)
        self.min_size = check_not_negative("min_size", min_size, "pixels")
        self._mask_runner = None if masks is None else MaskRunner(masks)
        super().__init__(model, **options)

    def _filter(
        self, detections: sv.Detections, fractions: npt.NDArray[np.float64], resolution_wh: tuple[int, int]
    ) -> sv.Detections:
        visible = postprocessing.filter_by_size(detections, self.min_size)
        if self.max_area is None:
            return visible
        return postprocessing.filter_by_area(visible, self.max_area, resolution_wh)

    def _suppress(self, detections: sv.Detections) -> sv.Detections:
        unique = super()._suppress(detections)
        return unique if self.nms is None else unique.with_nms(self.nms)

    def _open(self, frame: Any, prefix: str) -> tuple[Any, tuple[int, int]]:
        if self._mask_runner is not None and is_encoded(frame):
            raise ImageError(f"{prefix}masks need the pixels of the frame, got {type(frame).__name__}; pass the image")
        return super()._open(frame, prefix)

    def _add_masks(self, detections: sv.Detections, image: Any, resolution_wh: tuple[int, int]) -> None:
        if self._mask_runner is not None:
            self._mask_runner.add_masks(detections, image, resolution_wh)


@renamed_arguments(variant="adapter")
class Pointer(_FrameDetector):
    """Open-vocabulary pointer: like `Detector`, but returns one point per object. Thread-safe.

    A call returns each point as a box without area; `key_points` returns `sv.KeyPoints`. Points outside the frame are
    removed.

    Attributes:
        model: Model that runs the requests.
    """

    attempt = renamed_function("Pointer.attempt", "Pointer.detect_each", _FrameDetector.detect_each)
    _request = Point

    @overload
    def key_points(self, frame: list[Any], classes: str | Sequence[str]) -> list[sv.KeyPoints]: ...
    @overload
    def key_points(self, frame: Frame, classes: str | Sequence[str]) -> sv.KeyPoints: ...
    def key_points(self, frame: Frame | list[Any], classes: str | Sequence[str]) -> sv.KeyPoints | list[sv.KeyPoints]:
        """Find objects like a call, and return each point as an `sv.KeyPoints` object with one key point.

        Arguments and errors are those of a call.

        Returns:
            Key points of the frame; for a list of frames, a list of the same length: `xy` float32 [N, 1, 2] in pixels,
            `keypoint_confidence` float32 [N, 1], `class_id` int [N], `data["class_name"]` str [N].
        """
        if isinstance(frame, list):
            return [_as_key_points(points) for points in self(frame, classes)]
        return _as_key_points(self(frame, classes))

    def _filter(
        self, detections: sv.Detections, fractions: npt.NDArray[np.float64], resolution_wh: tuple[int, int]
    ) -> sv.Detections:
        inside = np.asarray(((fractions >= 0) & (fractions <= 1)).all(axis=1))
        return cast(sv.Detections, detections[inside])


def _open_frame(frame: Any, prefix: str) -> tuple[Any, tuple[int, int]]:
    """Return a frame as one object for all its requests, so that it is encoded once, and its (width, height).

    Raises:
        ImageError: The frame cannot be read; the message begins with `prefix`.
    """
    if is_encoded(frame):
        return frame, (frame.size[0], frame.size[1])
    if _is_bgr_array(frame):
        return frame, (frame.shape[1], frame.shape[0])  # converting it here as well would cost milliseconds
    try:
        image = Image.fromarray(to_rgb(frame))
    except ImageError as error:
        raise ImageError(f"{prefix}{error}") from error.__cause__
    return image, image.size


def _open_model(model: str | os.PathLike[str] | VisionModel, device: str | None) -> VisionModel:
    if isinstance(model, (str, os.PathLike)):
        from moondream_cv.loading import open_model

        return open_model(os.fspath(model), device)
    if device is not None:
        raise ValueError(
            f"device applies to a model given by name only, got {device!r} with a {type(model).__name__}; pass "
            "device= to load() instead"
        )
    if isinstance(model, type) or not _is_model(model):
        raise ValueError(
            f"model must be a name such as 'moondream2', a folder, a server URL or a loaded model, got "
            f"{type(model).__name__}: {model!r:.100}"
        )
    return model


def _is_model(candidate: object) -> bool:
    """Return whether an object is a `VisionModel`. `isinstance` would read `has_scores`, which may query a server."""
    methods = all(inspect.getattr_static(candidate, name, None) is not None for name in ("run", "close"))
    return methods and isinstance(getattr(candidate, "skills", None), Set)


def _is_bgr_array(frame: object) -> bool:
    """Return whether a frame is a BGR array as OpenCV reads it, which needs no conversion."""
    return (
        isinstance(frame, np.ndarray)
        and frame.dtype == np.uint8
        and frame.ndim == 3
        and frame.shape[2] == 3
        and frame.size > 0
    )


def _reject_containers(frame: object) -> None:
    image_kinds = (str, bytes, bytearray, memoryview, np.ndarray)
    if not isinstance(frame, Iterable) or isinstance(frame, image_kinds) or is_encoded(frame):
        return
    if hasattr(frame, "read") or hasattr(frame, "numpy"):  # files; tensors, for which `to_rgb` has a better message
        return
    raise ValueError(f"frames must be a list, got {type(frame).__name__}; pass list(...) of it")


def _as_key_points(points: sv.Detections) -> sv.KeyPoints:
    return sv.KeyPoints(
        xy=points.xyxy.astype(np.float32)[:, None, :2],  # [N, 1, 2]
        keypoint_confidence=postprocessing.scores(points)[:, None],  # [N, 1]
        class_id=np.asarray(points.class_id, dtype=np.int_),
        data=dict(points.data),
    )


@functools.cache  # once per process and class of model
def _warn_no_scores(model: str) -> None:
    warnings.warn(
        f"{model} returns no scores: every detection has a confidence of 1.0, so a threshold has no effect",
        UserWarning,
        stacklevel=4,
    )
