"""All images of a batch in one call of the model, and for each image what came of it: a result, or its error."""

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
    """A block that asks models of a pool.

    Attributes:
        manifest: Its fields and outputs.
    """

    manifest: ClassVar[type[WorkflowBlockManifest]]

    def __init__(self, models: ModelPool) -> None:
        if not isinstance(models, ModelPool):  # the engine says of a TypeError whose parameter it is
            raise TypeError(f"moondream_cv_blocks.models must be a ModelPool, not {type(models).__name__}")
        self._models = models

    @classmethod
    def get_init_parameters(cls) -> list[str]:
        return ["models"]

    @classmethod
    def get_manifest(cls) -> type[WorkflowBlockManifest]:
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
) -> list[sv.Detections | Exception]:
    """Look for classes on images.

    Args:
        kind: What finds them.
        model: A name for the pool.
        class_names: As `parse_class_names` takes them; this and what follows may come from anywhere, and be wrong.
        nms: Of a `Detector` alone.
    """
    frames, outcomes = _readable(images, pixels_of)
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
            opened = _able(pool.get(model), model, SKILLS[kind])
            found = kind(opened, **options).detect_each(list(frames.values()), names)
        except Exception as error:  # of the step, not of an image
            found = [error] * len(frames)
        outcomes.update(zip(frames, found, strict=True))
    return [outcomes[index] for index in range(len(images))]


def run_requests(
    pool: ModelPool, model: str, images: Sequence[WorkflowImageData], request: Callable[[Any, int], Request]
) -> list[Result | Exception]:
    """Ask something of each image.

    Args:
        model: A name for the pool.
        request: Makes a request of a picture and its number; what it raises is the image's error.
    """
    pictures, outcomes = _readable(images, lambda image: Image.fromarray(pixels_of(image)[..., ::-1]))
    requests: dict[int, Request] = {}
    for index, picture in pictures.items():
        try:
            requests[index] = request(picture, index)
        except Exception as error:
            outcomes[index] = error
    if requests:
        results: Sequence[Any]
        try:
            results = _able(pool.get(model), model, next(iter(requests.values())).skill).run(list(requests.values()))
        except Exception as error:
            results = [ErrorResult(error)] * len(requests)
        for index, result in zip(requests, results, strict=True):
            outcomes[index] = result.error if isinstance(result, ErrorResult) else result
    return [outcomes[index] for index in range(len(images))]


def _able(opened: VisionModel, name: str, skill: str) -> VisionModel:
    """A model, which has a skill.

    Raises:
        UnsupportedSkill: It lacks it.
    """
    if skill not in opened.skills:
        raise UnsupportedSkill(
            f"the model {redacted(name)} cannot {skill}, only {', '.join(sorted(opened.skills))}; set the field model "
            "to moondream2 or to the URL of moondream-cv serve"
        )
    return opened


def _readable(
    images: Sequence[WorkflowImageData], read: Callable[[WorkflowImageData], Any]
) -> tuple[dict[int, Any], dict[int, Any]]:
    """What was read of images, and the errors of the others, by their numbers."""
    pictures, errors = {}, {}
    for index, image in enumerate(images):
        try:
            pictures[index] = read(image)
        except Exception as error:
            errors[index] = error
    return pictures, errors
