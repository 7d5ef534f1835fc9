"""Fields that blocks have in common, and what is refused of them when a workflow is compiled.

Whatever a field says may also come from a selector, and is then known only while the workflow runs: the same checks
make an error output of it there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from pydantic import Field, field_validator, model_validator

from moondream_cv.detector import check_classes

from .pool import check_model
from .roboflow import ENGINE_VERSIONS, OutputDefinition, WorkflowBlockManifest, types

if TYPE_CHECKING:
    Images: TypeAlias = str
    Text: TypeAlias = str
    Texts: TypeAlias = str
    Number: TypeAlias = str
    Integer: TypeAlias = str
    Flag: TypeAlias = str
    Anything: TypeAlias = str
else:
    Images = types.Selector(kind=[types.IMAGE_KIND])
    Text = types.Selector(kind=[types.STRING_KIND])
    Texts = types.Selector(kind=[types.LIST_OF_VALUES_KIND, types.STRING_KIND])
    Number = types.Selector(kind=[types.FLOAT_ZERO_TO_ONE_KIND, types.FLOAT_KIND])
    Integer = types.Selector(kind=[types.INTEGER_KIND])
    Flag = types.Selector(kind=[types.BOOLEAN_KIND])
    Anything = types.Selector()

_SELECTOR = re.compile(r"\$(inputs|steps|thresholds|sensors)\.\S+")


class MoondreamManifest(WorkflowBlockManifest):
    """Images, and the model that looks at them."""

    images: Images = types.ImageInputField
    model: Text | str = Field(
        default="moondream2",
        title="Model",
        description="Where the model runs. `moondream2` is loaded in this process, once for all blocks and workflows, "
        "and downloaded the first time; so is `repository@revision` of the hub, or a local folder. `tiny` is the "
        "embedded demonstration model, which knows rendered shapes and icons only. The URL of a server (`moondream-cv "
        "serve`, Roboflow Inference, Moondream's API) loads nothing here.",
        examples=[
            "moondream2",
            "tiny",
            "vikhyatk/moondream2@2025-06-21",
            "./my-model",
            "http://localhost:2020",
            "$inputs.model",
        ],
    )

    @field_validator("model")
    @classmethod
    def _check_model(cls, value: str) -> str:
        if not is_selector(value, "model"):
            try:
                check_model(value)
            except Exception as error:
                raise ValueError(f"model: {error}") from error
        return value

    @classmethod
    def get_parameters_accepting_batches(cls) -> list[str]:
        return ["images"]

    @classmethod
    def get_execution_engine_compatibility(cls) -> str | None:
        return ENGINE_VERSIONS


class FinderManifest(MoondreamManifest):
    """What is looked for as well."""

    class_names: list[str] | str | Texts = Field(
        title="Class Names",
        description="What to look for, in any words: a list, or names separated by commas. `class_id` follows their "
        "order. The image is encoded once however many there are.",
        examples=[["person", "red car"], "person, red car", "$inputs.class_names"],
    )
    confidence: float | Number = Field(
        default=0.0,
        title="Confidence Threshold",
        description="Leave out what the model is less sure of, from 0 to 1. Confidences come from the model's own "
        "token probabilities; a server that gives none answers 1.0 for everything.",
        examples=[0.0, 0.3, "$inputs.confidence"],
    )
    max_objects: int | Integer = Field(
        default=50,
        title="Maximum Objects",
        description="Objects per image and class at the most.",
        examples=[50, "$inputs.max_objects"],
    )

    @model_validator(mode="before")
    @classmethod
    def _take_prompt(cls, values: Any) -> Any:
        """A step of `roboflow_core/moondream2@v1` becomes one of these by its `type` alone: its prompt is one class."""
        if isinstance(values, dict) and "class_names" not in values and values.get("prompt") is not None:
            prompt = values["prompt"]
            names = prompt if isinstance(prompt, str) and prompt.startswith("$") else [prompt]
            return {**{key: value for key, value in values.items() if key != "prompt"}, "class_names": names}
        return values

    @field_validator("class_names")
    @classmethod
    def _check_class_names(cls, value: list[str] | str) -> list[str] | str:
        if isinstance(value, list) or not is_selector(value, "class_names"):
            try:
                class_list(value)
            except ValueError as error:
                raise ValueError(f"class_names: {error}") from error
        return value

    @field_validator("confidence")
    @classmethod
    def _check_confidence(cls, value: float | str) -> float | str:
        return check_fraction(value, "confidence")

    @field_validator("max_objects")
    @classmethod
    def _check_max_objects(cls, value: int | str) -> int | str:
        return check_count(value, "max_objects")


class TextManifest(MoondreamManifest):
    """How text is written as well."""

    max_tokens: int | Integer = Field(
        default=768,
        title="Maximum Tokens",
        description="Tokens at the most, a token being a short word or a part of a longer one.",
        examples=[768, 64, "$inputs.max_tokens"],
    )
    temperature: float | Number = Field(
        default=0.0,
        title="Temperature",
        description="0 always takes the likeliest words, so that the same image gives the same text. Above it the "
        "model varies; its own default is 0.5.",
        examples=[0.0, 0.5, "$inputs.temperature"],
    )

    @field_validator("max_tokens")
    @classmethod
    def _check_max_tokens(cls, value: int | str) -> int | str:
        return check_count(value, "max_tokens")

    @field_validator("temperature")
    @classmethod
    def _check_temperature(cls, value: float | str) -> float | str:
        if not is_selector(value, "temperature") and not (isinstance(value, (int, float)) and 0 <= value < math.inf):
            raise ValueError(f"temperature must be a number from 0 on, not {value!r}")
        return value


def class_list(value: Any) -> list[str]:
    """Class names from a list or from a string with commas, without spaces around them.

    Raises:
        ValueError: There is none, one says nothing, is there twice or is no string.
    """
    parts = value.split(",") if isinstance(value, str) else value
    if isinstance(parts, Sequence):
        parts = [part.strip() if isinstance(part, str) else part for part in parts]
        for part in parts:
            if isinstance(part, str) and part.startswith("$"):
                raise ValueError(f"{part!r} is no name; a selector stands for the whole list")
    return check_classes(parts)


def is_selector(value: Any, field: str) -> bool:
    """Whether a value is known only while the workflow runs.

    Raises:
        ValueError: It looks like a selector and is none.
    """
    if not isinstance(value, str) or not value.startswith("$"):
        return False
    if not _SELECTOR.fullmatch(value):
        raise ValueError(f"{field}: {value!r} is no selector; write $inputs.NAME or $steps.STEP.OUTPUT")
    return True


def check_fraction(value: Any, field: str) -> Any:
    """Return a number in 0..1, or a selector."""
    if not is_selector(value, field) and not (isinstance(value, (int, float)) and 0 <= value <= 1):
        raise ValueError(f"{field} must be a number in 0..1, not {value!r}")
    return value


def check_count(value: Any, field: str) -> Any:
    """Return an integer from 1 on, or a selector."""
    if not is_selector(value, field) and not (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        raise ValueError(f"{field} must be an integer of at least 1, not {value!r}")
    return value


def error_outputs() -> list[OutputDefinition]:
    """What every block says of an image on which it failed."""
    return [
        OutputDefinition(name="error_status", kind=[types.BOOLEAN_KIND]),
        OutputDefinition(name="error_message", kind=[types.STRING_KIND]),
    ]
