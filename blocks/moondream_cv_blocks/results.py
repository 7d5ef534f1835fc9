"""From the engine's images to frames, from what a model gives to outputs, and from what fails to error outputs."""

from __future__ import annotations

import logging
import math
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import supervision as sv

from moondream_cv.errors import ImageError, MoondreamError
from moondream_cv.images import to_rgb

from .messages import workflow_message
from .roboflow import WorkflowImageData, attach_parents_coordinates_to_sv_detections, constants

logger = logging.getLogger(__name__)

LOG_INTERVAL_SECONDS = 60.0  # seconds after which the same message is logged again
MAX_LOGGED_MESSAGES = 256

NO_ERROR = {"error_status": False, "error_message": ""}

_logged_at: dict[tuple[str, str], float] = {}  # when each block's messages were logged


def pixels_of(image: WorkflowImageData) -> npt.NDArray[np.uint8]:
    """[H, W, 3] BGR.

    Raises:
        ImageError: It cannot be read, or is no image.
    """
    try:
        pixels = image.numpy_image
    except Exception as error:  # of whatever reads it when it is asked for
        raise ImageError(f"the image cannot be read: {error}") from error
    if pixels is None:
        raise ImageError("the image cannot be read")
    if pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.size:
        return pixels  # as nearly all are
    return np.ascontiguousarray(to_rgb(pixels)[..., ::-1])


def block_outputs(
    results: Sequence[Any],
    images: Iterable[WorkflowImageData],
    give: Callable[[Any, WorkflowImageData], dict[str, Any]],
    nothing: Callable[[WorkflowImageData], dict[str, Any]],
    block: str,
) -> list[dict[str, Any]]:
    """The outputs of each image, whatever happens: an exception out of a block ends a whole video pipeline.

    Args:
        results: What came of the images; exceptions for those that failed.
        give: Makes outputs of a result.
        nothing: Makes those that stand in their place where something failed.
        block: Its name, for the log.
    """
    given = []
    for result, image in zip(results, images, strict=True):
        try:
            if isinstance(result, Exception):
                raise result
            given.append(NO_ERROR | give(result, image))
        except Exception as error:
            given.append(nothing(image) | _failed(error, block))
    return given


def error_outputs(error: Exception) -> dict[str, Any]:
    """Return the error outputs."""
    return {"error_status": True, "error_message": workflow_message(error)}


def _failed(error: Exception, block: str) -> dict[str, Any]:
    """The error outputs of an image, which are logged; what is not meant to happen with its traceback."""
    expected = isinstance(error, (MoondreamError, ValueError))
    given, now = error_outputs(error), time.monotonic()
    message = given["error_message"]
    key = block, message[:80]  # what it quotes at the end may differ from frame to frame
    if now - _logged_at.get(key, -math.inf) > LOG_INTERVAL_SECONDS:  # of a stream, every frame would say it
        if len(_logged_at) >= MAX_LOGGED_MESSAGES:
            _logged_at.clear()
        _logged_at[key] = now
        level = logging.WARNING if expected else logging.ERROR
        logger.log(level, "moondream_cv/%s: %s", block, message, exc_info=None if expected else error)
    return given


def as_float64(values: npt.ArrayLike | None) -> npt.NDArray[np.float64]:
    """Return values as float64, whose elements go through `json.dumps`; those of float32 do not."""
    return np.asarray(values, np.float64)


def as_prediction(detections: sv.Detections, image: WorkflowImageData, kind: str) -> sv.Detections:
    """Fill in the columns that Roboflow's own detection blocks have: IDs, and the position in the parent images.

    Args:
        detections: In pixels of the image, which can be read; filled in place.
        kind: The prediction's type, such as "object-detection".

    Returns:
        The detections: `xyxy` and `confidence` float64, `data["detection_id"]` unique, and `data["inference_id"]` the
        same for all detections of one call.
    """
    count = len(detections)
    height, width = image.numpy_image.shape[:2]
    detections.xyxy = as_float64(detections.xyxy)
    detections.confidence = as_float64(detections.confidence)
    detections[constants.INFERENCE_ID_KEY] = np.array([str(uuid.uuid4())] * count, dtype=str)
    detections[constants.DETECTION_ID_KEY] = np.array([str(uuid.uuid4()) for _ in range(count)], dtype=str)
    detections[constants.PREDICTION_TYPE_KEY] = np.array([kind] * count, dtype=str)
    detections[constants.IMAGE_DIMENSIONS_KEY] = np.array([[height, width]] * count, dtype=int).reshape(-1, 2)
    if not count:  # no row can say it
        detections.metadata[constants.IMAGE_DIMENSIONS_KEY] = [height, width]
    return attach_parents_coordinates_to_sv_detections(detections, image)


def empty_prediction(image: WorkflowImageData, kind: str) -> sv.Detections:
    """What stands in the place of detections on an image that failed."""
    nothing = sv.Detections(
        xyxy=np.empty((0, 4), np.float64),
        confidence=np.empty(0, np.float64),
        class_id=np.empty(0, int),
        data={"class_name": np.empty(0, str)},
    )
    try:
        pixels_of(image)
        return as_prediction(nothing, image, kind)
    except Exception:  # nothing is known of an image that cannot be read
        return nothing
