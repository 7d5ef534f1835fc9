"""`write_report`: plots, scores by class, and the worst held-out images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moondream_cv.dataset_layouts import LabeledImage
from moondream_cv.errors import MoondreamError
from moondream_cv.evaluation.matching import Counts
from moondream_cv.finetune.datasets import Dataset, Example
from moondream_cv.finetune.report import NUM_IMAGES, write_report
from moondream_cv.finetune.scoring import Score, ScoredExample
from moondream_cv.finetune.training_run import F1, REWARD, TrainingOptions, TrainingResult

BOX = (0.25, 0.25, 0.75, 0.75)


def make_run(folder: Path, skill: str = "detect", count: int = 8) -> tuple[Dataset, TrainingResult]:
    """Return a run on gray images with a "bolt" and no "nut", whose reward after training rises with their number."""
    images = []
    for i in range(count):
        path = folder / f"{i}.png"
        Image.new("RGB", (60 + 400 * (i % 2), 200), (128, 128, 128)).save(path)
        images.append(LabeledImage(path, {"bolt": (BOX,)}))
    size = 4 if skill == "detect" else 2
    none, found = np.zeros((0, size), np.float32), np.array([BOX if size == 4 else (0.5, 0.5)], np.float32)
    before = [ScoredExample(Example(one, "bolt", (BOX,)), none, 0.0, Counts(0, 0, 1)) for one in images]
    after = [ScoredExample(one.example, found, i / count, Counts(1, 0, 0)) for i, one in enumerate(before)]
    absent = [ScoredExample(Example(one, "nut", ()), none, 1.0, Counts()) for one in images]
    history = {
        step: {"sft_loss": 4 / step, "reward_mean": 0.1 * step, "kl": 0.01, F1: 0.2 * step, REWARD: 0.1}
        for step in (1, 2, 3)
    }
    dataset = Dataset(folder, "COCO", ("bolt", "nut", "gear"), tuple(images), tuple(images))
    scores = Score((*before, *absent)), Score((*after, *absent))
    checkpoint = folder / "0A1B" / "checkpoints" / "2.safetensors"
    return dataset, TrainingResult(3, 2, checkpoint, *scores, history, "all steps are complete")


@pytest.mark.parametrize(("skill", "method"), [("detect", "sft"), ("point", "rl")])
def test_report_has_scores_plots_and_the_worst_images(skill: str, method: str, tmp_path: Path) -> None:
    dataset, result = make_run(tmp_path, skill)
    options = TrainingOptions(skill=skill, method=method, steps=3)
    path = write_report(tmp_path / "report", "parts", dataset, options, result)
    text = path.read_text()
    assert "# Fine-tuning of parts" in text
    assert "| bolt | 8 | 0.000 | 1.000 | +1.000 |" in text
    assert "| nut | 0 | 1.000 | 1.000 | +0.000 |" in text
    assert "| gear |" not in text  # no held-out example
    assert "| **all** | 8 | 0.000 | 1.000 | +1.000 |" in text
    assert "- best: step 2, adapter `0A1B@2`" in text
    for plot in ("loss.png", "score.png"):
        assert Image.open(tmp_path / "report" / plot).width == 960
    images = sorted((tmp_path / "report" / "images").iterdir())
    assert [image.name for image in images] == [f"worst-{i}.jpg" for i in range(1, NUM_IMAGES + 1)]
    order = [text.index(f"{number}. {number - 1}.png (bolt, nut)") for number in range(1, NUM_IMAGES + 1)]
    assert order == sorted(order)


def test_panels_show_ground_truth_and_both_predictions(tmp_path: Path) -> None:
    dataset, result = make_run(tmp_path, count=2)
    write_report(tmp_path / "report", "parts", dataset, TrainingOptions(), result)
    pixels = np.asarray(Image.open(tmp_path / "report" / "images" / "worst-2.jpg")).astype(int)  # 460 x 200 pixels
    panels = np.split(pixels[36:, 12:], 3, axis=1)
    colored = [(panel.max(-1) - panel.min(-1) > 60).sum() for panel in panels]
    assert colored[0] > 500
    assert colored[1] == 0
    assert colored[2] > 500


def test_labels_show_letters_beyond_ascii(tmp_path: Path) -> None:
    dataset, result = make_run(tmp_path, count=2)
    panels = []
    for name in ("Größe", "Grüße"):
        before, after = (
            Score(tuple(replace(one, example=replace(one.example, name=name)) for one in score.examples[:2]))
            for score in (result.before, result.best)
        )
        renamed = replace(dataset, classes=(name,)), replace(result, before=before, best=after)
        write_report(tmp_path / "report", "parts", renamed[0], TrainingOptions(), renamed[1])
        panels.append(np.asarray(Image.open(tmp_path / "report" / "images" / "worst-1.jpg")).astype(int))
    assert np.abs(panels[0] - panels[1]).max() > 100


def test_report_replaces_images_of_an_earlier_one(tmp_path: Path) -> None:
    dataset, result = make_run(tmp_path)
    write_report(tmp_path / "report", "parts", dataset, TrainingOptions(), result)
    kept = Score(tuple(one for one in result.best.examples if one.example.image.path.name == "0.png"))
    changed = replace(result, best=kept, best_step=0, checkpoint=None)
    text = write_report(tmp_path / "report", "parts", dataset, TrainingOptions(), changed).read_text()
    assert [path.name for path in (tmp_path / "report" / "images").iterdir()] == ["worst-1.jpg"]
    assert "- best: the base model: no checkpoint has a better score" in text


def test_folder_that_cannot_be_written_raises(tmp_path: Path) -> None:
    dataset, result = make_run(tmp_path)
    (tmp_path / "report").write_text("a file")
    with pytest.raises(MoondreamError, match=r"the report in .*report cannot be written"):
        write_report(tmp_path / "report", "parts", dataset, TrainingOptions(), result)
