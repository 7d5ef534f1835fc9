"""`moondream_cv/detect@v1`: boxes of whatever the class names mean."""

from __future__ import annotations

from typing import Any, Literal

import supervision as sv

from moondream_cv.detector import Detector

from .fields import BoxManifest, block_metadata, error_output_definitions
from .results import as_prediction, block_outputs, empty_prediction
from .roboflow import Batch, BlockResult, OutputDefinition, WorkflowImageData, types
from .running import MoondreamBlock, run_detector

KIND = "object-detection"

DESCRIPTION = """
Detect objects by name with **Moondream 2**, an open-vocabulary vision-language model: any words will do, such as
`person`, `red car` or `dented can`, and nothing needs to be trained.

#### How it works

- Every image is encoded once, and all classes are looked for together, so that eight classes cost little more than one.
- All images of a batch go to the model in one call.
- `confidence` is real: it comes from the probabilities of the tokens that the model chose.
- `class_id` follows the order of `class_names`. Boxes of crops map back to the image that the crop was cut from.

#### When an image fails

Where an image cannot be read, or the model or its server fails on it, `predictions` is empty, `error_status` is true
and `error_message` says why. The workflow goes on.

#### What to connect it to

Filters, trackers, counters, zones, dynamic crop, visualisations and sinks: whatever takes object detections. To track
through a video without looking at every frame, use **Moondream Track** instead.

It takes the place of `roboflow_core/moondream2@v1`: change the step's `type`, and rename `prompt` to `class_names`.
"""


class Manifest(BoxManifest):
    """Boxes of whatever the class names mean."""

    model_config = block_metadata(
        "Moondream Detect",
        "Detect objects of any classes by name, with real confidences.",
        DESCRIPTION,
        keywords=["open vocabulary", "zero-shot", "object detection"],
        priority=5.4,
    )
    type: Literal["moondream_cv/detect@v1"]

    @classmethod
    def describe_outputs(cls) -> list[OutputDefinition]:
        return [
            OutputDefinition(name="predictions", kind=[types.OBJECT_DETECTION_PREDICTION_KIND]),
            *error_output_definitions(),
        ]


class DetectBlock(MoondreamBlock):
    """Images × class names → boxes."""

    manifest = Manifest

    def run(
        self,
        images: Batch[WorkflowImageData],
        class_names: list[str] | str,
        model: str,
        confidence: float,
        max_objects: int,
        nms: float | None,
    ) -> BlockResult:
        options = {"confidence": confidence, "max_objects": max_objects, "nms": nms}
        detections = run_detector(Detector, self._models, model, list(images), class_names, **options)
        return block_outputs(detections, images, _detection_outputs, _empty_outputs, "detect")


def _detection_outputs(detections: sv.Detections, image: WorkflowImageData) -> dict[str, Any]:
    return {"predictions": as_prediction(detections, image, KIND)}


def _empty_outputs(image: WorkflowImageData) -> dict[str, Any]:
    return {"predictions": empty_prediction(image, KIND)}
