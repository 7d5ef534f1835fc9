"""Opens the model that a command asks for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from moondream_cv.errors import UnsupportedSkill

from .output import Report, shown_model

if TYPE_CHECKING:
    from moondream_cv.vision_model import VisionModel


@contextmanager
def opened_model(name: str, device: str | None, skills: set[str], report: Report) -> Iterator[VisionModel]:
    """Load a model, and close it afterwards.

    Args:
        name: What `moondream_cv.load` or `moondream_cv.connect` takes.
        device: Where to; None is the best there is.
        skills: What it has to be able to do.

    Raises:
        MoondreamError: It cannot be loaded, or lacks a skill.
        ValueError: The name or the device is unknown.
    """
    model = load_model(name, device, report)
    try:
        missing = sorted(skills - model.skills)
        if missing:
            raise UnsupportedSkill(
                f"the model {shown_model(name)} cannot {', '.join(missing)}, only {', '.join(sorted(model.skills))}; "
                "try --model moondream2"
            )
        yield model
    finally:
        model.close()


def load_model(name: str, device: str | None, report: Report) -> VisionModel:
    """Load a model by name, or use the one behind a server's URL."""
    from moondream_cv.loading import is_url, open_model

    if is_url(name):
        with report.working("Connecting"):
            return open_model(name, device)
    with report.working("Starting PyTorch"):
        import torch  # noqa: F401
    return open_model(name, device)  # shows its own progress where it downloads
