"""Workflows for tests of the blocks: a definition of a few steps, compiled and run by Roboflow's own engine.

`tests.helpers.roboflow_app.prepare` comes first: `conftest.py` of `tests/roboflow` sees to it.
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

from moondream_cv.engine.local import LocalModel
from moondream_cv.requests import Request
from moondream_cv.scenes import Clip

ROOT = Path(__file__).parents[2]

NAMESPACE = "moondream_cv"
BLOCKS = ("detect", "point", "query", "caption", "track")
FINDERS = ("detect", "point", "track")
REQUIRED: dict[str, dict[str, Any]] = {
    "detect": {"class_names": ["dog"]},
    "point": {"class_names": ["dog"]},
    "query": {"question": "How many objects are there?"},
    "caption": {},
    "track": {"class_names": ["dog"]},
}
EMPTY: dict[str, dict[str, Any]] = {
    "detect": {"predictions": 0},
    "point": {"predictions": 0, "points": []},
    "query": {"answer": "", "reasoning": "", "grounding": []},
    "caption": {"caption": ""},
    "track": {"tracked_detections": 0, "new_instances": 0, "already_seen_instances": 0},
}
"""What each block gives of an image that failed; for detections, how many."""
START = datetime(2026, 1, 1, tzinfo=timezone.utc)


def step(block: str, name: str = "step", **fields: Any) -> dict[str, Any]:
    """A step with one of our blocks, on the input image and with the tiny model unless told otherwise."""
    return {"type": f"{NAMESPACE}/{block}@v1", "name": name, "images": "$inputs.image", "model": "tiny", **fields}


def block_step(block: str, **fields: Any) -> dict[str, Any]:
    """A step with what its block insists on."""
    return step(block, **{**REQUIRED[block], **fields})


def as_bgr(rgb: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(rgb[..., ::-1])


def bgr_frames(clip: Clip) -> list[np.ndarray]:
    return [as_bgr(rgb) for rgb, _ in clip]


def in_video(bgr: np.ndarray, number: int, source: str = "camera", fps: float | None = 30.0) -> dict[str, Any]:
    """A frame as the stream runner passes it to the engine, which counts from 1."""
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
    """A definition.

    Args:
        outputs: Selectors without "$steps.", such as "step.predictions", which name the outputs too; None: all of the
            last step, under the names that they have there.
        parameters: Names of inputs beside the image.
        defaults: More of them, with what they are unless given.
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


def compiled(definition: dict[str, Any], **init_parameters: Any) -> Any:
    """An `ExecutionEngine`.

    Raises:
        WorkflowError: The engine refuses the definition.
    """
    from roboflow_workflows.execution_engine.core import ExecutionEngine

    return ExecutionEngine.init(workflow_definition=definition, init_parameters=init_parameters)


def run(definition: dict[str, Any], images: Any, serialize: bool = False, **parameters: Any) -> list[dict[str, Any]]:
    """What a workflow gives for each image: its outputs, or with `outputs=None` those of the last step.

    Args:
        images: What the engine takes: BGR arrays, or one of them.
        parameters: Of the workflow.
    """
    return results(compiled(definition), images, serialize, **parameters)


def results(engine: Any, images: Any, serialize: bool = False, **parameters: Any) -> list[dict[str, Any]]:
    """The same with an engine that there is already."""
    found = engine.run(runtime_parameters={"image": images, **parameters}, serialize_results=serialize)
    return [result["*"] if set(result) == {"*"} else result for result in found]


def refusal(definition: dict[str, Any]) -> str:
    """What the engine says of the field of a definition that it refuses: "FIELD: message"."""
    from roboflow_workflows.errors import WorkflowSyntaxError

    try:
        compiled(definition)
    except WorkflowSyntaxError as error:
        (block,) = error.blocks_errors
        return f"{block.property_name}: {block.property_details}"
    raise AssertionError("the engine refuses nothing")


class Looks:
    """The tiny model, which tells how often it was asked.

    Attributes:
        asked: How many requests came in each call.
        gives: Makes another result of a request, while it is set.
    """

    def __init__(self, model: LocalModel) -> None:
        self.model, self.skills, self.has_scores = model, model.skills, model.has_scores
        self.asked: list[int] = []
        self.gives: Callable[[Request], Any] | None = None

    def run(self, requests: Sequence[Request]) -> Any:
        self.asked.append(len(requests))
        return self.model.run(requests) if self.gives is None else [self.gives(request) for request in requests]

    def close(self) -> None:
        """It belongs to somebody else."""


def engine_of(definition: dict[str, Any], model: Looks | None = None) -> Any:
    """An engine with a pool of its own, in which `tiny` is this model."""
    from moondream_cv_blocks import ModelPool

    models = ModelPool(device="cpu", timeout=240)
    if model is not None:
        models.add("tiny", model)  # type: ignore[arg-type]
    return compiled(definition, **{"moondream_cv_blocks.models": models})


def check_nothing(block: str, outputs: dict[str, Any], *says: str) -> None:
    """A block gives nothing on an image, and says why."""
    given = {name: len(value) if hasattr(value, "xyxy") else value for name, value in outputs.items()}
    message = given.pop("error_message")
    assert given == {**EMPTY[block], "error_status": True}
    assert all(words in message for words in says), message


def said_by(program: str, *arguments: str, **environment: str) -> dict[str, Any]:
    """The JSON that a program of a process of its own prints last.

    Args:
        environment: What it has beside what this process has.
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
