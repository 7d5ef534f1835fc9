"""Test field values as text: lists of class names, numbers, None, and model names with spaces."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moondream_cv_blocks import ModelPool, pool
from moondream_cv_blocks.values import parse_class_names, parse_optional_fraction
from tests.helpers.roboflow_app import skip_without_server
from tests.helpers.workflows import (
    BLOCKS,
    CLASS_BLOCKS,
    compile_error,
    compile_workflow,
    minimal_step,
    run_engine,
    run_workflow,
    step,
    workflow,
)

skip_without_server()
pytestmark = pytest.mark.roboflow

DETECTIONS = {"detect": "predictions", "point": "predictions", "track": "tracked_detections"}
LISTS = {
    "['dog', 'bus']": ["dog", "bus"],
    '["dog","bus"]': ["dog", "bus"],
    '["dog", "bus"]\n': ["dog", "bus"],
    "('dog', 'bus')": ["dog", "bus"],
    "('dog',)": ["dog"],
    "{'dog', 'bus'}": ["dog", "bus"],
    "['dog' 'bus']": ["dog", "bus"],  # str() of a NumPy array
    "['dog'\n 'bus']": ["dog", "bus"],
    '["dog, or a wolf", "bus"]': ["dog, or a wolf", "bus"],
    """["dog's bowl", 'a "bus"']""": ["dog's bowl", 'a "bus"'],
    '["\\u72d7", "\\ud83d\\udc15"]': ["狗", "🐕"],
    "['狗', 'Straßenbahn']": ["狗", "Straßenbahn"],
    "'dog', 'bus'": ["dog", "bus"],
    '"dog, or a wolf", "bus"': ["dog, or a wolf", "bus"],
    '"dog"': ["dog"],
    "[' dog ', 'bus']": ["dog", "bus"],
}
SEPARATED_NAMES = {  # text that is parsed as names separated by commas
    "dog, bus": ["dog", "bus"],
    "'70s car, dog": ["'70s car", "dog"],
    "dog's bowl": ["dog's bowl"],
    "(red) car, dog": ["(red) car", "dog"],
    "a [small] dog": ["a [small] dog"],
    "(dog)": ["(dog)"],
}
INVALID_LISTS = {
    "[dog, bus]": "class_names must be a valid list, got '[dog, bus]'",
    "['dog', bus]": "must be a valid list",
    "[['dog'], ['bus']]": "must be a valid list",
    "['dog' + 'bus']": "must be a valid list",
    "[f'dog']": "must be a valid list",
    "['dog', ]]": "must be a valid list",
    "[" * 100_000 + "]" * 100_000: "must be a valid list",
    "[]": "must have at least one class name",
    "[1, 2]": "class_names[0] must be a string",
    "['dog', 'dog']": "duplicates: 'dog'",
    "['dog', '']": "class_names[1] must not be empty",
    "['dog', '$inputs.x']": "for the whole list",
}


@pytest.mark.parametrize(("text", "names"), [*LISTS.items(), *SEPARATED_NAMES.items()])
def test_class_names_are_parsed_from_text(text: str, names: list[str]) -> None:
    assert parse_class_names(text) == names


@pytest.mark.parametrize("value", [np.array(["dog", "bus"]), ("dog", "bus"), ["dog ", " bus"]], ids=str)
def test_class_names_are_parsed_from_sequences(value: Any) -> None:
    assert parse_class_names(value) == ["dog", "bus"]


@pytest.mark.parametrize("block", CLASS_BLOCKS)
@pytest.mark.parametrize("text", ["['dog', 'bus']", '["dog","bus"]', "['dog' 'bus']"])
@pytest.mark.parametrize("place", ["literal", "input"])
def test_list_as_text_gives_the_same_detections_as_the_list(block: str, text: str, place: str, bgr: np.ndarray) -> None:
    (expected,) = run_workflow(workflow(step(block, class_names=["dog", "bus"])), bgr)
    if place == "literal":
        (outputs,) = run_workflow(workflow(step(block, class_names=text)), bgr)
    else:
        (outputs,) = run_workflow(
            workflow(step(block, class_names="$inputs.names"), parameters=["names"]), bgr, names=text
        )
    detections, name = outputs[DETECTIONS[block]], DETECTIONS[block]
    assert detections["class_name"].tolist() == ["dog", "bus"]
    np.testing.assert_array_equal(detections.xyxy, expected[name].xyxy)


@pytest.mark.parametrize(("text", "message"), INVALID_LISTS.items(), ids=[text[:20] for text in INVALID_LISTS])
def test_invalid_lists_as_text_are_rejected(text: str, message: str, bgr: np.ndarray) -> None:
    assert message in compile_error(workflow(step("detect", class_names=text)))
    (outputs,) = run_workflow(
        workflow(step("detect", class_names="$inputs.names"), parameters=["names"]), bgr, names=text
    )
    assert outputs["error_status"] is True
    assert message in outputs["error_message"]


# Inner workflows convert all bound values to text


def inner(block: str, **bound: Any) -> dict[str, Any]:
    """Return a workflow that runs a block in an inner workflow, with values bound to all of these fields."""
    required = {} if block == "caption" else {"question": "How many objects are there?"}
    fields = {**({} if block in CLASS_BLOCKS else required), **{name: f"$inputs.{name}" for name in bound}}
    child = workflow(step(block, "inner", **fields), outputs=[f"inner.{DETECTIONS.get(block, 'error_message')}"])
    child["inputs"] += [{"type": "WorkflowParameter", "name": name} for name in bound]
    child["outputs"] += [{"type": "JsonField", "name": "message", "selector": "$steps.inner.error_message"}]
    child["outputs"][0]["name"] = "found"
    return workflow(
        {
            "type": "roboflow_core/inner_workflow@v1",
            "name": "outer",
            "workflow_definition": child,
            "parameter_bindings": {"image": "$inputs.image", **bound},
        },
        outputs=["outer.found", "outer.message"],
    )


INNER_VALUES: dict[str, dict[str, Any]] = {
    "detect": {"class_names": ["dog", "bus"], "confidence": 0.1, "max_objects": 5, "nms": None, "model": "tiny"},
    "point": {"class_names": ["dog", "bus"], "confidence": 0, "max_objects": 5},
    "track": {"class_names": ["dog", "bus"], "nms": 0.5, "every": 2},
    "query": {"reasoning": False, "max_tokens": 64, "temperature": 0.0},
    "caption": {"length": "short", "max_tokens": 64, "temperature": 0},
}


@pytest.mark.parametrize("block", BLOCKS)
def test_inner_workflows_bind_values_of_all_types(block: str, bgr: np.ndarray) -> None:
    (outputs,) = run_workflow(inner(block, **INNER_VALUES[block]), bgr)
    assert outputs["outer.message"] == ""
    if block in CLASS_BLOCKS:
        assert outputs["outer.found"]["class_name"].tolist() == ["dog", "bus"]


@pytest.mark.parametrize("value", [None, "None", "null", "", " none "])
def test_nms_threshold_can_be_none_as_text(value: str | None) -> None:
    assert parse_optional_fraction(value, "nms") is None


# Model names


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("name", [" tiny", "tiny ", "\ttiny\n"])
@pytest.mark.parametrize("opened", [True, False], ids=["opened before", "not opened"])
def test_spaces_around_a_model_name_are_ignored(
    block: str, name: str, opened: bool, bgr: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(pool.ALLOWED, f" moondream2 ,{name}")
    models = ModelPool(device="cpu")
    model = models.get("tiny") if opened else None
    for definition in (
        workflow(minimal_step(block, model=name)),
        workflow(minimal_step(block, model="$inputs.model"), parameters=["model"]),
    ):
        engine = compile_workflow(definition, **{"moondream_cv_blocks.models": models})
        (outputs,) = run_engine(engine, bgr, model=name)
        assert outputs["error_message"] == ""
    assert models.get(name) is models.get("tiny")
    assert models.is_open(name)
    assert model is None or models.get(name) is model
    models.add(name, models.get("tiny"))
    models.close()


def test_spaces_around_a_url_are_ignored(closed_url: str, bgr: np.ndarray) -> None:
    (outputs,) = run_workflow(workflow(minimal_step("caption", model=f" {closed_url} ")), bgr)
    assert f"{closed_url}/v1/models is unreachable" in outputs["error_message"]


@pytest.mark.parametrize("version", ["moondream2", "moondream2/moondream2_2b_jul24", "moondream2/moondream2-2b"])
@pytest.mark.parametrize("field", ["model", "model_version"])
@pytest.mark.parametrize("place", ["literal", "input"])
def test_model_versions_of_the_core_block_select_moondream2(
    version: str, field: str, place: str, tiny: Any, bgr: np.ndarray
) -> None:
    models = ModelPool()
    models.add("moondream2", tiny)  # instead of the weights of Moondream 2
    fields: dict[str, Any] = {field: version if place == "literal" else "$inputs.version"}
    if field == "model_version":
        fields["type"] = "moondream_cv/detect@v1"
    of_step = {**minimal_step("detect"), **fields}
    if field == "model_version":
        del of_step["model"]
    definition = workflow(of_step)
    kind = ["roboflow_model_id"]
    definition["inputs"].append({"type": "WorkflowParameter", "name": "version", "kind": kind})
    (outputs,) = run_engine(
        compile_workflow(definition, **{"moondream_cv_blocks.models": models}), bgr, version=version
    )
    assert outputs["error_message"] == ""
    assert outputs["predictions"]["class_name"].tolist() == ["dog"]


@pytest.mark.parametrize("version", ["moondream2/other", "my-project/3", "anything", 5, ""])
def test_other_model_versions_are_rejected_with_a_hint(version: Any) -> None:
    message = compile_error(workflow(minimal_step("detect", model_version=version)))
    assert f"got {version!r}; remove it, and set the field model" in message
    assert "'moondream2/moondream2-2b'" in message


def test_model_takes_precedence_over_model_version(bgr: np.ndarray) -> None:
    (outputs,) = run_workflow(workflow(minimal_step("detect", model_version="moondream2/moondream2-2b")), bgr)
    assert outputs["predictions"]["class_name"].tolist() == ["dog"]  # the result of the tiny model
