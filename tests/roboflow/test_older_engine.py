"""The plugin with an engine from before it became a distribution of its own: `inference.core.workflows` of 1.5.

`make venv-roboflow` puts that version beside the environment's own packages, which have everything that it needs. A
process of its own finds it before the newer one, and is refused `roboflow_workflows`, which did not exist.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.helpers.roboflow_app import ENVIRONMENT, skip_without_server
from tests.helpers.workflows import ROOT, said_by

pytestmark = pytest.mark.roboflow
skip_without_server()

OLDER = Path(sys.prefix) / "older-engine"

PROGRAM = """
import json
import sys


class NotThereYet:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "roboflow_workflows":
            raise ModuleNotFoundError(f"No module named {name!r}", name="roboflow_workflows")


sys.meta_path.insert(0, NotThereYet())

from tests.helpers.roboflow_app import declare_torchvision_schemas

declare_torchvision_schemas()

import numpy as np
from inference.core.workflows.execution_engine.core import ExecutionEngine
from moondream_cv.scenes import render_scene
from moondream_cv_blocks.roboflow import WorkflowBlock
from tests.helpers.workflows import step, workflow

steps = [step("detect", class_names="dog"), step("point", "pointed", class_names="dog"),
         step("track", "tracked", class_names="dog"), step("caption", "said", length="short"),
         step("query", "asked", question="Is there a dog?")]
definition = workflow(*steps, outputs=[f"{s['name']}.*" for s in steps])
engine = ExecutionEngine.init(workflow_definition=definition, init_parameters={})
scene = render_scene(5, resolution_wh=(320, 240), names=["dog", "red circle"], style="plain")
(result,) = engine.run(runtime_parameters={"image": scene.image[..., ::-1].copy()}, serialize_results=True)
print(json.dumps({"base": WorkflowBlock.__module__, "result": result}))
"""


@pytest.mark.skipif(
    not OLDER.is_dir(), reason="inference-core 1.5.2 is not beside this environment: make venv-roboflow"
)
def test_the_blocks_run_in_the_engine_of_inference_1_5(tmp_path: Path) -> None:
    paths = os.pathsep.join([str(OLDER), str(ROOT)])
    said = said_by(PROGRAM, **ENVIRONMENT, PYTHONPATH=paths, MODEL_CACHE_DIR=str(tmp_path))
    assert said["base"] == "inference.core.workflows.prototypes.block"
    result = said["result"]
    (dog,) = result["step.*"]["predictions"]["predictions"]
    (point,) = result["pointed.*"]["predictions"]["predictions"]
    assert (dog["class"], point["class"]) == ("dog", "dog")
    assert abs(dog["x"] - point["x"]) < dog["width"] / 2
    assert [found["tracker_id"] for found in result["tracked.*"]["new_instances"]["predictions"]] == [1]
    assert "dog" in result["said.*"]["caption"]
    assert result["asked.*"]["answer"] == "yes"
    assert [outputs["error_message"] for outputs in result.values()] == [""] * 5
