"""Define, compile and run workflows with the blocks in Roboflow's workflows engine.

Call `tests.helpers.roboflow_app.prepare` first, as `tests/roboflow/conftest.py` does.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np

from moondream_cv.engine.local_model import LocalModel
from moondream_cv.requests import Request
from moondream_cv.scenes import Clip

ROOT = Path(__file__).parents[2]

NAMESPACE = "moondream_cv"
BLOCKS = ("detect", "point", "query", "caption", "track")
ALL_BLOCKS = (*BLOCKS, "segment")  # the last one needs a segmentation model
CLASS_BLOCKS = ("detect", "point", "track")
REQUIRED: dict[str, dict[str, Any]] = {
    "detect": {"class_names": ["dog"]},
    "point": {"class_names": ["dog"]},
    "query": {"question": "How many objects are there?"},
    "caption": {},
    "track": {"class_names": ["dog"]},
    "segment": {"class_names": ["dog"]},
}
EMPTY: dict[str, dict[str, Any]] = {
    "detect": {"predictions": 0},
    "point": {"predictions": 0, "points": []},
    "query": {"answer": "", "reasoning": "", "grounding": []},
    "caption": {"caption": ""},
    "track": {"tracked_detections": 0, "new_instances": 0, "already_seen_instances": 0},
    "segment": {"predictions": 0},
}
"""Outputs of each block for a failed image; for detections, their number."""
START = datetime(2026, 1, 1, tzinfo=timezone.utc)


def step(block: str, name: str = "step", **fields: Any) -> dict[str, Any]:
    """Return a step with one of the blocks, by default on the input image and with the tiny model."""
    return {"type": f"{NAMESPACE}/{block}@v1", "name": name, "images": "$inputs.image", "model": "tiny", **fields}


def minimal_step(block: str, **fields: Any) -> dict[str, Any]:
    """Return a step with the required fields of its block."""
    return step(block, **{**REQUIRED[block], **fields})


def as_bgr(rgb: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(rgb[..., ::-1])


def bgr_frames(clip: Clip) -> list[np.ndarray]:
    return [as_bgr(rgb) for rgb, _ in clip]


def video_frame(bgr: np.ndarray, number: int, source: str = "camera", fps: float | None = 30.0) -> dict[str, Any]:
    """Return a video frame as the stream runner passes it to the engine.

    Args:
        bgr: [H, W, 3] image.
        number: Frame number, from 1.
        source: Identifier of the video source.
        fps: Frame rate in the metadata.
    """
    rate = fps if fps and 0 < fps < math.inf else 30.0
    metadata = {
        "video_identifier": source,
        "frame_number": number,
        "frame_timestamp": START + timedelta(seconds=(number - 1) / rate),
        "fps": fps,
    }
    return {"type": "numpy_object", "value": bgr, "video_metadata": metadata}


def workflow(
    *steps: dict[str, Any], outputs: Sequence[str] | None = None, parameters: Sequence[str] = (), **defaults: Any
) -> dict[str, Any]:
    """Return a workflow definition.

    Args:
        steps: Steps of the workflow.
        outputs: Selectors without "$steps.", such as "step.predictions", which are also the names of the outputs;
            None: all outputs of the last step, under their names there.
        parameters: Names of input parameters without a default.
        defaults: Default values of more input parameters.
    """
    named = {"*": f"$steps.{steps[-1]['name']}.*"} if outputs is None else {o: f"$steps.{o}" for o in outputs}
    return {
        "version": "1.0",
        "inputs": [
            {"type": "WorkflowImage", "name": "image"},
            *({"type": "WorkflowParameter", "name": name} for name in parameters),
            *({"type": "WorkflowParameter", "name": name, "default_value": v} for name, v in defaults.items()),
        ],
        "steps": list(steps),
        "outputs": [{"type": "JsonField", "name": name, "selector": selector} for name, selector in named.items()],
    }


def compile_workflow(definition: dict[str, Any], **init_parameters: Any) -> Any:
    """Compile a workflow to an `ExecutionEngine`.

    Args:
        definition: Workflow definition.
        init_parameters: Init parameters of the blocks.

    Raises:
        WorkflowError: The engine rejects the definition.
    """
    from roboflow_workflows.execution_engine.core import ExecutionEngine

    return ExecutionEngine.init(workflow_definition=definition, init_parameters=init_parameters)


def run_workflow(
    definition: dict[str, Any], images: Any, serialize: bool = False, **parameters: Any
) -> list[dict[str, Any]]:
    """Compile and run a workflow.

    Args:
        definition: Workflow definition.
        images: One image or a list of images, as the engine accepts them.
        serialize: Serialize the outputs.
        parameters: Input parameters of the workflow.

    Returns:
        The outputs of each image.
    """
    return run_engine(compile_workflow(definition), images, serialize, **parameters)


def run_engine(engine: Any, images: Any, serialize: bool = False, **parameters: Any) -> list[dict[str, Any]]:
    """Run a compiled workflow; see `run_workflow`."""
    found = engine.run(runtime_parameters={"image": images, **parameters}, serialize_results=serialize)
    return [result["*"] if set(result) == {"*"} else result for result in found]


def compile_error(definition: dict[str, Any]) -> str:
    """Return the error of an invalid field when a workflow is compiled, as "FIELD: message"."""
    from roboflow_workflows.errors import WorkflowSyntaxError

    try:
        compile_workflow(definition)
    except WorkflowSyntaxError as error:
        (block,) = error.blocks_errors
        return f"{block.property_name}: {block.property_details}"
    raise AssertionError("the engine accepts the definition")


class CountingModel:
    """A model that counts its requests.

    Attributes:
        call_sizes: Number of requests of each call.
        make_result: Function that returns the result of a request; None: run the model.
    """

    def __init__(self, model: LocalModel) -> None:
        self.model, self.skills, self.has_scores = model, model.skills, model.has_scores
        self.call_sizes: list[int] = []
        self.make_result: Callable[[Request], Any] | None = None

    def run(self, requests: Sequence[Request]) -> Any:
        self.call_sizes.append(len(requests))
        if self.make_result is None:
            return self.model.run(requests)
        return [self.make_result(request) for request in requests]

    def close(self) -> None:
        """Do nothing; the model is shared."""


def make_engine(definition: dict[str, Any], model: CountingModel | None = None) -> Any:
    """Compile a workflow with a new pool, in which `tiny` is the given model."""
    from moondream_cv_blocks import ModelPool

    models = ModelPool(device="cpu", timeout=240)
    if model is not None:
        models.add("tiny", model)  # type: ignore[arg-type]
    return compile_workflow(definition, **{"moondream_cv_blocks.models": models})


def assert_failed(block: str, outputs: dict[str, Any], *expected: str) -> None:
    """Assert that the outputs of a block are empty and that its error message contains the given strings."""
    given = {name: len(value) if hasattr(value, "xyxy") else value for name, value in outputs.items()}
    message = given.pop("error_message")
    assert given == {**EMPTY[block], "error_status": True}
    assert all(text in message for text in expected), message


def run_program(program: str, *arguments: str, **environment: str) -> dict[str, Any]:
    """Run a Python program in a separate process and return the JSON of the last line that it prints.

    Args:
        program: Source code.
        arguments: Command-line arguments.
        environment: Environment variables to add.
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]
