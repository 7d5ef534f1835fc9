"""Test the engine's tensor representation of predictions: detections are rejected, text blocks work.

The engine reads the setting from the environment at import, so the test runs in a separate process.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.roboflow_app import skip_without_server
from tests.helpers.workflows import run_program

pytestmark = pytest.mark.roboflow
skip_without_server()

PROGRAM = """
import json
import sys
from pathlib import Path

from tests.helpers.roboflow_app import prepare

prepare(Path(sys.argv[1]))

from moondream_cv.scenes import render_scene
from tests.helpers.workflows import compile_error, run_workflow, step, workflow

scene = render_scene(5, resolution_wh=(320, 240), names=["dog", "red circle"], style="plain")
image = scene.image[..., ::-1].copy()
errors = {name: compile_error(workflow(step(name, class_names="dog"))) for name in ("detect", "point", "track")}
(answer,) = run_workflow(workflow(step("query", question="Is there a dog?")), image, serialize=True)
(caption,) = run_workflow(workflow(step("caption", length="short")), image, serialize=True)
print(json.dumps({"errors": errors, "answer": answer["answer"], "caption": caption["caption"]}))
"""


def test_blocks_with_detections_reject_the_tensor_representation(tmp_path: Path) -> None:
    report = run_program(PROGRAM, str(tmp_path), ENABLE_TENSOR_DATA_REPRESENTATION="True")
    assert set(report["errors"]) == {"detect", "point", "track"}
    for message in report["errors"].values():
        assert "unset the environment variable ENABLE_TENSOR_DATA_REPRESENTATION" in message
    assert report["answer"] == "yes"
    assert "dog" in report["caption"]
