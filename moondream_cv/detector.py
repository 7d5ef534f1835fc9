"""`Detector` and `Pointer`: frames × class names become one `run` of a model, and its replies become `sv.Detections`.

Both speak pixels and class ids, and clean up where asked to. Where the model runs and how it computes is left to the
`VisionModel`; tracking, drawing and slicing are left to supervision and to `moondream_cv.video`.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterable, Sequence, Set
from typing import Any, ClassVar, Literal, Protocol, TypeGuard, TypeVar, cast, get_args, overload

import numpy as np
import numpy.typing as npt
import supervision as sv
from PIL import Image

from moondream_cv import cleanup
from moondream_cv.errors import ImageError, UnsupportedSkill
from moondream_cv.geometry import clip_xyxy, denormalize_xyxy
from moondream_cv.images import ImageInput, is_encoded, to_rgb
from moondream_cv.requests import Detect, DetectResult, ErrorResult, Point, PointResult, Result, Settings
from moondream_cv.vision_model import VisionModel

logger = logging.getLogger(__name__)

Self = TypeVar("Self", bound="_Finder")
Failed = TypeVar("Failed")
OnError = Literal["raise", "empty"]
Box = tuple[float, float, float, float]


class EncodedLike(Protocol):
    """An image that a model has encoded already; it remembers its (width, height) in pixels."""

    @property
    def size(self) -> tuple[int, int]: ...


Frame = ImageInput | EncodedLike


class _Finder:
    """What `Detector` and `Pointer` have in common."""

    _request: ClassVar[type[Detect] | type[Point]]

    def __init__(
        self,
        model: str | os.PathLike[str] | VisionModel,
        *,
        confidence: float,
        max_objects: int,
        drop_duplicates: bool,
        mark_truncated: bool,
        on_error: OnError,
        device: str | None,
        max_crops: int | None,
        variant: str | None,
    ) -> None:
        self.confidence = _fraction("confidence", confidence)
        if on_error not in get_args(OnError):
            raise ValueError(f"on_error must be 'raise' or 'empty', not {on_error!r}")
        self.on_error = on_error
        self.drop_duplicates = drop_duplicates
        self.mark_truncated = mark_truncated
        self.settings = Settings(max_objects=max_objects, max_crops=max_crops, variant=variant)
        self._owns_model = isinstance(model, (str, os.PathLike))
        self.model = _open_model(model, device)
        if self._request.skill not in self.model.skills:
            skills = ", ".join(sorted(self.model.skills)) or "nothing"
            raise UnsupportedSkill(
                f"{type(self).__name__} needs a model that can {self._request.skill}; {type(self.model).__name__} can "
                f"{skills}. A model from moondream_cv.load() can."
            )

    @overload
    def __call__(self, frame: list[Any], classes: str | Sequence[str]) -> list[sv.Detections]: ...
    @overload
    def __call__(self, frame: Frame, classes: str | Sequence[str]) -> sv.Detections: ...
    def __call__(self, frame: Frame | list[Any], classes: str | Sequence[str]) -> sv.Detections | list[sv.Detections]:
        """Find everything that the class names mean, in one frame or in a list of frames.

        Args:
            frame: A BGR array, a PIL image, a path, the bytes of an image file, a binary file object, an image that the
                model has encoded; or a list of those. Every other container is refused.
            classes: A name such as "dog" or "red car", or a sequence of different names; `class_id` follows its order.

        Returns:
            For a frame its detections, for a list a list of the same length. Always filled, also when nothing is found:
            `xyxy` float32 [N, 4] in pixels of the frame and within it, `confidence` float32 [N] in 0..1, `class_id` int
            [N], `data["class_name"]` str [N]. `metadata` is empty. Classes come in their order, and the objects of a
            class in the model's. With `mark_truncated` there is `data["truncated"]` bool [N] as well.

        Raises:
            ValueError: A class name is empty, blank, given twice or not a string; the frames come in a container that
                is not a list.
            ImageError: An image cannot be read (unless `on_error` is "empty").
            MoondreamError: The model failed on a frame (likewise).
        """
        names = check_classes(classes)
        failed = functools.partial(self._fail, names)
        if isinstance(frame, list):
            return self._find(frame, names, failed)
        _refuse_containers(frame)
        return self._find([frame], names, failed, one=True)[0]

    def attempt(self, frames: list[Any], classes: str | Sequence[str]) -> list[sv.Detections | Exception]:
        """Do what a call with a list does, and give what a frame failed with in its place, whatever `on_error` says.

        Raises:
            ValueError: As a call does; errors of frames are not raised.
        """
        names = check_classes(classes)
        if not isinstance(frames, list):
            raise ValueError(f"frames must come in a list, not in a {type(frames).__name__}")
        return self._find(frames, names, lambda error, index: error)

    @overload
    async def acall(self, frame: list[Any], classes: str | Sequence[str]) -> list[sv.Detections]: ...
    @overload
    async def acall(self, frame: Frame, classes: str | Sequence[str]) -> sv.Detections: ...
    async def acall(
        self, frame: Frame | list[Any], classes: str | Sequence[str]
    ) -> sv.Detections | list[sv.Detections]:
        """Do what a call does, in a thread, so that the event loop goes on meanwhile; same arguments, same errors."""
        return await asyncio.to_thread(self.__call__, cast(Any, frame), classes)

    def close(self) -> None:
        """Close the model if it was loaded here, from a name; a model that was passed in stays open."""
        if self._owns_model:
            self.model.close()

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _find(
        self, frames: list[Any], names: list[str], failed: Callable[[Exception, int], Failed], one: bool = False
    ) -> list[sv.Detections | Failed]:
        """Run every frame with every class at once and give each frame's detections, in order.

        Args:
            failed: Raises the error of a frame, or gives what takes the place of its detections.
        """
        if self.confidence > 0 and not self.model.has_scores:
            _warn_no_scores(type(self.model).__name__)
        found: dict[int, sv.Detections | Failed] = {}
        opened: dict[int, tuple[Any, tuple[int, int]]] = {}
        for index, frame in enumerate(frames):
            try:
                opened[index] = _open_frame(frame, "" if one else f"frames[{index}]: ")
            except ImageError as error:
                found[index] = failed(error, index)
        requests = [self._request(image, name, self.settings) for image, _ in opened.values() for name in names]
        results = self.model.run(requests) if requests else []
        if len(results) != len(requests):
            raise RuntimeError(f"{type(self.model).__name__} gave {len(results)} results for {len(requests)} requests")
        replies_in_order = iter(results)
        for index, (_, resolution_wh) in opened.items():
            replies = [next(replies_in_order) for _ in names]
            errors = [reply.error for reply in replies if isinstance(reply, ErrorResult)]
            found[index] = failed(errors[0], index) if errors else self._convert(replies, names, resolution_wh)
        return [found[index] for index in range(len(frames))]

    def _fail(self, names: list[str], error: Exception, index: int) -> sv.Detections:
        """What `on_error` says is to be done."""
        if self.on_error == "raise":
            raise error
        logger.warning("frame %d of this call gives no detections: %s", index, error)
        return self._convert([], names, (1, 1))

    def _convert(self, results: Sequence[Result], names: list[str], resolution_wh: tuple[int, int]) -> sv.Detections:
        """Replies of one frame, one for each class, as detections in pixels."""
        rows: list[Box] = []
        scores: list[float] = []
        class_ids: list[int] = []
        truncated = np.zeros(len(names), dtype=np.bool_)  # by class
        for index, result in enumerate(results):
            if isinstance(result, DetectResult):
                rows += [(o.x_min, o.y_min, o.x_max, o.y_max) for o in result.objects]
                scores += [o.confidence for o in result.objects]
            elif isinstance(result, PointResult):
                rows += [(p.x, p.y, p.x, p.y) for p in result.points]
                scores += [p.confidence for p in result.points]
            class_ids += [index] * (len(rows) - len(class_ids))
            if getattr(result, "truncated", False):
                truncated[index] = True
                logger.info("%r: there may be more than max_objects=%d", names[index], self.settings.max_objects)
        boxes = np.array(rows, dtype=np.float64).reshape(-1, 4)
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
        cleaned = cleanup.without_unsure(self._within_frame(detections, boxes, resolution_wh), self.confidence)
        return self._without_repeats(cleaned)

    def _within_frame(
        self, detections: sv.Detections, fractions: npt.NDArray[np.float64], resolution_wh: tuple[int, int]
    ) -> sv.Detections:
        """Leave out what lies outside the frame, or does not suit it.

        Args:
            detections: Clipped to the frame.
            fractions: The same boxes [N, 4] as the model gave them, as fractions of the frame.
            resolution_wh: Width and height of the frame in pixels.
        """
        raise NotImplementedError

    def _without_repeats(self, detections: sv.Detections) -> sv.Detections:
        return cleanup.without_duplicates(detections) if self.drop_duplicates else detections


class Detector(_Finder):
    """An open-vocabulary object detector.

    Thread-safe. Usable as it is in an OpenCV loop, and with `functools.partial(detector, classes=["dog"])` as the
    callback of an `sv.InferenceSlicer`, which finds small objects in large images; any `batch_size` will do.

    Example:
        >>> detector = Detector("moondream2")  # doctest: +SKIP
        >>> detections = detector(cv2.imread("street.jpg"), ["person", "red car"])  # doctest: +SKIP

    Attributes:
        model: The model that does the work.
    """

    _request = Detect

    def __init__(
        self,
        model: str | os.PathLike[str] | VisionModel = "moondream2",
        *,
        confidence: float = 0.0,
        max_objects: int = 50,
        nms: float | None = None,
        max_area: float | None = None,
        min_size: float = 0.0,
        drop_duplicates: bool = True,
        mark_truncated: bool = False,
        on_error: OnError = "raise",
        device: str | None = None,
        max_crops: int | None = None,
        variant: str | None = None,
    ) -> None:
        """Open a model, or use one that is open.

        Args:
            model: A name or folder for `moondream_cv.load`, which may download it; a server's URL; any `VisionModel`.
            confidence: Leave out what the model is less sure of. A model without scores gives 1.0 for everything.
            max_objects: Objects per frame and class at the most.
            nms: Of boxes of the same class whose intersection over union exceeds this, keep the most confident one.
            max_area: Leave out boxes that cover more than this share of the frame, above 0 and up to 1. 0.95 catches
                the boxes around everything that some names get which are not in the frame; objects that really fill
                the frame go with them.
            min_size: Leave out boxes of which a side is shorter than this many pixels, after clipping.
            drop_duplicates: Of boxes of the same class that are exactly equal, keep the most confident one.
            mark_truncated: Fill `data["truncated"]`, bool [N]: whether `max_objects` ended the list of the object's
                class, so that there may be more. Without it this is only logged, since supervision merges detections
                only if they have the same keys in `data`, and those of other libraries have `class_name` alone.
            on_error: What a frame that cannot be read, or on which the model fails, does: "raise" its error, or give
                "empty" detections in its place and log a warning.
            device: Where to load a model that is given by name, such as "cuda:1"; None is the best there is.
            max_crops: Local crops per image at the most; fewer are faster and coarser. None: what the model was trained
                with.
            variant: An adapter to use; None: the one that the model was loaded with.

        Boxes that have no area within the frame are left out, everything else that the model gives is kept.

        Raises:
            ValueError: An argument is out of range, or `model` is neither a name nor a model.
            UnsupportedSkill: The model cannot detect.
            MoondreamError: The model cannot be loaded.
        """
        self.nms = None if nms is None else _fraction("nms", nms)
        self.max_area = None if max_area is None else _fraction("max_area", max_area, above_zero=True)
        self.min_size = _length("min_size", min_size)
        super().__init__(
            model,
            confidence=confidence,
            max_objects=max_objects,
            drop_duplicates=drop_duplicates,
            mark_truncated=mark_truncated,
            on_error=on_error,
            device=device,
            max_crops=max_crops,
            variant=variant,
        )

    def _within_frame(
        self, detections: sv.Detections, fractions: npt.NDArray[np.float64], resolution_wh: tuple[int, int]
    ) -> sv.Detections:
        visible = cleanup.without_thin(detections, self.min_size)
        if self.max_area is None:
            return visible
        return cleanup.without_frame_filling(visible, self.max_area, resolution_wh)

    def _without_repeats(self, detections: sv.Detections) -> sv.Detections:
        different = super()._without_repeats(detections)
        return different if self.nms is None else different.with_nms(self.nms)


class Pointer(_Finder):
    """Points at objects: like `Detector`, with boxes of no area at the points, or key points. Thread-safe."""

    _request = Point

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
        variant: str | None = None,
    ) -> None:
        """Open a model, or use one that is open. Arguments and errors are those of `Detector`.

        Points outside the frame are left out, everything else that the model gives is kept.
        """
        super().__init__(
            model,
            confidence=confidence,
            max_objects=max_objects,
            drop_duplicates=drop_duplicates,
            mark_truncated=mark_truncated,
            on_error=on_error,
            device=device,
            max_crops=max_crops,
            variant=variant,
        )

    @overload
    def key_points(self, frame: list[Any], classes: str | Sequence[str]) -> list[sv.KeyPoints]: ...
    @overload
    def key_points(self, frame: Frame, classes: str | Sequence[str]) -> sv.KeyPoints: ...
    def key_points(self, frame: Frame | list[Any], classes: str | Sequence[str]) -> sv.KeyPoints | list[sv.KeyPoints]:
        """Point as a call does, and give `sv.KeyPoints`: each point is an object with one key point.

        Returns:
            For a frame its key points, for a list a list: `xy` float32 [N, 1, 2] in pixels, `keypoint_confidence`
            float32 [N, 1], `class_id` int [N], `data["class_name"]` str [N].
        """
        if isinstance(frame, list):
            return [_as_key_points(points) for points in self(frame, classes)]
        return _as_key_points(self(frame, classes))

    def _within_frame(
        self, detections: sv.Detections, fractions: npt.NDArray[np.float64], resolution_wh: tuple[int, int]
    ) -> sv.Detections:
        inside = np.asarray(((fractions >= 0) & (fractions <= 1)).all(axis=1))
        return cast(sv.Detections, detections[inside])


def check_classes(classes: str | Sequence[str], argument: str = "classes") -> list[str]:
    """Return class names as a list, in their order.

    Args:
        argument: What messages call them.

    Raises:
        ValueError: There is none, one is blank, is there twice or is not a string, or they come in something without
            an order.
    """
    names = [classes] if isinstance(classes, str) else classes
    if not isinstance(names, Sequence) or isinstance(names, (bytes, bytearray, memoryview)):
        raise ValueError(
            f"{argument} must be a string or a sequence of strings, not {type(classes).__name__}: {classes!r:.100}"
        )
    if not names:
        raise ValueError(f"{argument} must name at least one class, not {classes!r}")
    for index, name in enumerate(names):
        if not isinstance(name, str):
            raise ValueError(f"{argument}[{index}] must be a string, not {type(name).__name__}: {name!r:.100}")
        if not name.strip():
            raise ValueError(f"{argument}[{index}] must say something, not {name!r:.100}")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{argument} must differ, and these are there twice: {', '.join(map(repr, twice))}")
    return list(names)


def _open_frame(frame: Any, place: str) -> tuple[Any, tuple[int, int]]:
    """The frame as one object for all its requests, so that it is encoded once, and its (width, height).

    Raises:
        ImageError: It cannot be read; the message begins with `place`.
    """
    if is_encoded(frame):
        return frame, (frame.size[0], frame.size[1])
    if _is_video_frame(frame):
        return frame, (frame.shape[1], frame.shape[0])  # converting it here as well would cost milliseconds
    try:
        picture = Image.fromarray(to_rgb(frame))
    except ImageError as error:
        raise ImageError(f"{place}{error}") from error.__cause__
    return picture, picture.size


def _open_model(model: str | os.PathLike[str] | VisionModel, device: str | None) -> VisionModel:
    if isinstance(model, (str, os.PathLike)):
        from moondream_cv.loading import open_model

        return open_model(os.fspath(model), device)
    if device is not None:
        raise ValueError(f"device={device!r} is for a model that is given by name; {type(model).__name__} has its own")
    if isinstance(model, type) or not _is_model(model):
        raise ValueError(
            f"model must be a name such as 'moondream2', a folder, a server's URL, or an open model, "
            f"not {type(model).__name__}: {model!r:.100}"
        )
    return model


def _is_model(candidate: object) -> bool:
    """Whether this is a `VisionModel`. `isinstance` would look at `has_scores`, for which some ask a server."""
    methods = all(inspect.getattr_static(candidate, name, None) is not None for name in ("run", "close"))
    return methods and isinstance(getattr(candidate, "skills", None), Set)


def _is_video_frame(frame: object) -> bool:
    """Whether this is a BGR array as OpenCV reads it, which needs no decoding."""
    return (
        isinstance(frame, np.ndarray)
        and frame.dtype == np.uint8
        and frame.ndim == 3
        and frame.shape[2] == 3
        and frame.size > 0
    )


def _refuse_containers(frame: object) -> None:
    image_kinds = (str, bytes, bytearray, memoryview, np.ndarray)
    if not isinstance(frame, Iterable) or isinstance(frame, image_kinds) or is_encoded(frame):
        return
    if hasattr(frame, "read") or hasattr(frame, "numpy"):  # files; tensors, which `to_rgb` has advice for
        return
    raise ValueError(f"frames must come in a list, not in a {type(frame).__name__}; pass list(...) of it")


def _fraction(name: str, value: object, above_zero: bool = False) -> float:
    if not _is_number(value) or not 0 <= value <= 1 or (above_zero and not value):
        raise ValueError(f"{name} must be a number {'above 0 and up to 1' if above_zero else 'in 0..1'}, not {value!r}")
    return float(value)


def _length(name: str, value: object) -> float:
    if not _is_number(value) or not 0 <= value < math.inf:
        raise ValueError(f"{name} must be a number of pixels from 0, not {value!r}")
    return float(value)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def _as_key_points(points: sv.Detections) -> sv.KeyPoints:
    return sv.KeyPoints(
        xy=points.xyxy.astype(np.float32)[:, None, :2],  # [N, 1, 2]
        keypoint_confidence=cleanup.scores(points)[:, None],  # [N, 1]
        class_id=np.asarray(points.class_id, dtype=np.int_),
        data=dict(points.data),
    )


@functools.cache  # once per process and kind of model
def _warn_no_scores(model: str) -> None:
    warnings.warn(
        f"{model} gives no scores: its detections carry a confidence of 1.0, so a threshold leaves nothing out",
        UserWarning,
        stacklevel=4,
    )
