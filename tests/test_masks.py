"""Masks of `Detector`, and outlines of masks."""

from __future__ import annotations

import asyncio
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import cv2
import numpy as np
import pytest
import supervision as sv
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from moondream_cv.detector import Detector
from moondream_cv.errors import ImageError
from moondream_cv.masks import outlines, svg_path
from tests.helpers.color_model import ColorModel, color_frame

pytestmark = pytest.mark.compat

RED, GREEN = (10, 5, 30, 45), (50, 20, 70, 40)
FRAME = color_frame(("red", RED), ("green", GREEN))
EMPTY = color_frame(("green", GREEN))
BAD = color_frame(("red", (0, 0, 9, 9)))


def fill_boxes(image: np.ndarray, xyxy: np.ndarray) -> np.ndarray:
    """Return masks that are the boxes; raise an error for `BAD`."""
    assert image.dtype == np.uint8
    assert xyxy.dtype == np.float32
    if xyxy[0, 0] == 0:
        raise RuntimeError("bad frame")
    masks = np.zeros((len(xyxy), *image.shape[:2]), bool)
    for mask, (left, top, right, bottom) in zip(masks, xyxy.astype(int), strict=True):
        mask[top:bottom, left:right] = True
    return masks


def red_pixels(image: np.ndarray, xyxy: np.ndarray) -> np.ndarray:
    """Return the red pixels of an RGB image, once per box."""
    is_red = (image[..., 0] > 200) & (image[..., 1:] < 50).all(axis=-1)
    return np.repeat(is_red[None], len(xyxy), axis=0)


def box_mask(box: tuple[int, int, int, int]) -> np.ndarray:
    return fill_boxes(FRAME, np.array([box], np.float32))[0]


@pytest.mark.parametrize("kind", ["array", "PIL image"])
def test_mask_function_gets_rgb_pixels_and_filtered_boxes(kind: str) -> None:
    frame = FRAME if kind == "array" else Image.fromarray(FRAME[..., ::-1])
    found = Detector(ColorModel(), masks=red_pixels)(frame, ["red"])
    assert found.mask.dtype == np.bool_
    assert (found.mask == box_mask(RED)).all()
    assert found.mask.any()

    small = Detector(ColorModel(), masks=fill_boxes, min_size=20.5)(FRAME, ["red", "green"])
    assert small.mask.shape == (0, *FRAME.shape[:2])
    both = Detector(ColorModel(), masks=fill_boxes)(FRAME, ["red", "green"])
    assert (both.mask == [box_mask(RED), box_mask(GREEN)]).all()


def test_lists_get_masks_and_merge() -> None:
    found = Detector(ColorModel(), masks=fill_boxes)([FRAME, EMPTY, FRAME], "red")
    assert [detections.mask.shape for detections in found] == [(n, *FRAME.shape[:2]) for n in (1, 0, 1)]
    assert sv.Detections.merge(found).mask.shape == (2, *FRAME.shape[:2])
    assert asyncio.run(Detector(ColorModel(), masks=fill_boxes).acall(FRAME, "red")).mask.any()


def test_frames_without_objects_do_not_call_the_function() -> None:
    calls: list[int] = []

    def record(image: np.ndarray, xyxy: np.ndarray) -> np.ndarray:
        calls.append(len(xyxy))
        return fill_boxes(image, xyxy)

    Detector(ColorModel(), masks=record)([EMPTY, FRAME, EMPTY], "red")
    assert calls == [1]


def test_errors_of_the_function_stay_with_their_frame() -> None:
    detector = Detector(ColorModel(), masks=fill_boxes)
    first, error, last = detector.detect_each([FRAME, BAD, FRAME], "red")
    assert isinstance(error, RuntimeError)
    assert isinstance(first, sv.Detections)
    assert isinstance(last, sv.Detections)
    with pytest.raises(RuntimeError, match="bad frame"):
        detector([FRAME, BAD], "red")
    found = Detector(ColorModel(), masks=fill_boxes, on_error="empty")([FRAME, BAD, b"no image"], "red")
    assert [detections.mask.shape[0] for detections in found] == [1, 0, 0]


@pytest.mark.parametrize(
    "convert",
    [
        np.uint8,
        np.float32,
        torch.tensor,
        lambda masks: torch.tensor(masks).bfloat16().requires_grad_(),
        lambda masks: [torch.tensor(mask).bfloat16() for mask in masks],
    ],
    ids=["uint8", "float32", "tensor", "bfloat16 tensor", "list of tensors"],
)
def test_masks_of_zeros_and_ones_are_accepted(convert: Any) -> None:
    found = Detector(ColorModel(), masks=lambda *arguments: convert(fill_boxes(*arguments)))(FRAME, "red")
    assert found.mask.dtype == np.bool_
    assert (found.mask[0] == box_mask(RED)).all()


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (np.zeros((1, 1, 60, 80)), r"an array of shape \(1, 60, 80\), got shape \(1, 1, 60, 80\)"),
        ([np.zeros((60, 80)), np.zeros((59, 80))], r"got 2 masks with the shapes \[\(59, 80\), \(60, 80\)\]"),
        (None, "got NoneType"),
        (np.full((1, 60, 80), np.nan), "masks of 0 and 1, got float64 with other values"),
        (np.full((1, 60, 80), 0.5), "masks of 0 and 1, got float64 with other values; compare scores"),
        (np.full((1, 60, 80), "a"), "masks of 0 and 1, got <U1"),
    ],
)
def test_other_results_of_the_function_are_rejected(masks: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Detector(ColorModel(), masks=lambda image, xyxy: masks)(FRAME, "red")


def test_functions_may_change_their_arguments_and_reuse_their_result() -> None:
    result = np.zeros((1, *FRAME.shape[:2]), bool)

    def change(image: np.ndarray, xyxy: np.ndarray) -> np.ndarray:
        result[:] = fill_boxes(image, xyxy)
        image[:], xyxy[:] = 0, 0
        return result

    frame = FRAME.copy()
    for found in Detector(ColorModel(), masks=change)([frame, color_frame(("red", (5, 5, 9, 9))), frame], "red")[::2]:
        assert found.xyxy.tolist() == [list(RED)]
        assert (found.mask[0] == box_mask(RED)).all()
    assert (frame == FRAME).all()

    read_only = np.broadcast_to(box_mask(RED), (1, *FRAME.shape[:2]))
    assert Detector(ColorModel(), masks=lambda image, xyxy: read_only)(FRAME, "red").mask.flags.writeable


def test_invalid_uses_raise() -> None:
    with pytest.raises(ValueError, match=r"masks must be a function .* got str: 'sam2'"):
        Detector(ColorModel(), masks="sam2")  # type: ignore[arg-type]

    class Encoded:
        size = (80, 60)

    with pytest.raises(ImageError, match="masks need the pixels of the frame, got Encoded; pass the image"):
        Detector(ColorModel(), masks=fill_boxes)(Encoded(), "red")


def test_threads_call_the_function_one_at_a_time() -> None:
    running = threading.Semaphore(1)

    def check(image: np.ndarray, xyxy: np.ndarray) -> np.ndarray:
        assert running.acquire(blocking=False)
        threading.Event().wait(0.001)  # gives other threads a chance to call
        running.release()
        return fill_boxes(image, xyxy)

    detector = Detector(ColorModel(), masks=check)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: detector(FRAME, "red"), range(32)))
    assert all((detections.mask[0] == box_mask(RED)).all() for detections in found)


def test_masks_of_a_detector_can_be_pickled() -> None:
    runner = pickle.loads(pickle.dumps(Detector(ColorModel(), masks=fill_boxes)._mask_runner))
    assert (runner(FRAME, np.array([RED]))[0] == box_mask(RED)).all()


@pytest.mark.parametrize("batch_size", [1, 4])
def test_masks_of_slices_are_moved_to_the_image(batch_size: int) -> None:
    callback = partial(Detector(ColorModel(), masks=fill_boxes), classes=["red"])
    slicer = sv.InferenceSlicer(callback, slice_wh=40, overlap_wh=0, batch_size=batch_size)
    found = slicer(FRAME)
    assert found.mask.shape[1:] == FRAME.shape[:2]
    assert (found.mask.any(axis=0) == box_mask(RED)).all()


# --- outlines ---------------------------------------------------------------------------------------------------------


def rasterize(mask: np.ndarray) -> np.ndarray:
    """Return the pixels whose centers are inside the outlines of a mask."""
    subpaths, (left, top, right, bottom) = svg_path(mask)
    filled = np.zeros(mask.shape, bool)
    y, x = np.mgrid[: mask.shape[0], : mask.shape[1]] + 0.5
    for subpath in subpaths:
        numbers = np.array([float(word) for word in subpath.split() if word not in "MLZ"]).reshape(-1, 2)
        polygon = (numbers * (right - left, bottom - top) + (left, top)).astype(np.float32)
        inside = [cv2.pointPolygonTest(polygon, (a, b), False) >= 0 for a, b in zip(x.flat, y.flat, strict=True)]
        filled ^= np.reshape(inside, mask.shape)  # even-odd rule
    return filled


def test_svg_path_is_relative_to_the_bounding_box() -> None:
    mask = np.zeros((60, 80), bool)
    mask[10:50, 20:40] = True
    mask[20:40, 25:35] = False
    subpaths, box = svg_path(mask)
    assert box == (20, 10, 40, 50)
    assert len(subpaths) == 2
    numbers = [float(word) for word in " ".join(subpaths).split() if word not in "MLZ"]
    assert 0 <= min(numbers) < 0.02
    assert 0.98 < max(numbers) <= 1
    assert (rasterize(mask) == mask).all()


def test_holes_have_the_opposite_orientation() -> None:
    mask = np.zeros((60, 80), bool)
    mask[10:50, 20:40] = True
    mask[20:40, 25:35] = False
    areas = [cv2.contourArea(polygon.astype(np.float32), oriented=True) for polygon in outlines(mask)]
    assert min(areas) < -150
    assert max(areas) > 150


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(5, 40), st.integers(5, 40))
def test_outlines_cover_random_masks(seed: int, height: int, width: int) -> None:
    noise = np.random.default_rng(seed).random((height, width)).astype(np.float32)
    mask = cv2.GaussianBlur(noise, (0, 0), 2) > 0.5
    differs = rasterize(mask) ^ mask
    padded = [np.pad(part, 1).astype(np.uint8) for part in (mask, ~mask)]
    inner = sum(cv2.erode(part, np.ones((3, 3)))[1:-1, 1:-1] for part in padded)
    assert not (differs & (inner > 0)).any()  # only pixels at a border of the mask may differ
    assert differs.mean() < 0.1


def test_masks_without_pixels_have_no_outlines() -> None:
    assert svg_path(np.zeros((60, 80), bool)) == ([], (0, 0, 0, 0))


@pytest.mark.parametrize("pixel", [(0, 0), (59, 79), (30, 40)])
def test_single_pixels_have_an_outline(pixel: tuple[int, int]) -> None:
    mask = np.zeros((60, 80), bool)
    mask[pixel] = True
    assert (rasterize(mask) == mask).all()
