"""Opens the model that a command asks for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moondream_cv.errors import UnsupportedSkill
from moondream_cv.urls import is_url

from .output import Report, shown_model

if TYPE_CHECKING:
    from moondream_cv.vision_model import VisionModel


@dataclass(frozen=True)
class ModelOptions:
    """A model and how it is loaded.

    Attributes:
        name: A name for `moondream_cv.load`, or a server's URL.
        device: Where to load it; None is the best there is.
        dtype: "float32", "bfloat16" or "float16"; None is the best for the device.
        adapter: An adapter's file or id.
    """

    name: str
    device: str | None = None
    dtype: str | None = None
    adapter: str | None = None


@contextmanager
def opened_model(options: ModelOptions, skills: set[str], report: Report) -> Iterator[VisionModel]:
    """Load a model, and close it afterwards.

    Args:
        options: The model and how it is loaded.
        skills: Skills that it must have.
        report: Where progress is shown.

    Raises:
        MoondreamError: It cannot be loaded, or lacks a skill.
        ValueError: The name or the device is unknown.
    """
    model = load_model(options, report)
    try:
        missing = sorted(skills - model.skills)
        if missing:
            raise UnsupportedSkill(
                f"the model {shown_model(options.name)} cannot {', '.join(missing)}, only "
                f"{', '.join(sorted(model.skills))}; try --model moondream2"
            )
        yield model
    finally:
        model.close()


def load_model(options: ModelOptions, report: Report) -> VisionModel:
    """Load a model by name, or use the one behind a server's URL.

    Raises:
        MoondreamError: It cannot be loaded.
        ValueError: The name or the device is unknown, or an option does not apply to a server.
    """
    if is_url(options.name):
        check_remote(options)
        from moondream_cv.loading import connect

        with report.working("Connecting"):
            return connect(options.name)
    with report.working("Starting PyTorch"):
        import torch  # noqa: F401
    from moondream_cv.loading import choose_device, load

    choose_device(options.device)
    if options.adapter is not None:  # found before the weights are downloaded
        from moondream_cv.model.adapters import find_adapter

        find_adapter(options.adapter)
    if report.quiet:
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
    return load(options.name, device=options.device, dtype=options.dtype, adapter=options.adapter)


def check_remote(options: ModelOptions) -> None:
    """Check the options of a model behind a URL.

    Raises:
        ValueError: An option is given that only applies to a model on this machine.
    """
    given = [name for name in ("device", "dtype", "adapter") if getattr(options, name) is not None]
    if given:
        names = ", ".join(f"--{name}" for name in given)
        raise ValueError(f"{names}: only for a model on this machine, and {shown_model(options.name)} is a server")
