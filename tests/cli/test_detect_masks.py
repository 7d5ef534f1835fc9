"""`moondream-cv detect --masks`, with a tiny random SAM 2."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import supervision as sv
from PIL import Image

from moondream_cv.drawing import annotate, class_color
from moondream_cv.sam import SamMasks
from tests.helpers.tiny_sam import save_tiny_sam2

Run = Callable[..., Any]
RED, GREEN = [10, 5, 30, 45], [50, 20, 70, 40]


@pytest.fixture(scope="module")
def sam(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_sam2(tmp_path_factory.mktemp("sam"))


def test_masks_are_printed_as_run_lengths_and_drawn(run: Run, folder: Path, sam: str) -> None:
    classes = ("-c", "red,green")
    result = run("detect", "one.png", "two.jpg", *classes, "--masks", sam, "--json", "-o", "with", "--device", "cpu")
    assert result.exit_code == 0, result.output
    first, second = (json.loads(line) for line in result.stdout.splitlines())
    image = cv2.imread("one.png")[..., ::-1]
    expected = SamMasks(sam, device="cpu")(image, np.array([RED, GREEN], np.float32))
    for entry, mask in zip(first["objects"], expected, strict=True):
        assert entry["segmentation"]["size"] == [60, 80]
        assert (sv.rle_to_mask(entry["segmentation"]["counts"], (80, 60)) == mask).all()
    assert second["objects"] == []

    run("detect", "one.png", *classes, "-o", "without")
    changed = (cv2.imread("with/one.png") != cv2.imread("without/one.png")).any(axis=-1)
    assert changed.any()
    assert expected.any(axis=0)[changed].all()


def test_masks_of_slices_are_computed_on_the_whole_image(run: Run, folder: Path, sam: str) -> None:
    result = run("detect", "one.png", "-c", "red", "--slice", 40, "--masks", sam, "--json", "--device", "cpu")
    (entry,) = json.loads(result.stdout)["images"]
    assert entry["objects"]
    assert {tuple(found["segmentation"]["size"]) for found in entry["objects"]} == {(60, 80)}


def test_unusable_segmentation_models_are_reported(run: Run, folder: Path) -> None:
    result = run("detect", "one.png", "-c", "red", "--masks", "./missing")
    assert result.exit_code != 0
    assert "cannot load the segmentation model ./missing" in result.output


def test_masks_are_filled_with_the_color_of_the_class() -> None:
    mask = np.zeros((1, 40, 60), bool)
    mask[0, 10:20, 15:25] = True
    found = sv.Detections(np.array([[5, 5, 50, 35]], np.float32), mask=mask, class_id=np.array([3]))
    image = Image.new("RGB", (60, 40))
    drawn, plain = (np.asarray(annotate(image, item)).astype(int) for item in (found, found[:0]))
    assert drawn[12, 18] * 255 / 110 == pytest.approx(np.array(class_color(3)), abs=3)
    assert (drawn[25, 30] == plain[25, 30]).all()
