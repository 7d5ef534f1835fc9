"""The page of examples/gradio_demo.py, used by Gradio's client."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from moondream_cv import Detector, Pointer, load
from moondream_cv.drawing import annotate
from moondream_cv.engine.local_model import LocalModel
from moondream_cv.scenes import render_scene
from tests.helpers.serve_process import free_port
from tests.helpers.waiting import until

client = pytest.importorskip("gradio_client", reason="needs gradio (make test-newest)")

DEMO = Path(__file__).parents[2] / "examples" / "gradio_demo.py"

pytestmark = pytest.mark.compat


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Yield a client of the page, which runs in a process."""
    folder, port = tmp_path_factory.mktemp("gradio"), free_port()
    url = f"http://127.0.0.1:{port}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GRADIO_TEMP_DIR": str(folder)}
    command = [sys.executable, str(DEMO), "--model", "tiny", "--port", str(port)]

    def is_ready() -> bool:
        assert process.poll() is None, (folder / "log").read_text()
        try:
            return httpx.get(url).status_code == 200
        except httpx.TransportError:
            return False

    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            until(is_ready)
            yield client.Client(url, download_files=str(folder), verbose=False, analytics_enabled=False)
        finally:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def model() -> Iterator[LocalModel]:
    loaded = load("tiny", device="cpu")
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image") / "scene.png"
    Image.fromarray(render_scene(3, names=["dog", "dog", "red circle"]).image).save(path)
    return path


def run(page: Any, image: Path, skill: str, text: str = "") -> tuple[np.ndarray, str, int]:
    """Submit the form; return the pixels of the result, the answer, and the number of updates."""
    job = page.submit(client.handle_file(str(image)), skill, text, api_name="/run")
    shown, answer = job.result()
    path = shown if isinstance(shown, str) else job.outputs()[0][0]
    return np.array(Image.open(path).convert("RGB")), answer, len(job.outputs())


@pytest.mark.parametrize(("skill", "finder", "count"), [("Detect", Detector, 3), ("Point", Pointer, 2)])
def test_page_draws_the_objects(
    page: Any, image: Path, model: LocalModel, skill: str, finder: type[Detector], count: int
) -> None:
    pixels, answer, _ = run(page, image, skill, "dog, red circle")
    found = finder(model)(str(image), ["dog", "red circle"])
    assert answer == f"{len(found)} found" == f"{count} found"
    assert np.array_equal(pixels, annotate(Image.open(image), found))


def test_page_streams_answers_and_captions(page: Any, image: Path, model: LocalModel) -> None:
    _, answer, _ = run(page, image, "Query", "How many dogs are there?")
    assert answer == model.query(str(image), "How many dogs are there?")["answer"] == "2"
    pixels, caption, num_updates = run(page, image, "Caption")
    assert "dog" in caption
    assert num_updates > 2
    assert np.array_equal(pixels, Image.open(image).convert("RGB"))


def test_page_shows_the_messages_of_errors(page: Any, image: Path) -> None:
    with pytest.raises(Exception, match="must not be empty"):
        run(page, image, "Detect", "dog, ")
    with pytest.raises(Exception, match=r"Select an image\."):
        page.predict(None, "Detect", "dog", api_name="/run")
