"""examples/client.mjs in Node, with a server of the tiny model."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from moondream_cv import load
from moondream_cv.scenes import render_scene
from tests.helpers.serve_process import free_port
from tests.helpers.served import Served, served

CLIENT = Path(__file__).parents[2] / "examples" / "client.mjs"
KEY = "example-key"

pytestmark = pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    model = load("tiny", device="cpu")
    with served(model, api_keys=(KEY,)) as running:
        running.client.headers["Authorization"] = f"Bearer {KEY}"
        yield running
    model.close()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    Image.fromarray(render_scene(3, names=["dog", "dog", "red circle"]).image).save(tmp_path / "scene.png")
    return tmp_path / "scene.png"


def run_client(*arguments: str, key: str = KEY) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "MOONDREAM_API_KEY": key}
    command = ["node", str(CLIENT), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


def test_client_prints_the_boxes_and_the_caption_of_the_server(server: Served, image: Path) -> None:
    model = load("tiny", device="cpu")
    objects, caption = model.detect(image, "dog")["objects"], model.caption(image, length="short")["caption"]
    model.close()

    result = run_client(str(image), "dog", server.url)
    assert (result.returncode, result.stderr) == (0, "")
    first, *boxes, text = result.stdout.splitlines()
    assert first == "dog: 2 found"
    printed = [tuple(map(float, line.split())) for line in boxes]
    expected = [tuple(found[key] for key in ("x_min", "y_min", "x_max", "y_max", "confidence")) for found in objects]
    assert [pytest.approx(box, abs=0.006) for box in expected] == printed
    assert len(printed) == 2
    assert text == caption


def test_client_reports_errors_without_a_stack_trace(server: Served, image: Path) -> None:
    broken = image.with_name("broken.png")
    broken.write_text("no image")
    closed = f"http://localhost:{free_port()}"
    for result, expected in (
        (run_client(), "Usage: node examples/client.mjs IMAGE CLASS [URL]"),
        (run_client(str(image), "dog", closed), f"{closed} cannot be reached (ECONNREFUSED); start moondream-cv serve"),
        (run_client(str(image), "dog", server.url, key="wrong"), "missing or invalid API key"),
        (run_client(str(broken), "dog", server.url), "is not an image in a supported format"),
    ):
        assert (result.returncode, result.stdout) == (1, "")
        assert expected in result.stderr
        assert len(result.stderr.splitlines()) == 1
