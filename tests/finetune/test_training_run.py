"""`run_training`: held-out scores, early stopping, checkpoints and resumption, on the tiny model."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from moondream_cv import load
from moondream_cv.dataset_layouts import LabeledImage
from moondream_cv.engine.local_model import LocalModel
from moondream_cv.errors import MoondreamError
from moondream_cv.evaluation.matching import Counts
from moondream_cv.finetune import ft, training_run
from moondream_cv.finetune.datasets import Dataset, Example, load_dataset
from moondream_cv.finetune.scoring import Score, ScoredExample, evaluate
from moondream_cv.finetune.training_run import (
    F1,
    REWARD,
    TrainingOptions,
    TrainingResult,
    held_out_examples,
    run_training,
)
from tests.helpers.labeled_scenes import arrow_scenes, write_dataset

SHORT = TrainingOptions(steps=6, batch=4, evaluate_every=2, patience=10)


@pytest.fixture(scope="module")
def tiny() -> LocalModel:
    model = load("tiny", device="cpu")
    model.show_progress = False
    return model


@pytest.fixture(scope="module")
def arrows(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Return scenes with arrows, which the tiny model does not detect: 120 to train, 20 held out."""
    folder = tmp_path_factory.mktemp("arrows")
    write_dataset(folder, arrow_scenes(20, seed=1), "yolo", "valid")
    return load_dataset(write_dataset(folder, arrow_scenes(120, seed=0), "yolo"), "arrow")


@pytest.fixture(scope="module")
def small(arrows: Dataset) -> Dataset:
    return replace(arrows, train=arrows.train[:12], held_out=arrows.held_out[:3])


class FixedScores:
    """Replaces `evaluate` in the run: returns a fixed F1 for the base model, and for each second step."""

    def __init__(self, example: Example, values: list[float]) -> None:
        self.example, self.values = example, values

    def __call__(self, model: LocalModel, examples: list[Example], skill: str, adapter: str | None = None) -> Score:
        step = 0 if adapter is None else int(Path(adapter).stem)
        right = round(self.values[step // 2] * 100)
        counts = Counts(right, 100 - right, 100 - right)
        return Score((ScoredExample(self.example, np.zeros((0, 4), np.float32), right / 100, counts),))


def train(
    model: LocalModel, dataset: Dataset, root: Path, options: TrainingOptions = SHORT, **more: Any
) -> tuple[TrainingResult, list[int]]:
    """Run or continue the finetune "arrows"; return the result and the steps of its checkpoints."""
    with ft("arrows", 8, model=model, root=root) as finetune:
        result = run_training(finetune, dataset, options, **more)
        return result, [one["step"] for one in finetune.list_checkpoints()["checkpoints"]]


# --- Training ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_supervised_run_teaches_an_unseen_class(tiny: LocalModel, arrows: Dataset, tmp_path: Path) -> None:
    result, _ = train(tiny, arrows, tmp_path, TrainingOptions(steps=40, evaluate_every=40))
    assert result.before.f1 <= 0.2
    assert result.best.f1 >= 0.6
    assert result.best.reward >= result.before.reward + 0.2
    assert result.history[result.best_step][F1] == result.best.f1
    assert result.history[1]["sft_loss"] > result.history[40]["sft_loss"]

    # The checkpoint of the best step has this score
    assert result.checkpoint is not None
    loaded = load("tiny", device="cpu", adapter=result.checkpoint)
    loaded.show_progress = False
    assert evaluate(loaded, held_out_examples(arrows), "detect").f1 == result.best.f1


@pytest.mark.slow
def test_points_are_trained_with_boxes(tiny: LocalModel, arrows: Dataset, tmp_path: Path) -> None:
    result, _ = train(tiny, arrows, tmp_path, TrainingOptions(skill="point", steps=30, evaluate_every=30))
    assert result.before.f1 <= 0.2
    assert result.best.f1 >= 0.5


def test_reinforcement_run_logs_rewards_and_is_repeatable(tiny: LocalModel, arrows: Dataset, tmp_path: Path) -> None:
    known = load_dataset(arrows.folder)
    dataset = replace(known, train=known.train[:6], held_out=known.held_out[:2])
    options = TrainingOptions(method="rl", steps=2, batch=4, num_rollouts=4, evaluate_every=2)
    result, _ = train(tiny, dataset, tmp_path / "first", options)
    assert result.step == 2
    for step in (1, 2):
        assert 0 < result.history[step]["reward_mean"] < 1
        assert result.history[step]["reward_std"] > 0
        assert {"kl", "grad_norm"} <= result.history[step].keys()
    again, _ = train(tiny, dataset, tmp_path / "second", options)
    assert again.history == result.history


def test_run_without_a_gradient_ends(
    tiny: LocalModel, small: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_run, "MAX_SKIPPED_STEPS", 2)
    dataset = replace(small, train=tuple(replace(image, boxes={}) for image in small.train))
    options = TrainingOptions(method="rl", steps=3, batch=2, num_rollouts=2)  # no rollout has an arrow: rewards are 1
    result, checkpoints = train(tiny, dataset, tmp_path, options)
    assert (result.step, result.best_step, result.checkpoint) == (0, 0, None)
    assert result.reason.startswith("no gradient in 2 successive batches, because the replies")
    assert checkpoints == []


# --- Scores, checkpoints and early stopping ---------------------------------------------------------------------------


def test_score_counts_matches_and_rewards(tiny: LocalModel, tmp_path: Path) -> None:
    scene = arrow_scenes(1)[0]
    Image.fromarray(scene.image).save(tmp_path / "scene.png")
    known = next(item for item in scene.objects if item.shape != "arrow")
    width, height = scene.resolution_wh
    scaled = [np.array(item.xyxy) / (width, height, width, height) for item in scene.named(known.name)]
    boxes = tuple(tuple(map(float, box)) for box in scaled)
    image = LabeledImage(tmp_path / "scene.png", {known.name: boxes})  # type: ignore[dict-item]
    right, absent = Example(image, known.name, boxes), Example(image, "arrow", boxes)  # type: ignore[arg-type]
    for skill in ("detect", "point"):
        score = evaluate(tiny, [right, absent], skill)
        assert score.counts_of(known.name) == Counts(len(boxes), 0, 0)
        assert score.counts_of("arrow").false_negatives == len(boxes)
        assert score.examples[0].reward > 0.8
        assert score.reward == np.mean([one.reward for one in score.examples])
        assert score.f1 == sum((one.counts for one in score.examples), Counts()).f1


def test_run_stops_without_improvement_and_keeps_the_best_checkpoint(
    tiny: LocalModel, small: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = held_out_examples(small)[0]
    monkeypatch.setattr(training_run, "evaluate", FixedScores(example, [0.1, 0.2, 0.5, 0.5, 0.3, 0.9]))
    result, checkpoints = train(tiny, small, tmp_path, replace(SHORT, steps=100, patience=2))
    assert result.reason == "no improvement in 2 evaluations"
    assert (result.step, result.best_step) == (8, 4)
    assert checkpoints == [8, 4]
    assert [metrics[F1] for _, metrics in sorted(result.history.items()) if F1 in metrics] == [0.1, 0.2, 0.5, 0.5, 0.3]
    assert result.checkpoint == tmp_path / result.checkpoint.parts[-3] / "checkpoints" / "4.safetensors"  # type: ignore[union-attr]

    # The same call has no more steps to run; more patience continues
    again, _ = train(tiny, small, tmp_path, replace(SHORT, steps=100, patience=2))
    assert (again.step, again.best_step) == (8, 4)
    longer, checkpoints = train(tiny, small, tmp_path, replace(SHORT, steps=10, patience=9))
    assert (longer.step, longer.best_step) == (10, 10)


def test_patience_starts_again_with_another_method(
    tiny: LocalModel, arrows: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = load_dataset(arrows.folder)
    dataset = replace(known, train=known.train[:6], held_out=known.held_out[:2])
    scores = FixedScores(held_out_examples(dataset)[0], [0.5, 0.6, 0.4, 0.4, 0.4, 0.7])
    monkeypatch.setattr(training_run, "evaluate", scores)
    first = replace(SHORT, steps=10, patience=2)
    stopped, _ = train(tiny, dataset, tmp_path, first)
    assert (stopped.step, stopped.best_step) == (6, 2)
    second = replace(first, method="rl", num_rollouts=4)
    continued, checkpoints = train(tiny, dataset, tmp_path, second)
    assert (continued.step, continued.best_step, checkpoints) == (10, 10, [10])


def test_base_model_is_the_best_if_no_checkpoint_is_better(
    tiny: LocalModel, small: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_run, "evaluate", FixedScores(held_out_examples(small)[0], [0.5, 0.4, 0.5, 0.3]))
    result, checkpoints = train(tiny, small, tmp_path)
    assert (result.best_step, result.checkpoint, checkpoints) == (0, None, [6])
    assert result.best is result.before


def test_checkpoints_saved_by_the_user_are_kept(
    tiny: LocalModel, small: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_run, "evaluate", FixedScores(held_out_examples(small)[0], [0.1, 0.2, 0.3, 0.4]))
    with ft("arrows", 8, model=tiny, root=tmp_path) as finetune:

        def save(step: int, metrics: Mapping[str, float]) -> None:
            if step == 3:
                finetune.save_checkpoint()

        run_training(finetune, small, SHORT, on_step=save)
        assert [one["step"] for one in finetune.list_checkpoints()["checkpoints"]] == [6, 3]


# --- Resumption -------------------------------------------------------------------------------------------------------


def test_interrupted_run_continues_to_the_same_result(tiny: LocalModel, small: Dataset, tmp_path: Path) -> None:
    straight, _ = train(tiny, small, tmp_path / "straight")

    def stop(at: int) -> Any:
        def on_step(step: int, metrics: Mapping[str, float]) -> None:
            if step == at:
                raise KeyboardInterrupt

        return on_step

    for at in (3, 4):  # between two scores, and before a score
        with pytest.raises(KeyboardInterrupt):
            train(tiny, small, tmp_path / "resumed", on_step=stop(at))
    resumed, checkpoints = train(tiny, small, tmp_path / "resumed")
    assert resumed.step == 6
    assert resumed.history == straight.history
    assert 6 in checkpoints
    for first, second in zip(saved_tensors(tmp_path / "straight"), saved_tensors(tmp_path / "resumed"), strict=True):
        assert first[0] == second[0]
        assert np.array_equal(first[1], second[1])


def saved_tensors(root: Path) -> list[tuple[str, Any]]:
    """Return the tensors of the checkpoint of step 6."""
    (path,) = root.glob("*/checkpoints/6.safetensors")
    return [(name, tensor.numpy()) for name, tensor in sorted(load_file(path).items())]


def test_callback_receives_each_step_and_score(tiny: LocalModel, small: Dataset, tmp_path: Path) -> None:
    calls: list[tuple[int, bool]] = []
    train(tiny, small, tmp_path, replace(SHORT, steps=3), on_step=lambda step, found: calls.append((step, F1 in found)))
    assert calls == [(0, True), (1, False), (2, False), (2, True), (3, False), (3, True)]


# --- Errors -----------------------------------------------------------------------------------------------------------


def test_unreadable_images_are_skipped(
    tiny: LocalModel, small: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = small.folder / "broken.png"
    path.write_bytes(small.train[0].path.read_bytes()[:200])
    broken = replace(small.train[0], path=path)
    dataset = replace(small, train=(broken, *small.train[1:3]), held_out=(broken, small.held_out[0]))
    with caplog.at_level(logging.WARNING):
        result, _ = train(tiny, dataset, tmp_path / "root", replace(SHORT, steps=4, evaluate_every=4))
    assert result.step == 4
    assert caplog.text.count("broken.png") == 2  # once for all held-out scores, and once for all epochs
    assert {one.example.image.path for one in result.best.examples} == {small.held_out[0].path}
    with pytest.raises(MoondreamError, match="none of the held-out images can be read"):
        train(tiny, replace(dataset, held_out=(broken,)), tmp_path / "other")


def test_examples_longer_than_the_context_are_skipped(
    tiny: LocalModel, small: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    crowded = replace(small.train[0], boxes={"arrow": ((0.1, 0.1, 0.2, 0.2),) * 150})
    with caplog.at_level(logging.WARNING):
        result, _ = train(tiny, replace(small, train=(crowded, *small.train[1:3])), tmp_path, replace(SHORT, steps=4))
    assert result.step == 4
    message = "has 150 boxes of 'arrow', more than the context of the model can hold"
    assert caplog.text.count(message) == 1  # in several epochs


def test_another_dataset_or_skill_needs_another_name(tiny: LocalModel, small: Dataset, tmp_path: Path) -> None:
    options = replace(SHORT, steps=1)
    train(tiny, small, tmp_path, options)
    others = [
        (replace(small, held_out=small.held_out[1:]), options),
        (replace(small, classes=("arrow", "dog")), options),
        (small, replace(options, skill="point")),
    ]
    for dataset, changed in others:
        with pytest.raises(ValueError, match=r"'arrows' was trained on another dataset, .*; use another name"):
            train(tiny, dataset, tmp_path, changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"skill": "query"}, "skill must be one of"),
        ({"method": "dpo"}, "method must be one of"),
        ({"steps": 0}, "steps must be"),
        ({"batch": 65}, "batch must be"),
        ({"num_rollouts": 1}, "num_rollouts must be"),
        ({"evaluate_every": 0}, "evaluate_every must be"),
        ({"patience": -1}, "patience must be"),
        ({"lr": 0}, "lr must be above 0 and at most 1, got 0"),
    ],
)
def test_invalid_options_raise(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingOptions(**changed)


# --- TensorBoard ------------------------------------------------------------------------------------------------------


def test_metrics_are_written_for_tensorboard(tiny: LocalModel, small: Dataset, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result, _ = train(tiny, small, tmp_path / "root", replace(SHORT, steps=2), log_folder=tmp_path / "logs")
    events = EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    assert {"sft_loss", "grad_norm", F1, REWARD} <= {*events.Tags()["scalars"]}
    losses = {event.step: event.value for event in events.Scalars("sft_loss")}
    assert losses == pytest.approx({step: result.history[step]["sft_loss"] for step in (1, 2)})


def test_run_without_tensorboard_writes_no_logs(
    tiny: LocalModel, small: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    train(tiny, small, tmp_path / "root", replace(SHORT, steps=1), log_folder=tmp_path / "logs")
    assert not (tmp_path / "logs").exists()
