"""Test hard scenes: ground truth, and that each difficulty occurs."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from moondream_cv.scenes import ICONS, Scene
from moondream_cv.scenes.backgrounds import color_distance
from moondream_cv.scenes.hard import FRAMES, LOOKALIKES, draw_difficulties, lookalike, render_hard
from moondream_cv.scenes.world import split_name


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [render_hard(seed) for seed in range(120)]


@pytest.mark.slow
def test_hard_scenes_have_valid_boxes(scenes: list[Scene]) -> None:
    for scene in scenes:
        width, height = scene.resolution_wh
        assert (width, height) in FRAMES
        assert scene.image.dtype == np.uint8
        assert 2 <= len(scene.objects) <= 14
        for item in scene.objects:
            left, top, right, bottom = item.xyxy
            assert 0 <= left < right <= width
            assert 0 <= top < bottom <= height
            assert max(right - left, bottom - top) >= 9


def test_seed_determines_the_scene() -> None:
    first, second, other = render_hard(7), render_hard(np.random.default_rng(7)), render_hard(8)
    np.testing.assert_array_equal(first.image, second.image)
    assert first.objects == second.objects != other.objects


def test_draw_difficulties_draws_one_or_two_of_four() -> None:
    rng = np.random.default_rng(0)
    drawn = [draw_difficulties(rng) for _ in range(400)]
    flags = Counter((d.small, d.crowded, d.faint, d.near_misses) for d in drawn)
    assert {sum(key) for key in flags} == {1, 2}
    assert len(flags) == 4 + 6


def test_hard_scenes_include_small_crowded_overlapping_and_similar_objects(scenes: list[Scene]) -> None:
    sizes = [
        max(o.xyxy[2] - o.xyxy[0], o.xyxy[3] - o.xyxy[1]) / min(s.resolution_wh) for s in scenes for o in s.objects
    ]
    assert np.mean(np.array(sizes) < 0.13) > 0.3
    assert np.mean([len(s.objects) >= 8 for s in scenes]) > 0.25
    assert np.mean([any(overlap(a.xyxy, b.xyxy) > 0.1 for a, b in combinations(s.objects, 2)) for s in scenes]) > 0.1
    alike = [any(similar(a.name, b.name) for a, b in combinations(s.objects, 2)) for s in scenes]
    assert np.mean(alike) > 0.5


def test_some_hard_scenes_have_low_contrast(scenes: list[Scene]) -> None:
    spread = [float(color_distance(s.image[::8, ::8], s.image[::8, ::8].mean((0, 1))).max()) for s in scenes]
    assert np.quantile(spread, 0.9) > 1.5 * np.quantile(spread, 0.1)


def overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Return the intersection as a share of the smaller box."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(0.0, width) * max(0.0, height) / min((x[2] - x[0]) * (x[3] - x[1]) for x in (a, b))


def similar(first: str, second: str) -> bool:
    """Return whether two names are look-alikes."""
    (color, shape), (other_color, other_shape) = split_name(first), split_name(second)
    if first == second or (color is None) != (other_color is None):
        return False
    if color is None:
        return any(shape in group and other_shape in group for group in LOOKALIKES)
    return (color == other_color) != (shape == other_shape)


def test_every_icon_is_in_one_group_of_lookalikes() -> None:
    assert sorted(name for group in LOOKALIKES for name in group) == sorted(ICONS)
    rng = np.random.default_rng(0)
    for name in (*ICONS, "red circle", "white star"):
        assert all(similar(name, lookalike(rng, name)) for _ in range(20))


def test_resolution_and_number_of_objects_can_be_set() -> None:
    scene = render_hard(3, resolution_wh=(200, 160), num_objects=1)
    assert scene.resolution_wh == (200, 160)
    assert len(scene.objects) == 1
    assert render_hard(3, num_objects=0).objects == ()
    assert {len(render_hard(seed, num_objects=(2, 3)).objects) for seed in range(20)} == {2, 3}
