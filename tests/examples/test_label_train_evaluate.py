"""examples/label_train_evaluate.py with the tiny model, which has not been trained on arrows."""

from __future__ import annotations

import re
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moondream_cv import Detector
from moondream_cv.dataset_layouts import read_labels
from moondream_cv.evaluation.matching import Counts, match_boxes
from moondream_cv.geometry import normalize_xyxy
from moondream_cv.scenes import render_scene
from tests.helpers.labeled_scenes import write_dataset

EXAMPLE = str(Path(__file__).parents[2] / "examples" / "label_train_evaluate.py")
SCORES = r"AP (\d\.\d{3}), F1 (\d\.\d{3}) on (\d+) images"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the current folder, with images in `photos`, and the labels of people in `corrected`."""
    scenes = [render_scene(seed, names=["red arrow", "blue arrow", "dog"]) for seed in range(20)]
    write_dataset(tmp_path / "corrected", scenes, "yolo")
    shutil.copytree(tmp_path / "corrected" / "train" / "images", tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_example(*arguments: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [EXAMPLE, "photos", "arrow", "dog", "--model", "tiny", *arguments])
        runpy.run_path(EXAMPLE, run_name="__main__")


def f1_of(adapter: str | None) -> float:
    """Return the F1 on the test split, without supervision."""
    labels, counts = read_labels(Path("run/dataset"), for_training=False), Counts()
    with Detector("tiny", adapter=adapter, device="cpu") as detector:
        for image in labels.splits["test"]:
            found = detector(str(image.path), ["arrow", "dog"])
            boxes = normalize_xyxy(found.xyxy, Image.open(image.path).size)
            for class_id, name in enumerate(["arrow", "dog"]):
                true = np.array(image.boxes.get(name, ()), np.float32).reshape(-1, 4)
                counts += match_boxes(boxes[found.class_id == class_id], true)[0]
    return counts.f1


@pytest.mark.slow
def test_training_on_reviewed_labels_changes_the_scores(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Label
    run_example()
    assert capsys.readouterr().out.startswith("Labeled 20 images; correct the labels")
    assert Path("run/dataset/report.html").exists()
    before = {path.read_text() for path in Path("run/dataset").glob("*/_annotations.coco.json")}
    assert len(before) == 3

    # Train on the reviewed labels
    run_example("--reviewed", "corrected", "--steps", "25")
    reviewed, *printed = capsys.readouterr().out.splitlines()
    assert reviewed == "Reviewed images: 20"
    (ap, f1, num_images), (ap_after, f1_after, _) = re.findall(SCORES, "\n".join(printed))
    adapter = re.search(r"with the adapter (.*/25\.safetensors)", "\n".join(printed))
    assert adapter is not None
    assert Path(adapter[1]).exists()
    assert num_images == "4"

    # The scores are those of the model without and with the adapter
    assert float(f1) == pytest.approx(f1_of(None), abs=6e-4)
    assert float(f1_after) == pytest.approx(f1_of(adapter[1]), abs=6e-4)
    assert float(f1_after) != float(f1)
    assert float(ap_after) != float(ap)
