"""Drawing of annotated images: sizes, positions and colors."""

from __future__ import annotations

import numpy as np
import pytest
import supervision as sv
from PIL import Image

from moondream_cv.cli.montage import Panel, make_montage
from moondream_cv.drawing import _place_label, annotate, class_color, with_text, wrap
from moondream_cv.fonts import load_font

pytestmark = pytest.mark.compat

GRAY = (90, 90, 90)


def found(*boxes: tuple[float, float, float, float], name: str = "thing") -> sv.Detections:
    count = len(boxes)
    return sv.Detections(
        xyxy=np.array(boxes, dtype=np.float32).reshape(-1, 4),
        confidence=np.full(count, 0.5, dtype=np.float32),
        class_id=np.arange(count),
        data={"class_name": np.array([name] * count, dtype=np.str_)},
    )


@pytest.mark.parametrize("size", [(1, 1), (20, 10), (200, 150), (1280, 720), (300, 2000)])
def test_annotate_keeps_the_input_image_and_the_size(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, GRAY)
    width, height = size
    boxes = [(0, 0, width, height), (width * 0.9, height * 0.9, width, height), (width / 2, height / 2) * 2]
    annotated = annotate(image, found(*boxes, name="a rather long name"))
    assert annotated.size == size
    assert annotated.mode == "RGB"
    assert np.array_equal(np.asarray(image), np.full((height, width, 3), GRAY, dtype=np.uint8))
    assert not np.array_equal(np.asarray(annotated), np.asarray(image))


def test_annotate_without_detections_returns_the_same_pixels() -> None:
    image = Image.new("RGB", (40, 30), GRAY)
    assert np.array_equal(np.asarray(annotate(image, found())), np.asarray(image))


def test_box_is_drawn_inside_its_edges_in_the_color_of_its_class() -> None:
    annotated = annotate(Image.new("RGB", (100, 80), GRAY), found((20, 30, 60, 70)))
    assert annotated.getpixel((20, 69)) == class_color(0)
    assert annotated.getpixel((59, 50)) == class_color(0)
    assert annotated.getpixel((60, 50)) == GRAY
    assert annotated.getpixel((40, 50)) == GRAY
    assert class_color(0) != class_color(1)


def test_gray_images_are_annotated_in_color() -> None:
    assert annotate(Image.new("L", (50, 50)), found((5, 20, 40, 45))).mode == "RGB"


def test_detections_without_names_and_scores_are_drawn() -> None:
    bare = sv.Detections(xyxy=np.array([[5, 5, 20, 20]], dtype=np.float32))
    assert annotate(Image.new("RGB", (50, 50)), bare).getpixel((5, 10)) == class_color(0)


@pytest.mark.parametrize("mark", [(0, 0, 30, 30), (170, 130, 200, 150), (0, 0, 200, 150), (100, 60, 100, 60)])
def test_labels_are_inside_the_frame(mark: tuple[float, float, float, float]) -> None:
    x0, y0, x1, y1 = _place_label(mark, (80, 15), [mark], [], (200, 150))
    assert 0 <= x0 < x1 < 200
    assert 0 <= y0 < y1 < 150


def test_labels_avoid_each_other() -> None:
    mark = (50.0, 50.0, 90.0, 90.0)
    first = _place_label(mark, (60, 15), [mark], [], (200, 150))
    second = _place_label(mark, (60, 15), [mark], [first], (200, 150))
    assert first[3] <= mark[1]
    assert second[1] >= mark[3]


def test_text_is_wrapped_below_the_image() -> None:
    image = Image.new("RGB", (200, 100), GRAY)
    one, many = with_text(image, ["short"]), with_text(image, ["a long answer " * 10])
    assert one.width == many.width == 200
    assert 100 < one.height < many.height
    assert one.getpixel((100, 50)) == GRAY


def test_wrap_splits_long_words() -> None:
    font = load_font(12)
    lines = wrap("a " + "x" * 100 + " b", font, 60)
    assert "".join(lines).replace(" ", "") == "a" + "x" * 100 + "b"
    assert all(font.getlength(line) <= 60 for line in lines)


def test_montage_of_any_number_of_panels() -> None:
    for count in (1, 2, 3):
        panels = [Panel(Image.new("RGB", (64, 48)), [[("asked", GRAY), ("said " * 30, GRAY)]])] * count
        assert make_montage("title", "subtitle", panels, panel_width=200).width == (248 if count == 1 else 472)
