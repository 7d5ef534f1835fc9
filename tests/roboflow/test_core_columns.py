"""Test that predictions have the data columns and types of Roboflow's blocks, which JSON, webhooks and sinks need."""

from __future__ import annotations

import json
from typing import Any, ClassVar

import numpy as np
import pytest
import supervision as sv

from moondream_cv.engine.local_model import LocalModel
from tests.helpers.remote_server import Reply, remote_server
from tests.helpers.roboflow_app import model_manager, skip_without_server
from tests.helpers.workflows import compile_workflow, run_engine, run_workflow, step, workflow

skip_without_server()
pytestmark = pytest.mark.roboflow

NAMES = ["dog", "bus", "red circle"]
PREDICTIONS = [
    ("detect", "predictions"),
    ("point", "predictions"),
    ("track", "tracked_detections"),
    ("track", "new_instances"),
]
every_prediction = pytest.mark.parametrize(("block", "output"), PREDICTIONS)
SCALING = {"scaling_relative_to_parent", "scaling_relative_to_root_parent"}
"""Columns that the engine adds to the outputs of a workflow, if they are not empty."""
PROPERTIES = (
    "confidence",
    "class_name",
    "class_id",
    "x_min",
    "y_min",
    "x_max",
    "y_max",
    "size",
    "center",
    "top_left",
    "bottom_right",
)


def core(block: str, name: str, **fields: Any) -> dict[str, Any]:
    """Return a step with one of Roboflow's blocks, such as "geotag_detection@v1"."""
    return {"type": f"roboflow_core/{block}", "name": name, **fields}


def found(block: str, *steps: dict[str, Any], outputs: list[str] | None = None, **fields: Any) -> dict[str, Any]:
    """Return a workflow that localizes `NAMES` in a step `found`, followed by more steps."""
    return workflow(step(block, "found", class_names=NAMES, **fields), *steps, outputs=outputs)


@pytest.fixture(scope="module")
def core_predictions(tiny: LocalModel, scene: Any) -> sv.Detections:
    """Return the predictions of Roboflow's own Moondream block, computed by its model manager."""
    from inference.core.interfaces.workflows_models_provider import ModelManagerModelsProvider
    from roboflow_workflows.core_steps.common.entities import StepExecutionMode

    moondream = core(
        "moondream2@v1", "found", images="$inputs.image", prompt="dog", model_version="moondream2/moondream2-2b"
    )
    parameters = {
        "model_manager": ModelManagerModelsProvider(model_manager(tiny)),
        "api_key": None,
        "step_execution_mode": StepExecutionMode.LOCAL,
    }
    engine = compile_workflow(
        workflow(moondream), **{f"workflows_core.{name}": value for name, value in parameters.items()}
    )
    (outputs,) = run_engine(engine, np.ascontiguousarray(scene.image[..., ::-1]))
    detections: sv.Detections = outputs["predictions"]
    assert len(detections) == 1
    return detections


@every_prediction
def test_predictions_have_the_columns_and_types_of_the_core_block(
    block: str, output: str, core_predictions: sv.Detections, bgr: np.ndarray
) -> None:
    (outputs,) = run_workflow(found(block), bgr)
    ours = outputs[output]
    assert core_predictions.data.keys() <= ours.data.keys()
    for name, column in core_predictions.data.items():
        assert ours.data[name].dtype.kind == column.dtype.kind, name
        assert ours.data[name].shape[1:] == column.shape[1:], name
    for name in ("xyxy", "confidence", "class_id"):
        assert getattr(ours, name).dtype == getattr(core_predictions, name).dtype, name
    assert ours.xyxy.dtype == ours.confidence.dtype == np.float64


@every_prediction
def test_empty_and_failed_predictions_have_the_same_types(block: str, output: str, bgr: np.ndarray) -> None:
    filled, empty, failed = run_workflow(found(block), [bgr, np.full_like(bgr, 127), np.zeros((0, 0, 3), np.uint8)])
    assert [len(outputs[output]) > 0 for outputs in (filled, empty, failed)] == [True, False, False]
    assert failed["error_status"] is True
    assert filled[output].data.keys() - empty[output].data.keys() <= SCALING
    for outputs in (empty, failed):
        assert outputs[output].xyxy.dtype == outputs[output].confidence.dtype == np.float64


# inference_id


@every_prediction
def test_each_image_has_one_inference_id(block: str, output: str, bgr: np.ndarray) -> None:
    engine = compile_workflow(found(block))
    ids = [set(outputs[output].data["inference_id"]) for outputs in run_engine(engine, [bgr, bgr])]
    ids += [set(outputs[output].data["inference_id"]) for outputs in run_engine(compile_workflow(found(block)), bgr)]
    if output == "new_instances":
        del ids[1]  # the second image of the batch is the next frame
    assert all(len(one) == 1 for one in ids)
    assert len(set.union(*ids)) == len(ids)


def test_tracked_detections_and_their_parts_share_the_inference_id(bgr: np.ndarray) -> None:
    (outputs,) = run_workflow(found("track"), bgr)
    tracked, new = (set(outputs[name].data["inference_id"]) for name in ("tracked_detections", "new_instances"))
    assert tracked == new


class Platform:
    """A fake of Roboflow's platform, which cannot be installed. Records the calls of sinks."""

    ANSWERS: ClassVar[dict[str, Any]] = {
        "get_roboflow_workspace": "workspace",
        "get_device_id": "device",
        "get_server_version": "1",
        "register_image_at_roboflow": {"id": "image"},
    }

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)

        def call(*arguments: Any, **options: Any) -> Any:
            self.calls.append((name, options or next(reversed(arguments), {})))
            return self.ANSWERS.get(name)

        return call


LAST_REPORT = "workflows:steps_cache:roboflow_core/model_monitoring_inference_aggregator@v1:key:last_report_time"
SINKS: dict[str, dict[str, Any]] = {
    "add_custom_metadata": {
        "type": "roboflow_core/roboflow_custom_metadata@v1",
        "field_name": "place",
        "field_value": "gate",
        "fire_and_forget": False,
    },
    "register_image_at_roboflow": {
        "type": "roboflow_core/roboflow_dataset_upload@v1",
        "images": "$inputs.image",
        "target_project": "project",
        "usage_quota_name": "quota",
        "fire_and_forget": False,
    },
    "send_inference_results_to_model_monitoring": {
        "type": "roboflow_core/model_monitoring_inference_aggregator@v1",
        "frequency": 1,
        "unique_aggregator_key": "key",
        "model_id": "$steps.model.output",
        "fire_and_forget": False,
    },
}


def inference_ids(call: str, options: dict[str, Any]) -> set[str]:
    """Return the inference IDs that a sink has sent."""
    if call == "add_custom_metadata":
        return set(options["inference_ids"])
    if call == "register_image_at_roboflow":
        return {options["inference_id"]}
    return {result["inference_id"] for result in options["inference_results"]}


@pytest.mark.parametrize("sink", SINKS)
@every_prediction
def test_roboflow_sinks_send_the_inference_id(block: str, output: str, sink: str, bgr: np.ndarray) -> None:
    from roboflow_workflows.utils.in_memory_cache import InMemoryWorkflowsCache

    platform = Platform()
    definition = found(
        block,
        core("first_non_empty_or_default@v1", "model", data=["$inputs.model_id"], default="moondream2"),
        {"name": "sink", "predictions": f"$steps.found.{output}", **SINKS[sink]},
        outputs=[f"found.{output}", "sink.error_status", "sink.message"],
    )
    definition["inputs"].append({"type": "WorkflowParameter", "name": "model_id", "default_value": "moondream2"})
    cache = InMemoryWorkflowsCache()
    cache.set(LAST_REPORT, "2026-01-01T00:00:00")  # an old report, so that the next one is due
    values = {"platform_client": platform, "api_key": "key", "cache": cache}
    engine = compile_workflow(definition, **{f"workflows_core.{name}": value for name, value in values.items()})
    (outputs,) = run_engine(engine, bgr)
    assert outputs["sink.error_status"] is False, outputs["sink.message"]
    (sent,) = [options for call, options in platform.calls if call == sink]
    assert json.dumps({name: value for name, value in sent.items() if name != "image_bytes"})
    assert inference_ids(sink, sent) == set(outputs[f"found.{output}"].data["inference_id"])
    if sink == "register_image_at_roboflow":
        (annotation,) = [options for call, options in platform.calls if call == "annotate_image_at_roboflow"]
        boxes = json.loads(annotation["annotation_content"])["predictions"]
        assert sorted(box["class"] for box in boxes) == sorted(NAMES)


# JSON


def scalars(value: Any) -> list[Any]:
    """Return the leaves of nested lists, dictionaries and arrays, as the elements of arrays are."""
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in scalars(item)]
    if isinstance(value, (list, tuple, np.ndarray)):
        return [leaf for item in value for leaf in scalars(item)]
    return [value]


def floats_of(outputs: dict[str, Any]) -> list[Any]:
    """Return every floating-point number in the outputs of a block."""
    leaves = []
    for value in outputs.values():
        parts = [value.xyxy, value.confidence, dict(value.data)] if isinstance(value, sv.Detections) else value
        leaves += scalars(parts)
    return [leaf for leaf in leaves if isinstance(leaf, (float, np.floating))]


@pytest.mark.parametrize("block", ["detect", "point", "track", "query"])
def test_floats_of_the_outputs_are_json_serializable(block: str, bgr: np.ndarray) -> None:
    if block == "query":
        definition = workflow(step("query", question="How many dogs are there?", reasoning=True))
    else:
        definition = found(block)
    (outputs,) = run_workflow(definition, bgr)
    numbers = floats_of(outputs)
    assert len(numbers) >= 2
    assert json.loads(json.dumps(numbers)) == numbers


@every_prediction
def test_geotag_detection_returns_json(block: str, output: str, bgr: np.ndarray) -> None:
    geotag = core(
        "geotag_detection@v1",
        "geotag",
        image="$inputs.image",
        predictions=f"$steps.found.{output}",
        latitude=52.5,
        longitude=13.4,
        altitude=30.0,
    )
    as_text = core(
        "property_definition@v1",
        "text",
        data="$steps.geotag.geojson",
        operations=[{"type": "ConvertDictionaryToJSON"}],
    )
    (outputs,) = run_workflow(found(block, geotag, as_text, outputs=["geotag.geojson", "text.output"]), bgr)
    features = json.loads(outputs["text.output"])["features"]
    assert features == outputs["geotag.geojson"]["features"]
    assert sorted(feature["properties"]["class"] for feature in features) == sorted(NAMES)
    assert all(52.4 < feature["geometry"]["coordinates"][1] < 52.6 for feature in features)


@every_prediction
def test_webhook_sink_sends_predictions(
    block: str, output: str, bgr: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Predictions are sent as properties, as a dictionary, and as coordinates of another block."""
    from roboflow_workflows.core_steps.sinks.webhook import v1

    monkeypatch.setattr(v1, "ALLOW_WEBHOOK_WORKFLOWS_SINK_TO_NON_GLOBAL_ADDRESSES", True)
    selector = f"$steps.found.{output}"
    extracts: dict[str, Any] = {
        name: [{"type": "DetectionsPropertyExtract", "property_name": name}] for name in PROPERTIES
    }
    operations = {**extracts, "all": [{"type": "DetectionsToDictionary"}]}
    geotag = core(
        "geotag_detection@v1",
        "geotag",
        image="$inputs.image",
        predictions=selector,
        latitude=52.5,
        longitude=13.4,
        altitude=30.0,
    )
    with remote_server() as server:
        server.on("/hook", Reply({}))
        hook = core(
            "webhook_sink@v1",
            "hook",
            url=f"{server.url}/hook",
            method="POST",
            json_payload={**dict.fromkeys(operations, selector), "places": "$steps.geotag.geo_detections"},
            json_payload_operations=operations,
            fire_and_forget=False,
        )
        (outputs,) = run_workflow(
            found(block, geotag, hook, outputs=[f"found.{output}", "hook.error_status", "hook.message"]), bgr
        )
        assert outputs["hook.error_status"] is False, outputs["hook.message"]
        (request,) = server.requests
    detections = outputs[f"found.{output}"]
    assert request.body["class_name"] == detections["class_name"].tolist()
    assert request.body["confidence"] == detections.confidence.tolist()
    assert request.body["x_min"] == detections.xyxy[:, 0].tolist()
    assert len(request.body["places"]) == len(request.body["all"]["predictions"]) == len(NAMES)
