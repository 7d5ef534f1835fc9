"""Fixtures that run the command line in this process, with a fake model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import pytest
from typer.testing import CliRunner, Result

from moondream_cv.cli import app, models
from moondream_cv.cli.models import ModelOptions
from moondream_cv.errors import CheckpointError
from tests.helpers.color_model import ColorModel, color_frame

Run = Callable[..., Result]


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> ColorModel:
    """Return the model "colors", which detects red, green and blue patches; other names raise."""
    fake = ColorModel()

    def load_model(options: ModelOptions, report: Any) -> ColorModel:
        if options.name not in ("colors", "moondream2"):
            raise CheckpointError(f"there is no model {options.name!r}")
        if options.device not in (None, "cpu"):
            raise ValueError(f"there is no device {options.device!r}")
        return fake

    monkeypatch.setattr(models, "load_model", load_model)
    return fake


@pytest.fixture
def run(model: ColorModel) -> Run:
    """Return a function that runs the command line: `run("detect", "a.png", "-c", "red")`."""

    def call(*arguments: object, stdin: bytes | None = None) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)

    return call


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the current folder, with `one.png` (a red and a green patch), `two.jpg` (no patch) and `broken.png`."""
    monkeypatch.chdir(tmp_path)
    cv2.imwrite("one.png", color_frame(("red", (10, 5, 30, 45)), ("green", (50, 20, 70, 40))))
    cv2.imwrite("two.jpg", color_frame())
    Path("broken.png").write_bytes(b"junk")
    return tmp_path
