"""Test the plugin with `inference.core.workflows` of `inference` 1.5, from before the engine was a separate package.

`make venv-roboflow` installs that version into a separate folder. A separate process imports it from there, and cannot
import `roboflow_workflows`, which did not exist.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.helpers.roboflow_app import ENVIRONMENT, skip_without_server
from tests.helpers.workflows import ROOT, run_program

pytestmark = pytest.mark.roboflow
skip_without_server()

OLDER = Path(sys.prefix) / "older-engine"

PROGRAM = """
import json
import sys


class BlockedImport:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "roboflow_workflows":
            raise ModuleNotFoundError(f"No module named {name!r}", name="roboflow_workflows")


sys.meta_path.insert(0, BlockedImport())

from tests.helpers.roboflow_app import declare_torchvision_schemas

declare_torchvision_schemas()

import numpy as np
from inference.core.workflows.execution_engine.core import ExecutionEngine
from moondream_cv.scenes import render_scene
from moondream_cv_blocks.roboflow import WorkflowBlock
from tests.helpers.workflows import step, workflow

steps = [step("detect", class_names="dog"), step("point", "pointed", class_names="dog"),
         step("track", "tracked", class_names="dog"), step("caption", "captioned", length="short"),
         step("query", "answered", question="Is there a dog?")]
definition = workflow(*steps, outputs=[f"{s['name']}.*" for s in steps])
engine = ExecutionEngine.init(workflow_definition=definition, init_parameters={})
scene = render_scene(5, resolution_wh=(320, 240), names=["dog", "red circle"], style="plain")
(result,) = engine.run(runtime_parameters={"image": scene.image[..., ::-1].copy()}, serialize_results=True)
print(json.dumps({"base": WorkflowBlock.__module__, "result": result}))
"""


@pytest.mark.skipif(not OLDER.is_dir(), reason="inference-core 1.5.2 is not installed; run make venv-roboflow")
def test_blocks_run_in_the_engine_of_inference_1_5(tmp_path: Path) -> None:
    paths = os.pathsep.join([str(OLDER), str(ROOT)])
    report = run_program(PROGRAM, **ENVIRONMENT, PYTHONPATH=paths, MODEL_CACHE_DIR=str(tmp_path))
    assert report["base"] == "inference.core.workflows.prototypes.block"
    result = report["result"]
    (dog,) = result["step.*"]["predictions"]["predictions"]
    (point,) = result["pointed.*"]["predictions"]["predictions"]
    assert (dog["class"], point["class"]) == ("dog", "dog")
    assert abs(dog["x"] - point["x"]) < dog["width"] / 2
    assert [found["tracker_id"] for found in result["tracked.*"]["new_instances"]["predictions"]] == [1]
    assert "dog" in result["captioned.*"]["caption"]
    assert result["answered.*"]["answer"] == "yes"
    assert [outputs["error_message"] for outputs in result.values()] == [""] * 5
