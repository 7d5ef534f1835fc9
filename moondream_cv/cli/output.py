"""The output of a command: text or JSON on standard output, notices and errors on standard error."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any

import typer

from moondream_cv import __version__
from moondream_cv.errors import MoondreamError
from moondream_cv.escaping import escaped
from moondream_cv.urls import is_url, shown_url

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

SCHEMA = 1
"""Number of the layout of a JSON document; it grows when a key changes its meaning or goes away."""

LINES_SCHEMA = 2
"""Number of the layout of JSON Lines, one object per image."""

_WIDTH_OF_FILES = 120  # columns when the output is no terminal

logger = logging.getLogger("moondream_cv")


class OutputError(OSError):
    """Standard output that cannot be written, such as a file on a full disk."""


class Report:
    """The replies of one command.

    Attributes:
        command: Name of the subcommand.
        as_json: Print JSON instead of text.
        lines: Print one line of JSON per image as soon as it is done, instead of one document at the end.
        quiet: Print errors only on standard error.
    """

    def __init__(
        self,
        command: str,
        as_json: bool,
        *,
        lines: bool = False,
        quiet: bool = False,
        text_to_stderr: bool = False,
        **header: Any,
    ) -> None:
        """Begin a report.

        Args:
            command: Name of the subcommand.
            as_json: As the attribute.
            lines: As the attribute.
            quiet: As the attribute.
            text_to_stderr: Print text on standard error, because standard output is used for an image.
            header: Keys at the head of the JSON document, or of each line. User and password of a `model` that is a URL
                are removed.
        """
        if isinstance(header.get("model"), str):
            header["model"] = shown_model(header["model"])
        self.command = command
        self.as_json = as_json
        self.lines = as_json and lines
        self.quiet = quiet
        self._header = {"version": __version__, "command": command, **header}
        self._images: list[dict[str, Any]] = []
        self._failed = 0
        self._err = _console(True)
        self._out = self._err if text_to_stderr else _console(False)

    @property
    def streams(self) -> bool:
        """Whether text appears on a terminal while it is generated."""
        return not self.as_json and self._out.is_terminal

    @property
    def failed(self) -> int:
        """Number of images that failed."""
        return self._failed

    def print(self, text: RenderableType = "", end: str = "\n") -> None:
        """Print text without control characters; nothing is printed with `as_json`.

        Raises:
            OutputError: Standard output cannot be written.
            BrokenPipeError: The program that reads standard output has ended.
        """
        if not self.as_json:
            with writing_stdout():
                _print(self._out, text, end)

    def notice(self, text: str) -> None:
        """Print a notice on standard error, unless `quiet`."""
        if not self.quiet:
            _print(self._err, text)

    def error(self, text: str) -> None:
        """Print an error on standard error."""
        _print(self._err, f"Error: {text}")

    def working(self, text: str) -> Any:
        """Return a context in which a terminal shows that a step is running."""
        if self.quiet or not self._err.is_terminal:
            return nullcontext()
        from rich.text import Text

        return self._err.status(Text(shown(text)))

    def add(self, image: dict[str, Any]) -> None:
        """Add one image's reply; with `lines` it is printed at once.

        Raises:
            OutputError: Standard output cannot be written.
            BrokenPipeError: The program that reads standard output has ended.
        """
        if self.lines:
            _write_json({"schema": LINES_SCHEMA, **self._header, **image})
        elif self.as_json:
            self._images.append(image)

    def put(self, **items: Any) -> None:
        """Add keys to the head of the document, or of the lines that follow."""
        self._header.update(items)

    @contextmanager
    def image(self, name: str) -> Iterator[None]:
        """Return a context in which an error is reported as that of one image, and the next images go on."""
        try:
            yield
        except (OutputError, BrokenPipeError):
            raise
        except Exception as error:  # a model may put any exception into its ErrorResult
            logger.debug("%s failed", name, exc_info=True)
            self.show_failure(name, error)
            self.add_failure(name, error)

    def show_failure(self, name: str, error: Exception) -> None:
        """Print the error of one image on standard error."""
        message = error_text(error)
        named = any(form in message for form in (name, shown(name), _shown_url_of(name)))
        self.error(message if named else f"{shown(_shown_url_of(name))}: {message}")

    def add_failure(self, name: str, error: Exception) -> None:
        """Count a failed image, and add its error in the place of its reply."""
        self._failed += 1
        self.add({"image": name, "error": error_text(error)})

    def finish(self) -> None:
        """Print the JSON document, if one was asked for.

        Raises:
            typer.Exit: With status 1 if an image failed.
            OutputError: Standard output cannot be written.
        """
        if self.as_json and not self.lines:
            _write_json({"schema": SCHEMA, **self._header, "images": self._images}, indent=2)
        if self._failed:
            raise typer.Exit(1)


def set_verbosity(verbose: bool, quiet: bool) -> None:
    """Set which messages of the package are logged: debug messages, the usual ones, or errors only.

    Raises:
        ValueError: Both are set.
    """
    if verbose and quiet:
        raise ValueError("--verbose and --quiet exclude each other; give one of them")
    logger.setLevel(logging.DEBUG if verbose else logging.ERROR if quiet else logging.INFO)


def error_text(error: Exception) -> str:
    """Return an error as one line; the class is named unless the package raises it on purpose."""
    text = " ".join(str(error).split())
    if isinstance(error, (MoondreamError, ValueError)) and text:
        return shown(text)
    return shown(f"{type(error).__name__}: {text}" if text else type(error).__name__)


def shown_model(name: str) -> str:
    """Return a model's name for messages: a URL without its user, password and query."""
    return shown_url(name) if is_url(name) else name


def shown(text: str) -> str:
    """Return text, such as a file name, on one line that every terminal can print: control characters are escaped."""
    return escaped(text)


@contextmanager
def writing_stdout() -> Iterator[None]:
    """Turn an error of writing standard output in the `with` into an `OutputError`.

    Raises:
        OutputError: It cannot be written.
        BrokenPipeError: The program that reads it has ended.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(f"standard output cannot be written: {error.strerror or error}") from error


def discard_stdout() -> None:
    """Redirect standard output to the null device, so that flushing its buffer at exit raises no second error."""
    with suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def _write_json(document: dict[str, Any], indent: int | None = None) -> None:
    with writing_stdout():
        sys.stdout.write(json.dumps(document, indent=indent) + "\n")
        sys.stdout.flush()


def _shown_url_of(name: str) -> str:
    return shown_url(name) if is_url(name) else name


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
