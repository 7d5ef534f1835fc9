"""`moondream_cv/point@v1`: point at objects by class name."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import supervision as sv

from moondream_cv.detector import Pointer

from .fields import ClassNamesManifest, block_metadata, error_output_definitions
from .results import as_float64, as_prediction, block_outputs, empty_prediction
from .roboflow import Batch, BlockResult, OutputDefinition, WorkflowImageData, constants, types
from .running import MoondreamBlock, run_detector

KIND = "keypoint-detection"
KEY_POINT = "point"  # name of the single key point of an object

# Older engines have no kind for labeled points.
LABELED_POINTS_KIND = getattr(types, "LABELED_POINTS_KIND", types.LIST_OF_VALUES_KIND)

DESCRIPTION = """
Point at objects by name with **Moondream 2**: one point per object. Pointing is faster than detection, sufficient for
counting, and works for objects without a clear outline. Class names can be any words.

#### Outputs

- `predictions`: one object detection of zero area per point, with the point as its only key point. Connect it to
  filters, zones, and dot, label and key-point visualizations. Its length is the count. Trackers do not work, because
  boxes without area never overlap; use **Moondream Track** instead.
- `points`: the same points in pixels as labeled, positive points, for segmentation blocks of the SAM family. Such a
  block accepts one list of points for all images of a run, and uses all points for one object. Run one image at a time,
  collapse the dimension (`roboflow_core/dimension_collapse@v1`, then the first element), and set `max_objects` to 1.

Each image is encoded once for all classes, and all images of a batch are processed in one call.

#### When an image fails

`predictions` and `points` are empty, `error_status` is true and `error_message` gives the reason. The workflow
continues.
"""


class Manifest(ClassNamesManifest):
    """Fields and outputs of the point block."""

    model_config = block_metadata(
        "Moondream Point",
        "Point at objects of any class by name, or count them.",
        DESCRIPTION,
        keywords=["open vocabulary", "zero-shot", "point", "count", "key point"],
        priority=5.41,
    )
    type: Literal["moondream_cv/point@v1"]

    @classmethod
    def describe_outputs(cls) -> list[OutputDefinition]:
        """Return the names and kinds of the outputs."""
        return [
            OutputDefinition(
                name="predictions",
                kind=[types.KEYPOINT_DETECTION_PREDICTION_KIND, types.OBJECT_DETECTION_PREDICTION_KIND],
            ),
            OutputDefinition(name="points", kind=[LABELED_POINTS_KIND]),
            *error_output_definitions(),
        ]


class PointBlock(MoondreamBlock):
    """Point at objects by class name."""

    manifest = Manifest

    def run(
        self,
        images: Batch[WorkflowImageData],
        class_names: list[str] | str,
        model: str,
        confidence: float,
        max_objects: int,
    ) -> BlockResult:
        """Return the outputs of each image; the arguments are the fields of the manifest."""
        options = {"confidence": confidence, "max_objects": max_objects}
        detections = run_detector(Pointer, self._models, model, list(images), class_names, **options)
        return block_outputs(detections, images, _point_outputs, _empty_outputs, "point")


def _point_outputs(detections: sv.Detections, image: WorkflowImageData) -> dict[str, Any]:
    points = [{"x": float(x), "y": float(y), "positive": True} for x, y in detections.xyxy[:, :2]]
    return {"predictions": as_prediction(_with_key_points(detections), image, KIND), "points": points}


def _empty_outputs(image: WorkflowImageData) -> dict[str, Any]:
    return {"predictions": _with_key_points(empty_prediction(image, KIND)), "points": []}


def _with_key_points(detections: sv.Detections) -> sv.Detections:
    """Add the corner of each zero-area box as its key point, [N, 1, 2], in place."""
    count = len(detections)
    detections[constants.KEYPOINTS_XY_KEY_IN_SV_DETECTIONS] = as_float64(detections.xyxy[:, None, :2])
    detections[constants.KEYPOINTS_CONFIDENCE_KEY_IN_SV_DETECTIONS] = as_float64(detections.confidence)[:, None]
    detections[constants.KEYPOINTS_CLASS_ID_KEY_IN_SV_DETECTIONS] = np.zeros((count, 1), int)
    detections[constants.KEYPOINTS_CLASS_NAME_KEY_IN_SV_DETECTIONS] = np.full((count, 1), KEY_POINT, object)
    return detections
