"""Pages in a real browser, for tests of what they show and do. It needs Chromium and Playwright for Python."""

from __future__ import annotations

import base64
import contextlib
import io
import os
import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import pytest
from PIL import Image

from tests.helpers.served import Served

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """A headless browser. Without one the test skips, or fails where `CI` is set."""
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        lacking(f"there is no {', '.join(BROWSERS)} on the path")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        lacking("Playwright is not installed: pip install playwright")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


def lacking(reason: str) -> NoReturn:
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@contextlib.contextmanager
def visiting(browser: Any) -> Iterator[Callable[..., Any]]:
    """Gives a function that opens the page of a server; what else it is given are options of Playwright's context.

    At the end no page may have asked for anything elsewhere, opened a dialog, or failed in a script.
    """
    contexts: list[Any] = []
    wrong: list[str] = []

    def visit(server: Served, **options: Any) -> Any:
        context = browser.new_context(permissions=["clipboard-read", "clipboard-write"], **options)
        contexts.append(context)
        context.set_default_timeout(240_000)
        page = context.new_page()
        own = (f"{server.url}/", "data:", f"blob:{server.url}/")
        page.on("request", lambda request: None if request.url.startswith(own) else wrong.append(request.url))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
        page.on("console", lambda said: wrong.append(said.text) if is_failure(said) else None)
        page.goto(server.url)
        return page

    try:
        yield visit
    finally:
        for context in contexts:
            context.close()
    assert wrong == []


def is_failure(said: Any) -> bool:
    """Whether the console speaks of more than a status that the page itself explains."""
    return said.type in ("error", "warning") and not said.text.startswith("Failed to load resource")


def encoded(picture: Image.Image, format: str, **options: Any) -> bytes:
    """An image as a file; the options are Pillow's."""
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


def upload(page: Any, content: bytes, name: str = "scene.png", mime: str = "image/png") -> None:
    """Choose a file."""
    page.set_input_files("#file", {"name": name, "mimeType": mime, "buffer": content})


def ask(page: Any, task: str, prompt: str = "") -> None:
    """Choose a task, type a prompt, press Enter, and wait until it is done."""
    page.locator(f"input[value={task}]").check()
    if prompt:
        page.locator("#prompt").fill(prompt)
        page.locator("#prompt").press("Enter")
    else:
        page.locator("#run").click()
    settled(page)


def settled(page: Any) -> None:
    """Wait until nothing runs any more."""
    page.locator("#timing", has_text=re.compile(r"\d")).wait_for()
    page.locator("#run").wait_for(state="visible")


def rectangles(page: Any, selector: str) -> list[list[float]]:
    """Left, top, right and bottom of elements, in CSS pixels from the image's corner."""
    measure = "(all) => all.map((e) => e.getBoundingClientRect()).map((r) => [r.left, r.top, r.right, r.bottom])"
    x, y, *_ = page.locator("#image").evaluate_all(measure)[0]
    return [
        [left - x, top - y, right - x, bottom - y]
        for left, top, right, bottom in page.locator(selector).evaluate_all(measure)
    ]


def transfer(page: Any, content: bytes, name: str, mime: str) -> Any:
    """What a drop or a paste of a file carries."""
    make = """([text, name, type]) => {
        const transfer = new DataTransfer();
        transfer.items.add(new File([Uint8Array.from(atob(text), (c) => c.charCodeAt(0))], name, {type}));
        return transfer;
    }"""
    return page.evaluate_handle(make, [base64.b64encode(content).decode(), name, mime])


def copied(page: Any) -> str:
    """What the copy button puts into the clipboard."""
    page.locator("#copy").click()
    page.locator("#copy", has_text="Copied").wait_for()
    text = page.evaluate("navigator.clipboard.readText()")
    assert isinstance(text, str)
    return text
