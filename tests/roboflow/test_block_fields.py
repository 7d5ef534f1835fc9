"""Fields of the blocks: what is accepted and refused when a workflow is compiled, and what manifests say of them."""

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
from tests.helpers.workflows import BLOCKS, FINDERS, REQUIRED, compiled, refusal, results, run, step, workflow

skip_without_server()
pytestmark = pytest.mark.roboflow

WRITERS = ("query", "caption")
SAYS = ("name", "short_description", "long_description", "license", "search_keywords", "ui_manifest")
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
}
VALUES: dict[str, Any] = {  # one for each field that takes a selector
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
    """A workflow of one step, which has what it needs beside these fields."""
    return workflow(step(block, **{**REQUIRED[block], **fields}))


def manifest(block: str) -> Any:
    return dict(zip(BLOCKS, load_blocks(), strict=True))[block].get_manifest()


def fields_of(block: str) -> list[str]:
    """All but those that every step of the engine has."""
    return [name for name in manifest(block).model_fields if name not in ("type", "name", "images")]


@pytest.fixture
def nothing_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever opens a model or connects to a server fails."""

    def refuse(*arguments: Any, **options: Any) -> None:
        pytest.fail(f"opens {arguments}")

    for name in ("load", "connect"):
        monkeypatch.setattr(pool, name, refuse)
    monkeypatch.setattr("socket.socket.connect", refuse)


# What is refused


@pytest.mark.parametrize("block", FINDERS)
@pytest.mark.parametrize(
    ("names", "says"),
    [
        ([], "at least one class"),
        (["dog", ""], "class_names[1] must not be empty"),
        (["  "], "class_names[0] must not be empty"),
        (["dog", "dog"], "duplicates: 'dog'"),
        (["dog", " dog "], "duplicates: 'dog'"),
        (["dog", 3], "class_names[1] must be a string, not int"),
        ([None], "class_names[0] must be a string, not NoneType"),
        ([["dog"]], "class_names[0] must be a string, not list"),
        (5, "class_names must be a list of names, or names separated by commas, not int: 5"),
        (None, "class_names must be a list of names, or names separated by commas, not NoneType"),
        ("", "class_names[0] must not be empty"),
        (" ", "class_names[0] must not be empty"),
        (",,,", "class_names[0] must not be empty"),
        ("dog,", "class_names[1] must not be empty"),
        ("dog,dog", "duplicates: 'dog'"),
        ("$input.x", "'$input.x' is no selector; write $inputs.NAME"),
        ("$inputs.", "is no selector"),
        ("$inputs.two words", "is no selector"),
        (["$inputs.x"], "stands for the whole list"),
        (["dog", "$inputs.x"], "stands for the whole list"),
        ("dog, $inputs.x", "stands for the whole list"),
        ("inputs.class_names", "a selector, such as $inputs.class_names"),
        ("dog\n\ncat", "class_names[1] must not be empty"),
    ],
)
def test_class_names_that_are_refused(block: str, names: Any, says: str) -> None:
    told = refusal(with_fields(block, class_names=names))
    assert told.startswith("class_names: ")
    assert says in told


@pytest.mark.parametrize(
    ("block", "field", "meant"),
    [
        ("detect", "confidance", "confidence"),
        ("detect", "model_id", "model"),
        ("point", "class_name", "class_names"),
        ("track", "evry", "every"),
        ("query", "parameter", "parameters"),
        ("caption", "lenght", "length"),
    ],
)
def test_fields_that_are_misspelt(block: str, field: str, meant: str) -> None:
    definition = with_fields(block, **{field: "x"})
    definition["steps"][0].pop(meant, None)
    assert f"there is no field '{field}'; did you mean '{meant}'?" in refusal(definition)


@pytest.mark.parametrize("field", ["note", "version", "x"])
def test_other_fields_that_there_are_not_are_passed_over(field: str) -> None:
    compiled(with_fields("detect", **{field: "anything"}))


@pytest.mark.parametrize("block", FINDERS)
def test_a_prompt_that_says_nothing_is_refused_as_class_names(block: str) -> None:
    told = refusal(workflow(step(block, prompt=" ")))
    assert told.startswith("class_names: ")
    assert "must not be empty" in told


@pytest.mark.parametrize(("block", "field"), [*((block, "class_names") for block in FINDERS), ("query", "question")])
def test_a_field_that_is_missing(block: str, field: str) -> None:
    assert refusal(workflow(step(block))) == f"{field}: Field required"


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("moondream3", "did you mean 'moondream2'?"),
        ("tinny", "did you mean 'tiny'?"),
        ("vikhyatk/moondream2@2020-01-01", "these work: vikhyatk/moondream2@2025-06-21"),
        ("moondream2@2020-01-01", "these work: vikhyatk/moondream2@2025-06-21"),
        ("./nothing", "there is no model './nothing'"),
        ("./notes", "holds no weights"),
        ("ftp://example.org", "neither http nor https"),
        ("http://", "no valid host and port"),
        ("http://localhost:99999", "no valid host and port"),
        ("http://localhost:2020?key=1", "followed by a query"),
        ("", "must not be empty"),
        ("  ", "must not be empty"),
        (5, "valid string"),
        (None, "valid string"),
        ("$input.model", "'$input.model' is no selector"),
    ],
)
def test_models_that_are_refused(
    block: str, model: Any, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "weights.txt").write_text("to be fetched")
    told = refusal(with_fields(block, model=model))
    assert told.startswith("model: ")
    assert says in told


def test_a_key_in_a_refused_url_is_not_shown() -> None:
    told = refusal(with_fields("caption", model="http://user:password@localhost:2020?key=secret"))
    assert told.startswith("model: ")
    assert "localhost:2020" in told
    assert not any(word in told for word in ("user", "password", "secret"))


def test_a_model_that_may_not_be_used_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOONDREAM_CV_BLOCKS_MODELS", "tiny")
    compiled(with_fields("caption"))
    assert refusal(with_fields("caption", model="moondream2")).endswith(
        "'moondream2' may not be used here, only tiny; MOONDREAM_CV_BLOCKS_MODELS lists the models"
    )


@pytest.mark.parametrize(
    ("block", "field"),
    [*((block, "confidence") for block in FINDERS), ("detect", "nms"), ("track", "nms")],
)
@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), float("inf"), "much", [0.5], "$input.x"])
def test_fractions_that_are_refused(block: str, field: str, value: Any) -> None:
    assert refusal(with_fields(block, **{field: value})).startswith(f"{field}: ")


@pytest.mark.parametrize(
    ("block", "field"),
    [
        *((block, "max_objects") for block in FINDERS),
        *((block, "max_tokens") for block in WRITERS),
        ("track", "every"),
    ],
)
@pytest.mark.parametrize("value", [0, -1, 1.5, "many", None, "$input.x"])
def test_counts_that_are_refused(block: str, field: str, value: Any) -> None:
    assert refusal(with_fields(block, **{field: value})).startswith(f"{field}: ")


@pytest.mark.parametrize("block", WRITERS)
@pytest.mark.parametrize("value", [-0.1, 2.1, float("nan"), float("inf"), "hot", None, "$input.x"])
def test_temperatures_that_are_refused(block: str, value: Any) -> None:
    assert refusal(with_fields(block, temperature=value)).startswith("temperature: ")


@pytest.mark.parametrize(
    ("block", "field", "value", "says"),
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
        ("query", "question", "$input.question", "'$input.question' is no selector"),
        ("query", "reasoning", "perhaps", "valid boolean"),
        ("query", "reasoning", None, "valid boolean"),
        ("query", "parameters", ["dog"], "valid dictionary"),
        ("query", "parameters", {"thing": ["dog"]}, "valid string"),
    ],
)
def test_other_values_that_are_refused(block: str, field: str, value: Any, says: str) -> None:
    told = refusal(with_fields(block, **{field: value}))
    assert told.startswith(f"{field}: ")
    assert says in told


@pytest.mark.parametrize("parameters", [{}, {"other": "dog"}])
def test_a_placeholder_without_a_parameter(parameters: dict[str, str]) -> None:
    told = refusal(with_fields("query", question="Is there a {thing}?", parameters=parameters))
    assert told.startswith("parameters: ")
    assert "the placeholder {thing}" in told
    assert f"parameters has {', '.join(parameters) or 'nothing'}" in told


# What is accepted


@pytest.mark.parametrize("block", FINDERS)
@pytest.mark.parametrize(
    "names",
    [
        ["dog"],
        "dog",
        "dog, red car",
        ["dog, or a wolf", "red car"],
        [f"thing {number}" for number in range(100)],
        ", ".join(f"thing {number}" for number in range(100)),
        ["Straßenbahn", "狗", "🐕"],
    ],
)
def test_class_names_that_are_accepted(block: str, names: Any) -> None:
    compiled(with_fields(block, class_names=names))


@pytest.mark.parametrize(
    ("block", "fields"),
    [
        *((block, {"confidence": value}) for block in FINDERS for value in (0, 0.3, 1)),
        *((block, {"max_objects": value}) for block in FINDERS for value in (1, 1000)),
        *((block, {"nms": value}) for block in ("detect", "track") for value in (None, 0, 1)),
        *((block, {"temperature": value}) for block in WRITERS for value in (0, 1.5, 2)),
        *((block, {"max_tokens": 1}) for block in WRITERS),
        *(("track", {"tracker": name}) for name in ("sort", "ocsort", "bytetrack", "botsort")),
        *(("caption", {"length": name}) for name in ("short", "normal", "long")),
        ("track", {"every": 1}),
        ("query", {"question": "Wie viele Hunde? 几只狗?"}),
        ("query", {"question": "What do braces such as {{thing}}, {} and { mean?"}),
        ("query", {"question": "Is {n} the number of {thing}s?", "parameters": {"thing": "dog", "n": 3, "more": 1.5}}),
        ("query", {"reasoning": True}),
    ],
)
def test_other_values_that_are_accepted(block: str, fields: dict[str, Any]) -> None:
    compiled(with_fields(block, **fields))


@pytest.mark.parametrize("block", BLOCKS)
def test_every_field_takes_a_selector(block: str, bgr: np.ndarray) -> None:
    """All but the tracker, which a stream keeps, and the parameters, whose values take them."""
    names = [name for name in fields_of(block) if name not in ("tracker", "parameters")]
    definition = workflow(step(block, **{name: f"$inputs.{name}" for name in names}), parameters=names)
    values = {name: VALUES[name] for name in names}
    (said,) = run(definition, bgr, **values)
    (expected,) = run(workflow(step(block, **values)), bgr)
    assert said["error_message"] == ""
    for name, value in expected.items():
        if hasattr(value, "xyxy"):
            assert said[name].data["class_name"].tolist() == value.data["class_name"].tolist()
            np.testing.assert_array_equal(said[name].xyxy, value.xyxy)
        else:
            assert said[name] == value


def test_values_of_parameters_take_selectors(bgr: np.ndarray) -> None:
    definition = workflow(
        step("query", question="How many {things} are there?", parameters={"things": "$inputs.things"}),
        parameters=["things"],
    )
    (said,) = run(definition, bgr, things="objects")
    (expected,) = run(with_fields("query"), bgr)
    assert said["answer"] == expected["answer"] == "4"


@pytest.mark.parametrize("block", FINDERS)
def test_a_prompt_in_the_place_of_class_names(block: str, bgr: np.ndarray) -> None:
    output = "step.tracked_detections" if block == "track" else "step.predictions"
    prompted = step(block, prompt="$inputs.prompt")
    for definition in (
        workflow(step(block, prompt="dog"), outputs=[output], parameters=["prompt"]),
        workflow(prompted, outputs=[output], parameters=["prompt"]),
    ):
        (said,) = run(definition, bgr, prompt="dog")
        assert said[output].data["class_name"].tolist() == ["dog"]


@pytest.mark.parametrize("block", FINDERS)
def test_a_prompt_with_commas_is_one_class(block: str) -> None:
    assert manifest(block)(**step(block, prompt="dog, or a wolf")).class_names == ["dog, or a wolf"]


def test_a_prompt_from_a_selector_is_read_as_class_names_are(bgr: np.ndarray) -> None:
    definition = workflow(step("detect", prompt="$inputs.prompt"), parameters=["prompt"])
    (said,) = run(definition, bgr, prompt="dog, bus")
    assert set(said["predictions"].data["class_name"]) == {"dog", "bus"}


def test_class_names_count_before_a_prompt(bgr: np.ndarray) -> None:
    (said,) = run(workflow(step("detect", prompt="bus", class_names="dog")), bgr)
    assert said["predictions"].data["class_name"].tolist() == ["dog"]


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("model", ["moondream2", "vikhyatk/moondream2", "some/other@main", "http://localhost:1"])
@pytest.mark.usefixtures("nothing_opens")
def test_compiling_opens_nothing(block: str, model: str) -> None:
    compiled(with_fields(block, model=model), **{"moondream_cv_blocks.models": ModelPool()})


def test_the_guard_of_that_test(nothing_opens: None, bgr: np.ndarray) -> None:
    engine = compiled(with_fields("caption"), **{"moondream_cv_blocks.models": ModelPool()})
    with pytest.raises(pytest.fail.Exception, match="opens \\('tiny',\\)"):
        results(engine, bgr)


# What the manifests say


def test_the_blocks() -> None:
    types = [block.get_manifest().model_fields["type"].annotation.__args__ for block in load_blocks()]
    assert types == [(f"moondream_cv/{name}@v1",) for name in BLOCKS]


@pytest.mark.parametrize("block", BLOCKS)
def test_what_a_block_says_of_itself(block: str) -> None:
    schema = manifest(block).model_json_schema()
    assert all(schema[name] for name in SAYS)
    assert schema["version"] == "v1"
    assert len(schema["short_description"]) < 80 < len(schema["long_description"])
    assert "`error_status`" in schema["long_description"]
    assert {"moondream", "moondream2", "VLM"} <= set(schema["search_keywords"])
    assert schema["is_vlm_block"] is True
    assert {"section", "icon", "blockPriority"} <= schema["ui_manifest"].keys()


@pytest.mark.parametrize("block", BLOCKS)
def test_every_field_is_described(block: str) -> None:
    fields = manifest(block).model_fields
    for name in fields_of(block):
        assert fields[name].title, name
        assert len(fields[name].description) > 20, name
        assert fields[name].examples, name


@pytest.mark.parametrize("block", BLOCKS)
def test_examples_are_accepted(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(Path(moondream_cv.__file__).parent / "tiny", tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)
    fields = manifest(block).model_fields
    for name in fields_of(block):
        for example in fields[name].examples:
            extra = {"parameters": {"thing": "dog"}} if name == "question" else {}
            accepted = manifest(block)(**step(block, **{**REQUIRED[block], **extra, name: example}))
            assert getattr(accepted, name) == example


@pytest.mark.parametrize("block", BLOCKS)
def test_defaults_are_accepted(block: str) -> None:
    least = manifest(block)(type=f"moondream_cv/{block}@v1", name="x", images="$inputs.image", **REQUIRED[block])
    fields = {name: getattr(least, name) for name in fields_of(block)}
    assert manifest(block)(type=f"moondream_cv/{block}@v1", name="x", images="$inputs.image", **fields) == least
    assert least.model == "moondream2"


@pytest.mark.parametrize("block", BLOCKS)
def test_the_schema_goes_through_json(block: str) -> None:
    schema = manifest(block).model_json_schema()
    assert json.loads(json.dumps(schema)) == schema
    assert set(fields_of(block)) <= schema["properties"].keys()


VISIBLE = {
    "detect": ["class_names", "model"],
    "point": ["class_names", "model"],
    "query": ["question", "model", "parameters"],
    "caption": ["model", "length"],
    "track": ["class_names", "model", "every"],
}
BOUNDS = {
    "confidence": ("number", 0, 1),
    "nms": ("number", 0, 1),
    "max_objects": ("integer", 1, 2**31 - 1),
    "max_tokens": ("integer", 1, 2**31 - 1),
    "every": ("integer", 1, 2**31 - 1),
    "temperature": ("number", 0, 2),
}


@pytest.mark.parametrize("block", BLOCKS)
def test_the_builder_shows_required_and_important_fields_first(block: str) -> None:
    schema = manifest(block).model_json_schema()
    shown = list(schema["properties"])
    required, visible = ["type", "name", "images", *REQUIRED[block]], VISIBLE[block]
    assert shown[: len(required)] == schema["required"] == required
    assert [name for name in shown if schema["properties"][name].get("always_visible")] == visible
    assert shown[3 : 3 + len(visible)] == visible


@pytest.mark.parametrize("block", BLOCKS)
def test_the_builder_knows_the_bounds_of_all_numbers(block: str) -> None:
    numbers = {}
    for name, schema in manifest(block).model_json_schema()["properties"].items():
        for option in schema.get("anyOf", [schema]):
            if option.get("type") in ("number", "integer"):
                numbers[name] = (option["type"], option["minimum"], option["maximum"])
    assert numbers == {name: BOUNDS[name] for name in fields_of(block) if name in BOUNDS}


@pytest.mark.parametrize("block", BLOCKS)
def test_bounds_of_the_builder_are_those_of_the_check(block: str) -> None:
    for name in [name for name in fields_of(block) if name in BOUNDS]:
        kind, low, high = BOUNDS[name]
        for value in (low, high):
            compiled(with_fields(block, **{name: value}))
        for value in (low - 1, high + 1) if kind == "integer" else (low - 0.01, high + 0.01):
            assert refusal(with_fields(block, **{name: value})).startswith(f"{name}: ")


def test_the_engine_lists_the_blocks() -> None:
    from roboflow_workflows.execution_engine.introspection.blocks_loader import describe_available_blocks

    listed = {block.manifest_type_identifier: block for block in describe_available_blocks(dynamic_blocks=[]).blocks}
    ours = [name for name in listed if name.startswith("moondream_cv/")]
    assert ours == [f"moondream_cv/{name}@v1" for name in BLOCKS]
    for name in BLOCKS:
        described = listed[f"moondream_cv/{name}@v1"]
        assert described.human_friendly_block_name == f"Moondream {name.capitalize()}"
        assert described.block_source == "moondream_cv_blocks"
        outputs = {output.name: [kind.name for kind in output.kind] for output in described.outputs_manifest}
        assert outputs == OUTPUTS[name]


# What takes the place of the core block


def core_parameters() -> dict[str, Any]:
    """What the core block is made with."""
    from roboflow_workflows.core_steps.common.entities import StepExecutionMode

    values = {"model_manager": None, "api_key": None, "step_execution_mode": StepExecutionMode.LOCAL}
    return {f"workflows_core.{name}": value for name, value in values.items()}


def converted(**fields: Any) -> dict[str, Any]:
    return {**CORE_STEP, "type": "moondream_cv/detect@v1", **fields}


def test_a_step_of_the_core_block_is_converted() -> None:
    """By changing its type and renaming its prompt, or by its type alone."""
    renamed = converted(class_names=CORE_STEP["prompt"])
    del renamed["prompt"]
    for of_step in (CORE_STEP, renamed, converted()):
        compiled(workflow(of_step, outputs=["step.predictions"]), **core_parameters())


def test_a_converted_step_has_the_outputs_of_the_core_block() -> None:
    from roboflow_workflows.execution_engine.introspection.blocks_loader import describe_available_blocks

    listed = {block.manifest_type_identifier: block for block in describe_available_blocks(dynamic_blocks=[]).blocks}
    core, ours = (
        {output.name: output.kind for output in listed[name].outputs_manifest}
        for name in (CORE_STEP["type"], "moondream_cv/detect@v1")
    )
    assert core
    assert core.items() <= ours.items()


def test_a_step_that_is_converted_by_its_type_alone_finds_the_same(bgr: np.ndarray) -> None:
    """The core block names no model that runs here, so the model is the one field to add for this test."""
    (by_type,) = run(workflow(converted(model="tiny")), bgr)
    (ours,) = run(with_fields("detect"), bgr)
    np.testing.assert_array_equal(by_type["predictions"].xyxy, ours["predictions"].xyxy)
    assert by_type["predictions"].data["class_name"].tolist() == ["dog"]


def test_fields_of_the_converted_step_that_ours_lacks_do_no_harm() -> None:
    fields = manifest("detect")(**converted()).model_dump()
    assert fields["class_names"] == ["dog"]
    assert fields["model"] == "moondream2"
    assert not {"prompt", "model_version"} & fields.keys()
