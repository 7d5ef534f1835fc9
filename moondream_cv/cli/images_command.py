"""The common part of all commands about images: options, inputs and outputs, and the loop over images."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .inputs import Picture, check_all, expand, is_several
from .models import ModelOptions, opened_model
from .output import Report, set_verbosity, shown
from .saving import STDOUT, plan_outputs, save
from .window import ImageWindow

if TYPE_CHECKING:
    from PIL import Image

    from moondream_cv.vision_model import VisionModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageOptions:
    """Options that the commands about images share.

    Attributes:
        images: As `inputs.expand` takes them.
        model: The model and how it is loaded.
        recursive: Search subfolders too.
        output: As `saving.plan_outputs` takes it.
        overwrite: Replace files that exist.
        as_json: Print JSON instead of text.
        as_lines: Print JSON Lines, even for a single image.
        show: Show each annotated image in a window.
        verbose: Log debug messages.
        quiet: Print errors only on standard error.
    """

    images: Sequence[str]
    model: ModelOptions
    recursive: bool = False
    output: str | None = None
    overwrite: bool = False
    as_json: bool = False
    as_lines: bool = False
    show: bool = False
    verbose: bool = False
    quiet: bool = False


@dataclass(frozen=True)
class Item:
    """One image of a command.

    Attributes:
        index: Its position among the images.
        picture: The input.
        target: Where the annotated image is saved, if anywhere.
        progress: Text for a status line.
    """

    index: int
    picture: Picture
    target: Path | None
    progress: str


class ImagesCommand:
    """A command about images: checks them, opens the model, and isolates the error of each image.

    Attributes:
        pictures: The input images.
        report: Where replies go.
    """

    def __init__(self, command: str, options: ImageOptions, **header: Any) -> None:
        """Check inputs and outputs; no model is loaded yet.

        Args:
            command: Name of the subcommand, which is the skill that the model needs.
            options: As given on the command line.
            header: Keys at the head of the JSON output.

        Raises:
            ValueError: An argument is wrong.
            typer.Exit: With status 1 if all images are missing or damaged.
        """
        set_verbosity(options.verbose, options.quiet)
        self._options, self._command = options, command
        as_json = options.as_json or options.as_lines
        to_stdout = options.output == str(STDOUT)
        if to_stdout and as_json:
            raise ValueError("--output - and --json both print on standard output; give --output a file")
        self.pictures = expand(options.images, options.recursive)
        self._targets = plan_outputs(options.output, self.pictures, options.overwrite)
        self.report = Report(
            command,
            as_json,
            lines=options.as_lines or is_several(options.images, self.pictures),
            quiet=options.quiet,
            text_to_stderr=to_stdout,
            model=options.model.name,
            **header,
        )
        with self.report.working("Checking images"):
            self._errors = check_all(self.pictures)
        for index, error in self._errors.items():
            self.report.show_failure(self.pictures[index].name, error)
        self._window = ImageWindow(f"moondream-cv {command}") if options.show else None

    @contextmanager
    def opened_model(self) -> Iterator[VisionModel]:
        """Load the model, and close it afterwards.

        Raises:
            typer.Exit: With status 1 if no image can be read, so that no model is needed.
            MoondreamError: The model cannot be loaded, or lacks the skill.
            ValueError: The name or the device is unknown.
        """
        if self.pictures and len(self._errors) == len(self.pictures):
            for index, error in self._errors.items():
                self.report.add_failure(self.pictures[index].name, error)
            self.report.finish()
        with ExitStack() as opened:
            model = opened.enter_context(opened_model(self._options.model, {self._command}, self.report))
            if self._window is not None:
                opened.callback(self._window.close)
            if self._command in ("detect", "point"):
                self.report.put(has_scores=model.has_scores)
            yield model

    def for_each(self, work: Callable[[Item], None]) -> None:
        """Call a function for every readable image. An error is reported as that of its image, and the others go on.

        Raises:
            OutputError: Standard output cannot be written.
        """
        count = len(self.pictures)
        for index, (picture, target) in enumerate(zip(self.pictures, self._targets, strict=True)):
            if index in self._errors:  # it is on standard error already
                self.report.add_failure(picture.name, self._errors[index])
                continue
            started = time.perf_counter()
            with self.report.image(picture.name):
                work(Item(index, picture, target, f"{picture.title} ({index + 1} of {count})"))
            logger.debug("%s took %.2f s", picture.title, time.perf_counter() - started)

    def show_and_save(self, annotated: Image.Image, item: Item, entry: dict[str, Any]) -> None:
        """Save an annotated image, if the item has a target, and show it, if `--show` was given.

        Args:
            annotated: In RGB.
            item: The image that it was made from.
            entry: The JSON of this image; the path is added to it.

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
