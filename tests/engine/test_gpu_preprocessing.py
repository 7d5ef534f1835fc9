"""Resizing as matrix products, compared with Pillow. Run with `pytest tests/engine/test_gpu_preprocessing.py`.

The products run here on the CPU, and in `tests/test_gpu.py` on a GPU.
"""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moondream_cv.engine import image_encoding
from moondream_cv.engine.crops import cut_crops, resize_with_pillow
from moondream_cv.engine.gpu_preprocessing import WEIGHT_BITS, cut_crops_on_device, lanczos_weights, resize
from moondream_cv.engine.local_model import LocalModel
from moondream_cv.engine.preprocessing import PreprocessedImage
from moondream_cv.engine.transfers import integers, upload
from moondream_cv.model.config import VisionConfig
from moondream_cv.requests import Detect, Settings

CPU = torch.device("cpu")
SIDES = st.one_of(st.integers(1, 40), st.integers(1, 600))


def noise(height: int, width: int, seed: int = 0, two_levels: bool = False) -> np.ndarray:
    """[height, width, 3] uint8; two levels make exact halves likely, and overshooting sums."""
    pixels = np.random.default_rng(seed).integers(0, 2 if two_levels else 256, (height, width, 3), np.uint8)
    return pixels * np.uint8(255) if two_levels else pixels


def resized(rgb: np.ndarray, width: int, height: int) -> np.ndarray:
    planes = torch.from_numpy(rgb).permute(2, 0, 1).float()
    return resize(planes, width, height).permute(1, 2, 0).to(torch.uint8).numpy()


@settings(max_examples=200)
@given(height=SIDES, width=SIDES, new_height=SIDES, new_width=SIDES, seed=st.integers(0, 9), two_levels=st.booleans())
def test_resized_pixels_equal_pillow(
    height: int, width: int, new_height: int, new_width: int, seed: int, two_levels: bool
) -> None:
    rgb = noise(height, width, seed, two_levels)
    expected = resize_with_pillow(rgb, new_width, new_height)
    got = resized(rgb, new_width, new_height)
    if height < 10 * new_height and width < 10 * new_width:
        np.testing.assert_array_equal(got, expected)
    else:
        assert np.abs(got.astype(int) - expected).max() <= 1


@pytest.mark.parametrize(
    ("size", "new_size"),
    [((6000, 5), (27, 378)), ((1, 4000), (378, 378)), ((1, 1), (378, 700)), ((3000, 2), (10, 900))],
)
def test_extreme_aspect_ratios_differ_by_at_most_one_level(size: tuple[int, int], new_size: tuple[int, int]) -> None:
    rgb = noise(*size)
    expected = resize_with_pillow(rgb, *new_size[::-1])
    assert np.abs(resized(rgb, *new_size[::-1]).astype(int) - expected).max() <= 1


@given(before=st.integers(1, 400), after=st.integers(1, 400))
def test_weights_of_a_pixel_add_up_to_one(before: int, after: int) -> None:
    weights = lanczos_weights(before, after, CPU)
    assert weights.shape == (after, before)
    assert torch.equal(weights, weights.round())
    assert ((weights.sum(1) / 2**WEIGHT_BITS - 1).abs() < before * 2.0**-WEIGHT_BITS).all()


@pytest.mark.parametrize("size", [(480, 640), (1080, 1920), (378, 378), (100, 90), (200, 3000), (900, 200), (1, 1)])
@pytest.mark.parametrize("max_crops", [None, 2])
def test_crops_equal_those_of_pillow(size: tuple[int, int], max_crops: int | None) -> None:
    rgb, config = noise(*size), VisionConfig()
    expected = cut_crops(rgb, config, max_crops)
    pixels, tiling = cut_crops_on_device(torch.from_numpy(rgb), config, max_crops)
    assert tiling == expected.tiling
    assert pixels.is_contiguous()
    np.testing.assert_array_equal(pixels.numpy(), expected.pixels)


def test_max_crops_must_be_positive() -> None:
    with pytest.raises(ValueError, match="max_crops must be at least 1, got 0"):
        cut_crops_on_device(torch.zeros(10, 10, 3, dtype=torch.uint8), VisionConfig(), 0)


def test_uploaded_arrays_may_be_modified() -> None:
    array = noise(4, 6)[:, ::-1]
    array.flags.writeable = False
    got = upload(array, CPU)
    np.testing.assert_array_equal(got.numpy(), array)
    assert not np.shares_memory(got.numpy(), array)
    assert integers([3, 1], CPU).tolist() == [3, 1]


@pytest.fixture
def _cut_on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_encoding, "CUTTING_DEVICES", ("cpu",))


@pytest.mark.usefixtures("_cut_on_device")
def test_encoding_equals_that_of_preprocessed_images(model: LocalModel) -> None:
    frames = [noise(240, 320), noise(50, 40, 1)]
    preprocessed = PreprocessedImage(frames[0], model.config.vision, model.config.vision.max_crops)
    mixed = model.encode_arrays([*frames, preprocessed], None, None)
    assert isinstance(mixed[0].pixels, torch.Tensor)
    assert isinstance(mixed[2].pixels, np.ndarray)
    for encoded, frame in zip(mixed, [*frames, frames[0]], strict=True):
        np.testing.assert_array_equal(encoded.crops, cut_crops(frame, model.config.vision).pixels)
    torch.testing.assert_close(mixed[0].embedding, mixed[2].embedding)


@pytest.mark.usefixtures("_cut_on_device")
def test_only_changed_crops_of_a_frame_are_encoded_again(model: LocalModel) -> None:
    frame = noise(240, 320)
    first = model.encode_image(frame)
    assert isinstance(first.pixels, torch.Tensor)
    assert model.encode_image(frame, previous=first) is first
    changed = frame.copy()
    changed[:20, :20] = 0
    second = model.encode_image(changed, previous=first)
    np.testing.assert_array_equal(second.crops, model.encode_image(changed).crops)
    assert second is not first


@pytest.mark.usefixtures("_cut_on_device")
def test_pickled_image_has_its_crops_on_the_host(model: LocalModel) -> None:
    encoded = model.encode_image(noise(240, 320))
    copied = pickle.loads(pickle.dumps(encoded))
    assert isinstance(copied.pixels, np.ndarray)
    assert copied.nbytes == encoded.nbytes
    np.testing.assert_array_equal(copied.crops, encoded.crops)
    request = Detect(copied, "dog", Settings(max_objects=2))
    assert model.run([request]) == model.run([Detect(encoded, "dog", Settings(max_objects=2))])
