"""Report of a training run: plots, a table of scores, and the worst held-out images before and after training."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import supervision as sv
from PIL import Image, ImageDraw

from moondream_cv.drawing import annotate
from moondream_cv.errors import MoondreamError
from moondream_cv.evaluation.matching import Counts
from moondream_cv.finetune.datasets import Dataset
from moondream_cv.finetune.scoring import ScoredExample
from moondream_cv.finetune.training_run import F1, REWARD, TrainingOptions, TrainingResult
from moondream_cv.fonts import load_font
from moondream_cv.images import to_rgb

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NUM_IMAGES = 6
"""Number of the worst images in a report."""

_PANEL_SIDE, _MARGIN, _TITLE_HEIGHT = 480, 12, 36  # pixels
_TEXT_COLOR = (40, 44, 52)
_SMOOTHED_STEPS = 10
_COLORS = {"loss": "#1f5fbf", "score": "#1f5fbf", "reward": "#d9731a", "base": "#8a8f98"}


def write_report(folder: Path, title: str, dataset: Dataset, options: TrainingOptions, result: TrainingResult) -> Path:
    """Write `report.md`, `loss.png`, `score.png` and `images/`; existing files are replaced.

    Args:
        folder: Folder to write.
        title: Name of the finetune.
        dataset: Dataset of the run.
        options: Options of the run.
        result: Result of the run.

    Returns:
        The file `report.md`.

    Raises:
        MoondreamError: The folder cannot be written.
    """
    try:
        (folder / "images").mkdir(parents=True, exist_ok=True)
        for stale in (folder / "images").glob("worst-*.jpg"):
            stale.unlink()
        _plot_training(folder / "loss.png", options, result.history)
        _plot_scores(folder / "score.png", options, result)
        images = _write_images(folder / "images", options.skill, dataset, result)
        text = _markdown(title, dataset, options, result, images)
        (folder / "report.md").write_text(text, encoding="utf-8")
    except OSError as error:
        raise MoondreamError(f"the report in {folder} cannot be written: {error}") from error
    return folder / "report.md"


# --- Text -------------------------------------------------------------------------------------------------------------


def _markdown(
    title: str, dataset: Dataset, options: TrainingOptions, result: TrainingResult, images: Sequence[tuple[str, str]]
) -> str:
    metric = "F1 at IoU 0.5" if options.skill == "detect" else "F1 of points inside boxes"
    method = "supervised" if options.method == "sft" else "reinforcement learning"
    best = "the base model: no checkpoint has a better score"
    if result.checkpoint is not None:
        best = f"step {result.best_step}, adapter `{result.checkpoint.parents[1].name}@{result.best_step}`"
    lines = [
        f"# Fine-tuning of {title}",
        "",
        f"- dataset: {dataset.folder.name} ({dataset.layout}), {len(dataset.train)} images for training, "
        f"{len(dataset.held_out)} held out",
        f"- training: {options.skill}, {method}, {result.step} steps of {options.batch} examples, learning rate "
        f"{options.lr:g}",
        f"- end of the run: {result.reason}",
        f"- best: {best}",
        "",
        "## Held-out score",
        "",
        "![Held-out score by step](score.png)",
        "",
        f"| class | objects | {metric} before | after | change |",
        "|---|---:|---:|---:|---:|",
    ]
    for name in dataset.classes:
        before, after = result.before.counts_of(name), result.best.counts_of(name)
        if any(one.example.name == name for one in result.before.examples):
            lines.append(_row(name, before, after))
    total_before, total_after = (
        sum((one.counts for one in score.examples), Counts()) for score in (result.before, result.best)
    )
    lines.append(_row("**all**", total_before, total_after))
    lines += [
        "",
        f"Mean reward: {result.before.reward:.3f} before, {result.best.reward:.3f} after.",
        "",
        "## Training",
        "",
        "![Training by step](loss.png)",
        "",
        "## Worst held-out images",
        "",
        "Ground truth, base model, and best checkpoint, lowest reward first.",
    ]
    for file, description in images:
        lines += ["", f"{description}:", "", f"![{description}](images/{file})"]
    return "\n".join(lines) + "\n"


def _row(name: str, before: Counts, after: Counts) -> str:
    objects = before.true_positives + before.false_negatives
    return f"| {name} | {objects} | {before.f1:.3f} | {after.f1:.3f} | {after.f1 - before.f1:+.3f} |"


# --- Plots ------------------------------------------------------------------------------------------------------------


def _plot_training(path: Path, options: TrainingOptions, history: Mapping[int, Mapping[str, float]]) -> None:
    """Plot the loss of supervised training, or reward and KL divergence of reinforcement learning."""
    from matplotlib.figure import Figure

    if options.method == "sft":
        figure = Figure(figsize=(8, 4), layout="constrained")
        axes = figure.add_subplot()
        _plot_metric(axes, history, "sft_loss", "loss (cross-entropy per choice)")
    else:
        figure = Figure(figsize=(8, 6), layout="constrained")
        axes = figure.add_subplot(2, 1, 1)
        _plot_metric(axes, history, "reward_mean", "mean reward of rollouts (0 to 1)")
        axes = figure.add_subplot(2, 1, 2, sharex=axes)
        _plot_metric(axes, history, "kl", "KL divergence from\nthe base model, per choice")
    axes.set_xlabel("training step")
    figure.savefig(path, dpi=120)


def _plot_metric(axes: Axes, history: Mapping[int, Mapping[str, float]], name: str, label: str) -> None:
    """Plot a metric and its moving average."""
    steps, values = _series(history, name)
    axes.plot(steps, values, color=_COLORS["loss"], alpha=0.35, linewidth=1, label="each step")
    size = min(_SMOOTHED_STEPS, len(values) // 2)  # at least two points, which is the shortest line
    if size > 1:
        mean = np.convolve(values, np.full(size, 1 / size), "valid")
        axes.plot(steps[size - 1 :], mean, color=_COLORS["loss"], linewidth=2, label=f"mean of {size} steps")
    axes.set_ylabel(label)
    _finish(axes)


def _plot_scores(path: Path, options: TrainingOptions, result: TrainingResult) -> None:
    """Plot the held-out F1 and reward, with the base model and the best step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    metric = "F1 at IoU 0.5" if options.skill == "detect" else "F1 of points inside boxes"
    for name, label, color in ((F1, metric, _COLORS["score"]), (REWARD, "mean reward", _COLORS["reward"])):
        steps, values = _series(result.history, name)
        axes.plot(steps, values, color=color, marker="o", markersize=4, label=label)
    axes.axhline(result.before.f1, color=_COLORS["base"], linestyle="--", linewidth=1, label=f"{metric}, base model")
    axes.plot([result.best_step], [result.best.f1], "*", color=_COLORS["score"], markersize=15, label="best step")
    axes.set_xlabel("training step")
    axes.set_ylabel("held-out score (0 to 1)")
    axes.set_ylim(-0.02, 1.02)
    _finish(axes)
    figure.savefig(path, dpi=120)


def _series(history: Mapping[int, Mapping[str, float]], name: str) -> tuple[list[int], list[float]]:
    found = [(step, metrics[name]) for step, metrics in sorted(history.items()) if name in metrics]
    return [step for step, _ in found], [value for _, value in found]


def _finish(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.has_data():
        axes.legend(frameon=False, fontsize=9)


# --- Images -----------------------------------------------------------------------------------------------------------


def _write_images(folder: Path, skill: str, dataset: Dataset, result: TrainingResult) -> list[tuple[str, str]]:
    """Write the images with the lowest mean reward; return their file names and descriptions."""
    before, after = _by_image(result.before.examples), _by_image(result.best.examples)
    rewards = {path: float(np.mean([one.reward for one in found])) for path, found in after.items()}
    written = []
    for number, path in enumerate(sorted(rewards, key=lambda path: (rewards[path], path))[:NUM_IMAGES], 1):
        rgb = to_rgb(path)
        panels = [
            ("Ground truth", [(one.example.name, np.array(one.example.boxes)) for one in after[path]], "detect"),
            (f"Before: {_mean(before[path])}", [(one.example.name, one.predicted) for one in before[path]], skill),
            (f"After: {_mean(after[path])}", [(one.example.name, one.predicted) for one in after[path]], skill),
        ]
        drawn = [(title, _annotated(rgb, regions, kind, dataset.classes)) for title, regions, kind in panels]
        _side_by_side(drawn).save(folder / f"worst-{number}.jpg", quality=90)
        names = ", ".join(one.example.name for one in after[path])
        written.append((f"worst-{number}.jpg", f"{number}. {path.name} ({names})"))
    return written


def _by_image(examples: Sequence[ScoredExample]) -> dict[Path, list[ScoredExample]]:
    found: dict[Path, list[ScoredExample]] = defaultdict(list)
    for one in examples:
        found[one.example.image.path].append(one)
    return found


def _mean(examples: Sequence[ScoredExample]) -> str:
    return f"mean reward {np.mean([one.reward for one in examples]):.2f}"


def _annotated(
    rgb: npt.NDArray[np.uint8], regions: Sequence[tuple[str, npt.NDArray[Any]]], kind: str, classes: Sequence[str]
) -> Image.Image:
    """Return an image in the size of a panel with boxes or points, and the class names at them."""
    scale = _PANEL_SIDE / max(rgb.shape[:2])
    height, width = (max(1, round(side * scale)) for side in rgb.shape[:2])
    image = Image.fromarray(rgb).resize((width, height), Image.Resampling.LANCZOS)
    size = 4 if kind == "detect" else 2
    values = np.concatenate([np.zeros((0, size)), *(found.reshape(-1, size) for _, found in regions)])
    names = [name for name, found in regions for _ in range(len(found))]
    xyxy = np.tile(values, 4 // size) * (width, height, width, height)
    detections = sv.Detections(
        xyxy.astype(np.float32),
        class_id=np.array([classes.index(name) for name in names], np.int64),
        data={"class_name": np.array(names, np.str_)},
    )
    return annotate(image, detections)


def _side_by_side(panels: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Return images next to each other, each with a title above it."""
    font = load_font(18)
    width = max(*(image.width for _, image in panels), *(math.ceil(font.getlength(title)) for title, _ in panels))
    height = max(image.height for _, image in panels)
    size = _MARGIN + len(panels) * (width + _MARGIN), _TITLE_HEIGHT + height + _MARGIN
    canvas = Image.new("RGB", size, (255, 255, 255))
    draw = ImageDraw.Draw(canvas)
    for i, (title, image) in enumerate(panels):
        x = _MARGIN + i * (width + _MARGIN)
        font.draw(draw, (x, (_TITLE_HEIGHT - font.height) // 2), title, _TEXT_COLOR)
        canvas.paste(image, (x, _TITLE_HEIGHT))
    return canvas
