"""What `moondream-cv video` shows while it works: a bar on a terminal, and not the same warning for every frame."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .output import shown

if TYPE_CHECKING:
    from types import TracebackType

    from moondream_cv.video import Summary

# Loggers that report single frames.
_FRAME_BY_FRAME = ("moondream_cv.detector", "moondream_cv.video.tracking.keyframe_detector")
_LINES_OF_A_KIND = 3


class Bar:
    """Shows on a terminal how far a video has come.

    Attributes:
        summary: The latest that it was told; None before the first frame.
    """

    def __init__(self, name: str, *, wanted: bool) -> None:
        """Make a bar that is not shown yet.

        Args:
            name: Of the source.
            wanted: Whether a terminal, if there is one, has room for a bar.
        """
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.summary: Summary | None = None
        console = Console(stderr=True)
        self._visible = wanted and console.is_terminal
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rates]}", markup=False),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not self._visible,
            transient=True,
            redirect_stdout=False,  # JSON lines are for whoever reads them
            expand=True,
        )
        short = shown(name if len(name) <= 24 else f"...{name[-21:]}")
        self._task = self._progress.add_task(short, total=None, rates="")
        self._streams: list[tuple[logging.StreamHandler[Any], Any]] = []

    def __enter__(self) -> Bar:
        self._progress.start()
        if self._visible:  # log lines go above the bar, instead of through it
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

    def update(self, summary: Summary) -> None:
        """Show how far it is."""
        self.summary = summary
        total = None if summary.frame_count is None else max(summary.frame_count, summary.frames)
        rates = f"{summary.fps:.1f} fps, detector {summary.detector_fps:.1f} fps"
        self._progress.update(self._task, completed=summary.frames, total=total, rates=rates)


@contextmanager
def few_of_a_kind() -> Iterator[None]:
    """Give a context in which the lines that every frame could give are logged a few times, and never twice."""
    lines: set[str] = set()
    kinds: Counter[str] = Counter()

    def is_new(record: logging.LogRecord) -> bool:
        if record.name not in _FRAME_BY_FRAME:
            return True
        line, kind = record.getMessage(), str(record.msg)
        if line in lines or kinds[kind] >= _LINES_OF_A_KIND:
            return False
        lines.add(line)
        kinds[kind] += 1
        return True

    handlers = logging.getLogger("moondream_cv").handlers
    for handler in handlers:
        handler.addFilter(is_new)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(is_new)
