"""`moondream_cv/caption@v1`: caption images."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from moondream_cv.requests import Caption, CaptionResult

from .fields import ALWAYS_VISIBLE, Text, TextManifest, block_metadata, error_output_definitions
from .results import block_outputs
from .roboflow import Batch, BlockResult, OutputDefinition, WorkflowImageData, types
from .running import MoondreamBlock, run_requests
from .values import parse_text_settings

DESCRIPTION = """
Describe images with **Moondream 2** in one sentence (`short`), one paragraph (`normal`) or several (`long`).

All images of a batch are processed in one call. If several Moondream blocks use the same image, it is encoded once.

#### When an image fails

`caption` is empty, `error_status` is true and `error_message` gives the reason. The workflow continues.
"""


class Manifest(TextManifest):
    """Fields and outputs of the caption block."""

    model_config = block_metadata(
        "Moondream Caption",
        "Generate captions of images.",
        DESCRIPTION,
        keywords=["caption", "describe"],
        priority=5.43,
    )
    type: Literal["moondream_cv/caption@v1"]
    length: Literal["short", "normal", "long"] | Text = Field(
        default="normal",
        title="Length",
        description="Length of the caption: `short` is one sentence, `normal` one paragraph, `long` several.",
        examples=["short", "normal", "long", "$inputs.length"],
        json_schema_extra=ALWAYS_VISIBLE,
    )

    @classmethod
    def describe_outputs(cls) -> list[OutputDefinition]:
        """Return the names and kinds of the outputs."""
        return [
            OutputDefinition(name="caption", kind=[types.STRING_KIND, types.LANGUAGE_MODEL_OUTPUT_KIND]),
            *error_output_definitions(),
        ]


class CaptionBlock(MoondreamBlock):
    """Caption images."""

    manifest = Manifest

    def run(
        self,
        images: Batch[WorkflowImageData],
        model: str,
        length: str,
        max_tokens: int,
        temperature: float,
    ) -> BlockResult:
        """Return the outputs of each image; the arguments are the fields of the manifest."""

        def request(image: Any, index: int) -> Caption:
            return Caption(image, length, parse_text_settings(max_tokens, temperature))

        results = run_requests(self._models, model, list(images), request)
        return block_outputs(results, images, _caption_outputs, _empty_outputs, "caption")


def _caption_outputs(result: CaptionResult, image: WorkflowImageData) -> dict[str, Any]:
    return {"caption": result.caption}


def _empty_outputs(image: WorkflowImageData) -> dict[str, Any]:
    return {"caption": ""}
