"""Output of a command: text or JSON on standard output, notices and errors on standard error."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any

import typer

from moondream_cv import __version__
from moondream_cv.errors import MoondreamError
from moondream_cv.escaping import escaped
from moondream_cv.progress import showing_on
from moondream_cv.urls import is_url, shown_url

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.status import Status

SCHEMA = 1
"""Version of the JSON document; it increases when a key changes its meaning or is removed."""

LINES_SCHEMA = 2
"""Version of the JSON Lines, one object per image."""

_WIDTH_OF_FILES = 120  # columns, if the output is not a terminal
_REFRESHES_PER_SECOND = 10

logger = logging.getLogger("moondream_cv")


class OutputError(OSError):
    """An error while writing standard output, such as a full disk."""


class Report:
    """Output of one command.

    Attributes:
        command: Name of the command.
        as_json: Print JSON instead of text.
        lines: Print one line of JSON per image as soon as it is done, instead of one document at the end.
        quiet: Print only errors on standard error.
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
        """Create a report without results.

        Args:
            command: See the attribute.
            as_json: See the attribute.
            lines: See the attribute.
            quiet: See the attribute.
            text_to_stderr: Print text on standard error, because standard output is used for an image.
            **header: Keys at the head of the JSON document, or of each line. If `model` is a URL, its user and password
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
        self._status = _StatusDisplay(self._err, is_visible=not quiet and _is_animated(self._err))

    @property
    def streams(self) -> bool:
        """Whether text is printed on a terminal while it is generated."""
        return not self.as_json and self._out.is_terminal

    @property
    def failed(self) -> int:
        """Number of images that failed."""
        return self._failed

    def print(self, text: RenderableType = "", end: str = "\n") -> None:
        """Print text without control characters, unless `as_json`.

        Args:
            text: Text or rich renderable.
            end: Text to append.

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

    def working(self, text: str) -> AbstractContextManager[None]:
        """Return a context manager that shows a status on a terminal. The progress of the model is appended to it."""
        return self._status.titled(text)

    def model_progress(self) -> AbstractContextManager[None]:
        """Return a context manager that shows the progress of models as a status on a terminal.

        Without a terminal, the progress is logged; with `quiet`, it is not shown.
        """
        return showing_on(self._status) if self.quiet or self._status.is_visible else nullcontext()

    def add(self, image: dict[str, Any]) -> None:
        """Add the result of one image; with `lines` it is printed immediately.

        Args:
            image: JSON entry of the image.

        Raises:
            OutputError: Standard output cannot be written.
            BrokenPipeError: The program that reads standard output has ended.
        """
        if self.lines:
            _write_json({"schema": LINES_SCHEMA, **self._header, **image})
        elif self.as_json:
            self._images.append(image)

    def put(self, **items: Any) -> None:
        """Add keys to the head of the document, or of the following lines."""
        self._header.update(items)

    @contextmanager
    def image(self, name: str) -> Iterator[None]:
        """Return a context manager that reports errors of one image and suppresses them, so that the others are run."""
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
        """Count a failed image, and add its error instead of a result."""
        self._failed += 1
        self.add({"image": name, "error": error_text(error)})

    def finish(self) -> None:
        """Print the JSON document with `as_json`, unless lines were printed.

        Raises:
            typer.Exit: With status 1 if an image failed.
            OutputError: Standard output cannot be written.
        """
        if self.as_json and not self.lines:
            _write_json({"schema": SCHEMA, **self._header, "images": self._images}, indent=2)
        if self._failed:
            raise typer.Exit(1)


class _StatusDisplay:
    """The status line of a command: a title, the progress of the model, or both.

    Attributes:
        is_visible: Whether the line is shown.
    """

    def __init__(self, console: Console, *, is_visible: bool) -> None:
        self.is_visible = is_visible
        self._console = console
        self._title = ""
        self._status: Status | None = None

    @contextmanager
    def titled(self, title: str) -> Iterator[None]:
        """Show a title until the `with` statement ends."""
        before, self._title = self._title, title
        self._update(title)
        try:
            yield
        finally:
            self._title = before
            self._update(before)

    def show(self, text: str) -> None:
        """Show the progress of the model behind the title."""
        self._update(f"{self._title}  {text}" if self._title else text)

    def clear(self) -> None:
        """Remove the progress of the model."""
        self._update(self._title)

    def _update(self, text: str) -> None:
        if not self.is_visible:
            return
        from rich.text import Text

        line = Text(shown(text), no_wrap=True, overflow="ellipsis")
        if not text:
            if self._status is not None:
                status, self._status = self._status, None
                status.stop()
        elif self._status is None:
            self._status = self._console.status(line, refresh_per_second=_REFRESHES_PER_SECOND)
            self._status.start()
        else:
            self._status.update(line)


def set_verbosity(verbose: bool, quiet: bool) -> None:
    """Set the minimum level of logged messages: debug, info or error.

    Args:
        verbose: Log debug messages.
        quiet: Log only errors.

    Raises:
        ValueError: Both options are set.
    """
    if verbose and quiet:
        raise ValueError("--verbose and --quiet exclude each other; use one of them")
    logger.setLevel(logging.DEBUG if verbose else logging.ERROR if quiet else logging.INFO)


def error_text(error: Exception) -> str:
    """Return an error as one line; unexpected errors include their class."""
    text = " ".join(str(error).split())
    if isinstance(error, (MoondreamError, ValueError)) and text:
        return shown(text)
    return shown(f"{type(error).__name__}: {text}" if text else type(error).__name__)


def shown_model(name: str) -> str:
    """Return a model name for messages; a URL is shown without user, password and query."""
    return shown_url(name) if is_url(name) else name


def shown(text: str) -> str:
    """Return text on one line with control characters escaped, so that it is safe to print on a terminal."""
    return escaped(text)


@contextmanager
def writing_stdout() -> Iterator[None]:
    """Convert errors of writing standard output in the `with` to `OutputError`.

    Raises:
        OutputError: Standard output cannot be written.
        BrokenPipeError: The program that reads standard output has ended.
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


def _is_animated(console: Console) -> bool:
    """Return whether a console can replace its last line. `FORCE_COLOR` does not turn a file into a terminal."""
    try:
        return console.is_terminal and not console.is_dumb_terminal and console.file.isatty()
    except ValueError:  # closed
        return False


def _console(stderr: bool) -> Console:
    from rich.console import Console

    console = Console(stderr=stderr)
    if not console.is_terminal:
        console.width = _WIDTH_OF_FILES
    return console
