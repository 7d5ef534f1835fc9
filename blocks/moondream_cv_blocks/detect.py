"""`moondream_cv/detect@v1`: detect objects by class name."""

from __future__ import annotations

from typing import Literal

from moondream_cv.detector import Detector

from .fields import BoxManifest, block_metadata, error_output_definitions
from .results import prediction_outputs
from .roboflow import Batch, BlockResult, OutputDefinition, WorkflowImageData, types
from .running import MoondreamBlock, run_detector

KIND = "object-detection"

DESCRIPTION = """
Detect objects by name with **Moondream 2**, an open-vocabulary vision-language model. Class names can be any words,
such as `person`, `red car` or `dented can`. No training is required.

#### How it works

- Each image is encoded once and all classes are detected together, so eight classes take little longer than one.
- All images of a batch are processed in one call.
- `confidence` is computed from the model's token probabilities.
- `class_id` follows the order of `class_names`. Boxes in crops keep their position in the original image.

#### When an image fails

If an image cannot be read, or the model or its server fails, `predictions` is empty, `error_status` is true and
`error_message` gives the reason. The workflow continues.

#### Connect it to

Any block that accepts object detections: filters, trackers, counters, zones, dynamic crop, visualizations and sinks.
For videos, **Moondream Track** runs the model on every Nth frame only.

#### Replace roboflow_core/moondream2@v1

Change the `type` of the step, and rename `prompt` to `class_names`.
"""


class Manifest(BoxManifest):
    """Fields and outputs of the detect block."""

    model_config = block_metadata(
        "Moondream Detect",
        "Detect objects of any class by name, with confidence scores.",
        DESCRIPTION,
        keywords=["open vocabulary", "zero-shot", "object detection"],
        priority=5.4,
    )
    type: Literal["moondream_cv/detect@v1"]

    @classmethod
    def describe_outputs(cls) -> list[OutputDefinition]:
        """Return the names and kinds of the outputs."""
        return [
            OutputDefinition(name="predictions", kind=[types.OBJECT_DETECTION_PREDICTION_KIND]),
            *error_output_definitions(),
        ]


class DetectBlock(MoondreamBlock):
    """Detect objects by class name."""

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
        """Return the outputs of each image; the arguments are the fields of the manifest."""
        options = {"confidence": confidence, "max_objects": max_objects, "nms": nms}
        detections = run_detector(Detector, self._models, model, list(images), class_names, **options)
        return prediction_outputs(detections, images, KIND, "detect")
