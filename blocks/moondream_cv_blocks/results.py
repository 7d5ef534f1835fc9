"""Convert workflow images to pixels, results to block outputs, and errors to error outputs."""

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

LOG_INTERVAL_SECONDS = 60.0  # a message of a block is logged at most once in this time
MAX_LOGGED_MESSAGES = 256

NO_ERROR = {"error_status": False, "error_message": ""}

_logged_at: dict[tuple[str, str], float] = {}  # block and message → time of the last log record


def pixels_of(image: WorkflowImageData) -> npt.NDArray[np.uint8]:
    """Return the pixels of an image, [H, W, 3] uint8, BGR.

    Raises:
        ImageError: The image cannot be read, or is not an image.
    """
    try:
        pixels = image.numpy_image
    except Exception as error:  # the engine loads the image here, from a file, a URL or base64
        raise ImageError(f"the image cannot be read: {error}") from error
    if pixels is None:
        raise ImageError("the image cannot be read")
    if pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.size:
        return pixels
    return np.ascontiguousarray(to_rgb(pixels)[..., ::-1])


def block_outputs(
    results: Sequence[Any],
    images: Iterable[WorkflowImageData],
    result_outputs: Callable[[Any, WorkflowImageData], dict[str, Any]],
    empty_outputs: Callable[[WorkflowImageData], dict[str, Any]],
    block: str,
) -> list[dict[str, Any]]:
    """Return the outputs of each image. Never raises, because an exception in a block ends the whole video pipeline.

    Args:
        results: Result of each image, or the exception it failed with.
        images: Images of the batch.
        result_outputs: Function that returns the outputs of a result.
        empty_outputs: Function that returns the outputs of a failed image.
        block: Name of the block, for the log.
    """
    outputs = []
    for result, image in zip(results, images, strict=True):
        try:
            if isinstance(result, Exception):
                raise result
            outputs.append(NO_ERROR | result_outputs(result, image))
        except Exception as error:
            outputs.append(empty_outputs(image) | _log_failure(error, block))
    return outputs


def prediction_outputs(
    results: Sequence[sv.Detections | Exception], images: Iterable[WorkflowImageData], kind: str, block: str
) -> list[dict[str, Any]]:
    """Return the outputs of each image for a block whose only output besides errors is `predictions`.

    Args:
        results: Detections of each image in pixels, changed in place, or the exception it failed with.
        images: Images of the batch.
        kind: Prediction type, such as "object-detection".
        block: Name of the block, for the log.
    """

    def result_outputs(detections: sv.Detections, image: WorkflowImageData) -> dict[str, Any]:
        return {"predictions": as_prediction(detections, image, kind)}

    def empty_outputs(image: WorkflowImageData) -> dict[str, Any]:
        return {"predictions": empty_prediction(image, kind)}

    return block_outputs(results, images, result_outputs, empty_outputs, block)


def error_outputs(error: Exception) -> dict[str, Any]:
    """Return the error outputs of a failed image."""
    return {"error_status": True, "error_message": workflow_message(error)}


def _log_failure(error: Exception, block: str) -> dict[str, Any]:
    """Return the error outputs of a failed image, and log the error; unexpected errors with a traceback."""
    expected = isinstance(error, (MoondreamError, ValueError))
    outputs, now = error_outputs(error), time.monotonic()
    message = outputs["error_message"]
    key = block, message[:80]  # the end of a message can differ from frame to frame
    if now - _logged_at.get(key, -math.inf) > LOG_INTERVAL_SECONDS:  # not for every frame of a stream
        if len(_logged_at) >= MAX_LOGGED_MESSAGES:
            _logged_at.clear()
        _logged_at[key] = now
        level = logging.WARNING if expected else logging.ERROR
        logger.log(level, "moondream_cv/%s: %s", block, message, exc_info=None if expected else error)
    return outputs


def as_float64(values: npt.ArrayLike | None) -> npt.NDArray[np.float64]:
    """Return values as float64, whose elements `json.dumps` accepts, unlike those of float32."""
    return np.asarray(values, np.float64)


def as_prediction(detections: sv.Detections, image: WorkflowImageData, kind: str) -> sv.Detections:
    """Add the data columns of Roboflow's detection blocks: IDs, and the position in the parent images.

    Args:
        detections: Detections in pixels of the image; changed in place.
        image: Readable image of the detections.
        kind: Prediction type, such as "object-detection".

    Returns:
        The detections. `xyxy` and `confidence` are float64, `data["detection_id"]` is unique, and
        `data["inference_id"]` is the same for all detections of one call.
    """
    count = len(detections)
    height, width = image.numpy_image.shape[:2]
    detections.xyxy = as_float64(detections.xyxy)
    detections.confidence = as_float64(detections.confidence)
    detections[constants.INFERENCE_ID_KEY] = np.array([str(uuid.uuid4())] * count, dtype=str)
    detections[constants.DETECTION_ID_KEY] = np.array([str(uuid.uuid4()) for _ in range(count)], dtype=str)
    detections[constants.PREDICTION_TYPE_KEY] = np.array([kind] * count, dtype=str)
    detections[constants.IMAGE_DIMENSIONS_KEY] = np.array([[height, width]] * count, dtype=int).reshape(-1, 2)
    if not count:  # empty columns lose the image size
        detections.metadata[constants.IMAGE_DIMENSIONS_KEY] = [height, width]
    return attach_parents_coordinates_to_sv_detections(detections, image)


def empty_prediction(image: WorkflowImageData, kind: str) -> sv.Detections:
    """Return the empty detections of a failed image."""
    empty = sv.Detections(
        xyxy=np.empty((0, 4), np.float64),
        confidence=np.empty(0, np.float64),
        class_id=np.empty(0, int),
        data={"class_name": np.empty(0, str)},
    )
    try:
        pixels_of(image)
        return as_prediction(empty, image, kind)
    except Exception:  # an unreadable image has no size
        return empty
