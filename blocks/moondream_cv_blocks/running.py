"""Run a model on all images of a batch in one call, with a result or an error for each image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import supervision as sv
from PIL import Image

from moondream_cv.detector import Detector, Pointer
from moondream_cv.errors import UnsupportedSkill
from moondream_cv.requests import ErrorResult, Request, Result
from moondream_cv.vision_model import VisionModel

from .pool import ModelPool, redacted
from .results import pixels_of
from .roboflow import WorkflowBlock, WorkflowBlockManifest, WorkflowImageData
from .values import parse_class_names, parse_count, parse_fraction, parse_optional_fraction

SKILLS: dict[type[Detector] | type[Pointer], str] = {Detector: "detect", Pointer: "point"}


class MoondreamBlock(WorkflowBlock):
    """Base class of the blocks, which get their models from a pool.

    Attributes:
        manifest: Fields and outputs of the block.
    """

    manifest: ClassVar[type[WorkflowBlockManifest]]

    def __init__(self, models: ModelPool) -> None:
        if not isinstance(models, ModelPool):  # the engine adds the name of the block to a TypeError
            raise TypeError(f"moondream_cv_blocks.models must be a ModelPool, got {type(models).__name__}")
        self._models = models

    @classmethod
    def get_init_parameters(cls) -> list[str]:
        """Return the names of the constructor's parameters, for the engine."""
        return ["models"]

    @classmethod
    def get_manifest(cls) -> type[WorkflowBlockManifest]:
        """Return the manifest class, for the engine."""
        return cls.manifest


def run_detector(
    kind: type[Detector] | type[Pointer],
    pool: ModelPool,
    model: str,
    images: Sequence[WorkflowImageData],
    class_names: Any,
    *,
    confidence: Any,
    max_objects: Any,
    nms: Any = None,
    masks: Any = None,
) -> list[sv.Detections | Exception]:
    """Detect or point at classes on images.

    The values from `class_names` on come from workflow inputs and can be invalid.

    Args:
        kind: `Detector` or `Pointer`.
        pool: Pool of models.
        model: Model name or server URL.
        images: Images of the batch.
        class_names: Class names, in any form that `parse_class_names` accepts.
        confidence: Minimum confidence, 0..1.
        max_objects: Maximum number of objects per image and class.
        nms: IoU threshold of non-maximum suppression, 0..1; only for `Detector`.
        masks: Name of a segmentation model; None computes no masks. Only for `Detector`.

    Returns:
        The detections of each image, or its error.
    """
    # Read the images
    frames, outcomes = _read_images(images, pixels_of)

    # Run the model on the readable ones
    if frames:
        try:
            names = parse_class_names(class_names)
            options: dict[str, Any] = {
                "confidence": parse_fraction(confidence, "confidence"),
                "max_objects": parse_count(max_objects, "max_objects"),
            }
            threshold = parse_optional_fraction(nms, "nms")
            if threshold is not None:
                options["nms"] = threshold
            if masks is not None:
                options["masks"] = pool.get_masks(masks)
            opened = _check_skill(pool.get(model), model, SKILLS[kind])
            results = kind(opened, **options).detect_each(list(frames.values()), names)
        except Exception as error:  # concerns all images
            results = [error] * len(frames)
        outcomes.update(zip(frames, results, strict=True))
    return [outcomes[index] for index in range(len(images))]


def run_requests(
    pool: ModelPool, model: str, images: Sequence[WorkflowImageData], request: Callable[[Any, int], Request]
) -> list[Result | Exception]:
    """Run one request for each image.

    Args:
        pool: Pool of models.
        model: Model name or server URL.
        images: Images of the batch.
        request: Function that creates the request of an image and its index. An exception is the error of that image.

    Returns:
        The result of each image, or its error.
    """
    # Create the requests
    readable, outcomes = _read_images(images, lambda image: Image.fromarray(pixels_of(image)[..., ::-1]))
    requests: dict[int, Request] = {}
    for index, image in readable.items():
        try:
            requests[index] = request(image, index)
        except Exception as error:
            outcomes[index] = error

    # Run the model
    if requests:
        results: Sequence[Any]
        try:
            opened = _check_skill(pool.get(model), model, next(iter(requests.values())).skill)
            results = opened.run(list(requests.values()))
        except Exception as error:
            results = [ErrorResult(error)] * len(requests)
        for index, result in zip(requests, results, strict=True):
            outcomes[index] = result.error if isinstance(result, ErrorResult) else result
    return [outcomes[index] for index in range(len(images))]


def _check_skill(opened: VisionModel, name: str, skill: str) -> VisionModel:
    """Return a model that supports a skill.

    Raises:
        UnsupportedSkill: The model does not support the skill.
    """
    if skill not in opened.skills:
        raise UnsupportedSkill(
            f"the model {redacted(name)} does not support {skill}, only {', '.join(sorted(opened.skills))}; set the "
            "field model to moondream2 or to the URL of moondream-cv serve"
        )
    return opened


def _read_images(
    images: Sequence[WorkflowImageData], read: Callable[[WorkflowImageData], Any]
) -> tuple[dict[int, Any], dict[int, Any]]:
    """Read images; return those that were read and the errors of the others, by index."""
    readable, errors = {}, {}
    for index, image in enumerate(images):
        try:
            readable[index] = read(image)
        except Exception as error:
            errors[index] = error
    return readable, errors
