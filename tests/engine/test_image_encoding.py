"""Encoding of several frames together, and of changed crops only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from moondream_cv import load
from moondream_cv.engine import crops as crops_module
from moondream_cv.engine import image_encoding
from moondream_cv.engine.crops import cut_all, cut_crops, largest_differences
from moondream_cv.engine.image_encoding import EncodedImage, encode_images, reencode
from moondream_cv.engine.local_model import LocalModel
from moondream_cv.images import to_rgb
from moondream_cv.model.adapters import load_adapter
from moondream_cv.model.config import VisionConfig
from moondream_cv.model.moondream import MoondreamNetwork
from moondream_cv.scenes import render_clip, render_scene

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
IMAGES = ("0_378x378.png", "1_640x480.png", "3_200x900.png", "4_50x40.png")  # 1, 8, 1 and 1 local crops
NAMES = ["dog", "red circle", "blue star"]
SMALL = VisionConfig(crop_size=112, max_crops=4, overlap_margin=1)
SETTINGS: dict[str, Any] = {"max_crops": None, "adapter_name": None, "adapter": None, "fingerprint": "7"}
ROUNDING = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def tiny() -> LocalModel:
    return load("tiny", device="cpu")


@pytest.fixture(scope="module")
def scene() -> np.ndarray:
    """[480, 640, 3] RGB; the tiny model cuts it into two local crops in one row."""
    return render_scene(5, resolution_wh=(640, 480), names=NAMES, style="plain").image


def tensors(encoded: EncodedImage) -> list[Tensor]:
    return [encoded.features, encoded.embedding, *(t for pair in encoded.prefix.layers for t in pair)]


def assert_same(got: EncodedImage, expected: EncodedImage) -> None:
    assert (got.size, got.tiling) == (expected.size, expected.tiling)
    np.testing.assert_array_equal(got.crops, expected.crops)
    for one, other in zip(tensors(got), tensors(expected), strict=True):
        torch.testing.assert_close(one, other, **ROUNDING)


@contextmanager
def crops_seen(network: MoondreamNetwork) -> Iterator[list[int]]:
    """Collect the number of crops in each pass of the vision encoder."""
    seen: list[int] = []
    hook = network.vision.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    try:
        yield seen
    finally:
        hook.remove()


def boxes(model: LocalModel, encoded: EncodedImage, names: Sequence[str] = NAMES) -> np.ndarray:
    """[objects, 5] corners and confidences."""
    found = [item for name in names for item in model.detect(encoded, name)["objects"]]
    return np.array([[item[k] for k in ("x_min", "y_min", "x_max", "y_max", "confidence")] for item in found])


# --- Several frames ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [12_000, image_encoding.TOKENS_PER_CPU_PASS], ids=["one pass", "passes of 4"])
@pytest.mark.parametrize("name", ["mha", "gqa"])
def test_batch_encoding_equals_published_values(name: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_encoding, "TOKENS_PER_CPU_PASS", tokens)
    model = load(str(GOLDEN / name), device="cpu", dtype="float32")
    expected = load_file(GOLDEN / name / "expected.safetensors")
    frames = [to_rgb(GOLDEN / name / "images" / image) for image in IMAGES]
    batch = encode_images(model.network, frames, **SETTINGS)
    assert [encoded.tiling for encoded in batch] == [(1, 1), (2, 4), (1, 1), (1, 1)]
    for image, frame, encoded in zip(IMAGES, frames, batch, strict=True):
        assert_same(encoded, encode_images(model.network, [frame], **SETTINGS)[0])
        for got, key in (
            (encoded.embedding, "image_embedding"),
            (encoded.prefix.layers[0][0][0][:, ::37], "k_cache.0"),
            (encoded.prefix.layers[-1][1][0][:, ::37], "v_cache.last"),
        ):
            torch.testing.assert_close(got, expected[f"{image[0]}.{key}"], atol=1e-4, rtol=0)


def test_batch_encoding_with_adapter_equals_single_images() -> None:
    model = load(str(GOLDEN / "gqa"), device="cpu", dtype="float32")
    lora = load_adapter(str(GOLDEN / "gqa" / "adapter.pt"), model.config, device=model.device, dtype=model.dtype)
    frames = [to_rgb(GOLDEN / "gqa" / "images" / IMAGES[i]) for i in (0, 3)]
    with_adapter = {**SETTINGS, "adapter": lora, "adapter_name": "a"}
    for frame, encoded in zip(frames, encode_images(model.network, frames, **with_adapter), strict=True):
        assert_same(encoded, encode_images(model.network, [frame], **with_adapter)[0])
        plain = encode_images(model.network, [frame], **SETTINGS)[0].prefix
        assert not torch.allclose(encoded.prefix.layers[-1][0], plain.layers[-1][0], atol=1e-3)


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 500), st.integers(1, 500)), min_size=1, max_size=5),
    max_crops=st.sampled_from([None, 1, 2, 6]),
    tokens=st.sampled_from([1, 200, 12_000]),
)
def test_frames_of_different_sizes_are_encoded_together(
    model: LocalModel, sizes: list[tuple[int, int]], max_crops: int | None, tokens: int
) -> None:
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 256, (height, width, 3), dtype=np.uint8) for width, height in sizes]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_encoding, "TOKENS_PER_CPU_PASS", tokens)
        batch = encode_images(model.network, frames, **{**SETTINGS, "max_crops": max_crops})
    assert [encoded.size for encoded in batch] == sizes
    for frame, encoded in zip(frames, batch, strict=True):
        assert_same(encoded, encode_images(model.network, [frame], **{**SETTINGS, "max_crops": max_crops})[0])


def test_encoding_no_frames_returns_an_empty_list(model: LocalModel) -> None:
    assert encode_images(model.network, [], **SETTINGS) == []


def test_crops_are_split_into_few_even_passes(tiny: LocalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = [np.zeros((480, 640, 3), np.uint8)] * 5  # three crops each
    with crops_seen(tiny.network) as seen:
        encode_images(tiny.network, frames, **SETTINGS)
        assert seen == [15]
        monkeypatch.setattr(image_encoding, "TOKENS_PER_CPU_PASS", 6 * 64)
        encode_images(tiny.network, frames, **SETTINGS)
        assert seen[1:] == [5, 5, 5]


def test_identical_crops_of_a_small_image_are_encoded_once(tiny: LocalModel) -> None:
    frame = np.random.default_rng(0).integers(0, 256, (100, 90, 3), dtype=np.uint8)
    with crops_seen(tiny.network) as seen:
        (encoded,) = encode_images(tiny.network, [frame], **SETTINGS)
    assert seen == [1]
    assert encoded.crops.shape == (2, 112, 112, 3)
    np.testing.assert_array_equal(encoded.crops[0], encoded.crops[1])
    assert torch.equal(encoded.features[0], encoded.features[1])


def test_encoded_images_share_no_memory(model: LocalModel, frame: np.ndarray) -> None:
    batch = encode_images(model.network, [frame, frame[:50, :40], frame[::-1]], **SETTINGS)
    for encoded in batch:
        for tensor in (encoded.features, encoded.embedding):
            assert tensor.untyped_storage().nbytes() == tensor.nbytes
        assert encoded.crops.base is None
    storages = [{tensor.untyped_storage().data_ptr() for tensor in tensors(encoded)} for encoded in batch]
    assert len(set.union(*storages)) == sum(map(len, storages))


def test_nbytes_counts_all_tensors(model: LocalModel, frame: np.ndarray) -> None:
    (encoded,) = encode_images(model.network, [frame], **SETTINGS)
    assert encoded.nbytes == encoded.crops.size + 4 * sum(tensor.numel() for tensor in tensors(encoded))


def test_non_positive_max_crops_raises(model: LocalModel, frame: np.ndarray) -> None:
    with pytest.raises(ValueError, match="max_crops must be at least 1, got 0"):
        encode_images(model.network, [frame], **{**SETTINGS, "max_crops": 0})


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_crops_are_the_same_with_any_number_of_threads(
    threads: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crops_module, "MIN_PIXELS_FOR_THREADS", 1)
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 256, (200 - 60 * i, 300, 3), dtype=np.uint8) for i in range(count)]
    cut = cut_all(frames, SMALL, threads=threads)
    assert len(cut) == count
    for frame, crops in zip(frames, cut, strict=True):
        expected = cut_crops(frame, SMALL)
        assert crops.tiling == expected.tiling
        np.testing.assert_array_equal(crops.pixels, expected.pixels)


# --- Consecutive frames --------------------------------------------------------------------------------------------


def again(
    model: LocalModel, frame: np.ndarray, previous: EncodedImage, tolerance: float = 0.0
) -> tuple[EncodedImage, int]:
    """Return the result of `reencode` and the number of crops that it encoded."""
    with crops_seen(model.network) as seen:
        encoded = reencode(model.network, frame, previous, tolerance, **SETTINGS)
    assert len(seen) <= 1
    return encoded, sum(seen)


def test_identical_frame_is_not_encoded_again(tiny: LocalModel, scene: np.ndarray) -> None:
    (first,) = encode_images(tiny.network, [scene], **SETTINGS)
    for tolerance in (0.0, 5.0):
        second, count = again(tiny, scene.copy(), first, tolerance)
        assert second is first
        assert count == 0


@pytest.mark.parametrize("tolerance", [0.0, 3.0])
def test_only_changed_crops_are_encoded_again(tiny: LocalModel, scene: np.ndarray, tolerance: float) -> None:
    (first,) = encode_images(tiny.network, [scene], **SETTINGS)
    before = [tensor.clone() for tensor in tensors(first)], first.crops.copy()
    moved = scene.copy()
    moved[:, :200] = scene[::-1, :200]  # outside the right local crop
    second, count = again(tiny, moved, first, tolerance)
    assert count == 2
    (full,) = encode_images(tiny.network, [moved], **SETTINGS)
    assert_same(second, full)
    assert torch.equal(second.features[2], first.features[2])
    assert not torch.allclose(second.embedding, first.embedding, atol=1e-2)
    assert all(torch.equal(old, kept) for old, kept in zip(before[0], tensors(first), strict=True))
    np.testing.assert_array_equal(before[1], first.crops)


@pytest.mark.slow
def test_change_in_two_of_nine_crops_encodes_two() -> None:
    model = load(str(GOLDEN / "mha"), device="cpu", dtype="float32")
    frame = to_rgb(GOLDEN / "mha" / "images" / "1_640x480.png")
    changed = frame.copy()
    changed[:40, :40] = 255 - changed[:40, :40]
    (first,) = encode_images(model.network, [frame], **SETTINGS)
    second, count = again(model, changed, first)
    assert count == 2
    assert_same(second, encode_images(model.network, [changed], **SETTINGS)[0])


@settings(max_examples=25, deadline=None)
@given(data=st.data(), max_crops=st.sampled_from([1, 4, 9]))
def test_reencoding_equals_encoding(model: LocalModel, frame: np.ndarray, data: st.DataObject, max_crops: int) -> None:
    height, width = frame.shape[:2]
    top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    bottom, right = data.draw(st.integers(top, height)), data.draw(st.integers(left, width))
    changed = frame.copy()
    changed[top:bottom, left:right] += np.uint8(100)
    limited = {**SETTINGS, "max_crops": max_crops}
    first, full = (encode_images(model.network, [image], **limited)[0] for image in (frame, changed))
    with crops_seen(model.network) as seen:
        second = reencode(model.network, changed, first, **limited)
    assert_same(second, full)
    different = sum(not np.array_equal(a, b) for a, b in zip(first.crops, full.crops, strict=True))
    assert sum(seen) == (min(different, 1) if full.tiling == (1, 1) else different)


def test_detections_along_a_clip_agree(tiny: LocalModel) -> None:
    clip = render_clip(3, num_frames=4, num_objects=3)
    frames = [frame for frame, _ in clip]
    settings = {**SETTINGS, "fingerprint": tiny.encode_image(frames[0]).fingerprint}
    (encoded,) = encode_images(tiny.network, frames[:1], **settings)
    for frame in frames[1:]:
        encoded = reencode(tiny.network, frame, encoded, **settings)
        (full,) = encode_images(tiny.network, [frame], **settings)
        found, expected = (boxes(tiny, e, clip.class_names) for e in (encoded, full))
        assert len(expected)
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_frame_of_another_size_is_encoded_completely(model: LocalModel, frame: np.ndarray) -> None:
    few = {**SETTINGS, "max_crops": 2}
    (first,) = encode_images(model.network, [frame], **few)
    for other in (frame[:100], np.ascontiguousarray(frame.transpose(1, 0, 2)), frame[:50, :50]):
        second = reencode(model.network, other, first, 5.0, **SETTINGS)
        assert second.max_crops == 2
        assert_same(second, encode_images(model.network, [other], **few)[0])


@pytest.mark.parametrize(
    ("different", "message"),
    [
        ({"fingerprint": "8"}, "encoded by another model"),
        ({"max_crops": 3}, "max_crops=4, not 3"),
        ({"adapter_name": "other"}, "adapter None, not 'other'"),
    ],
)
def test_previous_image_of_another_model_or_settings_raises(
    model: LocalModel, frame: np.ndarray, different: dict[str, Any], message: str
) -> None:
    (first,) = encode_images(model.network, [frame], **SETTINGS)
    for image in (frame, frame[:100]):
        with pytest.raises(ValueError, match=message):
            reencode(model.network, image, first, **{**SETTINGS, **different})


@pytest.mark.parametrize("tolerance", [-1.0, float("nan")])
def test_invalid_tolerance_raises(model: LocalModel, frame: np.ndarray, tolerance: float) -> None:
    (first,) = encode_images(model.network, [frame], **SETTINGS)
    with pytest.raises(ValueError, match=f"tolerance must be 0 or more gray levels, got {tolerance}"):
        reencode(model.network, frame, first, tolerance, **SETTINGS)


# --- Tolerance --------------------------------------------------------------------------------------------------------


def exposures(rgb: np.ndarray, sigma: float, seed: int) -> np.ndarray:
    """Return the same view with new camera noise of `sigma` gray levels."""
    noise = np.random.default_rng(seed).normal(0, sigma, rgb.shape)
    return np.clip(np.rint(rgb + noise), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("sigma", [2.0, 5.0, 10.0])
def test_difference_of_noise_stays_below_its_standard_deviation(sigma: float) -> None:
    view = np.random.default_rng(0).integers(40, 216, (4, 378, 378, 3))
    differences = largest_differences(exposures(view, sigma, 1), exposures(view, sigma, 2))
    assert differences.shape == (4,)
    assert (differences < sigma).all()
    assert (differences > 0.5 * sigma).all()


def test_small_object_differs_more_than_noise() -> None:
    view = np.random.default_rng(0).integers(40, 176, (1, 378, 378, 3)).astype(np.uint8)
    spot = view.copy()
    spot[0, 200:204, 301:305] += 80
    noisy = exposures(view, 5, 1)
    assert np.abs(spot.astype(int) - view).mean() < 0.01 < 3 < np.abs(noisy.astype(int) - view).mean()
    assert largest_differences(noisy, view) < 5 < largest_differences(spot, view) == 80 * 16 / 64


@given(
    place=st.tuples(st.integers(0, 108), st.integers(0, 108)),
    shift=st.tuples(st.integers(-3, 3), st.integers(-3, 3)).filter(any),
    channel=st.integers(0, 2),
)
def test_moving_four_pixel_dot_is_detected_anywhere(
    place: tuple[int, int], shift: tuple[int, int], channel: int
) -> None:
    crops = np.zeros((2, 1, 112, 112, 3), np.uint8)
    for crop, by in zip(crops, ((0, 0), shift), strict=True):
        top, left = (int(np.clip(p + b, 0, 108)) for p, b in zip(place, by, strict=True))
        crop[0, top : top + 4, left : left + 4, channel] = 160
    difference = float(largest_differences(crops[1], crops[0])[0])
    assert difference == float(largest_differences(crops[0], crops[1])[0])
    assert difference >= 10 or np.array_equal(crops[0], crops[1])  # one pixel of motion: 1 × 4 × 160 / 64


@pytest.mark.parametrize("value", [1, 255])
def test_uniform_change_equals_its_difference(value: int) -> None:
    old, new = np.zeros((2, 42, 42, 3), np.uint8), np.full((2, 42, 42, 3), value, np.uint8)
    np.testing.assert_array_equal(largest_differences(new, old), [value, value])
    np.testing.assert_array_equal(largest_differences(old, new), [value, value])


def test_noise_within_tolerance_is_unchanged_and_a_small_object_is_not(tiny: LocalModel, scene: np.ndarray) -> None:
    (first,) = encode_images(tiny.network, [exposures(scene, 4, 1)], **SETTINGS)
    second, count = again(tiny, exposures(scene, 4, 2), first, 4.0)
    assert second is first
    assert count == 0
    assert again(tiny, exposures(scene, 4, 2), first)[1] == 3

    appeared = scene.copy()
    appeared[50:74, 50:74] = 255 - appeared[50:74, 50:74]  # 1/24 of the frame's width, at the left
    noisy = exposures(appeared, 4, 2)
    third, count = again(tiny, noisy, first, 4.0)
    assert count == 2
    (full,) = encode_images(tiny.network, [noisy], **SETTINGS)
    np.testing.assert_array_equal(third.crops, [full.crops[0], full.crops[1], first.crops[2]])
    torch.testing.assert_close(third.features[:2], full.features[:2], **ROUNDING)
    assert torch.equal(third.features[2], first.features[2])


def test_slow_drift_accumulates_until_it_exceeds_the_tolerance(tiny: LocalModel, scene: np.ndarray) -> None:
    (encoded,) = encode_images(tiny.network, [scene // 2], **SETTINGS)
    counts = []
    for step in range(1, 10):
        brighter = scene // 2 + np.uint8(step)
        encoded, count = again(tiny, brighter, encoded, 3.5)
        counts.append(count)
    assert counts == [0, 0, 0, 3, 0, 0, 0, 3, 0]
    assert_same(encoded, encode_images(tiny.network, [scene // 2 + np.uint8(8)], **SETTINGS)[0])
