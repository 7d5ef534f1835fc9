"""Test the fields of the blocks: validation when a workflow is compiled, and the metadata of the manifests."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moondream_cv
from moondream_cv_blocks import ModelPool, load_blocks, pool
from tests.helpers.roboflow_app import skip_without_server
from tests.helpers.workflows import (
    ALL_BLOCKS,
    BLOCKS,
    CLASS_BLOCKS,
    REQUIRED,
    compile_error,
    compile_workflow,
    run_engine,
    run_workflow,
    step,
    workflow,
)

skip_without_server()
pytestmark = pytest.mark.roboflow

TEXT_BLOCKS = ("query", "caption")
METADATA = ("name", "short_description", "long_description", "license", "search_keywords", "ui_manifest")
BOXES = ["object_detection_prediction"]
TEXT = ["string", "language_model_output"]
ERRORS = {"error_status": ["boolean"], "error_message": ["string"]}
OUTPUTS = {
    "detect": {"predictions": BOXES, **ERRORS},
    "point": {
        "predictions": ["keypoint_detection_prediction", "object_detection_prediction"],
        "points": ["labeled_points"],
        **ERRORS,
    },
    "query": {"answer": TEXT, "reasoning": ["string"], "grounding": ["list_of_values"], **ERRORS},
    "caption": {"caption": TEXT, **ERRORS},
    "track": {"tracked_detections": BOXES, "new_instances": BOXES, "already_seen_instances": BOXES, **ERRORS},
    "segment": {"predictions": ["instance_segmentation_prediction"], **ERRORS},
}
VALUES: dict[str, Any] = {  # one for each field that accepts a selector
    "model": "tiny",
    "class_names": ["dog", "bus"],
    "confidence": 0.5,
    "max_objects": 3,
    "nms": 0.5,
    "every": 2,
    "question": "How many objects are there?",
    "reasoning": False,
    "length": "short",
    "max_tokens": 64,
    "temperature": 0.0,
}
CORE_STEP = {
    "type": "roboflow_core/moondream2@v1",
    "name": "step",
    "images": "$inputs.image",
    "prompt": "dog",
    "model_version": "moondream2/moondream2-2b",
}


def with_fields(block: str, **fields: Any) -> dict[str, Any]:
    """Return a workflow of one step with the required fields of its block and the given ones."""
    return workflow(step(block, **{**REQUIRED[block], **fields}))


def manifest(block: str) -> Any:
    return dict(zip(ALL_BLOCKS, load_blocks(), strict=True))[block].get_manifest()


def fields_of(block: str) -> list[str]:
    """Return the fields of a block, without those of all blocks of the engine."""
    return [name for name in manifest(block).model_fields if name not in ("type", "name", "images")]


@pytest.fixture
def no_models_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test if a model is opened or a server is connected."""

    def fail(*arguments: Any, **options: Any) -> None:
        pytest.fail(f"opens {arguments}")

    for name in ("load", "connect"):
        monkeypatch.setattr(pool, name, fail)
    monkeypatch.setattr("socket.socket.connect", fail)


# Invalid values


@pytest.mark.parametrize("block", CLASS_BLOCKS)
@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "at least one class"),
        (["dog", ""], "class_names[1] must not be empty"),
        (["  "], "class_names[0] must not be empty"),
        (["dog", "dog"], "duplicates: 'dog'"),
        (["dog", " dog "], "duplicates: 'dog'"),
        (["dog", 3], "class_names[1] must be a string, got int"),
        ([None], "class_names[0] must be a string, got NoneType"),
        ([["dog"]], "class_names[0] must be a string, got list"),
        (5, "class_names must be a list of names, or names separated by commas, got int: 5"),
        (None, "class_names must be a list of names, or names separated by commas, got NoneType"),
        ("", "class_names[0] must not be empty"),
        (" ", "class_names[0] must not be empty"),
        (",,,", "class_names[0] must not be empty"),
        ("dog,", "class_names[1] must not be empty"),
        ("dog,dog", "duplicates: 'dog'"),
        ("$input.x", "invalid selector '$input.x'; write $inputs.NAME"),
        ("$inputs.", "invalid selector"),
        ("$inputs.two words", "invalid selector"),
        (["$inputs.x"], "for the whole list"),
        (["dog", "$inputs.x"], "for the whole list"),
        ("dog, $inputs.x", "for the whole list"),
        ("inputs.class_names", "a selector, such as $inputs.class_names"),
        ("dog\n\ncat", "class_names[1] must not be empty"),
    ],
)
def test_invalid_class_names_are_rejected(block: str, names: Any, message: str) -> None:
    error = compile_error(with_fields(block, class_names=names))
    assert error.startswith("class_names: ")
    assert message in error


@pytest.mark.parametrize(
    ("block", "field", "expected"),
    [
        ("detect", "confidance", "confidence"),
        ("detect", "model_id", "model"),
        ("point", "class_name", "class_names"),
        ("track", "evry", "every"),
        ("query", "parameter", "parameters"),
        ("caption", "lenght", "length"),
    ],
)
def test_misspelled_field_names_are_rejected(block: str, field: str, expected: str) -> None:
    definition = with_fields(block, **{field: "x"})
    definition["steps"][0].pop(expected, None)
    assert f"unknown field '{field}'; did you mean '{expected}'?" in compile_error(definition)


@pytest.mark.parametrize("field", ["note", "version", "x"])
def test_other_unknown_fields_are_ignored(field: str) -> None:
    compile_workflow(with_fields("detect", **{field: "anything"}))


@pytest.mark.parametrize("block", CLASS_BLOCKS)
def test_blank_prompt_is_rejected(block: str) -> None:
    error = compile_error(workflow(step(block, prompt=" ")))
    assert error.startswith("class_names: ")
    assert "must not be empty" in error


@pytest.mark.parametrize(
    ("block", "field"), [*((block, "class_names") for block in CLASS_BLOCKS), ("query", "question")]
)
def test_missing_required_field_is_rejected(block: str, field: str) -> None:
    assert compile_error(workflow(step(block))) == f"{field}: Field required"


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("moondream3", "did you mean 'moondream2'?"),
        ("tinny", "did you mean 'tiny'?"),
        ("vikhyatk/moondream2@2020-01-01", "supported releases: vikhyatk/moondream2@2025-06-21"),
        ("moondream2@2020-01-01", "supported releases: vikhyatk/moondream2@2025-06-21"),
        ("./nothing", "there is no model './nothing'"),
        ("./notes", "contains no weights"),
        ("ftp://example.org", "must begin with http:// or https://"),
        ("http://", "no valid host and port"),
        ("http://localhost:99999", "no valid host and port"),
        ("http://localhost:2020?key=1", "must not have a query"),
        ("", "must not be empty"),
        ("  ", "must not be empty"),
        (5, "valid string"),
        (None, "valid string"),
        ("$input.model", "invalid selector '$input.model'"),
    ],
)
def test_invalid_models_are_rejected(
    block: str, model: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "weights.txt").write_text("to be fetched")
    error = compile_error(with_fields(block, model=model))
    assert error.startswith("model: ")
    assert message in error


def test_error_message_hides_credentials_of_a_url() -> None:
    error = compile_error(with_fields("caption", model="http://user:password@localhost:2020?key=secret"))
    assert error.startswith("model: ")
    assert "localhost:2020" in error
    assert not any(word in error for word in ("user", "password", "secret"))


def test_model_that_is_not_allowed_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOONDREAM_CV_BLOCKS_MODELS", "tiny")
    compile_workflow(with_fields("caption"))
    error = compile_error(with_fields("caption", model="moondream2"))
    assert error.endswith(
        "'moondream2' is not allowed, only tiny; add it to the environment variable MOONDREAM_CV_BLOCKS_MODELS "
        "to use it"
    )


@pytest.mark.parametrize(
    ("block", "field"),
    [*((block, "confidence") for block in CLASS_BLOCKS), ("detect", "nms"), ("track", "nms")],
)
@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), float("inf"), "much", [0.5], "$input.x"])
def test_invalid_fractions_are_rejected(block: str, field: str, value: Any) -> None:
    assert compile_error(with_fields(block, **{field: value})).startswith(f"{field}: ")


@pytest.mark.parametrize(
    ("block", "field"),
    [
        *((block, "max_objects") for block in CLASS_BLOCKS),
        *((block, "max_tokens") for block in TEXT_BLOCKS),
        ("track", "every"),
    ],
)
@pytest.mark.parametrize("value", [0, -1, 1.5, "many", None, "$input.x"])
def test_invalid_counts_are_rejected(block: str, field: str, value: Any) -> None:
    assert compile_error(with_fields(block, **{field: value})).startswith(f"{field}: ")


@pytest.mark.parametrize("block", TEXT_BLOCKS)
@pytest.mark.parametrize("value", [-0.1, 2.1, float("nan"), float("inf"), "hot", None, "$input.x"])
def test_invalid_temperatures_are_rejected(block: str, value: Any) -> None:
    assert compile_error(with_fields(block, temperature=value)).startswith("temperature: ")


@pytest.mark.parametrize(
    ("block", "field", "value", "message"),
    [
        ("caption", "length", "medium", "'short', 'normal' or 'long'"),
        ("caption", "length", "Short", "'short', 'normal' or 'long'"),
        ("caption", "length", "", "'short', 'normal' or 'long'"),
        ("caption", "length", "$input.length", "'short', 'normal' or 'long'"),
        ("track", "tracker", "deepsort", "'sort', 'ocsort', 'bytetrack' or 'botsort'"),
        ("track", "tracker", "$inputs.tracker", "'sort', 'ocsort', 'bytetrack' or 'botsort'"),
        ("query", "question", "", "question must not be empty"),
        ("query", "question", " ", "question must not be empty"),
        ("query", "question", 5, "valid string"),
        ("query", "question", "$input.question", "invalid selector '$input.question'"),
        ("query", "reasoning", "perhaps", "valid boolean"),
        ("query", "reasoning", None, "valid boolean"),
        ("query", "parameters", ["dog"], "valid dictionary"),
        ("query", "parameters", {"object": ["dog"]}, "valid string"),
    ],
)
def test_other_invalid_values_are_rejected(block: str, field: str, value: Any, message: str) -> None:
    error = compile_error(with_fields(block, **{field: value}))
    assert error.startswith(f"{field}: ")
    assert message in error


@pytest.mark.parametrize("parameters", [{}, {"other": "dog"}])
def test_placeholder_without_a_parameter_is_rejected(parameters: dict[str, str]) -> None:
    error = compile_error(with_fields("query", question="Is there a {object}?", parameters=parameters))
    assert error.startswith("parameters: ")
    assert "the placeholder {object}" in error
    assert f"parameters has {', '.join(parameters) or 'no values'}" in error


# Valid values


@pytest.mark.parametrize("block", CLASS_BLOCKS)
@pytest.mark.parametrize(
    "names",
    [
        ["dog"],
        "dog",
        "dog, red car",
        ["dog, or a wolf", "red car"],
        [f"class {number}" for number in range(100)],
        ", ".join(f"class {number}" for number in range(100)),
        ["Straßenbahn", "狗", "🐕"],
    ],
)
def test_valid_class_names_are_accepted(block: str, names: Any) -> None:
    compile_workflow(with_fields(block, class_names=names))


@pytest.mark.parametrize(
    ("block", "fields"),
    [
        *((block, {"confidence": value}) for block in CLASS_BLOCKS for value in (0, 0.3, 1)),
        *((block, {"max_objects": value}) for block in CLASS_BLOCKS for value in (1, 1000)),
        *((block, {"nms": value}) for block in ("detect", "track") for value in (None, 0, 1)),
        *((block, {"temperature": value}) for block in TEXT_BLOCKS for value in (0, 1.5, 2)),
        *((block, {"max_tokens": 1}) for block in TEXT_BLOCKS),
        *(("track", {"tracker": name}) for name in ("sort", "ocsort", "bytetrack", "botsort")),
        *(("caption", {"length": name}) for name in ("short", "normal", "long")),
        ("track", {"every": 1}),
        ("query", {"question": "Wie viele Hunde? 几只狗?"}),
        ("query", {"question": "What do braces such as {{object}}, {} and { mean?"}),
        (
            "query",
            {"question": "Is {n} the number of {object}s?", "parameters": {"object": "dog", "n": 3, "more": 1.5}},
        ),
        ("query", {"reasoning": True}),
    ],
)
def test_other_valid_values_are_accepted(block: str, fields: dict[str, Any]) -> None:
    compile_workflow(with_fields(block, **fields))


@pytest.mark.parametrize("block", BLOCKS)
def test_every_field_accepts_a_selector(block: str, bgr: np.ndarray) -> None:
    """The exceptions are the tracker, which is fixed per stream, and the parameters, whose values accept selectors."""
    names = [name for name in fields_of(block) if name not in ("tracker", "parameters")]
    definition = workflow(step(block, **{name: f"$inputs.{name}" for name in names}), parameters=names)
    values = {name: VALUES[name] for name in names}
    (outputs,) = run_workflow(definition, bgr, **values)
    (expected,) = run_workflow(workflow(step(block, **values)), bgr)
    assert outputs["error_message"] == ""
    for name, value in expected.items():
        if hasattr(value, "xyxy"):
            assert outputs[name].data["class_name"].tolist() == value.data["class_name"].tolist()
            np.testing.assert_array_equal(outputs[name].xyxy, value.xyxy)
        else:
            assert outputs[name] == value


def test_values_of_parameters_accept_selectors(bgr: np.ndarray) -> None:
    definition = workflow(
        step("query", question="How many {objects} are there?", parameters={"objects": "$inputs.objects"}),
        parameters=["objects"],
    )
    (outputs,) = run_workflow(definition, bgr, objects="objects")
    (expected,) = run_workflow(with_fields("query"), bgr)
    assert outputs["answer"] == expected["answer"] == "4"


@pytest.mark.parametrize("block", CLASS_BLOCKS)
def test_prompt_is_an_alias_of_class_names(block: str, bgr: np.ndarray) -> None:
    output = "step.tracked_detections" if block == "track" else "step.predictions"
    prompted = step(block, prompt="$inputs.prompt")
    for definition in (
        workflow(step(block, prompt="dog"), outputs=[output], parameters=["prompt"]),
        workflow(prompted, outputs=[output], parameters=["prompt"]),
    ):
        (outputs,) = run_workflow(definition, bgr, prompt="dog")
        assert outputs[output].data["class_name"].tolist() == ["dog"]


@pytest.mark.parametrize("block", CLASS_BLOCKS)
def test_prompt_with_commas_is_one_class(block: str) -> None:
    assert manifest(block)(**step(block, prompt="dog, or a wolf")).class_names == ["dog, or a wolf"]


def test_prompt_from_a_selector_is_split_like_class_names(bgr: np.ndarray) -> None:
    definition = workflow(step("detect", prompt="$inputs.prompt"), parameters=["prompt"])
    (outputs,) = run_workflow(definition, bgr, prompt="dog, bus")
    assert set(outputs["predictions"].data["class_name"]) == {"dog", "bus"}


def test_class_names_take_precedence_over_prompt(bgr: np.ndarray) -> None:
    (outputs,) = run_workflow(workflow(step("detect", prompt="bus", class_names="dog")), bgr)
    assert outputs["predictions"].data["class_name"].tolist() == ["dog"]


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("model", ["moondream2", "vikhyatk/moondream2", "some/other@main", "http://localhost:1"])
@pytest.mark.usefixtures("no_models_opened")
def test_compiling_opens_no_models(block: str, model: str) -> None:
    compile_workflow(with_fields(block, model=model), **{"moondream_cv_blocks.models": ModelPool()})


def test_guard_detects_an_opened_model(no_models_opened: None, bgr: np.ndarray) -> None:
    engine = compile_workflow(with_fields("caption"), **{"moondream_cv_blocks.models": ModelPool()})
    with pytest.raises(pytest.fail.Exception, match="opens \\('tiny',\\)"):
        run_engine(engine, bgr)


# Manifests


def test_load_blocks_returns_all_blocks() -> None:
    types = [block.get_manifest().model_fields["type"].annotation.__args__ for block in load_blocks()]
    assert types == [(f"moondream_cv/{name}@v1",) for name in ALL_BLOCKS]


@pytest.mark.parametrize("block", ALL_BLOCKS)
def test_blocks_have_metadata(block: str) -> None:
    schema = manifest(block).model_json_schema()
    assert all(schema[name] for name in METADATA)
    assert schema["version"] == "v1"
    assert len(schema["short_description"]) < 80 < len(schema["long_description"])
    assert "`error_status`" in schema["long_description"]
    assert {"moondream", "moondream2", "VLM"} <= set(schema["search_keywords"])
    assert schema["is_vlm_block"] is True
    assert {"section", "icon", "blockPriority"} <= schema["ui_manifest"].keys()


@pytest.mark.parametrize("block", ALL_BLOCKS)
def test_every_field_has_title_description_and_examples(block: str) -> None:
    fields = manifest(block).model_fields
    for name in fields_of(block):
        assert fields[name].title, name
        assert len(fields[name].description) > 20, name
        assert fields[name].examples, name


@pytest.mark.parametrize("block", ALL_BLOCKS)
def test_examples_are_valid(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(Path(moondream_cv.__file__).parent / "tiny", tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)
    fields = manifest(block).model_fields
    for name in fields_of(block):
        for example in fields[name].examples:
            extra = {"parameters": {"object": "dog"}} if name == "question" else {}
            accepted = manifest(block)(**step(block, **{**REQUIRED[block], **extra, name: example}))
            assert getattr(accepted, name) == example


@pytest.mark.parametrize("block", ALL_BLOCKS)
def test_defaults_are_valid(block: str) -> None:
    least = manifest(block)(type=f"moondream_cv/{block}@v1", name="x", images="$inputs.image", **REQUIRED[block])
    fields = {name: getattr(least, name) for name in fields_of(block)}
    assert manifest(block)(type=f"moondream_cv/{block}@v1", name="x", images="$inputs.image", **fields) == least
    assert least.model == "moondream2"


@pytest.mark.parametrize("block", ALL_BLOCKS)
def test_schema_is_json_serializable(block: str) -> None:
    schema = manifest(block).model_json_schema()
    assert json.loads(json.dumps(schema)) == schema
    assert set(fields_of(block)) <= schema["properties"].keys()


VISIBLE = {
    "detect": ["class_names", "model"],
    "point": ["class_names", "model"],
    "query": ["question", "model", "parameters"],
    "caption": ["model", "length"],
    "track": ["class_names", "model", "every"],
    "segment": ["class_names", "model", "masks"],
}
LIMITS = {
    "confidence": ("number", 0, 1),
    "nms": ("number", 0, 1),
    "max_objects": ("integer", 1, 2**31 - 1),
    "max_tokens": ("integer", 1, 2**31 - 1),
    "every": ("integer", 1, 2**31 - 1),
    "temperature": ("number", 0, 2),
}


@pytest.mark.parametrize("block", ALL_BLOCKS)
def test_schema_lists_required_and_visible_fields_first(block: str) -> None:
    schema = manifest(block).model_json_schema()
    shown = list(schema["properties"])
    required, visible = ["type", "name", "images", *REQUIRED[block]], VISIBLE[block]
    assert shown[: len(required)] == schema["required"] == required
    assert [name for name in shown if schema["properties"][name].get("always_visible")] == visible
    assert shown[3 : 3 + len(visible)] == visible


@pytest.mark.parametrize("block", ALL_BLOCKS)
def test_schema_has_limits_of_all_numbers(block: str) -> None:
    numbers = {}
    for name, schema in manifest(block).model_json_schema()["properties"].items():
        for option in schema.get("anyOf", [schema]):
            if option.get("type") in ("number", "integer"):
                numbers[name] = (option["type"], option["minimum"], option["maximum"])
    assert numbers == {name: LIMITS[name] for name in fields_of(block) if name in LIMITS}


@pytest.mark.parametrize("block", ALL_BLOCKS)
def test_limits_of_the_schema_match_the_validation(block: str) -> None:
    for name in [name for name in fields_of(block) if name in LIMITS]:
        kind, low, high = LIMITS[name]
        for value in (low, high):
            compile_workflow(with_fields(block, **{name: value}))
        for value in (low - 1, high + 1) if kind == "integer" else (low - 0.01, high + 0.01):
            assert compile_error(with_fields(block, **{name: value})).startswith(f"{name}: ")


def test_engine_lists_the_blocks() -> None:
    from roboflow_workflows.execution_engine.introspection.blocks_loader import describe_available_blocks

    listed = {block.manifest_type_identifier: block for block in describe_available_blocks(dynamic_blocks=[]).blocks}
    ours = [name for name in listed if name.startswith("moondream_cv/")]
    assert ours == [f"moondream_cv/{name}@v1" for name in ALL_BLOCKS]
    for name in ALL_BLOCKS:
        described = listed[f"moondream_cv/{name}@v1"]
        assert described.human_friendly_block_name == f"Moondream {name.capitalize()}"
        assert described.block_source == "moondream_cv_blocks"
        outputs = {output.name: [kind.name for kind in output.kind] for output in described.outputs_manifest}
        assert outputs == OUTPUTS[name]


# Conversion of steps of the core block


def core_parameters() -> dict[str, Any]:
    """Return the init parameters of the core block."""
    from roboflow_workflows.core_steps.common.entities import StepExecutionMode

    values = {"model_manager": None, "api_key": None, "step_execution_mode": StepExecutionMode.LOCAL}
    return {f"workflows_core.{name}": value for name, value in values.items()}


def converted(**fields: Any) -> dict[str, Any]:
    return {**CORE_STEP, "type": "moondream_cv/detect@v1", **fields}


def test_core_block_step_can_be_converted() -> None:
    """Changing the type is sufficient; renaming the prompt is optional."""
    renamed = converted(class_names=CORE_STEP["prompt"])
    del renamed["prompt"]
    for of_step in (CORE_STEP, renamed, converted()):
        compile_workflow(workflow(of_step, outputs=["step.predictions"]), **core_parameters())


def test_detect_block_has_the_outputs_of_the_core_block() -> None:
    from roboflow_workflows.execution_engine.introspection.blocks_loader import describe_available_blocks

    listed = {block.manifest_type_identifier: block for block in describe_available_blocks(dynamic_blocks=[]).blocks}
    core, ours = (
        {output.name: output.kind for output in listed[name].outputs_manifest}
        for name in (CORE_STEP["type"], "moondream_cv/detect@v1")
    )
    assert core
    assert core.items() <= ours.items()


def test_step_converted_by_type_alone_returns_the_same_detections(bgr: np.ndarray) -> None:
    """The test sets the model as well, because the tests have no weights for the model of the core block."""
    (by_type,) = run_workflow(workflow(converted(model="tiny")), bgr)
    (ours,) = run_workflow(with_fields("detect"), bgr)
    np.testing.assert_array_equal(by_type["predictions"].xyxy, ours["predictions"].xyxy)
    assert by_type["predictions"].data["class_name"].tolist() == ["dog"]


def test_core_block_fields_are_mapped_to_model_and_class_names() -> None:
    fields = manifest("detect")(**converted()).model_dump()
    assert fields["class_names"] == ["dog"]
    assert fields["model"] == "moondream2"
    assert not {"prompt", "model_version"} & fields.keys()
