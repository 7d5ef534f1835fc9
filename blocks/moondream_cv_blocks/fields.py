"""Fields that the blocks share, and their validation when a workflow is compiled.

`values.py` parses the values of the fields.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from pydantic import ConfigDict, Field, GetJsonSchemaHandler, field_validator, model_validator
from pydantic.config import JsonDict
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from moondream_cv.errors import MoondreamError

from .messages import workflow_message
from .pool import CORE_MODELS, canonical_name, check_model
from .roboflow import ENGINE_VERSIONS, TENSORS, OutputDefinition, WorkflowBlockManifest, types
from .values import (
    MAX_COUNT,
    MAX_TEMPERATURE,
    is_selector,
    parse_class_names,
    parse_count,
    parse_fraction,
    parse_optional_fraction,
    parse_temperature,
    parsed_by,
    resembles_selector,
)

if TYPE_CHECKING:
    Images: TypeAlias = str
    ModelName: TypeAlias = str
    Text: TypeAlias = str
    Texts: TypeAlias = str
    Number: TypeAlias = str
    Integer: TypeAlias = str
    Flag: TypeAlias = str
    Anything: TypeAlias = str
else:
    Images = types.Selector(kind=[types.IMAGE_KIND])
    ModelName = types.Selector(kind=[types.STRING_KIND, types.ROBOFLOW_MODEL_ID_KIND])
    Text = types.Selector(kind=[types.STRING_KIND])
    Texts = types.Selector(kind=[types.LIST_OF_VALUES_KIND, types.STRING_KIND])
    Number = types.Selector(kind=[types.FLOAT_ZERO_TO_ONE_KIND, types.FLOAT_KIND])
    Integer = types.Selector(kind=[types.INTEGER_KIND])
    Flag = types.Selector(kind=[types.BOOLEAN_KIND])
    Anything = types.Selector()

# The limits in `Field` are for the workflow builder; `parsed_by` enforces them.
FractionLiteral: TypeAlias = Annotated[float, Field(ge=0, le=1)]
FractionField: TypeAlias = Annotated[FractionLiteral | Number, parsed_by(parse_fraction)]
OptionalFractionField: TypeAlias = Annotated[FractionLiteral | Number | None, parsed_by(parse_optional_fraction)]
CountField: TypeAlias = Annotated[Annotated[int, Field(ge=1, le=MAX_COUNT)] | Integer, parsed_by(parse_count)]
TemperatureField: TypeAlias = Annotated[
    Annotated[float, Field(ge=0, le=MAX_TEMPERATURE)] | Number, parsed_by(parse_temperature)
]
ALWAYS_VISIBLE: JsonDict = {"always_visible": True}
"""Extra of a field that the workflow builder shows outside the advanced options."""


def block_metadata(
    name: str, short: str, long: str, *, keywords: Sequence[str], priority: float, section: str = "model"
) -> ConfigDict:
    """Return the metadata of a block for the workflow builder.

    Args:
        name: Name of the block.
        short: Description of one sentence.
        long: Description for the side panel, in Markdown.
        keywords: Search keywords, in addition to those of all blocks of this plugin.
        priority: Position in the section; lower values come first.
        section: Section in the list of blocks.
    """
    return ConfigDict(
        # The engine assigns a workflow's inputs before each run. A validation error there is an exception, after which
        # a stream runner waits forever for frames that are never consumed. The block returns error outputs instead.
        validate_assignment=False,
        json_schema_extra={
            "name": name,
            "version": "v1",
            "short_description": short,
            "long_description": long,
            "license": "Apache-2.0",
            "block_type": "model",
            "search_keywords": ["moondream", "moondream2", *keywords, "vision language model", "VLM"],
            "is_vlm_block": True,
            "ui_manifest": {"section": section, "icon": "fal fa-moon", "blockPriority": priority},
        },
    )


class MoondreamManifest(WorkflowBlockManifest):
    """Fields of all blocks: the images and the model."""

    images: Images = types.ImageInputField
    model: ModelName | str = Field(
        default="moondream2",
        title="Model",
        description="Model name or server URL. `moondream2`, a Hugging Face `repository@revision` or a local folder is "
        "loaded in this process, once for all blocks and workflows, and downloaded on first use. The URL of a server "
        "(`moondream-cv serve`, Roboflow Inference, Moondream's API) runs the model there. `tiny` is a demonstration "
        "model for rendered shapes and icons.",
        examples=[
            "moondream2",
            "tiny",
            "vikhyatk/moondream2@2025-06-21",
            "./my-model",
            "http://localhost:2020",
            "$inputs.model",
        ],
        json_schema_extra=ALWAYS_VISIBLE,
    )

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Return the schema with required fields first, then the fields that are always visible."""
        schema = super().__get_pydantic_json_schema__(core_schema, handler)
        required = schema["required"]

        def place(item: tuple[str, Any]) -> int:
            name, field = item
            return 0 if name in required else 1 if field.get("always_visible") else 2

        return {**schema, "properties": dict(sorted(schema["properties"].items(), key=place))}

    @model_validator(mode="before")
    @classmethod
    def _convert_model_version(cls, values: Any) -> Any:
        """Convert the field `model_version` of a `roboflow_core/moondream2@v1` step to `model`.

        Raises:
            ValueError: The field names a model other than Moondream 2.
        """
        if not isinstance(values, dict) or values.get("model_version") is None:
            return values
        version, rest = values["model_version"], {k: v for k, v in values.items() if k != "model_version"}
        if not resembles_selector(version) and (
            not isinstance(version, str) or canonical_name(version) != "moondream2"
        ):
            raise ValueError(
                f"model_version must be 'moondream2' or one of {', '.join(map(repr, sorted(CORE_MODELS)))}, got "
                f"{version!r:.100}; remove it, and set the field model"
            )
        return {"model": version, **rest}

    @model_validator(mode="before")
    @classmethod
    def _reject_misspelled_fields(cls, values: Any) -> Any:
        """Ignore unknown fields, unless the name looks like a typo of a known field.

        Raises:
            ValueError: A field name looks like a typo.
        """
        if isinstance(values, dict):
            missing = [name for name in cls.model_fields if name not in values]
            for key in values.keys() - cls.model_fields.keys():
                close = difflib.get_close_matches(str(key), missing, n=1, cutoff=0.75)
                if close:
                    raise ValueError(f"unknown field {key!r}; did you mean {close[0]!r}?")
        return values

    @field_validator("model")
    @classmethod
    def _check_model(cls, value: str) -> str:
        if not is_selector(value):
            try:
                check_model(value)
            except (MoondreamError, ValueError) as error:  # pydantic reports a ValueError only
                raise ValueError(workflow_message(error)) from error
            return canonical_name(value)
        return value

    @classmethod
    def get_parameters_accepting_batches(cls) -> list[str]:
        """Return the fields that accept a batch."""
        return ["images"]

    @classmethod
    def get_execution_engine_compatibility(cls) -> str | None:
        """Return the supported versions of the workflows engine."""
        return ENGINE_VERSIONS


class ClassNamesManifest(MoondreamManifest):
    """Fields of blocks that localize classes."""

    class_names: list[str] | str | Texts = Field(
        title="Class Names",
        description="Classes to detect, in any words: a list, or names separated by commas or line breaks. `class_id` "
        "follows their order.",
        examples=[["person", "red car"], "person, red car", "$inputs.class_names"],
        json_schema_extra=ALWAYS_VISIBLE,
    )
    confidence: FractionField = Field(
        default=0.0,
        title="Confidence Threshold",
        description="Minimum confidence, from 0 to 1. 0 keeps all results; start with 0.3 to reduce false positives. "
        "Confidences come from the model's token probabilities. For a server that does not return them, all are 1.0.",
        examples=[0.0, 0.3, "$inputs.confidence"],
    )
    max_objects: CountField = Field(
        default=50,
        title="Maximum Objects",
        description="Maximum number of results per image and class.",
        examples=[50, "$inputs.max_objects"],
    )

    @model_validator(mode="before")
    @classmethod
    def _reject_tensor_representation(cls, values: Any) -> Any:
        if TENSORS:
            raise ValueError(
                "this block returns sv.Detections, not tensors; unset the environment variable "
                "ENABLE_TENSOR_DATA_REPRESENTATION"
            )
        return values

    @model_validator(mode="before")
    @classmethod
    def _convert_prompt(cls, values: Any) -> Any:
        """Convert the field `prompt` of a `roboflow_core/moondream2@v1` step to `class_names`.

        A literal prompt is one class, even with commas. The value of a selector is parsed like `class_names`.
        """
        if isinstance(values, dict) and "class_names" not in values and values.get("prompt") is not None:
            prompt = values["prompt"]
            names = prompt if resembles_selector(prompt) else [prompt]
            return {**{key: value for key, value in values.items() if key != "prompt"}, "class_names": names}
        return values

    @field_validator("class_names", mode="before")
    @classmethod
    def _check_class_names(cls, value: Any) -> Any:
        if not is_selector(value):
            parse_class_names(value)
        return value


class BoxManifest(ClassNamesManifest):
    """Fields of blocks that detect boxes."""

    nms: OptionalFractionField = Field(
        default=None,
        title="NMS Threshold",
        description="IoU threshold of non-maximum suppression within each class, from 0 to 1. Not set: no suppression.",
        examples=[None, 0.5, "$inputs.nms"],
    )


class TextManifest(MoondreamManifest):
    """Fields of blocks that generate text."""

    max_tokens: CountField = Field(
        default=768,
        title="Maximum Tokens",
        description="Maximum number of tokens to generate. A token is a short word or a part of a longer one.",
        examples=[768, 64, "$inputs.max_tokens"],
    )
    temperature: TemperatureField = Field(
        default=0.0,
        title="Temperature",
        description="Sampling temperature. 0 is greedy decoding: the same image always gives the same text. Higher "
        "values vary the text; the model's default is 0.5.",
        examples=[0.0, 0.5, "$inputs.temperature"],
    )


def error_output_definitions() -> list[OutputDefinition]:
    """Return the error outputs that all blocks have."""
    return [
        OutputDefinition(name="error_status", kind=[types.BOOLEAN_KIND]),
        OutputDefinition(name="error_message", kind=[types.STRING_KIND]),
    ]
