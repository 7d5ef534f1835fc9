"""`moondream_cv/caption@v1`: a description of each image."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from moondream_cv.requests import CAPTION_LENGTHS, Caption

from .fields import Text, TextManifest, described, error_outputs, is_selector, text_settings
from .results import NO_ERROR, failed
from .roboflow import Batch, BlockResult, OutputDefinition, WorkflowImageData, types
from .running import MoondreamBlock, ask

DESCRIPTION = """
Describe images with **Moondream 2**, in a sentence (`short`), a paragraph (`normal`) or at length (`long`).

All images of a batch go to the model in one call and are written together. Where other Moondream blocks look at the
same image, it is encoded once for all of them.

#### When an image fails

`caption` is empty, `error_status` is true and `error_message` says why. The workflow goes on.
"""


class Manifest(TextManifest):
    """A description of each image."""

    model_config = described(
        "Moondream Caption",
        "Describe images in words.",
        DESCRIPTION,
        keywords=["caption", "describe"],
        priority=5.43,
    )
    type: Literal["moondream_cv/caption@v1"]
    length: Literal["short", "normal", "long"] | Text = Field(
        default="normal",
        title="Length",
        description="How much to say: `short`, `normal` or `long`.",
        examples=["short", "normal", "long", "$inputs.length"],
    )

    @field_validator("length")
    @classmethod
    def _check_length(cls, value: str) -> str:
        if not is_selector(value) and value not in CAPTION_LENGTHS:
            raise ValueError(f"length must be one of {', '.join(CAPTION_LENGTHS)}, not {value!r}")
        return value

    @classmethod
    def describe_outputs(cls) -> list[OutputDefinition]:
        return [OutputDefinition(name="caption", kind=[types.STRING_KIND]), *error_outputs()]


class CaptionBlock(MoondreamBlock):
    """Images → descriptions."""

    @classmethod
    def get_manifest(cls) -> type[Manifest]:
        return Manifest

    def run(
        self,
        images: Batch[WorkflowImageData],
        model: str,
        length: str,
        max_tokens: int,
        temperature: float,
    ) -> BlockResult:
        def request(picture: Any, index: int) -> Caption:
            return Caption(picture, length, text_settings(max_tokens, temperature))

        return [_outputs(result) for result in ask(self._models, model, list(images), request)]


def _outputs(result: Any) -> dict[str, Any]:
    if isinstance(result, Exception):
        return {"caption": "", **failed(result, "moondream_cv/caption")}
    return {"caption": result.caption, **NO_ERROR}
