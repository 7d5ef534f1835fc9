"""Test that the code of `docs/workflows.md` and `examples/workflow_video.py` runs with the tiny model.

The code of the page runs unchanged, except for the model, the class names and the URL of the server.
"""

from __future__ import annotations

import io
import json
import re
import runpy
from contextlib import redirect_stdout
from pathlib import Path

import cv2
import numpy as np
import pytest

from moondream_cv.engine.local_model import LocalModel
from moondream_cv.scenes import render_clip
from tests.helpers.clips import write_clip
from tests.helpers.line_crossings import true_crossings
from tests.helpers.roboflow_app import skip_without_server
from tests.helpers.workflows import run_workflow, workflow

pytestmark = pytest.mark.roboflow
skip_without_server()

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "workflows.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
FRAMES = 12


@pytest.fixture(autouse=True)
def _reader(tmp_path: Path, bgr: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """Change to a folder with the files that the page uses."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "blocks").symlink_to(ROOT / "blocks")
    cv2.imwrite("street.jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, 98])
    clip = render_clip(1, num_frames=FRAMES, names=["dog", "red circle", "dog"], resolution_wh=(320, 240))
    write_clip(tmp_path / "street.mp4", (rgb[..., ::-1] for rgb, _ in clip))


def run_code(code: str, server: str = "") -> str:
    """Run a code block of the page and return its output."""
    for original, replacement in (
        ("moondream2", "tiny"),
        ('["person", "car"]', '["dog", "bus"]'),
        ("http://localhost:9001", server),
    ):
        code = code.replace(original, replacement or original)
    out = io.StringIO()
    with redirect_stdout(out):
        exec(compile(code, "docs/workflows.md", "exec"), {"__name__": "page"})
    return out.getvalue()


def test_page_has_three_code_blocks() -> None:
    assert len(BLOCKS) == 3


def test_code_for_the_engine_runs(bgr: np.ndarray) -> None:
    output = run_code(BLOCKS[0])
    assert "dog" in output
    assert "bus" in output
    annotated = cv2.imread("annotated.jpg")
    assert annotated is not None
    assert annotated.shape == bgr.shape
    assert np.abs(annotated.astype(int) - bgr).max() > 100


def test_code_for_a_video_runs() -> None:
    lines = run_code(BLOCKS[1]).splitlines()
    assert [int(line.split()[0]) for line in lines] == list(range(1, FRAMES + 1))
    assert all(line.split()[1:] == ["2"] for line in lines)  # two dogs and no error


def test_code_for_the_server_runs(url: str, tiny: LocalModel) -> None:
    output = run_code(BLOCKS[2], url)
    assert "'class': 'dog'" in output
    assert "'class': 'bus'" in output


def test_page_lists_all_sample_workflows() -> None:
    listed = set(re.findall(r"\.\./blocks/workflows/(\w+\.json)\)", PAGE))
    assert listed == {path.name for path in (ROOT / "blocks" / "workflows").glob("*.json")}


def test_page_lists_all_fields_and_outputs() -> None:
    from moondream_cv_blocks import load_blocks

    for block in load_blocks():
        manifest = block.get_manifest()
        (kind,) = manifest.model_fields["type"].annotation.__args__
        (row,) = re.findall(rf"^\| `{kind}` \|(.*)\|(.*)\|$", PAGE, re.MULTILINE)
        fields = set(manifest.model_fields) - {"type", "name", "images", "model"}
        outputs = {output.name for output in manifest.describe_outputs()} - {"error_status", "error_message"}
        assert set(re.findall(r"`(\w+)`", row[0])) == fields
        assert set(re.findall(r"`(\w+)`", row[1])) == outputs


def test_step_of_the_readme_runs(bgr: np.ndarray) -> None:
    readme = (ROOT / "README.md").read_text()
    (found,) = re.findall(r"```json\n(.*?)```", readme, re.DOTALL)
    (outputs,) = run_workflow(workflow(json.loads(found) | {"model": "tiny", "class_names": ["dog"]}), bgr)
    assert outputs["predictions"].data["class_name"].tolist() == ["dog"]


def test_example_counts_crossings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["workflow_video.py", "--output", "counted.mp4"])
    out = io.StringIO()
    with redirect_stdout(out):
        example = runpy.run_path(str(ROOT / "examples" / "workflow_video.py"), run_name="__main__")
    clip = render_clip(3, num_frames=150, names=example["NAMES"], resolution_wh=(640, 360))
    (counts,) = re.findall(r"^(\d+) in, (\d+) out", out.getvalue())
    assert tuple(map(int, counts)) == true_crossings(clip, 320)
    assert sum(map(int, counts)) > 0
    frames = cv2.VideoCapture("counted.mp4")
    assert int(frames.get(cv2.CAP_PROP_FRAME_COUNT)) == 150
    assert frames.read()[1].shape == (360, 640, 3)
