"""A progress bar on a terminal, for commands whose output may be JSON."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any

from .report import shown

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self


class ProgressBar:
    """A bar on standard error. Log messages are printed above it. It is a `Display` for the progress of the model.

    Attributes:
        is_visible: Whether the bar is displayed.
    """

    def __init__(self, description: str, total: int | None, *, is_shown: bool) -> None:
        """Create a bar; a `with` statement shows it.

        Args:
            description: Text in front of the bar.
            total: Number of items; None if it is unknown.
            is_shown: Show the bar if standard error is a terminal.
        """
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        self.is_visible = is_shown and console.is_terminal
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[detail]}", markup=False),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not self.is_visible,
            transient=True,
            redirect_stdout=False,  # JSON must not be mixed with the bar
            expand=True,
        )
        self._task = self._progress.add_task(description, total=total, detail="")
        self._detail = ""  # text behind the bar
        self._streams: list[tuple[logging.StreamHandler[Any], Any]] = []

    def __enter__(self) -> Self:
        self._progress.start()
        if self.is_visible:  # log messages are printed above the bar
            for handler in logging.getLogger("moondream_cv").handlers:
                if isinstance(handler, logging.StreamHandler):
                    self._streams.append((handler, handler.setStream(sys.stderr)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handler, stream in self._streams:
            if stream is not None:
                handler.setStream(stream)
        self._progress.stop()

    def show(self, text: str) -> None:
        """Show the progress of the model in place of the detail.

        Args:
            text: Text of the model.
        """
        self._set(detail=shown(text))

    def clear(self) -> None:
        """Show the detail again."""
        self._set(detail=self._detail)

    def _set(self, **fields: Any) -> None:
        """Change `completed`, `total` or `detail`, the text behind the bar."""
        self._progress.update(self._task, **fields)

    def _restart(self, description: str, total: int | None, completed: int) -> None:
        """Replace the bar by that of another stage, whose remaining time is estimated from then on.

        Args:
            description: Text in front of the bar.
            total: Number of items; None if it is unknown.
            completed: Number of items that are already complete.
        """
        self._progress.remove_task(self._task)
        self._task = self._progress.add_task(description, total=total, completed=completed, detail="")

    def _print(self, line: str) -> None:
        """Print a line above the bar."""
        self._progress.console.print(line, highlight=False, markup=False)
