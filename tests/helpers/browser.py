"""Helpers for tests of pages in a real browser. They need Chromium and Playwright for Python."""

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
    """Yield a headless browser. If there is none, skip the test, or fail it if `CI` is set."""
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        skip_or_fail(f"none of {', '.join(BROWSERS)} is on the path")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        skip_or_fail("Playwright is not installed: pip install playwright")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


def skip_or_fail(reason: str) -> NoReturn:
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@contextlib.contextmanager
def visiting(browser: Any) -> Iterator[Callable[..., Any]]:
    """Yield a function that opens the page of a server, with further options of Playwright's `new_context`.

    At the end, check that no page has sent a request to another site, opened a dialog or raised a script error.
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
        page.on("console", lambda message: wrong.append(message.text) if is_failure(message) else None)
        page.goto(server.url)
        return page

    try:
        yield visit
    finally:
        for context in contexts:
            context.close()
    assert wrong == []


def is_failure(message: Any) -> bool:
    """Return whether a console message is an error other than an HTTP status, which the page reports itself."""
    return message.type in ("error", "warning") and not message.text.startswith("Failed to load resource")


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    """Return an image as a file, with options of Pillow's `save`."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def upload(page: Any, content: bytes, name: str = "scene.png", mime: str = "image/png") -> None:
    """Choose a file in the page."""
    page.set_input_files("#file", {"name": name, "mimeType": mime, "buffer": content})


def ask(page: Any, task: str, prompt: str = "") -> None:
    """Choose a task, enter a prompt, run it and wait for the result."""
    page.locator(f"input[value={task}]").check()
    if prompt:
        page.locator("#prompt").fill(prompt)
        page.locator("#prompt").press("Enter")
    else:
        page.locator("#run").click()
    wait_until_done(page)


def wait_until_done(page: Any) -> None:
    """Wait until no run is in progress."""
    page.locator("#timing", has_text=re.compile(r"\d")).wait_for()
    page.locator("#run").wait_for(state="visible")


def rectangles(page: Any, selector: str) -> list[list[float]]:
    """Return (left, top, right, bottom) of elements, in CSS pixels relative to the image."""
    measure = "(all) => all.map((e) => e.getBoundingClientRect()).map((r) => [r.left, r.top, r.right, r.bottom])"
    x, y, *_ = page.locator("#image").evaluate_all(measure)[0]
    return [
        [left - x, top - y, right - x, bottom - y]
        for left, top, right, bottom in page.locator(selector).evaluate_all(measure)
    ]


def transfer(page: Any, content: bytes, name: str, mime: str) -> Any:
    """Return the data transfer of a dropped or pasted file."""
    make = """([text, name, type]) => {
        const transfer = new DataTransfer();
        transfer.items.add(new File([Uint8Array.from(atob(text), (c) => c.charCodeAt(0))], name, {type}));
        return transfer;
    }"""
    return page.evaluate_handle(make, [base64.b64encode(content).decode(), name, mime])


def copied(page: Any) -> str:
    """Click the copy button and return the content of the clipboard."""
    page.locator("#copy").click()
    page.locator("#copy", has_text="Copied").wait_for()
    text = page.evaluate("navigator.clipboard.readText()")
    assert isinstance(text, str)
    return text
