"""Run a model on batches of images with the prompts of every class, and return labeled images.

All prompts of a skill decode in one pass over an image. Objects that several prompts of a class find are merged, and
objects that a negative prompt describes better are removed.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
import supervision as sv
from PIL import Image
from typing_extensions import Self

from moondream_cv.detector import Detector, Pointer
from moondream_cv.errors import ImageError, MoondreamError
from moondream_cv.images import to_rgb
from moondream_cv.labeling.errors import LabelingError
from moondream_cv.labeling.inputs import InputImage
from moondream_cv.labeling.prompts import ClassPrompts
from moondream_cv.labeling.records import ImageRecord, LabeledObject
from moondream_cv.slicing import with_slices
from moondream_cv.urls import is_url

if TYPE_CHECKING:
    from moondream_cv.vision_model import VisionModel

MERGE_IOU = 0.5
"""Minimum IoU of boxes that several prompts of a class find, or that a negative prompt and a prompt find."""

MERGE_DISTANCE = 0.02
"""Maximum distance of such points, as a fraction of the longer side of the image."""

_DECODING_THREADS = max(1, min(4, (os.cpu_count() or 1) // 2))

_MIN_URLS = 4  # URLs in a batch that must fail before the storage is considered unavailable

Pixels = npt.NDArray[np.uint8]
"""[H, W, 3] RGB pixels."""


@dataclass(frozen=True)
class LabelingSettings:
    """Model and options that determine the objects. They can be pickled, for worker processes.

    Attributes:
        classes: Classes with their prompts.
        model: Model name or folder for `moondream_cv.load`, or server URL.
        device: Device of a local model; None selects the best available.
        dtype: "float32", "bfloat16" or "float16"; None selects the best for the device.
        quantize: "int8" or "int4"; None: as in the checkpoint.
        adapter: LoRA adapter; None uses none.
        max_objects: Maximum number of objects per image and prompt.
        nms: IoU threshold of non-maximum suppression within each class; None keeps overlapping boxes of one prompt.
        max_area: Maximum box area as a fraction of the image area; None keeps boxes of any area.
        slice_size: Size of overlapping slices in pixels; None: the whole image at once.
    """

    classes: tuple[ClassPrompts, ...]
    model: str = "moondream2"
    device: str | None = None
    dtype: str | None = None
    quantize: str | None = None
    adapter: str | None = None
    max_objects: int = 50
    nms: float | None = None
    max_area: float | None = None
    slice_size: int | None = None

    @property
    def skills(self) -> set[str]:
        """Skills that the model must have."""
        return {str(prompts.skill) for prompts in self.classes}

    def to_dict(self) -> dict[str, Any]:
        """Return the settings that determine the objects, as a JSON-compatible dict.

        The device is not one of them, so that a run can continue on another machine.
        """
        names = ("model", "dtype", "quantize", "adapter", "max_objects", "nms", "max_area", "slice_size")
        return {
            "classes": [prompts.to_dict() for prompts in self.classes],
            **{name: getattr(self, name) for name in names},
        }

    def check(self, is_loaded: bool, on_ray: bool) -> None:
        """Check the options that exclude each other, without loading the model.

        Args:
            is_loaded: Whether a loaded model replaces that of the settings.
            on_ray: Whether the model runs on Ray.

        Raises:
            LabelingError: Options exclude each other.
            MoondreamError: The name of the model is unknown.
            ValueError: The URL of a server is invalid.
        """
        from moondream_cv.loading import check_name, is_url

        given = [name for name in ("device", "dtype", "quantize", "adapter") if getattr(self, name) is not None]
        if given and (is_loaded or is_url(self.model)):
            kind = "a loaded model" if is_loaded else "a server"
            raise LabelingError(f"{' and '.join(given)} must be None for {kind}, {self.model}")
        if is_loaded and on_ray:
            raise LabelingError("a loaded model cannot run on Ray; give the name of a model or the URL of a server")
        if self.slice_size is not None and "point" in self.skills:
            raise LabelingError("slices are for boxes only, and a class has the skill 'point'; remove one of them")
        if not is_loaded and self.classes:
            check_name(self.model)

    def open_model(self) -> VisionModel:
        """Load the model, or connect to the server.

        Raises:
            MoondreamError: The model cannot be loaded.
            ValueError: An option does not apply to the model.
        """
        from moondream_cv.loading import connect, is_url, load

        if is_url(self.model):
            return connect(self.model)
        return load(self.model, device=self.device, dtype=self.dtype, quantize=self.quantize, adapter=self.adapter)


class Labeler:
    """Labels batches of images.

    Attributes:
        settings: Model and options.
    """

    def __init__(self, settings: LabelingSettings, model: VisionModel | None = None) -> None:
        """Load the model unless one is given. Without classes, no model is loaded.

        Args:
            settings: Model and options.
            model: Loaded model to use in place of that of the settings. It stays open.

        Raises:
            MoondreamError: The model cannot be loaded, or does not have a skill.
            ValueError: An option does not apply to the model.
        """
        self.settings = settings
        self._owned: VisionModel | None = None
        self._skills: list[_SkillLabeler] = []
        if settings.classes:
            if model is None:
                model = self._owned = settings.open_model()
            for skill in sorted(settings.skills):
                classes = [prompts for prompts in settings.classes if prompts.skill == skill]
                self._skills.append(_SkillLabeler(model, settings, classes))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the model if the labeler has loaded it."""
        if self._owned is not None:
            self._owned.close()

    def label(
        self, batch: Sequence[InputImage], pixels: Sequence[Pixels | ImageError] | None = None
    ) -> list[ImageRecord]:
        """Return the labels of a batch of images.

        Args:
            batch: Images.
            pixels: Pixels or the error of each image, as `read_batch` returns them; None reads them.

        Returns:
            A record for each image, in order. If an image cannot be read, or if the model fails on it twice but not on
            others of the batch, its record has an `error`.

        Raises:
            LabelingError: The folder or the storage of all images became unavailable.
            MoondreamError: The model failed on every image, or it became unavailable.
        """
        loaded = read_batch(batch) if pixels is None else pixels
        _check_storage(batch, loaded)
        readable = [index for index, image in enumerate(loaded) if not isinstance(image, ImageError)]
        found = dict(zip(readable, self._find([cast(Pixels, loaded[index]) for index in readable]), strict=True))
        records = []
        for image, loaded_image, objects in zip(batch, loaded, map(found.get, range(len(batch))), strict=True):
            if isinstance(loaded_image, ImageError):
                records.append(_failed(image, loaded_image))
            elif isinstance(objects, MoondreamError):
                records.append(_failed(image, objects))
            else:
                records.append(self._record(image, loaded_image, objects or []))
        return records

    def _find(self, images: Sequence[Pixels]) -> list[list[LabeledObject] | MoondreamError]:
        """Return the objects in each image, ordered by class, or the error of the model."""
        by_skill = [skill.find(images) for skill in self._skills] or [[[]] * len(images)]
        order = {prompts.name: index for index, prompts in enumerate(self.settings.classes)}
        found: list[list[LabeledObject] | MoondreamError] = []
        for results in zip(*by_skill, strict=True):
            error = next((result for result in results if isinstance(result, MoondreamError)), None)
            objects = [one for result in results if not isinstance(result, MoondreamError) for one in result]
            found.append(error or sorted(objects, key=lambda one: order[one.class_name]))
        return found

    def _record(self, image: InputImage, pixels: Pixels, objects: list[LabeledObject]) -> ImageRecord:
        """Return the record of an image, with the labels of its dataset first."""
        height, width = pixels.shape[:2]
        given = image.given_objects(width, height)
        added = [one for one in objects if not _is_given(one, given, max(width, height))]
        return ImageRecord(
            image.name, image.source, width, height, (*given, *added), split=image.split, group=image.group
        )


class _SkillLabeler:
    """Finds the objects of all classes with the same skill."""

    def __init__(self, model: VisionModel, settings: LabelingSettings, classes: Sequence[ClassPrompts]) -> None:
        self._classes, self._model, self._has_scores = classes, model, False
        self._nms, self._is_point = settings.nms, classes[0].skill == "point"
        self._prompts = list(dict.fromkeys(text for one in classes for text in (*one.prompts, *one.negative)))
        self._max_objects = settings.max_objects
        max_objects = max(one.max_objects or settings.max_objects for one in classes)
        if self._is_point:
            self._detector: Detector | Pointer = Pointer(model, max_objects=max_objects)
            self._find_in_slices = None
        else:
            max_area = settings.max_area if settings.slice_size is None else None
            detector = Detector(model, max_objects=max_objects, max_area=max_area)
            self._detector = detector
            self._find_in_slices = (
                None
                if settings.slice_size is None
                else with_slices(detector, settings.slice_size, None, settings.max_area)
            )

    def find(self, images: Sequence[Pixels]) -> list[list[LabeledObject] | MoondreamError]:
        """Return the objects in each image, or the error of the model.

        Raises:
            MoondreamError: The model failed on every image, or it became unavailable.
        """
        results = self._detect(images)
        failed = [index for index, result in enumerate(results) if isinstance(result, Exception)]
        if 0 < len(failed) < len(results):
            # Repeat the failed images with one that succeeded, which also fails if the model is unavailable
            control = next(index for index in range(len(results)) if index not in failed)
            *repeated, available = self._detect([images[index] for index in (*failed, control)])
            if isinstance(available, Exception):
                raise available
            for index, result in zip(failed, repeated, strict=True):
                results[index] = result
        for result in results:
            is_total = len(failed) == len(results)
            if isinstance(result, Exception) and (is_total or not isinstance(result, MoondreamError)):
                raise result
        self._has_scores = self._model.has_scores  # a server may be unavailable before
        return [
            result if isinstance(result, MoondreamError) else self._objects(cast(sv.Detections, result), image)
            for result, image in zip(results, images, strict=True)
        ]

    def _detect(self, images: Sequence[Pixels]) -> list[sv.Detections | Exception]:
        if not images:
            return []
        if self._find_in_slices is None:
            return self._detector.detect_each([image[..., ::-1] for image in images], self._prompts)
        found: list[sv.Detections | Exception] = []
        for image in images:
            try:
                found.append(self._find_in_slices(Image.fromarray(image), self._prompts))
            except MoondreamError as error:
                found.append(error)
        return found

    def _objects(self, found: sv.Detections, image: Pixels) -> list[LabeledObject]:
        """Return the objects of each class, from the detections of all prompts."""
        assert found.confidence is not None
        assert found.class_id is not None
        longer_side = max(image.shape[:2])
        objects = []
        for prompts in self._classes:
            # Choose the detections of the class
            ids = [self._prompts.index(text) for text in prompts.prompts]
            limit = prompts.max_objects or self._max_objects
            mask = np.zeros(len(found), dtype=np.bool_)
            for index in ids:
                mask[np.flatnonzero(found.class_id == index)[:limit]] = True
            mask &= found.confidence >= np.float32(prompts.threshold)
            positive = cast(sv.Detections, found[mask])
            if len(ids) > 1:
                positive = self._merge_prompts(positive, longer_side)
            if prompts.negative:
                others = np.isin(found.class_id, [self._prompts.index(text) for text in prompts.negative])
                positive = self._remove_negatives(positive, cast(sv.Detections, found[others]), longer_side)
            if self._nms is not None and not self._is_point:
                positive = positive.with_nms(self._nms, class_agnostic=True)
            objects += self._labeled(positive, prompts)
        return objects

    def _merge_prompts(self, found: sv.Detections, longer_side: int) -> sv.Detections:
        """Keep the most confident one of similar detections that different prompts of a class have found."""
        assert found.class_id is not None
        similar = self._similar(found, found, longer_side) & (found.class_id[:, None] != found.class_id)
        kept: list[int] = []
        for index in np.argsort(-np.asarray(found.confidence), kind="stable"):
            if not similar[index, kept].any():
                kept.append(int(index))
        return cast(sv.Detections, found[np.sort(np.array(kept, dtype=int))])

    def _remove_negatives(self, found: sv.Detections, negative: sv.Detections, longer_side: int) -> sv.Detections:
        """Remove the detections that a negative prompt has found with at least the same confidence."""
        similar = self._similar(found, negative, longer_side)
        stronger = np.asarray(negative.confidence) >= np.asarray(found.confidence)[:, None]
        outdone = np.asarray((similar & stronger).any(axis=1))
        return cast(sv.Detections, found[~outdone])

    def _similar(self, a: sv.Detections, b: sv.Detections, longer_side: int) -> npt.NDArray[np.bool_]:
        return similar_objects(a.xyxy, b.xyxy, self._is_point, longer_side)

    def _labeled(self, found: sv.Detections, prompts: ClassPrompts) -> list[LabeledObject]:
        assert found.confidence is not None
        assert found.class_id is not None
        objects = []
        for box, confidence, index in zip(found.xyxy.tolist(), found.confidence.tolist(), found.class_id, strict=True):
            x_min, y_min, x_max, y_max = (round(value, 2) for value in box)
            if not self._is_point and (x_min >= x_max or y_min >= y_max):
                continue  # without area after rounding
            prompt = self._prompts[index]
            objects.append(
                LabeledObject(
                    prompts.name,
                    (x_min, y_min, x_max, y_max),
                    round(confidence, 4) if self._has_scores else None,
                    prompt=None if prompt == prompts.name else prompt,
                    is_point=self._is_point,
                )
            )
        return objects


def read_batch(batch: Sequence[InputImage]) -> list[Pixels | ImageError]:
    """Read a batch of images in threads.

    Args:
        batch: Images.

    Returns:
        Upright RGB pixels, [H, W, 3] uint8, or the error of each image.
    """
    return list(_decoding_threads().map(_read, batch))


@functools.cache
def _decoding_threads() -> ThreadPoolExecutor:
    """Return the threads for all batches; new threads would spread the freed memory over more arenas."""
    return ThreadPoolExecutor(_DECODING_THREADS, thread_name_prefix="moondream-cv images")


def similar_objects(
    a: npt.NDArray[np.number], b: npt.NDArray[np.number], is_point: bool, longer_side: int
) -> npt.NDArray[np.bool_]:
    """Return which pairs of boxes have an IoU of at least `MERGE_IOU`, or which pairs of points are close.

    Args:
        a: [N, 4] xyxy boxes in pixels.
        b: [M, 4] xyxy boxes in pixels.
        is_point: Whether the boxes are points, without area.
        longer_side: Longer side of the image in pixels.

    Returns:
        [N, M] bool.
    """
    if not len(a) or not len(b):
        return np.zeros((len(a), len(b)), dtype=np.bool_)
    if is_point:
        distances = np.linalg.norm(a[:, None, :2] - b[:, :2], axis=-1)
        return np.asarray(distances <= MERGE_DISTANCE * longer_side)
    return np.asarray(sv.box_iou_batch(a, b) >= MERGE_IOU)


def _read(image: InputImage) -> Pixels | ImageError:
    try:
        return to_rgb(image.open())
    except ImageError as error:
        return error


def _check_storage(batch: Sequence[InputImage], loaded: Sequence[Pixels | ImageError]) -> None:
    """Check that the images of a batch are not all unreadable because their folder or storage is gone."""
    errors = [image for image in loaded if isinstance(image, ImageError)]
    if not errors or len(errors) < len(batch):
        return
    if all(is_url(image.source) for image in batch):
        if len(batch) >= _MIN_URLS:
            raise LabelingError(f"no image of a batch can be read: {errors[0]}; check the storage")
        return
    folders = {(image.dataset / image.source).parent for image in batch if not is_url(image.source)}
    if not any(folder.is_dir() and any(folder.iterdir()) for folder in folders):
        raise LabelingError(f"{min(folders)} does not exist anymore, or is empty; mount it again or restore it")


def _failed(image: InputImage, error: Exception) -> ImageRecord:
    return ImageRecord(image.name, image.source, split=image.split, group=image.group, error=str(error))


def _is_given(found: LabeledObject, given: Sequence[LabeledObject], longer_side: int) -> bool:
    """Return whether the dataset already contains an object that the model has found."""
    same = [one.xyxy for one in given if one.class_name == found.class_name and one.is_point == found.is_point]
    boxes = np.array(same, dtype=np.float64).reshape(-1, 4)
    return bool(similar_objects(np.array([found.xyxy]), boxes, found.is_point, longer_side).any())
