"""`moondream_cv/segment@v1`: detect objects by class name, with masks."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from moondream_cv.detector import Detector
from moondream_cv.sam import DEFAULT_SAM

from .fields import ALWAYS_VISIBLE, BoxManifest, ModelName, block_metadata, error_output_definitions
from .pool import check_allowed
from .results import prediction_outputs
from .roboflow import Batch, BlockResult, OutputDefinition, WorkflowImageData, types
from .running import MoondreamBlock, run_detector
from .values import is_selector

KIND = "instance-segmentation"

DESCRIPTION = """
Segment objects by name: **Moondream 2**, an open-vocabulary vision-language model, detects them, and **SAM 2** computes
a mask in each box. No training is required.

#### How it works

- Each image is encoded once by each model, and the boxes of an image are segmented together.
- `confidence` is the confidence of the detection.
- `class_id` follows the order of `class_names`. Masks in crops keep their position in the original image.
- The segmentation model runs in this process, also if `model` is the URL of a server.

#### When an image fails

If an image cannot be read, or a model or its server fails, `predictions` is empty, `error_status` is true and
`error_message` gives the reason. The workflow continues.

#### Connect it to

Any block that accepts instance segmentations: mask, polygon and halo visualizations, filters, zones, dynamic zones and
sinks.
"""


class Manifest(BoxManifest):
    """Fields and outputs of the segment block."""

    model_config = block_metadata(
        "Moondream Segment",
        "Detect objects of any class by name, with masks of SAM 2.",
        DESCRIPTION,
        keywords=["open vocabulary", "zero-shot", "instance segmentation", "mask", "SAM"],
        priority=5.41,
    )
    type: Literal["moondream_cv/segment@v1"]
    masks: ModelName | str = Field(
        default=DEFAULT_SAM,
        title="Segmentation Model",
        description="Hugging Face repository or local folder of SAM or SAM 2. It is loaded in this process, once for "
        "all workflows, and downloaded on first use.",
        examples=[DEFAULT_SAM, "facebook/sam2.1-hiera-large", "./my-sam", "$inputs.masks"],
        json_schema_extra=ALWAYS_VISIBLE,
    )

    @field_validator("masks")
    @classmethod
    def _check_masks(cls, value: str) -> str:
        return value if is_selector(value) else check_allowed(value)

    @classmethod
    def describe_outputs(cls) -> list[OutputDefinition]:
        """Return the names and kinds of the outputs."""
        return [
            OutputDefinition(name="predictions", kind=[types.INSTANCE_SEGMENTATION_PREDICTION_KIND]),
            *error_output_definitions(),
        ]


class SegmentBlock(MoondreamBlock):
    """Detect objects by class name, with masks."""

    manifest = Manifest

    def run(
        self,
        images: Batch[WorkflowImageData],
        class_names: list[str] | str,
        model: str,
        masks: str,
        confidence: float,
        max_objects: int,
        nms: float | None,
    ) -> BlockResult:
        """Return the outputs of each image; the arguments are the fields of the manifest."""
        options = {"confidence": confidence, "max_objects": max_objects, "nms": nms, "masks": masks}
        detections = run_detector(Detector, self._models, model, list(images), class_names, **options)
        return prediction_outputs(detections, images, KIND, "segment")
