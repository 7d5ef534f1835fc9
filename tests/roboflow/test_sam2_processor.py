"""`SamMasks` prepares images as transformers' processor of SAM 2 does, which requires torchvision."""

from __future__ import annotations

import pytest
import transformers

from moondream_cv.sam import SamMasks
from moondream_cv.scenes import render_scene
from tests.helpers.roboflow_app import skip_without_server
from tests.helpers.tiny_sam import SIZE, tiny_sam2

skip_without_server()
pytestmark = pytest.mark.roboflow


@pytest.mark.parametrize("resolution_wh", [(320, 240), (50, 90)])
def test_input_is_that_of_the_processor(resolution_wh: tuple[int, int]) -> None:
    image = render_scene(3, resolution_wh=resolution_wh).image
    processor = transformers.Sam2ImageProcessor(size={"height": SIZE, "width": SIZE})
    expected = processor(images=image, return_tensors="pt")["pixel_values"]
    pixels, input_hw = SamMasks(tiny_sam2())._preprocess(image)
    assert input_hw == (SIZE, SIZE)
    assert pixels.shape == expected.shape
    assert (pixels - expected).abs().max() < 0.03  # less than two steps of 8-bit values
