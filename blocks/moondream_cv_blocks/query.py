"""`moondream_cv/query@v1`: answer questions about images."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from pydantic import Field, ValidationInfo, field_validator

from moondream_cv.requests import Query, QueryResult

from .fields import ALWAYS_VISIBLE, Anything, Flag, Text, TextManifest, block_metadata, error_output_definitions
from .results import block_outputs
from .roboflow import Batch, BlockResult, OutputDefinition, WorkflowImageData, types
from .running import MoondreamBlock, run_requests
from .values import is_selector, parse_flag, parse_text_settings

DESCRIPTION = """
Ask **Moondream 2** a question about each image, such as "What color is the car?", "Is the door open?" or "What does the
label say?".

#### Questions with placeholders

`{name}` in the question is replaced by that value of `parameters`: a constant, a workflow input, or the output of
another step, which can differ for each image. For example, `What color is the {object}?` with
`{"object": "$steps.classes.output"}` asks about the detected class of each crop. Write `{{name}}` for a literal
`{name}`.

#### Outputs

- `answer`: the answer. With a `temperature` of 0, the same image always gets the same answer. If the question requests
  JSON, connect **JSON Parser**, **VLM As Classifier** or **VLM As Detector**.
- `reasoning`: the reasoning before the answer, if `reasoning` is enabled; otherwise empty.
- `grounding`: the parts of the reasoning that refer to points of the image, in pixels:
  `[{"start": 0, "end": 7, "text": "the dog", "points": [{"x": 120.0, "y": 80.5}]}]`.

All images of a batch are processed in one call.

#### When an image fails

`answer` and `reasoning` are empty, `error_status` is true and `error_message` gives the reason. The workflow continues.
"""

_PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}|\{(\w+)\}")


class Manifest(TextManifest):
    """Fields and outputs of the query block."""

    model_config = block_metadata(
        "Moondream Query",
        "Ask questions about images.",
        DESCRIPTION,
        keywords=["question", "visual question answering", "VQA", "reasoning"],
        priority=5.42,
    )
    type: Literal["moondream_cv/query@v1"]
    question: Text | str = Field(
        title="Question",
        description="Question about the image. `{name}` is replaced by that value of the parameters.",
        examples=["What color is the car?", "Is there a {object} in the image?", "$inputs.question"],
        json_schema_extra={"multiline": True, **ALWAYS_VISIBLE},
    )
    parameters: dict[str, Anything | str | int | float | bool] = Field(
        default_factory=dict,
        validate_default=True,
        title="Parameters",
        description="Values of the placeholders in the question: constants, or selectors of inputs and other steps, "
        "which can differ for each image.",
        examples=[{"object": "$inputs.object"}, {"object": "$steps.classes.output"}],
        json_schema_extra=ALWAYS_VISIBLE,
    )
    reasoning: bool | Flag = Field(
        default=False,
        title="Reasoning",
        description="Reason before answering, and return the reasoning. Slower, but often better at counting and "
        "comparing.",
        examples=[False, True, "$inputs.reasoning"],
    )

    @field_validator("question")
    @classmethod
    def _check_question(cls, value: str) -> str:
        if not is_selector(value) and not value.strip():
            raise ValueError(f"question must not be empty, got {value!r}")
        return value

    @field_validator("parameters")
    @classmethod
    def _check_parameters(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        question = info.data.get("question")  # missing if it is invalid
        if question is not None and not is_selector(question):
            fill_placeholders(question, value)
        return value

    @classmethod
    def get_parameters_accepting_batches_and_scalars(cls) -> list[str]:
        """Return the fields whose value can differ for each image."""
        return ["question", "parameters"]

    @classmethod
    def describe_outputs(cls) -> list[OutputDefinition]:
        """Return the names and kinds of the outputs."""
        return [
            OutputDefinition(name="answer", kind=[types.STRING_KIND, types.LANGUAGE_MODEL_OUTPUT_KIND]),
            OutputDefinition(name="reasoning", kind=[types.STRING_KIND]),
            OutputDefinition(name="grounding", kind=[types.LIST_OF_VALUES_KIND]),
            *error_output_definitions(),
        ]


class QueryBlock(MoondreamBlock):
    """Answer questions about images."""

    manifest = Manifest

    def run(
        self,
        images: Batch[WorkflowImageData],
        model: str,
        question: Batch[str] | str,
        parameters: dict[str, Any],
        reasoning: bool,
        max_tokens: int,
        temperature: float,
    ) -> BlockResult:
        """Return the outputs of each image; the arguments are the fields of the manifest."""

        def request(image: Any, index: int) -> Query:
            values = {name: _of_image(value, index) for name, value in parameters.items()}
            text = fill_placeholders(_of_image(question, index), values)
            settings = parse_text_settings(max_tokens, temperature)
            return Query(image, text, parse_flag(reasoning, "reasoning"), settings=settings)

        results = run_requests(self._models, model, list(images), request)
        return block_outputs(results, images, _answer_outputs, _empty_outputs, "query")


def fill_placeholders(question: Any, values: Mapping[str, Any]) -> str:
    """Return a question with its placeholders replaced by values.

    Args:
        question: Question with placeholders such as `{name}`.
        values: Text or number of each placeholder.

    Raises:
        ValueError: The question is not a string, or a placeholder has no valid value.
    """
    if not isinstance(question, str):
        raise ValueError(f"question must be a string, got {type(question).__name__}: {question!r:.100}")

    def value(match: re.Match[str]) -> str:
        literal, name = match.groups()
        if literal is not None:
            return f"{{{literal}}}"
        given = values.get(name)
        if given is None:
            names = ", ".join(key for key, one in values.items() if one is not None) or "no values"
            raise ValueError(
                f"question has the placeholder {{{name}}}, but parameters has {names}; for the literal text "
                f"{{{name}}} write {{{{{name}}}}}"
            )
        if not isinstance(given, (str, int, float, np.number)):
            kind = type(given).__name__
            raise ValueError(f"parameters[{name!r}] must be a string or a number, got {kind}: {given!r:.100}")
        return str(given)

    return _PLACEHOLDER.sub(value, question)


def _of_image(value: Any, index: int) -> Any:
    """Return the value of one image, if the values are a batch."""
    return value[index] if isinstance(value, Batch) else value


def _answer_outputs(result: QueryResult, image: WorkflowImageData) -> dict[str, Any]:
    """Return the outputs of a result, with the grounding points in pixels."""
    if result.reasoning is None:
        return {"answer": result.answer, "reasoning": "", "grounding": []}
    height, width = image.numpy_image.shape[:2]
    reasoning = result.reasoning
    grounding = [
        {
            "start": ground.start,
            "end": ground.end,
            "text": reasoning.text[ground.start : ground.end],
            "points": [{"x": float(x * width), "y": float(y * height)} for x, y in ground.points],
        }
        for ground in reasoning.grounding
    ]
    return {"answer": result.answer, "reasoning": reasoning.text, "grounding": grounding}


def _empty_outputs(image: WorkflowImageData) -> dict[str, Any]:
    return {"answer": "", "reasoning": "", "grounding": []}
