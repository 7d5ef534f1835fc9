"""`moondream_cv/query@v1`: an answer to a question about each image."""

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
Ask a question about each image and get **Moondream 2**'s answer, in words: "What colour is the car?", "Is the door
open?", "What does the label say?".

#### Questions that differ from image to image

`{name}` in the question stands for the value of that name in `parameters`: something fixed, a workflow input, or the
output of another step, which may differ for each image. `What colour is the {thing}?` with
`{"thing": "$steps.classes.output"}` asks each crop for the colour of what was found there. `{{name}}` means `{name}`
itself.

#### Outputs

- `answer`: what the model says. With a `temperature` of 0 the same image gets the same answer again. If the question
  asks for JSON, **JSON Parser**, **VLM As Classifier** and **VLM As Detector** read it.
- `reasoning`: what it thought before, where `reasoning` is set; otherwise empty.
- `grounding`: which parts of those thoughts speak of which points of the image:
  `[{"start": 0, "end": 7, "text": "the dog", "points": [{"x": 120.0, "y": 80.5}]}]`, in pixels.

All images of a batch go to the model in one call and are answered together.

#### When an image fails

`answer` and `reasoning` are empty, `error_status` is true and `error_message` says why. The workflow goes on.
"""

_PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}|\{(\w+)\}")


class Manifest(TextManifest):
    """An answer to a question about each image."""

    model_config = block_metadata(
        "Moondream Query",
        "Ask a question about images and get an answer in words.",
        DESCRIPTION,
        keywords=["question", "visual question answering", "VQA", "reasoning"],
        priority=5.42,
    )
    type: Literal["moondream_cv/query@v1"]
    question: Text | str = Field(
        title="Question",
        description="What to ask. `{name}` stands for the value of that name in the parameters.",
        examples=["What colour is the car?", "Is there a {thing} in the picture?", "$inputs.question"],
        json_schema_extra={"multiline": True, **ALWAYS_VISIBLE},
    )
    parameters: dict[str, Anything | str | int | float | bool] = Field(
        default_factory=dict,
        validate_default=True,
        title="Parameters",
        description="Values for the placeholders of the question: fixed, or selectors of inputs and of other steps, "
        "which may give one for each image.",
        examples=[{"thing": "$inputs.thing"}, {"thing": "$steps.classes.output"}],
        json_schema_extra=ALWAYS_VISIBLE,
    )
    reasoning: bool | Flag = Field(
        default=False,
        title="Reasoning",
        description="Think first, and return the reasoning. Slower, and often better at counting and comparing.",
        examples=[False, True, "$inputs.reasoning"],
    )

    @field_validator("question")
    @classmethod
    def _check_question(cls, value: str) -> str:
        if not is_selector(value) and not value.strip():
            raise ValueError(f"question must say something, not {value!r}")
        return value

    @field_validator("parameters")
    @classmethod
    def _check_parameters(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        question = info.data.get("question")  # missing where it is wrong itself
        if question is not None and not is_selector(question):
            fill_placeholders(question, value)
        return value

    @classmethod
    def get_parameters_accepting_batches_and_scalars(cls) -> list[str]:
        return ["question", "parameters"]

    @classmethod
    def describe_outputs(cls) -> list[OutputDefinition]:
        return [
            OutputDefinition(name="answer", kind=[types.STRING_KIND, types.LANGUAGE_MODEL_OUTPUT_KIND]),
            OutputDefinition(name="reasoning", kind=[types.STRING_KIND]),
            OutputDefinition(name="grounding", kind=[types.LIST_OF_VALUES_KIND]),
            *error_output_definitions(),
        ]


class QueryBlock(MoondreamBlock):
    """Images × a question → answers."""

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
        def request(image: Any, index: int) -> Query:
            values = {name: _of_image(value, index) for name, value in parameters.items()}
            asked = fill_placeholders(_of_image(question, index), values)
            settings = parse_text_settings(max_tokens, temperature)
            return Query(image, asked, parse_flag(reasoning, "reasoning"), settings=settings)

        results = run_requests(self._models, model, list(images), request)
        return block_outputs(results, images, _answer_outputs, _empty_outputs, "query")


def fill_placeholders(question: Any, values: Mapping[str, Any]) -> str:
    """A question with values in the place of its placeholders.

    Raises:
        ValueError: It is no text, or there is no value of a name.
    """
    if not isinstance(question, str):
        raise ValueError(f"question must be a text, not {type(question).__name__}: {question!r:.100}")

    def value(match: re.Match[str]) -> str:
        literal, name = match.groups()
        if literal is not None:
            return f"{{{literal}}}"
        given = values.get(name)
        if given is None:
            names = ", ".join(key for key, one in values.items() if one is not None) or "nothing"
            raise ValueError(
                f"question has the placeholder {{{name}}}, and parameters has {names}; for the word in braces itself "
                f"write {{{{{name}}}}}"
            )
        if not isinstance(given, (str, int, float, np.number)):
            kind = type(given).__name__
            raise ValueError(f"parameters[{name!r}] must be a text or a number, not {kind}: {given!r:.100}")
        return str(given)

    return _PLACEHOLDER.sub(value, question)


def _of_image(value: Any, index: int) -> Any:
    return value[index] if isinstance(value, Batch) else value


def _answer_outputs(result: QueryResult, image: WorkflowImageData) -> dict[str, Any]:
    """The outputs; points of the grounding are in pixels."""
    if result.reasoning is None:
        return {"answer": result.answer, "reasoning": "", "grounding": []}
    height, width = image.numpy_image.shape[:2]
    thoughts = result.reasoning
    grounding = [
        {
            "start": ground.start,
            "end": ground.end,
            "text": thoughts.text[ground.start : ground.end],
            "points": [{"x": float(x * width), "y": float(y * height)} for x, y in ground.points],
        }
        for ground in thoughts.grounding
    ]
    return {"answer": result.answer, "reasoning": thoughts.text, "grounding": grounding}


def _empty_outputs(image: WorkflowImageData) -> dict[str, Any]:
    return {"answer": "", "reasoning": "", "grounding": []}
