"""A training run on a dataset: steps, held-out scores, early stopping and checkpoints.

All state of a run is in the store of the finetune: the adapter, the optimizer and the metrics of each step. A run that
was stopped at any point therefore continues when it is called again with the same arguments.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from moondream_cv.arguments import check_choice, check_integer, check_share
from moondream_cv.errors import MoondreamError
from moondream_cv.finetune.datasets import Dataset, Example, batches, examples_of
from moondream_cv.finetune.finetune import Finetune
from moondream_cv.finetune.groups import MAX_GROUPS
from moondream_cv.finetune.scoring import Score, evaluate, with_images
from moondream_cv.finetune.wire import MAX_ROLLOUTS

SKILLS = ("detect", "point")
METHODS = ("sft", "rl")
F1, REWARD = "held_out_f1", "held_out_reward"
"""Names of the metrics of the held-out score."""

DATASET = "dataset_digest"
"""Name of the metric of step 0 that identifies the dataset, the skill and the classes."""

MAX_SKIPPED_STEPS = 20
"""Number of successive batches without a gradient after which a run stops."""

_MAX_HELD_OUT = 200  # images; more would mainly make the score slower
_POSITIONS_PER_OBJECT = {"detect": 3, "point": 2}
_PROMPT_POSITIONS = 24  # upper limit for the template of a prompt

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingOptions:
    """Options of a training run.

    Attributes:
        skill: "detect" or "point".
        method: "sft", supervised training on the boxes, or "rl", reinforcement learning with the built-in reward.
        steps: Maximum number of steps.
        batch: Number of examples per step, 1 to 64. An example is one class in one image.
        lr: Learning rate, above 0 and at most 1.
        num_rollouts: Number of replies per example of "rl", 2 to 16.
        evaluate_every: Number of steps between two held-out scores.
        patience: Number of successive held-out scores without improvement after which the run stops.
        seed: Seed of the order of the examples.
    """

    skill: str = "detect"
    method: str = "sft"
    steps: int = 300
    batch: int = 16
    lr: float = 2e-3
    num_rollouts: int = 8
    evaluate_every: int = 25
    patience: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("skill", self.skill, SKILLS)
        check_choice("method", self.method, METHODS)
        check_integer("batch", self.batch, 1, MAX_GROUPS)
        check_integer("num_rollouts", self.num_rollouts, 2, MAX_ROLLOUTS)
        for name in ("steps", "evaluate_every", "patience"):
            check_integer(name, getattr(self, name))
        check_integer("seed", self.seed, 0)
        check_share("lr", self.lr)


@dataclass(frozen=True)
class TrainingResult:
    """Result of a training run.

    Attributes:
        step: Number of completed steps.
        best_step: Step with the best held-out score; 0 if no checkpoint is better than the base model.
        checkpoint: File of the checkpoint of the best step; None for step 0.
        before: Held-out score of the base model.
        best: Held-out score of the best step.
        history: Metrics by step.
        reason: Reason for the end of the run, for messages.
    """

    step: int
    best_step: int
    checkpoint: Path | None
    before: Score
    best: Score
    history: Mapping[int, Mapping[str, float]]
    reason: str


def run_training(
    finetune: Finetune,
    dataset: Dataset,
    options: TrainingOptions,
    *,
    on_step: Callable[[int, Mapping[str, float]], None] | None = None,
    log_folder: Path | None = None,
) -> TrainingResult:
    """Train a finetune on a dataset, or continue an earlier call.

    Every `evaluate_every` steps it scores the held-out images and saves a checkpoint; only the best and the latest one
    are kept. An exception, also a `KeyboardInterrupt`, loses at most the step that it interrupts.

    Args:
        finetune: Finetune to train.
        dataset: Images for training and for the score, of which the first 200 are used.
        options: Options. `steps`, `evaluate_every` and `patience` may differ from those of an earlier call.
        on_step: Called with the step and all of its metrics after each step and each score.
        log_folder: Folder for TensorBoard, which is only written if `tensorboard` is installed; None: none.

    Raises:
        MoondreamError: No image can be read, or the store fails.
        ValueError: An earlier call had another dataset, skill or classes.
    """
    with _summary_writer(log_folder) as write:

        def report(step: int, metrics: Mapping[str, float]) -> None:
            write(step, metrics)
            if on_step is not None:
                on_step(step, metrics)

        return _Run(finetune, dataset, options, report).run()


def held_out_examples(dataset: Dataset) -> list[Example]:
    """Return the examples of the held-out score: the same in each call.

    Args:
        dataset: Dataset; its first 200 held-out images are used.
    """
    rng = np.random.default_rng(0)
    images = dataset.held_out[:_MAX_HELD_OUT]
    return [example for image in images for example in examples_of(image, dataset.classes, rng)]


class _Run:
    """State of a training run."""

    def __init__(
        self,
        finetune: Finetune,
        dataset: Dataset,
        options: TrainingOptions,
        report: Callable[[int, Mapping[str, float]], None],
    ) -> None:
        self.finetune, self.dataset, self.options, self.report = finetune, dataset, options, report
        self.store, self.model = finetune.service.store, finetune.service.model
        self.step = self.store.get(finetune.finetune_id).step
        self.history = self.store.metrics(finetune.finetune_id)
        self.held_out = held_out_examples(dataset)
        self.scores: dict[int, Score] = {}
        self.unreadable: set[Path] = set()
        self.too_long: set[tuple[Path, str]] = set()

    def run(self) -> TrainingResult:
        """Train until the number of steps is reached, or the held-out score does not improve."""
        self.store.check_resumable(self.finetune.finetune_id)
        self._check_dataset()
        self._score(0)
        if not self.scores[0].examples:
            raise MoondreamError("none of the held-out images can be read; see the warnings for the reasons")
        self.held_out = [one.example for one in self.scores[0].examples]
        remaining = batches(self.dataset.train, self.dataset.classes, self.options.batch, self.options.seed)
        remaining = islice(remaining, self.step, None)
        skipped = 0
        reason = ""
        while not reason:
            if self.step and F1 not in self.history.get(self.step, {}) and self._is_score_due():
                self._score(self.step)
            if self._evaluations_since_best() >= self.options.patience:
                reason = f"no improvement in {self.options.patience} evaluations"
            elif self.step >= self.options.steps:
                reason = "all steps are complete"
            elif skipped == MAX_SKIPPED_STEPS:
                reason = f"no gradient in {skipped} successive batches"
                if self.options.method == "rl":
                    reason += ", because the replies to each example have equal rewards; start with method sft"
            else:
                skipped = 0 if self._train(next(remaining)) else skipped + 1
        return self._result(reason)

    def _check_dataset(self) -> None:
        """Check that the held-out images are those of earlier calls, so that scores can be compared."""
        names = [image.path.relative_to(self.dataset.folder).as_posix() for image in self.dataset.held_out]
        content = [self.options.skill, *self.dataset.classes, str(len(self.dataset.train)), *names]
        digest = float(zlib.crc32("\0".join(content).encode()))
        if self.history.get(0, {}).pop(DATASET, digest) != digest:
            raise ValueError(
                f"the finetune {self.finetune.name!r} was trained on another dataset, or with another skill, other "
                "classes or other held-out images; use another name for a new finetune"
            )
        self.finetune.log_metrics(0, {DATASET: digest})

    def _train(self, examples: Sequence[Example]) -> bool:
        """Train on a batch, and return whether the adapter changed."""
        groups = self._groups(pair for pair in with_images(examples, self.unreadable) if self._fits(pair[0]))
        if not groups:
            return False
        reply = self.finetune.train_step(groups, self.options.lr)
        if not reply["applied"]:
            return False
        self.step = reply["step"]
        names = ("sft_loss",) if self.options.method == "sft" else ("reward_mean", "reward_std", "kl")
        self._log(self.step, {name: reply[name] for name in (*names, "grad_norm")})
        return True

    def _fits(self, example: Example) -> bool:
        """Return whether the objects of an example fit into the context of the model."""
        config = self.model.config
        length = _PROMPT_POSITIONS + len(example.name) + _POSITIONS_PER_OBJECT[self.options.skill] * len(example.boxes)
        fits = length <= config.text.max_context - config.prefix_length
        if not fits and (example.image.path, example.name) not in self.too_long:
            self.too_long.add((example.image.path, example.name))
            logger.warning(
                "skipped: %s has %d boxes of %r, more than the context of the model can hold",
                example.image.path,
                len(example.boxes),
                example.name,
            )
        return fits

    def _groups(self, pairs: Iterable[tuple[Example, Any]]) -> list[dict[str, Any]]:
        """Return the groups of a training step; rollouts are sampled for "rl"."""
        requests = [
            ({"skill": self.options.skill, "object": example.name, "image": image}, {"boxes": list(example.boxes)})
            for example, image in pairs
        ]
        if self.options.method == "sft":
            return [{"mode": "sft", "request": request, "target": target} for request, target in requests]
        asked = (
            (i, {**request, "num_rollouts": self.options.num_rollouts, "ground_truth": target})
            for i, (request, target) in enumerate(requests)
        )
        replies = dict(self.finetune.rollout_stream(asked, max_concurrency=8))
        return [{"mode": "rl", **replies[i]} for i in range(len(requests))]

    # --- Scores and checkpoints ---------------------------------------------------------------------------------------

    def _is_score_due(self) -> bool:
        return self.step % self.options.evaluate_every == 0 or self.step >= self.options.steps

    def _score(self, step: int) -> None:
        """Score the adapter of the current step, or the base model for step 0, and save it as a checkpoint."""
        if step == 0:
            score = evaluate(self.model, self.held_out, self.options.skill)
        else:
            self.finetune.save_checkpoint()
            score = self._evaluate_checkpoint(step)
        self.scores[step] = score
        self._log(step, {F1: score.f1, REWARD: score.reward})
        if step:
            self._delete_checkpoints()

    def _evaluate_checkpoint(self, step: int) -> Score:
        adapter = str(self.finetune.checkpoint(step))
        try:
            return evaluate(self.model, self.held_out, self.options.skill, adapter)
        finally:
            self.model.remove_adapter(adapter)

    def _delete_checkpoints(self) -> None:
        """Delete the checkpoints of this run, but not the best and the latest one."""
        kept = {self._best_step(), self.step}
        for step in self._saved_steps() - kept:
            self.finetune.delete_checkpoint(step)
            self.scores.pop(step, None)

    def _saved_steps(self) -> set[int]:
        """Return the steps of this run with a checkpoint."""
        saved = self.store.saved_steps(self.finetune.finetune_id)
        return {step for step in saved if F1 in self.history.get(step, {})}

    def _best_step(self) -> int:
        """Return the first step with the best score whose adapter exists."""
        candidates = sorted({0, *self._saved_steps()})
        return max(candidates, key=lambda step: (round(self.history[step][F1], 6), self.history[step][REWARD]))

    def _evaluations_since_best(self) -> int:
        """Return the number of scores after the best one, without those of an earlier run with the other method."""
        other = "reward_mean" if self.options.method == "sft" else "sft_loss"
        last_other = max((step for step, metrics in self.history.items() if other in metrics), default=0)
        start = max(self._best_step(), last_other)
        return sum(F1 in metrics for step, metrics in self.history.items() if step > start)

    def _log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.finetune.log_metrics(step, metrics)
        self.history.setdefault(step, {}).update(metrics)
        self.report(step, self.history[step])

    def _result(self, reason: str) -> TrainingResult:
        best = self._best_step()
        if best not in self.scores:
            self.scores[best] = self._evaluate_checkpoint(best)
        checkpoint = self.finetune.checkpoint(best) if best else None
        return TrainingResult(self.step, best, checkpoint, self.scores[0], self.scores[best], self.history, reason)


@contextmanager
def _summary_writer(folder: Path | None) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
    """Return a function that writes metrics for TensorBoard, or does nothing if it is not installed."""
    if folder is None:
        yield lambda step, metrics: None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        logger.debug('tensorboard is not installed; pip install "moondream-cv[finetune]" for its plots')
        yield lambda step, metrics: None
        return
    with SummaryWriter(str(folder)) as writer:

        def write(step: int, metrics: Mapping[str, float]) -> None:
            for name, value in metrics.items():
                writer.add_scalar(name, value, step)

        yield write
