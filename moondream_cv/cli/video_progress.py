"""Progress of `moondream-cv video`: a progress bar on a terminal, and limits for messages about single frames."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .progress_bar import ProgressBar
from .report import shown

if TYPE_CHECKING:
    from moondream_cv.video import Summary

# Loggers with messages about single frames.
_FRAME_LOGGERS = ("moondream_cv.detector", "moondream_cv.video.tracking.keyframe_detector")
_MAX_MESSAGES = 3


class VideoProgress(ProgressBar):
    """Progress bar of a video on a terminal.

    Attributes:
        summary: Latest summary; None before the first frame.
    """

    def __init__(self, name: str, *, is_shown: bool) -> None:
        """Create a progress bar; a `with` statement shows it.

        Args:
            name: Name of the source.
            is_shown: Show the bar if standard error is a terminal.
        """
        super().__init__(shown(name if len(name) <= 24 else f"...{name[-21:]}"), None, is_shown=is_shown)
        self.summary: Summary | None = None

    def update(self, summary: Summary) -> None:
        """Update the bar from the summary of a frame."""
        self.summary = summary
        total = None if summary.frame_count is None else max(summary.frame_count, summary.frames)
        rates = f"{summary.fps:.1f} fps, detector {summary.detector_fps:.1f} fps"
        self._set(completed=summary.frames, total=total, detail=rates)


@contextmanager
def limit_frame_messages() -> Iterator[None]:
    """Log each kind of message about single frames a few times only, and equal messages once, inside a `with`."""
    lines: set[str] = set()
    kinds: Counter[str] = Counter()

    def is_new(record: logging.LogRecord) -> bool:
        if record.name not in _FRAME_LOGGERS:
            return True
        line, kind = record.getMessage(), str(record.msg)
        if line in lines or kinds[kind] >= _MAX_MESSAGES:
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
