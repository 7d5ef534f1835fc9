"""Fields that blocks have in common, and what is refused of them when a workflow is compiled.

What a field says may also come from a selector, and is then known only while the workflow runs: the same functions make
an error output of it there.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_validator

from moondream_cv.detector import check_classes
from moondream_cv.errors import MoondreamError
from moondream_cv.requests import Settings

from .pool import check_model
from .roboflow import ENGINE_VERSIONS, TENSORS, OutputDefinition, WorkflowBlockManifest, types

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

T = TypeVar("T")

_NUMBER, _INTEGER, _FLAG = TypeAdapter(float), TypeAdapter(int), TypeAdapter(bool)
_MOST = 2**31 - 1
_SELECTOR = re.compile(r"\$(inputs|steps)\.\S+")
_LIKE_A_SELECTOR = re.compile(r"\$[A-Za-z_]")  # unlike "$20"


def described(
    name: str, short: str, long: str, *, keywords: Sequence[str], priority: float, section: str = "model"
) -> ConfigDict:
    """What the workflow builder shows of a block.

    Args:
        long: For the side panel, in Markdown.
        keywords: By which it is found, beside its name.
        priority: Of the blocks of a section those with the lowest come first.
        section: Of the list of blocks.
    """
    return ConfigDict(
        # The engine assigns a workflow's inputs before each run, and a refusal there is an exception: a stream runner
        # then waits forever for frames that nobody takes. The block makes error outputs of it instead.
        validate_assignment=False,
        json_schema_extra={
            "name": name,
            "version": "v1",
            "short_description": short,
            "long_description": long,
            "license": "Apache-2.0",
            "block_type": "model",
            "search_keywords": ["moondream", *keywords, "VLM"],
            "ui_manifest": {"section": section, "icon": "fal fa-moon", "blockPriority": priority},
        },
    )


class MoondreamManifest(WorkflowBlockManifest):
    """Images, and the model that looks at them."""

    images: Images = types.ImageInputField
    model: Text | str = Field(
        default="moondream2",
        title="Model",
        description="Where the model runs. `moondream2` is loaded in this process, once for all blocks and workflows, "
        "and downloaded the first time; so is `repository@revision` of Hugging Face, or a local folder. With the URL "
        "of a server (`moondream-cv serve`, Roboflow Inference, Moondream's API) nothing is loaded here. `tiny` is a "
        "demonstration model that knows rendered shapes and icons only.",
        examples=[
            "moondream2",
            "tiny",
            "vikhyatk/moondream2@2025-06-21",
            "./my-model",
            "http://localhost:2020",
            "$inputs.model",
        ],
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_misspelt(cls, values: Any) -> Any:
        """Fields that a block does not have are passed over, but not those that are nearly called like one it has."""
        if isinstance(values, dict):
            missing = [name for name in cls.model_fields if name not in values]
            for key in values:
                close = difflib.get_close_matches(str(key), missing, n=1, cutoff=0.75)
                if close and key not in cls.model_fields:
                    raise ValueError(f"there is no field {key!r}; did you mean {close[0]!r}?")
        return values

    @field_validator("model")
    @classmethod
    def _check_model(cls, value: str) -> str:
        if not is_selector(value):
            try:
                check_model(value)
            except MoondreamError as error:  # of those pydantic would make a crash
                raise ValueError(str(error)) from error
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
        description="What to look for, in any words: a list, or names separated by commas (by nothing else). "
        "`class_id` follows their order. The image is encoded once however many there are.",
        examples=[["person", "red car"], "person, red car", "$inputs.class_names"],
    )
    confidence: float | Number = Field(
        default=0.0,
        title="Confidence Threshold",
        description="Drop results below this confidence, from 0 to 1; 0 keeps all that the model says, 0.3 is a good "
        "start against false ones. Confidences come from the model's own token probabilities; a server that gives none "
        "answers 1.0 for everything.",
        examples=[0.0, 0.3, "$inputs.confidence"],
    )
    max_objects: int | Integer = Field(
        default=50,
        title="Maximum Objects",
        description="Results per image and class at the most.",
        examples=[50, "$inputs.max_objects"],
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_tensors(cls, values: Any) -> Any:
        if TENSORS:
            raise ValueError("this block gives sv.Detections: unset ENABLE_TENSOR_DATA_REPRESENTATION")
        return values

    @model_validator(mode="before")
    @classmethod
    def _take_prompt(cls, values: Any) -> Any:
        """A step of `roboflow_core/moondream2@v1` becomes one of these by its `type` alone.

        A prompt that is written down is one class, commas or not; one from a selector is read as `class_names` are.
        """
        if isinstance(values, dict) and "class_names" not in values and values.get("prompt") is not None:
            prompt = values["prompt"]
            names = prompt if isinstance(prompt, str) and _LIKE_A_SELECTOR.match(prompt) else [prompt]
            return {**{key: value for key, value in values.items() if key != "prompt"}, "class_names": names}
        return values

    @field_validator("class_names", mode="before")
    @classmethod
    def _check_class_names(cls, value: Any) -> Any:
        if not is_selector(value):
            class_list(value)
        return value

    @field_validator("confidence", mode="before")
    @classmethod
    def _check_confidence(cls, value: Any) -> Any:
        return value if is_selector(value) else fraction(value, "confidence")

    @field_validator("max_objects", mode="before")
    @classmethod
    def _check_max_objects(cls, value: Any) -> Any:
        return value if is_selector(value) else count(value, "max_objects")


class BoxManifest(FinderManifest):
    """Which boxes are kept as well."""

    nms: float | Number | None = Field(
        default=None,
        title="NMS Threshold",
        description="Of boxes of the same class whose intersection over union exceeds this, keep the most confident "
        "one; from 0 to 1. Not set: keep all.",
        examples=[None, 0.5, "$inputs.nms"],
    )

    @field_validator("nms", mode="before")
    @classmethod
    def _check_nms(cls, value: Any) -> Any:
        return value if value is None or is_selector(value) else fraction(value, "nms")


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

    @field_validator("max_tokens", mode="before")
    @classmethod
    def _check_max_tokens(cls, value: Any) -> Any:
        return value if is_selector(value) else count(value, "max_tokens")

    @field_validator("temperature", mode="before")
    @classmethod
    def _check_temperature(cls, value: Any) -> Any:
        return value if is_selector(value) else number(value, "temperature")


def class_list(value: Any) -> list[str]:
    """Class names from a list, or from a string with commas or line breaks, without spaces around them.

    Raises:
        ValueError: There is none, one says nothing, is there twice or is no string.
    """
    parts = re.split(r"[,\n]", value) if isinstance(value, str) else value
    if isinstance(parts, Sequence):
        parts = [part.strip() if isinstance(part, str) else part for part in parts]
        for part in parts:
            if isinstance(part, str) and (_LIKE_A_SELECTOR.match(part) or _SELECTOR.fullmatch(f"${part}")):
                raise ValueError(
                    f"class_names has {part!r}, which is no name; a selector, such as $inputs.class_names, stands for "
                    "the whole list"
                )
    return check_classes(parts, "class_names")


def is_selector(value: Any) -> bool:
    """Whether a value is known only while the workflow runs.

    Raises:
        ValueError: It looks like a selector and is none.
    """
    if not isinstance(value, str) or not _LIKE_A_SELECTOR.match(value):
        return False
    if not _SELECTOR.fullmatch(value):
        raise ValueError(f"{value!r} is no selector; write $inputs.NAME or $steps.STEP.OUTPUT")
    return True


def fraction(value: Any, field: str) -> float:
    """A number in 0..1, perhaps written as a string.

    Raises:
        ValueError: It is none.
    """
    given = _read(_NUMBER, value)
    if given is None or not 0 <= given <= 1:
        raise ValueError(f"{field} must be a number in 0..1, not {value!r:.100}")
    return given


def number(value: Any, field: str) -> float:
    """A number from 0 on; otherwise as `fraction`."""
    given = _read(_NUMBER, value)
    if given is None or not 0 <= given < math.inf:
        raise ValueError(f"{field} must be a number from 0 on, not {value!r:.100}")
    return given


def count(value: Any, field: str) -> int:
    """An integer from 1 on; otherwise as `fraction`."""
    given = _read(_INTEGER, value)
    if given is None or not 1 <= given <= _MOST:
        raise ValueError(f"{field} must be an integer from 1 to {_MOST}, not {value!r:.100}")
    return given


def flag(value: Any, field: str) -> bool:
    """True or false, perhaps written as a string; otherwise as `fraction`."""
    given = _read(_FLAG, value)
    if given is None:
        raise ValueError(f"{field} must be true or false, not {value!r:.100}")
    return given


def _read(adapter: TypeAdapter[T], value: Any) -> T | None:
    """A value, perhaps written as a string; None where it is no such value."""
    if isinstance(value, bool) and adapter is not _FLAG:
        return None
    try:
        return adapter.validate_python(value)
    except ValidationError:
        return None


def text_settings(max_tokens: Any, temperature: Any) -> Settings:
    """The settings of a text from two fields; raises `ValueError` for what is out of range."""
    return Settings(temperature=number(temperature, "temperature"), max_tokens=count(max_tokens, "max_tokens"))


def error_outputs() -> list[OutputDefinition]:
    """What every block says of an image on which it failed."""
    return [
        OutputDefinition(name="error_status", kind=[types.BOOLEAN_KIND]),
        OutputDefinition(name="error_message", kind=[types.STRING_KIND]),
    ]
