"""Progress of `moondream-cv label`: a bar on a terminal, otherwise a line from time to time."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from .progress_bar import ProgressBar
from .report import Report, shown

if TYPE_CHECKING:
    from moondream_cv.labeling import LabelingProgress

_TITLES = {"frames": "Extracting frames", "duplicates": "Comparing images", "labels": "Labeling", "export": "Exporting"}
_NUM_CLASSES = 3  # classes with a count behind the bar
_SECONDS_BETWEEN_LINES = 30.0


class LabelProgress(ProgressBar):
    """Progress of a run.

    Attributes:
        progress: Latest state of the stage "labels"; None before it.
    """

    def __init__(self, report: Report) -> None:
        """Create a progress bar; a `with` statement shows it.

        Args:
            report: Output of the command.
        """
        super().__init__("Listing images", None, is_shown=not report.quiet)
        self.progress: LabelingProgress | None = None
        self._report = report
        self._stage = ""
        self._start, self._done_at_start, self._last_line = 0.0, 0, 0.0

    def update(self, progress: LabelingProgress) -> None:
        """Show the state of a run.

        Args:
            progress: State of the run.
        """
        now = time.monotonic()
        is_new = progress.stage != self._stage
        if is_new:
            self._stage, self._start, self._done_at_start, self._last_line = progress.stage, now, progress.done, now
        if progress.stage == "labels":
            self.progress = progress
        self._detail = self._describe(progress, now - self._start)
        total = progress.total or None
        if is_new:
            self._restart(_TITLES[progress.stage], total, progress.done)
        self._set(completed=progress.done, total=total, detail=self._detail)
        if not self.is_visible and now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            count = f"{progress.done:,}" + (f" of {progress.total:,}" if progress.total else "")
            self._report.notice(
                f"{_TITLES[progress.stage]}: {count} images{self._time_left(progress, now)}; {self._detail}"
            )

    def _describe(self, progress: LabelingProgress, seconds: float) -> str:
        """Return the rate, the most frequent classes and the number of failed images."""
        done = progress.done - self._done_at_start
        parts = [f"{done / seconds:.1f} images/s"] if seconds > 0 and done > 0 else []
        parts += [f"{shown(name)} {count:,}" for name, count in progress.counts.most_common(_NUM_CLASSES) if count]
        if progress.num_failed:
            parts.append(f"failed {progress.num_failed:,}")
        return ", ".join(parts)

    def _time_left(self, progress: LabelingProgress, now: float) -> str:
        done = progress.done - self._done_at_start
        if done <= 0 or progress.total <= progress.done:
            return ""
        minutes = (now - self._start) * (progress.total - progress.done) / done / 60
        return f", {minutes / 60:.1f} h left" if minutes >= 120 else f", {max(1, round(minutes))} min left"
