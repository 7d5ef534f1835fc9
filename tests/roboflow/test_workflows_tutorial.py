"""The code of `docs/tutorials/workflows.md` runs from top to bottom, prints the shown output and draws the picture."""

from __future__ import annotations

import io
import re
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from moondream_cv import Detector
from moondream_cv.cli.demo_clip import track_clip
from moondream_cv.cli.demo_scenes import PLANS, RESOLUTION_WH
from moondream_cv.engine.local_model import LocalModel
from moondream_cv.scenes import render_scene
from tests.helpers.roboflow_app import skip_without_server

pytestmark = pytest.mark.roboflow
skip_without_server()

DOCS = Path(__file__).parents[2] / "docs"
BLOCKS = re.findall(
    r"^```(python|text)\n(.*?)^```$", (DOCS / "tutorials" / "workflows.md").read_text(), re.DOTALL | re.MULTILINE
)


def test_tutorial_runs_from_top_to_bottom(tiny: LocalModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Write the files of `moondream-cv demo` that the page uses
    monkeypatch.chdir(tmp_path)
    street = PLANS[1]
    track_clip(Detector(tiny), tmp_path / "demo")
    image = render_scene(street.seed, resolution_wh=RESOLUTION_WH, names=street.names).image
    Image.fromarray(image).save("demo/2-street.png")

    # Run the blocks, and compare their output
    names: dict[str, Any] = {"__name__": "reader"}
    printed, compared = "", 0
    for language, code in BLOCKS:
        if language == "python":
            with redirect_stdout(io.StringIO()) as output:
                exec(compile(code, "workflows.md", "exec"), names)
            printed = output.getvalue()
        else:
            assert printed == code
            compared += 1
    assert compared == 2

    # Compare the picture
    drawn, shown = (
        np.asarray(Image.open(path), dtype=np.int16)
        for path in ("workflow.jpg", DOCS / "images" / "tutorial-workflows.jpg")
    )
    assert drawn.shape == shown.shape
    assert (np.abs(drawn - shown).max(axis=2) > 64).mean() < 0.001
