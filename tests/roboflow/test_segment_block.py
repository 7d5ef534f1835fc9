"""Test the segment block, with a tiny random SAM 2: masks, failures, and Roboflow's blocks for segmentations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from moondream_cv import Detector
from moondream_cv.engine.local_model import LocalModel
from moondream_cv.sam import SamMasks
from moondream_cv_blocks import ModelPool, load_blocks, pool
from tests.helpers.roboflow_app import skip_without_server
from tests.helpers.tiny_sam import save_tiny_sam2
from tests.helpers.workflows import (
    assert_failed,
    compile_error,
    make_engine,
    minimal_step,
    run_engine,
    run_workflow,
    step,
    workflow,
)

skip_without_server()
pytestmark = pytest.mark.roboflow

NAMES = ["dog", "red circle", "umbrella"]


@pytest.fixture(scope="module")
def sam(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_sam2(tmp_path_factory.mktemp("sam"))


@pytest.fixture
def segment(sam: str) -> Callable[..., dict[str, Any]]:
    """Return a function that returns a segment step."""
    return lambda **fields: step("segment", "segment", **{"class_names": NAMES, "masks": sam, **fields})


def test_predictions_have_the_masks_of_the_detector(
    segment: Callable[..., dict[str, Any]], sam: str, tiny: LocalModel, bgr: np.ndarray
) -> None:
    found, other = (result["predictions"] for result in run_workflow(workflow(segment()), [bgr, bgr[:, ::-1].copy()]))
    expected = Detector(tiny, masks=SamMasks(sam, device="cpu"))(bgr, NAMES)
    assert found.data["class_name"].tolist() == expected.data["class_name"].tolist() == NAMES[:2]
    assert (found.mask == expected.mask).mean() > 0.99
    assert set(found.data["prediction_type"]) == {"instance-segmentation"}
    assert len(other) > 0
    (nothing,) = run_workflow(workflow(segment(class_names="umbrella")), bgr)
    assert len(nothing["predictions"]) == 0
    assert not nothing["error_status"]


def test_serialized_predictions_have_polygons(segment: Callable[..., dict[str, Any]], bgr: np.ndarray) -> None:
    (result,) = run_workflow(workflow(segment()), bgr, serialize=True)
    predictions = result["predictions"]["predictions"]
    assert {found["class"] for found in predictions} <= set(NAMES)
    assert predictions
    assert all(len(found["points"]) >= 3 for found in predictions)


def test_masks_in_crops_keep_their_position(segment: Callable[..., dict[str, Any]], bgr: np.ndarray) -> None:
    crop = {
        "type": "roboflow_core/absolute_static_crop@v1",
        "name": "crop",
        "images": "$inputs.image",
        "x_center": 160,
        "y_center": 120,
        "width": 300,
        "height": 220,
    }
    drawing = {
        "type": "roboflow_core/mask_visualization@v1",
        "name": "draw",
        "image": "$steps.crop.crops",
        "predictions": "$steps.segment.predictions",
    }
    definition = workflow(
        crop,
        segment(images="$steps.crop.crops"),
        drawing,
        outputs=["crop.crops", "segment.predictions", "draw.image"],
    )
    (result,) = run_workflow(definition, bgr)
    masks = result["segment.predictions"].mask  # of the whole image
    assert masks.shape[1:] == (240, 320)
    before, after = (result[name].numpy_image for name in ("crop.crops", "draw.image"))
    changed = (before != after).any(axis=-1)
    assert changed.any()
    assert masks.any(axis=0)[10:230, 10:310][changed].all()


def test_polygons_of_predictions_are_drawn(segment: Callable[..., dict[str, Any]], bgr: np.ndarray) -> None:
    drawing = {
        "type": "roboflow_core/polygon_visualization@v1",
        "name": "draw",
        "image": "$inputs.image",
        "predictions": "$steps.segment.predictions",
    }
    (result,) = run_workflow(workflow(segment(), drawing, outputs=["draw.image"]), bgr)
    assert (result["draw.image"].numpy_image != bgr).any()


def test_segmentation_model_is_loaded_once(
    segment: Callable[..., dict[str, Any]], sam: str, bgr: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []

    def load(name: str, device: str | None) -> SamMasks:
        loaded.append(name)
        return SamMasks(name, device=device)

    monkeypatch.setattr(pool, "SamMasks", load)
    engine = make_engine(workflow(segment()))
    for _ in range(2):
        assert len(run_engine(engine, [bgr, bgr])[1]["predictions"]) > 0
    assert loaded == [sam]


def test_unusable_segmentation_models_fail_the_images(
    segment: Callable[..., dict[str, Any]], bgr: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(workflow(segment(masks="./missing")))
    for _ in range(2):  # the second run does not try again
        for outputs in run_engine(engine, [bgr, bgr]):
            assert_failed("segment", outputs, "cannot load the segmentation model ./missing")
    definition = workflow(segment(masks="$inputs.masks"), parameters=["masks"])
    (outputs,) = run_engine(make_engine(definition), bgr, masks=5)
    assert_failed("segment", outputs, "got int")


def test_allowed_models_apply_to_segmentation_models(
    segment: Callable[..., dict[str, Any]],
    sam: str,
    bgr: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("MOONDREAM_CV_BLOCKS_MODELS", "tiny")
    message = compile_error(workflow(segment(confidence=0.01)))  # the engine caches workflows
    assert message.startswith("masks: ")
    assert "is not allowed" in message
    monkeypatch.setenv("MOONDREAM_CV_BLOCKS_MODELS", f"tiny,{sam}")
    load_blocks()
    assert not caplog.records
    (outputs,) = run_engine(make_engine(workflow(segment())), bgr)
    assert len(outputs["predictions"]) > 0
    with pytest.raises(ValueError, match="is not allowed"):
        ModelPool().get_masks("facebook/sam2.1-hiera-small")


def test_default_segmentation_model_is_sam2() -> None:
    block = next(block for block in load_blocks() if block.__name__ == "SegmentBlock")
    least = block.get_manifest()(**minimal_step("segment"))
    assert least.masks == "facebook/sam2.1-hiera-small"
