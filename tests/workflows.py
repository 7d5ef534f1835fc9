"""Workflows for tests of the blocks: a definition of a few steps, compiled and run by Roboflow's own engine.

`tests.roboflow_app.prepare` comes first: `conftest.py` of `tests/roboflow` sees to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

NAMESPACE = "moondream_cv"
BLOCKS = ("detect", "point", "query", "caption", "track")


def step(block: str, name: str = "step", **fields: Any) -> dict[str, Any]:
    """A step with one of our blocks, on the input image and with the tiny model unless told otherwise."""
    return {"type": f"{NAMESPACE}/{block}@v1", "name": name, "images": "$inputs.image", "model": "tiny", **fields}


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
