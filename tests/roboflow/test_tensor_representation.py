"""The engine's other representation of predictions, which it takes from the environment when it is imported.

A process of its own has it: what gives detections is refused with the reason, and texts come as ever.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.roboflow_app import skip_without_server
from tests.helpers.workflows import said_by

pytestmark = pytest.mark.roboflow
skip_without_server()

PROGRAM = """
import json
import sys
from pathlib import Path

from tests.helpers.roboflow_app import prepare

prepare(Path(sys.argv[1]))

from moondream_cv.scenes import render_scene
from tests.helpers.workflows import refusal, run, step, workflow

scene = render_scene(5, resolution_wh=(320, 240), names=["dog", "red circle"], style="plain")
refused = {name: refusal(workflow(step(name, class_names="dog"))) for name in ("detect", "point", "track")}
(asked,) = run(workflow(step("query", question="Is there a dog?")), scene.image[..., ::-1].copy(), serialize=True)
(said,) = run(workflow(step("caption", length="short")), scene.image[..., ::-1].copy(), serialize=True)
print(json.dumps({"refused": refused, "answer": asked["answer"], "caption": said["caption"]}))
"""


def test_what_gives_detections_is_refused(tmp_path: Path) -> None:
    said = said_by(PROGRAM, str(tmp_path), ENABLE_TENSOR_DATA_REPRESENTATION="True")
    assert set(said["refused"]) == {"detect", "point", "track"}
    for message in said["refused"].values():
        assert "unset ENABLE_TENSOR_DATA_REPRESENTATION" in message
    assert said["answer"] == "yes"
    assert "dog" in said["caption"]
