"""Loading of the model of a command."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moondream_cv.errors import UnsupportedSkill
from moondream_cv.urls import is_url

from .report import Report, shown_model

if TYPE_CHECKING:
    from moondream_cv.sam import SamMasks
    from moondream_cv.vision_model import VisionModel


@dataclass(frozen=True)
class ModelOptions:
    """A model and its loading options.

    Attributes:
        name: Model name for `moondream_cv.load`, or server URL.
        device: Device for the model; None selects the best available.
        dtype: "float32", "bfloat16" or "float16"; None selects the best for the device.
        adapter: LoRA adapter, as a file, a folder, "ID@STEP" of a finetune or a published ID; None uses none.
        quantize: "int8" or "int4"; None loads the weights as they are stored.
    """

    name: str
    device: str | None = None
    dtype: str | None = None
    adapter: str | None = None
    quantize: str | None = None

    def load_arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of `moondream_cv.load`."""
        return {"device": self.device, "dtype": self.dtype, "quantize": self.quantize, "adapter": self.adapter}


@contextmanager
def opened_model(options: ModelOptions, skills: set[str], report: Report) -> Iterator[VisionModel]:
    """Load a model for the length of a `with`.

    Args:
        options: Model and loading options.
        skills: Required skills.
        report: Output for progress.

    Raises:
        MoondreamError: The model cannot be loaded, or does not have a skill.
        ValueError: The name or the device is unknown.
    """
    with report.model_progress():
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
    """Load a model by name, or connect to a server by URL.

    Args:
        options: Model and loading options.
        report: Output for progress.

    Raises:
        MoondreamError: The model cannot be loaded.
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
    if report.quiet:
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
    return load(options.name, **options.load_arguments())


def check_remote(options: ModelOptions) -> None:
    """Check the options of a model on a server.

    Raises:
        ValueError: An option is set that only applies to a local model.
    """
    given = [name for name, value in options.load_arguments().items() if value is not None]
    if given:
        names = ", ".join(f"--{name}" for name in given)
        raise ValueError(
            f"{names} applies to a local model only, and {shown_model(options.name)} is a server; remove it"
        )


def load_masks(name: str, device: str | None, show_progress: bool) -> SamMasks:
    """Load a segmentation model.

    Args:
        name: Repository on the hub, or folder.
        device: Device for the model; None selects the best available.
        show_progress: Show progress bars of downloading and loading.

    Raises:
        MoondreamError: The model cannot be loaded.
        ValueError: The device is unknown.
    """
    from moondream_cv.sam import SamMasks

    if not show_progress:
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
    return SamMasks(name, device=device)
