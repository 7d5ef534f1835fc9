"""Coordinate conversions: inverses, shapes and dtypes, and errors."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from moondream_cv.geometry import (
    clip_xyxy,
    denormalize_xy,
    denormalize_xyxy,
    normalize_xy,
    normalize_xyxy,
    xcycwh_to_xyxy,
    xyxy_to_xcycwh,
)

Array = npt.NDArray[Any]
WH = (640, 480)


def arrays(size: int) -> st.SearchStrategy[Array]:
    """Return a strategy of arrays [..., size] with up to two leading dimensions, inside and outside the frame."""
    shapes = hnp.array_shapes(min_dims=0, max_dims=2, min_side=0, max_side=4).map(lambda shape: (*shape, size))
    return hnp.arrays(np.float64, shapes, elements=st.floats(-1e5, 1e5))


def assert_close(actual: Array, expected: Array) -> None:
    """Assert equality up to rounding; `atol` is for subnormal numbers, which have low precision."""
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-300)


resolutions = st.tuples(st.integers(1, 20_000), st.integers(1, 20_000))


@given(arrays(4))
def test_xyxy_and_xcycwh_are_inverses(boxes: Array) -> None:
    np.testing.assert_allclose(xcycwh_to_xyxy(xyxy_to_xcycwh(boxes)), boxes, rtol=0, atol=1e-9)
    np.testing.assert_allclose(xyxy_to_xcycwh(xcycwh_to_xyxy(boxes)), boxes, rtol=0, atol=1e-9)


@given(hnp.arrays(np.float32, (3, 4), elements=st.integers(-4096, 4096)))
def test_whole_pixels_are_exact_in_float32(boxes: Array) -> None:
    np.testing.assert_array_equal(xcycwh_to_xyxy(xyxy_to_xcycwh(boxes)), boxes)


@given(arrays(4), resolutions)
def test_normalized_and_pixel_boxes_are_inverses(boxes: Array, resolution_wh: tuple[int, int]) -> None:
    assert_close(normalize_xyxy(denormalize_xyxy(boxes, resolution_wh), resolution_wh), boxes)
    assert_close(denormalize_xyxy(normalize_xyxy(boxes, resolution_wh), resolution_wh), boxes)


@given(arrays(2), resolutions)
def test_normalized_and_pixel_points_are_inverses(points: Array, resolution_wh: tuple[int, int]) -> None:
    assert_close(normalize_xy(denormalize_xy(points, resolution_wh), resolution_wh), points)
    assert_close(denormalize_xy(normalize_xy(points, resolution_wh), resolution_wh), points)


@given(arrays(4), resolutions)
def test_clipping_moves_boxes_inside_and_is_idempotent(boxes: Array, resolution_wh: tuple[int, int]) -> None:
    clipped = clip_xyxy(boxes, resolution_wh)
    assert (clipped >= 0).all()
    assert (clipped[..., 0::2] <= resolution_wh[0]).all()
    assert (clipped[..., 1::2] <= resolution_wh[1]).all()
    np.testing.assert_array_equal(clip_xyxy(clipped, resolution_wh), clipped)
    inside = (boxes == clipped).all(axis=-1)
    np.testing.assert_array_equal(clipped[inside], boxes[inside])


@given(arrays(4), resolutions)
def test_clipping_pixels_equals_clipping_fractions(boxes: Array, resolution_wh: tuple[int, int]) -> None:
    fractions = clip_xyxy(normalize_xyxy(boxes, resolution_wh), (1, 1))
    np.testing.assert_allclose(denormalize_xyxy(fractions, resolution_wh), clip_xyxy(boxes, resolution_wh), atol=1e-7)


@pytest.mark.parametrize(
    ("function", "given", "expected"),
    [
        (xyxy_to_xcycwh, [10.0, 20, 30, 60], [20, 40, 20, 40]),  # corners to center and size
        (xcycwh_to_xyxy, [20.0, 40, 20, 40], [10, 20, 30, 60]),  # center and size to corners
        (lambda xyxy: denormalize_xyxy(xyxy, WH), [0.25, 0.5, 1, 1], [160, 240, 640, 480]),  # x by width, y by height
        (lambda xyxy: normalize_xyxy(xyxy, WH), [160.0, 240, 640, 480], [0.25, 0.5, 1, 1]),  # and back
        (lambda xy: denormalize_xy(xy, WH), [0.25, 0.5], [160, 240]),  # a point
        (lambda xy: normalize_xy(xy, WH), [160.0, 240], [0.25, 0.5]),  # and back
        (lambda xyxy: clip_xyxy(xyxy, WH), [-5.0, 10, 700, 490], [0, 10, 640, 480]),  # across three edges
        (lambda xyxy: clip_xyxy(xyxy, WH), [700.0, -9, 800, -1], [640, 0, 640, 0]),  # outside the frame
        (xyxy_to_xcycwh, [30.0, 60, 10, 20], [20, 40, -20, -40]),  # swapped corners give a negative size
    ],
)
def test_known_values(function: Callable[[Any], Array], given: list[float], expected: list[float]) -> None:
    np.testing.assert_array_equal(function(given), expected)


FUNCTIONS: dict[str, tuple[int, Callable[[Any], Array]]] = {
    "xyxy_to_xcycwh": (4, xyxy_to_xcycwh),
    "xcycwh_to_xyxy": (4, xcycwh_to_xyxy),
    "denormalize_xyxy": (4, lambda values: denormalize_xyxy(values, WH)),
    "normalize_xyxy": (4, lambda values: normalize_xyxy(values, WH)),
    "clip_xyxy": (4, lambda values: clip_xyxy(values, WH)),
    "denormalize_xy": (2, lambda values: denormalize_xy(values, WH)),
    "normalize_xy": (2, lambda values: normalize_xy(values, WH)),
}
each_function = pytest.mark.parametrize(("size", "function"), FUNCTIONS.values(), ids=FUNCTIONS.keys())


@each_function
@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (np.float64, np.float64),
        (np.float32, np.float32),
        (np.float16, np.float32),
        (np.int64, np.float32),
        (np.uint8, np.float32),
    ],
)
@pytest.mark.parametrize("leading", [(), (0,), (5,), (2, 3)], ids=["one", "none", "list", "grid"])
def test_shape_and_dtype(
    size: int, function: Callable[[Any], Array], dtype: Any, expected: Any, leading: tuple[int, ...]
) -> None:
    values = np.ones((*leading, size), dtype)
    result = function(values)
    assert result.shape == values.shape
    assert result.dtype == expected
    assert not np.shares_memory(result, values)


@each_function
@pytest.mark.parametrize("shape", [(), (0,), (3,), (5, 6), (4, 0)])
def test_wrong_shapes_raise(size: int, function: Callable[[Any], Array], shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"\[\.\.\., {size}\], got \({', '.join(map(str, shape))},?\)"):
        function(np.zeros(shape))


@each_function
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_values_raise(size: int, function: Callable[[Any], Array], value: float) -> None:
    values = np.ones((3, size))
    values[1, -1] = value
    with pytest.raises(ValueError, match=rf"must be finite, got .*{value}"):
        function(values)


@pytest.mark.parametrize("values", [["a", "b", "c", "d"], [None] * 4, [True] * 4], ids=["text", "none", "bool"])
def test_non_numeric_values_raise(values: Any) -> None:
    with pytest.raises(ValueError, match="must be numeric"):
        clip_xyxy(values, WH)


@pytest.mark.parametrize(
    "resolution_wh",
    [(0, 480), (640, -1), (640,), (640, 480, 3), 640, (np.nan, 480), ("640", "480"), None],
    ids=["zero", "negative", "one", "three", "number", "nan", "text", "none"],
)
@pytest.mark.parametrize("function", [denormalize_xyxy, normalize_xyxy, clip_xyxy])
def test_resolution_must_be_positive(function: Callable[[Any, Any], Array], resolution_wh: Any) -> None:
    with pytest.raises(ValueError, match="resolution_wh must be a positive"):
        function(np.ones(4), resolution_wh)
