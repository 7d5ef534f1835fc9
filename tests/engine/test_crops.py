"""Tiling and cutting of images. `test_parity.py` compares crops with the published ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moondream_cv.engine.crops import cut_crops, normalize, select_tiling
from moondream_cv.model.config import VisionConfig

CONFIG = VisionConfig(crop_size=112, max_crops=4, overlap_margin=1)


@pytest.mark.parametrize(
    ("resolution_wh", "tiling"),
    [
        ((378, 378), (1, 1)),
        ((640, 480), (2, 4)),
        ((1280, 720), (2, 4)),
        ((1920, 1080), (2, 4)),
        ((480, 640), (4, 2)),
        ((200, 900), (1, 1)),  # narrower than a window
        ((1000, 1000), (3, 3)),
    ],
)
def test_tilings_of_full_size_crops(resolution_wh: tuple[int, int], tiling: tuple[int, int]) -> None:
    width, height = resolution_wh
    assert cut_crops(np.zeros((height, width, 3), np.uint8), VisionConfig()).tiling == tiling


@given(st.integers(-200, 5000), st.integers(-200, 5000), st.integers(1, 20))
def test_tiling_respects_max_crops(height: int, width: int, max_crops: int) -> None:
    rows, columns = select_tiling(height, width, 266, max_crops)
    assert rows >= 1
    assert columns >= 1
    # As published, a very long image has a single row of tiles, which may exceed the limit.
    assert rows * columns <= max_crops or 1 in (rows, columns)


@pytest.mark.parametrize("max_crops", [1, 2, 4, 12])
def test_max_crops_overrides_the_config(max_crops: int) -> None:
    crops = cut_crops(np.zeros((1000, 1000, 3), np.uint8), CONFIG, max_crops)
    assert crops.tiling[0] * crops.tiling[1] <= max_crops
    assert len(crops.pixels) == 1 + crops.tiling[0] * crops.tiling[1]


def test_max_crops_must_be_positive() -> None:
    with pytest.raises(ValueError, match="max_crops must be at least 1, got 0"):
        cut_crops(np.zeros((10, 10, 3), np.uint8), CONFIG, 0)


def test_neighboring_crops_share_their_overlap() -> None:
    rng = np.random.default_rng(0)
    crops = cut_crops(rng.integers(0, 256, (400, 400, 3), dtype=np.uint8), CONFIG)
    assert crops.tiling == (2, 2)
    margin = 2 * 14
    left, right, below = crops.pixels[1], crops.pixels[2], crops.pixels[3]
    np.testing.assert_array_equal(left[:, -margin:], right[:, :margin])
    np.testing.assert_array_equal(left[-margin:], below[:margin])


def test_normalize_maps_bytes_to_minus_one_to_one() -> None:
    pixels = torch.tensor([0, 255, 51], dtype=torch.uint8).view(1, 1, 1, 3)
    torch.testing.assert_close(normalize(pixels, torch.float32).flatten(), torch.tensor([-1.0, 1.0, -0.6]))
