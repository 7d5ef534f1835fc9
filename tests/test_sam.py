"""Masks of SAM and SAM 2 with tiny random models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from moondream_cv import sam
from moondream_cv.errors import CheckpointError
from moondream_cv.sam import SamMasks
from tests.helpers.tiny_sam import save_tiny_sam2, tiny_sam, tiny_sam2

HAS_SAM2 = hasattr(transformers, "Sam2Model")
needs_sam2 = pytest.mark.skipif(not HAS_SAM2, reason="the installed transformers has no SAM 2")
BOXES = np.array([[4, 4, 40, 50], [60, 10, 118, 70], [0, 0, 120, 80]], np.float32)

pytestmark = pytest.mark.compat


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (80, 120, 3)).astype(np.uint8)


@pytest.fixture(params=["sam", pytest.param("sam2", marks=needs_sam2)])
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_sam() if request.param == "sam" else tiny_sam2()


def test_each_box_gets_a_mask_of_the_image_size(model: Any, image: np.ndarray) -> None:
    masks = SamMasks(model)(image, BOXES)
    assert masks.shape == (3, 80, 120)
    assert masks.dtype == np.bool_
    assert all(0 < mask.mean() < 1 for mask in masks)
    for index, box in enumerate(BOXES):
        alone = SamMasks(model)(image, box[None])
        assert (masks[index] == alone[0]).mean() > 0.999
        assert (masks[index] != masks[index - 1]).mean() > 0.01


def test_masks_depend_on_points(model: Any, image: np.ndarray) -> None:
    points = np.array([[10, 10, 10, 10], [100, 60, 100, 60]], np.float32)
    first, second, box = SamMasks(model)(image, np.concatenate([points, BOXES[:1]]))
    assert (first != second).any()
    assert (box == SamMasks(model)(image, BOXES[:1])[0]).mean() > 0.999


@pytest.mark.parametrize("hw", [(1, 1), (1, 500), (500, 1)])
def test_narrow_images_get_masks(model: Any, hw: tuple[int, int]) -> None:
    height, width = hw
    boxes = np.array([[0, 0, width, height], [0, 0, 0, 0]], np.float32)
    assert SamMasks(model)(np.zeros((*hw, 3), np.uint8), boxes).shape == (2, *hw)


def test_no_boxes_give_no_masks(image: np.ndarray) -> None:
    assert SamMasks(tiny_sam())(image, np.zeros((0, 4), np.float32)).shape == (0, 80, 120)


def test_many_boxes_are_decoded_in_several_passes(model: Any, image: np.ndarray) -> None:
    boxes = np.repeat(BOXES, 50, axis=0)
    masks = SamMasks(model)(image, boxes)
    assert (masks == np.repeat(SamMasks(model)(image, BOXES), 50, axis=0)).mean() > 0.999


def test_bfloat16_changes_few_pixels(model: Any, image: np.ndarray) -> None:
    expected = SamMasks(model)(image, BOXES)
    assert (SamMasks(model.to(torch.bfloat16))(image, BOXES) == expected).mean() > 0.9


def test_masks_are_those_of_the_processor(image: np.ndarray) -> None:
    processor_class = getattr(transformers, "SamImageProcessorPil", transformers.SamImageProcessor)
    size = {"height": 64, "width": 64}
    processor = transformers.SamProcessor(processor_class(size={"longest_edge": 64}, pad_size=size))
    model = tiny_sam()
    inputs = processor(images=image, input_boxes=[BOXES.tolist()], return_tensors="pt")
    pixels, _ = SamMasks(model)._preprocess(image)
    assert (pixels - inputs["pixel_values"]).abs().max() < 0.05  # two steps of 8-bit values

    inputs["input_boxes"] = inputs["input_boxes"].float()
    with torch.inference_mode():
        output = model(**{name: inputs[name] for name in ("pixel_values", "input_boxes")})
    (processed,) = processor.post_process_masks(
        output.pred_masks, inputs["original_sizes"], inputs["reshaped_input_sizes"]
    )
    best = processed[torch.arange(3), output.iou_scores[0].argmax(dim=-1)].numpy()
    assert (SamMasks(model)(image, BOXES) == best).mean() > 0.99


@needs_sam2
def test_sam2_is_loaded_from_a_folder(tmp_path: Path, image: np.ndarray, caplog: pytest.LogCaptureFixture) -> None:
    loaded = SamMasks(save_tiny_sam2(tmp_path), device="cpu")
    assert isinstance(loaded.model, transformers.Sam2Model)
    assert (loaded(image, BOXES) == SamMasks(tiny_sam2())(image, BOXES)).all()
    assert not caplog.records


def test_sam_is_loaded_from_a_folder(tmp_path: Path, image: np.ndarray) -> None:
    tiny_sam().save_pretrained(tmp_path)
    assert (SamMasks(tmp_path, device="cpu")(image, BOXES) == SamMasks(tiny_sam())(image, BOXES)).all()


def test_models_that_cannot_be_used_are_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match=r"model .*missing: there is no such folder, and it is not the name"):
        SamMasks(tmp_path / "missing", device="cpu")
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(CheckpointError, match=r"is not a SAM or SAM 2 checkpoint: its model type is 'vit'"):
        SamMasks(tmp_path, device="cpu")
    (tmp_path / "config.json").write_text('{"model_type": "sam2"}')
    monkeypatch.setitem(sam._CLASSES, "sam2", "Sam9Model")  # a class that the installed transformers does not have
    with pytest.raises(CheckpointError, match="needs a transformers with Sam9Model"):
        SamMasks(tmp_path, device="cpu")
    with pytest.raises(ValueError, match="got Linear"):
        SamMasks(torch.nn.Linear(1, 1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="device applies to a model given by name only"):
        SamMasks(tiny_sam(), device="cpu")
    with pytest.raises(ValueError, match="must have weights, got a SamModel on the device meta"):
        SamMasks(tiny_sam().to("meta"))


def test_damaged_checkpoints_are_rejected(tmp_path: Path) -> None:
    tiny_sam().save_pretrained(tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    with pytest.raises(CheckpointError, match=r"config\.json: it is a file; use a folder"):
        SamMasks(config, device="cpu")

    state = load_file(weights)
    save_file({name: value for name, value in state.items() if "iou_token" not in name}, weights, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 weights, such as mask_decoder\.iou_token\.weight"):
        SamMasks(tmp_path, device="cpu")
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot load the segmentation model"):
        SamMasks(tmp_path, device="cpu")
    weights.unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")  # can contain code
    with pytest.raises(CheckpointError, match=r"cannot load .*no file named model\.safetensors"):
        SamMasks(tmp_path, device="cpu")
    for content in ("{", "[]", '{"model_type": "sam", "vision_config": 3}'):
        config.write_text(content)
        with pytest.raises(CheckpointError):
            SamMasks(tmp_path, device="cpu")
