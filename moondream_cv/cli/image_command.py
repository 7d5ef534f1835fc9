"""Implementation of all commands about images: inputs, outputs, and the loop over images."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .image_window import ImageWindow
from .inputs import InputImage, check_all, expand_inputs, is_multiple
from .models import opened_model
from .options import ImageOptions
from .report import Report, set_verbosity, shown
from .saving import STDOUT, plan_outputs, save
from .signals import exit_on_interrupt

if TYPE_CHECKING:
    from PIL import Image

    from moondream_cv.vision_model import VisionModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Item:
    """One image of a command.

    Attributes:
        index: Index among the images of the command.
        source: Input image.
        target: Path for the annotated image; None if it is not saved.
        progress: Text of the status line.
    """

    index: int
    source: InputImage
    target: Path | None
    progress: str


class ImageCommand:
    """A command about images: checks the images, opens the model, and reports the error of each image separately.

    Attributes:
        images: Input images.
        report: Output of the command.
    """

    def __init__(self, command: str, images: Sequence[str], options: ImageOptions, **header: Any) -> None:
        """Check inputs and outputs; the model is loaded later.

        Args:
            command: Name of the command, which is also the required skill of the model.
            images: Image arguments of the command line.
            options: Model and outputs.
            **header: Keys at the head of the JSON output.

        Raises:
            ValueError: An argument is invalid.
        """
        set_verbosity(options.verbose, options.quiet)
        self._options, self._command = options, command
        as_json = options.as_json or options.as_lines
        to_stdout = options.output == str(STDOUT)
        if to_stdout and as_json:
            raise ValueError("--output - and --json both print on standard output; use a file for --output")
        self.images = expand_inputs(images, options.recursive)
        self._targets = plan_outputs(options.output, self.images, options.overwrite)
        self.report = Report(
            command,
            as_json,
            lines=options.as_lines or is_multiple(images, self.images),
            quiet=options.quiet,
            text_to_stderr=to_stdout,
            model=options.model,
            **header,
        )
        with self.report.working("Checking images"):
            self._errors = check_all(self.images)
        for index, error in self._errors.items():
            self.report.show_failure(self.images[index].name, error)
        self._window = ImageWindow(f"moondream-cv {command}") if options.show else None

    @contextmanager
    def opened_model(self) -> Iterator[VisionModel]:
        """Load the model for the length of a `with`.

        Raises:
            typer.Exit: With status 1 if no image can be read, before the model is loaded.
            MoondreamError: The model cannot be loaded, or does not have the skill.
            ValueError: The name or the device is unknown.
        """
        if self.images and len(self._errors) == len(self.images):
            for index, error in self._errors.items():
                self.report.add_failure(self.images[index].name, error)
            self.report.finish()
        with ExitStack() as opened:
            opened.enter_context(exit_on_interrupt())
            model = opened.enter_context(opened_model(self._options.model_options, {self._command}, self.report))
            if self._window is not None:
                opened.callback(self._window.close)
            if self._command in ("detect", "point"):
                self.report.put(has_scores=model.has_scores)
            yield model

    def for_each(self, work: Callable[[Item], None]) -> None:
        """Call a function for every readable image. Errors are reported per image, and the loop continues.

        Args:
            work: Function that processes one image.

        Raises:
            OutputError: Standard output cannot be written.
        """
        count = len(self.images)
        for index, (source, target) in enumerate(zip(self.images, self._targets, strict=True)):
            if index in self._errors:  # already printed on standard error
                self.report.add_failure(source.name, self._errors[index])
                continue
            started = time.perf_counter()
            with self.report.image(source.name):
                progress = f"{source.title} ({index + 1} of {count})" if count > 1 else source.title
                work(Item(index, source, target, progress))
            logger.debug("%s took %.2f s", source.title, time.perf_counter() - started)

    def show_and_save(self, annotated: Image.Image, item: Item, entry: dict[str, Any]) -> None:
        """Save an annotated image if the item has a target, and show it if `--show` is set.

        Args:
            annotated: RGB image.
            item: Image of the command.
            entry: JSON entry of the image; the path is added to it.

        Raises:
            OSError: The file cannot be written.
        """
        if item.target is not None:
            save(annotated, item.target)
            if item.target != STDOUT:
                entry["annotated"] = str(item.target)
                self.report.notice(f"Saved {shown(str(item.target))}")
        if self._window is not None:
            self._window.show(annotated)
