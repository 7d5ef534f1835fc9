"""Progress of long operations: a status line on a terminal, otherwise log messages.

An `Operation` is one call, for example loading a model or running requests. Functions that take long call `update`. The
first 2 s of an operation report nothing and cost one clock read per update.

A status line is only shown by the main thread of the main process, so that servers, video pipelines and worker
processes never write to the terminal. Their messages have the level DEBUG.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator
from typing import Protocol, TextIO

from moondream_cv.escaping import escaped

__all__ = ["Display", "Operation", "StatusLine", "byte_unit", "hidden", "showing_on"]

logger = logging.getLogger(__name__)

VARIABLE = "MOONDREAM_CV_PROGRESS"
"""Environment variable that turns progress off if it is "0"."""

DELAY = 2.0  # seconds of an operation before its first report
REFRESH_INTERVAL = 0.1  # seconds between two updates of a display
SECOND_MESSAGE = 5.0  # age of an operation at its second log message, in seconds; doubles with each message
_MIN_SECONDS_TO_ESTIMATE = 1.0
_DEFAULT_COLUMNS = 80


class Display(Protocol):
    """Shows one line of text until it is cleared."""

    def show(self, text: str) -> None:
        """Replace the text. The display escapes control characters."""

    def clear(self) -> None:
        """Remove the text."""


class StatusLine:
    """A status line on a terminal. The cursor stays at its beginning, so other output replaces the line."""

    def __init__(self, stream: TextIO) -> None:
        """Create a line that is not shown yet.

        Args:
            stream: Terminal.
        """
        self._stream = stream
        self._width = 0  # cells of the text that is shown

    def show(self, text: str) -> None:
        """Replace the text. It is cut to the width of the terminal.

        Args:
            text: Text without line breaks.

        Raises:
            OSError: The terminal cannot be written.
            ValueError: The stream is closed.
        """
        shown, width = _fit(escaped(text), _columns(self._stream) - 1)
        self._stream.write(f"\r{shown}{' ' * (self._width - width)}\r")
        self._stream.flush()
        self._width = width

    def clear(self) -> None:
        """Remove the text; see `show` for errors."""
        if self._width:
            self.show("")


class Operation:
    """Progress of one call. Use it in a `with` statement, in one thread.

    Errors of a display are ignored and turn it off: progress never breaks the call that it reports.

    Attributes:
        prefix: Returns the text in front of each stage; None: no text.
    """

    def __init__(self, name: str, *, is_enabled: bool = True, clock: Callable[[], float] = time.monotonic) -> None:
        """Start the clock of an operation.

        Args:
            name: Name for log messages, for example "Loading tiny".
            is_enabled: Whether the operation is reported. The environment variable `MOONDREAM_CV_PROGRESS=0` turns off
                all operations.
            clock: Returns the time in seconds.
        """
        self.prefix: Callable[[], str] | None = None
        self._name, self._clock = name, clock
        self._start = clock()
        self._due = self._start + DELAY if is_enabled and os.environ.get(VARIABLE) != "0" else math.inf
        self._display: Display | None = None
        self._level: int | None = None  # level of log messages; None: not chosen, or a display
        self._stage, self._stage_start, self._done_at_start = "", self._start, 0.0
        self._seconds: dict[str, float] = {}  # by stage

    def __enter__(self) -> Operation:
        return self

    def __exit__(self, *exception: object) -> None:
        self.finish()

    def update(
        self,
        stage: str,
        done: float = 0,
        total: float | None = None,
        unit: str = "",
        detail: Callable[[], str] | None = None,
    ) -> None:
        """Report the state of the operation if a report is due.

        Args:
            stage: Name of the current stage, for example "Encoding image".
            done: Completed part of the stage, in `unit`; a float is shown with one decimal.
            total: Size of the stage, in `unit`; None if it is unknown.
            unit: Plural of the unit, for example "crops".
            detail: Returns a text that is shown in place of the prefix, the stage and the numbers.
        """
        now = self._clock()
        if stage != self._stage:
            self._begin_stage(stage, now, done)
        if now < self._due:
            return
        try:
            if self._display is None and self._level is None:
                self._choose_output()
            text = detail() if detail is not None else self._line(stage, done, total, unit, now)
            if self._display is not None:
                self._due = now + REFRESH_INTERVAL
                self._display.show(text)
            else:
                self._due = self._start + _next_message(now - self._start)
                logger.log(self._level or logging.DEBUG, "%s", text)
        except Exception:  # a closed terminal, a broken pipe, an encoding without some character
            self._due, self._display = math.inf, None

    def finish(self) -> None:
        """Remove the display, and log how long the stages took if the operation was long enough to be reported."""
        display, self._display = self._display, None
        is_reported, self._due = self._due < math.inf, math.inf
        if display is not None:
            with contextlib.suppress(Exception):
                display.clear()
        now = self._clock()
        if is_reported and now - self._start >= DELAY and logger.isEnabledFor(logging.DEBUG):
            self._begin_stage("", now, 0)
            stages = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in self._seconds.items())
            logger.debug("%s took %.1f s%s", self._name, now - self._start, f": {stages}" if stages else "")

    def _begin_stage(self, stage: str, now: float, done: float) -> None:
        if self._stage:
            self._seconds[self._stage] = self._seconds.get(self._stage, 0.0) + now - self._stage_start
        self._stage, self._stage_start, self._done_at_start = stage, now, done

    def _choose_output(self) -> None:
        """Choose the display, or the level of log messages."""
        if not _may_display():
            self._level = logging.DEBUG
        elif _display is not None:
            self._display = _display
        elif _is_terminal(sys.stderr):
            self._display = StatusLine(sys.stderr)
        else:
            self._level = logging.INFO

    def _line(self, stage: str, done: float, total: float | None, unit: str, now: float) -> str:
        text = stage
        if total is not None:
            text += f": {_number(done)} of {_number(total)} {unit}{self._time_left(done, total, now)}"
        prefix = "" if self.prefix is None else self.prefix()
        return f"{prefix}; {text[:1].lower()}{text[1:]}" if prefix else text

    def _time_left(self, done: float, total: float, now: float) -> str:
        """Return the estimated time until the end of the stage, with a comma in front; empty if it is unknown."""
        seconds, part = now - self._stage_start, done - self._done_at_start
        if seconds < _MIN_SECONDS_TO_ESTIMATE or part <= 0 or done >= total:
            return ""
        left = math.ceil(seconds * (total - done) / part)
        return f", {left} s left" if left < 120 else f", {math.ceil(left / 60)} min left"


_display: Display | None = None  # display of `showing_on`


@contextlib.contextmanager
def showing_on(display: Display) -> Iterator[None]:
    """Show the operations of the main thread on a display, in place of the terminal and of log messages.

    Args:
        display: Display that is used until the `with` statement ends.
    """
    global _display
    before, _display = _display, display
    try:
        yield
    finally:
        _display = before


def hidden() -> contextlib.AbstractContextManager[None]:
    """Return a context manager that hides the operations of the main thread."""
    return showing_on(_NoDisplay())


class _NoDisplay:
    def show(self, text: str) -> None:
        pass

    def clear(self) -> None:
        pass


def byte_unit(num_bytes: int) -> tuple[float, str]:
    """Return the divisor and the name of the unit for a number of bytes: MB, or GB from 1 GB on.

    Args:
        num_bytes: Number of bytes.
    """
    return (1e9, "GB") if num_bytes >= 1e9 else (1e6, "MB")


def _may_display() -> bool:
    """Return whether this is the main thread of a process that multiprocessing has not started."""
    from multiprocessing import parent_process

    return threading.current_thread() is threading.main_thread() and parent_process() is None


def _is_terminal(stream: TextIO | None) -> bool:
    try:
        return stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"
    except ValueError:  # closed
        return False


def _next_message(seconds: float) -> float:
    """Return the age of an operation, in seconds, at which the log message after the one at `seconds` is due."""
    due = SECOND_MESSAGE
    while due <= seconds:
        due *= 2
    return due


def _number(value: float) -> str:
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def _columns(stream: TextIO) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns or _DEFAULT_COLUMNS
    except (OSError, ValueError):
        return _DEFAULT_COLUMNS


def _fit(text: str, columns: int) -> tuple[str, int]:
    """Cut text to a number of terminal cells, and return it with the number of its cells."""
    width = 0
    for i, character in enumerate(text):
        wide = unicodedata.east_asian_width(character) in ("W", "F")
        cells = 0 if unicodedata.combining(character) else 2 if wide else 1
        if width + cells > columns:
            return text[:i], width
        width += cells
    return text, width
