"""Draw the pictures of docs/tutorials from the results of the code on these pages.

    PYTHONPATH=. python scripts/make_tutorial_images.py            # all pictures except workflows, about two minutes
    PYTHONPATH=. python scripts/make_tutorial_images.py images     # one picture
    PYTHONPATH=. .venv-roboflow/bin/python scripts/make_tutorial_images.py workflows

The pictures of labeling and serving are screenshots and need Chromium and Playwright. `workflows` needs Roboflow's
engine, from the environment that `make venv-roboflow` creates.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from docs_images import IMAGES, draw_grid, read_picture, save_picture, selected_pictures
from PIL import Image
from typer.testing import CliRunner

from moondream_cv import Detector
from moondream_cv.cli import app
from moondream_cv.cli.demo_clip import sample_frames, track_clip
from moondream_cv.cli.demo_scenes import PLANS, RESOLUTION_WH
from moondream_cv.drawing import annotate
from moondream_cv.scenes import render_scene

DOCS = Path(__file__).resolve().parents[1] / "docs"
REAL_MODEL = "## The same with the real model"  # heading of the section that needs a download


@contextlib.contextmanager
def reader_folder() -> Iterator[Path]:
    """Change to a temporary folder with the images and the clip of `moondream-cv demo`."""
    before, finetunes = Path.cwd(), os.environ.get("MOONDREAM_CV_FINETUNES")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "demo").mkdir()
        for number, plan in enumerate(PLANS, 1):
            scene = render_scene(plan.seed, resolution_wh=RESOLUTION_WH, names=plan.names)
            Image.fromarray(scene.image).save(folder / "demo" / f"{number}-{plan.title}.png")
        track_clip(Detector("tiny"), folder / "demo")
        os.environ["MOONDREAM_CV_FINETUNES"] = str(folder / "finetunes")
        os.chdir(folder)
        try:
            yield folder
        finally:
            os.chdir(before)
            os.environ.pop("MOONDREAM_CV_FINETUNES")
            if finetunes is not None:
                os.environ["MOONDREAM_CV_FINETUNES"] = finetunes


def run_tutorial(name: str, until: str | None = None) -> dict[str, Any]:
    """Run the Python code and the commands of a tutorial in the current folder, and return the Python names.

    Args:
        name: Name of the page without `.md`.
        until: File after which to stop; None runs all steps with the tiny model.
    """
    page = (DOCS / "tutorials" / f"{name}.md").read_text(encoding="utf-8").partition(REAL_MODEL)[0]
    names: dict[str, Any] = {"__name__": "reader"}
    for language, code in re.findall(r"^```(python|sh)\n(.*?)^```$", page, re.DOTALL | re.MULTILINE):
        if until is not None and Path(until).exists():
            break
        if language == "python":
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(code, f"{name}.md", "exec"), names)
            continue
        for line in code.replace("\\\n", " ").splitlines():
            if line.startswith("moondream-cv ") and line != "moondream-cv demo":
                result = CliRunner().invoke(app, shlex.split(line)[1:])
                if result.exit_code:
                    raise SystemExit(f"{line}\n{result.stderr}")
    return names


def draw_images() -> Image.Image:
    """Return the image that the command `detect` writes."""
    run_tutorial("images", until="found.png")
    return read_picture("found.png")


def draw_video() -> Image.Image:
    """Return four frames of the clip with tracks, a line and counts."""
    run_tutorial("video", until="counted.mp4")
    frames = [image for _, image in sample_frames(Path("counted.mp4"), 4)]
    return draw_grid([frames[:2], frames[2:]], [], width=560)


def draw_redaction() -> Image.Image:
    """Return three frames of the clip before and after redaction."""
    run_tutorial("redaction", until="blurred.mp4")
    rows = [[image for _, image in sample_frames(Path(name), 3)] for name in ("demo/clip.mp4", "blurred.mp4")]
    return draw_grid(rows, [["demo/clip.mp4"], ["blurred.mp4"]], width=370)


def draw_fine_tuning() -> Image.Image:
    """Return held-out images with the arrows that the base model and the adapter detect."""
    names = run_tutorial("fine-tuning")
    paths = names["paths"][:12:4]
    rows = [
        [annotate(read_picture(path), found) for path, found in zip(paths, detector(paths, "arrow"), strict=True)]
        for detector in (names["before"], names["after"])
    ]
    return draw_grid(rows, [["Base model"], ["With the adapter"]], width=370)


def draw_labeling() -> Image.Image:
    """Return the upper part of the report of the labeling tutorial."""
    from tests.helpers.browser import chromium

    run_tutorial("labeling", until="dataset/report.html")
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1000, "height": 1400})
        page.goto(Path("dataset/report.html").resolve().as_uri())
        return read_picture(page.screenshot())


def draw_serving(port: int = 2020) -> Image.Image:
    """Return the playground with a result.

    Args:
        port: Free port for the server, which the picture shows.
    """
    from tests.helpers.browser import ask, chromium, upload
    from tests.helpers.serve_process import ServeProcess

    server = ServeProcess("--model", "tiny", port=port)
    try:
        server.wait_until_ready()
        with chromium() as browser:
            page = browser.new_page(viewport={"width": 1280, "height": 800})
            page.goto(f"http://localhost:{port}")
            upload(page, Path("demo/2-street.png").read_bytes(), "2-street.png")
            ask(page, "detect", "car, bus, bicycle")
            return read_picture(page.screenshot())
    finally:
        server.process.kill()
        server.process.wait()


def draw_workflows() -> Image.Image:
    """Return the image that the workflow draws."""
    from tests.helpers.roboflow_app import prepare

    prepare(Path("cache"))
    run_tutorial("workflows", until="workflow.jpg")
    return read_picture("workflow.jpg")


PICTURES: dict[str, Callable[[], Image.Image]] = {
    "images": draw_images,
    "video": draw_video,
    "redaction": draw_redaction,
    "fine-tuning": draw_fine_tuning,
    "labeling": draw_labeling,
    "serving": draw_serving,
    "workflows": draw_workflows,
}


def picture_path(name: str) -> Path:
    """Return the path of a picture in the repository."""
    return IMAGES / f"tutorial-{name}.jpg"


def main() -> None:
    """Draw the pictures that the arguments name, or all except workflows."""
    for name in selected_pictures(PICTURES, skipped="workflows"):
        with reader_folder():
            save_picture(PICTURES[name](), picture_path(name))


if __name__ == "__main__":
    main()
