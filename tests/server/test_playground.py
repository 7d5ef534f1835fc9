"""The playground in a real browser with a real server. Run with `pytest tests/server/test_playground.py`.

It needs Chromium and Playwright for Python. Without them, the tests are skipped, or fail if `CI` is set.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

from moondream_cv.engine.local_model import LocalModel
from moondream_cv.loading import load
from moondream_cv.requests import DetectedObject, DetectResult, Request, Result
from tests.helpers.browser import (
    ask,
    chromium,
    copied,
    encoded,
    rectangles,
    transfer,
    upload,
    visiting,
    wait_until_done,
)
from tests.helpers.served import Served, served

ROOT = Path(__file__).parents[2]
Open = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as running:
        yield running


@pytest.fixture
def visit(browser: Any) -> Iterator[Open]:
    """Opens the page of a server. At the end, checks requests to other sites and script errors."""
    with visiting(browser) as visit:
        yield visit


@pytest.fixture
def page(visit: Open, server: Served) -> Any:
    return visit(server)


@pytest.fixture(scope="module")
def png(scene_image: Image.Image) -> bytes:
    return encoded(scene_image, "PNG")


def expected(page: Any, objects: Sequence[dict[str, float]]) -> Any:
    """Return the expected rectangles of objects, in the format of `rectangles`."""
    _, _, width, height = rectangles(page, "#image")[0]
    keys = ("x_min", "y_min", "x_max", "y_max")
    return np.clip([[found[key] for key in keys] for found in objects], 0, 1) * (width, height, width, height)


def test_page_shows_the_model_and_its_skills(page: Any, server: Served, tiny: LocalModel) -> None:
    page.locator(".lamp.ready").wait_for()
    assert page.title() == "tiny · moondream-cv"
    assert page.locator("#model").inner_text() == "tiny"
    assert page.locator("#skills").inner_text() == " · ".join(sorted(tiny.skills))
    assert page.locator("input[name=task]:disabled").count() == 0


def test_headers_allow_only_the_page(server: Served) -> None:
    answer = server.client.get("/")
    policy = dict(rule.split(" ", 1) for rule in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert policy["script-src"].startswith("'sha256-")
    assert policy["style-src"].startswith("'sha256-")
    assert answer.headers["x-frame-options"] == "DENY"
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert re.findall(r"\{\{\w+}}", answer.text) == []
    again = server.client.get("/", headers={"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


def test_icon_is_served(server: Served) -> None:
    answer = server.client.get("/favicon.ico")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/svg+xml")


def test_page_can_be_disabled(tiny: LocalModel) -> None:
    with served(tiny, page=False) as running:
        assert running.client.get("/").status_code == 404


@pytest.mark.parametrize(
    ("format", "mime", "options", "orientation", "sent_as_it_is"),
    [
        ("PNG", "image/png", {}, 1, True),
        ("JPEG", "image/jpeg", {"quality": 95}, 1, True),
        ("JPEG", "image/jpeg", {"quality": 95}, 6, True),
        ("WEBP", "image/webp", {"lossless": True}, 1, True),
        ("GIF", "image/gif", {}, 1, False),
    ],
)
def test_boxes_are_drawn_at_the_detected_positions(
    page: Any,
    tiny: LocalModel,
    scene_image: Image.Image,
    format: str,
    mime: str,
    options: dict[str, Any],
    orientation: int,
    sent_as_it_is: bool,
) -> None:
    if orientation == 6:  # the image is rotated, with the orientation in EXIF
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        scene_image, options = scene_image.transpose(Image.Transpose.ROTATE_90), {**options, "exif": exif}
    content = encoded(scene_image, format, **options)
    upload(page, content, f"scene.{format.lower()}", mime)
    ask(page, "detect", "red circle, heart, cat, blue square")
    found = {name: tiny.detect(content, name)["objects"] for name in ("red circle", "heart", "cat", "blue square")}
    assert [len(objects) for objects in found.values()] == [1, 0, 1, 1]
    objects = [one for several in found.values() for one in several]
    np.testing.assert_allclose(rectangles(page, ".box"), expected(page, objects), atol=1)
    tags = [f"{name} {one['confidence']:.2f}" for name, several in found.items() for one in several]
    assert page.locator(".tag").all_inner_texts() == tags
    assert page.locator(".count").all_inner_texts() == ["1", "0", "1", "1"]
    assert page.locator("#status").inner_text() == "3 objects"
    colors = page.locator(".box").evaluate_all("(all) => all.map((box) => getComputedStyle(box).borderColor)")
    assert len(set(colors)) == 3
    assert page.locator("#sent").is_hidden() == sent_as_it_is


def test_points_are_drawn_at_the_detected_positions(page: Any, tiny: LocalModel, png: bytes) -> None:
    upload(page, png)
    ask(page, "point", "blue square")
    points = tiny.point(png, "blue square")["points"]
    _, _, width, height = rectangles(page, "#image")[0]
    drawn = np.asarray(rectangles(page, ".dot"))
    np.testing.assert_allclose(
        (drawn[:, :2] + drawn[:, 2:]) / 2, [[p["x"] * width, p["y"] * height] for p in points], atol=1
    )
    assert page.locator("#status").inner_text() == "1 point"


def test_answer_is_shown(page: Any, tiny: LocalModel, png: bytes) -> None:
    question = "How many blue squares are there?"
    upload(page, png)
    ask(page, "query", question)
    answer = tiny.query(png, question, settings={"temperature": 0})["answer"]
    assert page.locator("#answer").inner_text() == answer.strip() != ""
    assert page.locator("#reasoning-result").is_hidden()
    assert re.fullmatch(r"[\d.]+ m?s · first word after [\d.]+ m?s", page.locator("#timing").inner_text())


def test_reasoning_is_shown(page: Any, tiny: LocalModel, png: bytes) -> None:
    question = "How many blue squares are there?"
    upload(page, png)
    page.locator("input[value=query]").check()
    page.locator("#reasoning").check()
    ask(page, "query", question)
    reply = tiny.query(png, question, reasoning=True, settings={"temperature": 0})
    assert page.locator("#reasoning-text").inner_text() == reply["reasoning"]["text"].strip() != ""
    assert page.locator("#answer").inner_text() == reply["answer"].strip()


def test_caption_is_streamed(page: Any, tiny: LocalModel, png: bytes) -> None:
    upload(page, png)
    page.evaluate(
        """() => {
            window.added = [];
            const note = (records) => records.forEach((r) => r.addedNodes.forEach((n) => added.push(n.textContent)));
            new MutationObserver(note).observe(document.getElementById("answer"), {childList: true});
        }"""
    )
    ask(page, "caption")
    caption = tiny.caption(png, settings={"temperature": 0})["caption"]
    added = page.evaluate("window.added")
    assert len(added) > 5
    assert "".join(added).strip() == page.locator("#answer").inner_text() == caption.strip()
    assert page.locator(".streaming").count() == 0


@pytest.mark.parametrize("way", ["drop", "paste"])
def test_image_can_be_dropped_and_pasted(page: Any, png: bytes, way: str) -> None:
    handle = transfer(page, png, "dropped.png", "image/png")
    page.evaluate(
        """([transfer, way]) => document.body.dispatchEvent(
            way === "drop" ? new DragEvent("drop", {dataTransfer: transfer, bubbles: true, cancelable: true})
                : new ClipboardEvent("paste", {clipboardData: transfer, bubbles: true, cancelable: true}))""",
        [handle, way],
    )
    page.locator("#file-name", has_text="dropped.png").wait_for()
    ask(page, "detect", "red circle")
    assert page.locator(".box").count() == 1


def test_example_can_be_detected_filtered_and_saved(page: Any) -> None:
    page.locator("#example").click()
    page.locator("#save").wait_for(state="visible")
    page.locator("#prompt").press("Enter")
    wait_until_done(page)
    tags = page.locator(".tag").all_inner_texts()
    assert [tag.rsplit(" ", 1)[0] for tag in tags] == ["red circle", "blue square", "blue square"]
    scores = sorted({float(tag.rsplit(" ", 1)[1]) for tag in tags})
    page.locator("#threshold").fill(f"{(scores[0] + scores[-1]) / 2:.2f}")
    assert 0 < page.locator(".box").count() < 3
    assert any(" of " in count for count in page.locator(".count").all_inner_texts())
    assert "confidence=" in page.locator("#code").inner_text()
    with page.expect_download() as download:
        page.locator("#save").click()
    assert Image.open(download.value.path()).size == (640, 480)


def test_missing_input_shows_an_error(page: Any, png: bytes) -> None:
    error = page.locator("#error")
    page.locator("#run").click()
    assert "Choose an image" in error.inner_text()
    upload(page, b"not an image", "notes.txt", "text/plain")
    page.locator("#error", has_text="notes.txt is not an image").wait_for()
    upload(page, png)
    error.wait_for(state="hidden")
    page.locator("#run").click()
    assert error.inner_text() == "Enter the objects to find."
    page.locator("input[value=query]").check()
    page.locator("#run").click()
    assert error.inner_text() == "Enter a question."


def test_server_errors_are_shown(page: Any, png: bytes) -> None:
    upload(page, png)
    ask(page, "query", "x" * 3000)
    assert re.fullmatch(r"[A-Z].+\(4\d\d\)", page.locator("#error").inner_text())
    assert "failed after" in page.locator("#timing").inner_text()


def test_oversized_file_is_scaled_down(visit: Open, tiny: LocalModel) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (500, 2500, 3), np.uint8))
    with served(tiny, max_body=2_000_000) as running:
        page = visit(running)
        upload(page, encoded(noise, "PNG", compress_level=0), "noise.png")
        page.locator("#sent", has_text="2048 × 410").wait_for()
        ask(page, "detect", "red circle")
        assert page.locator("#error").is_hidden()
        assert page.locator("#file-name").inner_text() == "noise-sent.jpg"


def test_api_key_is_requested_and_kept_in_the_tab(visit: Open, tiny: LocalModel, png: bytes, tmp_path: Path) -> None:
    with served(tiny, api_keys=("k-secret",)) as running:
        page = visit(running)
        page.locator("#error", has_text="requires an API key").wait_for()
        upload(page, png)
        page.locator("#prompt").fill("red circle")
        page.locator("#key").fill("wrong")
        page.locator("#key").press("Enter")
        page.locator("#error", has_text="API key is invalid").wait_for()
        page.locator("#key").fill("k-secret")
        page.locator("#key").press("Enter")
        page.locator(".box").wait_for()
        assert page.locator("#key-field").is_hidden()
        assert page.locator("#model").inner_text() == "tiny"
        assert "k-secret" in page.evaluate("Object.values(sessionStorage)")
        assert page.evaluate("localStorage.length + document.cookie.length") == 0
        assert 'os.environ["MOONDREAM_API_KEY"]' in page.locator("#code").inner_text()
        (tmp_path / "scene.png").write_bytes(png)
        for recipe in ("python", "client", "curl"):
            page.locator(f"input[value={recipe}]").check()
            out = run(copied(page), recipe, tmp_path, MOONDREAM_API_KEY="k-secret")
            assert len(printed(out, recipe)) == 1
        page.reload()
        page.locator(".lamp.ready").wait_for()
        assert "k-secret" not in page.content()


RECIPES = [
    # recipe, task, prompt
    ("python", "detect", "red circle, blue square, cat"),
    ("python", "point", "blue square"),
    ("python", "query", 'How many "blue squares" are there? It\'s 100% \\ sure'),
    ("client", "detect", "blue square"),
    ("client", "caption", ""),
    ("curl", "detect", 'red circle, blue square, it\'s 100% \\ "odd"'),
    ("curl", "point", "blue square"),
    ("curl", "query", 'How many "blue squares" are there? It\'s 100% \\ sure'),
]


@pytest.mark.parametrize(("recipe", "task", "prompt"), RECIPES)
def test_copied_code_returns_the_same_results(
    page: Any, server: Served, tmp_path: Path, png: bytes, recipe: str, task: str, prompt: str
) -> None:
    """The file name and the prompts contain characters that are special in shells and Python.

    The tolerance covers the rounding to pixels on the page, and the JPEG conversion of Moondream's client.
    """
    name = 'the scene\'s 50% "best" $HOME.png'
    (tmp_path / name).write_bytes(png)
    upload(page, png, name)
    ask(page, task, prompt)
    page.locator(f"input[value={recipe}]").check()
    code = copied(page)
    assert server.url in code
    out = run(code, recipe, tmp_path)
    if task in ("query", "caption"):
        answer = page.locator("#answer").inner_text()
        assert answer
        assert answer == (json.loads(out)["answer"] if recipe == "curl" else out).strip()
        return
    shown = [[float(cell) for cell in row.split("\t")] for row in page.locator("tbody tr").all_inner_texts()]
    assert shown
    np.testing.assert_allclose(printed(out, recipe), shown, atol=1.5 if recipe == "client" else 0.51)


def run(code: str, recipe: str, folder: Path, **environment: str) -> str:
    """Run a recipe in a folder and return its output."""
    if recipe == "client":
        pytest.importorskip("moondream", reason="Moondream's client is not installed: pip install moondream")
    command = ["sh", "-c", code] if recipe == "curl" else [sys.executable, "-c", code]
    path = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **path, **environment}, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def printed(out: str, recipe: str) -> list[list[float]]:
    """Return the confidences and pixel coordinates in the output of a recipe, as in the table on the page."""
    if recipe == "python":
        lines = re.findall(r"\[([^]]+)\] (\S+)$", out, re.MULTILINE)
        return [[float(score), *map(float, place.split())] for place, score in lines]
    if recipe == "client":
        replies = [ast.literal_eval(text) for text in re.findall(r"\[.*\]$", out, re.MULTILINE)]
    else:
        replies = [
            next(reply[key] for key in ("objects", "points") if key in reply)
            for reply in map(json.loads, out.splitlines())
        ]
    return [
        [
            one["confidence"],
            *(value * (320 if key.startswith("x") else 240) for key, value in one.items() if key != "confidence"),
        ]
        for reply in replies
        for one in reply
    ]


class BlockingModel:
    """A model that supports only detection, has no scores, and blocks until `released` is set."""

    skills = frozenset({"detect"})
    has_scores = False

    def __init__(self) -> None:
        self.asked, self.released = threading.Event(), threading.Event()

    def run(self, requests: Sequence[Request]) -> list[Result]:
        return [DetectResult(tuple(self.stream(request))) for request in requests]

    def stream(self, request: Request) -> Iterator[DetectedObject]:
        self.asked.set()
        assert self.released.wait(240)
        yield DetectedObject(0.25, 0.25, 0.5, 0.5)

    def close(self) -> None:
        pass


@pytest.mark.parametrize("way", ["click", "Escape"])
def test_run_can_be_cancelled_and_unsupported_tasks_are_disabled(visit: Open, png: bytes, way: str) -> None:
    model = BlockingModel()
    with served(model) as running:
        page = visit(running)
        page.locator(".lamp.ready").wait_for()
        disabled = page.locator("input[name=task]:disabled").evaluate_all("(all) => all.map((one) => one.value)")
        assert disabled == ["point", "query", "caption"]
        upload(page, png)
        page.locator("#prompt").fill("dog, cat")
        page.locator("#prompt").press("Enter")
        assert model.asked.wait(240)
        try:
            if way == "click":
                page.locator("#cancel").click()
            else:
                page.keyboard.press("Escape")
            wait_until_done(page)
            assert page.locator("#timing").inner_text().startswith("cancelled after ")
            assert page.locator("#status").inner_text() == "Cancelled"
            assert page.locator("#error").is_hidden()
        finally:
            model.released.set()
        page.locator("#prompt").press("Enter")
        page.locator("#status", has_text="2 objects").wait_for()
        assert page.locator(".tag").all_inner_texts() == ["dog", "cat"]
        assert page.locator("#threshold-field").is_hidden()


class NonStreamingModel:
    """A minimal `VisionModel`, which cannot stream."""

    skills = frozenset({"detect"})
    has_scores = False

    def run(self, requests: Sequence[Request]) -> list[Result]:
        return [DetectResult((DetectedObject(0.25, 0.25, 0.5, 0.5),)) for _ in requests]

    def close(self) -> None:
        pass


def test_results_of_a_model_without_streaming_are_shown(visit: Open, png: bytes) -> None:
    with served(NonStreamingModel()) as running:
        page = visit(running)
        upload(page, png)
        ask(page, "detect", "dog")
        assert page.locator(".tag").all_inner_texts() == ["dog"]


def test_page_waits_for_a_loading_model(visit: Open) -> None:
    go = threading.Event()

    def load_late() -> LocalModel:
        assert go.wait(240)
        return load("tiny")

    with served(load_late) as running:
        try:
            page = visit(running)
            page.locator("#skills", has_text="loading").wait_for()
        finally:
            go.set()
        page.locator(".lamp.ready").wait_for()


@pytest.mark.parametrize(("width", "scheme"), [(360, "light"), (360, "dark"), (2560, "light")])
def test_layout_fits_narrow_and_wide_screens(visit: Open, server: Served, width: int, scheme: str) -> None:
    page = visit(server, viewport={"width": width, "height": 740}, color_scheme=scheme)
    page.locator("#example").click()
    ask(page, "detect", f"red circle, blue square, {'unending' * 30}")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    frame, *tags = rectangles(page, "#overlay") + rectangles(page, ".tag")
    assert len(tags) == 3
    for tag in tags:
        assert tag[0] >= frame[0] - 0.5
        assert tag[1] >= frame[1] - 0.5
        assert tag[2] <= frame[2] + 0.5
        assert tag[3] <= frame[3] + 0.5


def test_run_waits_for_the_example(page: Any) -> None:
    page.evaluate(
        """() => {
          const toBlob = HTMLCanvasElement.prototype.toBlob;
          const released = new Promise((resolve) => { window.release = resolve; });
          HTMLCanvasElement.prototype.toBlob = function (...given) { released.then(() => toBlob.apply(this, given)); };
        }"""
    )
    page.locator("#example").click()
    page.locator("#run").click()
    page.evaluate("release()")
    wait_until_done(page)
    assert page.locator("#error").is_hidden()
    assert page.locator(".tag").count() > 0


def test_names_are_inserted_as_text(page: Any, png: bytes) -> None:
    hostile = "<img src=x onerror=alert(1)> <script>alert(2)</script>"
    upload(page, png, f"{hostile.replace('/', '_')}.png")
    before = page.locator("img, script").count()
    ask(page, "detect", f"{hostile}, red circle")
    assert page.locator(".name").all_inner_texts() == [hostile, "red circle"]
    assert hostile in page.locator("#code").inner_text()
    assert page.locator("img, script").count() == before
