"""Draw the pictures of docs/examples.md: run examples with the tiny model on a rendered scene and a rendered clip.

    python scripts/make_example_images.py                                       # all pictures except Gradio
    .venv-newest/bin/python scripts/make_example_images.py example-gradio.png    # Gradio comes from `make test-newest`

The picture of Gradio also requires Chromium.
"""

from __future__ import annotations

import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import httpx
import numpy as np
from docs_images import IMAGES, read_picture, save_picture, selected_pictures
from PIL import Image

from moondream_cv.scenes import render_clip, render_scene
from moondream_cv.scenes.objects import paint, stamp
from moondream_cv.video import open_source

ROOT = Path(__file__).resolve().parents[1]
FRAMES = (40, 116)  # frames of the clip in the picture
TOOLBAR = ("house", "red arrow", "book", "key", "blue star", "clock")
URL = "http://127.0.0.1:7861"


def draw_counting(folder: Path) -> Image.Image:
    """Return two frames of the video of rtsp_counting.py."""
    # Write a clip
    video, counted = folder / "clip.mp4", folder / "counted.mp4"
    clip = render_clip(3, num_frames=120, names=["car", "bus", "truck", "boat", "car"], resolution_wh=(640, 360))
    writer = cv2.VideoWriter(str(video), cv2.VideoWriter.fourcc(*"mp4v"), 30, (640, 360))
    for rgb, _ in clip.frames():
        writer.write(cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR))
    writer.release()

    # Run the example
    options = ["--line", "0.5", "0.95", "0.5", "0.05", "--model", "tiny", "--output", str(counted)]
    sys.argv = ["rtsp_counting.py", str(video), "car", "bus", "truck", "boat", *options]
    runpy.run_path(str(ROOT / "examples" / "rtsp_counting.py"), run_name="__main__")

    # Join two frames
    with open_source(counted) as source:
        first, second = (frame.image[..., ::-1] for frame in source if frame.index in FRAMES)
    gap = np.full((len(first), 8, 3), 255, np.uint8)
    return Image.fromarray(np.hstack([first, gap, second]))


def draw_screenshot(folder: Path) -> Image.Image:
    """Return the marked screenshot of gui_grounding.py: a window with a toolbar."""
    # Draw a window
    image = np.full((300, 640, 3), 246, np.uint8)
    image[:36], image[36:104] = (70, 80, 96), (226, 230, 236)
    image[124:280, 20:620] = 255
    rng = np.random.default_rng(0)
    for column, name in enumerate(TOOLBAR):
        stamp(image, paint(name, 44, rng, varied=False), 40 + 96 * column, 48)
    for row in range(140, 270, 24):
        image[row : row + 8, 40 : int(rng.integers(300, 600))] = 214
    screenshot = folder / "screenshot.png"
    Image.fromarray(image).save(screenshot)

    # Run the example
    output = str(folder / "marked.png")
    sys.argv = ["gui_grounding.py", str(screenshot), "key", "--model", "tiny", "--output", output]
    runpy.run_path(str(ROOT / "examples" / "gui_grounding.py"), run_name="__main__")
    return read_picture(output)


def draw_gradio(folder: Path) -> Image.Image:
    """Return a screenshot of the page of gradio_demo.py after a detection."""
    from playwright.sync_api import sync_playwright

    # Start the example
    scene = folder / "scene.png"
    Image.fromarray(
        render_scene(3, names=["dog", "dog", "red circle"], resolution_wh=(480, 360), style="plain").image
    ).save(scene)
    example = ROOT / "examples" / "gradio_demo.py"
    command = [sys.executable, str(example), "--model", "tiny", "--port", URL.rpartition(":")[2]]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        while not _is_ready():
            if process.poll() is not None:
                raise SystemExit(f"{example} ended with status {process.returncode}")
            time.sleep(0.1)

        # Use the page
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1100, "height": 660})
            page.goto(URL)
            page.set_input_files("input[type=file]", scene)
            page.get_by_label("class names or question").fill("dog, red circle")
            page.get_by_role("button", name="Submit").click()
            page.wait_for_function("document.querySelectorAll('textarea')[1].value === '3 found'")
            page.wait_for_load_state("networkidle")
            page.evaluate("window.scrollTo(0, 0)")
            screenshot = page.screenshot()
            browser.close()
        return read_picture(screenshot)
    finally:
        process.terminate()
        process.wait()


def _is_ready() -> bool:
    try:
        return httpx.get(URL).status_code == 200
    except httpx.TransportError:
        return False


PICTURES: dict[str, Callable[[Path], Image.Image]] = {
    "example-counting.jpg": draw_counting,
    "example-screenshot.png": draw_screenshot,
    "example-gradio.png": draw_gradio,
}


def main() -> None:
    """Draw the pictures that the arguments name, or all except Gradio."""
    for name in selected_pictures(PICTURES, skipped="example-gradio.png"):
        with tempfile.TemporaryDirectory() as folder:
            save_picture(PICTURES[name](Path(folder)), IMAGES / name)


if __name__ == "__main__":
    main()
