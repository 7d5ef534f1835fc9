"""What a command prints: text or JSON on standard output, notices and errors on standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import typer

from moondream_cv import __version__
from moondream_cv.errors import MoondreamError
from moondream_cv.escaping import escaped

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

SCHEMA = 1
"""Number of the JSON layout; it grows when a key changes its meaning or goes away."""

_WIDTH_OF_FILES = 120  # columns when the output is no terminal


class Report:
    """The replies of one command.

    Attributes:
        command: Which one.
        as_json: Collect the replies and print them as one JSON document at the end, instead of text as they come.
    """

    def __init__(self, command: str, as_json: bool, **header: Any) -> None:
        """Begin a report.

        Args:
            command: Which one.
            as_json: As the attribute.
            header: What stands at the head of the JSON document; of a `model` that is a URL, what may be shown.
        """
        if isinstance(header.get("model"), str):
            header["model"] = shown_model(header["model"])
        self.command = command
        self.as_json = as_json
        self._document = {"schema": SCHEMA, "version": __version__, "command": command, **header}
        self._images: list[dict[str, Any]] = []
        self._failed = 0
        self._out, self._err = _console(False), _console(True)

    @property
    def streams(self) -> bool:
        """Whether somebody sees the text while it is being written."""
        return not self.as_json and self._out.is_terminal

    @property
    def failed(self) -> int:
        """How many images failed."""
        return self._failed

    def print(self, text: RenderableType = "", end: str = "\n") -> None:
        """Print for people, without control characters; nothing is shown where JSON was asked for."""
        if not self.as_json:
            _print(self._out, text, end)

    def notice(self, text: str) -> None:
        """Say something on standard error."""
        _print(self._err, text)

    def working(self, text: str) -> Any:
        """Give a context in which a terminal shows that something goes on."""
        if not self._err.is_terminal:
            return nullcontext()
        from rich.text import Text

        return self._err.status(Text(shown(text)))

    def add(self, image: dict[str, Any]) -> None:
        """Add one image's reply to the document."""
        self._images.append(image)

    def put(self, **items: Any) -> None:
        """Add keys beside the images to the document."""
        self._document.update(items)

    @contextmanager
    def image(self, name: str) -> Iterator[None]:
        """Give a context in which an error is reported as that of one image, and the next ones go on."""
        try:
            yield
        except Exception as error:  # a model may put any exception into its ErrorResult
            self._failed += 1
            message = error_text(error)
            self.notice(f"Error: {message if name in message else f'{shown(name)}: {message}'}")
            self.add({"image": name, "error": message})

    def finish(self) -> None:
        """Print the JSON document, if one was asked for.

        Raises:
            typer.Exit: With status 1 if an image failed.
        """
        if self.as_json:
            sys.stdout.write(json.dumps({**self._document, "images": self._images}, indent=2) + "\n")
            sys.stdout.flush()
        if self._failed:
            raise typer.Exit(1)


def error_text(error: Exception) -> str:
    """Return an error as one line; the class is named where it is not one that the package raises on purpose."""
    text = " ".join(str(error).split())
    if isinstance(error, (MoondreamError, ValueError)) and text:
        return shown(text)
    return shown(f"{type(error).__name__}: {text}" if text else type(error).__name__)


def shown_model(name: str) -> str:
    """Return a model's name as it may be shown: a URL without what it may hold of passwords and keys."""
    from moondream_cv.backends.addresses import is_url, shown_url

    return shown_url(name) if is_url(name) else name


def shown(text: str) -> str:
    """Return text on one line that every terminal can print, such as a file's name: control characters are escaped."""
    return escaped(text)


def _print(console: Console, text: RenderableType, end: str = "\n") -> None:
    if isinstance(text, str):
        text = escaped(text, multiline=True)
    console.print(text, end=end, highlight=False, soft_wrap=isinstance(text, str), markup=False, emoji=False)


def _console(stderr: bool) -> Console:
    from rich.console import Console

    console = Console(stderr=stderr)
    if not console.is_terminal:
        console.width = _WIDTH_OF_FILES
    return console
