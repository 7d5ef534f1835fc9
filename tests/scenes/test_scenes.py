"""Test the renderers of scenes and clips: names, boxes, positions and determinism."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from itertools import combinations

import cv2
import numpy as np
import numpy.typing as npt
import pytest

import moondream_cv.scenes as scenes
from moondream_cv.scenes import (
    ALL_NAMES,
    COLORED_SHAPES,
    COLORS,
    ICONS,
    SHAPES,
    Scene,
    SceneObject,
    plural,
    render_alternate,
    render_clip,
    render_scene,
    with_article,
)
from moondream_cv.scenes.objects import outlined, paint
from moondream_cv.scenes.sprites import icon_levels
from moondream_cv.scenes.world import query_names, split_name

Box = tuple[float, float, float, float]


def bounding_box(mask: npt.NDArray[np.bool_]) -> Box:
    """Return the edges of the box around the true pixels of a mask."""
    left, top, width, height = cv2.boundingRect(mask.astype(np.uint8))
    return float(left), float(top), float(left + width), float(top + height)


def overlap(first: Box, second: Box) -> float:
    """Return the intersection of two boxes as a share of the smaller one."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    return max(0.0, width) * max(0.0, height) / min(areas)


def assert_valid(scene: Scene) -> None:
    """Check the type of the image, and that all boxes have a positive area within the frame."""
    width, height = scene.resolution_wh
    assert scene.image.dtype == np.uint8
    assert scene.image.shape == (height, width, 3)
    for item in scene.objects:
        left, top, right, bottom = item.xyxy
        assert 0 <= left < right <= width, item
        assert 0 <= top < bottom <= height, item
        assert split_name(item.name) == (item.color, item.shape)
        assert item.kind == ("icon" if item.name in ICONS else "shape")


# --- vocabulary ------------------------------------------------------------------------------------------------------


def test_vocabulary_has_64_colored_shapes_and_32_icons() -> None:
    assert (len(SHAPES), len(COLORS), len(COLORED_SHAPES), len(ICONS)) == (8, 8, 64, 32)
    assert (ICONS[0], ICONS[-1]) == ("dog", "donut")
    assert COLORS["orange"] == (245, 135, 25)
    assert len(set(ALL_NAMES)) == 96


@pytest.mark.parametrize(
    ("name", "many"),
    [("dog", "dogs"), ("red cross", "red crosses"), ("bus", "buses"), ("fish", "fish"), ("book", "books")],
)
def test_plural(name: str, many: str) -> None:
    assert plural(name) == many


@pytest.mark.parametrize(
    ("name", "one"),
    [("dog", "a dog"), ("orange ring", "an orange ring"), ("umbrella", "an umbrella"), ("blue star", "a blue star")],
)
def test_with_article(name: str, one: str) -> None:
    assert with_article(name) == one


def test_query_names_include_shapes_without_color() -> None:
    assert query_names(["red circle", "dog"]) == ("circle", "dog", "red circle")


@pytest.mark.parametrize("name", ["red", "red dog", "zebra", "", "circle red", "pink circle"])
def test_unknown_names_raise(name: str) -> None:
    with pytest.raises(ValueError, match="unknown name"):
        split_name(name)
    with pytest.raises(ValueError, match="unknown name"):
        render_scene(0, names=[name])


def test_named_matches_full_names_and_shapes_of_any_color() -> None:
    image = np.zeros((50, 50, 3), np.uint8)
    red = SceneObject.from_name("red circle", (20, 0, 30, 10))
    blue = SceneObject.from_name("blue circle", (0, 0, 10, 10))
    dog = SceneObject.from_name("dog", (0, 20, 10, 30))
    scene = Scene(image, (red, blue, dog))
    assert scene.named("red circle") == (red,)
    assert scene.named("circle") == (blue, red)  # left to right
    assert scene.named("dog") == (dog,)
    assert scene.named("green circle") == scene.named("square") == ()
    with pytest.raises(ValueError, match="unknown name 'red'"):
        scene.named("red")


# --- scenes ----------------------------------------------------------------------------------------------------------


def test_sprites_are_cropped_to_their_visible_pixels() -> None:
    for name in ICONS:
        sprite = icon_levels(name)[0]
        assert sprite.rgb.shape[:2] == sprite.alpha.shape
        assert max(sprite.alpha.shape) == 112
        height, width = sprite.alpha.shape
        assert bounding_box(sprite.alpha > 127) == (0, 0, width, height)


@pytest.mark.parametrize("name", ALL_NAMES)
def test_painted_objects_have_tight_boxes(name: str) -> None:
    rng = np.random.default_rng(3)
    for size in (15.0, 47.3, 140.0):
        patch = paint(name, size, rng, shadow=True)
        left, top, width, height = patch.box
        assert bounding_box(patch.alpha > 127) == (left, top, left + width, top + height)
        assert max(width, height) == pytest.approx(size, rel=0.25, abs=2)
        framed = outlined(patch, (255, 255, 255), 2)
        assert framed.box[2:] == pytest.approx((width + 4, height + 4), abs=2)


@pytest.mark.parametrize("name", COLORED_SHAPES)
def test_boxes_of_plain_shapes_are_exact(name: str) -> None:
    scene = render_scene(11, names=[name], style="plain", resolution_wh=(160, 120))
    (item,) = scene.objects
    behind = scene.image[0, 0].astype(float)
    color = np.array(COLORS[name.split()[0]], float)
    change = color - behind
    coverage = (scene.image - behind) @ change / (change @ change)
    assert np.allclose(bounding_box(coverage > 0.5), item.xyxy, atol=0.01)


@pytest.mark.parametrize("name", ICONS)
def test_boxes_of_plain_icons_are_exact_to_one_pixel(name: str) -> None:
    scene = render_scene(12, names=[name], style="plain", resolution_wh=(160, 120))
    (item,) = scene.objects
    changed = np.abs(scene.image.astype(int) - scene.image[0, 0]).sum(2) > 60
    assert np.allclose(bounding_box(changed), item.xyxy, atol=1.01)


@pytest.mark.parametrize("render", [render_scene, render_alternate])
@pytest.mark.parametrize("name", ["red circle", "green star", "blue ring", "yellow cross", "purple triangle"])
def test_boxes_enclose_the_pixels_of_the_objects_color(render: Callable[..., Scene], name: str) -> None:
    """The pixels are those of the finished image, with random background, outline and camera effects."""
    for seed in range(8):
        scene = render(seed, names=[name], resolution_wh=(320, 240))
        left, top, right, bottom = (round(edge) for edge in scene.objects[0].xyxy)
        near = np.abs(scene.image.astype(int) - COLORS[name.split()[0]]).sum(2) < 110
        inside = near[top:bottom, left:right]
        assert inside.sum() >= 0.9 * near.sum()
        found = bounding_box(inside)
        assert np.allclose(found, (0, 0, right - left, bottom - top), atol=0.08 * (right - left) + 3), seed


@pytest.mark.parametrize("seed", range(60))
def test_training_scenes_have_valid_boxes(seed: int) -> None:
    scene = render_scene(seed)
    assert_valid(scene)
    assert 1 <= len(scene.objects) <= 8
    for item in scene.objects:
        assert max(item.xyxy[2] - item.xyxy[0], item.xyxy[3] - item.xyxy[1]) >= 12
    assert all(overlap(a.xyxy, b.xyxy) <= 0.06 for a, b in combinations(scene.objects, 2))


def test_objects_stand_out_from_the_background() -> None:
    """Otherwise, a white object on white or a black object on black would be invisible."""
    for seed in range(40):
        scene = render_scene(seed, names=[("white circle", "black square")[seed % 2]], resolution_wh=(200, 200))
        left, top, right, bottom = (int(edge) for edge in scene.objects[0].xyxy)
        gray = scene.image.astype(float).mean(2)
        inner = gray[
            (top * 2 + bottom) // 3 : (top + 2 * bottom) // 3, (left * 2 + right) // 3 : (left + 2 * right) // 3
        ]
        frame = gray[max(0, top - 4) : bottom + 4, max(0, left - 4) : right + 4]
        assert np.abs(frame - inner.mean()).max() > 45, seed


def test_scenes_contain_repeated_classes_and_near_misses() -> None:
    repeated = near = 0
    for seed in range(150):
        names = [item.name for item in render_scene(seed, resolution_wh=(160, 160)).objects]
        repeated += len(set(names)) < len(names)
        pairs = [(a.split(), b.split()) for a, b in combinations(names, 2) if a != b and " " in a and " " in b]
        near += any(a[0] == b[0] or a[1] == b[1] for a, b in pairs)
    assert repeated > 40
    assert near > 40


@pytest.mark.parametrize("render", [render_scene, render_alternate])
def test_seed_determines_the_scene(render: Callable[..., Scene]) -> None:
    first, second, other = render(5), render(5), render(6)
    assert first.objects == second.objects
    assert np.array_equal(first.image, second.image)
    assert first.objects != other.objects
    assert render(np.random.default_rng(5)).objects == first.objects


def test_names_set_the_objects_and_shapes_get_a_color() -> None:
    scene = render_scene(1, names=["dog", "circle", "red star", "dog"])
    assert [item.shape for item in scene.objects] == ["dog", "circle", "star", "dog"]
    assert scene.objects[1].color in COLORS
    assert len(scene.named("dog")) == 2


def test_number_of_objects_and_resolution_can_be_set() -> None:
    assert len(render_scene(0, num_objects=5, resolution_wh=(640, 480)).objects) == 5
    assert all(2 <= len(render_scene(seed, num_objects=(2, 3)).objects) <= 3 for seed in range(20))
    assert render_scene(0, num_objects=0).objects == ()
    assert render_scene(0, resolution_wh=(1920, 1080)).image.shape == (1080, 1920, 3)
    assert render_alternate(0, num_objects=4, resolution_wh=(300, 200)).resolution_wh == (300, 200)


def test_allow_overlap_overlaps_boxes_by_at_most_a_third() -> None:
    largest = 0.0
    for seed in range(30):
        items = render_scene(seed, num_objects=8, resolution_wh=(200, 200), allow_overlap=True).objects
        largest = max([largest, *(overlap(a.xyxy, b.xyxy) for a, b in combinations(items, 2))])
    assert 0.1 < largest <= 0.35


def test_invalid_arguments_raise() -> None:
    with pytest.raises(ValueError, match="style must be one of train, plain, got 'cubist'"):
        render_scene(0, style="cubist")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="names sets the number of objects"):
        render_scene(0, names=["dog"], num_objects=2)
    with pytest.raises(ValueError, match="do not fit"):
        render_scene(0, names=["dog"] * 60, resolution_wh=(64, 64))
    with pytest.raises(ValueError, match="has no color"):
        render_alternate(0, names=["circle"])


@pytest.mark.parametrize("seed", range(25))
def test_alternate_scenes_have_valid_boxes(seed: int) -> None:
    scene = render_alternate(seed)
    assert_valid(scene)
    assert 1 <= len(scene.objects) <= 7
    assert all(overlap(a.xyxy, b.xyxy) == 0 for a, b in combinations(scene.objects, 2))


# --- clips -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pan", [False, True])
def test_clip_objects_keep_their_track_ids(pan: bool) -> None:
    clip = render_clip(4, num_frames=80, pan=pan)
    assert len(clip) == 80
    assert len(clip.names) == 8
    assert len(clip.class_names) == 3
    previous: dict[int, Box] = {}
    for image, items in clip.frames():
        assert_valid(Scene(image, items))
        assert image.shape == (480, 640, 3)
        ids = [item.track_id for item in items]
        assert ids == sorted(set(ids))
        for item in items:
            assert item.name == clip.names[item.track_id - 1]
            assert 0 <= item.visible <= 1
            if item.track_id in previous:
                assert np.abs(np.subtract(item.xyxy, previous[item.track_id])).max() <= 16  # pixels between frames
        previous = {item.track_id: item.xyxy for item in items}


def test_clips_are_deterministic_and_allow_random_access() -> None:
    clip, again = render_clip(7, num_frames=12, pan=True), render_clip(7, num_frames=12, pan=True)
    for index, (image, items) in enumerate(clip):
        other, other_items = again.frame(index)
        assert np.array_equal(image, other)
        assert items == other_items
    assert not np.array_equal(clip.frame(0)[0], clip.frame(-1)[0])


def test_clip_objects_leave_return_and_occlude_each_other() -> None:
    clip = render_clip(0, num_frames=600, names=["red circle", "dog", "blue star", "cat", "bus", "green ring"])
    present = np.zeros((600, 7), bool)
    occluded = False
    for index, (_, items) in enumerate(clip):
        for item in items:
            present[index, item.track_id] = True
            inside = item.xyxy[0] > 0 and item.xyxy[1] > 0 and item.xyxy[2] < 640 and item.xyxy[3] < 480
            occluded |= inside and item.visible < 0.7
    assert occluded
    returns = [(np.diff(present[:, track].astype(int)) == 1).sum() for track in (3, 6)]
    assert min(returns) >= 1
    assert present[:, [1, 2, 4, 5]].all()


def test_visible_is_the_share_of_visible_pixels() -> None:
    clip = render_clip(2, num_frames=200, names=["red square"] * 3)
    partial = [item for _, items in clip for item in items if item.track_id == 3 and item.xyxy[0] == 0]
    assert any(0 < item.visible < 0.6 for item in partial)
    full = [item for _, items in clip for item in items if item.track_id == 3 and 0 < item.xyxy[0] < 400]
    assert all(item.visible == 1 for item in full)  # no object is in front of the last track


# --- import ----------------------------------------------------------------------------------------------------------


def test_import_loads_no_heavy_dependencies() -> None:
    code = (
        "import sys, moondream_cv.scenes as s; heavy = {'cv2', 'numpy', 'PIL', 'torch'} & set(sys.modules); "
        "assert not heavy, heavy; s.ICONS; assert 'cv2' not in sys.modules; assert set(s.__all__) <= set(dir(s))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=240)


def test_exported_names_resolve() -> None:
    for name in scenes.__all__:
        assert getattr(scenes, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        scenes.nothing  # noqa: B018
