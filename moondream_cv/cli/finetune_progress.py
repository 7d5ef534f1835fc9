"""Progress of `moondream-cv finetune train`: a bar on a terminal, otherwise a line per held-out score."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from .progress_bar import ProgressBar
from .report import Report

if TYPE_CHECKING:
    from moondream_cv.finetune.training_run import TrainingOptions


class TrainingProgress(ProgressBar):
    """Progress of a training run.

    Attributes:
        step: Last completed step.
    """

    def __init__(self, report: Report, options: TrainingOptions) -> None:
        """Create a progress bar; a `with` statement shows it.

        Args:
            report: Output of the command.
            options: Options of the run.
        """
        super().__init__("Training", options.steps, is_shown=not report.quiet)
        self.step = 0
        self._report = report
        self._reported = -1

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the metrics of a step, and print its held-out score if it has one.

        Args:
            step: Step.
            metrics: Metrics of the step by name.
        """
        from moondream_cv.finetune.training_run import F1, REWARD

        self.step = max(self.step, step)
        training = [
            f"{label} {metrics[name]:.3f}"
            for name, label in (("sft_loss", "loss"), ("reward_mean", "reward"), ("kl", "KL"))
            if metrics.get(name) is not None
        ]
        if training:
            self._detail = ", ".join(training)
        self._set(completed=self.step, detail=self._detail)
        if F1 in metrics and step != self._reported and not self._report.quiet:
            self._reported = step
            score = f"held-out F1 {metrics[F1]:.3f}, mean reward {metrics[REWARD]:.3f}"
            line = "; ".join([f"Step {step}: {score}" if step else f"Base model: {score}", *training])
            if self.is_visible:
                self._print(line)
            else:
                self._report.notice(line)
